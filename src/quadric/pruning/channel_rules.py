"""Rules: what a layer or an operation does to the channels of a signal.

A rule takes the ledger and the arguments of the operation, with signals for tensors. It returns the signal that comes
out, or NotImplemented where it does not understand these arguments; whoever asked then fixes all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from quadric.pruning.channel_atoms import Ledger, Shape, Signal, Size, Weight, parts

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "follow", "heads", "rows"]

CONVOLUTIONS: dict[type[nn.Module], int] = {
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3},
    **{nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3},
}


# ----------------------------------------------------------------------------------------------------- rules of layers
LAYERS = {nn.Linear, *CONVOLUTIONS}
ATTENTION_WIDTH = "nn.MultiheadAttention has one width for its inputs and its heads together"


def rows(ledger: Ledger, layer: nn.Module) -> Tensor:
    """The atoms that the weight and the bias of a linear layer or a convolution produce, (channels,).

    Of a transposed convolution, these are the channels of one group.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    atoms = ledger.along(weight, 1 if isinstance(layer, _ConvTransposeNd) else 0, "producers")
    if isinstance(bias, Tensor):
        times = len(bias) // len(atoms)  # more than 1 for the groups of a transposed convolution
        ledger.tie(ledger.along(bias, 0, "biases"), atoms.repeat(times))
    return atoms


def _linear_of(ledger: Ledger, signal: Signal, weight: Tensor, bias: Tensor | None, who: str) -> Signal:
    ledger.consume(signal, ledger.along(weight, 1, "consumers"), 1, -1, who)
    atoms = ledger.along(weight, 0, "producers")
    if bias is not None:
        ledger.tie(ledger.along(bias, 0, "biases"), atoms)
    return Signal(atoms, -1, signal.ndim)


def _linear(ledger: Ledger, layer: nn.Linear, who: str, input: Signal) -> Signal:
    return _linear_of(ledger, input, layer.weight, layer.bias, who)


def _functional_linear(ledger: Ledger, input: Signal, weight: Weight, bias: Weight | None = None) -> Any:
    if not isinstance(input, Signal) or not isinstance(weight, Weight) or not isinstance(bias, (Weight, type(None))):
        return NotImplemented
    given = None if bias is None else ledger.parameters[bias.name]
    return _linear_of(ledger, input, ledger.parameters[weight.name], given, weight.name)


def _convolution(ledger: Ledger, layer: _ConvNd, who: str, input: Signal) -> Any:
    transposed = isinstance(layer, _ConvTransposeNd)
    return _convolution_of(
        ledger, input, layer.weight, layer.bias, layer.groups, CONVOLUTIONS[type(layer)], transposed, who
    )


def _convolution_of(
    ledger: Ledger,
    signal: Signal,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    space: int,
    transposed: bool,
    who: str,
) -> Signal:
    depthwise = groups > 1 and (weight.shape[0] == groups if transposed else weight.shape[1] == 1)
    made = ledger.along(weight, 1 if transposed and not depthwise else 0, "producers")
    # Groups must stay of equal size, so that a unit has the same channel of every group; of depthwise ones, all of it.
    if depthwise:
        by_group = made.view(groups, -1)
        ledger.tie(made, by_group[:, :1].expand_as(by_group).flatten())
        into, times = by_group[:, 0], 1
    else:
        into, times = ledger.along(weight, 0 if transposed else 1, "consumers"), 1 if transposed else groups
        split = into if transposed else made
        ledger.tie(split, split.view(groups, -1)[:1].expand(groups, -1).flatten())
    ledger.consume(signal, into, times, -space - 1, who)
    if transposed:
        made = made.repeat_interleave(weight.shape[1]) if depthwise else made.repeat(groups)
    if bias is not None:
        ledger.tie(ledger.along(bias, 0, "biases"), made)
    return Signal(made, -space - 1, space + 2)


