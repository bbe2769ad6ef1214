"""Condition a model's weight gradients by their inputs, under any optimizer, with and without accumulated gradients.

Run it with ``python examples/isaac.py``; it needs torch and quadric, and takes a few seconds.

One line conditions the model, and torch's own optimizers step on what arrives. Printed after a backward, the handle
says what is conditioned, how, and at what cost. At the end the batches come in four parts each: by default every part
is conditioned by its own rows, and with ``pooled=True`` the sum by all of them.
"""

import torch
from torch import nn
from torch.nn import functional as F

import quadric

STEPS, BATCH, PARTS = 200, 128, 4


def data():
    """Inputs of very different sizes, and classes that depend on all of them."""
    generator = torch.Generator().manual_seed(0)
    whitened = torch.randn(2000, 30, generator=generator)
    teacher = nn.utils.skip_init(nn.Linear, 30, 5, bias=False)
    nn.init.normal_(teacher.weight, generator=generator)
    return 0.5 + whitened * torch.logspace(0, -2, 30), teacher(whitened).argmax(1)


def train(make_optimizer, points, labels, parts=1, **conditioning):
    """Train from the same start; return the loss at the end and the handle on the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    handle = quadric.isaac(model, **conditioning) if conditioning else None
    optimizer = make_optimizer(model.parameters())
    if conditioning.get("pooled"):
        handle.attach(optimizer)
    for _ in range(STEPS):
        rows = torch.randint(len(points), (BATCH,))
        optimizer.zero_grad()
        for part in rows.chunk(parts):
            (F.cross_entropy(model(points[part]), labels[part]) / parts).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(points), labels).item(), handle


def main():
    """Two optimizers, plain and conditioned; then conditioned with accumulated gradients, in both ways."""
    torch.set_num_threads(1)  # a network of this size is as fast on one
    points, labels = data()
    optimizers = {
        "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    }
    damping = quadric.relative(1.0)
    print("training loss after", STEPS, "steps")
    for name, make in optimizers.items():
        plain, _ = train(make, points, labels)
        conditioned, handle = train(make, points, labels, damping=damping)
        print(f"  {name:5}  plain {plain:.3f}, conditioned {conditioned:.3f}")
    print(handle)
    print("the conditioned AdamW with each batch in", PARTS, "parts")
    for pooled in (False, True):
        loss, _ = train(optimizers["AdamW"], points, labels, PARTS, damping=damping, pooled=pooled)
        print(f"  {'pooled' if pooled else 'each part by itself'}: {loss:.3f}")


if __name__ == "__main__":
    main()
