"""The files of a leaderboard folder beside its records: what nothing here writes, what is missing,
and plots that are none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from robbench.contributions.pages import PAGES
from robbench.figures.gallery import data_of, files_of
from robbench.papers import load
from robbench.records import Store, is_temporary
from robbench.reproducing import begun

CHECKPOINT = re.compile(r"[0-9a-f]{64}\.(json|safetensors)|\.[0-9a-f]{64}\.partial")
GRIDS = (".yaml", ".yml")  # which people write, for `robbench run --grid`


def file_problems(store: Store, pages: Collection[Path]) -> list[str]:
    """A line for every file that is neither raw data nor written by `robbench leaderboard` or
    `reproduce`, and for all that is missing or broken of a figure. pages: what the former writes.
    """
    known, lines = set(pages), []
    for key, scale in begun(store.root):
        kinds = (*PAGES, "costs.json")
        known |= {store.root / "papers" / f"{key}.{scale}.{kind}" for kind in kinds}
        for name, figure in load(key).figures.items():
            if not figure.draw:
                continue
            files = files_of(figure, data_of(store.root, key, scale, name))
            known.update(files)
            if any(file.exists() for file in files):
                again = f"run 'robbench reproduce {key}:{name} --scale {scale}'"
                lines += [f"{line}; {again}" for line in _incomplete(files)]
    return lines + [
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


def _incomplete(files: Collection[Path]) -> Iterator[str]:
    """What is missing of a figure, and plots that cannot be shown."""
    for file in files:
        if not file.exists():
            yield f"{file}: it is missing"
        elif file.suffix in (".svg", ".png") and not _shows(file):
            yield f"{file}: it is no {file.suffix[1:].upper()}"


def _shows(file: Path) -> bool:
    """Whether a plot is what its name says, whole."""
    try:
        if file.suffix == ".svg":
            return ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):  # ParseError is a SyntaxError, as is Pillow's
        return False
