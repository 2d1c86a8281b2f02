"""Executes cells: trains what is missing, attacks, judges, scores on fresh draws, merges shards.

An attack is never believed. Its x' is checked for shape, finite values, box and ε, and scored here
on draws that it never saw. Anything wrong makes the cell failed, with the reason and no number.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robbench import registry
from robbench.access import Access
from robbench.attacks import Configured
from robbench.checkpoints import Shelf, Trained, cache_folder, key_of
from robbench.datasets import Dataset, Subset
from robbench.defense import resolve
from robbench.deployed import images_at_once
from robbench.errors import InputError, unknown
from robbench.grid import Cell
from robbench.randomness import preserved_random_state, sandboxed, seed_everything
from robbench.records import Record
from robbench.rules import ABSTAIN
from robbench.threat import Threat, distance, within
from robbench.training import Progress, derive

SCORING_DRAWS = 20  # fresh draws per image of a stochastic defense
SHARD = 250  # images of one unit of work, fewer where they are large
LIBRARIES = ("torch", "torchvision", "torchattacks", "adversarial-robustness-toolbox", "numpy")


class Violation(Exception):
    """What an attack returned is not an adversarial example of its threat model."""


def shards(n: int, shape: tuple[int, int, int]) -> list[range]:
    """Fixed runs of images: they depend on the data alone, never on workers or memory."""
    size = min(SHARD, images_at_once(shape))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass
class Shared:
    """What the cells of one process have in common: data, trained defenses, clean outcomes."""

    out: Path
    data_dir: Path | None
    device: torch.device
    given: dict[str, Dataset] = field(default_factory=dict)
    models: dict[str, Trained] = field(default_factory=dict)
    trained: dict[tuple[str, str, int], Trained] = field(default_factory=dict)
    clean: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def dataset(self, name: str) -> Dataset:
        return self.given[name] if name in self.given else registry.dataset(name, self.data_dir)

    @property
    def shelf(self) -> Shelf:
        """Checkpoints beside the records come first, so that everybody measures the same."""
        return Shelf([self.out / "checkpoints", cache_folder()])

    def deploy(
        self,
        spec: str,
        dataset: Dataset,
        train_seed: int,
        progress: Progress = lambda done, total: None,
    ) -> Trained:
        if spec in self.models:
            return self.models[spec]
        key = (spec, dataset.hash, train_seed)
        if key not in self.trained:
            self.trained[key] = self.shelf.deploy(spec, dataset, train_seed, self.device, progress)
        return self.trained[key]


@dataclass
class Part:
    """The outcome of one cell on one shard."""

    cell: Cell
    shard: int
    reason: str | None = None
    draws: int = 1
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    trace: dict[str, np.ndarray] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def run_shard(
    cells: Sequence[Cell],
    shard: int,
    shared: Shared,
    progress: Progress = lambda done, total: None,
) -> list[Part]:
    """Attack one shard once and judge it for every cell that shares the x'.

    Mistakes of the user (InputError) go to the caller; everything else is a failed cell.
    """
    try:
        return _run_shard(cells, shard, shared, progress)
    except InputError:
        raise
    except Exception as error:
        return [Part(cell, shard, _reason(error)) for cell in cells]


def _reason(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def _run_shard(cells: Sequence[Cell], shard: int, shared: Shared, progress: Progress) -> list[Part]:
    first = cells[0]
    dataset = shared.dataset(first.dataset)
    subset = dataset.subset(first.n)
    picked = shards(first.n, dataset.shape)[shard]
    x, y = (tensor[picked.start : picked.stop].to(shared.device) for tensor in (subset.x, subset.y))
    source = shared.deploy(first.source, dataset, first.train_seed)
    attack = Configured.of(first.attack)
    access = _access(first, source)
    access.report = progress
    threat = first.threat
    if attack.entry.minimal:
        threat = threat.model_copy(update={"eps": None})
    started = time.perf_counter()
    seed = derive(first.seed, first.attack_key(), shard, "attack")
    with sandboxed(source.deployed, seed):
        rng = torch.Generator().manual_seed(seed)
        # copies: an attack that writes into x would be measured against what it wrote
        adversarial = attack(access, x.clone(), y.clone(), threat, rng)
    _check_trace(access.trace, len(y))
    cost = {
        "forwards": access.cost.forwards / len(y),
        "backwards": access.cost.backwards / len(y),
        "queries": access.cost.queries / len(y),
        "seconds": time.perf_counter() - started,
    }
    parts = []
    for cell in cells:
        part = Part(cell, shard, trace=access.trace, cost=cost)
        try:
            _judge(part, adversarial, x, y, shared, subset, attack.entry.minimal)
        except InputError:
            raise
        except Violation as violation:
            part.reason = str(violation)
        except Exception as error:  # one target that breaks is not the other targets' fault
            part.reason = _reason(error)
        parts.append(part)
    return parts


def _check_trace(trace: dict[str, np.ndarray], n: int) -> None:
    for name, values in trace.items():
        numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
        if not numbers or values.shape[-1:] != (n,):
            raise Violation(f"the attack left a trace {name!r} that is not (..., {n}) numbers")


def _access(cell: Cell, source: Trained) -> Access:
    """What the setting gives the attacker."""
    setting, deployed = cell.setting, source.deployed
    if setting.kind == "blackbox":
        return Access(deployed, draws=deployed.draws, gradients=False)
    if setting.kind == "transfer":
        return Access(deployed, draws=setting.eot, own=False)
    if setting.kind == "adaptive":
        return Access(deployed, draws=setting.eot, loss=source.loss)
    return Access(deployed)


def _judge(
    part: Part,
    adversarial: Tensor,
    x: Tensor,
    y: Tensor,
    shared: Shared,
    subset: Subset,
    minimal: bool,
) -> None:
    """Check x', score it and the clean images on fresh draws, and fill the part."""
    cell, shard = part.cell, part.shard
    target = shared.deploy(cell.defense, shared.dataset(cell.dataset), cell.train_seed)
    lengths = check(adversarial, x, cell.threat, bounded=not minimal)
    same = (adversarial == x).flatten(1).all(dim=1).cpu().numpy()
    if minimal:  # a point beyond ε is no success at this ε: the attacker hands in x itself
        inside = within(lengths, cell.threat)
        adversarial = torch.where(inside.view(-1, 1, 1, 1), adversarial, x)
    deployed = target.deployed
    part.draws = SCORING_DRAWS if deployed.stochastic else 1
    clean_key = (cell.dataset, cell.n, shard, target.keys, cell.defense, cell.seed)
    if clean_key not in shared.clean:
        role = derive(cell.seed, cell.data, cell.defense, shard, "clean")
        shared.clean[clean_key] = _score(target, x, y, part.draws, role)
    clean_ok, clean_err = shared.clean[clean_key]
    ok, err = _score(target, adversarial, y, part.draws, derive(cell.seed, cell.id, shard, "score"))
    part.arrays = {
        "ok": ok,
        "err": err,
        "clean_ok": clean_ok,
        "clean_err": clean_err,
        "distance": lengths.cpu().numpy().astype(np.float32),
    }
    part.trace = {**part.trace, "unchanged": same}
    source = shared.deploy(cell.source, shared.dataset(cell.dataset), cell.train_seed)
    part.provenance = {
        "checkpoints": list(target.keys),
        "weights": list(target.weights),
        "oracle_checkpoints": list(source.keys),
        "oracle_weights": list(source.weights),
        "dataset_hash": shared.dataset(cell.dataset).hash,
        "subset_hash": subset.hash,
        "randomness": list(deployed.randomness),
        "chunk": deployed.chunk,
        "threads": torch.get_num_threads(),
        "shard": len(shards(cell.n, deployed.shape)[0]),
    }


