"""The pages of papers beside the records, as they must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from robbench.audit import Audited
from robbench.contributions.beside import Beside
from robbench.papers import load
from robbench.papers.reproduction import Known, by_threat
from robbench.records import Record, Store
from robbench.reproducing import Part, committed, page_files


def paper_pages(
    store: Store, records: Sequence[Record], audits: Mapping[str, Audited]
) -> dict[Path, str]:
    """Path -> text of the pages of every paper and scale that the folder has; of what is not there
    but for its records, no dataset is read. audits: of all these records."""
    datasets = Beside(store, records)
    finished = {record.id: record for record in records if record.status == "ok"}
    found: dict[Path, str] = {}
    for key, scale in committed(store.root):
        part = Part(load(key), scale, store.root, datasets.dataset)
        least = part.reproduction.overlay.strongest_n or 1
        found |= page_files(part, Known(finished, audits, by_threat(records, least)))
    return found
