"""Maps: how the weight of a layer meets its inputs, written as rows.

Every map here is, for each of its groups, one product ``z = a Wᵀ`` of rows of inputs a ``(rows, n)`` with a matrix
W ``(o, n)``. For a linear layer a row is a token or an example; for a convolution it is the patch behind one position
of the output; for a transposed convolution it is one position of the input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution", "Linear", "Map", "Sizes", "map_of"]

Mixing = Callable[[Tensor], Tensor]


class Sizes(NamedTuple):
    """How large a map is in one pass.

    Args:
        groups: Matrices that the weight holds.
        rows: Rows of inputs, r.
        features: Length n of a row.
        outputs: Outputs o of a row.
    """

    groups: int
    rows: int
    features: int
    outputs: int


class Map(ABC):
    """What a layer does with its inputs, its weight and its bias; the same bits as torch's own."""

    @abstractmethod
    def output(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    @abstractmethod
    def other_gradients(
        self, g: Tensor, a: Tensor, weight: Tensor, *, of_input: bool, of_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the input and of the bias, where asked for."""

    @abstractmethod
    def weight_gradient(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        """The gradient ``gᵀ a`` of the weight, in the weight's shape."""

    def during(self, g: Tensor, a: Tensor, *, of_input: bool, of_bias: bool) -> Map:
        """The map for one backward pass, in which the other gradients will be asked for after that of the weight."""
        return self

    def plain(self) -> Map:
        """The map without a pass."""
        return self

    @abstractmethod
    def smaller_sides(self, sizes: Sizes) -> tuple[int, int]:
        """Of what a mixing meets, the columns, and of what a smoother meets, the rows: the fewest there can be."""

    @abstractmethod
    def mixed_gradient(self, g: Tensor, a: Tensor, weight: Tensor, mix: Mixing) -> Tensor:
        """The gradient ``gᵀ mix(a) = mix(g)ᵀ a`` for a symmetric mixing of the rows: ``mix`` meets one of the two."""

    def smoothed_gradient(self, g: Tensor, a: Tensor, weight: Tensor, smoother: Tensor) -> Tensor:
        """The gradient ``gᵀ (a S)`` for a symmetric matrix S over the features, ``(..., n, n)``."""
        matrix = self.matrix(self.weight_gradient(g, a, weight)).to(smoother.dtype)
        return self.weight(matrix @ smoother, weight)

    @abstractmethod
    def sizes(self, g: Tensor, a: Tensor, weight: Tensor) -> Sizes:
        """How large the map is in this pass."""

    @abstractmethod
    def rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:
        """The rows of inputs, all or those of some numbers: ``(..., rows, n)``, groups in front where there are any."""

    @abstractmethod
    def output_rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:
        """The same rows of the gradients with respect to the outputs: ``(..., rows, o)``."""

    @abstractmethod
    def geometry(self) -> list[int]:
        """The map in numbers, for :func:`map_of`."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as ``(..., o, n)``."""

    @abstractmethod
    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix ``(..., o, n)`` in the shape of the weight ``like``."""


class Linear(Map):
    """``z = a Wᵀ + b`` over the last axis of inputs of any rank: ``torch.nn.functional.linear``."""

    def output(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(a, weight, bias)

    def other_gradients(  # noqa: D102
        self, g: Tensor, a: Tensor, weight: Tensor, *, of_input: bool, of_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        of_a = of_b = None
        if of_input and a.ndim == 1:
            of_a = weight.t().mv(g)
        elif of_input and a.ndim == 2 and not a.is_contiguous() and a.stride() == (1, a.shape[0]):
            of_a = weight.t().mm(g.t()).t()  # the order that torch takes for such an input
        elif of_input:
            of_a = g.mm(weight) if g.ndim == 2 else _flat(g).mm(weight).view(a.shape)
        if of_bias:
            # Strided inputs of more axes meet the bias apart from the product: their gradients are summed together.
            of_b = _flat(g).sum(0) if a.ndim < 3 or a.is_contiguous() else g.sum_to_size(g.shape[-1])
        return of_a, of_b

    def weight_gradient(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return _flat(g).t().mm(_flat(a))

    def mixed_gradient(self, g: Tensor, a: Tensor, weight: Tensor, mix: Mixing) -> Tensor:  # noqa: D102
        g, a = _flat(g), _flat(a)
        return mix(g).t().mm(a) if g.shape[1] <= a.shape[1] else g.t().mm(mix(a))

    def smoothed_gradient(self, g: Tensor, a: Tensor, weight: Tensor, smoother: Tensor) -> Tensor:  # noqa: D102
        if a.numel() >= weight.numel():
            return super().smoothed_gradient(g, a, weight, smoother)
        # Fewer rows than outputs: the inputs are the smaller factor.
        return self.weight_gradient(g, (a.to(smoother.dtype) @ smoother).to(g.dtype), weight)

    def sizes(self, g: Tensor, a: Tensor, weight: Tensor) -> Sizes:  # noqa: D102
        outputs, features = weight.shape
        return Sizes(1, g.numel() // outputs if outputs else 0, features, outputs)

    def smaller_sides(self, sizes: Sizes) -> tuple[int, int]:  # noqa: D102
        return min(sizes.features, sizes.outputs), min(sizes.rows, sizes.outputs)

    def rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:  # noqa: D102
        return _picked(_flat(a), picks)

    def output_rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:  # noqa: D102
        return _picked(_flat(g), picks)

    def geometry(self) -> list[int]:  # noqa: D102
        return []

    def matrix(self, weight: Tensor) -> Tensor:  # noqa: D102
        return weight

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:  # noqa: D102
        return matrix


@dataclass(frozen=True)
class Convolution(Map):
    """A convolution or transposed convolution over any number of axes, zero-padded: ``torch.convolution``.

    Args:
        stride: For each axis.
        padding: For each axis.
        dilation: For each axis.
        transposed: Whether it is the transposed one.
        output_padding: For each axis; of a transposed one.
        groups: Groups of channels that do not meet.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def _arguments(
        self,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def output(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return torch.convolution(a, weight, bias, *self._arguments)

    def other_gradients(  # noqa: D102
        self, g: Tensor, a: Tensor, weight: Tensor, *, of_input: bool, of_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not of_input and not of_bias:
            return None, None
        of_a, _, of_b = self._backward(g, a, weight, of_input, False, of_bias)
        return of_a, of_b

    def weight_gradient(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return self._backward(g, a, weight, False, True, False)[1]

    def during(self, g: Tensor, a: Tensor, *, of_input: bool, of_bias: bool) -> Map:  # noqa: D102
        return _ConvolutionPass(*self._arguments, g, a, of_input, of_bias) if of_input or of_bias else self

    def _backward(self, g: Tensor, a: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        outputs = g.shape[1:2]
        return torch.ops.aten.convolution_backward(g, a, weight, outputs, *self._arguments, wanted)

    def mixed_gradient(self, g: Tensor, a: Tensor, weight: Tensor, mix: Mixing) -> Tensor:  # noqa: D102
        if self.transposed:
            return self.weight_gradient(g, self._image(mix(self._pixels(a, None)), a), weight)
        return self.weight_gradient(self._image(mix(self._pixels(g, None)), g), a, weight)

    def sizes(self, g: Tensor, a: Tensor, weight: Tensor) -> Sizes:  # noqa: D102
        outputs, features = self.matrix(weight).shape[-2:]
        image = a if self.transposed else g
        return Sizes(self.groups, image.numel() // image.shape[1] if image.shape[1] else 0, features, outputs)

    def smaller_sides(self, sizes: Sizes) -> tuple[int, int]:  # noqa: D102
        return sizes.features if self.transposed else sizes.outputs, sizes.outputs

    def rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:  # noqa: D102
        return self._pixels(a, picks) if self.transposed else self._patches(a, g.shape[2:], weight.shape[2:], picks)

    def output_rows(self, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None) -> Tensor:  # noqa: D102
        if not self.transposed:
            return self._pixels(g, picks)
        # The outputs that one input reaches are what the convolution that this one transposes would read.
        return self._patches(g, a.shape[2:], weight.shape[2:], picks)

    def geometry(self) -> list[int]:  # noqa: D102
        each = (*self.stride, *self.padding, *self.dilation, *self.output_padding)
        return [self.transposed, self.groups, *each]

    def matrix(self, weight: Tensor) -> Tensor:  # noqa: D102
        if self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).mT
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:  # noqa: D102
        return (matrix.mT if self.transposed else matrix).reshape(like.shape)

    def _pixels(self, image: Tensor, picks: Tensor | None) -> Tensor:
        # Positions of an image as rows of channels, (groups, rows, channels of a group).
        flat = image.flatten(2)
        if picks is None:
            rows = flat.movedim(1, -1).reshape(-1, flat.shape[1])
        else:
            rows = flat[picks // flat.shape[2], :, picks % flat.shape[2]]
        return rows.unflatten(1, (self.groups, -1)).movedim(1, 0)

    def _image(self, rows: Tensor, like: Tensor) -> Tensor:
        # The inverse of _pixels for all positions.
        batch, channels, *positions = like.shape
        flat = rows.movedim(0, 1).reshape(batch, math.prod(positions), channels)
        return flat.movedim(-1, 1).reshape(like.shape)

    def _patches(self, image: Tensor, positions: torch.Size, reach: torch.Size, picks: Tensor | None) -> Tensor:
        # What the kernel sees at some positions, (groups, rows, channels of a group × kernel); no other is unfolded.
        if picks is None:
            picks = torch.arange(len(image) * math.prod(positions), device=image.device)
        example, step = picks, 1
        places: Tensor | None = None  # among the pixels of an image, (rows, kernel); negative in the padding
        for axis in reversed(range(len(positions))):
            line, example = example % positions[axis], example // positions[axis]
            geometry = self.stride[axis], self.padding[axis], self.dilation[axis], step
            here = _sight(image.shape[2 + axis], positions[axis], reach[axis], geometry, image.device)[line]
            places = here if places is None else (here.unsqueeze(2) + places.unsqueeze(1)).flatten(1)
            step *= image.shape[2 + axis]
        flat = image.flatten(2)
        if not any(self.padding):
            seen = flat[example.unsqueeze(1), :, places]  # (rows, kernel, channels)
        else:
            seen = flat[example.unsqueeze(1), :, places.clamp_min(0)] * (places >= 0).unsqueeze(-1)  # pyright: ignore
        return seen.mT.reshape(len(picks), self.groups, -1).movedim(1, 0)


@lru_cache(maxsize=1024)
def _sight(size: int, positions: int, reach: int, geometry: tuple[int, int, int, int], device: torch.device) -> Tensor:
    # The pixels that a kernel sees along one axis from each position, (positions, reach); negative in the padding.
    stride, padding, dilation, step = geometry
    at = torch.arange(positions)[:, None] * stride - padding + torch.arange(reach) * dilation
    return torch.where((at >= 0) & (at < size), at * step, -(2**48)).to(device)


def _flat(x: Tensor) -> Tensor:
    # All axes but the last one as rows.
    return x if x.ndim == 2 else x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def _picked(rows: Tensor, picks: Tensor | None) -> Tensor:
    return rows if picks is None else rows.index_select(0, picks)


@dataclass(frozen=True)
class _ConvolutionPass(Convolution):
    # One call gives all gradients sooner than two, and CPUs get that of the bias from the product for the weight's.

    g: Tensor
    a: Tensor
    of_input: bool
    of_bias: bool
    others: list[Tensor | None] = field(default_factory=list)

    def plain(self) -> Map:
        return Convolution(*self._arguments)

    def weight_gradient(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        if g is not self.g or a is not self.a:  # one of them is mixed
            return super().weight_gradient(g, a, weight)
        of_a, of_weight, of_b = self._backward(g, a, weight, self.of_input, True, self.of_bias)
        self.others[:] = [of_a, of_b]
        return of_weight

    def other_gradients(
        self, g: Tensor, a: Tensor, weight: Tensor, *, of_input: bool, of_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.others:
            return super().other_gradients(g, a, weight, of_input=of_input, of_bias=of_bias)
        of_a, of_b = self.others
        return of_a, of_b


def map_of(geometry: list[int]) -> Map:
    """The map that has this :meth:`Map.geometry`."""
    if not geometry:
        return Linear()
    transposed, groups, *each = geometry
    axes = len(each) // 4
    stride, padding, dilation, output_padding = (tuple(each[i * axes : (i + 1) * axes]) for i in range(4))
    return Convolution(stride, padding, dilation, bool(transposed), output_padding, groups)
