"""What ISAAC adds to a forward and a backward pass, as ratios to the same pass without it.

Run with ``make bench-isaac`` or ``python benchmarks/isaac_overhead.py [--quick] [--only NAME …] [--ours]``.

**Time.** A row is one way to condition, on its own copy of the network or layer and of its inputs. Every round all rows
take a turn, in an order drawn anew, in one process; the ratio of a row in a round is its time over the mean of two
plain copies in the same round. The table has the median of the ratios and their quartiles. *plain, another copy* is one
of these over the other: what it differs from 1 by is the noise of the measurement, and no smaller overhead is known. A
layer is square, with a bias; timed are its outputs and the gradients of weight, bias and input. A network is timed with
its mean cross-entropy. Gradients are dropped before each pass, as ``zero_grad`` does, so that every row finds and
leaves memory in the same state.

**Memory.** The ratio of peaks of what torch's CPU allocator holds, as in ``hessian_diagonal.py``: weights, gradients
and whatever comes and goes in two passes. The batch of a network is not counted, the input of a layer is.

**Rows looked at.** With ``--max-rows [N …]`` the rows of the table are values of ``max_rows``, which bounds how many
inputs of a layer are looked at.

The published code takes part where it is installed (``make peers``). It conditions ``nn.Linear`` with inputs of two
dimensions, and is left out of ResNet-20, where that would be the last layer alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hessian_diagonal import Case, Subject, Turn, cifar, clusters, peak, timed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import nn

import quadric
from quadric.lab.models import GPT, ResNet20
from quadric.lab.plots import GRID, INK, MUTED, THEME, png, settings

WIDTHS = (256, 512, 1024, 2048, 4096)
BATCHES = (16, 64, 256, 1024)
GOALS = {
    "4096x64": 1.04,
    "1024x64": 1.08,
    "256x16": 1.5,
    "2048x1024": 1.25,
    "resnet20": 1.15,
    "gpt": 1.15,
    "mlp-wide": 1.01,  # what the paper reports of its widest network
}
BOUNDED = ("2048x1024", "resnet20", "gpt")  # where rows are many, and max_rows has a say
FEWEST = 7  # rounds, also of a slow network

PLAIN, AGAIN = "plain", "plain, another copy"
RELATIVE, ABSOLUTE = "isaac, relative(1.0)", "isaac, damping 1.0"
PUBLISHED = "isaac.Linear, published"

Row = Callable[[nn.Module], nn.Module]  # conditions a model, in place where it can


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Args:
        rounds: turns of each row.
        turn: seconds that the plain pass should run in a turn.
        patience: seconds after which a slow network has had its rounds, unless they are too few.
    """

    rounds: int
    turn: float
    patience: float


@dataclass(frozen=True)
class Job:
    """Something to condition.

    Args:
        case: it with a batch; of a layer, the targets are the gradient of its outputs.
        run: what a subject does in its turns.
        published: whether the published code conditions the same layers.
    """

    case: Case
    run: Callable[[Subject], Turn]
    published: bool = True


def layer_pass(subject: Subject) -> Turn:
    """Outputs of a layer, and the gradients of its parameters and of its input."""
    inputs = subject.inputs.clone().requires_grad_()
    upstream = subject.targets.clone()

    def both() -> None:
        subject.model(inputs).backward(upstream)

    def forget() -> None:
        inputs.grad = None

    return Turn(both, forget)


def network_pass(subject: Subject) -> Turn:
    """The loss and the gradients of all parameters."""
    return Turn(lambda: subject.loss().backward())


# What is compared.


def plain(model: nn.Module) -> nn.Module:
    """As it is."""
    return model


def conditioned(**options: Any) -> Row:
    """By ``quadric.isaac``."""

    def condition(model: nn.Module) -> nn.Module:
        quadric.isaac(model, **options)
        return model

    return condition


def exchanged(package: ModuleType) -> Row:
    """Each ``nn.Linear`` by the published class, with the same parameters and the paper's λ = 1."""

    def exchange(model: nn.Module) -> nn.Module:
        if type(model) is nn.Linear:
            bias = model.bias is not None
            new = package.Linear(model.in_features, model.out_features, la=1.0, bias=bias, device="meta")
            new.weight, new.bias = model.weight, model.bias
            return new
        for name, child in model.named_children():
            setattr(model, name, exchange(child))
        return model

    return exchange


