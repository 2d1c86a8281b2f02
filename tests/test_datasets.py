"""Splits, subsets, readers and what they say about bad data. No network and no real MNIST.

PYTHONPATH=benchmark python -m pytest tests/test_datasets.py
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from robbench import datasets
from robbench.datasets import fetching, from_tensors, load, stratified_order
from robbench.errors import InputError

# A change of either orphans every published record on digits.
DIGITS_HASH = "481da3cd3b203f5d8247d8b8f24faae5ec89ed04a824f0fa8848d2523045ad52"
DIGITS_500 = "8805c4c91250425ff87868243e35260fe0c616eada1ba116c835de3f14fcda21"


def write_idx(file: Path, values: NDArray[np.uint8]) -> None:
    """The idx format of MNIST: magic number, dimensions, bytes; integers big-endian."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    file.write_bytes(header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


def write_mnist(directory: Path, folder: str = "MNIST", train: int = 120, test: int = 40) -> Path:
    raw = directory / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    return raw


def write_images(root: Path, mode: str = "RGB", suffix: str = "png") -> Path:
    """20 training and 4 test images of 5 x 3 pixels in each of two classes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 4)):
        for label in ("dog", "cat"):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (3, 5, len(mode)), dtype=np.uint8)
                image = Image.fromarray(pixels.squeeze())
                image.save(root / split / label / f"{i}.{suffix}")
    return root


def pack(root: Path, archive: Path, prefix: str) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, prefix)
    return archive


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    """A mirror on this machine."""
    handler = functools.partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 3))
def test_stratified_order_keeps_every_prefix_near_the_class_shares(y: list[int], seed: int) -> None:
    labels = np.array(y)
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(y)))
    assert order.dtype == np.int64
    classes = np.unique(labels)
    for n in range(1, len(y) + 1):
        for label in classes:
            share = np.mean(labels == label)
            # every class is within half an image of its share of a position that all of them
            # share, and the position within half an image per class of n
            distance = abs(np.sum(labels[order[:n]] == label) - n * share)
            assert distance <= 0.5 + 0.5 * len(classes) * share + 1e-9
    if len(set(np.bincount(labels, minlength=6)[classes].tolist())) == 1:  # equal sizes: rounds
        rounds = labels[order].reshape(-1, len(classes))
        assert np.all(rounds == classes)


def test_stratified_order_is_frozen_and_random_within_a_class() -> None:
    assert stratified_order(np.repeat([0, 1], 5)).tolist() == [2, 5, 0, 7, 1, 6, 3, 9, 4, 8]
    zeros = np.zeros(50, dtype=np.int64)
    assert not np.array_equal(stratified_order(zeros), np.arange(50))
    assert not np.array_equal(stratified_order(zeros), stratified_order(zeros, seed=1))


def test_stratified_order_by_hand() -> None:
    y = np.array([0, 0, 0, 0, 1, 1, 2])  # positions 1/8 3/8 5/8 7/8, 1/4 3/4, 1/2
    assert y[stratified_order(y)].tolist() == [0, 1, 0, 2, 0, 1, 0]


def test_digits_splits() -> None:
    digits = load("digits")
    sizes = [len(split.y) for split in (digits.train, digits.validation, digits.test)]
    assert sizes == [1097, 200, 500]
    assert digits.shape == (1, 8, 8)
    assert digits.labels == tuple("0123456789")
    assert digits.eps["linf"] == tuple(Fraction(text) for text in ("0.05", "0.1", "0.2", "0.3"))
    assert digits.control == Fraction(1, 2)
    for split in (digits.train, digits.validation, digits.test):
        assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
        assert split.x.min() == 0 and split.x.max() == 1
        share = split.y.bincount() / len(split.y)
        assert share == pytest.approx(np.full(10, 0.1), abs=0.006)


def test_digits_splits_are_disjoint_and_whole() -> None:
    digits = load("digits")
    rows = torch.cat([split.x for split in (digits.train, digits.validation, digits.test)])
    found = sorted((row * 16).to(torch.uint8).numpy().tobytes() for row in rows)
    from sklearn.datasets import load_digits

    assert found == sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)


def test_digits_hashes_are_frozen() -> None:
    digits = load("digits")
    assert digits.hash == DIGITS_HASH
    assert digits.subset(500).hash == DIGITS_500


@given(st.integers(1, 500), st.integers(1, 500))
def test_subsets_are_nested_and_stratified(n: int, m: int) -> None:
    digits = load("digits")
    small, large = digits.subset(min(n, m)), digits.subset(max(n, m))
    assert np.array_equal(small.ids, large.ids[: len(small.ids)])
    assert (small.hash == large.hash) == (n == m)
    assert torch.equal(small.x, digits.test.x[small.ids])
    assert torch.equal(small.y, digits.test.y[small.ids])
    counts = small.y.bincount(minlength=10)
    assert counts.max() - counts.min() <= 4  # 48 to 51 in all 500


def test_subset_does_not_give_away_the_order() -> None:
    digits = load("digits")
    digits.subset(5).ids[:] = 0
    assert len(set(digits.subset(5).ids.tolist())) == 5


def test_subset_hash_is_that_of_name_and_ids() -> None:
    subset = load("digits").subset(3)
    expected = hashlib.sha256(b"digits\0" + struct.pack("<3q", *subset.ids.tolist())).hexdigest()
    assert subset.hash == expected


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (600, "n = 600, but the test split of digits has 500 images; write -n 500 or less"),
        (0, "n = 0, but at least one image is needed"),
        (-1, "n = -1, but"),
    ],
)
def test_subset_of_a_wrong_size(n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("digits").subset(n)


def test_load_keeps_datasets_in_memory(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert load("digits") is load("digits")
    assert load("mnist", tmp_path) is load("mnist", tmp_path)


def test_datasets_travel_between_processes() -> None:
    digits = load("digits")
    assert pickle.loads(pickle.dumps(digits)).hash == digits.hash


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown dataset 'mnits'; did you mean 'mnist'.*folder:"):
        load("mnits")


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path)
    mnist = load("mnist", tmp_path)
    sizes = [len(split.y) for split in (mnist.train, mnist.validation, mnist.test)]
    assert sizes == [110, 10, 40]  # one twelfth is held out: 5,000 of 60,000
    assert mnist.validation.y.tolist() == list(range(10))
    assert mnist.shape == (1, 28, 28)
    header = 16
    pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[header:], np.uint8)
    assert np.array_equal((mnist.test.x * 255).round().to(torch.uint8).numpy().ravel(), pixels)
    assert mnist.test.y.tolist() == [i % 10 for i in range(40)]


def test_mnist_finds_its_directory_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    monkeypatch.setenv("ROBBENCH_DATA", str(tmp_path))
    assert len(load("mnist").test.y) == 40
    monkeypatch.delenv("ROBBENCH_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="home/.cache/robbench/data/MNIST/raw"):
        load("mnist")


def test_missing_mnist_says_what_where_and_how(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError) as caught:
        load("mnist", tmp_path)
    assert str(caught.value) == (
        f"mnist: t10k-labels-idx1-ubyte not found in {raw}; "
        f"write 'robbench data mnist --data-dir {tmp_path}', or put the four idx files there"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"<html>404</html>", b"\0\0\x08\x03\0\0\0\x28\0\0\0\x1c\0\0\0\x1c\1\2\3"],
    ids=["empty", "short", "web page", "truncated"],
)
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_broken_mnist_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    file = write_mnist(tmp_path) / name
    file.write_bytes(content)
    for read in (load, datasets.fetch):
        with pytest.raises(InputError, match="is not a complete idx file") as caught:
            read("mnist", tmp_path)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_fashion_mnist_agrees_with_torchvision(tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    fashion = load("fashion-mnist", tmp_path)
    theirs = torchvision.datasets.FashionMNIST(str(tmp_path), train=False)
    assert torch.equal((fashion.test.x * 255).round().to(torch.uint8)[:, 0], theirs.data)
    assert torch.equal(fashion.test.y, theirs.targets)
    assert list(fashion.labels) == theirs.classes
    assert [len(split.y) for split in (fashion.train, fashion.validation)] == [110, 10]
    assert fashion.subset(5).hash[:16] == "8d1d22e202a7744f"
    assert fashion.eps is datasets.SMALL_EPS and fashion.control == datasets.SMALL_CONTROL


def test_idx_files_are_read_packed_and_unpacked(tmp_path: Path) -> None:
    write_mnist(tmp_path / "plain")
    raw = write_mnist(tmp_path / "packed")
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert load("mnist", tmp_path / "packed").hash == load("mnist", tmp_path / "plain").hash
    packed = raw / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:500])
    with pytest.raises(InputError, match="ubyte.gz is not a complete idx file"):
        datasets.DATASETS["mnist"](tmp_path / "packed")


def test_mnist_with_labels_that_do_not_fit(tmp_path: Path) -> None:
    labels = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.zeros(39, dtype=np.uint8))
    with pytest.raises(InputError, match="has 40 images, but .* has 39 labels"):
        load("mnist", tmp_path)
    write_idx(labels, np.full(40, 10, dtype=np.uint8))
    with pytest.raises(InputError, match="others than 0 to 9"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_fetch_downloads_idx_files(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, target = tmp_path / "server", tmp_path / "target"
    server.mkdir()
    resources = []
    for file in write_mnist(tmp_path / "made", folder).iterdir():
        packed = gzip.compress(file.read_bytes())
        (server / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    publisher = getattr(torchvision.datasets, folder)
    monkeypatch.setattr(publisher, "resources", resources)
    monkeypatch.setattr(fetching, "COUNTS", {name: (120, 40)})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(server) as address:
        monkeypatch.setattr(publisher, "mirrors", [address])
        assert datasets.fetch(name, target) == target / folder / "raw"
    assert load(name, target).hash == load(name, tmp_path / "made").hash
    packed = target / folder / "raw" / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(b"another"))
    with pytest.raises(InputError, match="is not the published file"):
        datasets.fetch(name, target)


def test_fetch_of_mnist_with_images_missing(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(InputError, match="mnist has 120 training and 40 test images in .* but 600"):
        datasets.fetch("mnist", tmp_path)


def test_fetch_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing listens on the discard port, so the real error of a dead network comes back
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match="mnist could not be downloaded") as caught:
        datasets.fetch("mnist", tmp_path)
    message = str(caught.value)
    assert f"by hand into {tmp_path / 'MNIST' / 'raw'}" in message
    assert "train-images-idx3-ubyte" in message
    assert "\n" not in message


def test_fetch_of_what_is_already_there(tmp_path: Path) -> None:
    assert "sklearn" in str(datasets.fetch("digits"))
    assert datasets.fetch("digits").is_file()
    images = write_images(tmp_path / "images")
    assert datasets.fetch(f"folder:{images}") == images
    with pytest.raises(InputError, match="unknown dataset"):
        datasets.fetch("imagenette")


def test_every_dataset_can_be_fetched() -> None:
    assert set(datasets.FETCH) == set(datasets.DATASETS)


def test_a_view_has_the_first_training_images_and_the_same_test_images() -> None:
    whole, view = load("digits"), load("digits@300")
    assert view.name == "digits@300" and view.hash != whole.hash
    assert torch.equal(view.train.x, whole.train.x[:300])
    assert torch.equal(view.validation.y, whole.validation.y[:30])
    assert torch.equal(view.test.x, whole.test.x)
    assert np.bincount(view.train.y).min() >= 28  # stratified, as the order is


@pytest.mark.parametrize("count", ["", "0", "01", "-5", "many", "2000"])
def test_a_view_of_no_number_of_images_is_one_line(count: str) -> None:
    with pytest.raises(InputError, match=r"^(dataset )?digits@.*write digits@\d+"):
        load(f"digits@{count}")


def test_cifar10_as_jpeg_is_an_image_folder_of_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="put an image folder"):
        load("cifar10-jpeg", tmp_path)
    write_images(tmp_path / "cifar10-jpeg")
    found = load("cifar10-jpeg", tmp_path)
    assert (found.name, found.labels) == ("cifar10-jpeg", ("cat", "dog"))
    assert load("cifar10-jpeg@20", tmp_path).train.y.shape == (20,)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder_of_images(tmp_path: Path, mode: str, channels: int) -> None:
    write_images(tmp_path, mode)
    found = load(f"folder:{tmp_path}")
    assert found.name == f"folder:{tmp_path}"
    assert found.shape == (channels, 3, 5)
    assert found.labels == ("cat", "dog")
    sizes = [len(split.y) for split in (found.train, found.validation, found.test)]
    assert sizes == [36, 4, 8]
    assert found.validation.y.bincount().tolist() == [2, 2]
    assert found.eps["linf"][2] == Fraction(8, 255)
    assert found.control == Fraction(32, 255)
    first = np.asarray(Image.open(tmp_path / "test" / "cat" / "0.png")).reshape(3, 5, channels)
    assert np.array_equal((found.test.x[0] * 255).round().numpy(), first.transpose(2, 0, 1))


def test_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    write_images(tmp_path)
    transform = torchvision.transforms.ToTensor()
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "test"), transform)
    ours = load(f"folder:{tmp_path}")
    assert torch.equal(ours.test.x, torch.stack([x for x, _ in theirs]))
    assert ours.test.y.tolist() == theirs.targets
    assert list(ours.labels) == theirs.classes


@pytest.mark.parametrize("prefix", ["", ".", "images"])
def test_archive_equals_its_folder(tmp_path: Path, prefix: str) -> None:
    images = write_images(tmp_path / "images")
    (images / "test" / "cat" / "._0.png").write_bytes(b"of macOS")
    (images / "test" / "cat" / "Thumbs.db").write_bytes(b"of Windows")
    archive = pack(images, tmp_path / "images.tar.gz", prefix)
    assert load(f"folder:{archive}").hash == load(f"folder:{images}").hash


def test_folder_with_gray_and_coloured_images(tmp_path: Path) -> None:
    write_images(tmp_path, "RGB")
    Image.new("L", (5, 3), 51).save(tmp_path / "test" / "cat" / "0.png")
    found = load(f"folder:{tmp_path}")
    assert found.shape == (3, 3, 5)
    assert torch.all(found.test.x[0] == torch.tensor(51) / 255)


def test_folder_with_two_sizes_names_both(tmp_path: Path) -> None:
    write_images(tmp_path)
    odd = tmp_path / "test" / "dog" / "3.png"
    Image.new("RGB", (5, 4)).save(odd)
    with pytest.raises(InputError, match="all images must have one size") as caught:
        load(f"folder:{tmp_path}")
    assert f"{odd} is 5 x 4" in str(caught.value)
    assert "is 5 x 3" in str(caught.value)


def test_folder_with_a_broken_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = tmp_path / "train" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="3.png cannot be read as an image") as caught:
        load(f"folder:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_folder_with_deep_pixels(tmp_path: Path) -> None:
    write_images(tmp_path)
    deep = Image.fromarray(np.full((3, 5), 40_000, dtype=np.uint16))
    deep.save(tmp_path / "train" / "dog" / "3.png")
    with pytest.raises(InputError, match="3.png has the pixel format I;16; need 8 bits"):
        load(f"folder:{tmp_path}")


def test_folder_with_other_classes_in_test(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(InputError, match="the same classes .* none of: dog, wolf"):
        load(f"folder:{tmp_path}")


def test_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of: all"):
        load(f"folder:{tmp_path}")
    with pytest.raises(InputError, match="nowhere does not exist; write folder:PATH"):
        load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="names no path"):
        load("folder:")


@pytest.mark.parametrize("cut", [0, 10, 600])
def test_broken_archive(tmp_path: Path, cut: int) -> None:
    archive = pack(write_images(tmp_path / "images"), tmp_path / "images.tar.gz", "")
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(InputError, match="images.tar.gz") as caught:
        load(f"folder:{archive}")
    assert "\n" not in str(caught.value)


def test_relative_folder_depends_on_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "a" / "images", "L")
    write_images(tmp_path / "b" / "images", "RGB")
    for place, channels in (("a", 1), ("b", 3)):
        monkeypatch.chdir(tmp_path / place)
        assert load("folder:images").shape[0] == channels


def test_from_tensors() -> None:
    x, y = torch.rand(6, 3, 4, 5, dtype=torch.float64), torch.arange(6, dtype=torch.int32) % 3
    found = from_tensors(x, y)
    assert found.shape == (3, 4, 5)
    assert found.test.x.dtype == torch.float32 and found.test.y.dtype == torch.int64
    assert found.labels == ("0", "1", "2")
    assert len(found.train.y) == len(found.validation.y) == 0
    assert found.train.x.shape == (0, 3, 4, 5)
    assert len(found.subset(6).ids) == 6
    before = found.hash
    x.zero_()
    assert from_tensors(found.test.x, y).hash == before, "a copy, untouched by the caller"
    assert from_tensors(x, y).hash != before
    assert from_tensors(found.test.x, y, labels=["a", "b", "c"]).hash != before


def test_from_tensors_divides_bytes() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    found = from_tensors(pixels, np.array([0]), "bytes")
    assert found.name == "bytes"
    assert found.test.x.flatten().tolist() == (torch.arange(256) / 255).tolist()


IMAGES, LABELS = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (IMAGES[0], LABELS, r"x has shape \(1, 4, 4\); need \(N, C, H, W\)"),
        (IMAGES[:0], LABELS[:0], r"x has shape \(0, 1, 4, 4\)"),
        (IMAGES * 255, LABELS, "x reaches from 127.5 to 127.5"),
        (IMAGES - 1, LABELS, "x reaches from -0.5 to -0.5"),
        (IMAGES * float("nan"), LABELS, "x holds NaN"),
        (IMAGES.to(torch.int64), LABELS, "x is torch.int64"),
        (IMAGES, LABELS[:1], "x has 2 images, but y has 1 labels"),
        (IMAGES, LABELS[:, None], r"y has shape \(2, 1\)"),
        (IMAGES, LABELS.float(), "y is torch.float32; need integer labels"),
        (IMAGES, LABELS > 0, "y is torch.bool; need integer labels"),
        (IMAGES, LABELS - 1, "y holds the label -1; labels start at 0"),
    ],
)
def test_from_tensors_refuses(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_tensors(x, y)


def test_from_tensors_with_too_few_names() -> None:
    with pytest.raises(InputError, match="y holds the label 1, but only 1 labels are named"):
        from_tensors(IMAGES, LABELS, labels=["cat"])


@pytest.mark.parametrize("eps", [datasets.SMALL_EPS, datasets.LARGE_EPS], ids=["small", "large"])
def test_default_budgets_ascend(eps: dict[str, tuple[Fraction, ...]]) -> None:
    assert set(eps) == {"linf", "l2", "l1"}
    for budgets in eps.values():
        assert list(budgets) == sorted(budgets) and len(budgets) == 4
