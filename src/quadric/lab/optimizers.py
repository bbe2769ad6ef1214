"""Who can enter a race: torch's optimizers and quadric's, built the same way and tuned on the same grid."""

import ast
import inspect
import math
import re
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


class ConditionedOptimizer:
    """Any optimizer, on weight gradients that :func:`quadric.isaac` conditions inside the backward.

    Args:
        conditioning: What :func:`quadric.isaac` returned for the model.
        optimizer: Of the same model's parameters.
        pooled: Whether the gradients are conditioned before the step and not in the backward.
    """

    def __init__(self, conditioning: Any, optimizer: Any, pooled: bool):
        self.conditioning, self.optimizer, self.pooled = conditioning, optimizer, pooled

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """One step of the optimizer."""
        if self.pooled:
            self.conditioning.condition_()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"conditioning": self.conditioning.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both states."""
        self.conditioning.load_state_dict(state["conditioning"])
        self.optimizer.load_state_dict(state["optimizer"])


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
        conditioned: Whether :func:`quadric.isaac`, whose keyword arguments ``--set`` may change too, conditions the
            gradients that it gets.
    """

    name: str
    ours: bool
    optimizer: Callable[..., Any]
    lr: float
    hyper: dict[str, Any]
    samples_labels: bool = False
    conditioned: bool = False

    def build(self, model: nn.Module, lr: float, hyper: Mapping[str, Any]) -> Any:
        """The optimizer of a model."""
        whole = "model" in inspect.signature(self.optimizer).parameters
        taken = keywords(quadric.isaac) if self.conditioned else {}
        own = {name: value for name, value in hyper.items() if name not in taken}
        optimizer = self.optimizer(model if whole else model.parameters(), lr, **own)
        if not self.conditioned:
            return optimizer
        given = {name: value for name, value in hyper.items() if name in taken}
        return ConditionedOptimizer(quadric.isaac(model, **given), optimizer, given.get("pooled", False))

    def settings(self) -> dict[str, Any]:
        """Every keyword argument of the optimizer and its value in a race, without the learning rate."""
        conditioning = keywords(quadric.isaac) if self.conditioned else {}
        return {**conditioning, **keywords(self.optimizer), **self.hyper}

    def described(self) -> dict[str, Any]:
        """The settings worth a line in a report: all of quadric's own, and what a rival of torch was given."""
        torchs = keywords(self.optimizer) if self.optimizer.__module__.startswith("torch.") else {}
        return {name: value for name, value in self.settings().items() if name in self.hyper or name not in torchs}


def keywords(taker: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments that ``--set`` may change, each with its default."""
    parameters = inspect.signature(taker).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("params", "model", "lr", "maximize")}


# Its paper's. Without the clip, a step along directions outside the matrix would be lr / damping times the gradient.
GINGER = {"damping": 1e-5, "clip": 1.0}

# In words, as `--set` takes it: one value serves the layers of every task.
ISAAC = {"damping": "relative(1.0)"}

# No weight decay anywhere: the race compares directions, and `--set adamw.weight_decay=0.01` gives it back.
ENTRANTS: dict[str, Entrant] = {
    "sgd": Entrant("SGD", False, torch.optim.SGD, 0.1, {"momentum": 0.9, "weight_decay": 0.0}),
    "adamw": Entrant("AdamW", False, torch.optim.AdamW, 1e-3, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
    "muon": Entrant("Muon", False, MuonAdamW, 3e-3, {}),
    "isaac": Entrant("ISAAC", True, quadric.ISAAC, 0.1, ISAAC),
    "isaac-adamw": Entrant(
        "ISAAC + AdamW",
        True,
        torch.optim.AdamW,
        1e-3,
        {**ISAAC, "betas": (0.9, 0.999), "weight_decay": 0.0},
        conditioned=True,
    ),
    "isaac-muon": Entrant("ISAAC + Muon", True, MuonAdamW, 3e-3, ISAAC, conditioned=True),
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
    try:
        return entrant.build(model, lr, {key: meant(f"{name}.{key}", value) for key, value in hyper.items()})
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        given = ", ".join(f"{name}.{key}={value}" for key, value in overrides.items())
        reason = " ".join(str(error).split())
        raise LabError(f"{name} cannot be built ({reason}); change --set {given or name + '.KEY=VALUE'}") from error


def meant(setting: str, value: Any) -> Any:
    """What an optimizer takes for the words of ``--set``: a dtype, a relative damping, names of layers.

    Args:
        setting: OPTIMIZER.KEY.
        value: As ``--set`` has it.

    Raises:
        LabError: When the words mean nothing.

    Example:
        >>> meant("isaac.targets", (1, "blocks.*"))
        ['1', 'blocks.*']
    """
    if setting.endswith("dtype") and isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise LabError(f"--set {setting}: torch has no dtype {value!r}; try float32 or bfloat16")
        return dtype
    if setting.endswith("damping") and isinstance(value, str):
        share = re.fullmatch(r"relative\(([\d.eE+-]+)\)", value)
        if share is None:
            raise LabError(f"--set {setting} is {value!r}: give a number such as 1.0, or relative(1.0)")
        return quadric.relative(float(share[1]))
    if setting.endswith((".targets", ".ignore")) and value is not None:
        names = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return [str(name).strip() for name in names]  # layers may be called 1 and 3
    return value


def held_bytes(optimizer: object, model: nn.Module) -> int:
    """Bytes of all tensors an optimizer keeps, each storage once; the model's and its gradients are not its own.

    Example:
        >>> model = nn.Linear(100, 1, bias=False)
        >>> held_bytes(torch.optim.SGD(model.parameters(), 0.1), model)
        0
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    own = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
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
