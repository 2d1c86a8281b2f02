"""The pages of papers beside the records, as they must be, with the figures and costs in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from robbench.audit import Audited
from robbench.contributions.beside import Beside
from robbench.errors import InputError
from robbench.papers import load
from robbench.papers.reproduction import Known
from robbench.records import Record, Store
from robbench.rendering import page_files
from robbench.reproducing import Part, begun

PAGES = ("md", "csv", "claims.csv")


class Papers(NamedTuple):
    """texts: of the pages and the CSVs beside them, by path. doubts: a line for what is not what
    would be measured or drawn now. broken: a line for a paper that no page can be made of."""

    texts: dict[Path, str]
    doubts: list[str]
    broken: list[str]


def paper_pages(store: Store, records: Sequence[Record], audits: Mapping[str, Audited]) -> Papers:
    """Of every paper and scale that the folder has anything of; of what is not there but for its
    records, no dataset is read. audits: of all these records."""
    datasets, made = Beside(store, records), Papers({}, [], [])
    for key, scale in begun(store.root):
        stem = store.root / "papers" / f"{key}.{scale}"
        try:
            part = Part(load(key), scale, store.root, datasets.dataset)
            known = Known.of(records, part.least, audits)
            paged = any(stem.with_name(f"{stem.name}.{kind}").exists() for kind in PAGES)
            texts = page_files(part, known) if paged else {}
            doubts = part.doubts(known)
        except InputError as error:
            made.broken.append(str(error))
            continue
        made.texts.update(texts)
        made.doubts.extend(doubts)
    return made
