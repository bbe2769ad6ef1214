"""Inverses, linear systems and determinants.

X = A⁻¹ B has the slope −A⁻¹ E X along a matrix E and the bend 2 A⁻¹ E A⁻¹ E X: along the entry i, j of A these are
−(A⁻¹)_ki X_jl and 2 (A⁻¹)_ki (A⁻¹)_ji X_jl.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import linear, rule
from quadric.backprop.rules.elementwise import curved


def of_matrix(inverse: Tensor, x: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """The h of A in X = A⁻¹ B."""
    below = None if h is None else inverse.square().mT @ h @ x.square().mT
    if g is None:
        return below
    bent = 2 * inverse.mT * (inverse.mT @ g @ x.mT)
    return bent if below is None else below + bent


def of_system(
    inverse: Tensor, x: Tensor, g: Tensor | None, h: Tensor | None, left: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The h of A and of B in A X = B, or X A = B."""
    if x.ndim < inverse.ndim:  # one vector for each matrix
        g, h = (None if t is None else t.unsqueeze(-1) for t in (g, h))
        below, of_b = of_system(inverse, x.unsqueeze(-1), g, h, left)
        return below, None if of_b is None else of_b.squeeze(-1)
    if left:
        return of_matrix(inverse, x, g, h), None if h is None else inverse.square().mT @ h
    g, swapped = (None if t is None else t.mT for t in (g, h))
    below = of_matrix(inverse.mT, x.mT, g, swapped)
    return None if below is None else below.mT, None if h is None else h @ inverse.square().mT


@rule("LinalgInvExBackward0")
def inverse(node: Any, g: Any, h: Any) -> Tensor | None:
    """X = A⁻¹."""
    x = node._saved_inverse
    return of_matrix(x, x, g, h)


@rule("LinalgSolveExBackward0")
def solution(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """A X = B, or X A = B."""
    return of_system(torch.linalg.inv(node._saved_A), node._saved_result, g, h, node._saved_left)


@rule("LinalgSolveTriangularBackward0")
def triangular_solution(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """A X = B, or X A = B, with one triangle of A."""
    upper, unit = node._saved_upper, node._saved_unitriangular
    identity = torch.eye(node._saved_self.shape[-1]).to(node._saved_self)
    whole = torch.linalg.solve_triangular(node._saved_self, identity, upper=upper, unitriangular=unit)
    of_a, of_b = of_system(whole, node._saved_result, g, h, node._saved_left)
    if of_a is not None:
        of_a = of_a.triu(int(unit)) if upper else of_a.tril(-int(unit))
    return of_a, of_b


@linear("LinalgDetBackward0")
def determinant(node: Any, h: Tensor) -> Tensor:
    """Linear in each entry, with its cofactor as the slope."""
    return node(torch.ones_like(h)).square() * h[..., None, None]


@rule("LinalgSlogdetBackward0")
def log_determinant(node: Any, g: Any, h: Any) -> Tensor | None:
    """Along an entry ln |det A| has the slope s = (A⁻¹)_ji, and the bend −s²."""
    slope = torch.linalg.inv(node._saved_A).mT
    g, h = (None if t is None or t[1] is None else t[1][..., None, None] for t in (g, h))
    return None if g is None and h is None else curved(h, slope, g, -slope.square())
