"""Products of two tensors: the backward of each operand with the other operand squared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import linear, rule
from quadric.backprop.rules.elementwise import curved
from quadric.backprop.rules.movement import of_multiple
from quadric.backprop.saved import axis, wanted
from quadric.backprop.squares import square, times_square


def of_right(left_squared: Tensor, h: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The h of B in Y = A B, in the layout of B: a weight is given transposed, and is best answered so."""
    if strides[0] < strides[1]:
        return (h.mT @ left_squared).mT
    return left_squared.mT @ h


@linear("MmBackward0")
def mm(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Y = A B."""
    left, right = wanted(node)
    return (
        times_square(h, node._saved_mat2.mT) if left else None,
        of_right(square(node._saved_self, h), h, node._saved_mat2_sym_strides) if right else None,
    )


@linear("AddmmBackward0")
def addmm(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = β C + α A B."""
    _, left, right = wanted(node)
    inner = of_multiple(node._saved_alpha, h)
    return (
        of_multiple(node._saved_beta, h),
        times_square(inner, node._saved_mat2.mT) if left else None,
        of_right(square(node._saved_mat1, h), inner, node._saved_mat2_sym_strides) if right else None,
    )


@linear("BmmBackward0")
def bmm(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A product for each element of a batch."""
    left, right = wanted(node)
    return (
        h @ square(node._saved_mat2, h).mT if left else None,
        square(node._saved_self, h).mT @ h if right else None,
    )


@linear("BaddbmmBackward0", "AddbmmBackward0")
def baddbmm(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = β C + α A B for each element of a batch, or summed over the batch."""
    _, left, right = wanted(node)
    inner = of_multiple(node._saved_alpha, h)
    return (
        of_multiple(node._saved_beta, h),
        inner @ square(node._saved_batch2, h).mT if left else None,
        square(node._saved_batch1, h).mT @ inner if right else None,
    )


@linear("MvBackward0")
def mv(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Y = A x."""
    left, right = wanted(node)
    return (
        torch.outer(h, square(node._saved_vec, h)) if left else None,
        square(node._saved_self, h).mT @ h if right else None,
    )


@linear("AddmvBackward0")
def addmv(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = β c + α A x."""
    _, left, right = wanted(node)
    inner = of_multiple(node._saved_alpha, h)
    return (
        of_multiple(node._saved_beta, h),
        torch.outer(inner, square(node._saved_vec, h)) if left else None,
        square(node._saved_mat, h).mT @ inner if right else None,
    )


@linear("AddrBackward0")
def addr(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = β C + α a bᵀ."""
    _, left, right = wanted(node)
    inner = of_multiple(node._saved_alpha, h)
    return (
        of_multiple(node._saved_beta, h),
        inner @ square(node._saved_vec2, h) if left else None,
        square(node._saved_vec1, h) @ inner if right else None,
    )


@rule("DotBackward0", "VdotBackward0", note="of real vectors")
def dot(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """Y = aᵀ b; where a and b are one vector the slope of both together is 2a and the bend 2."""
    a, b = node._saved_self, node._saved_tensor if hasattr(node, "_saved_tensor") else node._saved_other
    if node.next_functions[0] == node.next_functions[1]:
        return curved(h, 2 * a, g, torch.full_like(a, 2.0)), None
    left, right = wanted(node)
    if h is None:
        return None, None
    return h * square(b, h) if left else None, h * square(a, h) if right else None


@linear("MulBackward0")
def mul(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Y = a b, elementwise."""
    left, right = wanted(node)
    return (
        h * square(node._saved_other, h) if left else None,
        h * square(node._saved_self, h) if right else None,
    )


@linear("AddcmulBackward0")
def addcmul(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = c + v a b, elementwise."""
    _, left, right = wanted(node)
    inner = of_multiple(node._saved_value, h)
    return (
        h,
        inner * square(node._saved_tensor2, h) if left else None,
        inner * square(node._saved_tensor1, h) if right else None,
    )


@linear("LerpBackward1")
def lerp(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Y = (1 − w) x + w z."""
    x, z, w = wanted(node)
    weight = node._saved_weight
    return (
        h * square(1 - weight, h) if x else None,
        h * square(weight, h) if z else None,
        h * square(node._saved_end - node._saved_self, h) if w else None,
    )


@linear("ConvolutionBackward0", "ConvolutionOverrideableBackward0")
def convolution(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """A convolution or transposed convolution, with any groups, stride and dilation."""
    below, weight, bias = wanted(node)
    return torch.ops.aten.convolution_backward(
        h,
        square(node._saved_input, h) if weight else node._saved_input.to(h.dtype),
        square(node._saved_weight, h, 1) if below else node._saved_weight.to(h.dtype),
        [node._saved_bias_sym_sizes_opt[0]] if bias else None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
        [below, weight, bias],
    )


@linear("TrilinearBackward0")
def trilinear(node: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Σ a b c over some axes: in one operand, the square of what the other two make summed over the axes it lacks."""
    summed = sorted(node._saved_sumdim)
    lacking = [sorted(getattr(node, f"_saved_expand{place}")) for place in (1, 2, 3)]
    operands = [getattr(node, f"_saved_i{place}") for place in (1, 2, 3)]
    for place, axes in enumerate(lacking):
        for dim in axes if operands[place] is not None else ():  # what no other operand needs is not saved
            operands[place] = operands[place].unsqueeze(dim)
    for dim in summed:
        h = h.unsqueeze(dim)
    below: list[Tensor | None] = []
    for place, want in enumerate(wanted(node)):
        if not want:
            below.append(None)
            continue
        one, other = operands[:place] + operands[place + 1 :]
        inside = [dim for dim in lacking[place] if dim in summed]
        slope = one * other
        slope = slope.sum(inside, keepdim=True) if inside else slope
        below.append((h * square(slope, h)).sum(lacking[place]))
    return tuple(below)


@linear("LinalgCrossBackward0")
def cross(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A × b: each entry meets the two others of the other operand."""
    dim = axis(node._saved_dim)
    one, two = (h.roll(-step, dim) for step in (1, 2))

    def other_operand(x: Tensor) -> Tensor:
        x = square(x, h)
        return x.roll(-1, dim) * two + x.roll(-2, dim) * one

    left, right = wanted(node)
    return other_operand(node._saved_other) if left else None, other_operand(node._saved_self) if right else None
