"""h from a part of the batch: the second derivatives of some rows of the loss, times the inverse of their share.

Rules are linear in g and h together, so that with g cut to a random block of rows, each with the same chance, h is
unbiased. Where it is zero outside the block, products are formed of the block's rows alone; where some operation has
spread it over the batch, of all rows, which costs time and no bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import Rule

__all__ = ["RowBlock", "check_fraction"]

# Of a product whose first axis is that of rows: the saved operands and the inputs that have it too.
ALONG_ROWS = {
    "AddmmBackward0": ({"_saved_mat1"}, {0, 1}),
    "BaddbmmBackward0": ({"_saved_batch1", "_saved_batch2"}, {0, 1, 2}),
    "BmmBackward0": ({"_saved_self", "_saved_mat2"}, {0, 1}),
    "ConvolutionBackward0": ({"_saved_input"}, {0}),
    "MmBackward0": ({"_saved_self"}, {0}),
}


class _Cut:
    """A node whose saved operands along the rows are those of a block."""

    def __init__(self, node: Any, names: set[str], start: int, stop: int):
        self.node, self.names, self.start, self.stop = node, names, start, stop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node, name)
        return value[self.start : self.stop] if name in self.names else value


def check_fraction(fraction: float) -> None:
    """Refuse a fraction that is not one over a whole number.

    Raises:
        ValueError: if it is not.
    """
    if not 0 < fraction <= 1 or abs(1 / fraction - round(1 / fraction)) > 1e-6:
        raise ValueError(
            f"fraction must be 1 over a whole number, got {fraction}: 0.25 and 0.1 are, 1.0 takes all rows"
        )


class RowBlock:
    """One of so many blocks of consecutive rows, drawn from torch's generator; any tensor is cut at the same shares.

    Args:
        fraction: one over the number of blocks.
    """

    def __init__(self, fraction: float):
        self.count = round(1 / fraction)
        self.chosen = int(torch.randint(self.count, ()))

    def bounds(self, rows: int) -> tuple[int, int]:
        """The first row of the block and the one behind it."""
        return rows * self.chosen // self.count, rows * (self.chosen + 1) // self.count

    def holds(self, h: Tensor) -> bool:
        """Whether h is zero outside the block."""
        if h.ndim == 0:
            return False
        start, stop = self.bounds(len(h))
        return not bool(h[:start].any()) and not bool(h[stop:].any())

    def cut(self, g: Tensor | None) -> Tensor | None:
        """The rows of the block in g, scaled by the inverse of their share, among zeros."""
        if g is None or g.ndim == 0:
            return g
        start, stop = self.bounds(len(g))
        return self.padded(g[start:stop] * self.count, len(g), start)

    def padded(self, rows: Tensor, length: int, start: int) -> Tensor:
        """The rows of the block among zeros."""
        out = rows.new_zeros(length, *rows.shape[1:])
        out[start : start + len(rows)] = rows
        return out

    def apply(self, rule: Rule, node: Any, g: Any, h: Any) -> Any:
        """A rule on the rows of the block where it is a product and they hold all of h, on everything otherwise."""
        if h is None or node.name() not in ALONG_ROWS or not self.holds(h):
            return rule(node, g, h)
        names, places = ALONG_ROWS[node.name()]
        start, stop = self.bounds(len(h))
        below = rule(_Cut(node, names, start, stop), g, h[start:stop])
        return tuple(
            part if part is None or place not in places else self.padded(part, len(h), start)
            for place, part in enumerate(below)
        )
