"""The undefended network: what every defense has to beat, and the control of every attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from robbench.defense import Defense, defense

CIFAR_RECIPE: dict[str, object] = {
    "network": "resnet20",
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "schedule": "steps",
    "weight_decay": 5e-4,
    "crop": 4,
    "flip": True,
}


@defense("standard")
class Standard(Defense):
    """Cross-entropy on clean images. `paper`: the CIFAR recipe of He et al. 2016, section 4.2,
    with the learning-rate steps of paper 000, section 3.1."""

    source: ClassVar[str] = "He et al. 2016, arXiv:1512.03385"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},  # 60,000 images; the default counts on a thousand
        "paper": CIFAR_RECIPE,
    }
