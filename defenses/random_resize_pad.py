"""Random resizing and padding, Xie et al. 2018, arXiv:1711.01991, section 3.2.

Before the network sees an image, a random one of many patterns is applied: the image is resized to
a random size and put at a random place of a canvas of zeros. The authors train nothing for it, and
get their best results around an adversarially trained network, as paper 002 (section 3) reports:
`random-resize-pad(base=pgd-at)`, or adversarial training through the patterns,
`random-resize-pad(adversarial=pgd(eps=0.2, steps=5))`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.losses import Votes
from robbench.attacks.suite import Budget, Stage, frozen
from robbench.defense import Defense, defense
from robbench.errors import InputError
from robbench.randomness import preserved_random_state
from robbench.rules import Loss


class RandomResizePad(nn.Module):
    """Images (N, C, H, W) resized and padded at random, each on its own -> the network's logits.

    scale: side of the canvas by side of the image; a canvas no larger than the image changes
    nothing.
    """

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.transformed(x))

    def features(self, x: Tensor) -> Tensor:
        return self.network.features(self.transformed(x))  # type: ignore[operator]

    @property
    def readout(self) -> nn.Module:
        return self.network.readout  # type: ignore[return-value]

    def transformed(self, x: Tensor) -> Tensor:
        """(N, C, H', W'): the canvases, with H' = ceil(scale H) and W' = ceil(scale W)."""
        n, _, *sides = x.shape
        canvas = [math.ceil(side * self.scale - 1e-9) for side in sides]
        if canvas == sides:
            return x
        share = torch.rand(n, device=x.device)  # one for both sides: the image keeps its form
        for axis, (side, whole) in enumerate(zip(sides, canvas, strict=True), start=2):
            size = side + (share * (whole - side)).long()  # (N,) in [side, whole - 1]
            start = (torch.rand(n, device=x.device) * (whole - size + 1)).long()
            x = place(x, axis, size, start, whole)
        return x


def place(x: Tensor, axis: int, size: Tensor, start: Tensor, whole: int) -> Tensor:
    """Resize axis 2 or 3 of each image to `size` by nearest neighbour and place it at `start` of
    `whole` zeros; size and start are (N,) int64."""
    at = torch.arange(whole, device=x.device) - start[:, None]  # (N, whole) in the resized image
    inside = (at >= 0) & (at < size[:, None])
    source = (at * x.shape[axis] // size[:, None]).clamp(0, x.shape[axis] - 1)
    shape = [len(x), 1, 1, 1]
    shape[axis] = whole
    expanded = list(x.shape)
    expanded[axis] = whole
    return x.gather(axis, source.view(shape).expand(expanded)) * inside.view(shape)


@defense("random-resize-pad")
class RandomResizePadding(Defense):
    """A random size and place for every image and pass, around any base.

    scale: side of the canvas by side of the image, at least 1; 331/299 as in the paper (12,528
    patterns of 299 pixels, but 29 of MNIST's 28 and 4 of digits' 8: scale=1.5 gives those 54).
    Sizes are uniform from the image's to one pixel less than the canvas's. draws: passes averaged
    by softmax; 1 in the text, 30 in the authors' code, which also flips. The pattern is drawn per
    image, where the code draws one per batch; nearest neighbour and zeros are the code's. epochs:
    of training the base's weights further under random patterns, where adversarial= may find x'
    through them; 0 as in the paper (preset `paper`), whose networks know crops of all sizes. One
    made for images of 8 pixels is lost on 9 (a third of digits right, 98 % after ten epochs).
    Networks must take images of another size: all but mlp, lstm and vgg16 for large images.
    """

    source: ClassVar[str] = "Xie et al. 2018, arXiv:1711.01991"
    wraps: ClassVar[bool] = True
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}  # draw by draw
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 1, "base": "standard(epochs=3)"},
        "paper": {
            "epochs": 0,
            "base": "standard(batch_size=128, crop=4, epochs=200, flip=true, lr=0.1,"
            " network=resnet20, optimizer=sgd, schedule=steps, weight_decay=0.0005)",
        },
    }

    base: str | None = "standard"
    epochs: Annotated[int, Field(ge=0)] = 10
    scale: Annotated[float, Field(ge=1)] = 331 / 299

    def build(self, shape: tuple[int, int, int], labels: int) -> nn.ModuleList:
        members = super().build(shape, labels)
        for member in members.eval():
            try:
                with torch.no_grad(), preserved_random_state():
                    member(torch.zeros(1, *shape))
            except (RuntimeError, InputError):
                raise InputError(
                    f"{self.base_spec()} takes no images of another size than"
                    f" {shape[1]} x {shape[2]}; give the base another network, such as resnet8"
                ) from None
        return members.train()

    def prepare(self, network: nn.Module) -> nn.Module:
        return RandomResizePad(network, self.scale)

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Fixed sizes and places, whose mean every attack can climb."""
        return [frozen(budget)] if self.stochastic else []

    @property
    def random(self) -> bool:
        return self.scale > 1 or super().random
