"""What a record is held against: cells as they are made now, datasets, checkpoints, its like."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from robbench import registry
from robbench.attacks import Configured
from robbench.cell import MODEL, Cell
from robbench.checkpoints import key_of, recipe_of, sha256_of
from robbench.datasets import Dataset, kind
from robbench.datasets.described import FACTS, described
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.grid import block, nothing
from robbench.records import Record, Store, without_versions
from robbench.threat import check_budget

EMBEDDED = "digits"  # the dataset that every installation has
Key = tuple[object, ...]  # what it is that records share, and of which cells


@dataclass
class Beside:
    """What a record is held against: datasets, checkpoints, and the other records."""

    store: Store
    records: Collection[Record]
    _datasets: dict[str, Dataset] = field(default_factory=dict)
    _made: dict[Cell, Cell] = field(default_factory=dict)
    _keys: dict[tuple[str, str, int], list[str]] = field(default_factory=dict)

    @cached_property
    def common(self) -> dict[Key, str]:
        """What most of the records say that must all say the same."""
        counted: defaultdict[Key, Counter[str]] = defaultdict(Counter)
        for record in self.records:
            if record.status == "ok":
                for key, value in shared(record):
                    counted[key][value] += 1
        return {key: counts.most_common(1)[0][0] for key, counts in counted.items()}

    @cached_property
    def _checkpoints(self) -> tuple[dict[str, str], list[str]]:
        weights, lines, folder = {}, [], self.store.root / "checkpoints"
        for path in sorted(folder.glob("*.json")):
            try:
                recipe = recipe_of(path)
                sha256 = sha256_of(path.with_suffix(".safetensors"))
                if (recipe["key"], recipe["sha256"]) != (path.stem, sha256):
                    raise ValueError("its key or its SHA-256 differs")
                weights[path.stem] = sha256
            except InputError as error:
                lines.append(str(error))
            except (OSError, ValueError) as error:
                lines.append(f"{path}: the checkpoint is broken ({error}); train it again")
        for path in sorted(folder.glob("*.safetensors")):
            if not path.with_suffix(".json").exists():
                lines.append(f"{path}: the recipe {path.stem}.json is not beside it; add it")
        return weights, lines

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the weights of every sound checkpoint in the folder, by its key."""
        return self._checkpoints[0]

    @property
    def broken(self) -> list[str]:
        return self._checkpoints[1]

    def dataset(self, name: str) -> Dataset:
        """The dataset, without its pixels where they are not part of robbench."""
        if name not in self._datasets:
            registry.is_built_in(name)  # refuses what nobody knows
            known = kind(name) in FACTS and kind(name) != EMBEDDED
            digest = self.common.get(("dataset_hash", name), "")
            self._datasets[name] = described(name, digest) if known else registry.dataset(name)
        return self._datasets[name]

    def keys(self, spec: str, name: str, train_seed: int) -> list[str]:
        """Of the checkpoints behind a defense of today's versions."""
        asked = (spec, name, train_seed)
        if asked not in self._keys:
            dataset = self.dataset(name)
            self._keys[asked] = [key_of(part, dataset, train_seed) for part in resolve(spec)]
        return self._keys[asked]

    def made(self, cell: Cell) -> Cell:
        """A cell as `robbench run` makes it now, with today's versions; n, data, ε and seeds are
        not the cell's. InputError where it would make none, or another one."""
        for text in (cell.defense, cell.setting.oracle or "", cell.dataset):
            if text.startswith((MODEL, "folder:")):
                raise InputError(f"nobody else has {text}")
        self.dataset(cell.dataset).subset(cell.n)
        check_budget(cell.threat.norm, cell.threat.eps)
        if cell.threat.eps is None and cell.threat.norm != "none":
            raise InputError(f"the norm {cell.threat.norm} has no ε")
        eps = cell.threat.eps and Fraction(1)  # any other is as good
        threat = cell.threat.model_copy(update={"eps": eps})
        changes = {"n": 1, "data": "", "threat": threat, "train_seed": 0, "seed": 0}
        alike = cell.model_copy(update=changes)
        if alike not in self._made:
            self._made[alike] = _remade(alike, self.dataset(cell.dataset))
        return self._made[alike]


def shared(record: Record) -> Iterator[tuple[Key, str]]:
    """(key, value) of what records with the same key must have in common."""
    cell, said = record.cell, record.provenance
    yield ("dataset_hash", cell.dataset), str(said.get("dataset_hash"))
    yield ("subset_hash", cell.dataset, cell.data, cell.n), str(said.get("subset_hash"))
    if record.draws == 1 and record.clean_ok is not None and record.clean_err is not None:
        made_of = tuple(str(said.get(name)) for name in ("weights", "device", "versions"))
        defense = (cell.defense, cell.defense_version, cell.train_seed)
        clean = record.clean_ok.tobytes() + record.clean_err.tobytes()
        key = ("clean outcome", cell.dataset, cell.data, cell.n, *defense, *made_of)
        yield key, hashlib.sha256(clean).hexdigest()


def _remade(cell: Cell, dataset: Dataset) -> Cell:
    """The one cell that a grid of this cell's words gives."""
    threat, setting = cell.threat, cell.setting
    suite = Configured.of(cell.attack).entry.suite
    averaged = setting.kind in ("adaptive", "transfer")
    asked = block(
        dataset=cell.dataset,
        n=cell.n,
        defense=[cell.defense],
        attack=[cell.attack],
        norm=[threat.norm],
        eps=None if threat.eps is None else [str(threat.eps)],
        setting=None if suite else [setting.kind],
        oracle=[setting.oracle] if setting.oracle else None,
        eot=setting.eot if averaged else None,
        goal=[threat.goal],
        max_queries=setting.queries,
        target=threat.target,
    )
    cells = [each.model_copy(update={"data": ""}) for each in asked.cells(dataset, None)]
    if not cells:
        raise nothing([asked])
    (made, *more) = cells
    if more:
        raise InputError(f"it is {len(cells)} cells")
    for name in Cell.model_fields:
        was, now = (getattr(without_versions(each), name) for each in (cell, made))
        if was != now:
            raise InputError(f"its {name} is '{was}', where 'robbench run' writes '{now}'")
    if bool(made.setting.suite) != bool(setting.suite):
        raise InputError(f"its suite is {setting.suite!r}, where 'robbench run' writes"
                         f" {made.setting.suite!r}")  # fmt: skip
    return made
