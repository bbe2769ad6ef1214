import dataclasses
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from quadric.lab import LabError, train
from quadric.lab.optimizers import ENTRANTS
from quadric.lab.tasks import load_task, table_task, text_task
from quadric.lab.train import Plan, Saving, choose_device, epoch_order, evaluate, shift_and_mirror

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_task("digits").first(200)


def plan(optimizer="adamw", **given):
    defaults = {"lr": 1e-2, "settings": {}, "model": "mlp", "epochs": 3, "batch_size": 32}
    return Plan(optimizer, **{**defaults, **given})


def interrupted_after(steps):
    return lambda progress, loss: progress.step == steps


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


REMEMBERING = {"decay": 0.9, "refresh_every": 4, "max_rows": 20}  # a state, a phase, and random draws to resume


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        *((name, {"window": 8} if name == "mfac" else {}) for name in ENTRANTS),
        *((name, REMEMBERING) for name in ("isaac", "isaac-adamw", "isaac-muon")),
        ("isaac-muon", {"output_damping": "relative(1.0)", "decay": 0.5}),
        ("isaac-adamw", {"pooled": True, "decay": 0.5}),
    ],
)
def test_same_seed_same_bits_and_resume_continues_bitwise(tmp_path, digits, optimizer, settings):
    given = plan(optimizer, lr=ENTRANTS[optimizer].lr, settings=settings)
    whole, model, _ = train.train(given, digits, CPU)
    assert (whole.step, whole.diverged, whole.error) == (18, False, None)
    again, twin, _ = train.train(given, digits, CPU)
    assert torch.equal(parameters(model), parameters(twin))
    losses = [(r["step"], r["train_loss"], r["test_loss"], r["test_metric"]) for r in whole.history]
    assert losses == [(r["step"], r["train_loss"], r["test_loss"], r["test_metric"]) for r in again.history]

    saving = Saving(tmp_path / "run.pt")
    for stop in (4, 6, 15):  # within the first epoch, at its end, within the third
        with pytest.raises(KeyboardInterrupt):
            train.train(given, digits, CPU, saving=saving, watch=interrupted_after(stop))
        torch.rand(7)  # what happens between the processes must not matter
    resumed, revived, _ = train.train(given, digits, CPU, saving=saving)
    assert torch.equal(parameters(model), parameters(revived))
    assert losses == [(r["step"], r["train_loss"], r["test_loss"], r["test_metric"]) for r in resumed.history]


def test_resume_with_augmentation_batch_norm_and_a_schedule_is_bitwise(tmp_path):
    task = load_task("digits").first(96)
    given = plan("sgd", model="resnet20", augment=True, warmup=2, epochs=2)
    _, model, _ = train.train(given, task, CPU)
    saving = Saving(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        train.train(given, task, CPU, saving=saving, watch=interrupted_after(2))
    _, revived, _ = train.train(given, task, CPU, saving=saving)
    assert torch.equal(parameters(model), parameters(revived))


def test_another_seed_is_another_run(digits):
    first, _, _ = train.train(plan(), digits, CPU)
    second, _, _ = train.train(plan(seed=1), digits, CPU)
    assert first.history[-1]["train_loss"] != second.history[-1]["train_loss"]


def test_history_and_scalars(tmp_path, digits):
    progress, model, optimizer = train.train(plan(epochs=2), digits, CPU, tensorboard=tmp_path)
    steps = 200 // 32
    assert [r["step"] for r in progress.history] == [steps, 2 * steps]
    assert [r["epoch"] for r in progress.history] == [1, 2]
    last = progress.history[-1]
    assert (last["test_loss"], last["test_metric"]) == evaluate(model, digits)
    assert 0 < progress.history[0]["seconds"] < last["seconds"] == progress.seconds
    assert last["train_loss"] < progress.history[0]["train_loss"] < math.log(10)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("test_metric")] == [
        (r["step"], pytest.approx(r["test_metric"])) for r in progress.history
    ]
    run = train.describe_run(plan(epochs=2), progress, model, optimizer)
    assert run["state_mb"] == pytest.approx(8 * 8970 / 1e6, rel=1e-2)
    assert (run["seed"], run["diverged"], run["error"]) == (0, False, None)
    assert run["step_ms"] > 0


def test_evaluation_is_the_mean_over_all_test_examples(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.9))
    inputs, targets = digits.test
    outputs = model.eval()(digits.prepare(inputs))
    loss, metric = evaluate(model.train(), digits, batch_size=7)
    assert loss == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-5)
    assert metric == pytest.approx(100 * (outputs.argmax(1) == targets).float().mean().item(), rel=1e-5)


def test_a_run_that_diverges_ends_and_says_so(tmp_path, digits):
    given, saving = plan("sgd", lr=1e12), Saving(tmp_path / "run.pt")
    progress, model, optimizer = train.train(given, digits, CPU, saving=saving)
    assert progress.diverged
    assert progress.error is None
    assert progress.step < 3 * 6
    train.save(saving.path, given, progress, model, optimizer)
    again, _, _ = train.train(given, digits, CPU, saving=saving, watch=lambda *seen: pytest.fail("another step"))
    assert (again.diverged, again.step) == (True, progress.step)


