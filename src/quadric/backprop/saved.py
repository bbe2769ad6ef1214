"""How what a node saved is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["axes", "axis", "first", "wanted", "widened"]


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
