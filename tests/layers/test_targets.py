"""Targets: which weights are found in a model, which are taken, and why the others are not."""

import pytest
from torch import nn

from quadric.layers.targets import find_targets


class Block(nn.Module):
    """A module of somebody's own, with a matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.feed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.position = nn.Parameter(nn.init.zeros_(nn.Linear(4, 3).weight))
        self.shift = nn.Parameter(self.position[0].detach().clone())


def model():
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(5, 4),
            "blocks": nn.ModuleList([Block(), Block()]),
            "picture": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2)),
            "memory": nn.LSTM(4, 3),
            "cell": nn.GRUCell(4, 3),
            "both": nn.Bilinear(2, 3, 4),
            "norm": nn.LayerNorm((3, 4)),
            "head": nn.Linear(4, 2),
        }
    )


MATRICES = ["attention.in_proj_weight", "attention.out_proj.weight", "feed.0.weight", "feed.2.weight"]
BLOCKS = [f"blocks.{i}.{name}" for i in (0, 1) for name in MATRICES]
PICTURE = ["picture.0.weight", "picture.2.weight"]
DEFAULT = {*BLOCKS, *PICTURE, "head.weight"}


def taken(targets=None, ignore=None, of=None):
    return {target.name for target in find_targets(of or model(), targets, ignore) if not target.reason}


def test_by_default_every_layer_of_torch_that_multiplies_rows():
    assert taken() == DEFAULT


def test_every_matrix_is_taken_or_has_a_reason():
    found = find_targets(model(), None, None)
    names = {name for name, p in model().named_parameters() if p.ndim >= 2}
    assert {target.name for target in found} == names
    assert len(found) == len(names)
    reasons = {target.name: target.reason for target in found if target.reason}
    for name, part in {
        "tokens.weight": "one-hot",
        "memory.weight_ih_l0": "fused kernel",
        "memory.weight_hh_l0": "fused kernel",
        "cell.weight_ih": "fused kernel",
        "both.weight": "two inputs",
        "norm.weight": "does not mix",
        "blocks.0.position": "Block is no layer of torch: name it in targets",
    }.items():
        assert part in reasons[name]
    assert set(reasons) == names - DEFAULT


def test_a_weight_is_reached_from_the_module_that_multiplies_by_it():
    net = model()
    for target in find_targets(net, None, None):
        weight = target.module
        for name in target.path.split("."):
            weight = getattr(weight, name)
        assert weight is net.get_parameter(target.name)
    attention = [t for t in find_targets(net, None, None) if t.name == "blocks.0.attention.out_proj.weight"]
    assert attention[0].module is net["blocks"][0].attention


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("head", {"head.weight"}),
        ("head.weight", {"head.weight"}),
        ("*", DEFAULT | {"blocks.0.position", "blocks.1.position"}),
        ("blocks.0", {*BLOCKS[:4], "blocks.0.position"}),
        ("blocks.*.feed", {f"blocks.{i}.feed.{j}.weight" for i in (0, 1) for j in (0, 2)}),
        ("blocks.?.feed.0", {"blocks.0.feed.0.weight", "blocks.1.feed.0.weight"}),
        ("*.out_proj*", {"blocks.0.attention.out_proj.weight", "blocks.1.attention.out_proj.weight"}),
        ("*.attention", {name for name in BLOCKS if "attention" in name}),
        (["head", "picture.[02]"], {"head.weight", *PICTURE}),
        (nn.Conv2d, {"picture.0.weight"}),
        (nn.modules.conv._ConvNd, set(PICTURE)),
        (nn.MultiheadAttention, {name for name in BLOCKS if "attention" in name}),
        (nn.Linear, DEFAULT - set(PICTURE) - {f"blocks.{i}.attention.in_proj_weight" for i in (0, 1)}),
        ([Block], {"blocks.0.position", "blocks.1.position"}),
        ((nn.Conv2d, "head"), {"picture.0.weight", "head.weight"}),
        (nn.Module, DEFAULT | {"blocks.0.position", "blocks.1.position"}),
        ("tokens", set()),  # a reason that no pattern overrules
        ([], set()),
    ],
    ids=str,
)
def test_patterns_and_types_choose(targets, wanted):
    assert taken(targets) == wanted


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("head", {"head.weight"}),
        ("picture", set(PICTURE)),
        (nn.Conv2d, {"picture.0.weight"}),
        (["blocks.*", nn.ConvTranspose2d], {*BLOCKS, "picture.2.weight"}),
        (nn.Embedding, set()),
    ],
    ids=str,
)
def test_ignore_takes_out(ignore, left):
    assert taken(ignore=ignore) == DEFAULT - left


def test_ignore_wins_over_targets_and_both_are_reasons():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    reasons = {t.name: t.reason for t in find_targets(net, ["0", "1"], "1")}
    assert reasons == {"0.weight": "", "1.weight": "ignore names it", "2.weight": "targets does not name it"}


def test_the_model_itself_may_be_a_layer():
    assert taken(of=nn.Linear(2, 3)) == {"weight"}
    assert taken("weight", of=nn.Linear(2, 3)) == {"weight"}
    assert taken(of=nn.MultiheadAttention(4, 2)) == {"in_proj_weight", "out_proj.weight"}
    apart = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert taken(of=nn.MultiheadAttention(4, 2, kdim=3, vdim=5)) == apart
    assert taken(of=nn.BatchNorm1d(3)) == set()


def test_a_module_used_twice_is_one_target():
    layer = nn.Linear(3, 3)
    assert [t.name for t in find_targets(nn.Sequential(layer, nn.ReLU(), layer), None, None)] == ["0.weight"]


def test_weights_that_have_no_shape_yet_and_computed_ones_are_found():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyConv1d(3, 1))
    assert taken(of=net) == {"0.weight", "2.weight"}
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert taken(of=normed) == {"weight"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"targets": "heads"}, "'heads' matches no weight of this model: choose among .*weight"),
        ({"ignore": "heads"}, "'heads' matches no weight of this model: choose among .*weight"),
        ({"targets": ["head", nn.Conv1d]}, "Conv1d matches no weight of this model: choose among .*weight"),
        ({"ignore": nn.RNN}, "RNN matches no weight of this model: choose among .*weight"),
        ({"targets": 3}, "targets holds 3: give patterns"),
        ({"targets": ["head", 3]}, "targets holds 3: give patterns"),
        ({"ignore": nn.Linear(1, 1)}, r"ignore holds Linear\(.*: give patterns"),
        ({"ignore": nn.Sequential(nn.ReLU())}, r"ignore holds Sequential\("),
        ({"ignore": [int]}, r"ignore holds <class 'int'>: give patterns"),
        ({"ignore": [nn.Linear(1, 1)]}, r"ignore holds Linear\(.*: give patterns"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(given, shown):
    with pytest.raises(ValueError, match=shown):
        find_targets(model(), given.get("targets"), given.get("ignore"))


def test_a_model_without_matrices_says_so():
    with pytest.raises(ValueError, match="none at all"):
        find_targets(nn.ReLU(), "head", None)
