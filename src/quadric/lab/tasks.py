"""What there is to learn: real data, a loss, and the number people quote for it.

A task holds a training and a test set. For tuning, :meth:`Task.for_tuning` makes another task out of the training set
alone, so the code that tunes cannot see a test example.
"""

import lzma
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quadric.lab import LabError
from quadric.lab.checkpoint import DAMAGED, write_atomically

CACHE = Path.home() / ".cache" / "quadric"
TEXT_LENGTH = 128  # tokens a language model sees
RECONSTRUCTION = "-autoencoder"  # ends the name of a task that gives the images of another one back
SPLIT_SEED = 2026  # which examples are test, validation, or the first N: the same for every run and every seed


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by: a mean of ``score`` over examples, then ``finish``.

    Args:
        name: As a person says it.
        unit: Written behind the value; may be empty.
        higher_is_better: True for accuracy, False for an error.
        score: (outputs, targets) -> one number per prediction.
        finish: The mean score -> the value in ``unit``.
    """

    name: str
    unit: str
    higher_is_better: bool
    score: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[float], float]


@dataclass(frozen=True)
class Task:
    """A data set with its loss and metric, and the defaults of a run on it.

    Args:
        name: As given on the command line.
        title: For people.
        kind: What the inputs are; decides which models fit.
        train: Inputs and targets, the first axis counts examples.
        test: The same for the examples that only judge.
        prepare: Stored inputs -> what a model takes.
        shape: Shape of one prepared input.
        outputs: Classes, size of the alphabet, pixels, or numbers to predict.
        loss: (outputs, targets) -> scalar, the mean over the batch.
        metric: The number people quote.
        labels: What a model of this task predicts, for labels sampled from it.
        model: Default model.
        epochs: Default number of passes over ``train``.
        batch_size: Default examples in a step.
        target: Metric worth a time to reach it, or None.
        threads: CPU threads; None leaves it to torch. Networks of a few thousand parameters are as fast on one, and a
            second thread that waits for a busy core makes each of their steps ten times as long.
    """

    name: str
    title: str
    kind: Literal["image", "table", "text", "reconstruction"]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    prepare: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    labels: Literal["categorical", "bernoulli", "gaussian"]
    model: str
    epochs: int
    batch_size: int
    target: float | None
    threads: int | None = None

    def for_tuning(self) -> "Task":
        """The same task on the training set alone: its last part, a fifth but at most 5,000, becomes the test set."""
        inputs, targets = self.train
        held_out = min(5000, len(inputs) // 5)
        if held_out == 0:
            raise LabError(f"{self.name} has {len(inputs)} training examples: too few to hold some out for tuning")
        return replace(
            self,
            train=(inputs[:-held_out], targets[:-held_out]),
            test=(inputs[-held_out:], targets[-held_out:]),
        )

    def first(self, examples: int) -> "Task":
        """The same task with fewer training examples.

        Raises:
            LabError: When there are not so many.
        """
        inputs, targets = self.train
        if examples > len(inputs):
            raise LabError(f"{self.name} has {len(inputs)} training examples; --examples cannot be {examples}")
        return replace(self, train=(inputs[:examples], targets[:examples]))

    def to(self, device: torch.device) -> "Task":
        """The same task with its data on a device."""
        train, test = ((x.to(device), y.to(device)) for x, y in (self.train, self.test))
        return replace(self, train=train, test=test)


def _correct(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float()


def _next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none") / math.log(2)


ACCURACY = Metric("accuracy", "%", True, _correct, lambda mean: 100 * mean)
BITS = Metric("bits per character", "", False, _bits, lambda mean: mean)


def image_task(
    name: str,
    title: str,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    *,
    white: float = 255.0,
    model: str,
    epochs: int,
    batch_size: int,
    target: float | None,
) -> Task:
    """Classify images; pixels go to [-1, 1] (mean 0.5, standard deviation 0.5), the training set is shuffled once.

    Args:
        name: As on the command line.
        title: For people.
        arrays: Training images, training labels, test images, test labels; images are (examples, height, width) or
            (examples, height, width, channels).
        white: The largest pixel value.
        model: Default model.
        epochs: Default epochs.
        batch_size: Default batch size.
        target: Test accuracy worth a time to reach it.

    Raises:
        LabError: When the arrays do not belong together.
    """
    x_train, y_train, x_test, y_test = arrays
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y) or len(x) == 0 or x.shape[1:] != x_train.shape[1:]:
            raise LabError(
                f"the images {x.shape} and labels {y.shape} of {name} do not belong together: fetch it again"
            )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x_train))

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(x)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.from_numpy(y.astype(np.int64))

    train, test = tensors(x_train[order], y_train[order]), tensors(x_test, y_test)
    return Task(
        name=name,
        title=title,
        kind="image",
        train=train,
        test=test,
        prepare=lambda x: x.float() / (white / 2) - 1,
        shape=tuple(train[0].shape[1:]),
        outputs=int(max(y_train.max(), y_test.max())) + 1,
        loss=F.cross_entropy,
        metric=ACCURACY,
        labels="categorical",
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        target=target,
    )


def reconstruction_task(images: Task) -> Task:
    """Give the images of another task back through a narrow code; its labels are not used.

    Pixels go to [0, 1] and are probabilities: the loss is the binary cross-entropy and the metric the squared error,
    both summed over the pixels of an image.

    Args:
        images: A task that classifies them.
    """

    def pixels(stored: Tensor) -> Tensor:
        return (images.prepare(stored) + 1) / 2

    def loss(outputs: Tensor, stored: Tensor) -> Tensor:
        told = pixels(stored).flatten(1)
        return F.binary_cross_entropy_with_logits(outputs, told, reduction="sum") / len(outputs)

    def squared_error(outputs: Tensor, stored: Tensor) -> Tensor:
        return (outputs.sigmoid() - pixels(stored).flatten(1)).square().sum(1)

    train, test = images.train[0], images.test[0]
    return replace(
        images,
        name=f"{images.name}{RECONSTRUCTION}",
        title=f"{images.title}, given back through a narrow code",
        kind="reconstruction",
        train=(train, train),
        test=(test, test),
        prepare=pixels,
        outputs=math.prod(images.shape),
        loss=loss,
        metric=Metric("squared error", "", False, squared_error, lambda mean: mean),
        labels="bernoulli",
        model="autoencoder",
        target=None,
    )


def text_task(name: str, title: str, text: bytes, target: float | None = None) -> Task:
    """Predict the next character (byte) of a text from up to 128 before it; the last tenth of the text judges.

    Args:
        name: As on the command line.
        title: For people.
        text: The whole text.
        target: Bits per character worth a time to reach them.

    Raises:
        LabError: When the text is too short.
    """
    if len(text) < 20 * TEXT_LENGTH:
        raise LabError(f"the text {name} has {len(text)} bytes; give one of at least {20 * TEXT_LENGTH}")
    raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    alphabet, codes = raw.unique(return_inverse=True)
    cut = len(codes) * 9 // 10

    def windows(part: Tensor) -> tuple[Tensor, Tensor]:
        count = (len(part) - 1) // TEXT_LENGTH
        stop = count * TEXT_LENGTH
        return part[:stop].view(count, TEXT_LENGTH), part[1 : stop + 1].view(count, TEXT_LENGTH)

    return Task(
        name=name,
        title=title,
        kind="text",
        train=windows(codes[:cut]),
        test=windows(codes[cut:]),
        prepare=lambda tokens: tokens,
        shape=(TEXT_LENGTH,),
        outputs=len(alphabet),
        loss=_next_token_loss,
        metric=BITS,
        labels="categorical",
        model="gpt",
        epochs=2,
        batch_size=32,
        target=target,
    )


def table_task(name: str, title: str, x: np.ndarray, y: np.ndarray, test: np.ndarray) -> Task:
    """Predict a number from a row of numbers; both standardised by the training rows, the error in the data's own unit.

    Args:
        name: As on the command line.
        title: For people.
        x: Rows.
        y: The number of each row.
        test: Indices of the rows that judge.

    Raises:
        LabError: When the arrays do not belong together.
    """
    if x.ndim != 2 or y.shape != (len(x),) or not 0 < len(test) < len(x) or test.max() >= len(x):
        raise LabError(f"the rows {x.shape} and numbers {y.shape} of {name} do not belong together: fetch it again")
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    train = shuffled[~np.isin(shuffled, test)]

    def standard(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spread = values[train].std(axis=0)
        return (values - values[train].mean(axis=0)) / np.where(spread > 0, spread, 1), spread

    inputs = torch.from_numpy(standard(x.astype(np.float64))[0]).float()
    numbers, spread = standard(y.astype(np.float64))
    targets = torch.from_numpy(numbers).float().unsqueeze(1)
    error = Metric(
        name="RMSE",
        unit="",
        higher_is_better=False,
        score=lambda outputs, targets: (outputs - targets).square().squeeze(-1),
        finish=lambda mean: float(spread) * math.sqrt(mean),
    )
    return Task(
        name=name,
        title=title,
        kind="table",
        train=(inputs[train], targets[train]),
        test=(inputs[test], targets[test]),
        prepare=lambda rows: rows,
        shape=(x.shape[1],),
        outputs=1,
        loss=F.mse_loss,
        metric=error,
        labels="gaussian",
        model="mlp",
        epochs=40,
        batch_size=64,
        target=None,
        threads=1,
    )


def load_digits() -> Task:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; they come with the package."""
    from sklearn.datasets import load_digits as embedded  # a second of import that --help should not pay

    bunch: Any = embedded()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.images))
    images, labels = bunch.images[order].astype(np.uint8), bunch.target[order]
    arrays = (images[360:], labels[360:], images[:360], labels[:360])
    title = "Handwritten digits, 8×8 (scikit-learn's)"
    task = image_task("digits", title, arrays, white=16, model="mlp", epochs=30, batch_size=64, target=96.0)
    return replace(task, threads=1)


