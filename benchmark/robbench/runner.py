"""Executes cells: trains what is missing, attacks, has the judge score x', merges shards.

Anything that goes wrong makes the cell failed, with the reason and no number.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robbench import registry
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.evidence import PROBES, enough_draws
from robbench.attacks.suite import Ready
from robbench.cell import Cell
from robbench.checkpoints import Shelf, Trained, cache_folder, key_of
from robbench.datasets import Dataset, Subset
from robbench.defense import resolve
from robbench.deployed import images_at_once
from robbench.environment import environment
from robbench.errors import InputError
from robbench.judge import SCORING_DRAWS, Outcome, Violation, check, check_trace, score
from robbench.metered import within_limit
from robbench.networks.bpda import declared_backwards
from robbench.randomness import sandboxed
from robbench.records import Record, images_digest
from robbench.threat import within
from robbench.training import Progress, derive

KEPT = 8  # deployed defenses that a process holds; the others are loaded again
FAILURES = (InputError, Violation, RuntimeError, MemoryError)  # anything else is a bug
SHARD = 250  # images of one unit of work, fewer where they are large


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
    clean: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)
    keep_images: bool = False  # whether parts carry the x' that the attack returned
    untrained: dict[str, str] = field(default_factory=dict)  # checkpoint key -> why it is not there

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
        found = self.trained.pop(key, None)
        if found is None:
            for part, _ in chain(spec, dataset, train_seed) if self.untrained else ():
                if part in self.untrained:  # what failed for a task would fail again
                    raise InputError(f"{spec} is not trained: {self.untrained[part]}")
            found = self.shelf.deploy(spec, dataset, train_seed, self.device, progress)
        self.trained[key] = found  # the one that was used last stands last
        for oldest in list(self.trained)[:-KEPT]:
            del self.trained[oldest]
        return found


@dataclass
class Part:
    """The outcome of one cell on one shard."""

    cell: Cell
    shard: int
    reason: str | None = None
    mistake: bool = False  # the reason is an InputError: what the user wrote cannot be run
    draws: int = 1
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    trace: dict[str, np.ndarray] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    images: np.ndarray | None = None  # x' (N, C, H, W) float32, where they are kept


def run_shard(
    cells: Sequence[Cell],
    shard: int,
    shared: Shared,
    progress: Progress = lambda done, total: None,
) -> list[Part]:
    """Attack one shard once and judge it for every cell that shares the x'."""
    try:
        return _run_shard(cells, shard, shared, progress)
    except Exception as error:
        return [_failed(Part(cell, shard), error) for cell in cells]


def _failed(part: Part, error: Exception) -> Part:
    part.reason, part.mistake = explained(error), isinstance(error, InputError)
    return part


def explained(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, (InputError, Violation)):  # made to be read
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason_of(error)} ({Path(where.filename).name}:{where.lineno})"


