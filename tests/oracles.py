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


# ISAAC: a layer is, for each of its groups, one matrix that meets rows of inputs.


def conditioned(g, a, damping, looked=None):
    """``λ gᵀa (aᵀa/B + λI)⁻¹``; the moment may be of other rows than a."""
    g, a = g.double(), a.double()
    looked = a if looked is None else looked.double()
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    return damping * g.mT @ a @ torch.linalg.inv(looked.mT @ looked / len(looked) + damping * eye)


def conditioned_twice(g, a, damping, output_damping, observed=None):
    """``λ_g (ḡᵀḡ/B + λ_g I)⁻¹ ζ*`` with ḡ = B g, or ḡ = B times other gradients of the outputs."""
    scaled = len(a) * (g if observed is None else observed).double()
    eye = torch.eye(g.shape[1], dtype=torch.float64)
    return (
        output_damping
        * torch.linalg.inv(scaled.mT @ scaled / len(a) + output_damping * eye)
        @ conditioned(g, a, damping)
    )


def _positions(image, groups):
    return [part.movedim(1, -1).reshape(-1, part.shape[1]) for part in image.chunk(groups, 1)]


def _identity_twin(layer):
    """The same convolution of one group's channels, with the identity as its weight: it copies what a kernel sees."""
    kernel = layer.weight.shape[1:]  # channels on one side, and the reach
    size = kernel.numel()
    given = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    if layer.transposed:
        given["output_padding"] = layer.output_padding
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    if layer.transposed:
        kinds = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    ends = (size, kernel[0]) if layer.transposed else (kernel[0], size)
    twin = kinds[len(kernel) - 2](*ends, tuple(kernel[1:]), bias=False, **given).double()
    twin.weight.data = torch.eye(size, dtype=torch.float64).reshape(size, *kernel)
    return twin


def input_rows(layer, x):
    """The rows of inputs of each group of a linear layer or a convolution, ``(rows, n)`` each."""
    x = x.detach().double()
    if isinstance(layer, torch.nn.Linear):
        return [x.reshape(-1, layer.in_features)]
    x = x if x.ndim == layer.weight.ndim else x.unsqueeze(0)
    if layer.transposed:
        return _positions(x, layer.groups)
    return [_positions(_identity_twin(layer)(part).detach(), 1)[0] for part in x.chunk(layer.groups, 1)]


def output_rows(layer, x, g):
    """The same rows of gradients with respect to the outputs, ``(rows, o)`` for each group."""
    g = g.detach().double()
    if isinstance(layer, torch.nn.Linear):
        return [g.reshape(-1, layer.out_features)]
    batched = x.ndim == layer.weight.ndim
    g = g if batched else g.unsqueeze(0)
    if not layer.transposed:
        return _positions(g, layer.groups)
    twin, rows = _identity_twin(layer), []
    shape = (g.shape[0], len(twin.weight), *x.shape[2 if batched else 1 :])
    for part in g.chunk(layer.groups, 1):
        reached = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(twin(reached), reached, part)
        rows.append(_positions(gradient, 1)[0])
    return rows


def weight_of(layer, matrices):
    """Matrices ``(o, n)``, one for each group, in the shape of the layer's weight."""
    if getattr(layer, "transposed", False):
        matrices = [matrix.mT for matrix in matrices]
    return torch.cat(matrices).reshape(layer.weight.shape)


def mean_square(rows):
    """``tr(aᵀa/B)/n`` over all groups."""
    return float(torch.cat([part.flatten() for part in rows]).square().mean())


# Pruning: a quadratic ½ δᵀGδ, some of whose coordinates are to go.


def shrunk(matrix, shrinkage):
    """The matrix with its off-diagonal entries times ``1 − shrinkage``."""
    return shrinkage * torch.diag(matrix.diagonal()) + (1 - shrinkage) * matrix


