import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import APPROXIMATE, EXACT, LOSSES, Case, attentions, case, normal

import oracles
from quadric import hessian_diagonal
from quadric.backprop.walk import Walk

few = settings(deadline=None, max_examples=25)


def constants(outputs, seed):
    """Random numbers, negative ones among them, of the shape of each output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def straight(outputs):
    """A loss with a gradient and no curvature in the outputs."""
    return sum((g * y).sum() for y, g in zip(outputs, constants(outputs, 1), strict=True))


def curved(outputs):
    """A loss with a gradient and a diagonal Hessian in the outputs."""
    bends = constants(outputs, 2)
    return straight(outputs) + sum((h * (y - y.detach()) ** 2).sum() for y, h in zip(outputs, bends, strict=True))


def bent(outputs):
    """A loss curved once, all of it between the outputs and the end."""
    targets, bends = constants(outputs, 3), constants(outputs, 4)
    return sum((h * (y - t) ** 2).sum() for y, t, h in zip(outputs, targets, bends, strict=True))


def squared(outputs):
    """Half the squared distance to targets."""
    return sum(((y - t) ** 2).sum() / 2 for y, t in zip(outputs, constants(outputs, 3), strict=True))


def gauss_newton(outputs, inputs):
    """``Σ_k J_ki² h_k`` of the loss ``bent`` with a dense Jacobian."""
    sums = [torch.zeros_like(x) for x in inputs]
    for y, h in zip(outputs, constants(outputs, 4), strict=True):
        for entry, weight in zip(y.flatten().unbind(), (2 * h).flatten(), strict=True):
            rows = torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True)
            for total, row in zip(sums, rows, strict=True):
                total += weight * row**2
    return sums


def floating(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def choices(arguments):
    """All differentiated inputs at once, and where there are several, each of them with the others held constant."""
    yield arguments
    count = len(floating(arguments))
    for kept in range(count if count > 1 else 0):
        places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]
        yield [a.detach() if i in places and i != places[kept] else a for i, a in enumerate(arguments)]


def close(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        error = (one - other).abs()
        assert torch.all(error <= tolerance * max(1.0, float(other.abs().amax()) if other.numel() else 1.0)), (
            f"\nfound {one}\nexact {other}"
        )


def check(entry: Case, loss):
    for arguments in choices(entry.draw()):
        inputs = floating(arguments)
        expected = oracles.hessian_diagonal(loss(entry.evaluate(arguments, exact=True)), inputs)
        close(hessian_diagonal(loss(entry.evaluate(arguments)), inputs), expected)


def test_the_references_mean_the_same():
    for entry in (EXACT | LOSSES | {name: rest[0] for name, rest in APPROXIMATE.items()}).values():
        arguments = entry.draw()
        outputs, references = entry.evaluate(arguments), entry.evaluate(arguments, exact=True)
        close([y.detach() for y in outputs], [y.detach() for y in references])


@pytest.mark.parametrize("name", EXACT)
def test_one_operation_is_exact_under_a_curved_loss(name):
    check(EXACT[name], curved)


@pytest.mark.parametrize("name", EXACT)
def test_one_operation_is_exact_under_a_straight_loss(name):
    check(EXACT[name], straight)


@pytest.mark.parametrize("name", EXACT)
def test_gauss_newton_squares_the_jacobian(name):
    entry = EXACT[name]
    for arguments in choices(entry.draw()):
        inputs = floating(arguments)
        expected = gauss_newton(entry.evaluate(arguments, exact=True), inputs)
        close(hessian_diagonal(bent(entry.evaluate(arguments)), inputs, gauss_newton=True), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_exact(name):
    check(LOSSES[name], straight)


TWICE_CURVED = {"gaussian nll of log std", "squared norm"}  # one curved operation after another


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in TWICE_CURVED])
def test_gauss_newton_keeps_the_curvature_of_the_loss(name):
    entry = LOSSES[name]
    arguments = entry.draw()
    inputs = floating(arguments)[:1]
    expected = oracles.hessian_diagonal(straight(entry.evaluate(arguments, exact=True)), inputs)
    close(hessian_diagonal(straight(entry.evaluate(arguments)), inputs, gauss_newton=True), expected)


@pytest.mark.parametrize("name", [name for name in EXACT | LOSSES if name != "float_power"])  # which computes in double
def test_single_precision_agrees_with_double(name):
    entry = (EXACT | LOSSES)[name]
    loss = curved if name in EXACT else straight
    single, double = (
        entry.draw(torch.float32),
        [
            a.detach().double().requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in entry.draw(torch.float32)
        ],
    )
    found = hessian_diagonal(loss(entry.evaluate(single)), floating(single))
    assert all(h.dtype == torch.float32 for h in found)
    close([h.double() for h in found], hessian_diagonal(loss(entry.evaluate(double)), floating(double)), 2e-3)


@pytest.mark.parametrize("name", EXACT | LOSSES)
def test_a_backward_of_the_user_s_brings_the_same(name):
    entry = (EXACT | LOSSES)[name]
    loss = curved if name in EXACT else straight
    arguments = entry.draw()
    inputs = floating(arguments)
    expected = hessian_diagonal(loss(entry.evaluate(arguments)), inputs)
    gradients = torch.autograd.grad(loss(entry.evaluate(arguments)), inputs, materialize_grads=True)
    total = loss(entry.evaluate(arguments))
    with Walk(total, inputs) as walk:
        total.backward()
    close(walk.finished(inputs), expected, 1e-13)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert torch.equal(torch.zeros_like(x) if x.grad is None else x.grad, gradient)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_a_composition_is_close(name):
    entry, bound, _ = APPROXIMATE[name]
    arguments = entry.draw()
    inputs = floating(arguments)
    expected = oracles.hessian_diagonal(squared(entry.evaluate(arguments, exact=True)), inputs)
    found = hessian_diagonal(squared(entry.evaluate(arguments)), inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).abs().sum() <= bound * other.abs().sum()


@pytest.mark.parametrize("name", attentions("qkv"))
@pytest.mark.parametrize("loss", [curved, straight])
def test_every_kernel_of_attention_gives_what_its_parts_give(name, loss):
    entry = attentions("qkv")[name]
    arguments = entry.draw()
    inputs = floating(arguments)
    for gauss_newton in (False, True):
        parts = hessian_diagonal(loss(entry.evaluate(arguments, exact=True)), inputs, gauss_newton=gauss_newton)
        close(hessian_diagonal(loss(entry.evaluate(arguments)), inputs, gauss_newton=gauss_newton), parts)


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_a_cast_carries_the_diagonal_without_rounding_it(source, target):
    x = torch.tensor([1.0, -0.5, 2.0], dtype=source, requires_grad=True)
    bends = torch.tensor([0.5, 3.0, -2.0], dtype=target)
    (found,) = hessian_diagonal((bends * x.to(target) ** 2).sum(), [x])
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found.double(), 2 * bends.double())


@st.composite
def products(draw):
    """Shapes of a matrix product: one to four axes each, broadcast against each other."""
    rows, inner, columns = (draw(st.integers(1, 4)) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))

    def lead():
        kept = batch[draw(st.integers(0, len(batch))) :]
        return [1 if draw(st.booleans()) else n for n in kept]

    left = [inner] if draw(st.booleans()) else [*lead(), rows, inner]
    right = [inner] if draw(st.booleans()) else [*lead(), inner, columns]
    return left, right


@few
@given(products())
def test_matrix_products_of_any_shape_are_exact(shapes):
    check(case(torch.matmul, *(normal(*shape) for shape in shapes)), curved)


@st.composite
def broadcast(draw):
    """Two shapes that broadcast, sizes of zero among them."""
    shape = draw(st.lists(st.integers(0, 3), max_size=4))

    def part():
        kept = shape[draw(st.integers(0, len(shape))) :]
        return [1 if draw(st.booleans()) else n for n in kept]

    return part(), part()


@few
@given(broadcast(), st.sampled_from([torch.add, torch.sub, torch.mul, torch.maximum, torch.atan2, torch.hypot]))
def test_operations_that_broadcast_are_exact(shapes, operation):
    check(case(operation, *(normal(*shape) for shape in shapes)), curved)


@st.composite
def convolutions(draw):
    """A convolution or its transpose in one to three axes, with everything that may vary."""
    axes = draw(st.integers(1, 3))
    groups, wide = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    channels, filters = groups * draw(st.integers(1, 2)), groups * wide
    kernel = [draw(st.integers(1, 2 if axes == 3 else 3)) for _ in range(axes)]
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    transposed = draw(st.booleans())
    least = [1 if transposed else max(1, dilation * (k - 1) + 1 - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    if transposed:  # what it makes may not be empty
        padding = [0] * axes
    size = [n + draw(st.integers(0, 2 if axes < 3 else 1)) for n in least]
    weight = [channels, wide, *kernel] if transposed else [filters, channels // groups, *kernel]
    names = {False: [F.conv1d, F.conv2d, F.conv3d], True: [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]}
    bias = [normal(filters)] if draw(st.booleans()) else []
    batch = [draw(st.integers(1, 2))] if draw(st.booleans()) else []
    return case(
        names[transposed][axes - 1], normal(*batch, channels, *size), normal(*weight), *bias,
        stride=stride, dilation=dilation, padding=padding, groups=groups,
    )  # fmt: skip


@few
@given(convolutions())
def test_convolutions_of_any_shape_are_exact(entry):
    check(entry, curved)


@few
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.data())
def test_reductions_over_any_axes_are_exact(shape, data):
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    keepdim = data.draw(st.booleans())
    operation = data.draw(
        st.sampled_from([torch.sum, torch.mean, torch.logsumexp, torch.linalg.vector_norm, torch.amax])
    )
    check(case(operation, normal(*shape), dim=tuple(axes), keepdim=keepdim), curved)
