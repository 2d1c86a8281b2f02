"""On a CUDA device: every native attack stays there and gives what the CPU gives."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from robbench import networks, registry
from robbench.access import Access
from robbench.attacks import Configured, find
from robbench.deployed import Deployed
from robbench.rules import MeanProbabilities
from robbench.threat import NORM_NAMES, Threat

pytestmark = pytest.mark.cuda
LINF = Threat(norm="linf", eps=Fraction(1, 10))


def deployed(device: str) -> Deployed:
    torch.manual_seed(0)
    network = networks.build("resnet8", {"width": 4}, (1, 8, 8), 10).eval()
    members = torch.nn.ModuleList([network]).to(device)
    return Deployed(members, MeanProbabilities(), (1, 8, 8), 10)


def images(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(32, 1, 8, 8, generator=rng)
    y = torch.randint(10, (32,), generator=rng)
    return x.to(device), y.to(device)


@pytest.mark.parametrize("name", list(registry.attacks))
def test_a_native_attack_gives_on_cuda_what_it_gives_on_the_cpu(name: str) -> None:
    entry, results = find(name), []
    norm = next(norm for norm in NORM_NAMES if norm in entry.norms)
    eps = None if entry.minimal or norm == "none" else "0.1"
    for device in ("cpu", "cuda"):
        x, y = images(device)
        access = Access(deployed(device), gradients=entry.needs == "gradients")
        threat = Threat(norm=norm, eps=eps)
        result = Configured.of(name)(access, x, y, threat, torch.Generator().manual_seed(2))
        assert result.device.type == device
        results.append(result.cpu())
    alike = (results[0] - results[1]).abs() < 1e-4
    if entry.needs == "gradients" and eps:
        # a sign may flip where the gradient is at the rounding: a few pixels, never the picture
        assert alike.float().mean() > 0.95
    else:  # a walk along the boundary may part early: most images end where they did
        assert alike.flatten(1).all(dim=1).float().mean() > 0.5


@pytest.mark.parametrize("name", ["torchattacks:PGD", "art:ProjectedGradientDescent"])
def test_an_adapter_hands_cuda_images_back_on_cuda(name: str) -> None:
    x, y = images("cuda")
    result = Configured.of(name)(
        Access(deployed("cuda")), x, y, LINF, torch.Generator().manual_seed(2)
    )
    assert result.device.type == "cuda"
    assert float((result - x).abs().max()) <= 0.1 + 1e-6
