"""Channels: which slices live and die together, and where they may not be removed, with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quadric.lab.models import GPT, ResNet20, mlp, three_c_three_d
from quadric.pruning.channels import Slices, channel_spaces


def net(forward, **parts):
    """A module with these parts and this forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Net.forward = forward
    return Net()


def space_of(model, name, **options):
    """The only space that a weight produces."""
    (found,) = (s for s in channel_spaces(model, **options) if any(made.name == name for made in s.producers))
    return found


def shown(slices):
    return {(entry.name, entry.axis): entry.units.tolist() for entry in slices}


def test_chain():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 4))
    hidden, outputs = channel_spaces(model)
    assert (hidden.count, hidden.kind, hidden.removable, hidden.uncut) == (2, "channel", True, "")
    assert shown(hidden.producers) == {("0.weight", 0): [0, 1]}
    assert shown(hidden.biases) == {("0.bias", 0): [0, 1]}
    assert shown(hidden.followers) == {("1.weight", 0): [0, 1], ("1.bias", 0): [0, 1]}
    assert shown(hidden.statistics) == {("1.running_mean", 0): [0, 1], ("1.running_var", 0): [0, 1]}
    assert shown(hidden.consumers) == {("3.weight", 1): [0, 1]}
    assert shown(outputs.producers) == {("3.weight", 0): [0, 1, 2, 3]}
    assert (outputs.removable, outputs.fixed) == (False, "the model returns its channels")


def test_units_over_a_tensor():
    units = Slices("conv.weight", 1, torch.tensor([1, -1])).over((3, 2, 1, 1))
    assert units.shape == (3, 2, 1, 1)
    assert units[:, :, 0, 0].tolist() == [[1, -1]] * 3


FLATTENS = {
    "module": lambda self, x: self.fc(self.flatten(self.conv(x))),
    "function": lambda self, x: self.fc(torch.flatten(self.conv(x), 1)),
    "method": lambda self, x: self.fc(self.conv(x).flatten(start_dim=1)),
    "two flattens": lambda self, x: self.fc(self.conv(x).flatten(2).flatten(-2)),
    "view": lambda self, x: self.fc(F.max_pool2d(self.conv(x), 1).view(x.size(0), -1)),
    "reshape": lambda self, x: self.fc(self.conv(x).relu().reshape((x.shape[0], -1))),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_flatten_repeats_a_channel_for_each_place(name):
    model = net(FLATTENS[name], conv=nn.Conv2d(1, 3, 2), fc=nn.Linear(12, 2), flatten=nn.Flatten())
    space = space_of(model, "conv.weight")
    assert space.removable
    assert shown(space.consumers) == {("fc.weight", 1): [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]}


def test_flatten_of_tokens_repeats_the_channels():
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Flatten(), nn.Linear(6, 2))
    assert shown(space_of(model, "0.weight").consumers) == {("3.weight", 1): [0, 1, 2, 0, 1, 2]}


def test_view_to_a_written_size_may_lose_channels_but_keeps_their_place():
    model = net(lambda self, x: self.fc(self.conv(x).view(-1, 12)), conv=nn.Conv2d(1, 3, 2), fc=nn.Linear(12, 2))
    space = space_of(model, "conv.weight")
    assert shown(space.consumers) == {("fc.weight", 1): [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]}
    assert space.removable
    assert space.uncut == "the forward pass has the size 12 written into a view: write flatten(1) or -1"


def test_residual_stages_are_one_space_each():
    spaces = channel_spaces(ResNet20((3, 8, 8), 10))
    streams = {space.producers[0].name: space for space in spaces if len(space.producers) > 1}
    assert list(streams) == ["conv1.weight", "layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"]
    assert len(spaces) == 3 + 9 + 1  # streams, insides of blocks, outputs
    middle = streams["layer2.0.downsample.0.weight"]
    assert [entry.name for entry in middle.producers] == [
        "layer2.0.downsample.0.weight",
        *(f"layer2.{i}.conv2.weight" for i in range(3)),
    ]
    assert [entry.name for entry in middle.consumers] == [
        "layer2.1.conv1.weight",
        "layer2.2.conv1.weight",
        "layer3.0.downsample.0.weight",
        "layer3.0.conv1.weight",
    ]
    assert len(middle.followers) == len(middle.statistics) == 8
    tensors = (*middle.producers, *middle.followers, *middle.statistics, *middle.consumers)
    assert all(torch.equal(entry.units, torch.arange(32)) for entry in tensors)