def reason_of(error: BaseException) -> str:
    """An exception in one line, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def _run_shard(cells: Sequence[Cell], shard: int, shared: Shared, progress: Progress) -> list[Part]:
    first = cells[0]
    dataset = shared.dataset(first.dataset)
    subset = dataset.subset(first.n)
    picked = shards(first.n, dataset.shape)[shard]
    x, y = (tensor[picked.start : picked.stop].to(shared.device) for tensor in (subset.x, subset.y))
    source = shared.deploy(first.source, dataset, first.train_seed)
    attack = Configured.of(first.attack)
    access = _access(first, source, subset, shared)
    access.report = progress
    access.stages = _stages(first, access, shared)
    threat = attack.given(first.threat)
    started = time.perf_counter()
    seed = derive(first.seed, first.attack_key(), shard, "attack")
    with sandboxed(source.deployed, seed) as changed:
        rng = torch.Generator().manual_seed(seed)
        if limit := first.setting.queries:
            adversarial = within_limit(attack, access, x, y, threat, rng, limit)
        else:
            # copies: an attack that writes into x would be measured against what it wrote
            adversarial = attack(access, x.clone(), y.clone(), threat, rng)
    if changed:
        access.notes["changed"] = changed[:KEPT]
    check_trace(access.trace, len(y))
    cost = {
        "forwards": access.cost.forwards / len(y),
        "backwards": access.cost.backwards / len(y),
        "queries": access.cost.queries / len(y),
        "seconds": time.perf_counter() - started,
    }
    parts = []
    for cell in cells:
        part = Part(cell, shard, trace=access.trace, cost=cost, provenance=dict(access.notes))
        try:
            _judge(part, adversarial, x, y, shared, subset, attack.entry.minimal)
        except Exception as error:  # one target that breaks is not the other targets' fault
            _failed(part, error)
        parts.append(part)
    return parts


def _access(cell: Cell, source: Trained, subset: Subset, shared: Shared) -> Access:
    """What the setting gives the attacker."""
    setting, deployed, goal = cell.setting, source.deployed, cell.threat.goal
    draws = 1 if setting.eot == "auto" else setting.eot
    if setting.kind == "blackbox":
        return Access(deployed, draws=deployed.draws, gradients=False, goal=goal)
    if setting.kind == "transfer":
        losses = source.losses
        access = Access(deployed, draws=draws, losses=losses, knows=False, own=False, goal=goal)
    elif setting.kind == "adaptive":
        access = Access(deployed, draws=draws, losses=source.losses_for(goal), goal=goal)
    else:
        return Access(deployed, losses=source.losses, knows=False, goal=goal)
    if setting.eot == "auto":
        threat = Configured.of(cell.attack).given(cell.threat)
        if threat.eps is None:
            # one of a group of cells must not decide for the others: the dataset does
            budgets = shared.dataset(cell.dataset).eps.get(threat.norm)
            if not budgets:
                raise InputError(
                    f"eot = auto looks at steps within an ε, and {cell.dataset} has none for"
                    f" {threat.norm}; write a number"
                )
            threat = threat.model_copy(update={"eps": budgets[len(budgets) // 2]})
        # the same images for every shard: all of a cell is attacked with as many draws
        x, y = (t[:PROBES].to(shared.device) for t in (subset.x, subset.y))
        seed = derive(cell.seed, cell.attack_key(), "draws")
        with sandboxed(deployed, seed):
            rng = torch.Generator().manual_seed(seed)
            draws, seen = enough_draws(access, x, y, threat, rng)
        access = access.like(draws)
        access.selection = SCORING_DRAWS
        access.notes["eot"] = {"chosen": draws, **seen}
    return access


def _stages(cell: Cell, access: Access, shared: Shared) -> list[Ready]:
    """The stages of a suite, each with the access it has; all that share one count together."""
    dataset = shared.dataset(cell.dataset)
    queries = Access(
        access.deployed,
        draws=access.deployed.draws,
        gradients=False,
        losses=access.losses,
        goal=access.goal,
    )
    oracles: dict[str, Access] = {}
    weights: dict[str, list[str]] = {}
    ready = []
    for stage in cell.stages(shared.models):
        attack = Configured.of(stage.attack)
        source = access if attack.entry.needs == "gradients" else queries
        if stage.oracle:
            if stage.oracle not in oracles:
                trained = shared.deploy(stage.oracle, dataset, cell.train_seed)
                oracles[stage.oracle] = Access(trained.deployed, draws=access.draws, own=False)
            weights[stage.oracle] = list(trained.weights)
            source = oracles[stage.oracle]
        ready.append(Ready(str(stage), attack, source))
    if weights:
        access.notes["suite_weights"] = weights
    return ready


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
    if shared.keep_images:
        part.images = adversarial.detach().float().cpu().numpy()
    same = (adversarial == x).flatten(1).all(dim=1).cpu().numpy()
    if minimal:  # a point beyond ε is no success at this ε: the attacker hands in x itself
        inside = within(lengths, cell.threat)
        adversarial = torch.where(inside.view(-1, 1, 1, 1), adversarial, x)
    deployed = target.deployed
    part.draws = SCORING_DRAWS if deployed.stochastic else 1
    clean_key = (cell.dataset, cell.n, shard, target.keys, cell.defense, cell.seed)
    if clean_key not in shared.clean:
        role = derive(cell.seed, cell.data, cell.defense, shard, "clean")
        shared.clean[clean_key] = score(target, x, y, part.draws, role)
    before = shared.clean[clean_key]._asdict()
    after = score(target, adversarial, y, part.draws, derive(cell.seed, cell.id, shard, "score"))
    part.arrays = {
        **after._asdict(),
        **{f"clean_{name}": values for name, values in before.items()},
        "distance": lengths.cpu().numpy().astype(np.float32),
    }
    part.trace = {**part.trace, "unchanged": same}
    source = shared.deploy(cell.source, shared.dataset(cell.dataset), cell.train_seed)
    part.provenance |= {
        "checkpoints": list(target.keys),
        "weights": list(target.weights),
        "oracle_checkpoints": list(source.keys),
        "oracle_weights": list(source.weights),
        "dataset_hash": shared.dataset(cell.dataset).hash,
        "subset_hash": subset.hash,
        "randomness": list(deployed.randomness),
        "bpda": declared_backwards(deployed),
        "chunk": deployed.chunk,
        "threads": torch.get_num_threads(),
        "shard": len(shards(cell.n, deployed.shape)[0]),
    }


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
    if (images := images_of(parts)) is not None:
        provenance["images"] = images_digest(images)
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


def images_of(parts: Sequence[Part]) -> np.ndarray | None:
    """The x' of a cell from all of its shards, (N, C, H, W); None where one has none."""
    ordered = [part.images for part in sorted(parts, key=lambda part: part.shard)]
    kept = [images for images in ordered if images is not None]
    return np.concatenate(kept) if kept and len(kept) == len(ordered) else None