def test_a_test_loss_that_is_not_finite_is_divergence_too(digits):
    task = dataclasses.replace(digits, loss=lambda o, y: nn.functional.cross_entropy(o, y) / (len(o) < 50))
    progress, _, _ = train.train(plan(), task, CPU)
    assert (progress.step, progress.diverged, progress.error) == (6, True, None)


class Thorn(torch.autograd.Function):
    """The identity, whose gradient is NaN from the fifth step on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Thorn.calls += 1
        return gradient * (float("nan") if Thorn.calls >= 5 else 1.0)


def test_a_nan_gradient_is_the_recorded_error_of_the_run(digits):
    Thorn.calls = 0
    task = dataclasses.replace(digits, loss=lambda o, y: nn.functional.cross_entropy(Thorn.apply(o), y))
    progress, _, _ = train.train(plan("mfac", settings={"window": 4}), task, CPU)
    assert progress.error is not None
    assert "\n" not in progress.error
    assert progress.step == 4
    assert not progress.diverged


def test_a_checkpoint_of_another_run_is_refused(tmp_path, digits):
    saving = Saving(tmp_path / "run.pt", steps=1)
    with pytest.raises(KeyboardInterrupt):
        train.train(plan(), digits, CPU, saving=saving, watch=interrupted_after(2))
    with pytest.raises(LabError, match="is of another run"):
        train.train(plan(lr=0.5), digits, CPU, saving=saving)
    saving.path.write_bytes(saving.path.read_bytes()[:-100])
    with pytest.raises(LabError, match="truncated or damaged"):
        train.train(plan(), digits, CPU, saving=saving)


def test_checkpoints_are_written_as_often_as_asked(tmp_path, digits, monkeypatch):
    steps = []
    monkeypatch.setattr(train, "save", lambda path, plan, progress, *rest: steps.append(progress.step))
    train.train(plan(epochs=2), digits, CPU, saving=Saving(tmp_path / "a", seconds=1e9, steps=5))
    assert steps == [5, 10]
    steps.clear()
    train.train(plan(epochs=1), digits, CPU, saving=Saving(tmp_path / "a", seconds=0))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_text_and_regression_train():
    text = text_task("text", "a text", b"abcdefgh" * 1000)
    first = evaluate(train.build_model("gpt", text), text)
    progress, _, _ = train.train(plan("adamw", model="gpt", epochs=1, batch_size=8, lr=3e-3), text, CPU)
    assert first[1] == pytest.approx(3, abs=0.2)  # eight letters, three bits
    assert progress.history[-1]["test_metric"] < 1
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).numpy()
    table = table_task("line", "a line", x, 10 * x[:, 0] + 3, torch.arange(50).numpy())
    for name in ("ginger-sampled", "adamw"):
        progress, _, _ = train.train(plan(name, epochs=20), table, CPU)
        assert progress.history[-1]["test_metric"] < 3  # the standard deviation of y is 10


@pytest.mark.parametrize("optimizer", ["adamw", "ginger-sampled", "adahesscale"])
def test_an_autoencoder_trains(optimizer):
    task = load_task("digits-autoencoder").first(200)
    progress, _, _ = train.train(plan(optimizer, lr=1e-3, model="autoencoder", epochs=10), task, CPU)
    first, last = progress.history[0], progress.history[-1]
    assert progress.error is None
    assert last["train_loss"] < 0.9 * first["train_loss"]
    assert last["test_metric"] < 4.5  # the mean image, which needs no code, leaves 4.8


def test_an_optimizer_with_a_backward_of_its_own_looks_at_every_loss(digits):
    progress, _, optimizer = train.train(plan("adahesscale", epochs=1), digits, CPU)
    assert (progress.step, progress.error) == (6, None)
    assert int(optimizer.state_dict()["state"][0]["shared_updates"]) == 6
    text = text_task("text", "a text", b"abcdefgh" * 500)
    progress, _, optimizer = train.train(plan("adahesscale", model="gpt", epochs=1, batch_size=8), text, CPU)
    assert (progress.step > 0, progress.error) == (True, None)
    assert all(bool(state["squares"].any()) for state in optimizer.state_dict()["state"].values())


def test_orders_and_augmentation():
    assert sorted(epoch_order(0, 1, 50).tolist()) == list(range(50))
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(0, 2, 50))
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(1, 1, 50))
    torch.manual_seed(0)
    image = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    moved = shift_and_mirror(image, reach=1)
    views = {tuple(x.flatten().tolist()) for x in moved[:, 0]}
    padded = nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    crops = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    assert views == {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(1))}
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_devices():
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(LabError, match="torch sees no CUDA device here; use --device cpu or auto"):
            choose_device("cuda")
