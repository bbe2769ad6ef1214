"""The handle on a model whose weight gradients somebody else forms: layers, plan, state, and the way back."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quadric.distributed import alone, average_
from quadric.layers.intercept import Former, Site, attribute, intercept, release
from quadric.layers.targets import Choice, Target, find_targets

__all__ = ["Conditioning", "Layer"]

HEAD = ("weight", "inputs", "outputs", "rows", "looked at", "way", "extra")


class Layer(Former):
    """One conditioned weight: forms its gradients, and keeps what it has seen.

    Args:
        target: The weight.
        start: Of a part of a joint weight, its first row; None for a whole weight.
        handle: Whose settings count.
    """

    def __init__(self, target: Target, start: int | None, handle: Conditioning):
        super().__init__()
        self.target, self.start, self.handle = target, start, handle
        self.name = target.name if start is None else f"{target.name}[{start}:]"
        self.pool: Tensor | None = None  # statistics summed since the last step
        self.pool_rows = 0.0

    @property
    def weight(self) -> Tensor:
        """The weight as it is now."""
        return attribute(self.target.module, self.target.path)

    @abstractmethod
    def condition_pooled_(self, pool: Tensor, rows: float) -> None:
        """Condition the complete gradient of the weight in place, by a pooled sum of statistics over so many rows."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is kept from pass to pass, by name; empty before the first."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""

    @abstractmethod
    def seen(self) -> tuple[str, ...] | None:
        """The columns of the plan after the name; None before the first pass."""


