"""A conditioned model is a model: whatever torch does with modules and gradients, it does with this one."""

import copy
import gc
import io
import pickle
import shutil
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import quadric

pytestmark = [  # of torch, about torch
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node with no underlying reference"),
]

LAMBDA = 0.5


class OwnForward(nn.Linear):
    """A linear layer of somebody's own."""

    def forward(self, input):
        return 2 * super().forward(input)


class OwnLayer(nn.Module):
    """Weights that no layer of torch holds."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 4))
        self.kernel = nn.Parameter(torch.randn(2, 3, 1))

    def forward(self, input):
        return F.conv1d(F.linear(input, self.mix).unsqueeze(-1), self.kernel).squeeze(-1)


class Residual(nn.Module):
    """A model whose forward a compiler sees."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input):
        return input + self.second(torch.tanh(self.first(input)))


def perceptron():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def parametrized():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 3))
    )


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


NETWORKS = {
    "perceptron": (perceptron, (6, 4)),
    "convolutions": (convolutions, (3, 2, 6, 6)),
    "transformer": (transformer, (2, 3, 8)),
    "own forward": (lambda: OwnForward(4, 3), (6, 4)),
    "own layer": (OwnLayer, (6, 4)),
    "parametrized": (parametrized, (6, 4)),
    "used twice": (twice, (6, 4)),
    "unbatched convolution": (lambda: nn.Conv2d(2, 4, (1, 3), padding="same", dilation=2), (2, 5, 5)),
    "padded by its own pixels": (lambda: nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), (3, 2, 5)),
}
TARGETS = {"own layer": OwnLayer}


