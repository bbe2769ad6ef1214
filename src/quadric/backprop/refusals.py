"""What the walk refuses, each in one sentence that ends with the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadric.backprop.fallbacks import FALLBACKS
from quadric.backprop.registry import UnsupportedOperation

__all__ = ["HIDING", "check_finite", "check_loss", "check_targets", "unsupported"]

TORCH = str(Path(torch.__file__).parent)  # whose lines tell a user nothing
HIDING = {"CheckpointFunctionBackward"}  # nodes whose parameters are not in the graph
REMEDIES = {
    "CheckpointFunctionBackward": "reentrant checkpointing hides its graph: use torch.utils.checkpoint with "
    "use_reentrant=False",
    "CompiledFunctionBackward": "a compiled model is one opaque node: take h from the eager model, which shares its "
    'parameters, and compile the rest, or pass fallback="gauss_newton" or "zero"',
    "CudnnRnnBackward0": "a fused kernel hides the graph of this RNN: run the forward pass under "
    "torch.backends.cudnn.flags(enabled=False)",
}


def check_loss(loss: Tensor, fallback: str | None, dtype: torch.dtype | None) -> None:
    """Refuse a loss that has no Hessian diagonal to carry.

    Raises:
        ValueError: if it is not a real scalar with a graph, or an option is unknown.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a scalar, got {found}: reduce it with .mean() or .sum()")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"the loss must be a real number, got {loss.dtype}: take its real part or its absolute value")
    if not loss.requires_grad:
        raise ValueError("the loss has no graph, got a constant: compute it from parameters that require gradients")
    if fallback is not None and fallback not in FALLBACKS:
        raise ValueError(f"fallback must be None or one of {', '.join(FALLBACKS)}, got {fallback!r}: None raises")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}: torch.bfloat16 saves time and memory")


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that has no derivatives.

    Raises:
        ValueError: if it is not finite.
    """
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"the loss is {loss.item():g}: skip this batch, or look for the overflow")


def check_targets(params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """The tensors whose h is wanted, as a list.

    Raises:
        ValueError: if there is none, or one of them is not a real tensor that requires gradients.
    """
    targets = [params] if isinstance(params, Tensor) else list(params)
    for place, target in enumerate(targets):
        if not isinstance(target, Tensor) or not target.requires_grad:
            what = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"parameter {place} ({what}) does not require gradients: leave it out or call requires_grad_()"
            )
        if target.is_complex():
            raise ValueError(f"parameter {place} is complex, {target.dtype}: use torch.view_as_real")
    if not targets:
        raise ValueError("params is empty, got no tensor: pass list(model.parameters())")
    return targets


def unsupported(node: Any, targets: Sequence[Tensor], remedy: str | None = None) -> UnsupportedOperation:
    """The error for a node without a rule: its name, the parameters nearest to it, its source line, the remedy."""
    name = node.name()
    places = {id(target): place for place, target in enumerate(targets)}
    near = [f"{places.get(id(leaf), 'not asked for')} of shape {tuple(leaf.shape)}" for leaf in nearest(node)]
    trace = node.metadata.get("traceback_")
    own = [entry for entry in trace or [] if TORCH not in entry.partition("\n")[0]] or trace
    where = "" if not own else " at " + own[-1].strip().replace("\n", ": ")
    hint = "" if trace else "; torch.autograd.detect_anomaly() around the forward pass shows its source line"
    remedy = remedy or REMEDIES.get(
        name,
        f"give a rule with quadric.register_rule({name!r}, rule), give a custom Function a static method "
        'hessian_diagonal(ctx, g, h), or pass hessian_diagonal fallback="gauss_newton" or "zero"',
    )
    return UnsupportedOperation(
        f"there is no rule for the Hessian diagonal through {name}{where} (nearest parameters: "
        f"{', '.join(near) or 'none'}{hint}): {remedy}"
    )


def nearest(node: Any) -> list[Tensor]:
    """Up to three leaves that a node is computed from, by the fewest steps."""
    found, seen, waiting = [], {node}, [node]
    for here in waiting:  # grows as it is read
        if hasattr(here, "variable"):
            found.append(here.variable)
        fresh = [below for below, _ in here.next_functions if below is not None and below not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return found[:3]
