"""Which weights are pruned, which are left alone, and why."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from quadric import prune
from quadric.pruning.weights import find_weights


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.norm, self.scale = nn.LayerNorm([3, 4]), nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(2, 2))


def test_what_is_taken_by_default():
    weights = find_weights(Both(), None, None)
    assert weights.names == ["linear.weight"]
    assert set(weights.left_alone) == {"embedding.weight", "norm.weight", "norm.bias", "table"}
    assert "name it in targets" in weights.left_alone["embedding.weight"]
    assert weights.dim == 12


@pytest.mark.parametrize(
    ("targets", "ignore", "names"),
    [
        ("embedding", None, ["embedding.weight"]),
        (nn.Embedding, None, ["embedding.weight"]),
        (["embedding", nn.Linear], None, ["embedding.weight", "linear.weight"]),
        ("*", "table", ["embedding.weight", "linear.weight", "norm.weight", "norm.bias"]),
        ("*.weight", nn.LayerNorm, ["embedding.weight", "linear.weight"]),
    ],
)
def test_what_is_named(targets, ignore, names):
    weights = find_weights(Both(), targets, ignore)
    assert sorted(weights.names) == sorted(names)
    result = prune(Both(), 0.5, curvature="magnitude", targets=targets, ignore=ignore)
    assert sorted(result.masks) == sorted(names)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.middle = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("ignore", "names"),
    [(None, ["embedding.weight", "middle.weight"]), ("embedding", ["middle.weight"]), ("head", ["middle.weight"])],
)
def test_a_tied_weight_is_left_alone_by_any_of_its_names(ignore, names):
    weights = find_weights(Tied(), None, ignore)
    assert sorted(weights.names) == names
    assert not set(weights.names) & set(weights.left_alone)


@pytest.mark.parametrize("targets", [None, "*", "0"])
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.spectral_norm,
     nn.utils.parametrizations.weight_norm],
)  # fmt: skip
def test_parametrized_weights_are_left_alone(wrap, targets):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrap(model[0])
    if targets == "0":
        with pytest.raises(ValueError, match="parametrization"):
            find_weights(model, targets, None)
        return
    weights = find_weights(model, targets, None)
    assert weights.names == ["1.weight"]
    assert weights.left_alone
    assert all("parametrization" in reason for reason in weights.left_alone.values())


def test_recurrent_weights_under_a_parametrization():
    model = nn.GRUCell(4, 4)
    nn.utils.parametrizations.weight_norm(model, "weight_hh")
    weights = find_weights(model, None, None)
    assert weights.names == ["weight_ih"]
    assert all("parametrization" in reason for reason in weights.left_alone.values())


def test_masks_of_torch_are_a_parametrization_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    assert find_weights(model, "*", None).names == ["1.weight"]


def test_a_lazy_layer():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: call the model once"):
        find_weights(nn.Sequential(nn.LazyLinear(3)), None, None)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_types_that_cannot_be_pruned(dtype):
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(ValueError, match=rf"weight is of {dtype}: .+"):
        find_weights(model, None, None)


@pytest.mark.parametrize(
    "make",
    [lambda w: w.to("meta"), torch.Tensor.to_sparse, lambda w: w[:1].expand(2, 2)],
    ids=["meta", "sparse", "one"],
)
def test_memory_that_cannot_be_written_to(make):
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(make(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"weight (is|of) .*: .+"):
        find_weights(model, None, None)


def test_nothing_to_prune():
    with pytest.raises(ValueError, match=r"nothing to prune in BatchNorm1d .*: .+"):
        find_weights(nn.BatchNorm1d(3), None, None)


def test_one_vector_and_back():
    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.bfloat16), nn.Linear(3, 1, dtype=torch.float64))
    weights = find_weights(model, None, None)
    flat = weights.flatten(weights.params, torch.device("cpu"))
    assert flat.dtype == torch.float64
    weights.write(flat + 1)
    torch.testing.assert_close(weights.flatten(weights.params, torch.device("cpu")), flat + 1, rtol=0.02, atol=0.02)
    assert [part.shape for part in weights.split(flat)] == [(3, 2), (1, 3)]
