"""An operation: rounds of gradients, choices and answers on the weights of one model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadric.backprop.walk import hessian_diagonal
from quadric.distributed import alone, average_
from quadric.matrix import PSDMatrix
from quadric.optimizer import is_number, require, whole
from quadric.pruning.evidence import Evidence, Given, gradient_evidence, on_the_diagonal
from quadric.pruning.gradients import LossFunction, example_gradients, losses, mean_gradients
from quadric.pruning.masks import Masks
from quadric.pruning.memory import Plan, plan_memory
from quadric.pruning.patterns import Pattern
from quadric.pruning.progress import Watch
from quadric.pruning.result import PrunedLayer, PruneResult
from quadric.pruning.surgery import Update, remove_, unit_costs
from quadric.pruning.weights import Weights
from quadric.tiles import Tiles, wide

__all__ = ["CurvatureName", "Operation", "Request"]

CurvatureName = Literal["fisher", "hessian_diagonal", "magnitude"]


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`quadric.prune` that say how, checked.

    Raises:
        ValueError: if one is out of range.
    """

    sparsity: float
    final: float
    curvature: CurvatureName | PSDMatrix | Evidence
    num_grads: int
    block_size: int | None
    damping: float
    rounds: int
    parts: int
    shrinkage: float
    per_example: bool
    window_dtype: torch.dtype | None
    update: Update

    def __post_init__(self) -> None:
        for name, usual in (("num_grads", 256), ("rounds", 4), ("parts", 4), ("block_size", 128)):
            value = getattr(self, name)
            if value is not None or name != "block_size":
                object.__setattr__(self, name, whole(name, value, 1, f"{usual} is usual"))
        s, damping, dtype = self.shrinkage, self.damping, self.window_dtype
        part = is_number(self.sparsity) and 0 <= self.sparsity < 1
        require(part, "sparsity", repr(self.sparsity), "0 ≤ sparsity < 1", "0.9 removes nine weights of ten")
        beyond = is_number(self.final) and self.sparsity <= self.final < 1
        require(beyond, "final", repr(self.final), f"{self.sparsity} = sparsity ≤ final < 1", "None ends at sparsity")
        require(is_number(s) and 0 <= s <= 1, "shrinkage", repr(s), "0 ≤ shrinkage ≤ 1", "0.0 is the paper's")
        positive = is_number(damping) and 0 < damping < math.inf
        require(positive, "damping", repr(damping), "0 < damping < ∞", "1e-5 is usual")
        kinds = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
        require(dtype in kinds, "window_dtype", repr(dtype), "one of torch's four floating-point types", "None chooses")
        choices = {"update": ("joint", "single", "none")}
        if not isinstance(self.curvature, (PSDMatrix, Evidence)):
            choices["curvature"] = ("fisher", "hessian_diagonal", "magnitude")
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, name, repr(value), f"{name} in {', '.join(allowed)}", "choose one of these")

    @property
    def needs_data(self) -> bool:
        """Whether losses have to be differentiated."""
        return not isinstance(self.curvature, (PSDMatrix, Evidence)) and self.curvature != "magnitude"

    def refuse_missing_data(self, batches: Iterable[Any] | None, loss_fn: LossFunction | None) -> None:
        """Refuse a curvature that cannot be taken for want of data.

        Raises:
            ValueError: if losses have to be differentiated and there are none.
        """
        if self.needs_data and (batches is None or not callable(loss_fn)):
            raise ValueError(
                f"curvature {self.curvature!r} needs data, and batches is {batches!r:.40}, loss_fn {loss_fn!r:.40}: "
                "pass both, or curvature='magnitude'"
            )


