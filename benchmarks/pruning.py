"""Pruning M-FAC's own ResNet-20: how accurate it is after every method, at every sparsity.

Run with ``python benchmarks/pruning.py --data-dir FOLDER --weights FILE --json OUT [--only EXPERIMENT …] [--seeds …]``.

The folder holds ``cifar10.npz``, and the file is the checkpoint of M-FAC's paper: a ``safetensors`` file of the state
dict of ``quadric.lab.models.ResNet20``. All convolutional and linear weights are pruned, ranked together. A seed draws
the batches, of 32 images of the training set; the network is the same. A cell is the accuracy and the mean loss on the
first ``--test`` test images, as pruned; of seed 1 (of rows without seeds, of 0) once more with batch-norm statistics
of 1,280 training images, moved and mirrored at random as in the training of the network, which is why they suit it.

**one-shot.** No fine-tuning. Rows of *one round* go from the dense network to each sparsity with the same 64 gradients;
a *path* goes through the columns and takes new gradients on the way.

**windows.** One round with 64, 256 and 1,024 gradients in blocks of several sizes. Narrower windows are the first
gradients of the widest one of the seed.

**choices.** One round from the same network at 65 % to 80 %, an option changed in each row.

**patterns.** 2:4, 4:8, blocks of 1 × 4 and channels, one-shot to 50 %.

**gradual.** From the dense network to 75 %, 87.5 % and 95 %, each in ten epochs of fine-tuning: a pruning at the start
of each of the first six, the last four to recover. An epoch is ``--epoch`` images drawn anew, moved and mirrored.

Each cell is kept in the file of figures, and what is there is not measured again. ``--tables`` prints the tables of a
file, ``--page`` puts them into a page between its marks, ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format, fuse_conv_bn_eval

import quadric
from quadric.lab.models import ResidualBlock, ResNet20
from quadric.lab.plots import GRID, INK, MUTED, THEME, png, settings
from quadric.lab.subjects import put_weights, read_weights
from quadric.lab.tasks import load_task
from quadric.pruning.evidence import Evidence, GradientRows
from quadric.pruning.gradients import mean_gradients
from quadric.pruning.memory import plan_memory
from quadric.pruning.weights import find_weights
from quadric.tiles import Tiles

BATCH = 32
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LEVELS = (0.75, 0.875, 0.95)
GRADIENTS = 64
BLOCK = 64
DAMPING = 1e-5
WINDOWS = (64, 256, 1024)
BLOCKS: dict[str, int | None] = {"64": 64, "128": 128, "512": 512, "2048": 2048, "whole": None}
EPOCHS, PRUNINGS = 10, 6
MARGIN = 4  # pixels that an image is moved by at most
STEP = 32  # images in a step of fine-tuning
NORM_BATCHES, NORM_BATCH = 10, 128
# What BASELINES of one-shot pruning say: one seed, the first 4,000 test images.
BEFORE = {
    "before: single, 18 rounds, 147,456 images": (90.5, 89.5, 87.2, 81.2, 55.0, 25.7),
    "before: joint, 18 rounds, 147,456 images": (90.6, 89.2, 87.1, 82.7, 61.7, 35.0),
}

Batch = tuple[Tensor, Tensor]
Cell = dict[str, float]
Loss = Callable[[nn.Module, Batch], Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def sampled_loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """At labels that the model itself draws, as large as the mean of a batch."""
    return quadric.sampled_loss(model(batch[0])) / math.sqrt(len(batch[0]))


@dataclass(frozen=True)
class Size:
    """How much is measured; the figures of two sizes do not mix.

    Args:
        test: Test images.
        epoch: Images in an epoch of fine-tuning.
        gradients: In a round.
        windows: Widths of windows.
    """

    test: int = 4000
    epoch: int = 1000
    gradients: int = GRADIENTS
    windows: tuple[int, ...] = WINDOWS


class Batches:
    """Batches of training images in a random order, without end.

    Args:
        data: Images as they are kept, and labels.
        prepare: Images as they are kept → what the network takes.
        seed: Of the order.
        size: Images in a batch.
        moved: Whether images are moved and mirrored at random, as they were when the network was trained.
    """

    def __init__(self, data: Batch, prepare: Callable[[Tensor], Tensor], seed: int, size: int, moved: bool):
        self.data, self.prepare, self.size, self.moved, self.drawn = data, prepare, size, moved, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Batch]:
        """The next batches."""
        while True:
            if len(self.order) < self.size:
                self.order = torch.randperm(len(self.data[0]), generator=self.generator)
            chosen, self.order = self.order[: self.size], self.order[self.size :]
            self.drawn += self.size
            images = self.data[0][chosen]
            yield self.prepare(self._move(images) if self.moved else images), self.data[1][chosen]

    def _move(self, images: Tensor) -> Tensor:
        """By up to four pixels each way, black where nothing is, and mirrored half the time."""
        places = torch.randint(0, 2 * MARGIN + 1, (2, len(images)), generator=self.generator)
        mirrored = torch.rand(len(images), 1, 1, 1, generator=self.generator) < 0.5
        height, width = images.shape[2:]
        windows = F.pad(images, (MARGIN,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images)), :, places[0], places[1]]
        return torch.where(mirrored, images.flip(-1), images)


@dataclass
class Bench:
    """The dense network, its data, and how much is measured.

    Args:
        dense: In evaluation mode.
        train: Images and labels.
        test: The same.
        prepare: Images as they are kept → what the network takes.
        size: How much is measured.
        kept: Gradients of the dense network, of the seed and number that were asked for last.
        half: Networks at 65 %, by seed.
    """

    dense: nn.Module
    train: Batch
    test: Batch
    prepare: Callable[[Tensor], Tensor]
    size: Size
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    half: dict[int, tuple[nn.Module, dict[str, Tensor]]] = field(default_factory=dict)

    def batches(self, seed: int, size: int = BATCH, moved: bool = False) -> Batches:
        """Training images in the order of a seed."""
        return Batches(self.train, self.prepare, seed, size, moved)

    def network(self) -> nn.Module:
        """A copy of the dense network."""
        return copy.deepcopy(self.dense)

    def gradients(self, seed: int, count: int) -> Tensor:
        """Of the dense network, ``(count, weights)``."""
        if (seed, count) not in self.kept:
            self.kept.clear()
            weights = find_weights(self.dense, None, None)
            found = mean_gradients(self.dense, loss_fn, iter(self.batches(seed)), weights.params)
            rows = torch.empty(count, weights.dim)
            for row, gradient in zip(rows, found, strict=False):
                row.copy_(weights.flatten(gradient, row.device))
            self.kept[seed, count] = rows
        return self.kept[seed, count]

    def halfway(self, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """A network at 65 %, and its masks: the same for all rows of a seed."""
        if seed not in self.half:
            model = self.network()
            result = quadric.prune(
                model, 0.65, batches=self.batches(seed), loss_fn=loss_fn, rounds=6, parts=4,
                num_grads=self.size.gradients // 2, block_size=BLOCK, damping=DAMPING,
            )  # fmt: skip
            self.half[seed] = model, dict(result.masks)
        model, masks = self.half[seed]
        return copy.deepcopy(model), masks

    def evidence(self, rows: Tensor, block: int | None) -> Evidence:
        """What gradients say of the curvature, in blocks."""
        tiles = Tiles.runs(rows.shape[1], block)
        plan = plan_memory(rows.shape[1], len(rows), block, rows.dtype, rows.dtype, rows.device)
        evidence = GradientRows(tiles, plan, DAMPING, 0.0)
        for row in rows:
            evidence.add(row)
        return evidence

    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy in % and mean loss on the test images."""
        folded = convert_conv2d_weight_memory_format(fold(copy.deepcopy(model).eval()), torch.channels_last)
        images, labels = (part[: self.size.test] for part in self.test)
        right = loss = 0.0
        with torch.inference_mode():
            for x, y in zip(images.split(100), labels.split(100), strict=True):
                outputs = folded(self.prepare(x))
                right += float((outputs.argmax(1) == y).sum())
                loss += float(F.cross_entropy(outputs, y, reduction="sum"))
        return 100 * right / len(labels), loss / len(labels)

    def cell(self, model: nn.Module, seed: int, seconds: float, images: int, again: bool | None = None) -> Cell:
        """All that is kept of a network.

        Args:
            model: As pruned.
            seed: Of the images for batch norm.
            seconds: That it took.
            images: Whose gradients were taken for it.
            again: Whether to judge it with new batch-norm statistics as well; of seed 1, if nobody says.
        """
        accuracy, loss = self.judge(model)
        cell = {"accuracy": accuracy, "loss": loss, "seconds": seconds, "images": images}
        if again or (again is None and seed == 1):
            model = copy.deepcopy(model)
            some = itertools.islice(self.batches(1000 + seed, NORM_BATCH, moved=True), NORM_BATCHES)
            quadric.reestimate_batch_norm(model, some, loss_fn)
            cell["bn_accuracy"], cell["bn_loss"] = self.judge(model)
        return cell


