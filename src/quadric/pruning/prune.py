r"""Prune: remove the weights whose loss costs least, by the curvature of the loss, and let the others answer."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadric.backprop.walk import hessian_diagonal
from quadric.distributed import alone, average_
from quadric.layers.targets import Choice
from quadric.matrix import PSDMatrix, positive_damping
from quadric.optimizer import require
from quadric.pruning.evidence import Evidence, Given, GradientBlocks, GradientRows, on_the_diagonal
from quadric.pruning.export import export
from quadric.pruning.gradients import (
    LossFunction,
    endless,
    evaluating,
    example_gradients,
    losses,
    mean_gradients,
)
from quadric.pruning.masks import Masks
from quadric.pruning.memory import Plan, plan_memory
from quadric.pruning.patterns import Pattern, Scope, find_pattern
from quadric.pruning.surgery import Update, remove_, unit_costs
from quadric.pruning.weights import Weights
from quadric.tiles import Tiles, wide

__all__ = ["PruneResult", "PrunedLayer", "prune"]

CurvatureName = Literal["fisher", "hessian_diagonal", "magnitude"]
Watch = Callable[[str, float], object]


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned parameter.

    Args:
        name: As in ``model.named_parameters()``.
        shape: Its shape.
        weights: Numbers in it.
        removed: How many of them are zero for good.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    removed: int

    @property
    def sparsity(self) -> float:
        """The share that is removed."""
        return self.removed / self.weights


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What :func:`prune` has done; it prints as a table.

    Args:
        masks: By name of each pruned parameter, True where a weight is kept; :func:`quadric.hold_masks` takes them.
        layers: The pruned parameters, in the model's order.
        left_alone: Names of other weights, each with the reason.
        loss_increase: The rise of the loss that the curvature predicts, in units of the loss.
        memory: How gradients were kept; None where there were none.
        model: The model, pruned in place.
    """

    masks: Masks
    layers: tuple[PrunedLayer, ...]
    left_alone: dict[str, str]
    loss_increase: float
    memory: Plan | None
    model: nn.Module = field(compare=False)

    @property
    def sparsity(self) -> float:
        """The share of all numbers in the pruned parameters that is removed."""
        return sum(layer.removed for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def compact(self) -> nn.Module:
        """A smaller dense copy of the model, without the channels that are zero; warns of those that it cannot cut out.

        Raises:
            ValueError: if no channel can be cut out; the reasons are listed.
        """
        from quadric.pruning.compact import compact

        smaller, notes = compact(self.model, self.masks)
        if notes:
            warnings.warn("; ".join(notes), stacklevel=2)
        return smaller

    def export(self, layout: Literal["dense", "csr", "2:4"] = "dense") -> dict[str, Tensor]:
        """The state of the model with its pruned weights in a layout: see :func:`quadric.pruning.export.export`.

        Args:
            layout: ``"dense"``, ``"csr"`` or ``"2:4"``.
        """
        return export(self.model, self.masks, layout)

    def __str__(self) -> str:
        rows = [("", "shape", "weights", "removed", "sparsity")]
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            rows.append(
                (layer.name, shape, f"{layer.weights:,}", f"{layer.removed:,}", f"{100 * layer.sparsity:.1f} %")
            )
        weights, removed = (sum(getattr(layer, key) for layer in self.layers) for key in ("weights", "removed"))
        rows.append(("all", "", f"{weights:,}", f"{removed:,}", f"{100 * self.sparsity:.2f} %"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.left_alone.items()]
        return "\n".join([*lines, f"predicted rise of the loss: {self.loss_increase:.3g}"])

    __repr__ = __str__


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    curvature: CurvatureName | PSDMatrix = "fisher",
    num_grads: int = 256,
    block_size: int | None = None,
    damping: float = 1e-5,
    rounds: int = 1,
    parts: int = 1,
    shrinkage: float = 0.0,
    per_example: bool = False,
    window_dtype: torch.dtype | None = None,
    pattern: str = "unstructured",
    scope: Scope = "global",
    update: Update = "joint",
    targets: Choice = None,
    ignore: Choice = None,
    masks: Mapping[str, Tensor] | None = None,
    progress: bool | Watch = False,
) -> PruneResult:
    r"""Remove the weights that cost the loss least, and move the others to make up for them, in place.

    With :math:`G = \lambda I + \frac1m \sum g_i g_i^\top` from m gradients, removing the weight i alone costs
    :math:`w_i^2 / (2 [G^{-1}]_{ii})`; the cheapest set Q goes, and the kept set S answers at once:

    .. math::
        \delta_Q = -w_Q, \qquad \delta_S = G_S^\top (m\lambda I + G_S G_S^\top)^{-1} G_Q w_Q .

    Cost: ``num_grads`` gradients a round; then O(m²) a weight, or O(block_size²) where blocks are smaller, a part.
    Memory: ``num_grads`` numbers a weight (in bfloat16 where float32 does not fit), or ``block_size`` doubles.

    Args:
        model: Any model; it is run in evaluation mode and its weights are changed. Modes, gradients and everything else
            are left as they are, and on any error the weights are as before.
        sparsity: Share of the weights that is zero at the end, 0 ≤ sparsity < 1.
        batches: Training data, run through again and again; :math:`g_i` is the gradient of one batch.
        loss_fn: ``loss_fn(model, batch)`` → the mean loss of the batch. At labels sampled from the model,
            :func:`quadric.sampled_loss`, G is the true Fisher matrix.
        curvature: ``"fisher"`` as above; ``"hessian_diagonal"``, optimal brain damage with :math:`|h| + \lambda`;
            ``"magnitude"``, the identity, which needs no data; or any matrix over the weights in the model's order.
        num_grads: m, gradients a round (batches, where the curvature is the Hessian diagonal).
        block_size: Keep only blocks of G of so many consecutive weights; 128 is good for one-shot pruning.
        damping: λ, positive.
        rounds: Times that new gradients are taken, with the density shrinking geometrically from round to round.
        parts: Times a round that weights are chosen and removed with the same gradients, so that a choice knows what
            went before.
        shrinkage: s, from 0 to 1: entries of G off the diagonal are multiplied by 1 − s.
        per_example: Take the gradient of each example of a batch.
        window_dtype: Type to keep gradients in.
        pattern: ``"unstructured"``; ``"N:M"``, at most N of M consecutive inputs stay; ``"block:RxC"`` of the weight
            seen as a matrix of outputs × the rest; ``"channel"``, outputs of layers with their biases and batch norms,
            together those of layers that are added up, and heads of ``nn.MultiheadAttention``.
        scope: ``"global"`` ranks all weights together; ``"layer"`` gives each parameter the same sparsity.
        update: ``"joint"``, the exact answer above; ``"single"``, the paper's sum of the answers to each weight alone;
            ``"none"``.
        targets: Patterns of names (``fnmatch``) of weights or modules, or types of modules; None takes linear,
            convolutional, attention, recurrent and bilinear layers.
        ignore: The same, to leave alone.
        masks: Weights that are removed already and stay so, by name; they count.
        progress: True prints a plan and a bar to stderr; a function is called with what is done and the share finished.

    Raises:
        ValueError: if an argument is out of range, the loss or a gradient is not finite, or the gradients do not fit
            into memory.

    Example:
        Two weights and the loss (w₁ + w₂ − 2)²/2 at its minimum (1.5, 0.5): to remove the smaller one costs nothing if
        the other goes to 2, and that is what the curvature [[1, 1], [1, 1]] says.

        >>> from quadric import LowRank
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.5, 0.5]]))
        >>> result = prune(model, 0.5, curvature=LowRank(torch.ones(1, 2), damping=1e-6))
        >>> model.weight.detach().round(decimals=3)
        tensor([[2., 0.]])
        >>> result.sparsity
        0.5

    Papers: Frantar, Kurtic and Alistarh, arXiv 2107.03356; Kurtic et al., arXiv 2203.07259; Hassibi and Stork, 1992.
    """
    request = _Request(
        curvature, num_grads, block_size, positive_damping(damping), rounds, parts, shrinkage, per_example,
        window_dtype, update,
    )  # fmt: skip
    _check(sparsity, scope, request, batches, loss_fn)
    weights, found = find_pattern(pattern, scope, sparsity, model, targets, ignore)
    watch = progress if callable(progress) else _Bar() if progress else lambda what, share: None
    operation = _Operation(weights, found, request, masks or {}, sparsity, watch)
    before = [p.detach().clone() for p in weights.params]
    try:
        with evaluating(model, weights.params):
            operation.run(model, loss_fn, endless(batches) if batches is not None else iter(()))
    except BaseException:
        with torch.no_grad():
            for p, values in zip(weights.params, before, strict=True):
                p.copy_(values)
        raise
    watch(f"pruned to {100 * sparsity:g} %", 1.0)
    kept = weights.split(operation.kept)
    return PruneResult(
        masks=Masks.of(
            model, {n: mask.to(p.device) for n, mask, p in zip(weights.names, kept, weights.params, strict=True)}
        ),
        layers=tuple(
            PrunedLayer(name, tuple(mask.shape), mask.numel(), mask.numel() - int(mask.sum()))
            for name, mask in zip(weights.names, kept, strict=True)
        ),
        left_alone=weights.left_alone,
        loss_increase=operation.rise,
        memory=operation.plan,
        model=model,
    )


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`prune` that say how."""

    curvature: CurvatureName | PSDMatrix
    num_grads: int
    block_size: int | None
    damping: float
    rounds: int
    parts: int
    shrinkage: float
    per_example: bool
    window_dtype: torch.dtype | None
    update: Update

    @property
    def needs_data(self) -> bool:
        return self.curvature in ("fisher", "hessian_diagonal")


def _check(
    sparsity: float, scope: str, request: _Request, batches: Iterable[Any] | None, loss_fn: LossFunction | None
) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    require(number and 0 <= sparsity < 1, "sparsity", sparsity, "0 ≤ sparsity < 1", "0.9 removes nine weights of ten")
    for name, usual in (("num_grads", 256), ("rounds", 4), ("parts", 4)):
        value = getattr(request, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(whole, name, value, f"{name} ≥ 1, an integer", f"{usual} is usual")
    size = request.block_size
    require(
        size is None or (isinstance(size, int) and size >= 1),
        "block_size",
        size,
        "block_size ≥ 1 or None",
        "128 is usual",
    )
    s = request.shrinkage
    require(0 <= s <= 1, "shrinkage", s, "0 ≤ shrinkage ≤ 1", "0.0 is the paper's, 0.1 a start")
    dtype = request.window_dtype
    require(
        dtype is None or dtype.is_floating_point,
        "window_dtype",
        dtype,
        "a floating-point type or None",
        "torch.bfloat16 halves the memory",
    )
    for name, value, allowed in (
        ("curvature", request.curvature, ("fisher", "hessian_diagonal", "magnitude")),
        ("scope", scope, ("global", "layer")),
        ("update", request.update, ("joint", "single", "none")),
    ):
        if not isinstance(value, PSDMatrix):
            require(value in allowed, name, repr(value), f"{name} in {', '.join(allowed)}", "choose one of these")
    if request.needs_data and (batches is None or loss_fn is None):
        raise ValueError(
            f"curvature {request.curvature!r} needs data, and batches is {batches!r:.40}, loss_fn {loss_fn!r:.40}: "
            "pass both, or curvature='magnitude'"
        )


class _Operation:
    """One pruning under way: everything as long as the padded weights, and the evidence of the present round."""

    def __init__(
        self,
        weights: Weights,
        pattern: Pattern,
        request: _Request,
        masks: Mapping[str, Tensor],
        sparsity: float,
        watch: Watch,
    ):
        self.weights, self.request, self.final, self.watch = weights, request, sparsity, watch
        self.plan: Plan | None = None
        self.rise = self.worked = 0.0
        device = weights.params[0].device
        if request.curvature == "fisher":
            types = {torch.promote_types(p.dtype, torch.float32) for p in weights.params}
            self.plan = plan_memory(
                weights.dim, request.num_grads, request.block_size, max(types, key=lambda kind: kind.itemsize),
                request.window_dtype, device,
            )  # fmt: skip
            device = self.plan.device
            watch(str(self.plan), 0.0)
        if isinstance(request.curvature, PSDMatrix):
            device = request.curvature.device
            if request.curvature.dim != weights.dim:
                raise ValueError(
                    f"the matrix has {request.curvature.dim} coordinates and the weights {weights.dim}: "
                    f"flatten {', '.join(weights.names[:3])}… in this order"
                )
        self.device = device
        self.pattern = pattern.to(device)
        self.kept = self._removed_before(masks)

    def _removed_before(self, masks: Mapping[str, Tensor]) -> Tensor:
        for name, mask in masks.items():
            if name not in self.weights.names:
                raise ValueError(f"masks names {name!r}, which is not pruned here: name it in targets, or leave it out")
            p = self.weights.params[self.weights.names.index(name)]
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: pass booleans of shape "
                    f"{tuple(p.shape)}"
                )
        parts = [
            masks.get(name, torch.ones_like(p, dtype=torch.bool))
            for name, p in zip(self.weights.names, self.weights.params, strict=True)
        ]
        kept = torch.cat([part.reshape(-1).to(self.device) for part in parts])
        before = 1 - float(kept.double().mean())
        require(
            before <= self.final + 0.5 / len(kept),
            "sparsity",
            self.final,
            f"sparsity ≥ {before:.6g}, that of masks",
            "raise it",
        )
        return kept

    def run(self, model: nn.Module, loss_fn: LossFunction | None, batches: Iterator[Any]) -> None:
        """All rounds; the model has its new weights after each."""
        request = self.request
        steps, done, density = request.rounds * request.parts, 0, float(self.kept.double().mean())
        for _ in range(request.rounds):
            evidence = self._evidence(model, loss_fn, batches)
            tiles = evidence.tiles
            kept, unit = tiles.pad(self.kept), tiles.pad(self.pattern.unit + 1) - 1
            values = tiles.pad(self.weights.flatten(self.weights.params, self.device).to(wide(kept))) * kept
            for _ in range(request.parts):
                done += 1
                # The density shrinks by one factor from step to step, and reaches the last weight exactly.
                now = self.final if done == steps else 1 - density * ((1 - self.final) / density) ** (done / steps)
                self._tell(f"removing {100 * now:.1f} %", self._gradients_a_round / request.parts / 2)
                costs = unit_costs(evidence, unit, self.pattern.count, values, kept)
                _refuse(costs, "the costs hold")
                chosen = self.pattern.choose(costs, tiles.unpad(kept), now, self.final)
                gone = torch.where(unit >= 0, chosen[unit.clamp_min(0)], False) & kept
                self.rise += remove_(evidence, unit, values, kept, gone, request.update)
                _refuse(values, "the updated weights hold")
            self.kept = tiles.unpad(kept)
            self.weights.write(tiles.unpad(values))

    @property
    def _gradients_a_round(self) -> int:
        return self.request.num_grads if self.request.needs_data else 1

    def _tell(self, what: str, work: float) -> None:
        """Say what comes next, which will take so many gradients' time."""
        self.watch(what, self.worked / (1.5 * self.request.rounds * self._gradients_a_round))
        self.worked += work

    def _evidence(self, model: nn.Module, loss_fn: LossFunction | None, batches: Iterator[Any]) -> Evidence:
        """What the curvature is at the present weights."""
        request, weights = self.request, self.weights
        if isinstance(request.curvature, PSDMatrix):
            return Given(Tiles([weights.dim], weights.dim), request.curvature)
        if request.curvature == "magnitude" or loss_fn is None:
            ones = torch.ones(weights.dim, device=self.device)
            return on_the_diagonal(Tiles([weights.dim]), ones, request.damping)
        if request.curvature == "hessian_diagonal":
            total = torch.zeros(weights.dim, device=self.device, dtype=wide(self.kept))
            for h in self._observed(hessian_diagonal(loss, weights.params) for loss in losses(model, loss_fn, batches)):
                total += h
            return on_the_diagonal(Tiles([weights.dim]), total / request.num_grads, request.damping)
        assert self.plan is not None
        kind = GradientBlocks if self.plan.by_block else GradientRows
        evidence = kind(Tiles.runs(weights.dim, request.block_size), self.plan, request.damping, request.shrinkage)
        source = example_gradients if request.per_example else mean_gradients
        for gradient in self._observed(source(model, loss_fn, batches, weights.params)):
            evidence.add(gradient)
        return evidence

    def _observed(self, source: Iterator[Iterable[Tensor]]) -> Iterator[Tensor]:
        """As many flat observations as were asked for, finite, and the same in all processes."""
        for number in range(self.request.num_grads):
            self._tell(f"{self.request.curvature} {number + 1} of {self.request.num_grads}", 1)
            flat = self.weights.flatten(next(source), self.device)
            if not alone():  # every process must come to the same masks
                average_([flat])
            _refuse(flat, f"gradient {number} holds")
            yield flat


def _refuse(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = float(values[~torch.isfinite(values)][0])
        raise ValueError(f"{what} {bad}; nothing was changed: leave that batch out, or raise damping")


class _Bar:
    """A bar on stderr: one line that is drawn again in a terminal, a line for each tenth anywhere else."""

    def __init__(self) -> None:
        self.tenth = -1

    def __call__(self, what: str, share: float) -> None:
        terminal, tenth = sys.stderr.isatty(), math.floor(10 * share)
        if share == 0 and what.startswith("memory"):
            print(what, file=sys.stderr)
        elif terminal:
            print(
                f"\r\x1b[K{'█' * round(30 * share):░<30} {100 * share:3.0f} %  {what}",
                end="\n" if share == 1 else "",
                file=sys.stderr,
                flush=True,
            )
        elif tenth > self.tenth:
            self.tenth = tenth
            print(f"{100 * share:3.0f} %  {what}", file=sys.stderr)
