import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import oracles
import quadric
from quadric import ISAAC, InputMoment, isaac, relative
from quadric.layers.maps import Linear, Sizes
from quadric.methods import isaac as module
from quadric.methods.isaac import INVERSE, Way, cheapest, condition, sample

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
few = settings(deadline=None, max_examples=40)

LAYERS = {  # how to make a layer, and the shape of its input
    "fewer rows than features": (lambda: nn.Linear(9, 5), (4, 9)),
    "more rows than features": (lambda: nn.Linear(7, 5), (30, 7)),
    "more outputs than rows": (lambda: nn.Linear(3, 20), (4, 3)),
    "one row": (lambda: nn.Linear(4, 4), (1, 4)),
    "a vector": (lambda: nn.Linear(9, 5), (9,)),
    "tokens": (lambda: nn.Linear(9, 5), (3, 4, 9)),
    "four axes": (lambda: nn.Linear(9, 5, bias=False), (2, 1, 2, 9)),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 6)),
    **{
        f"convolution, {mode}": (
            lambda mode=mode: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode),
            (2, 4, 6, 5),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "convolution, few positions": (lambda: nn.Conv2d(20, 6, 3, padding=1), (1, 20, 3, 3)),
    "convolution, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 7)),
    "convolution, same and even": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 7)),
    "convolution, valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid"), (2, 4, 7)),
    "convolution, unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(6, 5, 1, bias=False), (2, 6, 3, 3)),
    "three axes": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 3, 3)),
    "transposed, few positions": (lambda: nn.ConvTranspose1d(20, 6, 3, stride=2, groups=2), (2, 20, 3)),
    "transposed, three axes": (lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2), (2, 4, 2, 2, 2)),
}


def made(name, seed=0):
    """A layer in float64, an input, and a gradient of its output as a mean over examples leaves it."""
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    output = layer(x)
    return layer, x, torch.randn_like(output) / len(x)


def weight_gradient(layer, x, g):
    """What one backward leaves in the weight's grad."""
    layer.zero_grad()
    layer(x).backward(g)
    return layer.weight.grad.clone()


def absolute(damping, rows):
    """λ of either kind for the rows of all groups that are looked at."""
    return damping.share * oracles.mean_square(rows) if isinstance(damping, relative) else damping


def definition(layer, x, g, damping, picks=None):
    """ζ* of a layer, in its weight's shape; the moment of some rows only where picks are given."""
    inputs, outputs = oracles.input_rows(layer, x), oracles.output_rows(layer, x, g)
    looked = inputs if picks is None else [rows[picks] for rows in inputs]
    level = absolute(damping, looked)
    parts = zip(outputs, inputs, looked, strict=True)
    return oracles.weight_of(layer, [oracles.conditioned(gs, rows, level, some) for gs, rows, some in parts])


