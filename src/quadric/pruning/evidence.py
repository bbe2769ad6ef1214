r"""Evidence: what gradients at fixed weights say about the curvature, a section of the weights at a time.

.. math::
    G = D + \frac{1 - s}{m} \sum_{i=1}^m g_i g_i^\top, \qquad
    D = \lambda I + s\, \mathrm{diag}\Big(\frac1m \sum_{i=1}^m g_i g_i^\top\Big)

within blocks of consecutive coordinates. The shrinkage s takes the off-diagonal entries, which few gradients estimate
badly, towards zero. A section comes as a scale, :math:`D^{1/2}`, and the matrix
:math:`D^{-1/2} G D^{-1/2} = I + \dots`: costs are the same in scaled coordinates.

Small matrices are made for as many blocks as fit into a fixed amount of memory, and never for all.

Cost: of a section O(m · block) for each weight, or O(m²) for each where blocks are larger than m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quadric.matrix import Dense, Diagonal, LowRank, PSDMatrix
from quadric.pruning.memory import TOGETHER, WORK, Plan
from quadric.tiles import Tiles, slab_tiles, slabs, wide

__all__ = ["Evidence", "Given", "GradientBlocks", "GradientRows", "Section", "gradient_evidence", "on_the_diagonal"]


@dataclass(frozen=True)
class Section:
    """Some consecutive coordinates, coupled with no others.

    Args:
        columns: Which of the padded coordinates.
        matrix: Of the coordinates times ``scale``.
        scale: ``(columns,)``, or a scalar.
        block: Padded coordinates in a block; units are held by the multipliers of one block.
    """

    columns: slice
    matrix: PSDMatrix
    scale: Tensor
    block: int


class Evidence(ABC):
    """A curvature matrix over padded coordinates.

    Args:
        tiles: The cut of the coordinates into blocks.
        device: Where it is.
    """

    def __init__(self, tiles: Tiles, device: torch.device):
        self.tiles, self.device = tiles, device

    @abstractmethod
    def sections(self) -> Iterator[Section]:
        """All coordinates, some blocks at a time; what one section has made is let go before the next."""


class Given(Evidence):
    """A matrix over all coordinates that somebody hands in."""

    def __init__(self, tiles: Tiles, matrix: PSDMatrix):
        super().__init__(tiles, matrix.device)
        self.matrix = matrix

    def sections(self) -> Iterator[Section]:  # noqa: D102
        yield Section(slice(0, self.tiles.length), self.matrix, torch.ones((), device=self.device), self.tiles.length)


def on_the_diagonal(tiles: Tiles, values: Tensor, damping: float) -> Given:
    """A diagonal matrix of the absolute values of a vector ``(dim,)``, plus λ."""
    return Given(tiles, Diagonal(tiles.pad(values).abs() + damping))


class Gradients(Evidence):
    """What has been seen of gradients.

    Args:
        tiles: The cut of the coordinates into blocks; each is one tile where sums are kept.
        plan: How many gradients there will be, and the type and device of what is kept of them.
        damping: λ.
        shrinkage: s, from 0 to 1.
    """

    def __init__(self, tiles: Tiles, plan: Plan, damping: float, shrinkage: float):
        super().__init__(tiles, plan.device)
        self.damping, self.shrinkage, self.seen = damping, shrinkage, 0

    @abstractmethod
    def add(self, gradient: Tensor) -> None:
        """Learn from a gradient, ``(dim,)``."""

    @property
    def weight(self) -> float:
        """The factor of the sum of outer products in G."""
        return (1 - self.shrinkage) / self.seen

    def root(self, squares: Tensor) -> Tensor:
        """D^(1/2), from the sums of the squares of the gradients' entries."""
        return (self.damping + squares * (self.shrinkage / self.seen)).sqrt()


