"""Several optimizers on one task: the same seeds, the same tuning, one file for each finished run.

A race killed at any moment continues where it was: finished runs are read back, the one under way continues from its
checkpoint. The learning rate of every optimizer is chosen on the same grid, with a seed that does not race, on examples
held out of the training set.
"""

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from quadric.lab import LabError, report
from quadric.lab.checkpoint import read_json, write_atomically, write_json
from quadric.lab.display import Display
from quadric.lab.models import build_model
from quadric.lab.optimizers import build_optimizer, find_entrant
from quadric.lab.tasks import Task
from quadric.lab.train import Plan, Progress, Saving, Watch, describe_run, save, train, training_steps


@dataclass(frozen=True)
class Race:
    """Everything that decides a race.

    Args:
        task: Name of the task.
        model: One of ``MODELS``.
        optimizers: Names of the entrants.
        settings: Hyper-parameters by entrant; may hold ``lr`` where nothing is tuned.
        seeds: Of the runs.
        epochs: Of each run.
        batch_size: Of each run.
        schedule: "cosine" or "constant".
        warmup: Steps over which the rate rises.
        augment: Shift and mirror the training images.
        examples: Training examples to use; None uses all.
        rates: Learning rates to try for each optimizer; empty takes each one's default.
        tune_epochs: Epochs of a trial.
        target: Test metric whose time is taken, or None.
        device: "cpu" or "cuda".
        threads: CPU threads; sums over more of them round differently.
    """

    task: str
    model: str
    optimizers: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    schedule: Literal["cosine", "constant"]
    warmup: int
    augment: bool
    examples: int | None
    rates: tuple[float, ...]
    tune_epochs: int
    target: float | None
    device: str
    threads: int

    @property
    def tuning_seed(self) -> int:
        """The seed of the trials; it never races."""
        return max(self.seeds) + 1000

    def plan(self, optimizer: str, lr: float, seed: int, epochs: int) -> Plan:
        """The plan of one run."""
        settings = {key: value for key, value in self.settings.get(optimizer, {}).items() if key != "lr"}
        return Plan(
            optimizer=optimizer,
            lr=lr,
            settings=settings,
            model=self.model,
            epochs=epochs,
            batch_size=self.batch_size,
            schedule=self.schedule,
            warmup=self.warmup,
            seed=seed,
            augment=self.augment,
        )


@dataclass(frozen=True)
class Track:
    """Where a race runs.

    Args:
        task: Its task, with the examples that the race uses.
        folder: Where its files are.
        display: Where progress is shown.
        saving_seconds: Seconds between checkpoints.
        saving_steps: Steps between checkpoints; 0 leaves it to the time.
    """

    task: Task
    folder: Path
    display: Display
    saving_seconds: float = 30.0
    saving_steps: int = 0

    def saving(self, path: Path) -> Saving:
        """Checkpoints of one run in a file."""
        return Saving(path, self.saving_seconds, self.saving_steps)


def log_grid(low: float, high: float, count: int) -> tuple[float, ...]:
    """Learning rates at equal ratios, rounded to two digits.

    Example:
        >>> log_grid(1e-4, 1.0, 5)
        (0.0001, 0.001, 0.01, 0.1, 1.0)
    """
    if count == 1:
        return (float(f"{math.sqrt(low * high):.2g}"),)
    return tuple(float(f"{low * (high / low) ** (i / (count - 1)):.2g}") for i in range(count))


def run_race(race: Race, track: Track, *, command: str) -> Path:
    """Tune, race, write results.json and the report; whatever is finished in the folder already is not repeated.

    Returns:
        The path of the report.

    Raises:
        LabError: When no run finished; everything is written before.
    """
    started = time.strftime("%Y-%m-%d %H:%M")
    trials: dict[str, list[dict[str, Any]]] = {}
    rates: dict[str, float] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in race.optimizers}
    with track.display.live():
        for name in race.optimizers:
            trials[name] = [_trial(race, track, name, lr) for lr in race.rates]
            rates[name] = _chosen_rate(race, track, name, trials[name])
        for seed in race.seeds:  # seeds outside: a machine that slows down meanwhile slows every optimizer
            for name in race.optimizers:
                runs[name].append(_run(race, track, name, rates[name], seed))

    results = describe_race(race, track.task, rates, runs, trials, command=command, started=started)
    write_json(track.folder / "results.json", results)
    results = read_json(track.folder / "results.json")  # what a reader of the file sees: no NaN, lists for tuples
    page = report.write_report(results, track.folder)
    console = track.display.console
    console.print(report.results_table(results, console.width))
    track.display.say(f"report: {page}")
    if all(_lost(run) for given in runs.values() for run in given):
        raise LabError(f"no run finished; {page} says why: try smaller rates or another --set", code=1)
    return page


