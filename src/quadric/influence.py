r"""Influence: by how much the loss of a test example would rise if a training example had been left out.

Leaving out the training example z of n, whose loss has the gradient g at the trained parameters, moves these by
:math:`G^{-1} g / n` to first order: G is the curvature of the training loss. The loss of a test example follows with

.. math::
    \mathcal I(z_\text{test}, z) = \frac1n\, \nabla L(z_\text{test})^\top G^{-1}\, \nabla L(z), \qquad
    G = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top

which is positive for an example that helps, and negative for one that harms. The inverse meets the few test gradients;
those of the training examples pass by once and are not kept.

Cost: n + m + t gradients of single examples for t test examples, O(m²) for each parameter (O(dim²) for each gradient
where these are many, and O(block_size²) in blocks), and O(t) for each parameter and training example.

Papers: Koh and Liang, arXiv 1703.04730; Martens, arXiv 1412.1193, for the Fisher matrix in place of the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import RandomSampler

from quadric.matrix import PSDMatrix
from quadric.optimizer import is_number, require, whole
from quadric.pruning.evidence import Evidence, Given, gradient_evidence
from quadric.pruning.gradients import LossFunction, evaluating, example_gradients, examples_in, losses, mean_gradients
from quadric.pruning.memory import SPARE, Plan, available_bytes, plan_memory, size
from quadric.pruning.progress import Watch, watcher
from quadric.pruning.weights import Weights, refuse_unfit
from quadric.tiles import Tiles, wide

__all__ = ["influence"]

TOGETHER = 256  # examples whose gradients are formed or multiplied at a time
SLAB = 2**27  # bytes of gradients or solutions that are worked on at a time


def influence(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    loss_fn: LossFunction,
    curvature: Literal["fisher"] | PSDMatrix = "fisher",
    fisher_loss_fn: LossFunction | None = None,
    params: Iterable[nn.Parameter] | None = None,
    num_grads: int | None = None,
    block_size: int | None = None,
    damping: float = 1e-5,
    shrinkage: float = 0.0,
    progress: bool | Watch = False,
) -> Tensor:
    r"""Predict the rise of each test example's loss if a training example is left out, ``(test, training)``.

    .. math::
        \frac1n\, \nabla L(z_\text{test})^\top \Big(\lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top\Big)^{-1}
        \nabla L(z_\text{train})

    to first order at the parameters as they are: they should be at a minimum of the mean training loss plus
    :math:`\frac\lambda2 \lVert w \rVert^2`.

    Cost: a gradient of each example, twice for training examples of which the curvature is made; then O(num_grads²) a
    parameter. Memory: ``num_grads`` gradients, or dim² doubles where these are many; and a gradient of each test
    example.

    Args:
        model: Any model; it is run in evaluation mode and left as it was.
        train: The n examples of the training loss, in an order that stays: one batch (a tensor, a dictionary, or a
            tuple with a tensor in it) or any other iterable of batches. The first axis of all tensors is the examples.
        test: Other examples, in the same form.
        loss_fn: ``loss_fn(model, batch)`` → the mean loss of the batch, without any L2 term; here of a batch of one.
        curvature: ``"fisher"`` as above, or G itself with its damping: a matrix over ``params``, for instance
            ``quadric.Dense(hessian, damping)``.
        fisher_loss_fn: A loss for the :math:`g_i` alone. None takes ``loss_fn``, for the empirical Fisher matrix; at
            labels sampled from the model, :func:`quadric.sampled_loss`, G is the true one, which resembles the Hessian
            more.
        params: Parameters of the model that would move; None takes all that ask for gradients, biases too.
        num_grads: m, gradients of examples drawn from ``train``, of all of them before any comes again; None takes one
            of each.
        block_size: Keep only blocks of G of so many consecutive parameters.
        damping: λ, positive; if the training loss has an L2 term :math:`\frac\lambda2 \lVert w \rVert^2`, its λ.
        shrinkage: s, from 0 to 1: entries of G off the diagonal are multiplied by 1 − s.
        progress: True prints a plan and a bar to stderr; a function is called with what is done and the share finished.

    Raises:
        ValueError: if an argument is out of range, the examples cannot be told apart, the loss or a gradient is not
            finite, or the gradients do not fit into memory.

    Example:
        The mean of 0 and 2 is 1, with the losses (w − y)²/2, gradients 1 and −1, and G = 1. At the test example 3 the
        gradient is −2: without the 0 the loss falls, without the 2 it rises.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> def loss_fn(model, y):
        ...     return (model(torch.ones_like(y)) - y).square().mean() / 2
        >>> influence(model, torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0]]), loss_fn=loss_fn).round(decimals=3)
        tensor([[-1.,  1.]])

    Paper: Koh and Liang, arXiv 1703.04730.
    """
    _check(curvature, num_grads, block_size, damping, shrinkage)
    weights = _find_params(model, params)
    training, testing = _Examples.of(train, "train"), _Examples.of(test, "test")
    matrix = curvature if isinstance(curvature, PSDMatrix) else None
    if matrix is not None and matrix.dim != weights.dim:
        raise ValueError(
            f"the matrix has {matrix.dim} coordinates and the parameters {weights.dim}: flatten "
            f"{', '.join(weights.names[:3])}… in this order"
        )
    plan = _plan(weights, num_grads or training.count, block_size) if matrix is None else None
    device = matrix.device if matrix is not None else plan.device if plan else weights.params[0].device
    _refuse_too_many(testing.count, training.count, weights.dim, device, plan, block_size)
    watch = watcher(progress)
    source = _Source(model, weights, device, watch, testing.count + training.count + (plan.gradients if plan else 0))
    fisher_loss_fn = fisher_loss_fn or loss_fn
    with evaluating(model, weights.params):
        source.try_out({"test": (loss_fn, testing), "train": (loss_fn, training), "fisher": (fisher_loss_fn, training)})
        if plan is not None:
            watch(str(plan), 0.0)
            evidence = gradient_evidence(plan, weights.dim, block_size, damping, shrinkage)
            for rows in source.gradients("fisher", _drawn(training.count, plan.gradients)):
                for row in rows:
                    evidence.add(row)
        else:
            assert matrix is not None
            evidence = Given(Tiles([weights.dim], weights.dim), matrix)
        wanted = torch.cat([rows.to(wide(rows)) for rows in source.gradients("test")])
        wanted = _solved(evidence, wanted)
        found, seen = wanted.new_empty(testing.count, training.count), 0
        for rows in source.gradients("train"):
            found[:, seen : seen + len(rows)] = wanted @ rows.to(wanted.dtype).mT / training.count
            seen += len(rows)
    watch("done", 1.0)
    like = weights.params[0]
    return found.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _check(curvature: object, num_grads: int | None, block_size: int | None, damping: float, shrinkage: float) -> None:
    require(
        curvature == "fisher" if isinstance(curvature, str) else isinstance(curvature, PSDMatrix),
        "curvature",
        repr(curvature) if isinstance(curvature, str) else type(curvature).__name__,
        "curvature is 'fisher' or a matrix",
        "quadric.Dense(hessian, damping) makes one of a tensor",
    )
    for name, value in (("num_grads", num_grads), ("block_size", block_size)):
        if value is not None:
            whole(name, value, 1, "None takes all")
    part = is_number(shrinkage) and 0 <= shrinkage <= 1
    require(part, "shrinkage", repr(shrinkage), "0 ≤ shrinkage ≤ 1", "0.0 takes the matrix as it is")
    positive = is_number(damping) and 0 < damping < math.inf
    require(positive, "damping", repr(damping), "0 < damping < ∞", "take the λ of the L2 term")


def _find_params(model: nn.Module, params: Iterable[nn.Parameter] | None) -> Weights:
    names = {id(p): name for name, p in model.named_parameters()}
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    found = {}
    for p in [params] if isinstance(params, Tensor) else params:
        name = names.get(id(p))
        if name is None:
            told = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)
            raise ValueError(
                f"params holds {told}, no parameter of {type(model).__name__}: pass some of its parameters"
            )
        refuse_unfit(name, p)
        found[name] = (p, model.get_submodule(name.rpartition(".")[0]))
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter that asks for a gradient: pass params")
    return Weights(found, {})


@dataclass(frozen=True)
class _Examples:
    """Batches that can be walked through again and again.

    Args:
        batches: The batches.
        lengths: Examples in each.
    """

    batches: Iterable[Any]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, given: Any, name: str) -> _Examples:
        """What a user has passed.

        Raises:
            ValueError: if the examples cannot be counted, or would come in another order the next time.
        """
        whole = isinstance(given, (Tensor, Mapping)) or (
            isinstance(given, tuple) and any(isinstance(part, Tensor) for part in given)
        )
        batches = [given] if whole else given
        if iter(batches) is batches:
            raise ValueError(
                f"{name} is {type(given).__name__}, which ends after one pass: pass a list or a DataLoader"
            )
        if isinstance(getattr(batches, "sampler", None), RandomSampler):
            raise ValueError(
                f"{name} shuffles, so that no example keeps its place: make the DataLoader with shuffle=False"
            )
        lengths = []
        for number, batch in enumerate(batches):
            count, shapes = examples_in(batch)
            if not count:
                raise ValueError(
                    f"batch {number} of {name} has {shapes}: pass batches whose tensors have the examples as first axis"
                )
            lengths.append(count)
        if not lengths:
            raise ValueError(f"{name} is empty: pass at least one example")
        return cls(batches, tuple(lengths))

    @property
    def count(self) -> int:
        """Examples."""
        return sum(self.lengths)

    def taken(self, times: Tensor, most: int) -> Iterator[Any]:
        """Batches of at most so many examples, each example as often as ``times`` says."""
        for batch, counts in zip(self.batches, times.split(self.lengths), strict=True):
            places = torch.arange(len(counts)).repeat_interleave(counts)
            for rows in places.split(most) if len(places) else ():
                yield tree_map(lambda x, rows=rows: x[rows.to(x.device)] if isinstance(x, Tensor) else x, batch)

    def first(self) -> Iterator[Any]:
        """The first example, a batch of one."""
        batch = next(iter(self.batches))
        yield tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, batch)


class _Source:
    """Flat gradients of single examples, and how far their work has come."""

    def __init__(self, model: nn.Module, weights: Weights, device: torch.device, watch: Watch, total: int):
        self.model, self.weights, self.device, self.watch = model, weights, device, watch
        self.total, self.done = total, 0
        self.parts: dict[str, tuple[LossFunction, _Examples, bool]] = {}

    def try_out(self, parts: dict[str, tuple[LossFunction, _Examples]]) -> None:
        """Run each loss on its first example, and see whether ``torch.func`` can take many at a time."""
        for name, (loss_fn, examples) in parts.items():
            for _ in losses(self.model, loss_fn, examples.first()):
                pass
            mapped = max(examples.lengths) > 1
            if mapped:
                try:
                    list(example_gradients(self.model, loss_fn, examples.first(), self.weights.params))
                except RuntimeError:  # one at a time then; what is wrong with the loss itself was told above
                    mapped = False
            self.parts[name] = loss_fn, examples, mapped

    def gradients(self, name: str, times: Tensor | None = None) -> Iterator[Tensor]:
        """The gradients ``(some, dim)`` of one part in order, each as often as ``times`` says.

        Raises:
            ValueError: if one is not finite.
        """
        loss_fn, examples, mapped = self.parts[name]
        times = torch.ones(examples.count, dtype=torch.long) if times is None else times
        places = torch.arange(examples.count).repeat_interleave(times).tolist()
        batches = examples.taken(times, TOGETHER if mapped else 1)
        find = example_gradients if mapped else mean_gradients
        found = find(self.model, loss_fn, batches, self.weights.params)
        flat = (self.weights.flatten(gradient, self.device) for gradient in found)
        some, seen = _together(self.weights.dim), 0
        while group := list(islice(flat, some)):
            rows = torch.stack(group)
            bad = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
            if bad:
                place, what = places[seen + bad[0]], "test" if name == "test" else "train"
                raise ValueError(
                    f"the gradient of example {place} of {what} is not finite: leave that example out, or mend its data"
                )
            seen, self.done = seen + len(rows), self.done + len(rows)
            yield rows
            self.watch(f"gradients, {name}", min(0.99, self.done / self.total))


def _together(dim: int) -> int:
    """Vectors that are worked on at a time."""
    return max(1, min(TOGETHER, SLAB // (8 * dim)))


def _drawn(count: int, wanted: int) -> Tensor:
    """How often each of ``count`` examples is taken, ``wanted`` in all; always the same."""
    times = torch.full((count,), wanted // count)
    times[torch.randperm(count, generator=torch.Generator().manual_seed(0))[: wanted % count]] += 1
    return times


def _plan(weights: Weights, gradients: int, block_size: int | None) -> Plan:
    """How to keep the gradients of the curvature; sums of their outer products where these are smaller."""
    size = min(block_size or weights.dim, weights.dim)
    return plan_memory(weights.dim, gradients, size, weights.dtype, None, weights.params[0].device)


def _refuse_too_many(
    tests: int, count: int, dim: int, device: torch.device, plan: Plan | None, block_size: int | None
) -> None:
    there = available_bytes(device)
    if there is None:
        return
    room = int(SPARE * there)
    if plan is not None:
        room -= plan.window_bytes + plan.work_bytes
        if not plan.by_block:  # products of the gradients with one another, and their factors
            room -= 32 * min(plan.gradients, block_size or dim, dim) ** 2
    each = 24 * dim + 8 * count  # a gradient with a padded copy and its solution, and a row of the answer
    if tests * each > room:
        beside = f", beside {plan}" if plan else f" of {size(there)} available"
        remedy = f"pass at most {room // each} test examples at a time" if room >= each else "set a lower num_grads"
        raise ValueError(
            f"memory: {tests:,} test gradients of {dim:,} parameters and {count:,} numbers for each: "
            f"{size(tests * each)}{beside}: that does not fit; {remedy}"
        )


def _solved(evidence: Evidence, vectors: Tensor) -> Tensor:
    """The inverse times each of the vectors ``(n, dim)``."""
    padded = evidence.tiles.pad(vectors)
    for section in evidence.sections():
        for some in padded[:, section.columns].split(_together(evidence.tiles.dim)):
            some.copy_(section.matrix.solve(some / section.scale) / section.scale)
    return evidence.tiles.unpad(padded)
