"""Published layouts in miniature: CIFAR's pickles, the folders of ImageNet, images left on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import os
import pickle
import shutil
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import robbench
from robbench import datasets
from robbench.datasets import fetching, images, load, stratified_order
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.training import train


def python2(value):
    """The pickle of a value as Python 2 wrote it (protocol 2, strings of bytes), as CIFAR's are."""
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(value[key]) for key in value) + b"u"
    assert value.dtype == np.uint8
    rows, columns = value.shape
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = python2(rows) + python2(columns) + b"\x86"
    content = b"T" + struct.pack("<I", value.size) + value.tobytes()
    return made + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"


def write_pickle(file, value):
    file.write_bytes(b"\x80\x02" + python2(value) + b".")


def picture(seed, *shape):
    """Bytes that differ from picture to picture and are the same under any version of NumPy."""
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def write_cifar10(directory):
    root = directory / "cifar-10-batches-py"
    root.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        labels = [(i * 7 + seed) % 10 for i in range(20)]
        batch = {"batch_label": name, "labels": labels, "data": picture(seed, 20, 3072)}
        write_pickle(root / name, batch)
    names = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    write_pickle(root / "batches.meta", {"num_vis": 3072, "label_names": names})
    return root


def write_cifar100(directory):
    root = directory / "cifar-100-python"
    root.mkdir(parents=True)
    for seed, (name, n) in enumerate((("train", 1000), ("test", 100))):
        fine = [i % 100 for i in range(n)]
        batch = {"fine_labels": fine, "coarse_labels": [i // 5 for i in fine]}
        write_pickle(root / name, batch | {"data": picture(seed, n, 3072)})
    names = [f"fine {i}" for i in range(100)]
    write_pickle(root / "meta", {"fine_label_names": names, "coarse_label_names": ["coarse"]})
    return root


def write_jpeg(file, seed, height=64, width=64, mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(seed, height, width, len(mode)).squeeze()
    Image.fromarray(pixels, mode=None).save(file, "JPEG")


def write_tiny_imagenet(directory):
    """Three labels with 20 training and 2 test images each; one image is gray, as some are."""
    root = directory / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]  # in no order, as in the original
    rows = []
    for label, wnid in enumerate(wnids):
        for i in range(20):
            file = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            write_jpeg(file, 100 * label + i, mode="L" if i == 7 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
        for i in range(2):
            file = f"val_{2 * label + i}.JPEG"
            write_jpeg(root / "val" / "images" / file, 1000 + 2 * label + i)
            rows.append(f"{file}\t{wnid}\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn03\ttench\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))
    (root / "test" / "images").mkdir(parents=True)  # unlabelled in the original, never read
    return root


def write_imagenet(directory):
    root = directory / "imagenet"
    for label, wnid in enumerate(("n07", "n04")):
        for i in range(25):
            write_jpeg(root / "train" / wnid / f"{wnid}_{i}.JPEG", 50 * label + i, 20, 30)
        for i in range(3):
            file = root / "val" / wnid / f"ILSVRC2012_val_{label}{i}.JPEG"
            write_jpeg(file, 500 + 3 * label + i, 300 + 30 * i, 280)
    return root


MINIATURES = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
    "imagenet": write_imagenet,
}
SIZES = {  # train, validation, test
    "cifar10": (90, 10, 20),
    "cifar100": (900, 100, 100),
    "tiny-imagenet": (57, 3, 6),
    "imagenet": (48, 2, 6),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All miniatures below one folder; tests that break something copy what they need."""
    directory = tmp_path_factory.mktemp("data")
    for write in MINIATURES.values():
        write(directory)
    return directory


def splits(dataset):
    return dataset.train, dataset.validation, dataset.test


def image_keys(split):
    """What tells images apart: the pixels, or the file."""
    if isinstance(split.x, images.ImageFiles):
        return list(split.x.files)
    return [image.numpy().tobytes() for image in split.x]


@pytest.mark.parametrize("name", MINIATURES)
def test_splits_are_disjoint_stratified_and_whole(name, made):
    dataset = load(name, made)
    assert tuple(len(split.y) for split in splits(dataset)) == SIZES[name]
    assert len({key for split in splits(dataset) for key in image_keys(split)}) == sum(SIZES[name])
    for split in splits(dataset):
        assert len(split.x) == len(split.y) and split.x.dtype == torch.float32
        counts = split.y.bincount(minlength=len(dataset.labels))
        assert counts.max() == counts.min()
    assert dataset.eps is datasets.LARGE_EPS and dataset.control == datasets.LARGE_CONTROL


@pytest.mark.parametrize(
    ("name", "validation", "subset"),
    [
        ("cifar10", "defe8827eaeb7109", "17e6bcd8acbbc53a"),
        ("cifar100", "19cf7d02cb8f62a4", "e63067825b925af2"),
        ("tiny-imagenet", "991602ee1572f9d8", "480bd40c68814670"),
        ("imagenet", "409ec603b6de660a", "5b50dde833838746"),
    ],
)
def test_splits_and_subsets_are_frozen(name, validation, subset, made):
    """A change of any of these orphans every published record on the dataset."""
    dataset = load(name, made)
    digest = hashlib.sha256()
    for key in image_keys(dataset.validation):
        digest.update(key if isinstance(key, bytes) else key.encode())
    assert (digest.hexdigest()[:16], dataset.subset(5).hash[:16]) == (validation, subset)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_agrees_with_torchvision(name, made, monkeypatch):
    """torchvision unpickles only what has the published MD5, so it is given ours."""
    publisher = getattr(torchvision.datasets, name.upper())
    trust(monkeypatch, publisher, made)
    dataset = load(name, made)
    theirs = publisher(str(made), train=False)
    ours = (dataset.test.x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, theirs.data)
    assert dataset.test.y.tolist() == theirs.targets
    assert list(dataset.labels) == theirs.classes
    learning = publisher(str(made), train=True)
    order = stratified_order(np.array(learning.targets))[: len(dataset.validation.y)]
    ours = (dataset.validation.x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, learning.data[order])


def trust(monkeypatch, publisher, directory):
    """Make the checksums that torchvision knows those of the miniature."""
    root = directory / publisher.base_folder

    def md5(file):
        return hashlib.md5((root / file).read_bytes()).hexdigest()

    for kind in ("train_list", "test_list"):
        trusted = [[file, md5(file)] for file, _ in getattr(publisher, kind)]
        monkeypatch.setattr(publisher, kind, trusted)
    meta = publisher.meta | {"md5": md5(publisher.meta["filename"])}
    monkeypatch.setattr(publisher, "meta", meta)


def test_cifar_arrays_in_fortran_order_and_of_a_new_numpy_are_read(made, tmp_path):
    root = shutil.copytree(made / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    batch = {"data": np.asfortranarray(picture(5, 20, 3072)), "labels": list(range(10)) * 2}
    (root / "test_batch").write_bytes(pickle.dumps(batch, protocol=4))
    found = (load("cifar10", tmp_path).test.x * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(found.reshape(20, 3072), batch["data"])


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_a_cifar_pickle_with_code_is_refused_and_does_not_run(file, made, tmp_path):
    trap = tmp_path / "trap"
    content = pickle.dumps({"data": Bait(trap), "labels": [0]}, protocol=2)
    pickle.loads(content)
    trap.rmdir()  # so it would have run
    root = shutil.copytree(made / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    (root / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file} would run \w+\.mkdir .* delete it and fetch"):
        load("cifar10", tmp_path)
    assert not trap.exists()


def test_a_cifar_pickle_cannot_call_numpy(made, tmp_path):
    """What stands for an array is inert: arrays of objects are not built from raw addresses."""
    root = shutil.copytree(made / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    batch = {"data": np.array([[None]]), "labels": [0]}
    (root / "test_batch").write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(InputError, match="pixels of the type 'O8' instead of bytes"):
        load("cifar10", tmp_path)


GOOD = {"data": picture(0, 4, 3072), "labels": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GOOD | {"labels": [0, 1, 2]}, "4 images, but 3 labels"),
        (GOOD | {"labels": [0, 1, 2, 10]}, "no labels, or others than 0 to 9"),
        (GOOD | {"labels": [0, 1, 2, -1]}, "no labels, or others than 0 to 9"),
        (GOOD | {"labels": ["a"] * 4}, "invalid literal"),
        (GOOD | {"data": picture(0, 4, 3000)}, "cannot reshape"),
        (GOOD | {"data": "pixels"}, "no attribute 'array'"),
        ({"data": GOOD["data"]}, "'labels'"),
        ([1], "it holds list instead of a dictionary"),
    ],
)
def test_a_cifar_batch_that_is_none_is_named(value, message, made, tmp_path):
    root = shutil.copytree(made / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    write_pickle(root / "test_batch", value)
    with pytest.raises(InputError, match="is not a complete CIFAR file") as caught:
        load("cifar10", tmp_path)
    assert str(root / "test_batch") in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 30, 1000, -1])
def test_a_truncated_cifar_batch_is_named(cut, made, tmp_path):
    root = shutil.copytree(made / "cifar-100-python", tmp_path / "cifar-100-python")
    (root / "train").write_bytes((root / "train").read_bytes()[:cut])
    with pytest.raises(InputError, match="train is not a complete CIFAR file") as caught:
        load("cifar100", tmp_path)
    assert "\n" not in str(caught.value)


def test_cifar_without_label_names_is_refused(made, tmp_path):
    root = shutil.copytree(made / "cifar-100-python", tmp_path / "cifar-100-python")
    write_pickle(root / "meta", {"fine_label_names": [1, 2]})
    with pytest.raises(InputError, match="no list of names under 'fine_label_names'"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_4"),
        ("cifar100", "cifar-100-python/meta"),
        ("tiny-imagenet", "tiny-imagenet-200/val/val_annotations.txt"),
        ("tiny-imagenet", "tiny-imagenet-200/wnids.txt"),
    ],
)
def test_a_missing_file_says_how_to_get_it_and_where_to_put_it(name, gone, tmp_path):
    MINIATURES[name](tmp_path)
    (tmp_path / gone).unlink()
    folder, _, file = gone.partition("/")
    with pytest.raises(InputError) as caught:
        load(name, tmp_path)
    start, _, advice = str(caught.value).partition("; ")
    assert start == f"{name}: {file} not found in {tmp_path / folder}"
    assert advice.startswith(f"write 'robbench data {name} --data-dir {tmp_path}', or put ")


def test_missing_imagenet_says_where_to_get_it_and_how_to_lay_it_out(tmp_path):
    for read in (load, datasets.fetch):
        with pytest.raises(InputError, match="val not found in .*imagenet; it cannot be") as caught:
            read("imagenet", tmp_path)
        assert "https://image-net.org" in str(caught.value) and "WNID" in str(caught.value)


def test_tiny_imagenet_agrees_with_torchvision(made):
    tiny = load("tiny-imagenet", made)
    assert tiny.labels == ("goldfish, Carassius auratus", "n02", "tench")
    assert tiny.shape == (3, 64, 64)
    root = made / "tiny-imagenet-200"
    theirs = torchvision.datasets.ImageFolder(str(root / "train"))
    pixels = torchvision.transforms.functional.to_tensor
    order = stratified_order(np.array(theirs.targets))[: len(tiny.validation.y)]
    assert torch.equal(tiny.validation.x[:], torch.stack([pixels(theirs[i][0]) for i in order]))
    assert tiny.validation.y.tolist() == [theirs.targets[i] for i in order]
    for file, y in zip(tiny.test.x.files, tiny.test.y, strict=True):
        (row,) = [
            line.split("\t")
            for line in (root / "val" / "val_annotations.txt").read_text().splitlines()
            if line.startswith(f"{Path(file).name}\t")
        ]
        assert theirs.classes[y] == row[1]


def test_imagenet_is_cropped_as_torchvisions_weights_expect_it(made):
    """The preprocessing of the weights, undone up to its normalisation."""
    imagenet = load("imagenet", made)
    assert imagenet.shape == (3, 224, 224) and imagenet.labels == ("n04", "n07")
    view = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    theirs = torchvision.datasets.ImageFolder(str(made / "imagenet" / "val"), view)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std))
    for ours, y, (expected, target) in zip(imagenet.test.x, imagenet.test.y, theirs, strict=True):
        assert torch.allclose((ours - mean) / std, expected, atol=1e-6)
        assert y == target


def test_imagenet_can_be_evaluated_from_its_validation_images_alone(made, tmp_path):
    whole = load("imagenet", made)
    shutil.copytree(made / "imagenet" / "val", tmp_path / "imagenet" / "val")
    alone = load("imagenet", tmp_path)
    assert len(alone.train.y) == len(alone.validation.y) == 0
    assert alone.subset(6).hash == whole.subset(6).hash and alone.hash != whole.hash


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root / "train" / "n04"), "one of train and val has no .* n04"),
        (lambda root: shutil.rmtree(root / "val" / "n04" / ""), "has no folder n04"),
        (lambda root: [f.unlink() for f in (root / "val/n04").iterdir()], "n04 holds no images"),
        (lambda root: [shutil.rmtree(f) for f in (root / "val").iterdir()], "no folders of WordN"),
    ],
)
def test_imagenet_with_something_missing(break_it, message, made, tmp_path):
    break_it(shutil.copytree(made / "imagenet", tmp_path / "imagenet"))
    with pytest.raises(InputError, match=message):
        load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG\tn03\t0\n", "val_1.JPEG is only in one of val/images and .* 5 in all"),
        ("val_0.JPEG\tn09\t0\n", r"has a line \['val_0.JPEG', 'n09'\] without a known label"),
        ("val_0.JPEG\n", r"has a line \['val_0.JPEG'\] without a known label"),
    ],
)
def test_tiny_imagenet_with_wrong_annotations(annotations, message, made, tmp_path):
    root = shutil.copytree(made / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200")
    (root / "val" / "val_annotations.txt").write_text(annotations)
    with pytest.raises(InputError, match=message):
        load("tiny-imagenet", tmp_path)


def test_broken_images_are_named_when_they_are_used(made, tmp_path):
    shutil.copytree(made / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200")
    x = load("tiny-imagenet", tmp_path).test.x
    files = [x.root / file for file in x.files]
    files[0].write_bytes(files[0].read_bytes()[:300])
    write_jpeg(files[1], 0, 64, 32)
    files[2].unlink()
    for i, message in enumerate(
        ["cannot be read as an image", "is 32 x 64; need 64 x 64", "No su"]
    ):
        with pytest.raises(InputError, match=message) as caught:
            x[i]
        assert str(files[i]) in str(caught.value)
    assert x[3:].shape == (3, 3, 64, 64)


# --------------------------------------------------------------------------- undecoded images


@pytest.fixture
def x(made):
    return load("tiny-imagenet", made).train.x


TAKINGS = {
    "an image": lambda x: x[3],
    "the last image": lambda x: x[-1],
    "a slice": lambda x: x[5:20:4],
    "ids": lambda x: x[torch.tensor([4, 0, 4, -2])],
    "a list": lambda x: x[[1, 2]],
    "a table of ids": lambda x: x[torch.tensor([[1, 2], [3, 4]])],
    "a mask": lambda x: x[torch.arange(len(x)) % 5 == 0],
    "index_select": lambda x: x.index_select(0, torch.tensor([7, 3])),
    "nothing": lambda x: x[torch.tensor([], dtype=torch.int64)],
    "rows and columns": lambda x: x[2:4, :, 1:3, 5],
    "an element each": lambda x: x[torch.tensor([1, 2]), torch.tensor([0, 2])],
    "batches": lambda x: torch.cat([part[:] for part in x.split(10)]),
    "one by one": lambda x: torch.stack(list(x)),
    "arithmetic": lambda x: 1 - x * 2,
    "second operand": lambda x: torch.ones(1) - x,
    "concatenated": lambda x: torch.cat([x, x[:1]]),
    "another type": lambda x: x.to(torch.float64),
    "a copy": lambda x: x.clone(),
    "normalised": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("taking", TAKINGS)
def test_undecoded_images_give_what_the_plain_tensor_gives(taking, x):
    plain = x.decoded()
    assert type(plain) is torch.Tensor
    found, expected = TAKINGS[taking](x), TAKINGS[taking](plain)
    assert type(found) is torch.Tensor and found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_only_what_is_taken_is_decoded(x, monkeypatch):
    read = []
    monkeypatch.setattr(images.ImageFiles, "_read", lambda self, file: read.append(file) or 0)
    parts = x[2:5], x[torch.tensor([7])], x.to("cpu"), x.split(9)[1][:1], len(x), x.shape
    assert len(parts) == 6
    taken = [x.files[i] for i in (2, 3, 4, 7, 9)]
    assert read == [x.root / file for file in taken]


def test_moving_leaves_images_undecoded(x):
    moved = x.to("meta")  # a device that every machine has
    assert isinstance(moved, images.ImageFiles) and moved.device.type == "meta"
    assert moved.files == x.files
    assert moved[:2].device.type == "meta"


def test_too_many_images_at_once_are_refused(x, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 10 * 3 * 64 * 64 * 4)
    assert x[:10].shape[0] == 10
    for use in (lambda: x[:11], lambda: x.mean()):
        with pytest.raises(InputError, match="would take .* GiB as one tensor; take a part"):
            use()


def test_undecoded_images_travel_between_processes(x):
    copy = pickle.loads(pickle.dumps(x))
    assert isinstance(copy, images.ImageFiles) and torch.equal(copy[:3], x[:3])


def test_undecoded_images_are_shown_without_pixels(x):
    assert repr(x) == f"ImageFiles({x.root}, shape=(57, 3, 64, 64), device=cpu)"


def test_the_hash_of_undecoded_images_is_that_of_their_files(made, tmp_path):
    root = shutil.copytree(made / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200")
    before = load("tiny-imagenet", made).hash
    assert load("tiny-imagenet", tmp_path).hash == before, "wherever it lies"
    file = root / "train" / "n01" / "images" / "n01_3.JPEG"
    file.write_bytes(file.read_bytes() + b"\0")
    assert datasets.DATASETS["tiny-imagenet"](tmp_path).hash != before
    gone = datasets.DATASETS["tiny-imagenet"](tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="has changed while in use"):
        gone.hash  # noqa: B018


def test_attacks_see_undecoded_images_as_they_see_tensors(made):
    tiny = load("tiny-imagenet", made)
    plain = datasets.from_tensors(tiny.test.x[:], tiny.test.y, tiny.name, labels=tiny.labels)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 3)).eval()
    found, expected = (
        robbench.evaluate(model, data, "pgd(steps=2)", eps="2/255", n=6).frame()
        for data in (tiny, plain)
    )
    shown = [name for name in expected.columns if expected[name].dtype.kind == "f"]
    timed = [name for name in shown if "seconds" in name]
    assert found[shown].drop(columns=timed).equals(expected[shown].drop(columns=timed))


def test_training_on_undecoded_images_gives_the_same_weights(made):
    tiny = load("tiny-imagenet", made)
    splits = {
        name: getattr(tiny, name)._replace(x=getattr(tiny, name).x.decoded())
        for name in ("train", "validation")
    }
    plain = dataclasses.replace(tiny, **splits)
    (recipe,) = resolve("standard(network=mlp, epochs=1)")
    weights = []
    for data in (tiny, plain):
        torch.manual_seed(0)
        members = recipe.build(data.shape, len(data.labels))
        train(recipe, members, data, 0, torch.device("cpu"))
        weights.append(torch.nn.utils.parameters_to_vector(members.parameters()))
    assert torch.equal(*weights)


# ----------------------------------------------------------------------------------- fetching


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(directory):
    """A mirror on this machine."""
    handler = functools.partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


@pytest.fixture
def small(monkeypatch):
    """The miniatures count as what was published."""
    counts = {name: (train + held, test) for name, (train, held, test) in SIZES.items()}
    monkeypatch.setattr(fetching, "COUNTS", counts)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_fetched_once_and_checked(name, made, small, tmp_path, monkeypatch):
    publisher = getattr(torchvision.datasets, name.upper())
    trust(monkeypatch, publisher, made)
    archive = tmp_path / "server" / f"{name}-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made / publisher.base_folder, publisher.base_folder)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(publisher, "tgz_md5", md5)
    target = tmp_path / "target"
    with serve(archive.parent) as address:
        monkeypatch.setattr(publisher, "url", f"{address}{archive.name}")
        assert datasets.fetch(name, target) == target / publisher.base_folder
    assert load(name, target).hash == load(name, made).hash
    assert datasets.fetch(name, target).is_dir(), "without the server"


def test_tiny_imagenet_is_fetched(made, small, tmp_path, monkeypatch):
    archive = tmp_path / "server" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    shutil.make_archive(str(archive.with_suffix("")), "zip", made, "tiny-imagenet-200")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(fetching, "TINY_MD5", md5)
    target = tmp_path / "target"
    with serve(archive.parent) as address:
        monkeypatch.setattr(fetching, "TINY_URL", f"{address}{archive.name}")
        assert datasets.fetch("tiny-imagenet", target) == target / "tiny-imagenet-200"
    assert load("tiny-imagenet", target).hash == load("tiny-imagenet", made).hash


def test_an_archive_that_is_not_the_published_one_is_not_unpacked(small, tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "tiny.zip").write_bytes(b"PK")
    with serve(tmp_path / "server") as address:
        monkeypatch.setattr(fetching, "TINY_URL", f"{address}tiny.zip")
        with pytest.raises(InputError, match=r"could not be downloaded \(.*\); unpack http"):
            datasets.fetch("tiny-imagenet", tmp_path / "target")
    assert not (tmp_path / "target" / "tiny-imagenet-200").exists()


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_fetching_without_a_network_says_what_to_do_by_hand(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TINY_URL", "http://127.0.0.1:9/tiny.zip")  # nothing listens
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=f"{name} could not be downloaded") as caught:
        datasets.fetch(name, tmp_path)
    assert "by hand into" in str(caught.value) and "\n" not in str(caught.value)


def test_a_fetched_file_that_was_changed_is_named(made, small):
    with pytest.raises(InputError, match=r"data_batch_1 is not the published file \(MD5 "):
        datasets.fetch("cifar10", made)


def test_a_dataset_with_images_missing_is_not_the_published_one(made):
    with pytest.raises(InputError, match="50 training and 6 test images in .* but 1281167 and 500"):
        datasets.fetch("imagenet", made)


def test_imagenet_is_checked_where_it_was_laid_out(made, small, tmp_path):
    assert datasets.fetch("imagenet", made) == made / "imagenet"
    shutil.copytree(made / "imagenet" / "val", tmp_path / "imagenet" / "val")
    assert datasets.fetch("imagenet", tmp_path) == tmp_path / "imagenet", "without train"


def test_fetching_decodes_what_will_be_evaluated(made, small, tmp_path):
    shutil.copytree(made / "imagenet", tmp_path / "imagenet")
    file = tmp_path / "imagenet" / "val" / "n04" / "ILSVRC2012_val_11.JPEG"
    file.write_bytes(b"no image")
    with pytest.raises(InputError, match="ILSVRC2012_val_11.JPEG cannot be read as an image"):
        datasets.fetch("imagenet", tmp_path)
