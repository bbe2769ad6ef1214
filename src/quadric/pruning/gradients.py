"""Gradients of a loss at fixed weights, in evaluation mode: of mini-batches, or of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from quadric.distributed import alone
from quadric.layers.intercept import left_to_torch

__all__ = ["LossFunction", "evaluating", "example_gradients", "examples_in", "losses", "mean_gradients"]

LossFunction = Callable[[Any, Any], Tensor]
CHUNK = 2**27  # bytes of gradients of single examples that are formed at a time


@contextmanager
def evaluating(model: nn.Module, params: Sequence[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode and the parameters asking for gradients, as long as the block lasts.

    Raises:
        RuntimeError: if there can be none, in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradients are needed and inference mode is on: leave torch.inference_mode() before")
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in params if not p.requires_grad]
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        # What conditions gradients for an optimizer says nothing about the loss.
        with torch.enable_grad(), left_to_torch(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p in frozen:
            p.requires_grad_(False)


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches again and again, as long as they can be walked through anew.

    Raises:
        ValueError: if there are none, or no more.
    """
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            yield batch
        if seen == before:
            what = f"batches ended after {seen} and cannot start again" if seen else "batches is empty"
            raise ValueError(f"{what}: pass a list or a DataLoader")


def losses(model: nn.Module, loss_fn: LossFunction, batches: Iterator[Any]) -> Iterator[Tensor]:
    """The loss of each batch, with its graph.

    Raises:
        ValueError: if it is not a finite scalar that depends on the parameters.
    """
    for number, batch in enumerate(batches):
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            told = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn returned {told}: return the mean loss of the batch, a scalar")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the parameters: compute it from model(inputs), with gradients"
            )
        if alone() and not bool(torch.isfinite(loss)):  # else all processes see it in the average of their gradients
            raise ValueError(f"the loss of batch {number} is {loss.item()}: leave that batch out, or mend its data")
        yield loss


def mean_gradients(
    model: nn.Module, loss_fn: LossFunction, batches: Iterator[Any], params: Sequence[nn.Parameter]
) -> Iterator[list[Tensor]]:
    """The gradient of the mean loss of each batch, one tensor for each parameter; zeros where it has no part in it."""
    for loss in losses(model, loss_fn, batches):
        with torch.autocast(loss.device.type, enabled=False):  # of the caller: it is for the forward pass
            found = torch.autograd.grad(loss, params, allow_unused=True)
        yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]


def example_gradients(
    model: nn.Module, loss_fn: LossFunction, batches: Iterator[Any], params: Sequence[nn.Parameter]
) -> Iterator[list[Tensor]]:
    """The gradient of the loss of each single example, by ``torch.func.vmap``.

    Every tensor of a batch holds one example for each index of its first axis.

    Raises:
        ValueError: if the tensors of a batch have no first axis in common.
        RuntimeError: if ``torch.func`` cannot map the loss over the examples.
    """
    whole = _Loss(model, loss_fn)
    names = {id(p): name for name, p in whole.named_parameters()}
    given = {names[id(p)]: p.detach() for p in params}

    def loss_of(values: dict[str, Tensor], example: Any) -> Tensor:
        return functional_call(whole, values, (example,)).reshape(())

    some = max(1, CHUNK // (4 * sum(p.numel() for p in params)))
    for batch in batches:
        count, shapes = examples_in(batch)
        if not count:
            raise ValueError(
                f"per_example takes batches of tensors with one first axis, got {shapes}: set per_example=False"
            )
        next(losses(model, loss_fn, iter([_rows(batch, slice(0, 1), drop=True)])))  # what is wrong with it is said here
        for start in range(0, count, some):
            part = _rows(batch, slice(start, start + some))
            mapped_axes = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, part)
            try:
                found = vmap(grad(loss_of), in_dims=(None, mapped_axes), randomness="different")(given, part)
            except (RuntimeError, ValueError) as error:
                told = " ".join(str(error).split())[:300]
                raise RuntimeError(
                    f"torch.func cannot map this loss over examples ({told}): set per_example=False and pass batches "
                    "of one example"
                ) from error
            # A batch of one example again, because that is what loss_fn knows.
            rows = zip(*(found[names[id(p)]] for p in params), strict=True)
            yield from (list(row) for row in rows)


def examples_in(batch: Any) -> tuple[int, str]:
    """How many examples the tensors of a batch have as their first axis, 0 if not all as many; and their shapes."""
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
    counts = {len(x) if x.ndim else 0 for x in tensors}
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "no tensor"
    return counts.pop() if len(counts) == 1 else 0, shapes


def _rows(batch: Any, rows: slice, drop: bool = False) -> Any:
    """Some examples of a batch, each a batch of one behind an axis to map over; with ``drop``, as a batch."""
    return tree_map(lambda x: (x[rows] if drop else x[rows].unsqueeze(1)) if isinstance(x, Tensor) else x, batch)


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` reaches the model wherever ``loss_fn`` calls it."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)
