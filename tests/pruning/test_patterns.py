"""Patterns are exact: in every cell, block and family, however they come about."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from quadric import prune
from quadric.pruning.patterns import find_pattern


def generator(seed):
    return torch.Generator().manual_seed(seed)


def along_inputs(weight, transposed=False):
    """A weight as rows of consecutive inputs."""
    return weight.movedim(0 if transposed else 1, -1).flatten(0, -2)


class Mixture(nn.Module):
    """A linear layer, convolutions of both kinds and with groups, of 8 inputs each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.grouped = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1, groups=2)
        self.up, self.odd = nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.odd(self.up(torch.tanh(self.grouped(torch.tanh(self.conv(x))))))
        return self.head(x.mean((2, 3)))


def images(count=4):
    draw = generator(1)
    return [(torch.randn(3, 8, 4, 4, generator=draw), torch.randint(0, 4, (3,), generator=draw)) for _ in range(count)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("most", "size"), [(2, 4), (1, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize(("rounds", "parts"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("more", [0.0, 0.1, 0.2])
def test_every_cell_keeps_at_most_n_of_m(most, size, rounds, parts, more):
    model, sparsity = Mixture(), 1 - most / size + more * most / size
    options = {"batches": images(), "loss_fn": loss_fn, "num_grads": 4, "block_size": 64}
    result = prune(model, sparsity, pattern=f"{most}:{size}", rounds=rounds, parts=parts, **options)
    for name, mask in result.masks.items():
        cells = along_inputs(mask, name.startswith("up")).unflatten(-1, (-1, size))
        counts = cells.sum(-1)
        assert int(counts.max()) <= most
        if not more:
            assert int(counts.min()) == most
    weights = sum(layer.weights for layer in result.layers)
    assert sum(layer.removed for layer in result.layers) == round(sparsity * weights)
    assert set(result.left_alone) == {"odd.weight"}
    assert str(size) in result.left_alone["odd.weight"]


def test_cells_keep_their_largest_weights():
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    prune(model, 0.5, curvature="magnitude", pattern="2:4")
    assert model.weight.tolist() == torch.tensor([[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, -0.3, 0.4]]).tolist()
    # What goes beyond is the cheapest of what the cells may keep, wherever it is.
    prune(model, 0.75, curvature="magnitude", pattern="2:4")
    assert model.weight.tolist() == [[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_cells_beside_the_sparsity_of_each_layer():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    result = prune(model, 0.75, curvature="magnitude", pattern="2:4", scope="layer")
    assert [layer.sparsity for layer in result.layers] == [0.75, 0.75]
    assert all(int(mask.unflatten(-1, (-1, 4)).sum(-1).max()) <= 2 for mask in result.masks.values())


def test_cells_do_not_reach_across_groups():
    """Six inputs a group of a transposed convolution: twelve are three cells of four, of which one straddles."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(12, 8, 3, groups=2))
    result = prune(model, 0.5, curvature="magnitude", pattern="2:4")
    assert list(result.masks) == ["0.weight"]
    assert "1.weight" in result.left_alone


def test_the_least_sparsity_of_thirds_can_be_written_down():
    with pytest.raises(ValueError, match=r"set it to 0\.33+ or more") as caught:
        prune(nn.Linear(6, 4), 0.33, curvature="magnitude", pattern="2:3")
    told = float(str(caught.value).split("set it to ")[1].split()[0])
    assert prune(nn.Linear(6, 4), told, curvature="magnitude", pattern="2:3").sparsity == pytest.approx(1 / 3)


def test_nothing_that_divides():
    with pytest.raises(ValueError, match=r"nothing to prune \(weight: its 6 inputs .*4\): .+"):
        prune(nn.Linear(6, 4), 0.5, curvature="magnitude", pattern="2:4")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.3, 0.5, 0.9]),
    st.integers(1, 3),
)  # fmt: skip
def test_blocks_go_as_one_with_edges(rows, columns, high, wide, sparsity, parts):
    model = nn.Linear(columns, rows, bias=False)
    model.weight.data = torch.randn(rows, columns, generator=generator(rows * 10 + columns))
    before = model.weight.detach().clone()
    result = prune(model, sparsity, curvature="magnitude", pattern=f"block:{high}x{wide}", parts=parts)
    mask, costs, counts = result.masks["weight"], [], []
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            block = mask[i : i + high, j : j + wide]
            assert bool(block.all()) or not bool(block.any())
            costs.append(float(before[i : i + high, j : j + wide].square().mean()))
            counts.append((block.numel(), not bool(block.any())))
    room = round(sparsity * rows * columns) - sum(size for size, out in counts if out)
    assert room >= 0
    blocks = list(zip(costs, counts, strict=True))
    stay = [(cost, size) for cost, (size, out) in blocks if not out]
    assert all(size > room for _, size in stay)
    if parts == 1:  # dearer ones went only where a cheaper one was too large
        assert all(cost <= c or size < n for cost, (size, out) in blocks if out for c, n in stay)


def test_blocks_of_a_convolution_are_outputs_by_the_rest():
    model = nn.Conv2d(2, 4, 3)
    mask = prune(model, 0.5, curvature="magnitude", pattern="block:2x9").masks["weight"].flatten(1)
    assert mask.shape == (4, 18)
    for block in mask.unflatten(0, (2, 2)).unflatten(2, (2, 9)).movedim(2, 1).reshape(4, 18):
        assert bool(block.all()) or not bool(block.any())


def test_units_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    _, pattern = find_pattern("block:1x2", "layer", 0.5, model, None, None)
    assert pattern.unit.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    assert pattern.pool.tolist() == [0, 0, 0, 0, 1]
    _, pattern = find_pattern("1:2", "global", 0.5, model, "1", None)
    assert pattern.cells.tolist() == [[0, 1]]
    assert pattern.pool.tolist() == [0, 0]


# Channels.


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def pictures(count=4):
    draw = generator(2)
    return [(torch.randn(4, 3, 8, 8, generator=draw), torch.randint(0, 3, (4,), generator=draw)) for _ in range(count)]


def rows_alive(mask):
    return mask.flatten(1).any(1) if mask.ndim > 1 else mask


@pytest.mark.parametrize("curvature", ["fisher", "hessian_diagonal", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_channels_of_a_chain_take_their_biases_and_batch_norms_along(curvature, scope):
    model = chain()
    options = {"batches": pictures(), "loss_fn": loss_fn, "num_grads": 4, "rounds": 2}
    result = prune(model, 0.5, pattern="channel", curvature=curvature, scope=scope, **options)
    assert set(result.masks) == {
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "7.weight", "7.bias",
    }  # fmt: skip
    assert "9.weight" in result.left_alone
    for names in (("0.weight", "0.bias", "1.weight", "1.bias"), ("3.weight", "3.bias"), ("7.weight", "7.bias")):
        alive = [rows_alive(result.masks[name]) for name in names]
        assert all(torch.equal(alive[0], each) for each in alive)
        assert bool(alive[0].any())
        for name in names:
            mask, p = result.masks[name], model.get_parameter(name)
            assert torch.equal(mask, alive[0].view(-1, *[1] * (mask.ndim - 1)).expand_as(mask))
            assert not p[~mask].any()
    # The removed channels are silent, whatever comes in.
    model.eval()
    inside = model[:3](torch.randn(5, 3, 8, 8, generator=generator(5)))
    assert not inside[:, ~rows_alive(result.masks["0.weight"])].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_at_least_one_channel_of_each_family_stays(scope):
    model = chain()
    result = prune(model, 0.999, pattern="channel", curvature="magnitude", scope=scope)
    for name in ("0.weight", "3.weight", "7.weight"):
        assert int(rows_alive(result.masks[name]).sum()) == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.outer = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(self.second(F.relu(self.inner(self.first(x))))))
        return self.head(x.mean((2, 3)))


def test_channels_that_are_added_up_go_together():
    model = Residual()
    options = {"batches": pictures(), "loss_fn": loss_fn, "num_grads": 6, "block_size": 50}
    result = prune(model, 0.5, pattern="channel", **options)
    stream = ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "second.weight", "outer.weight", "outer.bias")
    alive = [rows_alive(result.masks[name]) for name in stream]
    assert all(torch.equal(alive[0], each) for each in alive)
    inner = [rows_alive(result.masks[name]) for name in ("first.weight", "inner.weight", "inner.bias")]
    assert all(torch.equal(inner[0], each) for each in inner)
    assert 0.3 < result.sparsity <= 0.5 + 1e-9
    smaller = result.compact()
    model.eval()
    x = torch.randn(2, 3, 8, 8, generator=generator(0))
    torch.testing.assert_close(smaller.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_heads_go_whole():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.head = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model = Attention()
    data = [(torch.randn(3, 5, 8, generator=generator(i)), torch.tensor([0, 1, 2])) for i in range(4)]
    result = prune(model, 0.5, pattern="channel", batches=data, loss_fn=loss_fn, num_grads=4)
    rows = rows_alive(result.masks["attention.in_proj_weight"]).view(3, 4, 2)
    for part in rows:
        assert torch.equal(part, rows[0])
    heads = rows[0]
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert int(heads[:, 0].sum()) == 2


def test_a_model_that_returns_what_it_makes_has_no_channel_to_spare():
    with pytest.raises(ValueError, match=r"nothing to prune.*: .+"):
        prune(nn.Linear(4, 3), 0.5, curvature="magnitude", pattern="channel")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) if float(x.sum()) > 0 else self.first(x).square())


def test_a_compiled_model_is_traced_below_its_compiler():
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = torch.compile(plain, backend="eager")
    result = prune(model, 0.8, curvature="magnitude", pattern="channel")
    assert set(result.masks) == {"_orig_mod.0.weight", "_orig_mod.0.bias"}
    assert "_orig_mod.2.weight" in result.left_alone
    assert bool(plain[2].weight.all())


def test_a_model_that_cannot_be_traced_keeps_its_channels():
    """Its outputs may be among them."""
    with pytest.raises(ValueError, match=r"first\.weight: the model cannot be traced.*: .+"):
        prune(Untraceable(), 0.8, curvature="magnitude", pattern="channel")


def test_a_unit_too_large_for_the_room_leaves_it_to_smaller_ones():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # the cheapest block, 64 of 80 weights
    result = prune(model, 0.2, curvature="magnitude", pattern="block:8x8")
    assert result.sparsity == 0.2
    assert not model[2].weight.any()
