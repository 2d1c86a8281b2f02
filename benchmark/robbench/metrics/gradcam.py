"""Where networks look, and how far apart the members of an ensemble do."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.errors import InputError


def grad_cam(activations: Tensor, gradients: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(N, H, W) in [0, 1], 1 at the most important place; all 0 where nothing speaks for the label.

    Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2. activations (N, C, H, W): the last
    feature maps; gradients: those of the label's logit with respect to them. size: height and
    width of the image, to which maps are enlarged bilinearly.
    """
    if activations.shape != gradients.shape or activations.ndim != 4:
        raise InputError(
            f"activations are {tuple(activations.shape)}, gradients {tuple(gradients.shape)};"
            " Grad-CAM takes feature maps (N, C, H, W) and as many gradients"
        )
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    maps = (weights * activations).sum(dim=1, keepdim=True).relu()
    if size is not None:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    maps = maps[:, 0]
    largest = maps.amax(dim=(1, 2), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1)


def centre(maps: Tensor, threshold: float = 0.9) -> Tensor:
    """(..., 2) row and column, in pixels, of the centre of what is above the threshold.

    nan for a map that nowhere is. maps (..., H, W) in [0, 1].
    """
    above = (maps > threshold).double()
    weight = above.sum(dim=(-2, -1))
    rows = torch.arange(maps.shape[-2], device=maps.device, dtype=above.dtype)
    columns = torch.arange(maps.shape[-1], device=maps.device, dtype=above.dtype)
    row = (above.sum(dim=-1) * rows).sum(dim=-1) / weight
    column = (above.sum(dim=-2) * columns).sum(dim=-1) / weight
    return torch.stack([row, column], dim=-1)


def centre_distance(maps: Tensor, threshold: float = 0.9) -> Tensor:
    """(N,) pixels: mean distance between the centres of two members' maps.

    Huang et al. 2021 (PDD), Ensemble Diversity Analysis, on the regions above 0.9. The paper does
    not say how its three distances become one number. nan where a member's map is all 0.
    maps (K, N, H, W).
    """
    if len(maps) < 2:
        raise InputError("one member makes no pair; centre_distance needs two members or more")
    pairs = itertools.combinations(centre(maps, threshold), 2)
    return torch.stack([torch.linalg.vector_norm(a - b, dim=-1) for a, b in pairs]).mean(dim=0)
