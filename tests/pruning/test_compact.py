"""Compaction: a smaller model with the same outputs wherever channels are understood; and what stays, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quadric.lab.models import GPT, ResNet20, three_c_three_d
from quadric.pruning.channels import channel_spaces
from quadric.pruning.compact import compact


def stir(model):
    """Double precision, and norms whose statistics and weights are those of no fresh model."""
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    if tensor.ndim:
                        tensor.uniform_(0.5, 1.5) if name != "bias" else tensor.normal_()
    return model


@torch.no_grad()
def remove(model, share):
    """Masks that remove this share of the units of each space, at random, applied."""
    parameters = dict(model.named_parameters())
    masks = {}
    for space in channel_spaces(model):
        if space.removable:
            gone = torch.cat((torch.randperm(space.count) < int(space.count * share), torch.tensor([False])))
            for slices in space.producers + space.biases + space.followers:
                parameter = parameters[slices.name]
                masks.setdefault(slices.name, torch.ones_like(parameter, dtype=torch.bool))
                masks[slices.name] &= ~gone[slices.over(parameter.shape)]
    for name, mask in masks.items():
        parameters[name].mul_(mask)
    return masks


def size(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def check_same(model, smaller, *inputs):
    for training in (False, True):
        expected, found = (copy.deepcopy(m).train(training)(*inputs) for m in (model, smaller))
        assert float(expected.std()) > 1e-6  # else the outputs say nothing
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def check_half(model, *inputs):
    masks = remove(stir(model), 0.5)
    smaller, notes = compact(model, masks)
    check_same(model, smaller, *inputs)
    again = compact(model, masks)[0]
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(smaller.state_dict())
    check_same(model, again, *inputs)
    return smaller, notes


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        b, c = x.shape[:2]
        s = F.adaptive_avg_pool2d(x, 1).view(b, c)
        s = torch.sigmoid(self.up(F.relu(self.down(s)))).view(b, c, 1, 1)
        return x * s.expand_as(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Dense(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([self.inner(x), x], dim=1)


class Gate(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        value, gate = self.layer(x).chunk(2, dim=1)
        return F.silu(gate) * value


@st.composite
def blocks(draw, width):
    """A block that takes `width` channels, and the channels it gives."""
    kind = draw(
        st.sampled_from(
            [
                "conv",
                "grouped",
                "depthwise",
                "transposed",
                "norm",
                "act",
                "squeeze",
                "residual",
                "dense",
                "gate",
                "bottleneck",
            ]
        )
    )
    kernel = draw(st.sampled_from([1, 3]))
    out = draw(st.integers(1, 4)) * 2
    bias = draw(st.booleans())
    if kind == "grouped":
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if width % g == 0]))
        return nn.Conv2d(width, groups * out, kernel, padding=kernel // 2, groups=groups, bias=bias), groups * out
    if kind == "depthwise":
        times = draw(st.integers(1, 2))
        return nn.Conv2d(width, width * times, kernel, padding=kernel // 2, groups=width, bias=bias), width * times
    if kind == "transposed":
        groups = draw(st.sampled_from([g for g in (1, 2, width) if width % g == 0]))
        return nn.ConvTranspose2d(width, groups * 2, kernel, padding=kernel // 2, groups=groups, bias=bias), groups * 2
    if kind == "norm":
        return nn.BatchNorm2d(width), width
    if kind == "act":
        return draw(
            st.sampled_from(
                [nn.ReLU(), nn.GELU(), nn.PReLU(width), nn.Hardswish(), nn.MaxPool2d(3, 1, 1), nn.Hardtanh()]
            )
        ), width
    if kind == "squeeze":
        return Squeeze(width), width
    if kind == "gate":
        return Gate(nn.Conv2d(width, 2 * out, 1)), out
    if kind == "dense":
        return Dense(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, kernel, padding=kernel // 2))
        ), width + out
    if kind == "residual":
        return Residual(nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=bias)), width
    if kind == "bottleneck":
        return (
            Residual(
                nn.Sequential(
                    nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, width, 1)
                )
            ),
            width,
        )
    return nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=bias), out


@st.composite
def nets(draw):
    width = draw(st.integers(2, 6))
    layers = [nn.Conv2d(3, width, 3, stride=draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(1, 6))):
        block, width = draw(blocks(width))
        layers.append(block)
    pool = draw(st.sampled_from([[], [nn.AdaptiveAvgPool2d(1)], [nn.AdaptiveMaxPool2d(2)]]))
    side = 1 if pool and isinstance(pool[0], nn.AdaptiveAvgPool2d) else 2 if pool else None
    if side is None:
        probe = nn.Sequential(*layers).eval()(torch.zeros(2, 3, 7, 7))
        side = probe.shape[-1]
    hidden = draw(st.integers(2, 6))
    flat = width * side * side
    head = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 3)]
    return nn.Sequential(*layers, *pool, *head)


@settings(max_examples=15, deadline=None)
@given(nets(), st.integers(0, 2**31), st.sampled_from([0.3, 0.5, 0.8]))
def test_any_net_keeps_its_outputs(model, seed, share):
    torch.manual_seed(seed)
    masks = remove(stir(model), share)
    spaces = channel_spaces(model)
    assert not any(space.uncut for space in spaces)
    if any(int(space.count * share) for space in spaces if space.removable):
        smaller, notes = compact(model, masks)
        assert all(note.endswith("a layer needs one channel at least") for note in notes)
        left = dict(smaller.named_parameters())
        for space in spaces:
            for slices in space.producers if space.removable else ():
                removed = sum(int(unit) < 0 for unit in slices.units)
                removed += int((~masks[slices.name]).movedim(slices.axis, 0).flatten(1).all(1).sum())
                rows = left[slices.name].shape[slices.axis]
                assert rows >= 1
                assert notes or rows <= len(slices.units) - removed  # fewer where a row has lost all it reads
        inputs = torch.randn(4, 3, 7, 7, dtype=torch.double)
        for training in (False, True):
            expected, found = (copy.deepcopy(m).train(training)(inputs) for m in (model, smaller))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_residual_network_of_half_the_channels():
    torch.manual_seed(0)
    model = ResNet20((3, 16, 16), 10)
    smaller, notes = check_half(model, torch.randn(4, 3, 16, 16, dtype=torch.double))
    assert notes == ()
    stem = 27 * 8
    stages = 6 * 8 * 8 * 9 + (8 * 16 + 5 * 16 * 16) * 9 + 8 * 16 + (16 * 32 + 5 * 32 * 32) * 9 + 16 * 32
    norms = 2 * (7 * 8 + 7 * 16 + 7 * 32)
    assert size(smaller) == stem + stages + norms + 32 * 10 + 10 == 68_786
    assert "Conv2d(8, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)" in repr(smaller.layer2)
    assert "(bn2): BatchNorm2d(32, " in repr(smaller.layer3)
    assert repr(smaller.fc) == "Linear(in_features=32, out_features=10, bias=True)"
    assert size(model) == 272_474  # the model itself is left as it was


def test_chain_with_a_flatten_counted_by_hand():
    torch.manual_seed(0)
    model = stir(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5)))
    masks = {"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}
    with torch.no_grad():
        for channel in (1, 4, 7):
            masks["0.weight"][channel] = False
            model[0].weight[channel], model[0].bias[channel] = 0, 0
            model[1].weight[channel], model[1].bias[channel] = 0, 0
    smaller, _ = compact(model, masks)
    assert size(smaller) == (5 * 27 + 5) + 2 * 5 + (5 * 5 * 9 + 5)
    assert smaller[4].in_features == 45
    assert torch.equal(smaller[1].running_mean, model[1].running_mean[[0, 2, 3, 5, 6]])
    assert torch.equal(smaller[4].weight.view(5, 5, 9), model[4].weight.view(5, 8, 9)[:, [0, 2, 3, 5, 6]])
    check_same(model, smaller, torch.randn(6, 3, 5, 5, dtype=torch.double))


def test_three_convolutions_and_three_dense_layers():
    torch.manual_seed(0)
    smaller, notes = check_half(three_c_three_d((3, 12, 12), 10), torch.randn(3, 3, 12, 12, dtype=torch.double))
    assert notes == ()
    assert [layer.weight.shape[0] for layer in smaller if hasattr(layer, "weight")] == [32, 48, 64, 256, 128, 10]


def test_depthwise_and_grouped_layers_print_right():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 12, 1, groups=4),
        nn.PReLU(12),
        nn.ConvTranspose2d(12, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 4, 1),
    )
    smaller, _ = check_half(model, torch.randn(2, 3, 8, 8, dtype=torch.double))
    assert [(layer.in_channels, layer.out_channels, layer.groups) for layer in smaller if layer is not smaller[3]] == [
        (3, 4, 1),
        (4, 8, 4),
        (8, 8, 4),
        (8, 4, 2),
        (4, 8, 4),
        (8, 4, 1),
    ]
    assert smaller[3].num_parameters == 8


def test_feed_forward_layers_of_transformers_shrink():
    torch.manual_seed(0)
    smaller, notes = check_half(GPT((8,), 11, width=8, depth=2, heads=2), torch.randint(0, 11, (3, 8)))
    assert notes == ()
    assert smaller.blocks[1].wide.out_features == smaller.blocks[1].narrow.in_features == 16


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


def test_heads_stay_and_the_layers_beside_them_shrink():
    torch.manual_seed(0)
    smaller, notes = check_half(Encoder(), torch.randn(2, 5, 8, dtype=torch.double))
    assert smaller.encoder.layers[0].linear1.out_features == 6
    assert notes == tuple(
        f"2 of 4 heads of encoder.layers.{i}.self_attn.in_proj_weight are zero and stay: nn.MultiheadAttention has one "
        "width for its inputs and its heads together"
        for i in (0, 1)
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x)[0]


def test_attention_alone_cannot_shrink():
    model = Attention()
    with pytest.raises(ValueError, match=r"^this model cannot shrink: 2 of 4 heads of attend.in_proj_weight are zero"):
        compact(model, remove(model, 0.5))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden if hidden.sum() > 0 else -hidden)


def test_untraceable_model_cannot_shrink():
    model = Branching()
    masks = remove(model, 0.5)
    assert not masks["first.weight"].all()  # rows may be removed all the same
    with pytest.raises(
        ValueError, match=r"3 of 6 channels of first.weight are zero and stay: the model cannot be traced"
    ):
        compact(model, masks)


def test_channel_that_is_zero_in_one_of_two_producers_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
        model[0].weight[2], model[0].bias[2] = 0, 0
        model[1].inner.weight[2], model[1].inner.bias[2] = 0, 0
    smaller, _ = compact(model, {})
    assert smaller[0].weight.shape == (3, 3)
    assert torch.equal(smaller[0].bias, model[0].bias[[0, 1, 3]])
    assert smaller[1].inner.weight.shape == (3, 3)
    check_same(model, smaller, torch.randn(5, 3, dtype=torch.double))


@pytest.mark.parametrize("entry", ["bias", "norm"])
def test_channel_whose_bias_or_norm_is_not_zero_stays(entry):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        if entry == "norm":
            model[0].bias[1] = 0
    with pytest.raises(ValueError, match=r"no channel is zero in all layers that make it.*pattern='channel'"):
        compact(model, {})


def test_kept_weight_that_happens_to_be_zero_stays():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    masks = {"0.weight": torch.ones(4, 3, dtype=torch.bool)}
    masks["0.weight"][1] = False
    assert compact(model, masks)[0][0].out_features == 3


def test_removal_spreads_to_what_nobody_reads_and_to_what_reads_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # row 3 of layer 1 is read by nobody, and row 2 of layer 0 by row 3 of layer 1 alone
        model[1].weight[:3, 2] = 0
        model[0].weight[0] = 0  # row 0 of layer 0 is zero, and row 0 of layer 1 reads that alone
        model[1].weight[0, 1:] = 0
    smaller, _ = compact(model, {})
    assert [tuple(layer.weight.shape) for layer in smaller] == [(2, 4), (2, 2), (4, 2), (4, 4)]
    check_same(model, smaller, torch.randn(5, 4, dtype=torch.double))


def test_layer_without_channels_keeps_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    smaller, notes = compact(model, {})
    assert smaller[0].out_features == smaller[2].in_features == 1
    assert notes == ("1 of 4 channels of 0.weight are zero and stay: a layer needs one channel at least",)
    x = torch.randn(5, 3, dtype=torch.double)
    assert torch.equal(smaller(x), model(x))


def test_one_of_two_joined_layers_keeps_a_channel_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), Dense(nn.Conv2d(2, 2, 1)), Residual(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1)
    )
    (space,) = (s for s in channel_spaces(model) if s.removable)
    assert space.count == 4  # the residual makes one space of both
    with torch.no_grad():
        for layer, rows in ((model[0], [0, 1]), (model[2].inner, [2, 3])):
            layer.weight[rows], layer.bias[rows] = 0, 0
    smaller, notes = compact(model, {})
    assert [smaller[0].out_channels, smaller[1].inner.out_channels, smaller[2].inner.out_channels] == [1, 2, 3]
    names = "0.weight, 1.inner.weight, 2.inner.weight"
    assert notes == (f"1 of 4 channels of {names} are zero and stay: a layer needs one channel at least",)
    check_same(model.double(), smaller.double(), torch.randn(4, 3, 5, 5, dtype=torch.double))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.twice, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.alias, self.spare = self.twice, nn.Linear(5, 5)

    def forward(self, x):
        return self.out(torch.relu(self.alias(torch.relu(self.twice(self.into(x))))))


def test_tied_layers_shrink_together_and_stay_tied():
    torch.manual_seed(0)
    smaller, _ = check_half(Tied(), torch.randn(4, 3, dtype=torch.double))
    assert smaller.twice is smaller.alias
    assert smaller.into.out_features == smaller.twice.in_features == smaller.twice.out_features == 3
    assert smaller.spare.weight.shape == (5, 5)  # which no forward uses


def test_tied_parameters_of_two_layers_stay_tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[2].weight = model[1].weight
    smaller, _ = check_half(model, torch.randn(4, 3, dtype=torch.double))
    assert smaller[2].weight is smaller[1].weight
    assert smaller[1].weight.shape == (3, 3)


def test_table_of_an_embedding_tied_to_the_output_shrinks():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.token.weight

        def forward(self, x):
            return self.head(torch.tanh(self.token(x)))

    torch.manual_seed(0)
    model = Language().double()
    with torch.no_grad():
        model.token.weight[:, :2] = 0
    smaller, _ = compact(model, {})
    assert smaller.head.weight is smaller.token.weight
    assert (smaller.token.embedding_dim, smaller.head.in_features, smaller.head.out_features) == (4, 4, 7)
    check_same(model, smaller, torch.randint(0, 7, (3, 5)))


def test_smaller_model_learns_like_the_pruned_one():
    torch.manual_seed(0)
    model = stir(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2)))
    masks = remove(model, 0.5)
    smaller, _ = compact(model, masks)
    x = torch.randn(4, 2, 5, 5, dtype=torch.double)
    for net in (model, smaller):
        net(x).square().sum().backward()
    kept = masks["0.bias"]
    torch.testing.assert_close(smaller[0].weight.grad, model[0].weight.grad[kept])
    torch.testing.assert_close(smaller[1].running_var, model[1].running_var[kept])


def test_frozen_parameters_and_modes_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[0].weight.requires_grad_(False)
    smaller, _ = compact(model, remove(model, 0.5))
    assert not smaller[0].weight.requires_grad
    assert smaller[0].bias.requires_grad
    assert not smaller.training


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("missing", (4, 3), r"there is a mask for 'missing', .*: its parameters are 0.weight, 0.bias, 2.weight"),
        ("0.weight", (3, 4), r"the mask of 0.weight has shape \(3, 4\) and the parameter \(4, 3\): give the masks of"),
        ("0.weight", (4, 3), r"0.weight is not zero where its mask removes it: multiply it by the mask first"),
    ],
)
def test_masks_that_do_not_fit(name, shape, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        compact(model, {name: torch.zeros(shape, dtype=torch.bool)})


def test_model_of_outputs_alone_cannot_shrink():
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError, match=r"none of its channels may be removed \(weight: the model returns its channels\)"
    ):
        compact(model, {})
