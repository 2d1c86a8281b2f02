"""The undefended network: what every defense has to beat, and the control of every attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from robbench.defense import Defense, defense
from robbench.recipes import CIFAR_RECIPE


@defense("standard")
class Standard(Defense):
    """Cross-entropy on clean images. `paper`: ResNet-20 of He et al. 2016, section 4.2, trained as
    paper 000 trains what it compares with (He et al. have less weight decay and fewer epochs)."""

    source: ClassVar[str] = "He et al. 2016, arXiv:1512.03385"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},  # 60,000 images; the default counts on a thousand
        "paper": CIFAR_RECIPE,
    }
