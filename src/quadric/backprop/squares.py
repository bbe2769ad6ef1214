"""Squares of the operands of products; that of a weight used many times is formed once a walk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["keeping", "square", "times_square"]

CACHEFUL = 2**19  # numbers
LARGE = 2**15  # numbers above which fresh memory costs as much as the square itself


class _Kept(threading.local):
    """What a thread keeps: the squares that one walk uses again, and memory on the CPU for all others."""

    def __init__(self) -> None:
        self.reused: frozenset[int] = frozenset()  # addresses of tensors
        self.squares: dict[tuple, Tensor] = {}
        self.scratch: dict[tuple[int, torch.dtype], Tensor] = {}


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


def square(x: Tensor, h: Tensor, operand: int = 0) -> Tensor:
    """x² in the type of h, rounded once; the next call for the same ``operand`` may overwrite it."""
    if x.data_ptr() in _kept.reused:
        key = (x.data_ptr(), x.shape, x.stride(), x._version, h.dtype)
        if key not in _kept.squares:
            _kept.squares[key] = fresh_square(x, h)
        return _kept.squares[key]
    if x.dtype != torch.promote_types(x.dtype, h.dtype) or x.numel() < LARGE or x.device.type != "cpu":
        return fresh_square(x, h)
    if not x.is_contiguous():  # a weight is given transposed
        return square(x.mT, h, operand).mT if x.mT.is_contiguous() else fresh_square(x, h)
    memory = _kept.scratch.get((operand, h.dtype))
    if memory is None or len(memory) < x.numel():
        with torch.inference_mode(False):  # such tensors could not be written to outside of it
            memory = _kept.scratch[operand, h.dtype] = torch.empty(x.numel(), dtype=h.dtype)
    return torch.mul(x, x, out=memory[: x.numel()].view(x.shape))


def times_square(h: Tensor, weight: Tensor) -> Tensor:
    """``h @ weight²``; a large weight is squared a cacheful of rows at a time, which spares memory and its traffic."""
    rows = max(1, CACHEFUL // max(1, weight.shape[-1]))
    whole = h.device.type != "cpu" or torch.finfo(h.dtype).bits < 32 or weight.data_ptr() in _kept.reused
    if whole or len(weight) <= rows:
        return h @ square(weight, h)
    parts = zip(h.split(rows, -1), weight.split(rows), strict=True)
    total = h.new_zeros(len(h), weight.shape[1])
    for part, weights in parts:
        total.addmm_(part, square(weights, h))
    return total


def fresh_square(x: Tensor, h: Tensor) -> Tensor:
    """x² in memory of its own."""
    dtype = torch.promote_types(x.dtype, h.dtype)
    if x.ndim == 0:
        x = x.new_ones((), dtype=dtype) * x  # what was a Python number has float32 squares otherwise
    x = x.to(dtype)
    return (x * x).to(h.dtype)
