"""Interception: nothing changes but who forms the gradient of a weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quadric.layers.intercept import Former, LinearSite, Site, intercept, release
from quadric.layers.maps import Convolution
from quadric.layers.targets import find_targets


class Recorder(Former):
    """Forms the plain gradient, and notes of whom it was asked to."""

    def __init__(self, name, start, notes):
        super().__init__()
        self.name, self.start, self.notes = name, start, notes

    def __call__(self, kind, g, a, weight):
        self.notes.append((self.name, self.start))
        return kind.weight_gradient(g, a, weight)


def intercepted(model, targets=None):
    """A model under interception, its copy that is not, the notes of all recorders, and the sites."""
    plain, notes, formers, sites = copy.deepcopy(model), [], {}, []
    taken = [target for target in find_targets(model, targets, None) if not target.reason]
    for module in {target.module: None for target in taken}:
        names = {target.path: target.name for target in taken if target.module is module}

        def former(name, start):
            return formers.setdefault((name, start), Recorder(name, start, notes))

        sites.append(intercept(module, names, former))
    return plain, notes, sites


def leaves(inputs):
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]


def run(model, inputs, autocast=None, seed=0):
    """Outputs and gradients of everything, by name."""
    torch.manual_seed(seed)  # dropout
    inputs = leaves(inputs)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = model(*inputs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    model.zero_grad()
    differentiable = [y for y in outputs if y.requires_grad]
    gradients = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) for y in differentiable]
    torch.autograd.backward(differentiable, gradients)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {name: p.grad for name, p in model.named_parameters()}
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def check_same(got, wanted):
    """The same bits, but for weight gradients that another order of sums may round."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith(("output", "input", "buffer")) or "bias" in name or value is None:
            assert got[name] is value or torch.equal(got[name], value), name
        else:
            torch.testing.assert_close(got[name], value)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(2 * input)


class Masked(nn.Linear):
    def __init__(self, *args, **given):
        super().__init__(*args, **given)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).view_as(self.weight))

    def forward(self, input):
        return F.linear(input, self.weight * self.mask, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, input):
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (spread + 1e-5), self.bias)


class FusedAttention(nn.Module):
    """Queries, keys and values by one layer, as small GPTs have it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` on one to three inputs."""

    def __init__(self, call=None, **given):
        super().__init__()
        self.inner, self.call = nn.MultiheadAttention(8, 2, **given), call or {}

    def forward(self, query, key=None, value=None):
        key = query if key is None else key
        return self.inner(query, key, key if value is None else value, **self.call)


