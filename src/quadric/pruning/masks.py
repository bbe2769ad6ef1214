"""Masks: which weights are kept, and how removed ones stay exactly zero whatever steps along the parameters.

Three things together hold for every optimizer. Gradients of removed weights are zero from the moment that they are
accumulated, so no momentum, second moment, closure or gradient norm ever sees them. Gradients are masked once more
before a step, for those that came another way. And the weights themselves are masked after it, for steps that mix
gradients, as Muon's does. A mask multiplies bit patterns as integers: 0 times anything is +0.0, infinities and NaN too.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, _foreach_mul_, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import LBFGS, Optimizer

__all__ = ["HeldMasks", "Masks", "hold_masks", "optimizers_of"]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: as wide as a number they mask

Place = Callable[[], Tensor | None]  # a parameter of today: frameworks swap parameters, so it is looked up when needed


class Masks(dict[str, Tensor]):
    """Boolean masks by the names of parameters, True where a weight is kept, that also know their parameters.

    The model is remembered weakly, by the modules that own the parameters. A pickle and any copy are ordered
    dictionaries with the same tensors and without that knowledge, so ``torch.load(weights_only=True)`` reads them.
    All masks are contiguous, and so ``safetensors.torch.save_file(masks, "masks.safetensors")`` takes them.

    Args:
        masks: Boolean tensors by name.
        places: Where to find the parameter of each name.
    """

    def __init__(self, masks: Mapping[str, Tensor], places: Mapping[str, Place] | None = None):
        super().__init__(masks)
        self.places = dict(places or {})

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
        """Masks of the parameters of a model.

        Args:
            model: The model.
            masks: Boolean tensors by the names of ``model.named_parameters()``, each of its parameter's shape.

        Raises:
            ValueError: if there is no such parameter, or a mask is not boolean or of another shape.

        Example:
            >>> masks = Masks.of(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
            >>> masks["weight"]
            tensor([[ True, False]])
        """
        places: dict[str, Place] = {}
        for name, mask in masks.items():
            owner, _, leaf = name.rpartition(".")
            module = _submodule(model, owner)
            parameter = None if module is None else module._parameters.get(leaf)
            if module is None or parameter is None:
                shown = ", ".join(known for known, _ in list(model.named_parameters())[:3]) or "none at all"
                raise ValueError(
                    f"masks names {name!r}, which is no parameter of the model: use names of "
                    f"model.named_parameters(), such as {shown}"
                )
            _check(name, mask, parameter)
            places[name] = partial(_owned, weakref.ref(module), leaf)
        return cls({name: mask.detach().contiguous() for name, mask in masks.items()}, places)

    def parameter(self, name: str) -> Tensor | None:
        """The parameter of a name as it is now, None if it is not known or its model is gone.

        Args:
            name: A key.
        """
        return self.places[name]() if name in self.places else None

    def __reduce__(self) -> tuple:
        return OrderedDict, (), None, None, iter(self.items())


@dataclass(eq=False)
class Site:
    """A parameter and what it is multiplied by: an integer 1 where a weight is kept and 0 where it is removed."""

    place: Place
    bits: Tensor
    watched: Tensor | None = None  # the parameter that calls us after it has accumulated a gradient
    hook: Any = None

    def bits_for(self, tensor: Tensor) -> Tensor:
        """The factors for a tensor of the parameter's shape, wherever it has moved to since."""
        dtype = INTEGERS[tensor.element_size()]
        if self.bits.device != tensor.device or self.bits.dtype != dtype:
            self.bits = self.bits.to(tensor.device, dtype)
        return self.bits


class HeldMasks:
    """Masks that are held; it lives as long as their optimizer.

    Args:
        sites: The parameters of each optimizer.
    """

    def __init__(self, sites: list[tuple[Optimizer, list[Site]]]):
        self._sites = [site for _, own in sites for site in own]
        self._hooks = []
        for optimizer, own in sites:
            _clear(optimizer, own)
            self._after(own)
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_, own=own: self._before(own)))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_, own=own: self._after(own)))

    def remove(self) -> None:
        """End it: from now on the removed weights are trained like any others."""
        for hook in self._hooks + [site.hook for site in self._sites if site.hook is not None]:
            hook.remove()
        self._hooks, self._sites = [], []

    @torch.no_grad()
    def _before(self, sites: list[Site]) -> None:
        # Also gradients that no backward accumulated, or that were changed since.
        _zero_((site, p.grad) for site, p in _present(sites) if p.grad is not None)

    @torch.no_grad()
    def _after(self, sites: list[Site]) -> None:
        present = _present(sites)
        _zero_(present)
        for site, p in present:
            if site.watched is not p and p.requires_grad and p.is_leaf:
                if site.hook is not None:
                    site.hook.remove()
                site.watched, site.hook = p, p.register_post_accumulate_grad_hook(_watcher(weakref.ref(self), site))