def fold(model: nn.Module) -> nn.Module:
    """Batch norm as part of the convolution before it, in place: a third faster, and the same but for rounding."""
    for pair in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
        conv, norm = (getattr(model, name, None) for name in pair)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(model, pair[0], fuse_conv_bn_eval(conv, norm))
            setattr(model, pair[1], nn.Identity())
    for child in model.children():
        fold(child)
    return model


# The experiments: what a seed yields in each column of a row.

Row = Callable[[Bench, int], Iterator[Cell]]


def magnitude(bench: Bench, seed: int) -> Iterator[Cell]:
    """The smallest weights."""
    for sparsity in SPARSITIES:
        model, started = bench.network(), time.perf_counter()
        quadric.prune(model, sparsity, curvature="magnitude", update="none")
        yield bench.cell(model, seed, time.perf_counter() - started, 0, again=True)


def brain_damage(bench: Bench, seed: int) -> Iterator[Cell]:
    """Optimal brain damage; its diagonal is taken once for all sparsities."""
    model, started = bench.network(), time.perf_counter()
    weights = find_weights(model, None, None)
    total = torch.zeros(weights.dim, dtype=torch.float64)
    count = bench.size.gradients
    for batch in itertools.islice(bench.batches(seed), count):
        total += weights.flatten(quadric.hessian_diagonal(loss_fn(model, batch), weights.params), total.device)
    curvature = quadric.Diagonal((total / count).abs() + DAMPING)
    common = time.perf_counter() - started
    for sparsity in SPARSITIES:
        model, started = bench.network(), time.perf_counter()
        quadric.prune(model, sparsity, curvature=curvature)
        yield bench.cell(model, seed, common + time.perf_counter() - started, count * BATCH)


