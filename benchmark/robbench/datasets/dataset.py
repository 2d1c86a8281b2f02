"""Datasets in memory: three splits, the fixed order of their images, the subset that is evaluated.

Every split and every subset comes from `stratified_order`, never from today's shuffle: the first n
test images are the same for everybody, which is what paired tests need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.datasets.images import ImageFiles
from robbench.errors import InputError

# Default budgets. linf and l2 are the literature's. l1 is ours, since no common list exists: eps
# is the number of pixel values that can go all the way from 0 to 1.
SMALL_EPS = {
    "linf": tuple(Fraction(k, 20) for k in (1, 2, 4, 6)),  # 0.05, 0.1, 0.2, 0.3
    "l2": tuple(Fraction(k, 2) for k in (1, 2, 3, 4)),  # 0.5, 1, 1.5, 2
    "l1": tuple(Fraction(k) for k in (2, 4, 8, 12)),
}
LARGE_EPS = {
    "linf": tuple(Fraction(k, 255) for k in (2, 4, 8, 16)),
    "l2": tuple(Fraction(k, 4) for k in (1, 2, 4, 8)),  # 0.25, 0.5, 1, 2
    "l1": tuple(Fraction(k) for k in (6, 12, 24, 48)),
}
SMALL_CONTROL = Fraction(1, 2)
LARGE_CONTROL = Fraction(32, 255)


class Split(NamedTuple):
    x: Tensor  # float32 (N, C, H, W) in [0, 1]; of large datasets ImageFiles, decoded when used
    y: Tensor  # int64 (N,)


class Subset(NamedTuple):
    ids: NDArray[np.int64]  # (n,) positions in the test split
    x: Tensor  # float32 (n, C, H, W) in [0, 1]
    y: Tensor  # int64 (n,)
    hash: str  # SHA-256 of the dataset's name and the ids


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset in its three splits, each of which may be empty but for the test split."""

    name: str
    train: Split
    validation: Split
    test: Split
    labels: tuple[str, ...]  # label y is called labels[y]
    eps: Mapping[str, tuple[Fraction, ...]]  # norm -> the default list, ascending
    control: Fraction  # linf eps at which an undefended network must reach 0 %

    def __repr__(self) -> str:
        parts = ("train", self.train), ("validation", self.validation), ("test", self.test)
        sizes = ", ".join(f"{len(split.y)} {name}" for name, split in parts)
        return f"<Dataset {self.name}: {sizes} images of {self.shape}, {len(self.labels)} labels>"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.test.x.shape[1:]
        return c, h, w

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all splits' shapes, pixels and labels, and of the label names.

        For images that stay files, their names and sizes in bytes stand for the pixels.
        """
        digest = hashlib.sha256("\0".join(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.x.shape)).encode())
            if isinstance(split.x, ImageFiles):
                digest.update(split.x.listing().encode())
            else:
                digest.update(np.ascontiguousarray(split.x.numpy(), dtype="<f4").data)
            digest.update(np.ascontiguousarray(split.y.numpy(), dtype="<i8").data)
        return digest.hexdigest()

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The fixed order in which test images are evaluated, (N,) positions."""
        return stratified_order(self.test.y.numpy())

    def subset(self, n: int) -> Subset:
        """The first n test images of the fixed stratified order: n = 500 is the start of 1,000."""
        self.check_count(n)
        ids = self.order[:n].copy()
        digest = hashlib.sha256(self.name.encode() + b"\0" + ids.astype("<i8").tobytes())
        return Subset(ids, *take(self.test, ids), digest.hexdigest())

    def check_count(self, n: int) -> None:
        """InputError where there are no n test images."""
        size = len(self.test.y)
        if n > size:
            raise InputError(
                f"n = {n}, but the test split of {self.name} has {size} images; "
                f"write -n {size} or less"
            )
        if n < 1:
            raise InputError(f"n = {n}, but at least one image is needed; write -n 1 to -n {size}")


def stratified_order(y: NDArray[np.integer[Any]], seed: int = 0) -> NDArray[np.int64]:
    """A permutation of N images, (N,), whose every prefix has the class shares of the whole.

    Within a class the order is random; the image of rank r among the m of its class comes at
    (r + 0.5) / m, ties by class. RandomState and not Generator: its stream is frozen, so that the
    splits and the ids of published records stay what they are under any version of NumPy.
    """
    y = np.asarray(y)
    random = np.random.RandomState(seed)
    position = np.empty(len(y), dtype=np.float64)
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((y, position)).astype(np.int64)