def hold_masks(
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | Iterable[Optimizer],
    model: nn.Module | None = None,
) -> HeldMasks:
    r"""Keep removed weights exactly zero through every step of an optimizer.

    .. math::
        g \leftarrow m \circ g \text{ when accumulated and before a step}, \qquad
        w \leftarrow m \circ w \text{ now and after a step}

    Momentum, weight decay, closures, gradient clipping, scaled gradients, accumulation and averaging over processes
    need nothing else. What the optimizer remembers of removed weights is set to zero here and stays there (but for the
    least values of Rprop and Adamax) where it belongs to single weights; estimates that cannot be cut, such as the
    curvature of this package's optimizers, forget by themselves.

    No key of any ``state_dict`` changes, and nothing is added: after loading a checkpoint call this again, and training
    continues bitwise. Copies and pickles of the model or the optimizer are not held: call this for them.

    Several holds work side by side: a weight is zero if any of them has removed it, and comes back to life when the
    last of those is removed.

    Cost: three passes over the masked parameters, with factors that take as much memory as the parameters.

    Args:
        masks: Boolean tensors by the names of parameters, True where a weight is kept. They are copied.
        optimizer: Any of ``torch.optim`` or made like them, or a wrapper that has one as ``.optimizer``; or several
            that share the parameters among them.
        model: Whose parameters are named. Not needed for the masks of a :class:`quadric.PruneResult`, nor if the
            optimizer was given ``model.named_parameters()``.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: if a mask fits no parameter, or its parameter is not one of the optimizer; nothing is changed then.

    Example:
        Both gradients are 1, and only one weight moves.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        >>> handle = hold_masks({"weight": torch.tensor([[True, False]])}, optimizer, layer)
        >>> layer(torch.ones(2)).backward()
        >>> optimizer.step()
        >>> layer.weight.tolist()
        [[0.5, 0.0]]
    """
    optimizers = optimizers_of(optimizer)
    if not masks:
        raise ValueError("masks is empty: give one boolean tensor for each parameter that has removed weights")
    if model is not None:
        masks = Masks.of(model, masks)
    elif not isinstance(masks, Masks):
        masks = Masks(
            masks, {name: partial(_named, [weakref.ref(each) for each in optimizers], name) for name in masks}
        )
    owners = {id(p): each for each in optimizers for group in each.param_groups for p in group["params"]}
    sites: dict[int, tuple[Optimizer, Site]] = {}
    for name, mask in masks.items():
        p = masks.parameter(name)
        if p is None:
            raise ValueError(
                f"the parameter {name!r} is not to be found by its name alone: pass model=, or make the optimizer from "
                "model.named_parameters()"
            )
        _check(name, mask, p)
        if id(p) not in owners:
            raise ValueError(
                f"the optimizer does not have {name!r}, of which there is a mask: leave that mask out, give the "
                "parameter to the optimizer, or pass all optimizers in a list"
            )
        # As a tensor laid out like the parameter, whatever its memory format.
        bits = torch.empty_like(p, dtype=INTEGERS[p.element_size()], requires_grad=False).copy_(mask)
        if id(p) in sites:  # a tied weight under another of its names
            sites[id(p)][1].bits.mul_(bits)
        else:
            sites[id(p)] = owners[id(p)], Site(masks.places[name], bits)
    return HeldMasks([(each, [site for owner, site in sites.values() if owner is each]) for each in optimizers])


