"""Examples run with a tiny budget."""

import importlib.util
import json
from pathlib import Path

import gymnasium
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # a run of an example sets it


@pytest.fixture(scope="module")
def reinforcement_learning():
    return example("reinforcement_learning")


def test_conditioned_optimizers_train_and_the_plan_is_told(monkeypatch, capsys):
    module = example("isaac")
    monkeypatch.setattr(module, "STEPS", 20)
    module.main()
    told = capsys.readouterr().out
    assert "3 weights conditioned: damping relative(share=1.0)" in told
    losses = [line.rpartition(" ")[2] for line in told.splitlines() if ": 1." in line or "conditioned 1." in line]
    assert len(losses) == 4
    assert max(map(float, losses)) < 1.6  # log 5 = 1.61 is where it begins


def test_influence_is_what_retraining_finds_and_wrong_labels_stand_out(monkeypatch, capsys):
    module = example("influence")
    for name, value in {"TRAIN": 200, "LEFT_OUT": 1, "WRONG": 10}.items():
        monkeypatch.setattr(module, name, value)
    module.main()
    told = capsys.readouterr().out
    pairs = [line.split() for line in told.splitlines() if "retrained" in line]
    harmful, helpful = [(float(words[-3].rstrip(",")), float(words[-1])) for words in pairs]
    assert max(harmful) < 0 < min(helpful)
    assert int(told.split("wrong: ")[1].split()[0]) >= 5  # chance finds one of them in two runs


def sweep(out, *arguments):
    return ["--steps", "2048", "--seeds", "7", "--jobs", "1", "--out", str(out), *arguments]


def test_a_sweep_tells_draws_and_is_not_run_twice(reinforcement_learning, tmp_path, capsys):
    reinforcement_learning.main(sweep(tmp_path, "--lr", "1e-3", "--trust", "0", "1e-5"))
    told = capsys.readouterr().out
    assert all(title in told for title in ("Adam", "AdaHesScale", "AdaHesScale, trust 1e-05"))
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(run["optimizer"], run["trust"]) for run in runs] == [
        ("adam", 0),
        ("adahesscale", 0),
        ("adahesscale", 1e-5),
    ]
    assert all([steps for steps, _ in run["curve"]] == [1024, 2048] for run in runs)
    assert len({run["curve"][0][1] for run in runs}) == 1  # one seed, one network before the first step
    reinforcement_learning.main(sweep(tmp_path, "--lr", "1e-3", "1e-2", "--optimizer", "adam"))
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4


def test_a_run_whose_numbers_overflow_is_a_collapse(reinforcement_learning):
    settings = {"env": "CartPole-v1", "steps": 2048, "seed": 0, "max_norm": 0, "clip": 0, "trust": 0}
    run = reinforcement_learning.train({**settings, "optimizer": "adahesscale", "lr": 1e15})
    assert run["diverged"]
    assert reinforcement_learning.collapsed(run)


def test_a_collapse_is_a_loss_of_what_was_gained(reinforcement_learning):
    def collapsed(*returns):
        return reinforcement_learning.collapsed({"curve": list(enumerate(returns)), "diverged": None})

    assert collapsed(20, 500, 30)
    assert collapsed(20, 9, 9)
    assert collapsed(-500, -500, -500)
    assert not collapsed(20, 500, 400)
    assert not collapsed(-500, -80, -90)
    assert collapsed(-500, -80, -480)


def test_too_few_steps_and_continuous_actions_are_told(reinforcement_learning, tmp_path, capsys):
    with pytest.raises(ValueError, match="no episode of Acrobot-v1 ended within 2048 steps"):
        reinforcement_learning.main(sweep(tmp_path, "--env", "Acrobot-v1", "--optimizer", "adam"))
    with pytest.raises(SystemExit):
        reinforcement_learning.main(sweep(tmp_path, "--env", "Pendulum-v1"))
    assert "Pendulum-v1 has no discrete actions; choose" in capsys.readouterr().err


class Corridor(gymnasium.Env):
    """Three steps to the right, and the episode ends: at a wall, or for lack of time."""

    observation_space = gymnasium.spaces.Box(0, 10, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, wall):
        self.wall = wall

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return torch.zeros(1).numpy(), {}

    def step(self, action):
        self.at += 1
        return torch.full((1,), float(self.at)).numpy(), 1.0, self.at == 3 and self.wall, self.at == 3, {}


@pytest.mark.parametrize("wall", [True, False])
def test_advantages_are_those_of_the_definition_and_resets_are_left_out(reinforcement_learning, wall):
    example = reinforcement_learning
    envs = gymnasium.vector.SyncVectorEnv([lambda: Corridor(wall)] * example.ENVS)
    torch.manual_seed(0)
    actor, critic = example.network(1, 2), example.network(1, 1)
    state, resetting = torch.as_tensor(envs.reset()[0]), torch.zeros(example.ENVS, dtype=torch.bool)
    with torch.no_grad():
        (states, _, _, _, targets), _, _ = example.collect(envs, actor, critic, state, resetting)
        v = critic(torch.tensor([[0.0], [1.0], [2.0], [3.0]])).squeeze(-1).tolist()
    assert len(states) == example.ENVS * example.HORIZON * 3 // 4  # every fourth step is a reset
    advantage, after = 0.0, 0.0 if wall else v[3]
    for place in (2, 1, 0):
        surprise = 1 - example.DISCOUNT + example.DISCOUNT * after - v[place]
        advantage, after = surprise + example.DISCOUNT * example.SMOOTHING * advantage, v[place]
        found = targets[states.squeeze(-1) == place]
        torch.testing.assert_close(found, torch.full((len(states) // 3,), advantage + v[place]))
