"""Atoms: what is known of the channels of a model, and the spaces that follow from it.

Every index of every axis that carries channels is an *atom*. Operations tie atoms to one another, and fix those that
must stay. Tied atoms are one *unit*, and units that the same weight produces are one :class:`Space`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ledger", "Shape", "Signal", "Size", "Slices", "Space", "Weight", "parts"]

ROLES = ("producers", "biases", "followers", "statistics", "consumers")


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


class Ledger:
    """Atoms along the axes of a model's tensors, which of them are tied, and which are fixed and why.

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
        for part in parts(value):
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
            self.fix(signal, f"{who} reads its channels in a way that is not understood")
            self.fixed.append((atoms, f"{who} reads what is not followed"))
            return
        self.tie(read, atoms.repeat(groups))
        if signal.restless:
            self.fixed.append((read, f"{signal.restless} makes a constant of a channel of zeros before {who} reads it"))

    def spaces(self, weights: Mapping[str, Any] | None) -> tuple[Space, ...]:
        """Units are tied atoms; units that one weight produces are a space.

        Args:
            weights: Names of the weights that may be pruned; None for all.
        """
        unit = _connected(self.atoms, self.ties)
        producing = [unit[atoms] for key, atoms in self.axes.items() if "producers" in self.roles[key]]
        family = _connected(self.atoms, [(units[:1].expand(len(units)), units) for units in producing])[unit]
        ranks = _ranks(unit, family)
        produced = set(family[torch.cat(producing)].tolist()) if producing else set()
        found: dict[int, dict[str, list[Slices]]] = {root: {role: [] for role in ROLES} for root in sorted(produced)}
        for (name, axis), atoms in self.axes.items():
            role = next(role for role in ROLES if role in self.roles[name, axis])
            for root in torch.unique(family[atoms]).tolist():
                if root in found:
                    found[root][role].append(Slices(name, axis, ranks[atoms].where(family[atoms] == root, -1)))
        fixed, uncut = self._first(self.fixed, family), self._first(self.uncut, family)
        heads = self._first([(atoms, "head") for atoms in self.heads], family)
        for root, tensors in found.items():
            others = [made.name for made in tensors["producers"] if weights is not None and made.name not in weights]
            if others:
                fixed.setdefault(root, f"{others[0]} makes its channels too and is not among the weights to prune")
        return tuple(
            Space(
                int(ranks[family == root].max()) + 1,
                heads.get(root, "channel"),
                **{role: tuple(slices) for role, slices in tensors.items()},
                fixed=fixed.get(root, ""),
                uncut=uncut.get(root, ""),
            )
            for root, tensors in found.items()
        )

    @staticmethod
    def _first(said: Sequence[tuple[Tensor, str]], family: Tensor) -> dict[int, str]:
        # The first sentence that was said of each family.
        first: dict[int, str] = {}
        for atoms, reason in said:
            for root in torch.unique(family[atoms]).tolist():
                first.setdefault(root, reason)
        return first


def parts(value: Any) -> Iterator[Any]:
    """Signals, weights, shapes and sizes in nested arguments."""
    if isinstance(value, (Signal, Weight, Shape, Size)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from parts(part)
    elif isinstance(value, dict):
        yield from parts(list(value.values()))
    elif isinstance(value, slice):
        yield from parts((value.start, value.stop, value.step))


def _ranks(unit: Tensor, family: Tensor) -> Tensor:
    # The number of each atom's unit among the units of its family, in order of their first atoms.
    firsts = torch.unique(unit)
    order = torch.argsort(family[firsts], stable=True)
    sizes = torch.unique_consecutive(family[firsts][order], return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ranks = torch.empty_like(unit)
    ranks[firsts[order]] = torch.arange(len(firsts)) - starts
    return ranks[unit]


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
