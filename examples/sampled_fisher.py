"""Train with Ginger on the true Fisher matrix: its curvature observes labels sampled from the model.

Run it with ``python examples/sampled_fisher.py``; it needs torch and quadric, and takes a few seconds.

The gradient at the true labels says where to go. The squared gradient at labels drawn from the model's own prediction
averages to the Fisher matrix, which for cross-entropy is the Gauss-Newton matrix. Squares of the gradient at the true
labels average to another matrix, the empirical Fisher. The script trains with one and with the other, and at the end
gathers the heaviest directions of both matrices at the parameters it has reached, in the same units.
"""

import torch
from torch import nn
from torch.nn import functional as F

import quadric

STEPS, BATCH = 300, 64


def data():
    """Points on three noisy spirals, and which spiral each is on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 3
    along = torch.rand(1200, generator=generator)
    angle = 4 * along + labels * 2 * torch.pi / 3 + 0.15 * torch.randn(1200, generator=generator)
    return torch.stack([along * angle.cos(), along * angle.sin()], 1) * 2, labels


def train(model, points, labels, sampled):
    """Train in place; the only difference is one line."""
    optimizer = quadric.Ginger(model.parameters(), lr=3e-2, rank=8, damping=1e-2)
    for _ in range(STEPS):
        rows = torch.randint(len(points), (BATCH,))
        outputs = model(points[rows])
        optimizer.zero_grad()
        if sampled:
            optimizer.observe(quadric.sampled_loss(outputs, kind="categorical"))  # costs one more backward
        F.cross_entropy(outputs, labels[rows]).backward()
        optimizer.step()


def heaviest(model, points, labels, sampled):
    """The largest eigenvalue of the Fisher matrix of all parameters, true or empirical, from 400 batches."""
    params = list(model.parameters())
    estimate = quadric.HeaviestDirections(sum(p.numel() for p in params), rank=16, decay=0.999, damping=1e-8)
    for _ in range(400):
        rows = torch.randint(len(points), (BATCH,))
        outputs = model(points[rows])
        # A mean over BATCH examples has squares BATCH times smaller than one example's: bring both to one scale.
        loss = quadric.sampled_loss(outputs) if sampled else BATCH**0.5 * F.cross_entropy(outputs, labels[rows])
        estimate.update(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, params)]))
    weight = 1 - 0.999**400  # what the weights of 400 observations add up to
    return torch.linalg.matrix_norm(estimate.matrix().rows, 2).item() ** 2 / weight


def main():
    """Train twice from the same start."""
    torch.set_num_threads(1)  # a network of this size is as fast on one
    points, labels = data()
    for sampled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
        train(model, points, labels, sampled)
        with torch.no_grad():
            outputs = model(points)
        accuracy = 100 * (outputs.argmax(-1) == labels).float().mean().item()
        print("labels sampled from the model:" if sampled else "plain gradients:")
        print(f"  loss {F.cross_entropy(outputs, labels).item():.3f}, accuracy {accuracy:.1f} %")
        print(f"  largest eigenvalue of the Fisher matrix      {heaviest(model, points, labels, True):.2f}")
        print(f"  largest eigenvalue of the empirical Fisher   {heaviest(model, points, labels, False):.2f}")


if __name__ == "__main__":
    main()