def test_depthwise_convolution_ties_what_it_reads_to_what_it_makes():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 1, 1))
    space = space_of(model, "0.weight")
    assert shown(space.producers) == {("0.weight", 0): [0, 1], ("1.weight", 0): [0, 0, 1, 1]}
    assert shown(space.biases) == {("0.bias", 0): [0, 1], ("1.bias", 0): [0, 0, 1, 1]}
    assert shown(space.consumers) == {("2.weight", 1): [0, 0, 1, 1]}


def test_groups_lose_the_same_channel_each():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 1, 1))
    before, after = channel_spaces(model)[:2]
    assert shown(before.producers) == {("0.weight", 0): [0, 1, 2, 0, 1, 2]}
    assert shown(before.consumers) == {("1.weight", 1): [0, 1, 2]}
    assert shown(after.producers) == {("1.weight", 0): [0, 1, 0, 1]}
    assert (before.count, after.count) == (3, 2)


def test_transposed_convolution_makes_channels_along_its_second_axis():
    model = nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 1, 1))
    before, after = channel_spaces(model)[:2]
    assert shown(before.producers) == {("0.weight", 1): [0, 1, 0, 1]}
    assert shown(before.consumers) == {("1.weight", 0): [0, 1, 0, 1]}
    assert shown(after.producers) == {("1.weight", 1): [0, 1, 2]}
    assert shown(after.biases) == {("1.bias", 0): [0, 1, 2, 0, 1, 2]}
    assert shown(after.consumers) == {("2.weight", 1): [0, 1, 2, 0, 1, 2]}


def test_concatenation_is_read_by_the_units_of_two_spaces():
    model = net(
        lambda self, x: self.read(torch.cat([self.one(x), self.two(x).relu()], 1)),
        one=nn.Conv2d(1, 2, 1),
        two=nn.Conv2d(1, 3, 1),
        read=nn.Conv2d(5, 1, 1),
    )
    assert shown(space_of(model, "one.weight").consumers) == {("read.weight", 1): [0, 1, -1, -1, -1]}
    assert shown(space_of(model, "two.weight").consumers) == {("read.weight", 1): [-1, -1, 0, 1, 2]}


def test_gate_ties_its_halves():
    model = nn.Sequential(nn.Linear(2, 6), nn.GLU(), nn.Linear(3, 1))
    space = space_of(model, "0.weight")
    assert shown(space.producers) == {("0.weight", 0): [0, 1, 2, 0, 1, 2]}
    assert shown(space.consumers) == {("2.weight", 1): [0, 1, 2]}


def test_squeeze_and_excitation_is_tied_to_the_channels_it_scales():
    def forward(self, x):
        x = self.conv(x)
        scale = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return self.read(x * scale[:, :, None, None])

    parts = {"conv": nn.Conv2d(1, 4, 1), "down": nn.Linear(4, 2), "up": nn.Linear(2, 4), "read": nn.Conv2d(4, 1, 1)}
    space = space_of(net(forward, **parts), "conv.weight")
    assert space.removable  # the scale of a channel of zeros is not 0, and does not matter
    assert shown(space.producers) == {("conv.weight", 0): [0, 1, 2, 3], ("up.weight", 0): [0, 1, 2, 3]}
    assert shown(space.consumers) == {("down.weight", 1): [0, 1, 2, 3], ("read.weight", 1): [0, 1, 2, 3]}


