"""What a package outside of robbench looks like: one defense, one attack, one dataset."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

import robbench
from robbench.datasets import Split
from robbench.defense import defense


class Noise(nn.Module):
    """x + σ ξ, ξ standard normal."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x)


@defense("input-noise")
class InputNoise(robbench.Defense):
    """Gaussian noise on the image, while training and at test."""

    source: ClassVar[str] = "an example"

    network: str = "mlp(hidden=[16])"
    epochs: Annotated[int, Field(ge=1)] = 5
    sigma: Annotated[float, Field(ge=0)] = 0.1

    def prepare(self, network: nn.Module) -> nn.Module:
        network.normalize = nn.Sequential(Noise(self.sigma), network.normalize)
        return network

    @property
    def random(self) -> bool:
        return self.sigma > 0


@robbench.attack("corners", norms=("linf",), needs="scores", targeted=False)
def corners(
    access: robbench.Access,
    x: Tensor,
    y: Tensor,
    threat: robbench.Threat,
    rng: Generator,
    *,
    tries: Annotated[int, Field(ge=1)] = 10,
) -> Tensor:
    """The corner of the ball, out of `tries` random ones, where the true label scores least."""
    worst, lowest = x, access(x).gather(1, y[:, None])
    for _ in range(tries):
        signs = torch.randint(0, 2, x.shape, generator=rng).to(x) * 2 - 1
        candidate = (x + float(threat.eps) * signs).clamp(0, 1)
        score = access(candidate).gather(1, y[:, None])
        better = score < lowest
        worst = torch.where(better[:, :, None, None], candidate, worst)
        lowest = torch.where(better, score, lowest)
    return worst


def bars(data_dir: Path | None) -> robbench.Dataset:
    """A bright bar in one of four rows of a gray 4 x 4 image; the row is the label."""

    def split(n: int, seed: int) -> Split:
        rng = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % 4
        x = 0.4 * torch.rand(n, 1, 4, 4, generator=rng)
        x[torch.arange(n), 0, y] += 0.5
        return Split(x, y)

    return robbench.Dataset(
        "bars",
        train=split(400, 0),
        validation=split(40, 1),
        test=split(80, 2),
        labels=("first", "second", "third", "fourth"),
        eps={"linf": (Fraction(1, 10), Fraction(1, 5))},
        control=Fraction(1, 2),
    )
