"""Whole networks against the exact diagonal: bounds are measured errors rounded up, see the table in NETWORKS."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from operations import LOSSES, Draw
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracles
from quadric import hessian_diagonal
from quadric.backprop.walk import Walk


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classify(model, shape, classes):
    x, labels = randn(6, *shape), torch.arange(6) % classes
    return lambda: F.cross_entropy(model(x), labels)


def tanh_mlp():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, classify(model, (6,), 4)


def relu_convolutions():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return model, classify(model, (2, 6, 6), 3)


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_one, self.norm_two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


def residual():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, classify(model, (2, 6, 6), 3)


def transformer(norm_first):
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 3)})
    x, labels = randn(3, 5, 8), torch.arange(15) % 3
    return model, lambda: F.cross_entropy(model["head"](model["layer"](x)).flatten(0, 1), labels)


class Block(nn.Module):
    """Causal attention and SwiGLU, each after a norm and around a shortcut."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_one, self.norm_two = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_one(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm_two(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    """A small language model that shares its embedding with its head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 8), nn.Embedding(6, 8)
        self.block, self.norm = Block(8, 2), nn.LayerNorm(8)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.norm(self.block(x)) @ self.tokens.weight.t()


def gpt():
    model = GPT()
    nn.init.normal_(model.tokens.weight, std=0.4)
    text = torch.randint(7, (4, 7), generator=torch.Generator().manual_seed(0))
    return model, lambda: F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def recurrent(kind):
    model = nn.ModuleDict({"cell": kind(3, 5, batch_first=True), "head": nn.Linear(5, 2)})
    x, labels = randn(6, 4, 3), torch.arange(6) % 2
    return model, lambda: F.cross_entropy(model["head"](model["cell"](x)[0][:, -1]), labels)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 1, 1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        skip = F.silu(self.first(x))
        return self.last(torch.cat([skip, F.silu(self.up(F.silu(self.norm(self.down(skip)))))], 1))


def u_net():
    model = UNet()
    x, target = randn(3, 1, 6, 6), (randn(3, 1, 6, 6, seed=1) > 0).double()
    return model, lambda: F.binary_cross_entropy_with_logits(model(x), target)


def vgg():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(), nn.Linear(20, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    return model, classify(model, (2, 8, 8), 3)


class Mixer(nn.Module):
    """Patches mixed along places, then along channels."""

    def __init__(self):
        super().__init__()
        self.norm_one, self.norm_two, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.places = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x):
        x = x + self.places(self.norm_one(x).mT).mT
        return self.head((x + self.channels(self.norm_two(x))).mean(1))


def mixer():
    model = Mixer()
    return model, classify(model, (4, 6), 3)


def graph_convolutions():
    model = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)])
    edges = (randn(9, 9) > 0.5).double()
    adjacency = (edges + edges.t() + torch.eye(9)).clamp(max=1)
    adjacency = adjacency / adjacency.sum(1, keepdim=True)
    x, labels, seen = randn(9, 5, seed=1), torch.arange(9) % 3, torch.arange(9) < 6

    def loss():
        y = F.elu(adjacency @ model[0](x))
        y = F.elu(adjacency @ model[1](y))
        return F.cross_entropy(model[2](adjacency @ y)[seen], labels[seen])

    return model, loss


def variational():
    encoder, decoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), nn.Linear(3, 6)
    model = nn.ModuleDict({"encoder": encoder, "hidden": nn.Linear(3, 8), "decoder": nn.Linear(8, 6)})
    x, noise = randn(6, 6).sigmoid(), randn(6, 3, seed=1)
    del decoder

    def loss():
        mean, log_variance = model["encoder"](x).chunk(2, -1)
        code = mean + noise * (0.5 * log_variance).exp()
        rebuilt = model["decoder"](F.softplus(model["hidden"](code)))
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
        return (F.binary_cross_entropy_with_logits(rebuilt, x, reduction="sum") + divergence) / len(x)

    return model, loss