def close(a, b, tolerance=1e-10):
    """Relative to the largest entry of what is expected."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def ways(handle):
    return [layer.way.name for layer in handle.layers.values() if layer.looked]


# ζ* is its definition.


@pytest.mark.parametrize("damping", [0.01, 0.7, relative(1.0)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_conditioned_as_defined(name, damping):
    layer, x, g = made(name)
    plain, twin = copy.deepcopy(layer), x.clone().requires_grad_()
    x.requires_grad_()
    handle = isaac(layer, damping, max_rows=None)
    got, wanted = weight_gradient(layer, x, g), weight_gradient(plain, twin, g)
    close(got, definition(plain, x, g, damping))
    assert not torch.allclose(got, wanted, rtol=1e-3)
    assert torch.equal(layer(x), plain(twin))
    assert torch.equal(x.grad, twin.grad)
    assert layer.bias is None or torch.equal(layer.bias.grad, plain.bias.grad)
    handle.remove()
    assert torch.equal(weight_gradient(layer, x, g), wanted)


WAYS = {  # the layer, its input, the rows looked at, and the way that is cheapest
    "features": (lambda: nn.Linear(7, 5), (30, 7), None),
    "features of some": (lambda: nn.Linear(3, 4), (60, 3), 20),
    "rows": (lambda: nn.Linear(9, 5), (4, 9), None),
    "rows, more outputs": (lambda: nn.Linear(9, 15), (4, 9), None),
    "sampled rows": (lambda: nn.Linear(20, 5), (40, 20), 2),
    "sampled rows of all": (lambda: nn.Linear(60, 2), (30, 60), None),
    "mixed rows": (lambda: nn.Linear(20, 20), (10, 20), 2),
    "features of some patches": (lambda: nn.Conv2d(4, 6, 1, groups=2), (2, 4, 6, 6), 20),
    "rows of patches": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 4, 4), None),
    "sampled rows of patches": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), (2, 8, 5, 5), 3),
    "features of some pixels": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), (2, 4, 6, 6), 20),
    "rows of pixels": (lambda: nn.ConvTranspose2d(40, 40, 2, groups=2), (1, 40, 2, 2), None),
    "rows of pixels, wide": (lambda: nn.ConvTranspose2d(40, 4, 2, groups=2), (1, 40, 2, 2), None),
    "rows of patches, many outputs": (lambda: nn.Conv2d(30, 60, 1), (1, 30, 2, 2), None),
    "features of patches, many outputs": (lambda: nn.Conv1d(2, 50, 1), (1, 2, 6), None),
    "sampled rows of pixels": (lambda: nn.ConvTranspose2d(40, 4, 2, groups=2), (2, 40, 5, 5), 3),
}


def way_of(case):
    return next(way for way in ("features", "sampled rows", "mixed rows", "rows") if case.startswith(way))


@pytest.mark.parametrize("damping", [0.3, relative(0.5)], ids=str)
@pytest.mark.parametrize("case", WAYS)
def test_every_way_is_the_definition_on_the_rows_picked(case, damping, monkeypatch):
    make, shape, most = WAYS[case]
    if case == "sampled rows of all":  # never the cheapest, and right all the same
        monkeypatch.setattr(module, "cheapest", lambda *_: Way("sampled rows", 1.0))
    picked = []

    def sampling(rows, most, device):
        picked.append(sample(rows, most, device))
        return picked[-1]

    monkeypatch.setattr(module, "sample", sampling)
    torch.manual_seed(1)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    plain, handle = copy.deepcopy(layer), isaac(layer, damping, max_rows=most)
    for _ in range(3):
        got = weight_gradient(layer, x, g)
        assert ways(handle) == [way_of(case)]
        close(got, definition(plain, x, g, damping, picked[-1]))
    (looked,) = (found.looked for found in handle.layers.values())
    assert looked == (most or len(oracles.input_rows(plain, x)[0]))


@pytest.mark.parametrize("way", ["features", "sampled rows", "mixed rows"])
def test_rows_picked_twice_count_twice(way):
    layer, x, g = made("more rows than features")
    picks = torch.tensor([3, 3, 17, 29, 3])
    gradient, raised = condition(Linear(), g, x, layer.weight.detach(), picks, 0.2, 1, way)
    close(gradient, definition(layer, x, g, 0.2, picks))
    assert not raised


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [{"decay": 0.9}, {"refresh_every": 5}, {"decay": 0.0}], ids=str)
def test_an_average_begins_as_the_definition(name, given):
    layer, x, g = made(name)
    plain, handle = copy.deepcopy(layer), isaac(layer, 0.7, max_rows=None, **given)
    close(weight_gradient(layer, x, g), definition(plain, x, g, 0.7))
    assert ways(handle) == ["average"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_pool_of_one_pass_is_the_definition(name):
    layer, x, g = made(name)
    plain, handle = copy.deepcopy(layer), isaac(layer, relative(0.5), max_rows=None, pooled=True)
    close(weight_gradient(layer, x, g), weight_gradient(plain, x, g), 1e-14)  # not yet
    handle.condition_()
    close(layer.weight.grad, definition(plain, x, g, relative(0.5)))
    assert ways(handle) == ["pooled"]


# Models.


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def twice(layer):
    return nn.Sequential(layer, nn.Tanh(), layer)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x[:2]).sum() * 2 + self.layer(x[2:]).square().sum()


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3)), (5, 9)),
    "fused attention": (FusedAttention, (2, 5, 8)),
    "shared": (lambda: twice(nn.Linear(6, 6)), (4, 6)),
    "shared convolution": (lambda: twice(nn.Conv1d(3, 3, 3, padding=1)), (2, 3, 6)),
    "used on parts": (TwoBranches, (7, 6)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1)),
        (2, 3, 5, 5),
    ),
    "auto-encoder": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3, stride=2)),
        (3, 2, 9),
    ),
}


def uses(model, x):
    """A backward of a plain model's squares, and for each layer what it met in each use: inputs and gradients."""
    met = {layer: [] for layer in model.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)}

    def hook(layer, args, output):
        output.register_hook(lambda g: met[layer].append((args[0].detach(), g)))

    hooks = [layer.register_forward_hook(hook) for layer in met]
    model(x).square().mean().backward()
    for handle in hooks:
        handle.remove()
    return met


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_conditioned_layer_by_layer_and_use_by_use(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    plain, damping = copy.deepcopy(model), relative(0.3)
    handle = isaac(model, damping)
    model(x).square().mean().backward()
    met = uses(plain, x)
    names = {layer: name for name, layer in plain.named_modules()}
    assert {found.name for found in handle.layers.values()} == {f"{names[layer]}.weight" for layer in met}
    for layer, found in met.items():
        wanted = sum(definition(layer, a, g, damping) for a, g in found)
        close(model.get_submodule(names[layer]).weight.grad, wanted)
    conditioned = {f"{names[layer]}.weight" for layer in met}
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert name in conditioned or torch.equal(p.grad, q.grad)


def conditioned_block(gradient, a, damping):
    """ζ* from a finished gradient."""
    a = a.reshape(-1, a.shape[-1])
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    return gradient @ (absolute(damping, [a]) * torch.linalg.inv(a.T @ a / len(a) + absolute(damping, [a]) * eye))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "others", "three", "widths"])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"masked": True}], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_projections_of_an_attention(kind, batch_first, call, pooled):
    torch.manual_seed(0)
    widths = {"kdim": 5, "vdim": 7} if kind == "widths" else {}
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first, **widths).double()
    query, key, value = (torch.randn(3, 4, widths.get(width, 8), dtype=torch.float64) for width in ("", "kdim", "vdim"))
    inputs = {
        "self": (query, query, query),
        "others": (query, key, key),
        "three": (query, key, value),
        "widths": (query, key, value),
    }[kind]
    if call.get("masked"):
        length = 4 if batch_first else 3
        call = {"attn_mask": torch.ones(length, length).triu(1).bool(), "need_weights": False}
    plain, damping = copy.deepcopy(model), relative(0.4)
    handle = isaac(model, damping, pooled=pooled)
    y, y_plain = model(*inputs, **call)[0], plain(*inputs, **call)[0]
    g = torch.randn_like(y)
    y.backward(g)
    y_plain.backward(g)
    if pooled:
        handle.condition_()
    identity = copy.deepcopy(plain).requires_grad_(False)
    identity.out_proj.weight.copy_(torch.eye(8))
    identity.out_proj.bias.zero_()
    close(
        model.out_proj.weight.grad,
        conditioned_block(plain.out_proj.weight.grad, identity(*inputs, **call)[0], damping),
    )
    if kind == "widths":
        for name, a in zip("qkv", inputs, strict=True):
            wanted = conditioned_block(getattr(plain, f"{name}_proj_weight").grad, a, damping)
            close(getattr(model, f"{name}_proj_weight").grad, wanted)
    else:
        for i, a in enumerate(inputs):
            part = slice(8 * i, 8 * i + 8)
            close(model.in_proj_weight.grad[part], conditioned_block(plain.in_proj_weight.grad[part], a, damping))
    for name in ("in_proj_bias", "out_proj.bias"):
        assert torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad)


class Masked(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.computed(), self.bias)

    def computed(self):
        return self.weight * (torch.arange(self.weight.numel()) % 3 > 0).view_as(self.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Masked(6, 4),
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
        lambda: parametrizations.weight_norm(nn.Conv1d(6, 4, 3)),
        lambda: parametrizations.spectral_norm(nn.ConvTranspose1d(6, 4, 3)).eval(),
    ],
)
def test_gradients_go_on_from_a_computed_weight(make):
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn((2, 6, 6) if "Conv" in type(layer).__name__ else (5, 6), dtype=torch.float64)
    plain, handle = copy.deepcopy(layer), isaac(layer, 0.5)
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)
    weight = plain.computed() if isinstance(plain, Masked) else plain.weight
    wanted = torch.autograd.grad(weight, [p for p in plain.parameters() if p is not plain.bias],
                                 definition(plain, x, g, 0.5))  # fmt: skip
    for p, gradient in zip((p for p in layer.parameters() if p is not layer.bias), wanted, strict=True):
        close(p.grad, gradient)
    assert len(ways(handle)) == 1