def test_parameters_that_scale_or_shift_channels_follow_them():
    model = net(
        lambda self, x: self.read(self.conv(x) * self.scale + self.shift),
        conv=nn.Conv2d(1, 2, 1),
        scale=nn.Parameter(torch.ones(2, 1, 1)),
        shift=nn.Parameter(torch.ones(1, 2, 1, 1)),
        read=nn.Conv2d(2, 1, 1),
    )
    space = space_of(model, "conv.weight")
    assert shown(space.followers) == {("scale", 0): [0, 1]}
    assert shown(space.producers) == {("conv.weight", 0): [0, 1], ("shift", 1): [0, 1]}


def test_heads_of_attention():
    model = net(lambda self, x: self.mix(x, x, x)[0], mix=nn.MultiheadAttention(4, 2, add_bias_kv=True))
    heads = space_of(model, "mix.in_proj_weight")
    assert (heads.count, heads.kind, heads.removable) == (2, "head", True)
    assert shown(heads.producers) == {("mix.in_proj_weight", 0): [0, 0, 1, 1] * 3}
    assert shown(heads.biases) == {
        ("mix.in_proj_bias", 0): [0, 0, 1, 1] * 3,
        ("mix.bias_k", 2): [0, 0, 1, 1],
        ("mix.bias_v", 2): [0, 0, 1, 1],
    }
    assert shown(heads.consumers) == {("mix.out_proj.weight", 1): [0, 0, 1, 1]}
    assert heads.uncut == "nn.MultiheadAttention has one width for its inputs and its heads together"
    assert space_of(model, "mix.out_proj.weight").fixed == heads.uncut


def test_heads_of_attention_with_inputs_of_other_widths():
    model = net(lambda self, q, k: self.mix(q, k, k)[0], mix=nn.MultiheadAttention(4, 2, bias=False, kdim=3, vdim=3))
    heads = space_of(model, "mix.q_proj_weight")
    assert shown(heads.producers) == {(f"mix.{part}_proj_weight", 0): [0, 0, 1, 1] for part in "qkv"}


def branch(self, x):
    x = self.conv(x)
    return self.read(x if self.training else x.sigmoid())


def overwritten(self, x):
    x = self.conv(x)
    x.sigmoid_()
    return self.read(x)


def overwritten_through_a_view(self, x):
    x = self.conv(x)
    return self.read(x) + x.view(x.size(0), -1).sigmoid_().sum()


