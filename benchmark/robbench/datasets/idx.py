"""MNIST and Fashion-MNIST: four idx files, 28 x 28 gray pixels, ten labels."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robbench.datasets.dataset import (
    SMALL_CONTROL,
    SMALL_EPS,
    Dataset,
    Split,
    hold_out,
    require,
)
from robbench.datasets.embedded import TEN
from robbench.errors import InputError

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def mnist(directory: Path) -> Dataset:
    """MNIST, 28 x 28 (LeCun et al. 1998), from directory/MNIST/raw.

    The first twelfth of the training images' stratified order is validation: 5,000 of 60,000.
    """
    return _idx_dataset("mnist", directory, directory / "MNIST" / "raw", TEN)


def fashion_mnist(directory: Path) -> Dataset:
    """Fashion-MNIST, 28 x 28 (Xiao et al. 2017, arXiv:1708.07747), from directory/FashionMNIST/raw.

    Split like MNIST.
    """
    return _idx_dataset("fashion-mnist", directory, directory / "FashionMNIST" / "raw", CLOTHES)


def present(file: Path) -> Path:
    """The file, or its .gz where only that is there."""
    packed = file.with_name(f"{file.name}.gz")
    return packed if not file.is_file() and packed.is_file() else file


def _idx_dataset(name: str, directory: Path, raw: Path, labels: Sequence[str]) -> Dataset:
    files = [present(raw / file) for file in IDX_FILES]
    require(name, directory, raw, [file.name for file in files], "the four idx files")
    learning, test = (_read_pair(files[i], files[i + 1]) for i in (0, 2))
    if learning.x.shape[1:] != test.x.shape[1:]:
        raise InputError(f"{name}: images in {raw} differ in size between train and t10k")
    return hold_out(name, learning, test, 12, labels, eps=SMALL_EPS, control=SMALL_CONTROL)


def _read_pair(images: Path, labels: Path) -> Split:
    """Images (N, 1, H, W) and labels of an idx pair, as bytes and int64."""
    x, y = _read_idx(images, 3), _read_idx(labels, 1)
    if len(x) != len(y):
        raise InputError(f"{images} has {len(x)} images, but {labels} has {len(y)} labels")
    if len(y) == 0 or int(y.max()) > 9:
        raise InputError(f"{labels} holds no labels, or others than 0 to 9")
    return Split(x[:, None], y.to(torch.int64))


def _read_idx(file: Path, dimensions: int) -> Tensor:
    """uint8 of so many dimensions; InputError naming a file that is broken.

    The format: two zeros, the type (8: bytes), the number of dimensions, these as big-endian
    32-bit integers, the values.
    """
    start = 4 + 4 * dimensions
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        shape = struct.unpack(f">{dimensions}I", content[4:start])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise _broken(file, type(error).__name__) from error
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise _broken(file, f"it starts with {content[:4]!r}")
    if len(content) - start != math.prod(shape):
        raise _broken(file, f"{len(content) - start} bytes of values instead of {math.prod(shape)}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _broken(file: Path, why: str) -> InputError:
    return InputError(f"{file} is not a complete idx file ({why}); delete it and fetch it again")
