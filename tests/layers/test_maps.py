"""Maps: their rows against the oracles, and the gradients beside the weight's to the last bit of torch's own."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import oracles
from quadric.layers.maps import Convolution, Linear, map_of

few = settings(deadline=None, max_examples=25)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def convolution_of(layer):
    return Convolution(
        layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    )


@st.composite
def convolutions(draw):
    """A convolution of one to three axes, transposed or not, and an input that fits it."""
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = draw(st.integers(1, 3))
    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        given["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    straight = nn.Conv1d, nn.Conv2d, nn.Conv3d
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else straight
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = kinds[axes - 1](*channels, kernel, **given).double()
    positions = each(1, 4)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        each_axis = zip(positions, stride, padding, reach, layer.output_padding, strict=True)
        assume(all((n - 1) * s - 2 * p + r + o > 0 for n, s, p, r, o in each_axis))
    else:
        positions = tuple(max(n, r - 2 * p) for n, r, p in zip(positions, reach, padding, strict=True))
    return layer, torch.randn(draw(st.integers(1, 3)), channels[0], *positions, dtype=torch.float64)


LINEARS = {  # inputs with n features
    "vector": lambda n: torch.randn(n),
    "matrix": lambda n: torch.randn(6, n),
    "three axes": lambda n: torch.randn(2, 3, n),
    "five axes": lambda n: torch.randn(2, 1, 3, 2, n),
    "transposed": lambda n: torch.randn(n, 6).t(),
    "transposed, one row": lambda n: torch.randn(n, 1).t(),
    "leading axes exchanged": lambda n: torch.randn(3, 2, n).transpose(0, 1),
    "last axis exchanged": lambda n: torch.randn(n, 3, 2).transpose(0, 2),
    "every second": lambda n: torch.randn(6, 2 * n)[::2, ::2],
    "every second, three axes": lambda n: torch.randn(4, 3, 2 * n)[::2, :, ::2],
    "expanded": lambda n: torch.randn(1, n).expand(5, n),
    "expanded, three axes": lambda n: torch.randn(3, 1, n).expand(3, 5, n),
    "one number everywhere": lambda n: torch.randn(()).expand(3, n),
    "no rows": lambda n: torch.randn(0, n),
    "no rows, three axes": lambda n: torch.randn(2, 0, n),
}


@st.composite
def linears(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    a = LINEARS[draw(st.sampled_from(sorted(LINEARS)))](4)
    return nn.Linear(4, draw(st.integers(1, 6))).double(), a.double()


layers = st.one_of(convolutions(), linears())


def of(layer, x):
    """The map of a layer, the plain layer's output with a graph, a gradient for it, and oracle rows of both sides."""
    kind = Linear() if isinstance(layer, nn.Linear) else convolution_of(layer)
    g = torch.randn(layer(x).shape, dtype=x.dtype, generator=generator(1))
    return kind, g, torch.stack(oracles.input_rows(layer, x)), torch.stack(oracles.output_rows(layer, x, g))


@few
@given(layers)
def test_rows_are_those_of_the_definition(case):
    layer, x = case
    kind, g, a_rows, g_rows = of(layer, x)
    weight = layer.weight.detach()
    mine, other = kind.rows(g, x, weight, None), kind.output_rows(g, x, weight, None)
    assert torch.equal(mine.reshape(a_rows.shape), a_rows)
    assert torch.equal(other.reshape(g_rows.shape), g_rows)
    assert tuple(kind.sizes(g, x, weight)) == (*a_rows.shape, g_rows.shape[2])
    rows = a_rows.shape[1]
    if rows:
        picks = torch.randint(rows, (2 * rows,), generator=generator(0))  # any order, some of them twice
        assert torch.equal(kind.rows(g, x, weight, picks), mine[..., picks, :])
        assert torch.equal(kind.output_rows(g, x, weight, picks), other[..., picks, :])


