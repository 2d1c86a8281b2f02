"""The pages of papers beside the records, as they must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from robbench.audit import Audited
from robbench.contributions.beside import Beside
from robbench.papers import load
from robbench.papers.reproduction import Known
from robbench.records import Record, Store
from robbench.reproducing import Part, committed, page_files


def paper_pages(
    store: Store, records: Sequence[Record], audits: Mapping[str, Audited]
) -> dict[Path, str]:
    """Path -> text of the pages of every paper and scale that the folder has; of what is not there
    but for its records, no dataset is read. audits: of all these records."""
    datasets = Beside(store, records)
    found: dict[Path, str] = {}
    for key, scale in committed(store.root):
        part = Part(load(key), scale, store.root, datasets.dataset)
        found |= page_files(part, Known.of(records, part.least, audits))
    return found
