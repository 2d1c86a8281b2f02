"""The command line: what it prints and writes, and one line for everything a user does wrong."""

from __future__ import annotations

import base64
import errno
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from robbench import checkpoints, datasets, executors, listing, networks, registry
from robbench.attacks import art, attack, torchattacks
from robbench.cell import Cell
from robbench.cli import COMMANDS, main
from robbench.findings import BEGIN, END
from robbench.records import Record, Store
from robbench.threat import format_eps

PLUGIN = Path(__file__).parent / "plugin"
TINY = "standard(epochs=3, network=mlp(hidden=[32]))"
OTHER = "standard(epochs=2, network=mlp(hidden=[32]))"
RUN = ["run", "--defense", TINY, "--baseline", "none", "--eps", "0.02,0.04", "-n", "20"]
SERIAL = ["--workers", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with two finished records and their pages."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.raises(SystemExit) as left:
        main([*RUN, *SERIAL, "--quiet", "--out", str(out)])
    assert not left.value.code
    return out


@pytest.fixture
def folder(measured, tmp_path):
    """A copy of it for each test, under the name that is the default of --out."""
    return Path(shutil.copytree(measured, tmp_path / "leaderboards"))


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def record_files(folder):
    return sorted((folder / "records").rglob("*.json"))


def assert_one_line(result, *parts):
    """Exit code 2, nothing on stdout, and one line on stderr that says all of the parts."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("robbench: ") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == []


# ------------------------------------------------------------------ what a user can do wrong

MISTAKES = {
    "an unknown command": (["rnu"], "'rnu'", "did you mean 'run'"),
    "an unknown option": ([*RUN, "--esp", "0.1"], "--esp", "--eps"),
    "an option without a value": (["run", "--defense"], "--defense", "argument"),
    "an argument too many": ([*RUN, "more"], "unexpected extra argument", "more"),
    "no number where one is due": ([*RUN, "-n", "many"], "'-n'", "many"),
    "no draws behind a gradient": ([*RUN, "--eot", "0"], "eot: 0 is no number of draws", "or auto"),
    "no time at all": ([*RUN, "--timeout", "0"], "timeout = 0.0", "a positive number of seconds"),
    "a time that is none": ([*RUN, "--timeout", "nan"], "timeout = nan"),
    "a precision that is none": ([*RUN, "--precision", "much"], "much", "such as 1% or 0.01"),
    "a precision of zero": ([*RUN, "--precision", "0%"], "--precision 0%", "such as 1%"),
    "a precision of half of everything": ([*RUN, "--precision", "50%"], "--precision 50%"),
    "a precision below zero": ([*RUN, "--precision=-1%"], "--precision -1%"),
    "nothing to attack": (["run", "--attack", "pgd"], "--defense ito", "list defenses"),
    "an empty defense": (["run", "--defense", ""], "--defense ito"),
    "an empty attack": ([*RUN, "--attack", ""], "attack is empty"),
    "an unknown defense": ([*RUN, "--defense", "itto"], "'itto'", "did you mean 'ito'"),
    "an unknown baseline": ([*RUN, "--baseline", "standart"], "did you mean 'standard'"),
    "an unknown attack": ([*RUN, "--attack", "pdg"], "'pdg'", "did you mean 'pgd'"),
    "an unknown attack of a library": (
        [*RUN, "--attack", "torchattacks:pgd"],
        "'pgd'",
        "did you mean 'PGD'",
    ),
    "an unknown dataset": ([*RUN, "--dataset", "mnits"], "did you mean 'mnist'", "folder:PATH"),
    "an unknown setting": ([*RUN, "--setting", "white"], "'white'", "did you mean 'whitebox'"),
    "an unknown norm": ([*RUN, "--norm", "linv"], "'linv'", "did you mean 'linf'"),
    "an unknown network": (
        [*RUN, "--defense", "standard(network=resnet9)"],
        "'resnet9'",
        "did you mean 'resnet",
    ),
    "an unknown setting of a network": (
        [*RUN, "--defense", "standard(network=mlp(hiden=[4]))"],
        "'hiden'",
        "did you mean 'hidden'",
    ),
    "an unknown setting of a defense": (
        [*RUN, "--defense", "ito(omga=0.4)"],
        "'omga'",
        "did you mean 'omega'",
    ),
    "an unknown setting of an attack": (
        [*RUN, "--attack", "pgd(step_s=3)"],
        "'step_s'",
        "did you mean 'steps' or 'step'",
    ),
    "an unknown preset": ([*RUN, "--preset", "papr"], "'papr'", "did you mean 'paper'"),
    "an unknown device": ([*RUN, "--device", "gpu"], "'gpu'", "cuda"),
    "a malformed spec": ([*RUN, "--defense", "ito(omega=0.4"], "at character", "')'"),
    "a setting out of its range": (
        [*RUN, "--defense", "standard(members=0)"],
        "members = 0",
        "greater than or equal to 1",
    ),
    "an epsilon in the units of 255": ([*RUN, "--eps", "8"], "ε = 8", "write 8/255"),
    "a negative epsilon": ([*RUN, "--eps", "-0.1"], "ε = -0.1 is not positive"),
    "an epsilon of zero": ([*RUN, "--eps", "0"], "ε = 0 is not positive"),
    "an epsilon that is no number": ([*RUN, "--eps", "abc"], "ε = abc", "write a fraction (8/255)"),
    "no epsilon": ([*RUN, "--eps", ""], "eps", "empty"),
    "a norm that the attack cannot do": (
        [*RUN, "--attack", "torchattacks:PGDL2", "--norm", "linf"],
        "torchattacks:PGDL2 cannot do the norm linf",
        "it does l2",
    ),
    "a setting that the attack cannot do": (
        [*RUN, "--attack", "torchattacks:Square", "--setting", "whitebox"],
        "blackbox",
    ),
    "an attack that cannot be believed": (
        [*RUN, "--attack", "art:DPatch"],
        "art:DPatch",
        "needs an object detector",
    ),
    "more images than there are": ([*RUN, "-n", "501"], "n = 501", "write -n 500 or less"),
    "no images": ([*RUN, "-n", "0"], "n = 0", "1"),
    "a target that is no label": ([*RUN, "--target", "cat"], "'cat'", "least-likely"),
    "a target beyond the labels": ([*RUN, "--target", "10"], "target = 10", "0 to 9"),
    "a transfer attack without an oracle": ([*RUN, "--setting", "transfer"], "oracle"),
    "an oracle without a transfer attack": ([*RUN, "--oracle", "standard"], "--setting transfer"),
    "an assignment to nothing": ([*RUN, "--set", "epochs=3"], "'epochs=3'", "defense.KEY=VALUE"),
    "an assignment without a value": ([*RUN, "--set", "defense.epochs"], "defense.KEY=VALUE"),
    "an assignment of two settings": (
        [*RUN, "--set", "defense.epochs=3, lr=0.1"],
        "write one setting",
    ),
    "an assignment to an unknown setting": (
        [*RUN, "--set", "defense.epoch=3"],
        "'epoch'",
        "did you mean 'epochs'",
    ),
    "an assignment to joined defenses": (
        ["run", "--defense", "standard & pgd-at", "--set", "defense.epochs=1"],
        "standard & pgd-at",
    ),
    "a grid and a defense": ([*RUN, "--grid", "grid.yaml"], "--grid", "--defense", "--eps"),
    "a grid that is not there": (["run", "--grid", "none.yaml"], "none.yaml", "No such file"),
    "a missing folder of images": ([*RUN, "--dataset", "folder:none"], "none does not exist"),
    "an unknown shell": (["completion", "bsh"], "'bsh'", "did you mean 'bash'"),
    "an unknown kind of list": (["list", "defences"], "'defences'", "'defenses'"),
    "an unknown dataset to fetch": (["data", "mnits"], "did you mean 'mnist'"),
    "training what is unknown": (["train", "--defense", "itto"], "did you mean 'ito'"),
    "verifying what is not there": (["verify", "none.json"], "none.json is no record"),
    "a board of nothing": (["leaderboard", "--out", "none"], "no records", "none"),
    "comparing what was never run": (["compare", "ito", "standard"], "no cell", "ito"),
    "comparing in an unknown setting": (["compare", "ito@white", "ito"], "'white'", "whitebox"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_lost(case, robbench, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    arguments, *parts = MISTAKES[case]
    before = contents(folder)
    assert_one_line(robbench(*arguments), *parts)
    assert contents(folder) == before


def test_a_missing_dataset_says_how_to_get_it_and_where_to_put_it(robbench, tmp_path):
    result = robbench(*RUN, "--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "out")
    raw = tmp_path / "MNIST" / "raw"
    assert_one_line(result, f"robbench data mnist --data-dir {tmp_path}", "put the four idx files")
    assert str(raw) in result[2] and "train-images-idx3-ubyte" in result[2]


def test_a_device_that_is_not_there_is_a_mistake(robbench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = robbench(*RUN, "--device", "cuda", "--out", tmp_path)
    assert_one_line(result, "no cuda device", "--device cpu")


def test_torch_and_torchvision_that_do_not_fit_are_named_with_the_remedy(robbench, monkeypatch):
    real = importlib.import_module

    def broken(name, *rest):
        if name == "torchvision.ops":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    result = robbench(*RUN)
    assert_one_line(result, "torchvision::nms", "pip install --force-reinstall torch torchvision")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("attack: [pgd", ("is not YAML",)),
        ("- pgd", ("must be a mapping",)),
        ("attack: pgd", ("defense is missing",)),
        (
            "defense: itto\nattak: pgd\nattack: fgms",
            ("did you mean 'ito'", "did you mean 'attack'", "did you mean 'fgsm'"),
        ),
        ("attack: pgd\ngrid:\n- defense: ito\n- defense: itto", ("grid[1]", "did you mean 'ito'")),
    ],
    ids=["no yaml", "a list", "no defense", "three mistakes", "the second block"],
)
def test_a_bad_grid_is_one_line_that_names_the_file(text, parts, robbench, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    assert_one_line(robbench("run", "--grid", grid, "--out", tmp_path), "grid.yaml", *parts)


@pytest.mark.parametrize(
    "arguments", [RUN, ["leaderboard"], ["compare", TINY, OTHER]], ids=["run", "board", "compare"]
)
def test_a_broken_record_is_named_and_left_alone(arguments, robbench, folder):
    path = record_files(folder)[0]
    path.write_text(path.read_text()[:-100])
    before = contents(folder)
    result = robbench(*arguments, "--out", folder)
    assert_one_line(result, str(path), "is broken", "delete it to run the cell again")
    assert contents(folder) == before


def test_a_record_of_another_schema_is_named_before_any_work(robbench, folder):
    path = record_files(folder)[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    before = contents(folder)
    result = robbench(*RUN, "--out", folder)
    assert_one_line(result, str(path), "another schema version", "choose another folder with --out")
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written_is_a_mistake_before_any_work(robbench, tmp_path):
    (tmp_path / "file").write_text("")
    result = robbench(*RUN, "--out", tmp_path / "file" / "out")
    assert_one_line(result, "cannot write to", "--out")


def full(monkeypatch, fits):
    """A disk on which a file can only be written where `fits` says so."""
    write = Path.write_text

    def write_text(self, text, *rest, **options):
        if not fits(self, text):
            write(self, text[: len(text) // 2], *rest, **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, text, *rest, **options)

    monkeypatch.setattr(Path, "write_text", write_text)


def test_a_full_disk_keeps_what_is_finished_and_the_command_goes_on(
    robbench, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        full(patch, lambda path, text: not text or not record_files(tmp_path))
        result = robbench(*RUN, *SERIAL, "--quiet", "--out", tmp_path)
    assert_one_line(result, "No space left", "finished cells are kept")
    (kept,) = record_files(tmp_path)
    assert list(contents(tmp_path)) == [kept.relative_to(tmp_path)]  # nothing half-written
    before = kept.read_bytes()
    assert robbench(*RUN, *SERIAL, "--quiet", "--out", tmp_path)[0] == 0
    assert len(record_files(tmp_path)) == 3  # with the probe
    assert kept.read_bytes() == before


def test_a_full_disk_leaves_the_old_pages_whole(robbench, folder, monkeypatch):
    before = contents(folder)
    full(monkeypatch, lambda path, text: ".md." not in path.name)
    assert_one_line(robbench("leaderboard", "--out", folder), "No space left")
    assert contents(folder) == before


@pytest.fixture
def checkpoint(robbench, tmp_path, monkeypatch):
    """A trained standard network in a cache of its own: the file of its weights."""
    monkeypatch.setenv("ROBBENCH_CACHE", str(tmp_path / "cache"))
    code, out, _ = robbench("train", "--defense", TINY, "--quiet", "--out", tmp_path / "out")
    assert code == 0
    return Path(out.strip().rpartition(": ")[2])


def test_training_prints_the_spec_and_where_the_checkpoint_lies(checkpoint, tmp_path):
    assert checkpoint.parent == tmp_path / "cache" / "checkpoints"
    recipe = json.loads(checkpoint.with_suffix(".json").read_text())
    assert recipe["sha256"] == sha256(checkpoint.read_bytes()).hexdigest()


def test_a_corrupt_checkpoint_is_named_with_the_remedy(checkpoint, robbench, folder):
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-1] ^= 1
    checkpoint.write_bytes(damaged)
    empty = folder.parent / "empty"
    arguments = [*RUN, "--seeds", "2", *SERIAL, "--quiet", "--out"]
    result = robbench(*arguments, empty)
    assert_one_line(result, str(checkpoint), "is damaged", "it is trained again")
    assert contents(empty) == {}
    before = contents(folder)
    code, out, err = robbench(*arguments, folder)
    assert (code, err) == (1, "")  # the cells of the first seed are finished and shown
    assert out.count(f"checkpoint {checkpoint} is damaged") == 2 and "standard" in out
    before.pop(Path("digits.flags.json"))  # which names the cells that failed
    assert before.items() <= contents(folder).items()


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_is_a_pickle_with_code_is_refused_and_not_run(
    checkpoint, robbench, tmp_path
):
    torch.save(Malice(tmp_path / "proof"), checkpoint)
    pickle.loads(pickle.dumps(Malice(tmp_path / "armed"))).close()
    assert (tmp_path / "armed").exists()  # the weapon works
    recipe_file = checkpoint.with_suffix(".json")
    recipe = json.loads(recipe_file.read_text())
    recipe["sha256"] = sha256(checkpoint.read_bytes()).hexdigest()  # the liar knows of the hash
    recipe_file.write_text(json.dumps(recipe))
    result = robbench(*RUN, *SERIAL, "--quiet", "--out", tmp_path / "out")
    assert_one_line(result, str(checkpoint), "cannot be read")
    assert not (tmp_path / "proof").exists()


# ------------------------------------------------------------------------------ the main job


def test_run_prints_every_share_with_its_interval_and_writes_records_and_pages(robbench, tmp_path):
    code, out, err = robbench(*RUN, *SERIAL, "--out", tmp_path)
    assert code == 0
    assert "digits: pgd, linf, n = 20" in out
    assert "whitebox = adaptive" in out and "passes an image" in " ".join(out.split())
    for column in ("accuracy", "incorrect", "abstained", "correct+abstained"):
        assert column in out
    lines = {words[0]: words for words in map(str.split, out.splitlines()) if words}
    records = [record for record in Store(tmp_path).all() if record.cell.attack == "pgd"]
    assert len(records) == 2
    for record in records:
        shown = lines[format_eps(record.cell.threat.eps)]
        assert shown[1] == f"{100 * record.ok.mean():.1f}"
        assert len(shown) == 9 and sum("–" in word for word in shown) == 4  # four intervals
    assert (tmp_path / "digits.md").exists() and (tmp_path / "digits.csv").exists()


def test_the_table_is_at_most_80_columns_wide(robbench, folder):
    arguments = [*RUN, "--setting", "whitebox,transfer", "--oracle", OTHER, "--norm", "linf,l2"]
    _, out, _ = robbench(*arguments, *SERIAL, "--out", folder)
    path = str(folder)
    assert max(len(line) for line in out.splitlines() if path not in line) <= 80


def test_progress_is_plain_lines_where_it_is_no_terminal(robbench, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBBENCH_CACHE", str(tmp_path / "cache"))
    _, _, err = robbench(*RUN, *SERIAL, "--out", tmp_path)
    trained, *done, tables = err.splitlines()
    assert trained.split("s  ")[1] == f"trained {TINY}" and tables == "writing the tables of digits"
    assert [f"[{index}/3]" in line for index, line in enumerate(done, 1)] == [True] * 3
    (probe,) = (line for line in done if "probe" in line)
    assert all("accuracy" in line for line in done if line != probe) and "accuracy" not in probe
    assert "\x1b" not in err and "\r" not in err


def test_a_training_that_failed_is_not_said_to_be_done(robbench, tmp_path, monkeypatch):
    def failing(*rest):
        raise RuntimeError("loss nan")

    monkeypatch.setattr(checkpoints, "train", failing)
    monkeypatch.setenv("ROBBENCH_CACHE", str(tmp_path / "cache"))
    code, out, err = robbench(*RUN, *SERIAL, "--out", tmp_path)
    assert code == 1
    assert "trained" not in err and err.count("RuntimeError: loss nan") == 3
    assert out.count("RuntimeError: loss nan") == 2


def test_progress_is_bars_with_the_time_left_on_a_terminal(robbench, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, _, err = robbench(*RUN, *SERIAL, "--out", tmp_path)
    assert code == 0
    assert "of 3 cells" in err and "━" in err and ":" in err


def test_a_second_call_runs_nothing(robbench, folder):
    before = contents(folder)
    code, out, err = robbench(*RUN, "--out", folder)
    assert (code, err) == (0, "")
    assert "digits: pgd" in out
    assert contents(folder) == before


def test_quiet_prints_no_progress_but_the_table(robbench, tmp_path):
    code, out, err = robbench(*RUN, *SERIAL, "--quiet", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "digits: pgd" in out


def test_json_is_a_row_for_each_cell_and_nothing_else(robbench, folder):
    code, out, err = robbench(*RUN, "--json", "--out", folder)
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["eps"] for row in rows] == ["0.02", "0.04"]
    records = {record.id: record for record in Store(folder).all()}
    for row in rows:
        assert row["accuracy"] == pytest.approx(records[row["id"]].ok.mean())
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_too_few_images_for_a_precision_are_not_called_sound_and_the_number_is_said(
    robbench, folder
):
    _, out, _ = robbench(*RUN, "--json", "--out", folder)
    assert "n_needed" not in json.loads(out)[0]
    _, out, _ = robbench(*RUN, "--precision", "2%", "--json", "--out", folder)
    needed = [row["n_needed"] for row in json.loads(out)]
    for row, n in zip(json.loads(out), needed, strict=True):
        share = row["robust_with_detection"]
        halves = [
            np.diff(binomtest(round(share * m), m).proportion_ci(method="wilson"))[0] / 2
            for m in (n, int(0.95 * n))
        ]
        assert halves[0] <= 0.0201 < halves[1]
    _, text, _ = robbench(*RUN, "--precision", "0.02", "--out", folder)
    said = " ".join(text.split())
    assert all(f"too few images to be sure: n = {n} for ± 2 %" in said for n in needed)
    assert "sound by" not in said


def test_a_precision_that_is_reached_changes_nothing(robbench, folder):
    plain, precise = (
        robbench(*RUN, *option, "--out", folder)[1] for option in ([], ["--precision", "40%"])
    )
    assert plain == precise and "no flag by" in plain
    _, out, _ = robbench(*RUN, "--precision", "40%", "--json", "--out", folder)
    assert [row["n_needed"] for row in json.loads(out)] == [20, 20]


def test_every_estimator_is_probed_once_and_stands_in_no_table(robbench, tmp_path):
    arguments = [*RUN, "--baseline", OTHER, "--attack", "pgd,fgsm", *SERIAL, "--out", tmp_path]
    _, out, _ = robbench(*arguments, "--json")
    probed = [record.cell for record in Store(tmp_path).all() if record.cell.attack == "probe"]
    assert sorted(cell.defense for cell in probed) == sorted([TINY, OTHER])
    assert {row["attack"] for row in json.loads(out)} == {"pgd", "fgsm"}
    assert "probe" not in (tmp_path / "digits.cells.md").read_text()


def test_an_attack_that_never_asks_the_defense_itself_needs_no_probe(robbench, tmp_path):
    transfer = ["--setting", "transfer", "--oracle", OTHER]
    assert robbench(*RUN, *transfer, *SERIAL, "--quiet", "--out", tmp_path)[0] == 0
    assert {record.cell.attack for record in Store(tmp_path).all()} == {"pgd"}


def test_seeds_are_cells_of_their_own(robbench, folder):
    _, out, _ = robbench(*RUN, "--seeds", "2", *SERIAL, "--json", "--out", folder)
    assert [(row["eps"], row["seed"]) for row in json.loads(out)] == [
        ("0.02", 0),
        ("0.04", 0),
        ("0.02", 1),
        ("0.04", 1),
    ]


def test_a_transfer_attack_is_crafted_on_the_oracle_and_never_on_itself(robbench, tmp_path):
    transfer = ["--setting", "transfer", "--oracle", f"{OTHER},{TINY}"]
    code, out, _ = robbench(*RUN, *transfer, *SERIAL, "--json", "--out", tmp_path)
    assert code == 0
    rows = json.loads(out)
    assert {row["oracle"] for row in rows} == {OTHER}
    assert [row["setting"] for row in rows] == ["transfer", "transfer"]


def test_nothing_left_to_run_is_said_with_the_reason(robbench, tmp_path):
    result = robbench(*RUN, "--setting", "adaptive", "--out", tmp_path)
    assert_one_line(result, "nothing to run", "equals whitebox")


def test_set_is_short_for_settings_in_the_spec(robbench, tmp_path):
    assign = ["--set", "defense.epochs=2", "--set", "attack.steps=3"]
    _, out, _ = robbench(*RUN, *assign, *SERIAL, "--json", "--out", tmp_path)
    assert {(row["defense"], row["attack"]) for row in json.loads(out)} == {(OTHER, "pgd(steps=3)")}


def test_a_grid_file_is_every_combination_of_its_lists(robbench, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"defense: ['{TINY}']\nn: 20\neps: {{linf: [8/255], l2: ['0.5', '1']}}\n"
        "grid:\n- {attack: [fgsm, bim(steps=2)], norm: [linf, l2]}\n"
    )
    code, out, _ = robbench("run", "--grid", grid, *SERIAL, "--json", "--out", tmp_path)
    assert code == 0
    assert {(row["attack"], row["norm"], row["eps"]) for row in json.loads(out)} == {
        (name, norm, eps)
        for name in ("fgsm", "bim(steps=2)")
        for norm, eps in (("linf", "8/255"), ("l2", "0.5"), ("l2", "1"))
    }


def test_an_interrupted_run_says_that_it_can_go_on(robbench, tmp_path, monkeypatch):
    def interrupted(*rest, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "measure", interrupted)
    code, out, err = robbench(*RUN, "--quiet", "--out", tmp_path)
    assert (code, out) == (130, "")
    assert err.strip().splitlines() == [
        "robbench: interrupted; finished cells are kept, run it again to go on"
    ]


@pytest.fixture
def cheat(monkeypatch):
    """An attack that takes 1.01 ε."""
    list(registry.attacks)
    monkeypatch.setattr(registry.attacks, "_entries", dict(registry.attacks._entries))

    @attack("cheat", norms=("linf",))
    def run(access, x, y, threat, rng):
        return x + 1.01 * float(threat.eps) * torch.where(x < 0.5, 1.0, -1.0)


def test_a_failing_attack_is_its_own_cells_failure_and_exit_code_1(robbench, tmp_path, cheat):
    arguments = [*RUN, "--attack", "cheat,pgd", *SERIAL, "--out", tmp_path]
    code, out, _ = robbench(*arguments)
    assert code == 1
    assert out.count("failed") == 2 and "1.0100 ε" in out
    assert "digits: pgd" in out and "digits: cheat" not in out
    rows = json.loads(robbench(*arguments, "--json")[1])
    assert [row["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
    assert "accuracy" not in rows[0] and "accuracy" in rows[2]
    assert "cheat" not in (tmp_path / "digits.md").read_text()


# ------------------------------------------------------------- records and what follows from them


def test_leaderboard_writes_the_pages_that_run_wrote(robbench, folder):
    before = contents(folder)
    for page in ("digits.md", "digits.csv"):
        (folder / page).unlink()
    code, out, _ = robbench("leaderboard", "--out", folder)
    assert (code, out) == (0, f"wrote digits in {folder}\n")
    assert contents(folder) == before


@pytest.mark.parametrize("page", ["digits.md", "digits.csv"])
def test_leaderboard_check_finds_an_edited_page_and_leaves_it(page, robbench, folder):
    assert robbench("leaderboard", "--check", "--out", folder)[0] == 0
    text = (folder / page).read_text()
    (folder / page).write_text(text.replace("0", "9", 1))
    code, out, _ = robbench("leaderboard", "--check", "--out", folder)
    assert code == 1 and page in out
    assert (folder / page).read_text() != text


def test_leaderboard_writes_the_findings_between_their_marks_and_checks_them(robbench, folder):
    page = folder / "findings.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    both = ["leaderboard", "--findings", page, "--out", folder]
    code, out, _ = robbench(*both, "--check")
    assert code == 1 and str(page) in out and "old" in page.read_text()
    assert robbench(*both)[0] == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and "not measured" in text
    assert robbench(*both, "--check")[0] == 0


def test_findings_without_a_place_for_them_are_one_line_and_stay(robbench, folder):
    page = folder / "findings.md"
    page.write_text("no marks\n")
    arguments = ["leaderboard", "--out", folder, "--findings"]
    assert_one_line(robbench(*arguments, page), BEGIN, END)
    assert page.read_text() == "no marks\n"
    assert_one_line(robbench(*arguments, folder / "none.md"), "none.md", "does not exist")
    page.write_bytes(b"\x89PNG")
    assert_one_line(robbench(*arguments, page), "findings.md is no page in UTF-8")
    assert page.read_bytes() == b"\x89PNG"


def test_a_full_disk_leaves_the_old_findings_whole(robbench, folder, monkeypatch):
    page = folder / "findings.md"
    page.write_text(f"{BEGIN}\nold\n{END}\n")
    before = contents(folder)
    full(monkeypatch, lambda path, text: "findings" not in path.name)
    assert_one_line(robbench("leaderboard", "--findings", page, "--out", folder), "No space left")
    assert contents(folder) == before


def test_compare_pairs_the_images_of_two_defenses(robbench, folder):
    arguments = [*RUN, "--defense", OTHER, *SERIAL, "--json", "--out", folder]
    other = {row["eps"]: row["accuracy"] for row in json.loads(robbench(*arguments)[1])}
    code, out, _ = robbench("compare", TINY, OTHER, "--out", folder)
    assert code == 0
    assert f"A = {TINY}" in out and f"B = {OTHER}" in out
    for eps, accuracy in other.items():
        (line,) = [text for text in out.splitlines() if f" {eps} " in text]
        assert f" {100 * accuracy:.1f} " in line


def test_verify_answers_bitwise_for_what_was_measured(robbench, folder):
    code, out, _ = robbench("verify", record_files(folder)[0])
    assert code == 0
    assert out.startswith("holds bitwise: accuracy ")


def edited(path, flipped):
    """Rewrite a record with the first `flipped` outcomes turned over, consistently."""
    data = json.loads(path.read_text())
    record = Record.model_validate(data)
    for key in ("ok", "err"):
        values = getattr(record, key).copy()
        values[:flipped] = 1 - values[:flipped]
        packed = base64.b64encode(zlib.compress(values.tobytes())).decode()
        data[key] = {**data[key], "zlib": packed}
    path.write_text(json.dumps(data))


def test_verify_answers_no_for_outcomes_that_were_edited_consistently(robbench, folder):
    path = record_files(folder)[0]
    edited(path, 20)
    code, out, _ = robbench("verify", path)
    assert code == 1
    assert out.startswith("does not hold: accuracy ")


def test_verify_answers_within_the_interval_for_one_image(robbench, folder):
    path = record_files(folder)[0]
    edited(path, 1)
    code, out, _ = robbench("verify", path)
    assert code == 0
    assert out.startswith("holds within the interval ")


def rewritten(path, **changes):
    """A record of a cell that differs in `changes`, in place of the old one."""
    data = json.loads(path.read_text())
    data["cell"] |= changes
    data["id"] = Cell.model_validate(data["cell"]).id
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": "0" * 16}, "the data differ"),
        ({"defense_version": "99"}, "another version"),
        ({"attack_version": 99}, "another version"),
        ({"defense": "model:Net:0123456789ab"}, "robbench.evaluate"),
        ({"defense": "itto"}, "did you mean 'ito'"),
    ],
    ids=["data", "defense version", "attack version", "model", "defense"],
)
def test_verify_says_why_a_record_cannot_be_run_again(changes, part, robbench, folder):
    path = record_files(folder)[0]
    rewritten(path, **changes)
    assert_one_line(robbench("verify", path), part)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"schema_version": 99}, "another schema version"),
        ({"status": "failed", "reason": "it fell over"}, "it fell over"),
    ],
    ids=["schema", "failed"],
)
def test_verify_takes_only_finished_records_of_this_schema(changes, part, robbench, folder):
    path = record_files(folder)[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_one_line(robbench("verify", path), str(path), part)


# ----------------------------------------------------------------------- showing, and the shell


def test_help_lists_every_command(robbench):
    code, out, err = robbench("--help")
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert robbench() == (0, out, "")


def test_help_and_version_import_nothing_slow():
    code = (
        "import sys; from robbench.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['run', '--help'], ['list', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'pydantic', 'pandas', 'scipy', 'art', 'rich'}\n"
        "print('slow:', slow & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("slow: set()\n")


def test_version_is_that_of_the_package(robbench):
    from importlib.metadata import version

    assert robbench("--version") == (0, f"robbench {version('robbench')}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell, robbench):
    code, out, _ = robbench("completion", shell)
    assert code == 0
    assert f"_ROBBENCH_COMPLETE={shell}_complete" in out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("robbench ver", {"verify"}),
        ("robbench run --defense st", {"standard"}),
        ("robbench run --attack translat", {"translation"}),
        ("robbench list net", {"networks"}),
    ],
)
def test_the_shell_completes_commands_and_names(words, completed, robbench, monkeypatch):
    monkeypatch.setenv("_ROBBENCH_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = robbench()
    assert code == 0
    assert {line.partition(",")[2] for line in out.splitlines()} == completed


LISTED = {
    "defenses": lambda: list(registry.defenses),
    "attacks": lambda: [
        *registry.attacks,
        *(f"torchattacks:{name}" for name in torchattacks.names()),
        *(f"art:{name}" for name in art.names()),
    ],
    "datasets": lambda: [*datasets.DATASETS, "NAME@5000", "folder:PATH"],
    "networks": lambda: list(networks.NETWORKS),
}


@pytest.mark.parametrize("kind", LISTED)
def test_list_shows_every_name_within_100_columns(kind, robbench):
    code, out, _ = robbench("list", kind)
    assert code == 0
    starts = {line.split(" ")[0] for line in out.splitlines() if line}
    assert starts >= set(LISTED[kind]())
    assert max(map(len, out.splitlines())) <= 100


def test_list_attacks_names_norms_needs_and_faults(robbench):
    _, out, _ = robbench("list", "attacks")
    words = " ".join(out.split())
    assert "torchattacks:Square linf l2 scores ε" in words
    assert "torchattacks:AutoAttack linf l2 gradients ε not AutoAttack" in words
    assert "art:DPatch needs an object detector" in words


def test_list_defenses_has_a_line_for_each(robbench):
    _, out, _ = robbench("list", "defenses")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["ito"] == [
        "ito",
        "001",
        "anonymous",
        "yes",
        "majority",
        "vote",
        "yes",
        "any",
        "quick",
        "paper",
    ]
    assert rows["standard"][1:5] == ["He", "2016", "no", "mean"]


def test_list_of_one_defense_shows_the_settings_that_a_spec_takes(robbench):
    _, out, _ = robbench("list", "defenses", "ito")
    words = " ".join(out.split())
    assert "omega=0.4" in words and "quorum=majority" in words
    assert "schedule" in words.partition("Settings of every defense: ")[2]


def test_list_of_one_attack_shows_what_it_does_and_its_settings(robbench):
    _, out, _ = robbench("list", "attacks", "apgd")
    words = " ".join(out.split())
    assert "norms linf l2 l1" in words and "steps=100" in words
    code, _, err = robbench("list", "attacks", "apgdd")
    assert code == 2 and "did you mean 'apgd'" in err
    code, _, err = robbench("list", "attacks", "art:DPatch")
    assert code == 2 and "needs an object detector" in err


def test_networks_are_listed_all_at_once(robbench):
    code, _, err = robbench("list", "networks", "mlp")
    assert code == 2 and "robbench list networks" in err


def test_the_variants_of_the_papers_are_listed_with_the_papers(robbench):
    _, out, _ = robbench("list", "attacks")
    assert "pgd:as-published adp, mmc, mixup-inference, pdd" in " ".join(out.split())


def test_data_says_where_a_dataset_is(robbench):
    code, out, _ = robbench("data", "digits")
    assert code == 0
    where = Path(out.strip().rpartition("from ")[2])
    assert where.is_file()
    assert "500 test images" in out and datasets.load("digits").hash[:16] in out


# ------------------------------------------------------------------------------------ plugins


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the package tests/plugin is installed, as pip would do it."""
    copy = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, copy, dirs_exist_ok=True)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(copy / "site")
    return copy / "site"


