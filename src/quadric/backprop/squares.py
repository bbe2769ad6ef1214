"""Squares of the operands of products; that of a weight used many times is formed once a walk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["keeping", "square"]


class _Kept(threading.local):
    """What the walk that runs in this thread keeps: squares by the memory of their tensor, for tensors used again."""

    reused: frozenset[int] = frozenset()
    squares: dict[tuple, Tensor] | None = None


_kept = _Kept()


@contextmanager
def keeping(reused: frozenset[int], squares: dict[tuple, Tensor]) -> Iterator[None]:
    """Keep the squares of tensors that start at the addresses ``reused``."""
    before = _kept.reused, _kept.squares
    _kept.reused, _kept.squares = reused, squares
    try:
        yield
    finally:
        _kept.reused, _kept.squares = before


def square(x: Tensor, h: Tensor) -> Tensor:
    """x² in the type of h."""
    if _kept.squares is None or x.data_ptr() not in _kept.reused:
        return squared(x, h.dtype)
    key = (x.data_ptr(), x.shape, x.stride(), x._version, h.dtype)
    if key not in _kept.squares:
        _kept.squares[key] = squared(x, h.dtype)
    return _kept.squares[key]


def squared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, whatever the two types."""
    x = x.to(torch.promote_types(x.dtype, dtype))
    return (x * x).to(dtype)