def siamese():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    one, two, labels = randn(8, 5), randn(8, 5, seed=1), torch.tensor([1.0, -1.0] * 4).double()
    return model, lambda: F.cosine_embedding_loss(model(one), model(two), labels, margin=-0.5)


def clipped_policy():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "actor": nn.Linear(8, 3), "critic": nn.Linear(8, 1)}
    )
    states, actions, gains, returns = randn(12, 4), torch.arange(12) % 3, randn(12, seed=1), randn(12, seed=2)
    with torch.no_grad():
        old = model["actor"](model["body"](states)).log_softmax(-1).gather(1, actions[:, None])[:, 0]
    old = old + 0.2 * randn(12, seed=3)

    def loss():
        features = model["body"](states)
        policy = torch.distributions.Categorical(logits=model["actor"](features))
        ratio = (policy.log_prob(actions) - old).exp()
        surrogate = torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains).mean()
        value = 0.5 * (model["critic"](features)[:, 0] - returns).pow(2).mean()
        return value - surrogate - 0.01 * policy.entropy().mean()

    return model, loss


def soft_actor(by_noise):
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "mean": nn.Linear(8, 2), "log_std": nn.Linear(8, 2)}
    )
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double().requires_grad_(False)
    states, noise = randn(12, 4), randn(12, 2, seed=1)

    def loss():
        features = model["body"](states)
        mean, log_std = model["mean"](features), model["log_std"](features).clamp(-5, 2)
        before = mean + noise * log_std.exp()
        if by_noise:
            log_p = -noise.pow(2) / 2 - log_std - 2 * (math.log(2) - before - F.softplus(-2 * before))
        else:
            log_p = torch.distributions.Normal(mean, log_std.exp()).log_prob(before) - torch.log(
                1 - before.tanh().pow(2) + 1e-6
            )
        return (0.2 * log_p.sum(-1) - critic(torch.cat([states, before.tanh()], -1))[:, 0]).mean()

    return model, loss


def deep_set():
    model = nn.ModuleDict(
        {
            "each": nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 6)),
            "all": nn.Sequential(nn.Mish(), nn.Linear(6, 1)),
        }
    )
    x, target = randn(6, 5, 3), randn(6, 1, seed=1)
    return model, lambda: F.huber_loss(model["all"](model["each"](x).sum(1)), target)