def optimizers_of(given: Any) -> list[Optimizer]:
    """The optimizers that somebody passed as one, as a wrapper of one, or as several.

    Raises:
        ValueError: if one of them is no optimizer.
    """
    found = []
    for each in [given] if hasattr(given, "step") or not isinstance(given, Iterable) else given:
        inner = each
        while "param_groups" not in getattr(inner, "__dict__", {}) and hasattr(inner, "optimizer"):
            inner = inner.optimizer  # a wrapper forwards to it and has no hooks of its own
        if not isinstance(inner, Optimizer):
            raise ValueError(
                f"optimizer must be one of torch.optim or made like them, got {type(each).__name__}: pass the object "
                "whose step() changes the parameters"
            )
        found.append(inner)
    return found


def _check(name: str, mask: Any, parameter: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the mask of {name} is {kind}: make it a boolean tensor, True where a weight is kept")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name} has shape {tuple(mask.shape)} and the parameter {tuple(parameter.shape)}: "
            "use masks that were made for this model"
        )
    if hasattr(parameter, "to_local"):
        raise ValueError(f"{name} is sharded (DTensor), and its mask is not: use DistributedDataParallel")
    if parameter.element_size() not in INTEGERS:
        raise ValueError(f"{name} is {parameter.dtype}, which masks do not take: use numbers of eight bytes at most")


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in filter(None, path.split(".")):
        module = None if module is None else module._modules.get(part)
    return module


def _owned(owner: weakref.ref[nn.Module], leaf: str) -> Tensor | None:
    module = owner()
    return None if module is None else module._parameters.get(leaf)


def _named(optimizers: list[weakref.ref[Optimizer]], name: str) -> Tensor | None:
    for each in optimizers:
        optimizer = each()
        for group in [] if optimizer is None else optimizer.param_groups:
            if name in group.get("param_names", ()):
                return group["params"][group["param_names"].index(name)]
    return None


def _present(sites: list[Site]) -> list[tuple[Site, Tensor]]:
    return [(site, p) for site in sites if (p := site.place()) is not None]


def _zero_(pairs: Iterable[tuple[Site, Tensor]]) -> None:
    # One launch for all strided tensors.
    tensors, factors = [], []
    for site, tensor in pairs:
        bits = site.bits_for(tensor)
        if tensor.layout == torch.sparse_coo:
            tensor, bits = tensor._values(), bits[tuple(tensor._indices())]
        tensors.append(tensor.detach().view(bits.dtype))
        factors.append(bits)
    if tensors:
        _foreach_mul_(tensors, factors)


def _watcher(hold: weakref.ref[HeldMasks], site: Site) -> Callable[[Tensor], None]:
    # A parameter may outlive the optimizer, whose end is the end of the hold.
    def accumulated(p: Tensor) -> None:
        if hold() is None or p.grad is None:
            return
        if torch.is_grad_enabled():  # backward(create_graph=True): somebody may differentiate what is in the graph
            p.grad = p.grad.masked_fill(site.bits_for(p.grad) == 0, 0)
        else:
            _zero_([(site, p.grad)])

    return accumulated


def _clear(optimizer: Optimizer, sites: list[Site]) -> None:
    """Zero what an optimizer remembers of removed weights, which it would go on adding to them."""
    if "state" not in vars(optimizer):  # it is assembled when somebody looks: a copy
        return
    present = {p: site for site, p in _present(sites)}
    for p, site in present.items():
        kept = optimizer.state[p].values() if p in optimizer.state else ()
        _zero_((site, value) for value in kept if isinstance(value, Tensor) and value.ndim and value.shape == p.shape)
    if isinstance(optimizer, LBFGS):  # it keeps all parameters in flat vectors, with products of them
        params = [p for group in optimizer.param_groups for p in group["params"]]
        removed = torch.cat(
            [(present[p].bits if p in present else torch.ones_like(p)).reshape(-1) == 0 for p in params]
        )
        values = [value for state in optimizer.state.values() for value in state.values()]
        vectors = [vector for value in values for vector in (value if isinstance(value, list) else [value])]
        if any(isinstance(v, Tensor) and v.shape == removed.shape and bool(v[removed].any()) for v in vectors):
            optimizer.state.clear()
