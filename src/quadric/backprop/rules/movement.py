"""Data movement and constant multiples: operations whose Jacobian does not depend on the input.

Where each of its entries is 0 or 1 it equals its own square, and the node's backward applied to h is the answer. A
diagonal Jacobian is its own transpose, so that backward twice is its square.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quadric.backprop import saved
from quadric.backprop.registry import UnsupportedOperation, linear
from quadric.backprop.saved import first, wanted, widened

MOVES = (
    "AdaptiveMaxPool2D AdaptiveMaxPool3D Alias AsStrided BlockDiag Cat Ceil ChannelShuffle Clamp ClampMax ClampMin "
    "Clone Col2Im ConstantPadNd Cummax Cummin Cumsum DiagEmbed Diagonal DiagonalScatter Embedding Expand Fill Flip "
    "Floor Frac FractionalMaxPool2D FractionalMaxPool3D Gather Hardshrink Hardtanh Im2Col Index IndexCopy IndexFill "
    "IndexPut IndexSelect Kthvalue LiftFresh MaskedFill MaskedScatter MaskedSelect MaxPool2DWithIndices "
    "MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Mode NanToNum Nansum Narrow PackPaddedSequence Permute PixelShuffle "
    "PixelUnshuffle Put ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat ReplicationPad1D ReplicationPad2D "
    "ReplicationPad3D ReshapeAlias Roll Rot90 Round Scatter ScatterAdd Select SelectScatter Sign Slice SliceScatter "
    "Softshrink Sort Split SplitWithSizes Squeeze Stack Sum T Take Threshold Topk Trace Transpose Tril Triu Trunc "
    "Unbind Unfold UnsafeIndex UnsafeIndexPut UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleNearest1D "
    "UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D View "
    "Where Zero"
)
STRICT = (
    "AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "Cummax", "Cummin", "FractionalMaxPool", "IndexBackward", "Masked",
    "MaxPool", "ReflectionPad", "ReplicationPad", "Take",
)  # fmt: skip
ONE_OF_MANY = "MaxBackward0 MinBackward0 MedianBackward1 NanmedianBackward1 RemainderBackward0 FmodBackward0"


def overloads(*stems: str) -> list[str]:
    """The nodes of an operation: autograd numbers its overloads."""
    return [f"{stem}Backward{number}{form}" for stem in stems for number in range(5) for form in ("", "_copy")]


def backward(node: Any, *h: Any) -> Any:
    """A node's own backward, in its own type where it takes no other; half precision holds numbers up to 1 alone."""
    parts = [part for part in h if part is not None]
    own, given = node._input_metadata[0].dtype, parts[0].dtype
    if own == given or not node.name().startswith(STRICT) or not parts[0].numel():
        return node(*h)
    largest = torch.stack([part.abs().amax() for part in parts]).amax()
    scale = torch.where(largest > 0, largest, 1.0)
    below = node(*(None if part is None else (part / scale).to(own) for part in h))
    if type(below) is not tuple:
        return below.to(given) * scale
    return tuple(None if part is None else part.to(given) * scale for part in below)


@linear(*overloads(*MOVES.split()), *ONE_OF_MANY.split(), "torch::autograd::CopyBackwards")
def move(node: Any, h: Any) -> Any:
    """Every entry of the Jacobian is 0 or 1."""
    return backward(node, *h) if type(h) is tuple else backward(node, h)


@linear(*overloads("Deg2Rad", "LeakyRelu", "NativeDropout", "Neg", "Rad2Deg", "RreluWithNoise"))
def scale(node: Any, h: Any) -> Any:
    """The Jacobian is diagonal and symmetric in its use: J applied twice."""
    return node(node(first(h)))


@linear("CopysignBackward0", "CopysignBackward1")
def copysign(node: Any, h: Tensor) -> Any:
    """±x, and nothing of the sign."""
    slope = node(torch.ones_like(h))
    slope = slope[0] if type(slope) is tuple else slope
    below = slope.square() * h
    return (below, None) if len(node.next_functions) == 2 else below


@linear("SgnBackward0")
def flat(node: Any, h: Tensor) -> None:
    """A step has no slope."""


