"""What a race's results say: one standing for each optimizer, the columns of the summary, the verdict.

Every number of a report is computed once, here; nothing here knows where it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

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
    steps: int
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
                name=printable(entrant["name"]),
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
    means = [s.metric.mean for s in ranked if s.metric]
    places = decimals(means or [0.0], metric["unit"])
    whole = [s.complete for s in ranked]
    higher = metric["higher_is_better"]

    def column(
        title: str, unit: str, values: list[Spread | None], cells: list[str], allowed: list[bool], up: bool = False
    ):
        judged = [i for i, v in enumerate(values) if v is not None and (allowed[i] or not any(allowed))]
        means = {i: v.mean for i in judged if (v := values[i]) is not None}
        best = (max if up else min)(means.values()) if len(means) > 1 else None
        # Cells that read the same are equally good to the reader.
        words = {cells[i] for i in means if means[i] == best}
        return Column(title, unit, cells, frozenset(i for i in means if cells[i] in words))

    metrics = [s.metric for s in ranked]
    cells = [
        "–" if s.metric is None else measured(s.metric, places) + share(s.metric.count, len(s.runs)) for s in ranked
    ]
    table = [
        Column("optimizer", "", [s.name for s in ranked]),
        Column("lr", "", [number(finite(s.hyperparameters.get("lr"))) for s in ranked]),
        column("test loss", "", [s.loss for s in ranked], [_mean(s.loss) for s in ranked], whole),
        column(printable(metric["name"]), printable(metric["unit"]), metrics, cells, whole, higher),
        column("time", "s", [s.seconds for s in ranked], [_mean(s.seconds) for s in ranked], whole),
    ]
    if target is not None:
        cells = ["–" if not s.reached else _mean(s.reached) + share(s.reached.count, len(s.runs)) for s in ranked]
        always = [s.reached is not None and s.reached.count == len(s.runs) for s in ranked]
        table.append(column(f"to {goal(results)}", "s", [s.reached for s in ranked], cells, always))
    costs = [s.step_ms for s in ranked]
    table.append(column("step", "ms", costs, [_mean(cost) for cost in costs], [True] * len(ranked)))
    adamw = next((s.step_ms for s in ranked if s.name == "AdamW" and not s.ours), None)
    if adamw and adamw.mean > 0:
        table.append(Column("step ×", "AdamW", [f"{c.mean / adamw.mean:.2f}" if c else "–" for c in costs]))
    memory = [s.memory for s in ranked]
    table.append(column("memory", "MB", memory, [_mean(m) for m in memory], [True] * len(ranked)))
    return table


def verdict(results: dict[str, Any], ranked: Sequence[Standing]) -> tuple[str, str]:
    """A headline and one sentence: who won by how much, whether that exceeds the seeds' spread, who was quickest.

    The best of ours is held against the best rival. A difference counts if it exceeds the spread of a difference,
    √(σ₁² + σ₂²) with the two standard deviations over seeds.
    """
    judged = [s for s in ranked if s.metric]
    task, metric = printable(results["task"]), results["metric"]
    if not judged:
        return f"No run finished on {task}", f"All {sum(len(s.runs) for s in ranked)} runs diverged or failed."
    places = decimals([s.metric.mean for s in judged if s.metric], metric["unit"])
    first, second = judged[0], _opponent(judged[0], judged)
    assert first.metric is not None
    said = f"{measured(first.metric, places)}{unit_of(metric)} {printable(metric['name'])}".strip()
    if not first.complete:
        said += f" in {first.metric.count} of {len(first.runs)} seeds, the rest lost"
    if second is None:
        alone = "ran alone" if len(ranked) == 1 else "alone finished"
        return f"{first.name} {alone} on {task}", f"{first.name} {alone} and ended at {said}{_pace(results, ranked)}."
    assert second.metric is not None
    role = "the runner-up" if first.ours == second.ours else "the best rival" if first.ours else "the best of quadric’s"
    theirs = f"{measured(second.metric, places)}{unit_of(metric)}"
    if first.complete and not second.complete:
        role += f", which lost {len(second.runs) - second.metric.count} of {len(second.runs)} seeds"
        if (second.metric.mean > first.metric.mean) == metric["higher_is_better"]:
            text = f"{first.name} finished every seed and ended at {said}; "
            text += f"{second.name}, {role}, ended at {theirs} in the others"
            return f"No clear winner on {task}", f"{text}{_pace(results, ranked)}."
    gap, noise = abs(first.metric.mean - second.metric.mean), noise_of_difference(first.metric, second.metric)
    gap = gap if gap > 1e-6 * abs(first.metric.mean) else 0.0  # means of equal numbers differ by their rounding
    apart = f"{_difference(gap, places)}{' points' if metric['unit'] == '%' else unit_of(metric)}"
    if noise is None:
        headline = f"{first.name} ahead on {task}"
        text = (
            f"{first.name} ended ahead with {said}, {apart} better than {second.name}, {role}; "
            "a single seed cannot say whether that is luck"
        )
    elif gap > noise:
        # Who beat the other side may still be level with a companion of its own.
        level = [s.name for s in judged[1:] if s.complete and s.ours == first.ours and _level(first.metric, s.metric)]
        headline = f"{listed([first.name, *level])} {'lead' if level else 'wins'} on {task}"
        text = f"{first.name} {'ended first' if level else 'won'} with {said}, "
        text += f"level with {listed(level)} within the seeds’ spread, but " if level else ""
        text += (
            f"{apart} better than {second.name}, {role}, "
            f"which is more than the {'' if level else 'seeds’ '}spread ({_difference(noise, places)})"
        )
    else:
        headline = f"A tie on {task}"
        text = (
            f"{first.name} ended at {said} and {second.name}, {role}, at {theirs}: a tie, for "
            f"the {apart} between them lie within the seeds’ spread ({_difference(noise, places)})"
        )
    return headline, f"{text}{_pace(results, ranked)}."


def lost_runs(ranked: Sequence[Standing]) -> list[str]:
    """A line for each run that did not finish."""
    return [f"{s.name}, seed {run.seed}: {run.words}" for s in ranked for run in s.runs if not run.finished]


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


def printable(text: Any) -> str:
    """Text without line breaks, control characters and lone surrogates: they would break a row, an SVG or a file."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(str(text).split()))


