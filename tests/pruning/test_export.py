"""What goes out comes back, and multiplies as before."""

import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quadric.pruning.export import export
from quadric.pruning.masks import hold_masks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 4))


@pytest.fixture
def model():
    return network()


@pytest.fixture
def masks(model):
    generator = torch.Generator().manual_seed(1)
    names = ["0.weight", "3.weight", "3.bias"]
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.5 for name in names}


def masked(model, masks):
    return {name: value * masks[name] if name in masks else value for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dense_tensors_with_zeros_and_masks_through_files(model, masks, tmp_path):
    expected = masked(model, masks)
    state = export(model, masks)
    assert_same(state, expected)
    save_file(state, tmp_path / "model.safetensors")
    save_file(masks, tmp_path / "masks.safetensors")
    again = network()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(again.state_dict(), expected)
    read = load_file(tmp_path / "masks.safetensors")
    assert_same(read, masks)
    hold_masks(read, torch.optim.SGD(again.parameters(), 0.1), again)
    assert_same(again.state_dict(), expected)
    state["4.weight"].zero_()  # a copy
    assert model[4].weight.all()


def test_compressed_rows_come_back_and_multiply(model, masks):
    with torch.no_grad():
        model[3].weight[0, 0] = 0.0
    masks["3.weight"][0, 0] = True
    expected = masked(model, masks)
    file = io.BytesIO()
    torch.save(export(model, masks, "csr"), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for name in ("0.weight", "3.weight"):
        assert state[name].layout == torch.sparse_csr
        assert state[name].values().numel() == masks[name].sum()  # a kept 0.0 too
        assert torch.equal(state[name].to_dense().view(masks[name].shape), expected[name])
        v = torch.randn(state[name].shape[1])
        torch.testing.assert_close(state[name] @ v, expected[name].flatten(1) @ v)
    assert_same({k: v for k, v in state.items() if v.layout == torch.strided}, {
        k: v for k, v in expected.items() if k not in ("0.weight", "3.weight")
    })  # fmt: skip


def test_tied_weights_are_masked_under_all_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    mask = torch.eye(4, dtype=torch.bool)
    state = export(model, {"0.weight": mask, "1.weight": torch.ones(4, 4, dtype=torch.bool)})
    assert torch.equal(state["0.weight"] != 0, mask)
    assert torch.equal(state["1.weight"] != 0, mask)


def two_of_four(rows, columns):
    return torch.tensor([True, False, False, True]).repeat(rows, columns // 4)


def test_two_of_four_needs_the_pattern_and_a_device(model, masks):
    with pytest.raises(ValueError, match=r"^3\.weight does not have the pattern 2:4 \(row \d from column"):
        export(model, masks, "2:4")
    with pytest.raises(ValueError, match=r"weight does not have the pattern 2:4 \(6 columns, not fours\)"):
        export(nn.Linear(6, 2), {"weight": torch.zeros(2, 6, dtype=torch.bool)}, "2:4")
    with pytest.raises(ValueError, match=r"capability 8\.0 or more, and 3\.weight is on cpu"):
        export(model, {"3.weight": two_of_four(8, 16)}, "2:4")


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with 2:4 kernels"
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_two_of_four_on_a_device():
    model = nn.Linear(128, 64, device="cuda", dtype=torch.float16)
    mask = two_of_four(64, 128).cuda()
    dense = export(model, {"weight": mask})["weight"]
    state = export(model, {"weight": mask}, "2:4")
    x = torch.randn(32, 128, device="cuda", dtype=torch.float16)
    model.weight = nn.Parameter(state["weight"], requires_grad=False)
    torch.testing.assert_close(model(x), nn.functional.linear(x, dense, model.bias), rtol=1e-2, atol=1e-2)
    odd = nn.Linear(4, 3, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="torch has no 2:4 kernel for weight"):
        export(odd, {"weight": two_of_four(3, 4).cuda()}, "2:4")


def test_what_is_not_known_is_refused(model, masks):
    with pytest.raises(ValueError, match="layout is 'coo': choose one of 'dense', 'csr', '2:4'"):
        export(model, masks, "coo")
    with pytest.raises(ValueError, match=r"'9\.weight', which is no parameter"):
        export(model, {"9.weight": masks["0.weight"]})