@linear("HardsigmoidBackward0")
def hardsigmoid(node: Any, h: Tensor) -> Tensor:
    """Slope 1/6 between −3 and 3."""
    return torch.where(node._saved_self.abs() < 3, h / 36, 0.0)


@linear("MulBackward1", "DivBackward1", note="by a number")
def scale_by_number(node: Any, h: Tensor) -> Tensor:
    """Y = c x."""
    return node(node(h))


def of_multiple(alpha: float, h: Tensor) -> Tensor:
    """The h of x where that of α x is given: α² h."""
    return h if alpha in (1, -1) else h * alpha**2


@linear("AddBackward0", "SubBackward0")
def add(node: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Y = x ± α z."""
    return h, of_multiple(node._saved_alpha, h)


@linear("AddBackward1", "SubBackward1")
def add_number(node: Any, h: Tensor) -> Tensor:
    """Y = x ± c."""
    return h


@linear("RsubBackward0", "RsubBackward1")
def subtract_from(node: Any, h: Tensor) -> Any:
    """Y = z − α x."""
    scaled = of_multiple(node._saved_alpha, h)
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


@linear("AminmaxBackward0")
def extremes(node: Any, h: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """The least and the largest, each shared evenly among equals."""
    least, largest = h
    below = None
    if least is not None:
        below = node(torch.ones_like(least), None) * node(least, None)
    if largest is not None:
        above = node(None, torch.ones_like(largest)) * node(None, largest)
        below = above if below is None else below + above
    return below


@linear("ScatterReduceBackward0", "IndexReduceBackward0", note="amax, amin, prod, sum and mean")
def reduce_into(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Each entry of the target and of the source reaches one entry of the result, with a slope that backward tells."""
    of_target, of_source = node(torch.ones_like(h))
    if of_target is not None:
        of_target = of_target.square() * h
    if of_source is not None:
        dim, index = saved.axis(node._saved_dim), node._saved_index
        arrived = h.gather(dim, index) if "Scatter" in node.name() else h.index_select(dim, index)
        of_source = of_source.square() * arrived
    return of_target, of_source


@linear("EmbeddingBagBackward0")
def embedding_bag(node: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """Sums, means or largest of rows: the square of what a row weighs in a bag, where it may stand more than once."""
    h = first(h)
    if node._saved_mode == 2:  # the largest
        return node(h)[0], None
    indices, rows, weights = node._saved_indices, node._saved_weight, node._saved_per_sample_weights
    bags = torch.searchsorted(node._saved_offsets, torch.arange(len(indices), device=h.device), right=True) - 1
    counted = (indices != saved.axis(node._saved_padding_idx)).to(h.dtype)
    shares = counted if weights is None else counted * weights
    if node._saved_mode == 1:  # a mean
        shares = shares / node._saved_result2.clamp_min(1)[bags]
    shape = (node._saved_weight_sym_argsize_0, len(h))
    sparse = functools.partial(torch.sparse_coo_tensor, size=shape, check_invariants=False)
    summed = sparse(torch.stack([indices, bags]), shares.to(h.dtype)).coalesce()
    squares = sparse(summed.indices(), summed.values().square())
    if not wanted(node)[1]:
        return squares @ h, None
    return squares @ h, counted * (h[bags] * widened(rows)[indices].square()).sum(1)


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
        return backward(node, h) / node._saved_divisor_override
    kernel = node._saved_kernel_size
    axes, stride = len(kernel), node._saved_stride or kernel
    shape, outputs = node._saved_self.shape[-axes:], h.shape[-axes:]
    for axis in range(axes):
        sizes = window_sizes(
            shape[axis], outputs[axis], kernel[axis], stride[axis], node._saved_padding[axis],
            node._saved_count_include_pad,
        )  # fmt: skip
        h = h / sizes.to(h).view(-1, *[1] * (axes - 1 - axis))
    return backward(node, h)


@linear("AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0")
def adaptive_average_pool(node: Any, h: Tensor) -> Tensor:
    """Average pooling over windows that share an axis as evenly as they can."""
    axes = 2 if "2D" in node.name() else 3
    for axis in range(axes):
        length, outputs = node._saved_self.shape[axis - axes], h.shape[axis - axes]
        places = torch.arange(outputs)
        sizes = -(-(places + 1) * length // outputs) - places * length // outputs
        h = h / sizes.to(h).view(-1, *[1] * (axes - 1 - axis))
    return backward(node, h)


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
        unit = torch.eye(n, dtype=h.dtype, device=h.device).view(1, n, 1, n)
        weights = stretch(unit, [1, outputs[axis]], corners, None, scales[axis])[0, :, 0]  # (inputs, outputs)
        h = (h.movedim(2 + axis, -1) @ weights.square().mT).movedim(-1, 2 + axis)
    return h


# Sampling at points.

BILINEAR, NEAREST = range(2)  # torch's numbers for mode
ZEROS, BORDER, REFLECTION = range(3)  # and for padding_mode


@linear("AffineGridGeneratorBackward0")
def affine_grid(node: Any, h: Tensor) -> Tensor:
    """Every point of the grid is θ times its coordinates and 1."""
    axes = len(node._saved_size) - 2
    unit = torch.eye(axes, axes + 1, dtype=h.dtype, device=h.device).unsqueeze(0)
    places = torch.nn.functional.affine_grid(unit, [1, *node._saved_size[1:]], node._saved_align_corners)
    squares = torch.nn.functional.pad(places.square(), (0, 1), value=1.0).flatten(0, -2)
    return h.flatten(1, -2).mT @ squares


@linear("GridSampler2DBackward0", "GridSampler3DBackward0", note="modes bilinear and nearest")
def grid_sample(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Linear between pixels: squares of its weights for the image, of each channel's slope for the grid."""
    mode = node._saved_interpolation_mode
    if mode == NEAREST:
        return node(h)[0], None
    if mode != BILINEAR:
        raise UnsupportedOperation(
            "there is no rule for the Hessian diagonal through grid_sample with mode='bicubic': use mode='bilinear'"
        )
    image, grid = widened(node._saved_input), widened(node._saved_grid)
    padding, corners = node._saved_padding_mode, node._saved_align_corners
    ops = torch.ops.aten
    backward = ops.grid_sampler_2d_backward if image.ndim == 4 else ops.grid_sampler_3d_backward
    of_image = of_grid = None
    if wanted(node)[0]:
        points, mass = squared_weights(grid, image.shape[:1:-1], padding, corners)
        of_image, _ = backward(h * mass.unsqueeze(1), image, points, mode, ZEROS, corners, [True, False])
    if wanted(node)[1]:
        channels = image.shape[1]
        each, points = image.flatten(0, 1).unsqueeze(1), grid.repeat_interleave(channels, dim=0)
        ones = torch.ones_like(h).flatten(0, 1).unsqueeze(1)
        _, slopes = backward(ones, each, points, mode, padding, corners, [False, True])
        of_grid = (slopes.unflatten(0, (-1, channels)).square() * h.unsqueeze(-1)).sum(1)
    return of_image, of_grid


def squared_weights(grid: Tensor, sizes: torch.Size, padding: int, corners: bool) -> tuple[Tensor, Tensor]:
    """Points whose weights 1 − b and b, times a mass, are the squares of the weights 1 − a and a of the points given.

    Along one axis b = a²/m with the mass m = a² + (1 − a)², and the masses of the axes multiply.
    """
    size = torch.tensor(sizes, dtype=grid.dtype, device=grid.device)  # in the order of the grid's coordinates
    low, high = (0.0 * size, size - 1) if corners else (0.0 * size - 0.5, size - 0.5)
    place = (grid + 1) / 2 * (high - low) + low
    if padding == REFLECTION:
        period = 2 * (high - low).clamp_min(1e-30)
        place = (place - low).remainder(period)
        place = torch.minimum(place, period - place) + low
    if padding != ZEROS:
        place = place.clamp(torch.zeros_like(size), size - 1)
    a = place - place.floor()
    mass = a.square() + (1 - a).square()
    moved = place.floor() + a.square() / mass
    span = torch.where(high == low, 1.0, high - low)
    return (moved - low) / span * 2 - 1, mass.prod(-1)
