"""Who can enter a race: torch's optimizers and quadric's, built the same way and tuned on the same grid."""

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import quadric
from quadric.lab import LabError


class MuonAdamW:
    """torch's Muon on the hidden weight matrices, AdamW on everything else, under one learning rate.

    Embeddings and the output layer go to AdamW, as Muon's author advises; a convolution's weight is the matrix
    (outputs, inputs x height x width). A model without hidden matrices gives its output layer to Muon. The rate fits
    both because Muon's step is scaled to the size of AdamW's (``match_rms_adamw``).

    Args:
        model: The network.
        lr: Learning rate of both.
        momentum: Muon's.
        ns_steps: Newton-Schulz iterations of Muon.
        betas: AdamW's.
        weight_decay: Decoupled, for both.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        outer |= {id(linears[-1].weight)} if len(linears) > 0 else set()
        parameters = list(model.parameters())
        hidden = [p for p in parameters if p.ndim >= 2 and id(p) not in outer]
        hidden = hidden or [p for p in parameters if p.ndim >= 2]
        chosen = {id(p) for p in hidden}
        # torch's Muon takes two axes only: it is given views, which share their storage with the parameters.
        self.views = [(p, p.detach().view(p.shape[0], -1)) for p in hidden]
        self.muon = torch.optim.Muon(
            [view for _, view in self.views],
            lr=lr,
            momentum=momentum,
            ns_steps=ns_steps,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for p in parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both; a schedule that sets their ``lr`` drives both."""
        return self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter, view in self.views:
            parameter.grad = view.grad = None
        self.adamw.zero_grad()

    def step(self) -> None:
        """One step of each."""
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both states."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


@dataclass(frozen=True)
class Entrant:
    """An optimizer that can race.

    Args:
        name: For people.
        ours: Whether it is quadric's.
        optimizer: A class whose first argument is the parameters, or the ``model`` where it needs to know the layers;
            its keyword arguments are what ``--set`` may change.
        lr: Learning rate where nothing is tuned.
        hyper: Hyper-parameters that differ from the class's defaults.
        samples_labels: Whether it observes a loss at labels sampled from the model in each step.
    """

    name: str
    ours: bool
    optimizer: Callable[..., Any]
    lr: float
    hyper: dict[str, Any]
    samples_labels: bool = False

    def build(self, model: nn.Module, lr: float, hyper: Mapping[str, Any]) -> Any:
        """The optimizer of a model."""
        whole = "model" in inspect.signature(self.optimizer).parameters
        return self.optimizer(model if whole else model.parameters(), lr, **hyper)

    def settings(self) -> dict[str, Any]:
        """Every keyword argument of the optimizer and its value in a race, without the learning rate."""
        parameters = inspect.signature(self.optimizer).parameters
        names = [name for name in parameters if name not in ("params", "model", "lr", "maximize")]
        return {name: self.hyper.get(name, parameters[name].default) for name in names}

    def described(self) -> dict[str, Any]:
        """The settings worth a line in a report: all of quadric's own, and what a rival of torch was given."""
        return dict(self.hyper) if self.optimizer.__module__.startswith("torch.") else self.settings()


# Its paper's. Without the clip, a step along directions outside the matrix would be lr / damping times the gradient.
GINGER = {"damping": 1e-5, "clip": 1.0}