FIXED = {
    "normalised": (
        lambda self, x: self.read(self.group(self.conv(x))),
        "group (GroupNorm) takes statistics over its channels",
    ),
    "sigmoid": (
        lambda self, x: self.read(self.conv(x).sigmoid()),
        "sigmoid makes a constant of a channel of zeros before read reads it",
    ),
    "sigmoid in evaluation": (branch, "sigmoid makes a constant of a channel of zeros before read reads it"),
    "shifted": (
        lambda self, x: self.read(1 - self.conv(x)),
        "a sum with something else makes a constant of a channel of zeros before read reads it",
    ),
    "clamped": (
        lambda self, x: self.read(self.conv(x).clamp(min=0.5)),
        "clamp makes a constant of a channel of zeros before read reads it",
    ),
    "added to inputs": (lambda self, x: self.read(self.conv(x) + x), "add reads its channels, which is not understood"),
    "softmax": (
        lambda self, x: self.read(self.conv(x).softmax(1)),
        "softmax reads its channels, which is not understood",
    ),
    "some channels": (
        lambda self, x: self.one(self.conv(x)[:, :1]),
        "getitem reads its channels, which is not understood",
    ),
    "over channels": (lambda self, x: self.conv(x).mean(1), "mean reads its channels, which is not understood"),
    "counted": (
        lambda self, x: self.read(self.conv(x)) * self.conv(x).shape[1],
        "mul reads its channels, which is not understood",
    ),
    "as an axis of another": (
        lambda self, x: self.read(self.conv(x).transpose(1, 2).transpose(1, 3)),
        "read reads its channels in a way that is not understood",
    ),
    "overwritten": (overwritten, "sigmoid_ reads its channels, which is not understood"),
    "overwritten through a view": (overwritten_through_a_view, "sigmoid_ changes its channels in place"),
    "weight read": (
        lambda self, x: self.read(self.conv(x)) + self.conv.weight.sum(),
        "sum reads its channels, which is not understood",
    ),
    "recurrent": (
        lambda self, x: self.lstm(self.conv(x).mean(2))[0],
        "lstm reads its channels, which is not understood",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_channels_say_why(name):
    forward, reason = FIXED[name]
    layers = {"conv": nn.Conv2d(4, 4, 1), "read": nn.Conv2d(4, 4, 1), "one": nn.Conv2d(1, 4, 1)}
    model = net(forward, **layers, group=nn.GroupNorm(2, 4), lstm=nn.LSTM(4, 4))
    assert space_of(model, "conv.weight").fixed == reason


def test_every_weight_is_a_producer_in_one_space():
    for model in (
        mlp((1, 8, 8), 10),
        three_c_three_d((3, 12, 12), 10),
        ResNet20((3, 8, 8), 10),
        GPT((8,), 11, width=8, depth=2, heads=2),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        nn.Sequential(nn.Bilinear(2, 3, 4), nn.LSTM(4, 5)),
    ):
        made = [slices.name for space in channel_spaces(model) for slices in space.producers]
        assert sorted(made) == sorted(name for name, p in model.named_parameters() if p.ndim >= 2)


def test_stream_under_layer_norms_is_fixed_and_the_wide_layer_is_not():
    model = GPT((8,), 11, width=8, depth=1, heads=2)
    assert space_of(model, "token.weight").fixed == "blocks.0.norm1 (LayerNorm) takes statistics over its channels"
    assert {entry.name for entry in space_of(model, "position.weight").producers} == {
        "token.weight",
        "position.weight",
        "blocks.0.proj.weight",
        "blocks.0.narrow.weight",
    }
    wide = space_of(model, "blocks.0.wide.weight")
    assert wide.removable
    assert shown(wide.consumers) == {("blocks.0.narrow.weight", 1): list(range(32))}
    assert (
        space_of(model, "blocks.0.qkv.weight").fixed == "view in blocks.0 reads its channels, which is not understood"
    )


def test_model_that_cannot_be_traced_has_the_rows_of_its_layers():
    def forward(self, x):
        return self.read(self.body(x)) if x.sum() > 0 else x

    body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    model = net(forward, body=body, read=nn.ConvTranspose2d(2, 3, 1), lstm=nn.LSTM(2, 2))
    reason = "the model cannot be traced (TraceError: symbolically traced variables cannot be used as inputs to "
    reason += "control flow)"
    first, read = space_of(model, "body.0.weight"), space_of(model, "read.weight")
    assert (first.removable, first.uncut, read.removable, read.uncut) == (True, reason, True, reason)
    assert shown(first.biases) == {("body.0.bias", 0): [0, 1]}
    assert shown(first.followers) == {("body.1.weight", 0): [0, 1], ("body.1.bias", 0): [0, 1]}
    assert first.consumers == ()
    assert shown(read.producers) == {("read.weight", 1): [0, 1, 2]}
    assert space_of(model, "lstm.weight_ih_l0").fixed == reason


def test_submodule_that_cannot_be_traced_is_seen_as_a_whole():
    inner = net(lambda self, x: self.fc(x) if x.sum() > 0 else self.fc(-x), fc=nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(2, 3), inner, nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    assert space_of(model, "0.weight").fixed == "1 reads its channels, which is not understood"
    inside = space_of(model, "1.fc.weight")
    assert inside.removable
    assert inside.uncut.startswith("1 cannot be traced (TraceError: symbolically traced variables")
    assert space_of(model, "2.weight").removable
    assert not space_of(model, "2.weight").uncut


def test_replaced_forward_and_hooks_are_not_understood():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    handle = model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    reason = "0 (Linear) has a hook, a parametrisation or a forward of its own"
    assert space_of(model, "0.weight").fixed == reason
    handle.remove()
    assert space_of(model, "0.weight").removable
    model[0].forward = lambda x: torch.ones(len(x), 3)
    assert space_of(model, "0.weight").fixed == reason
    del model[0].forward
    model.forward = lambda x: x
    assert space_of(model, "0.weight").uncut == "the model cannot be traced (TypeError: its forward has been replaced)"


def test_parametrised_weight_is_not_understood_and_its_neighbours_are():
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(weight_norm(nn.Linear(2, 3)), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    assert "parametrisation" in space_of(model, "0.parametrizations.weight.original1").fixed
    assert space_of(model, "1.weight").removable


def test_unused_layer_is_fixed():
    model = net(lambda self, x: self.used(x), used=nn.Linear(2, 2), spare=nn.Linear(2, 2))
    assert space_of(model, "spare.weight").fixed == "the forward pass does not use it"


def test_layer_used_twice_ties_its_inputs_to_its_outputs():
    model = net(
        lambda self, x: self.read(self.twice(self.twice(self.first(x)))),
        first=nn.Linear(2, 3),
        twice=nn.Linear(3, 3),
        read=nn.Linear(3, 1),
    )
    space = space_of(model, "first.weight")
    assert shown(space.producers) == {("first.weight", 0): [0, 1, 2], ("twice.weight", 0): [0, 1, 2]}
    assert shown(space.consumers) == {("twice.weight", 1): [0, 1, 2], ("read.weight", 1): [0, 1, 2]}


def test_only_weights_that_may_be_pruned():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    weights = {"2.weight": model[2].weight}
    assert space_of(model, "2.weight", weights=weights).removable
    assert space_of(model, "0.weight", weights=weights).fixed == (
        "0.weight makes its channels too and is not among the weights to prune"
    )


def test_names_of_the_caller_are_used():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model.extra = model[0]
    names = {slices.name for s in channel_spaces(model, {"extra.weight": model[0].weight}) for slices in s.producers}
    assert "extra.weight" in names
    assert "0.weight" not in names


def test_arguments_with_a_default_have_it():
    def forward(self, x, mask=None, *, mode="nearest"):
        x = self.conv(x)
        if mask is not None:
            x = x + mask
        return self.read(F.interpolate(x, scale_factor=2.0, mode=mode))

    model = net(forward, conv=nn.Conv2d(1, 2, 1), read=nn.Conv2d(2, 1, 1))
    assert space_of(model, "conv.weight").removable


def test_model_is_left_as_it_was():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.total.add_(1)
            return x * torch.ones(2, 1, 1)

    model = nn.Sequential(nn.Conv2d(1, 2, 1), Counting(), nn.Conv2d(2, 1, 1))
    model[0].eval()
    before = [set(vars(module)) for module in model.modules()]
    channel_spaces(model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert (model.training, model[0].training, model[2].training) == (True, False, True)
    assert (model[1].calls, float(model[1].total)) == (0, 0.0)


def test_learnt_input_of_a_layer_is_not_understood():
    model = net(
        lambda self, x: self.read(self.first(self.query)) + x,
        first=nn.Linear(2, 3),
        query=nn.Parameter(torch.ones(4, 2)),
        read=nn.Linear(3, 1),
    )
    assert space_of(model, "first.weight").fixed == "first (Linear) is not understood"
    assert space_of(model, "query").fixed == "first reads its channels, which is not understood"


def test_table_of_which_rows_are_taken_joins_the_stream():
    model = net(
        lambda self, x: self.read(self.first(x) + self.places[: x.shape[1]]),
        first=nn.Linear(2, 3),
        places=nn.Parameter(torch.ones(5, 3)),
        read=nn.Linear(3, 1),
    )
    space = space_of(model, "places")
    assert space.removable
    assert shown(space.producers) == {("first.weight", 0): [0, 1, 2], ("places", 1): [0, 1, 2]}
