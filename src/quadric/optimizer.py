"""CurvatureOptimizer: the contract of torch.optim, written once for every method."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import Optimizer

from quadric.curvature import Curvature, damping_at

__all__ = ["Block", "CurvatureOptimizer", "is_number", "require", "whole"]

Group = dict[str, Any]


@dataclass
class Block:
    """Parameters of one group that share one estimate, and the flat buffer that their gradients are gathered in.

    Parameters are known by their place in the group, never by reference: a framework may swap them between two steps.
    """

    group: int  # the place of its group
    number: int  # among the blocks of its group
    members: list[int]  # places in group["params"], in the order of their columns
    shapes: list[torch.Size]
    spans: list[tuple[int, int]]  # the columns of each member
    curvature: Curvature
    flat: Tensor  # (curvature.tiles.length,): the gradients of a step, or its direction
    gradient: Tensor  # the gradients of a step, wherever the curvature wanted them
    buffers: dict[str, Tensor] = field(default_factory=dict)  # what else a method keeps, each as long as `flat`
    step: int = 0
    present: list[bool] = field(default_factory=list)  # which members have a gradient in this step

    def live(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a flat tensor that have a gradient in this step, in as few pieces as can be."""
        return [tensor] if all(self.present) else self.views(tensor)

    def views(self, tensor: Tensor) -> list[Tensor]:
        """A flat tensor as one view for each member that has a gradient in this step."""
        columns = zip(self.spans, self.shapes, self.present, strict=True)
        return [tensor[start:stop].view(shape) for (start, stop), shape, present in columns if present]

    @cached_property
    def spare(self) -> Tensor:
        """Memory as long as `flat` that a step may use and the next one overwrites."""
        return torch.empty_like(self.flat)

    def buffer(self, name: str) -> Tensor:
        """The flat buffer of that name, zeros at first."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros_like(self.flat)
        return self.buffers[name]


class CurvatureOptimizer(Optimizer, ABC):
    """Moves along a power of a damped curvature matrix.

    A subclass says which parameters share a matrix (:meth:`partition`), makes the estimate (:meth:`curvature`), and
    learns from a gradient and returns where to go (:meth:`direction`). The rest is here: closures, groups, missing and
    non-finite gradients, decoupled weight decay, and a state that is per parameter wherever anyone looks at it
    (``state_dict``, copies, pickles) and flat while it runs.

    Args:
        params: parameters or parameter groups.
        defaults: default hyper-parameters of a group.
    """

    def _forget(self) -> None:
        """Drop everything that is rebuilt from the per-parameter state."""
        self._blocks: dict[int, list[Block]] = defaultdict(list)  # by the place of the group

    def check(self, group: Group) -> None:
        """Refuse hyper-parameters out of range.

        Args:
            group: hyper-parameters of one group.
        """
        require(0 <= float(group["lr"]) < float("inf"), "lr", group["lr"], "0 ≤ lr < ∞", "1e-3 is a start")
        decay = group["weight_decay"]
        require(0 <= decay < float("inf"), "weight_decay", decay, "0 ≤ weight_decay < ∞", "0.0 turns it off")

    def partition(self, params: list[Tensor], group: Group) -> list[list[int]]:
        """Which parameters, by place and in which order, share a matrix; all of them by default."""
        return [list(range(len(params)))]

    @abstractmethod
    def curvature(self, params: list[list[Tensor]], group: Group) -> Curvature:
        """A new estimate for parameters already partitioned."""

    @abstractmethod
    def direction(self, block: Block, gradient: Tensor, group: Group) -> Tensor:
        """Learn from a flat gradient and return the flat direction that the parameters move against."""

    def add_param_group(self, param_group: Group) -> None:  # noqa: D102
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Raises:
            RuntimeError: if a gradient is sparse, complex, of the wrong shape or not finite; nothing is changed then.
            ValueError: if a schedule gives a damping that is not positive; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, block)
            for place, group in enumerate(self.param_groups)
            for block in self._active_blocks(place, group)
        ]
        for group, block in work:
            grads = [group["params"][i].grad for i in block.members]
            block.present = [grad is not None for grad in grads]
            block.gradient = block.curvature.inbox(block.flat)
            self._gather(block, grads, block.gradient)
            if "damping" in group:  # a schedule that turns bad must not do so half-way through the step
                damping_at(group["damping"], block.curvature.updates + 1)
        self._refuse_non_finite(work)
        for group, block in work:
            if group["maximize"]:
                block.gradient.neg_()
            block.step += 1
            direction = self.direction(block, block.gradient, group)
            params = [group["params"][i] for i, present in zip(block.members, block.present, strict=True) if present]
            lr = float(group["lr"])
            if group["weight_decay"]:
                _foreach_mul_(params, 1 - lr * group["weight_decay"])
            _foreach_add_(params, block.views(direction), alpha=-lr)
        return loss

    # From parameters to blocks.

    def _active_blocks(self, place: int, group: Group) -> list[Block]:
        """The blocks of a group in which some member has a gradient; members seen for the first time make new ones."""
        blocks = self._blocks[place]
        blocks[:] = [block for block in blocks if block.step]  # others were made by a step that was refused
        if not blocks:
            self._restore(place, group)
        known = {i for block in blocks for i in block.members}
        fresh: dict[tuple, list[int]] = defaultdict(list)
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.numel() and i not in known:
                if p.is_complex():
                    raise RuntimeError(f"complex parameter {i} of shape {tuple(p.shape)}: use torch.view_as_real")
                if hasattr(p, "to_local"):
                    raise RuntimeError(
                        f"parameter {i} of shape {tuple(p.shape)} is sharded (DTensor): use "
                        "DistributedDataParallel, or quadric.isaac with an optimizer that takes a DTensor"
                    )
                fresh[p.device, torch.promote_types(p.dtype, torch.float32)].append(i)
        for members in fresh.values():
            blocks.append(self._new_block(place, len(blocks), members))
        return [block for block in blocks if any(group["params"][i].grad is not None for i in block.members)]

    def _new_block(self, place: int, number: int, places: list[int]) -> Block:
        group = self.param_groups[place]
        params = [group["params"][i] for i in places]
        matrices = self.partition(params, group)
        curvature = self.curvature([[params[k] for k in matrix] for matrix in matrices], group)
        members, spans, start = [], [], 0
        # One matrix may be cut into blocks wherever it likes: the padding is behind the last of them.
        pads = curvature.tiles.pads if len(matrices) > 1 else [0]
        for matrix, pad in zip(matrices, pads, strict=True):
            for k in matrix:
                members.append(places[k])
                spans.append((start, start + params[k].numel()))
                start += params[k].numel()
            start += pad
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        flat = torch.zeros(curvature.tiles.length, dtype=dtype, device=params[0].device)
        return Block(place, number, members, [group["params"][i].shape for i in members], spans, curvature, flat, flat)

    def _gather(self, block: Block, grads: list[Tensor | None], out: Tensor) -> None:
        """Write gradients, zeros where there is none, into the columns of a flat tensor: one launch."""
        refuse_sparse(grad for grad in grads if grad is not None)
        zero = out.new_zeros(())
        pieces, at = [], 0
        for grad, shape, (start, stop) in zip(grads, block.shapes, block.spans, strict=True):
            if grad is not None and grad.shape != shape:
                raise RuntimeError(
                    f"a gradient of shape {tuple(grad.shape)} for a parameter that had {tuple(shape)} before: "
                    "make a new optimizer when parameters change their shape"
                )
            pieces += [zero.expand(start - at)] * (start > at)
            pieces.append(zero.expand(stop - start) if grad is None else grad.reshape(-1))
            at = stop
        torch.cat(pieces + [zero.expand(len(out) - at)] * (len(out) > at), out=out)

    def _refuse_non_finite(self, work: list[tuple[Group, Block]]) -> None:
        """Raise if any flat gradient is not finite, at the price of one dot product each and one synchronisation."""
        # All of them are launched before the first is waited for.
        squares = [torch.dot(block.gradient, block.gradient) for _, block in work]
        for (group, block), square in zip(work, squares, strict=True):
            if not math.isfinite(square):
                parts = [block.gradient[start:stop] for start, stop in block.spans]
                sizes = [float(part.abs().max().nan_to_num(math.inf)) for part in parts]
                k = sizes.index(max(sizes))  # the sum of all squares may overflow where no parameter's does
                odd = parts[k][~parts[k].isfinite()]
                shape = tuple(group["params"][block.members[k]].shape)
                raise RuntimeError(
                    f"the gradient of parameter {block.members[k]} of group {block.group} (shape {shape}) holds "
                    f"{float(odd[0]) if len(odd) else sizes[k]:g}; nothing was changed: skip this batch, clip the "
                    "gradients, lower lr, or use a GradScaler"
                )

    # State: flat while it runs, per parameter for everyone else.

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Tensor]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is kept of each parameter: a copy, made whenever somebody looks."""
        state = defaultdict(dict, self._loaded)
        for place, blocks in self._blocks.items():
            params = self.param_groups[place]["params"]
            for block in (block for block in blocks if block.step):
                for i, shape, (start, stop) in zip(block.members, block.shapes, block.spans, strict=True):
                    columns = block.curvature.columns(start, stop)
                    columns |= {name: buffer[start:stop].clone() for name, buffer in block.buffers.items()}
                    state[params[i]] = {
                        "step": torch.tensor(float(block.step)),
                        "block": torch.tensor(block.number),
                        **{name: value.reshape((*value.shape[:-1], *shape)) for name, value in columns.items()},
                    }
                shared = {"members": torch.tensor(len(block.members)), **block.curvature.shared()}
                state[params[block.members[0]]] |= {f"shared_{k}": v for k, v in shared.items()}
        return state

    @state.setter
    def state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        self._forget()
        self._loaded = state  # until the next step

    def _restore(self, place: int, group: Group) -> None:
        """Rebuild the blocks of a group from the per-parameter state, which is given up."""
        held: dict[int, list[int]] = defaultdict(list)
        for i, p in enumerate(group["params"]):
            if self._loaded.get(p):
                held[int(self._loaded[p]["block"])].append(i)
        for number, places in sorted(held.items()):
            whole = [int(self._loaded[group["params"][i]].get("shared_members", -1)) for i in places]
            if max(whole) != len(places):
                raise ValueError(
                    f"the state holds {len(places)} of the {max(whole)} parameters that shared block {number} of group "
                    f"{place}: load a state_dict with all of them"
                )
            block = self._new_block(place, number, places)
            states = [self._loaded.pop(group["params"][i]) for i in block.members]
            block.step = int(states[0]["step"])
            shared = {k.removeprefix("shared_"): s.pop(k) for s in states for k in list(s) if k.startswith("shared_")}
            columns = {
                span: {
                    name: value.reshape(*value.shape[: value.ndim - len(shape)], -1)
                    for name, value in state.items()
                    if name not in ("step", "block")
                }
                for span, shape, state in zip(block.spans, block.shapes, states, strict=True)
            }
            for name in set(next(iter(columns.values()))) - set(block.curvature.column_names):
                for (start, stop), values in columns.items():
                    block.buffer(name)[start:stop] = values.pop(name)
            block.curvature.restore(shared, columns)
            self._blocks[place].append(block)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        def without_schedules(_: Optimizer, state: dict[str, Any]) -> None:  # functions do not belong in a file
            for group in state["param_groups"]:
                for name in [name for name, value in group.items() if callable(value)]:
                    del group[name]

        hook = self.register_state_dict_post_hook(without_schedules, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, and the hyper-parameters that come with it.

        Args:
            state_dict: what :meth:`state_dict` gave. A schedule is not part of it: the present one stays.

        Raises:
            ValueError: if it is the state of another optimizer or model; nothing is changed then.
        """
        given: dict[str, Any] = {}

        def before(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            groups = [
                {k: v for k, v in group.items() if callable(v)} | saved
                for saved, group in zip(state["param_groups"], self.param_groups, strict=False)
            ] + state["param_groups"][len(self.param_groups) :]
            missing = sorted({name for saved in groups for name in self.defaults.keys() - saved.keys()})
            if missing:
                raise ValueError(
                    f"the state_dict has no {', '.join(missing)}: load the state of a {type(self).__name__} optimizer"
                )
            pairs = zip((key for saved in groups for key in saved["params"]), self._all_params(), strict=False)
            for key, p in pairs:
                for name, value in state["state"].get(key, {}).items():
                    apart = name in ("step", "block") or name.startswith("shared_")
                    if not apart and value.shape[max(0, value.ndim - p.ndim) :] != p.shape:
                        raise ValueError(
                            f"the state_dict holds {name} of shape {tuple(value.shape)} for parameter {key} of shape "
                            f"{tuple(p.shape)}: load the state that was saved with this model"
                        )
            given.update(state, param_groups=groups)
            return given

        def after(_: Optimizer) -> None:
            # torch has cast the state to the type of each parameter: take it once more as it was, so that the curvature
            # of bfloat16 parameters stays in float32.
            keys = [key for saved in given["param_groups"] for key in saved["params"]]
            self.state = {
                p: {k: v.to(p.device) for k, v in given["state"][key].items()}
                for key, p in zip(keys, self._all_params(), strict=True)
                if key in given["state"]
            }
            for place, group in enumerate(self.param_groups):
                self._restore(place, group)

        hooks = [
            self.register_load_state_dict_pre_hook(before),  # after those of the user, who may change what is loaded
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "state"})
        self.state = state["state"]  # pyright: ignore[reportIncompatibleVariableOverride]


def require(valid: bool, name: str, value: Any, condition: str, remedy: str) -> None:
    """Refuse a hyper-parameter in one sentence.

    Raises:
        ValueError: if it is not valid.
    """
    if not valid:
        raise ValueError(f"{name} must satisfy {condition}, got {value}: {remedy}")


def whole(name: str, value: Any, least: int, remedy: str) -> int:
    """A number that counts something; not a boolean, but any other integer, numpy's too.

    Raises:
        ValueError: if it is no integer, or below ``least``.
    """
    counts = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(counts and int(value) >= least, name, repr(value), f"{name} ≥ {least}, an integer", remedy)
    return int(value)


def is_number(value: Any) -> bool:
    """Whether it is a real number, numpy's too, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def refuse_sparse(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients that are not strided.

    Raises:
        RuntimeError: if there is one.
    """
    for gradient in gradients:
        if gradient.layout != torch.strided:
            raise RuntimeError(f"{gradient.layout} gradients are not supported: make the layer with sparse=False")