def check(adversarial: Tensor, x: Tensor, threat: Threat, bounded: bool = True) -> Tensor:
    """(N,) distances of a valid x'; a Violation says what is wrong and by how much."""
    if not isinstance(adversarial, Tensor):
        raise Violation(f"the attack returned {type(adversarial).__name__}, not a tensor")
    if adversarial.shape != x.shape:
        raise Violation(
            f"the attack returned the shape {tuple(adversarial.shape)}, not {tuple(x.shape)}"
        )
    if not adversarial.is_floating_point():
        raise Violation(f"the attack returned {adversarial.dtype}, not a floating-point type")
    if not bool(adversarial.isfinite().all()):
        bad = int((~adversarial.isfinite()).flatten(1).any(dim=1).sum())
        raise Violation(f"the attack returned values that are not finite in {bad} images")
    low, high = float(adversarial.min()), float(adversarial.max())
    if low < 0 or high > 1:
        raise Violation(f"the attack left the box [0, 1]: values from {low:.6g} to {high:.6g}")
    lengths = distance(adversarial, x, threat.norm)
    if bounded and threat.norm != "none" and not bool(within(lengths, threat).all()):
        bad = int((~within(lengths, threat)).sum())
        worst = float(lengths.max()) / float(threat.eps or 1)
        raise Violation(f"the attack left the ball: {bad} images, up to {worst:.4f} ε ({threat})")
    return lengths


