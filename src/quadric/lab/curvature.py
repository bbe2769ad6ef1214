"""What ``quadric curvature`` does: get a model and a batch, verify every estimate on them, write it all down."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import quadric
from quadric.lab import LabError, card, checkpoint
from quadric.lab.display import Display
from quadric.lab.models import build_model
from quadric.lab.subjects import kind, made_by_user, put_weights, read_weights, refuse_lazy, told, trained
from quadric.lab.tasks import Task
from quadric.lab.train import epoch_order

UNITS = 1000  # of the progress bar, for everything after the training
EXAMPLE = "return model, loss_fn, batch with loss_fn(model, batch) -> scalar loss"


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        name: Of the model and where it comes from, for a headline.
        description: The same in a sentence.
        model: In the mode in which the loss is to be computed.
        loss_fn: (model, batch) → scalar loss.
        batch: Tensors in tuples, lists or dictionaries.
    """

    name: str
    description: str
    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any


@dataclass(frozen=True)
class Options:
    """What :func:`quadric.verify` takes from the command line."""

    probes: int
    entries: int
    seed: int
    fallback: Literal["gauss_newton", "zero"] | None
    dtype: str | None


def subject_of_task(
    task: Task,
    model: str,
    *,
    batch_size: int,
    epochs: int,
    weights: Path | None,
    seed: int,
    device: torch.device,
    display: Display,
) -> Subject:
    """A network of the lab on the first batch of its task, fresh, trained or with parameters from a file.

    Args:
        task: Its data.
        model: One of ``MODELS``.
        batch_size: Examples in the batch.
        epochs: To train first, with AdamW at its default rate; 0 trains nothing.
        weights: A file or folder that ``quadric train`` wrote, or None.
        seed: Of the initial parameters and the order of the examples.
        device: Where.
        display: Shows the training.

    Raises:
        LabError: When the parameters do not fit, or the training diverges.
    """
    torch.manual_seed(seed)
    network = build_model(model, task).to(device)
    state = "as initialised"
    if weights is not None:
        put_weights(network, read_weights(weights, "--weights"), "give the --task and --model of it")
        state = f"with the parameters of {weights}"
    elif epochs:
        network, state = trained(task, model, epochs, seed, device, display)
    inputs, targets = task.train
    rows = epoch_order(seed, epochs, len(inputs))[:batch_size]
    batch = task.prepare(inputs[rows].to(device)), targets[rows].to(device)
    parameters = sum(p.numel() for p in network.parameters())
    return Subject(
        name=f"{model} on {task.name}",
        description=f"{task.title}: {model} with {parameters:,} parameters, {state}, on {len(rows)} examples",
        model=network.train(),
        loss_fn=lambda network, batch: task.loss(network(batch[0]), batch[1]),
        batch=batch,
    )


def subject_of_user(place: str, seed: int, device: torch.device) -> Subject:
    """What a function of the user's returns: ``module:function`` gives (model, loss_fn, batch).

    Args:
        place: The module, looked up in the current folder first, and the function in it.
        seed: Set before the function is called.
        device: Where to put the model and the tensors of the batch.

    Raises:
        LabError: When there is no such function, it fails, or it returns something else.
    """
    made = made_by_user(place, seed, EXAMPLE)
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module) or not callable(made[1]):
        raise LabError(f"--model {place}: the function returned {kind(made)}; it has to {EXAMPLE}")
    model, loss_fn, batch = made
    refuse_lazy(place, model)
    model = model.to(device)
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    parameters = sum(p.numel() for p in model.parameters())
    return Subject(
        name=place,
        description=f"{place}: {type(model).__name__} with {parameters:,} parameters",
        model=model,
        loss_fn=loss_fn,
        batch=batch,
    )


def compare(subject: Subject, options: Options, display: Display, *, command: str) -> dict[str, Any]:
    """Verify; return what card.json holds.

    Args:
        subject: What is looked at.
        options: How.
        display: Shows how far it is.
        command: The command line.

    Raises:
        LabError: When the estimates cannot be compared on this model.
        KeyboardInterrupt: When the person asked to stop.
    """
    started = time.strftime("%Y-%m-%d %H:%M")
    display.begin("comparing", UNITS)

    def watch(what: str, share: float) -> None:
        if display.step(round(UNITS * share), what):
            raise KeyboardInterrupt

    try:
        found = quadric.verify(
            subject.model,
            subject.loss_fn,
            subject.batch,
            probes=options.probes,
            entries=options.entries,
            seed=options.seed,
            fallback=options.fallback,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            watch=watch,
        )
    except quadric.UnsupportedOperation as error:
        raise LabError(f"{subject.name}: {error}; on this command line: --fallback gauss_newton or zero") from error
    except Exception as error:  # the model and its loss are anybody's: whatever they raise is the answer
        raise LabError(f"{subject.name}: {told(error)}") from error
    display.end(UNITS)
    device = next(subject.model.parameters()).device
    return {
        "quadric": version("quadric"),
        "command": command,
        "subject": subject.name,
        "description": subject.description,
        "options": asdict(options),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "started": started,
        },
        "card": found.to_dict(),
    }


def write(results: dict[str, Any], folder: Path, display: Display) -> Path:
    """Write card.json, the pictures and the page, print the table, and return the page's path.

    Args:
        results: What :func:`compare` returned.
        folder: Where to write.
        display: Where to print.
    """
    checkpoint.write_json(folder / "card.json", results, again="repeat")
    results = checkpoint.read_json(folder / "card.json")  # what a reader of the file sees: no NaN, lists for tuples
    page = card.write_card(results, folder)
    display.console.print(card.card_table(results, display.console.width))
    display.say(f"report: {page}")
    return page
