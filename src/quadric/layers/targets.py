"""Targets: which weights of a model somebody is to work on, by name or by type of module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Choice", "Target", "find_targets"]

Choice = str | type[nn.Module] | Sequence[str | type[nn.Module]] | None

# Why the inputs of these are not rows that a matrix multiplies, or not to be had.
LEFT_ALONE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "its inputs are one-hot: aᵀa is diagonal, the counts of the tokens"),
    ((nn.RNNBase, nn.RNNCellBase), "its products are inside a fused kernel"),
    (nn.Bilinear, "it multiplies two inputs at once"),
    (nn.LayerNorm, "it scales and does not mix"),
)
IGNORED = "ignore names it"
MIXING = (nn.Linear, _ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class Target:
    """A weight.

    Args:
        name: Of the weight in the model, such as ``blocks.0.attn.in_proj_weight``.
        module: Whose forward multiplies by it.
        path: Of the weight from that module.
        reason: Why it is left alone; empty where it is not.
    """

    name: str
    module: nn.Module
    path: str
    reason: str = ""


def not_conditioned(module: nn.Module, by_default: bool) -> str:
    """Why the weights of a module cannot be conditioned by its inputs, or not by default; empty where they can."""
    for kinds, reason in LEFT_ALONE:
        if isinstance(module, kinds):
            return reason
    if by_default and not isinstance(module, MIXING):
        return f"{type(module).__name__} is no layer of torch: name it in targets if it calls F.linear or a convolution"
    return ""


def find_targets(
    model: nn.Module,
    targets: Choice,
    ignore: Choice,
    judge: Callable[[nn.Module, bool], str] = not_conditioned,
) -> list[Target]:
    """Every weight of a model that has two axes or more, each with the reason why it is left alone if it is.

    Args:
        model: The model.
        targets: Patterns of names (``fnmatch``) of weights or of modules around them, or types of modules, to take;
            None takes all that ``judge`` lets pass by default.
        ignore: The same, to leave alone.
        judge: Says of a module, and whether it was not asked for but taken by default, why it is left alone.

    Raises:
        ValueError: if a pattern or type matches nothing.
    """
    chosen, ignored = _choices("targets", targets), _choices("ignore", ignore)
    used: set[str | type[nn.Module]] = set()
    found, seen = [], set()
    for prefix, module in model.named_modules():
        for path in _weights(module):
            name = f"{prefix}.{path}".removeprefix(".")
            if name in seen:  # the output projection belongs to its attention
                continue
            seen.add(name)
            owners = (module, *module.children()) if path.startswith("out_proj.") else (module,)
            wanted = [choice for choice in chosen if _matches(choice, owners, name)]
            unwanted = [choice for choice in ignored if _matches(choice, owners, name)]
            used.update(wanted, unwanted)
            if unwanted:
                reason = IGNORED
            elif not wanted and targets is not None:
                reason = "targets does not name it"
            else:
                reason = judge(module, targets is None)
            found.append(Target(name, module, path, reason))
    for choice in (*chosen, *ignored):
        if choice not in used:
            shown = ", ".join(target.name for target in found[:3]) or "none at all"
            raise ValueError(
                f"{_shown(choice)} matches no weight of this model: choose among its weights, such as {shown}"
            )
    return found


def _weights(module: nn.Module) -> Iterable[str]:
    # The attributes of a module that hold matrices; a parametrised weight is one, though it is no parameter.
    if isinstance(module, nn.MultiheadAttention):
        own = [name for name, p in module._parameters.items() if p is not None and name.endswith("proj_weight")]
        return [*own, "out_proj.weight"]
    if isinstance(module, (nn.Linear, _ConvNd)):
        return ["weight"]
    return [name for name, p in module._parameters.items() if p is not None and p.ndim >= 2]


def _choices(option: str, given: Any) -> tuple[str | type[nn.Module], ...]:
    several = isinstance(given, Iterable) and not isinstance(given, (str, type, nn.Module))
    choices: tuple = () if given is None else tuple(given) if several else (given,)
    for choice in choices:
        if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
            raise ValueError(
                f"{option} holds {choice!r}: give patterns of names such as 'blocks.*', or types of modules"
            )
    return choices


def _matches(choice: str | type[nn.Module], owners: Sequence[nn.Module], name: str) -> bool:
    # A pattern may name the weight, its module, or any module around it.
    if isinstance(choice, str):
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[: i + 1]), choice) for i in range(len(parts)))
    return any(isinstance(owner, choice) for owner in owners)


def _shown(choice: str | type[nn.Module]) -> str:
    return repr(choice) if isinstance(choice, str) else choice.__name__
