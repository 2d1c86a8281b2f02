"""Downloads into the layouts that the loaders read, and the check against what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from robbench.datasets.dataset import Dataset
from robbench.datasets.idx import IDX_FILES, present
from robbench.datasets.ilsvrc import TINY, TINY_FILES
from robbench.datasets.images import reason
from robbench.errors import InputError

TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
COUNTS = {  # images to learn from, with validation, and test images
    "digits": (1_297, 500),
    "mnist": (60_000, 10_000),
    "fashion-mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar10-jpeg": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny-imagenet": (100_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}
CLASSES = {  # of torchvision, which knows mirrors and checksums
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def check(name: str, directory: Path, dataset: Dataset) -> None:
    """InputError where a dataset is not the published one: MD5s that are known, and counts.

    imagenet may lack its training images. The first 500 images that are evaluated are decoded.
    """
    from torchvision.datasets.utils import calculate_md5

    for file, expected in _checksums(name, directory):
        if file.is_file() and (found := calculate_md5(file)) != expected:
            raise InputError(
                f"{file} is not the published file (MD5 {found} instead of {expected}); "
                "delete it and fetch it again"
            )
    counts = len(dataset.train.y) + len(dataset.validation.y), len(dataset.test.y)
    published = COUNTS[name]
    if counts != published and (name, counts) != ("imagenet", (0, published[1])):
        raise InputError(
            f"{name} has {counts[0]} training and {counts[1]} test images in {directory}, but"
            f" {published[0]} and {published[1]} were published; delete it and fetch it again"
        )
    for i in dataset.order[:500].tolist():
        dataset.test.x[i]


def _embedded(directory: Path) -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"


def _fetch_idx(name: str, directory: Path) -> Path:
    from torchvision import datasets

    raw = directory / CLASSES[name] / "raw"
    if all(present(raw / file).is_file() for file in IDX_FILES):
        return raw  # what is there but broken is reported by the loader, with the file's name
    publisher = getattr(datasets, CLASSES[name])
    hint = f"put {', '.join(IDX_FILES)} by hand into {raw}"
    _download(name, hint, lambda: publisher(str(directory), download=True))
    return raw


def _fetch_cifar(name: str, directory: Path) -> Path:
    from torchvision import datasets

    publisher = getattr(datasets, CLASSES[name])
    root = directory / str(publisher.base_folder)
    if not all(file.is_file() for file, _ in _checksums(name, directory)):
        _fetch_archive(name, directory, publisher.url, publisher.tgz_md5)
    return root


def _fetch_tiny_imagenet(directory: Path) -> Path:
    root = directory / TINY
    if not all((root / file).exists() for file in TINY_FILES):
        _fetch_archive("tiny-imagenet", directory, TINY_URL, TINY_MD5)
    return root


def _fetch_archive(name: str, directory: Path, url: str, md5: str) -> None:
    """Not the classes of torchvision, which would run what is in a pickle."""
    from torchvision.datasets.utils import download_and_extract_archive

    hint = f"unpack {url} by hand into {directory}"
    _download(name, hint, lambda: download_and_extract_archive(url, str(directory), md5=md5))


def _download(name: str, hint: str, download: Callable[[], object]) -> None:
    try:
        download()
    except (RuntimeError, OSError, EOFError, HTTPException) as error:  # URLError is an OSError
        raise InputError(f"{name} could not be downloaded ({reason(error)}); {hint}") from error


def _by_hand(name: str, directory: Path) -> Path:
    return directory / name  # whose loader says what to put there


def _checksums(name: str, directory: Path) -> Iterator[tuple[Path, str]]:
    """(file, MD5) of what torchvision knows: packed idx files, CIFAR's batches."""
    from torchvision import datasets

    publisher: Any = getattr(datasets, CLASSES.get(name, ""), None)
    if hasattr(publisher, "resources"):
        for file, md5 in publisher.resources:
            yield directory / CLASSES[name] / "raw" / file, md5
    elif publisher is not None:
        meta = publisher.meta["filename"], publisher.meta["md5"]
        for file, md5 in [*publisher.train_list, *publisher.test_list, meta]:
            yield directory / publisher.base_folder / file, md5


FETCH: dict[str, Callable[[Path], Path]] = {
    "digits": _embedded,
    "mnist": partial(_fetch_idx, "mnist"),
    "fashion-mnist": partial(_fetch_idx, "fashion-mnist"),
    "cifar10": partial(_fetch_cifar, "cifar10"),
    "cifar10-jpeg": partial(_by_hand, "cifar10-jpeg"),
    "cifar100": partial(_fetch_cifar, "cifar100"),
    "tiny-imagenet": _fetch_tiny_imagenet,
    "imagenet": partial(_by_hand, "imagenet"),
}
