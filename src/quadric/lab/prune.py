"""What ``quadric prune`` does: prune one dense network by every method to every sparsity, and judge them all alike.

Every run starts from the same dense weights, which are kept in the folder, and is a function of them, its method,
sparsity and seed. A finished run is a file, so that a command killed at any moment continues with the next one.
"""

import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import quadric
from quadric.lab import LabError, prune_page
from quadric.lab.checkpoint import read_json, write_atomically, write_json
from quadric.lab.display import Display
from quadric.lab.models import build_model
from quadric.lab.optimizers import build_optimizer, find_entrant
from quadric.lab.subjects import (
    OPTIMIZER,
    Weights,
    kind,
    made_by_user,
    put_weights,
    read_weights,
    refuse_lazy,
    told,
    trained,
)
from quadric.lab.tasks import Task
from quadric.lab.train import Plan, epoch_order, evaluate, make_reproducible, rate, training_steps
from quadric.pruning.patterns import find_pattern

UNITS = 1000  # of the progress bar, for a run
BATCH_NORM_BATCHES = 100  # at most, to estimate statistics from
EXAMPLE = "return model, loss_fn, batches[, evaluate] with loss_fn(model, batch) -> scalar loss"
# What a run may fail with and the next one need not: an operation without a rule, a matrix that cannot be factorised,
# no memory left. Anything else is wrong with what was asked for, and would be wrong with it in every run.
FAILURES = (RuntimeError, MemoryError, ArithmeticError)


@dataclass(frozen=True)
class Method:
    """A way to prune, as options of :func:`quadric.prune`."""

    curvature: Literal["fisher", "hessian_diagonal", "magnitude"]
    update: Literal["joint", "single", "none"]


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", "none"),
    "obd": Method("hessian_diagonal", "none"),
    "fisher": Method("fisher", "none"),
    "single": Method("fisher", "single"),
    "joint": Method("fisher", "joint"),
}


@dataclass(frozen=True)
class Pruning:
    """Everything that decides what a folder holds.

    Args:
        task: Name of the task; None where the model is the user's.
        model: One of ``MODELS``, or ``module:function``.
        checkpoint: A file of parameters, or None.
        epochs: Of the training before, where there is no file.
        methods: Keys of ``METHODS``.
        sparsities: Shares of the weights to remove, rising.
        seeds: Of the batches; the first one also of the dense network.
        batch_size: Examples in a batch of a task; None where the batches are the user's.
        options: Further arguments of :func:`quadric.prune`.
        batch_norm: Whether statistics of batch norm are estimated again after it.
        finetune: Epochs of training with the masks held.
        device: "cpu" or "cuda".
        threads: CPU threads; sums over more of them round differently.
    """

    task: str | None
    model: str
    checkpoint: str | None
    epochs: int
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    batch_size: int | None
    options: dict[str, Any]
    batch_norm: bool
    finetune: int
    device: str
    threads: int

    @property
    def kept(self) -> tuple[str, float, int]:
        """Method, sparsity and seed of the network that is written to files."""
        return "joint" if "joint" in self.methods else self.methods[-1], self.sparsities[-1], self.seeds[0]

    @property
    def batches(self) -> int:
        """How many batches the rounds of one run look at, one for a gradient."""
        return self.options["num_grads"] * self.options["rounds"]


@dataclass(frozen=True)
class Stream:
    """So many batches in an order that the seed decides; each look at it begins anew.

    Args:
        epoch: Gives the batches of an epoch.
        count: Of batches, over as many epochs as that takes.
    """

    epoch: Callable[[int], Iterator[Any]]
    count: int

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        return itertools.islice(itertools.chain.from_iterable(map(self.epoch, itertools.count())), self.count)

    def __len__(self) -> int:
        """How many there are."""
        return self.count


@dataclass(frozen=True)
class Subject:
    """What is pruned.

    Args:
        name: Of the model and where it comes from, for a headline.
        description: The same in a sentence.
        model: With the dense weights, unless it is to be trained first.
        loss_fn: (model, batch) → scalar loss.
        batches: (seed, epoch) → the batches of an epoch.
        judge: The metric of a model, and its loss where that is another.
        metric: Name, unit and direction of the metric.
        task: The built-in one, or None.
    """

    name: str
    description: str
    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: Callable[[int, int], Iterator[Any]]
    judge: Callable[[nn.Module], tuple[float, float | None]]
    metric: dict[str, Any]
    task: Task | None = None

    def stream(self, seed: int, count: int) -> Stream:
        """So many training batches in the order of a seed."""
        return Stream(lambda epoch: self.batches(seed, epoch), count)


