"""What `robbench data` prints: what a dataset holds and where it is, or what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from robbench import datasets
from robbench.cli import main


@pytest.fixture
def robbench(capsys):
    """Run the command line here: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return run


def test_it_says_what_a_dataset_holds_and_where_it_is(robbench):
    code, out, err = robbench("data", "digits")
    digits = datasets.load("digits")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "digits: 500 test images, 200 of validation, 1,097 of training",
        "shape 1 x 8 x 8",
        "10 labels: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        f"hash {digits.hash}",
        f"read from {datasets.fetch('digits')}",
    ]


def test_it_fetches_into_the_directory_that_is_named(robbench, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setitem(datasets.FETCH, "digits", lambda where: fetched.append(where) or where)
    code, out, _ = robbench("data", "digits", "--data-dir", tmp_path)
    assert code == 0 and fetched == [tmp_path]
    assert out.splitlines()[-1] == f"read from {tmp_path}"


def test_the_directory_may_stand_in_the_environment(robbench, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBBENCH_DATA", str(tmp_path))
    code, _, err = robbench("data", "imagenet")
    assert code == 2 and f"val not found in {tmp_path / 'imagenet'}" in err


def test_it_shortens_long_lists_of_labels(robbench, tmp_path):
    for split in ("train", "test"):
        for label in "abcdefghijkl":
            (tmp_path / split / label).mkdir(parents=True)
            pixels = np.zeros((3, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / label / "0.png")
    code, out, _ = robbench("data", f"folder:{tmp_path}")
    assert code == 0
    assert "\nshape 3 x 3 x 5\n12 labels: a, b, c, d, e, f, g, h, i, j, …\n" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "unknown dataset 'cifar11'; did you mean 'cifar10'"),
        ("folder:nowhere", "nowhere does not exist; write folder:PATH"),
        ("imagenet", "it cannot be fetched, so put ILSVRC 2012 from https://image-net.org"),
    ],
)
def test_what_is_wrong_is_one_line(name, message, robbench, tmp_path):
    code, out, err = robbench("data", name, "--data-dir", tmp_path)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_run_on_a_dataset_that_is_missing_says_how_to_get_it(robbench, tmp_path):
    for name in sorted(datasets.DATASETS.keys() - {"digits", "imagenet", "cifar10-jpeg"}):
        run = ["run", "--defense", "standard", "--dataset", name, "--data-dir", tmp_path]
        code, out, err = robbench(*run, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"write 'robbench data {name} --data-dir {tmp_path}', or put" in err