def test_a_head_tied_to_an_embedding_is_conditioned_in_its_use_alone():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, numbers):
            return self.head(torch.tanh(self.tokens(numbers)))

    model = Tied().double()
    plain, numbers = copy.deepcopy(model), torch.tensor([1, 2, 6, 2, 0])
    isaac(model, 0.5)
    model(numbers).square().sum().backward()
    plain(numbers).square().sum().backward()
    hidden = torch.tanh(plain.tokens(numbers)).detach()
    as_head = 2 * F.linear(hidden, plain.head.weight.detach()).T @ hidden
    wanted = plain.head.weight.grad - as_head + conditioned_block(as_head, hidden, 0.5)
    close(model.head.weight.grad, wanted)


def test_a_lazy_layer_is_conditioned_from_its_first_pass():
    torch.manual_seed(0)
    layer = nn.LazyLinear(3)
    isaac(layer, 0.5)
    x = torch.randn(5, 4)
    layer(x).backward(g := torch.randn(5, 3))
    assert type(layer) is nn.Linear
    close(layer.weight.grad.double(), definition(layer, x, g, 0.5), 1e-5)


# What it means.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [{}, {"max_rows": 3}, {"decay": 0.5}, {"output_damping": 1e12}], ids=str)
def test_a_large_damping_leaves_the_gradient(name, given):
    layer, x, g = made(name)
    wanted = weight_gradient(copy.deepcopy(layer), x, g)
    isaac(layer, 1e12, **given)
    close(weight_gradient(layer, x, g), wanted, 1e-9)


