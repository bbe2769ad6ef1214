import lzma
import math

import numpy as np
import pytest
import torch

from quadric.lab import LabError, tasks
from quadric.lab.tasks import BITS, load_task


def image_file(folder, name, train=50, test=20, shape=(28, 28)):
    rng = np.random.default_rng(0)
    np.savez_compressed(
        folder / name,
        x_train=rng.integers(256, size=(train, *shape)).astype(np.uint8),
        y_train=(np.arange(train) % 10).astype(np.uint8),
        x_test=rng.integers(256, size=(test, *shape)).astype(np.uint8),
        y_test=(np.arange(test) % 10).astype(np.uint8),
    )
    return folder / name


def regression_file(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(60, 4)).astype(np.float32)
    x[:, 3] = 7  # a constant column must not divide by zero
    y = (5 * x[:, 0] + 100).astype(np.float32)
    test = np.stack([rng.permutation(60)[:6] for _ in range(3)]).astype(np.uint16)
    np.savez(folder / "uci_regression.npz", toy_x=x, toy_y=y, toy_test=test)
    return x, y, test


def test_digits_are_embedded_and_split_the_same_way_every_time():
    first, second = load_task("digits"), load_task("digits")
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])
    assert (len(first.train[0]), len(first.test[0]), first.shape, first.outputs) == (1437, 360, (1, 8, 8), 10)
    prepared = first.prepare(first.train[0])
    assert (prepared.min(), prepared.max()) == (-1, 1)


def test_tuning_sees_no_test_example():
    task = load_task("digits")
    task = task.first(1000)
    tuning = task.for_tuning()
    assert torch.equal(torch.cat([tuning.train[0], tuning.test[0]]), task.train[0])
    assert torch.equal(torch.cat([tuning.train[1], tuning.test[1]]), task.train[1])
    assert len(tuning.test[0]) == 200
    with pytest.raises(LabError, match="too few"):
        task.first(4).for_tuning()
    with pytest.raises(LabError, match="has 1437 training examples; --examples cannot be 2000"):
        load_task("digits").first(2000)


@pytest.mark.parametrize(
    ("name", "file", "shape", "prepared"),
    [
        ("mnist", "mnist.npz", (28, 28), (1, 28, 28)),
        ("fashion-mnist", "fashion_mnist.npz", (28, 28), (1, 28, 28)),
        ("cifar10", "cifar10.npz", (32, 32, 3), (3, 32, 32)),
    ],
)
def test_image_files(tmp_path, name, file, shape, prepared):
    image_file(tmp_path, file, shape=shape)
    said = []
    task = load_task(name, tmp_path, say=said.append)
    assert said == [f"reading {name} …"]
    assert task.prepare(task.train[0]).shape == (50, *prepared)
    assert task.outputs == 10
    # The training set is shuffled with its labels, the test set stays in order.
    with np.load(tmp_path / file) as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
        last = arrays["x_test"][-1]
    order = [
        next(i for i in range(50) if np.array_equal(images[i].reshape(*shape), back(x, shape))) for x in task.train[0]
    ]
    assert order != list(range(50))
    assert [int(labels[i]) for i in order] == task.train[1].tolist()
    assert np.array_equal(back(task.test[0][-1], shape), last)


def back(x, shape):
    return (x[0] if len(shape) == 2 else x.permute(1, 2, 0)).numpy()


def test_damaged_files_are_one_sentence(tmp_path):
    with pytest.raises(LabError, match=r"there is no mnist.npz in .*; put it there or choose another --data-dir"):
        load_task("mnist", tmp_path)
    path = image_file(tmp_path, "mnist.npz")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LabError, match=r"damaged.*; fetch it again"):
            load_task("mnist", tmp_path)
    path.write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    with pytest.raises(LabError, match=r"damaged.*; fetch it again"):
        load_task("mnist", tmp_path)
    np.savez(path, x_train=np.zeros((3, 2, 2), np.uint8))
    with pytest.raises(LabError, match="lacks an array"):
        load_task("mnist", tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(LabError, match=r"is not an \.npz file"):
        load_task("mnist", tmp_path)
    images = np.zeros((3, 2, 2), np.uint8)
    np.savez(path, x_train=images, y_train=np.zeros(2), x_test=images, y_test=np.zeros(3))
    with pytest.raises(LabError, match="do not belong together"):
        load_task("mnist", tmp_path)


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "mnist.npz", x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    with pytest.raises(LabError, match="damaged"):
        load_task("mnist", tmp_path)


def test_images_are_fetched_once_and_kept(tmp_path, monkeypatch):
    calls = []

    class Bunch:
        data = np.arange(70 * 12, dtype=np.float64).reshape(70, 12) % 256
        target = np.array([str(i % 10) for i in range(70)], dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda name, **given: calls.append(name) or Bunch)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(tasks.IMAGE_SETS, "cifar10", ("c.npz", "CIFAR_10", 60, (3, 2, 2), "small", "mlp", 1, 50.0))
    task = load_task("cifar10")
    assert calls == ["CIFAR_10"]
    assert (len(task.train[0]), len(task.test[0]), task.shape) == (60, 10, (3, 2, 2))
    # Channels come first at openml.org and first in a prepared input: the last test image is the last row.
    assert torch.equal(task.test[0][-1].flatten(), torch.from_numpy(Bunch.data[-1].astype(np.uint8)))
    said = []
    load_task("cifar10", say=said.append)
    assert said == ["reading cifar10 …"]
    assert calls == ["CIFAR_10"]


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>\nmore")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    with pytest.raises(
        LabError, match=r"name resolution>\); give --data-dir with a folder that holds mnist.npz"
    ) as info:
        load_task("mnist")
    assert "\n" not in str(info.value)
    with pytest.raises(LabError, match=r"needs --data-dir .* tinyshakespeare.txt, or take any --text FILE"):
        load_task("shakespeare")
    with pytest.raises(LabError, match=r"needs --data-dir .* uci_regression.npz"):
        load_task("regression")


