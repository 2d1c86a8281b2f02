"""Where cells run: the device, and what a record says of it and of the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from robbench.errors import InputError, unknown

LIBRARIES = ("torch", "torchvision", "torchattacks", "adversarial-robustness-toolbox", "numpy")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Environment(BaseModel):
    """What every record says of where it was made."""

    model_config = ConfigDict(extra="allow", strict=True)
    robbench: str
    python: str
    versions: dict[str, str]
    device: str
    # none of what is no checkout: an installed wheel, an unpacked archive
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Environment:
        if missing := [name for name in LIBRARIES if name not in self.versions]:
            raise ValueError(f"versions lacks {', '.join(missing)}")
        return self


def choose_device(name: str) -> torch.device:
    """auto takes cuda, then mps, then the CPU; what is not there is an InputError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name not in available:
        raise unknown("device", name, ["auto", *available])
    if not available[name]:
        raise InputError(f"there is no {name} device here; write --device auto or --device cpu")
    if name == "cuda":  # the same logits in every batch, and in every run
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for the record."""
    return {
        "robbench": importlib.metadata.version("robbench"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": _commit(),
    }


@lru_cache
def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed wheel."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