@pytest.mark.parametrize("rows", [4, 40])
def test_a_small_damping_is_the_gauss_newton_step_of_least_squares(rows):
    """Scaled by 1/λ, one step from anywhere solves linear least squares."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 3, bias=False).double()
    x, y = torch.randn(rows, 9, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    start = layer.weight.detach().clone()
    isaac(layer, 1e-9)
    ((layer(x) - y).square().sum() / (2 * rows)).backward()
    stepped = start - layer.weight.grad / 1e-9
    # From the start, the smallest step to the least residual.
    solved = start + (torch.linalg.pinv(x) @ (y - x @ start.T)).T
    close(stepped, solved, 1e-6)


@st.composite
def problems(draw):
    name = draw(st.sampled_from(sorted(LAYERS)))
    damping = draw(st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
    damping = relative(damping) if draw(st.booleans()) else damping
    options = {
        "max_rows": draw(st.sampled_from([None, 1, 3, 10])),
        "decay": draw(st.sampled_from([None, 0.0, 0.9])),
        "refresh_every": draw(st.sampled_from([1, 3])),
        "output_damping": draw(st.sampled_from([None, 1e-3, relative(1.0)])),
    }
    return name, damping, options, draw(st.integers(0, 9))


@few
@given(problems())
def test_always_a_descent_direction_that_is_no_longer_than_the_gradient(problem):
    name, damping, options, seed = problem
    layer, x, g = made(name, seed)
    plain, _ = copy.deepcopy(layer), isaac(layer, damping, **options)
    for scale in (1.0, 1e3, 1e-3):
        got, gradient = weight_gradient(layer, scale * x, g), weight_gradient(plain, scale * x, g)
        assert float((got * gradient).sum()) > 0
        assert float(got.norm()) <= float(gradient.norm()) * (1 + 1e-9)


@few
@given(st.sampled_from(sorted(LAYERS)), st.floats(1e-6, 1e6), st.sampled_from([None, 0.9]))
def test_a_relative_damping_does_not_see_the_scale_of_the_inputs(name, scale, decay):
    one, x, g = made(name)
    other = copy.deepcopy(one)
    isaac(one, relative(0.7), decay=decay, max_rows=None)
    isaac(other, relative(0.7), decay=decay, max_rows=None)
    close(weight_gradient(other, scale * x, g), scale * weight_gradient(one, x, g), 1e-9)


def test_an_absolute_damping_does():
    layer, x, g = made("more rows than features")
    isaac(layer, 0.7)
    got = weight_gradient(layer, 100 * x, g)
    assert not torch.allclose(got, 100 * weight_gradient(layer, x, g), rtol=0.5)


def test_a_step_by_hand():
    """One row (3, 4), λ = 1, gradient g = 2 of the output: the moment has the eigenvalue 25 along the row."""
    layer = nn.Linear(2, 1)
    isaac(layer, 1.0)
    (2 * layer(torch.tensor([[3.0, 4.0]]))).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[6.0, 8.0]]) / 26)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([2.0]))


def test_a_step_of_the_two_sided_by_hand():
    """As above, and ḡ = 2 has the square 4: with λ_g = 2 another factor 2 / (4 + 2)."""
    layer = nn.Linear(2, 1)
    isaac(layer, 1.0, output_damping=2.0)
    (2 * layer(torch.tensor([[3.0, 4.0]]))).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[6.0, 8.0]]) / 26 / 3)


# Samples of rows.


@pytest.mark.parametrize(("rows", "most"), [(10, 3), (7, 5), (12, 4), (5, 1), (1000, 999)])
def test_every_row_is_as_likely_as_any_other(rows, most):
    torch.manual_seed(0)
    draws = 4000
    picks = torch.stack([sample(rows, most, torch.device("cpu")) for _ in range(draws)])
    assert picks.shape == (draws, most)
    assert picks.dtype == torch.long
    assert bool((picks.diff(dim=1) >= 0).all())  # spread over all of them
    stretches = torch.arange(most) * rows / most
    assert bool((picks >= stretches.floor()).all())
    assert bool((picks <= (stretches + rows / most).ceil() - 1).all())
    share = torch.bincount(picks.flatten(), minlength=rows) / draws
    # A row is drawn from at most two stretches, each with a probability p: the variance is at most p₁ + p₂ = most/rows.
    assert float((share - most / rows).abs().max()) < 5 * math.sqrt(most / rows / draws)


@pytest.mark.parametrize(("rows", "most"), [(10, 10), (3, 10), (1, 1)])
def test_all_rows_are_looked_at_where_there_are_no_more(rows, most):
    assert sample(rows, most, torch.device("cpu")) is None


def test_the_moment_of_a_sample_is_unbiased():
    torch.manual_seed(0)
    rows = torch.randn(11, 3, dtype=torch.float64) * torch.arange(1, 12).unsqueeze(1)
    picks = [sample(11, 4, torch.device("cpu")) for _ in range(20_000)]
    moments = torch.stack([rows[some].T @ rows[some] / 4 for some in picks])
    error = (moments.mean(0) - rows.T @ rows / 11).abs()
    assert bool((error < 5 * moments.std(0) / math.sqrt(len(picks))).all())


def test_a_sample_is_drawn_anew_in_each_pass_and_repeats_with_the_seed():
    layer, x, g = made("more rows than features")
    isaac(layer, 0.1, max_rows=5)
    torch.manual_seed(4)
    first, second = weight_gradient(layer, x, g), weight_gradient(layer, x, g)
    torch.manual_seed(4)
    assert torch.equal(weight_gradient(layer, x, g), first)
    assert not torch.equal(first, second)


# Odd inputs.


def test_a_damping_hidden_by_rounding_is_raised_and_said_once():
    torch.manual_seed(0)
    for rows in (4, 40):
        layer = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
        handle = isaac(layer, 1e-12)
        x = 1e5 * torch.ones(rows, 9) + torch.randn(rows, 9)
        with pytest.warns(RuntimeWarning, match=r"moment of .*weight had no Cholesky factor.* 1e-12: raise it"):
            layer(x).square().mean().backward()
        plain = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
        plain.load_state_dict(layer.state_dict())
        plain(x).square().mean().backward()
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            assert bool(p.grad.isfinite().all())
            assert float((p.grad.double() * q.grad.double()).sum()) >= 0
        layer(x).square().mean().backward()  # a warning would be an error here
        handle.remove()


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("sizes", [(9, 5), (3, 20), (20, 20)])
def test_inputs_whose_squares_overflow_leave_a_finite_gradient(sizes, most):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=False)
    plain, x = copy.deepcopy(layer), torch.randn(10, sizes[0]) * 1e25
    g = torch.randn(10, sizes[1]) * 1e-25
    isaac(layer, 1.0, max_rows=most)
    torch.testing.assert_close(weight_gradient(layer, x, g), weight_gradient(plain, x, g))


@pytest.mark.parametrize("damping", [1e-3, relative(1.0)], ids=str)
@pytest.mark.parametrize("given", [{}, {"max_rows": 3}, {"decay": 0.9}, {"output_damping": relative(1.0)}], ids=str)
@pytest.mark.parametrize("name", ["fewer rows than features", "more rows than features", "convolution", "transposed"])
def test_zeros(name, damping, given):
    layer, x, g = made(name)
    isaac(layer, damping, **given)
    assert not weight_gradient(layer, torch.zeros_like(x), g).any()
    assert not weight_gradient(layer, x, torch.zeros_like(g)).any()
    assert bool(weight_gradient(layer, x, g).isfinite().all())


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9)])
@pytest.mark.parametrize("given", [{}, {"decay": 0.9}, {"pooled": True}], ids=str)
def test_no_rows(shape, given):
    layer = nn.Linear(9, 5)
    handle = isaac(layer, **given)
    layer(torch.zeros(shape)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(5, 9))
    layer(torch.ones(3, 9)).sum().backward()
    if given.get("pooled"):
        handle.condition_()
    assert bool(layer.weight.grad.any())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_no_features_or_outputs(sizes):
    layer = nn.Linear(*sizes)
    isaac(layer)
    x = torch.randn(4, sizes[0], requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == sizes[::-1]
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("given", [{}, {"max_rows": 3}, {"output_damping": 1.0}], ids=str)
def test_what_is_not_finite_stays_visible(odd, given):
    layer, x, g = made("more rows than features")
    isaac(layer, **given)
    x[1, 2] = odd
    layer(x).backward(g)
    assert not bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_enters_no_moment(side, odd, first):
    one, x, g = made("more rows than features")
    other = copy.deepcopy(one)
    given = {"decay": 0.5, "output_damping": 0.3}
    handles = isaac(one, **given), isaac(other, **given)
    if not first:
        assert torch.equal(weight_gradient(one, x, g), weight_gradient(other, x, g))
    bad, worse = x.clone(), g.clone()
    (bad if side == "inputs" else worse)[1, 2] = odd
    assert not bool(weight_gradient(one, bad, worse).isfinite().all())
    if side == "inputs":
        assert bool(torch.cat([m.average().flatten() for m in handles[0].layers["weight", None].moments.values()])
                    .isfinite().all())  # fmt: skip
    got = weight_gradient(one, 2 * x, g)
    assert bool(got.isfinite().all())
    if side == "inputs" and first:
        return  # the outputs of the bad batch were fine, and were learnt
    kept, wanted = (handle.layers["weight", None].moments for handle in handles)
    weight_gradient(other, 2 * x, g)
    key = "inputs 1x7" if side == "inputs" else "outputs 1x5"
    assert torch.equal(kept[key].average(), wanted[key].average())


def test_a_pool_takes_nothing_that_is_not_finite():
    one, x, g = made("more rows than features")
    other = copy.deepcopy(one)
    handle, reference = isaac(one, 0.5, pooled=True), isaac(other, 0.5, pooled=True)
    for layer in (one, other):
        layer(x).backward(g)
    bad = x.clone()
    bad[0, 0] = math.nan
    one(bad).backward(g)
    assert not bool(one.weight.grad.isfinite().all())
    one.weight.grad = other.weight.grad.clone()
    handle.condition_()
    reference.condition_()
    assert torch.equal(one.weight.grad, other.weight.grad)


@pytest.mark.parametrize("given", [{}, {"decay": 0.9}, {"pooled": True}], ids=str)
@pytest.mark.parametrize("name", ["more rows than features", "convolution", "transposed"])
def test_a_backward_that_asks_for_inputs_alone_is_not_counted(name, given):
    layer, x, g = made(name)
    handle = isaac(layer, **given)
    x.requires_grad_()
    plain = copy.deepcopy(layer)
    (found,) = handle.layers.values()
    for kept in ([x], [x, layer.bias]):
        got = torch.autograd.grad(layer(x), kept, g)
        wanted = torch.autograd.grad(plain(x), [x, plain.bias][: len(kept)], g)
        assert all(torch.equal(p, q) for p, q in zip(got, wanted, strict=True))
        layer(x).backward(g, inputs=kept)
    assert found.passes == 0
    assert layer.weight.grad is None
    if given.get("pooled"):
        assert found.pool is None
        layer(x).backward(g, inputs=[layer.weight])
        handle.condition_()
        got = layer.weight.grad
    else:
        (got,) = torch.autograd.grad(layer(x), [layer.weight], g)
    assert found.passes == 1
    close(got, definition(plain, x.detach(), g, 1.0))


def test_frozen_layers_and_passes_without_gradients_are_not_counted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    handle = isaac(model, decay=0.9)
    model(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert handle.layers["0.weight", None].passes == 0
    assert not handle.layers["0.weight", None].moments
    assert handle.layers["1.weight", None].passes == 1
    model.eval()
    model(torch.randn(3, 4)).sum().backward()  # a gradient is a gradient
    assert handle.layers["1.weight", None].passes == 2


# The estimate.


def test_the_average_is_corrected_for_its_start():
    """β = 0.5: the batches weigh ½, ¼, ⅛ from the last one back, and as many times more as makes them sum to one."""
    estimate = InputMoment(1, damping=1.0, decay=0.5)
    for value in (1.0, 2.0, 4.0):
        estimate.update(torch.tensor([[value]]))
    wanted = (0.125 * 1 + 0.25 * 4 + 0.5 * 16) / 0.875
    torch.testing.assert_close(estimate.average(), torch.full((1, 1, 1), wanted))
    torch.testing.assert_close(estimate.matrix().to_dense(), torch.full((1, 1), wanted + 1))
    torch.testing.assert_close(estimate.smoother(), torch.full((1, 1, 1), 1 / (wanted + 1)))


def test_without_a_decay_the_last_batch_is_all_there_is():
    estimate = InputMoment(2, damping=relative(2.0))
    for rows in (torch.randn(5, 2), torch.tensor([[2.0, 0.0], [0.0, 2.0]])):
        estimate.update(rows)
    torch.testing.assert_close(estimate.matrix().to_dense(), 6 * torch.eye(2))  # 2 + 2·2


def test_groups_have_their_own_moments_and_one_damping():
    torch.manual_seed(0)
    rows = torch.randn(7, 6, dtype=torch.float64)
    estimate = InputMoment(3, damping=relative(0.5), groups=2)
    estimate.update(rows)
    level = 0.5 * oracles.mean_square([rows])
    moment = rows.T @ rows / 7
    moment[:3, 3:] = moment[3:, :3] = 0
    close(estimate.matrix().to_dense(), moment + level * torch.eye(6, dtype=torch.float64))
    wanted = level * torch.linalg.inv(moment + level * torch.eye(6, dtype=torch.float64))
    close(estimate.smoother()[0], wanted[:3, :3])
    close(estimate.smoother()[1], wanted[3:, 3:])


def test_half_precision_is_summed_in_single():
    estimate = InputMoment(1)
    estimate.update(torch.full((5000, 1), 300.0, dtype=torch.float16))  # the squares overflow, and so does their sum
    torch.testing.assert_close(estimate.average(), torch.full((1, 1, 1), 90_000.0))


def batches(count, seed=0, rows=6, features=5, outputs=4):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(rows, n, dtype=torch.float64, generator=generator)  # noqa: E731
    return [(draw(features), draw(outputs)) for _ in range(count)]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [0.8, None])
@pytest.mark.parametrize("damping", [0.3, relative(0.5)], ids=str)
def test_moments_are_averages_of_the_looks(every, decay, damping):
    if every == 1 and decay is None:
        return
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    isaac(layer, damping, decay=decay, refresh_every=every)
    average, weight = torch.zeros(5, 5, dtype=torch.float64), 0.0
    past = decay or 0.0
    for step, (x, g) in enumerate(batches(7)):
        if step % every == 0:
            average, weight = past * average + (1 - past) * x.T @ x / len(x), past * weight + 1 - past
        moment = average / weight
        level = damping.share * float(moment.trace()) / 5 if isinstance(damping, relative) else damping
        wanted = level * g.T @ x @ torch.linalg.inv(moment + level * torch.eye(5, dtype=torch.float64))
        close(weight_gradient(layer, x, g), wanted)


@pytest.mark.parametrize("given", [{}, {"decay": 0.9}, {"refresh_every": 2}, {"pooled": True}], ids=str)
@pytest.mark.parametrize("kind", [float, relative])
def test_schedules_count_passes(given, kind):
    layer, asked = nn.Linear(3, 2), []

    def schedule(passes):
        asked.append(passes)
        return 1.0

    handle = isaac(layer, relative(schedule) if kind is relative else schedule, **given)
    for step in range(1, 5):
        asked.clear()
        layer(torch.randn(4, 3)).sum().backward()
        if given.get("pooled"):
            handle.condition_()
        layer.zero_grad()
        assert set(asked) == {step}


def test_a_schedule_is_followed():
    layer, x, g = made("more rows than features")
    plain = copy.deepcopy(layer)
    isaac(layer, lambda passes: 2.0**-passes)
    for step in range(1, 4):
        close(weight_gradient(layer, x, g), definition(plain, x, g, 2.0**-step))


# Two sides.


def two_sided(layer, x, g, damping, output_damping, observed=None):
    inputs, outputs = oracles.input_rows(layer, x), oracles.output_rows(layer, x, g)
    others = outputs if observed is None else oracles.output_rows(layer, x, observed)
    level = absolute(damping, inputs)
    output_level = absolute(output_damping, [len(rows) * rows for rows in others])
    parts = zip(outputs, inputs, others, strict=True)
    return oracles.weight_of(
        layer, [oracles.conditioned_twice(gs, rows, level, output_level, some) for gs, rows, some in parts]
    )


@pytest.mark.parametrize("damping", [(0.7, 0.02), (relative(0.5), relative(2.0))], ids=str)
@pytest.mark.parametrize("given", [{}, {"decay": 0.9}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_sides_with_the_gradients_at_hand(name, damping, given):
    layer, x, g = made(name)
    plain = copy.deepcopy(layer)
    isaac(layer, damping[0], output_damping=damping[1], max_rows=None, **given)
    close(weight_gradient(layer, x, g), two_sided(plain, x, g, *damping), 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_two_sides_with_sampled_gradients(name):
    layer, x, g = made(name)
    plain, sampled = copy.deepcopy(layer), torch.randn(g.shape, dtype=torch.float64) / len(x)
    handle = isaac(layer, 0.7, output_damping=relative(1.0), max_rows=None)
    output = layer(x)
    handle.observe((output * sampled).sum())
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None
    output.backward(g)  # the graph is still there
    wanted = two_sided(plain, x, g, 0.7, relative(1.0), sampled)
    close(layer.weight.grad, wanted, 1e-9)
    close(weight_gradient(layer, x, g), wanted, 1e-9)  # no longer from the gradients at hand


def test_observations_are_averaged_and_leave_grad_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    handle = isaac(model, output_damping=relative(1.0), decay=0.9)
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    for _ in range(3):
        handle.observe(quadric.sampled_loss(model(x)))
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), before, strict=True))
    moments = handle.layers["0.weight", None].moments
    assert {side: m.updates for side, m in moments.items()} == {"inputs 1x5": 1, "outputs 1x4": 4}


def test_observe_needs_a_side_to_look_at():
    layer = nn.Linear(3, 2)
    handle = isaac(layer)
    with pytest.raises(RuntimeError, match=r"output_damping is None: give isaac one"):
        handle.observe(layer(torch.ones(1, 3)).sum())


# Pooled.


@pytest.mark.parametrize("name", ["mlp", "shared", "shared convolution", "convolutions", "auto-encoder"])
@pytest.mark.parametrize("damping", [0.3, relative(0.5)], ids=str)
def test_micro_batches_pooled_are_the_whole_batch(name, damping):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().double().eval()
    x = torch.randn(7, *shape[1:], dtype=torch.float64)
    pooled, apart = copy.deepcopy(model), copy.deepcopy(model)
    handle = isaac(pooled, damping, pooled=True, max_rows=None)
    reference = isaac(model, damping, pooled=True, max_rows=None)
    isaac(apart, damping, max_rows=None)
    model(x).square().sum().backward()
    reference.condition_()
    for net in (pooled, apart):
        for part in x.split([1, 4, 2]):
            net(part).square().sum().backward()
    handle.condition_()
    for p, q, r in zip(model.parameters(), pooled.parameters(), apart.parameters(), strict=True):
        close(q.grad, p.grad, 1e-12)
        assert p.ndim == 1 or not torch.allclose(r.grad, p.grad, rtol=1e-3)
    if "shared" not in name:  # unpooled, each use is met by its own rows
        plain = make().double().eval()
        plain.load_state_dict(model.state_dict())
        isaac(plain, damping, max_rows=None)
        plain(x).square().sum().backward()
        for p, q in zip(plain.parameters(), pooled.parameters(), strict=True):
            close(q.grad, p.grad, 1e-12)


def test_a_layer_used_twice_is_pooled_over_its_uses():
    torch.manual_seed(0)
    model = TwoBranches().double()
    plain, x = copy.deepcopy(model), torch.randn(7, 6, dtype=torch.float64)
    handle = isaac(model, 0.5, pooled=True)
    model(x).backward()
    plain(x).backward()
    handle.condition_()
    close(model.layer.weight.grad, conditioned_block(plain.layer.weight.grad, x, 0.5))


def test_a_sample_stands_for_all_rows_of_its_pass(monkeypatch):
    """Two of 8 rows count four times as much as both of 2."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "sample", lambda rows, most, device: torch.tensor([1, 5]) if rows > most else None)
    layer = nn.Linear(5, 4).double()
    plain, handle = copy.deepcopy(layer), isaac(layer, 0.3, pooled=True, max_rows=2)
    many, pair = torch.randn(8, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for x in (many, pair):
        for net in (layer, plain):
            net(x).square().sum().backward()
    handle.condition_()
    moment = (8 / 2 * many[[1, 5]].T @ many[[1, 5]] + pair.T @ pair) / 10
    wanted = 0.3 * plain.weight.grad @ torch.linalg.inv(moment + 0.3 * torch.eye(5, dtype=torch.float64))
    close(layer.weight.grad, wanted, 1e-12)


def test_pools_are_averaged_over_steps_where_there_is_a_decay():
    torch.manual_seed(0)
    one = nn.Linear(5, 4).double()
    other = copy.deepcopy(one)
    handle = isaac(one, 0.3, decay=0.8, pooled=True)
    isaac(other, 0.3, decay=0.8)
    for x, g in batches(4):
        one.zero_grad()
        for part in zip(x.split(2), g.split(2), strict=True):
            one(part[0]).backward(part[1])
        handle.condition_()
        close(one.weight.grad, weight_gradient(other, x, g), 1e-12)


def test_attached_to_an_optimizer():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    other, third = copy.deepcopy(one), copy.deepcopy(one)
    isaac(one, 0.3)
    handle = isaac(other, 0.3, pooled=True)
    optimizers = [torch.optim.Adam(one.parameters()), torch.optim.Adam(other.parameters())]
    handle.attach(optimizers[1])
    for x, _ in batches(3):
        for model, optimizer, parts in ((one, optimizers[0], [x]), (other, optimizers[1], x.split(2))):
            optimizer.zero_grad()
            for part in parts:
                model(part).square().sum().backward()
            optimizer.step()
    for p, q, r in zip(one.parameters(), other.parameters(), third.parameters(), strict=True):
        close(q.detach(), p.detach(), 1e-10)
        assert not torch.equal(p, r)
    handle.remove()
    other(batches(1)[0][0]).sum().backward()
    optimizers[1].step()  # no longer attached


def test_a_step_that_was_skipped_is_forgotten():
    layer, x, g = made("more rows than features")
    plain, handle = copy.deepcopy(layer), isaac(layer, 0.5, pooled=True)
    handle.condition_()  # nothing yet
    layer(x).backward(g)
    handle.condition_()
    layer.zero_grad()
    layer(3 * x).backward(g)
    layer.zero_grad()  # skipped
    layer(x).backward(g)
    handle.condition_()
    close(layer.weight.grad, definition(plain, x, g, 0.5))
    close(layer.weight.grad, definition(plain, x, g, 0.5))
    before = layer.weight.grad.clone()
    handle.condition_()  # nothing new
    assert torch.equal(layer.weight.grad, before)


def test_a_pool_that_nobody_uses_is_said_once():
    layer, x, g = made("more rows than features")
    isaac(layer, pooled=True)
    weight_gradient(layer, x, g)
    with pytest.warns(RuntimeWarning, match=r"pooled statistics of weight were never used: call handle\.attach"):
        weight_gradient(layer, x, g)
    weight_gradient(layer, x, g)


def test_what_cannot_be_pooled_is_left_alone_with_a_reason():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    normed = parametrizations.weight_norm(nn.Linear(4, 2))
    handle = isaac(nn.Sequential(first, second, normed, nn.Linear(2, 2)), pooled=True)
    reasons = {target.name: target.reason for target in handle.targets}
    assert "used in several places" in reasons["0.weight"]
    assert "used in several places" in reasons["1.weight"]
    assert "computed from other parameters" in reasons["2.weight"]
    assert not reasons["3.weight"]


def test_pooling_is_asked_for():
    with pytest.raises(RuntimeError, match=r"pooled is False: call isaac with pooled=True"):
        isaac(nn.Linear(3, 2)).condition_()


# Settings.


def test_settings_may_change_between_passes():
    layer, x, g = made("more rows than features")
    plain, handle = copy.deepcopy(layer), isaac(layer, 0.5)
    close(weight_gradient(layer, x, g), definition(plain, x, g, 0.5))
    handle.settings["damping"] = relative(2.0)
    close(weight_gradient(layer, x, g), definition(plain, x, g, relative(2.0)))
    handle.settings["output_damping"] = 0.1
    close(weight_gradient(layer, x, g), two_sided(plain, x, g, relative(2.0), 0.1), 1e-9)
    handle.settings.update(output_damping=None, decay=0.9, damping=0.4)
    weight_gradient(layer, 7 * x, g)
    handle.settings["damping"] = 0.2
    moment = (0.9 * 49 + 1) / 1.9 * x.T @ x / len(x)
    wanted = 0.2 * g.T @ x @ torch.linalg.inv(moment + 0.2 * torch.eye(7, dtype=torch.float64))
    close(weight_gradient(layer, x, g), wanted)
    handle.settings.update(decay=None, max_rows=3)
    weight_gradient(layer, x, g)
    assert handle.layers["weight", None].looked == 3


BAD = [
    ({"damping": 0.0}, r"damping.*got 0\.0"),
    ({"damping": -2.0}, r"damping.*got -2\.0"),
    ({"damping": math.nan}, "damping.*got nan"),
    ({"damping": math.inf}, "damping.*got inf"),
    ({"damping": lambda passes: -3.0}, r"damping.*got -3\.0"),
    ({"output_damping": 0.0}, r"damping.*got 0\.0"),
    ({"output_damping": -1.0}, r"damping.*got -1\.0"),
    ({"decay": 1.0}, r"decay.*got 1\.0"),
    ({"decay": -0.1}, r"decay.*got -0\.1"),
    ({"decay": math.nan}, "decay.*got nan"),
    ({"refresh_every": 0}, "refresh_every.*got 0"),
    ({"refresh_every": 1.5}, r"refresh_every.*got 1\.5"),
    ({"max_rows": 0}, "max_rows.*got 0"),
    ({"max_rows": -4}, "max_rows.*got -4"),
    ({"max_rows": 10.0}, r"max_rows.*got 10\.0"),
    ({"max_rows": True}, "max_rows.*got True"),
    ({"max_rows": "all"}, "max_rows.*got all"),
    ({"damping": None}, "damping.*got None"),
    ({"damping": "much"}, "damping.*got much"),
    ({"damping": lambda passes: -2.0}, r"damping.*got -2\.0"),
    ({"output_damping": 1.0, "pooled": True}, r"output_damping.*got 1\.0"),
    ({"targets": "encoder"}, "'encoder' matches no weight"),
    ({"ignore": nn.Conv2d}, "Conv2d matches no weight"),
]


@pytest.mark.parametrize("make", [isaac, ISAAC])
@pytest.mark.parametrize(("given", "shown"), BAD, ids=str)
def test_bad_arguments_are_refused_with_their_value_and_a_remedy(make, given, shown):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=rf"{shown}.*: .+"):
        make(model, **given)
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("make", [isaac, ISAAC])
def test_the_parameters_are_not_the_model(make):
    with pytest.raises(ValueError, match="got generator: pass it, not its parameters"):
        make(nn.Linear(3, 2).parameters())