# name: file, name at openml.org, training examples there, shape of an image there, title, model, epochs, target
IMAGE_SETS: dict[str, tuple[str, str, int, tuple[int, ...], str, str, int, float]] = {
    "mnist": ("mnist.npz", "mnist_784", 60000, (28, 28), "MNIST digits, 28×28", "mlp", 5, 97.5),
    "fashion-mnist": ("fashion_mnist.npz", "Fashion-MNIST", 60000, (28, 28), "Fashion-MNIST, 28×28", "mlp", 5, 87.0),
    "cifar10": ("cifar10.npz", "CIFAR_10", 50000, (3, 32, 32), "CIFAR-10, 32×32 in colour", "resnet20", 10, 75.0),
}


def load_images(name: str, data_dir: Path | None, say: Callable[[str], None]) -> Task:
    """An image set out of ``data_dir``, or fetched from openml.org once and kept in the user's cache folder.

    Args:
        name: One of ``IMAGE_SETS``.
        data_dir: Folder with the set's .npz file: x_train, y_train, x_test, y_test.
        say: Told before each thing that takes seconds.
    """
    file, openml, count, shape, title, model, epochs, target = IMAGE_SETS[name]
    path = (data_dir or CACHE) / file
    if data_dir is None and not path.exists():
        say(f"fetching {name} from openml.org …")
        fetch_images(name, openml, count, shape, path)
    with arrays(path) as file:
        say(f"reading {name} …")  # decompressing takes CIFAR-10 some seconds
        sets = (file["x_train"], file["y_train"], file["x_test"], file["y_test"])
    return image_task(name, title, sets, model=model, epochs=epochs, batch_size=128, target=target)


