"""Channels: which slices of which tensors live and die together.

An output channel of a layer is a slice of its weight, an entry of its bias, the entries of the batch norms that follow,
and a slice of every weight that reads it. A residual addition ties the channels of all layers that are added, a
depthwise convolution ties its inputs to its outputs, and an attention ties the rows of a head. :func:`channel_spaces`
finds this out from a symbolic trace of the model (``torch.fx``), which needs no data and runs no arithmetic.

How: every index of every axis that carries channels is an atom (``channel_atoms.py``). Over the traced operations, a
signal says which atoms the channels of a tensor are; a rule (``channel_rules.py``) passes it on and ties atoms to one
another. What no rule understands fixes its atoms.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from quadric.pruning.channel_atoms import Ledger, Signal, Slices, Space, Weight, parts
from quadric.pruning.channel_rules import ATTENTION_WIDTH, FUNCTIONS, LAYERS, METHODS, MODULES, follow, heads, rows

__all__ = ["Slices", "Space", "channel_spaces"]


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
        'the model returns its channels'
    """
    reader = Reader(model, weights or {})
    try:
        graphs = [_trace(model, training) for training in (True, False)]
    except Exception as error:  # whatever the user's forward raises when it meets a symbol instead of numbers
        reader.take_apart("", f"the model cannot be traced ({_one_line(error)})")
    else:
        opaque = {name: reason for _, leaves in graphs for name, reason in leaves.items()}
        for graph, _ in graphs:
            reader.read(graph, opaque)
        for name, reason in opaque.items():
            reader.take_apart(name, reason)
    reader.leave_the_rest()
    return reader.spaces(weights)


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
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # as above
            for node in reversed(list(itertools.islice(self.graph.nodes, before, None))):
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.opaque[name] = f"{name} cannot be traced ({_one_line(error)})"
            return self.create_proxy("call_module", name, args, kwargs)


def _trace(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, str]]:
    # A forward may count, and change buffers, so it runs on a copy, which shares the parameters.
    if "forward" in vars(model):
        raise TypeError("its forward has been replaced")
    root = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in root.modules():
        module.training = training
    usual = {p.name: p.default for p in inspect.signature(root.forward).parameters.values() if p.default is not p.empty}
    tracer = _Tracer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Was not able to add assertion")  # for defaults such as a string
        return tracer.trace(root, concrete_args=usual or None), tracer.opaque


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= 100 else said[:99] + '…'}"


# ----------------------------------------------------------------------------------------------------------- the walk


class Reader(Ledger):
    """Walks over traced operations, and over what is not in a trace."""

    def read(self, graph: fx.Graph, opaque: Mapping[str, str]) -> None:
        """Walk over the operations of a trace.

        Args:
            graph: The trace.
            opaque: Modules that could not be traced, and why.
        """
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = Signal()
            elif node.op == "get_attr":
                tensor = self.tensors.get(str(node.target))
                values[node] = Weight(self.names[id(tensor)]) if isinstance(tensor, nn.Parameter) else Signal()
            elif node.op == "output":
                self.fix(args, "the model returns its channels")
            else:
                values[node] = self.visit(node, args, kwargs, opaque)

    def visit(self, node: fx.Node, args: Any, kwargs: Any, opaque: Mapping[str, str]) -> Any:
        """What an operation makes of its arguments."""
        if node.op == "call_module":
            module, who = self.modules[str(node.target)], str(node.target)
            plain = _as_written(module) and not any(isinstance(part, Weight) for part in parts((args, kwargs)))
            rule = MODULES.get(type(module)) if plain else None
            args = (module, who, *args)
        else:
            who = str(getattr(node.target, "__name__", node.target))
            rule = FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(who)
        in_place = node.op != "call_module" and (who.endswith("_") or who in {"iadd", "isub"} or kwargs.get("inplace"))
        alone = node.op == "call_method" and in_place and not node.users  # what it changes is read by another name
        if rule is not None and not alone and _fits(rule, self, args, kwargs):
            found = rule(self, *args, **kwargs)
            if in_place and isinstance(found, Signal) and found.restless:
                self.fix(found, f"{who} changes its channels in place")  # which views of the same memory do not tell
            if found is not NotImplemented:
                return found
        inputs = args[2:] if node.op == "call_module" else args
        stack = list(node.meta.get("nn_module_stack", {}).values())
        where = f" in {stack[-1][0]}" if stack and node.op != "call_module" else ""
        self.fix((inputs, kwargs), f"{who}{where} reads its channels, which is not understood")
        if node.op == "call_module" and who not in opaque:
            why = (
                "is not understood" if _as_written(args[0]) else "has a hook, a parametrisation or a forward of its own"
            )
            reason = f"{who} ({type(args[0]).__name__}) {why}"
            self.untouchable |= {self.names[id(p)]: reason for p in args[0].parameters()}
        return Signal()

    def take_apart(self, prefix: str, reason: str) -> None:
        """The rows of each layer of a module that cannot be traced; they may be removed, but not cut out."""
        root = self.modules[prefix]
        before = self.atoms
        for module in root.modules():
            if isinstance(module, nn.MultiheadAttention) and _as_written(module):
                self.reasons.setdefault(self.names[id(module.out_proj.weight)], ATTENTION_WIDTH)
                heads(self, module)
            elif type(module) in LAYERS and _as_written(module):
                rows(self, module)
            elif isinstance(module, nn.Sequential):
                for layer, norm in itertools.pairwise(module):
                    follows = type(layer) in LAYERS and _as_written(layer) and isinstance(norm, _BatchNorm)
                    if follows and norm.affine and len(made := rows(self, layer)) == norm.num_features:
                        follow(self, norm, made)
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


def _as_written(module: nn.Module) -> bool:
    # No hook, parametrisation or new forward changes what the module does with its tensors.
    return not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) or parametrize.is_parametrized(part)
        for part in module.modules()
    )


def _fits(rule: Callable, reader: Reader, args: Iterable, kwargs: Mapping) -> bool:
    try:
        inspect.signature(rule).bind(reader, *args, **kwargs)
    except TypeError:
        return False
    return True