def subject_of_task(task: Task, pruning: Pruning, weights: Weights | None, device: torch.device) -> Subject:
    """A network of the lab on its task, with parameters from a file or fresh.

    Args:
        task: Its data.
        pruning: Names the model.
        weights: Its parameters, or None.
        device: Where.

    Raises:
        LabError: When the model cannot take such inputs, or the parameters are of another one.
    """
    torch.manual_seed(pruning.seeds[0])
    network = build_model(pruning.model, task).to(device)
    if weights is not None:
        put_weights(network, weights, "give the --task and --model of it")
    task = task.to(device)
    inputs, targets = task.train
    size = min(pruning.batch_size or task.batch_size, len(inputs))

    def batches(seed: int, epoch: int) -> Iterator[Any]:
        for rows in epoch_order(seed, epoch, len(inputs)).to(device).split(size):
            if len(rows) == size:
                yield task.prepare(inputs[rows]), targets[rows]

    def judge(network: nn.Module) -> tuple[float, float | None]:
        loss, metric = evaluate(network, task)
        return metric, loss

    parameters = sum(p.numel() for p in network.parameters())
    return Subject(
        name=f"{pruning.model} on {task.name}",
        description=f"{task.title}: {pruning.model} with {parameters:,} parameters, {len(inputs):,} training examples, "
        f"{len(task.test[0]):,} test examples",
        model=network,
        loss_fn=lambda network, batch: task.loss(network(batch[0]), batch[1]),
        batches=batches,
        judge=judge,
        metric={
            "name": task.metric.name,
            "unit": task.metric.unit,
            "higher_is_better": task.metric.higher_is_better,
        },
        task=task,
    )