BASES: dict[str, Row] = {PLAIN: plain, AGAIN: plain}


def our_rows() -> dict[str, Row]:
    """The relative damping of ``quadric.ISAAC`` and the paper's absolute one."""
    return {RELATIVE: conditioned(damping=quadric.relative(1.0)), ABSOLUTE: conditioned(damping=1.0)}


def bounded_rows(numbers: Sequence[int]) -> dict[str, Row]:
    """The default of ``max_rows``, these, and no bound."""
    damping = quadric.relative(1.0)
    rows = {"isaac, max_rows by default": conditioned(damping=damping)}
    rows |= {f"isaac, max_rows={number}": conditioned(damping=damping, max_rows=number) for number in numbers}
    return rows | {"isaac, max_rows=None": conditioned(damping=damping, max_rows=None)}


def published_rows() -> dict[str, Row]:
    """The row of the published code, if it is here."""
    try:
        return {PUBLISHED: exchanged(importlib.import_module("isaac"))}
    except ImportError:
        print("The published isaac is not installed and its row is left out: make peers")
        return {}


# What is conditioned.


def layer(width: int, batch: int) -> Job:
    """A square linear layer."""
    inputs, upstream = torch.randn(batch, width), torch.randn(batch, width) / batch
    return Job(Case(f"Linear {width} × {width}, batch {batch}", nn.Linear(width, width), inputs, upstream), layer_pass)


def mlp(width: int, batch: int) -> Job:
    """Two hidden ReLU layers on 784 inputs."""
    layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    case = Case(f"MLP 784-{width}-{width}-10, batch {batch}", nn.Sequential(*layers), *clusters(batch, (784,)))
    return Job(case, network_pass)


def resnet20(batch: int) -> Job:
    """On images of 3 × 32 × 32."""
    return Job(cifar("ResNet-20", ResNet20, batch), network_pass, published=False)


def gpt(width: int, batch: int, tokens: int) -> Job:
    """Four blocks, four heads, an alphabet of 65 letters."""
    text = torch.randint(0, 65, (batch, tokens + 1))
    title = f"GPT 4 × {width}, 4 heads, batch {batch} × {tokens} tokens"
    model = GPT((tokens,), 65, width=width, depth=4, heads=4)
    return Job(Case(title, model, text[:, :-1].contiguous(), text[:, 1:].contiguous()), network_pass)


