"""The report of a race: a page to read and a table for the terminal.

Every number is computed once, by `standings` and `columns`; the page, the table and the verdict only word it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from quadric.lab import plots


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and their sample standard deviation (None for a single one).

    Args:
        mean: The mean.
        std: The sample standard deviation.
        count: How many seeds had a value.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are numbers; None if there are none.

        >>> Spread.of([1.0, None, 3.0])
        Spread(mean=2.0, std=1.4142135623730951, count=2)
        """
        kept = [value for value in values if value is not None]
        return cls(fmean(kept), stdev(kept) if len(kept) > 1 else None, len(kept)) if kept else None


@dataclass(frozen=True)
class Outcome:
    """One run in numbers: where it ended, what it took, and in words whether it finished."""

    seed: int
    finished: bool
    words: str
    last: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float | None
    reached: float | None
    step_ms: float | None
    memory: float | None


@dataclass(frozen=True)
class Standing:
    """One optimizer over its seeds; quality and times come from the finished runs alone."""

    name: str
    ours: bool
    style: plots.Style
    hyperparameters: dict[str, Any]
    runs: list[Outcome]
    loss: Spread | None
    metric: Spread | None
    seconds: Spread | None
    reached: Spread | None
    step_ms: Spread | None
    memory: Spread | None

    @property
    def complete(self) -> bool:
        """Whether every seed finished."""
        return self.metric is not None and self.metric.count == len(self.runs)


@dataclass(frozen=True)
class Column:
    """One column of the summary: a title, its unit, a cell for each optimizer, and which of the cells are best."""

    title: str
    unit: str
    cells: list[str]
    best: frozenset[int] = frozenset()


def standings(results: dict[str, Any]) -> list[Standing]:
    """The optimizers of a race, best test metric first; one that lost a seed stands behind all that lost none."""
    entrants, sign = results["entrants"], -1 if results["metric"]["higher_is_better"] else 1
    ranked = []
    for entrant, style in zip(entrants, plots.styles([e["ours"] for e in entrants]), strict=True):
        runs = [_outcome(run, results) for run in entrant["runs"]]
        done = [run for run in runs if run.finished]
        ranked.append(
            Standing(
                name=_printable(entrant["name"]),
                ours=entrant["ours"],
                style=style,
                hyperparameters=entrant["hyperparameters"],
                runs=runs,
                loss=Spread.of(finite(run.last["test_loss"]) for run in done),
                metric=Spread.of(finite(run.last["test_metric"]) for run in done),
                seconds=Spread.of(run.seconds for run in done),
                reached=Spread.of(run.reached for run in done),
                step_ms=Spread.of(run.step_ms for run in runs),
                memory=Spread.of(run.memory for run in runs),
            )
        )
    return sorted(ranked, key=lambda s: (not s.complete, sign * s.metric.mean if s.metric else math.inf))


def columns(results: dict[str, Any], ranked: Sequence[Standing]) -> list[Column]:
    """The summary: one row for each optimizer in the given order.

    A best is marked where two or more can be compared, and among those that lost no seed if there are such.
    """
    metric, target = results["metric"], results["target"]
    places = _places([s.metric.mean for s in ranked if s.metric], metric["unit"])
    whole = [s.complete for s in ranked]
    higher = metric["higher_is_better"]

    def column(title: str, unit: str, values: list[Spread | None], cells: list[str], allowed: list[bool], up=False):
        judged = [i for i, v in enumerate(values) if v is not None and (allowed[i] or not any(allowed))]
        means = {i: v.mean for i in judged if (v := values[i]) is not None}
        best = (max if up else min)(means.values()) if len(means) > 1 else None
        # Cells that read the same are equally good to the reader.
        words = {cells[i] for i in means if means[i] == best}
        return Column(title, unit, cells, frozenset(i for i in means if cells[i] in words))

    metrics = [s.metric for s in ranked]
    cells = [
        "–" if s.metric is None else _measure(s.metric, places) + _share(s.metric.count, len(s.runs)) for s in ranked
    ]
    table = [
        Column("optimizer", "", [s.name for s in ranked]),
        Column("lr", "", [number(finite(s.hyperparameters.get("lr"))) for s in ranked]),
        column("test loss", "", [s.loss for s in ranked], [_mean(s.loss) for s in ranked], whole),
        column(_printable(metric["name"]), _printable(metric["unit"]), metrics, cells, whole, higher),
        column("training", "s", [s.seconds for s in ranked], [_mean(s.seconds) for s in ranked], whole),
    ]
    if target is not None:
        cells = ["–" if not s.reached else _mean(s.reached) + _share(s.reached.count, len(s.runs)) for s in ranked]
        always = [s.reached is not None and s.reached.count == len(s.runs) for s in ranked]
        table.append(column(f"to {_goal(results)}", "s", [s.reached for s in ranked], cells, always))
    costs = [s.step_ms for s in ranked]
    table.append(column("step", "ms", costs, [_mean(cost) for cost in costs], [True] * len(ranked)))
    adamw = next((s.step_ms for s in ranked if s.name == "AdamW" and not s.ours), None)
    if adamw and adamw.mean > 0:
        table.append(Column("step", "× AdamW", [f"{c.mean / adamw.mean:.2f}" if c else "–" for c in costs]))
    memory = [s.memory for s in ranked]
    table.append(column("memory", "MB", memory, [_mean(m) for m in memory], [True] * len(ranked)))
    return table


