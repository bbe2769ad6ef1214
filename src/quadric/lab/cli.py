"""The command line: ``quadric race``, ``train``, ``curvature`` and ``prune``.

Values are checked here, before anything is loaded or written; every failure is one line on stderr.
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Option

from quadric.lab import LabError

if TYPE_CHECKING:  # its imports take seconds: --help and a mistyped option should not wait for them
    from quadric.lab.prune import Pruning
    from quadric.lab.race import Race
    from quadric.lab.tasks import Task

MAX_SEED = 2**32 - 1
DEFAULT_RATES = 11  # learning rates of `--tune` without a number
# typer carries its own copy of click since 0.2x; either way this is the parent of all complaints about options
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# Options that mean the same to every command, or to those that look at one network.
TaskName = Annotated[
    str | None,
    Option(
        help="digits, mnist, fashion-mnist or cifar10, each also followed by -autoencoder; shakespeare, "
        "regression[:NAME], or the path of a text file. [default: digits]"
    ),
]
TextFile = Annotated[Path | None, Option(help="Take this text file, character by character.")]
DataDir = Annotated[
    Path | None, Option(help="Folder with data files; without it image sets are fetched from openml.org.")
]
Threads = Annotated[
    int | None, Option(min=1, help="CPU threads. [default: 1 for digits and regression, else torch's choice]")
]
Out = Annotated[Path | None, Option(help="Folder for everything written. [default: a new one under runs/]")]


class Schedule(str, Enum):
    """How the learning rate moves after the warm-up."""

    cosine = "cosine"
    constant = "constant"


class DeviceName(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Fallback(str, Enum):
    """What HesScale does where an operation has no rule."""

    gauss_newton = "gauss_newton"
    zero = "zero"


class CarriedType(str, Enum):
    """In which type HesScale carries the diagonal."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Scope(str, Enum):
    """Among which weights the least important are looked for."""

    all = "global"
    layer = "layer"


