"""How what a node saved is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

__all__ = ["axes", "axis", "checkpoints", "first", "raw_names", "rereadable", "wanted", "widened"]


def widened(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def axis(number: int) -> int:
    """A saved axis: torch shows a negative one as an unsigned number of 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def axes(numbers: Any) -> list[int]:
    """Saved axes, of which there may be one, several, or None for all of them, which is an empty list."""
    if numbers is None:
        return []
    return [axis(numbers)] if isinstance(numbers, int) else [axis(number) for number in numbers]


def first(part: Any) -> Any:
    """The g or h of the first output, of a node that may have several."""
    return part[0] if type(part) is tuple else part


def wanted(node: Any) -> list[bool]:
    """Which inputs a node has a gradient for."""
    return [below is not None for below, _ in node.next_functions]


# Activation checkpointing lets every saved tensor be read once in a backward. We read it too, before autograd does.


@cache
def raw_names(kind: type) -> list[str]:
    """The names of what a kind of node saves, not unpacked."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def checkpoints(node: Any) -> list[Any]:
    """What stands in for the saved tensors of a node that ``torch.utils.checkpoint`` will compute again."""
    held = []
    for name in raw_names(type(node)):
        part = getattr(node, name)
        for raw in part if isinstance(part, tuple | list) else (part,):
            # Older versions of torch do not show what is packed: there autograd raises its own CheckpointError.
            if getattr(raw, "unpack_hook", None) is not None and isinstance(raw.data, checkpoint._Holder):
                held.append(raw.data)
    return held


class _Lasting(dict):
    """Entries that are not forgotten when they have been read."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if value is not None:
            super().__setitem__(key, value)


@contextmanager
def rereadable(holders: Iterable[Any]) -> Iterator[None]:
    """Let checkpointed tensors be read as often as one likes."""
    for holder in holders:
        holder.handles = _Lasting(holder.handles)
    try:
        yield
    finally:
        for holder in holders:
            holder.handles = dict(holder.handles)