def verdict(results: dict[str, Any], ranked: Sequence[Standing]) -> tuple[str, str]:
    """A headline and one sentence: who won by how much, whether that exceeds the seeds' spread, who was quickest.

    The best of ours is held against the best rival. A difference counts if it exceeds the spread of a difference,
    √(σ₁² + σ₂²) with the two standard deviations over seeds.
    """
    judged = [s for s in ranked if s.metric]
    task, metric = _printable(results["task"]), results["metric"]
    if not judged:
        return f"No run finished on {task}", f"All {sum(len(s.runs) for s in ranked)} runs diverged or failed."
    places = _places([s.metric.mean for s in judged if s.metric], metric["unit"])
    first, second = judged[0], _opponent(judged[0], judged)
    assert first.metric is not None
    said = f"{_measure(first.metric, places)}{_unit(metric)} {_printable(metric['name'])}".strip()
    if not first.complete:
        said += f" in {first.metric.count} of {len(first.runs)} seeds, the rest lost"
    if second is None:
        alone = "ran alone" if len(ranked) == 1 else "alone finished"
        return f"{first.name} {alone} on {task}", f"{first.name} {alone} and ended at {said}{_pace(results, ranked)}."
    assert second.metric is not None
    role = "the runner-up" if first.ours == second.ours else "the best rival" if first.ours else "the best of quadric's"
    gap, noise = abs(first.metric.mean - second.metric.mean), _noise(first.metric, second.metric)
    apart = f"{gap:.{places}f}{' points' if metric['unit'] == '%' else _unit(metric)}"
    if noise is None:
        headline = f"{first.name} ahead on {task}"
        text = (
            f"{first.name} ended ahead with {said}, {apart} better than {second.name}, {role}; "
            "a single seed cannot say whether that is luck"
        )
    elif gap > noise:
        headline = f"{first.name} wins on {task}"
        text = (
            f"{first.name} won with {said}, {apart} better than {second.name}, {role}, "
            f"which is more than the seeds’ spread ({noise:.{places}f})"
        )
    else:
        headline = f"A tie on {task}"
        text = (
            f"{first.name} ended at {said} and {second.name}, {role}, at {_measure(second.metric, places)}"
            f"{_unit(metric)}: a tie, for the {apart} between them lie within the seeds’ spread ({noise:.{places}f})"
        )
    return headline, f"{text}{_pace(results, ranked)}."


def results_table(results: dict[str, Any]) -> Table:
    """The summary for the terminal: ours with a ◆, the best of each column bold, the verdict and lost runs below."""
    ranked = standings(results)
    headline, sentence = verdict(results, ranked)
    lines = [sentence, *_lost(ranked), "◆ quadric’s own; bold: best of its column; ±: standard deviation over seeds"]
    table = Table(title=Text(headline), caption=Text("\n".join(lines)), caption_justify="left", box=box.SIMPLE_HEAD)
    summary = columns(results, ranked)
    for i, column in enumerate(summary):
        head = f"{column.title}\n{column.unit}"
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row, standing in enumerate(ranked):
        name = Text(("◆ " if standing.ours else "  ") + standing.name, style="cyan" if standing.ours else "")
        rest = [Text(c.cells[row], style="bold green" if row in c.best else "") for c in summary[1:]]
        table.add_row(name, *rest)
    return table


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write `report.html`, complete in itself, and each of its pictures as PNG and SVG; return the page's path.

    Args:
        results: What a race measured, as in its results.json.
        folder: Where to write; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranked = standings(results)
    pictures: dict[str, str] = {}
    with plots.settings():
        for name, figure in _pictures(results, ranked).items():
            document = plots.svg(figure)
            (folder / f"{name}.svg").write_text(document, encoding="utf-8")
            (folder / f"{name}.png").write_bytes(plots.png(figure))
            pictures[name] = plots.inline(document, name)
    path = folder / "report.html"
    path.write_text(_page(results, ranked, pictures), encoding="utf-8")
    return path


