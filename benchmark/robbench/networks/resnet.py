"""ResNets for small images (6n+2 layers) and for ImageNet (18, 34, 50 layers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from robbench.networks.blocks import BasicBlock, Block, Bottleneck, PreActivationBlock, conv3x3
from robbench.networks.network import Network, Shape, init_convolutions

Form = Literal["auto", "cifar", "imagenet"]


def imagenet_form(form: Form, shape: Shape) -> bool:
    """Whether to build the network for large images; "auto" draws the line at a height of 96."""
    return shape[1] >= 96 if form == "auto" else form == "imagenet"


class ResNet(Network):
    """stem -> stages of residual blocks -> head -> mean over all pixels (N, D) -> readout.

    `make` gets the channels before and after a block and its stride; `widths` are the channels
    after each stage and `depths` their numbers of blocks. Stages but the first halve the image.
    """

    def __init__(
        self,
        shape: Shape,
        labels: int,
        *,
        stem: nn.Sequential,
        make: Callable[[int, int, int], Block],
        widths: Sequence[int],
        depths: Sequence[int],
    ) -> None:
        super().__init__(shape[0])
        self.stem = stem
        inputs = next(m.out_channels for m in stem if isinstance(m, nn.Conv2d))
        stages: list[nn.Module] = []
        for width, depth in zip(widths, depths, strict=True):
            first = make(inputs, width, 2 if stages else 1)
            stages.append(nn.Sequential(first, *(make(width, width, 1) for _ in range(depth - 1))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.head: nn.Module = nn.Identity()
        if any(isinstance(block, PreActivationBlock) for block in self.blocks):
            self.head = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())  # the last sum has none
        self.readout = nn.Linear(inputs, labels)
        init_convolutions(self)

    @property
    def blocks(self) -> list[Block]:
        """All residual blocks from input to output."""
        return [module for module in self.stages.modules() if isinstance(module, Block)]

    def features(self, x: Tensor) -> Tensor:
        maps = self.head(self.stages(self.stem(self.normalize(x))))  # (N, D, h, w)
        return maps.mean((2, 3))

    def torchvision_key(self, key: str) -> str | None:
        layer, _, rest = key.partition(".")
        if layer.startswith("layer"):
            return f"stages.{int(layer[5:]) - 1}.{rest.replace('downsample', 'shortcut')}"
        known = {"conv1": "stem.0", "bn1": "stem.1", "fc": "readout"}
        return f"{known.get(layer, layer)}.{rest}"


def thin_resnet(
    depth: int,
    shape: Shape,
    labels: int,
    *,
    width: int = 16,
    stem_stride: int = 1,
    pre_activation: bool = False,
) -> ResNet:
    """The 6n+2 ResNets of He et al. 2015 (arXiv:1512.03385), section 4.2, shortcut option A.

    With pre_activation the ones that EnResNet's code (paper 000) trains, which are not those its
    paper counts: a stem without BN, and strided 1x1 convolutions as shortcuts.
    """
    stem = nn.Sequential(conv3x3(shape[0], width, stem_stride))
    if not pre_activation:
        stem.extend([nn.BatchNorm2d(width), nn.ReLU()])
    return ResNet(
        shape,
        labels,
        stem=stem,
        make=PreActivationBlock if pre_activation else partial(BasicBlock, projects=False),
        widths=(width, 2 * width, 4 * width),
        depths=((depth - 2) // 6,) * 3,
    )


def quick(shape: Shape, labels: int, *, width: int = 8, pre_activation: bool = False) -> ResNet:
    """ResNet-8 of width 8, made for a CPU: from 28 pixels on the stem halves the image."""
    stride = 2 if min(shape[1:]) >= 28 else 1
    return thin_resnet(
        8, shape, labels, width=width, stem_stride=stride, pre_activation=pre_activation
    )


def resnet(
    depths: Sequence[int],
    bottleneck: bool,
    shape: Shape,
    labels: int,
    *,
    form: Form = "auto",
    width: int = 64,
) -> ResNet:
    """The four-stage ResNets of He et al. 2015, table 1, with projection shortcuts (option B).

    The "imagenet" form is torchvision's; "cifar" has a 3x3 stem without stride and max-pool.
    """
    if imagenet_form(form, shape):
        conv, pool = nn.Conv2d(shape[0], width, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, 1)
        stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), pool)
    else:
        stem = nn.Sequential(conv3x3(shape[0], width), nn.BatchNorm2d(width), nn.ReLU())
    expansion = 4 if bottleneck else 1
    return ResNet(
        shape,
        labels,
        stem=stem,
        make=Bottleneck if bottleneck else BasicBlock,
        widths=[expansion * width * 2**stage for stage in range(4)],
        depths=depths,
    )
