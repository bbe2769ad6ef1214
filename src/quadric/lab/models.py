"""The networks of the lab, each shaped by the task it is built for."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadric.lab import LabError
from quadric.lab.tasks import RECONSTRUCTION, Task


def logistic(shape: Sequence[int], outputs: int) -> nn.Module:
    """One linear layer: logistic regression, or linear regression where the task asks for numbers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))


def mlp(shape: Sequence[int], outputs: int) -> nn.Module:
    """Two hidden ReLU layers: 64 wide for small inputs (up to 100 numbers), 256 for larger ones."""
    inputs = math.prod(shape)
    width = 64 if inputs <= 100 else 256
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def three_c_three_d(shape: Sequence[int], outputs: int) -> nn.Module:
    """DeepOBS's 3c3d: three convolutions with max-pooling, three dense layers; 895,210 parameters on CIFAR-10.

    Raises:
        LabError: When the image is too small for the unpadded convolutions.
    """
    channels, height, width = shape
    if min(height, width) < 10:
        raise LabError(f"3c3d needs images of at least 10x10, not {height}x{width}; use --model mlp or resnet20")
    features = nn.Sequential(
        nn.Conv2d(channels, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
    )
    size = features(torch.zeros(1, *shape)).shape[1]
    head = (nn.Linear(size, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, outputs))
    return nn.Sequential(*features, *head)


def autoencoder(shape: Sequence[int], outputs: int) -> nn.Module:
    """The classic deep auto-encoder of MNIST, 784-1000-500-250-30-250-500-1000-784: 2,837,314 parameters.

    The widths are those of Hinton and Salakhutdinov (Science 313, 2006), which second-order methods have been tried on
    ever since; hidden layers are ReLU, the code and the logits of the pixels are linear. For small inputs (up to 100
    numbers) the code has 8 numbers and the layers are 128, 64 and 32 wide. Linear layers are named ``layer1`` to
    ``layer8``.
    """
    inputs = math.prod(shape)
    encoder = (128, 64, 32, 8) if inputs <= 100 else (1000, 500, 250, 30)
    widths = (inputs, *encoder, *reversed(encoder[:-1]), outputs)
    linear = (len(encoder), len(widths) - 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        layers[f"layer{number}"] = nn.Linear(before, after)
        if number not in linear:
            layers[f"relu{number}"] = nn.ReLU()
    for layer in layers.values():
        if isinstance(layer, nn.Linear):  # He's scale: torch's default lets a signal through eight layers die
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: the identity, or a 1x1 projection where the shape changes.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: 2 halves the image.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (batch, outputs, height / stride, width / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """CIFAR's ResNet-20 (arXiv 1512.03385) with projection shortcuts: 272,474 parameters for 3 channels and 10 classes.

    With zero-padded shortcuts (option A) it would have 269,722. Parameters carry the names of the network that M-FAC's
    paper prunes, so those weights load as they are.

    Args:
        shape: Channels, height and width of an image.
        outputs: Classes.
    """

    def __init__(self, shape: Sequence[int], outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.fc = nn.Linear(64, outputs)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, ResidualBlock(outputs, outputs, 1), ResidualBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, outputs)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class AttentionBlock(nn.Module):
    """Causal self-attention, then a GELU layer four times as wide; layer norm before each, a residual around each.

    Args:
        width: Features of a token.
        heads: Attention heads; divides width.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (batch, tokens, width)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT: learnt positions, 4 blocks of width 128 with 4 heads, an output layer of its own (not tied).

    Args:
        shape: One input's shape: the number of tokens it sees.
        outputs: Size of the alphabet.
    """

    def __init__(self, shape: Sequence[int], outputs: int, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.token = nn.Embedding(outputs, width)
        self.position = nn.Embedding(shape[0], width)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):  # GPT-2's initialisation
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token after each one, (batch, tokens, outputs)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


Builder = Callable[[Sequence[int], int], nn.Module]
# name: how to build it, and the kinds of input it takes
MODELS: dict[str, tuple[Builder, tuple[str, ...]]] = {
    "logistic": (logistic, ("image", "table")),
    "mlp": (mlp, ("image", "table")),
    "3c3d": (three_c_three_d, ("image",)),
    "resnet20": (ResNet20, ("image",)),
    "gpt": (GPT, ("text",)),
    "autoencoder": (autoencoder, ("reconstruction",)),
}


def build_model(name: str, task: Task) -> nn.Module:
    """A freshly initialised network for a task; draws from torch's global generator.

    Raises:
        LabError: When there is no such model, or it cannot take such inputs.

    Example:
        >>> from quadric.lab.tasks import load_task
        >>> sum(p.numel() for p in build_model("logistic", load_task("digits")).parameters())
        650
    """
    if name not in MODELS:
        raise LabError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    build, kinds = MODELS[name]
    if task.kind not in kinds:
        able = ", ".join(other for other, (_, takes) in MODELS.items() if task.kind in takes)
        if "reconstruction" in kinds and task.kind == "image":
            able += f", or --task {task.name}{RECONSTRUCTION}"
        raise LabError(
            f"{name} takes {' or '.join(kinds)} inputs, and {task.name} has {task.kind}: choose --model {able}"
        )
    return build(task.shape, task.outputs)
