"""Steps without a useful derivative, Athalye et al. 2018, arXiv:1802.00420, section 4.1 (BPDA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BPDA(nn.Module):
    """A step that is deployed as it is and differentiated as another one.

    step: images or activations (N, …) -> (N, …), with any derivative or none. substitute: what it
    is differentiated as, of the same shapes (default: the identity). Whatever module has a
    `declared_backward` says what stands for its derivative; records keep it.
    """

    def __init__(self, step: nn.Module, substitute: nn.Module | None = None) -> None:
        super().__init__()
        self.step, self.substitute = step, substitute or nn.Identity()
        self.declared_backward = f"{type(step).__name__} as {type(self.substitute).__name__}"

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            exact = self.step(x)
        if not x.requires_grad:
            return exact
        smooth = self.substitute(x)
        # the value of the one to the last bit, the derivative of the other
        return exact + (smooth - smooth.detach())


def declared_backwards(module: nn.Module) -> list[str]:
    """What the modules inside say of their derivatives, each once."""
    said = (getattr(inner, "declared_backward", None) for inner in module.modules())
    return list(dict.fromkeys(text for text in said if text))