def finite(value: Any) -> float | None:
    """The value as a float; None where a run had no finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading: so many significant digits, no exponent where the eye needs none.

    >>> number(0.07123), number(12.3456), number(1234.5), number(0.01), number(None)
    ('0.0712', '12.3', '1234', '0.01', '–')
    """
    if value is None:
        return "–"
    if value == 0 or f"{value:g}" == f"{value:.{digits - 1}g}":
        return f"{value:g}"  # a chosen number such as 0.01 stays as it was chosen
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - exponent)}f}" if -5 < exponent < 6 else f"{value:.{digits - 1}e}"


def _outcome(run: dict[str, Any], results: dict[str, Any]) -> Outcome:
    history, target, up = run["history"], results["target"], results["metric"]["higher_is_better"]
    last = history[-1] if history else {"step": 0, "train_loss": None, "test_loss": None, "test_metric": None}
    finished = not run["diverged"] and run["error"] is None and finite(last["test_metric"]) is not None
    if run["error"] is not None:
        words = f"failed after step {last['step']}: {_printable(run['error'])}"
    elif finished:
        words = "finished"
    else:
        words = f"diverged after step {last['step']}" if run["diverged"] else "ended without a finite test metric"
    reached = None
    if finished and target is not None:
        hits = (e for e in history if (m := finite(e["test_metric"])) is not None and (m >= target if up else m <= target))
        reached = finite(next(hits, {"seconds": None})["seconds"])
    return Outcome(
        run["seed"], finished, words, last, history, finite(run["seconds"]), reached, finite(run["step_ms"]),
        finite(run["state_mb"]),
    )  # fmt: skip


def _opponent(first: Standing, judged: Sequence[Standing]) -> Standing | None:
    others = [s for s in judged if s is not first]
    return next((s for s in others if s.ours != first.ours), others[0] if others else None)


def _noise(a: Spread, b: Spread) -> float | None:
    return None if a.std is None or b.std is None else math.hypot(a.std, b.std)


def _pace(results: dict[str, Any], ranked: Sequence[Standing]) -> str:
    # The clause on time to target; only those that always reached it compete, if there are such.
    if results["target"] is None:
        return ""
    most = max((s.reached.count / len(s.runs) for s in ranked if s.reached), default=0)
    timed = [(s.reached.mean, i, s) for i, s in enumerate(ranked) if s.reached and s.reached.count / len(s.runs) == most]
    if not timed:
        return f"; {'it did not reach' if len(ranked) == 1 else 'none reached'} {_goal(results)}"
    quick = [s for _, _, s in sorted(timed)]
    first, second = quick[0], _opponent(quick[0], quick)
    assert first.reached is not None
    among = "" if most == 1 else f", though not in every seed ({first.reached.count} of {len(first.runs)})"
    if second is None:
        alone = "it" if len(ranked) == 1 else f"{first.name} alone"
        return f"; {alone} reached {_goal(results)} {'in' if most < 1 else 'in every seed, in'} {_mean(first.reached)} s{among}"
    assert second.reached is not None
    noise = _noise(first.reached, second.reached)
    if noise is not None and second.reached.mean - first.reached.mean <= noise:
        times = f"{_mean(first.reached)} and {_mean(second.reached)} s"
        return f"; {first.name} and {second.name} were equally quick to {_goal(results)} within the spread ({times}){among}"
    if first.ours == second.ours:
        role = "the next"
    else:
        role = "the quickest rival" if first.ours else "the quickest of quadric’s"
    times = f"{_mean(first.reached)} s, against {_mean(second.reached)} s for {second.name}, {role}"
    return f"; {first.name} was quickest to {_goal(results)} ({times}){among}"


