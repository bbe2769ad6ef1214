"""Data movement and constant multiples: operations whose Jacobian does not depend on the input.

Where each of its entries is 0 or 1 it equals its own square, and the node's backward applied to h is the answer. A
diagonal Jacobian is its own transpose, so that backward twice is its square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import linear

MOVES = (
    "AdaptiveMaxPool2D AdaptiveMaxPool3D Alias AsStrided BlockDiag Cat Ceil ChannelShuffle Clamp ClampMax ClampMin "
    "Clone Col2Im ConstantPadNd Cummax Cummin Cumsum DiagEmbed Diagonal DiagonalScatter Embedding Expand Fill Flip "
    "Floor Frac FractionalMaxPool2D FractionalMaxPool3D Gather Hardshrink Hardtanh Im2Col Index IndexCopy IndexFill "
    "IndexPut IndexSelect Kthvalue LiftFresh MaskedFill MaskedScatter MaskedSelect MaxPool2DWithIndices "
    "MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Mode NanToNum Nansum Narrow Permute PixelShuffle PixelUnshuffle Put "
    "ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D "
    "ReshapeAlias Roll Rot90 Round Scatter ScatterAdd Select SelectScatter Sign Slice SliceScatter Softshrink Sort "
    "Split SplitWithSizes Squeeze Stack Sum T Take Threshold Topk Trace Transpose Tril Triu Trunc Unbind Unfold "
    "UnsafeIndex UnsafeIndexPut UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleNearest1D "
    "UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D View "
    "Where Zero"
)
ONE_OF_MANY = "MaxBackward0 MinBackward0 MedianBackward1 NanmedianBackward1 RemainderBackward0 FmodBackward0"


def overloads(*stems: str) -> list[str]:
    """The nodes of an operation: autograd numbers its overloads."""
    return [f"{stem}Backward{number}" for stem in stems for number in range(5)]


@linear(*overloads(*MOVES.split()), *ONE_OF_MANY.split(), "torch::autograd::CopyBackwards")
def move(node: Any, h: Any) -> Any:
    """Every entry of the Jacobian is 0 or 1."""
    return node(*h) if type(h) is tuple else node(h)


@linear(*overloads("Deg2Rad", "Hardsigmoid", "LeakyRelu", "NativeDropout", "Neg", "Rad2Deg", "RreluWithNoise"))
def scale(node: Any, h: Any) -> Any:
    """The Jacobian is diagonal and symmetric in its use: J applied twice."""
    return node(node(h[0] if type(h) is tuple else h))


@linear("MulBackward1", "DivBackward1", note="by a number")
def scale_by_number(node: Any, h: Tensor) -> Tensor:
    """Y = c x."""
    return node(node(h))


@linear("AddBackward0", "SubBackward0")
def add(node: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Y = x ± α z."""
    return h, h if node._saved_alpha in (1, -1) else h * node._saved_alpha**2


@linear("AddBackward1", "SubBackward1")
def add_number(node: Any, h: Tensor) -> Tensor:
    """Y = x ± c."""
    return h


@linear("RsubBackward0", "RsubBackward1")
def subtract_from(node: Any, h: Tensor) -> Any:
    """Y = z − α x."""
    scaled = h if node._saved_alpha in (1, -1) else h * node._saved_alpha**2
    return (scaled, h) if len(node.next_functions) == 2 else scaled


@linear("ToCopyBackward0")
def convert(node: Any, h: Tensor) -> Tensor:
    """A conversion of type or device: the type of h is the walk's affair."""
    below, output = node.next_functions[0]
    device = below.variable.device if hasattr(below, "variable") else below._input_metadata[output].device
    return h.to(device)


@linear("MeanBackward0", "MeanBackward1")
def mean(node: Any, h: Tensor) -> Tensor:
    """Every entry of the Jacobian is 0 or 1/n."""
    return node(h) / max(node._saved_self_sym_numel // max(h.numel(), 1), 1)


@linear("IndexAddBackward0")
def index_add(node: Any, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """Y = x, and α times the source added at some places."""
    x, source = node(h)
    return x, None if source is None else source * node._saved_alpha


@linear("LerpBackward0")
def lerp(node: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Y = (1 − c) x + c z."""
    return h * (1 - node._saved_weight) ** 2, h * node._saved_weight**2


# Averages over windows: an entry of the Jacobian is 0 or 1 / (the size of the window).


def window_sizes(length: int, outputs: int, kernel: int, stride: int, padding: int, count_padding: bool) -> Tensor:
    """How many places each window along one axis counts."""
    start = torch.arange(outputs) * stride - padding
    stop = (start + kernel).clamp_max(length + padding)
    return stop - start if count_padding else stop.clamp_max(length) - start.clamp_min(0)


@linear("AvgPool2DBackward0", "AvgPool3DBackward0")
def average_pool(node: Any, h: Tensor) -> Tensor:
    """Average pooling over windows of one size."""
    if node._saved_divisor_override:
        return node(h) / node._saved_divisor_override
    kernel = node._saved_kernel_size
    axes, stride = len(kernel), node._saved_stride or kernel
    shape, outputs = node._saved_self.shape[-axes:], h.shape[-axes:]
    for axis in range(axes):
        sizes = window_sizes(
            shape[axis], outputs[axis], kernel[axis], stride[axis], node._saved_padding[axis],
            node._saved_count_include_pad,
        )  # fmt: skip
        h = h / sizes.to(h).view(-1, *[1] * (axes - 1 - axis))
    return node(h)


@linear("AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0")
def adaptive_average_pool(node: Any, h: Tensor) -> Tensor:
    """Average pooling over windows that share an axis as evenly as they can."""
    axes = 2 if "2D" in node.name() else 3
    for axis in range(axes):
        length, outputs = node._saved_self.shape[axis - axes], h.shape[axis - axes]
        places = torch.arange(outputs)
        sizes = -(-(places + 1) * length // outputs) - places * length // outputs
        h = h / sizes.to(h).view(-1, *[1] * (axes - 1 - axis))
    return node(h)


# Interpolation: separable, so the squares of its weights are the product of squares along each axis.


@linear(*overloads("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleTrilinear3D",
                   "UpsampleBilinear2DAa", "UpsampleBicubic2DAa"))  # fmt: skip
def interpolate(node: Any, h: Tensor) -> Tensor:
    """Linear and cubic interpolation."""
    shape, outputs = node._saved_self_sym_sizes[2:], node._saved_output_size
    corners, axes = node._saved_align_corners, len(outputs)
    scales = [getattr(node, f"_saved_scales{end}", None) for end in ([""], ["_h", "_w"], ["_d", "_h", "_w"])[axes - 1]]
    cubic, smooth = "Bicubic" in node.name(), "Aa" in node.name()
    ops = torch.ops.aten
    stretch = {
        (True, True): ops._upsample_bicubic2d_aa, (True, False): ops.upsample_bicubic2d,
        (False, True): ops._upsample_bilinear2d_aa, (False, False): ops.upsample_bilinear2d,
    }[cubic, smooth]  # fmt: skip
    for axis in range(axes):
        n = shape[axis]
        unit = torch.eye(n, dtype=h.dtype, device=h.device).view(1, n, n, 1)
        weights = stretch(unit, [outputs[axis], 1], corners, scales[axis], None)[0, :, :, 0]  # (inputs, outputs)
        h = (h.movedim(2 + axis, -1) @ weights.square().mT).movedim(-1, 2 + axis)
    return h
