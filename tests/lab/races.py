"""Results of races that never ran: drawn from a fixed seed, or given by each seed's final metric."""

import math
import random

# name: (ours, learning rate, final error %, seconds an epoch, step ms, memory, speed of learning)
FIELD = {
    "SGD": (False, 0.3, 3.4, 0.050, 0.86, 0.038, 0.5),
    "AdamW": (False, 0.003, 2.6, 0.058, 0.97, 0.077, 0.9),
    "Muon": (False, 0.03, 2.2, 0.118, 2.05, 0.061, 1.1),
    "MFAC": (True, 0.01, 1.9, 0.101, 1.72, 2.5, 1.2),
    "Ginger": (True, 0.01, 2.3, 0.095, 1.61, 0.35, 1.0),
    "BlockMeanAdaGrad": (True, 0.03, 2.5, 0.062, 1.02, 0.039, 0.8),
}
GRID = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]


def made_up_run(rng, seed, epochs, error, epoch_seconds, step_ms, memory, speed):
    final, pace, history, elapsed = error * rng.uniform(0.92, 1.08), speed * rng.uniform(0.95, 1.05), [], 0.0
    for epoch in range(1, epochs + 1):
        elapsed += epoch_seconds * rng.uniform(0.95, 1.05)
        left = math.exp(-pace * epoch * 0.55)
        history.append(
            {
                "step": 23 * epoch,
                "epoch": epoch,
                "seconds": elapsed,
                "lr": 0.01,
                "train_loss": 2.2 * left + 0.6 * math.exp(-pace * epoch * 0.16) * rng.uniform(0.9, 1.1) + 1e-4,
                "test_loss": 2.2 * left + 0.035 * error * rng.uniform(0.97, 1.03),
                "test_metric": 100 - final - 75 * left - 6 * math.exp(-pace * epoch * 0.2) * rng.uniform(0.8, 1.2),
            }
        )
    return {
        "seed": seed,
        "steps": 23 * epochs,
        "diverged": False,
        "error": None,
        "seconds": elapsed,
        "step_ms": step_ms * rng.uniform(0.98, 1.02),
        "state_mb": memory,
        "history": history,
    }


def made_up_race(names=tuple(FIELD), seeds=3, epochs=30, tuned=True, target=96.0):
    """Results such as a race on digits writes, drawn from a fixed seed."""
    rng = random.Random(7)
    entrants, trials = [], {}
    for name in names:
        ours, lr, *character = FIELD[name]
        runs = [made_up_run(rng, seed, epochs, *character) for seed in range(seeds)]
        entrants.append({"name": name, "ours": ours, "hyperparameters": {"lr": lr, "weight_decay": 0.0}, "runs": runs})
        trials[name] = []
        for rate in GRID:
            off = math.log10(rate / lr)
            lost = off > 1.2 or (ours and off > 0.9)
            loss = None if lost else 0.09 + 0.25 * off**2 * (2.5 if off > 0 else 1) + 0.01 * rng.random()
            metric = None if lost else 97 - 4 * off**2
            trials[name].append({"lr": rate, "loss": loss, "metric": metric, "diverged": lost, "error": None})
    return {
        "quadric": "0.1.0",
        "command": "quadric race --task digits --tune",
        "task": "digits",
        "model": "mlp",
        "description": "An MLP with one hidden layer of 128 units on 1,797 handwritten digits of 8×8 pixels.",
        "parameters": 9610,
        "epochs": epochs,
        "steps": 23 * epochs,
        "batch_size": 64,
        "schedule": "cosine",
        "seeds": list(range(seeds)),
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "target": target,
        "environment": {
            "torch": "2.13.0",
            "python": "3.12",
            "device": "cpu",
            "threads": 2,
            "started": "2026-11-20 05:20",
        },
        "tuning": {"grid": GRID, "epochs": 5, "trials": trials} if tuned else None,
        "entrants": entrants,
    }


def short_race(finals, *, higher=True, target=None, unit="%", times=None):
    """A race given by the final metric of each seed: {name: (ours, [metric or None])}; None is a diverged run."""
    race = made_up_race(names=("SGD",), seeds=1, epochs=1, tuned=False, target=target)
    race["metric"] = {"name": "accuracy" if higher else "RMSE", "unit": unit, "higher_is_better": higher}
    race["entrants"] = []
    for name, (ours, metrics) in finals.items():
        runs = []
        for seed, metric in enumerate(metrics):
            seconds = (times or {}).get(name, [1.0] * len(metrics))[seed]
            entry = {"step": 10, "epoch": 1, "seconds": seconds, "lr": 0.1, "train_loss": 0.5, "test_loss": 0.25}
            runs.append(
                {
                    "seed": seed,
                    "steps": 10,
                    "diverged": metric is None,
                    "error": None,
                    "seconds": seconds,
                    "step_ms": 2.0,
                    "state_mb": 1.0,
                    "history": [{**entry, "test_metric": metric}],
                }
            )
        race["entrants"].append({"name": name, "ours": ours, "hyperparameters": {"lr": 0.1}, "runs": runs})
    race["seeds"] = list(range(max(len(metrics) for _, metrics in finals.values())))
    return race