def test_up_to_512_rows_the_default_is_the_formula():
    """More are sampled where they cost much: here 513 rows of 300 features and one output."""
    for rows, looked in ((512, 512), (513, 64)):
        layer = nn.Linear(300, 1)
        handle = isaac(layer)
        layer(torch.randn(rows, 300)).sum().backward()
        assert next(iter(handle.layers.values())).looked == looked
    small = nn.Linear(16, 16)
    handle = isaac(small)
    small(torch.randn(2000, 16)).sum().backward()
    assert next(iter(handle.layers.values())).looked == 2000


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_share_is_refused(share):
    for schedule in (share, lambda passes: share):
        with pytest.raises(ValueError, match=rf"got {share}: .+"):
            relative(schedule)


@pytest.mark.parametrize("momentum", [1.0, -0.1, math.nan])
def test_a_bad_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"momentum.*got {momentum}: .+"):
        ISAAC(nn.Linear(3, 2), momentum=momentum)


# Cost.


def counted(layer, x, g):
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(g)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", sorted(WAYS.keys() - {"sampled rows of all"}))
def test_products_cost_what_the_plan_says(case):
    make, shape, most = WAYS[case]
    torch.manual_seed(1)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    g = torch.randn_like(layer(x))
    plain = counted(layer, x, g)
    handle = isaac(layer, max_rows=most)
    total = counted(layer, x, g)
    (found,) = handle.layers.values()
    size = found.sizes.features if found.way.name == "features" else found.looked
    assert found.way.name == way_of(case)
    assert total - plain == found.way.flops - found.sizes.groups * INVERSE * size**3


