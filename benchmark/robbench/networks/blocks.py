"""Residual blocks with three sites where a defense can put a module of its own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Block(nn.Module):
    """x -> out(relu(sum(shortcut(x) + branch(F(x))))), without the ReLU if pre-activated.

    The sites `branch`, `sum` and `out` are identities to be replaced. No ReLU works in place: a
    site may keep what it was given.
    """

    def __init__(self, downsamples: bool) -> None:
        super().__init__()
        self.downsamples = downsamples  # changes the shape (C, H, W), be it only C
        self.branch: nn.Module = nn.Identity()
        self.sum: nn.Module = nn.Identity()
        self.out: nn.Module = nn.Identity()


class PadShortcut(nn.Module):
    """Option A of He et al. 2015 (arXiv:1512.03385): every stride-th pixel, new channels 0."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.after))


class PostActivationBlock(Block):
    """The layout of He et al. 2015 (arXiv:1512.03385): the last ReLU follows the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projects: bool = True) -> None:
        super().__init__(downsamples=stride != 1 or inputs != outputs)
        self.shortcut: nn.Module = nn.Identity()
        if self.downsamples and projects:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        elif self.downsamples:
            self.shortcut = PadShortcut(inputs, outputs, stride)

    def residual(self, x: Tensor) -> Tensor:
        """F(x), in the shape of the output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        total = self.sum(self.shortcut(x) + self.branch(self.residual(x)))
        return self.out(F.relu(total))


class BasicBlock(PostActivationBlock):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projects: bool = True) -> None:
        super().__init__(inputs, outputs, stride, projects=projects)
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)

    def residual(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(hidden))


class Bottleneck(PostActivationBlock):
    """1x1, 3x3 and 1x1 convolution; the 3x3 has the stride, as in torchvision ("v1.5")."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        narrow = outputs // 4
        self.conv1, self.bn1 = conv1x1(inputs, narrow), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = conv3x3(narrow, narrow, stride), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = conv1x1(narrow, outputs), nn.BatchNorm2d(outputs)

    def residual(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return self.bn3(self.conv3(hidden))


class PreActivationBlock(Block):
    """He et al. 2016 (arXiv:1603.05027): BN and ReLU before each convolution, none after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the *activated* input, as in the
    code of EnResNet (paper 000) and in wide ResNets.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, dropout: float = 0.0) -> None:
        super().__init__(downsamples=stride != 1 or inputs != outputs)
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shortcut = conv1x1(inputs, outputs, stride) if self.downsamples else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = self.shortcut(active) if self.downsamples else x
        hidden = self.dropout(F.relu(self.bn2(self.conv1(active))))
        return self.out(self.sum(shortcut + self.branch(self.conv2(hidden))))
