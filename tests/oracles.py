"""Slow dense float64 definitions, written from the equations and not from the code."""

import torch


def spans(dim, block_size=None):
    """Consecutive runs of columns, the last one shorter."""
    size = block_size or dim
    return [(start, min(start + size, dim)) for start in range(0, dim, size)]


def dense_power(matrix, power):
    """A symmetric positive semidefinite matrix to a real power, by its eigendecomposition."""
    if power == 0:
        return torch.eye(len(matrix), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag(values.clamp_min(0) ** power) @ vectors.mT


def low_rank_power(rows, damping, power, block_size=None):
    """``(λI + RᵀR)**power``, through the singular values of R: their squares lose no small eigenvalue to rounding."""
    rows = rows.double()
    out = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start, stop in spans(rows.shape[1], block_size):
        part = rows[:, start:stop]
        values = torch.full((stop - start,), damping, dtype=torch.float64)
        vectors = torch.eye(stop - start, dtype=torch.float64)
        if len(part):
            _, singular, basis = torch.linalg.svd(part, full_matrices=True)
            values[: len(singular)] += singular**2
            vectors = basis.mT
        out[start:stop, start:stop] = vectors @ torch.diag(values**power) @ vectors.mT
    return out


def window_fisher(gradients, window, damping, block_size=None):
    """``λI + mean of g gᵀ`` over the last ``window`` gradients, or over those there are, within blocks."""
    seen = [g.double() for g in gradients[-window:]]
    dim = len(gradients[0])
    mean = sum(torch.outer(g, g) for g in seen) / len(seen)
    out = torch.zeros(dim, dim, dtype=torch.float64)
    for start, stop in spans(dim, block_size):
        out[start:stop, start:stop] = mean[start:stop, start:stop]
    return out + damping * torch.eye(dim, dtype=torch.float64)


class MFAC:
    """The M-FAC optimizer of one flat parameter."""

    def __init__(self, theta, *, lr, momentum, window, damping, block_size=None, weight_decay=0.0):
        self.theta, self.seen, self.momentum_buffer = theta.double(), [], torch.zeros(len(theta), dtype=torch.float64)
        self.lr, self.momentum, self.window, self.damping = lr, momentum, window, damping
        self.block_size, self.weight_decay = block_size, weight_decay

    def step(self, gradient):
        self.seen.append(gradient.double())
        fisher = window_fisher(self.seen, self.window, self.damping, self.block_size)
        self.momentum_buffer = self.momentum * self.momentum_buffer + torch.linalg.solve(fisher, gradient.double())
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.lr * self.momentum_buffer


def decay_and_truncate(curvature, observation, decay, rank):
    """The ``rank`` heaviest directions of ``α G + (1−α) d dᵀ``."""
    mixed = decay * curvature + (1 - decay) * torch.outer(observation, observation)
    values, vectors = torch.linalg.eigh(mixed)
    keep = min(rank, len(values))
    values, vectors = values[-keep:].clamp_min(0), vectors[:, -keep:]
    return vectors @ torch.diag(values) @ vectors.mT


class Ginger:
    """The Ginger optimizer of one flat parameter."""

    def __init__(self, theta, *, lr, betas, rank, damping, clip=None, weight_decay=0.0):
        dim = len(theta)
        self.theta, self.curvature = theta.double(), torch.zeros(dim, dim, dtype=torch.float64)
        self.average, self.steps = torch.zeros(dim, dtype=torch.float64), 0
        self.lr, self.betas, self.rank, self.damping = lr, betas, rank, damping
        self.clip, self.weight_decay = clip, weight_decay

    def step(self, gradient, observation=None):
        gradient = gradient.double()
        observation = gradient if observation is None else observation.double()
        self.steps += 1
        self.curvature = decay_and_truncate(self.curvature, observation, self.betas[1], self.rank)
        self.average = self.betas[0] * self.average + (1 - self.betas[0]) * gradient
        corrected = self.average / (1 - self.betas[0] ** self.steps)
        matrix = self.curvature + self.damping * torch.eye(len(gradient), dtype=torch.float64)
        direction = torch.linalg.solve(matrix, corrected)
        if self.clip is not None:
            direction = direction.clamp(-self.clip, self.clip)
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.lr * direction


class AdaHesScale:
    """The AdaHesScale optimizer of one flat parameter."""

    def __init__(self, theta, *, lr, betas, eps=1e-8, clip=None, trust=None, weight_decay=0.0, maximize=False):
        self.theta, self.m, self.v = theta.double(), *torch.zeros(2, len(theta), dtype=torch.float64)
        self.steps, self.looks, self.update = 0, 0, None
        self.lr, self.betas, self.eps, self.clip, self.trust = lr, betas, eps, clip, trust
        self.weight_decay, self.sign = weight_decay, -1 if maximize else 1

    def step(self, gradient, diagonal=None):
        self.steps += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * self.sign * gradient.double()
        if diagonal is not None:
            self.looks += 1
            self.v = self.betas[1] * self.v + (1 - self.betas[1]) * diagonal.double() ** 2
        mean = self.m / (1 - self.betas[0] ** self.steps)
        root = (self.v / (1 - self.betas[1] ** self.looks)).sqrt()
        update = mean / (root + self.eps)
        if self.clip is not None:
            update = update.clamp(-self.clip, self.clip)
        self.update = self.lr * update
        if self.trust is not None:
            curved = float((root * self.update**2).sum())
            self.update = self.update * min(1.0, (2 * self.trust / curved) ** 0.5)
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.update


def block_means(matrix, labels):
    """Each off-diagonal block replaced by its mean, each diagonal block by its mean diagonal and mean off-diagonal."""
    matrix, out = matrix.double(), torch.zeros_like(matrix, dtype=torch.float64)
    groups = [torch.nonzero(labels == k).flatten() for k in range(int(labels.max()) + 1)]
    for i, mine in enumerate(groups):
        for j, other in enumerate(groups):
            block = matrix[mine][:, other]
            if i != j:
                out[mine[:, None], other] = block.mean()
                continue
            size = len(mine)
            inside = torch.full((size, size), 0.0, dtype=torch.float64)
            if size > 1:
                inside += (block.sum() - block.trace()) / (size * (size - 1))
            inside.fill_diagonal_(float(block.trace()) / size)
            out[mine[:, None], other] = inside
    return out


class BlockMeanAdaGrad:
    """AdaGrad of one flat parameter with the block means of the sum, or bias-corrected average, of outer products."""

    def __init__(self, theta, labels, *, lr, damping, decay=None, whiten=False, weight_decay=0.0):
        dim = len(theta)
        self.theta, self.labels, self.total = theta.double(), labels, torch.zeros(dim, dim, dtype=torch.float64)
        self.moment, self.steps = torch.zeros(dim, dtype=torch.float64), 0
        self.lr, self.damping, self.decay, self.whiten, self.weight_decay = lr, damping, decay, whiten, weight_decay

    def step(self, gradient):
        gradient, damping = gradient.double(), self.damping
        self.steps += 1
        past, now = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
        count = self.steps if self.decay is None else 1 - self.decay**self.steps  # what the weights add up to
        if self.whiten:
            self.moment = past * self.moment + now * gradient**2
            gradient = gradient / (self.moment / count).sqrt()
            damping = damping * self.steps if self.decay is None else damping
        self.total = past * self.total + now * torch.outer(gradient, gradient)
        mean = block_means(self.total if self.decay is None else self.total / count, self.labels)
        direction = dense_power(mean + damping * torch.eye(len(gradient), dtype=torch.float64), -0.5) @ gradient
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.lr * direction


def hessian_diagonal(loss, params):
    """``∂²L/∂θ_i²`` for every coordinate of every parameter: one more backward pass for each."""
    gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    diagonals = []
    for param, gradient in zip(params, gradients, strict=True):
        diagonal = torch.zeros_like(param)
        if gradient.requires_grad:
            for i, entry in enumerate(gradient.flatten().unbind()):
                row = torch.autograd.grad(entry, param, retain_graph=True, materialize_grads=True)[0]
                diagonal.view(-1)[i] = row.flatten()[i]
        diagonals.append(diagonal)
    return tuple(diagonals)