def test_a_package_joins_by_entry_points_with_a_defense_an_attack_and_a_dataset(site, tmp_path):
    run = ["run", "--defense", "input-noise(sigma=0.2)", "--attack", "corners(tries=3)"]
    run += ["--dataset", "bars", "--baseline", "standard(epochs=2, network=mlp)", "--json"]
    run += ["-n", "40", "--workers", "1", "--out", str(tmp_path)]
    lists = [["list", kind] for kind in ("defenses", "attacks", "datasets")]
    code = (
        "import sys; from robbench.cli import main\n"
        f"for arguments in {[run, *lists, ['data', 'bars']]}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as left: assert not left.code, left\n"
        "    print('@@@', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows, defenses, attacks, names, data, _ = done.stdout.split("@@@\n")
    measured = [(row["defense"], row["eps"], row["draws"]) for row in json.loads(rows)]
    noisy, plain = "input-noise(sigma=0.2)", "standard(epochs=2, network=mlp)"
    assert measured == [
        (noisy, "0.1", 20),
        (noisy, "0.2", 20),
        (plain, "0.1", 1),
        (plain, "0.2", 1),
    ]
    assert [row["setting"] for row in json.loads(rows)] == ["blackbox"] * 4
    assert any(line.startswith("input-noise ") for line in defenses.splitlines())
    assert any(line.split()[:3] == ["corners", "linf", "scores"] for line in attacks.splitlines())
    assert ["bars", "plugin"] in [line.split() for line in names.splitlines()]
    assert "bars: 80 test images" in data
    assert len(record_files(tmp_path)) == 4


def test_a_plugin_with_the_name_of_our_dataset_is_an_error_that_names_both(monkeypatch):
    entries = registry.Registry("dataset", None)
    entries._loaded = True
    entries.add("digits", checkpoints.key_of)  # any function from elsewhere
    monkeypatch.setattr(registry, "datasets", entries)
    with pytest.raises(registry.InputError, match=r"checkpoints\.py and .*embedded\.py"):
        registry.dataset("digits")


def test_lists_of_a_plain_class_of_a_plugin_do_not_fail(monkeypatch):
    """A defense plugin that is none is refused when it is used, not when it is listed."""
    monkeypatch.setattr(registry.defenses, "_entries", {"odd": np.ndarray})
    assert "odd  " in listing.defenses() and "not a Defense" in listing.defenses()
    assert listing.defenses("odd").startswith("odd\n")


def test_a_training_that_diverges_is_one_line(robbench, tmp_path):
    code, _, err = robbench("train", "--defense", "standard(lr=1e30, epochs=1, network=mlp)", "-q")
    assert code == 1
    assert err.startswith("robbench: training of standard diverged") and err.count("\n") == 1


def test_one_label_is_no_dataset(robbench, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / split / "cat" / f"{index}.png")
    code, _, err = robbench("run", "--defense", "standard", "--dataset", f"folder:{tmp_path}")
    assert code == 2 and "has only the label cat; two are needed" in err