@pytest.mark.parametrize("kind", ["average", "pooled"])
@pytest.mark.parametrize("name", ["more rows than features", "more outputs than rows", "pointwise", "transposed"])
def test_averages_cost_what_the_plan_says(kind, name):
    layer, x, g = made(name)
    x.requires_grad_()
    plain = counted(layer, x, g)
    handle = isaac(layer, **({"pooled": True} if kind == "pooled" else {"decay": 0.9}))
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(g)
        if kind == "pooled":
            handle.condition_()
    (found,) = handle.layers.values()
    assert found.way.name == kind
    inversion = found.sizes.groups * INVERSE * found.sizes.features**3
    assert counter.get_total_flops() - plain == found.way.flops - inversion


def test_fewer_rows_than_features_cost_no_full_product():
    rows, features, outputs = 8, 128, 96
    layer = nn.Linear(features, outputs)
    x, g = torch.randn(rows, features, requires_grad=True), torch.randn(rows, outputs)
    plain = counted(layer, x, g)
    isaac(layer)
    extra = counted(layer, x, g) - plain
    assert extra == 2 * rows**2 * (features + outputs)
    assert extra < 2 * rows * features * outputs / 5


def test_a_moment_that_is_kept_costs_no_look():
    layer, x, g = made("more rows than features")
    isaac(layer, refresh_every=2)
    first, second = counted(layer, x, g), counted(layer, x, g)
    assert first - second == 2 * 30 * 7**2


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("features", [1, 30, 900])
def test_the_cheapest_way_is_taken(rows, features, some):
    for outputs in (1, 30, 900):
        sizes = Sizes(1, rows, features, outputs)
        for looked in {rows, max(1, rows // 10)}:
            sides = Linear().smaller_sides(sizes)
            found = cheapest(sizes, looked, sides, some)
            assert 0 < found.flops <= cheapest(sizes, looked, sides, False).flops
            assert cheapest(sizes._replace(groups=3), looked, sides, some) == found._replace(flops=3 * found.flops)
            dear = 2 * looked * features**2 + INVERSE * features**3 + 2 * features**2 * sides[1]
            assert found.flops <= dear
            assert looked < rows or found.name in ("rows", "features", "sampled rows")


@pytest.mark.parametrize(
    ("sizes", "looked", "names"),
    [
        ((64, 1024, 1024), 64, {"rows"}),
        ((8192, 256, 1024), 512, {"features"}),
        ((8192, 4096, 4096), 64, {"sampled rows", "mixed rows"}),
    ],
)
def test_usual_sizes_take_their_way(sizes, looked, names):
    sizes = Sizes(1, *sizes)
    assert cheapest(sizes, looked, Linear().smaller_sides(sizes), True).name in names


# The optimizer.


def test_two_steps_by_hand():
    """The row (1, 1): λ is the mean square 1, and the gradient (1, 1) is divided by 2 + 1."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = ISAAC(model, lr=0.3, momentum=0.5, weight_decay=0.1)
    for wanted in (-0.1, -0.1 * 0.97 - 0.15):  # 0.3/3, then 0.3 (0.5 + 1)/3 after the decay of 0.3 · 0.1
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        torch.testing.assert_close(model.weight, torch.full((1, 2), wanted))


@pytest.mark.parametrize(
    "given", [{}, {"decay": 0.9, "refresh_every": 2}, {"output_damping": relative(1.0)}, {"pooled": True}], ids=str
)
def test_it_is_isaac_and_stochastic_gradient_descent(given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    other = copy.deepcopy(model)
    one = ISAAC(model, 0.05, damping=relative(0.5), **given)
    handle, two = isaac(other, relative(0.5), **given), torch.optim.SGD(other.parameters(), 0.05, momentum=0.9)
    if given.get("pooled"):
        handle.attach(two)
    for x, _ in batches(5):
        for net, optimizer in ((model, one), (other, two)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-12)


def test_hyper_parameters_of_the_group_are_those_of_the_layers():
    layer, x, g = made("more rows than features")
    plain, optimizer = copy.deepcopy(layer), ISAAC(layer)
    optimizer.param_groups[0]["damping"] = 0.2
    close(weight_gradient(layer, x, g), definition(plain, x, g, 0.2))


def test_settings_of_a_file_are_those_of_the_layers():
    layer, x, g = made("more rows than features")
    plain, optimizer = copy.deepcopy(layer), ISAAC(layer, damping=0.5)
    weight_gradient(layer, x, g)
    optimizer.step()
    layer.load_state_dict(plain.state_dict())
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"damping": 0.1, "output_damping": 0.3}
    optimizer.load_state_dict(state)
    close(weight_gradient(layer, x, g), two_sided(plain, x, g, 0.1, 0.3), 1e-9)
    optimizer.param_groups[0]["output_damping"] = None
    close(weight_gradient(layer, x, g), definition(plain, x, g, 0.1))


def test_a_closure_of_pooled_statistics():
    layer, x, _ = made("more rows than features")
    plain, start = copy.deepcopy(layer), layer.weight.detach().clone()
    optimizer = ISAAC(layer, 0.1, damping=0.5, pooled=True)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss.detach()) == float(plain(x).square().sum().detach())
    g = 2 * plain(x).detach()
    close((start - layer.weight.detach()) / 0.1, definition(plain, x, g, 0.5))


def test_a_layer_added_later_is_trained_and_not_conditioned():
    model, late = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = ISAAC(model, lr=0.1, momentum=0.0)
    optimizer.add_param_group({"params": late.parameters()})
    x = torch.randn(4, 3)
    before = late.weight.detach().clone()
    late(model(x)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(late.weight, before - 0.1 * late.weight.grad)


@pytest.mark.parametrize("given", [{}, {"decay": 0.8}, {"decay": 0.8, "output_damping": relative(1.0)}], ids=str)
def test_training_resumes_from_a_file(given):
    def training():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        return model, ISAAC(model, 0.05, **given)

    def train(model, optimizer, data):
        for x, _ in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    data, (model, optimizer), (again, resumed) = batches(8), training(), training()
    train(model, optimizer, data[:4])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(again, resumed, data[6:7])  # over a state of its own
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, data[4:])
    train(again, resumed, data[4:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_it_trains():
    """Inputs of very different scales, which a plain gradient follows one by one."""

    def final(make):
        torch.manual_seed(0)
        scales = torch.logspace(0, -2, 20)
        x, target = torch.randn(256, 20) * scales, torch.randn(20, 3) / scales.unsqueeze(1)
        model = nn.Linear(20, 3, bias=False)
        optimizer = make(model)
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x @ target)
            loss.backward()
            optimizer.step()
        return loss.item()

    plain = min(
        final(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9)) for lr in (0.1, 0.3, 1.0, 3.0)
    )
    conditioned = final(lambda m: ISAAC(m, 300.0, damping=relative(0.01)))
    assert conditioned < 0.5 * plain


def test_half_precision_factors_in_single():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Linear(9, 5).to(dtype)
        plain, x = copy.deepcopy(layer).double(), torch.randn(12, 9).to(dtype)
        g = torch.randn(12, 5).to(dtype)
        for options in ({}, {"decay": 0.9}, {"output_damping": 1e6}, {"max_rows": 12}):
            handle = isaac(layer, 0.5, **options)
            got = weight_gradient(layer, x, g)
            assert got.dtype == dtype
            close(got.double(), definition(plain, x.double(), g.double(), 0.5), 0.02)
            for found in handle.layers.values():
                assert all(moment.average().dtype == torch.float32 for moment in found.moments.values())
            handle.remove()


def test_no_warning_in_ordinary_use():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        optimizer = ISAAC(model, damping=relative(1e-3))
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 64).relu()).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("way", ["features", "rows", "sampled rows", "mixed rows"])
def test_single_precision_holds_at_small_dampings(way, share):
    """Inputs whose moment has eigenvalues over four decades, beside their mean."""
    torch.manual_seed(0)
    sizes = {"features": (200, 20, 9), "rows": (20, 60, 30), "sampled rows": (60, 90, 9), "mixed rows": (60, 60, 70)}
    rows, features, outputs = sizes[way]
    x = 1 + torch.randn(rows, features) * torch.logspace(0, -2, features)
    g = (x @ torch.randn(features, outputs) + 0.1 * torch.randn(rows, outputs)) / rows
    picks = torch.arange(0, rows, 3) if way in ("sampled rows", "mixed rows") else None
    weight = torch.zeros(outputs, features)
    got, raised = condition(Linear(), g, x, weight, picks, relative(share), 1, way)
    looked = x if picks is None else x[picks]
    wanted = oracles.conditioned(g, x, share * oracles.mean_square([looked.double()]), looked)
    assert float((got - wanted).norm()) <= 5e-3 * float(wanted.norm())
    assert float((got.double() * (g.double().T @ x.double())).sum()) > 0
    assert not raised