def _lost(ranked: Sequence[Standing]) -> list[str]:
    return [f"{s.name}, seed {run.seed}: {run.words}" for s in ranked for run in s.runs if not run.finished]


def _printable(text: Any) -> str:
    # Line breaks, control characters and lone surrogates would break a table row, an SVG or the file's encoding.
    return "".join(c if c.isprintable() else "�" for c in " ".join(str(text).split()))


def _places(values: Sequence[float], unit: str) -> int:
    # Decimals shared by a column: hundredths of a per cent, else four significant digits of the largest value.
    largest = max((abs(v) for v in values), default=0.0)
    return 2 if unit == "%" or largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))


def _measure(spread: Spread, places: int) -> str:
    return f"{spread.mean:.{places}f}" + ("" if spread.std is None else f" ± {spread.std:.{places}f}")


def _mean(spread: Spread | None) -> str:
    return number(spread.mean if spread else None)


def _share(count: int, total: int) -> str:
    return "" if count == total else f" ({count} of {total})"


def _unit(metric: dict[str, Any]) -> str:
    return f" {_printable(metric['unit'])}" if metric["unit"] else ""


def _goal(results: dict[str, Any]) -> str:
    return f"{results['target']:g}{_unit(results['metric'])}"


def _curve(standing: Standing, x: str, y: str) -> plots.Series:
    # Mean and band run over the steps all finished runs have in common, so that they average the same seeds throughout.
    points = [
        {e["step"]: (a, b) for e in run.history if None not in ((a := finite(e[x])), (b := finite(e[y])))}
        for run in standing.runs
    ]
    done = [p for p, run in zip(points, standing.runs, strict=True) if run.finished]
    rest = [p for p, run in zip(points, standing.runs, strict=True) if not run.finished and p]
    steps = sorted(set.intersection(*map(set, done))) if done else []
    values = [[p[step][1] for p in done] for step in steps]
    return plots.Series(
        standing.name,
        standing.style,
        x=[fmean(p[step][0] for p in done) for step in steps],
        y=[fmean(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
        broken=[tuple(map(list, zip(*p.values(), strict=True))) for p in rest],
    )


def _pictures(results: dict[str, Any], ranked: Sequence[Standing]) -> dict[str, Figure]:
    metric, target = results["metric"], finite(results["target"])
    quality = f"Test {_printable(metric['name'])}" + (f" ({_printable(metric['unit'])})" if metric["unit"] else "")
    over = {"steps": ("step", "steps"), "seconds": ("seconds", "training seconds")}
    losses = {key: [_curve(s, x, "train_loss") for s in ranked] for key, (x, _) in over.items()}
    tests = {key: [_curve(s, x, "test_metric") for s in ranked] for key, (x, _) in over.items()}
    figures = {}
    for key, (_, x) in over.items():
        if any(s.x or s.broken for s in tests[key]):
            figures[f"metric_{key}"] = plots.curves(tests[key], x=x, y=quality, target=target)
        if any(s.x or s.broken for s in losses[key]):
            figures[f"loss_{key}"] = plots.curves(losses[key], x=x, y="Training loss", log_y=True)
    if {"metric_steps", "metric_seconds"} <= figures.keys():
        figures["race"] = plots.race(tests["steps"], tests["seconds"], y=quality, target=target)
    if any(s.metric for s in ranked):
        seeds = [
            plots.Series(
                s.name + ("" if s.complete else f" ({s.metric.count if s.metric else 0} of {len(s.runs)})"),
                s.style,
                x=[run.last["test_metric"] for run in s.runs if run.finished],
                y=[s.metric.mean] if s.metric else [],
            )
            for s in ranked
        ]
        figures["seeds"] = plots.ends(seeds, x=quality.lower() if metric["name"].islower() else quality)
    if results["tuning"]:
        figures["tuning"] = plots.tuning([_trials(s, results["tuning"]) for s in ranked])
    return figures


def _trials(standing: Standing, tuning: dict[str, Any]) -> plots.Trials:
    tried = tuning["trials"].get(standing.name, [])
    good = [(t["lr"], t["loss"]) for t in tried if not t["diverged"] and finite(t["loss"]) is not None]
    lost = [t["lr"] for t in tried if t["diverged"] or finite(t["loss"]) is None]
    rates, losses = [a for a, _ in good], [b for _, b in good]
    return plots.Trials(
        standing.name, standing.style, rates, losses, lost, finite(standing.hyperparameters.get("lr"))
    )