def run_single(race: Race, track: Track, *, command: str) -> None:
    """A race of one: train, then keep the parameters, the checkpoint and a results.json.

    Raises:
        LabError: When the run did not reach its end; everything is saved before.
    """
    started = time.strftime("%Y-%m-%d %H:%M")
    task, display = track.task, track.display
    (name,), (seed,) = race.optimizers, race.seeds
    lr = _chosen_rate(race, track, name, [])
    plan = race.plan(name, lr, seed, race.epochs)
    every = max(1, race.epochs // 20)  # a hundred epochs are twenty lines
    show = _watcher(track)

    def watch(progress: Progress, loss: float) -> bool:
        last = progress.history[-1] if progress.history else {"step": 0}
        if last["step"] == progress.step and (last["epoch"] % every == 0 or last["epoch"] == race.epochs):
            metric = format_metric(task, last["test_metric"])
            losses = f"train loss {last['train_loss']:.4f}, test loss {last['test_loss']:.4f}"
            display.say(f"epoch {last['epoch']}/{race.epochs}: {losses}, {metric}, {last['seconds']:.1f} s")
        return show(progress, loss)

    saving, scalars = track.saving(track.folder / "checkpoint.pt"), track.folder / "tensorboard"
    with display.live():
        display.begin(f"{name} on {task.name}", count_steps(race, task))
        outcome = train(plan, task, torch.device(race.device), saving=saving, tensorboard=scalars, watch=watch)
    progress, model, optimizer = outcome
    save(saving.path, plan, progress, model, optimizer)
    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(track.folder / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
    run = describe_run(plan, progress, model, optimizer)
    results = describe_race(race, task, {name: lr}, {name: [run]}, {}, command=command, started=started)
    write_json(track.folder / "results.json", results)
    line = f"{name}, seed {seed}: {summary(task, run)}"
    if progress.lost:
        raise LabError(f"{line}; try a smaller --lr or --warmup, all is saved in {track.folder}", code=1)
    display.say(line)
    display.say(f"saved: {track.folder}")


def describe_race(
    race: Race,
    task: Task,
    rates: Mapping[str, float],
    runs: Mapping[str, list[dict[str, Any]]],
    trials: Mapping[str, list[dict[str, Any]]],
    *,
    command: str,
    started: str,
) -> dict[str, Any]:
    """What results.json holds: the race, and every run with its history.

    Args:
        race: The race.
        task: Its task.
        rates: The learning rate of each optimizer.
        runs: Finished runs of each optimizer, as :func:`quadric.lab.train.describe_run` has them.
        trials: Tuning runs of each optimizer.
        command: The command line.
        started: Local date and time.
    """
    model = build_model(race.model, task)
    parameters = sum(p.numel() for p in model.parameters())
    examples = len(task.train[0])
    return {
        "quadric": version("quadric"),
        "command": command,
        "task": task.name,
        "model": race.model,
        "description": f"{task.title}: {race.model} with {parameters:,} parameters, {examples:,} training examples, "
        f"{len(task.test[0]):,} test examples",
        "parameters": parameters,
        "epochs": race.epochs,
        "steps": training_steps(task, race.batch_size, race.epochs),
        "batch_size": race.batch_size,
        "schedule": race.schedule,
        "seeds": race.seeds,
        "metric": {
            "name": task.metric.name,
            "unit": task.metric.unit,
            "higher_is_better": task.metric.higher_is_better,
        },
        "target": race.target,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if race.device == "cuda" else "cpu",
            "threads": race.threads,
            "started": started,
        },
        "tuning": None
        if not race.rates
        else {
            "grid": race.rates,
            "epochs": race.tune_epochs,
            "trials": {find_entrant(name).name: trials[name] for name in race.optimizers},
        },
        "entrants": [
            {
                "name": find_entrant(name).name,
                "ours": find_entrant(name).ours,
                "hyperparameters": {
                    "lr": rates[name],
                    **find_entrant(name).described(),
                    **race.plan(name, rates[name], 0, race.epochs).settings,
                },
                "runs": runs[name],
            }
            for name in race.optimizers
        ],
    }


def check_race(race: Race, task: Task) -> None:
    """Build everything once, so that an impossible value is answered before an hour of training."""
    for name in race.optimizers:  # a model for each: some optimizers reach into its layers
        build_optimizer(name, build_model(race.model, task), 1e-3, race.plan(name, 1e-3, 0, 1).settings)


def count_steps(race: Race, task: Task) -> int:
    """Steps of all trials and runs."""
    trial = training_steps(task.for_tuning(), race.batch_size, race.tune_epochs) if race.rates else 0
    run = training_steps(task, race.batch_size, race.epochs)
    return len(race.optimizers) * (len(race.rates) * trial + len(race.seeds) * run)


def _trial(race: Race, track: Track, name: str, lr: float) -> dict[str, Any]:
    path = track.folder / "tuning" / f"{name}-lr{lr:g}.json"
    plan = race.plan(name, lr, race.tuning_seed, race.tune_epochs)
    run = _finished(race, track, track.task.for_tuning(), plan, path, f"tuning {name}, lr {lr:g}")
    last = {} if _lost(run) else run["history"][-1]
    return {
        "lr": lr,
        "loss": last.get("test_loss"),
        "metric": last.get("test_metric"),
        "diverged": run["diverged"],
        "error": run["error"],
    }


def _lost(run: Mapping[str, Any]) -> bool:
    return run["diverged"] or run["error"] is not None


def _run(race: Race, track: Track, name: str, lr: float, seed: int) -> dict[str, Any]:
    label = f"{name}, seed {seed}"
    path = track.folder / "runs" / f"{name}-seed{seed}.json"
    plan = race.plan(name, lr, seed, race.epochs)
    run = _finished(race, track, track.task, plan, path, label, track.folder / "tensorboard" / path.stem)
    track.display.say(f"{label}: {summary(track.task, run)}")
    return run


def _finished(
    race: Race, track: Track, task: Task, plan: Plan, path: Path, label: str, tensorboard: Path | None = None
) -> dict[str, Any]:
    # The run that the file holds; trained first where there is no such file.
    steps = training_steps(task, plan.batch_size, plan.epochs)
    if not path.exists():
        saving = track.saving(path.with_suffix(".checkpoint.pt"))
        device = torch.device(race.device)
        track.display.begin(label, steps)
        outcome = train(plan, task, device, saving=saving, tensorboard=tensorboard, watch=_watcher(track))
        write_json(path, describe_run(plan, *outcome))
        saving.path.unlink(missing_ok=True)
    track.display.end(steps)
    return read_json(path, "seed", "steps", "diverged", "error", "seconds", "step_ms", "state_mb", "history")


def _chosen_rate(race: Race, track: Track, name: str, trials: list[dict[str, Any]]) -> float:
    if not trials:
        return race.settings.get(name, {}).get("lr", find_entrant(name).lr)
    finished = [trial for trial in trials if trial["metric"] is not None]
    if not finished:
        track.display.say(f"tuning {name}: no rate of the grid trains; it races with the smallest, {race.rates[0]:g}")
        return race.rates[0]
    sign = -1 if track.task.metric.higher_is_better else 1
    best = min(finished, key=lambda trial: (sign * trial["metric"], trial["loss"]))
    lost = f" ({len(trials) - len(finished)} lost)" if len(finished) < len(trials) else ""
    line = f"tuning {name}: lr {best['lr']:g} of {len(trials)} tried{lost}, validation "
    line += format_metric(track.task, best["metric"])
    if len(trials) > 1 and best["lr"] in (race.rates[0], race.rates[-1]):
        line += " (an end of the grid: a wider --lr-range may serve it better)"
    track.display.say(line)
    return best["lr"]


def _watcher(track: Track) -> Watch:
    def watch(progress: Progress, loss: float) -> bool:
        metric = format_metric(track.task, progress.history[-1]["test_metric"]) if progress.history else ""
        return track.display.step(progress.step, f"loss {loss:.3f}  {metric}")

    return watch


def format_metric(task: Task, value: float) -> str:
    """A metric as a person reads it."""
    digits = f"{value:.2f}" if task.metric.unit == "%" else f"{value:.4g}"
    return f"{task.metric.name} {digits} {task.metric.unit}".rstrip()


def summary(task: Task, run: Mapping[str, Any]) -> str:
    """How a run ended, in one line."""
    if run["error"] is not None:
        return f"failed after step {run['steps']}: {run['error']}"
    if run["diverged"]:
        return f"diverged after step {run['steps']}"
    last = run["history"][-1]
    metric = format_metric(task, last["test_metric"])
    return f"{metric}, test loss {last['test_loss']:.4g}, {run['seconds']:.1f} s of training"