class GradientRows(Gradients):
    """Gradients as they are."""

    def __init__(self, tiles: Tiles, plan: Plan, damping: float, shrinkage: float):
        super().__init__(tiles, plan, damping, shrinkage)
        self.rows = torch.empty(tiles.count, plan.gradients, tiles.width, dtype=plan.dtype, device=plan.device)

    def add(self, gradient: Tensor) -> None:  # noqa: D102
        if self.rows.dtype == torch.float16:  # the one type with a range that gradients leave
            gradient = gradient.clamp(-65504, 65504)
        self.rows[:, self.seen] = self.tiles.cut(self.tiles.pad(gradient))
        self.seen += 1

    def sections(self) -> Iterator[Section]:  # noqa: D102
        rows, width = self.rows[:, : self.seen], self.tiles.width
        narrow = self.tiles.one_each and width <= self.seen
        some = self.tiles.count
        if self.tiles.one_each:
            some = max(1, WORK // (48 * min(width, self.seen) ** 2))  # six small matrices of a block at a time
        for first in range(0, self.tiles.count, some):
            part = rows[first : first + some]
            columns = slice(first * width, (first + len(part)) * width)
            squares = torch.cat([slab.square().sum(1) for slab in slabs(part, wide(part))])
            scale = self.root(squares)
            if narrow:
                step = slab_tiles(part)
                sums = part.new_empty(len(part), width, width, dtype=wide(part))
                for slab, target in zip(slabs(part, wide(part)), sums.split(step), strict=True):
                    torch.bmm(slab.mT, slab, out=target)
                matrix: PSDMatrix = Dense.of_blocks(_scaled_(sums, self.weight, scale), 1.0)
            else:
                blocks = len(part) if self.tiles.one_each else 1
                tiles = Tiles([columns.stop - columns.start] if blocks == 1 else [width] * blocks, width)
                matrix = LowRank.of_tiles(part, tiles, 1.0, self.weight, scale.reciprocal())
            block = width if self.tiles.one_each else self.tiles.length
            yield Section(columns, matrix, scale.flatten(), block)


class GradientBlocks(Gradients):
    """The sums of the gradients' outer products within blocks."""

    def __init__(self, tiles: Tiles, plan: Plan, damping: float, shrinkage: float):
        super().__init__(tiles, plan, damping, shrinkage)
        self.sums = torch.zeros(tiles.count, tiles.width, tiles.width, dtype=plan.dtype, device=plan.device)
        self.waiting = torch.zeros(tiles.count, TOGETHER, tiles.width, dtype=plan.dtype, device=plan.device)

    def add(self, gradient: Tensor) -> None:  # noqa: D102
        self.waiting[:, self.seen % TOGETHER] = self.tiles.cut(self.tiles.pad(gradient))
        self.seen += 1
        if self.seen % TOGETHER == 0:
            self._sum(TOGETHER)

    def _sum(self, count: int) -> None:
        rows = self.waiting[:, :count]
        for slab, sums in zip(slabs(rows, self.sums.dtype), self.sums.split(slab_tiles(rows)), strict=True):
            sums.baddbmm_(slab.mT, slab)

    @cached_property
    def scale(self) -> Tensor:
        """D^(1/2) of all tiles, ``(tiles, width)``; from now on the sums are in scaled coordinates."""
        if rest := self.seen % TOGETHER:
            self._sum(rest)
        scale = self.root(self.sums.diagonal(dim1=1, dim2=2))
        _scaled_(self.sums, self.weight, scale)
        return scale

    def sections(self) -> Iterator[Section]:  # noqa: D102
        width = self.tiles.width
        some = max(1, WORK // (48 * width**2))
        for first in range(0, self.tiles.count, some):
            scale = self.scale[first : first + some]
            matrix = Dense.of_blocks(self.sums[first : first + some], 1.0)
            yield Section(slice(first * width, (first + len(scale)) * width), matrix, scale.flatten(), width)


def gradient_evidence(plan: Plan, dim: int, block_size: int | None, damping: float, shrinkage: float) -> Gradients:
    """Evidence without gradients yet, which will keep them as a plan says.

    Args:
        plan: The plan.
        dim: Coordinates.
        block_size: Coordinates in a block; None for one block.
        damping: λ.
        shrinkage: s, from 0 to 1.
    """
    block_size = None if block_size is None or block_size >= dim else block_size
    if not plan.by_block:
        return GradientRows(Tiles.runs(dim, block_size), plan, damping, shrinkage)
    tiles = Tiles([dim], dim) if block_size is None else Tiles.runs(dim, block_size)  # a block of sums is one tile
    return GradientBlocks(tiles, plan, damping, shrinkage)


def _scaled_(sums: Tensor, weight: float, scale: Tensor) -> Tensor:
    """``weight · sums`` with both sides divided by the scale, in place."""
    return sums.div_(scale.unsqueeze(1)).mul_(weight / scale.unsqueeze(2))