def pair(name="perceptron", damping=LAMBDA, dtype=torch.float32, **options):
    """A plain model, a conditioned one and its handle, and a batch."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    plain, batch = make().to(dtype), torch.randn(shape, dtype=dtype)
    conditioned = copy.deepcopy(plain)
    return plain, conditioned, quadric.isaac(conditioned, damping, targets=TARGETS.get(name), **options), batch


def double(name="perceptron", **options):
    return pair(name, dtype=torch.float64, **options)


def backward(model, *inputs, call=None):
    """The gradients of a fixed loss, by name."""
    model.zero_grad()
    output = (model if call is None else call)(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    (output * weights + output.square() / 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def zeta(gradient, rows, damping=LAMBDA):
    """λ gᵀa (aᵀa/B + λI)⁻¹."""
    rows = rows.detach().reshape(-1, rows.shape[-1]).to(gradient.dtype)
    moment = rows.mT @ rows / len(rows)
    return damping * gradient @ torch.linalg.inv(moment + damping * torch.eye(len(moment), dtype=gradient.dtype))


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model, params, batch):
    return functional_call(model, params, (batch,)).square().sum()


# Compilers.


@pytest.fixture
def compile():
    """torch.compile for the whole graph, without memory of earlier tests."""
    torch._dynamo.reset()
    yield lambda model, **options: torch.compile(model, **{"backend": "aot_eager", "fullgraph": True} | options)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_layers_have_the_gradients_of_eager_ones(compile, name):
    plain, model, _, batch = pair(name)
    expected = backward(model, batch)
    assert any(not torch.allclose(g, expected[key]) for key, g in backward(plain, batch).items())
    agree(backward(model, batch, call=compile(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler of C++")
def test_the_default_compiler_takes_a_conditioned_model(compile):
    _, model, _, batch = pair()
    expected = backward(model, batch)
    agree(backward(model, batch, call=compile(model, backend="inductor")), expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_follows_when_it_is_conditioned_and_restored(compile):
    plain, model, handle, batch = pair()
    handle.remove()
    compiled = compile(model)
    raw = backward(plain, batch)
    agree(backward(model, batch, call=compiled), raw)
    handle = quadric.isaac(model, LAMBDA)
    expected = backward(model, batch)
    assert not torch.allclose(expected["0.weight"], raw["0.weight"])
    agree(backward(model, batch, call=compiled), expected)
    handle.remove()
    agree(backward(model, batch, call=compiled), raw)


def test_a_model_compiled_in_place_is_conditioned(compile):
    torch.manual_seed(0)
    model, batch = Residual(), torch.randn(6, 4)
    plain = copy.deepcopy(model)
    model.compile(backend="aot_eager", fullgraph=True)
    handle = quadric.isaac(model, LAMBDA)
    found, raw = backward(model, batch), backward(plain, batch)
    torch.testing.assert_close(found["first.weight"], zeta(raw["first.weight"], batch))
    handle.remove()
    agree(backward(model, batch), raw)


def test_isaac_takes_the_model_that_compile_returns(compile):
    plain, model, handle, batch = pair()
    handle.remove()
    compiled = compile(model)
    quadric.isaac(compiled, LAMBDA)
    found = backward(model, batch, call=compiled)["0.weight"]
    torch.testing.assert_close(found, zeta(backward(plain, batch)["0.weight"], batch))


def test_a_compiled_layer_is_frozen_and_thawed(compile):
    _, model, _, batch = pair()
    compiled = compile(model)
    for frozen in (False, True, False):
        model[0].weight.requires_grad_(not frozen)
        found = backward(model, batch, call=compiled)
        assert ("0.weight" not in found) is frozen
        agree(found, backward(model, batch))


@pytest.mark.parametrize("same", ["keys and values", "nothing"])
def test_a_compiled_attention_knows_its_three_projections(compile, same):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    quadric.isaac(layer, LAMBDA)
    queries, keys, values = torch.randn(3, 2, 5, 8)
    inputs = queries, keys, keys if same == "keys and values" else values
    expected = backward(layer, *inputs, call=lambda *tensors: layer(*tensors)[0])
    compiled = compile(layer)
    agree(backward(layer, *inputs, call=lambda *tensors: compiled(*tensors)[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_compiled_layers_take_batches_of_any_size(compile, name):
    _, model, _, batch = pair(name)
    compiled = compile(model, dynamic=True)
    for size in (2, 40):
        inputs = torch.randn(size, *batch.shape[1:])
        agree(backward(model, inputs, call=compiled), backward(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9, "refresh_every": 2},
        {"decay": 0.5, "output_damping": 0.3},
        {"damping": lambda passes: 1 / passes},
        {"pooled": True},
    ],
)
def test_what_a_layer_keeps_moves_on_in_compiled_passes(compile, options):
    _, eager, kept, batch = pair(**options)
    _, model, handle, _ = pair(**options)
    compiled = compile(model)
    for factor in (1, 2, 3):
        found, expected = backward(model, factor * batch, call=compiled), backward(eager, factor * batch)
        agree(found, expected, rtol=1e-4, atol=1e-5)
        if "pooled" in options:
            handle.condition_()
            kept.condition_()
            torch.testing.assert_close(model[0].weight.grad, eager[0].weight.grad)
            assert not torch.allclose(model[0].weight.grad, found["0.weight"])
    agree(handle.state_dict(), kept.state_dict())


def test_settings_may_change_between_two_compiled_passes(compile):
    plain, model, handle, batch = pair()
    compiled = compile(model)
    raw = backward(plain, batch)["0.weight"]
    for damping in (0.5, 4.0):
        handle.settings["damping"] = damping
        torch.testing.assert_close(backward(model, batch, call=compiled)["0.weight"], zeta(raw, batch, damping))


def test_a_compiled_pass_samples_the_rows_of_an_eager_one(compile):
    _, model, handle, batch = pair("convolutions", max_rows=4)
    compiled = compile(model)
    torch.manual_seed(1)
    expected = backward(model, batch)
    torch.manual_seed(1)
    agree(backward(model, batch, call=compiled), expected, rtol=1e-4, atol=1e-5)
    assert "sampled rows" in str(handle)


def test_compiled_checkpoints_learn_once_a_backward(compile):
    _, model, handle, batch = pair(decay=0.9)
    compiled = compile(lambda inputs: checkpoint(model, inputs, use_reentrant=False))
    found = backward(model, batch, call=compiled)
    assert handle.state_dict()["0.weight/passes"] == 1
    _, eager, _, _ = pair(decay=0.9)
    agree(found, backward(eager, batch))


def test_a_compiled_model_runs_under_autocast(compile):
    _, model, _, batch = pair()
    compiled = compile(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(batch), model(batch)
    assert torch.equal(found, expected)
    (of_found,) = torch.autograd.grad(found.sum(), model[0].weight)
    (of_expected,) = torch.autograd.grad(expected.sum(), model[0].weight)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-2, atol=1e-3)


def test_sampled_output_gradients_are_observed_in_a_compiled_model(compile):
    _, eager, kept, batch = pair(output_damping=LAMBDA)
    _, model, handle, _ = pair(output_damping=LAMBDA)
    found = []
    for call, net, own in ((eager, eager, kept), (compile(model), model, handle)):
        torch.manual_seed(1)
        own.observe(quadric.sampled_loss(call(batch)))
        assert net[0].weight.grad is None
        found.append(backward(net, batch, call=call))
    agree(*found)
    assert handle.sampled


def test_the_operation_of_compiled_graphs_keeps_the_rules_of_torch():
    layer = nn.Linear(4, 3)
    handle = quadric.isaac(layer)
    arguments = torch.randn(6, 3), torch.randn(6, 4), layer.weight.detach(), handle.layers["weight", None].key, []
    torch.library.opcheck(torch.ops.quadric.weight_gradient.default, arguments)


def test_a_compiled_backward_needs_the_handle(compile):
    _, model, handle, batch = pair()
    output = compile(model)(batch).sum()
    handle.remove()
    del handle
    gc.collect()
    with pytest.raises(
        RuntimeError, match="between the forward and the backward of a compiled model: keep it until then"
    ):
        output.backward()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_transform_inside_a_compiled_function_runs_eagerly(compile, mapped):
    _, model, _, batch = double()
    params = parameters(model)

    def gradient(params, inputs):
        of = grad(lambda params, inputs: loss(model, params, inputs))
        return vmap(of, (None, 0))(params, inputs) if mapped else of(params, inputs)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="a compiler does not tell isaac what is differentiated"):
        compile(gradient)(params, batch)
    torch._dynamo.reset()
    agree(compile(gradient, fullgraph=False)(params, batch), gradient(params, batch))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_plain(strict):
    _, model, _, batch = pair()
    program = torch.export.export(model, (batch,), strict=strict)
    assert torch.equal(program.module()(batch), model(batch))
    assert "quadric" not in str(program.graph)


def test_a_conditioned_model_is_traced_without_gradients():
    _, model, _, batch = pair()
    with torch.no_grad():
        traced = torch.jit.trace(model, batch)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    assert b"quadric" not in file.getvalue()
    assert torch.equal(traced(batch), model(batch))


# Transforms of torch.func.


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "transformer", "own layer"])
def test_grad_of_a_functional_call_is_what_backward_finds(name):
    _, model, _, batch = double(name)
    model(batch).square().sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    agree(grad(lambda params: loss(model, params, batch))(parameters(model)), expected)


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "transformer"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_of_single_examples_are_conditioned_by_their_own_rows(name, chunk):
    _, model, _, batch = double(name)
    batches = torch.stack([batch, 2 * batch, batch + 1])
    gradient = grad(lambda params, inputs: loss(model, params, inputs))
    found = vmap(gradient, (None, 0), chunk_size=chunk)(parameters(model), batches)
    each = [gradient(parameters(model), inputs) for inputs in batches]
    agree(found, {key: torch.stack([g[key] for g in each]) for key in found})


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_an_ensemble_is_conditioned_member_by_member(name):
    plain, model, _, batch = double(name)
    members = [copy.deepcopy(plain) for _ in range(3)]
    for size, member in enumerate(members, 1):
        for p in member.parameters():
            p.data.mul_(size)
    stacked, _ = stack_module_state(members)
    found = vmap(grad(lambda params: loss(model, params, batch)))({key: p.detach() for key, p in stacked.items()})
    for place, member in enumerate(members):
        quadric.isaac(member, LAMBDA)
        member(batch).square().sum().backward()
        agree({key: g[place] for key, g in found.items()}, {key: p.grad for key, p in member.named_parameters()})


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
@pytest.mark.parametrize("damping", [LAMBDA, quadric.relative(0.7)])
def test_an_ensemble_is_conditioned_where_only_its_forward_is_mapped(name, damping):
    plain, model, _, batch = double(name, damping=damping)
    members = [copy.deepcopy(plain) for _ in range(3)]
    stacked, _ = stack_module_state(members)
    vmap(lambda params: functional_call(model, params, (batch,)))(stacked).square().sum().backward()
    expected = grad(lambda params: loss(model, params, batch))(parameters(plain))
    for place in range(3):
        agree({key: p.grad[place] for key, p in stacked.items()}, expected)


def test_single_examples_of_many_positions_are_conditioned_by_some_of_them():
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 3, 3).double()
    handle = quadric.isaac(layer, LAMBDA, max_rows=20)
    images = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    gradient = grad(lambda params, image: loss(layer, params, image))
    found = vmap(gradient, (None, 0))(parameters(layer), images)
    assert "20" in str(handle)
    agree({key: g[1] for key, g in found.items()}, gradient(parameters(layer), images[1]))


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "transformer"])
def test_forward_mode_is_that_of_the_plain_model(name):
    plain, model, _, batch = double(name)
    params, tangents = parameters(model), {key: torch.randn_like(p) for key, p in parameters(model).items()}

    def call(net):
        def output(params):
            with sdpa_kernel(SDPBackend.MATH):  # the only one with a forward mode
                return functional_call(net, params, (batch,))

        return output

    output, expected = jvp(call(plain), (params,), (tangents,))
    found, tangent = jvp(call(model), (params,), (tangents,))
    assert torch.equal(found, output)
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(linearize(call(model), params)[1](tangents), expected)
    agree(jacfwd(call(model))(params), jacfwd(call(plain))(params))
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(p, tangents[key]) for key, p in params.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(call(model)(dual)).tangent, expected)


@pytest.mark.parametrize("some", ["weight", "bias", "input"])
def test_dual_tensors_pass_where_gradients_are_recorded(some):
    plain, model, _, batch = double()
    found = []
    for net in (model, plain):
        with forward_ad.dual_level():
            inputs = forward_ad.make_dual(batch, torch.ones_like(batch)) if some == "input" else batch
            params = {
                key: forward_ad.make_dual(p, torch.ones_like(p)) if some in key else p
                for key, p in net.named_parameters()
            }
            found.append(forward_ad.unpack_dual(functional_call(net, params, (inputs,))).tangent)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_reverse_mode_is_linear_in_the_gradient_of_the_output(name):
    _, model, _, batch = double(name)

    def call(params):
        return functional_call(model, params, (batch,))

    output, pull = vjp(call, parameters(model))
    direction = torch.randn_like(output)
    (expected,) = pull(direction)
    for chunk in (None, 2):
        rows = jacrev(call, chunk_size=chunk)(parameters(model))
        agree({key: torch.einsum("rc,rc...->...", direction, row) for key, row in rows.items()}, expected)
    names = list(expected)
    for vectorize in (False, True):
        jacobians = functional.jacobian(
            lambda *params: call(dict(zip(names, params, strict=True))),
            tuple(parameters(model).values()),
            vectorize=vectorize,
        )
        agree(dict(zip(names, jacobians, strict=True)), rows)
    batched = torch.autograd.grad(
        model(batch), list(model.parameters()), torch.stack([direction, -2 * direction]), is_grads_batched=True
    )
    agree({key: g[1] for key, g in zip(names, batched, strict=True)}, {key: -2 * g for key, g in expected.items()})


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_the_hessian_is_the_derivative_of_the_conditioned_gradient(name):
    _, model, _, batch = double(name)
    params, step = parameters(model), 1e-6
    gradient = grad(lambda params: loss(model, params, batch))
    curvature = hessian(lambda params: loss(model, params, batch))(params)["0.weight"]["0.weight"]
    move = torch.zeros_like(params["0.weight"])
    move.view(-1)[1] = step
    ahead, behind = (gradient(params | {"0.weight": params["0.weight"] + side * move})["0.weight"] for side in (1, -1))
    found = curvature.reshape(*move.shape, -1)[..., 1]
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"refresh_every": 2}, {"pooled": True}, {"output_damping": 1.0}])
def test_a_transform_may_not_change_what_a_layer_keeps(options):
    _, model, handle, batch = double(**options)
    with pytest.raises(RuntimeError, match=r"call isaac with decay=None, refresh_every=1, pooled=False"):
        grad(lambda params: loss(model, params, batch))(parameters(model))
    assert not any("moment" in key for key in handle.state_dict())
    backward(model, batch)


def test_a_weight_that_is_not_differentiated_forms_no_gradient():
    _, model, handle, batch = double()
    params = parameters(model)
    biases = {key: p for key, p in params.items() if "bias" in key}
    grad(lambda biases: loss(model, params | biases, batch))(biases)
    assert all(layer.passes == 0 for layer in handle.layers.values())


# Derivatives of gradients.

WAYS = {
    "features": (lambda: nn.Linear(7, 5), (30, 7), None),
    "rows": (lambda: nn.Linear(9, 5), (2, 3, 9), None),
    "sampled rows": (lambda: nn.Linear(7, 5), (30, 7), 3),
    "mixed rows": (lambda: nn.Linear(9, 2), (5, 9), 3),
    "features of a convolution": (lambda: nn.Conv2d(2, 4, 2, stride=2, groups=2), (2, 2, 5, 5), None),
    "features of a transposed one": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), (2, 4, 3), None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damping", [LAMBDA, quadric.relative(0.7)])
def test_conditioned_gradients_have_derivatives_by_inputs_and_biases(way, damping):
    torch.manual_seed(0)
    make, shape, most = WAYS[way]
    layer = make().double()
    handle = quadric.isaac(layer, damping, max_rows=most)

    def gradient(inputs, bias):
        torch.manual_seed(1)  # the same rows
        output = functional_call(layer, {"bias": bias}, (inputs,))
        return torch.autograd.grad(output.pow(3).sum(), layer.weight, create_graph=True)

    arguments = torch.randn(shape, dtype=torch.float64, requires_grad=True), layer.bias.detach().requires_grad_()
    torch.autograd.gradcheck(gradient, arguments, fast_mode=True)
    torch.autograd.gradgradcheck(gradient, arguments, fast_mode=True)
    assert handle.layers["weight", None].way.name in way


def test_a_penalty_on_input_gradients_keeps_its_own_term_plain():
    # ∂z/∂x = W: its gradient by W has no rows, and the layer's own output does not count.
    _, layer, _, _ = double("own forward")
    inputs = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(inputs).sum(), inputs, create_graph=True)
    slope.square().sum().backward()
    columns = 2 * layer.weight.detach().sum(0)
    torch.testing.assert_close(layer.weight.grad, (6 * 2 * 2 * columns).expand(3, 4))


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"pooled": True}])
def test_a_backward_to_the_inputs_alone_looks_at_no_rows(options):
    _, model, handle, batch = pair(**options)
    batch.requires_grad_()
    model(batch).sum().backward(inputs=[batch])
    assert batch.grad is not None
    assert all(layer.passes == 0 and layer.pool is None for layer in handle.layers.values())
    backward(model, batch)
    assert all(layer.passes == 1 for layer in handle.layers.values())


def test_a_retained_graph_gives_the_same_gradient_again():
    _, model, _, batch = double()
    output = model(batch).sum()
    first, second = (torch.autograd.grad(output, model[0].weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_hessian_diagonal_of_a_conditioned_model_is_that_of_the_plain_one():
    plain, model, _, batch = double()
    found, expected = (
        quadric.hessian_diagonal(net(batch).square().sum(), list(net.parameters())) for net in (model, plain)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_adahesscale_steps_on_conditioned_gradients():
    plain, model, _, batch = double()
    raw, conditioned = backward(plain, batch), backward(model, batch)
    optimizer = quadric.AdaHesScale(model.parameters(), 0.1, betas=(0.0, 0.0), eps=1.0)
    model.zero_grad()
    optimizer.backward(model(batch).square().sum())
    assert not torch.allclose(raw["0.weight"], conditioned["0.weight"])
    before = parameters(copy.deepcopy(model))
    optimizer.step()
    moved = {key: before[key] - p for key, p in parameters(model).items()}
    assert all(torch.equal(moved[key].sign(), p.grad.sign()) for key, p in model.named_parameters())


# Checkpoints and saved tensors.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"decay": 0.9, "output_damping": 0.5}, {"pooled": True}])
@pytest.mark.parametrize("name", ["perceptron", "transformer"])
def test_checkpoints_learn_once_a_backward(name, reentrant, options):
    _, eager, kept, batch = double(name, **options)
    _, model, handle, _ = double(name, **options)
    inputs = batch.requires_grad_()
    for _ in range(2):
        found = backward(model, inputs, call=lambda x: checkpoint(model, x, use_reentrant=reentrant))
        of_input, inputs.grad = inputs.grad, None
        agree(found, backward(eager, inputs))
        assert torch.equal(of_input, inputs.grad)
        inputs.grad = None
        if "pooled" in options:
            handle.condition_()
            kept.condition_()
    agree(handle.state_dict(), kept.state_dict())
    assert {layer.passes for layer in handle.layers.values()} <= {0, 2}


def test_saved_tensors_may_live_elsewhere():
    _, model, _, batch = double("convolutions")
    expected = backward(model, batch)
    with torch.autograd.graph.save_on_cpu():
        agree(backward(model, batch), expected)
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy)

    def call(inputs):
        with packed:
            return model(inputs)

    agree(backward(model, batch, call=call), expected)


def test_a_weight_changed_before_its_backward_is_noticed():
    _, model, _, batch = pair()
    output = model(batch).sum()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


# Lower precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["perceptron", "convolutions", "transformer"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_touches_nothing_but_weight_gradients(name, dtype, inside):
    plain, model, handle, batch = pair(name)
    exact = backward(model, batch)
    found, outputs = {}, []
    for net in (model, plain):
        net.zero_grad()
        inputs = batch.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            output = net(inputs)
            value = (output * torch.linspace(-1, 1, output.numel()).view_as(output) + output.float().square() / 2).sum()
            if inside:
                value.backward()
        if not inside:
            value.backward()
        outputs.append(output)
        found[net] = {"input": inputs.grad} | {key: p.grad for key, p in net.named_parameters()}
    assert torch.equal(*outputs)
    conditioned = {layer.name for layer in handle.layers.values() if layer.passes}
    assert len(conditioned) >= 2
    for key, gradient in found[model].items():
        assert gradient.dtype == torch.float32
        if key in conditioned:
            torch.testing.assert_close(gradient, exact[key], rtol=0.1, atol=0.05 * exact[key].abs().max().item())
            assert not torch.allclose(gradient, found[plain][key], rtol=0.1)
        else:
            assert torch.equal(gradient, found[plain][key]), key


def test_a_backward_under_autocast_conditions_in_full_precision():
    _, model, _, batch = pair()
    exact = backward(model, batch)["2.weight"]
    model.zero_grad()
    output = model(batch)
    value = (output * torch.linspace(-1, 1, output.numel()).view_as(output) + output.square() / 2).sum()
    with torch.autocast("cpu", torch.bfloat16):
        value.backward()
    torch.testing.assert_close(model[2].weight.grad, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_have_gradients_of_half_precision(dtype):
    plain, model, _, batch = pair("perceptron", dtype=dtype)
    inputs = batch.clone().requires_grad_()
    found, raw = backward(model, inputs), backward(plain, batch)
    assert {g.dtype for g in found.values()} == {inputs.grad.dtype} == {dtype}
    assert torch.equal(found["2.bias"], raw["2.bias"])
    expected = zeta(raw["0.weight"].double(), batch)
    torch.testing.assert_close(found["0.weight"].double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_a_model_may_change_its_type_between_two_passes():
    plain, model, _, batch = pair(decay=0.0)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        found = backward(model.to(dtype), batch.to(dtype))["0.weight"].double()
        expected = zeta(backward(plain.to(dtype), batch.to(dtype))["0.weight"].double(), batch)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_outputs_of_many_rows_are_looked_at_in_half_precision():
    # Gradients near the largest number of float16, times as many rows, are none of its numbers.
    torch.manual_seed(0)
    layer, batch, labels = nn.Linear(8, 8), torch.randn(2048, 8), torch.randint(8, (2048,))
    exact = copy.deepcopy(layer)
    options = {"output_damping": quadric.relative(0.1), "max_rows": None}
    quadric.isaac(layer, LAMBDA, **options)
    quadric.isaac(exact, LAMBDA, **options)
    with torch.autocast("cpu", torch.float16):
        output = layer(batch)
    scale = 2.0**17
    (scale * F.cross_entropy(3 * output.float(), labels)).backward()
    F.cross_entropy(3 * exact(batch), labels).backward()
    expected = exact.weight.grad
    error = (layer.weight.grad / scale - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"output_damping": quadric.relative(1.0)}, {"pooled": True}])
def test_a_scaled_loss_makes_the_same_step_and_an_overflow_none(options):
    _, model, handle, batch = pair(damping=quadric.relative(LAMBDA), **options)
    _, unscaled, kept, _ = pair(damping=quadric.relative(LAMBDA), **options)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, unscaled)]
    if "pooled" in options:
        handle.attach(optimizers[0])
        kept.attach(optimizers[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(batch).square().sum() * factor).backward()
        scaler.step(optimizers[0])
        scaler.update()
        unscaled(batch).square().sum().backward()
        if factor == 1:
            optimizers[1].step()
    agree(parameters(model), parameters(unscaled), rtol=1e-4, atol=1e-5)


# Copies and files.


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "parametrized"])  # torch pickles none of these
def test_copies_and_files_of_a_model_are_plain(name):
    plain, model, _, batch = pair(name)
    raw = backward(plain, batch)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
    file = io.BytesIO()
    torch.save(model, file)
    assert b"quadric" not in file.getvalue()
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        agree(backward(other, batch), raw)
        handle = quadric.isaac(other, LAMBDA, targets=TARGETS.get(name))  # a copy is conditioned like any other model
        agree(backward(other, batch), backward(model, batch))
        handle.remove()
        agree(backward(other, batch), raw)


def test_a_copy_of_a_parametrized_model_is_plain():
    plain, model, _, batch = pair("parametrized")
    agree(backward(copy.deepcopy(model), batch), backward(plain, batch))


def test_an_averaged_model_is_plain():
    plain, model, _, batch = pair()
    averaged = AveragedModel(model)
    agree(backward(averaged.module, batch), backward(plain, batch))
    with torch.no_grad():
        model[0].weight.add_(1)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].weight, model[0].weight)


@pytest.mark.parametrize("by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_handle_conditions_its_copy_of_the_model(by):
    _, model, handle, batch = pair(decay=0.9)
    backward(model, batch)
    other, same = by((model, handle))
    alone = by(handle)
    assert same.model is other
    assert alone.model is not model
    expected = backward(model, 2 * batch)
    for each in (same, alone):
        agree(backward(each.model, 2 * batch), expected)
        agree(each.state_dict(), handle.state_dict())
        each.remove()
        assert all("forward" not in vars(module) for module in each.model.modules())
    assert "2 weights conditioned" in str(alone)


@pytest.mark.parametrize("by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_goes_on_with_its_copy_of_the_model(by):
    torch.manual_seed(0)
    model, batch = perceptron(), torch.randn(6, 4)
    optimizer = quadric.ISAAC(model, decay=0.9)

    def steps(model, optimizer):
        for factor in (1, 2):
            backward(model, factor * batch)
            optimizer.step()
        return parameters(model)

    steps(model, optimizer)
    other, its = by((model, optimizer))
    assert its.handle.model is other
    assert its.handle.settings is its.param_groups[0]
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed = perceptron()
    anew = quadric.ISAAC(resumed, decay=0.9)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    anew.load_state_dict(state)
    assert anew.handle.settings is anew.param_groups[0]
    expected = steps(model, optimizer)
    for found in (steps(other, its), steps(resumed, anew)):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# Modules and their neighbours.


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_hooks_fire_in_their_order_and_see_plain_values(name):
    plain, model, _, batch = pair(name)

    def logged(net):
        log = []
        for key, module in net.named_modules():
            module.register_forward_pre_hook(lambda _, i, key=key: log.append(("before", key, i[0])))
            module.register_forward_hook(lambda _, i, o, key=key: log.append(("after", key, o)))
            module.register_full_backward_pre_hook(lambda _, g, key=key: log.append(("backward", key, g[0])))
            module.register_full_backward_hook(lambda _, g, o, key=key: log.append(("done", key, g[0])))
        backward(net, batch.clone().requires_grad_())
        return log

    for (*found, value), (*expected, other) in zip(logged(model), logged(plain), strict=True):
        assert found == expected
        assert torch.equal(value, other)


def test_hooks_of_a_weight_see_the_conditioned_gradient():
    _, model, _, batch = pair()
    expected = backward(model, batch)["0.weight"]
    seen = []
    model[0].weight.register_hook(lambda g: 2 * g)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    backward(model, batch)
    assert torch.equal(seen[0], 2 * expected)


def test_two_handles_share_a_model_but_not_a_layer():
    plain, model, handle, batch = pair()
    both = backward(model, batch)
    handle.remove()
    first, second = quadric.isaac(model, LAMBDA, targets="0"), quadric.isaac(model, LAMBDA, targets="2")
    agree(backward(model, batch), both)
    with pytest.raises(
        ValueError, match=r"the forward of 0 is replaced already, by isaac's conditioning of 0\.weight: rem"
    ):
        quadric.isaac(model)
    first.remove()
    with pytest.raises(ValueError, match="the forward of 2 is replaced already"):
        quadric.isaac(model)
    assert "forward" not in vars(model[0])  # a refused handle leaves nothing behind
    agree(backward(model, batch), both | {"0.weight": backward(plain, batch)["0.weight"]})
    second.remove()
    agree(backward(model, batch), backward(plain, batch))


def test_a_removed_handle_leaves_its_successor_alone():
    plain, model, handle, batch = pair()
    expected = backward(model, batch)
    handle.remove()
    handle.remove()
    agree(backward(model, batch), backward(plain, batch))
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    quadric.isaac(model, LAMBDA)
    handle.remove()
    agree(backward(model, batch), expected)


def test_a_forward_that_somebody_wrapped_is_plain_once_the_handle_is_removed():
    plain, model, handle, batch = pair()
    inner = model[0].forward
    model[0].forward = lambda input: 2 * inner(input / 2)
    assert not torch.allclose(backward(model, batch)["0.weight"], backward(plain, batch)["0.weight"])
    handle.remove()
    plain[0].forward = lambda input: 2 * F.linear(input / 2, plain[0].weight, plain[0].bias)
    agree(backward(model, batch), backward(plain, batch))


def test_a_handle_kept_on_its_own_model_says_so_when_it_is_copied():
    _, model, handle, _ = pair()
    model.handle = handle
    with pytest.raises(RuntimeError, match="keep the handle beside the model"):
        copy.deepcopy(model)


def test_a_handle_kept_in_a_module_around_its_model_is_copied():
    plain, model, handle, batch = pair()
    whole = nn.Sequential(model)
    whole.handle = handle
    other = copy.deepcopy(whole)
    assert other.handle.model is other[0]
    agree(backward(other[0], batch), backward(model, batch))
    other.handle.remove()
    agree(backward(other[0], batch), backward(plain, batch))


def test_a_part_of_a_model_is_conditioned_by_itself():
    plain, model, handle, batch = pair()
    handle.remove()
    whole = nn.Sequential(model, nn.Identity())
    handle = quadric.isaac(whole[0], LAMBDA, targets="0.weight")
    raw = backward(plain, batch)
    agree(backward(model, batch, call=whole), raw | {"0.weight": zeta(raw["0.weight"], batch)})
    assert "left alone: 2.weight: targets does not name it" in str(handle)


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"pooled": True}, {"max_rows": 2}])
def test_a_model_without_storage_has_gradients_without_storage(options):
    _, model, _, batch = pair("convolutions", **options)
    found = backward(model.to("meta"), batch.to("meta"))
    assert {key: g.shape for key, g in found.items()} == {key: p.shape for key, p in model.named_parameters()}
    assert {g.device.type for g in found.values()} == {"meta"}


@pytest.mark.parametrize("swap", [False, True])
def test_parameters_may_be_replaced(swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        plain, model, _, batch = pair(decay=0.0)
        for net in (plain, model):
            backward(net, batch)
            net.zero_grad()
            net.double().float()
            net.load_state_dict({key: 2 * p for key, p in net.state_dict().items()}, assign=not swap)
            if swap:
                torch.utils.swap_tensors(net[0].weight, nn.Parameter(torch.ones(8, 4)))
            else:
                net[0].weight = nn.Parameter(torch.ones(8, 4))
        found, raw = backward(model, batch), backward(plain, batch)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(found["0.weight"], zeta(raw["0.weight"], batch))
    assert torch.equal(found["0.bias"], raw["0.bias"])


def test_a_layer_used_twice_pools_the_rows_of_both_uses():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    plain, batch = copy.deepcopy(layer), torch.randn(8, 4, dtype=torch.float64)
    handle = quadric.isaac(layer, LAMBDA, pooled=True)
    for net in (layer, plain):
        (net(batch[:3]).square().sum() + net(batch[3:]).sin().sum()).backward()
    handle.condition_()
    torch.testing.assert_close(layer.weight.grad, zeta(plain.weight.grad, batch))


def test_a_tied_weight_is_conditioned_where_rows_multiply_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False)).double()
    model[2].weight = model[0].weight
    tokens = torch.randint(7, (2, 3))
    apart = copy.deepcopy(model)
    apart[2].weight = nn.Parameter(model[0].weight.detach().clone())
    quadric.isaac(model, LAMBDA)
    quadric.isaac(apart, LAMBDA)
    found, expected = backward(model, tokens), backward(apart, tokens)
    torch.testing.assert_close(found["0.weight"], expected["0.weight"] + expected["2.weight"])
    params = parameters(model)
    of_call = grad(lambda params: functional_call(model, params, (tokens,)).square().sum())(params)
    model.zero_grad()
    model(tokens).square().sum().backward()
    torch.testing.assert_close(of_call["0.weight"], model[0].weight.grad)


def test_lazy_and_masked_weights_are_conditioned():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.LazyLinear(3)), torch.randn(6, 4)
    quadric.isaac(model, LAMBDA)
    model(batch)
    prune.random_unstructured(model[0], "weight", 0.5)
    found = backward(model, batch)["0.weight_orig"]
    plain, mask = nn.Linear(4, 3), model[0].weight_mask
    plain.load_state_dict({"weight": model[0].weight_orig * mask, "bias": model[0].bias})
    torch.testing.assert_close(found, zeta(backward(plain, batch)["weight"], batch) * mask)


def test_a_replaced_layer_is_plain_and_apply_reaches_every_module():
    _, model, handle, batch = pair()
    model[0] = nn.Linear(4, 8)
    reached = []
    model.apply(reached.append)
    assert len(reached) == 4
    found = backward(model, batch)
    handle.remove()
    assert torch.equal(found["0.weight"], backward(model, batch)["0.weight"])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_threads_train_their_own_models(decay):
    def train(model, batch):
        torch.set_num_threads(1)
        optimizer = quadric.ISAAC(model, 0.01, decay=decay)
        for _ in range(10):
            backward(model, batch)
            optimizer.step()

    torch.manual_seed(0)
    batch = torch.randn(2, 3, 8)
    models = [nn.Sequential(nn.Linear(8, 8), transformer()) for _ in range(3)]
    alone = copy.deepcopy(models)
    for model in alone:
        train(model, batch)
    threads = [threading.Thread(target=train, args=(model, batch)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, other in zip(models, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_nothing_is_conditioned_where_no_gradient_is_recorded():
    plain, model, handle, batch = pair("transformer")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(batch), plain(batch))
    assert all(layer.passes == 0 for layer in handle.layers.values())


def test_a_frozen_attention_takes_the_way_of_the_plain_one():
    torch.manual_seed(0)
    layer, batch = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False), torch.randn(2, 5, 16)
    expected = layer(batch, batch, batch, need_weights=False)[0]
    quadric.isaac(layer)
    assert torch.equal(layer(batch, batch, batch, need_weights=False)[0], expected)


def test_a_forgotten_model_is_freed():
    _, model, handle, batch = pair(decay=0.9)
    backward(model, batch)
    seen = weakref.ref(model)
    del model, handle
    gc.collect()
    assert seen() is None


def test_a_pass_of_shapes_alone_leaves_nothing_behind():
    options = {"allow_non_fake_inputs": True}
    with torch._subclasses.fake_tensor.FakeTensorMode(**options):
        fake = nn.Linear(33, 7)
        quadric.isaac(fake, quadric.relative(1.0))
        fake(torch.randn(17, 33)).sum().backward()
        assert fake.weight.grad.shape == (7, 33)
    real = nn.Linear(33, 7)
    quadric.isaac(real, quadric.relative(1.0))
    real(torch.randn(17, 33)).sum().backward()
    assert bool(real.weight.grad.isfinite().all())