def one_round(bench: Bench, seed: int, **options: Any) -> Iterator[Cell]:
    """From the dense network; its gradients are taken once for all sparsities."""
    started = time.perf_counter()
    rows = bench.gradients(seed, bench.size.gradients)
    common = time.perf_counter() - started
    for sparsity in SPARSITIES:
        model, started = bench.network(), time.perf_counter()
        quadric.prune(model, sparsity, curvature=bench.evidence(rows, BLOCK), **options)
        yield bench.cell(model, seed, common + time.perf_counter() - started, len(rows) * BATCH)


def path(
    bench: Bench, seed: int, rounds: int, share: float = 1.0, moved: bool = False, **options: Any
) -> Iterator[Cell]:
    """Through the columns, new gradients each time.

    Args:
        bench: The network and its data.
        seed: Of the batches.
        rounds: In each column.
        share: Of the usual number of gradients.
        moved: Whether the images are moved and mirrored.
        options: Of ``quadric.prune``.
    """
    model, batches, masks, seconds = bench.network(), bench.batches(seed, moved=moved), None, 0.0
    options = {"num_grads": round(share * bench.size.gradients), "block_size": BLOCK, "damping": DAMPING} | options
    for sparsity in SPARSITIES:
        started = time.perf_counter()
        masks = quadric.prune(
            model, sparsity, batches=batches, loss_fn=loss_fn, rounds=rounds, masks=masks, **options
        ).masks
        seconds += time.perf_counter() - started
        yield bench.cell(model, seed, seconds, batches.drawn)


def window(bench: Bench, seed: int, count: int, update: Any, sparsity: float) -> Iterator[Cell]:
    """One round with some gradients, in blocks of each size."""
    rows = bench.gradients(seed, bench.size.windows[-1])[:count]
    for block in BLOCKS.values():
        model, started = bench.network(), time.perf_counter()
        quadric.prune(model, sparsity, curvature=bench.evidence(rows, block), update=update)
        yield bench.cell(model, seed, time.perf_counter() - started, len(rows) * BATCH, again=False)


