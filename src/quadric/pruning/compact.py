"""A smaller dense model: what is zero in whole channels is cut out.

A channel that is zero in every layer that makes it, with its bias and its batch norm, adds nothing anywhere. Its slices
leave all tensors of its :class:`~quadric.pruning.channels.Space`, in the layers that make it and in those that read it,
and what is left is an ordinary model with smaller layers and the same outputs, up to the rounding of shorter sums. A
channel that nobody reads any more goes as well, and so on until nothing changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quadric.pruning.channels import Slices, Space, channel_spaces

__all__ = ["compact"]


def compact(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    """A smaller copy of a pruned model, and a sentence for each space of channels where zeros had to stay.

    Chains, residual networks, depthwise convolutions and concatenations shrink, in training and in evaluation mode
    alike. Heads of ``nn.MultiheadAttention``, outputs of the model, channels under a layer norm, and whatever the
    symbolic trace does not understand keep their zeros, and the notes say so. No layer is left without channels.

    Cost: a copy of the model, and a look at each weight for every layer through which a removal spreads.

    Args:
        model: The pruned model; it is left as it was.
        masks: Which weights are kept, parameter name → bool tensor. Parameters without a mask count as removed where
            they are exactly zero.

    Raises:
        ValueError: if a mask does not fit the model, or nothing at all can be cut out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[1], model[0].bias[1] = 0, 0
        >>> smaller, notes = compact(model, {})
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in smaller.parameters())
        (13, 9)
    """
    alive = _alive(model, masks)
    spaces = channel_spaces(model)
    dead, notes = _dead(spaces, alive)
    if not any(bool(gone.any()) for gone in dead):
        fixed = "; ".join(f"{_names(space)}: {space.fixed}" for space in spaces)
        why = "; ".join(notes) or (
            "no channel is zero in all layers that make it, with its bias and its batch norm: prune with "
            "pattern='channel'"
            if any(space.removable for space in spaces)
            else f"none of its channels may be removed ({fixed or 'it has no layers'})"
        )
        raise ValueError(f"this model cannot shrink: {why}")
    kept: dict[tuple[str, int], Tensor] = {}
    for space, gone in zip(spaces, dead, strict=True):
        for slices in _all(space):
            key = slices.name, slices.axis
            kept[key] = kept.get(key, torch.ones(len(slices.units), dtype=torch.bool)) & ~_at(slices, gone)
    return _cut(model, kept), notes


def _alive(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # What is not removed, of each parameter by every name it has.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    removed: dict[int, Tensor] = {}
    for name, mask in masks.items():
        if name not in parameters:
            shown = ", ".join(list(parameters)[:3])
            raise ValueError(
                f"there is a mask for {name!r}, which the model does not have: its parameters are {shown}, …"
            )
        parameter = parameters[name]
        if mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)} and the parameter {tuple(parameter.shape)}: give "
                "the masks of this model"
            )
        if bool(parameter[~mask.to(parameter.device)].any()):
            raise ValueError(f"{name} is not zero where its mask removes it: multiply it by the mask first")
        removed[id(parameter)] = mask.to(parameter.device)
    return {name: removed[id(p)].clone() if id(p) in removed else p.detach() != 0 for name, p in parameters.items()}


def _dead(spaces: Sequence[Space], alive: dict[str, Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    # The units to cut of each space, and what is to be said. A unit without makers or readers takes its slices with it,
    # and so may leave others without.
    dead = [torch.zeros(space.count, dtype=torch.bool) for space in spaces]
    changed = True
    while changed:
        changed = False
        for space, gone in zip(spaces, dead, strict=True):
            if space.fixed or space.uncut:
                continue
            new = gone | ~_any(space, _makers(space), alive)
            if space.consumers:
                new |= ~_any(space, space.consumers, alive)
            for slices in _all(space):  # of which each keeps one channel, though others are tied to more
                if bool(_at(slices, new).all()):
                    new[slices.units[~_at(slices, gone)][0]] = False
            if bool((new & ~gone).any()):
                gone |= new
                changed = True
                for slices in (*_makers(space), *space.consumers):
                    entries = alive[slices.name]
                    entries &= ~_at(slices, gone).to(entries.device)[(..., *[None] * (entries.ndim - slices.axis - 1))]
    return dead, tuple(_notes(spaces, dead, alive))


def _notes(spaces: Sequence[Space], dead: Sequence[Tensor], alive: Mapping[str, Tensor]) -> Iterable[str]:
    for space, gone in zip(spaces, dead, strict=True):
        idle = ~_any(space, _makers(space), alive)
        left = int((idle & ~gone).sum())
        if left:
            why = space.fixed or space.uncut or "a layer needs one channel at least"
            yield f"{left} of {space.count} {space.kind}s of {_names(space)} are zero and stay: {why}"


def _names(space: Space) -> str:
    shown = ", ".join(slices.name for slices in space.producers[:3])
    return shown + (f" and {len(space.producers) - 3} more" if len(space.producers) > 3 else "")


def _makers(space: Space) -> tuple[Slices, ...]:
    return space.producers + space.biases + space.followers


def _all(space: Space) -> tuple[Slices, ...]:
    return _makers(space) + space.statistics + space.consumers


def _at(slices: Slices, units: Tensor) -> Tensor:
    # What holds of the unit of each index, (size of the axis,); False where there is none.
    return torch.cat((units, units.new_zeros(1)))[slices.units]


def _any(space: Space, tensors: Iterable[Slices], alive: Mapping[str, Tensor]) -> Tensor:
    # The units of which something is left in these tensors, (count,).
    found = torch.zeros(space.count + 1, dtype=torch.bool)
    for slices in tensors:
        entries = alive[slices.name]
        left = entries.movedim(slices.axis, 0).flatten(1).any(1) if entries.ndim > 1 else entries
        found[slices.units[left.cpu()]] = True  # index -1, of no unit, is the last and is dropped
    return found[:-1]


def _cut(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> nn.Module:
    smaller = copy.deepcopy(model)
    tensors: dict[str, Tensor] = {
        **dict(smaller.named_buffers(remove_duplicate=False)),
        **dict(smaller.named_parameters(remove_duplicate=False)),
    }
    new: dict[int, Tensor] = {}
    for (name, axis), keep in kept.items():
        if not bool(keep.all()):
            old = tensors[name]
            whole = new.get(id(old), old).detach()
            part = whole.index_select(axis, keep.nonzero().flatten().to(old.device))
            new[id(old)] = nn.Parameter(part, old.requires_grad) if isinstance(old, nn.Parameter) else part
    for module in smaller.modules():
        changed = {
            name: new[id(tensor)]
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if id(tensor) in new
        }
        for name, tensor in changed.items():
            setattr(module, name, tensor)
        if changed:
            _resize(module)
    return smaller


def _resize(module: nn.Module) -> None:
    # The sizes that a layer keeps beside its tensors, and prints.
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        rows, columns = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise: the groups are the channels
            module.groups = rows if transposed else rows * module.groups // module.out_channels
            module.in_channels, module.out_channels = module.groups, rows * columns if transposed else rows
        elif transposed:
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, _NormBase):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
