"""Models that a command looks at: a person's own, one with parameters from a file, one trained on the spot."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quadric.lab import LabError, checkpoint
from quadric.lab.display import Display
from quadric.lab.optimizers import find_entrant
from quadric.lab.race import format_metric
from quadric.lab.tasks import Task
from quadric.lab.train import Plan, Progress, evaluate, train, training_steps

OPTIMIZER = "adamw"  # trains before anything is looked at: a stranger to every estimate


def made_by_user(place: str, seed: int, example: str) -> Any:
    """What a function of the user's returns.

    Args:
        place: ``module:function``; the module is looked up in the current folder first.
        seed: Set before the function is called.
        example: What the function has to do, for the errors.

    Raises:
        LabError: When there is no such function, or it fails.
    """
    module_name, _, function_name = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look where the person stands
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever stands at the top of a person's module
        raise LabError(f"--model {place}: cannot import {module_name} ({told(error)}); put it right") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise LabError(f"--model {place}: {module_name} has no function {function_name!r}; it has to {example}")
    torch.manual_seed(seed)
    try:
        return function()
    except (Exception, SystemExit) as error:  # the same of its function
        raise LabError(f"--model {place}: the function fails ({told(error)}); it has to {example}") from error


def refuse_lazy(place: str, model: nn.Module) -> None:
    """Refuse a model some of whose parameters have no shape yet.

    Raises:
        LabError: When it is one.
    """
    if any(is_lazy(p) for p in model.parameters()):
        raise LabError(f"--model {place}: its lazy layers have no shape yet; call the model once before returning it")


@dataclass(frozen=True)
class Weights:
    """A model's state out of a file.

    Args:
        file: Where it is from.
        tensors: By name, on the CPU.
    """

    file: Path
    tensors: dict[str, Tensor]


def read_weights(path: Path, option: str) -> Weights:
    """Read a model's state; nothing is unpickled.

    Args:
        path: A file of safetensors, a ``checkpoint.pt`` of ``quadric train``, or the folder which that wrote.
        option: What the path was given as.

    Raises:
        LabError: When there is no such file, or it holds no parameters.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    remedy = f"give {option} the folder or file that quadric train wrote, or a safetensors file of the state dict"
    if not file.exists():
        raise LabError(f"there is no {file}; {remedy}")
    try:
        return Weights(file, checkpoint.load(file)["model"] if file.suffix == ".pt" else load_file(file))
    except (OSError, KeyError, SafetensorError, LabError) as error:
        why = "it is damaged or not quadric's" if isinstance(error, LabError) else error
        raise LabError(f"{file} holds no parameters ({why}); {remedy}") from error


def put_weights(model: nn.Module, weights: Weights, remedy: str) -> None:
    """Put a state into a model, whole or not at all.

    A name that the file lacks is taken from another name of the same tensor, as files keep tied weights once.

    Args:
        model: The network it is of.
        weights: Its state.
        remedy: What to do where they are of another network.

    Raises:
        LabError: When they are.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {**weights.tensors}
    known = {_place(own[name]): given[name] for name in own if name in given}
    given |= {name: known[_place(value)] for name, value in own.items() if name not in given and _place(value) in known}
    if missing := [name for name in own if name not in given]:
        why = f"{missing[0]} is missing"
    elif spare := [name for name in given if name not in own]:
        why = f"{spare[0]} is not in this one"
    elif other := [name for name in own if given[name].shape != own[name].shape]:
        why = f"{other[0]} is {_shape(given[other[0]])} there and {_shape(own[other[0]])} here"
    else:
        model.load_state_dict(given, strict=False)  # what is no tensor stays as the model has it
        return
    raise LabError(f"the parameters in {weights.file} are of another network ({why}); {remedy}")


def trained(
    task: Task, model: str, epochs: int, seed: int, device: torch.device, display: Display
) -> tuple[nn.Module, str]:
    """A network of the lab after some epochs, and a few words on how it got there.

    Args:
        task: On what.
        model: One of ``MODELS``.
        epochs: With AdamW at its default rate.
        seed: Of the initial parameters and the order of the examples.
        device: Where.
        display: Shows the training.

    Raises:
        LabError: When the training diverges.
        KeyboardInterrupt: When the person asked to stop.
    """
    entrant = find_entrant(OPTIMIZER)
    plan = Plan(OPTIMIZER, entrant.lr, {}, model, epochs, min(task.batch_size, len(task.train[0])), seed=seed)

    def watch(progress: Progress, loss: float) -> bool:
        return display.step(progress.step, f"loss {loss:.3f}")

    steps = training_steps(task, task.batch_size, epochs)
    display.begin(f"training, {entrant.name}", steps)
    progress, network, _ = train(plan, task, device, watch=watch)
    display.end(steps)
    if progress.lost:
        raise LabError(
            f"the training was lost after step {progress.step}; use fewer --epochs or another --seed", code=1
        )
    metric = format_metric(task, evaluate(network, task.to(device))[1])
    return network, f"after {epochs} {'epoch' if epochs == 1 else 'epochs'} of {entrant.name} (test {metric})"


def told(error: BaseException) -> str:
    """An error of anybody's in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def kind(value: Any) -> str:
    """What something is, for a person who expected something else."""
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _place(value: Tensor) -> tuple[Any, ...]:
    # Where a tensor lies; one without numbers lies nowhere, and is like no other.
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else (id(value),)


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "a number"