class Training(NamedTuple):
    """A defense that is needed without a cell. watched: it is trained anew by who needs it, and
    not kept."""

    dataset: str
    defense: str
    train_seed: int = 0
    watched: bool = False


def trainings(
    cells: Iterable[Cell], models: Mapping[str, Trained] = MappingProxyType({})
) -> list[Training]:
    """The defenses that these cells attack or judge, each once. models: as in `Cell.sources`."""
    return list(
        dict.fromkeys(
            Training(cell.dataset, spec, cell.train_seed)
            for cell in cells
            for spec in (*cell.sources(models), cell.defense)
        )
    )


def missing_training(
    cells: Sequence[Cell], shared: Shared, others: Iterable[Training] = ()
) -> dict[str, tuple[str, str, int]]:
    """Checkpoint key -> (dataset, spec, train seed) of all that the cells and others need and no
    folder has, bases before what is built on them; of what is watched the bases alone."""
    jobs: dict[str, tuple[str, str, int]] = {}
    for name, spec, seed, watched in dict.fromkeys((*trainings(cells, shared.models), *others)):
        if spec in shared.models:
            continue
        links = chain(spec, shared.dataset(name), seed)
        for key, text in links[:-1] if watched else links:
            if shared.shelf.find(key) is None:
                jobs[key] = (name, text, seed)
    return jobs


def chain(spec: str, dataset: Dataset, train_seed: int) -> list[tuple[str, str]]:
    """(key, spec) of every checkpoint behind a spec, bases first."""
    links: list[tuple[str, str]] = []
    for defense in resolve(spec):
        if base := defense.base_spec():
            links += chain(str(base), dataset, train_seed)
        links.append((key_of(defense, dataset, train_seed), str(defense.spec)))
    return links


def base_keys(spec: str, dataset: Dataset, train_seed: int) -> list[str]:
    """Keys of the checkpoints that must exist before this one can be trained."""
    return [key for key, _ in chain(spec, dataset, train_seed)][:-1]


def needed_keys(spec: str, cell: Cell, shared: Shared) -> list[str]:
    """Keys of the checkpoints behind the target or the oracle of a cell."""
    if spec in shared.models:
        return []
    return [key for key, _ in chain(spec, shared.dataset(cell.dataset), cell.train_seed)]
