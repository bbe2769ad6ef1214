"""The result of a pruning: masks, what went where, and what can be made of the model now."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from quadric.pruning.compact import compact
from quadric.pruning.export import Layout, export
from quadric.pruning.masks import Masks
from quadric.pruning.memory import Plan

__all__ = ["PruneResult", "PrunedLayer"]


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


@dataclass(frozen=True, repr=False, eq=False)
class PruneResult:
    """What :func:`prune` has done; it prints as a table.

    Args:
        masks: By name of each pruned parameter, True where a weight is kept; :func:`quadric.hold_masks` takes them.
        layers: The pruned parameters, in the model's order.
        left_alone: Names of other weights, each with the reason.
        loss_increase: The rise of the loss that the curvature predicts, in units of the loss; NaN after magnitude.
        memory: How gradients were kept; None where there were none.
        model: The model, pruned in place.
    """

    masks: Masks
    layers: tuple[PrunedLayer, ...]
    left_alone: dict[str, str]
    loss_increase: float
    memory: Plan | None
    model: nn.Module

    @property
    def sparsity(self) -> float:
        """The share of all numbers in the pruned parameters that is removed."""
        return sum(layer.removed for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def compact(self) -> nn.Module:
        """A smaller dense copy of the model, without the channels that are zero; warns of those that it cannot cut out.

        Raises:
            ValueError: if no channel can be cut out; the reasons are listed.
        """
        smaller, notes = compact(self.model, self.masks)
        if notes:
            warnings.warn("; ".join(notes), stacklevel=2)
        return smaller

    def export(self, layout: Layout = "dense") -> dict[str, Tensor]:
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
        if not math.isnan(self.loss_increase):
            lines.append(f"predicted rise of the loss: {self.loss_increase:.3g}")
        return "\n".join(lines)

    __repr__ = __str__
