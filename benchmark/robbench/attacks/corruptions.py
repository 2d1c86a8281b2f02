"""Noise, rotations and shifts: what happens to an image that nobody attacks, or its worst case.

Gaussian noise and rotations at random are the checks of Pang et al. 2020 (ICLR, arXiv
1905.10626); the worst case per image over a grid is that of Engstrom et al. 2019 (ICML, arXiv
1712.02779). All are unbounded in norm: the setting says how far they go.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack
from robbench.attacks.gradient import worst_of
from robbench.errors import InputError
from robbench.rules import Draw
from robbench.threat import Threat

Tries = Annotated[int, Field(ge=1)]


@attack("gaussian-noise", norms=("none",), needs="labels", targeted=False)
def gaussian_noise(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    sigma: Annotated[float, Field(gt=0)] = 0.05,
    tries: Tries = 1,
) -> Tensor:
    """Independent noise of standard deviation sigma, clipped to the box; the worst of `tries`."""
    noise = (torch.randn(x.shape, generator=rng) for _ in range(tries))
    return _worst(access, [(x + sigma * each.to(x)).clamp(0, 1) for each in noise], y)


@attack("rotation", norms=("none",), needs="labels", targeted=False)
def rotation(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    degrees: Annotated[float, Field(gt=0, le=180)] = 30.0,
    tries: Tries = 1,
    grid: Annotated[int, Field(ge=2)] | None = None,
) -> Tensor:
    """A random angle up to ±degrees, or the worst of `tries`, or of `grid` equally spaced ones.

    About the centre, bilinear, black where nothing is known.
    """
    _only_one(tries, grid, "grid=31")
    if grid is not None:
        angles = [torch.full((len(x),), angle) for angle in _spaced(degrees, grid)]
    else:
        angles = [degrees * (2 * torch.rand(len(x), generator=rng) - 1) for _ in range(tries)]
    return _worst(access, [rotated(x, angle) for angle in angles], y)


@attack("translation", norms=("none",), needs="labels", targeted=False)
def translation(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    pixels: Annotated[int, Field(ge=1)] = 3,
    tries: Tries = 1,
    grid: bool = False,
) -> Tensor:
    """A random shift up to ±pixels each way, or the worst of `tries`, or with grid of all shifts.

    By whole pixels, black where nothing is known.
    """
    _only_one(tries, grid or None, "grid=true")
    if grid:
        reach = range(-pixels, pixels + 1)
        shifts = [torch.tensor([to]).expand(len(x), 2) for to in itertools.product(reach, reach)]
    else:
        shifts = [
            torch.randint(-pixels, pixels + 1, (len(x), 2), generator=rng) for _ in range(tries)
        ]
    return _worst(access, [shifted(x, shift, pixels) for shift in shifts], y)


def rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Images turned counter-clockwise about their centres, each by its own of (N,) degrees."""
    height, width = x.shape[2:]
    angle = degrees.to(x) * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # where a pixel comes from, in coordinates that run from -1 to 1 along either side
    matrix = torch.stack(
        [cos, -sin * (height / width), zero, sin * (width / height), cos, zero], dim=1
    )
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


def shifted(x: Tensor, shift: Tensor, reach: int) -> Tensor:
    """Images moved down and to the right by (N, 2) whole pixels of at most `reach`."""
    height, width = x.shape[2:]
    above, left = (reach - shift.to(x.device)).T[..., None]
    rows = above + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    padded = F.pad(x, (reach,) * 4)
    return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _spaced(degrees: float, count: int) -> list[float]:
    return torch.linspace(-degrees, degrees, count, dtype=torch.float64).tolist()


def _only_one(tries: int, grid: object, example: str) -> None:
    if tries > 1 and grid is not None:
        raise InputError(
            f"tries draws at random and grid does not; write tries={tries} or {example}"
        )


def _worst(access: Access, candidates: list[Tensor], y: Tensor) -> Tensor:
    """The first candidate of each image that costs the defense most labels; asks for labels only,
    and for none where there is nothing to choose."""
    return worst_of(access, candidates, y, None, _unknown)[0]


def _unknown(draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
    """The loss of an attacker who sees labels and no scores."""
    return torch.zeros_like(draw.logits[0, 0, :, 0])
