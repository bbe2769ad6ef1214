"""One training run, to be read in one sitting.

A run is decided by its plan: the same plan gives the same bits, and a run that was killed continues from its last
checkpoint to the bits it would have had. Everything random is either a function of (seed, epoch), as the order of the
examples is, or drawn from torch's global generators, whose state a checkpoint keeps.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quadric
from quadric.lab import LabError, checkpoint
from quadric.lab.models import build_model
from quadric.lab.optimizers import build_optimizer, find_entrant, held_bytes
from quadric.lab.scalars import ScalarLog
from quadric.lab.tasks import Task


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run.

    Args:
        optimizer: One of ``ENTRANTS``.
        lr: Its peak learning rate.
        settings: Hyper-parameters that differ from the entrant's.
        model: One of ``MODELS``.
        epochs: Passes over the training set.
        batch_size: Examples in a step; a last smaller batch is left out.
        schedule: "cosine" falls to zero at the end, "constant" stays.
        warmup: Steps over which the rate rises linearly.
        seed: Of the initial parameters, the order of examples, and sampled labels.
        augment: Shift images by up to 4 pixels and mirror half of them.
    """

    optimizer: str
    lr: float
    settings: dict[str, Any]
    model: str
    epochs: int
    batch_size: int
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    seed: int = 0
    augment: bool = False


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint.

    Args:
        step: Steps taken.
        loss_sum: Of the training losses of this epoch.
        seconds: Spent in training steps; evaluation and checkpoints are not counted.
        recent: Seconds of the latest steps.
        history: One record an epoch.
        diverged: Whether the training or the test loss stopped being finite.
        error: What the optimizer (or torch) refused to do, which ended the run.
    """

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    history: list[dict[str, Any]] = field(default_factory=list)
    diverged: bool = False
    error: str | None = None

    @property
    def lost(self) -> bool:
        """Whether the run ended before its last step."""
        return self.diverged or self.error is not None


@dataclass(frozen=True)
class Saving:
    """Where and how often a run saves itself: also after an epoch that ends a second or more after the last time.

    Args:
        path: The checkpoint; one that is there is continued.
        seconds: Time between two.
        steps: Steps between two; 0 leaves it to the time.
    """

    path: Path
    seconds: float = 30.0
    steps: int = 0


Watch = Callable[[Progress, float], bool]


def training_steps(task: Task, batch_size: int, epochs: int) -> int:
    """Steps of a run; a rest that fills no batch is left out of an epoch."""
    examples = len(task.train[0])
    return epochs * (examples // min(batch_size, examples))


def train(
    plan: Plan,
    task: Task,
    device: torch.device,
    *,
    saving: Saving | None = None,
    tensorboard: Path | None = None,
    watch: Watch | None = None,
) -> tuple[Progress, nn.Module, Any]:
    """Train until the plan is done, the loss is no longer finite, or the optimizer refuses; continue a checkpoint.

    Args:
        plan: What to do.
        task: On what.
        device: Where.
        saving: Where to keep checkpoints; None keeps none.
        tensorboard: Folder of its scalars; None writes none.
        watch: Called after every step with the progress and that step's loss; True saves the run and interrupts it.

    Returns:
        How it went, the model, and its optimizer.

    Raises:
        LabError: When the plan does not fit the task or the checkpoint.
        KeyboardInterrupt: When ``watch`` asks for it.
    """
    make_reproducible(device)
    task = task.to(device)
    inputs, targets = task.train
    batch_size = min(plan.batch_size, len(inputs))
    steps_per_epoch = len(inputs) // batch_size
    total = plan.epochs * steps_per_epoch
    entrant = find_entrant(plan.optimizer)

    torch.manual_seed(plan.seed)
    model = build_model(plan.model, task).to(device)
    optimizer = build_optimizer(plan.optimizer, model, plan.lr, plan.settings)
    progress = Progress()
    if saving is not None and saving.path.exists():
        progress = restore(saving.path, plan, model, optimizer)
    scalars = None if tensorboard is None else ScalarLog(tensorboard, progress.history)

    order, saved = Tensor(), time.monotonic()
    while progress.step < total and not progress.lost:
        epoch, batch = divmod(progress.step, steps_per_epoch)
        if batch == 0 or len(order) == 0:
            order = epoch_order(plan.seed, epoch, len(inputs)).to(device)
        started = now(device)

        rows = order[batch * batch_size : (batch + 1) * batch_size]
        x, y = task.prepare(inputs[rows]), targets[rows]
        if plan.augment:
            x = shift_and_mirror(x)
        lr = plan.lr * rate(progress.step, total, plan)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            optimizer.zero_grad()
            outputs = model.train()(x)
            loss = task.loss(outputs, y)
            value = loss.item()
            if not math.isfinite(value):
                progress.diverged = True
                break
            if entrant.samples_labels:
                optimizer.observe(quadric.sampled_loss(outputs.flatten(0, -2), kind=task.labels))
            getattr(optimizer, "backward", Tensor.backward)(loss)  # AdaHesScale's looks at the Hessian on the way
            optimizer.step()
        except Exception as error:  # a NaN gradient, no memory left, a setting refused late: it ends this run alone
            progress.error = " ".join(f"{type(error).__name__}: {error}".split())
            break

        elapsed = now(device) - started
        progress.step += 1
        progress.loss_sum += value
        progress.seconds += elapsed
        progress.recent.append(elapsed)
        if batch + 1 == steps_per_epoch:
            test_loss, test_metric = evaluate(model, task)
            record = {
                "step": progress.step,
                "epoch": epoch + 1,
                "seconds": progress.seconds,
                "lr": lr,
                "train_loss": progress.loss_sum / steps_per_epoch,
                "test_loss": test_loss,
                "test_metric": test_metric,
            }
            progress.history.append(record)
            progress.loss_sum = 0.0
            progress.diverged = not math.isfinite(test_loss)
            if scalars is not None:
                scalars.add(record)
        stop = watch is not None and watch(progress, value)
        if saving is not None:
            waited = time.monotonic() - saved
            by_steps = saving.steps > 0 and progress.step % saving.steps == 0
            by_time = waited >= saving.seconds or (batch + 1 == steps_per_epoch and waited >= 1)
            if stop or by_steps or by_time:
                save(saving.path, plan, progress, model, optimizer)
                saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    return progress, model, optimizer


def rate(step: int, total: int, plan: Plan) -> float:
    """The learning rate of a step over its peak: a linear rise over the warm-up, then constant or half a cosine.

    Args:
        step: Steps taken before it.
        total: Steps of the run.
        plan: Says which schedule.

    Example:
        >>> plan = Plan("sgd", 0.1, {}, "mlp", epochs=1, batch_size=1, schedule="cosine", warmup=2)
        >>> [round(rate(step, 6, plan), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    if plan.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - plan.warmup) / (total - plan.warmup))


