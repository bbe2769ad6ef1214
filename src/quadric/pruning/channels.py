"""Channels: which slices of which tensors live and die together.

An output channel of a layer is a slice of its weight, an entry of its bias, the entries of the batch norms that follow,
and a slice of every weight that reads it. A residual addition ties the channels of all layers that are added, a
depthwise convolution ties its inputs to its outputs, and an attention ties the rows of a head. :func:`channel_spaces`
finds this out from a symbolic trace of the model (``torch.fx``), which needs no data and runs no arithmetic.

How: every index of every axis that carries channels is an *atom*. Walking over the traced operations, a
:class:`Signal` says which atoms the channels of a tensor are; an operation passes it on, ties atoms to one another, or,
where it is not understood, fixes them. Tied atoms are one *unit*, and units that the same weight produces are one
:class:`Space`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["Slices", "Space", "channel_spaces"]

ROLES = ("producers", "biases", "followers", "statistics", "consumers")
CONVOLUTIONS: dict[type[nn.Module], int] = {
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3},
    **{nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3},
}


@dataclass(frozen=True)
class Slices:
    """The slices of one tensor that belong to the units of a space.

    Args:
        name: Of the tensor in the model.
        axis: Along which it is sliced.
        units: The unit of each index along the axis, (size of the axis,); -1 where it is in no unit of this space.
    """

    name: str
    axis: int
    units: Tensor

    def over(self, shape: Sequence[int]) -> Tensor:
        """The unit of each element of the tensor, a view of its shape.

        Args:
            shape: Of the tensor.

        Example:
            >>> Slices("fc.weight", 1, torch.tensor([0, 0, 1])).over((2, 3)).tolist()
            [[0, 0, 1], [0, 0, 1]]
        """
        return self.units.view(-1, *[1] * (len(shape) - self.axis - 1)).expand(*shape)


@dataclass(frozen=True)
class Space:
    """Units that can each be removed, and the tensors they run through.

    Args:
        count: Number of units.
        kind: "channel" or "head".
        producers: Weights whose slices make the units: rows, or columns of transposed convolutions and embeddings.
        biases: Biases of those weights.
        followers: Weights and biases of batch norms, and scales, whose entries belong to a unit and are zero with it.
        statistics: Running means and variances.
        consumers: Weights that read the units; an index map repeats where a flatten does.
        fixed: Why no unit may be removed, one sentence; empty where units may be.
        uncut: Why a removed unit keeps its place as zeros; empty where its slices can be cut out.
    """

    count: int
    kind: str
    producers: tuple[Slices, ...]
    biases: tuple[Slices, ...]
    followers: tuple[Slices, ...]
    statistics: tuple[Slices, ...]
    consumers: tuple[Slices, ...]
    fixed: str = ""
    uncut: str = ""

    @property
    def removable(self) -> bool:
        """Whether units may be removed at all."""
        return not self.fixed


def channel_spaces(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> tuple[Space, ...]:
    """The spaces of channels and heads of a model.

    Every weight with two axes or more is a producer in exactly one space. In a residual network all layers that add to
    one stream form one space, and its unit c is channel c in all of them. Inputs are taken to come in batches, and
    arguments of ``forward`` that have a default to have that. The model is traced in training and in evaluation mode;
    a submodule that cannot be traced is seen as a whole, and a model that cannot be traced has the rows of each layer,
    with its bias, for units that may be removed but not cut out.

    Cost: two symbolic traces, and a few operations on index vectors for each layer.

    Args:
        model: The model; it is left as it was.
        weights: The parameters that may be pruned, by name; None for all. A space with another producer is fixed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> hidden, outputs = channel_spaces(model)
        >>> hidden.count, hidden.producers[0].name, hidden.consumers[0].units.tolist()
        (3, '0.weight', [0, 1, 2])
        >>> outputs.fixed
        'the model returns them'
    """
    reader = Reader(model, weights or {})
    try:
        graphs = [_trace(model, training) for training in (True, False)]
    except Exception as error:  # whatever the user's forward raises when it meets a symbol instead of numbers
        reader.take_apart("", f"the model cannot be traced ({_one_line(error)})")
    else:
        for graph, _ in graphs:
            reader.read(graph)
        for name, reason in {name: reason for _, opaque in graphs for name, reason in opaque.items()}.items():
            reader.take_apart(name, reason)
    reader.leave_the_rest()
    return reader.spaces(None if weights is None else set(weights))


# ---------------------------------------------------------------------------------------------------------- the trace


class _Tracer(fx.Tracer):
    # A submodule whose forward fails on symbols is a leaf, and the reason is kept.
    def __init__(self):
        super().__init__()
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Modules of torch without tensors are traced to the function that they call.
        whole = super().is_leaf_module(m, module_qualified_name)
        return type(m) in MODULES or (whole and any(True for _ in itertools.chain(m.parameters(), m.buffers())))

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # as above
            name = self.path_of_module(m)
            self.opaque[name] = f"{name} cannot be traced ({_one_line(error)})"
            return self.create_proxy("call_module", name, args, kwargs)


def _trace(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, str]]:
    # The tracer hangs constants on its root, so the root is a shallow copy, which shares all submodules and tensors.
    if "forward" in vars(model):
        raise TypeError("its forward has been replaced")
    root = copy.copy(model)
    modules = [root, *itertools.islice(model.modules(), 1, None)]
    before = [module.training for module in modules]
    usual = {p.name: p.default for p in inspect.signature(root.forward).parameters.values() if p.default is not p.empty}
    tracer = _Tracer()
    try:
        for module in modules:
            module.training = training
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Was not able to add assertion")  # for defaults such as a string
            return tracer.trace(root, concrete_args=usual or None), tracer.opaque
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# ------------------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True, eq=False)
class Signal:
    """What is known of a tensor of the traced model.

    Args:
        atoms: The atom of each channel; None where channels are not followed.
        axis: Of the channels, counted from the end (negative).
        ndim: Number of axes; None where it is not known.
        spread: "inner" where each channel has become an unknown number of neighbours (a flatten of channel × place),
            "outer" where the sequence of channels is repeated (place × channel), else empty.
        restless: What makes something else than zero of a channel of zeros; empty where nothing does.
    """

    atoms: Tensor | None = None
    axis: int = -1
    ndim: int | None = None
    spread: str = ""
    restless: str = ""

    @property
    def place(self) -> int | None:
        """The axis of the channels counted from the front, where that is known."""
        return None if self.ndim is None else self.ndim + self.axis


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that the forward reads by itself."""

    name: str


