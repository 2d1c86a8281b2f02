"""Wide ResNets, the backbone of most published adversarially trained CIFAR networks."""

from __future__ import annotations

from functools import partial

from torch import nn

from robbench.errors import InputError
from robbench.networks.blocks import PreActivationBlock, conv3x3
from robbench.networks.network import Shape
from robbench.networks.resnet import ResNet


def wideresnet(
    shape: Shape, labels: int, *, depth: int = 34, widen: int = 10, dropout: float = 0.0
) -> ResNet:
    """Zagoruyko & Komodakis 2016 (arXiv:1605.07146), without the unused stage in TRADES' code."""
    if depth < 10 or depth % 6 != 4:
        raise InputError(f"depth of a wide ResNet must be 6n + 4 (10, 16, 22, 28, 34), not {depth}")
    return ResNet(
        shape,
        labels,
        stem=nn.Sequential(conv3x3(shape[0], 16)),
        make=partial(PreActivationBlock, dropout=dropout),
        widths=(16 * widen, 32 * widen, 64 * widen),
        depths=((depth - 4) // 6,) * 3,
    )