def subject_of_user(pruning: Pruning, weights: Weights | None, device: torch.device) -> Subject:
    """What a function of the user's returns: ``module:function`` gives (model, loss_fn, batches[, evaluate]).

    Of the batches as many are read as the gradients of a run and the judgement take. Without ``evaluate`` every fifth
    of them is held back, and the loss on these is the judgement.

    Args:
        pruning: Names the module and the function in it.
        weights: Parameters of the model, or None.
        device: Where to put the model and the tensors of the batches.

    Raises:
        LabError: When there is no such function, it fails, it returns something else, or the parameters are of another
            model.
    """
    place = pruning.model
    made = made_by_user(place, pruning.seeds[0], EXAMPLE)
    fits = isinstance(made, tuple) and len(made) in (3, 4) and isinstance(made[0], nn.Module)
    if not fits or not all(callable(part) for part in (made[1], *made[3:])):
        raise LabError(f"--model {place}: the function returned {kind(made)}; it has to {EXAMPLE}")
    model, loss_fn, given, *rest = made
    refuse_lazy(place, model)
    held_apart = not rest
    try:
        kept = list(itertools.islice(iter(given), pruning.batches * (5 if held_apart else 4) // 4))
    except Exception as error:  # a loader of anybody's
        raise LabError(
            f"--model {place}: its batches cannot be read ({told(error)}); they have to be an iterable"
        ) from error
    training = [batch for i, batch in enumerate(kept) if not held_apart or i % 5 < 4]
    held = [batch for i, batch in enumerate(kept) if held_apart and i % 5 == 4]
    if not training or (held_apart and not held):
        least = 5 if held_apart else 1
        why = "a fifth is held back to judge by" if held_apart else "gradients need one at least"
        raise LabError(
            f"--model {place}: it gave {len(kept)} batches, and {why}; give {least} or more"
            + (", or return evaluate" if held_apart else "")
        )
    model = model.to(device)
    if weights is not None:
        put_weights(model, weights, "give the --checkpoint of this model")

    def here(batch: Any) -> Any:
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)

    def batches(seed: int, epoch: int) -> Iterator[Any]:
        return (here(training[i]) for i in epoch_order(seed, epoch, len(training)).tolist())

    def held_loss(model: nn.Module) -> tuple[float, float | None]:
        return math.fsum(float(loss_fn(model, here(batch)).detach()) for batch in held) / len(held), None

    def score(model: nn.Module) -> tuple[float, float | None]:
        value = rest[0](model)
        try:
            return float(value.detach() if isinstance(value, Tensor) else value), None
        except (TypeError, ValueError, RuntimeError) as error:
            raise LabError(f"--model {place}: evaluate returned {kind(value)}; it has to return a number") from error

    parameters = sum(p.numel() for p in model.parameters())
    judged = f"judged on {len(held)} batches held back" if held_apart else "judged by its own function"
    return Subject(
        name=place,
        description=f"{place}: {type(model).__name__} with {parameters:,} parameters, {len(training)} batches for "
        f"gradients, {judged}",
        model=model,
        loss_fn=loss_fn,
        batches=batches,
        judge=held_loss if held_apart else score,
        metric={
            "name": "loss on held-back batches" if held_apart else "score",
            "unit": "",
            "higher_is_better": not held_apart,
        },
    )


def check_pruning(pruning: Pruning, subject: Subject) -> None:
    """Refuse what the model cannot be asked for, before any work.

    Raises:
        LabError: When there is nothing to prune, the pattern or a name fits no weight, or statistics of batch norm are
            to be estimated that it does not keep.
    """
    options = pruning.options
    try:
        find_pattern(
            options["pattern"], options["scope"], pruning.sparsities[0], subject.model, options["targets"],
            options["ignore"],
        )  # fmt: skip
    except ValueError as error:
        raise LabError(f"{subject.name}: {error}") from error
    norms = (m for m in subject.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)
    if pruning.batch_norm and next(norms, None) is None:
        raise LabError(f"{subject.name} keeps no statistics that --batch-norm could estimate again; leave it out")


def count_units(pruning: Pruning, task: Task | None) -> int:
    """Units of the progress bar of everything there is to do."""
    runs = len(pruning.methods) * len(pruning.sparsities) * len(pruning.seeds)
    before = 0 if task is None else training_steps(task, task.batch_size, pruning.epochs)
    after = 0 if task is None else training_steps(task, task.batch_size, pruning.finetune)
    return before + runs * (UNITS + after)


def run_prune(pruning: Pruning, subject: Subject, folder: Path, display: Display, *, command: str) -> Path:
    """Prune by every method to every sparsity, write tables, pictures and networks, and return the page's path.

    Args:
        pruning: What to do; whatever of it is finished in the folder is not repeated.
        subject: To what.
        folder: Where its files are.
        display: Where progress is shown.
        command: The command line.

    Raises:
        LabError: When something is wrong with the options or the model, or no run finished.
        KeyboardInterrupt: When the person asked to stop.
    """
    started = time.strftime("%Y-%m-%d %H:%M")
    device = torch.device(pruning.device)
    make_reproducible(device)
    with display.live():
        dense, tensors = _dense(pruning, subject, folder, device, display)
        display.say(f"dense: {_summary(subject, dense)}")
        plans: list[str] = []  # of memory: the first is said, and those of other runs are like it
        runs: dict[str, list[dict[str, Any]]] = {key: [] for key in pruning.methods}
        for seed, sparsity, key in itertools.product(pruning.seeds, pruning.sparsities, pruning.methods):
            runs[key].append(_finished(pruning, subject, tensors, key, sparsity, seed, folder, display, plans))
    results = _describe(pruning, subject, dense, runs, command=command, started=started)
    write_json(folder / "results.json", results)
    results = read_json(folder / "results.json")  # what a reader of the file sees: no NaN, lists for tuples
    page = prune_page.write_page(results, folder)
    width = display.console.width
    display.console.print(prune_page.results_table(results, width), end="\n\n")
    if layers := prune_page.layers_table(results, width):
        display.console.print(layers, end="\n\n")
    if results["kept"] is not None:
        told = f"{results['kept']['method']} at {prune_page.percent(results['kept']['sparsity'])}"
        told += f", seed {results['kept']['seed']}" if len(pruning.seeds) > 1 else ""
        for file in results["kept"]["files"]:
            display.say(f"{told}: {folder / file}")
    display.say(f"report: {page}")
    errors = [run["error"] for given in runs.values() for run in given]
    if all(errors):
        raise LabError(f"no run finished ({errors[0]}); put that right or try other --methods", code=1)
    return page


def _dense(
    pruning: Pruning, subject: Subject, folder: Path, device: torch.device, display: Display
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # The weights that every run starts from, and how good they are; made once, read back by a command that resumes.
    file, note = folder / "dense.safetensors", folder / "dense.json"
    steps = 0 if subject.task is None else training_steps(subject.task, subject.task.batch_size, pruning.epochs)
    if not note.exists():
        state = "as its function returned it" if subject.task is None else "as initialised"
        if pruning.checkpoint is not None:
            state = f"with the parameters of {pruning.checkpoint}"
        elif pruning.epochs and subject.task is not None:
            network, state = trained(subject.task, pruning.model, pruning.epochs, pruning.seeds[0], device, display)
            subject.model.load_state_dict(network.state_dict())
        metric, loss = _judged(subject)
        write_atomically(file, lambda out: out.write(safetensors.torch.save(_tensors(subject.model))))
        write_json(note, {"state": state, "metric": metric, "loss": loss})
    else:
        display.end(steps)
    put_weights(subject.model, read_weights(file, "--out"), "choose another --out")
    return read_json(note, "state", "metric", "loss"), _tensors(subject.model, device)


def _finished(
    pruning: Pruning,
    subject: Subject,
    dense: dict[str, Tensor],
    key: str,
    sparsity: float,
    seed: int,
    folder: Path,
    display: Display,
    plans: list[str],
) -> dict[str, Any]:
    # The run that its file holds; carried out first where there is no such file.
    label = f"{key} at {prune_page.percent(sparsity)}" + (f", seed {seed}" if len(pruning.seeds) > 1 else "")
    path = folder / "runs" / f"{key}-{sparsity:g}-seed{seed}.json"
    after = 0 if subject.task is None else training_steps(subject.task, subject.task.batch_size, pruning.finetune)
    if not path.exists():
        display.begin(label, UNITS + after)
        try:
            run = _run(pruning, subject, dense, key, sparsity, seed, folder, display, plans)
        except FAILURES as error:
            display.say(f"{label}: failed, {told(error)}")
            display.end(UNITS + after)
            return {"sparsity": sparsity, "seed": seed, "error": told(error), "metric": None}
        write_json(path, run)
    display.end(UNITS + after)
    run = read_json(path, "sparsity", "seed", "error", "metric", "loss", "reached", "seconds", "layers")
    display.say(f"{label}: {_summary(subject, run)}, {run['seconds']:.1f} s")
    return run


def _run(
    pruning: Pruning,
    subject: Subject,
    dense: dict[str, Tensor],
    key: str,
    sparsity: float,
    seed: int,
    folder: Path,
    display: Display,
    plans: list[str],
) -> dict[str, Any]:
    def watch(what: str, share: float) -> None:
        if what.startswith("memory") and not plans:
            plans.append(what)
            display.say(what)
        if display.step(round(UNITS * share), what):
            raise KeyboardInterrupt

    model, method = subject.model, METHODS[key]
    model.load_state_dict(dense, strict=False)
    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        result = quadric.prune(
            model,
            sparsity,
            batches=subject.stream(seed, pruning.batches),
            loss_fn=subject.loss_fn,
            curvature=method.curvature,
            update=method.update,
            progress=watch,
            **pruning.options,
        )
        if pruning.batch_norm:
            count = min(BATCH_NORM_BATCHES, pruning.batches)
            quadric.reestimate_batch_norm(model, subject.stream(seed, count), subject.loss_fn)
        if pruning.finetune:
            _finetune(pruning, subject, result, seed, display)
    except (*FAILURES, LabError):
        raise
    except ValueError as error:  # a sentence with its remedy, where it is quadric's
        raise LabError(f"{subject.name}: {error}") from error
    except Exception as error:  # the model, its loss and its batches are anybody's: whatever they raise is the answer
        raise LabError(f"{subject.name}: {told(error)}") from error
    seconds = time.perf_counter() - started
    metric, loss = _judged(subject)
    if (key, sparsity, seed) == pruning.kept:
        masks = {name: mask.cpu().contiguous() for name, mask in result.masks.items()}
        for file, tensors in (("pruned.safetensors", _tensors(model)), ("masks.safetensors", masks)):
            content = safetensors.torch.save(tensors, metadata={"format": "pt"})  # one entry: their order is no order
            write_atomically(folder / file, lambda out, content=content: out.write(content))
    return {
        "sparsity": sparsity,
        "seed": seed,
        "error": None,
        "metric": metric,
        "loss": loss,
        "reached": result.sparsity,
        "loss_increase": result.loss_increase,
        "memory": None
        if (plan := result.memory) is None
        else {
            "gradients": plan.gradients,
            "by_block": plan.by_block,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": str(plan.device),
            "window_bytes": plan.window_bytes,
        },
        "seconds": seconds,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "weights": layer.weights,
                "removed": layer.removed,
            }
            for layer in result.layers
        ],
        "left_alone": dict(result.left_alone),
    }


