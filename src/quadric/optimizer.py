"""CurvatureOptimizer: the contract of torch.optim, written once for every method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadric.curvature import Curvature

__all__ = ["Block", "CurvatureOptimizer"]


@dataclass
class Block:
    """Parameters of one group that share one estimate, and the flat buffer that their gradients are gathered in.

    Parameters are known by their place in the group, not by reference: a framework may swap them between two steps.
    """

    number: int
    members: list[int]  # places in group["params"], in the order of the columns
    shapes: list[torch.Size]
    curvature: Curvature
    flat: Tensor  # (length,): gradients, then the direction
    spans: list[tuple[int, int]]  # the columns of each member in `flat`
    buffers: dict[str, Tensor] = field(default_factory=dict)  # further state of the length of `flat`
    step: int = 0

    def views(self, tensor: Tensor) -> list[Tensor]:
        """A tensor ``(..., length)`` as one view ``(..., *shape)`` for each member."""
        return [
            tensor[..., start:stop].view(*tensor.shape[:-1], *shape)
            for (start, stop), shape in zip(self.spans, self.shapes, strict=True)
        ]


class CurvatureOptimizer(Optimizer, ABC):
    """An optimizer that moves along a power of a damped curvature matrix: subclasses fill three holes.

    :meth:`partition` says which parameters share a matrix, :meth:`curvature` makes the estimate, :meth:`direction`
    learns from a gradient and returns the way to go. The rest is here: closures, groups, missing and non-finite
    gradients, weight decay, and a state that is per parameter wherever anyone looks at it (``state_dict``, copies,
    pickles) and flat while it runs.

    Args:
        params: parameters or parameter groups.
        defaults: default hyper-parameters of a group, ``lr`` and ``weight_decay`` among them.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._blocks: dict[int, list[Block]] = {}  # by the place of the group
        super().__init__(params, {**defaults, "maximize": defaults.get("maximize", False)})

    # The three holes.

    def partition(self, params: Sequence[Tensor]) -> list[list[int]]:
        """Which parameters, by place, share a matrix: one list for each matrix; by default all share one."""
        return [list(range(len(params)))]

    @abstractmethod
    def curvature(self, blocks: list[list[Tensor]], group: dict[str, Any]) -> Curvature:
        """A new estimate for these parameters, one list for each matrix."""

    @abstractmethod
    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Learn from ``gradient``, ``(length,)``, and return the direction of descent in the same columns."""
