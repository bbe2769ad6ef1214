"""Damped positive definite matrices of huge dimension, as values: factorised once, never changed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quadric.tiles import Tiles, combine, project, slab_tiles, slabs, wide

__all__ = ["BlockMean", "Dense", "Diagonal", "Groups", "LowRank", "PSDMatrix"]


class PSDMatrix(ABC):
    r"""A symmetric positive definite ``dim × dim`` matrix :math:`G` and its powers.

    A subclass says how :math:`G^p` meets a vector (:meth:`apply`), its diagonal and its determinant; everything else
    follows here. The matrix axis is always the last one: ``v`` is ``(..., dim)``, any number of vectors at once.
    Powers below one need :math:`G` to be positive definite.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device

    def apply(self, v: Tensor, power: float = 1.0) -> Tensor:
        """The product ``G**power @ v``, differentiable in v.

        Args:
            v: vectors, ``(..., dim)``.
            power: any real number; −1 solves by Cholesky, other powers but 0 and 1 take an eigendecomposition of the
                small matrix, made once and kept.

        Raises:
            ValueError: if the last axis of ``v`` is not ``dim`` long.
        """
        if v.ndim == 0 or v.shape[-1] != self.dim:
            raise ValueError(
                f"v has shape {tuple(v.shape)}, but the last axis must have the matrix's {self.dim} entries: "
                f"pass vectors as (..., {self.dim})"
            )
        if power == 0:
            return v.clone()
        if v.requires_grad and torch.is_grad_enabled():
            return _Product.apply(v, self, power)
        return self._apply(v, power)

    @abstractmethod
    def _apply(self, v: Tensor, power: float) -> Tensor: ...

    @abstractmethod
    def diagonal(self, power: float = 1.0) -> Tensor:
        """The diagonal of ``G**power``, ``(dim,)``."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """The logarithm of the determinant, a scalar."""

    @abstractmethod
    def restrict(self, kept: Tensor) -> PSDMatrix:
        """The matrix of some coordinates alone; the others stay, coupled with nothing.

        Args:
            kept: which coordinates, ``(dim,)`` booleans. What is on the diagonal of the others is left to the class.
        """

    def complete(self, v: Tensor, fixed: Tensor) -> Tensor:
        r"""The x that agrees with v where ``fixed`` is set and has the least :math:`x^\top G x`, ``(dim,)``.

        With F the fixed and S the other coordinates, :math:`x_S = -G_{SS}^{-1} G_{SF} v_F`: the mean of a normal
        variable of precision G, given some of its entries.

        Args:
            v: a vector, ``(dim,)``.
            fixed: ``(dim,)`` booleans.
        """
        given = torch.where(fixed, v, 0)
        pull = torch.where(fixed, 0, self.apply(given))
        return torch.where(fixed, given, -self.restrict(~fixed).solve(pull))

    def multipliers(self, v: Tensor, units: Tensor) -> Tensor:
        r"""What it takes to hold each unit of coordinates at the values of v, ``(n, size)``.

        For a unit u alone these are the Lagrange multipliers :math:`c = [G^{-1}]_{uu}^{-1} v_u` of the least
        :math:`\frac12 x^\top G x` with :math:`x_u = v_u`: the minimum is :math:`\frac12 v_u^\top c`, and it is reached
        at the columns of the inverse added up, :math:`x = G^{-1}_{:,u}\, c`.

        Args:
            v: a vector, ``(dim,)``.
            units: coordinates of each unit, ``(n, size)`` integers; −1 where a unit is shorter.
        """
        values = torch.where(units >= 0, v[units.clamp_min(0)], 0)
        if units.shape[1] == 1:
            return values / self.inverse_diagonal()[units.clamp_min(0)]
        found = []
        some = max(1, 2**25 // units.shape[1] ** 2)
        for part, values_of_part in zip(units.split(some), values.split(some), strict=True):
            blocks = self.inverse_blocks(part)
            blocks = blocks + torch.diag_embed((part < 0).to(blocks.dtype))
            found.append(torch.linalg.solve(blocks, values_of_part.to(blocks.dtype)))
        return torch.cat(found).to(torch.promote_types(v.dtype, self.dtype))

    def inverse_blocks(self, units: Tensor) -> Tensor:
        """The entries of the inverse within each unit, ``(n, size, size)``; zeros beside a −1.

        Here by a solve for every coordinate of every unit: for small dimensions, where a class knows nothing better.

        Args:
            units: coordinates, ``(n, size)`` integers; −1 where a unit is shorter.
        """
        eye = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        columns = self.solve(eye[units.clamp_min(0)])
        return _within_units(columns.gather(-1, units.clamp_min(0).unsqueeze(1).expand(-1, units.shape[1], -1)), units)

    def solve(self, v: Tensor) -> Tensor:
        """The solution x of ``G x = v``."""
        return self.apply(v, -1.0)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of the inverse, ``(dim,)``."""
        return self.diagonal(-1.0)

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a scalar."""
        return self.diagonal().sum()

    def quad(self, v: Tensor, power: float = 1.0) -> Tensor:
        """The quadratic form ``vᵀ G**power v``, ``(...,)``."""
        return (v * self.apply(v, power)).sum(-1)

    def sample(self, n: int, power: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws of a normal variable with mean zero and covariance ``G**power``, ``(n, dim)``."""
        noise = torch.randn(n, self.dim, dtype=self.dtype, device=self.device, generator=generator)
        return self.apply(noise, power / 2)

    def to_dense(self) -> Tensor:
        """The whole matrix, ``(dim, dim)``: for small dimensions and tests."""
        return self.apply(torch.eye(self.dim, dtype=self.dtype, device=self.device))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(v)

    @property
    def shape(self) -> torch.Size:
        """``(dim, dim)``."""
        return torch.Size((self.dim, self.dim))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, dtype={self.dtype}, device={str(self.device)!r})"