def epoch_order(seed: int, epoch: int, examples: int) -> Tensor:
    """The order of the examples in an epoch: a function of the seed, so there is no state to keep."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def shift_and_mirror(images: Tensor, reach: int = 4) -> Tensor:
    """Shift each image by up to ``reach`` pixels each way and mirror half of them (torch's global generator decides).

    Args:
        images: (batch, channels, height, width).
        reach: Pixels.
    """
    count, channels, height, width = images.shape
    device = images.device
    down, right = torch.randint(2 * reach + 1, (2, count, 1)).to(device)
    rows = down + torch.arange(height, device=device)
    columns = right + torch.arange(width, device=device)
    columns = torch.where((torch.rand(count, 1) < 0.5).to(device), columns.flip(1), columns)
    padded = F.pad(images, (reach,) * 4)
    each = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[each, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int = 1000) -> tuple[float, float]:
    """Mean loss and metric over the test set, in evaluation mode.

    Args:
        model: The network.
        task: Its data on the model's device.
        batch_size: Examples (windows of text: an eighth of it) at a time.
    """
    model.eval()
    inputs, targets = task.test
    losses, scores, count = 0.0, 0.0, 0
    chunk = batch_size // 8 if task.kind == "text" else batch_size
    for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
        outputs = model(task.prepare(x))
        losses += task.loss(outputs, y).item() * len(x)
        scores += task.metric.score(outputs, y).mean().item() * len(x)
        count += len(x)
    return losses / count, task.metric.finish(scores / count)


def save(path: Path, plan: Plan, progress: Progress, model: nn.Module, optimizer: Any) -> None:
    """Write a checkpoint between two steps."""
    state = {
        "plan": asdict(plan),
        "progress": {**vars(progress), "recent": list(progress.recent)},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoint.save(path, state)


def restore(path: Path, plan: Plan, model: nn.Module, optimizer: Any) -> Progress:
    """Put a run back to where its checkpoint stands.

    Raises:
        LabError: When the checkpoint is of another run, or does not fit.
    """
    state = checkpoint.load(path)
    try:
        if state["plan"] != asdict(plan):
            raise LabError(
                f"the checkpoint {path} is of another run; repeat that run's options or choose another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        told = state["progress"]
        return Progress(**{**told, "recent": deque(told["recent"], maxlen=1000)})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LabError(
            f"the checkpoint {path} does not fit this run; delete it and repeat with --resume to start this run again"
        ) from error


def describe_run(plan: Plan, progress: Progress, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A finished run as results.json has it."""
    return {
        "seed": plan.seed,
        "steps": progress.step,
        "diverged": progress.diverged,
        "error": progress.error,
        "seconds": progress.seconds,
        "step_ms": 1000 * statistics.median(progress.recent) if progress.recent else None,
        "state_mb": held_bytes(optimizer, model) / 1e6,
        "history": progress.history,
    }


def choose_device(name: str) -> torch.device:
    """A device by its name on the command line.

    Raises:
        LabError: When there is no such device here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def make_reproducible(device: torch.device) -> None:
    """Ask for the same bits in every run; on the CPU torch gives them unasked."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