class Operation:
    """One pruning under way.

    Args:
        weights: What is pruned.
        pattern: In which units.
        request: How.
        masks: Weights that are removed already, by name.
        watch: Told what is being done, and the share that is finished.

    Raises:
        ValueError: if masks or a matrix do not fit the weights, or the gradients do not fit into memory.
    """

    def __init__(
        self,
        weights: Weights,
        pattern: Pattern,
        request: Request,
        masks: Mapping[str, Tensor],
        watch: Watch,
    ):
        self.weights, self.request, self.watch = weights, request, watch
        self.plan: Plan | None = None
        self.rise = self.worked = 0.0
        self.left: Tensor | slice = slice(None)  # the coordinates of a round
        device = weights.params[0].device
        if request.curvature == "fisher":
            self.plan = plan_memory(
                weights.dim, request.num_grads, request.block_size, weights.dtype, request.window_dtype, device
            )
            device = self.plan.device
            watch(str(self.plan), 0.0)
        if isinstance(request.curvature, (PSDMatrix, Evidence)):
            given = request.curvature if isinstance(request.curvature, PSDMatrix) else request.curvature.tiles
            device = request.curvature.device
            if given.dim != weights.dim:
                raise ValueError(
                    f"the curvature has {given.dim} coordinates and the weights {weights.dim}: flatten "
                    f"{', '.join(weights.names[:3])}… in this order"
                )
        self.device = device
        self.pattern = pattern.to(device)
        self.kept = self._removed_before(masks)

    def _removed_before(self, masks: Mapping[str, Tensor]) -> Tensor:
        for name, mask in masks.items():
            if name not in self.weights.names:
                raise ValueError(f"masks names {name!r}, which is not pruned here: name it in targets, or leave it out")
            shape = tuple(self.weights.found[name][0].shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
                told = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
                raise ValueError(f"the mask of {name} is {told}: pass booleans of shape {shape}")
        parts = [masks.get(name, torch.ones(p.shape, dtype=torch.bool)) for name, (p, _) in self.weights.found.items()]
        kept = torch.cat([part.reshape(-1).to(self.device) for part in parts])
        before = float(self.pattern.removed(kept).min())
        enough = before <= self.request.final + 0.5 / len(kept)
        told = f"sparsity ≥ {before:.6g}, which masks have removed"
        require(enough, "sparsity", self.request.final, told, "raise it")
        return kept

    def run(self, model: nn.Module, loss_fn: LossFunction | None, batches: Iterator[Any]) -> None:
        """All rounds; the model has its new weights after each."""
        request = self.request
        steps, done, density = request.rounds * request.parts, 0, float(self.kept.double().mean())
        if not bool(self.kept.all()):  # before the first gradient
            flat = self.weights.flatten(self.weights.params, self.device)
            self.weights.write(torch.where(self.kept, flat, 0))
        for _ in range(request.rounds if bool(self.kept.any()) else 0):
            # Blocks are cut anew from the weights that are left: neighbours that are gone would only take their room.
            everything = self._given or bool(self.kept.all())
            self.left = slice(None) if everything else self.kept.nonzero().flatten()
            evidence = self._evidence(model, loss_fn, batches)
            tiles = evidence.tiles
            kept, unit = tiles.pad(self.kept[self.left]).clone(), tiles.pad(self.pattern.unit[self.left] + 1) - 1
            flat = self.weights.flatten(self.weights.params, self.device).to(wide(kept))
            values = tiles.pad(flat[self.left])
            for _ in range(request.parts):
                done += 1
                # The density shrinks by one factor from step to step, and reaches the last weight exactly.
                t = done / steps
                now = request.sparsity if done == steps else 1 - density ** (1 - t) * (1 - request.sparsity) ** t
                self._tell(f"removing {100 * now:.1f} %", self._choosing / request.parts)
                costs = unit_costs(evidence, unit, self.pattern.count, values, kept)
                _refuse(costs, "the costs hold")
                chosen = self.pattern.choose(costs, self.kept, now, request.final)
                gone = torch.where(unit >= 0, chosen[unit.clamp_min(0)], False) & kept
                self.rise += remove_(evidence, unit, values, kept, gone, request.update)
                _refuse(values, "the updated weights hold")
                self.kept[self.left] = tiles.unpad(kept)
            flat[self.left] = tiles.unpad(values)
            self.weights.write(flat)
            del evidence  # before the next round makes another

    def result(self, model: nn.Module) -> PruneResult:
        """What has been done."""
        names, params = self.weights.names, self.weights.params
        kept = [mask.to(p.device) for mask, p in zip(self.weights.split(self.kept), params, strict=True)]
        return PruneResult(
            masks=Masks.of(model, dict(zip(names, kept, strict=True))),
            layers=tuple(
                PrunedLayer(name, tuple(mask.shape), mask.numel(), mask.numel() - int(mask.sum()))
                for name, mask in zip(names, kept, strict=True)
            ),
            left_alone=self.weights.left_alone,
            loss_increase=math.nan if self.request.curvature == "magnitude" else self.rise,
            memory=self.plan,
            model=model,
        )

    @property
    def _given(self) -> bool:
        """Whether the curvature is there already, and over all coordinates."""
        return isinstance(self.request.curvature, (PSDMatrix, Evidence))

    def _tell(self, what: str, work: float) -> None:
        """Say what comes next, which will take so many gradients' time."""
        gradients = self.request.num_grads if self.request.needs_data else 0
        self.watch(what, self.worked / (self.request.rounds * (gradients + self._choosing)))
        self.worked += work

    @property
    def _choosing(self) -> float:
        """The parts of a round, as so many gradients: about half of what these take."""
        return self.request.num_grads / 2

    def _evidence(self, model: nn.Module, loss_fn: LossFunction | None, batches: Iterator[Any]) -> Evidence:
        """What the curvature is at the present weights."""
        request, params, dim = self.request, self.weights.params, len(self.kept[self.left])
        if isinstance(request.curvature, Evidence):
            return request.curvature
        if isinstance(request.curvature, PSDMatrix):
            return Given(Tiles([dim], dim), request.curvature)
        if request.curvature == "magnitude" or loss_fn is None:
            return on_the_diagonal(Tiles([dim]), torch.ones(dim, device=self.device), request.damping)
        if request.curvature == "hessian_diagonal":
            total = torch.zeros(dim, device=self.device, dtype=wide(self.kept))
            for h in self._observed(hessian_diagonal(loss, params) for loss in losses(model, loss_fn, batches)):
                total += h
            return on_the_diagonal(Tiles([dim]), total / request.num_grads, request.damping)
        assert self.plan is not None
        evidence = gradient_evidence(self.plan, dim, request.block_size, request.damping, request.shrinkage)
        source = example_gradients if request.per_example else mean_gradients
        for gradient in self._observed(source(model, loss_fn, batches, params)):
            evidence.add(gradient)
        return evidence

    def _observed(self, source: Iterator[Iterable[Tensor]]) -> Iterator[Tensor]:
        """As many observations of what is left as were asked for, finite, and the same in all processes."""
        for number in range(self.request.num_grads):
            self._tell(f"{self.request.curvature} {number + 1} of {self.request.num_grads}", 1)
            flat = self.weights.flatten(next(source), self.device)[self.left]
            if not alone():  # every process must come to the same masks
                average_([flat])
            _refuse(flat, f"gradient {number} holds")
            yield flat


def _refuse(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = float(values[~torch.isfinite(values)][0])
        raise ValueError(f"{what} {bad}; nothing was changed: leave that batch out, or raise damping")
