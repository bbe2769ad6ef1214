"""The options of the engine: a fraction of the rows, the exact softmax, another type; each alone and all together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from quadric import AdaHesScale, hessian_diagonal
from quadric.backprop.sampling import RowBlock


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def relative(found, expected):
    wrong = sum((one.double() - other.double()).abs().sum() for one, other in zip(found, expected, strict=True))
    return float(wrong / sum(other.double().abs().sum() for other in expected))


class Attention(nn.Module):
    """Encoder layers and a head on each token."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


class Language(nn.Module):
    """Causal attention and SwiGLU between an embedding and a head that share their weights."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(4, 8), nn.RMSNorm(8)
        self.qkv, self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((8, 24), (8, 12), (8, 12), (12, 8)))

    def forward(self, x):
        x = self.tokens((x[..., 0] > 0).long() + 2 * (x[..., 1] > 0))
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return (x @ self.tokens.weight.t()).mean(1)


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def sequential(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


NETWORKS = {
    "MLP": (lambda: sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU()), (5,)),
    "convolutions": (
        lambda: sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ELU()
        ),
        (2, 6, 6),
    ),
    "batch norm": (
        lambda: sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.SiLU()
        ),
        (2, 6, 6),
    ),
    "transformer": (Attention, (5, 8)),
    "language model": (Language, (6, 2)),
    "LSTM": (Recurrent, (4, 3)),
}


def build(name, dtype=torch.float64, rows=8):
    """A network and its loss on so many rows."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = randn(rows, *shape, seed=1)
    model = make()
    model(x.float())  # makes lazy layers
    model = model.to(dtype)
    return model, lambda: F.cross_entropy(model(x.to(dtype)), torch.arange(rows) % 4)


