"""Weights: the parameters to prune, found by name or type of layer, and seen as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from quadric.layers.targets import IGNORED, Choice, find_targets

__all__ = ["Weights", "find_weights", "refuse_unfit"]

BY_DEFAULT = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Weights:
    """Some parameters of a model, whose numbers are the coordinates of everything in this room.

    Args:
        found: The parameters by name, as in ``model.named_parameters()``, each with the module that it belongs to.
        left_alone: Other weights, with the reason why they are none of these.
    """

    found: dict[str, tuple[nn.Parameter, nn.Module]]
    left_alone: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return list(self.found)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters."""
        return [p for p, _ in self.found.values()]

    @property
    def owners(self) -> list[nn.Module]:
        """The module of each."""
        return [owner for _, owner in self.found.values()]

    @property
    def sizes(self) -> list[int]:
        """Numbers in each parameter."""
        return [p.numel() for p in self.params]

    @property
    def dim(self) -> int:
        """Numbers in all of them."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of their gradients, float32 or better."""
        return max((torch.promote_types(p.dtype, torch.float32) for p in self.params), key=lambda kind: kind.itemsize)

    def flatten(self, tensors: Iterable[Tensor], device: torch.device) -> Tensor:
        """Tensors shaped like the parameters as one vector, ``(dim,)``, in float32 or better."""
        parts = [x.detach().reshape(-1).to(device, torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        return torch.cat(parts)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector ``(dim,)`` as views in the shapes of the parameters."""
        return [part.view(p.shape) for part, p in zip(flat.split(self.sizes), self.params, strict=True)]

    def without(self, reasons: dict[str, str]) -> Weights:
        """All but some, which are left alone for these reasons.

        Raises:
            ValueError: if nothing remains.
        """
        left_alone = self.left_alone | reasons
        found = {name: place for name, place in self.found.items() if name not in reasons}
        if not found:
            raise ValueError(
                f"there is nothing to prune ({_told(left_alone)}): choose other targets or another pattern"
            )
        return Weights(found, left_alone)

    def joined_by(self, model: nn.Module, names: Iterable[str]) -> Weights:
        """These and further parameters of the model, whatever their shape."""
        places = {name: (model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])) for name in names}
        for name, (p, _) in places.items():
            refuse_unfit(name, p)
        return Weights(self.found | places, self.left_alone)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Give the parameters the values of a vector ``(dim,)``.

        Raises:
            ValueError: if one is beyond the range of its parameter's type.
        """
        for name, values in zip(self.names, self.split(flat), strict=True):
            p, rounded = self.found[name][0], values.to(self.found[name][0].dtype)
            if not bool(torch.isfinite(rounded).all()):
                bad = float(values[~torch.isfinite(rounded)][0])
                raise ValueError(f"an updated weight of {name} is {bad:g}, beyond {p.dtype}: raise damping")
            p.copy_(rounded)


def judged(module: nn.Module, by_default: bool) -> str:
    """Why the weights of a module are not pruned unless somebody names them; empty where they are."""
    if by_default and not isinstance(module, BY_DEFAULT):
        return (
            f"{type(module).__name__} is neither linear nor a convolution, attention or recurrent: name it in targets"
        )
    return ""


def find_weights(model: nn.Module, targets: Choice, ignore: Choice) -> Weights:
    """The weights with two axes or more that are to be pruned; tied ones once.

    Args:
        model: The model.
        targets: Patterns of names of weights or modules (``fnmatch``), or types of modules; None takes all linear,
            convolutional, attention, recurrent and bilinear layers.
        ignore: The same, to leave alone.

    Raises:
        ValueError: if there is nothing to prune, a pattern matches nothing, or a weight holds a number that is not
            finite, is complex, sharded or has no shape yet.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[nn.Parameter, nn.Module]] = {}
    left_alone = {}
    ignored = set()  # a weight that is tied to an ignored one is the same weight
    for target in find_targets(model, targets, ignore, judged):
        owner_path, _, attribute = target.path.rpartition(".")
        owner = target.module.get_submodule(owner_path)
        p, reason = owner._parameters.get(attribute), target.reason
        if p is None and not reason:
            reason = "a parametrization computes it: remove that first, then prune"
        if "parametrizations" in target.name.split(".") and reason != IGNORED:
            reason = "a parametrization computes a weight from it: remove that first, then prune"
        if p is not None and not is_lazy(p) and not p.numel() and not reason:
            reason = "it holds no numbers"
        if reason:
            left_alone[target.name] = reason
            ignored |= {id(p)} if reason == IGNORED else set()
        elif p is not None:
            found.setdefault(names[id(p)], (p, owner))
    found = {name: place for name, place in found.items() if id(place[0]) not in ignored}
    left_alone = {name: reason for name, reason in left_alone.items() if name not in found}
    if not found:
        told = _told(left_alone) or "it has no weight of two axes"
        raise ValueError(f"there is nothing to prune in {type(model).__name__} ({told}): name weights in targets")
    for name, (p, _) in found.items():
        refuse_unfit(name, p)
    return Weights(found, left_alone)


def _told(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def refuse_unfit(name: str, p: Tensor) -> None:
    """Refuse a parameter that has no dense finite real values of its own.

    Raises:
        ValueError: if so.
    """
    if is_lazy(p):
        raise ValueError(f"{name} has no shape yet: call the model once on a batch")
    if p.is_meta or p.layout != torch.strided:
        raise ValueError(f"{name} is {'on the meta device' if p.is_meta else p.layout}: give it dense values first")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name} of shape {tuple(p.shape)} repeats one memory: make it nn.Parameter(p.clone())")
    if p.is_complex() or not p.is_floating_point():
        raise ValueError(f"{name} is of {p.dtype}: leave it out")
    if hasattr(p, "to_local"):
        raise ValueError(f"{name} is sharded (DTensor): prune the whole model before sharding it")
    if not bool(torch.isfinite(p).all()):
        bad = p[~torch.isfinite(p)][0].item()
        raise ValueError(f"{name} holds {bad}: load weights that are finite")
