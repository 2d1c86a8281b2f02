"""VGG-16: with BN and one linear layer for small images, as published for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn

from robbench.networks.network import Network, Shape, init_convolutions
from robbench.networks.resnet import Form, imagenet_form

GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions before a pool


class VGG16(Network):
    """Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration D.

    The "imagenet" form is torchvision's vgg16 less its dropout: layers -> 7x7 maps -> two hidden
    layers of 4096. The "cifar" form has BN and reads the mean over all pixels (N, 512).
    """

    def __init__(self, shape: Shape, labels: int, *, form: Form = "auto") -> None:
        super().__init__(shape[0])
        large = imagenet_form(form, shape)
        self.layers, size = _convolutions(shape, batch_norm=not large)
        self.hidden: nn.Module | None = None
        if large:
            # Left out where it changes nothing: its gradient on a GPU is not deterministic.
            pool = nn.Identity() if size == (7, 7) else nn.AdaptiveAvgPool2d(7)
            first, second = nn.Linear(512 * 7 * 7, 4096), nn.Linear(4096, 4096)
            self.hidden = nn.Sequential(pool, nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())
        self.readout = nn.Linear(4096 if large else 512, labels)
        init_convolutions(self)

    def features(self, x: Tensor) -> Tensor:
        maps = self.layers(self.normalize(x))  # (N, 512, h, w)
        return maps.mean((2, 3)) if self.hidden is None else self.hidden(maps)

    def torchvision_key(self, key: str) -> str | None:
        layer, _, rest = key.rpartition(".")
        known = {"classifier.0": "hidden.2", "classifier.3": "hidden.4", "classifier.6": "readout"}
        return f"{known.get(layer, layer.replace('features', 'layers'))}.{rest}"


def _convolutions(shape: Shape, *, batch_norm: bool) -> tuple[nn.Sequential, tuple[int, int]]:
    """All convolutions, and the size (h, w) of the maps that they give."""
    inputs, height, width = shape
    layers: list[nn.Module] = []
    for outputs, repeats in GROUPS:
        for _ in range(repeats):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers.append(nn.ReLU())
            inputs = outputs
        if min(height, width) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers.append(nn.Identity())  # nothing left to halve; keeps torchvision's numbering
    return nn.Sequential(*layers), (height, width)