def _score(
    target: Trained, x: Tensor, y: Tensor, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint8 counts of right and of wrong-and-accepted answers in fresh draws."""
    with preserved_random_state():
        seed_everything(seed)
        try:
            answers = target.deployed.decide(x.float(), draws)
        except FloatingPointError as error:
            raise Violation(str(error)) from None
    right = (answers == y).sum(dim=0)
    wrong = ((answers != y) & (answers != ABSTAIN)).sum(dim=0)
    return right.cpu().numpy().astype(np.uint8), wrong.cpu().numpy().astype(np.uint8)


def merge(parts: Sequence[Part], shared: Shared) -> Record:
    """The record of a cell from all of its shards; one failed shard fails the cell."""
    parts = sorted(parts, key=lambda part: part.shard)
    cell = parts[0].cell
    provenance = {**environment(shared.device), **parts[0].provenance}
    failed = [part for part in parts if part.reason]
    if failed:
        return Record(
            id=cell.id, cell=cell, status="failed", reason=failed[0].reason, provenance=provenance
        )
    sizes = [len(part.arrays["ok"]) for part in parts]
    cost = {
        key: round(float(np.average([part.cost[key] for part in parts], weights=sizes)), 3)
        for key in ("forwards", "backwards", "queries")
    }
    cost["seconds"] = round(sum(part.cost["seconds"] for part in parts), 2)
    return Record(
        id=cell.id,
        cell=cell,
        draws=parts[0].draws,
        **{key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays},
        trace={
            key: np.concatenate([part.trace[key] for part in parts], axis=-1)
            for key in parts[0].trace
            if all(key in part.trace for part in parts)
        },
        cost=cost,
        provenance=provenance,
    )


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


def missing_training(cells: Sequence[Cell], shared: Shared) -> dict[str, tuple[str, str, int]]:
    """Checkpoint key -> (dataset, spec, train seed) of all that the cells need and no folder has,
    bases before what is built on them."""
    jobs: dict[str, tuple[str, str, int]] = {}
    for cell in cells:
        for spec in dict.fromkeys((cell.source, cell.defense)):
            if spec in shared.models:
                continue
            for key, text in _chain(spec, shared.dataset(cell.dataset), cell.train_seed):
                if shared.shelf.find(key) is None:
                    jobs[key] = (cell.dataset, text, cell.train_seed)
    return jobs


def _chain(spec: str, dataset: Dataset, train_seed: int) -> list[tuple[str, str]]:
    """(key, spec) of every checkpoint behind a spec, bases first."""
    links: list[tuple[str, str]] = []
    for defense in resolve(spec):
        base = defense.base_spec()
        if base:
            links += _chain(str(base), dataset, train_seed)
        links.append((key_of(defense, dataset, train_seed), str(defense.spec)))
    return links


def base_keys(spec: str, dataset: Dataset, train_seed: int) -> list[str]:
    """Keys of the checkpoints that must exist before this one can be trained."""
    return [key for key, _ in _chain(spec, dataset, train_seed)][:-1]


def needed_keys(cell: Cell, shared: Shared) -> list[str]:
    """Keys of the checkpoints that a cell runs on."""
    dataset = shared.dataset(cell.dataset)
    specs = [spec for spec in (cell.source, cell.defense) if spec not in shared.models]
    return [
        key for spec in dict.fromkeys(specs) for key, _ in _chain(spec, dataset, cell.train_seed)
    ]