class Products(TorchDispatchMode):
    """The products that are formed, and the shapes of their operands."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution_backward"):
            self.shapes.append((name, [tuple(t.shape) for t in args if isinstance(t, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def products(function):
    with Products() as seen:
        function()
    return seen.shapes


# A fraction of the rows.


def mean_of_blocks(loss, params, monkeypatch, count=4):
    """H by every block in turn, averaged."""
    found = []
    for chosen in range(count):
        total = loss()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, chosen=chosen, **__: torch.tensor(chosen))
            found.append(hessian_diagonal(total, params, fraction=1 / count))
    return [sum(parts) / count for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_of_a_batch_have_the_whole_as_their_mean(name, count, monkeypatch):
    model, loss = build(name)
    params = list(model.parameters())
    whole = hessian_diagonal(loss(), params)
    close(mean_of_blocks(loss, params, monkeypatch, count), whole, 1e-12)
    assert relative(hessian_diagonal(loss(), params, fraction=1 / count), whole) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", [3, 7])
def test_rows_that_the_blocks_do_not_divide_are_shared_out(name, rows, monkeypatch):
    model, loss = build(name, rows=rows)
    close(
        mean_of_blocks(loss, list(model.parameters()), monkeypatch), hessian_diagonal(loss(), model.parameters()), 1e-12
    )


def time_first():
    model = nn.ModuleDict({"cell": nn.GRU(3, 5), "head": nn.Linear(5, 4)})
    x = randn(5, 3, 3)
    return model, lambda: F.cross_entropy(model["head"](model["cell"](x)[0]).flatten(0, 1), torch.arange(15) % 4)


def instance_norm():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(27, 4))
    x = randn(4, 2, 4, 4)
    return model, lambda: F.cross_entropy(model(x), torch.arange(4))


def scan():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    x = randn(8, 5, 3)
    return model, lambda: F.cross_entropy(model(x).cumsum(0).tanh().flatten(0, 1), torch.arange(40) % 4)


def mixed_tokens():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 4)})
    x = randn(3, 5, 8)
    return model, lambda: F.cross_entropy(model["head"](model["layer"](x)).flatten(0, 1), torch.arange(15) % 4)


@pytest.mark.parametrize("make", [time_first, instance_norm, scan, mixed_tokens])
def test_it_is_unbiased_where_the_first_axis_is_not_that_of_examples(make, monkeypatch):
    torch.manual_seed(0)
    model, loss = make()
    params = list(model.double().parameters())
    close(mean_of_blocks(loss, params, monkeypatch), hessian_diagonal(loss(), params), 1e-12)


@pytest.mark.parametrize("name", ["MLP", "convolutions"])
def test_a_block_has_the_diagonal_of_its_rows(name, monkeypatch):
    model, _ = build(name)
    params = list(model.parameters())
    x, labels = randn(8, *NETWORKS[name][1], seed=1), torch.arange(8) % 4
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(1))
    found = hessian_diagonal(F.cross_entropy(model(x), labels), params, fraction=0.25)
    close(found, hessian_diagonal(F.cross_entropy(model(x[2:4]), labels[2:4]), params))


@pytest.mark.parametrize(("name", "of_h", "of_g"), [("MLP", 5, 2), ("convolutions", 4, 1)])
def test_products_are_formed_of_the_rows_of_the_block_alone(name, of_h, of_g):
    model, loss = build(name, torch.float32)

    def rows(fraction):
        """Of the batch, in each product."""
        total = loss()
        found = products(lambda: hessian_diagonal(total, model.parameters(), fraction=fraction))
        return sorted(max(n for shape in operands for n in shape[:2] if n in (2, 8)) for _, operands in found)

    assert rows(1.0) == [8] * (of_h + of_g)
    assert rows(0.25) == [2] * of_h + [8] * of_g


def test_a_seed_brings_the_same_block_again():
    model, loss = build("MLP")
    params = list(model.parameters())
    found = []
    for seed in (3, 3):
        torch.manual_seed(seed)
        found.append(hessian_diagonal(loss(), params, fraction=0.125))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len({RowBlock(0.125).chosen for _ in range(100)}) == 8


def test_a_fraction_of_one_draws_nothing():
    model, loss = build("MLP")
    before = torch.get_rng_state()
    hessian_diagonal(loss(), model.parameters(), fraction=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fraction", [0.3, 0, 2, -0.5, 0.7, float("nan")])
def test_other_fractions_are_one_clear_error(fraction):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=f"fraction must be 1 over a whole number, got {fraction}"):
        hessian_diagonal(x.exp().sum(), [x], fraction=fraction)
    with pytest.raises(ValueError, match=f"fraction must be 1 over a whole number, got {fraction}"):
        AdaHesScale([x], fraction=fraction)
    assert x.grad is None


# The exact softmax.


def tanh_network(inputs, width, classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes)).double()


def sequences(**keywords):
    """Cross-entropy of the tokens of sequences."""
    labels = torch.arange(15) % 4
    return (3, 5, 5), lambda y: F.cross_entropy(y.flatten(0, 1), labels, **keywords)


def rows_of(**keywords):
    """Cross-entropy of rows."""
    return (6, 5), lambda y: F.cross_entropy(y, torch.arange(6) % 4, **keywords)


SOFTMAX_LOSSES = {
    "mean": rows_of(),
    "sum": rows_of(reduction="sum"),
    "class weights": rows_of(weight=torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)),
    "label smoothing": rows_of(label_smoothing=0.2),
    "weights and smoothing": rows_of(label_smoothing=0.2, weight=torch.tensor([0.2, 1.0, 3.0, 0.5]).double()),
    "ignored labels": ((6, 5), lambda y: F.cross_entropy(y, torch.tensor([0, 1, -100, 3, -100, 2]))),
    "soft targets": ((6, 5), lambda y: F.cross_entropy(y, randn(6, 4, seed=4).softmax(-1))),
    "sequences": sequences(),
    "smoothed sequences": sequences(label_smoothing=0.1),
    "log_softmax by hand": ((6, 5), lambda y: -(y.log_softmax(-1) * randn(6, 4, seed=4).softmax(-1)).sum() / 6),
    "a multiple": ((6, 5), lambda y: 3 * F.nll_loss(F.log_softmax(y, 1), torch.arange(6) % 4)),
    "some rows": ((6, 5), lambda y: F.cross_entropy(y[1:4], torch.arange(3))),
    "KL divergence": ((6, 5), lambda y: F.kl_div(y.log_softmax(1), randn(6, 4, seed=4).softmax(-1), reduction="sum")),
}
CARRIED = [name for name in SOFTMAX_LOSSES if name != "some rows"]  # which is cut out on the way to the product


@pytest.mark.parametrize("name", SOFTMAX_LOSSES)
def test_one_hidden_layer_is_exact(name):
    shape, of_logits = SOFTMAX_LOSSES[name]
    model, x = tanh_network(5, 6, 4), randn(*shape, seed=1)
    params = list(model.parameters())
    exact = oracles.hessian_diagonal(of_logits(model(x)), params)
    usual = hessian_diagonal(of_logits(model(x)), params)
    assert relative(usual, exact) > 1e-3
    found = hessian_diagonal(of_logits(model(x)), params, exact_softmax=True)
    close(found, exact if name in CARRIED else usual)


def test_gauss_newton_is_that_of_the_whole_loss_hessian():
    model, x = tanh_network(5, 6, 4), randn(6, 5, seed=1)
    params = list(model.parameters())
    y = model(x)
    found = hessian_diagonal(F.cross_entropy(y, torch.arange(6) % 4), params, gauss_newton=True, exact_softmax=True)
    p, y = y.detach().softmax(-1), model(x)
    slopes = [torch.autograd.grad(y[i, k], params, retain_graph=True) for i in range(6) for k in range(4)]
    for place, h in enumerate(found):
        j = torch.stack([part[place] for part in slopes]).view(6, 4, -1)
        expected = (p[..., None] * j**2).sum((0, 1)) - ((p[..., None] * j).sum(1) ** 2).sum(0)
        close([h.flatten()], [expected / 6])


def test_tied_weights_add_up():
    tokens, w = torch.tensor([0, 2, 1, 1]), (0.5 * randn(4, 3)).requires_grad_()
    copy_of_w = w.detach().clone().requires_grad_()

    def loss(table, head):
        return F.cross_entropy(torch.tanh(F.embedding(tokens, table)) @ head.t(), torch.tensor([1, 3, 0, 2]))

    found = hessian_diagonal(loss(w, w), [w], exact_softmax=True)
    close(found, [sum(oracles.hessian_diagonal(loss(w, copy_of_w), [w, copy_of_w]))])


@pytest.mark.parametrize(
    "of_outputs", [lambda y: y.pow(2).mean(), lambda y: y.softmax(-1).pow(2).sum(), lambda y: y.logsumexp(-1).sum()]
)
def test_without_a_log_softmax_nothing_changes(of_outputs):
    model, x = tanh_network(5, 6, 4), randn(6, 5, seed=1)
    params = list(model.parameters())
    usual = hessian_diagonal(of_outputs(model(x)), params)
    found = hessian_diagonal(of_outputs(model(x)), params, exact_softmax=True)
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_softmax_leaves_the_last_layer_exact(name):
    model, loss = build(name)
    with sdpa_kernel(SDPBackend.MATH):
        exact = oracles.hessian_diagonal(loss(), list(model.parameters()))
    found = hessian_diagonal(loss(), list(model.parameters()), exact_softmax=True)
    if name != "language model":  # whose head is its embedding
        close(found[-2:], exact[-2:])
    assert all(h.isfinite().all() for h in found)


def test_the_exact_softmax_costs_two_products_of_the_last_layer():
    model, loss = build("MLP")
    params, usual, total = list(model.parameters()), loss(), loss()
    plain = products(lambda: hessian_diagonal(usual, params))
    more = products(lambda: hessian_diagonal(total, params, exact_softmax=True))
    for shapes in plain:
        more.remove(shapes)
    assert more == [("mm", [(8, 4), (4, 6)])] * 2


# Another type.


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_gives_nearly_the_same_in_single(name):
    model, loss = build(name, torch.float32)
    params = list(model.parameters())
    expected = hessian_diagonal(loss(), params)
    found = hessian_diagonal(loss(), params, dtype=torch.bfloat16)
    assert {h.dtype for h in found} == {torch.float32}
    assert 1e-5 < relative(found, expected) < 0.02


@pytest.mark.parametrize("name", NETWORKS)
def test_double_is_for_those_who_want_it(name):
    model, loss = build(name, torch.float32)
    params = list(model.parameters())
    found = hessian_diagonal(loss(), params, dtype=torch.float64)
    assert {h.dtype for h in found} == {torch.float32}
    assert relative(found, hessian_diagonal(loss(), params)) < 1e-5


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("name", ["transformer", "language model"])
def test_every_kernel_of_attention_takes_bfloat16(name, backend):
    model, loss = build(name, torch.float32)
    params = list(model.parameters())
    expected = hessian_diagonal(loss(), params)
    with sdpa_kernel(backend):
        found = hessian_diagonal(loss(), params, dtype=torch.bfloat16)
    assert relative(found, expected) < 0.02


def test_bfloat16_under_autocast_and_in_a_model_of_half_precision():
    model, loss = build("MLP", torch.float32)
    expected = hessian_diagonal(loss(), model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        total = loss()
    assert relative(hessian_diagonal(total, model.parameters(), dtype=torch.bfloat16), expected) < 0.05
    half, loss = build("MLP", torch.bfloat16)
    found = hessian_diagonal(loss(), half.parameters(), dtype=torch.bfloat16)
    assert {h.dtype for h in found} == {torch.float32}
    assert relative(found, expected) < 0.1


STRICT = {
    "max_pool1d": (lambda x: F.max_pool1d(x[0], 2), (1, 2, 3, 6)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (1, 2, 4, 6)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (1, 2, 4, 6)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), (1, 2, 4, 6)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 3), (1, 2, 4, 5)),
    "index": (lambda x: x[torch.tensor([0, 0, 1])], (3, 4)),
    "masked": (lambda x: x[torch.tensor([True, False, True])], (3, 4)),
    "cummax": (lambda x: x.cummax(-1)[0], (3, 4)),
    "take": (lambda x: x.take(torch.tensor([0, 5, 5])), (3, 4)),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STRICT)
def test_operations_that_take_one_type_alone_are_passed_in_half_precision(name, dtype):
    function, shape = STRICT[name]
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).round().div(8).requires_grad_()
    for size in (1.0, 1e-12, 1e12):  # beyond what half precision holds
        found = hessian_diagonal(size * function(x.to(dtype)).float().pow(2).sum(), [x])
        expected = hessian_diagonal(size * function(x).pow(2).sum(), [x])
        assert relative(found, expected) < 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_in_double_takes_bfloat16(name):
    model, loss = build(name)
    params = list(model.parameters())
    found = hessian_diagonal(loss(), params, dtype=torch.bfloat16)
    assert {h.dtype for h in found} == {torch.float64}
    assert relative(found, hessian_diagonal(loss(), params)) < 0.02


# All of them together.

ALL = {"gauss_newton": True, "dtype": torch.bfloat16, "fraction": 0.25, "exact_softmax": True}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_options_together(name):
    model, loss = build(name, torch.float32)
    params = list(model.parameters())
    found = []
    for dtype in (torch.bfloat16, None):
        torch.manual_seed(1)
        found.append(hessian_diagonal(loss(), params, **ALL | {"dtype": dtype}))
    assert relative(*found) < 0.03
    before = params[-1].detach().clone()
    optimizer = AdaHesScale(params, lr=1e-2, **ALL)
    optimizer.backward(loss())
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[-1], before)


def test_groups_may_differ_in_every_option():
    model, loss = build("MLP")
    params = list(model.parameters())
    options = [{}, {"gauss_newton": True}, {"exact_softmax": True}, {"dtype": torch.float64}, {"fraction": 0.5}, ALL]
    optimizer = AdaHesScale([{"params": [p], **given} for p, given in zip(params, options, strict=True)])
    torch.manual_seed(5)
    optimizer.backward(loss())
    for place in range(4):  # those without chance
        expected = hessian_diagonal(loss(), params, **options[place])[place]
        close([optimizer._collected[place, 0]], [expected], 1e-12)
    torch.manual_seed(5)
    for place in (4, 5):
        expected = hessian_diagonal(loss(), params, **options[place])[place]
        close([optimizer._collected[place, 0]], [expected.float() if place == 5 else expected], 1e-6)


def test_a_state_dict_brings_the_options_and_the_averages_back():
    model, _ = build("convolutions", torch.float32)
    twin = copy.deepcopy(model)
    x, labels = randn(8, 2, 6, 6, seed=1).float(), torch.arange(8) % 4
    one, other = AdaHesScale(model.parameters(), lr=0.01, **ALL), AdaHesScale(twin.parameters())

    def step(network, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.backward(F.cross_entropy(network(x), labels))
        optimizer.step()
        optimizer.zero_grad()

    step(model, one, 0)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(one.state_dict())
    assert {name: other.param_groups[0][name] for name in ALL} == ALL
    for seed in (1, 2):
        step(model, one, seed)
        step(twin, other, seed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