def _functional_convolution(space: int) -> Callable:
    def rule(
        ledger: Ledger,
        input: Signal,
        weight: Weight,
        bias: Weight | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if (
            not isinstance(input, Signal)
            or not isinstance(weight, Weight)
            or not isinstance(bias, (Weight, type(None)))
        ):
            return NotImplemented
        if groups != 1:  # the number would stay what the forward says
            return NotImplemented
        given = None if bias is None else ledger.parameters[bias.name]
        kernel = ledger.parameters[weight.name]
        return _convolution_of(ledger, input, kernel, given, 1, space, False, weight.name)

    return rule


def follow(ledger: Ledger, norm: nn.Module, atoms: Tensor) -> None:
    """Tie all that a norm keeps for each channel to these atoms."""
    for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        if tensor.ndim == 1:
            role = "followers" if name in {"weight", "bias"} else "statistics"
            ledger.tie(ledger.along(tensor, 0, role), atoms)


def _channel_norm(ledger: Ledger, norm: _BatchNorm | _InstanceNorm, who: str, input: Signal) -> Any:
    if input.atoms is None:
        for parameter in norm.parameters():
            ledger.untouchable.setdefault(ledger.names[id(parameter)], f"{who} reads what is not followed")
        return Signal(ndim=input.ndim)
    # Where the number of axes is not known, the signal comes from a linear layer, whose features the norm is over.
    atoms = ledger.resolve(input, norm.num_features)
    if atoms is None or not norm.affine or input.place not in {None, 1} or (input.ndim is None and input.axis != -1):
        return NotImplemented
    follow(ledger, norm, atoms)
    ndim = 2 if input.ndim is None else input.ndim
    return replace(input, atoms=atoms, ndim=ndim, spread="", restless="")


def _mixing_norm(ledger: Ledger, norm: nn.Module, who: str, input: Signal) -> Signal:
    ledger.fix(input, f"{who} ({type(norm).__name__}) takes statistics over its channels")
    for parameter in norm.parameters():
        ledger.untouchable.setdefault(ledger.names[id(parameter)], f"{who} normalises all features together")
    return Signal(ndim=input.ndim)


def _embedding(ledger: Ledger, layer: nn.Embedding, who: str, input: Signal) -> Any:
    if layer.max_norm is not None:
        return NotImplemented
    ndim = None if input.ndim is None else input.ndim + 1
    return Signal(ledger.along(layer.weight, 1, "producers"), -1, ndim)


def _prelu(ledger: Ledger, layer: nn.PReLU, who: str, input: Signal) -> Any:
    if layer.num_parameters > 1:
        if input.atoms is None or input.place != 1 or input.spread or len(input.atoms) != layer.num_parameters:
            return NotImplemented
        ledger.tie(ledger.along(layer.weight, 0, "followers"), input.atoms)
    return input


def heads(ledger: Ledger, layer: nn.MultiheadAttention) -> None:
    """Tie the rows of queries, keys and values, and the columns of the output, of each head."""
    separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    entries = [
        *((weight, 0, "producers") for weight in ((layer.in_proj_weight,) if layer._qkv_same_embed_dim else separate)),
        (layer.in_proj_bias, 0, "biases"),
        (layer.bias_k, 2, "biases"),
        (layer.bias_v, 2, "biases"),
        (layer.out_proj.weight, 1, "consumers"),
    ]
    head = None
    for tensor, axis, role in entries:
        if tensor is not None:
            atoms = ledger.along(tensor, axis, role)
            by_head = atoms.view(-1, layer.num_heads, layer.head_dim).transpose(0, 1).reshape(layer.num_heads, -1)
            head = by_head[:, :1] if head is None else head
            ledger.tie(by_head.flatten(), head.expand_as(by_head).flatten())
            ledger.heads.append(atoms)
            ledger.uncut.append((atoms, ATTENTION_WIDTH))


def _attention(
    ledger: Ledger,
    layer: nn.MultiheadAttention,
    who: str,
    query: Signal,
    key: Signal,
    value: Signal,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Signal, Signal]:
    ledger.fix((query, key, value, key_padding_mask, attn_mask), f"{who} reads its channels, and {ATTENTION_WIDTH}")
    ledger.reasons.setdefault(ledger.names[id(layer.out_proj.weight)], ATTENTION_WIDTH)
    heads(ledger, layer)
    return Signal(ndim=query.ndim), Signal()


def _transformer(ledger: Ledger, layer: nn.Module, who: str, *args: Any, **kwargs: Any) -> Signal:
    reason = f"{who} ({type(layer).__name__}) takes statistics over its channels"
    ledger.fix((args, kwargs), reason)
    taken = set()
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads(ledger, module)
            taken |= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            wide, narrow = module.linear1, module.linear2
            assert isinstance(wide, nn.Linear)
            assert isinstance(narrow, nn.Linear)
            ledger.tie(rows(ledger, wide), ledger.along(narrow.weight, 1, "consumers"))
            taken |= {id(p) for p in wide.parameters()}
            activation = module.activation
            if activation not in {F.relu, F.gelu} and not isinstance(activation, (nn.ReLU, nn.GELU)):
                ledger.fix(Signal(rows(ledger, wide)), f"the activation of {who} is not understood")
    for parameter in layer.parameters():
        if id(parameter) not in taken:
            ledger.reasons.setdefault(ledger.names[id(parameter)], reason)
    return Signal(ndim=args[0].ndim if args and isinstance(args[0], Signal) else None)


# ------------------------------------------------------------------------------------------------- rules of operations


def _through(ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
    # An elementwise function with f(0) = 0 of its first argument.
    first, *others = list(parts((args, kwargs))) or [None]
    return NotImplemented if others or not isinstance(first, Signal) else first


def _restless(name: str) -> Callable:
    def rule(ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
        found = _through(ledger, *args, **kwargs)
        return found if found is NotImplemented else replace(found, restless=found.restless or name)

    return rule


def _clamp(ledger: Ledger, input: Signal, min: Any = None, max: Any = None, inplace: bool = False) -> Any:
    if not isinstance(input, Signal) or not all(isinstance(b, (int, float, type(None))) for b in (min, max)):
        return NotImplemented
    holds_zero = (min is None or min <= 0) and (max is None or max >= 0)
    return input if holds_zero else replace(input, restless="clamp")


def _hardtanh(ledger: Ledger, input: Signal, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _clamp(ledger, input, min_val, max_val)


def _power(ledger: Ledger, input: Any, exponent: Any) -> Any:
    if not isinstance(input, Signal) or not isinstance(exponent, (int, float)):
        return NotImplemented
    return input if exponent > 0 else replace(input, restless="a power that is not positive")


def _expand_as(ledger: Ledger, input: Any, other: Any) -> Any:
    if not isinstance(input, Signal) or not isinstance(other, Signal):
        return NotImplemented
    found = _paired(ledger, input, other, product=True)
    return found if found is NotImplemented else replace(found, restless=input.restless)


def _sum(ledger: Ledger, input: Any, other: Any, alpha: Any = 1) -> Any:
    return _paired(ledger, input, other, product=False)


def _product(ledger: Ledger, input: Any, other: Any) -> Any:
    return _paired(ledger, input, other, product=True)


def _quotient(ledger: Ledger, input: Any, other: Any, rounding_mode: Any = None) -> Any:
    # Divided by numbers alone: 0 / 0 is not 0.
    return NotImplemented if isinstance(other, Signal) else _paired(ledger, input, other, product=True)


def _paired(ledger: Ledger, one: Any, other: Any, product: bool) -> Any:
    # A sum of two is zero where both are, a product where one is.
    if not isinstance(one, Signal):
        one, other = other, one
    if not isinstance(one, Signal) or one.atoms is None:
        plain = isinstance(one, Signal) and not [
            p for p in parts(other) if not isinstance(p, Signal) or p.atoms is not None
        ]
        return Signal() if plain else NotImplemented
    added = replace(one, restless=one.restless or "a sum with something else")
    if isinstance(other, (int, float)):
        return one if product or other == 0 else added
    if isinstance(other, Size):
        return one if product and not other.counts_channels else NotImplemented
    if isinstance(other, Weight):
        shape = ledger.parameters[other.name].shape
        size = shape[one.axis] if len(shape) >= -one.axis else 1
        if size == 1 and len(one.atoms) > 1:
            return one if product else added
        if one.spread or size != len(one.atoms) or len(shape) > (one.ndim or len(shape)):
            return NotImplemented
        role = "followers" if product or len(shape) == 1 else "producers"
        ledger.tie(ledger.along(ledger.parameters[other.name], len(shape) + one.axis, role), one.atoms)
        return one
    if not isinstance(other, Signal) or other.atoms is None or one.axis != other.axis or one.spread != other.spread:
        return NotImplemented
    if len(one.atoms) != len(other.atoms):
        few, many = sorted((one, other), key=_count)
        if _count(few) > 1:
            return NotImplemented
        ledger.fix(few, "it is spread over all channels of another tensor")  # as in spatial attention
        return many if product else replace(many, restless=many.restless or "a sum with something else")
    ledger.tie(one.atoms, other.atoms)
    restless = (one.restless and other.restless) if product else (one.restless or other.restless)
    ndim = max(one.ndim, other.ndim) if one.ndim and other.ndim else None
    return replace(one, ndim=ndim, restless=restless)


def _count(signal: Signal) -> int:
    return 0 if signal.atoms is None else len(signal.atoms)


def _pool(space: int) -> Callable:
    def rule(ledger: Ledger, input: Any, *args: Any, **kwargs: Any) -> Any:
        over_places = isinstance(input, Signal) and (input.atoms is None or input.axis <= -space - 1)
        plain = not kwargs.get("return_indices") and not _counting(args, kwargs)
        return input if over_places and plain else NotImplemented

    return rule


def _counting(*values: Any) -> bool:
    # Whether the number of channels of something is among the arguments.
    return any(isinstance(size, Size) and size.counts_channels for size in parts(values))


def _resize(ledger: Ledger, input: Any, *args: Any, **kwargs: Any) -> Any:
    plain = isinstance(input, Signal) and input.place == 1 and not input.spread
    return input if plain and not _counting(args, kwargs) else NotImplemented


def _pad(ledger: Ledger, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if not isinstance(input, Signal) or input.atoms is None or not isinstance(pad, (tuple, list)):
        return NotImplemented
    if len(pad) // 2 >= -input.axis and any(size != 0 for size in pad[-2 * input.axis - 2 :]):
        return NotImplemented
    return replace(input, restless=input.restless or "padding with a value") if value else input


def _reduce(ledger: Ledger, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if not isinstance(input, Signal) or dim is None:
        return NotImplemented
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    if not all(isinstance(d, int) and (d < 0 or input.ndim is not None) for d in dims):
        return NotImplemented
    dims = [d if d < 0 else d - (input.ndim or 0) for d in dims]
    if input.atoms is not None and input.axis in dims:
        return NotImplemented
    if keepdim:
        return input
    ndim = None if input.ndim is None else input.ndim - len(dims)
    return replace(input, axis=input.axis + sum(d > input.axis for d in dims), ndim=ndim)


def _flatten(ledger: Ledger, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(input, Signal) or not isinstance(start_dim, int) or not isinstance(end_dim, int):
        return NotImplemented
    if input.ndim is None:
        if (start_dim, end_dim) != (1, -1) or (input.atoms is not None and (input.axis != -1 or input.spread)):
            return NotImplemented
        return replace(input, ndim=2, spread="outer" if input.atoms is not None else "")
    start, end = start_dim % input.ndim, end_dim % input.ndim
    ndim, place = input.ndim - (end - start), input.ndim + input.axis
    if start == end:
        return input
    if input.atoms is None or place > end:
        return replace(input, ndim=ndim)
    if place < start:
        return replace(input, axis=place - ndim, ndim=ndim)
    if input.spread or place not in {start, end}:
        return NotImplemented
    return replace(input, axis=start - ndim, ndim=ndim, spread="inner" if place == start else "outer")


def _view(ledger: Ledger, input: Any, *shape: Any) -> Any:
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
    if not isinstance(input, Signal) or input.place is None or input.spread or len(sizes) <= input.place:
        return NotImplemented
    place = input.place
    ahead, here, behind = sizes[:place], sizes[place], sizes[place + 1 :]
    kept = all(isinstance(size, Size) and size.axis == axis for axis, size in enumerate(ahead))
    others = [size for size in (*behind, *([here] if input.atoms is None else [])) if isinstance(size, Size)]
    if (not kept and not (place == 1 and ahead == [-1] and here != -1)) or any(o.counts_channels for o in others):
        return NotImplemented
    if input.atoms is None:
        return Signal(ndim=len(sizes))
    found = replace(input, axis=place - len(sizes), ndim=len(sizes))
    # A number of channels that comes from a signal of the same channels changes with them, and so does -1.
    if isinstance(here, Size):
        counted = here.of.atoms if here.counts_channels and here.axis is not None else None
        return found if counted is not None and torch.equal(counted, input.atoms) else NotImplemented
    alone = all(size == 1 for size in behind)
    if here == -1 and alone:
        return replace(found, spread="inner" if input.axis < -1 else "")
    if isinstance(here, int) and here > 0 and here % len(input.atoms) == 0 and (alone or here == len(input.atoms)):
        reason = f"the forward pass has the size {here} written into a view: write flatten(1) or -1"
        ledger.uncut.append((input.atoms, reason))
        return replace(found, atoms=input.atoms.repeat_interleave(here // len(input.atoms)))
    return NotImplemented


def _transpose(ledger: Ledger, input: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(input, Signal) or not isinstance(dim0, int) or not isinstance(dim1, int):
        return NotImplemented
    if input.ndim is None and (dim0 >= 0 or dim1 >= 0):
        return NotImplemented
    one, other = (d if d < 0 else d - (input.ndim or 0) for d in (dim0, dim1))
    return replace(input, axis={one: other, other: one}.get(input.axis, input.axis))


def _permute(ledger: Ledger, input: Any, *dims: Any) -> Any:
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else list(dims)
    if not isinstance(input, Signal) or not all(isinstance(d, int) for d in order):
        return NotImplemented
    count = len(order)
    if input.atoms is None:
        return Signal(ndim=count)
    return replace(input, axis=[d % count for d in order].index(input.axis % count) - count, ndim=count)


def _unsqueeze(ledger: Ledger, input: Any, dim: int) -> Any:
    if not isinstance(input, Signal) or not isinstance(dim, int) or (input.ndim is None and dim >= 0):
        return NotImplemented
    back = dim if dim < 0 else dim - (input.ndim or 0) - 1
    ndim = None if input.ndim is None else input.ndim + 1
    return replace(input, axis=input.axis if input.axis > back else input.axis - 1, ndim=ndim)


def _squeeze(ledger: Ledger, input: Any, dim: Any = None) -> Any:
    return NotImplemented if dim is None else _reduce(ledger, input, dim)


def _chunk(ledger: Ledger, input: Any, chunks: int, dim: int = 0) -> Any:
    if not isinstance(input, Signal) or input.atoms is None or input.spread or not isinstance(chunks, int):
        return NotImplemented
    if not isinstance(dim, int):
        return NotImplemented
    axis = dim if dim < 0 or input.ndim is None else dim - input.ndim
    if axis >= 0 or (axis == input.axis and len(input.atoms) % chunks):
        return NotImplemented
    if axis != input.axis:
        return (input,) * chunks
    pieces = input.atoms.view(chunks, -1)  # which must stay of equal size
    ledger.tie(pieces.flatten(), pieces[:1].expand_as(pieces).flatten())
    return tuple(replace(input, atoms=part) for part in pieces)


def _gate(ledger: Ledger, input: Any, dim: int = -1) -> Any:
    pieces = _chunk(ledger, input, 2, dim)
    # x · sigmoid(y)
    return NotImplemented if pieces is NotImplemented or pieces[0] is pieces[1] else pieces[0]


def _join(ledger: Ledger, tensors: Any, dim: Any = 0) -> Any:
    if not isinstance(tensors, (list, tuple)) or not all(
        isinstance(t, Signal) and t.atoms is not None and not t.spread for t in tensors
    ):
        return NotImplemented
    first = tensors[0]
    ndim = next((t.ndim for t in tensors if t.ndim is not None), None)
    if not isinstance(dim, int) or (dim >= 0 and ndim is None) or any(t.axis != first.axis for t in tensors):
        return NotImplemented
    restless = next((t.restless for t in tensors if t.restless), "")
    if (dim if dim < 0 else dim - (ndim or 0)) == first.axis:
        return replace(first, atoms=torch.cat([t.atoms for t in tensors]), ndim=ndim, restless=restless)
    if len({len(t.atoms) for t in tensors}) > 1:
        return NotImplemented
    for other in tensors[1:]:
        ledger.tie(first.atoms, other.atoms)
    return replace(first, ndim=ndim, restless=restless)


def _attribute(ledger: Ledger, value: Any, name: str) -> Any:
    if isinstance(value, Signal) and name == "shape":
        return Shape(value)
    return Signal() if name in {"device", "dtype", "ndim", "is_cuda", "requires_grad"} else NotImplemented


def _size(ledger: Ledger, input: Any, dim: Any = None) -> Any:
    if not isinstance(input, Signal):
        return NotImplemented
    return Shape(input) if dim is None else _item(ledger, Shape(input), dim)


def _item(ledger: Ledger, value: Any, index: Any) -> Any:
    if isinstance(value, (tuple, list)) and isinstance(index, int):
        return value[index]
    if isinstance(value, Shape) and isinstance(index, int):
        ndim = value.of.ndim
        return Size(value.of, index % ndim if ndim else 0 if index == 0 else None)
    if isinstance(value, Shape) and isinstance(index, slice) and value.of.ndim is not None:
        return tuple(Size(value.of, axis) for axis in range(value.of.ndim)[index])
    indices = list(index) if isinstance(index, tuple) else [index]
    if isinstance(value, Weight):  # such as the first rows of a table of positions
        table = ledger.parameters[value.name]
        sliced = len(indices) < table.ndim and all(isinstance(part, slice) for part in indices)
        if sliced and not _counting(indices):
            return Signal(ledger.along(table, table.ndim - 1, "producers"), -1, table.ndim)
    if not isinstance(value, Signal) or value.place is None or value.atoms is None or any(parts(indices)):
        return NotImplemented
    if not all(part is None or isinstance(part, (int, slice)) for part in indices):
        return NotImplemented
    whole = [slice(None)] * ((value.ndim or 0) - sum(part is not None for part in indices))
    taken = [part for part in (*indices, *whole) if part is not None]
    if taken[value.place] != slice(None):
        return NotImplemented
    # The axes that come out, by the axis that went in; -1 for new ones.
    numbers = iter(range(len(taken)))
    origins = [-1 if part is None else next(numbers) for part in (*indices, *whole)]
    left = [origin for origin in origins if origin < 0 or not isinstance(taken[origin], int)]
    return replace(value, axis=left.index(value.place) - len(left), ndim=len(left))


# fmt: off
STILL = (  # functions of each element that leave zero alone
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "hardswish", "softsign",
    "tanhshrink", "hardshrink", "softshrink", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    "neg", "negative", "abs", "absolute", "sin", "tan", "sinh", "asinh", "arcsinh", "atan", "arctan", "erf", "expm1",
    "log1p", "sqrt", "square", "sign", "floor", "ceil", "round", "trunc", "clone", "detach", "contiguous", "to",
    "float", "half", "double", "bfloat16", "type", "cuda", "cpu", "nan_to_num",
)
RESTLESS = (  # and functions that do not
    "sigmoid", "hardsigmoid", "softplus", "logsigmoid", "exp", "cos", "cosh", "log", "reciprocal", "rsqrt",
)
# fmt: on
POOLS = {f"{kind}_pool{k}d": k for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for k in (1, 2, 3)}
RULES: dict[str, Callable] = {
    **dict.fromkeys(STILL, _through),
    **{name: _restless(name) for name in RESTLESS},
    **{name: _pool(k) for name, k in POOLS.items()},
    **dict.fromkeys(("interpolate", "upsample"), _resize),
    **dict.fromkeys(("add", "sub", "subtract", "iadd", "isub"), _sum),
    **dict.fromkeys(("maximum", "minimum"), _sum),
    **dict.fromkeys(("mul", "multiply", "imul"), _product),
    **dict.fromkeys(("div", "divide", "truediv", "itruediv"), _quotient),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "hardtanh": _hardtanh,
    "pow": _power,
    "expand_as": _expand_as,
    "pad": _pad,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    "flatten": _flatten,
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "chunk": _chunk,
    "glu": _gate,
    **dict.fromkeys(("cat", "concat", "concatenate"), _join),
    "size": _size,
    "getitem": _item,
    "linear": _functional_linear,
    **{f"conv{space}d": _functional_convolution(space) for space in (1, 2, 3)},
}
METHODS: dict[str, Callable] = {**RULES, **{f"{name}_": rule for name, rule in RULES.items()}}
FUNCTIONS: dict[Any, Callable] = {
    getattr(home, name): rule for home in (torch, F, operator) for name, rule in METHODS.items() if hasattr(home, name)
}
FUNCTIONS[getattr] = _attribute
MODULES: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _channel_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _channel_norm),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm), _mixing_norm),
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
    **dict.fromkeys((nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder), _transformer),
    **dict.fromkeys((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), _transformer),
}
