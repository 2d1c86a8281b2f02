"""A user's own images: train/CLASS/*, test/CLASS/*, in a folder or an archive of it."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from robbench.datasets.dataset import Dataset, Split, hold_out
from robbench.datasets.images import decode, is_image, pixels, reason
from robbench.errors import InputError


class _File(NamedTuple):
    label: str
    name: str
    content: bytes


def folder(path: Path, name: str | None = None) -> Dataset:
    """Images under path/train/CLASS/ and path/test/CLASS/, or in a .tar.gz of that.

    One size for all; a single channel if every image is 8-bit grayscale, else RGB. The first tenth
    of the training images' stratified order is validation. Labels are the sorted class names.
    """
    found: dict[str, list[_File]] = {"train": [], "test": []}
    for split, label, file, content in _files(path):
        found[split].append(_File(label, file, content))
    train_labels, test_labels = ({row.label for row in rows} for rows in found.values())
    if train_labels != test_labels or not train_labels:
        odd = ", ".join(sorted(train_labels ^ test_labels)) or "all"
        raise InputError(
            f"{path} needs images of the same classes in train/CLASS/ and test/CLASS/; "
            f"one of the two has none of: {odd}"
        )
    labels = sorted(train_labels)
    rows = sorted(found["train"]) + sorted(found["test"])
    whole, n = _decoded(rows, labels), len(found["train"])
    learning, test = Split(whole.x[:n], whole.y[:n]), Split(whole.x[n:], whole.y[n:])
    return hold_out(name or f"folder:{path}", learning, test, 10, labels)


def folder_path(name: str) -> Path:
    """PATH of folder:PATH; InputError if there is nothing."""
    text = name.removeprefix("folder:")
    if not text:
        raise InputError("folder: names no path; write folder:PATH")
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; write folder:PATH of a folder or a .tar.gz")
    return path


def _decoded(rows: Sequence[_File], labels: Sequence[str]) -> Split:
    """Bytes (N, C, H, W) of pictures of one size; gray ones become RGB when any has colour."""
    first = decode(rows[0].name, rows[0].content)
    x = np.empty((len(rows), first.height, first.width, 3), dtype=np.uint8)
    coloured = False
    for i, row in enumerate(rows):
        image = decode(row.name, row.content)
        if image.size != first.size:
            sizes = [
                f"{file.name} is {picture.width} x {picture.height}"
                for file, picture in ((rows[0], first), (row, image))
            ]
            raise InputError(f"all images must have one size, but {sizes[0]} and {sizes[1]}")
        coloured |= image.mode == "RGB"
        x[i] = pixels(image)  # one gray channel spreads over three
    planes = torch.from_numpy(x if coloured else x[..., :1]).permute(0, 3, 1, 2)
    return Split(planes, torch.tensor([labels.index(row.label) for row in rows]))


def _files(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """(split, class, file, content) of every image in a folder or an archive."""
    try:
        yield from _archived(path) if path.is_file() else _listed(path)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read as a folder of images or a .tar.gz of one ({reason(error)})"
        ) from error


def _listed(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for split in ("train", "test"):
        for file in sorted(path.glob(f"{split}/*/*")):
            if is_image(file.name):
                yield split, file.parent.name, str(file), file.read_bytes()


def _archived(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Nothing is unpacked to disk. A leading folder, as in images/train/cat/1.png, is skipped."""
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            parts = member.name.split("/")
            if len(parts) < 3 or parts[-3] not in ("train", "test") or not is_image(parts[-1]):
                continue
            content = archive.extractfile(member)
            if content is not None:  # a plain file
                yield parts[-3], parts[-2], f"{path}/{member.name}", content.read()