def _finetune(pruning: Pruning, subject: Subject, result: Any, seed: int, display: Display) -> None:
    # The masks stay; everything else is as in the training before.
    assert subject.task is not None
    task, model = subject.task, subject.model
    entrant = find_entrant(OPTIMIZER)
    size = min(task.batch_size, len(task.train[0]))
    plan = Plan(OPTIMIZER, entrant.lr, {}, pruning.model, pruning.finetune, size, seed=seed)
    optimizer = build_optimizer(OPTIMIZER, model, entrant.lr, {})
    handle = quadric.hold_masks(result.masks, optimizer, model)
    total = training_steps(task, size, pruning.finetune)
    inputs, targets = task.train
    orders = (epoch_order(seed, epoch, len(inputs)).to(inputs.device) for epoch in range(pruning.finetune))
    rows = (rows for order in orders for rows in order.split(size) if len(rows) == size)
    model.train()
    for step, chosen in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = entrant.lr * rate(step, total, plan)
        optimizer.zero_grad()
        loss = task.loss(model(task.prepare(inputs[chosen])), targets[chosen])
        loss.backward()
        optimizer.step()
        if display.step(UNITS + step + 1, f"fine-tuning, loss {loss.item():.3f}"):
            raise KeyboardInterrupt
    handle.remove()