def take(split: Split, ids: NDArray[np.int64] | Sequence[int] | range) -> Split:
    """The images of these ids, a copy; bytes become floats in [0, 1], files stay files."""
    index = torch.as_tensor(ids, dtype=torch.int64)
    if isinstance(split.x, ImageFiles):
        return Split(split.x.pick(index), split.y[index])
    x = split.x[index]
    if x.dtype == torch.uint8:
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return Split(x, split.y[index])


def hold_out(
    name: str,
    learning: Split,
    test: Split,
    part: int,
    labels: Sequence[str],
    *,
    eps: Mapping[str, tuple[Fraction, ...]] = LARGE_EPS,
    control: Fraction = LARGE_CONTROL,
) -> Dataset:
    """The Dataset whose validation split is 1/part of the learning images, the first in their
    stratified order. x of both splits may also be uint8 (N, C, H, W), which is divided by 255."""
    if len(labels) < 2:
        raise InputError(f"{name} has only the label {', '.join(labels)}; two are needed at least")
    order = stratified_order(learning.y.numpy())
    held_out = len(order) // part
    return Dataset(
        name,
        train=take(learning, order[held_out:]),
        validation=take(learning, order[:held_out]),
        test=take(test, range(len(test.y))),
        labels=tuple(labels),
        eps=eps,
        control=control,
    )


def first(dataset: Dataset, count: int, name: str) -> Dataset:
    """The dataset with the first `count` of its training images and a tenth as many for validation,
    in their order: so few in every class. InputError for more than there are."""
    have = len(dataset.train.y)
    if count > have:
        raise InputError(
            f"{name}: {dataset.name} has {have} training images;"
            f" write {dataset.name}@{have} or less"
        )
    return replace(shortened(dataset, count, max(1, count // 10)), name=name)


def shortened(dataset: Dataset, count: int, held_out: int) -> Dataset:
    """The dataset with the first `count` images for training and `held_out` for validation, or as
    many as there are."""
    validation = take(dataset.validation, range(min(held_out, len(dataset.validation.y))))
    return replace(dataset, train=take(dataset.train, range(count)), validation=validation)


def require(name: str, directory: Path, folder: Path, files: Iterable[str], put: str) -> None:
    """InputError where one of these files or folders is missing, with what to do about it."""
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise InputError(
            f"{name}: {', '.join(missing)} not found in {folder}; "
            f"write 'robbench data {name} --data-dir {directory}', or put {put} there"
        )


def from_tensors(
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    name: str = "tensors",
    *,
    labels: Sequence[str] | None = None,
    eps: Mapping[str, tuple[Fraction, ...]] = LARGE_EPS,
    control: Fraction = LARGE_CONTROL,
) -> Dataset:
    """A user's own evaluation data as a test split; train and validation stay empty.

    x (N, C, H, W): floats in [0, 1], or uint8, which is divided by 255. y (N,): integers from 0.
    `labels` names the classes, by default "0" up to the largest y. InputError for anything else.
    """
    pixels = _checked_pixels(torch.as_tensor(x).detach().cpu())
    target = _checked_labels(torch.as_tensor(y).detach().cpu(), len(pixels))
    classes = int(target.max()) + 1
    names = tuple(labels) if labels is not None else tuple(str(label) for label in range(classes))
    if len(names) < classes:
        raise InputError(f"y holds the label {classes - 1}, but only {len(names)} labels are named")
    test = Split(pixels, target)
    return Dataset(name, take(test, []), take(test, []), test, names, eps, control)


def _checked_pixels(x: Tensor) -> Tensor:
    """float32 (N, C, H, W) in [0, 1], a copy."""
    if x.ndim != 4 or x.numel() == 0:
        raise InputError(f"x has shape {tuple(x.shape)}; need (N, C, H, W), none of them 0")
    if x.dtype == torch.uint8:
        return x.to(torch.float32) / 255
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; need floats in [0, 1] or uint8 (divided by 255)")
    if not torch.isfinite(x).all():
        raise InputError("x holds NaN or infinite values; need floats in [0, 1]")
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise InputError(
            f"x reaches from {low:g} to {high:g}; need floats in [0, 1], without normalisation "
            "(the defense does it), or uint8"
        )
    return x.to(torch.float32, copy=True).contiguous()


def _checked_labels(y: Tensor, n: int) -> Tensor:
    """int64 (N,), a copy."""
    if y.ndim != 1:
        raise InputError(f"y has shape {tuple(y.shape)}; need one integer label per image, ({n},)")
    if len(y) != n:
        raise InputError(f"x has {n} images, but y has {len(y)} labels")
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise InputError(f"y is {y.dtype}; need integer labels")
    target = y.to(torch.int64, copy=True)
    if int(target.min()) < 0:
        raise InputError(f"y holds the label {int(target.min())}; labels start at 0")
    return target