@dataclass(frozen=True, eq=False)
class Shape:
    """The shape of a signal."""

    of: Signal


@dataclass(frozen=True, eq=False)
class Size:
    """The size of one axis, counted from the front, of a signal; None where it is not known which."""

    of: Signal
    axis: int | None

    @property
    def counts_channels(self) -> bool:
        """Whether the size changes with the number of channels, or might."""
        return self.of.atoms is not None and (self.axis is None or self.axis == self.of.place)


class Reader:
    """Walks over traced operations and collects atoms, ties, and what is fixed and why.

    Args:
        model: The model.
        weights: Names to prefer for parameters that have several.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]):
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {
            **dict(model.named_buffers(remove_duplicate=False)),
            **dict(model.named_parameters(remove_duplicate=False)),
        }
        self.names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        self.names |= {id(tensor): name for name, tensor in weights.items()}
        self.parameters = {self.names[id(p)]: p for p in model.parameters()}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.roles: dict[tuple[str, int], set[str]] = {}
        self.heads: list[Tensor] = []
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.fixed: list[tuple[Tensor, str]] = []
        self.uncut: list[tuple[Tensor, str]] = []
        self.reasons: dict[str, str] = {}  # why a parameter makes no channels
        self.untouchable: dict[str, str] = {}  # parameters that something reads which is not understood
        self.atoms = 0

    # atoms

    def along(self, tensor: Tensor, axis: int, role: str) -> Tensor:
        """The atoms along an axis of a parameter or buffer, (size,)."""
        key = self.names[id(tensor)], axis
        if key not in self.axes:
            self.axes[key] = torch.arange(self.atoms, self.atoms + tensor.shape[axis])
            self.atoms += tensor.shape[axis]
        self.roles.setdefault(key, set()).add(role)
        return self.axes[key]

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Let atoms be one."""
        self.ties.append((one, other))

    def fix(self, value: Any, reason: str) -> None:
        """Fix all that is known in a value: what follows is not understood, or needs all channels."""
        for part in _parts(value):
            if isinstance(part, Weight):
                self.untouchable.setdefault(part.name, reason)
            elif isinstance(part, Shape) or (isinstance(part, Size) and part.counts_channels):
                self.fix(part.of, reason)
            elif isinstance(part, Size):
                continue
            elif part.atoms is not None:
                self.fixed.append((part.atoms, reason))

    def resolve(self, signal: Signal, count: int) -> Tensor | None:
        """The atoms of a signal that is known to have so many channels; None where they cannot be told."""
        atoms = signal.atoms
        if atoms is None or count % len(atoms) or (count != len(atoms) and not signal.spread):
            return None
        times = count // len(atoms)
        return atoms.repeat_interleave(times) if signal.spread == "inner" else atoms.repeat(times)

    def consume(self, signal: Signal, atoms: Tensor, groups: int, axis: int, who: str) -> None:
        """Let a weight read the channels of a signal by slices with these atoms, the same ones in every group."""
        read = self.resolve(signal, len(atoms) * groups) if signal.axis == axis else None
        if read is None:
            self.fix(signal, f"{who} reads them in a way that is not understood")
            self.fixed.append((atoms, f"{who} reads what is not followed"))
            return
        self.tie(read, atoms.repeat(groups))
        if signal.restless:
            self.fixed.append((read, f"{signal.restless} makes a constant of a channel of zeros before {who} reads it"))

    # the walk

    def read(self, graph: fx.Graph) -> None:
        """Walk over the operations of a trace."""
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = Signal()
            elif node.op == "get_attr":
                tensor = self.tensors.get(str(node.target))
                values[node] = Weight(self.names[id(tensor)]) if isinstance(tensor, nn.Parameter) else Signal()
            elif node.op == "output":
                self.fix(args, "the model returns them")
            else:
                values[node] = self.visit(node, args, kwargs)

    def visit(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What an operation makes of its arguments."""
        if node.op == "call_module":
            module, who = self.modules[str(node.target)], str(node.target)
            changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            rule = None if changed else MODULES.get(type(module))
            args = (module, who, *args)
        else:
            who = str(getattr(node.target, "__name__", node.target))
            rule = FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(who)
        in_place = node.op == "call_method" and who.endswith("_") and not node.users  # others read its argument
        if rule is not None and not in_place and _fits(rule, self, args, kwargs):
            found = rule(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        inputs = args[2:] if node.op == "call_module" else args
        self.fix((inputs, kwargs), f"{who} reads them, which is not understood")
        if node.op == "call_module":
            reason = f"{who} ({type(args[0]).__name__}) is not understood"
            for parameter in args[0].parameters():
                self.untouchable.setdefault(self.names[id(parameter)], reason)
        return Signal()

    # what is not in a trace

    def take_apart(self, prefix: str, reason: str) -> None:
        """The rows of each layer of a module that cannot be traced; they may be removed, but not cut out."""
        root = self.modules[prefix]
        before = self.atoms
        for name, module in root.named_modules(prefix=prefix):
            if isinstance(module, nn.MultiheadAttention):
                _heads(self, module)
            elif isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(
                self.modules.get(name.rpartition(".")[0]), nn.MultiheadAttention
            ):
                _rows(self, module)
            elif isinstance(module, nn.Sequential):
                for layer, norm in itertools.pairwise(module):
                    if isinstance(layer, (nn.Linear, _ConvNd)) and isinstance(norm, _BatchNorm) and norm.affine:
                        rows = _rows(self, layer)
                        if len(rows) == norm.num_features:
                            _follow(self, norm, rows)
        for parameter in root.parameters():
            self.reasons.setdefault(self.names[id(parameter)], reason)
        inside = {self.names[id(tensor)] for tensor in (*root.parameters(), *root.buffers())}
        self.uncut += [(atoms, reason) for (name, _), atoms in self.axes.items() if name in inside]
        self.uncut.append((torch.arange(before, self.atoms), reason))

    def leave_the_rest(self) -> None:
        """A fixed space for each weight that no operation was seen to produce channels with."""
        producing = {name for (name, _), roles in self.roles.items() if roles & {"producers", "followers"}}
        for name, parameter in self.parameters.items():
            reason = {**self.reasons, **self.untouchable}.get(name, "the forward pass does not use it")
            if name not in producing and parameter.ndim >= 2:
                self.fixed.append((self.along(parameter, 0, "producers"), reason))
        for (name, _), atoms in self.axes.items():
            if name in self.untouchable:
                self.fixed.append((atoms, self.untouchable[name]))

    # the result

    def spaces(self, weights: set[str] | None) -> tuple[Space, ...]:
        """Units are tied atoms; units that one weight produces are a space."""
        unit = _connected(self.atoms, self.ties)
        producing = [unit[atoms] for key, atoms in self.axes.items() if "producers" in self.roles[key]]
        family = _connected(self.atoms, [(units[:1].expand(len(units)), units) for units in producing])
        spaces = []
        for root in torch.unique(family[torch.cat(producing)]).tolist() if producing else ():
            members = torch.unique(unit[family[unit] == root])
            spaces.append(self._space(unit, members, weights))
        return tuple(spaces)

    def _space(self, unit: Tensor, members: Tensor, weights: set[str] | None) -> Space:
        rank = torch.full((self.atoms,), -1)
        rank[members] = torch.arange(len(members))
        found: dict[str, list[Slices]] = {role: [] for role in ROLES}
        for (name, axis), atoms in self.axes.items():
            units = rank[unit[atoms]]
            if bool((units >= 0).any()):
                role = next(role for role in ROLES if role in self.roles[name, axis])
                found[role].append(Slices(name, axis, units))
        why = {
            key: next((reason for atoms, reason in said if bool((rank[unit[atoms]] >= 0).any())), "")
            for key, said in (("fixed", self.fixed), ("uncut", self.uncut), ("head", [(a, "head") for a in self.heads]))
        }
        others = [made.name for made in found["producers"] if weights is not None and made.name not in weights]
        if others and not why["fixed"]:
            why["fixed"] = f"{others[0]} makes them too and is not among the weights to prune"
        tensors = {role: tuple(slices) for role, slices in found.items()}
        return Space(len(members), why["head"] or "channel", **tensors, fixed=why["fixed"], uncut=why["uncut"])


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (Signal, Weight, Shape, Size)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        yield from _parts(list(value.values()))
    elif isinstance(value, slice):
        yield from _parts((value.start, value.stop, value.step))


def _fits(rule: Callable, reader: Reader, args: Iterable, kwargs: Mapping) -> bool:
    try:
        inspect.signature(rule).bind(reader, *args, **kwargs)
    except TypeError:
        return False
    return True


def _connected(count: int, ties: list[tuple[Tensor, Tensor]]) -> Tensor:
    # The smallest member of each connected set, by passing minima along ties and jumping, (count,).
    label = torch.arange(count)
    if not ties:
        return label
    one, other = (torch.cat(side) for side in zip(*ties, strict=True))
    while True:
        least = torch.minimum(label[one], label[other])
        new = label.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
        new = new.scatter_reduce(0, label, new, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


# ----------------------------------------------------------------------------------------------------- rules of layers


def _rows(reader: Reader, layer: nn.Module) -> Tensor:
    # The atoms that a layer's weight and bias produce, each channel with its own, (channels of a group,).
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    atoms = reader.along(weight, 1 if isinstance(layer, _ConvTransposeNd) else 0, "producers")
    if isinstance(bias, Tensor):
        times = len(bias) // len(atoms)  # more than 1 for the groups of a transposed convolution
        reader.tie(reader.along(bias, 0, "biases"), atoms.repeat(times))
    return atoms


def _linear_of(reader: Reader, signal: Signal, weight: Tensor, bias: Tensor | None, who: str) -> Signal:
    reader.consume(signal, reader.along(weight, 1, "consumers"), 1, -1, who)
    atoms = reader.along(weight, 0, "producers")
    if bias is not None:
        reader.tie(reader.along(bias, 0, "biases"), atoms)
    return Signal(atoms, -1, signal.ndim)


def _linear(reader: Reader, layer: nn.Linear, who: str, input: Signal) -> Signal:
    return _linear_of(reader, input, layer.weight, layer.bias, who)


def _functional_linear(reader: Reader, input: Signal, weight: Weight, bias: Weight | None = None) -> Any:
    if not isinstance(input, Signal) or not isinstance(weight, Weight) or not isinstance(bias, (Weight, type(None))):
        return NotImplemented
    given = None if bias is None else reader.parameters[bias.name]
    return _linear_of(reader, input, reader.parameters[weight.name], given, weight.name)


def _convolution(reader: Reader, layer: _ConvNd, who: str, input: Signal) -> Any:
    transposed = isinstance(layer, _ConvTransposeNd)
    return _convolution_of(
        reader, input, layer.weight, layer.bias, layer.groups, CONVOLUTIONS[type(layer)], transposed, who
    )


def _convolution_of(
    reader: Reader,
    signal: Signal,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    space: int,
    transposed: bool,
    who: str,
) -> Signal:
    depthwise = groups > 1 and (weight.shape[0] == groups if transposed else weight.shape[1] == 1)
    made = reader.along(weight, 1 if transposed and not depthwise else 0, "producers")
    # Groups must stay of equal size, so that a unit has the same channel of every group; of depthwise ones, all of it.
    if depthwise:
        by_group = made.view(groups, -1)
        reader.tie(made, by_group[:, :1].expand_as(by_group).flatten())
        into, times = by_group[:, 0], 1
    else:
        into, times = reader.along(weight, 0 if transposed else 1, "consumers"), 1 if transposed else groups
        split = into if transposed else made
        reader.tie(split, split.view(groups, -1)[:1].expand(groups, -1).flatten())
    reader.consume(signal, into, times, -space - 1, who)
    if transposed:
        made = made.repeat_interleave(weight.shape[1]) if depthwise else made.repeat(groups)
    if bias is not None:
        reader.tie(reader.along(bias, 0, "biases"), made)
    return Signal(made, -space - 1, space + 2)


def _functional_convolution(space: int) -> Callable:
    def rule(
        reader: Reader,
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
        given = None if bias is None else reader.parameters[bias.name]
        kernel = reader.parameters[weight.name]
        return _convolution_of(reader, input, kernel, given, 1, space, False, weight.name)

    return rule


def _follow(reader: Reader, norm: nn.Module, atoms: Tensor) -> None:
    for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        if tensor.ndim == 1:
            role = "followers" if name in {"weight", "bias"} else "statistics"
            reader.tie(reader.along(tensor, 0, role), atoms)


def _channel_norm(reader: Reader, norm: _BatchNorm | _InstanceNorm, who: str, input: Signal) -> Any:
    if input.atoms is None:
        for parameter in norm.parameters():
            reader.untouchable.setdefault(reader.names[id(parameter)], f"{who} reads what is not followed")
        return Signal(ndim=input.ndim)
    # Where the number of axes is not known, the signal comes from a linear layer, whose features the norm is over.
    atoms = reader.resolve(input, norm.num_features)
    if atoms is None or not norm.affine or input.place not in {None, 1} or (input.ndim is None and input.axis != -1):
        return NotImplemented
    _follow(reader, norm, atoms)
    ndim = 2 if input.ndim is None else input.ndim
    return replace(input, atoms=atoms, ndim=ndim, spread="", restless="")


def _mixing_norm(reader: Reader, norm: nn.Module, who: str, input: Signal) -> Signal:
    reader.fix(input, f"{who} ({type(norm).__name__}) takes its statistics over them")
    for parameter in norm.parameters():
        reader.untouchable.setdefault(reader.names[id(parameter)], f"{who} normalises all features together")
    return Signal(ndim=input.ndim)


def _embedding(reader: Reader, layer: nn.Embedding, who: str, input: Signal) -> Any:
    if layer.max_norm is not None:
        return NotImplemented
    ndim = None if input.ndim is None else input.ndim + 1
    return Signal(reader.along(layer.weight, 1, "producers"), -1, ndim)


def _prelu(reader: Reader, layer: nn.PReLU, who: str, input: Signal) -> Any:
    if layer.num_parameters > 1:
        if input.atoms is None or input.place != 1 or input.spread or len(input.atoms) != layer.num_parameters:
            return NotImplemented
        reader.tie(reader.along(layer.weight, 0, "followers"), input.atoms)
    return input


def _heads(reader: Reader, layer: nn.MultiheadAttention) -> None:
    heads, features = layer.num_heads, layer.embed_dim
    first = None
    stacked = [(layer.in_proj_weight, 0)] if layer._qkv_same_embed_dim else []
    separate = [] if stacked else [(w, 0) for w in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)]
    entries = [
        *((weight, axis, "producers") for weight, axis in (*stacked, *separate)),
        (layer.in_proj_bias, 0, "biases"),
        (layer.bias_k, 2, "biases"),
        (layer.bias_v, 2, "biases"),
        (layer.out_proj.weight, 1, "consumers"),
    ]
    for tensor, axis, role in entries:
        if tensor is not None:
            atoms = reader.along(tensor, axis, role)
            by_head = atoms.view(-1, heads, features // heads).transpose(0, 1).reshape(heads, -1)
            first = by_head[:, :1] if first is None else first
            reader.tie(by_head.flatten(), first.expand_as(by_head).flatten())
            reader.heads.append(atoms)
            reader.uncut.append((atoms, "MultiheadAttention has one size for its inputs and its heads together"))


def _attention(
    reader: Reader,
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
    reason = f"{who} (MultiheadAttention) reads them, and its width cannot change"
    reader.fix((query, key, value, key_padding_mask, attn_mask), reason)
    reader.reasons.setdefault(reader.names[id(layer.out_proj.weight)], reason)
    _heads(reader, layer)
    return Signal(ndim=query.ndim), Signal()


def _transformer(reader: Reader, layer: nn.Module, who: str, *args: Any, **kwargs: Any) -> Signal:
    reason = f"{who} ({type(layer).__name__}) takes their statistics"
    reader.fix((args, kwargs), reason)
    taken = set()
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            _heads(reader, module)
            taken |= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            wide, narrow = module.linear1, module.linear2
            assert isinstance(wide, nn.Linear)
            assert isinstance(narrow, nn.Linear)
            reader.tie(_rows(reader, wide), reader.along(narrow.weight, 1, "consumers"))
            taken |= {id(p) for p in wide.parameters()}
            activation = module.activation
            if activation not in {F.relu, F.gelu} and not isinstance(activation, (nn.ReLU, nn.GELU)):
                reader.fix(Signal(_rows(reader, wide)), f"the activation of {who} is not understood")
    for parameter in layer.parameters():
        if id(parameter) not in taken:
            reader.reasons.setdefault(reader.names[id(parameter)], reason)
    return Signal(ndim=args[0].ndim if args and isinstance(args[0], Signal) else None)


# ------------------------------------------------------------------------------------------------- rules of operations


def _through(reader: Reader, *args: Any, **kwargs: Any) -> Any:
    # An elementwise function with f(0) = 0 of its first argument.
    first, *others = list(_parts((args, kwargs))) or [None]
    return NotImplemented if others or not isinstance(first, Signal) else first


def _restless(name: str) -> Callable:
    def rule(reader: Reader, *args: Any, **kwargs: Any) -> Any:
        found = _through(reader, *args, **kwargs)
        return found if found is NotImplemented else replace(found, restless=found.restless or name)

    return rule


def _clamp(reader: Reader, input: Signal, min: Any = None, max: Any = None, inplace: bool = False) -> Any:
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
        return NotImplemented
    holds_zero = (min is None or min <= 0) and (max is None or max >= 0)
    return input if holds_zero else replace(input, restless="clamp")


def _hardtanh(reader: Reader, input: Signal, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _clamp(reader, input, min_val, max_val)


def _power(reader: Reader, input: Any, exponent: Any) -> Any:
    if not isinstance(input, Signal) or not isinstance(exponent, (int, float)):
        return NotImplemented
    return input if exponent > 0 else replace(input, restless="a power that is not positive")


def _expand_as(reader: Reader, input: Any, other: Any) -> Any:
    if not isinstance(input, Signal) or not isinstance(other, Signal):
        return NotImplemented
    found = _paired(reader, input, other, product=True)
    return found if found is NotImplemented else replace(found, restless=input.restless)


def _sum(reader: Reader, input: Any, other: Any, alpha: Any = 1) -> Any:
    return _paired(reader, input, other, product=False)


def _product(reader: Reader, input: Any, other: Any) -> Any:
    return _paired(reader, input, other, product=True)


def _quotient(reader: Reader, input: Any, other: Any, rounding_mode: Any = None) -> Any:
    # Divided by numbers alone: 0 / 0 is not 0.
    return NotImplemented if isinstance(other, Signal) else _paired(reader, input, other, product=True)


def _paired(reader: Reader, one: Any, other: Any, product: bool) -> Any:
    # A sum of two is zero where both are, a product where one is.
    if not isinstance(one, Signal):
        one, other = other, one
    if not isinstance(one, Signal) or one.atoms is None:
        plain = isinstance(one, Signal) and not [
            p for p in _parts(other) if not isinstance(p, Signal) or p.atoms is not None
        ]
        return Signal() if plain else NotImplemented
    added = replace(one, restless=one.restless or "a sum with something else")
    if isinstance(other, (int, float)):
        return one if product or other == 0 else added
    if isinstance(other, Size):
        return one if product and not other.counts_channels else NotImplemented
    if isinstance(other, Weight):
        shape = reader.parameters[other.name].shape
        size = shape[one.axis] if len(shape) >= -one.axis else 1
        if size == 1 and len(one.atoms) > 1:
            return one if product else added
        if one.spread or size != len(one.atoms) or len(shape) > (one.ndim or len(shape)):
            return NotImplemented
        role = "followers" if product or len(shape) == 1 else "producers"
        reader.tie(reader.along(reader.parameters[other.name], len(shape) + one.axis, role), one.atoms)
        return one
    if not isinstance(other, Signal) or other.atoms is None or one.axis != other.axis or one.spread != other.spread:
        return NotImplemented
    if len(one.atoms) != len(other.atoms):
        few, many = sorted((one, other), key=_count)
        if _count(few) > 1:
            return NotImplemented
        reader.fix(few, "it is spread over all channels of another tensor")  # as in spatial attention
        return many if product else replace(many, restless=many.restless or "a sum with something else")
    reader.tie(one.atoms, other.atoms)
    restless = (one.restless and other.restless) if product else (one.restless or other.restless)
    ndim = max(one.ndim, other.ndim) if one.ndim and other.ndim else None
    return replace(one, ndim=ndim, restless=restless)


def _count(signal: Signal) -> int:
    return 0 if signal.atoms is None else len(signal.atoms)


def _pool(space: int) -> Callable:
    def rule(reader: Reader, input: Any, *args: Any, **kwargs: Any) -> Any:
        over_places = isinstance(input, Signal) and (input.atoms is None or input.axis <= -space - 1)
        return input if over_places and not kwargs.get("return_indices") else NotImplemented

    return rule


def _resize(reader: Reader, input: Any, *args: Any, **kwargs: Any) -> Any:
    return input if isinstance(input, Signal) and input.place == 1 and not input.spread else NotImplemented


def _pad(reader: Reader, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if not isinstance(input, Signal) or input.atoms is None or not isinstance(pad, (tuple, list)):
        return NotImplemented
    if len(pad) // 2 >= -input.axis and any(size != 0 for size in pad[-2 * input.axis - 2 :]):
        return NotImplemented
    return replace(input, restless=input.restless or "padding with a value") if value else input


def _reduce(reader: Reader, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
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


def _flatten(reader: Reader, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(input, Signal):
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


def _view(reader: Reader, input: Any, *shape: Any) -> Any:
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
        reader.uncut.append((input.atoms, reason))
        return replace(found, atoms=input.atoms.repeat_interleave(here // len(input.atoms)))
    return NotImplemented


def _transpose(reader: Reader, input: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(input, Signal) or (input.ndim is None and (dim0 >= 0 or dim1 >= 0)):
        return NotImplemented
    one, other = (d if d < 0 else d - (input.ndim or 0) for d in (dim0, dim1))
    return replace(input, axis={one: other, other: one}.get(input.axis, input.axis))


def _permute(reader: Reader, input: Any, *dims: Any) -> Any:
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else list(dims)
    if not isinstance(input, Signal) or not all(isinstance(d, int) for d in order):
        return NotImplemented
    count = len(order)
    if input.atoms is None:
        return Signal(ndim=count)
    return replace(input, axis=[d % count for d in order].index(input.axis % count) - count, ndim=count)


def _unsqueeze(reader: Reader, input: Any, dim: int) -> Any:
    if not isinstance(input, Signal) or (input.ndim is None and dim >= 0):
        return NotImplemented
    back = dim if dim < 0 else dim - (input.ndim or 0) - 1
    ndim = None if input.ndim is None else input.ndim + 1
    return replace(input, axis=input.axis if input.axis > back else input.axis - 1, ndim=ndim)


def _squeeze(reader: Reader, input: Any, dim: Any = None) -> Any:
    return NotImplemented if dim is None else _reduce(reader, input, dim)


def _chunk(reader: Reader, input: Any, chunks: int, dim: int = 0) -> Any:
    if not isinstance(input, Signal) or input.atoms is None or input.spread or not isinstance(chunks, int):
        return NotImplemented
    axis = dim if dim < 0 or input.ndim is None else dim - input.ndim
    if axis >= 0 or (axis == input.axis and len(input.atoms) % chunks):
        return NotImplemented
    if axis != input.axis:
        return (input,) * chunks
    parts = input.atoms.view(chunks, -1)  # which must stay of equal size
    reader.tie(parts.flatten(), parts[:1].expand_as(parts).flatten())
    return tuple(replace(input, atoms=part) for part in parts)


def _gate(reader: Reader, input: Any, dim: int = -1) -> Any:
    parts = _chunk(reader, input, 2, dim)
    # x · sigmoid(y)
    return NotImplemented if parts is NotImplemented or parts[0] is parts[1] else parts[0]


def _join(reader: Reader, tensors: Any, dim: Any = 0) -> Any:
    if not tensors or not all(isinstance(t, Signal) and t.atoms is not None and not t.spread for t in tensors):
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
        reader.tie(first.atoms, other.atoms)
    return replace(first, ndim=ndim, restless=restless)


def _attribute(reader: Reader, value: Any, name: str) -> Any:
    if isinstance(value, Signal) and name == "shape":
        return Shape(value)
    return Signal() if name in {"device", "dtype", "ndim", "is_cuda", "requires_grad"} else NotImplemented


def _size(reader: Reader, input: Any, dim: Any = None) -> Any:
    if not isinstance(input, Signal):
        return NotImplemented
    return Shape(input) if dim is None else _item(reader, Shape(input), dim)


def _item(reader: Reader, value: Any, index: Any) -> Any:
    if isinstance(value, (tuple, list)) and isinstance(index, int):
        return value[index]
    if isinstance(value, Shape) and isinstance(index, int):
        ndim = value.of.ndim
        return Size(value.of, index % ndim if ndim else 0 if index == 0 else None)
    parts = list(index) if isinstance(index, tuple) else [index]
    if isinstance(value, Weight):  # such as the first rows of a table of positions
        table = reader.parameters[value.name]
        sliced = len(parts) < table.ndim and all(isinstance(part, slice) for part in parts)
        if sliced and not any(size.counts_channels for size in _parts(parts) if isinstance(size, Size)):
            return Signal(reader.along(table, table.ndim - 1, "producers"), -1, table.ndim)
    plain = all(isinstance(part, (int, slice)) for part in parts) and not any(_parts(parts))
    if not isinstance(value, Signal) or value.place is None or value.atoms is None or not plain:
        return NotImplemented
    if value.place < len(parts) and parts[value.place] != slice(None):
        return NotImplemented
    dropped = [place for place, part in enumerate(parts) if isinstance(part, int)]
    axis = value.axis + sum(place > value.place for place in dropped)
    return replace(value, axis=axis, ndim=(value.ndim or 0) - len(dropped))


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
