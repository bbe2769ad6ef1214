"""Replace one AdamW line by M-FAC and compare, on scikit-learn's handwritten digits.

Run it with ``python examples/replace_adamw.py``; it needs torch, scikit-learn and quadric, and takes a few seconds.

The loop is ordinary torch: nothing in it knows which optimizer it drives. Each optimizer gets its learning rate from
the same grid, chosen on examples that neither train nor test, and is then judged on the test digits with three other
seeds. The set is small: read the result as "both train", not as a verdict. ``quadric race`` does the same at length.
"""

import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import quadric

RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
EPOCHS, BATCH = 20, 64

OPTIMIZERS = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
    "M-FAC": lambda params, lr: quadric.MFAC(params, lr=lr, window=64, damping=1e-2),
}


def load():
    """Images in [-1, 1] with their labels: 60 % to train, 20 % to choose the learning rate, 20 % to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 8 - 1
    labels = torch.tensor(digits.target)
    parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split([1078, 1437])
    return [(images[rows], labels[rows]) for rows in parts]


def train(make_optimizer, lr, training, judging, seed):
    """Train a small network; return its accuracy in percent on the judging examples, and the milliseconds of a step."""
    images, labels = training
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make_optimizer(model.parameters(), lr)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * batches)
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH)[:batches]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    milliseconds = 1000 * (time.perf_counter() - started) / (EPOCHS * batches)
    images, labels = judging
    with torch.no_grad():
        return 100 * (model(images).argmax(-1) == labels).float().mean().item(), milliseconds


def main():
    """Choose a learning rate for each optimizer, then judge it."""
    torch.set_num_threads(1)  # a network of this size is as fast on one
    training, validation, test = load()
    for name, make in OPTIMIZERS.items():
        lr = max(RATES, key=lambda lr: train(make, lr, training, validation, seed=0)[0])
        runs = [train(make, lr, training, test, seed) for seed in (1, 2, 3)]
        accuracies, times = zip(*runs, strict=True)
        accuracy = f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} %"
        print(f"{name}: lr {lr:g}, test accuracy {accuracy}, {statistics.median(times):.2f} ms a step")


if __name__ == "__main__":
    main()
