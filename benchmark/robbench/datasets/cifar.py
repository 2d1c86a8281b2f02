"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): pickles, read without running what is in them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from robbench.datasets.dataset import Dataset, Split, hold_out, require
from robbench.datasets.image_folder import folder
from robbench.datasets.images import reason
from robbench.errors import InputError

SIZE = (3, 32, 32)
# what a pickled array is made of, as old and as new versions of NumPy write it
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


def cifar10(directory: Path) -> Dataset:
    """CIFAR-10, 3 x 32 x 32, from directory/cifar-10-batches-py.

    The first tenth of the training images' stratified order is validation: 5,000 of 50,000.
    """
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    root = directory / "cifar-10-batches-py"
    require("cifar10", directory, root, [*batches, "test_batch", "batches.meta"], "all batches")
    names = _names(root / "batches.meta", "label_names")
    learning = [_batch(root / batch, "labels", len(names)) for batch in batches]
    x, y = (torch.cat(parts) for parts in zip(*learning, strict=True))
    test = _batch(root / "test_batch", "labels", len(names))
    return hold_out("cifar10", Split(x, y), test, 10, names)


def cifar10_jpeg(directory: Path) -> Dataset:
    """CIFAR-10 re-encoded as JPEG: directory/cifar10-jpeg.tar.gz, or a folder cifar10-jpeg, with
    train/CLASS/* and test/CLASS/*. Its own dataset: compression takes what attacks look for."""
    found = (directory / "cifar10-jpeg.tar.gz", directory / "cifar10-jpeg")
    for path in found:
        if path.exists():
            return folder(path, "cifar10-jpeg")
    put = "an image folder with train/CLASS/* and test/CLASS/*, or a .tar.gz of it"
    raise InputError(f"cifar10-jpeg: neither {found[0]} nor {found[1]} is there; put {put} there")


def cifar100(directory: Path) -> Dataset:
    """CIFAR-100 with its 100 fine labels, 3 x 32 x 32, from directory/cifar-100-python.

    Split like CIFAR-10.
    """
    root = directory / "cifar-100-python"
    require("cifar100", directory, root, ["train", "test", "meta"], "these files")
    names = _names(root / "meta", "fine_label_names")
    learning, test = (_batch(root / file, "fine_labels", len(names)) for file in ("train", "test"))
    return hold_out("cifar100", learning, test, 10, names)


class _Rebuilt:
    """Stands for an array or its type: NumPy is not called with what a file says."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """The array of bytes; ValueError or TypeError for anything else."""
        _, shape, kind, fortran, values = self.state
        if kind.arguments[0] not in ("u1", "|u1"):
            raise ValueError(f"pixels of the type {kind.arguments[0]!r} instead of bytes")
        content = values.encode("latin1") if isinstance(values, str) else values
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Plain(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and arrays of bytes, and nothing else."""

    def find_class(self, module: str, name: str) -> type[_Rebuilt]:
        if (module, name) not in ARRAYS:
            raise _Code(f"{module}.{name}")
        return _Rebuilt


class _Code(Exception):
    """A pickle that would run something."""


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = _Plain(stream, encoding="latin1").load()
    except _Code as error:
        raise InputError(
            f"{file} would run {error} when read, which no CIFAR file does, and was not read; "
            "delete it and fetch it again"
        ) from None
    except Exception as error:  # broken pickles raise a dozen types
        _broken(file, reason(error))
    if not isinstance(content, dict):
        _broken(file, f"it holds {type(content).__name__} instead of a dictionary")
    return content


def _batch(file: Path, key: str, labels: int) -> Split:
    """Images (N, 3, 32, 32) as bytes and their labels, int64 (N,)."""
    content = _read(file)
    try:
        x = content["data"].array()
        y = np.array(content[key], dtype=np.int64)
        x = x.reshape(len(x), *SIZE)  # rows of 3072: red, green, blue
    except Exception as error:  # as above: whatever a file of another kind leads to
        _broken(file, reason(error))
    if len(x) != len(y):
        _broken(file, f"{len(x)} images, but {len(y)} labels")
    if len(y) == 0 or y.min() < 0 or y.max() >= labels:
        _broken(file, f"no labels, or others than 0 to {labels - 1}")
    return Split(torch.from_numpy(x.copy()), torch.from_numpy(y))


def _names(file: Path, key: str) -> Sequence[str]:
    names = _read(file).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        _broken(file, f"no list of names under {key!r}")
    return names


def _broken(file: Path, why: str) -> NoReturn:
    raise InputError(f"{file} is not a complete CIFAR file ({why}); delete it and fetch it again")
