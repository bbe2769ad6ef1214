"""What can be done at an operation without a rule, where the user asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import Entry

__all__ = ["FALLBACKS"]


def zero(node: Any, g: Any, h: Any) -> None:
    """Let no h through."""


def probe(node: Any, g: Any, h: Any) -> Any:
    """Σ_k J_ki² h_k, unbiased: (Jᵀ(√|h| z))² for random signs z, those with h above zero and below it apart."""
    if h is None:
        return None
    parts = h if type(h) is tuple else (h,)
    backward = node.apply if hasattr(node, "_forward_cls") else node
    total: list[Tensor | None] = []
    for sign in (1, -1):
        inputs = [None if part is None else signs(part) * (sign * part).clamp_min(0).sqrt() for part in parts]
        below = backward(*inputs)
        below = below if type(below) is tuple else (below,)
        squares = [None if part is None else sign * part.square() for part in below]
        total = [
            a if b is None else b if a is None else a + b
            for a, b in zip(total or [None] * len(squares), squares, strict=True)
        ]
    return tuple(total)


def signs(like: Tensor) -> Tensor:
    """±1 at random, by a generator of its own: the user's stays where it is."""
    generator = torch.Generator(like.device).manual_seed(like.numel())
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


FALLBACKS = {
    "gauss_newton": Entry(probe, "fallback", exact=False, linear=True),
    "zero": Entry(zero, "fallback", exact=False, linear=True),
}
