"""Random streams, and code of others that must leave everything as it was."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> tuple[Any, ...]:
    """The state of every stream that a module on this device may draw from."""
    accelerator = None
    if device.type == "cuda":
        accelerator = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        accelerator = torch.mps.get_rng_state()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator


def set_random_state(device: torch.device, state: tuple[Any, ...]) -> None:
    python, numpy_state, cpu, accelerator = state
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    if device.type == "cuda":
        torch.cuda.set_rng_state(accelerator, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(accelerator)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's global streams: libraries draw from all three."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Global random streams are the caller's again afterwards, whatever happened inside."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # asking a device for its state would start CUDA on every device of the machine
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@dataclass
class Snapshot:
    """Modes, buffers, weights and their gradients, of every sub-module."""

    module: nn.Module
    modes: dict[str, bool] = field(init=False)
    buffers: dict[str, Tensor] = field(init=False)
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.modes = {name: m.training for name, m in self.module.named_modules()}
        self.buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        self.weights = {n: p.detach().clone() for n, p in self.module.named_parameters()}

    def changed(self) -> list[str]:
        """Sub-modules whose mode is another, buffers and weights that hold other numbers."""
        tensors = {**self.buffers, **self.weights}
        now = {**dict(self.module.named_buffers()), **dict(self.module.named_parameters())}
        return [
            *(n for n, m in self.module.named_modules() if m.training != self.modes.get(n)),
            *(n for n, t in tensors.items() if not _same(t, now[n].detach())),
        ]

    def restore(self) -> None:
        for name, module in self.module.named_modules():
            module.training = self.modes.get(name, module.training)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self.buffers[name])
        for name, parameter in self.module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
            parameter.copy_(self.weights[name])


def _same(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and bool(torch.equal(before, now))


@contextlib.contextmanager
def sandboxed(module: nn.Module, seed: int) -> Iterator[list[str]]:
    """Run foreign code: own random streams and working directory, the module as it was before;
    what of the module the code had changed is in the list afterwards."""
    changed: list[str] = []
    snapshot, here = Snapshot(module), Path.cwd()
    with preserved_random_state(), tempfile.TemporaryDirectory() as private:
        seed_everything(seed)
        os.chdir(private)
        try:
            yield changed
        finally:
            os.chdir(here)
            changed += snapshot.changed()
            snapshot.restore()