def share(count: int, total: int) -> str:
    """How many of all a cell speaks for; nothing where it is all of them."""
    return "" if count == total else f" ({count}/{total})"


def unit_of(metric: dict[str, Any]) -> str:
    """The metric's unit as it follows a number."""
    return f" {printable(metric['unit'])}" if metric["unit"] else ""


def goal(results: dict[str, Any]) -> str:
    """The target with its unit."""
    return f"{results['target']:g}{unit_of(results['metric'])}"


def _outcome(run: dict[str, Any], results: dict[str, Any]) -> Outcome:
    history, target, up = run["history"], results["target"], results["metric"]["higher_is_better"]
    last = history[-1] if history else {"train_loss": None, "test_loss": None, "test_metric": None}
    finished = not run["diverged"] and run["error"] is None and finite(last["test_metric"]) is not None
    if run["error"] is not None:
        words = f"failed after step {run['steps']}: {printable(run['error'])}"
    elif finished:
        words = "finished"
    else:
        words = f"diverged after step {run['steps']}" if run["diverged"] else "ended without a finite test metric"
    reached = None
    if finished and target is not None:
        hits = (
            e for e in history if (m := finite(e["test_metric"])) is not None and (m >= target if up else m <= target)
        )
        reached = finite(next(hits, {"seconds": None})["seconds"])
    return Outcome(
        seed=run["seed"],
        steps=run["steps"],
        finished=finished,
        words=words,
        last=last,
        history=history,
        seconds=finite(run["seconds"]),
        reached=reached,
        step_ms=finite(run["step_ms"]),
        memory=finite(run["state_mb"]),
    )


def _opponent(first: Standing, judged: Sequence[Standing]) -> Standing | None:
    others = [s for s in judged if s is not first]
    return next((s for s in others if s.ours != first.ours), others[0] if others else None)


