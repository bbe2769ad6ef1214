import io
import json

import pytest
import torch
from rich.console import Console

from quadric.lab import race as racing
from quadric.lab.display import Display
from quadric.lab.race import Race, Track, check_race, count_steps, log_grid, run_race
from quadric.lab.tasks import load_task


def small_race(**given):
    defaults = {
        "task": "digits",
        "model": "logistic",
        "optimizers": ("sgd", "adamw"),
        "settings": {},
        "seeds": (3, 4),
        "epochs": 2,
        "batch_size": 32,
        "schedule": "cosine",
        "warmup": 0,
        "augment": False,
        "examples": 200,
        "rates": (1e-4, 1e-1),
        "tune_epochs": 1,
        "target": 50.0,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    return Race(**{**defaults, **given})


@pytest.fixture(scope="module")
def digits():
    return load_task("digits").first(200)


def start(race, task, folder):
    out = io.StringIO()
    display = Display(Console(file=out, width=200), count_steps(race, task))
    report = run_race(race, Track(task, folder, display), command="quadric race")
    return json.loads((folder / "results.json").read_text()), report, out.getvalue(), display


@pytest.fixture
def recorded(monkeypatch):
    """Every training run of the race: its plan, and the examples it saw."""
    calls = []
    real = racing.train

    def spy(plan, task, device, **given):
        calls.append((plan, task))
        return real(plan, task, device, **given)

    monkeypatch.setattr(racing, "train", spy)
    return calls


def test_a_race_is_fair_and_its_results_complete(tmp_path, digits, recorded):
    race = small_race()
    results, report, said, display = start(race, digits, tmp_path)
    trials, runs = recorded[:4], recorded[4:]

    # The same grid, one seed that does not race, and no test example among those that choose.
    assert [(p.optimizer, p.lr) for p, _ in trials] == [(n, lr) for n in ("sgd", "adamw") for lr in (1e-4, 1e-1)]
    assert {p.seed for p, _ in trials} == {1004}
    for _, task in trials:
        assert len(task.train[0]) + len(task.test[0]) == 200
        assert task.test[0].data_ptr() != digits.test[0].data_ptr()
    # The same seeds and the same length for each; optimizers take turns.
    assert [(p.seed, p.optimizer) for p, _ in runs] == [(s, n) for s in (3, 4) for n in ("sgd", "adamw")]
    assert {(p.epochs, p.batch_size, p.model) for p, _ in runs} == {(2, 32, "logistic")}
    assert all(task is digits for _, task in runs)

    assert display.done == count_steps(race, digits) == 2 * (2 * 5 + 2 * 2 * 6)
    assert report == tmp_path / "report.html"
    assert report.stat().st_size > 1000
    assert "AdamW" in said
    assert (results["parameters"], results["steps"], results["target"]) == (650, 12, 50.0)
    assert results["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert results["tuning"]["grid"] == [1e-4, 1e-1]
    for entrant in results["entrants"]:
        tried = results["tuning"]["trials"][entrant["name"]]
        best = max(tried, key=lambda t: (t["metric"], -t["loss"]))
        assert entrant["hyperparameters"]["lr"] == best["lr"]
        assert [run["seed"] for run in entrant["runs"]] == [3, 4]
        for run in entrant["runs"]:
            assert [r["step"] for r in run["history"]] == [6, 12]
            assert set(run["history"][0]) == {
                "step",
                "epoch",
                "seconds",
                "lr",
                "train_loss",
                "test_loss",
                "test_metric",
            }
    assert results["entrants"][0]["hyperparameters"]["momentum"] == 0.9
    assert not list(tmp_path.rglob("*.pt"))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4


def test_a_killed_race_repeats_nothing_that_is_finished(tmp_path, digits, recorded):
    race = small_race()
    first, *_ = start(race, digits, tmp_path)
    recorded.clear()
    start(race, digits, tmp_path)
    assert recorded == []
    (tmp_path / "runs" / "adamw-seed4.json").unlink()
    (tmp_path / "tuning" / "sgd-lr0.1.json").unlink()
    again, *_ = start(race, digits, tmp_path)
    assert [(p.optimizer, p.seed, p.lr) for p, _ in recorded] == [("sgd", 1004, 0.1), ("adamw", 4, 0.1)]
    for old, new in zip(first["entrants"], again["entrants"], strict=True):
        for a, b in zip(old["runs"], new["runs"], strict=True):
            assert [r["test_loss"] for r in a["history"]] == [r["test_loss"] for r in b["history"]]


def test_ctrl_c_stops_between_steps_and_the_run_continues(tmp_path, digits, recorded, monkeypatch):
    race = small_race(rates=(), settings={"adamw": {"lr": 0.01}})
    whole, *_ = start(race, digits, tmp_path / "whole")
    folder = tmp_path / "cut"
    real = Display.step
    monkeypatch.setattr(Display, "step", lambda self, steps, state: real(self, steps, state) or self.done + steps == 22)
    with pytest.raises(KeyboardInterrupt):
        start(race, digits, folder)
    monkeypatch.undo()
    assert [p.name for p in (folder / "runs").glob("*.pt")] == ["adamw-seed3.checkpoint.pt"]
    again, *_ = start(race, digits, folder)
    for old, new in zip(whole["entrants"], again["entrants"], strict=True):
        for a, b in zip(old["runs"], new["runs"], strict=True):
            assert [r["test_loss"] for r in a["history"]] == [r["test_loss"] for r in b["history"]]
    assert whole["tuning"] is None
    assert whole["entrants"][1]["hyperparameters"]["lr"] == 0.01


def test_a_trial_that_was_cut_continues_too(tmp_path, digits, monkeypatch):
    race = small_race(optimizers=("adamw",), seeds=(0,), tune_epochs=2)
    whole, *_ = start(race, digits, tmp_path / "whole")
    real = Display.step
    monkeypatch.setattr(Display, "step", lambda self, steps, state: real(self, steps, state) or steps == 7)
    with pytest.raises(KeyboardInterrupt):
        start(race, digits, tmp_path / "cut")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "cut").rglob("*.pt")] == ["adamw-lr0.0001.checkpoint.pt"]
    again, *_ = start(race, digits, tmp_path / "cut")
    assert again["tuning"] == whole["tuning"]


