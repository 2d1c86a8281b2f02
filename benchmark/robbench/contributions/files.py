"""The files of a leaderboard folder beside its records: what nothing here writes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from robbench.contributions.pages import PAGES
from robbench.figures.gallery import data_of, files_of
from robbench.papers import load
from robbench.records import Store, is_temporary
from robbench.reproducing import begun

CHECKPOINT = re.compile(r"[0-9a-f]{64}\.(json|safetensors)|\.[0-9a-f]{64}\.partial")
GRIDS = (".yaml", ".yml")  # which people write, for `robbench run --grid`


def file_problems(store: Store, pages: Collection[Path]) -> list[str]:
    """A line for every file that is neither raw data nor written by `robbench leaderboard` or
    `reproduce`. pages: what the former writes."""
    known = set(pages)
    for key, scale in begun(store.root):
        kinds = (*PAGES, "costs.json")
        known |= {store.root / "papers" / f"{key}.{scale}.{kind}" for kind in kinds}
        for name, figure in load(key).figures.items():
            if figure.draw:
                known.update(files_of(figure, data_of(store.root, key, scale, name)))
    return [
        f"{path}: nothing here writes it; remove it"
        for path in sorted(store.root.rglob("*"))
        if not path.is_dir() and path not in known and not _raw(path, store)
    ]


def _raw(path: Path, store: Store) -> bool:
    """A record or what lies among them, a checkpoint, a grid, or what is just being written: looked
    at elsewhere, or not at all."""
    if is_temporary(path) or store.folder in path.parents:
        return True
    if path.parent == store.root / "checkpoints":
        return CHECKPOINT.fullmatch(path.name) is not None
    return path.parent == store.root and path.suffix in GRIDS
