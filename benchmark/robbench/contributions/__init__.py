"""Results that somebody contributes: what is wrong with them, as far as the files alone can tell.

Nothing is run and nothing is fetched. A record must be complete, fit its cell and fit the records
beside it; whether it is what its cell gives is what `robbench verify` finds out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from robbench import registry
from robbench.cell import Cell
from robbench.contributions.beside import Beside, shared
from robbench.contributions.complete import Notes, Provenance, missing
from robbench.contributions.outcome import contradictions, image_problems
from robbench.datasets import Dataset
from robbench.errors import InputError
from robbench.records import (
    Record,
    Store,
    images_file,
    is_temporary,
    newest,
    read,
    versions,
    without_versions,
)

__all__ = ["collect", "image_problems", "problems"]
AGAIN = "run the cell again with this checkout, or leave the record out"


def collect(store: Store) -> tuple[dict[Path, Record], list[str]]:
    """Every record below a folder by its file, and a line for every file that is none."""
    found: dict[Path, Record] = {}
    lines = []
    for path in sorted(store.folder.rglob("*")):
        if path.is_dir() or is_temporary(path):
            continue
        if path.suffix != ".json":
            if path.suffix != ".npz" or not path.with_suffix(".json").exists():
                lines.append(f"{path}: it belongs to no record; remove it")
            continue
        try:
            record = read(path)
        except InputError as error:
            lines.append(str(error))
            continue
        if record is None:
            lines.append(f"{path}: it is of another schema version; {AGAIN}")
        else:
            found[path] = record
    return found, lines


def problems(store: Store, found: Mapping[Path, Record]) -> list[str]:
    """A line for everything that is wrong with the records of a folder and with its checkpoints."""
    beside = Beside(store, found.values())
    lines = list(beside.broken)
    for path, record in found.items():
        if path != store.path(record.cell):
            lines.append(f"{path}: the record belongs to {store.path(record.cell)}; move it there")
        lines += [f"{path}: {text}; {AGAIN}" for text in _record(record, beside)]
        lines += [f"{path}: {text}" for text in image_problems(path, record, _loaded(path, record))]
    return lines + list(_hidden(found))


def _record(record: Record, beside: Beside) -> Iterator[str]:
    """What is wrong with one record."""
    cell = record.cell
    try:
        made = beside.made(cell)
    except InputError as error:
        yield f"the cell cannot be made again ({error})"
        return
    parts = ("defense", "attack", "oracle")
    for name, was, now in zip(parts, versions(cell), versions(made), strict=True):
        if was > now:  # type: ignore[operator]
            yield f"the version of the {name} is newer than that of this checkout"
    if record.status == "failed":
        if not record.reason:
            yield "the cell failed without a reason"
        yield from missing(Notes, record.provenance)
        return
    incomplete = list(missing(Provenance, record.provenance))
    yield from incomplete or _provenance(record, made, beside)
    yield from contradictions(record)


def _provenance(record: Record, made: Cell, beside: Beside) -> Iterator[str]:
    """What contradicts the cell, the checkpoints in the folder, or the other records."""
    cell, said = record.cell, record.provenance
    dataset = beside.dataset(cell.dataset)
    if said["dataset_hash"][:16] != cell.data:
        yield f"the cell's data {cell.data!r} is not the start of its dataset_hash"
        return
    if said["dataset_hash"] != dataset.hash:
        yield f"its {cell.dataset} has another hash than {dataset.hash[:16]}"
        return
    subset = dataset.subset(cell.n).hash  # empty where there are no pixels
    for key, value in shared(record):
        if value != (subset if key[0] == "subset_hash" and subset else beside.common[key]):
            yield f"its {key[0]} is not that of the other records like it"
    if any(part != "none" for part in said["randomness"]) != (record.draws > 1):
        yield f"{record.draws} scoring draws do not fit its randomness"
    current = versions(cell) == versions(made)
    for role, spec in (("", cell.defense), ("oracle_", cell.source)):
        keys, weights = said[f"{role}checkpoints"], said.get(f"{role}weights") or []
        if current and keys != beside.keys(spec, cell.dataset, cell.train_seed):
            yield f"its {role}checkpoints are not the keys of {spec}"
        elif weights and len(weights) != len(keys):
            yield f"it has {len(weights)} {role}weights for {len(keys)} checkpoints"
        elif any(beside.weights.get(k, w) != w for k, w in zip(keys, weights, strict=False)):
            yield f"its {role}weights are not those in {beside.store.root / 'checkpoints'}"
    stages, n = len(said.get("suite", [])), cell.n
    traced = {"suite_lost": (stages, n), "suite_passes": (stages, n), "suite_winner": (n,)}
    shapes = {name: each.shape for name, each in record.trace.items() if name.startswith("suite_")}
    if shapes != (traced if stages else {}):
        yield f"its trace is not that of a suite of {stages} stages"


def _loaded(path: Path, record: Record) -> Dataset | None:
    """The dataset with its pixels, if there are images to hold against it and it is here."""
    if not images_file(path).exists():
        return None
    try:
        dataset = registry.dataset(record.cell.dataset)
    except InputError:
        return None
    return dataset if record.cell.n <= len(dataset.test.y) else None


def _hidden(found: Mapping[Path, Record]) -> Iterator[str]:
    """Failed records of newer versions in front of finished ones, which no page shows any more."""
    path_of = {record.id: path for path, record in found.items()}
    shown: defaultdict[Cell, list[Record]] = defaultdict(list)
    for record in newest(found.values(), without_versions):
        shown[without_versions(record.cell)].append(record)
    for record in found.values():
        front = shown[without_versions(record.cell)]
        if record.status == "ok" and all(each.status == "failed" for each in front):
            yield (
                f"{path_of[front[0].id]}: this failed cell of a newer version hides"
                f" {path_of[record.id]}; run it again, or leave it out"
            )