def _judged(subject: Subject) -> tuple[float, float | None]:
    subject.model.eval()
    try:
        return subject.judge(subject.model)
    except LabError:
        raise
    except Exception as error:  # the judgement may be anybody's
        raise LabError(f"{subject.name}: {told(error)}") from error


def _tensors(model: nn.Module, device: torch.device | None = None) -> dict[str, Tensor]:
    # Copies, each in a memory of its own: tied weights are two names, and a file takes no shared memory.
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.detach().to(device or "cpu", copy=True).contiguous() for name, value in state.items()}


def _summary(subject: Subject, run: dict[str, Any]) -> str:
    metric = subject.metric
    words = f"{metric['name']} {prune_page.value(run['metric'], metric)}"
    return words if run["loss"] is None else f"{words}, test loss {prune_page.number(run['loss'], 4)}"


def _describe(
    pruning: Pruning,
    subject: Subject,
    dense: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    *,
    command: str,
    started: str,
) -> dict[str, Any]:
    key, sparsity, seed = pruning.kept
    done = [run for run in runs[key] if (run["sparsity"], run["seed"]) == (sparsity, seed) and run["error"] is None]
    return {
        "quadric": version("quadric"),
        "command": command,
        "subject": subject.name,
        "description": f"{subject.description}, {dense['state']}",
        "metric": subject.metric,
        "dense": dense,
        "sparsities": pruning.sparsities,
        "seeds": pruning.seeds,
        "batch_size": pruning.batch_size,
        "options": pruning.options,
        "batch_norm": pruning.batch_norm,
        "finetune": pruning.finetune,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if pruning.device == "cuda" else "cpu",
            "threads": pruning.threads,
            "started": started,
        },
        "methods": [{"key": key, **vars(METHODS[key]), "runs": runs[key]} for key in pruning.methods],
        "kept": {
            "method": key,
            "sparsity": sparsity,
            "seed": seed,
            "files": ["pruned.safetensors", "masks.safetensors"],
        }
        if done
        else None,
    }
