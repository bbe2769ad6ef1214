r"""M-FAC: steps along the damped inverse of the mean of the last m gradients' outer products.

.. math::
    F = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top, \qquad
    F^{-1} g_j = m\, G^\top K^{-1} e_j, \qquad K = m\lambda I + G G^\top

Written this way, for a gradient that is a row of the window G, nothing cancels: the usual
:math:`(g - G^\top K^{-1} G g)/\lambda` has no digit left in float32 at λ = 1e-5.

Cost: two reads of the m × d window a step, one to refresh a row of GGᵀ and one to add up the direction, and one m × m
Cholesky in float64. Memory: (m + 2) d numbers and m² doubles.

Paper: Frantar, Kurtic and Alistarh, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information,
NeurIPS 2021, arXiv 2107.03356.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

from quadric.curvature import Curvature, Schedule
from quadric.matrix import LowRank, cholesky
from quadric.optimizer import Block, CurvatureOptimizer, require
from quadric.tiles import Tiles, combine, project, slab_tiles, slabs, wide

__all__ = ["MFAC", "GradientWindow"]


def newest_coefficients(gram: Tensor, newest: int, damping: float) -> Tensor:
    """The weights ``n K⁻¹ e_j``, ``(blocks, n)``, of the rows in ``F⁻¹ g_j``, from Gram matrices ``(blocks, n, n)``."""
    n = gram.shape[-1]
    unit = gram.new_zeros(n, 1)
    unit[newest] = n
    return torch.cholesky_solve(unit.expand(len(gram), n, 1), cholesky(gram, n * damping)).squeeze(-1)


class GradientWindow(Curvature):
    r"""The last gradients and the matrix :math:`\lambda I + \frac1n \sum g_i g_i^\top` of the n seen so far.

    While the window fills, n counts the rows it has, so a filling window is not diluted.

    Cost: one read of the window and O(window) small work an update. Memory: window · dim numbers of ``dtype`` and
    min(window, block_size)² doubles for each block.

    Args:
        dim: number of coordinates of a gradient.
        window: number of gradients kept, the oldest dropped first.
        damping: λ, positive, or a schedule over the number of updates.
        block_size: keep only the diagonal blocks of so many consecutive coordinates (the last may be shorter).
        dtype: type of the stored gradients, that of the first one by default; sums are in float32 or better.

    Raises:
        ValueError: if an argument is not positive.

    Example:
        After the one gradient (3, 4) of length 5, with λ = 1, the eigenvalue along it is 1 + 25.

        >>> window = GradientWindow(dim=2, window=8, damping=1.0)
        >>> window.update(torch.tensor([3.0, 4.0]))
        >>> window.matrix().solve(torch.tensor([78.0, 104.0]))
        tensor([3., 4.])
    """

    column_names = ("window",)
    rows: Tensor  # (tiles, window, width), a ring
    gram: Tensor  # (blocks, window, window) or, by column, (blocks, width, width), float64

    def __init__(
        self,
        dim: int,
        window: int,
        damping: Schedule,
        *,
        block_size: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(Tiles.runs(dim, block_size), damping)
        whole = isinstance(window, int) and window >= 1
        require(whole, "window", window, "window ≥ 1, an integer", "64 to 1024 gradients are usual")
        real = dtype is None or dtype.is_floating_point
        require(real, "dtype", dtype, "a floating-point type or None", "torch.bfloat16 halves the memory")
        self.window, self.dtype = window, dtype
        # Blocks shorter than the window: their own covariance is smaller than the Gram matrix of the rows.
        self.by_column = self.tiles.one_each and self.tiles.width < window
        self.register_buffer("rows", torch.empty(0))
        self.register_buffer("gram", torch.empty(0))

    @property
    def filled(self) -> int:
        """The number of gradients in the window."""
        return min(self.updates, self.window)

    @property
    def newest(self) -> int:
        """The row of the last gradient."""
        return (self.updates - 1) % self.window

    def _make(self, dtype: torch.dtype, device: torch.device) -> None:
        tiles, side = self.tiles, self.tiles.width if self.by_column else self.window
        self.rows = torch.zeros(tiles.count, self.window, tiles.width, dtype=dtype, device=device)
        self.gram = torch.zeros(len(tiles.sizes), side, side, dtype=wide(self.rows), device=device)

    def absorb(self, observation: Tensor) -> None:  # noqa: D102
        if not self.updates:
            self._make(self.dtype or observation.dtype, observation.device)
        row, sums = self.updates % self.window, torch.promote_types(observation.dtype, torch.float32)
        old = self._column(row) if self.by_column else None
        if self.rows.dtype == torch.float16:  # the one type with a range that gradients leave
            observation = observation.clamp(-65504, 65504)
        self.rows[:, row] = self.tiles.cut(observation)
        self.updates += 1
        if old is not None:
            new = self._column(row)
            self.gram.baddbmm_(new, new.mT).baddbmm_(old, old.mT, alpha=-1)
            if row == self.window - 1:  # afresh once a round: what rounding left of a huge gradient goes with it
                grams = self.gram.split(slab_tiles(self.rows))
                for slab, gram in zip(slabs(self.rows, self.gram.dtype), grams, strict=True):
                    torch.bmm(slab.mT, slab, out=gram)
        else:
            new = self.rows[:, row : row + 1].to(sums)  # as it was rounded, so that the Gram matrix is that of the rows
            products = project(self.rows[:, : self.filled], new)
            products = self.tiles.total(products).squeeze(1)
            self.gram[:, row, : self.filled] = products
            self.gram[:, : self.filled, row] = products

    def _column(self, row: int) -> Tensor:
        """A row as one float64 column for each block, ``(blocks, width, 1)``."""
        return self.rows[:, row, :, None].to(self.gram.dtype, copy=True)

    def solve_newest(self, out: Tensor | None = None) -> Tensor:
        """``F⁻¹ g`` for the gradient g of the last update, ``(tiles.length,)``: one read of the window."""
        damping, n = self.damping_now(), self.filled
        sums = torch.promote_types(self.rows.dtype, torch.float32) if out is None else out.dtype
        if self.by_column:
            factor = cholesky(self.gram, n * damping)
            return torch.cholesky_solve(self._column(self.newest) * n, factor).to(sums).flatten()
        weights = newest_coefficients(self.gram[:, :n, :n], self.newest, damping)
        out = None if out is None else self.tiles.cut(out).unsqueeze(1)
        return combine(self.tiles.spread(weights.to(sums)).unsqueeze(1), self.rows[:, :n], out).flatten()

    def matrix(self) -> LowRank:
        """The matrix of the window; it shares the rows, so it must be used before the next update."""
        if not self.updates:
            return LowRank(torch.zeros(0, self.dim), self.damping_now())
        return LowRank.of_tiles(self.rows[:, : self.filled], self.tiles, self.damping_now(), 1 / self.filled)

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:  # noqa: D102
        return {"window": self.tiles.read(self.rows, start, stop)}

    def shared(self) -> dict[str, Tensor]:  # noqa: D102
        return super().shared() | {"gram": self.gram.clone()}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:  # noqa: D102
        super().restore(shared, columns)
        first = next(iter(columns.values()))["window"]
        self._make(first.dtype, first.device)
        self.gram = shared["gram"].clone()
        for (start, stop), values in columns.items():
            self.tiles.write(self.rows, start, stop, values["window"])


class MFAC(CurvatureOptimizer):
    r"""The M-FAC optimizer: momentum on :math:`F^{-1} g`, all parameters of a group in one matrix.

    .. math::
        b \leftarrow \mu b + F^{-1} g, \qquad \theta \leftarrow (1 - \eta\,\text{wd})\,\theta - \eta\, b

    Cost: two reads of the window a step. Memory: (window + 2) numbers a parameter.

    Args:
        params: parameters or parameter groups; each group has a window of its own.
        lr: learning rate η.
        momentum: μ of the heavy ball, on the direction.
        window: number of gradients kept, m.
        damping: λ, or a schedule over the steps. Eigenvalues of the Fisher matrix far above it are divided out; along
            directions no gradient has shown, the step is η/λ times the gradient.
        block_size: keep only diagonal blocks of so many consecutive coordinates.
        window_dtype: type of the stored gradients; bfloat16 halves the memory; on a CPU it saves no time.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        One gradient 2 with λ = 1: F = 1 + 2², so the step is 0.5 · 2 / 5.

        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = MFAC([w], lr=0.5, window=4, damping=1.0)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> round(w.item(), 4)
        0.8

    Paper: arXiv 2107.03356.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        window: int = 512,
        damping: Schedule = 1e-5,
        block_size: int | None = None,
        window_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "window": window,
            "damping": damping,
            "block_size": block_size,
            "window_dtype": window_dtype,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:  # noqa: D102
        super().check(group)
        require(0 <= group["momentum"] < 1, "momentum", group["momentum"], "0 ≤ momentum < 1", "0.9 is usual")
        self.curvature([[torch.empty(1)]], group)  # which checks the rest

    def curvature(self, params: list[list[Tensor]], group: dict[str, Any]) -> GradientWindow:  # noqa: D102
        dim = sum(p.numel() for p in params[0])
        return GradientWindow(
            dim, group["window"], group["damping"], block_size=group["block_size"], dtype=group["window_dtype"]
        )

    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:  # noqa: D102
        window: GradientWindow = block.curvature  # type: ignore[assignment]
        window.damping = group["damping"]
        window.absorb(gradient)
        direction = window.solve_newest(out=gradient)
        if not group["momentum"]:
            return direction
        buffer = block.buffer("momentum_buffer")
        _foreach_mul_(block.live(buffer), group["momentum"])
        _foreach_add_(block.live(buffer), block.live(direction))
        return buffer