class Tied(nn.Module):
    """One matrix as embedding and as classifier."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, numbers):
        return self.head(torch.tanh(self.tokens(numbers)))


class Named(nn.Module):
    """Matrices of its own, whole, in parts, computed, and turned."""

    def __init__(self):
        super().__init__()
        self.whole, self.sliced = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(6, 8))
        self.turned, self.scaled = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2, 3))
        self.kernel = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        x = F.linear(x, self.whole)
        x = F.linear(x, self.sliced[:5, 2:7])
        x = F.linear(x, self.turned.t())
        x = F.conv1d(x.unsqueeze(-1), self.kernel.t().unsqueeze(-1))
        return F.linear(x.squeeze(-1).repeat(1, 2)[:, :3], self.scaled * 2)


def twice(layer):
    return nn.Sequential(layer, nn.Tanh(), layer)


def normed(norm, layer):
    torch.manual_seed(3)
    return norm(layer)


SPEC = {  # how to make a model, the shapes of its inputs, and what is asked of the recorders in a backward
    "linear": (lambda: nn.Linear(4, 3), [(5, 4)], ["weight"]),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), [(2, 5, 4)], ["weight"]),
    "own forward": (lambda: Doubled(4, 3), [(5, 4)], ["weight"]),
    "masked": (lambda: Masked(4, 3), [(5, 4)], ["weight"]),
    "standardised": (lambda: Standardised(3, 4, 3), [(2, 3, 5, 5)], ["weight"]),
    "quantisable linear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 3), [(5, 4)], ["weight"]),
    "shared": (lambda: twice(nn.Linear(4, 4)), [(5, 4)], ["0.weight"] * 2),
    "shared convolution": (lambda: twice(nn.Conv1d(3, 3, 3, padding=1)), [(2, 3, 5)], ["0.weight"] * 2),
    "fused attention": (FusedAttention, [(2, 5, 8)], ["out.weight", "qkv.weight"]),
    "convolution, unbatched": (lambda: nn.Conv2d(3, 4, 3), [(3, 6, 5)], ["weight"]),
    "convolution, same and even": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=1), [(2, 3, 7)], ["weight"]),
    "convolution, same and mixed": (
        lambda: nn.Conv3d(2, 3, (2, 3, 4), padding="same", dilation=(1, 2, 3)),
        [(2, 2, 4, 5, 6)],
        ["weight"],
    ),
    "convolution, valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid", stride=2), [(2, 3, 6, 5)], ["weight"]),
    **{
        f"convolution, {mode}": (
            lambda mode=mode: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2, padding_mode=mode),
            [(2, 4, 5, 6)],
            ["weight"],
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "circular and same": (
        lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"),
        [(2, 3, 7)],
        ["weight"],
    ),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), [(2, 6, 5, 5)], ["weight"]),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), [(2, 6, 5, 5)], ["weight"]),
    "three axes": (lambda: nn.Conv3d(2, 4, 2, stride=2, groups=2), [(2, 2, 4, 4, 4)], ["weight"]),
    "transposed, unbatched": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), [(3, 5)], ["weight"]),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        [(2, 4, 3, 4)],
        ["weight"],
    ),
    "transposed, three axes": (lambda: nn.ConvTranspose3d(2, 3, 2), [(2, 2, 3, 3, 3)], ["weight"]),
    "attention": (Attention, [(5, 2, 8)], ["inner.in_proj_weight", "inner.out_proj.weight"]),
    "attention, unbatched": (  # torch takes its three inputs for different ones
        Attention,
        [(5, 8)],
        ["inner.in_proj_weight[0]", "inner.in_proj_weight[16]", "inner.in_proj_weight[8]", "inner.out_proj.weight"],
    ),
    "attention, batch first": (
        lambda: Attention(batch_first=True, call={"need_weights": False}),
        [(2, 5, 8)],
        ["inner.in_proj_weight", "inner.out_proj.weight"],
    ),
    "attention, dropout and bias": (
        lambda: Attention(dropout=0.3, add_bias_kv=True, add_zero_attn=True),
        [(5, 2, 8)],
        ["inner.in_proj_weight", "inner.out_proj.weight"],
    ),
    "attention without bias": (
        lambda: Attention(bias=False, call={"average_attn_weights": False}),
        [(5, 2, 8)],
        ["inner.in_proj_weight", "inner.out_proj.weight"],
    ),
    "attention, masked": (
        lambda: Attention(
            batch_first=True,
            call={
                "attn_mask": torch.ones(5, 5).triu(1).bool(),
                "key_padding_mask": torch.arange(5).expand(2, 5) > 3,
                "need_weights": False,
            },
        ),
        [(2, 5, 8)],
        ["inner.in_proj_weight", "inner.out_proj.weight"],
    ),
    "attention, causal": (
        lambda: Attention(
            call={"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False}
        ),
        [(5, 2, 8)],
        ["inner.in_proj_weight", "inner.out_proj.weight"],
    ),
    "attention to others": (
        Attention,
        [(5, 2, 8), (4, 2, 8)],
        ["inner.in_proj_weight[0]", "inner.in_proj_weight[8]", "inner.out_proj.weight"],
    ),
    "attention of three": (
        Attention,
        [(5, 2, 8), (4, 2, 8), (4, 2, 8)],
        ["inner.in_proj_weight[0]", "inner.in_proj_weight[16]", "inner.in_proj_weight[8]", "inner.out_proj.weight"],
    ),
    "attention, other widths": (
        lambda: Attention(kdim=3, vdim=5),
        [(5, 2, 8), (4, 2, 3), (4, 2, 5)],
        ["inner.k_proj_weight", "inner.out_proj.weight", "inner.q_proj_weight", "inner.v_proj_weight"],
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True),
        [(2, 5, 8)],
        ["linear1.weight", "linear2.weight", "self_attn.in_proj_weight", "self_attn.out_proj.weight"],
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
        [(2, 5, 8), (2, 4, 8)],
        [
            "decoder.layers.0.linear1.weight",
            "decoder.layers.0.linear2.weight",
            "decoder.layers.0.multihead_attn.in_proj_weight[0]",
            "decoder.layers.0.multihead_attn.in_proj_weight[8]",
            "decoder.layers.0.multihead_attn.out_proj.weight",
            "decoder.layers.0.self_attn.in_proj_weight",
            "decoder.layers.0.self_attn.out_proj.weight",
            "encoder.layers.0.linear1.weight",
            "encoder.layers.0.linear2.weight",
            "encoder.layers.0.self_attn.in_proj_weight",
            "encoder.layers.0.self_attn.out_proj.weight",
        ],
    ),
    **{
        f"{norm.__name__}, {layer}": (
            lambda norm=norm, make=make: normed(norm, make()),
            [shape],
            ["weight"],
        )
        for norm in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)
        for layer, make, shape in [
            ("linear", lambda: nn.Linear(9, 7), (5, 9)),
            ("convolution", lambda: nn.Conv1d(9, 7, 3), (2, 9, 5)),
        ]
    },
    "batch norm between": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        [(2, 3, 6, 6)],
        ["0.weight", "3.weight"],
    ),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, shapes, asked = SPEC[name]
    return make().to(dtype), [torch.randn(shape).to(dtype) for shape in shapes], asked


def shown(notes):
    return sorted(name if start is None else f"{name}[{start}]" for name, start in notes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", SPEC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_but_who_forms_the_weight_gradients(name, dtype):
    model, inputs, asked = made(name, dtype)
    plain, notes, _ = intercepted(model)
    for seed in range(2):  # buffers move on
        check_same(run(model, inputs, seed=seed), run(plain, inputs, seed=seed))
        assert shown(notes) == asked
        notes.clear()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", sorted(SPEC.keys() - {"orthogonal, linear", "orthogonal, convolution"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_nothing_changes_under_autocast(name, dtype):
    model, inputs, asked = made(name)
    plain, notes, _ = intercepted(model)
    got, wanted = run(model, inputs, autocast=dtype), run(plain, inputs, autocast=dtype)
    shared = name.startswith("shared")  # autocast adds the two in the lower type: here they are added as they are
    for key, value in wanted.items():
        if key.startswith(("output", "input")) or ("bias" in key and not shared):
            assert torch.equal(got[key], value), key
            assert got[key].dtype == value.dtype
        elif value is not None:
            torch.testing.assert_close(got[key], value, rtol=0.05, atol=0.1)
    assert shown(notes) == asked


@pytest.mark.parametrize("name", ["convolution, zeros", "pointwise", "depthwise", "transposed", "batch norm between"])
def test_channels_last(name):
    model, inputs, asked = made(name)
    model = model.to(memory_format=torch.channels_last)
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    plain, notes, _ = intercepted(model)
    got, wanted = run(model, inputs), run(plain, inputs)
    check_same(got, wanted)
    assert got["output 0"].stride() == wanted["output 0"].stride()
    assert got["input 0"].stride() == wanted["input 0"].stride()
    assert shown(notes) == asked


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: x[:1].expand(3, *x.shape[1:]),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:0],
    ],
    ids=["outer", "inner", "expanded", "sliced", "empty"],
)
@pytest.mark.parametrize("name", ["linear", "linear without bias", "fused attention", "attention, batch first"])
def test_layouts_of_inputs(name, layout):
    model, (x,), _ = made(name)
    plain, _, _ = intercepted(model)
    check_same(run(model, [layout(x)]), run(plain, [layout(x)]))


def test_gradients_that_come_expanded():
    model, (x,), _ = made("linear without bias")
    plain, _, _ = intercepted(model)
    for net in (model, plain):
        net(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


def test_tied_weights_are_met_where_rows_are_multiplied():
    torch.manual_seed(0)
    model = Tied()
    plain, notes, _ = intercepted(model)
    numbers = torch.tensor([[1, 2], [6, 2]])
    check_same(run(model, [numbers]), run(plain, [numbers]))
    assert shown(notes) == ["head.weight"]


def test_a_named_module_and_its_own_matrices():
    torch.manual_seed(0)
    model = Named()
    plain, notes, _ = intercepted(model, "*")
    x = torch.randn(6, 4)
    check_same(run(model, [x]), run(plain, [x]))
    assert shown(notes) == ["kernel", "scaled", "sliced", "turned", "whole"]


def test_a_matrix_that_is_no_weight_of_the_module_is_left_to_torch():
    class Borrowing(nn.Module):
        def __init__(self, lender):
            super().__init__()
            self.own = nn.Parameter(torch.randn(3, 4))
            object.__setattr__(self, "lender", lender)

        def forward(self, x):
            pairs = F.linear(x, x)  # activations: no weight at all
            return F.linear(F.linear(x, self.own), self.lender.weight) + pairs

    lender = nn.Linear(3, 5, bias=False)
    model = Borrowing(lender)
    _, notes, _ = intercepted(model, "own")
    x = torch.randn(5, 4, requires_grad=True)
    model(x).sum().backward()
    assert shown(notes) == ["own"]
    torch.testing.assert_close(lender.weight.grad, torch.ones(5, 5) @ (x @ model.own.T))


def test_lazy_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    _, notes, sites = intercepted(model)
    x = torch.randn(4, 5)
    model(x).sum().backward()
    assert shown(notes) == ["0.weight", "2.weight"]
    assert model[0].weight.grad.shape == (3, 5)
    for site in sites:
        release(site)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [nn.Linear, Doubled])
def test_nested_inputs_are_left_to_torch(make):
    model = make(4, 3)
    plain, notes, _ = intercepted(model)
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)])
    assert torch.equal(model(x)[1], plain(x)[1])
    assert not notes


def test_complex_weights_are_left_to_torch():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    plain, notes, _ = intercepted(model)
    x = torch.randn(5, 4, dtype=torch.complex64)
    for net in (model, plain):
        net(x).abs().sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    assert not notes


@pytest.mark.parametrize("name", ["linear", "convolution, zeros", "attention", "transformer layer"])
def test_frozen_weights_and_no_gradients_cost_nothing(name):
    model, inputs, _ = made(name)
    plain, notes, _ = intercepted(model)

    def nodes(net):
        outputs = net(*leaves(inputs))
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        found, rest = [], [output.grad_fn]
        while rest:
            node = rest.pop()
            if node is not None:
                found.append(node.name())
                rest += [following for following, _ in node.next_functions]
        return sorted(found)

    torch.manual_seed(0)
    assert any("Product" in node for node in nodes(model))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            got = model(*inputs)
            torch.manual_seed(0)
            wanted = plain(*inputs)
        got, wanted = (y if isinstance(y, tuple) else (y,) for y in (got, wanted))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for net in (model, plain):
        net.requires_grad_(False)
    assert nodes(model) == nodes(plain)
    check_same(run(model, inputs), run(plain, inputs))
    assert not notes


def test_a_frozen_bias_gets_no_gradient():
    layer = nn.Linear(4, 3)
    _, notes, _ = intercepted(layer)
    layer.bias.requires_grad_(False)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.bias.grad is None
    assert len(notes) == 1


def test_training_goes_on_when_a_frozen_weight_is_thawed():
    layer = nn.Linear(4, 3)
    _, notes, _ = intercepted(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(5, 4)).sum().backward()
    assert not notes
    layer.weight.requires_grad_(True)
    layer(torch.randn(5, 4)).sum().backward()
    assert len(notes) == 1


def test_a_former_that_forms_nothing_leaves_the_gradient_alone():
    class Nothing(Former):
        def __call__(self, kind, g, a, weight):
            return None

    layer, nothing = nn.Linear(4, 3), Nothing()
    intercept(layer, {"weight": "weight"}, lambda name, start: nothing)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 5.0))


def test_the_forward_is_restored():
    model, inputs, _ = made("transformer")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    wanted = run(model, inputs)
    _, notes, sites = intercepted(model)
    assert all(isinstance(site.module.forward, Site) for site in sites)
    assert isinstance(model.encoder.layers[0].linear1.forward, LinearSite)
    for site in sites:
        release(site)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: held.keys() for name, held in after.items()} == {name: held.keys() for name, held in before.items()}
    got = run(model, inputs)
    assert all(got[name] is None or torch.equal(got[name], wanted[name]) for name in wanted)
    assert not notes


def test_types_names_and_signatures_stay():
    model, _, _ = made("transformer")
    types, names, text = [type(m) for m in model.modules()], list(model.state_dict()), repr(model)
    intercepted(model)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == names
    assert repr(model) == text


def test_one_overlay_at_a_time():
    layer = nn.Sequential(nn.Linear(4, 3))
    intercepted(layer)
    with pytest.raises(
        ValueError, match=r"forward of 0 is replaced already, by isaac's.*0\.weight: remove that before"
    ):
        intercepted(layer)
    other = nn.Linear(4, 3)
    other.forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of the model is replaced already, by <function.*: remove that"):
        intercepted(other)


@pytest.mark.parametrize("make", [nn.Linear, Doubled])
def test_somebody_elses_overlay_stays_and_is_no_longer_conditioned(make):
    layer = make(4, 3)
    plain, notes, (site,) = intercepted(layer)
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)
    x = torch.randn(5, 4)
    layer(x).sum().backward()
    assert len(notes) == 1
    release(site)
    assert torch.equal(layer(x), 2 * plain(x))
    layer(x).sum().backward()
    assert len(notes) == 1


def test_module_hooks_still_run():
    layer = nn.Linear(4, 3)
    intercepted(layer)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: seen.append("after"))
    layer.register_full_backward_hook(lambda module, of_input, of_output: seen.append("backward"))
    layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_a_parametrization_is_evaluated_once_and_its_parameters_learn():
    evaluations = []

    class Squared(nn.Module):
        def forward(self, weight):
            evaluations.append(1)
            return weight.square()

    for layer, x in [(nn.Linear(4, 3), torch.randn(5, 4)), (nn.Conv1d(4, 3, 2), torch.randn(2, 4, 5))]:
        parametrize.register_parametrization(layer, "weight", Squared())
        plain, notes, _ = intercepted(layer)
        evaluations.clear()
        layer(x).sum().backward()
        assert len(evaluations) == len(notes) == 1
        plain(x).sum().backward()
        torch.testing.assert_close(
            layer.parametrizations.weight.original.grad, plain.parametrizations.weight.original.grad
        )


def test_keywords_and_positions_of_convolutions():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 2, 3))

        def forward(self, x):
            x = F.conv1d(x, self.kernel, None, 2, (1,), 1, 2)
            x = F.conv1d(input=x, weight=self.kernel, groups=2, padding="valid")
            return F.conv_transpose1d(x, self.kernel, None, 2, 1, 1, 2, 2)

    torch.manual_seed(0)
    model = Called()
    kinds = []

    class Noting(Former):
        def __call__(self, kind, g, a, weight):
            kinds.append(kind.plain())
            return kind.weight_gradient(g, a, weight)

    plain, noting = copy.deepcopy(model), Noting()
    intercept(model, {"kernel": "kernel"}, lambda name, start: noting)
    x = torch.randn(2, 4, 11)
    check_same(run(model, [x]), run(plain, [x]))
    assert kinds == [
        Convolution((2,), (1,), (2,), True, (1,), 2),
        Convolution((1,), (0,), (1,), False, (0,), 2),
        Convolution((2,), (1,), (1,), False, (0,), 2),
    ]