@dataclass(frozen=True)
class Common:
    """The options that `race` and `train` share."""

    task: Annotated[
        str,
        Option(
            help="digits (comes with the package), mnist, fashion-mnist or cifar10, each also followed by "
            "-autoencoder as in mnist-autoencoder; shakespeare, regression[:NAME], or the path of a text file."
        ),
    ] = "digits"
    text: Annotated[Path | None, Option(help="Learn this text file, character by character.")] = None
    data_dir: DataDir = None
    model: Annotated[
        str | None, Option(help="logistic, mlp, 3c3d, resnet20, gpt or autoencoder. [default: the task's]")
    ] = None
    epochs: Annotated[int | None, Option(min=1, help="Passes over the training set. [default: the task's]")] = None
    batch_size: Annotated[int | None, Option(min=1, help="Examples in a step. [default: the task's]")] = None
    examples: Annotated[int | None, Option(min=1, help="Use only so many training examples. [default: all]")] = None
    schedule: Annotated[Schedule, Option(help="How the learning rate moves.")] = Schedule.cosine
    warmup: Annotated[int, Option(min=0, help="Steps over which the learning rate rises at the start.")] = 0
    augment: Annotated[bool, Option("--augment", help="Shift and mirror the training images.")] = False
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="OPTIMIZER.KEY=VALUE", help="Change a hyper-parameter; may be repeated."),
    ] = None
    target: Annotated[float | None, Option(help="Test metric whose time is taken. [default: the task's]")] = None
    device: Annotated[DeviceName, Option(help="Where to train.")] = DeviceName.auto
    threads: Threads = None
    out: Out = None
    resume: Annotated[bool, Option("--resume", help="Continue what is in --out (or the newest of runs/).")] = False
    checkpoint_seconds: Annotated[float, Option(min=0, help="Seconds between checkpoints of a run.")] = 30.0


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its ``common: Common``."""

    def spread(**given: Any) -> None:
        command(common=Common(**{field.name: given.pop(field.name) for field in fields(Common)}), **given)

    own = [p for p in signature(command).parameters.values() if p.name != "common"]
    shared = signature(Common).parameters.values()
    every = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
    # What typer reads to know a command's options: the signature for defaults, the annotations for types.
    spread.__signature__ = Signature(every)  # pyright: ignore[reportFunctionMemberAccess]
    spread.__annotations__ = {p.name: p.annotation for p in every}
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    return spread


@app.callback(invoke_without_command=True)
def top(ctx: typer.Context, show: Annotated[bool, Option("--version", help="Print the version.")] = False):
    """Second-order optimizers for PyTorch, raced on real data."""
    if show:
        typer.echo(f"quadric {version('quadric')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
@with_common
def race(
    ctx: typer.Context,
    common: Common,
    optimizers: Annotated[
        str,
        Option(
            help="Who races: sgd, adamw, muon, isaac, isaac-adamw, isaac-muon, mfac, ginger, ginger-sampled, "
            "adahesscale, block-mean-adagrad."
        ),
    ] = "sgd,adamw,muon,isaac,mfac,ginger,adahesscale,block-mean-adagrad",
    seeds: Annotated[str, Option(help="How many seeds each optimizer runs, or which: 0,1,2.")] = "5",
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="The first seed, where --seeds is a number.")] = 0,
    tune: Annotated[
        int,
        Option(min=0, metavar="[N]", help="Try N learning rates for each optimizer; 0: take each one's default."),
    ] = DEFAULT_RATES,
    lr_range: Annotated[tuple[float, float], Option(help="Ends of the grid of --tune.")] = (1e-5, 1.0),
    tune_epochs: Annotated[int | None, Option(min=1, help="Epochs of a trial. [default: as --epochs]")] = None,
):
    """Race optimizers on one task: the same seeds, the same tuning for each, a table and a report at the end.

    \b
    Examples:
      quadric race
      quadric race --task fashion-mnist --data-dir data --examples 20000 --seeds 3
      quadric race --task cifar10 --model resnet20 --optimizers sgd,adamw,mfac --epochs 10 --augment
      quadric race --task shakespeare --data-dir data --optimizers adamw,muon,ginger --tune 4
      quadric race --optimizers adamw,mfac --tune 0 --set mfac.lr=0.01 --set mfac.window=128
      quadric race --optimizers sgd,isaac --set "isaac.damping=relative(0.3)" --set isaac.targets=1,3
      quadric race --out runs/mine --resume
    """  # noqa: D301  (a real backspace: click's mark for "keep these lines")
    from quadric.lab.optimizers import parse_settings
    from quadric.lab.race import log_grid, run_race

    low, high = lr_range
    if not 0 < low <= high < math.inf:
        raise LabError(f"--lr-range takes two positive rates, the smaller first, not {low:g} {high:g}")
    rates = log_grid(low, high, tune) if tune else ()
    if (room := len(set(rates))) < tune:
        raise LabError(f"--lr-range {low:g} {high:g} has room for {room} rates; use --tune {room} or a wider range")
    names = _names(optimizers)
    settings = parse_settings(common.settings or [], names)
    fixed = [name for name in names if "lr" in settings[name]]
    if tune and fixed:
        raise LabError(f"--set {fixed[0]}.lr fixes a rate that --tune would choose; add --tune 0 or leave it out")
    start(
        run_race,
        ctx,
        common,
        optimizers=names,
        settings=settings,
        seeds=_seeds(seeds, seed),
        rates=rates,
        tune_epochs=tune_epochs,
    )


@app.command()
@with_common
def train(
    ctx: typer.Context,
    common: Common,
    optimizer: Annotated[
        str,
        Option(
            help="sgd, adamw, muon, isaac, isaac-adamw, isaac-muon, mfac, ginger, ginger-sampled, adahesscale or "
            "block-mean-adagrad."
        ),
    ] = "mfac",
    lr: Annotated[float | None, Option(help="Learning rate. [default: the optimizer's]")] = None,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Of parameters, order of examples and sampled labels.")] = 0,
    checkpoint_steps: Annotated[int, Option(min=0, help="Steps between checkpoints; 0: by time only.")] = 0,
):
    """Train one network with one optimizer; --resume continues a killed run to the same bits.

    \b
    Examples:
      quadric train --optimizer mfac
      quadric train --optimizer ginger --task cifar10 --data-dir data --epochs 30 --augment --out runs/ginger
      quadric train --out runs/ginger --resume
      quadric train --optimizer adamw --text book.txt --lr 0.003 --warmup 100
    """  # noqa: D301
    from quadric.lab.optimizers import check_rate, find_entrant, parse_settings
    from quadric.lab.race import run_single

    find_entrant(optimizer)
    settings = parse_settings(common.settings or [], [optimizer])
    if lr is not None:
        check_rate("--lr", lr)
        settings[optimizer]["lr"] = lr
    start(
        run_single,
        ctx,
        common,
        optimizers=(optimizer,),
        settings=settings,
        seeds=(seed,),
        checkpoint_steps=checkpoint_steps,
    )


@app.command()
def curvature(
    ctx: typer.Context,
    task: TaskName = None,
    text: TextFile = None,
    data_dir: DataDir = None,
    model: Annotated[
        str | None,
        Option(
            help="logistic, mlp, 3c3d, resnet20, gpt or autoencoder [default: the task's]; or module:function, a "
            "function of your own that returns (model, loss_fn, batch), where loss_fn(model, batch) is the scalar "
            "loss.",
        ),
    ] = None,
    epochs: Annotated[int, Option(min=0, help="Train the model of a task so long first, with AdamW.")] = 0,
    weights: Annotated[
        Path | None,
        Option(
            "--weights",
            "--checkpoint",
            help="Take the parameters from this file or folder, which quadric train wrote, or from another file of "
            "safetensors.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, help="Examples of the task in the batch. [default: the task's]")
    ] = None,
    probes: Annotated[int, Option(min=1, help="Random vectors of Hutchinson's estimate.")] = 10,
    entries: Annotated[int, Option(min=1, help="Entries of each tensor to compute exactly.")] = 64,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Of parameters, batch, entries and probes.")] = 0,
    fallback: Annotated[Fallback | None, Option(help="For operations without a rule of HesScale's.")] = None,
    dtype: Annotated[CarriedType | None, Option(help="Type in which HesScale carries the diagonal.")] = None,
    device: Annotated[DeviceName, Option(help="Where to compute.")] = DeviceName.auto,
    threads: Threads = None,
    out: Out = None,
):
    """Compare every estimate of the Hessian's diagonal with the exact one: a table, pictures, a report.

    \b
    Examples:
      quadric curvature
      quadric curvature --epochs 5 --entries 200
      quadric curvature --weights runs/train-digits-mlp
      quadric curvature --task cifar10 --model resnet20 --data-dir data --batch-size 32 --entries 16
      quadric curvature --model mynet:build --probes 100 --out runs/mynet
    """  # noqa: D301
    import torch

    from quadric.lab.curvature import UNITS, Options, compare, subject_of_task, subject_of_user, write
    from quadric.lab.display import Display
    from quadric.lab.train import choose_device, make_reproducible, training_steps

    theirs = model is not None and ":" in model
    if theirs:
        refuse_task_options(
            str(model),
            {
                "--task": task, "--text": text, "--data-dir": data_dir, "--weights": weights,
                "--batch-size": batch_size, "--epochs": epochs or None,
            },
        )  # fmt: skip
    if weights is not None and epochs:
        raise LabError("--weights and --epochs both say which parameters to take; leave one out")
    check_threads(threads)
    where = choose_device(device.value)
    console = wide_console()
    data = None if theirs else chosen_task(task or "digits", text, data_dir, console)
    if chosen := threads or (data and data.threads):
        torch.set_num_threads(chosen)
    make_reproducible(where)
    name = str(model) if data is None else f"{data.name}-{model or data.model}"
    folder = out or _folder_under_runs(f"curvature-{name}".replace(":", "-"), False)
    refuse_taken(folder)
    steps = 0 if data is None else training_steps(data, data.batch_size, epochs)
    display = Display(console, steps + UNITS)
    words: list[str] = ctx.obj
    try:
        with display.live():
            if data is None:
                subject = subject_of_user(str(model), seed, where)
            else:
                subject = subject_of_task(
                    data, model or data.model, batch_size=batch_size or data.batch_size, epochs=epochs, weights=weights,
                    seed=seed, device=where, display=display,
                )  # fmt: skip
            how = Options(probes, entries, seed, fallback.value if fallback else None, dtype.value if dtype else None)
            results = compare(subject, how, display, command=shlex.join(["quadric", *words]))
        write(results, folder, display)
    except KeyboardInterrupt:
        raise LabError("interrupted before anything was saved; repeat it, perhaps with fewer --entries", 130) from None
    except (BrokenPipeError, SystemExit):  # `quadric curvature | head`, which rich answers with SystemExit
        _give_up_stdout()
        raise LabError(f"who read the output has left; what was saved is in {folder}", 1) from None


@app.command()
def prune(
    ctx: typer.Context,
    task: TaskName = None,
    text: TextFile = None,
    data_dir: DataDir = None,
    model: Annotated[
        str | None,
        Option(
            help="logistic, mlp, 3c3d, resnet20, gpt or autoencoder [default: the task's]; or module:function, a "
            "function of your own that returns (model, loss_fn, batches) or (model, loss_fn, batches, evaluate), where "
            "loss_fn(model, batch) is the scalar loss and evaluate(model) a number, the higher the better; without it "
            "the loss on held-back batches judges.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        Option(
            "--checkpoint",
            "--weights",
            help="Take the parameters from this safetensors file of the model's state dict, or from what quadric "
            "train wrote.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        Option(min=0, help="Train the model of a task so long first, with AdamW. [default: the task's]"),
    ] = None,
    sparsity: Annotated[
        str | None,
        Option(help="Share of the weights to remove, or several with commas. [default: 0.5,0.6,0.7,0.8,0.9]"),
    ] = None,
    methods: Annotated[
        str,
        Option(
            help="magnitude; obd (optimal brain damage); and by the inverse of the Fisher matrix: fisher (moves "
            "nothing), single (the sum of single updates), joint (the exact update of all)."
        ),
    ] = "magnitude,obd,fisher,single,joint",
    num_grads: Annotated[int, Option(min=1, help="Gradients of a round.")] = 256,
    batch_size: Annotated[
        int | None, Option(min=1, help="Examples of the task in a batch, one for a gradient. [default: the task's]")
    ] = None,
    per_example: Annotated[
        bool, Option("--per-example", help="Take gradients of single examples, not of batches.")
    ] = False,
    block_size: Annotated[
        int,
        Option(min=1, help="Weights in a block of the Fisher matrix; a number as large as the model puts all in one."),
    ] = 64,
    damping: Annotated[float, Option(help="Added to the diagonal of the Fisher matrix.")] = 1e-5,
    shrinkage: Annotated[float, Option(help="Share of its off-diagonals to drop, 0 to 1.")] = 0.0,
    rounds: Annotated[int, Option(min=1, help="Remove in so many rounds, each with gradients of its own.")] = 1,
    parts: Annotated[int, Option(min=1, help="Choose and update so many times in a round.")] = 4,
    pattern: Annotated[
        str, Option(help="unstructured, N:M (at most N of M neighbours stay) such as 2:4, block:RxC, or channel.")
    ] = "unstructured",
    scope: Annotated[Scope, Option(help="Rank all weights together, or those of each layer.")] = Scope.all,
    targets: Annotated[
        str | None,
        Option(help="Names of weights or layers to prune, such as 'layer1.*,fc'. [default: linear, convolution, ...]"),
    ] = None,
    ignore: Annotated[str | None, Option(help="Names of weights or layers to leave alone.")] = None,
    batch_norm: Annotated[
        bool, Option("--batch-norm", help="Estimate the statistics of batch norm again after it, for every method.")
    ] = False,
    finetune: Annotated[
        int, Option(min=0, metavar="EPOCHS", help="Train so long after it, with AdamW and the masks held.")
    ] = 0,
    seeds: Annotated[str, Option(help="How many seeds each method runs, or which: 0,1,2.")] = "1",
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="The first seed, where --seeds is a number.")] = 0,
    device: Annotated[DeviceName, Option(help="Where to compute.")] = DeviceName.auto,
    threads: Threads = None,
    out: Out = None,
    resume: Annotated[bool, Option("--resume", help="Continue what is in --out (or the newest of runs/).")] = False,
):
    """Prune one dense network by several methods: tables, pictures, a report, the pruned network and its masks.

    \b
    Examples:
      quadric prune
      quadric prune --sparsity 0.8,0.9,0.95 --rounds 8 --seeds 3
      quadric prune --task cifar10 --data-dir data --checkpoint resnet20.safetensors --sparsity 0.9 --rounds 8
      quadric prune --methods magnitude,joint --pattern 2:4 --batch-norm --out runs/sparse
      quadric prune --model mynet:build --checkpoint mynet.safetensors --sparsity 0.9 --block-size 2000
      quadric prune --out runs/sparse --resume
    """  # noqa: D301
    import torch

    from quadric.lab.display import Display
    from quadric.lab.prune import (
        METHODS,
        Pruning,
        check_pruning,
        count_units,
        run_prune,
        subject_of_task,
        subject_of_user,
    )
    from quadric.lab.subjects import read_weights
    from quadric.lab.train import choose_device, make_reproducible

    theirs = model is not None and ":" in model
    if theirs:
        refuse_task_options(
            str(model),
            {
                "--task": task, "--text": text, "--data-dir": data_dir, "--batch-size": batch_size,
                "--epochs": epochs, "--finetune": finetune or None,
            },
        )  # fmt: skip
    if checkpoint is not None and epochs:
        raise LabError("--checkpoint and --epochs both say which parameters to take; leave one out")
    if not 0 < damping < math.inf:
        raise LabError(f"--damping must be a positive number, not {damping:g}; the default is 1e-5")
    if not 0 <= shrinkage <= 1:
        raise LabError(f"--shrinkage must be between 0 and 1, not {shrinkage:g}")
    shares = _sparsities(sparsity, pattern)
    names = _listed("--methods", methods)
    for name in names:
        if name not in METHODS:
            raise LabError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
    every = _seeds(seeds, seed)
    check_threads(threads)
    where = choose_device(device.value)
    weights = None if checkpoint is None else read_weights(checkpoint, "--checkpoint")
    console = wide_console()
    data = None if theirs else chosen_task(task or "digits", text, data_dir, console)
    if chosen := threads or (data and data.threads):
        torch.set_num_threads(chosen)
    make_reproducible(where)
    if data is not None and checkpoint is None and epochs is None:
        epochs = data.epochs
    plan = Pruning(
        task=data and data.name,
        model=str(model) if data is None else model or data.model,
        checkpoint=None if checkpoint is None else str(checkpoint),
        epochs=epochs or 0,
        methods=names,
        sparsities=shares,
        seeds=every,
        batch_size=None if data is None else min(batch_size or data.batch_size, len(data.train[0])),
        options={
            "num_grads": num_grads,
            "block_size": block_size,
            "damping": damping,
            "rounds": rounds,
            "parts": parts,
            "shrinkage": shrinkage,
            "per_example": per_example,
            "pattern": pattern,
            "scope": scope.value,
            "targets": None if targets is None else list(_listed("--targets", targets)),
            "ignore": None if ignore is None else list(_listed("--ignore", ignore)),
        },
        batch_norm=batch_norm,
        finetune=finetune,
        device=where.type,
        threads=torch.get_num_threads(),
    )
    subject = subject_of_user(plan, weights, where) if data is None else subject_of_task(data, plan, weights, where)
    check_pruning(plan, subject)
    words: list[str] = ctx.obj
    folder = open_folder(out, "prune", plan.model if data is None else f"{plan.task}-{plan.model}", plan, resume, words)
    display = Display(console, count_units(plan, data))
    try:
        run_prune(plan, subject, folder, display, command=shlex.join(["quadric", *words]))
    except KeyboardInterrupt:
        raise _unfinished("interrupted", words, folder, out, code=130) from None
    except (BrokenPipeError, SystemExit):  # `quadric prune | head`, which rich answers with SystemExit
        _give_up_stdout()
        raise _unfinished("who read the output has left", words, folder, out, code=1) from None


def start(
    act: Callable[..., Any],
    ctx: typer.Context,
    common: Common,
    *,
    optimizers: tuple[str, ...],
    settings: dict[str, dict[str, Any]],
    seeds: tuple[int, ...],
    rates: tuple[float, ...] = (),
    tune_epochs: int | None = None,
    checkpoint_steps: int = 0,
) -> None:
    """Load the task, check everything, open the folder, and only then act.

    Raises:
        LabError: When a value is impossible, or the person interrupts.
    """
    import torch

    from quadric.lab.display import Display
    from quadric.lab.race import Race, Track, check_race, count_steps
    from quadric.lab.train import choose_device

    for option, value in (("--target", common.target), ("--checkpoint-seconds", common.checkpoint_seconds)):
        if value is not None and not math.isfinite(value):
            raise LabError(f"{option} must be a finite number, not {value}")
    check_threads(common.threads)
    device = choose_device(common.device.value)
    console = wide_console()
    task = chosen_task(common.task, common.text, common.data_dir, console)
    if common.examples is not None:
        task = task.first(common.examples)
    if common.augment and task.kind != "image":
        raise LabError(f"--augment is for images with labels, and {task.name} has none; leave it out")
    if threads := common.threads or task.threads:
        torch.set_num_threads(threads)
    epochs = common.epochs or task.epochs
    plan = Race(
        task=task.name,
        model=common.model or task.model,
        optimizers=optimizers,
        settings=settings,
        seeds=seeds,
        epochs=epochs,
        batch_size=min(common.batch_size or task.batch_size, len(task.train[0])),
        schedule=common.schedule.value,
        warmup=common.warmup,
        augment=common.augment,
        examples=common.examples,
        rates=rates,
        tune_epochs=tune_epochs or epochs,
        target=task.target if common.target is None else common.target,
        device=device.type,
        threads=torch.get_num_threads(),
    )
    check_race(plan, task)
    words: list[str] = ctx.obj
    folder = open_folder(common.out, str(ctx.info_name), f"{plan.task}-{plan.model}", plan, common.resume, words)
    display = Display(console, count_steps(plan, task))
    track = Track(task, folder, display, common.checkpoint_seconds, checkpoint_steps)
    try:
        act(plan, track, command=shlex.join(["quadric", *words]))
    except KeyboardInterrupt:
        raise _unfinished("interrupted", words, folder, common.out, code=130) from None
    except (BrokenPipeError, SystemExit):  # `quadric race | head`, which rich answers with SystemExit
        _give_up_stdout()
        raise _unfinished("who read the output has left", words, folder, common.out, code=1) from None


def refuse_task_options(model: str, given: Mapping[str, Any]) -> None:
    """Refuse options that say something of a task where the model is a person's own.

    Args:
        model: ``--model``.
        given: Values of such options; None where one was not given.

    Raises:
        LabError: When there is one.
    """
    for option, value in given.items():
        if value is not None:
            raise LabError(f"{option} belongs to a built-in task, and --model {model} brings its own; leave it out")


def check_threads(threads: int | None) -> None:
    """Refuse more threads than there are cores.

    Raises:
        LabError: When there are not so many.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise LabError(f"--threads {threads} is more than this machine's {cores} cores; give at most {cores}")