def fetch_images(name: str, openml: str, count: int, shape: tuple[int, ...], path: Path) -> None:
    """Download an image set and keep it as an .npz file.

    Args:
        name: What the task is called.
        openml: What it is called at openml.org.
        count: How many of its examples are the training set; they come first there.
        shape: Shape of an image there, channels first.
        path: Where to keep it.

    Raises:
        LabError: When it cannot be had.
    """
    from sklearn.datasets import fetch_openml

    try:
        bunch: Any = fetch_openml(openml, version=1, as_frame=False, parser="auto", data_home=str(path.parent))
        images = bunch.data.astype(np.uint8).reshape(-1, *shape)
        labels = bunch.target.astype(np.int64).astype(np.uint8)
    except Exception as error:  # the network, its proxies and the remote format fail in too many ways to list
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LabError(
            f"{name} could not be fetched from openml.org ({reason[0]}); give --data-dir with a folder that holds "
            f"{path.name} (arrays x_train, y_train, x_test, y_test)"
        ) from error
    if len(shape) == 3:
        images = images.transpose(0, 2, 3, 1)
    sets = {"x_train": images[:count], "y_train": labels[:count], "x_test": images[count:], "y_test": labels[count:]}
    write_atomically(path, lambda file: np.savez_compressed(file, **sets))


