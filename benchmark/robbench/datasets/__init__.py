"""Images in [0, 1] with integer labels, in fixed splits, and the fixed subset that is evaluated.

    load("digits")                       # embedded in scikit-learn, needs no file and no network
    load("mnist", Path("data"))          # the four idx files under data/MNIST/raw
    load("cifar10@5000", Path("data"))   # with the first 5,000 training images alone
    load("folder:my/images")             # train/CLASS/*.png, test/CLASS/*.png, or a .tar.gz of it

Layouts, splits and what is kept in memory: docs/datasets.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from robbench.datasets.cifar import cifar10, cifar10_jpeg, cifar100
from robbench.datasets.dataset import (
    LARGE_CONTROL,
    LARGE_EPS,
    SMALL_CONTROL,
    SMALL_EPS,
    Dataset,
    Split,
    Subset,
    first,
    from_tensors,
    stratified_order,
)
from robbench.datasets.embedded import digits
from robbench.datasets.fetching import FETCH, check
from robbench.datasets.idx import fashion_mnist, mnist
from robbench.datasets.ilsvrc import imagenet, tiny_imagenet
from robbench.datasets.image_folder import folder, folder_path
from robbench.errors import InputError, unknown

__all__ = [
    "DATASETS", "FETCH", "LARGE_CONTROL", "LARGE_EPS", "SMALL_CONTROL", "SMALL_EPS",
    "Dataset", "Split", "Subset", "check_name", "fetch", "from_tensors", "kind", "load",
    "stratified_order",
]  # fmt: skip
DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar10-jpeg": cifar10_jpeg,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
    "imagenet": imagenet,
}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset of this name, a key of DATASETS or folder:PATH; later calls return the same.

    NAME@COUNT has the first COUNT training images in their stratified order, a tenth as many for
    validation, and the whole test split.

    `data_dir` is by default $ROBBENCH_DATA, else ~/.cache/robbench/data. Raises InputError when
    files are missing or broken, with what to do about it. tiny-imagenet and imagenet stay on disk,
    whose files are decoded when they are used and reported when they turn out to be broken.
    """
    check_name(name)
    where = _directory(data_dir) if kind(name) in DATASETS else folder_path(name)
    return _load(name, where.absolute())  # folder:images depends on the current folder


def fetch(name: str, data_dir: Path | None = None) -> Path:
    """Download a dataset if it is not there yet, check it, return where it is.

    digits is embedded: the path is that of the file inside scikit-learn. InputError without a
    network, with the folder into which the files can be put by hand, for imagenet, which cannot be
    downloaded, and for what is not the published dataset; a folder:PATH only needs to load.
    """
    check_name(name)
    if kind(name) not in DATASETS:
        load(name)
        return folder_path(name)
    name = kind(name)
    directory = _directory(data_dir).absolute()
    where = FETCH[name](directory)
    check(name, directory, load(name, directory))
    return where


@lru_cache(maxsize=4)  # MNIST takes 220 MB, CIFAR 740 MB
def _load(name: str, where: Path) -> Dataset:
    whole = kind(name)
    if whole not in DATASETS:
        return folder(where, name)
    dataset = DATASETS[whole](where)
    return dataset if name == whole else first(dataset, int(name.partition("@")[2]), name)


def kind(name: str) -> str:
    """What a name is about: `cifar10` of cifar10@5000, `folder` of folder:PATH."""
    return "folder" if name.startswith("folder:") else name.partition("@")[0]


def check_name(name: str, more: Collection[str] = ()) -> None:
    """InputError for what is neither built in nor a folder; `more` are names of plugins."""
    whole, view, count = name.partition("@")
    if name.startswith("folder:"):
        return
    if whole not in DATASETS:
        known = {*DATASETS, *more}
        raise unknown("dataset", name, known, "or folder:PATH for your own images")
    if view and (not count.isdecimal() or int(count) < 1 or count.startswith("0")):
        raise InputError(f"dataset {name}: {count!r} is no number of images; write {whole}@5000")


def _directory(data_dir: Path | None) -> Path:
    if data_dir is not None:
        return data_dir.expanduser()
    variable = os.environ.get("ROBBENCH_DATA")
    return Path(variable).expanduser() if variable else Path.home() / ".cache/robbench/data"