def noise_of_difference(a: Spread, b: Spread) -> float | None:
    """The spread √(σ₁² + σ₂²) that a difference of means has by luck; None where a single seed shows none.

    >>> noise_of_difference(Spread(2.0, 3.0, 2), Spread(1.0, 4.0, 2))
    5.0
    """
    return None if a.std is None or b.std is None else math.hypot(a.std, b.std)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _level(a: Spread, b: Spread | None) -> bool:
    noise = None if b is None else noise_of_difference(a, b)
    return b is not None and noise is not None and abs(a.mean - b.mean) <= noise


def _pace(results: dict[str, Any], ranked: Sequence[Standing]) -> str:
    # The clause on time to target; only those that always reached it compete, if there are such.
    if results["target"] is None:
        return ""
    most = max((s.reached.count / len(s.runs) for s in ranked if s.reached), default=0)
    timed = [
        (s.reached.mean, i, s) for i, s in enumerate(ranked) if s.reached and s.reached.count / len(s.runs) == most
    ]
    if not timed:
        return f"; {'it did not reach' if len(ranked) == 1 else 'none reached'} {goal(results)}"
    quick = [s for _, _, s in sorted(timed)]
    first, second = quick[0], _opponent(quick[0], quick)
    assert first.reached is not None
    among = "" if most == 1 else f", though not in every seed ({first.reached.count} of {len(first.runs)})"
    if second is None and most < 1 and sum(s.reached is not None for s in ranked) > 1:
        often = f"{first.reached.count} of {len(first.runs)} seeds, in {_mean(first.reached)} s"
        return f"; {first.name} reached {goal(results)} most often, in {often}"
    if second is None:
        alone = "it" if len(ranked) == 1 else f"{first.name} alone"
        always = "" if most < 1 else " in every seed,"
        return f"; {alone} reached {goal(results)}{always} in {_mean(first.reached)} s{among}"
    if most == 1 and any(s.reached and s.reached.mean < first.reached.mean for s in ranked):
        among = ", of those that got there in every seed"
    assert second.reached is not None
    tied = _level(first.reached, second.reached)
    front = [first, *([second] if tied else [])]
    front += [s for s in quick[1:] if s is not second and s.ours == first.ours and _level(first.reached, s.reached)]
    names, times = listed([s.name for s in front]), f"{listed([_mean(s.reached) for s in front])} s"
    if tied:
        return f"; {names} were equally quick to {goal(results)} within the spread ({times}){among}"
    if first.ours == second.ours:
        role = "the next"
    else:
        role = "the quickest rival" if first.ours else "the quickest of quadric’s"
    times += f", against {_mean(second.reached)} s for {second.name}, {role}"
    return f"; {names} {'were' if len(front) > 1 else 'was'} quickest to {goal(results)} ({times}){among}"


def decimals(values: Sequence[float], unit: str) -> int:
    """Decimals shared by a column: hundredths of a per cent, else four significant digits of the middle value.

    >>> decimals([91.43, 10.0], "%"), decimals([0.3817, 2.3], ""), decimals([1234.5], "")
    (2, 3, 0)
    """
    middle = median(abs(v) for v in values)
    return 2 if unit == "%" or middle == 0 else min(6, max(0, 3 - math.floor(math.log10(middle))))


def measured(spread: Spread, places: int) -> str:
    """A mean with so many decimals, and its spread behind it.

    >>> measured(Spread(91.432, 0.051, 3), 2), measured(Spread(0.5, None, 1), 1)
    ('91.43 ± 0.05', '0.5')
    """
    if abs(spread.mean) >= 1:  # far larger than its column: no digits that mean nothing
        places = min(places, max(0, 4 - math.floor(math.log10(abs(spread.mean)))))
    return f"{spread.mean:.{places}f}" + ("" if spread.std is None else f" ± {spread.std:.{places}f}")


def _difference(value: float, places: int) -> str:
    # A difference too small for its column keeps its first digits: "0.00 better" would be nonsense.
    text = f"{value:.{places}f}"
    return text if float(text) or not value else number(value, 2)


def _mean(spread: Spread | None) -> str:
    return number(spread.mean if spread else None)
