"""Which training examples do the test losses hang on? Influence on scikit-learn's handwritten digits, and its proof.

Run it with ``python examples/influence.py``; it needs torch, scikit-learn and quadric, and takes about ten seconds.

A logistic regression is trained to its minimum. ``quadric.influence`` predicts, for every training digit, by how much
the test loss would rise if the digit had been left out. Then some digits are left out in truth and the model trained
again: the script prints both numbers. At the end a few training labels are made wrong, and influence finds them.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import quadric

TRAIN, LEFT_OUT, WRONG, DRAWS = 1000, 5, 50, 8
L2 = 0.01  # the λ in the mean loss + λ/2 |w|²


def load():
    """Images in [0, 1] and labels, to train and to test, in double precision because tiny differences count here."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).flatten(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[rows], labels[rows]) for rows in order.tensor_split([TRAIN])]


def loss_fn(model, batch):
    """The mean loss of a batch, without the L2 term."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def sampled_loss_fn(model, batch):
    """A loss at labels drawn from the model, for the true Fisher matrix: here the Hessian of the loss."""
    images, _ = batch
    return quadric.sampled_loss(model(images))


def train(model, batch, weights):
    """Minimise the weighted sum of the losses and the L2 term, in place."""
    images, labels = batch
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = weights @ F.cross_entropy(model(images), labels, reduction="none") + L2 / 2 * squares
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def main():
    """Predict, retrain, and find wrong labels."""
    torch.set_num_threads(1)  # a model of this size is as fast on one
    torch.manual_seed(0)
    training, test = load()
    equal = torch.full((len(training[0]),), 1 / len(training[0]), dtype=torch.float64)
    model = train(nn.Linear(64, 10, dtype=torch.float64), training, equal)
    found = quadric.influence(
        model,
        training,
        test,
        loss_fn=loss_fn,
        fisher_loss_fn=sampled_loss_fn,
        num_grads=DRAWS * len(training[0]),
        damping=L2,
    )
    print("influence of", found.shape[1], "training on", found.shape[0], "test examples")
    rises, before = found.mean(0), loss_fn(model, test)
    order = rises.argsort()
    print("test loss", f"{before.item():.4f}, and its rise if one training example is left out:")
    for j in (*order[:LEFT_OUT].tolist(), *order[-LEFT_OUT:].tolist()):
        others = equal.clone()
        others[j] = 0
        risen = loss_fn(train(copy.deepcopy(model), training, others), test) - before
        told = f"predicted {rises[j].item():+.2e}, retrained {risen.item():+.2e}"
        print(f"  example {j:4}, a {training[1][j].item()}: {told}")

    labels = training[1].clone()
    wrong = torch.randperm(len(labels))[:WRONG]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (WRONG,))) % 10
    training = training[0], labels
    model = train(model, training, equal)
    rises = quadric.influence(model, training, test, loss_fn=loss_fn, fisher_loss_fn=sampled_loss_fn, damping=L2).mean(
        0
    )
    harmful = rises.argsort()[:WRONG]
    print(f"{WRONG} labels made wrong: {torch.isin(harmful, wrong).sum()} of them among the {WRONG} most harmful")


if __name__ == "__main__":
    main()
