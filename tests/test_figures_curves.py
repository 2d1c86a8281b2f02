"""Figures of accuracies over ε, over a parameter, over members × draws, and while training."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from torch import nn

from robbench import datasets, figures
from robbench.checkpoints import Shelf
from robbench.datasets.dataset import first
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import training
from robbench.figures.watching import Attacked, accuracies, variance, watch
from robbench.metrics import Measure
from robbench.papers.claims import _series
from robbench.papers.paper import Paper, Scale
from robbench.papers.reproduction import Known, Reproduction
from robbench.runner import Shared
from robbench.statistics import Interval

CPU = torch.device("cpu")
SMALL = first(datasets.load("digits"), 200, "small-digits")
MLP = "epochs=2, lr=0.003, network=mlp(hidden=[16, 8])"
Rows = list[dict[str, Any]]

OVER_EPS = {
    "bind": {"dataset": "cifar10", "attack": "pgd"},
    "panels": [
        {
            "name": "l2",
            "bind": {"norm": "l2"},
            "eps": [0, 0.5, 1.0],
            "published": {"A": {0: 92.0, 1.0: 50.0}},
            "quoted": {"C": {"0.5": 40.0}},
        },
        {"name": "linf", "bind": {"norm": "linf"}, "eps": [0, "4/255", "8/255"]},
    ],
    "series": [
        {"name": "A", "bind": {"defense": "standard"}},
        {"name": "B", "bind": {"defense": "ito", "measure": "correct_or_abstained"}},
    ],
    "everywhere": [{"name": "D", "bind": {"defense": "pgd-at"}}],
}
OVER_PARAMETER = {
    "bind": {"dataset": "cifar10", "attack": "pgd"},
    "defense": "ito(omega={value})",
    "parameter": "ω",
    "values": [0.1, 0.2, 0.4],
    "log2": True,
    "series": [{"name": "eps 8/255", "bind": {"eps": "8/255"}}],
    "published": {"eps 8/255": {0.2: 84.6}},
}
GRID = {
    "bind": {"dataset": "cifar10", "attack": "pgd"},
    "defense": "ito(members={members}, draws={draws})",
    "members": [1, 2, 20],
    "draws": [1, 4],
}
CURVES = {
    "panels": [
        {"name": "P", "series": [{"name": "plain", "dataset": "mnist", "defense": "standard"}]},
        {
            "name": "Q",
            "series": [
                {"name": "plain", "dataset": "mnist", "defense": "standard"},
                {"name": "three", "dataset": "mnist", "defense": "ensemble(training=separate)"},
            ],
        },
    ]
}
LOOKS = {
    "runs": [
        {
            "dataset": "mnist",
            "defense": "sdr-learnable",
            "panel": "MLP",
            "variance": "variance, MLP",
            "published": [14.0, 18.0],
            "attacked": {"eps": 0.2, "n": 40},
            "attacked_name": "FGSM accuracy",
        }
    ]
}


def measured(fields: Mapping[str, Any]) -> Measure:
    """A number that depends on every field, between 0.2 and 0.8."""
    value = 0.2 + 0.6 * (zlib.crc32(json.dumps(fields, sort_keys=True).encode()) % 997) / 997
    return Measure(value, Interval(value - 0.1, value + 0.1))


class Recorded(figures.Sources):
    """Sources whose records hold such numbers, and whose scale makes 2 of 20 members."""

    def __init__(self) -> None:
        self.reproduction = self

    def line(self, fields: Mapping[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(measure=measured(fields))

    def cells_of(self, binding: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(defense=binding.defense.replace("members=20", "members=2"))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> figures.Sources:
    """Of a paper whose MNIST is a few digits and whose networks are tiny."""
    scale = Scale(
        datasets={"mnist": "small-digits"},
        networks={name: "mlp(hidden=[16, 8])" for name in ("mlp", "resnet20")},
        recipe={
            "epochs": 2, "optimizer": "adam", "lr": 0.003, "schedule": "constant",
            "batch_size": 64, "weight_decay": 0.0, "crop": 0, "flip": False,
        },
    )  # fmt: skip
    paper = Paper(
        key="t", number="9", title="t", authors=("a",), venue="v", bibtex={}, tables={},
        scales={"smoke": scale},
    )  # fmt: skip
    shared = Shared(tmp_path_factory.mktemp("out"), None, CPU, {"small-digits": SMALL})
    reproduction = Reproduction(paper, "smoke", shared.dataset)
    return figures.Sources(reproduction, Known({}, {}, {}, {}), shared)


def rows_of(name: str, arguments: Mapping[str, Any], sources: Any = None) -> Rows:
    return list(figures.drawings.get(name).data(sources or Recorded(), arguments))  # type: ignore[arg-type]


def by_series(rows: Rows) -> dict[str, Rows]:
    return {row["series"]: [each for each in rows if each["series"] == row["series"]]
            for row in rows}  # fmt: skip


def test_points_over_eps_are_those_of_their_bindings() -> None:
    drawing = figures.drawings.get("accuracy-over-eps")
    found = by_series(rows_of("accuracy-over-eps", OVER_EPS))
    assert set(found) == {
        "A l2", "B l2", "D", "A l2 (published)", "C l2", "A linf", "B linf"
    }  # fmt: skip
    base = {"dataset": "cifar10", "attack": "pgd"}
    expected = [
        {**base, "norm": "linf", "defense": "ito", "eps": "4/255",
         "measure": "clean_correct_or_abstained"},
        {**base, "norm": "linf", "defense": "ito", "eps": "4/255",
         "measure": "correct_or_abstained"},
        {**base, "norm": "linf", "defense": "ito", "eps": "8/255",
         "measure": "correct_or_abstained"},
    ]  # fmt: skip
    asked = [dict(each) for each in drawing.bindings(OVER_EPS)]
    assert all(each in asked for each in expected) and len(asked) == 15
    assert [row["x"] for row in found["B linf"]] == pytest.approx([0, 4 / 255, 8 / 255])
    assert [row["x"] for row in found["D"]] == [0, 0.5, 1.0]  # once, of the first panel
    assert [row["y"] for row in found["A l2 (published)"]] == [92.0, 50.0]
    assert found["C l2"][0]["kind"] == "quoted" and found["C l2"][0]["low"] == ""
    row = found["A l2"][1]
    value = 100 * measured({**base, "norm": "l2", "defense": "standard", "eps": 0.5}).value
    assert (row["y"], row["low"], row["high"]) == pytest.approx((value, value - 10, value + 10))


def test_conditional_accuracy_without_attack_is_the_clean_one() -> None:
    arguments = {
        "bind": {"dataset": "d", "attack": "pgd", "defense": "pdd", "measure": "conditional"},
        "panels": [{"eps": [0, 0.1]}],
        "series": [{"name": "A"}],
    }
    asked = figures.drawings.get("accuracy-over-eps").bindings(arguments)
    assert [each["measure"] for each in asked] == ["clean", "conditional"]
    assert set(by_series(rows_of("accuracy-over-eps", arguments))) == {"A"}  # of one panel


def test_points_over_a_parameter() -> None:
    found = by_series(rows_of("accuracy-over-parameter", OVER_PARAMETER))
    asked = figures.drawings.get("accuracy-over-parameter").bindings(OVER_PARAMETER)
    assert [each["defense"] for each in asked] == [f"ito(omega={w})" for w in (0.1, 0.2, 0.4)]
    ours = found["eps 8/255"]
    assert [row["x"] for row in ours] == [0.1, 0.2, 0.4]
    assert [row["y"] for row in ours] == [100 * measured(each).value for each in asked]
    assert found["eps 8/255 (published)"][0]["x"] == 0.2


def test_members_by_draws_has_each_size_of_the_scale_once() -> None:
    rows = rows_of("members-by-draws", GRID)
    found = by_series(rows)
    assert set(found) == {"1 models", "2 models", "models", "inferences"}
    grid = np.array([[row["y"] for row in found[f"{m} models"]] for m in (1, 2)])
    assert [row["x"] for row in found["1 models"]] == [1, 4]
    assert [row["y"] for row in found["models"]] == pytest.approx(grid.mean(axis=1))
    assert [row["y"] for row in found["inferences"]] == pytest.approx(grid.mean(axis=0))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="panels.0.epsilon"):
        rows_of("accuracy-over-eps", {**OVER_EPS, "panels": [{"epsilon": [1]}]})


def test_claims_read_the_curves(tmp_path: Path) -> None:
    figures.write(tmp_path / "f.csv", rows_of("accuracy-over-eps", OVER_EPS))
    named = figures.read_series(tmp_path / "f.csv")
    points = _series(named, "B linf")
    assert len(points) == 3 and points == sorted(points)
    assert all(point.low <= point.y <= point.high for point in points)


def test_watching_changes_nothing_and_sees_every_epoch(tmp_path: Path) -> None:
    spec = f"sdr-learnable({MLP})"
    shelf = Shelf([tmp_path])
    key = shelf.deploy(spec, SMALL, 0, CPU).keys[0]
    alone = shelf.members(resolve(spec)[0], SMALL, 0, CPU)[0].state_dict()
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def look(epoch: int, members: nn.ModuleList) -> None:
        assert not members.training
        torch.rand(3), np.random.rand()  # random numbers of an attack are nobody else's
        for parameter in members.parameters():
            parameter.requires_grad_(False)
        seen[epoch] = members.state_dict()

    folders = [tmp_path]  # what is there already is trained again all the same
    watched = watch(spec, SMALL, 0, CPU, folders, look).state_dict()
    assert list(seen) == [0, 1, 2]
    for name, tensor in alone.items():
        assert torch.equal(tensor, watched[name]) and torch.equal(tensor, seen[2][name])
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in alone)
    assert [path.name for path in tmp_path.glob("*.json")] == [f"{key}.json"]


def test_a_base_that_is_trained_within_is_not_looked_at() -> None:
    seen: list[int] = []
    spec = f"standard({MLP}, base='standard({MLP})')"
    watch(spec, SMALL, 0, CPU, [], lambda epoch, members: seen.append(epoch))
    assert seen == [0, 1, 2]


def test_what_is_watched_has_the_accuracy_of_the_checkpoint(tmp_path: Path) -> None:
    """Without randomness the look after an epoch and the curve of training are the same number."""
    spec = f"standard({MLP})"
    shelf = Shelf([tmp_path])
    path = shelf.find(shelf.deploy(spec, SMALL, 0, CPU).keys[0])
    assert path is not None
    clean, attacked = [], []
    (defense,) = resolve(spec)

    def look(epoch: int, members: nn.ModuleList) -> None:
        threat = Attacked(eps=0.3)
        plain, worse = accuracies(defense, members, SMALL, threat, epoch)
        assert worse is not None
        clean.append(plain.value)
        attacked.append(worse.value)

    watch(spec, SMALL, 0, CPU, [], look)
    assert clean[1:] == [point.values[0] for point in training.curve(path, "validation")]
    assert all(worse <= plain for plain, worse in zip(clean, attacked, strict=True))


def test_members_trained_in_turn_cannot_be_watched() -> None:
    with pytest.raises(InputError, match="one by one"):
        watch("ensemble(training=separate)", SMALL, 0, CPU, [], lambda epoch, members: None)


def test_variance_of_untrained_weights_by_hand() -> None:
    """σ = initial / sqrt(inputs): a unit with k inputs has a variance of initial² in its weights
    and of initial² / k in its bias."""
    torch.manual_seed(0)
    members = resolve(f"sdr-learnable(initial=0.4, {MLP})")[0].build((1, 8, 8), 10)
    by_hand = sum(
        units * 0.4**2 * (1 + 1 / inputs) for inputs, units in ((64, 16), (16, 8), (8, 10))
    )
    assert variance(members) == pytest.approx(by_hand, rel=1e-4)


def test_variance_decays_by_zeta_twice_an_epoch() -> None:
    """With β = 0 nothing lets Σ grow, and it falls to ζ² of itself in every epoch."""
    seen = []
    spec = f"sdr-decay(beta=0, zeta=0.6, tau=0.5, {MLP})"
    watch(spec, SMALL, 0, CPU, [], lambda epoch, members: seen.append(variance(members)))
    assert seen == pytest.approx([seen[0] * 0.36**epoch for epoch in range(3)], rel=1e-4)


def test_training_curves_are_those_of_the_checkpoints(sources: figures.Sources) -> None:
    rows = rows_of("training-curves", CURVES, sources)
    found = by_series(rows)
    assert "plain validation P" in found and "plain training Q" in found
    three = found["three validation"]
    spec = sources.defense("ensemble(training=separate)", "mnist")
    path = sources.shared.shelf.find(sources.shared.deploy(spec, SMALL, 0).keys[0])
    assert path is not None
    curve = json.loads(path.with_suffix(".json").read_text())["curve"]
    for row in three:
        each = [p["validation_accuracy"] for p in curve if p["epoch"] == row["x"] - 1]
        assert len(each) == 3  # members one after the other
        assert row["y"] == pytest.approx(100 * np.mean(each))
        bounds = ttest_1samp(each, 0).confidence_interval(0.95)
        inside = [min(max(100 * bound, 0), 100) for bound in bounds]
        assert (row["low"], row["high"]) == pytest.approx(inside)
    assert rows == rows_of("training-curves", CURVES, sources)


def test_a_vote_is_watched(sources: figures.Sources) -> None:
    series = {
        "name": "ensemble",
        "dataset": "mnist",
        "defense": "sdr-learnable(test=vote, draws=3)",
    }
    arguments = {"parts": ["validation"], "panels": [{"series": [{**series, "watched": True}]}]}
    rows = rows_of("training-curves", arguments, sources)
    assert [(row["series"], row["x"]) for row in rows] == [("ensemble", 1), ("ensemble", 2)]
    assert rows == rows_of("training-curves", arguments, sources)


def test_variance_while_training(sources: figures.Sources) -> None:
    found = by_series(rows_of("variance-while-training", LOOKS, sources))
    assert [row["x"] for row in found["variance, MLP"]] == [0, 1, 2]
    assert [row["x"] for row in found["FGSM accuracy"]] == [1, 2]
    (printed,) = found["variance, MLP (published)"]  # a range, of no epoch
    assert [printed[key] for key in ("x", "y", "low", "high")] == ["", "", 14.0, 18.0]
    for row in (*found["clean accuracy"], *found["FGSM accuracy"]):
        assert 0 <= row["low"] <= row["y"] <= row["high"] <= 100
    assert found == by_series(rows_of("variance-while-training", LOOKS, sources))


EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "accuracy-over-eps": OVER_EPS,
    "accuracy-over-parameter": OVER_PARAMETER,
    "members-by-draws": GRID,
    "training-curves": CURVES,
    "variance-while-training": LOOKS,
}


@pytest.fixture
def plotted(tmp_path: Path, sources: figures.Sources) -> Callable[[str], Any]:
    """The plot of an example from rows that were read back from CSV, and its SVG twice over."""

    def plot(name: str) -> Any:
        trains = name in ("training-curves", "variance-while-training")
        rows = rows_of(name, EXAMPLES[name], sources if trains else None)
        data = tmp_path / "f.csv"
        figures.write(data, rows)
        read = figures.read(data)
        drawn = []
        for _ in range(2):
            made = figures.drawings.get(name).plot(read, EXAMPLES[name])
            figures.save(made, data)
            drawn.append([file.read_bytes() for file in figures.plots_of(data)])
        return made, read, drawn

    return plot


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_rows_give_the_same_bytes(name: str, plotted: Callable[[str], Any]) -> None:
    _, _, (one, other) = plotted(name)
    assert one == other and one[0].startswith(b"<?xml") and io.BytesIO(one[1]).read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    "name", ("accuracy-over-eps", "training-curves", "variance-while-training")
)
def test_every_series_is_in_the_plot(name: str, plotted: Callable[[str], Any]) -> None:
    """Lines hold the numbers of the CSV, in the panel that they belong to."""
    canvas, read, _ = plotted(name)
    panels = [axis for axis in canvas.axes if axis.lines]
    lines = [np.asarray(line.get_xydata()) for axis in panels for line in axis.lines]
    for series in by_series([row for row in read if row["x"] != ""]).values():
        points = np.array([[float(row["x"]), float(row["y"])] for row in series])
        assert any(line.shape == points.shape and np.allclose(line, points) for line in lines)
    assert all(axis.get_ylabel() for axis in panels) and panels[-1].get_xlabel()


def test_a_legend_tells_what_was_published_from_what_is_quoted(
    plotted: Callable[[str], Any],
) -> None:
    canvas, _, _ = plotted("accuracy-over-eps")
    labels = {text.get_text() for legend in canvas.legends for text in legend.get_texts()}
    assert labels == {"A", "B", "D", "C (quoted)", "published"}


def test_a_published_range_is_a_band_and_every_panel_says_what_it_is(
    plotted: Callable[[str], Any],
) -> None:
    canvas, _, _ = plotted("variance-while-training")
    (band,) = canvas.axes[0].patches
    assert (band.get_y(), band.get_height()) == (14.0, 4.0)
    assert [axis.get_title() for axis in canvas.axes] == ["MLP", "MLP"]


def test_ticks_that_would_run_into_each_other_have_one_label() -> None:
    from robbench.figures.styles import ticks

    _, axis = figures.canvas()
    ticks(axis, {0.0: "0", 1.0: "1", 1.02: "1.02", 2.0: "2"})
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "", "2"]
