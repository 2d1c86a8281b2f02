"""Images in [0, 1] with integer labels, in fixed splits, and the fixed subset that is evaluated.

    load("digits")                       # embedded in scikit-learn, needs no file and no network
    load("mnist", Path("data"))          # the four idx files under data/MNIST/raw
    load("folder:my/images")             # train/CLASS/*.png, test/CLASS/*.png, or a .tar.gz of it

Every split and every subset comes from `stratified_order`, never from today's shuffle: the first n
test images are the same for everybody, which is what paired tests need.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robbench.errors import InputError, unknown

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
TEN = tuple(str(digit) for digit in range(10))
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MODES = ("L", "RGB", "1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr")  # Pillow's with 8 bits or less


class Split(NamedTuple):
    x: Tensor  # float32 (N, C, H, W) in [0, 1]
    y: Tensor  # int64 (N,)


class Subset(NamedTuple):
    ids: NDArray[np.int64]  # (n,) positions in the test split
    x: Tensor  # float32 (n, C, H, W) in [0, 1]
    y: Tensor  # int64 (n,)
    hash: str  # SHA-256 of the dataset's name and the ids


class _Picture(NamedTuple):
    label: str
    file: str
    pixels: NDArray[np.uint8]  # (H, W, 1 or 3)


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.test.x.shape[1:]
        return c, h, w

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all splits' shapes, pixels and labels, and of the label names."""
        digest = hashlib.sha256("\0".join(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.x.shape)).encode())
            digest.update(np.ascontiguousarray(split.x.numpy(), dtype="<f4").data)
            digest.update(np.ascontiguousarray(split.y.numpy(), dtype="<i8").data)
        return digest.hexdigest()

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The fixed order in which test images are evaluated, (N,) positions."""
        return stratified_order(self.test.y.numpy())

    def subset(self, n: int) -> Subset:
        """The first n test images of the fixed stratified order: n = 500 is the start of 1,000."""
        size = len(self.test.y)
        if n > size:
            raise InputError(
                f"n = {n}, but the test split of {self.name} has {size} images; "
                f"write -n {size} or less"
            )
        if n < 1:
            raise InputError(f"n = {n}, but at least one image is needed; write -n 1 to -n {size}")
        ids = self.order[:n].copy()
        digest = hashlib.sha256(self.name.encode() + b"\0" + ids.astype("<i8").tobytes())
        return Subset(ids, *_take(self.test, ids), digest.hexdigest())


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


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset of this name, kept in memory: digits, mnist, or folder:PATH.

    `data_dir` is by default $ROBBENCH_DATA, else ~/.cache/robbench/data. Raises InputError when
    files are missing or broken, with what to do about it.
    """
    check_name(name)
    where = _directory(data_dir) if name in DATASETS else _folder_path(name)
    return _load(name, where.absolute())  # folder:images depends on the current folder


def fetch(name: str, data_dir: Path | None = None) -> Path:
    """Download a dataset if it is not there yet, check that it can be read, return where it is.

    digits is embedded: the path is that of the file inside scikit-learn. InputError without a
    network, with the folder into which the files can be put by hand.
    """
    check_name(name)
    where = FETCH[name](_directory(data_dir)) if name in FETCH else _folder_path(name)
    load(name, data_dir)
    return where


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
    return Dataset(name, _take(test, []), _take(test, []), test, names, eps, control)


