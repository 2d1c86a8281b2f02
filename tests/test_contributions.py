"""Contributed records: every defect that can be planted makes its one line, and the tree none."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from robbench import figures, registry
from robbench.cli import main
from robbench.contributions import collect, problems
from robbench.contributions.beside import _remade
from robbench.contributions.files import file_problems
from robbench.contributions.pages import paper_pages
from robbench.datasets import DATASETS
from robbench.datasets import load as dataset_of
from robbench.datasets.described import FACTS, described
from robbench.grid import block
from robbench.papers import costs
from robbench.papers.reproduction import Known
from robbench.records import Record, Store, images_digest, images_file, read, read_images
from robbench.reproducing import loader, part_of
from robbench.runner import Shared

COMMITTED = Path(__file__).parent.parent / "leaderboards"
OTHER = "0" * 64
DEFENSE = "standard(epochs=1)"
GRID = f"""
defense: {DEFENSE}
grid:
  - {{attack: [pgd(steps=2), fgsm], n: 300, eps: [0.1, 0.2]}}
  - {{attack: deepfool, n: 20, eps: 0.1}}
  - {{attack: single-pixel, n: 20, norm: l0, eps: 1}}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of records with their images, some in two shards, made by a process of their own."""
    out = tmp_path_factory.mktemp("measured") / "leaderboards"
    grid = out.parent / "grid.yaml"
    grid.write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBBENCH_CACHE", str(out))
        process = ["--workers", "1", "--timeout", "600"]
        with pytest.raises(SystemExit) as left:
            main(["run", "--grid", str(grid), *process, "--keep-images", "-q", "--out", str(out)])
    assert not left.value.code
    return out


@pytest.fixture
def folder(measured, tmp_path):
    return Path(shutil.copytree(measured, tmp_path / "leaderboards"))


def lines_of(folder):
    store = Store(folder)
    found, lines = collect(store)
    return lines + problems(store, found)


def record_of(folder, attack):
    """The first record of an attack, and its file."""
    found, _ = collect(Store(folder))
    return next(each for each in found.items() if each[1].cell.attack.startswith(attack))


def put(folder, record, images=None):
    """Write a record as a forger would, with the id and the file of its cell."""
    record = record.model_copy(update={"id": record.cell.id})
    path = Store(folder).path(record.cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.text())
    if images is not None:
        with images_file(path).open("wb") as file:
            np.savez_compressed(file, x=images)


def forged(folder, attack, **changes):
    """Replace a record by one with changes, without its images."""
    path, record = record_of(folder, attack)
    path.unlink()
    images_file(path).unlink()
    provenance = {**record.provenance, **changes.pop("provenance", {})}
    provenance = {key: value for key, value in provenance.items() if value is not None}
    put(folder, record.model_copy(update={"provenance": provenance, **changes}))


def cell_with(folder, attack, changes):
    """The cell of a record with changes, those of threat and setting in dicts."""
    cell = record_of(folder, attack)[1].cell
    for part in ("threat", "setting"):
        if part in changes:
            changes[part] = getattr(cell, part).model_copy(update=changes[part])
    return cell.model_copy(update=changes)


def with_cell(provenance=None, **changes):
    def plant(folder):
        forged(folder, "pgd", cell=cell_with(folder, "pgd", changes), provenance=provenance or {})

    return plant


def with_array(attack, **changes):
    """changes: array -> function of (record) -> values."""

    def plant(folder):
        record = record_of(folder, attack)[1]
        forged(folder, attack, **{name: change(record) for name, change in changes.items()})

    return plant


def edited(name, where, value):
    """The array of a record with one value at the first image where a condition holds."""

    def change(record):
        values = getattr(record, name).copy()
        values[np.flatnonzero(where(record))[0]] = value
        return values

    return change


def moved(record):
    return (record.distance > 0) & (record.clean_ok == 1)


def broken(record):
    return moved(record) & (record.ok != record.clean_ok) & (record.distance < 0.1)


def beyond(record):
    return record.distance > 0.11


def with_provenance(**changes):
    return lambda folder: forged(folder, "pgd", provenance=changes)


def with_file(change):
    return lambda folder: change(record_of(folder, "pgd")[0])


def another_place(path):
    path.rename(path.with_name("0" * 20 + ".json"))
    images_file(path).rename(images_file(path).with_name("0" * 20 + ".npz"))


def edited_text(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damaged_checkpoint(folder):
    path = next((folder / "checkpoints").glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b"\0")


def lonely_checkpoint(folder):
    next((folder / "checkpoints").glob("*.json")).unlink()


def recipe_without_points(folder):
    edited_text(curve=[{"epoch": 0, "seconds": "?"}])(next((folder / "checkpoints").glob("*.json")))


def failed_without_reason(folder):
    record = record_of(folder, "pgd")[1]
    forged(folder, "pgd", **vars(Record(id=record.id, cell=record.cell, status="failed")) | {
        "provenance": record.provenance})  # fmt: skip


def failed_in_front(folder):
    record = record_of(folder, "pgd")[1]
    failed = Record(
        id=record.id, cell=record.cell, status="failed", reason="?", provenance=record.provenance
    )
    forged(folder, "pgd", cell=cell_with(folder, "pgd", {"attack_version": 1}))
    put(folder, failed)


def with_images(change, known=True):
    """The images of a record after a change, and what the record knows of them."""

    def plant(folder):
        path, record = record_of(folder, "deepfool")
        images = change(read_images(images_file(path)).copy())
        digest = images_digest(images) if known else OTHER
        put(
            folder,
            record.model_copy(update={"provenance": {**record.provenance, "images": digest}}),
            images,
        )

    return plant


def set_to(value):
    def change(images):
        images[3, 0, 4, 4] = value
        return images

    return change


PLANTED = {
    "broken": (with_file(lambda path: path.write_text("{")), "is broken"),
    "schema": (with_file(edited_text(schema_version=0)), "another schema version"),
    "id": (with_file(edited_text(id=OTHER)), "its id is not that of its cell"),
    "place": (with_file(another_place), "move it there"),
    "no record": (
        with_file(lambda path: path.with_name("notes.txt").write_text("")), "to no record"
    ),
    "unknown defense": (with_cell(defense="nothing"), "unknown defense"),
    "not canonical": (with_cell(defense="standard( epochs=1)"), "its defense is"),
    "unknown setting": (with_cell(attack="pgd(stepps=2)"), "unknown setting of attack pgd"),
    "model": (with_cell(defense="model:mine"), "nobody else has model:mine"),
    "norm": (with_cell(threat={"norm": "l0", "eps": 1}), "cannot do the norm l0"),
    "no eps": (with_cell(threat={"eps": None}), "has no ε"),
    "eot": (with_cell(setting={"eot": 5}), "its setting is"),
    "adaptive": (with_cell(setting={"kind": "adaptive"}), "its adaptive cell equals whitebox"),
    "suite": (with_cell(setting={"suite": "0"}), "its suite is"),
    "defense version": (with_cell(defense_version="99"), "version of the defense is newer"),
    "attack version": (with_cell(attack_version=99), "version of the attack is newer"),
    "oracle version": (
        with_cell(setting={"oracle_version": "99"}), "version of the oracle is newer"
    ),
    "data": (with_cell(data="0" * 16), "not the start of its dataset_hash"),
    "other data": (
        with_cell(data="0" * 16, provenance={"dataset_hash": OTHER}), "has another hash"
    ),
    "subset": (with_provenance(subset_hash=OTHER), "its subset_hash is not"),
    "clean outcome": (
        with_array("pgd", clean_ok=edited("clean_ok", moved, 0),
                   clean_best=edited("clean_best", moved, 0)), "its clean outcome is not"
    ),
    "eps": (with_array("pgd", distance=edited("distance", moved, 0.25)), "farther than ε"),
    "nan": (with_array("pgd", distance=edited("distance", moved, np.nan)), "is no length"),
    "negative": (with_array("pgd", distance=edited("distance", moved, -1)), "is no length"),
    "box": (with_array("deepfool", distance=edited("distance", beyond, 1.5)), "in the box"),
    "beyond eps": (
        with_array("deepfool", distance=edited("distance", broken, 0.5)), "judged in two ways"
    ),
    "pixels": (
        with_array("single-pixel", distance=edited("distance", lambda r: r.distance == 1, 0.5)),
        "no number of pixels",
    ),
    "unchanged": (
        with_array("pgd", distance=edited("distance", moved, 0)), "unchanged contradicts"
    ),
    "trace": (
        with_array("pgd", trace=lambda record: {"loss": record.trace["loss"]}), "'unchanged'"
    ),
    "best": (with_array("pgd", best=edited("best", lambda r: r.ok == 1, 0)), "best does not fit"),
    "draws": (with_array("pgd", draws=lambda record: 20), "20 scoring draws"),
    "cost": (with_array("pgd", cost=lambda record: {"forwards": 1.0}), "cost has forwards, not"),
    "no cost": (with_array("pgd", cost=lambda record: {}), "cost has nothing, not"),
    "negative cost": (
        with_array("pgd", cost=lambda record: {**record.cost, "seconds": -1.0}), "seconds: Input"
    ),
    "no subset": (with_provenance(subset_hash=None), "subset_hash: Field required"),
    "no weights": (with_provenance(weights=None), "weights or oracle_weights is missing"),
    "draws of no dict": (with_provenance(eot=20), "eot: Input should be"),
    "no number of draws": (with_provenance(eot={"chosen": "5"}), "eot.chosen: Input should be"),
    "changed": (with_provenance(changed=3), "changed: Input should be"),
    "probe": (with_provenance(probe={"paths": {}}), "probe.paths.judge: Field required"),
    "stages": (with_provenance(suite=["fgsm"]), "not that of a suite of 1 stages"),
    "draws of a failed cell": (
        with_array("pgd", status=lambda record: "failed", reason=lambda record: "?",
                   provenance=lambda record: {"eot": 20}), "eot: Input should be"
    ),
    "no version of torch": (with_provenance(versions={"numpy": "2"}), "versions lacks torch"),
    "weights": (with_provenance(weights=[OTHER]), "its weights are not those in"),
    "two weights": (with_provenance(weights=[OTHER] * 2), "2 weights for 1 checkpoints"),
    "checkpoints": (with_provenance(checkpoints=[OTHER]), "its checkpoints are not the keys"),
    "oracle": (with_provenance(oracle_checkpoints=[OTHER]), "oracle_checkpoints are not"),
    "damaged checkpoint": (damaged_checkpoint, "the checkpoint is broken"),
    "lonely checkpoint": (lonely_checkpoint, "the recipe"),
    "no points": (recipe_without_points, "the checkpoint is broken (curve.0.seconds"),
    "hidden": (
        with_file(lambda path: path.rename(path.with_name(".forged.json"))
                  and images_file(path).unlink()), "move it there"
    ),
    "hidden file": (
        with_file(lambda path: path.with_name(".notes").write_text("")), "to no record"
    ),
    "no reason": (failed_without_reason, "failed without a reason"),
    "failed in front": (failed_in_front, "hides"),
    "other images": (with_images(set_to(0.5), known=False), "SHA-256"),
    "images out of the box": (with_images(set_to(1.5)), "not within the box"),
    "moved images": (with_images(set_to(0.987)), "other distances than the record in image 3"),
    "few images": (with_images(lambda images: images[1:]), "has the shape (19, 1, 8, 8)"),
    "flat images": (with_images(lambda images: images[:, :, :4]), "not (20, 1, 8, 8)"),
    "broken images": (
        with_file(lambda path: images_file(path).write_bytes(b"PK")), "are broken"
    ),
    "unknown images": (
        with_file(lambda path: shutil.copy(images_file(path), path.with_name("a.npz"))),
        "a.npz: it belongs to no record",
    ),
}  # fmt: skip


def test_what_run_wrote_has_no_problem(measured):
    assert lines_of(measured) == []


@pytest.mark.parametrize(("plant", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_defect_makes_its_line_and_no_other(plant, words, folder):
    plant(folder)
    (line,) = lines_of(folder)
    assert words in line and str(folder) in line and "; " in line


def test_the_images_of_all_shards_lie_beside_the_record(measured):
    path, record = record_of(measured, "pgd")
    images = read_images(images_file(path))
    assert images.shape == (300, 1, 8, 8)
    assert record.provenance["images"] == images_digest(images)


def test_images_go_where_the_cell_is_run_again_without_them(folder):
    path, record = record_of(folder, "fgsm")
    Store(folder).put(record)
    assert not images_file(path).exists() and path.exists()
    assert Store(folder).get(record.cell) and not Store(folder).get(record.cell, images=True)


def test_verify_looks_at_the_images_first(robbench, folder):
    with_images(set_to(0.987))(folder)
    code, out, _ = robbench("verify", record_of(folder, "deepfool")[0])
    assert code == 1 and "does not hold" in out and "other distances" in out


def test_data_that_are_not_here_are_held_against_the_other_records(tmp_path):
    folder = tmp_path / "leaderboards"
    store = Store(COMMITTED)
    whole = (record for record in store.all("mnist") if record.cell.n == 200)
    first, *others = islice(whole, 4)
    for record in (first, *others):
        Store(folder).put(record)
    assert lines_of(folder) == []
    provenance = {**first.provenance, "subset_hash": OTHER}
    Store(folder).put(first.model_copy(update={"provenance": provenance}))
    (line,) = lines_of(folder)
    assert "its subset_hash is not that of the other records" in line


def test_the_committed_records_have_no_problem():
    store = Store(COMMITTED)  # a part of them: `.ci/run` looks at all
    found = {path: read(path) for path in sorted(store.folder.rglob("*.json"))[::12]}
    assert problems(store, found) == []


def test_check_names_everything_that_is_wrong(robbench, folder):
    assert robbench("leaderboard", "--check", "--out", folder)[0] == 0
    forged(folder, "single-pixel", provenance={"eot": 20})  # no page can be made of it
    for attack in ("pgd", "fgsm"):
        record_of(folder, attack)[0].write_text("{")
    damaged_checkpoint(folder)
    code, out, _ = robbench("leaderboard", "--check", "--out", folder)
    *lines, last = out.splitlines()
    assert code == 1 and last == "pages are compared once the records are right"
    assert sorted("is broken" in line for line in lines) == [False, True, True, True]


def test_pages_of_papers_are_checked_and_written_without_their_data(robbench, folder, monkeypatch):
    page = folder / "papers" / "enresnet.cpu.md"
    page.parent.mkdir()
    page.write_text("edited")
    monkeypatch.setenv("ROBBENCH_DATA", str(folder / "nowhere"))
    code, out, _ = robbench("leaderboard", "--check", "--out", folder)
    assert code == 1 and str(page) in out and page.read_text() == "edited"
    assert robbench("leaderboard", "--out", folder)[0] == 0
    assert "not measured" in page.read_text()
    assert robbench("leaderboard", "--check", "--out", folder)[0] == 0


FIGURE, COSTS = "papers/pang/fig_mmd.smoke.csv", "papers/sdr.smoke.costs.json"


@pytest.fixture(scope="module")
def begun(measured, tmp_path_factory):
    """The same folder with costs of one paper and a computed figure of another."""
    out = tmp_path_factory.mktemp("begun") / "leaderboards"
    shutil.copytree(measured, out)
    load, shared = loader(out, None), Shared(out, None, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(costs.FUNCTIONS, "epoch-seconds", costs.Function(_seconds, 3))
        assert part_of("sdr:claims", "smoke", out, load).measure_costs(shared) == []
    known = Known.of([], 1)
    assert part_of("pang:fig_mmd", "smoke", out, load).figures.draw(shared, known) == []
    return out


def _seconds(spec, dataset, shared, arguments):
    return lambda: 1.0


@pytest.fixture
def papers(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "leaderboards"))


def paper_lines(folder):
    store = Store(folder)
    found, _ = collect(store)
    made = paper_pages(store, list(found.values()), {})
    files = file_problems(store, {*made.texts, *folder.glob("digits.*")})
    differing = [f"{path} differs" for path, text in made.texts.items()
                 if not path.exists() or path.read_text() != text]  # fmt: skip
    return [*made.broken, *made.doubts, *files, *differing]


def with_cost(which, **changes):
    """Change the first cost of a function, or its inputs."""

    def plant(folder):
        kept = json.loads((folder / COSTS).read_text())
        cost = kept[next(key for key in kept if key.startswith(which))]
        for name, value in changes.items():
            where = cost if name in cost else cost["inputs"]
            where[name] = {**where[name], **value} if isinstance(value, dict) else value
        (folder / COSTS).write_text(json.dumps(kept))

    return plant


def with_text(name, change):
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def with_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def without(name):
    return lambda folder: (folder / name).unlink()


def of_other_data(kind):
    """A plot that the data beside it was not drawn to."""

    def plant(folder):
        data, elsewhere = folder / FIGURE, folder.parent / "other.csv"
        elsewhere.write_text("x,y\n1,2\n")
        figures.save(figures.canvas()[0], elsewhere)
        elsewhere.with_suffix(f".{kind}").rename(data.with_suffix(f".{kind}"))

    return plant


def stray(name):
    def plant(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    return plant


def unknown_cost(folder):
    text = (folder / COSTS).read_text()
    (folder / COSTS).write_text(text.replace('"parameters · sdr', '"parameters · rds', 1))


PAPERS = {
    "costs cut": (with_text(COSTS, lambda text: text[:-40]), "are broken"),
    "no costs": (with_text(COSTS, lambda text: "[1]"), "are broken"),
    "negative cost": (with_cost("epoch", value=-1.0), "are broken"),
    "outside": (with_cost("epoch", value=9.0), "does not lie in its interval"),
    "not a number": (with_cost("epoch", value=float("nan")), "are broken"),
    "nowhere": (with_cost("epoch", environment={"versions": {}}), "versions lacks torch"),
    "other images": (with_cost("epoch", datasets={"digits": OTHER}), "digits has other images"),
    "older": (with_cost("epoch", versions={"standard": "99"}), "standard has another version"),
    "count": (with_cost("parameters", value=7.0), "is stale, there are"),
    "unknown cost": (unknown_cost, "the paper has no such cost"),
    "csv cut": (
        with_text(FIGURE, lambda text: "".join(text.splitlines(keepends=True)[:-1])),
        "not as it was written",
    ),
    "csv without a table": (with_text(FIGURE, lambda text: ""), "not as it was written"),
    "csv of nothing": (without(FIGURE.replace("csv", "json")), "fig_mmd.smoke.json is missing"),
    "csv of something": (stray(FIGURE.replace("csv", "json")), "fig_mmd.smoke.json is broken"),
    "no csv": (without(FIGURE), "fig_mmd.smoke.csv is stale, it is missing"),
    "png cut": (with_bytes(FIGURE.replace("csv", "png"), lambda data: data[:-50]), "it is no PNG"),
    "svg cut": (with_bytes(FIGURE.replace("csv", "svg"), lambda data: data[:-50]), "it is no SVG"),
    "png of other data": (of_other_data("png"), "png: it was not drawn from fig_mmd.smoke.csv"),
    "svg of other data": (of_other_data("svg"), "svg: it was not drawn from fig_mmd.smoke.csv"),
    "no svg": (without(FIGURE.replace("csv", "svg")), "fig_mmd.smoke.svg: it is missing"),
    "board of nothing": (stray("cifar10.md"), "cifar10.md: nothing here writes it"),
    "costs of nobody": (stray("papers/nope.cpu.costs.json"), "nothing here writes it"),
    "figure of nobody": (stray("papers/pang/figure.smoke.png"), "nothing here writes it"),
    "csv without its page": (stray("papers/pang.smoke.csv"), "pang.smoke.md differs"),
    "figure without records": (stray("papers/ito/figure2.smoke.csv"), "figure2.smoke.csv is stale"),
}


def test_costs_and_figures_as_reproduce_wrote_them_have_no_problem(begun):
    assert paper_lines(begun) == []


@pytest.mark.parametrize(("plant", "words"), PAPERS.values(), ids=PAPERS)
def test_a_defect_beside_the_records_makes_a_line(plant, words, papers):
    plant(papers)
    lines = paper_lines(papers)
    assert any(words in line for line in lines) and not any("\n" in line for line in lines)


def test_a_missing_record_keeps_no_page_from_being_written(robbench, papers):
    for name in ("ito/figure2.cpu.csv", "ito.cpu.md", "pdd.cpu.md"):
        path = papers / "papers" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    code, _, err = robbench("leaderboard", "--out", papers)
    assert code == 0 and "figure2.cpu.csv is stale" in err and "not measured" in err
    assert all((papers / f"papers/{key}.cpu.md").read_text() for key in ("ito", "pdd"))
    code, out, _ = robbench("leaderboard", "--check", "--out", papers)
    assert code == 1 and "figure2.cpu.csv is stale" in out and "not what the records" not in out


def test_every_dataset_can_be_described():
    assert FACTS.keys() == DATASETS.keys()
    digits = registry.dataset("digits")
    made = described("digits", digits.hash)
    for name in ("shape", "hash", "labels", "eps", "control"):
        assert getattr(made, name) == getattr(digits, name)
    assert len(made.test.y) == len(digits.test.y)
    with pytest.raises(Exception, match="has 500 images"):
        made.subset(501)


@pytest.mark.parametrize("eot", [1, 20])
def test_transfer_from_a_stochastic_oracle_can_be_made_again_whatever_its_draws(eot):
    digits = dataset_of("digits")
    asked = block(
        dataset="digits",
        n=10,
        defense=["standard"],
        attack=["pgd"],
        norm=["linf"],
        eps=["0.1"],
        setting=["transfer"],
        oracle=["ito"],
        eot=eot,
    )
    (cell,) = asked.cells(digits, None)
    assert cell.setting.eot == eot
    assert _remade(cell.model_copy(update={"data": ""}), digits).setting.eot == eot