def among(matrix, kept, block_size=None):
    """The matrix within blocks of so many consecutive ones of the coordinates that are left; 1 for the others."""
    left = kept.nonzero().flatten()
    out = torch.eye(len(kept), dtype=torch.float64)
    for start, stop in spans(len(left), block_size):
        block = left[start:stop]
        out[block[:, None], block] = matrix[block][:, block].double()
    return out


def least_rise(matrix, weights, kept, gone):
    """The δ that takes ``gone`` to zero at the least ½ δᵀGδ, and that rise, from the Karush-Kuhn-Tucker equations.

    Coordinates that are not ``kept`` are zero already and cannot move.
    """
    matrix, dim = matrix.double(), len(weights)
    fixed = (gone | ~kept).nonzero().flatten()
    rows = torch.eye(dim, dtype=torch.float64)[fixed]
    target = torch.where(gone & kept, -weights.double(), 0)[fixed]
    system = torch.zeros(dim + len(fixed), dim + len(fixed), dtype=torch.float64)
    system[:dim, :dim], system[dim:, :dim], system[:dim, dim:] = matrix, rows, rows.mT
    move = torch.linalg.solve(system, torch.cat([torch.zeros(dim, dtype=torch.float64), target]))[:dim]
    return move, float(move @ matrix @ move / 2)


def costs_of_units(matrix, weights, kept, unit):
    """The least rise if a unit goes, for each alone."""
    rises = [least_rise(matrix, weights, kept, (unit == u) & kept)[1] for u in range(int(unit.max()) + 1)]
    return torch.tensor(rises, dtype=torch.float64)


def removed(matrix, weights, kept, unit, chosen, update):
    """δ and ½ δᵀGδ as some units go: the constrained minimum, the sum of those of single units, or no answer."""
    gone = torch.isin(unit, chosen) & kept
    if update == "joint":
        return least_rise(matrix, weights, kept, gone)
    move = torch.zeros(len(weights), dtype=torch.float64)
    if update == "single":
        move = sum((least_rise(matrix, weights, kept, (unit == u) & kept)[0] for u in chosen), move)
    move = torch.where(gone, -weights.double(), torch.where(kept, move, 0))
    return move, float(move @ matrix.double() @ move / 2)


def cheapest(costs, alive, sizes, sparsity):
    """The units that go: in order of cost a weight, each that leaves no more weights gone than the sparsity says."""
    room = round(sparsity * sum(sizes)) - (sum(sizes) - sum(alive))
    chosen = []
    for u in sorted((u for u in range(len(alive)) if alive[u]), key=lambda u: float(costs[u]) / alive[u]):
        if alive[u] <= room:
            room -= alive[u]
            chosen.append(u)
    return torch.tensor(chosen, dtype=torch.long)


def prune(weights, sparsity, matrix_at, *, rounds=1, parts=1, unit=None, update="joint", kept=None):
    """The weights, what is kept and the predicted rise; each round asks ``matrix_at(weights, kept)``."""
    weights = weights.double()
    unit = torch.arange(len(weights)) if unit is None else unit
    kept = torch.ones(len(weights), dtype=torch.bool) if kept is None else kept.clone()
    weights, rise, steps = torch.where(kept, weights, 0), 0.0, rounds * parts
    density, matrix = float(kept.double().mean()), None
    for step in range(steps):
        matrix = matrix if step % parts else matrix_at(weights, kept)
        now = 1 - density * ((1 - sparsity) / density) ** ((step + 1) / steps)
        now = sparsity if step == steps - 1 else now
        alive, sizes = ([int(((unit == u) & k).sum()) for u in range(int(unit.max()) + 1)] for k in (kept, unit >= 0))
        chosen = cheapest(costs_of_units(matrix, weights, kept, unit), alive, sizes, now)
        move, more = removed(matrix, weights, kept, unit, chosen, update)
        kept = kept & ~torch.isin(unit, chosen)
        weights, rise = torch.where(kept, weights + move, 0), rise + more
    return weights, kept, rise
