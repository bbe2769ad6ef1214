"""Curvature: what is believed about the damped matrix G of a loss, learnt from observations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quadric.matrix import PSDMatrix, positive_damping
from quadric.tiles import Tiles

__all__ = ["Curvature", "Schedule"]

Schedule = float | Callable[[int], float]
"""A number, or a function from the number of updates so far to a number."""


def damping_at(damping: Schedule, updates: int) -> float:
    """λ after so many updates, positive and finite."""
    return positive_damping(float(damping(updates) if callable(damping) else damping))


class Curvature(nn.Module, ABC):
    """A belief about a damped curvature matrix over ``dim`` coordinates; its tensors are buffers.

    A buffer is made when the first observation arrives, on its device and in its type, so that a constructor needs to
    know neither. A subclass says how an observation is absorbed and which matrix is believed in.

    Args:
        tiles: the cut of the coordinates into blocks, each with a matrix of its own, and of their storage.
        damping: λ, positive, or a schedule of it over the number of updates.

    Raises:
        ValueError: if there is no coordinate or ``damping`` is not positive.
    """

    column_names: tuple[str, ...] = ()  # the keys of columns()

    def __init__(self, tiles: Tiles, damping: Schedule):
        super().__init__()
        if tiles.dim < 1:
            raise ValueError(f"dim must be at least 1, got {tiles.dim}: it is the number of coordinates of a gradient")
        self.tiles, self.dim = tiles, tiles.dim
        self.damping = damping
        self.updates = 0  # observations absorbed so far
        self.damping_now()

    def damping_now(self) -> float:
        """λ at the present number of updates."""
        return damping_at(self.damping, self.updates)

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Learn from one observation.

        Args:
            observation: a gradient, ``(dim,)``.

        Raises:
            ValueError: if it has another shape or holds a number that is not finite; nothing is changed then.
        """
        self.check(observation, observation.shape == (self.dim,))
        self.absorb(self.tiles.pad(observation))

    def check(self, observation: Tensor, fits: bool) -> None:
        """Refuse an observation that does not fit or is not finite.

        Raises:
            ValueError: if so.
        """
        if not fits:
            raise ValueError(
                f"the observation has shape {tuple(observation.shape)}, but this estimate has {self.dim} coordinates: "
                "flatten the gradients and concatenate them in one order"
            )
        if not observation.is_floating_point() or not bool(torch.isfinite(observation).all()):
            finite = observation.is_floating_point()
            found = observation[~torch.isfinite(observation)][0].item() if finite else observation.dtype
            raise ValueError(f"the observation holds {found}: skip this batch, or look for the overflow in its loss")

    @abstractmethod
    def absorb(self, observation: Tensor) -> None:
        """:meth:`update` for an observation already padded, ``(tiles.length,)``, and known to be finite."""

    def inbox(self, flat: Tensor) -> Tensor:
        """Where the next padded observation had best be written: ``flat``, or memory of its size that saves a copy."""
        return flat

    @abstractmethod
    def matrix(self) -> PSDMatrix:
        """What is believed now, factorised when first used; it does not follow later updates."""

    # The state by coordinates, for an optimizer that shows each parameter its part.

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """A copy of what is kept of the padded coordinates ``start`` to ``stop``, ``(..., stop − start)`` each."""
        return {}

    def shared(self) -> dict[str, Tensor]:
        """A copy of what belongs to no single coordinate: small tensors."""
        return {"updates": torch.tensor(self.updates)}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:
        """Take over what :meth:`shared` and, for each span of coordinates, :meth:`columns` gave."""
        self.updates = int(shared["updates"])

    def get_extra_state(self) -> Tensor:  # noqa: D102
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:  # noqa: D102
        self.updates = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        # A buffer that no observation has made yet, here or there, is empty: it takes its shape and type from there.
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is not None and loaded is not None and not (buffer.numel() and loaded.numel()):
                self._buffers[name] = torch.empty_like(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportCallIssue]