class Conditioning:
    """The conditioned layers of a model, until :meth:`remove`. Printed, it is the plan.

    Args:
        model: The model.
        settings: Shared by the layers; they may be changed at any time.
        targets: Weights to condition.
        ignore: Weights to leave alone.
        make: Makes a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        targets: Choice,
        ignore: Choice,
        make: Callable[[Target, int | None, Conditioning], Layer],
    ):
        self.model, self.settings = model, settings
        self._given = targets, ignore, make
        self.targets = find_targets(model, targets, ignore)
        if settings["pooled"]:
            self.targets = [replace(target, reason=_unpoolable(target, self.targets)) for target in self.targets]
        taken = [target for target in self.targets if not target.reason]
        self.layers = {(each.name, start): make(each, start, self) for each in taken for start in _parts(each)}
        self.observing = False  # only output gradients are looked at now
        self.sampled = False  # output gradients come from observe()
        self.pooled = False  # pooled statistics were used once
        self._said: set[str] = set()
        self._hooks: list[Any] = []
        self._sites: list[Site] = []
        names: dict[nn.Module, dict[str, str]] = defaultdict(dict)
        for target in taken:
            names[target.module][target.path] = target.name
        try:
            for module, own in names.items():
                self._sites.append(intercept(module, own, self.former))
        except ValueError:
            self.remove()
            raise

    def former(self, name: str, start: int | None) -> Layer:
        """The layer of a weight by its name and, of a part of a joint weight, its first row."""
        return self.layers[name, start]

    def remove(self) -> None:
        """Restore the model."""
        for site in self._sites:
            release(site)
        for hook in self._hooks:
            hook.remove()
        self._sites, self._hooks = [], []

    def observe(self, loss: Tensor) -> None:
        """Take the output gradients of the two-sided ζ from a loss at sampled labels; ``.grad`` stays untouched.

        Args:
            loss: :func:`quadric.sampled_loss` of the model's outputs, with their graph, which is kept.

        Raises:
            RuntimeError: if the outputs are not conditioned.
        """
        if self.settings["output_damping"] is None:
            raise RuntimeError("observe looks at output gradients, but output_damping is None: give isaac one")
        self.observing = True
        try:
            params = [p for p in self.model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        finally:
            self.observing = False
        self.sampled = True

    # Pooled statistics.

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every step of an optimizer begin with :meth:`condition_`.

        Args:
            optimizer: Any; where its step takes a closure, call :meth:`condition_` at the end of the closure instead.
        """
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self.condition_()))

    @torch.no_grad()
    def condition_(self) -> None:
        """Condition the gradients in place by the inputs of all passes and all processes since the last call.

        Raises:
            RuntimeError: if the statistics are not pooled.
        """
        if not self.settings["pooled"]:
            raise RuntimeError("condition_ needs pooled statistics, but pooled is False: call isaac with pooled=True")
        self.pooled = True
        layers = list(self.layers.values())
        if not layers:
            return
        device = layers[0].weight.device  # NCCL sends nothing from a CPU
        rows = torch.tensor([layer.pool_rows for layer in layers], device=device)
        everywhere = (rows > 0).float()
        if not alone():
            average_([rows, everywhere])
            shared = zip(layers, everywhere, strict=True)
            average_([layer.pool for layer, share in shared if share == 1 and layer.pool is not None])
        for layer, count, share in zip(layers, rows.tolist(), everywhere.tolist(), strict=True):
            pool, layer.pool, layer.pool_rows = layer.pool, None, 0.0
            if share == 1 and pool is not None:
                layer.condition_pooled_(pool, count)
            elif share:
                self.say_once("absent", f"{layer.name} was not used by every process, and its gradient stays plain")

    def say_once(self, about: str, sentence: str) -> None:
        """Warn, once of each kind."""
        if about not in self._said:
            self._said.add(about)
            warnings.warn(f"{sentence} (said once)", RuntimeWarning, stacklevel=2)

    # State.

    def state_dict(self) -> dict[str, Tensor]:
        """What the layers keep from pass to pass: small tensors, by name."""
        kept = {f"{layer.name}/{key}": value for layer in self.layers.values() for key, value in layer.state().items()}
        return kept | {"sampled": torch.tensor(self.sampled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Args:
            state: Of a model with the same names.
        """
        self.sampled = bool(state.get("sampled", False))
        for layer in self.layers.values():
            own = f"{layer.name}/"
            layer.restore({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "settings": self.settings, "given": self._given, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied model has the forwards of its types: it is conditioned anew.
        if not vars(state["model"]):
            raise RuntimeError(
                "the handle of isaac is an attribute of the model that it conditions, and would be copied before it: "
                "keep the handle beside the model"
            )
        self.__init__(state["model"], state["settings"], *state["given"])
        self.load_state_dict(state["state"])

    # The plan.

    def plan(self, *inputs: Any, **named: Any) -> str:
        """The plan for a batch, before any pass: shapes alone go through a copy of the model.

        Args:
            inputs: What the model is called with.
            named: The same, by name.

        Raises:
            RuntimeError: if the model's forward asks for values.
        """

        def shape_of(tensor: Tensor) -> Tensor:
            return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)

        memo: dict[int, Any] = {id(p): nn.Parameter(shape_of(p), p.requires_grad) for p in self.model.parameters()}
        memo |= {id(buffer): shape_of(buffer) for buffer in self.model.buffers()}
        copied, (targets, ignore, make) = copy.deepcopy(self.model, memo), self._given
        handle = Conditioning(copied, self.settings, targets, ignore, make)
        batch, options = tree_map_only(Tensor, lambda tensor: shape_of(tensor).detach(), (inputs, named))
        try:
            with torch.enable_grad():
                outputs = tree_leaves(copied(*batch, **options))
        except (NotImplementedError, RuntimeError) as error:
            raise RuntimeError(
                f"the model wants more than shapes ({error}): print the handle after a backward"
            ) from error
        reached = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
        torch.autograd.backward(reached, [torch.ones_like(out) for out in reached])
        return str(handle)

    def __str__(self) -> str:
        seen = {layer: layer.seen() for layer in self.layers.values()}
        touched = {layer.target for layer, columns in seen.items() if columns}
        waiting = [layer for layer in seen if layer.start is None and layer.target not in touched]
        lines = [HEAD, *((layer.name, *columns) for layer, columns in seen.items() if columns)]
        lines += [
            (layer.name, *["–"] * (len(HEAD) - 2), "frozen" * (not layer.weight.requires_grad)) for layer in waiting
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        options = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "params")
        return "\n".join(
            [
                f"{len(lines) - 1} weights conditioned: {options}",
                *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
                *["rows and costs are known after a backward pass, or from handle.plan(*inputs)"] * bool(waiting),
                *(f"left alone: {target.name}: {target.reason}" for target in self.targets if target.reason),
            ]
        )

    __repr__ = __str__


def _parts(target: Target) -> Sequence[int | None]:
    # Where the parts of a weight begin: an attention may project queries, keys and values by one or apart.
    if target.path != "in_proj_weight":
        return (None,)
    width = attribute(target.module, target.path).shape[1]
    return None, 0, width, 2 * width


def _unpoolable(target: Target, targets: Sequence[Target]) -> str:
    # Why the gradient of a weight cannot be conditioned once it is complete.
    weight = attribute(target.module, target.path)
    others = (other for other in targets if other.name != target.name)
    if target.reason:
        return target.reason
    if hasattr(weight, "to_local"):
        return "it is sharded over processes: pooled statistics condition whole gradients"
    if not weight.is_leaf:
        return "it is computed from other parameters: pooled statistics condition the gradients of parameters"
    if any(attribute(other.module, other.path) is weight for other in others):
        return "it is used in several places, whose gradients are added before pooled statistics meet them"
    return ""
