"""Patterns: which weights go together, and which of them go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from quadric.layers.targets import Choice
from quadric.optimizer import require
from quadric.pruning.channels import channel_spaces
from quadric.pruning.weights import Weights, find_weights

__all__ = ["Pattern", "Scope", "find_pattern"]

Scope = Literal["global", "layer"]
KINDS = "'unstructured', 'N:M' with 0 < N < M such as '2:4', 'block:RxC' such as 'block:1x4', or 'channel'"

UNTRACED = "cannot be traced"  # in the reason why a space is not understood


@dataclass(frozen=True)
class Pattern:
    """Coordinates in units that go as one, and the rule by which units are chosen.

    Args:
        unit: Of each coordinate, ``(dim,)``; −1 where it stays whatever happens.
        pool: Of each unit, ``(count,)``: each pool reaches the sparsity by itself.
        cells: Units of which at most ``most`` may stay together, ``(cells, size)``; None where there is no such rule.
        most: Units of a cell that may stay.
        family: Of each unit, ``(count,)``: at least one of a family stays; None where all may go.
    """

    unit: Tensor
    pool: Tensor
    cells: Tensor | None = None
    most: int = 0
    family: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self.pool)

    def to(self, device: torch.device) -> Pattern:
        """The same with its tensors on a device."""
        cells = None if self.cells is None else self.cells.to(device)
        family = None if self.family is None else self.family.to(device)
        return Pattern(self.unit.to(device), self.pool.to(device), cells, self.most, family)

    def choose(self, costs: Tensor, kept: Tensor, now: float, final: float) -> Tensor:
        """The units to remove, ``(count,)`` booleans: the cheapest a weight, until as many weights are gone.

        Args:
            costs: Of each unit, ``(count,)``.
            kept: Which coordinates are left, ``(dim,)``.
            now: The sparsity to reach.
            final: The sparsity that will be reached at last.
        """
        sizes, alive = self._per_unit(torch.ones_like(kept)), self._per_unit(kept)
        chosen = torch.zeros_like(self.pool, dtype=torch.bool)
        forced = 0
        if self.cells is not None:
            forced = round((self.cells.shape[1] - self.most) * now / final)
            rank = torch.where(alive > 0, costs, -torch.inf)[self.cells].argsort(dim=1, stable=True)
            chosen[self.cells.gather(1, rank[:, :forced])] = True
            chosen &= alive > 0
        allowed = (alive > 0) & ~chosen & ~self._last_of_families(costs, alive)
        for pool in range(int(self.pool.max()) + 1):
            inside = self.pool == pool
            size = int(sizes[inside].sum())
            target = self._target(size, forced, now, final)
            room = target - size + int(alive[inside & ~chosen].sum())
            candidates = (inside & allowed).nonzero().flatten()
            candidates = candidates[torch.argsort(costs[candidates] / alive[candidates], stable=True)]
            # Once for units of one size; a unit too large for what is left of the room leaves it to smaller ones.
            while len(candidates):
                candidates = candidates[alive[candidates] <= room]
                taken = alive[candidates].cumsum(0) <= room
                chosen[candidates[taken]] = True
                room -= int(alive[candidates[taken]].sum())
                candidates = candidates[~taken]
        return chosen

    def _target(self, size: int, forced: int, now: float, final: float) -> int:
        """How many of so many weights are to be gone."""
        if self.cells is None:
            return round(now * size)
        # What the cells demand, and of the rest the same share: so that no cell loses early what it may keep at last.
        cells, demanded = size // self.cells.shape[1], self.cells.shape[1] - self.most
        return forced * cells + round((round(final * size) - demanded * cells) * now / final)

    def removed(self, kept: Tensor) -> Tensor:
        """The share of each pool that is gone."""
        owned, pools = self.unit >= 0, int(self.pool.max()) + 1
        members = (self.pool[self.unit[chosen]] for chosen in (owned, owned & kept))
        sizes, alive = (torch.bincount(pool, minlength=pools) for pool in members)
        return 1 - alive / sizes.clamp_min(1)

    def _per_unit(self, chosen: Tensor) -> Tensor:
        return torch.bincount(self.unit[chosen & (self.unit >= 0)], minlength=self.count)

    def _last_of_families(self, costs: Tensor, alive: Tensor) -> Tensor:
        last = torch.zeros_like(self.pool, dtype=torch.bool)
        if self.family is not None:
            order = torch.argsort(torch.where(alive > 0, costs, -torch.inf), descending=True, stable=True)
            families, place = torch.unique(self.family[order], return_inverse=True)
            first = torch.full_like(families, self.count)
            first.scatter_reduce_(0, place, torch.arange(self.count, device=place.device), "amin")
            last[order[first]] = True
        return last


def find_pattern(
    text: str, scope: Scope, sparsity: float, model: nn.Module, targets: Choice, ignore: Choice
) -> tuple[Weights, Pattern]:
    """The weights of a model that a pattern can be imposed on, and how.

    Args:
        text: The pattern.
        scope: Whether the sparsity is that of all weights or of each parameter (each set of tied channels).
        sparsity: To be reached.
        model: The model.
        targets: As :func:`find_weights` takes them.
        ignore: The same.

    Raises:
        ValueError: if there is no such pattern, the sparsity contradicts it, or there is nothing to prune.
    """
    require(scope in ("global", "layer"), "scope", repr(scope), "scope in global, layer", "choose one of these")
    require(isinstance(text, str), "pattern", repr(text), f"one of {KINDS}", "choose one of these")
    cell, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"block:(\d+)x(\d+)", text)
    weights = find_weights(model, targets, ignore)
    if cell and 0 < int(cell[1]) < int(cell[2]):
        weights, pattern = _cells(weights, int(cell[1]), int(cell[2]), sparsity)
    elif block and min(int(block[1]), int(block[2])) > 0:
        pattern = _blocks(weights, int(block[1]), int(block[2]))
    elif text == "unstructured":
        pattern = Pattern(torch.arange(weights.dim), _owner(weights))
    elif text == "channel":
        weights, pattern = _channels(weights, model, targets)
    else:
        raise ValueError(f"pattern must be one of {KINDS}, got {text!r}: choose one of these")
    if scope == "global":
        pattern = Pattern(pattern.unit, torch.zeros_like(pattern.pool), pattern.cells, pattern.most, pattern.family)
    return weights, pattern


def _owner(weights: Weights) -> Tensor:
    """The parameter that each coordinate belongs to."""
    return torch.arange(len(weights.sizes)).repeat_interleave(torch.tensor(weights.sizes))


def _cells(weights: Weights, most: int, size: int, sparsity: float) -> tuple[Weights, Pattern]:
    least = 1 - most / size
    if sparsity < least - 1e-6:
        raise ValueError(
            f"pattern {most}:{size} removes at least {least:g} of the weights, and sparsity is {sparsity}: set it to "
            f"{least:.7g} or more"
        )
    reasons, cells, start = {}, [], 0
    for name, p, module in zip(weights.names, weights.params, weights.owners, strict=True):
        inputs, together = 1, p.shape[1]
        if isinstance(module, _ConvTransposeNd):
            inputs, together = 0, module.in_channels // module.groups
        if together % size:
            reasons[name] = f"its {together} inputs are no multiple of {size}"
        else:
            cells.append((start + torch.arange(p.numel()).view(p.shape)).movedim(inputs, -1).reshape(-1, size))
            start += p.numel()
    weights = weights.without(reasons)
    return weights, Pattern(torch.arange(weights.dim), _owner(weights), torch.cat(cells), most)


def _blocks(weights: Weights, rows: int, columns: int) -> Pattern:
    units, pools, start = [], [], 0
    for number, p in enumerate(weights.params):
        matrix = p.flatten(1)
        across = -(-matrix.shape[1] // columns)
        row, column = torch.arange(matrix.shape[0]) // rows, torch.arange(matrix.shape[1]) // columns
        units.append((start + row.unsqueeze(1) * across + column).flatten())
        count = across * -(-matrix.shape[0] // rows)
        pools.append(torch.full((count,), number))
        start += count
    return Pattern(torch.cat(units), torch.cat(pools))


def _channels(weights: Weights, model: nn.Module, targets: Choice) -> tuple[Weights, Pattern]:
    """Units are channels with all that makes and follows them: rows of weights, biases, batch norms."""
    prefix = "_orig_mod." if isinstance(getattr(model, "_orig_mod", None), nn.Module) else ""  # of torch.compile
    given = {name.removeprefix(prefix): p for name, (p, _) in weights.found.items()}
    spaces = channel_spaces(model.get_submodule(prefix.rstrip(".")), given)
    blind = UNTRACED if targets is None else ""  # whoever names layers of a network that cannot be traced knows it
    why = [space.fixed or (space.uncut if blind and blind in space.uncut else "") for space in spaces]
    reasons = {prefix + piece.name: r for space, r in zip(spaces, why, strict=True) if r for piece in space.producers}
    weights = weights.without({name: reason for name, reason in reasons.items() if name in weights.found})
    taken = [space for space, reason in zip(spaces, why, strict=True) if not reason]
    slices = [
        (number, prefix + piece.name, piece)
        for number, space in enumerate(taken)
        for piece in (*space.producers, *space.biases, *space.followers)
    ]
    weights = weights.joined_by(model, [name for _, name, _ in slices])
    starts = torch.tensor([0, *(space.count for space in taken)]).cumsum(0)
    units = [torch.full(p.shape, -1) for p in weights.params]
    place = {name: i for i, name in enumerate(weights.names)}
    for number, name, piece in slices:
        unit = piece.over(units[place[name]].shape)
        units[place[name]] = torch.where(unit >= 0, unit + starts[number], units[place[name]])
    family = torch.arange(len(taken)).repeat_interleave(torch.tensor([space.count for space in taken]))
    return weights, Pattern(torch.cat([unit.flatten() for unit in units]), family, family=family)