class Diagonal(PSDMatrix):
    r"""A diagonal matrix :math:`G = \mathrm{diag}(d)`.

    Cost: one pass over ``dim`` numbers for every operation.

    Args:
        values: the diagonal, ``(dim,)``, not negative.

    Raises:
        ValueError: if ``values`` is not a vector of finite numbers, none of them negative.

    Example:
        >>> Diagonal(torch.tensor([1.0, 4.0])).apply(torch.tensor([2.0, 2.0]), power=-0.5)
        tensor([2., 1.])
    """

    def __init__(self, values: Tensor):
        if values.ndim != 1 or not torch.isfinite(values).all() or (values < 0).any():
            raise ValueError(
                f"values must be a vector of finite numbers, none of them negative, got {_shown(values)}: "
                "take the absolute value or clamp before building the matrix"
            )
        self.values = values.detach().clone()
        self.dim, self.dtype, self.device = len(values), values.dtype, values.device

    def _apply(self, v: Tensor, power: float) -> Tensor:
        return v * self.diagonal(power)

    def diagonal(self, power: float = 1.0) -> Tensor:  # noqa: D102
        return self.values.pow(power)

    def logdet(self) -> Tensor:  # noqa: D102
        return self.values.log().sum()

    def restrict(self, kept: Tensor) -> Diagonal:  # noqa: D102
        return self

    def inverse_blocks(self, units: Tensor) -> Tensor:  # noqa: D102
        return _within_units(torch.diag_embed(self.inverse_diagonal()[units.clamp_min(0)]), units)


class Dense(PSDMatrix):
    r"""A small matrix as it is, :math:`G = \lambda I + M`, or several of them along the diagonal.

    Cost: O(n³) once for each n × n block, then O(n · dim) a vector.

    Args:
        values: M, ``(n, n)`` or ``(blocks, n, n)``, symmetric and positive semi-definite. It is copied.
        damping: λ, positive.

    Raises:
        ValueError: if ``damping`` is not positive, or ``values`` not finite or not square.

    Example:
        >>> matrix = Dense(torch.tensor([[3.0, 0.0], [0.0, 8.0]]), damping=1.0)
        >>> matrix.solve(torch.tensor([8.0, 9.0]))
        tensor([2., 1.])
    """

    def __init__(self, values: Tensor, damping: float):
        square = values.ndim in (2, 3) and values.shape[-1] == values.shape[-2]
        if not square or not torch.isfinite(values).all():
            raise ValueError(f"values must be finite (n, n) matrices, got {_shown(values)}: rows.T @ rows makes one")
        self._build(values.detach().clone().view(-1, *values.shape[-2:]), positive_damping(damping))

    @classmethod
    def of_blocks(cls, values: Tensor, damping: float) -> Dense:
        """The same of finite blocks ``(blocks, n, n)`` that nobody will change: shared, not copied or looked at."""
        self = cls.__new__(cls)
        self._build(values, positive_damping(damping))
        return self

    def _build(self, values: Tensor, damping: float) -> None:
        self.values, self.damping = values, damping
        self.dim, self.device = values.shape[0] * values.shape[1], values.device
        self.dtype = torch.promote_types(values.dtype, torch.float32)

    @cached_property
    def _factor(self) -> Tensor:
        return cholesky(self.values.to(wide(self.values)), self.damping)

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.cholesky_inverse(self._factor)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.values.to(wide(self.values)))
        return values.clamp_min(0) + self.damping, vectors

    def _apply(self, v: Tensor, power: float) -> Tensor:
        x = v.reshape(-1, *self.values.shape[:2]).movedim(0, -1).to(wide(self.values))  # (blocks, n, vectors)
        if power == 1:
            x = self.values.to(x.dtype) @ x + self.damping * x
        elif power == -1:
            x = torch.cholesky_solve(x, self._factor)
        else:
            values, vectors = self._spectrum
            x = vectors @ (values.pow(power).unsqueeze(-1) * (vectors.mT @ x))
        return x.movedim(-1, 0).reshape(v.shape).to(torch.promote_types(v.dtype, self.dtype))

    def diagonal(self, power: float = 1.0) -> Tensor:  # noqa: D102
        if power == 1:
            return (self.values.diagonal(dim1=1, dim2=2) + self.damping).reshape(-1).to(self.dtype)
        if power == -1:
            return self._inverse.diagonal(dim1=1, dim2=2).reshape(-1).to(self.dtype)
        values, vectors = self._spectrum
        return (vectors.square() @ values.pow(power).unsqueeze(-1)).reshape(-1).to(self.dtype)

    def logdet(self) -> Tensor:  # noqa: D102
        return 2 * self._factor.diagonal(dim1=1, dim2=2).abs().log().sum().to(self.dtype)

    def restrict(self, kept: Tensor) -> Dense:  # noqa: D102
        sides = kept.view(self.values.shape[:2])
        return Dense.of_blocks(self.values * (sides.unsqueeze(1) & sides.unsqueeze(2)), self.damping)

    def inverse_blocks(self, units: Tensor) -> Tensor:  # noqa: D102
        return _blocks_of(self._inverse, units.clamp_min(0), units).to(self.dtype)


