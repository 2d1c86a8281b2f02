"""robbench: what an adversarial defense is really worth.

    import robbench
    print(robbench.evaluate(my_torch_model, dataset="digits", attack="pgd", eps="0.1"))

Names are imported when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robbench.access import Access
    from robbench.attacks import attack
    from robbench.datasets import Dataset, from_tensors
    from robbench.defense import Defense
    from robbench.errors import InputError
    from robbench.evaluation import deploy, evaluate
    from robbench.registry import dataset
    from robbench.rules import Draw
    from robbench.threat import Threat

_HOMES = {
    "evaluate": "evaluation",
    "deploy": "evaluation",
    "attack": "attacks",
    "Defense": "defense",
    "Dataset": "datasets",
    "from_tensors": "datasets",
    "dataset": "registry",
    "Access": "access",
    "Draw": "rules",
    "Threat": "threat",
    "InputError": "errors",
}
__all__ = [
    "Access", "Dataset", "Defense", "Draw", "InputError", "Threat",
    "attack", "dataset", "deploy", "evaluate", "from_tensors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robbench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