def digits(directory: Path) -> Dataset:
    """1,797 scans of 8 x 8 pixels in 17 gray levels (Alpaydin & Kaynak 1998, from scikit-learn).

    Test, validation and train are the first 500, the next 200 and the last 1,097 images of the
    stratified order. `directory` is not read.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32) / 16)[:, None]  # (1797, 1, 8, 8)
    whole = Split(x, torch.from_numpy(bunch.target.astype(np.int64)))
    order = stratified_order(bunch.target)
    return Dataset(
        "digits",
        train=_take(whole, order[700:]),
        validation=_take(whole, order[500:700]),
        test=_take(whole, order[:500]),
        labels=TEN,
        eps=SMALL_EPS,
        control=SMALL_CONTROL,
    )


def mnist(directory: Path) -> Dataset:
    """MNIST, 28 x 28 (LeCun et al. 1998), from directory/MNIST/raw.

    The first twelfth of the training images' stratified order is validation: 5,000 of 60,000.
    """
    raw = directory / "MNIST" / "raw"
    missing = [file for file in MNIST_FILES if not (raw / file).is_file()]
    if missing:
        raise InputError(
            f"mnist: {', '.join(missing)} not found in {raw}; "
            f"write 'robbench data mnist --data-dir {directory}', or put the four idx files there"
        )
    learning, test = (_read_idx(raw / MNIST_FILES[i], raw / MNIST_FILES[i + 1]) for i in (0, 2))
    if learning.x.shape[1:] != test.x.shape[1:]:
        raise InputError(f"mnist: images in {raw} differ in size between train and t10k")
    order = stratified_order(learning.y.numpy())
    held_out = len(order) // 12
    return Dataset(
        "mnist",
        train=_take(learning, order[held_out:]),
        validation=_take(learning, order[:held_out]),
        test=test,
        labels=TEN,
        eps=SMALL_EPS,
        control=SMALL_CONTROL,
    )


def folder(path: Path, name: str | None = None) -> Dataset:
    """Images under path/train/CLASS/ and path/test/CLASS/, or in a .tar.gz of that.

    One size for all; a single channel if every image is 8-bit grayscale, else RGB. The first tenth
    of the training images' stratified order is validation. Labels are the sorted class names.
    """
    found: dict[str, list[_Picture]] = {"train": [], "test": []}
    for row in _files(path):
        split, picture = _decode(*row)
        found[split].append(picture)
    train_labels, test_labels = ({row.label for row in rows} for rows in found.values())
    if train_labels != test_labels or not train_labels:
        odd = ", ".join(sorted(train_labels ^ test_labels)) or "all"
        raise InputError(
            f"{path} needs images of the same classes in train/CLASS/ and test/CLASS/; "
            f"one of the two has none of: {odd}"
        )
    labels = tuple(sorted(train_labels))
    learning, test = _stack(found, labels)
    order = stratified_order(learning.y.numpy())
    held_out = len(order) // 10
    return Dataset(
        name or f"folder:{path}",
        train=_take(learning, order[held_out:]),
        validation=_take(learning, order[:held_out]),
        test=test,
        labels=labels,
        eps=LARGE_EPS,
        control=LARGE_CONTROL,
    )


DATASETS: dict[str, Callable[[Path], Dataset]] = {"digits": digits, "mnist": mnist}


def _embedded(directory: Path) -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"


def _download_mnist(directory: Path) -> Path:
    from torchvision import datasets

    raw = directory / "MNIST" / "raw"
    if all((raw / file).is_file() for file in MNIST_FILES):
        return raw  # what is there but broken is reported by the loader, with the file's name
    try:
        datasets.MNIST(str(directory), download=True)
    except (RuntimeError, OSError, HTTPException) as error:  # URLError is an OSError
        raise InputError(
            f"mnist could not be downloaded ({_reason(error)}); "
            f"put {', '.join(MNIST_FILES)} by hand into {raw}"
        ) from error
    return raw


FETCH: dict[str, Callable[[Path], Path]] = {"digits": _embedded, "mnist": _download_mnist}


@lru_cache(maxsize=4)  # MNIST takes 220 MB
def _load(name: str, where: Path) -> Dataset:
    return DATASETS[name](where) if name in DATASETS else folder(where, name)


def check_name(name: str, more: Collection[str] = ()) -> None:
    """InputError for what is neither built in nor a folder; `more` are names of plugins."""
    if name not in DATASETS and not name.startswith("folder:"):
        known = {*DATASETS, *more}
        raise unknown("dataset", name, known, "or folder:PATH for your own images")


def _directory(data_dir: Path | None) -> Path:
    if data_dir is not None:
        return data_dir.expanduser()
    variable = os.environ.get("ROBBENCH_DATA")
    return Path(variable).expanduser() if variable else Path.home() / ".cache/robbench/data"


def _folder_path(name: str) -> Path:
    text = name.removeprefix("folder:")
    if not text:
        raise InputError("folder: names no path; write folder:PATH")
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; write folder:PATH of a folder or a .tar.gz")
    return path


def _take(split: Split, ids: NDArray[np.int64] | Sequence[int]) -> Split:
    index = torch.as_tensor(ids, dtype=torch.int64)
    return Split(split.x[index], split.y[index])


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


def _read_idx(images: Path, labels: Path) -> Split:
    """An idx pair as a split; InputError naming the file that is broken."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    read: list[Tensor] = []
    for file, reader in ((images, read_image_file), (labels, read_label_file)):
        try:
            read.append(reader(str(file)))
        except (ValueError, TypeError, RuntimeError, AssertionError, KeyError, OSError) as error:
            raise InputError(
                f"{file} is not a complete idx file ({type(error).__name__}); "
                "delete it and fetch it again"
            ) from error
    x, y = read
    if len(x) != len(y):
        raise InputError(f"{images} has {len(x)} images, but {labels} has {len(y)} labels")
    if len(y) == 0 or int(y.max()) > 9:
        raise InputError(f"{labels} holds no labels, or others than 0 to 9")
    return Split(x[:, None].to(torch.float32) / 255, y.to(torch.int64))