def choice(
    bench: Bench, seed: int, share: float = 1.0, loss: Loss = loss_fn, moved: bool = False, **options: Any
) -> Iterator[Cell]:
    """From 65 % to 80 % in one round, with these options instead of the usual ones."""
    model, masks = bench.halfway(seed)
    batches, started = bench.batches(100 + seed, moved=moved), time.perf_counter()
    usual = {"num_grads": round(share * bench.size.gradients), "block_size": BLOCK, "damping": DAMPING}
    quadric.prune(model, 0.8, batches=batches, loss_fn=loss, masks=masks, **(usual | options))
    yield bench.cell(model, seed, time.perf_counter() - started, batches.drawn, again=False)


def pattern(bench: Bench, seed: int, **options: Any) -> Iterator[Cell]:
    """One-shot to 50 % in each pattern."""
    for name in PATTERNS:
        model, batches, started = bench.network(), bench.batches(seed), time.perf_counter()
        usual = {"num_grads": bench.size.gradients, "block_size": BLOCK, "damping": DAMPING}
        quadric.prune(model, 0.5, batches=batches, loss_fn=loss_fn, pattern=name, **(usual | options))
        yield bench.cell(model, seed, time.perf_counter() - started, batches.drawn, again=True)


def gradual(bench: Bench, seed: int, lr: float = 0.01, **options: Any) -> Iterator[Cell]:
    """Fine-tuning and pruning in turns, from level to level."""
    model, batches, seconds, masks, before = bench.network(), bench.batches(seed, STEP, moved=True), 0.0, {}, 0.0
    evidence = bench.batches(100 + seed, moved=True)
    steps = max(1, bench.size.epoch // STEP)
    for level in LEVELS:
        started = time.perf_counter()
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        pruner = quadric.GradualPruner(
            model, optimizer, level, initial=before, start=1, end=1 + (PRUNINGS - 1) * steps, every=steps,
            batches=Anew(evidence), loss_fn=loss_fn, masks=masks, **options,
        )  # fmt: skip
        model.train()
        total = EPOCHS * steps
        for step, batch in enumerate(itertools.islice(batches, total)):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            pruner.step()
        pruner.remove()
        masks, before = dict(pruner.masks), level
        seconds += time.perf_counter() - started
        yield bench.cell(model.eval(), seed, seconds, batches.drawn + evidence.drawn, again=False)


@dataclass(frozen=True)
class Anew:
    """Batches that can be walked through again: each walk goes on where the last one stopped."""

    batches: Batches

    def __iter__(self) -> Iterator[Batch]:
        """The next batches."""
        return iter(self.batches)


PATTERNS = ("2:4", "4:8", "block:1x4", "channel")
SMALL: dict[str, Any] = {"block_size": BLOCK, "damping": DAMPING}


@dataclass(frozen=True)
class Experiment:
    """Rows of one table.

    Args:
        title: Of the first column.
        columns: What a row yields a cell for.
        rows: By name.
        fixed: Rows that do not depend on the seed.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, Row]
    fixed: tuple[str, ...] = ()


def percent(sparsity: float) -> str:
    """For the head of a column."""
    return f"{100 * sparsity:g} %"


EXPERIMENTS: dict[str, Experiment] = {
    "one-shot": Experiment(
        "one-shot",
        tuple(map(percent, SPARSITIES)),
        {
            "magnitude": magnitude,
            "optimal brain damage, one round": brain_damage,
            "none (saliency only), one round": partial(one_round, update="none"),
            "single, one round": partial(one_round, update="single"),
            "joint, one round": partial(one_round, update="joint"),
            "joint, one round, 4 parts": partial(one_round, update="joint", parts=4),
            "joint, path of 6 rounds, 4 parts": partial(path, rounds=1, parts=4),
            "single, path of 18 rounds, 4 parts": partial(path, rounds=3, parts=4, update="single"),
            "joint, path of 18 rounds": partial(path, rounds=3),
            "joint, path of 18 rounds, 4 parts": partial(path, rounds=3, parts=4),
            "joint, path of 18 rounds, 4 parts, 256 gradients": partial(path, rounds=3, parts=4, share=4.0),
        },
        fixed=("magnitude",),
    ),
    "windows": Experiment(
        "one round to 80 %",
        tuple(BLOCKS),
        {
            f"{update}, {count} gradients": partial(window, count=count, update=update, sparsity=0.8)
            for update in ("single", "joint")
            for count in WINDOWS
        },
    ),
    "choices": Experiment(
        "one round from 65 % to 80 %",
        ("80 %",),
        {
            "joint, 64 gradients, blocks of 64": choice,
            "update none": partial(choice, update="none"),
            "update single": partial(choice, update="single"),
            "4 parts": partial(choice, parts=4),
            "16 parts": partial(choice, parts=16),
            "update single, 4 parts": partial(choice, update="single", parts=4),
            "32 gradients, 4 parts": partial(choice, parts=4, share=0.5),
            "128 gradients, 4 parts": partial(choice, parts=4, share=2),
            "blocks of 16, 4 parts": partial(choice, parts=4, block_size=16),
            "blocks of 256, 4 parts": partial(choice, parts=4, block_size=256),
            "λ = 1e-6, 4 parts": partial(choice, parts=4, damping=1e-6),
            "λ = 1e-4, 4 parts": partial(choice, parts=4, damping=1e-4),
            "shrinkage 0.05, 4 parts": partial(choice, parts=4, shrinkage=0.05),
            "shrinkage 0.2, 4 parts": partial(choice, parts=4, shrinkage=0.2),
            "images moved and mirrored, 4 parts": partial(choice, parts=4, moved=True),
            "labels sampled from the model, 4 parts": partial(choice, parts=4, loss=sampled_loss_fn),
            "2,048 per-example gradients, λ = 1e-3, 4 parts": partial(
                choice, parts=4, share=BATCH, per_example=True, damping=1e-3
            ),
        },
    ),
    "patterns": Experiment(
        "one-shot to 50 %",
        PATTERNS,
        {
            "magnitude": partial(pattern, curvature="magnitude", update="none"),
            "joint, one round": pattern,
            "joint, 4 rounds, 4 parts": partial(pattern, rounds=4, parts=4),
        },
        fixed=("magnitude",),
    ),
    "gradual": Experiment(
        "fine-tuned",
        tuple(map(percent, LEVELS)),
        {
            "magnitude": partial(gradual, curvature="magnitude", update="none"),
            "none (saliency only), 4 parts": partial(gradual, num_grads=32, parts=4, update="none", **SMALL),
            "joint, 4 parts": partial(gradual, num_grads=32, parts=4, **SMALL),
        },
    ),
}


# Figures: kept, shown, drawn.


def key(experiment: str, row: str, column: str, seed: int) -> str:
    """Of a cell in the file of figures."""
    return f"{experiment} | {row} | {column} | {seed}"


def measure(bench: Bench, name: str, row: str, seed: int, cells: dict[str, Cell], keep: Callable[[], None]) -> None:
    """The cells of a row that are not there yet; each is printed and kept at once."""
    experiment = EXPERIMENTS[name]
    if all(key(name, row, column, seed) in cells for column in experiment.columns):
        return
    for column, cell in zip(experiment.columns, experiment.rows[row](bench, seed), strict=True):
        cells[key(name, row, column, seed)] = cell
        again = f" ({cell['bn_accuracy']:.1f})" if "bn_accuracy" in cell else ""
        told = f"{cell['accuracy']:6.2f} %{again}, loss {cell['loss']:.3f}, {cell['images']:,.0f} images"
        print(f"{name:9} seed {seed} {row:48} {column:>9} {told}, {cell['seconds']:.0f} s", flush=True)
        keep()


def over_seeds(cells: dict[str, Cell], name: str, row: str, column: str, what: str) -> list[float]:
    """A figure of all seeds."""
    start = key(name, row, column, 0).removesuffix("0")
    return [cell[what] for place, cell in cells.items() if place.startswith(start) and what in cell]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    about = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{about}"


def table(cells: dict[str, Cell], name: str, what: str, digits: int = 1) -> list[str]:
    """Of one figure, a row each."""
    experiment = EXPERIMENTS[name]
    lines = [f"| {experiment.title} | " + " | ".join(experiment.columns) + " | images | seeds |"]
    lines.append("|---" * (len(experiment.columns) + 3) + "|")
    for row in experiment.rows:
        found = [over_seeds(cells, name, row, column, what) for column in experiment.columns]
        if any(found):
            images = [max(over_seeds(cells, name, row, column, "images"), default=0) for column in experiment.columns]
            seeds = max(map(len, found))
            shown = " | ".join(spread(values, digits) for values in found)
            lines.append(f"| {row} | {shown} | {max(images):,.0f} | {seeds} |")
    return lines


def choices_table(cells: dict[str, Cell]) -> list[str]:
    """All figures of the one column of ``choices``."""
    experiment = EXPERIMENTS["choices"]
    heads = {"accuracy": ("accuracy", 1), "loss": ("loss", 3), "seconds": ("seconds", 0), "images": ("images", 0)}
    lines = [f"| {experiment.title} | " + " | ".join(head for head, _ in heads.values()) + " | seeds |"]
    lines.append("|---" * (len(heads) + 2) + "|")
    for row in experiment.rows:
        found = {what: over_seeds(cells, "choices", row, experiment.columns[0], what) for what in heads}
        if found["accuracy"]:
            parts = [f"{statistics.fmean(found[what]):,.0f}" if digits == 0 else spread(found[what], digits)
                     for what, (_, digits) in heads.items()]  # fmt: skip
            lines.append(f"| {row} | " + " | ".join(parts) + f" | {len(found['accuracy'])} |")
    return lines


def tables(cells: dict[str, Cell]) -> dict[str, list[str]]:
    """All tables by name."""
    first = table(cells, "one-shot", "accuracy")
    first += [f"| {row} | " + " | ".join(map(str, values)) + " | | 1 |" for row, values in BEFORE.items()]
    return {
        "one-shot": first,
        "one-shot, batch norm": table(cells, "one-shot", "bn_accuracy"),
        "one-shot, loss": table(cells, "one-shot", "loss", 3),
        "windows": table(cells, "windows", "accuracy"),
        "windows, loss": table(cells, "windows", "loss", 3),
        "choices": choices_table(cells),
        "patterns": table(cells, "patterns", "accuracy"),
        "patterns, batch norm": table(cells, "patterns", "bn_accuracy"),
        "gradual": table(cells, "gradual", "accuracy"),
        "gradual, loss": table(cells, "gradual", "loss", 3),
    }


def put_tables(page: Path, made: dict[str, list[str]]) -> None:
    """Each table between ``<!-- table NAME -->`` and ``<!-- end -->`` of a page."""
    text = page.read_text()
    for name, lines in made.items():
        mark = f"<!-- table {name} -->\n"
        if mark in text:
            before, _, rest = text.partition(mark)
            text = before + mark + "\n" + "\n".join(lines) + "\n\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    page.write_text(text)


# name: colour and dashes
LINES = {
    "magnitude": ("rival-0", (4, 1.6)),
    "optimal brain damage, one round": ("rival-1", (1.4, 1.4)),
    "single, one round": ("ours-1", (6, 1.6, 1.4, 1.6)),
    "joint, one round": ("ours-2", (8, 2)),
    "joint, path of 6 rounds, 4 parts": ("ours-3", (3, 1)),
    "joint, path of 18 rounds, 4 parts": ("ours-0", ()),
}


def plot(cells: dict[str, Cell], dense: Cell) -> Figure:
    """Accuracy over sparsity, as pruned and with batch norm estimated again; bands span the seeds."""
    figure = Figure((9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, what, title in zip(
        panels, ("accuracy", "bn_accuracy"), ("as pruned", "batch norm estimated again"), strict=True
    ):
        draw(axes, cells, what, dense[what])
        axes.set_title(title, loc="left", color=INK, fontsize=10)
    panels[0].set_ylabel("test accuracy, %", color=MUTED)
    figure.supxlabel("share of the weights removed, %", color=MUTED, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, labelcolor=INK, handlelength=3.2)
    return figure


def draw(axes: Axes, cells: dict[str, Cell], what: str, dense: float) -> None:
    """One panel."""
    axes.axhline(dense, color=MUTED, lw=0.9, ls=(0, (2, 2)), zorder=1.8)
    axes.annotate("dense", (50, dense), xytext=(0, 3), textcoords="offset points", color=MUTED, fontsize=8)
    for row, (colour, dashes) in LINES.items():
        found = {
            100 * sparsity: values
            for sparsity in SPARSITIES
            if (values := over_seeds(cells, "one-shot", row, percent(sparsity), what))
        }
        if not found:
            continue
        x, ink = list(found), THEME[colour][0]
        axes.fill_between(
            x, [min(v) for v in found.values()], [max(v) for v in found.values()], color=ink, alpha=0.15, lw=0
        )
        means = [statistics.fmean(v) for v in found.values()]
        axes.plot(x, means, color=ink, ls=(0, dashes) if dashes else "-", lw=1.8, marker="o", ms=3.6, label=row)
    if what == "accuracy":
        row = "before: joint, 18 rounds, 147,456 images"
        axes.plot(
            [100 * s for s in SPARSITIES],
            BEFORE[row],
            "x",
            color=INK,
            ms=6,
            mew=1.4,
            label="before, one seed",
            zorder=3,
        )
    axes.xaxis.set_major_locator(FixedLocator([100 * sparsity for sparsity in SPARSITIES]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_ylim(0, 100)


def whole(data_dir: Path, weights: Path, size: Size) -> Bench:
    """The network of the paper, on CIFAR-10."""
    task = load_task("cifar10", data_dir)
    model = ResNet20(task.shape, task.outputs)
    put_weights(model, read_weights(weights, "--weights"), "give the checkpoint of M-FAC's paper")

    def prepare(images: Tensor) -> Tensor:
        return task.prepare(images).contiguous(memory_format=torch.channels_last)

    model = convert_conv2d_weight_memory_format(model.eval(), torch.channels_last)
    return Bench(model, task.train, task.test, prepare, size)


def tiny() -> Bench:
    """One residual block on noise."""
    model = nn.Sequential(ResidualBlock(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    data = torch.randn(160, 3, 6, 6), torch.randint(0, 4, (160,))
    size = Size(test=20, epoch=128, gradients=4, windows=(2, 3, 4))
    return Bench(model.eval(), data, data, lambda images: images, size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and is not in the file yet; print, draw or write down what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network on noise, to see it run")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="holds cifar10.npz")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the checkpoint, a safetensors file")
    parser.add_argument("--json", type=Path, metavar="OUT", required=True, help="the file of figures, which grows")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows of the tables")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="0 1 2; none measures nothing")
    parser.add_argument("--test", type=int, default=4000, metavar="N", help="test images")
    parser.add_argument("--epoch", type=int, default=1000, metavar="N", help="images in an epoch of fine-tuning")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw accuracy over sparsity to this PNG")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    results = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"cells": {}}
    cells = results["cells"]
    if chosen.seeds:
        if not chosen.quick and not (chosen.data_dir and chosen.weights):
            parser.error("--data-dir and --weights say where the data and the network are")
        torch.manual_seed(0)
        size = Size(chosen.test, chosen.epoch)
        bench = tiny() if chosen.quick else whole(chosen.data_dir, chosen.weights, size)
        told = {"test": bench.size.test, "epoch": bench.size.epoch, "torch": torch.__version__}
        if results.setdefault("settings", told) != told:
            parser.error(f"{chosen.json} holds figures of {results['settings']}, not {told}: give another --json")
        if "dense" not in results:
            results["dense"] = bench.cell(bench.dense, 0, 0, 0, again=True)
        again = f"{results['dense']['bn_accuracy']:.2f} % with statistics of batch norm as for the rows"
        print(f"dense: {results['dense']['accuracy']:.2f} %, {again}", flush=True)

        def keep() -> None:
            chosen.json.write_text(json.dumps(results, indent=1) + "\n")

        for seed, name in itertools.product(chosen.seeds, chosen.only or EXPERIMENTS):
            for row in rows_of(name, chosen.rows, seed == chosen.seeds[0]):
                measure(bench, name, row, seed, cells, keep)
    made = tables(cells)
    if chosen.tables:
        print("\n\n".join(f"{name}\n\n" + "\n".join(lines) for name, lines in made.items()))
    if chosen.page:
        put_tables(chosen.page, made)
    if chosen.plot:
        with settings():
            chosen.plot.write_bytes(png(plot(cells, results["dense"])))


def rows_of(name: str, wanted: Iterable[str] | None, first: bool) -> list[str]:
    """The rows of an experiment that are measured for a seed; one that does not depend on it, for the first alone."""
    experiment = EXPERIMENTS[name]
    rows = [row for row in experiment.rows if wanted is None or row in wanted]
    return [row for row in rows if first or row not in experiment.fixed]


if __name__ == "__main__":
    main()