class LowRank(PSDMatrix):
    r"""A few directions on top of a multiple of the identity, :math:`G = \lambda I + R^\top R`.

    With the small matrix :math:`K = \lambda I + RR^\top` and the eigenvalues :math:`\sigma` and vectors :math:`U` of
    :math:`RR^\top`,

    .. math::
        G^{-1}v = (v - R^\top K^{-1} R v)/\lambda, \qquad
        G^p v = \lambda^p v + R^\top U\, \frac{(\lambda+\sigma)^p - \lambda^p}{\sigma}\, U^\top R v .

    Products and factors are taken in double precision whatever the type of the rows, because the difference above
    cancels: with float32 sums it has no correct digit left once :math:`\sigma/\lambda` exceeds :math:`10^7`.

    Cost: O(rank² dim) once, then O(rank dim) a vector. If a block has no more columns than there are rows, its matrix
    itself is factorised instead.

    Args:
        rows: R, ``(rank, dim)``, any scaling already inside; rank 0 leaves λI. They are copied.
        damping: λ, positive.
        block_size: keep only the diagonal blocks of so many consecutive columns (the last block may be shorter).

    Raises:
        ValueError: if ``damping`` is not positive, ``rows`` not finite or not a matrix, or ``block_size`` below 1.

    Example:
        One direction (3, 4) of length 5 and λ = 1: the eigenvalue along it is 26, across it 1.

        >>> matrix = LowRank(torch.tensor([[3.0, 4.0]]), damping=1.0)
        >>> matrix.solve(torch.tensor([78.0, 104.0]))
        tensor([3., 4.])
        >>> round(matrix.logdet().exp().item(), 4)
        26.0
    """

    def __init__(self, rows: Tensor, damping: float, *, block_size: int | None = None):
        if rows.ndim != 2 or not torch.isfinite(rows).all():
            raise ValueError(f"rows must be a finite (rank, dim) tensor, got {_shown(rows)}: stack vectors with vstack")
        tiles = Tiles.runs(rows.shape[1], block_size)
        self._build(tiles.cut(tiles.pad(rows.detach())).clone(), tiles, damping, weight=1.0)

    @classmethod
    def of_tiles(
        cls, rows: Tensor, tiles: Tiles, damping: float, weight: float = 1.0, columns: Tensor | None = None
    ) -> LowRank:
        """The matrix ``damping·I + weight·rowsᵀ rows`` of rows already cut into tiles: shared, not copied.

        Args:
            rows: ``(tiles, rank, width)``. If they change afterwards, the next use of the matrix raises an error.
            tiles: the cut of the columns; each of its blocks has a matrix of its own.
            damping: λ, positive.
            weight: scale of the squares, for instance one over the number of rows for their mean.
            columns: a factor for each column of the rows, ``(tiles, width)``; None for ones.
        """
        self = cls.__new__(cls)
        self._build(rows, tiles, damping, weight, columns)
        return self

    def _build(self, rows: Tensor, tiles: Tiles, damping: float, weight: float, columns: Tensor | None = None) -> None:
        self._stored, self._version, self._tiles = rows, _version(rows), tiles
        self._columns = None if columns is None else columns.to(wide(rows))
        self.damping, self.weight = positive_damping(damping), float(weight)
        self.dim, self.device = tiles.dim, rows.device
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        # No more columns than rows: the block itself is the smaller matrix, and has nothing to cancel.
        self._inner = tiles.one_each and tiles.width <= rows.shape[1]

    @property
    def rank(self) -> int:
        """The number of rows."""
        return self._stored.shape[1]

    @property
    def rows(self) -> Tensor:
        """R, ``(rank, dim)``, with the weight inside: a copy."""
        rows = self._scaled(self._rows.to(self.dtype) * self.weight**0.5)
        return self._flat(rows.to(self.dtype))

    @property
    def _rows(self) -> Tensor:
        if _version(self._stored) != self._version:
            raise RuntimeError(
                "the estimate behind this matrix has been updated since: call matrix() again after update()"
            )
        return self._stored

    def _slabs(self) -> Iterator[Tensor]:
        """The rows in double precision, a cacheful at a time; each overwrites the one before."""
        step, converted = slab_tiles(self._rows), slabs(self._rows, wide(self._rows))
        if self._columns is None:
            return converted
        return (slab.mul_(c.unsqueeze(1)) for slab, c in zip(converted, self._columns.split(step), strict=True))

    def _scaled(self, x: Tensor) -> Tensor:
        """Tiles ``(tiles, ..., width)`` times the factors of the columns."""
        return x if self._columns is None else x * self._columns.unsqueeze(1)

    @cached_property
    def _gram(self) -> Tensor:
        """``weight·R Rᵀ`` of each block."""
        if len(self._tiles.sizes) == 1:  # added up as they come: all tiles' together could be larger than the rows
            total = torch.zeros(1, self.rank, self.rank, dtype=wide(self._rows), device=self.device)
            for slab in self._slabs():
                total += torch.bmm(slab, slab.mT).sum(0)
            return self.weight * total
        return self.weight * self._tiles.total(torch.cat([slab @ slab.mT for slab in self._slabs()]))

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor of the small matrix of each block, ``λI + R Rᵀ`` or, inner, ``λI + Rᵀ R``."""
        if not self._inner:
            return cholesky(self._gram, self.damping)
        # By QR of the rows on top of √λ I: RᵀR itself would square their condition number.
        double, width = wide(self._rows), self._tiles.width
        floor = self.damping**0.5 * torch.eye(width, dtype=double, device=self.device)
        scaled = (self.weight**0.5 * slab for slab in self._slabs())
        stacked = (torch.cat([rows, floor.expand(len(rows), width, width)], 1) for rows in scaled)
        return torch.cat([torch.linalg.qr(rows).R.mT for rows in stacked])

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, in columns, of ``R Rᵀ`` or, inner, ``Rᵀ R``."""
        if not self._inner:
            values, vectors = torch.linalg.eigh(self._gram)
            return values.clamp_min(0), vectors
        parts = [torch.linalg.svd(slab, full_matrices=False) for slab in self._slabs()]
        values = torch.cat([singular for _, singular, _ in parts]).square()
        return self.weight * values, torch.cat([rows for _, _, rows in parts]).mT

    def _flat(self, x: Tensor) -> Tensor:
        return self._tiles.unpad(self._tiles.join(x))

    def _apply(self, v: Tensor, power: float) -> Tensor:
        rows, tiles = self._rows, self._tiles
        x = tiles.cut(tiles.pad(v.reshape(-1, self.dim).to(wide(rows)))).contiguous()  # (tiles, vectors, width)
        if self._inner and power != 1:
            x = torch.cholesky_solve(x.mT, self._factor).mT if power == -1 else x @ self._dense_power(power)
        else:
            inner = tiles.total(project(rows, self._scaled(x)))  # (blocks, vectors, rank)
            if power == 1:
                base, inner = self.damping, inner * self.weight
            elif power == -1:
                # Scaled at the end, so that the difference is taken between numbers of one size.
                base, inner = 1.0, torch.cholesky_solve(inner.mT, self._factor).mT * -self.weight
            else:
                values, vectors = self._spectrum
                base = self.damping**power
                inner = (inner @ vectors * self._gain(values, power).unsqueeze(1)) @ vectors.mT
            x = base * x + self._scaled(combine(tiles.spread(inner).contiguous(), rows))
            x = x / self.damping if power == -1 else x
        return self._flat(x).reshape(v.shape).to(torch.promote_types(v.dtype, self.dtype))

    def _gain(self, values: Tensor, power: float) -> Tensor:
        """``weight·((λ+σ)^p − λ^p)/σ``, without cancellation for small σ and with its limit at σ = 0."""
        ratio = values / self.damping
        gain = torch.expm1(power * ratio.log1p()) / ratio
        return self.weight * self.damping ** (power - 1) * torch.where(ratio > 0, gain, power)

    def _dense_power(self, power: float) -> Tensor:
        if power == -1:
            return torch.cholesky_inverse(self._factor)
        values, vectors = self._spectrum
        return vectors * (self.damping + values).pow(power).unsqueeze(1) @ vectors.mT

    def diagonal(self, power: float = 1.0) -> Tensor:  # noqa: D102
        if self._inner and power != 1:
            x = self._dense_power(power).diagonal(dim1=1, dim2=2)
        elif power == 1:
            x = self.damping + self.weight * self._column_squares(None)
        elif power == -1:
            x = (1 - self.weight * self._column_squares(self._inverse_factor)) / self.damping
        else:
            values, vectors = self._spectrum
            gain = self._gain(values, power)  # all of one sign, that of the power
            x = self.damping**power + math.copysign(1, power) * self._column_squares(
                (vectors * gain.abs().sqrt().unsqueeze(1)).mT
            )
        return self._flat(x).to(self.dtype)

    def _column_squares(self, mixing: Tensor | None) -> Tensor:
        """The squared lengths of the columns of ``mixing @ R``, ``(tiles, width)``."""
        if mixing is None:
            return torch.cat([slab.square().sum(1) for slab in self._slabs()])
        mixings = self._tiles.spread(mixing).split(slab_tiles(self._rows))
        return torch.cat([(m @ slab).square().sum(1) for m, slab in zip(mixings, self._slabs(), strict=True)])

    @cached_property
    def _inverse_factor(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self._factor.dtype, device=self.device)
        return torch.linalg.solve_triangular(self._factor, eye, upper=False)

    def restrict(self, kept: Tensor) -> LowRank:
        """The matrix of some coordinates alone, λ on the diagonal of the others; the rows are shared.

        Args:
            kept: which coordinates, ``(dim,)`` booleans.
        """
        columns = self._tiles.cut(self._tiles.pad(kept.to(wide(self._rows))))
        columns = columns if self._columns is None else columns * self._columns
        return LowRank.of_tiles(self._rows, self._tiles, self.damping, self.weight, columns)

    def complete(self, v: Tensor, fixed: Tensor) -> Tensor:
        r"""As in the base, with :math:`x_S = -R_S^\top (\lambda I + R_S R_S^\top)^{-1} R_F v_F`: nothing cancels.

        Args:
            v: a vector, ``(dim,)``.
            fixed: ``(dim,)`` booleans.
        """
        if self._inner:
            return super().complete(v, fixed)
        tiles, rest = self._tiles, self.restrict(~fixed)
        given = torch.where(fixed, v, 0)
        x = tiles.cut(tiles.pad(given.to(wide(self._rows)))).unsqueeze(1)  # (tiles, 1, width)
        pull = tiles.total(project(self._rows, self._scaled(x)))  # (blocks, 1, rank)
        weights = torch.cholesky_solve(pull.mT, rest._factor).mT * -self.weight
        answer = rest._scaled(combine(tiles.spread(weights).contiguous(), self._rows))
        answer = self._flat(answer).flatten().to(torch.promote_types(v.dtype, self.dtype))
        return torch.where(fixed, given, answer)

    def multipliers(self, v: Tensor, units: Tensor) -> Tensor:
        r"""As in the base; of units with more coordinates than there are rows by a small matrix of the rows.

        With :math:`Z = K^{-1/2} R_u`, :math:`[G^{-1}]_{uu}^{-1} = \lambda (I + Z^\top (I - Z Z^\top)^{-1} Z)`.

        Args:
            v: a vector, ``(dim,)``.
            units: coordinates of each unit, ``(n, size)`` integers; −1 where a unit is shorter.
        """
        if units.shape[1] <= self.rank or self._inner or not self._one_factor_each(units):
            return super().multipliers(v, units)
        values = torch.where(units >= 0, v[units.clamp_min(0)], 0).to(wide(self._rows))
        eye = torch.eye(self.rank, dtype=values.dtype, device=self.device)
        found = torch.empty_like(values)
        for part, z in self._unit_columns(units):
            inner = eye - self.weight * z.mT @ z
            pushed = torch.linalg.solve(inner, (values[part].unsqueeze(1) @ z).mT)
            found[part] = self.damping * (values[part] + self.weight * (z @ pushed).squeeze(-1))
        return found.to(torch.promote_types(v.dtype, self.dtype))

    def inverse_blocks(self, units: Tensor) -> Tensor:
        """The entries of the inverse within each unit, ``(n, size, size)``; zeros beside a −1.

        Args:
            units: coordinates of each unit, ``(n, size)`` integers; −1 where a unit is shorter.
        """
        if self._inner:
            return _blocks_of(self._dense_power(-1.0), self._places[units.clamp_min(0)], units).to(self.dtype)
        if not self._one_factor_each(units):
            return super().inverse_blocks(units)
        n, size = units.shape
        found = torch.empty(n, size, size, dtype=wide(self._rows), device=self.device)
        eye = torch.eye(size, dtype=found.dtype, device=self.device)
        for part, z in self._unit_columns(units):
            found[part] = (eye - self.weight * z @ z.mT) / self.damping
        return _within_units(found, units).to(self.dtype)

    def logdet(self) -> Tensor:  # noqa: D102
        factors = 2 * self._factor.diagonal(dim1=1, dim2=2).abs().log().sum()
        counted = self._factor.shape[0] * self._factor.shape[1]
        return (factors + (self.dim - counted) * math.log(self.damping)).to(self.dtype)

    def _one_factor_each(self, units: Tensor) -> bool:
        """Whether each unit lies in one block and, where there are several, in one tile."""
        if len(self._tiles.sizes) == 1:
            return True
        tile = self._places[units.clamp_min(0)] // self._tiles.width
        return self._tiles.one_each and bool(((tile == tile[:, :1]) | (units < 0)).all())

    @cached_property
    def _places(self) -> Tensor:
        """Where each coordinate is among the padded ones."""
        return self._tiles.pad(torch.ones(self.dim, dtype=torch.bool, device=self.device)).nonzero().flatten()

    def _unit_columns(self, units: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some units at a time with their columns of ``K^(-1/2) R``, ``(some, size, rank)``; zeros where −1 stands."""
        width, rows = self._tiles.width, self._rows
        places = self._places[torch.where(units >= 0, units, units[:, :1])]  # where a unit is shorter: any of its own
        tile, offset, live = places // width, places % width, (units >= 0).unsqueeze(-1)
        if len(self._tiles.sizes) == 1:  # one factor: units of any tiles go together
            some = max(1, 2**22 // max(1, units.shape[1] * self.rank))
            for part in torch.arange(len(units), device=self.device).split(some):
                columns = rows[tile[part], :, offset[part]].to(wide(rows))  # (some, size, rank)
                if self._columns is not None:
                    columns *= self._columns[tile[part], offset[part]].unsqueeze(-1)
                yield part, columns * live[part] @ self._inverse_factor[0].mT
            return
        step, order = slab_tiles(rows), torch.argsort(tile[:, 0], stable=True)
        starts = torch.arange(0, self._tiles.count, step, device=self.device)
        bounds = torch.searchsorted(tile[order, 0].contiguous(), starts)
        parts = torch.tensor_split(order, bounds[1:].cpu())
        mixings = self._inverse_factor.split(step)
        for start, part, mixing, slab in zip(starts, parts, mixings, self._slabs(), strict=True):
            if len(part):
                yield part, (mixing @ slab)[tile[part] - start, :, offset[part]] * live[part]


class Groups:
    """Coordinates in L groups: sums over each group, and one number for each group handed to its members.

    Groups of one size are summed as one two-dimensional view: one launch for each distinct size, not for each group.

    Args:
        labels: the group of every coordinate, ``(dim,)`` integers from 0 to L − 1, each group with a member. If they
            ascend, and larger groups follow smaller ones, nothing has to be permuted.

    Raises:
        ValueError: if ``labels`` is not a vector of such integers.

    Example:
        >>> Groups(torch.tensor([0, 1, 1])).sum(torch.tensor([5.0, 1.0, 2.0]))
        tensor([5., 3.])
    """

    def __init__(self, labels: Tensor):
        if labels.ndim != 1 or labels.numel() == 0 or labels.is_floating_point() or int(labels.min()) < 0:
            raise ValueError(
                f"groups must be a vector with the group 0…L−1 of every coordinate, got {_shown(labels)}: "
                "torch.arange(rows).repeat_interleave(columns) groups a matrix by its rows"
            )
        sizes = torch.bincount(labels)
        if int(sizes.min()) == 0:
            empty = int((sizes == 0).nonzero()[0])
            raise ValueError(f"group {empty} of {len(sizes)} has no member: number the groups without gaps")
        by_size = torch.argsort(sizes, stable=True)
        place = torch.argsort(by_size)  # of each group among the groups in order of size
        order = torch.argsort(place[labels], stable=True)
        sizes_in_order, counts = torch.unique_consecutive(sizes[by_size], return_counts=True)
        self._set(list(zip(counts.tolist(), sizes_in_order.tolist(), strict=True)), sizes)
        if bool((by_size.diff() != 1).any()):
            self._by_size, self._place = by_size, place
        if bool((order.diff() != 1).any()):
            self._order = order

    @classmethod
    def consecutive(cls, runs: list[tuple[int, int]], device: torch.device) -> Groups:
        """Groups whose members lie side by side.

        Args:
            runs: how many groups of which size follow one another, ``(groups, size)``.
            device: of the vectors to come.
        """
        self = cls.__new__(cls)
        counts, sizes = torch.tensor(runs, device=device).unbind(1)
        self._set(runs, sizes.repeat_interleave(counts))
        return self

    def _set(self, runs: list[tuple[int, int]], sizes: Tensor) -> None:
        self._runs, self.sizes, self.roots = runs, sizes, sizes.to(wide(sizes)).sqrt()
        self._several, self._others = sizes > 1, (sizes - 1).clamp_min(1)
        self.dim, self.count = int(sizes.sum()), len(sizes)
        self._order = self._by_size = self._place = None

    @property
    def labels(self) -> Tensor:
        """The group of every coordinate, ``(dim,)``."""
        numbers = torch.arange(self.count, device=self.sizes.device)
        numbers = numbers if self._by_size is None else self._by_size
        ordered = numbers.repeat_interleave(self.sizes[numbers])
        return ordered if self._order is None else torch.empty_like(ordered).index_copy_(0, self._order, ordered)

    def sum(self, v: Tensor) -> Tensor:
        """Sums over each group, ``(..., dim)`` to ``(..., L)``."""
        return self._reduce(v, lambda view: view.sum(-1))

    def square_sum(self, v: Tensor) -> Tensor:
        """Sums of squares over each group, ``(..., dim)`` to ``(..., L)``, without a vector of squares."""
        return self._reduce(v, lambda view: torch.linalg.vector_norm(view, dim=-1)).square()

    def _reduce(self, v: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        v = v if self._order is None else v[..., self._order]
        values = torch.cat([reduce(view) for view in self._views(v)], -1)
        return values if self._place is None else values[..., self._place]

    def blend(self, v: Tensor, u: Tensor, within: Tensor, coupled: Tensor, out: Tensor | None = None) -> Tensor:
        """``within ∘ (v − its group means) + Q coupled``, the product of a function of a block mean matrix with v.

        Args:
            v: vectors, ``(..., dim)``.
            u: Qᵀv, the sums of v over the groups by the roots of their sizes, ``(..., L)``.
            within: the function of the spread inside each group, ``(L,)``.
            coupled: the function of the coupling of the groups times u, ``(..., L)``.
            out: where to put the result; not v.
        """
        shift = (coupled - within * u) / self.roots
        return self.affine(v, within.to(v.dtype), shift.to(v.dtype), out)

    def spread(self, diagonal: Tensor, traces: Tensor) -> Tensor:
        """The λ of :class:`BlockMean` from the diagonal of C and the traces D, ``(L,)`` each."""
        # Rounding may leave a hair below zero; a group of one has no spread, and its λ is multiplied by nothing.
        return torch.where(self._several, (traces - diagonal).clamp_min(0) / self._others, diagonal)

    def affine(self, v: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
        """``scale·v + shift`` with one scale and one shift for each group, ``(..., L)`` each."""
        if self._by_size is not None:
            scale, shift = scale[..., self._by_size], shift[..., self._by_size]
        ordered = v if self._order is None else v[..., self._order]
        x = torch.empty_like(ordered) if out is None or self._order is not None else out
        counts = [n for n, _ in self._runs]
        parts = (self._views(x), self._views(ordered), scale.split(counts, -1), shift.split(counts, -1))
        for target, view, a, b in zip(*parts, strict=True):
            torch.mul(view, a.unsqueeze(-1), out=target).add_(b.unsqueeze(-1))  # addcmul is scalar code when broadcast
        return x if self._order is None else torch.empty_like(v).index_copy_(-1, self._order, x)

    def _views(self, v: Tensor) -> list[Tensor]:
        """The ordered coordinates as one ``(..., groups, size)`` view for each distinct size."""
        parts = v.split([n * size for n, size in self._runs], -1)
        return [part.unflatten(-1, run) for part, run in zip(parts, self._runs, strict=True)]


class BlockMean(PSDMatrix):
    r"""A full matrix through its block means (arXiv 1804.05484), damped.

    Coordinates in L groups of sizes s, with indicator :math:`P` and :math:`Q = P\,\mathrm{diag}(s)^{-1/2}`. Each
    off-diagonal block of a matrix M becomes its mean, each diagonal block keeps two numbers, its mean diagonal and its
    mean off-diagonal. With :math:`C = Q^\top M Q`, the traces D of the diagonal blocks and
    :math:`\lambda_i = (D_i - C_{ii})/(s_i - 1)`, any function of :math:`\hat M + \delta I` is

    .. math::
        f(\hat M + \delta I)\,v = P f(\lambda+\delta) \circ (v - \bar v) + Q f(C + \delta I)\, Q^\top v

    with the group means :math:`\bar v` of v.

    Cost: O(L³) once, then O(dim + L²) a vector.

    Args:
        groups: the group of every coordinate, ``(dim,)`` integers, or :class:`Groups`.
        coupling: C, ``(L, L)``, positive semidefinite.
        traces: D, ``(L,)``.
        damping: δ, not negative.
        dtype: type of the matrix, that of ``coupling`` by default; factors are in double precision.

    Raises:
        ValueError: if the shapes disagree, ``damping`` is negative, or a singular matrix is inverted.

    Example:
        Both coordinates in one group, M = [[2, 1], [1, 2]]: C is the sum of M over its size, D its trace.

        >>> matrix = BlockMean(torch.tensor([0, 0]), torch.tensor([[3.0]]), torch.tensor([4.0]))
        >>> matrix.to_dense()
        tensor([[2., 1.],
                [1., 2.]])
    """

    def __init__(
        self,
        groups: Tensor | Groups,
        coupling: Tensor,
        traces: Tensor,
        damping: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ):
        self.groups = groups if isinstance(groups, Groups) else Groups(groups)
        count = self.groups.count
        if coupling.shape != (count, count) or traces.shape != (count,):
            raise ValueError(
                f"coupling and traces have shapes {tuple(coupling.shape)} and {tuple(traces.shape)}, but the groups "
                f"number {count}: pass ({count}, {count}) and ({count},)"
            )
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be finite and not negative, got {damping}: 1e-8 to 1e-2 are usual")
        self.dim, self.dtype, self.device = self.groups.dim, dtype or coupling.dtype, coupling.device
        self.damping = float(damping)
        double = wide(coupling)
        self._sizes = self.groups.sizes.to(double)
        self._coupling = coupling.detach().to(double, copy=True)
        self._within = self.groups.spread(self._coupling.diagonal(), traces.detach().to(double)) + self.damping

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._coupling)
        return values.clamp_min(0) + self.damping, vectors

    def parts(self, power: float) -> tuple[Tensor, Tensor]:
        """``f(λ+δ)``, ``(L,)``, and ``f(C+δI)``, ``(L, L)``, for the power f.

        Args:
            power: any real number.

        Raises:
            ValueError: if the power is negative and the matrix singular.
        """
        if power < 0 and not self.damping:
            values = self._spectrum[0]
            noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
            if bool(values[0] <= noise) or not bool(self._within.min() > 0):
                raise ValueError(f"power {power} of a singular matrix with damping 0.0: give it a positive damping")
        if power == 1:
            across = self._coupling + self.damping * torch.eye(
                self.groups.count, dtype=self._coupling.dtype, device=self.device
            )
        elif power == -1:
            across = torch.cholesky_inverse(cholesky(self._coupling, self.damping))
        else:
            values, vectors = self._spectrum
            across = vectors * values.pow(power) @ vectors.mT
        return self._within.pow(power), across

    def _apply(self, v: Tensor, power: float) -> Tensor:
        (within, across), x = self.parts(power), v.to(wide(v))
        u = self.groups.sum(x) / self.groups.roots
        return self.groups.blend(x, u, within, u @ across).to(torch.promote_types(v.dtype, self.dtype))

    def diagonal(self, power: float = 1.0) -> Tensor:  # noqa: D102
        within, across = self.parts(power)
        value = within * (1 - 1 / self._sizes) + across.diagonal() / self._sizes
        return self.groups.affine(value.new_zeros(self.dim), within, value).to(self.dtype)

    def logdet(self) -> Tensor:  # noqa: D102
        return (((self._sizes - 1) * self._within.log()).sum() + self._spectrum[0].log().sum()).to(self.dtype)

    def restrict(self, kept: Tensor) -> BlockMean:
        """The matrix of some coordinates alone, 1 + δ on the diagonal of the others, which become one more group.

        Args:
            kept: which coordinates, ``(dim,)`` booleans.
        """
        count = self.groups.count
        labels = torch.where(kept, self.groups.labels, count)
        members = torch.bincount(labels, minlength=count + 1)
        share = members[:count] / self._sizes
        within = self._within - self.damping
        coupling = self._coupling * (share.unsqueeze(0) * share.unsqueeze(1)).sqrt()
        coupling.diagonal().copy_(within + share * (self._coupling.diagonal() - within))
        traces = coupling.diagonal() + (members[:count] - 1) * within
        coupling = torch.block_diag(coupling, torch.ones_like(coupling[:1, :1]))
        traces = torch.cat([traces, members[count:].to(traces)])
        left, labels = torch.unique(labels, return_inverse=True)
        return BlockMean(labels, coupling[left][:, left], traces[left], self.damping, dtype=self.dtype)


class _Product(torch.autograd.Function):
    """``G**power @ v`` with its derivative in v: the same product, because G is symmetric."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, matrix: PSDMatrix, power: float) -> Tensor:
        ctx.matrix, ctx.power = matrix, power
        return matrix._apply(v, power)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.matrix.apply(gradients[0], ctx.power), None, None


def _blocks_of(inverse: Tensor, places: Tensor, units: Tensor) -> Tensor:
    """Entries of the blocks ``(blocks, width, width)`` of an inverse at the places of each unit."""
    width = inverse.shape[-1]
    block, offset = places // width, places % width
    found = inverse[block.unsqueeze(2), offset.unsqueeze(2), offset.unsqueeze(1)]
    return _within_units(found * (block.unsqueeze(2) == block.unsqueeze(1)), units)


def _within_units(blocks: Tensor, units: Tensor) -> Tensor:
    """Blocks of units, ``(n, size, size)``, with zeros beside each −1."""
    live = units >= 0
    return blocks * (live.unsqueeze(2) & live.unsqueeze(1))


def positive_damping(damping: float) -> float:
    """λ as a number.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}: 1e-5 to 1e-2 are usual")
    return float(damping)


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written to, where torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def cholesky(small: Tensor, damping: float | Tensor) -> Tensor:
    """The factor L of ``small + damping·I = L Lᵀ``; where rounding has hidden λ, eigenvalues are raised above it."""
    damped = small + damping * torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(small)
        noise = values[..., -1:].clamp_min(0) * (values.shape[-1] * torch.finfo(values.dtype).eps)
        root = vectors * (torch.maximum(values, noise) + damping).sqrt().unsqueeze(-2)
        factor = torch.linalg.qr(root.mT).R.mT
    return factor


def _shown(tensor: Tensor) -> str:
    """A tensor in an error message: its shape and, where there is one, its first offending value."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = tensor[~torch.isfinite(tensor)].flatten()[0].item()
        return f"shape {tuple(tensor.shape)} holding {bad}"
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}"
