import concurrent.futures
import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import oracles
import quadric
from quadric import UnsupportedOperation, hessian_diagonal, register_rule
from quadric.backprop.registry import RULES


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape, seed=0):
    return randn(*shape, seed=seed).requires_grad_()


def close(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)).to(dtype)


def loss_of(model, seed=1, dtype=torch.float64):
    return F.cross_entropy(model(randn(8, 5, seed=seed, dtype=dtype)), torch.arange(8) % 3)


def exact(make_loss, *inputs):
    """The engine against the oracle, each on a graph of its own."""
    close(hessian_diagonal(make_loss(*inputs), inputs), oracles.hessian_diagonal(make_loss(*inputs), inputs))


class Cube(torch.autograd.Function):
    """x³ with a rule of its own, which can be told to fail and counts its calls."""

    calls = 0
    fails = ""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        if Cube.fails == "backward":
            raise ArithmeticError("told to fail in backward")
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def hessian_diagonal(ctx, g, h):
        Cube.calls += 1
        if Cube.fails == "rule":
            raise ArithmeticError("told to fail in the rule")
        (x,) = ctx.saved_tensors
        return 9 * x**4 * h + 6 * x * g


class Mystery(torch.autograd.Function):
    """sin x, without a rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].cos() * g


@pytest.fixture(autouse=True)
def _cube():
    Cube.calls, Cube.fails = 0, ""
    yield
    Cube.calls, Cube.fails = 0, ""


# What is computed.


def test_uses_of_a_tensor_add():
    exact(lambda x: x.sin().sum() + (x**3).sum() + x.sum(), leaf(5))


def test_an_inner_tensor_used_several_times_adds():
    def loss(x):
        y = x.exp()
        return (y.log() ** 2).sum() + y.sum() + (2 * y).sum() + y[1:].sum()

    x = leaf(5)
    y = x.exp().detach()
    expected = 2 + 3 * y + torch.cat([torch.zeros(1, dtype=torch.float64), y[1:]])
    found = hessian_diagonal(loss(x), [x])[0]
    # (log y)² and its logarithm's bend meet in y, whose diagonal is exact because everything here is elementwise
    close([found], [expected])


def test_a_weight_used_three_times_side_by_side_is_exact():
    inputs = [randn(4, 3, seed=s) for s in range(3)]
    exact(lambda w: sum((torch.tanh(x @ w) - 0.3).pow(2).sum() for x in inputs), leaf(3, 2, seed=7))


def test_a_weight_used_three_times_in_a_row_is_the_sum_of_three_weights():
    x, w = randn(4, 3), leaf(3, 3, seed=1)
    copies = [w.detach().clone().requires_grad_() for _ in range(3)]

    def loss(a, b, c):
        return (torch.tanh(torch.tanh(x @ a) @ b.t()) @ c).pow(2).mean()

    tied = hessian_diagonal(loss(w, w, w), [w])
    close(tied, [sum(hessian_diagonal(loss(*copies), copies))])


def test_tied_embedding_is_the_sum_of_both_uses():
    tokens, w = torch.tensor([[0, 2], [1, 1]]), leaf(4, 3)
    copy = w.detach().clone().requires_grad_()

    def loss(table, head):
        return F.cross_entropy(
            (torch.tanh(F.embedding(tokens, table)) @ head.t()).flatten(0, 1), torch.tensor([1, 3, 0, 2])
        )

    close(hessian_diagonal(loss(w, w), [w]), [sum(hessian_diagonal(loss(w, copy), [w, copy]))])


def test_a_loss_is_linear_in_its_terms():
    model = network()
    params = list(model.parameters())
    x = randn(8, 5)
    y = model[:3](x)
    one, two = y.pow(2).mean(), (model[3:](y) * 0.3).exp().sum()
    parts = [hessian_diagonal(loss, params, retain_graph=True) for loss in (one, two, one + 3 * two)]
    close(parts[2], [a + 3 * b for a, b in zip(*parts[:2], strict=True)])


def test_a_multiple_of_a_loss_has_the_multiple():
    model = network()
    params = list(model.parameters())
    close(hessian_diagonal(1024 * loss_of(model), params), [1024 * h for h in hessian_diagonal(loss_of(model), params)])


def test_micro_batches_add_to_the_batch():
    model = network()
    params = list(model.parameters())
    x = randn(8, 5)
    parts = [hessian_diagonal(model(part).pow(2).sum() / 8, params) for part in x.split(2)]
    close([sum(h) for h in zip(*parts, strict=True)], hessian_diagonal(model(x).pow(2).sum() / 8, params))


def test_the_last_layer_is_exact():
    model = network()
    exact_last = oracles.hessian_diagonal(loss_of(model), list(model[4].parameters()))
    close(hessian_diagonal(loss_of(model), list(model[4].parameters())), exact_last)
    close(hessian_diagonal(loss_of(model), list(model.parameters()))[-2:], exact_last)


def test_branches_that_do_not_reach_the_loss_do_not_count():
    x, w = leaf(3, 4), leaf(4, seed=1)
    y = x * w
    Mystery.apply(y).sum()  # nobody looks at this
    first, _ = y.split([1, 2])
    variance, mean = torch.var_mean(first, dim=1)
    loss = mean.exp().sum()
    assert variance.requires_grad
    copies = [x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()]
    close(
        hessian_diagonal(loss, [x, w]),
        oracles.hessian_diagonal((copies[0] * copies[1])[:1].mean(1).exp().sum(), copies),
    )


def test_an_operation_off_the_way_to_the_parameters_needs_no_rule():
    x, w = leaf(4), leaf(4, seed=1)
    found = hessian_diagonal((Mystery.apply(x) * w).pow(2).sum(), [w])
    close(found, [2 * x.detach().sin() ** 2])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, 6).t()[1:, :].reshape(-1)[2:].view(2, -1)[:, ::2],
        lambda x: x.unfold(1, 2, 1).permute(2, 0, 1)[0, 1:].expand(3, -1, -1).diagonal(),
        lambda x: x[None].transpose(0, 2).squeeze(-1).unbind(1)[2].view(2, 2).mT.flatten(),
        lambda x: x.as_strided((3, 3), (4, 1), 1)[1].narrow(0, 1, 2).unsqueeze(0),
        lambda x: torch.stack(x.chunk(2, 1)).movedim(0, 1).flatten(1).select(0, 2),
    ],
)
def test_views_of_views(view):
    exact(lambda x: (view(x) ** 3).sum(), leaf(3, 4))
    exact(lambda x: (view(x * 2).exp()).sum(), leaf(3, 4))


# In place.


def scaled_in_place(x, w):
    y = x * 2
    y.mul_(w)
    return (y**2).sum()


def slices_in_place(x, w):
    y = x * 2
    y[1:].mul_(w[1:])
    y[0].add_(w[0])
    return (y**3).sum()


def slice_assigned(x, w):
    y = torch.zeros(3, 4, dtype=x.dtype)
    y[1:] = x[1:]
    y[0] = w[0] * 2
    return y.exp().sum()


def filled_by_rows(x, w):
    rows = torch.empty(3, 4, dtype=x.dtype)
    for i in range(3):
        rows[i] = x[i] * w[i]
    return (rows**2).sum()


def activated_in_place(x, w):
    y = F.relu_(x * w) * 1
    y += 3 * w.detach()
    y -= x.detach()
    return (y**2).sum()


def masked_in_place(x, w):
    y = x * w
    y.masked_fill_(x > 0.3, 0.5)
    y[x.detach() < -1] = 2.0
    return y.exp().sum()


def elementwise_in_place(x, w):
    y = x * w
    y.mul_(0.5).neg_().add_(1.5).sigmoid_()
    return (y**2).sum()


def slice_activated_in_place(x, w):
    y = x * w
    y[0].mul_(3)
    y[:, 1:].tanh_()
    return (y**2).sum()


def view_of_view_in_place(x, w):
    y = x * w
    y.view(2, 6).t()[1:3].relu_()
    return (y**3).sum()


def base_of_view_in_place(x, w):
    y = x * w
    z = y[1:]
    y.mul_(3)
    return (z**2).sum()


@pytest.mark.parametrize(
    "loss",
    [
        scaled_in_place, slices_in_place, slice_assigned, filled_by_rows, activated_in_place, masked_in_place,
        elementwise_in_place, slice_activated_in_place, view_of_view_in_place, base_of_view_in_place,
    ],
)  # fmt: skip
def test_updates_in_place_are_right_for_each_operand(loss):
    x, w = leaf(3, 4), leaf(3, 4, seed=1)
    exact(lambda x: loss(x, w.detach()), x)
    exact(lambda w: loss(x.detach(), w), w)


def test_a_saved_tensor_changed_in_place_is_an_error_of_autograd():
    x, w = leaf(3), leaf(3, seed=1)
    y = x.exp()
    loss = (y * w).sum() ** 2
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hessian_diagonal(loss, [x, w])


# Shapes and types at the edge.


def test_an_empty_batch_gives_zeros():
    for model in (network(), nn.Sequential(nn.Linear(5, 4).double(), nn.LayerNorm(4).double(), nn.Softmax(-1))):
        params = list(model.parameters())
        found = hessian_diagonal(model(randn(0, 5)).pow(2).sum(), params)
        same(found, [torch.zeros_like(p) for p in params])


def test_an_empty_batch_of_images_gives_zeros():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)).double()
    params = list(model.parameters())
    found = hessian_diagonal(model(randn(0, 2, 3, 3)).pow(2).sum(), params)
    same(found, [torch.zeros_like(p) for p in params])


def test_numbers_without_axes():
    exact(lambda x, y: (x * 2).tanh() * y.exp(), leaf(seed=1), leaf(seed=2))


def test_a_loss_with_one_entry_may_have_axes():
    x = leaf(3)
    close(hessian_diagonal((x**3).sum().view(1, 1), [x]), [6 * x.detach()])


@pytest.mark.parametrize("transform", [torch.fft.rfft, torch.fft.fft, lambda x: torch.complex(x, x), lambda x: x * 1j])
def test_complex_tensors_are_one_clear_error(transform):
    x = leaf(4)
    with pytest.raises(UnsupportedOperation, match="Backward0"):
        hessian_diagonal((x.sin() + transform(x).abs().pow(2)[:1].sum()).sum(), [x])


def test_a_complex_parameter_is_refused():
    x = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        hessian_diagonal(x.abs().sum(), [x])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision_have_a_diagonal_in_single(dtype):
    half = network(dtype)
    params = list(half.parameters())
    full = network(seed=3)
    full.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    x = randn(8, 5, seed=1, dtype=dtype)
    found = hessian_diagonal(F.cross_entropy(half(x).float(), torch.arange(8) % 3), params)
    expected = hessian_diagonal(F.cross_entropy(full(x.double()), torch.arange(8) % 3), list(full.parameters()))
    for h, e in zip(found, expected, strict=True):
        assert h.dtype == torch.float32
        assert (h - e).norm() < 0.05 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = network(torch.float32)
    params = list(model.parameters())
    x = randn(8, 5, seed=1, dtype=torch.float32)
    expected = hessian_diagonal(F.cross_entropy(model(x), torch.arange(8) % 3), params)
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), torch.arange(8) % 3)
    for h, e in zip(hessian_diagonal(loss, params), expected, strict=True):
        assert h.dtype == torch.float32
        assert (h - e).norm() < 0.05 * e.norm()


def test_carried_in_another_type():
    model = network(torch.float32)
    params = list(model.parameters())
    expected = hessian_diagonal(loss_of(model, dtype=torch.float32), params)
    for dtype, tolerance in [(torch.bfloat16, 0.05), (torch.float64, 1e-5)]:
        for h, e in zip(
            hessian_diagonal(loss_of(model, dtype=torch.float32), params, dtype=dtype), expected, strict=True
        ):
            assert (h - e).norm() < tolerance * e.norm()


def test_sparse_gradients_of_an_embedding():
    tokens = torch.tensor([1, 3, 1])

    def diagonal(sparse):
        w = leaf(5, 2)
        return hessian_diagonal(F.embedding(tokens, w, sparse=sparse).exp().sum(), [w])

    close(diagonal(True), diagonal(False))


# Which tensors are asked for.


def test_inner_tensors_are_parameters_too():
    x, w = leaf(3, 4), leaf(4, 2, seed=1)
    y = torch.tanh(x)
    z = y @ w
    loss = z.exp().sum()
    found = hessian_diagonal(loss, [z, y, x, w, loss], retain_graph=True)
    values = [t.detach().clone().requires_grad_() for t in (z, y, x, w)]
    copies = [
        oracles.hessian_diagonal(values[0].exp().sum(), [values[0]])[0],
        oracles.hessian_diagonal((values[1] @ w).exp().sum(), [values[1]])[0],
        oracles.hessian_diagonal((torch.tanh(values[2]) @ w).exp().sum(), [values[2]])[0],
        oracles.hessian_diagonal((y @ values[3]).exp().sum(), [values[3]])[0],
    ]
    close(found[:4], copies)
    close(found[4:], [torch.zeros((), dtype=torch.float64)])
    for tensor, h in zip([z, y, x, w], found, strict=False):
        close(hessian_diagonal(loss, [tensor], retain_graph=True), [h])


def test_several_outputs_of_one_node():
    x = leaf(3, 4)
    one, two, three = torch.tanh(x).unbind()
    loss = (one * 2).exp().sum() + two.pow(3).sum()
    found = hessian_diagonal(loss, [three, two, one])
    close(found, [torch.zeros_like(three), 6 * two.detach(), 4 * (2 * one.detach()).exp()])


def test_duplicates_are_answered_twice():
    x, y = leaf(3), leaf(3, seed=1)
    found = hessian_diagonal((x**3 * y).sum(), [x, y, x])
    close(found, [6 * x.detach() * y.detach(), torch.zeros_like(x), 6 * x.detach() * y.detach()])


def test_zeros_where_the_loss_does_not_depend():
    x, other = leaf(3), leaf(2, 2, seed=1)
    copy_of_a_leaf, used_nowhere = leaf(2), leaf(3, seed=2).exp()
    found = hessian_diagonal(x.exp().sum(), [other, x, copy_of_a_leaf, used_nowhere])
    same(found, [torch.zeros(2, 2).double(), x.detach().exp(), torch.zeros(2).double(), torch.zeros(3).double()])
    same(hessian_diagonal(x.exp().sum(), [other]), [torch.zeros(2, 2).double()])


def test_a_linear_loss_gives_zeros():
    x = leaf(3, 4)
    found = hessian_diagonal((x @ randn(4, 2)).sum(), [x])
    same(found, [torch.zeros(3, 4).double()])
    assert found[0].is_contiguous()


def test_a_loss_that_is_a_parameter_itself():
    x = leaf()
    same(hessian_diagonal(x, [x]), [torch.zeros((), dtype=torch.float64)])


def test_frozen_parameters_change_nothing_for_the_others():
    model = network()
    full = hessian_diagonal(loss_of(model), list(model.parameters()))
    model[2].requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    close(hessian_diagonal(loss_of(model), rest), [*full[:2], *full[4:]], 1e-14)


def test_one_tensor_or_a_generator_will_do():
    model = network()
    first = next(model.parameters())
    (alone,) = hessian_diagonal(loss_of(model), first)
    same([alone], hessian_diagonal(loss_of(model), model.parameters())[:1])


def test_parameters_that_are_views_of_one_buffer():
    flat = leaf(23)
    parts = [flat[:20].view(5, 4), flat[20:].view(3)]

    def loss(weight, rest):
        return F.cross_entropy(torch.tanh(randn(6, 5) @ weight)[:, :3] + rest, torch.arange(6) % 3)

    copies = [p.detach().clone().requires_grad_() for p in parts]
    expected = hessian_diagonal(loss(*copies), copies)
    close(hessian_diagonal(loss(*parts), parts, retain_graph=True), expected)
    close(hessian_diagonal(loss(*parts), [flat]), [torch.cat([h.flatten() for h in expected])])


def test_functional_call():
    model = network()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = torch.func.functional_call(model, params, (randn(8, 5, seed=1),))
    found = hessian_diagonal(F.cross_entropy(output, torch.arange(8) % 3), params.values())
    same(found, hessian_diagonal(loss_of(model), model.parameters()))


def test_weights_made_by_a_parametrization():
    model = network()
    nn.utils.parametrizations.weight_norm(model[4])
    params = list(model.parameters())
    for h in hessian_diagonal(loss_of(model), params):
        assert h.isfinite().all()
        assert h.abs().sum() > 0


def test_inputs_are_as_good_as_parameters():
    exact(lambda x: F.cross_entropy(x, torch.tensor([1, 0])), leaf(2, 3))


# Backward passes.


def test_the_gradient_is_bitwise_the_same():
    model = network(torch.float32)
    params = list(model.parameters())
    loss_of(model, dtype=torch.float32).backward()
    plain = [p.grad.clone() for p in params]
    model.zero_grad()
    optimizer = quadric.AdaHesScale(params)
    optimizer.backward(loss_of(model, dtype=torch.float32))
    same([p.grad for p in params], plain)


def test_gradients_stay_as_they_are():
    model = network()
    loss_of(model).backward()
    kept = [p.grad for p in model.parameters()]
    values = [g.clone() for g in kept]
    hessian_diagonal(loss_of(model), model.parameters())
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    same(kept, values)


def test_several_passes_over_a_kept_graph():
    model = network()
    params = list(model.parameters())
    loss = loss_of(model)
    first = hessian_diagonal(loss, params, retain_graph=True)
    loss.backward(retain_graph=True)
    same(hessian_diagonal(loss, params, retain_graph=True), first)
    same(hessian_diagonal(loss, params), first)
    with pytest.raises(RuntimeError, match="second time"):
        hessian_diagonal(loss, params)


def test_under_no_grad():
    model = network()
    params = list(model.parameters())
    loss = loss_of(model)
    expected = hessian_diagonal(loss, params, retain_graph=True)
    with torch.no_grad():
        found = hessian_diagonal(loss, params)
    same(found, expected)
    assert not any(h.requires_grad for h in found)


def test_the_random_state_of_the_user_stays():
    model = network()
    loss = loss_of(model)
    before = torch.get_rng_state()
    hessian_diagonal(loss, model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_call_gives_the_same_bits():
    model = network(torch.float32)
    loss = loss_of(model, dtype=torch.float32)
    first = hessian_diagonal(loss, model.parameters(), retain_graph=True)
    same(hessian_diagonal(loss, model.parameters()), first)


def test_called_inside_a_hook_of_another_backward():
    outer, inner = network(), network(seed=5)
    expected_outer = hessian_diagonal(loss_of(outer), outer.parameters())
    expected_inner = hessian_diagonal(loss_of(inner), inner.parameters())
    found = []
    y = outer[:2](randn(8, 5, seed=1))

    def look(g):
        with torch.enable_grad():
            found.extend(hessian_diagonal(loss_of(inner), inner.parameters()))

    y.register_hook(look)
    loss = F.cross_entropy(outer[2:](y), torch.arange(8) % 3)
    same(hessian_diagonal(loss, outer.parameters()), expected_outer)
    same(found, expected_inner)


def test_called_inside_a_hook_over_the_same_graph():
    model = network()
    params = list(model.parameters())
    y = model[:2](randn(8, 5, seed=1))
    loss = F.cross_entropy(model[2:](y), torch.arange(8) % 3)
    found = []

    def again(g):
        if not found:
            found.append(None)
            found.extend(hessian_diagonal(loss, params, retain_graph=True))

    y.register_hook(again)
    expected = hessian_diagonal(loss_of(model), params)
    close(hessian_diagonal(loss, params, retain_graph=True), expected, 1e-14)
    close(found[1:], expected, 1e-14)


def test_called_inside_a_custom_backward():
    inner = network(seed=5)
    expected = hessian_diagonal(loss_of(inner), inner.parameters())
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                found.extend(hessian_diagonal(loss_of(inner), inner.parameters()))
            return g

        @staticmethod
        def hessian_diagonal(ctx, g, h):
            return h

    x = leaf(4)
    close(hessian_diagonal(Look.apply(x.exp()).pow(2).sum(), [x]), [4 * (2 * x.detach()).exp()])
    same(found, expected)


def test_threads_over_one_kept_graph():
    model = network()
    params, loss = list(model.parameters()), loss_of(model)
    expected = hessian_diagonal(loss, params, retain_graph=True)

    def look(_):
        return hessian_diagonal(loss, params, retain_graph=True)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for found in threads.map(look, range(60)):
            close(found, expected)


def test_two_threads_with_two_models():
    models = [network(seed=s) for s in range(2)]
    expected = [hessian_diagonal(loss_of(m), m.parameters()) for m in models]
    found = [[], []]
    start = threading.Barrier(2)

    def work(place):
        start.wait()
        for _ in range(20):
            found[place].append(hessian_diagonal(loss_of(models[place]), models[place].parameters()))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        assert len(found[place]) == 20
        for diagonals in found[place]:
            same(diagonals, expected[place])


def test_a_graph_deeper_than_the_stack():
    x = leaf(2)
    y = x
    for _ in range(5000):
        y = y * 0.9999 + 0
    scale = 0.9999**5000
    close(hessian_diagonal((y**2).sum() / 2, [x]), [torch.full((2,), scale**2, dtype=x.dtype)])


# Nothing stays behind.


def test_a_later_backward_calls_no_rule():
    x = leaf(4)
    loss = Cube.apply(Cube.apply(x)).sum()
    hessian_diagonal(loss, [x], retain_graph=True)
    assert Cube.calls == 2
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, x)
    assert Cube.calls == 2


def test_nothing_on_modules_parameters_or_tensors():
    model = network()
    before = [dict(vars(m)) for m in model.modules()], [dict(vars(p)) for p in model.parameters()]
    loss = loss_of(model)
    hessian_diagonal(loss, model.parameters(), retain_graph=True)
    assert ([dict(vars(m)) for m in model.modules()], [dict(vars(p)) for p in model.parameters()]) == before
    assert all(not p._backward_hooks for p in model.parameters())
    assert vars(loss) == {}


def failing(kind, x):
    """A loss whose Hessian diagonal fails on the way, and what to expect."""
    y = x.tanh()
    if kind == "hook":
        y.register_hook(lambda g: raise_(ArithmeticError("told to fail in a hook")))
    Cube.fails = kind
    return Cube.apply(y.exp()).sum()


def raise_(error):
    raise error


@pytest.mark.parametrize("kind", ["", "rule", "hook", "backward"])
def test_memory_is_released(kind):
    model = network()
    x = randn(8, 5)
    activations = []
    handles = [m.register_forward_hook(lambda m, i, o: activations.append(weakref.ref(o))) for m in model]
    loss = failing(kind, model(x))
    for handle in handles:
        handle.remove()
    expectation = pytest.raises(ArithmeticError, match="told to fail") if kind else contextlib.nullcontext()
    with expectation:
        hessian_diagonal(loss, model.parameters())
    dying = [weakref.ref(model), weakref.ref(loss), *map(weakref.ref, model.parameters()), *activations]
    del model, loss, handles, expectation
    gc.collect()
    assert [ref() for ref in dying] == [None] * len(dying)


def test_memory_is_released_without_the_collector():
    model = network()
    activations = []
    handles = [m.register_forward_hook(lambda m, i, o: activations.append(weakref.ref(o))) for m in model]
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(model)
        hessian_diagonal(loss, model.parameters())
        del loss
        assert [ref() for ref in activations] == [None] * len(activations)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["rule", "hook", "backward"])
def test_after_an_error_the_graph_is_as_before(kind):
    x = leaf(4)
    loss = failing(kind, x)
    with pytest.raises(ArithmeticError, match="told to fail"):
        hessian_diagonal(loss, [x], retain_graph=True)
    Cube.fails = ""
    calls = Cube.calls
    if kind != "hook":
        loss.backward(retain_graph=True)
        assert Cube.calls == calls
    fresh = Cube.apply(x.tanh().exp()).sum()
    exact_value = oracles.hessian_diagonal((x.tanh().exp() ** 3).sum(), [x])
    close(hessian_diagonal(fresh, [x]), exact_value)


def test_refusing_an_operation_leaves_the_graph_as_it_was():
    x = leaf(4)
    loss = Cube.apply(Mystery.apply(x)).sum()
    with pytest.raises(UnsupportedOperation):
        hessian_diagonal(loss, [x])
    loss.backward()
    assert Cube.calls == 0
    assert x.grad is not None


# Operations without a rule.


def test_the_error_names_node_parameters_line_and_remedy():
    model = network()
    loss = Mystery.apply(model[:2](randn(8, 5))).sum()
    with pytest.raises(UnsupportedOperation) as caught:
        hessian_diagonal(loss, model.parameters())
    text = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    for part in ("MysteryBackward", "(6, 5)", "register_rule", "hessian_diagonal", "fallback", "detect_anomaly"):
        assert part in text
    assert "\n" not in text


def test_the_error_names_the_source_line_under_anomaly_mode():
    x = leaf(4)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        loss = Mystery.apply(x).sum()  # the line to be shown
    with pytest.raises(UnsupportedOperation, match="the line to be shown") as caught:
        hessian_diagonal(loss, [x])
    assert "test_walk.py" in str(caught.value)


def test_fallback_zero_lets_nothing_through():
    x, w = leaf(4), leaf(4, seed=1)
    loss = (Mystery.apply(x) * w).pow(2).sum()
    found = hessian_diagonal(loss, [x, w], fallback="zero")
    close(found, [torch.zeros(4).double(), 2 * x.detach().sin() ** 2])


def test_fallback_gauss_newton_squares_a_diagonal_jacobian_exactly():
    x = leaf(6)
    loss = (randn(6, seed=1) * (Mystery.apply(x) - 2) ** 2).sum()
    close(hessian_diagonal(loss, [x], fallback="gauss_newton"), [2 * randn(6, seed=1) * x.detach().cos() ** 2])


def test_fallback_gauss_newton_does_not_move_the_random_state():
    x = leaf(6)
    before = torch.get_rng_state()
    hessian_diagonal(Mystery.apply(x).pow(2).sum(), [x], fallback="gauss_newton")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gauss_newton_fallback_is_unbiased():
    class Mix(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, m):
            ctx.save_for_backward(m)
            return m @ x

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0].t() @ g, None

    x, m = leaf(3, 4000), randn(5, 3)
    found = hessian_diagonal(Mix.apply(x, m).pow(2).sum() / 2, [x], fallback="gauss_newton")[0]
    expected = m.pow(2).sum(0)
    assert ((found.mean(1) - expected).abs() < 0.1 * expected).all()


def test_a_registered_rule_is_used(monkeypatch):
    x = leaf(4)
    monkeypatch.setitem(RULES, "MysteryBackward", None)
    monkeypatch.delitem(RULES, "MysteryBackward")

    def rule(node, g, h):
        (x,) = node.saved_tensors
        return x.cos() ** 2 * h - x.sin() * g

    register_rule("MysteryBackward", rule)
    exact_value = oracles.hessian_diagonal((x.sin() ** 3).sum(), [x])
    close(hessian_diagonal((Mystery.apply(x) ** 3).sum(), [x]), exact_value)
    close(hessian_diagonal(Mystery.apply(x).sum(), [x]), [-x.detach().sin()])


def test_a_later_rule_replaces_the_library_s(monkeypatch):
    monkeypatch.setitem(RULES, "TanhBackward0", RULES["TanhBackward0"])
    register_rule("TanhBackward0", lambda node, g, h: torch.full_like(g, 7.0))
    x = leaf(4)
    close(hessian_diagonal(x.tanh().sum(), [x]), [torch.full((4,), 7.0).double()])


@pytest.mark.parametrize(("name", "rule"), [("", print), (3, print), ("TanhBackward0", 5)])
def test_a_bad_rule_is_refused(name, rule):
    with pytest.raises(ValueError, match="register_rule"):
        register_rule(name, rule)


def test_a_rule_that_returns_the_wrong_number_of_inputs_is_an_error(monkeypatch):
    monkeypatch.setitem(RULES, "Atan2Backward0", RULES["Atan2Backward0"])
    register_rule("Atan2Backward0", lambda node, g, h: h)
    x, y = leaf(4), leaf(4, seed=1)
    with pytest.raises(ValueError, match=r"Atan2Backward0 returned 1 tensors for 2 inputs"):
        hessian_diagonal(torch.atan2(x, y).sum(), [x, y])


def test_a_custom_function_brings_its_rule():
    x = leaf(4)
    expected = oracles.hessian_diagonal(((x.tanh() ** 3) ** 2).sum(), [x])
    close(hessian_diagonal((Cube.apply(x.tanh()) ** 2).sum(), [x]), expected)
    close(hessian_diagonal(Cube.apply(x).sum(), [x]), [6 * x.detach()])


class SumAndProduct(torch.autograd.Function):
    """Several inputs, a number among them, and several outputs."""

    @staticmethod
    def forward(ctx, x, factor, y):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x + factor * y, x * y

    @staticmethod
    def backward(ctx, g_sum, g_product):
        x, y = ctx.saved_tensors
        return g_sum + g_product * y, None, ctx.factor * g_sum + g_product * x

    @staticmethod
    def hessian_diagonal(ctx, g, h):
        x, y = ctx.saved_tensors
        return h[0] + h[1] * y**2, ctx.factor**2 * h[0] + h[1] * x**2


def test_a_custom_function_of_several_inputs_and_outputs():
    x, y = leaf(4), leaf(4, seed=1)

    def bends(total, product):
        return (2 * total**2).sum() + product.exp().sum()

    # x enters both outputs; only their diagonals count
    e = (x * y).detach().exp()
    expected = [4 + e * y.detach() ** 2, 36 + e * x.detach() ** 2]
    close(hessian_diagonal(bends(*SumAndProduct.apply(x, 3, y)), [x, y]), expected)
    only_product = SumAndProduct.apply(x, 3, y)[1]
    close(hessian_diagonal(only_product.exp().sum(), [x, y]), [e * y.detach() ** 2, e * x.detach() ** 2])


def test_the_backward_of_a_backward_is_a_clear_error():
    x = leaf(4)
    (gradient,) = torch.autograd.grad(x.tanh().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedOperation, match="TanhBackwardBackward0"):
        hessian_diagonal(gradient.pow(2).sum(), [x])


# Frameworks.


def checkpointed(model, use_reentrant):
    def loss(x):
        y = checkpoint(model[:2], x, use_reentrant=use_reentrant)
        return F.cross_entropy(checkpoint(model[2:], y, use_reentrant=use_reentrant), torch.arange(8) % 3)

    return loss(randn(8, 5, seed=1).requires_grad_(use_reentrant))


def test_checkpointing_without_reentrance():
    model = network()
    close(
        hessian_diagonal(checkpointed(model, False), model.parameters()),
        hessian_diagonal(loss_of(model), model.parameters()),
    )


def test_reentrant_checkpointing_is_one_clear_error():
    model = network()
    with pytest.raises(UnsupportedOperation, match="use_reentrant=False"):
        hessian_diagonal(checkpointed(model, True), model.parameters())


def test_saved_tensor_hooks_of_the_user():
    model = network()
    expected = hessian_diagonal(loss_of(model), model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = loss_of(model)
    same(hessian_diagonal(loss, model.parameters()), expected)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model)
    same(hessian_diagonal(loss, model.parameters()), expected)


def test_a_compiled_model_is_one_clear_error():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(UnsupportedOperation, match=r"CompiledFunctionBackward.*eager"):
        hessian_diagonal(loss_of(compiled), model.parameters())


def test_a_module_compiled_to_eager_is_eager():
    model = network()
    found = hessian_diagonal(loss_of(torch.compile(model, backend="eager")), model.parameters())
    close(found, hessian_diagonal(loss_of(model), model.parameters()), 1e-14)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_model_wrapped_for_several_processes():
    model = network()
    expected = hessian_diagonal(loss_of(model), model.parameters())
    wrapped = DistributedDataParallel(model)
    close(hessian_diagonal(loss_of(wrapped), model.parameters()), expected, 1e-14)
    optimizer = quadric.AdaHesScale(model.parameters())
    optimizer.backward(loss_of(wrapped))
    optimizer.step()


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.exp(), r"scalar.*\(3,\).*mean"),
        (lambda x: x.exp().sum().detach(), "graph"),
        (lambda x: torch.tensor(1.0), "graph"),
        (lambda x: 3.0, "scalar.*float"),
        (lambda x: (x * 1j).sum(), "real"),
        (lambda x: x[:0].exp(), "scalar"),
        (lambda x: (x * float("nan")).sum(), "nan"),
        (lambda x: x.abs().sum() / 0, "inf"),
    ],
)
def test_a_bad_loss_is_refused(make, message):
    x = leaf(3)
    with pytest.raises(ValueError, match=message):
        hessian_diagonal(make(x), [x])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda x: [], "empty"),
        (lambda x: [x.detach()], "require"),
        (lambda x: [x, 3], "parameter 1.*int"),
        (lambda x: [torch.zeros(2, dtype=torch.long)], "require"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    x = leaf(3)
    with pytest.raises(ValueError, match=message):
        hessian_diagonal(x.exp().sum(), params(x))


@pytest.mark.parametrize("given", [{"fallback": "one"}, {"dtype": torch.int32}])
def test_bad_options_are_refused(given):
    x = leaf(3)
    with pytest.raises(ValueError, match=r"fallback|dtype"):
        hessian_diagonal(x.exp().sum(), [x], **given)


def test_a_region_of_mixed_types_and_the_type_of_the_result():
    x, t = leaf(3, seed=4).detach().float().requires_grad_(), torch.rand(3, dtype=torch.float64)
    loss = (t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x)).sum()
    (h,) = hessian_diagonal(loss, [x])
    s = torch.sigmoid(x.detach())
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, -s * (1 - s))