@few
@given(layers)
def test_output_and_gradients_have_the_bits_of_torch(case):
    layer, x = case
    kind, g, _, _ = of(layer, x)
    inputs = x.detach().requires_grad_()
    output = layer(inputs)
    wanted = torch.autograd.grad(output, (inputs, layer.weight, layer.bias), g)
    with torch.no_grad():  # as in the forward of a Function
        assert torch.equal(kind.output(x, layer.weight, layer.bias), output)
        of_a, of_b = kind.other_gradients(g, x, layer.weight, of_input=True, of_bias=True)
        assert torch.equal(of_a, wanted[0])
        assert torch.equal(of_b, wanted[2])
        assert kind.other_gradients(g, x, layer.weight, of_input=False, of_bias=False) == (None, None)
        assert torch.equal(kind.weight_gradient(g, x, layer.weight), wanted[1])


def close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


@few
@given(layers)
def test_a_mixing_of_rows_meets_one_factor(case):
    layer, x = case
    kind, g, a_rows, g_rows = of(layer, x)
    rows = a_rows.shape[1]
    if not rows:
        return
    mixing = torch.randn(len(a_rows), rows, rows, dtype=torch.float64, generator=generator(2))
    mixing = mixing + mixing.mT
    met = []

    def mix(factor):
        met.append(factor)
        return (mixing @ factor).view_as(factor)

    gradient = kind.mixed_gradient(g, x, layer.weight.detach(), mix)
    close(gradient, oracles.weight_of(layer, list(g_rows.mT @ mixing @ a_rows)))
    assert len(met) == 1
    if isinstance(kind, Linear):
        assert met[0].shape[-1] == min(a_rows.shape[2], g_rows.shape[2])  # the narrower one


@few
@given(layers)
def test_a_smoothing_of_features_is_one_of_the_weight_gradient(case):
    layer, x = case
    kind, g, a_rows, g_rows = of(layer, x)
    features = a_rows.shape[2]
    smoother = torch.randn(len(a_rows), features, features, dtype=torch.float64, generator=generator(2))
    smoother = smoother + smoother.mT
    gradient = kind.smoothed_gradient(
        g, x, layer.weight.detach(), smoother.squeeze(0) if isinstance(kind, Linear) else smoother
    )
    close(gradient, oracles.weight_of(layer, list(g_rows.mT @ a_rows @ smoother)))


@few
@given(layers)
def test_a_weight_is_a_matrix_for_each_group(case):
    layer, x = case
    kind, _, a_rows, g_rows = of(layer, x)
    matrix = kind.matrix(layer.weight)
    assert matrix.shape[-2:] == (g_rows.shape[2], a_rows.shape[2])
    assert torch.equal(kind.weight(matrix, layer.weight), layer.weight)
    assert torch.equal(oracles.weight_of(layer, list(matrix.view(len(a_rows), *matrix.shape[-2:]))), layer.weight)


@few
@given(convolutions())
def test_a_map_is_found_again_by_its_numbers(case):
    layer, _ = case
    kind = convolution_of(layer)
    assert all(isinstance(number, int) for number in kind.geometry())
    assert map_of(list(map(int, kind.geometry()))) == kind
    assert isinstance(map_of(Linear().geometry()), Linear)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4, 3), (40, 33)])
def test_linear_has_the_bits_of_torch_in_lower_types(name, dtype, sizes):
    torch.manual_seed(0)
    features, outputs = sizes
    layer = nn.Linear(features, outputs).to(dtype)
    x = LINEARS[name](features).to(dtype)
    x = x.detach().requires_grad_()
    output = layer(x)
    g = torch.randn(output.shape).to(dtype)
    wanted = torch.autograd.grad(output, (x, layer.bias), g)
    kind = Linear()
    with torch.no_grad():  # as in the forward of a Function
        assert torch.equal(kind.output(x, layer.weight, layer.bias), output)
        got = kind.other_gradients(g, x, layer.weight, of_input=True, of_bias=True)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_no_patch_is_unfolded_that_nobody_picked():
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 20, 20)
    g = torch.randn(2, 4, 18, 18)
    kind = convolution_of(layer)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():  # views cost nothing
                largest.append(math.prod(out.shape))
            return out

    kind.rows(g, x, layer.weight, torch.arange(5))  # where a kernel looks is worked out once
    with Sizes():
        rows = kind.rows(g, x, layer.weight, torch.arange(5))
    assert rows.shape == (1, 5, 27)
    assert max(largest) <= 5 * 27
