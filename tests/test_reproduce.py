"""From bound numbers to tables: derived numbers, claims, formats, and the command."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from scipy.stats import ttest_rel
from sklearn.metrics import roc_auc_score

from robbench.datasets import load as dataset
from robbench.errors import InputError
from robbench.grid import Cell, Setting
from robbench.metrics.diversity import entropy_measure
from robbench.papers import cells, claims, derived, load, pages
from robbench.papers.paper import Binding, Claim, Scale
from robbench.records import Record
from robbench.threat import Threat

BOUND = {"dataset": "digits", "defense": "standard", "attack": "pgd", "norm": "linf", "eps": "0.1"}
N = 40


def record(right, seed=0, draws=1, **arrays):
    """A record of images that are so often right under attack and always when clean."""
    ok = np.asarray(right, dtype=np.uint8)
    full = np.full(len(ok), draws, dtype=np.uint8)
    cell = Cell(
        dataset="digits",
        data="0" * 16,
        n=len(ok),
        defense="standard",
        defense_version="1",
        attack="pgd",
        attack_version=1,
        threat=Threat(eps="1/10"),
        setting=Setting(kind="whitebox"),
        seed=seed,
    )
    fields = {"clean_ok": full, "distance": np.zeros(len(ok), np.float32), **arrays}
    return Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        ok=ok,
        err=(full - ok).astype(np.uint8),
        clean_err=(full - fields["clean_ok"]).astype(np.uint8),
        cost={"forwards": 1.0, "backwards": 1.0, "queries": 1.0, "seconds": 1.0},
        **fields,
    )


def bound(function, **arguments):
    return Binding(kind="derived", function=function, arguments=arguments, **BOUND)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_a_difference_is_paired_over_images(random):
    a, b = random.integers(0, 2, N), random.integers(0, 2, N)
    found = derived.value_of(bound("difference", **{"from": {}}), [record(a), record(b)])
    theirs = ttest_rel(a.astype(float), b.astype(float))
    assert found.value == pytest.approx((a - b.astype(float)).mean())
    assert found.interval == pytest.approx(theirs.confidence_interval(0.95), abs=1e-9)


def test_auc_is_scikit_learns_over_broken_images_and_their_originals(random):
    right, clean, attacked = (
        random.integers(0, 2, N),
        random.normal(1, 1, N),
        random.normal(0, 1, N),
    )
    made = record(
        right,
        best=right.astype(np.uint8),
        clean_best=np.ones(N, np.uint8),
        score=attacked.astype(np.float32),
        clean_score=clean.astype(np.float32),
    )
    broken = right == 0
    scores = np.concatenate([clean[broken], attacked[broken]]).astype(np.float32)
    truth = np.repeat([1, 0], broken.sum())
    found = derived.value_of(bound("auc"), [made])
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert found.interval.low < found.value < found.interval.high


def test_auc_of_an_attack_that_breaks_nothing_is_not_defined():
    ones = np.ones(N, np.uint8)
    scores = {"score": np.zeros(N, np.float32), "clean_score": np.zeros(N, np.float32)}
    found = derived.value_of(bound("auc"), [record(ones, best=ones, clean_best=ones, **scores)])
    assert np.isnan(found.value)


def test_entropy_is_the_measure_of_who_is_right_when_clean(random):
    import torch

    clean = random.integers(0, 2, (3, N)).astype(np.uint8)
    made = [record(np.zeros(N), seed=k, clean_ok=clean[k]) for k in range(3)]
    found = derived.value_of(bound("entropy"), made)
    assert found.value == pytest.approx(entropy_measure(torch.from_numpy(clean > 0)))


def test_runs_have_the_mean_and_the_standard_deviation_of_their_accuracies(random):
    runs = [record(random.integers(0, 2, N), seed=k) for k in range(5)]
    accuracies = [float(each.ok.mean()) for each in runs]
    assert derived.value_of(bound("spread"), runs).value == pytest.approx(
        np.std(accuracies, ddof=1)
    )
    assert derived.value_of(bound("mean-of-runs"), runs).value == pytest.approx(np.mean(accuracies))


def test_shares_of_images_are_complete(random):
    made = record(random.integers(0, 6, N), draws=5)
    shares = [derived.measured(made, name).value for name in ("accuracy", "incorrect", "abstained")]
    assert sum(shares) == pytest.approx(1)
    assert derived.measured(made, "clean").value == 1
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        derived.measured(made, "acuracy")


SMALLER = Scale(
    datasets={"cifar10": "digits"},
    networks={"resnet20": "quick", "resnet50": "quick(width=4)"},
    recipe={"epochs": 2},
    recipe_of={"ito": {"epochs": 1}},
    members={20: 3},
    draws={20: 7},
)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("enresnet(network=resnet20, members=5)", ["members=5", "epochs=2", "step=2/255"]),
        ("ito(network=resnet50)", ["draws=7", "epochs=1", "base=", "quick(width=4)"]),
        ("pgd-at(network=resnet20) & standard(network=resnet20)", [" & ", "epochs=2"]),
    ],
)
def test_a_scale_reaches_every_part_of_a_defense(given, parts):
    found = cells.shrunk(given, "cifar10", SMALLER)
    assert all(part in found for part in parts)
    assert "resnet20" not in found and "resnet50" not in found


def test_a_scale_that_shrinks_nothing_leaves_the_preset_of_the_paper():
    from robbench.defense import with_preset

    text = "enresnet(network=resnet20)"
    assert cells.shrunk(text, "cifar10", Scale()) == str(with_preset(text, "paper", "cifar10"))


def test_the_adaptive_cell_of_a_deterministic_defense_is_its_white_box():
    asked = Binding(**{**BOUND, "setting": "adaptive", "eot": 5})
    made = cells.cell_of(asked, Scale(recipe={"epochs": 2}), dataset)
    assert (made.setting.kind, made.setting.eot) == ("whitebox", 1)


def test_any_length_is_the_whole_box():
    for norm, whole in (("linf", 1), ("l2", 8), ("l1", 64), ("l0", 64)):
        attack = {"l0": "jsma", "l1": "ead"}.get(norm, "pgd")
        asked = Binding(**{**BOUND, "attack": attack, "norm": norm, "eps": "any"})
        assert cells.cell_of(asked, Scale(recipe={"epochs": 2}), dataset).threat.eps == whole


def judged(claim, measures):
    """A claim about numbers with these measures, by path."""
    numbers = {path: number for path, number in zip("ab", load("enresnet").numbers(), strict=False)}

    def line_of(path):
        number = numbers[path]._replace(binding=bound("mean-distance"))
        return claims.Line(number, "percent", (), measures[path], "")

    return claims.judge(Claim(what="w", where="1", **claim), line_of, lambda figure: CURVES)


def measure(value, low, high):
    from robbench.metrics import Measure
    from robbench.statistics import Interval

    return Measure(value, Interval(low, high))


CURVES = {
    "up": ([0, 1, 2, 3], [0.1, 0.2, 0.4, 0.5]),
    "down": ([3, 2, 1, 0], [0.1, 0.2, 0.4, 0.5]),
    "hill": ([0, 1, 2, 3], [0.1, 0.6, 0.5, 0.2]),
    "flat": ([0, 1, 2, 3], [0.1, 0.1, 0.1, 0.1]),
}


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        ({"number": "a", "value": 52}, "yes"),
        ({"number": "a", "value": 60}, "no"),
        ({"number": "a", "value": "<=60"}, "yes"),
        ({"number": "a", "value": ">60"}, "no"),
        ({"number": "a", "value": "~56"}, "yes"),
        ({"number": "a", "value": "O(K^2)"}, "undecided"),
        ({"number": "a", "holds": "below:60"}, "yes"),
        ({"number": "a", "holds": "below:50"}, "undecided"),
        ({"number": "a", "holds": "above:60"}, "no"),
        ({"differ": ["a", "b"], "holds": "positive"}, "yes"),
        ({"differ": ["b", "a"], "holds": "positive"}, "no"),
        ({"differ": ["a", "a"], "holds": "zero:10"}, "yes"),
        ({"differ": ["a", "a"], "holds": "zero:1"}, "undecided"),
        ({"differ": ["a", "b"], "holds": "zero"}, "no"),
        ({"order": [["a", "b"]]}, "yes"),
        ({"order": [["b", "a"], ["a", "b"]]}, "no"),
        ({"order": [["a", "a"]]}, "undecided"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "rises"}, "yes"),
        ({"curve": {"figure": "f", "series": ["down"]}, "holds": "rises"}, "no"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["flat"]}, "holds": "falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["hill"]}, "holds": "rises-then-falls"}, "yes"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "rises-then-falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["up", "flat"]}, "holds": "widens"}, "yes"),
        ({"curve": {"figure": "f", "series": ["up", "up"]}, "holds": "widens"}, "no"),
        ({"text": "a definition"}, "a definition"),
    ],
)
def test_whether_a_claim_holds(claim, holds):
    measures = {"a": measure(0.52, 0.49, 0.55), "b": measure(0.3, 0.27, 0.33)}
    assert judged(claim, measures).holds == holds


def test_a_claim_without_a_measure_says_why():
    assert judged({"number": "a", "value": 1}, {"a": None}).holds == ""
    unknown = judged({"curve": {"figure": "f", "series": ["ups"]}, "holds": "rises"}, {})
    assert "unknown series 'ups'" in unknown.holds


def test_a_claim_has_one_counterpart():
    with pytest.raises(ValueError, match="one of number, bind, differ, order, curve and text"):
        Claim(what="w", where="1", number="a", text="b")


def test_bibtex_has_a_balanced_entry_for_every_paper():
    for key in ("enresnet", "ito", "pang", "pdd", "sdr"):
        entry = pages.bibtex(load(key))
        assert re.match(rf"@\w+{{{key},\n", entry)
        assert entry.count("{") == entry.count("}")
        assert len(re.findall(r"^  title = ", entry, re.MULTILINE)) == 1


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


def test_a_table_is_measured_and_printed(robbench, out):
    code, text, err = robbench(
        "reproduce", "enresnet:table7", "--scale", "smoke", "--out", out, "--workers", "1"
    )
    assert code == 0, err
    assert "trainings" in err and "goes on where it was" in err
    assert max(map(len, text.splitlines())) <= 80
    assert "digits · quick(width=4) · n = 10 · 1 epochs" in text
    assert re.search(r"ifgsm20 +46\.03 +\d+\.\d \(\d", text)


def shown(robbench, out, form, what="enresnet:table7"):
    call = ("reproduce", what, "--scale", "smoke", "--out", out, "--show", "--format", form)
    code, text, err = robbench(*call)
    assert (code, err) == (0, "")
    return text


def test_formats_agree(robbench, out):
    rows = json.loads(shown(robbench, out, "json"))
    lines = list(csv.DictReader(io.StringIO(shown(robbench, out, "csv"))))
    assert len(rows) == len(lines) == 8
    for row, line in zip(rows, lines, strict=True):
        assert line["number"] == row["number"] and float(line["measured"]) == row["measured"]
        assert row["low"] <= row["measured"] <= row["high"]
        assert (row["dataset"], row["n"], row["epochs"]) == ("digits", "10", "1")
    latex = shown(robbench, out, "latex")
    grid = [line for line in latex.splitlines() if line.rstrip().endswith(r"\\")]
    assert len(grid) == 5 and {line.count("&") for line in grid} == {8}
    assert f"{rows[1]['measured']:.1f} ({rows[1]['low']:.1f}--" in latex
    assert r"\cite{enresnet}" in latex
    markdown = shown(robbench, out, "markdown")
    assert f"{rows[1]['measured']:.1f} ({rows[1]['low']:.1f}–" in markdown
    assert shown(robbench, out, "bibtex").startswith("@")


def test_claims_that_nothing_was_measured_for_say_so(robbench, out):
    text = shown(robbench, out, "text", "enresnet:claims")
    assert re.match(r"\d+ claims: \d+ hold at this scale", text)
    assert "not measured" in text and max(map(len, text.splitlines())) <= 80


def test_an_estimate_runs_nothing(robbench, tmp_path):
    code, text, _ = robbench(
        "reproduce", "enresnet:table7", "--scale", "smoke", "--out", tmp_path, "--estimate"
    )
    assert code == 0 and re.match(r"\d+ trainings, about .* on 8 cells", text)
    assert not list(tmp_path.rglob("*.json"))


def test_what_there_is_is_listed(robbench):
    code, text, _ = robbench("reproduce")
    assert code == 0
    for part in ("enresnet:table1", "pdd:figure4", "sdr:claims", "not drawn"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["enresnet:tabel1"], "unknown part of enresnet 'tabel1'; did you mean 'table1'"),
        (["enresnt"], "unknown paper 'enresnt'; did you mean 'enresnet'"),
        (["sdr", "--estimate", "--show"], "write one"),
        (["enresnet:table1", "--scale", "paper"], "robbench data cifar10"),
    ],
)
def test_a_mistake_is_one_line(robbench, tmp_path, arguments, message):
    call = ["reproduce", *arguments, "--out", tmp_path, "--data-dir", tmp_path]
    code, out, err = robbench(*call)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