def _stack(found: Mapping[str, list[_Picture]], labels: Sequence[str]) -> tuple[Split, Split]:
    """(train, test) of pictures of one size; gray ones become RGB when any picture has colour."""
    pictures = found["train"] + found["test"]
    first = pictures[0]
    for picture in pictures:
        if picture.pixels.shape[:2] != first.pixels.shape[:2]:
            sizes = [f"{p.file} is {_size(p)}" for p in (first, picture)]
            raise InputError(f"all images must have one size, but {sizes[0]} and {sizes[1]}")
    gray = all(picture.pixels.shape[2] == 1 for picture in pictures)
    channels = 1 if gray else 3

    def split(rows: list[_Picture]) -> Split:
        rows = sorted(rows, key=lambda row: (row.label, row.file))
        height, width = first.pixels.shape[:2]
        x = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        for i, row in enumerate(rows):
            x[i] = row.pixels  # one gray channel spreads over three
        y = torch.tensor([labels.index(row.label) for row in rows], dtype=torch.int64)
        planes = torch.from_numpy(x).permute(0, 3, 1, 2)
        return Split(planes.to(torch.float32, memory_format=torch.contiguous_format) / 255, y)

    return split(found["train"]), split(found["test"])


def _size(picture: _Picture) -> str:
    height, width = picture.pixels.shape[:2]
    return f"{width} x {height}"


def _decode(split: str, label: str, file: str, content: bytes) -> tuple[str, _Picture]:
    """Alpha is dropped; more than 8 bits a channel would be cut off silently and is refused."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            if mode in MODES:
                pixels = np.asarray(image.convert("L" if mode == "L" else "RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise InputError(f"{file} cannot be read as an image ({_reason(error)})") from error
    if mode not in MODES:
        raise InputError(f"{file} has the pixel format {mode}; need 8 bits a channel")
    return split, _Picture(label, file, pixels.reshape(*pixels.shape[:2], -1))


def _files(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """(split, class, file, content) of every image in a folder or an archive."""
    try:
        yield from _archived(path) if path.is_file() else _listed(path)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read as a folder of images or a .tar.gz of one ({_reason(error)})"
        ) from error


def _listed(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for split in ("train", "test"):
        for file in sorted(path.glob(f"{split}/*/*")):
            if _is_image(file.name):
                yield split, file.parent.name, str(file), file.read_bytes()


def _archived(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Nothing is unpacked to disk. A leading folder, as in images/train/cat/1.png, is skipped."""
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            parts = member.name.split("/")
            if len(parts) < 3 or parts[-3] not in ("train", "test") or not _is_image(parts[-1]):
                continue
            content = archive.extractfile(member)
            if content is not None:  # a plain file
                yield parts[-3], parts[-2], f"{path}/{member.name}", content.read()


def _is_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    # macOS leaves a hidden ._1.png beside every 1.png in its archives
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _reason(error: Exception) -> str:
    """An exception of a library in one line."""
    return " ".join(str(error).split()) or type(error).__name__