def test_text_windows_predict_the_next_byte(tmp_path):
    text = ("to be, or not to be: that is the question. " * 100).encode()
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    task = load_task("shakespeare", tmp_path)
    x, y = task.train
    assert torch.equal(x[:, 1:], y[:, :-1])
    alphabet = sorted(set(text))
    assert task.outputs == len(alphabet)
    assert bytes(alphabet[i] for i in x[0].tolist()) == text[:128]
    cut = len(text) * 9 // 10
    assert bytes(alphabet[i] for i in task.test[0][0].tolist()) == text[cut : cut + 128]

    (tmp_path / "book.txt.xz").write_bytes(lzma.compress(text))
    same = load_task(str(tmp_path / "book.txt.xz"))
    assert torch.equal(same.train[0], x)
    (tmp_path / "note.txt").write_text("short")
    with pytest.raises(LabError, match="note has 5 bytes; give one of at least 2560"):
        load_task(str(tmp_path / "note.txt"))


def test_an_autoencoder_task_gives_back_its_own_images():
    digits, task = load_task("digits"), load_task("digits-autoencoder")
    assert (task.name, task.kind, task.shape, task.outputs) == ("digits-autoencoder", "reconstruction", (1, 8, 8), 64)
    assert torch.equal(task.train[0], digits.train[0])
    assert torch.equal(task.test[1], digits.test[0])
    inputs, stored = task.for_tuning().test
    pixels = task.prepare(inputs)
    assert (pixels.min(), pixels.max()) == (0, 1)
    # Every pixel told to be a half: 64 times one bit, and the squared distances from grey.
    outputs = torch.zeros(len(inputs), 64)
    assert task.loss(outputs, stored).item() == pytest.approx(64 * math.log(2), rel=1e-5)
    error = task.metric.finish(task.metric.score(outputs, stored).mean().item())
    assert error == pytest.approx(64 * (pixels - 0.5).square().mean().item(), rel=1e-5)
    assert not task.metric.higher_is_better


def test_every_image_set_has_an_autoencoder_task(tmp_path):
    image_file(tmp_path, "cifar10.npz", shape=(32, 32, 3))
    task = load_task("cifar10-autoencoder", tmp_path)
    assert (task.outputs, task.labels, task.model, task.target) == (3072, "bernoulli", "autoencoder", None)
    with pytest.raises(LabError, match="there is no task 'shakespeare-autoencoder'"):
        load_task("shakespeare-autoencoder", tmp_path)


def test_bits_of_a_uniform_guess():
    outputs, targets = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)
    assert BITS.finish(BITS.score(outputs, targets).mean().item()) == pytest.approx(3)


def test_regression_is_standardised_by_the_training_rows_and_judged_in_its_own_unit(tmp_path):
    _, y, test = regression_file(tmp_path)
    task = load_task("regression:toy", tmp_path)
    rows = np.setdiff1d(np.arange(60), test[0])
    assert len(task.train[0]) == 54
    assert torch.allclose(task.train[0].mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(task.train[0][:, :3].std(0, correction=0), torch.ones(3), atol=1e-5)
    assert torch.isfinite(task.train[0]).all()
    expected = (y[test[0]] - y[rows].mean()) / y[rows].std()
    assert torch.allclose(task.test[1].squeeze(1), torch.from_numpy(expected), atol=1e-5)
    # Predicting the training mean everywhere has the error of the mean, in the unit of y.
    outputs = torch.zeros_like(task.test[1])
    rmse = task.metric.finish(task.metric.score(outputs, task.test[1]).mean().item())
    assert rmse == pytest.approx(math.sqrt(((y[test[0]] - y[rows].mean()) ** 2).mean()), rel=1e-4)
    with pytest.raises(LabError, match=r"there is no regression set 'tory'; choose regression:NAME of toy"):
        load_task("regression:tory", tmp_path)


def test_unknown_task_lists_the_known(tmp_path):
    with pytest.raises(LabError, match=r"there is no task 'nope'; choose one of digits, mnist, fashion-mnist, cifar10"):
        load_task("nope")
    with pytest.raises(LabError, match=r"--data-dir .*missing is not a folder"):
        load_task("digits", tmp_path / "missing")