def wide_console() -> Console:
    """Standard output: a file or a pipe has no width of its own, and gets one wide enough for the tables."""
    return Console(width=None if sys.stdout and sys.stdout.isatty() else 100)


def chosen_task(name: str, text: Path | None, data_dir: Path | None, console: Console) -> "Task":
    """The task of ``--task``, or of ``--text`` where that is given."""
    from quadric.lab.tasks import load_task, text_task_from

    return load_task(name, data_dir, say=console.print) if text is None else text_task_from(text)


def open_folder(
    out: Path | None, kind: str, name: str, plan: "Race | Pruning", resume: bool, words: Sequence[str]
) -> Path:
    """The folder of something long: a new one with its configuration, or the one to continue.

    Args:
        out: ``--out``; None takes runs/KIND-NAME, with a number where that is taken.
        kind: "race", "train" or "prune".
        name: Of the task and model.
        plan: Its configuration.
        resume: ``--resume``.
        words: The command line after ``quadric``, remembered for ``--resume``.

    Raises:
        LabError: When the folder holds something else, or there is nothing to continue.
    """
    from quadric.lab.checkpoint import read_json, write_json

    config = json.loads(json.dumps({"command": kind, "quadric": version("quadric"), **asdict(plan)}))
    folder = out or _folder_under_runs(f"{kind}-{name}".replace(":", "-"), resume)
    file = folder / "config.json"
    if not file.exists():
        if resume:
            raise LabError(f"there is nothing to resume in {folder}; start it without --resume")
        refuse_taken(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot make the folder {folder} ({error.strerror}); choose another --out") from error
        write_json(file, {"arguments": list(words[1:]), **config}, again="repeat")
        return folder
    before = read_json(file, remedy="choose another --out")
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


def refuse_taken(folder: Path) -> None:
    """Refuse a folder for new files that is not there to be filled, or cannot be made.

    Raises:
        LabError: When there is something in it, it is none, or what it would stand in cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} exists and is not a run's folder; choose another --out")
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "Permission denied" if nearest.is_dir() else "Not a directory"
        raise LabError(f"cannot make the folder {folder} ({why}); choose another --out")


def _folder_under_runs(name: str, resume: bool) -> Path:
    number, folder = 1, Path("runs") / name
    newest = folder
    while folder.exists():
        newest, number = folder, number + 1
        folder = Path("runs") / f"{name}-{number}"
    return newest if resume else folder


def _names(text: str) -> tuple[str, ...]:
    from quadric.lab.optimizers import find_entrant

    names = _listed("--optimizers", text)
    for name in names:
        find_entrant(name)
    return names


def _listed(option: str, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if len(set(names)) < len(names) or not names:
        raise LabError(f"{option} takes different names with commas between them, not {text!r}")
    return names


def _sparsities(text: str | None, pattern: str) -> tuple[float, ...]:
    # Rising; with N of M neighbours at most, 1 - N/M of them are gone at least, and that is what it asks for.
    count = "([1-9][0-9]*)"
    shape = re.fullmatch(f"unstructured|channel|{count}:{count}|block:{count}x{count}", pattern)
    if shape is None:
        raise LabError(
            f"--pattern is unstructured, N:M such as 2:4, block:RxC such as block:4x1, or channel, not {pattern!r}"
        )
    least = 1 - int(shape[1]) / int(shape[2]) if shape[1] else 0.0
    if shape[1] and least <= 0:
        raise LabError(f"--pattern N:M keeps N of M neighbours, and {pattern} keeps all; give the smaller number first")
    if text is None:
        return (least,) if least else (0.5, 0.6, 0.7, 0.8, 0.9)
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise LabError(f"--sparsity takes shares between 0 and 1, such as 0.9 or 0.5,0.9, not {text!r}")
    if shares[0] < least - 1e-9:
        raise LabError(
            f"--pattern {pattern} removes {least:g} of the weights at least; --sparsity cannot be {shares[0]:g}"
        )
    return tuple(shares)


def _seeds(text: str, first: int) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and 0 < numbers[0] <= 1000:
        return tuple(range(first, first + numbers[0]))
    if len(numbers) < 2 or len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) > MAX_SEED:
        raise LabError(f"--seeds takes a number of seeds up to 1000, or different seeds such as 0,1,2, not {text!r}")
    return tuple(numbers)


def _unfinished(why: str, words: Sequence[str], folder: Path, out: Path | None, code: int) -> LabError:
    words = [word for word in words if word != "--resume"]
    if out is None:
        words += ["--out", str(folder)]
    return LabError(f"{why}; continue with: {shlex.join(['quadric', *words, '--resume'])}", code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; every failure becomes one line on stderr."""
    try:
        words = _with_number_of_rates(_with_remembered(arguments))
        status: Any = app(args=words, prog_name="quadric", standalone_mode=False, obj=list(arguments))
        return status if isinstance(status, int) else 0
    except LabError as error:
        return _complain(str(error), error.code)
    except UsageError as error:
        told = getattr(error, "format_message", error.__str__)().rstrip(".")
        command = f"{arguments[0]} " if arguments[0] in ("race", "train", "curvature", "prune") else ""
        return _complain(f"{told}; see quadric {command}--help", 2)
    except MemoryError:
        return _complain("the memory is used up; try a smaller --batch-size, model or window", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted before anything was saved", 130)
    except OSError as error:
        _give_up_stdout()
        return _complain(f"the system refuses ({error}); put that right, then repeat, with --resume if a run began", 1)


def _give_up_stdout() -> None:
    # What is still buffered would fail once more, and louder, when Python ends.
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_remembered(arguments: Sequence[str]) -> list[str]:
    # `quadric race --out FOLDER --resume` need not repeat the options: those the folder was started with come first,
    # the given ones after them win, and open_folder answers what contradicts.
    words = list(arguments)
    places = [i for i, word in enumerate(words) if word == "--out" or word.startswith("--out=")]
    if "--resume" not in words or not places:
        return words
    out = words[places[-1]].partition("=")[2] or "".join(words[places[-1] + 1 : places[-1] + 2])
    try:
        remembered = [str(word) for word in json.loads((Path(out) / "config.json").read_text())["arguments"]]
    except (OSError, ValueError, KeyError, TypeError):
        return words  # open_folder says what is wrong with the folder
    return [words[0], *remembered, *words[1:]]


def _with_number_of_rates(arguments: Sequence[str]) -> list[str]:
    # `--tune` may stand alone, which typer has no word for.
    words = list(arguments)
    for i, word in enumerate(words):
        if word == "--tune" and (i + 1 == len(words) or words[i + 1].startswith("--")):
            words[i] = f"--tune={DEFAULT_RATES}"
    return words


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"quadric: {line}" if code == 130 else f"quadric: error: {line}", file=sys.stderr)
    return code