JOBS: dict[str, Callable[[], Job]] = {
    **{f"{width}x{batch}": lambda w=width, b=batch: layer(w, b) for width in WIDTHS for batch in BATCHES},
    "mlp": lambda: mlp(256, 128),
    "mlp-wide": lambda: mlp(8192, 64),
    "resnet20": lambda: resnet20(128),
    "gpt": lambda: gpt(256, 64, 128),
}
QUICK: dict[str, Callable[[], Job]] = {
    **{f"{width}x{batch}": lambda w=width, b=batch: layer(w // 16, b // 8) for width in WIDTHS for batch in BATCHES},
    "mlp": lambda: mlp(16, 8),
    "mlp-wide": lambda: mlp(64, 8),
    "resnet20": lambda: resnet20(2),
    "gpt": lambda: gpt(16, 2, 8),
}


# Measuring.


def starting(job: Job, row: Row) -> Callable[[Subject], Turn]:
    """Conditions the model of a subject and says what it does in its turns."""

    def start(subject: Subject) -> Turn:
        subject.model = row(subject.model)
        return job.run(subject)

    return start


def failure_of(job: Job, row: Row) -> str:
    """What a row says where it cannot take a model."""
    subject = Subject(job.case)
    turn = starting(job, row)(subject)
    try:
        timed(subject, turn, 1)
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # the published code asserts two dimensions
        return f"{type(error).__name__}: {error}"
    return ""


def seconds_of(job: Job, rows: dict[str, Row], effort: Effort) -> dict[str, list[float]]:
    """For each row the seconds of a pass, once a round."""
    running = {name: (subject := Subject(job.case), starting(job, row)(subject)) for name, row in rows.items()}
    for mine in running.values():
        timed(*mine, 2)
    pace = {name: timed(*mine, 1) for name, mine in running.items()}
    times = max(1, round(effort.turn / pace[PLAIN]))
    affordable = max(FEWEST, effort.patience / (times * sum(pace.values())))
    rounds = int(min(effort.rounds, affordable))
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(rows), len(rows)):
            seconds[name].append(timed(*running[name], times) / times)
    return seconds


def measure(job: Job, rows: dict[str, Row], effort: Effort, goal: float | None) -> dict[str, Any]:
    """Time all rows in turn, find their peaks, and print the table."""
    failed = {name: failure for name, row in rows.items() if (failure := failure_of(job, row))}
    able = BASES | {name: row for name, row in rows.items() if name not in failed}
    seconds = seconds_of(job, able, effort)
    heaviest = peak(job.case, starting(job, plain), 2)
    base = [statistics.fmean(pair) for pair in zip(seconds[PLAIN], seconds[AGAIN], strict=True)]
    milliseconds = 1e3 * statistics.median(base)
    print(f"\n{job.case.title}" + (f"; goal {goal}" if goal else ""))
    print(f"  plain: {milliseconds:.3g} ms, {heaviest / 2**20:.1f} MiB, {len(seconds[PLAIN])} rounds")
    print(f"  {'':30}{'time':>7}   {'quartiles':17}{'memory':>7}")
    results: dict[str, Any] = {}
    for name in (AGAIN, *rows):
        if name in failed:
            results[name] = {"fails": failed[name]}
            print(f"  {name:30}  fails: {failed[name].splitlines()[0]}")
            continue
        beside = seconds[PLAIN] if name == AGAIN else base
        ratios = [own / other for own, other in zip(seconds[name], beside, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        memory = peak(job.case, starting(job, able[name]), 2) / heaviest
        results[name] = {"time": middle, "quartiles": [low, high], "memory": memory}
        print(f"  {name:30}{middle:7.3f}   {f'{low:.3f} – {high:.3f}':17}{memory:7.2f}", flush=True)
    model = job.case.model
    size = [model.in_features, len(job.case.inputs)] if isinstance(model, nn.Linear) else None
    return {"title": job.case.title, "size": size, "goal": goal, "milliseconds": milliseconds, "rows": results}


# What is said and shown at the end.


def grid(results: dict[str, Any], row: str) -> dict[tuple[int, int], float]:
    """A row's ratio at each width and batch of a layer that was measured."""
    return {tuple(job["size"]): job["rows"][row]["time"] for job in results.values() if job["size"] and found(job, row)}


def found(job: dict[str, Any], row: str) -> bool:
    """Whether a row was measured there and did not fail."""
    return "time" in job["rows"].get(row, {})


def print_grid(results: dict[str, Any], row: str) -> None:
    """Layers of all widths and batches at a glance."""
    ratios = grid(results, row)
    if not ratios:
        return
    batches = sorted({batch for _, batch in ratios})
    print(f"\n{row}: time over the plain layer's")
    print(f"  {'width':>7}" + "".join(f"{f'b {batch}':>9}" for batch in batches))
    for width in sorted({width for width, _ in ratios}):
        cells = (ratios.get((width, batch)) for batch in batches)
        print(f"  {width:7}" + "".join(f"{cell:9.3f}" if cell else f"{'–':>9}" for cell in cells))


def print_goals(results: dict[str, Any], row: str) -> None:
    """What was wanted beside what was found."""
    wanted = [job for job in results.values() if job["goal"] and found(job, row)]
    if not wanted:
        return
    print(f"\n{row}: goals\n  {'':44}{'goal':>6}{'found':>8}")
    for job in wanted:
        ratio = job["rows"][row]["time"]
        print(f"  {job['title']:44}{job['goal']:6}{ratio:8.3f}  {'met' if ratio <= job['goal'] else 'missed'}")


def print_bounds(results: dict[str, Any], rows: Sequence[str]) -> None:
    """What each bound of the rows looked at costs."""
    heads = [row.removeprefix("isaac, max_rows").lstrip("= ") for row in rows]
    print("\nTime over the plain pass by max_rows\n  " + f"{'':44}" + "".join(f"{head:>12}" for head in heads))
    for job in results.values():
        cells = (f"{job['rows'][row]['time']:12.3f}" if found(job, row) else f"{'fails':>12}" for row in rows)
        print(f"  {job['title']:44}" + "".join(cells))


def plot(results: dict[str, Any]) -> Figure:
    """The ratio over the width, a panel for each batch, ours beside the published code.

    Raises:
        ValueError: When no layer was measured.
    """
    ours, theirs = grid(results, RELATIVE), grid(results, PUBLISHED)
    if not ours:
        raise ValueError(
            f"--plot shows layers, and none of {', '.join(results)} is one: add some to --only, as 1024x64"
        )
    lines = [(RELATIVE, ours, THEME["ours-0"][0], "-"), ("published isaac.Linear", theirs, THEME["ours-1"][0], "--")]
    batches = sorted({batch for _, batch in ours})
    figure = Figure((9.0, 3.3), layout="constrained")
    panels = figure.subplots(1, len(batches), sharex=True, sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        sized = [(job["size"], job["goal"]) for job in results.values() if job["size"] and job["goal"]]
        goals = {width: goal for (width, other), goal in sized if other == batch}
        draw(axes, batch, lines, goals)
    highest = max([*ours.values(), *theirs.values()])
    panels[0].set_ylim(0.92, 1.08 * highest)
    panels[0].set_ylabel("time over the plain layer's", color=MUTED)
    figure.supxlabel("width of the layer", color=MUTED, fontsize=9)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        handlelength=3.2,
    )
    return figure


def draw(
    axes: Axes, batch: int, lines: Sequence[tuple[str, dict[Any, float], str, str]], goals: dict[int, float]
) -> None:
    """One panel."""
    widths = sorted({width for _, ratios, _, _ in lines for width, _ in ratios})
    axes.set(xscale="log", yscale="log")
    axes.axhline(1, color=MUTED, lw=0.9, zorder=1.8)  # above the grid
    for label, ratios, colour, dashes in lines:
        shown = [(width, ratios[width, batch]) for width in widths if (width, batch) in ratios]
        if shown:
            axes.plot(*zip(*shown, strict=True), dashes, color=colour, lw=1.8, marker="o", ms=4, label=label)
    if goals:
        axes.plot(list(goals), list(goals.values()), "_", color=INK, ms=13, mew=2, label="goal", zorder=3)
    axes.set_title(f"batch {batch}", loc="left", color=INK, fontsize=10)
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.12)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers and few rounds, to see it run")
    parser.add_argument("--only", nargs="+", choices=JOBS, metavar="NAME", help=f"these, of {', '.join(JOBS)}")
    parser.add_argument("--ours", action="store_true", help="leave out the row of the published code")
    parser.add_argument(
        "--max-rows",
        nargs="*",
        type=int,
        metavar="N",
        help=f"compare these bounds instead (by default 64 to 1024), on {', '.join(BOUNDED)}",
    )
    parser.add_argument("--rounds", type=int, help="turns of each row")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file as well")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the ratios of the layers to this PNG")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # it must be set up in the main thread
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    effort = Effort(FEWEST, 0.0, 40.0) if chosen.quick else Effort(40, 0.03, 40.0)
    if chosen.rounds:
        effort = dataclasses.replace(effort, rounds=chosen.rounds, patience=math.inf)
    bounds = chosen.max_rows is not None
    rows = bounded_rows(chosen.max_rows or (64, 128, 256, 512, 1024)) if bounds else our_rows()
    peers = {} if chosen.ours or bounds else published_rows()
    results: dict[str, Any] = {}
    for name in chosen.only or (BOUNDED if bounds else JOBS):
        torch.manual_seed(0)
        job = (QUICK if chosen.quick else JOBS)[name]()
        goal = None if chosen.quick else GOALS.get(name)
        results[name] = measure(job, rows | (peers if job.published else {}), effort, goal)
    if bounds:
        print_bounds(results, list(rows))
    else:
        for row in rows | peers:
            print_grid(results, row)
        for row in rows:
            print_goals(results, row)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")
    if chosen.plot:
        with settings():
            chosen.plot.write_bytes(png(plot(results)))


if __name__ == "__main__":
    main()