class VisionTransformer(nn.Module):
    """Patches, a token for the class and learnt positions."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.patches, self.layer, self.norm, self.head = nn.Conv2d(1, 6, 2, 2), layer, nn.LayerNorm(6), nn.Linear(6, 3)
        self.token, self.places = nn.Parameter(0.5 * torch.randn(1, 1, 6)), nn.Parameter(0.5 * torch.randn(1, 5, 6))

    def forward(self, x):
        y = self.patches(x).flatten(2).mT
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.places
        return self.head(self.norm(self.layer(y)[:, 0]))


def vision_transformer():
    model = VisionTransformer()
    return model, classify(model, (1, 4, 4), 3)


def rotated(x):
    """Each pair of entries turned by an angle that grows with the place."""
    angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
    one, two = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


class Llama(nn.Module):
    """RMS norms by hand, rotary places, keys and values that two heads share, SwiGLU."""

    def __init__(self):
        super().__init__()
        self.tokens, self.scale = nn.Embedding(7, 8), nn.Parameter(torch.ones(2, 8))
        self.q, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.k, self.v = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.gate, self.up, self.down = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 7)

    def norm(self, x, place):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale[place]

    def forward(self, tokens):
        x = self.tokens(tokens)
        y = self.norm(x, 0)
        q, k, v = (part(y).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm(x, 1)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def llama():
    model = Llama()
    text = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
    return model, lambda: F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def wave_net():
    model = nn.ModuleList([nn.Conv1d(2, 4, 1), nn.Conv1d(4, 8, 2), nn.Conv1d(4, 8, 2, dilation=2)])
    model.extend([nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 5, 1)])
    x, labels = randn(3, 2, 8), (torch.arange(24) % 5).view(3, 8)

    def loss():
        y, skipped = model[0](x), 0
        for place in (1, 2):
            one, two = model[place](F.pad(y, (place, 0))).chunk(2, 1)
            z = model[place + 2](torch.tanh(one) * torch.sigmoid(two))
            y, skipped = y + z, skipped + z
        return F.cross_entropy(model[5](F.relu(skipped)), labels)

    return model, loss


def mixture_of_experts():
    experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(3)])
    model = nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": experts, "head": nn.Linear(4, 3)})
    x = randn(10, 4)

    def loss():
        shares, chosen = model["gate"](x).softmax(-1).topk(2, -1)
        shares, out = shares / shares.sum(-1, keepdim=True), torch.zeros_like(x)
        for k, expert in enumerate(experts):
            rows, places = (chosen == k).nonzero(as_tuple=True)
            out = out.index_add(0, rows, shares[rows, places, None] * expert(x[rows]))
        return F.cross_entropy(model["head"](out), torch.arange(10) % 3)

    return model, loss


def neural_ode():
    field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    model = nn.ModuleDict({"field": field, "head": nn.Linear(4, 3)})
    x = randn(6, 4)

    def loss():
        y = x
        for _ in range(5):
            y = y + 0.2 * field(y)
        return F.cross_entropy(model["head"](y), torch.arange(6) % 3)

    return model, loss


def hypernetwork():
    model = nn.ModuleDict({"maker": nn.Linear(3, 72), "head": nn.Linear(4, 3)})
    code, x = randn(3, seed=2), randn(5, 2, 5, 5)

    def loss():
        filters = (model["maker"](code) / 5).view(4, 2, 3, 3)
        return F.cross_entropy(model["head"](F.conv2d(x, filters).tanh().mean((2, 3))), torch.arange(5) % 3)

    return model, loss


def normalising_flow():
    shifts = [nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)]
    mixing = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)) for _ in range(2)]
    model, x = nn.ModuleList([*shifts, *mixing]), randn(8, 4)

    def loss():
        y, volume = x, 0
        for shift, mix in zip(shifts, mixing, strict=True):
            weight = mix.weight + 2 * torch.eye(4, dtype=x.dtype)
            y = y @ weight
            one, two = y.chunk(2, -1)
            scale, move = shift(one).chunk(2, -1)
            y = torch.cat([one, two * scale.tanh().exp() + move], -1)
            volume = volume + scale.tanh().sum(-1) + torch.linalg.slogdet(weight)[1]
        return (0.5 * y.pow(2).sum(-1) - volume).mean()

    return model, loss


def random_field():
    model = nn.ModuleDict({"scores": nn.Linear(3, 4)})
    model.register_parameter("moves", nn.Parameter(0.5 * torch.randn(4, 4)))
    x, labels = randn(3, 5, 3), (torch.arange(15) % 4).view(3, 5)

    def loss():
        scores = model["scores"](x)
        total = scores[:, 0]
        for t in range(1, 5):
            total = torch.logsumexp(total.unsqueeze(2) + model.moves, 1) + scores[:, t]
        own = scores.gather(2, labels[..., None]).sum((1, 2)) + model.moves[labels[:, :-1], labels[:, 1:]].sum(1)
        return (total.logsumexp(-1) - own).mean()

    return model, loss


def mixture_density():
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 9))
    x, y = randn(8, 2), randn(8, seed=1)

    def loss():
        weights, means, spreads = model(x).chunk(3, -1)
        parts = torch.distributions.Normal(means, F.softplus(spreads) + 0.1)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), parts)
        return -mixture.log_prob(y).mean()

    return model, loss


def squeeze_and_excite():
    model = nn.ModuleDict(
        {
            "up": nn.Conv2d(2, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "squeeze": nn.Linear(4, 2),
            "excite": nn.Linear(2, 4),
            "down": nn.Conv2d(4, 4, 1),
            "last": nn.BatchNorm2d(4),
            "head": nn.Linear(4, 3),
        }
    )

    def forward(x):
        y = F.silu(model["norm"](model["up"](x)))
        gate = torch.sigmoid(model["excite"](F.silu(model["squeeze"](y.mean((2, 3))))))
        return model["head"]((model["last"](model["down"](y * gate[:, :, None, None])) + y).mean((2, 3)))

    return model, classify(forward, (2, 6, 6), 3)


def contrastive():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = randn(6, 4)
    near = x + 0.3 * randn(6, 4, seed=1)

    def loss():
        one, two = F.normalize(model(x), dim=-1), F.normalize(model(near), dim=-1)
        return F.cross_entropy(one @ two.t() / 0.5, torch.arange(6))

    return model, loss


# Builder, and bounds from measured values: of the relative L1 error from above, of the cosine from below.
NETWORKS = {
    "tanh MLP": (tanh_mlp, 0.12, 0.99),
    "ReLU convolutions": (relu_convolutions, 0.23, 0.99),
    "BatchNorm residual": (residual, 0.42, 0.8),
    "transformer, post-norm": (functools.partial(transformer, False), 0.22, 0.98),
    "transformer, pre-norm": (functools.partial(transformer, True), 0.16, 0.99),
    "GPT": (gpt, 0.65, 0.7),
    "LSTM": (functools.partial(recurrent, nn.LSTM), 0.12, 0.99),
    "GRU": (functools.partial(recurrent, nn.GRU), 0.46, 0.95),
    "RNN": (functools.partial(recurrent, nn.RNN), 0.38, 0.9),
    "U-Net": (u_net, 0.56, 0.88),
    "VGG": (vgg, 0.2, 0.99),
    "Mixer": (mixer, 0.18, 0.97),
    "graph convolutions": (graph_convolutions, 0.3, 0.97),
    "variational": (variational, 0.01, 0.999),
    "clipped policy": (clipped_policy, 0.18, 0.99),
    "soft actor": (functools.partial(soft_actor, True), 0.03, 0.999),
    "deep set": (deep_set, 0.6, 0.78),
    "vision transformer": (vision_transformer, 0.18, 0.99),
    "LLaMA": (llama, 0.09, 0.99),
    "WaveNet": (wave_net, 0.06, 0.99),
    "mixture of experts": (mixture_of_experts, 0.17, 0.99),
    "neural ODE": (neural_ode, 0.16, 0.98),
    "hypernetwork": (hypernetwork, 0.02, 0.999),
    "normalising flow": (normalising_flow, 0.26, 0.94),
    "random field": (random_field, 0.5, 0.96),
    "mixture density": (mixture_density, 0.66, 0.85),
}
# Where the estimate is poor: terms that cancel, or that multiply each other, come from the same input by several paths.
POOR = {
    "siamese": (siamese, 1.3),
    "soft actor by log_prob": (functools.partial(soft_actor, False), 3.3),
    "squeeze and excite": (squeeze_and_excite, 2.1),
    "contrastive": (contrastive, 6.8),
}
LAST = {
    "tanh MLP": "4",
    "ReLU convolutions": "5",
    "BatchNorm residual": "4",
    "transformer, post-norm": "head",
    "transformer, pre-norm": "head",
    "LSTM": "head",
    "GRU": "head",
    "RNN": "head",
    "U-Net": "last",
    "VGG": "11",
    "Mixer": "head",
    "graph convolutions": "2",
    "variational": "decoder",
    "clipped policy": "critic",
    "deep set": "all.1",
    "vision transformer": "head",
    "LLaMA": "head",
    "WaveNet": "5",
    "mixture of experts": "head",
    "neural ODE": "head",
    "hypernetwork": "head",
}


def build(name):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return (NETWORKS | POOR)[name][0]()
    finally:
        torch.set_default_dtype(torch.float32)


@functools.cache
def measured(name):
    """Dictionaries by parameter: the estimate, its Gauss–Newton form, the squared gradient and the exact diagonal."""
    model, loss = build(name)
    names, params = zip(*model.named_parameters(), strict=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        exact = oracles.hessian_diagonal(loss(), params)
    squares = [g**2 for g in torch.autograd.grad(loss(), params)]
    found = [hessian_diagonal(loss(), params), hessian_diagonal(loss(), params, gauss_newton=True), squares, exact]
    return [dict(zip(names, tensors, strict=True)) for tensors in found]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()))


def error(found, exact):
    return float((found - exact).abs().sum() / exact.abs().sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_is_near_the_exact_diagonal(name):
    estimate, _, _, exact = map(flat, measured(name))
    _, most, least = NETWORKS[name]
    assert error(estimate, exact) <= most
    assert cosine(estimate, exact) >= least


@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_beats_the_squared_gradient_at_its_best_scale(name):
    estimate, _, squares, exact = map(flat, measured(name))
    assert error(estimate, exact) < error(squares * (squares @ exact / (squares @ squares)), exact)


@pytest.mark.parametrize("name", POOR)
def test_what_is_known_to_be_poor_is_finite_and_no_worse_than_measured(name):
    estimate, _, _, exact = map(flat, measured(name))
    assert estimate.isfinite().all()
    assert error(estimate, exact) <= POOR[name][1]


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_is_exact(name):
    estimate, gauss_newton, _, exact = measured(name)
    last = [key for key in exact if key.startswith(LAST[name] + ".")]
    assert len(last) == 2
    for key in last:
        torch.testing.assert_close(estimate[key], exact[key], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gauss_newton[key], exact[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_backward_of_the_user_s_brings_the_same_and_its_gradient_stays_bitwise(name):
    model, loss = build(name)
    names, params = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(), params, materialize_grads=True)
    total = loss()
    with Walk(total, params) as walk:
        total.backward()
    for key, p, found, gradient in zip(names, params, walk.finished(params), gradients, strict=True):
        torch.testing.assert_close(found, measured(name)[0][key], rtol=1e-12, atol=1e-14)
        assert torch.equal(torch.zeros_like(p) if p.grad is None else p.grad, gradient)


def test_both_forms_agree_where_the_network_is_piecewise_linear():
    for name in ("ReLU convolutions", "VGG"):
        estimate, gauss_newton, _, _ = map(flat, measured(name))
        torch.testing.assert_close(estimate, gauss_newton, rtol=1e-10, atol=1e-10)


ROW_BY_ROW = [
    name
    for name, entry in LOSSES.items()
    if isinstance(entry.arguments[0], Draw)
    and entry.arguments[0].shape == (3, 4)
    and entry.arguments[0].sampler is torch.randn
    and sum(isinstance(a, Draw) and a.differentiated for a in entry.arguments) == 1
    and "norm" not in name  # a norm of all rows ties them together
]


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_a_linear_model_is_exact_with_every_loss(name):
    entry = LOSSES[name]
    _, *rest = entry.draw()
    x, weight, bias = randn(3, 5), randn(4, 5, seed=1).requires_grad_(), randn(4, seed=2).requires_grad_()

    def loss(exact):
        return sum(y.sum() for y in entry.evaluate([F.linear(x, weight, bias), *rest], exact))

    expected = oracles.hessian_diagonal(loss(True), [weight, bias])
    for found, one in zip(hessian_diagonal(loss(False), [weight, bias]), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "activation", [torch.tanh, torch.sigmoid, F.gelu, F.silu, F.softplus, F.mish, F.elu, F.relu, torch.sin, torch.exp]
)
def test_a_chain_of_single_neurons_is_exact_at_any_depth(activation):
    torch.manual_seed(0)
    layers = [nn.Linear(1, 1).double() for _ in range(6)]
    params = [p for layer in layers for p in layer.parameters()]
    x, target = randn(7, 1), randn(7, 1, seed=1)

    def loss():
        y = x
        for layer in layers:
            y = activation(layer(y))
        return F.mse_loss(y, target)

    for found, exact in zip(hessian_diagonal(loss(), params), oracles.hessian_diagonal(loss(), params), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