def test_what_diverges_is_recorded_and_loses(tmp_path, digits):
    race = small_race(optimizers=("sgd", "adamw"), rates=(), settings={"sgd": {"lr": 1e18}}, seeds=(0,), model="mlp")
    results, _, said, _ = start(race, digits, tmp_path)
    assert results["entrants"][0]["runs"][0]["diverged"] is True
    assert results["entrants"][1]["runs"][0]["diverged"] is False
    assert "sgd, seed 0: diverged after step 1" in said


def test_what_an_optimizer_refuses_is_kept_with_its_sentence_and_the_race_goes_on(tmp_path, digits, monkeypatch):
    def refuse(self, closure=None):
        raise TypeError("not\nlike this")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    results, page, said, display = start(small_race(seeds=(0,)), digits, tmp_path)
    sgd, adamw = (results["tuning"]["trials"][name] for name in ("SGD", "AdamW"))
    assert [(t["error"], t["loss"], t["diverged"]) for t in sgd] == [("TypeError: not like this", None, False)] * 2
    assert [t["error"] for t in adamw] == [None, None]
    (run,) = results["entrants"][0]["runs"]
    assert (run["error"], run["steps"], run["history"]) == ("TypeError: not like this", 0, [])
    assert "sgd, seed 0: failed after step 0: TypeError: not like this" in said
    assert "SGD at 0.0001, 0.1: TypeError: not like this" in page.read_text()
    assert results["entrants"][1]["runs"][0]["error"] is None
    assert display.done == count_steps(small_race(seeds=(0,)), digits)


def test_tuning_leaves_diverging_rates_aside_and_names_the_end_of_the_grid(tmp_path, digits):
    race = small_race(optimizers=("sgd",), rates=(0.01, 0.1, 1e18), seeds=(0,), model="mlp", tune_epochs=2)
    results, _, said, _ = start(race, digits, tmp_path)
    trials = results["tuning"]["trials"]["SGD"]
    assert [t["diverged"] for t in trials] == [False, False, True]
    assert trials[2]["metric"] is None
    assert results["entrants"][0]["hyperparameters"]["lr"] == 0.1
    assert "tuning sgd: lr 0.1 of 3 tried" in said
    assert "an end of the grid" not in said
    race = small_race(optimizers=("sgd",), rates=(1e17, 1e18), seeds=(0,), model="mlp")
    with pytest.raises(racing.LabError, match=r"no run finished; .*report.html says why"):
        start(race, digits, tmp_path / "none")
    assert "No run finished on digits" in (tmp_path / "none" / "report.html").read_text()


def test_the_grid_is_logarithmic():
    assert log_grid(1e-4, 1, 9) == (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1, 1.0)
    assert log_grid(1e-3, 1e-1, 1) == (1e-2,)


def test_entrants_that_reach_into_layers_get_a_model_each(tmp_path, digits):
    race = small_race(optimizers=("isaac", "isaac-adamw"), rates=(), seeds=(0,))
    check_race(race, digits)
    results, *_ = start(race, digits, tmp_path)
    assert [entrant["runs"][0]["error"] for entrant in results["entrants"]] == [None, None]
    assert [entrant["hyperparameters"]["damping"] for entrant in results["entrants"]] == ["relative(1.0)"] * 2


def test_a_race_is_checked_before_it_starts(digits):
    with pytest.raises(racing.LabError, match="gpt takes text"):
        check_race(small_race(model="gpt"), digits)
    with pytest.raises(racing.LabError, match="sgd cannot be built"):
        check_race(small_race(settings={"sgd": {"momentum": -1}}), digits)