def load_shakespeare(data_dir: Path | None) -> Task:
    """The tiny Shakespeare text, 1.1 million characters.

    Raises:
        LabError: When the folder is not given or lacks the file.
    """
    if data_dir is None:
        raise LabError(
            "shakespeare needs --data-dir with a folder that holds tinyshakespeare.txt, or take any --text FILE"
        )
    return text_task("shakespeare", "Tiny Shakespeare", read_text(data_dir / "tinyshakespeare.txt"), target=3.0)


def text_task_from(path: Path) -> Task:
    """Any text file as a task."""
    return text_task(path.stem, f"The text {path.name}", read_text(path))


def load_regression(name: str, data_dir: Path | None) -> Task:
    """One of the UCI regression sets.

    Args:
        name: ``regression`` (the set concrete) or ``regression:NAME``.
        data_dir: Folder with uci_regression.npz: NAME_x, NAME_y and NAME_test for each set.

    Raises:
        LabError: When the folder is not given or there is no such set.
    """
    if data_dir is None:
        raise LabError("regression needs --data-dir with a folder that holds uci_regression.npz")
    wanted = name.partition(":")[2] or "concrete"
    with arrays(data_dir / "uci_regression.npz") as file:
        names = [key.removesuffix("_x") for key in file.files if key.endswith("_x")]
        if wanted not in names:
            raise LabError(f"there is no regression set {wanted!r}; choose regression:NAME of {', '.join(names)}")
        x, y, test = (file[f"{wanted}_{part}"] for part in ("x", "y", "test"))
    # The first of the published splits; seeds of a race change the start and the order, not the data.
    return table_task(f"regression:{wanted}", f"UCI regression, {wanted}", x, y, test[0].astype(np.int64))


def load_task(name: str, data_dir: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Task:
    """A task by its name.

    Args:
        name: One of ``TASKS``, an image set followed by ``-autoencoder``, ``regression:NAME``, or the path of a text
            file.
        data_dir: Folder with data files.
        say: Told before each thing that takes seconds.

    Raises:
        LabError: When there is no such task or its data cannot be had.

    Example:
        >>> task = load_task("digits")
        >>> len(task.train[0]), len(task.for_tuning().train[0]), len(task.test[0])
        (1437, 1150, 360)
    """
    if data_dir is not None and not data_dir.is_dir():
        raise LabError(f"--data-dir {data_dir} is not a folder; give one that holds the data files")
    images = name.removesuffix(RECONSTRUCTION)
    if images == "digits" or images in IMAGE_SETS:
        task = load_digits() if images == "digits" else load_images(images, data_dir, say)
        return task if images == name else reconstruction_task(task)
    if name == "shakespeare":
        return load_shakespeare(data_dir)
    if name.partition(":")[0] == "regression":
        return load_regression(name, data_dir)
    if Path(name).is_file():
        return text_task_from(Path(name))
    raise LabError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}, or the path of a text file")


TASKS = ("digits", *IMAGE_SETS, f"mnist{RECONSTRUCTION}", "shakespeare", "regression")


@contextmanager
def arrays(path: Path) -> Iterator[Any]:
    """An open .npz file, from which arrays are taken by name.

    Raises:
        LabError: When it is missing or damaged, or lacks an array that is asked of it.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            yield file
    except FileNotFoundError as error:
        raise LabError(
            f"there is no {path.name} in {path.parent}; put it there or choose another --data-dir"
        ) from error
    except PermissionError as error:
        raise LabError(f"no permission to read {path}; allow it or choose another --data-dir") from error
    except (*DAMAGED, TypeError) as error:  # TypeError: a bare .npy array, which is no archive
        raise LabError(f"{path} is damaged, lacks an array or is not an .npz file; fetch it again") from error


def read_text(path: Path) -> bytes:
    """A text file's bytes; ``.xz`` is unpacked.

    Raises:
        LabError: When it cannot be read.
    """
    try:
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except FileNotFoundError as error:
        raise LabError(f"there is no {path.name} in {path.parent}; put it there or choose another folder") from error
    except (OSError, lzma.LZMAError) as error:
        raise LabError(f"cannot read the text {path} ({error}); choose another file") from error
