"""The command line: ``quadric race`` and ``quadric train``.

Values are checked here, before anything is loaded or written; every failure is one line on stderr.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quadric.lab import LabError

if TYPE_CHECKING:  # torch takes seconds to import: --help and a mistyped option should not wait for it
    from quadric.lab.race import Race
    from quadric.lab.tasks import Task

DEFAULT_RATES = 11  # learning rates of `--tune` without a number
# typer carries its own copy of click since 0.2x; either way this is the parent of all complaints about options
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Schedule(str, Enum):
    """How the learning rate moves after the warm-up."""

    cosine = "cosine"
    constant = "constant"


class DeviceName(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help="digits (comes with the package), mnist, fashion-mnist, cifar10, shakespeare, regression[:NAME], "
        "or the path of a text file.",
    ),
]
TextFile = Annotated[Path | None, typer.Option("--text", help="Learn this text file, character by character.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with data files; without it image sets are fetched from openml.org.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="logistic, mlp, 3c3d, resnet20 or gpt. [default: the task's]")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the training set. [default: the task's]")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Examples in a step. [default: the task's]")]
Examples = Annotated[int | None, typer.Option(min=1, help="Use only so many training examples. [default: all]")]
ScheduleName = Annotated[Schedule, typer.Option(help="How the learning rate moves.")]
Warmup = Annotated[int, typer.Option(min=0, help="Steps over which the learning rate rises at the start.")]
Augment = Annotated[bool, typer.Option("--augment", help="Shift and mirror the training images.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTIMIZER.KEY=VALUE", help="Change a hyper-parameter; may be repeated."),
]
Target = Annotated[float | None, typer.Option(help="Test metric whose time is taken. [default: the task's]")]
Device = Annotated[DeviceName, typer.Option(help="Where to train.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. [default: 1 for digits and regression, else torch's choice]")
]
Out = Annotated[Path | None, typer.Option(help="Folder for everything written. [default: a new one under runs/]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what is in --out (or the newest of runs/).")]
CheckpointSeconds = Annotated[float, typer.Option(min=0, help="Seconds between checkpoints of a run.")]


@app.callback(invoke_without_command=True)
def top(ctx: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    """Second-order optimizers for PyTorch, raced on real data."""
    if show:
        typer.echo(f"quadric {version('quadric')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def race(
    ctx: typer.Context,
    task: TaskName = "digits",
    text: TextFile = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    optimizers: Annotated[
        str,
        typer.Option(help="Who races: sgd, adamw, muon, mfac, ginger, ginger-sampled, block-mean-adagrad."),
    ] = "sgd,adamw,muon,mfac,ginger,block-mean-adagrad",
    seeds: Annotated[str, typer.Option(help="How many seeds each optimizer runs, or which: 0,1,2.")] = "5",
    seed: Annotated[int, typer.Option(min=0, help="The first seed, where --seeds is a number.")] = 0,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    schedule: ScheduleName = Schedule.cosine,
    warmup: Warmup = 0,
    augment: Augment = False,
    tune: Annotated[
        int,
        typer.Option(min=0, metavar="[N]", help="Try N learning rates for each optimizer; 0: take each one's default."),
    ] = DEFAULT_RATES,
    lr_range: Annotated[tuple[float, float], typer.Option(help="Ends of the grid of --tune.")] = (1e-5, 1.0),
    tune_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of a trial. [default: as --epochs]")] = None,
    settings: Settings = None,
    target: Target = None,
    device: Device = DeviceName.auto,
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    checkpoint_seconds: CheckpointSeconds = 30.0,
):
    """Race optimizers on one task: the same seeds, the same tuning for each, a table and a report at the end.

    \b
    Examples:
      quadric race
      quadric race --task fashion-mnist --data-dir data --examples 20000 --seeds 3
      quadric race --task cifar10 --model resnet20 --optimizers sgd,adamw,mfac --epochs 10 --augment
      quadric race --task shakespeare --data-dir data --optimizers adamw,muon,ginger --tune 4
      quadric race --optimizers adamw,mfac --tune 0 --set mfac.lr=0.01 --set mfac.window=128
      quadric race --out runs/mine --resume
    """  # noqa: D301  (a real backspace: click's mark for "keep these lines")
    from quadric.lab.display import Display
    from quadric.lab.optimizers import parse_settings
    from quadric.lab.race import Race, Track, check_race, count_steps, log_grid, run_race
    from quadric.lab.train import choose_device, set_threads

    low, high = lr_range
    if not 0 < low <= high < math.inf:
        raise LabError(f"--lr-range takes two positive rates, the smaller first, not {low:g} {high:g}")
    if tune > 1 and low == high:
        raise LabError(f"--lr-range {low:g} {high:g} has room for one rate; use --tune 1 or a wider range")
    names = _names(optimizers)
    overrides = parse_settings(settings or [], names)
    fixed = [name for name in names if "lr" in overrides[name]]
    if tune and fixed:
        raise LabError(f"--set {fixed[0]}.lr fixes a rate that --tune would choose; add --tune 0 or leave it out")
    chosen = choose_device(device.value).type
    loaded = _load(task, text, data_dir, examples)
    length = epochs or loaded.epochs
    plan = Race(
        task=loaded.name,
        model=model or loaded.model,
        optimizers=names,
        settings=overrides,
        seeds=_seeds(seeds, seed),
        epochs=length,
        batch_size=batch_size or loaded.batch_size,
        schedule=schedule.value,
        warmup=warmup,
        augment=_augmented(augment, loaded),
        examples=examples,
        rates=log_grid(low, high, tune) if tune else (),
        tune_epochs=tune_epochs or length,
        target=loaded.target if target is None else target,
        device=chosen,
        threads=set_threads(threads or loaded.threads),
    )
    check_race(plan, loaded)
    folder = open_folder(out, "race", plan, resume, words=ctx.obj)
    console = _console()
    track = Track(loaded, folder, Display(console, count_steps(plan, loaded)), checkpoint_seconds)
    try:
        report = run_race(plan, track, command=shlex.join(["quadric", *ctx.obj]))
    except KeyboardInterrupt:
        raise _interrupted(ctx.obj, folder, out) from None
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    ctx: typer.Context,
    optimizer: Annotated[
        str,
        typer.Option(help="sgd, adamw, muon, mfac, ginger, ginger-sampled or block-mean-adagrad."),
    ] = "mfac",
    task: TaskName = "digits",
    text: TextFile = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: the optimizer's]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters, order of examples and sampled labels.")] = 0,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    schedule: ScheduleName = Schedule.cosine,
    warmup: Warmup = 0,
    augment: Augment = False,
    settings: Settings = None,
    target: Target = None,
    device: Device = DeviceName.auto,
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    checkpoint_seconds: CheckpointSeconds = 30.0,
    checkpoint_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: by time only.")] = 0,
):
    """Train one network with one optimizer; --resume continues a killed run to the same bits.

    \b
    Examples:
      quadric train --optimizer mfac
      quadric train --optimizer ginger --task cifar10 --data-dir data --epochs 30 --augment --out runs/ginger
      quadric train --out runs/ginger --resume
      quadric train --optimizer adamw --text book.txt --lr 0.003 --warmup 100
    """  # noqa: D301
    from quadric.lab.display import Display
    from quadric.lab.optimizers import check_rate, find_entrant, parse_settings
    from quadric.lab.race import Race, Track, check_race, count_steps, run_single
    from quadric.lab.train import choose_device, set_threads

    find_entrant(optimizer)
    overrides = parse_settings(settings or [], [optimizer])
    if lr is not None:
        check_rate("--lr", lr)
        overrides[optimizer]["lr"] = lr
    chosen = choose_device(device.value).type
    loaded = _load(task, text, data_dir, examples)
    plan = Race(
        task=loaded.name,
        model=model or loaded.model,
        optimizers=(optimizer,),
        settings=overrides,
        seeds=(seed,),
        epochs=epochs or loaded.epochs,
        batch_size=batch_size or loaded.batch_size,
        schedule=schedule.value,
        warmup=warmup,
        augment=_augmented(augment, loaded),
        examples=examples,
        rates=(),
        tune_epochs=0,
        target=loaded.target if target is None else target,
        device=chosen,
        threads=set_threads(threads or loaded.threads),
    )
    check_race(plan, loaded)
    folder = open_folder(out, "train", plan, resume, words=ctx.obj)
    console = _console()
    display = Display(console, count_steps(plan, loaded))
    track = Track(loaded, folder, display, checkpoint_seconds, checkpoint_steps)
    try:
        run_single(plan, track, command=shlex.join(["quadric", *ctx.obj]))
    except KeyboardInterrupt:
        raise _interrupted(ctx.obj, folder, out) from None
    console.print(f"saved: {folder}", markup=False, highlight=False, soft_wrap=True)


def open_folder(out: Path | None, kind: str, plan: "Race", resume: bool, words: Sequence[str]) -> Path:
    """The folder of a race or run: a new one with its configuration, or the one to continue.

    Args:
        out: ``--out``; None takes runs/KIND-TASK-MODEL, with a number where that is taken.
        kind: "race" or "train".
        plan: Its configuration.
        resume: ``--resume``.
        words: The command line after ``quadric``, remembered for ``--resume``.

    Raises:
        LabError: When the folder holds something else, or there is nothing to continue.
    """
    from quadric.lab.checkpoint import read_json, write_json

    config = json.loads(json.dumps({"command": kind, "quadric": version("quadric"), **asdict(plan)}))
    folder = out or _folder_under_runs(f"{kind}-{plan.task}-{plan.model}".replace(":", "-"), resume)
    file = folder / "config.json"
    if not file.exists():
        if resume:
            raise LabError(f"there is nothing to resume in {folder}; start it without --resume")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LabError(f"{folder} exists and is not a run's folder; choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot make the folder {folder} ({error.strerror}); choose another --out") from error
        write_json(file, {"arguments": list(words[1:]), **config})
        return folder
    before = read_json(file)
    keys = [key for key in config if before.get(key) != config[key]]
    if keys:
        old, new = json.dumps(before.get(keys[0])), json.dumps(config[keys[0]])
        raise LabError(
            f"{folder} was started with another configuration ({keys[0]} {old}, now {new}); "
            "repeat its options or choose another --out"
        )
    if not resume:
        raise LabError(f"{folder} holds this {kind} already; add --resume to continue it or choose another --out")
    return folder


def _folder_under_runs(name: str, resume: bool) -> Path:
    number, folder = 1, Path("runs") / name
    newest = folder
    while folder.exists():
        newest, number = folder, number + 1
        folder = Path("runs") / f"{name}-{number}"
    return newest if resume else folder


def _names(text: str) -> tuple[str, ...]:
    from quadric.lab.optimizers import find_entrant

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        find_entrant(name)
    if len(set(names)) < len(names) or not names:
        raise LabError(f"--optimizers takes different names with commas between them, not {text!r}")
    return names


def _seeds(text: str, first: int) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and "," not in text and numbers[0] > 0:
        return tuple(range(first, first + numbers[0]))
    if len(numbers) < 2 or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise LabError(f"--seeds takes a number of seeds, or different seeds such as 0,1,2, not {text!r}")
    return tuple(numbers)


def _load(task: str, text: Path | None, data_dir: Path | None, examples: int | None) -> "Task":
    from quadric.lab.tasks import load_task, text_task_from

    loaded = load_task(task, data_dir) if text is None else text_task_from(text)
    return loaded if examples is None else loaded.first(examples)


def _augmented(augment: bool, task: "Task") -> bool:
    if augment and task.kind != "image":
        raise LabError(f"--augment shifts images, and {task.name} has none; leave it out")
    return augment


def _console() -> Console:
    # A file or a pipe has no width of its own: wide enough for the table.
    return Console(width=None if sys.stdout.isatty() else 100)


def _interrupted(words: Sequence[str], folder: Path, out: Path | None) -> LabError:
    words = [word for word in words if word != "--resume"]
    if out is None:
        words += ["--out", str(folder)]
    return LabError(f"interrupted; continue with: {shlex.join(['quadric', *words, '--resume'])}", code=130)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; every failure becomes one line on stderr.

    Args:
        arguments: The words after ``quadric``.
    """
    try:
        words = _with_number_of_rates(_with_remembered(arguments))
        status: Any = app(args=words, prog_name="quadric", standalone_mode=False, obj=list(arguments))
        return status if isinstance(status, int) else 0
    except LabError as error:
        return _complain(str(error), error.code)
    except UsageError as error:
        return _complain(getattr(error, "format_message", error.__str__)(), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted before anything was saved", 130)
    except BrokenPipeError:  # `quadric race | head`: whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _with_remembered(arguments: Sequence[str]) -> list[str]:
    # `quadric race --out FOLDER --resume` need not repeat the options: those the folder was started with come first,
    # the given ones after them win, and open_folder answers what contradicts.
    words = list(arguments)
    places = [i for i, word in enumerate(words) if word == "--out" or word.startswith("--out=")]
    if "--resume" not in words or not places:
        return words
    out = words[places[-1]].partition("=")[2] or "".join(words[places[-1] + 1 : places[-1] + 2])
    try:
        remembered = json.loads((Path(out) / "config.json").read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return words  # open_folder says what is wrong with the folder
    return [words[0], *remembered, *words[1:]]


def _with_number_of_rates(arguments: Sequence[str]) -> list[str]:
    # `--tune` may stand alone, which typer has no word for.
    words = list(arguments)
    for i, word in enumerate(words):
        if word == "--tune" and not (i + 1 < len(words) and words[i + 1].lstrip("-").isdigit()):
            words[i] = f"--tune={DEFAULT_RATES}"
    return words


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"quadric: {line}" if code == 130 else f"quadric: error: {line}", file=sys.stderr)
    return code
