"""VGG-16: with BN and one linear layer for small images, as published for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn

from robbench.networks.network import Network, Shape, init_convolutions
from robbench.networks.resnet import Form, imagenet_form

# channels in units of the first layer's, convolutions before a pool
GROUPS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


class VGG16(Network):
    """Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration D.

    The "imagenet" form is torchvision's vgg16 less its dropout: layers -> 7x7 maps -> two hidden
    layers of 4096. The "cifar" form has BN and reads the mean over all pixels (N, 8 width).
    width: channels of the first layer, 64 as published.
    """

    def __init__(self, shape: Shape, labels: int, *, form: Form = "auto", width: int = 64) -> None:
        super().__init__(shape[0])
        large = imagenet_form(form, shape)
        self.layers, size = _convolutions(shape, width, batch_norm=not large)
        self.hidden: nn.Module | None = None
        if large:
            # Left out where it changes nothing: its gradient on a GPU is not deterministic.
            pool = nn.Identity() if size == (7, 7) else nn.AdaptiveAvgPool2d(7)
            wide, last = nn.Linear(8 * width * 7 * 7, 4096), nn.Linear(4096, 4096)
            self.hidden = nn.Sequential(pool, nn.Flatten(), wide, nn.ReLU(), last, nn.ReLU())
        self.readout = nn.Linear(4096 if large else 8 * width, labels)
        init_convolutions(self)

    def features(self, x: Tensor) -> Tensor:
        maps = self.layers(self.normalize(x))  # (N, 8 width, h, w)
        return maps.mean((2, 3)) if self.hidden is None else self.hidden(maps)

    def torchvision_key(self, key: str) -> str | None:
        layer, _, rest = key.rpartition(".")
        known = {"classifier.0": "hidden.2", "classifier.3": "hidden.4", "classifier.6": "readout"}
        return f"{known.get(layer, layer.replace('features', 'layers'))}.{rest}"


def _convolutions(
    shape: Shape, first: int, *, batch_norm: bool
) -> tuple[nn.Sequential, tuple[int, int]]:
    """All convolutions, and the size (h, w) of the maps that they give."""
    inputs, height, width = shape
    layers: list[nn.Module] = []
    for multiple, repeats in GROUPS:
        outputs = multiple * first
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
