from types import SimpleNamespace

import pytest
import torch

from quadric.lab import LabError
from quadric.lab.models import MODELS, build_model


def like(kind, shape, outputs, name="a task"):
    return SimpleNamespace(kind=kind, shape=shape, outputs=outputs, name=name)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "outputs", "parameters"),
    [
        ("logistic", "image", (1, 8, 8), 10, 64 * 10 + 10),
        ("logistic", "table", (6,), 1, 7),
        ("mlp", "image", (1, 8, 8), 10, 65 * 64 + 65 * 64 + 65 * 10),
        ("mlp", "image", (1, 28, 28), 10, 785 * 256 + 257 * 256 + 257 * 10),
        ("mlp", "table", (6,), 1, 7 * 64 + 65 * 64 + 65),
        ("3c3d", "image", (3, 32, 32), 10, 895_210),  # DeepOBS
        ("3c3d", "image", (1, 28, 28), 10, 895_210 - 2 * 25 * 64),
        ("resnet20", "image", (3, 32, 32), 10, 272_474),  # M-FAC's, projection shortcuts
        ("resnet20", "image", (1, 8, 8), 10, 272_474 - 2 * 9 * 16),
        ("autoencoder", "reconstruction", (1, 28, 28), 784, 2_837_314),  # Hinton and Salakhutdinov's
        (
            "autoencoder",
            "reconstruction",
            (1, 8, 8),
            64,
            65 * 128 + 129 * 64 + 65 * 32 + 33 * 8 + 9 * 32 + 33 * 64 + 65 * 128 + 129 * 64,
        ),
        ("gpt", "text", (128,), 65, 2 * 65 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 256),
    ],
)
def test_shapes_and_sizes(name, kind, shape, outputs, parameters):
    torch.manual_seed(0)
    model = build_model(name, like(kind, shape, outputs))
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.randint(outputs, (3, *shape)) if kind == "text" else torch.randn(3, *shape)
    y = model(x)
    assert y.shape == ((3, *shape, outputs) if kind == "text" else (3, outputs))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gpt_is_causal():
    torch.manual_seed(0)
    model = build_model("gpt", like("text", (16,), 7)).eval()
    tokens = torch.randint(7, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 7
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_residual_network_carries_the_names_of_the_published_one():
    names = set(build_model("resnet20", like("image", (3, 32, 32), 10)).state_dict())
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer3.2.bn2.running_var", "fc.bias"} <= names
    assert "layer1.0.downsample.0.weight" not in names


def test_the_autoencoder_has_a_linear_code_and_linear_logits():
    model = build_model("autoencoder", like("reconstruction", (1, 28, 28), 784))
    widths = [module.in_features for module in model if isinstance(module, torch.nn.Linear)]
    assert widths == [784, 1000, 500, 250, 30, 250, 500, 1000]
    followed = [name for name, _ in model.named_children() if name.startswith("relu")]
    assert followed == ["relu1", "relu2", "relu3", "relu5", "relu6", "relu7"]
    code = model[:8](torch.rand(4, 1, 28, 28))
    assert code.shape == (4, 30)
    assert code.min() < 0


def test_impossible_pairs_are_one_sentence():
    with pytest.raises(LabError, match=r"there is no model 'vgg'; choose one of logistic, mlp"):
        build_model("vgg", like("image", (1, 8, 8), 10, "digits"))
    with pytest.raises(LabError, match=r"gpt takes text inputs, and digits has image: choose --model logistic, mlp"):
        build_model("gpt", like("image", (1, 8, 8), 10, "digits"))
    with pytest.raises(LabError, match=r"choose --model gpt"):
        build_model("mlp", like("text", (128,), 65, "shakespeare"))
    with pytest.raises(LabError, match=r"at least 10x10, not 8x8"):
        build_model("3c3d", like("image", (1, 8, 8), 10, "digits"))
    with pytest.raises(LabError, match=r"autoencoder takes reconstruction .*, or --task mnist-autoencoder"):
        build_model("autoencoder", like("image", (1, 28, 28), 10, "mnist"))
    with pytest.raises(LabError, match=r"choose --model autoencoder"):
        build_model("mlp", like("reconstruction", (1, 8, 8), 64, "digits-autoencoder"))
    assert set(MODELS) == {"logistic", "mlp", "3c3d", "resnet20", "gpt", "autoencoder"}