# No weight decay anywhere: the race compares directions, and `--set adamw.weight_decay=0.01` gives it back.
ENTRANTS: dict[str, Entrant] = {
    "sgd": Entrant("SGD", False, torch.optim.SGD, 0.1, {"momentum": 0.9, "weight_decay": 0.0}),
    "adamw": Entrant("AdamW", False, torch.optim.AdamW, 1e-3, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
    "muon": Entrant("Muon", False, MuonAdamW, 3e-3, {}),
    "mfac": Entrant("M-FAC", True, quadric.MFAC, 1e-3, {}),
    "ginger": Entrant("Ginger", True, quadric.Ginger, 1e-3, GINGER),
    "ginger-sampled": Entrant("Ginger (sampled)", True, quadric.Ginger, 1e-3, GINGER, samples_labels=True),
    "adahesscale": Entrant("AdaHesScale", True, quadric.AdaHesScale, 1e-3, {}),
    "block-mean-adagrad": Entrant("Block mean AdaGrad", True, quadric.BlockMeanAdaGrad, 3e-2, {}),
}


def find_entrant(name: str) -> Entrant:
    """An entrant by its name on the command line.

    Raises:
        LabError: When there is none.
    """
    if name not in ENTRANTS:
        raise LabError(f"there is no optimizer {name!r}; choose from {', '.join(ENTRANTS)}")
    return ENTRANTS[name]


def check_rate(option: str, value: Any) -> None:
    """A learning rate is a positive number.

    Raises:
        LabError: When it is not.
    """
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise LabError(f"{option} must be a positive number, not {value}")


def parse_settings(texts: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read ``--set OPTIMIZER.KEY=VALUE`` options.

    Args:
        texts: The options.
        names: The optimizers of this run.

    Raises:
        LabError: When one is not of that form, or names an optimizer or key that is not there.

    Example:
        >>> parse_settings(["sgd.momentum=0.8", "sgd.nesterov=True"], ["sgd"])
        {'sgd': {'momentum': 0.8, 'nesterov': True}}
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, key = left.partition(".")
        if not (equals and dot and key and value):
            raise LabError(f"--set takes OPTIMIZER.KEY=VALUE, such as mfac.window=128, not {text!r}")
        if name not in settings:
            raise LabError(f"--set {text}: {name} is not in this run; its optimizers are {', '.join(settings)}")
        keys = ("lr", *find_entrant(name).settings())
        if key not in keys:
            raise LabError(f"--set {text}: {name} has no {key!r}; it has {', '.join(keys)}")
        try:
            settings[name][key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name][key] = value  # a word, such as bfloat16
        if key == "lr":
            check_rate(f"--set {name}.lr", settings[name][key])
    return settings


def build_optimizer(name: str, model: nn.Module, lr: float, overrides: Mapping[str, Any]) -> Any:
    """An optimizer on a model's parameters.

    Args:
        name: One of ``ENTRANTS``.
        model: On the device it will train on.
        lr: Learning rate.
        overrides: Hyper-parameters of ``--set``.

    Raises:
        LabError: When the optimizer refuses a value.
    """
    entrant = find_entrant(name)
    hyper = {**entrant.hyper, **overrides}
    for key in hyper:
        if key.endswith("dtype") and isinstance(hyper[key], str):
            dtype = getattr(torch, hyper[key], None)
            if not isinstance(dtype, torch.dtype):
                raise LabError(f"--set {name}.{key}: torch has no dtype {hyper[key]!r}; try float32 or bfloat16")
            hyper[key] = dtype
    try:
        return entrant.build(model, lr, hyper)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        given = ", ".join(f"{name}.{key}={value}" for key, value in overrides.items())
        reason = " ".join(str(error).split())
        raise LabError(f"{name} cannot be built ({reason}); change --set {given or name + '.KEY=VALUE'}") from error


def held_bytes(optimizer: object, model: nn.Module) -> int:
    """Bytes of all tensors an optimizer keeps, each storage once; parameters and gradients are not its own.

    Example:
        >>> model = nn.Linear(100, 1, bias=False)
        >>> held_bytes(torch.optim.SGD(model.parameters(), 0.1), model)
        0
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    own = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    not_its = {tensor.untyped_storage().data_ptr() for tensor in own}
    waiting: list[Any] = [optimizer]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType)) or inspect.isroutine(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in not_its:
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            waiting.extend(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            waiting.extend(thing)
        elif hasattr(thing, "__dict__"):
            waiting.extend(vars(thing).values())
    return sum(storages.values())
