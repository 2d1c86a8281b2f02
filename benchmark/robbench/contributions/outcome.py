"""What a record says of its images, and the images themselves, held against the threat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from robbench.attacks import Configured
from robbench.datasets import Dataset
from robbench.errors import InputError
from robbench.judge import Violation, check_trace
from robbench.records import Record, images_digest, images_file, read_images
from robbench.threat import distance, format_eps, within


def contradictions(record: Record) -> Iterator[str]:
    """What no attack within the threat, and no judge, can have left."""
    cell, lengths = record.cell, record.distance
    assert lengths is not None and record.ok is not None and record.err is not None
    threat, minimal = cell.threat, Configured.of(cell.attack).entry.minimal
    if (bad := ~(np.isfinite(lengths) & (lengths >= 0))).any():
        yield f"the distance is no length for {_images(bad)}"
        return
    outside = ~within(torch.tensor(lengths), threat).numpy()
    if outside.any() and not minimal and threat.norm != "none":
        yield f"x' is farther than ε = {format_eps(threat.eps)} in {_images(outside)}"
    elif threat.norm in ("linf", "none") and (bad := lengths > 1).any():
        yield f"x' cannot be in the box [0, 1] in {_images(bad)}"
    elif threat.norm == "l0" and (bad := lengths % 1 != 0).any():
        yield f"the distance is no number of pixels in {_images(bad)}"
    for prefix in ("", "clean_"):
        best = getattr(record, f"{prefix}best")
        ok, err = (getattr(record, f"{prefix}{name}").astype(int) for name in ("ok", "err"))
        if best is not None and (bad := (best < ok) | (best + err > record.draws)).any():
            yield f"{prefix}best does not fit {prefix}ok and {prefix}err in {_images(bad)}"
    try:
        check_trace(record.trace, cell.n)
        unchanged = record.trace["unchanged"].astype(bool).reshape(cell.n)
    except (Violation, KeyError, ValueError) as error:
        yield f"the trace is not complete ({error})"
        return
    if (bad := unchanged != (lengths == 0)).any():
        yield f"unchanged contradicts the distance in {_images(bad)}"
        return
    itself = unchanged | outside if minimal else unchanged  # the judge was given x
    bad = itself & ((record.ok != record.clean_ok) | (record.err != record.clean_err))
    if record.draws == 1 and bad.any():
        yield f"the same x was judged in two ways in {_images(bad)}"


def _images(mask: np.ndarray) -> str:
    first = int(mask.argmax())
    return f"{int(mask.sum())} images, first {first}" if mask.sum() > 1 else f"image {first}"


def image_problems(path: Path, record: Record, dataset: Dataset | None) -> Iterator[str]:
    """What is wrong with the x' beside a record, if it is there. dataset: None to leave distances
    out."""
    file, expected = images_file(path), record.provenance.get("images")
    if not file.exists():
        return
    if expected is None:
        yield f"the record knows of no {file.name}; remove it"
        return
    try:
        images = read_images(file)
    except InputError as error:
        yield str(error)
        return
    remedy = f"delete {file.name}, or run the cell again with --keep-images"
    if images_digest(images) != expected:
        yield f"the SHA-256 of {file.name} is not that of the record; {remedy}"
    elif images.ndim != 4 or len(images) != record.cell.n:
        yield f"{file.name} has the shape {images.shape}, for n = {record.cell.n}; {remedy}"
    elif not (np.isfinite(images).all() and (images >= 0).all() and (images <= 1).all()):
        yield f"{file.name} is not within the box [0, 1]; {remedy}"
    elif dataset is not None and record.distance is not None:
        x = dataset.subset(record.cell.n).x
        if images.shape != tuple(x.shape):
            yield f"{file.name} has the shape {images.shape}, not {tuple(x.shape)}; {remedy}"
            return
        lengths = distance(torch.from_numpy(images), x[:], record.cell.threat.norm).numpy()
        if (bad := ~np.isclose(lengths, record.distance, rtol=1e-5, atol=1e-6)).any():
            yield f"{file.name} has other distances than the record in {_images(bad)}; {remedy}"
