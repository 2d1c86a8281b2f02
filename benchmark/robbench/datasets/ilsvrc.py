"""ImageNet and Tiny ImageNet: files that stay on disk and are decoded when they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from robbench.datasets.dataset import Dataset, Split, hold_out, require
from robbench.datasets.images import ImageFiles, is_image, reason
from robbench.errors import InputError

TINY = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"
TINY_FILES = ("wnids.txt", "train", "val/images", ANNOTATIONS)
WHERE = (
    "ILSVRC 2012 from https://image-net.org/download.php there as train/WNID/*.JPEG and"
    " val/WNID/*.JPEG (val alone is enough to evaluate)"
)
Listed = list[tuple[str, int]]  # (file relative to the root, label)


def tiny_imagenet(directory: Path) -> Dataset:
    """Tiny ImageNet, 3 x 64 x 64, 200 labels (Stanford CS231n), from directory/tiny-imagenet-200.

    Labels are the sorted WordNet ids, called by their words where words.txt is there. Test are the
    10,000 labelled images of val/; the first twentieth of the training images' stratified order is
    validation: 5,000 of 100,000.
    """
    root = directory / TINY
    require("tiny-imagenet", directory, root, TINY_FILES, f"the unpacked {TINY}.zip")
    wnids = sorted(_text(root / "wnids.txt").split())
    words = {}
    if (root / "words.txt").exists():
        rows = (line.split("\t") for line in _text(root / "words.txt").splitlines())
        words = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    learning, test = (
        _split(root, listed, _whole, (64, 64))
        for listed in (_classes(root, "train/{}/images", wnids), _annotated(root, wnids))
    )
    names = [words.get(wnid, wnid) for wnid in wnids]
    return hold_out("tiny-imagenet", learning, test, 20, names)


def imagenet(directory: Path) -> Dataset:
    """ImageNet, ILSVRC 2012 (Russakovsky et al. 2015, arXiv:1409.0575), from directory/imagenet.

    train/WNID/*.JPEG and val/WNID/*.JPEG, resized to 256 and cropped to the central 224 x 224 as
    torchvision's weights expect it; labels are the sorted WordNet ids, in the order of these
    weights. Test is val; the first 25th of the training images' stratified order is validation.
    Without train/ there is only a test split, which is another dataset: its hash differs.
    """
    root = directory / "imagenet"
    if not (root / "val").exists():
        raise InputError(f"imagenet: val not found in {root}; it cannot be fetched, so put {WHERE}")
    wnids = _folders(root / "val")
    training: Listed = []
    if (root / "train").exists():
        if odd := set(_folders(root / "train")) ^ set(wnids):
            raise InputError(f"{root}: one of train and val has no folder {min(odd)}; add it")
        training = _classes(root, "train/{}", wnids)
    learning, test = (
        _split(root, listed, _central, (224, 224))
        for listed in (training, _classes(root, "val/{}", wnids))
    )
    return hold_out("imagenet", learning, test, 25, wnids)


def _whole(image: Image.Image) -> Image.Image:
    return image


def _central(image: Image.Image) -> Image.Image:
    from torchvision.transforms import functional

    return functional.center_crop(functional.resize(image, [256]), [224])


def _split(
    root: Path, listed: Listed, prepare: Callable[[Image.Image], Image.Image], size: tuple[int, int]
) -> Split:
    files = ImageFiles(root, [file for file, _ in listed], prepare, size)
    return Split(files, torch.tensor([label for _, label in listed], dtype=torch.int64))


def _classes(root: Path, pattern: str, wnids: Sequence[str]) -> Listed:
    """The images of every class in the folder pattern.format(wnid)."""
    return [
        (f"{pattern.format(wnid)}/{file}", label)
        for label, wnid in enumerate(wnids)
        for file in _images(root / pattern.format(wnid))
    ]


def _annotated(root: Path, wnids: Sequence[str]) -> Listed:
    """The images of val/images with the labels of the annotations: file, WordNet id, box."""
    rows = [line.split("\t")[:2] for line in _text(root / ANNOTATIONS).splitlines()]
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    for row in rows:
        if len(row) != 2 or row[1] not in labels:
            raise InputError(f"{root / ANNOTATIONS} has a line {row!r} without a known label")
    annotated = {file: labels[wnid] for file, wnid in rows}
    files = _images(root / "val/images")
    if odd := annotated.keys() ^ set(files):
        raise InputError(
            f"{root}: {min(odd)} is only in one of val/images and {ANNOTATIONS}, {len(odd)} in all;"
            " delete the folder and fetch it again"
        )
    return [(f"val/images/{file}", annotated[file]) for file in files]


def _images(folder: Path) -> list[str]:
    """Sorted names of the images in a folder, at least one."""
    found = sorted(name for name in _names(folder) if is_image(name))
    if not found:
        raise InputError(f"{folder} holds no images; delete its dataset and fetch it again")
    return found


def _folders(folder: Path) -> list[str]:
    found = sorted(name for name in _names(folder) if name.startswith("n"))
    if not found:
        raise InputError(f"{folder} has no folders of WordNet ids; put {WHERE}")
    return found


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({reason(error)})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({reason(error)})") from error
