"""From bound numbers to tables: derived numbers, claims, formats, and the command."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from sklearn.metrics import roc_auc_score

from robbench import figures, statistics
from robbench.audit import CHECKS, Audited, Flag
from robbench.cell import Cell, Setting
from robbench.checkpoints import Shelf, key_of
from robbench.cli import main
from robbench.datasets import load as dataset
from robbench.datasets.dataset import first
from robbench.datasets.described import described
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.executors import measure as measure_cells
from robbench.metrics import Measure
from robbench.metrics.diversity import entropy_measure
from robbench.metrics.uncertainty import variability
from robbench.papers import cells, claims, costs, derived, estimate, latex, ledger, load, wording
from robbench.papers.inputs import inputs_on
from robbench.papers.paper import Binding, Claim, Scale, keys
from robbench.papers.reproduction import Known
from robbench.records import Record, Store
from robbench.rendering import page_files, rendered
from robbench.reproducing import loader, part_of
from robbench.runner import Shared, Training
from robbench.statistics import Interval
from robbench.tasks import Passes, attack_passes, plan
from robbench.threat import Threat

BOUND = {"dataset": "digits", "defense": "standard", "attack": "pgd", "norm": "linf", "eps": "0.1"}
N = 40
NEAR = "the published value lies in the interval, which is no longer than it or than 4"


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
    found = derived.value_of(bound("mean-of-runs"), runs)
    assert found.value == pytest.approx(np.mean(accuracies))
    assert found == tuple(variability(runs, lambda run: run.ok / run.draws)[:2])


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
    numbers = dict(zip(measures, load("enresnet").numbers(), strict=False))

    def line_of(path):
        number = numbers[path]._replace(binding=bound("mean-distance"))
        return claims.Line(number, "percent", (), measures[path], "")

    return claims.judge(Claim(what="w", where="1", **claim), line_of, lambda figure: CURVES)


def measure(value, low, high):
    from robbench.metrics import Measure
    from robbench.statistics import Interval

    return Measure(value, Interval(low, high))


def curve(x, y, half=float("nan")):
    return [claims.Point(*each, each[1] - half, each[1] + half) for each in zip(x, y, strict=True)]


def limit(first, second):
    return {"figure": "f", "series": [first, second], "left": 0.1}


ONE = {"figure": "f", "series": ["up"]}
CURVES = {
    "single": curve([0], [0.1]),
    "up": curve([0, 1, 2, 3], [0.1, 0.2, 0.4, 0.5]),
    "down": curve([3, 2, 1, 0], [0.1, 0.2, 0.4, 0.5]),
    "hill": curve([0, 1, 2, 3], [0.1, 0.6, 0.5, 0.2]),
    "flat": curve([0, 1, 2, 3], [0.1, 0.1, 0.1, 0.1]),
    "vague flat": curve([0, 1, 2, 3], [0.1, 0.1, 0.1, 0.1], half=0.5),
    "gap": curve([0, 1, 2, 3], [0.1, 0.2, float("nan"), 0.5]),
    "near": curve([1, 2, 4, 8], [0.5, 0.05, 0, 0], half=0.02),
    "unsure": curve([1, 2, 4, 8], [0.5, 0.05, 0, 0], half=0.2),
    "never": curve([1, 2, 4, 8], [0.5, 0.5, 0.5, 0.5], half=0.02),
    "far": curve([1, 2, 4, 8], [0.5, 0.4, 0.3, 0.05], half=0.02),
    "sure": curve([0, 1, 2, 3], [0.1, 0.6, 0.5, 0.2], half=0.05),
    "vague": curve([0, 1, 2, 3], [0.1, 0.6, 0.5, 0.2], half=0.5),
    "sure climb": curve([0, 1, 2, 3], [0.1, 0.2, 0.4, 0.5], half=0.1),
    "vague climb": curve([0, 1, 2, 3], [0.1, 0.2, 0.4, 0.5], half=0.4),
    "elsewhere": curve([4, 5, 6, 7], [0.1, 0.2, 0.4, 0.5]),
}


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        ({"number": "a", "value": 52}, "yes"),
        ({"number": "a", "value": 60}, "no"),
        ({"number": "wide", "value": 5}, "undecided"),
        ({"number": "wide", "value": 30}, "yes"),
        ({"number": "wide", "value": 40}, "no"),
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
        ({"differ": ["a", "b"], "holds": "zero:20"}, "undecided"),
        ({"most": [["b", "a"], ["a", "b"], ["a", "a"]], "value": 22}, "yes"),
        ({"most": [["b", "a"], ["a", "b"], ["a", "a"]], "value": 30}, "no"),
        ({"least": [["b", "a"], ["a", "b"], ["a", "a"]], "value": -22}, "yes"),
        ({"count": {"of": ["a", "b"], "below": 40}, "value": 1}, "yes"),
        ({"count": {"of": ["a", "b"], "below": 50}, "value": 2}, "yes"),
        ({"count": {"of": ["a", "b"], "below": 60}, "value": 1}, "no"),
        ({"order": [[["a", "b"], "b"]]}, "yes"),
        ({"order": [["a", ["a", "b"]]]}, "undecided"),
        ({"order": [["a", "b"]]}, "yes"),
        ({"order": [["b", "a"], ["a", "b"]]}, "no"),
        ({"order": [["a", "a"]]}, "undecided"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "rises"}, "yes"),
        ({"curve": {"figure": "f", "series": ["down"]}, "holds": "rises"}, "no"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["flat"]}, "holds": "falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["hill"]}, "holds": "rises-then-falls"}, "yes"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "rises-then-falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["sure"]}, "holds": "rises-then-falls"}, "yes"),
        ({"curve": {"figure": "f", "series": ["vague"]}, "holds": "rises-then-falls"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["flat"]}, "holds": "rises-then-falls"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["sure climb"]}, "holds": "rises"}, "yes"),
        ({"curve": {"figure": "f", "series": ["sure climb"]}, "holds": "falls"}, "no"),
        ({"curve": {"figure": "f", "series": ["vague climb"]}, "holds": "rises"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["vague climb"]}, "holds": "falls"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["sure", "flat"]}, "holds": "positive"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["sure", "sure climb"]}, "holds": "zero"}, "yes"),
        ({"curve": {"figure": "f", "series": ["vague flat"]}, "holds": "falls"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["gap"]}, "holds": "rises"}, "not defined here"),
        ({"curve": {"figure": "f", "series": ["vague flat"]}, "holds": "below:0.2"}, "undecided"),
        ({"curve": {"figure": "f", "series": ["sure"]}, "value": 0.35}, "yes"),
        ({"curve": {"figure": "f", "series": ["sure"]}, "value": 0.5}, "no"),
        ({"curve": limit("far", "near"), "value": "~4"}, "yes"),
        ({"curve": limit("far", "near"), "value": 8}, "no"),
        ({"curve": limit("never", "unsure"), "value": 8}, "undecided"),
        ({"curve": limit("never", "unsure"), "holds": "above:2"}, "undecided"),
        ({"curve": limit("unsure", "never"), "value": "~4"}, "undecided"),
        ({"curve": limit("never", "never"), "value": 8}, "not defined here"),
        ({"least": [["a", "b"], ["wide", "b"]], "holds": "above:-25"}, "undecided"),
        ({"most": [["a", "nan"], ["a", "b"]], "holds": "positive"}, "not defined here"),
        ({"count": {"of": ["a", "nan"], "below": 60}, "value": 1}, "not defined here"),
        ({"order": [[["nan", "a"], "b"]]}, "yes"),
        ({"order": [["nan", "b"]]}, "undecided"),
        ({"number": "a", "value": "~0.26 x 200"}, "yes"),
        ({"curve": {"figure": "f", "series": ["up", "flat"]}, "holds": "widens"}, "yes"),
        ({"curve": {"figure": "f", "series": ["up", "up"]}, "holds": "widens"}, "no"),
        ({"text": "a definition"}, "a definition"),
    ],
)
def test_whether_a_claim_holds(claim, holds):
    measures = {"a": measure(0.52, 0.49, 0.55), "b": measure(0.3, 0.27, 0.33)}
    measures |= {"wide": measure(0.1, 0.02, 0.31), "nan": measure(np.nan, np.nan, np.nan)}
    assert judged(claim, measures).holds == holds


def test_two_numbers_without_intervals_are_in_no_clear_order():
    nothing = float("nan")
    measures = {"a": measure(0.5, nothing, nothing), "b": measure(0.3, 0.2, 0.4)}
    assert judged({"order": [["a", "b"]]}, measures).holds == "undecided"


def test_a_difference_of_shares_is_as_wide_as_their_own_bounds():
    """56 of 70 against 48 of 80: 0.0524 to 0.3339 (Newcombe, Statist. Med. 17, 1998, table II,
    method 10). 15 of 60 against 0 of 12 is no clear difference."""
    first, second = statistics.proportion(56, 70), statistics.proportion(48, 80)
    found = claims.apart(measure(0.8, *first), measure(0.6, *second))
    assert found.interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    few, none = statistics.proportion(15, 60), statistics.proportion(0, 12)
    assert claims.apart(measure(0.25, *few), measure(0, *none)).interval.low < 0


def test_what_is_shown_is_what_is_judged():
    series = {"figure": "f", "series": ["up", "hill"]}
    found = judged({"curve": series, "holds": "widens"}, {})
    assert found.measured == "from 0 over -0.1 to 0.3"
    measures = {"a": measure(0.52, 0.49, 0.55), "b": measure(0.3, 0.27, 0.33)}
    found = judged({"count": {"of": ["a", "b"], "below": 50}, "value": 1}, measures)
    assert found.measured == "1 (1 to 2) of 2"
    found = judged({"most": [["b", "a"], ["a", "b"]], "value": 22}, measures)
    assert found.measured.startswith("+22 (+17.8 to +26.2) points")


def test_a_limit_beyond_the_points_is_infinitely_far():
    far, near, never = (CURVES[name] for name in ("far", "near", "up"))
    assert claims._limit(far, 0.1) == measure(8, 8, 8)
    assert claims._limit(far, 0.04) == measure(np.inf, 8, np.inf)
    ratio = claims._ratio(claims._limit(never, 0), claims._limit(near, 0.1))
    assert ratio.value == np.inf
    assert np.isnan(claims._ratio(claims._limit(never, 0), claims._limit(never, 0)).value)


def test_curves_at_other_places_are_not_compared():
    claim = {"curve": {"figure": "f", "series": ["up", "elsewhere"]}, "holds": "positive"}
    assert "at the same x" in judged(claim, {}).holds


def test_the_spread_over_five_runs_has_the_interval_of_a_normal_law(random):
    """0.599 and 2.874 times the standard deviation, as any table of χ² with 4 degrees says."""
    runs = [record(random.integers(0, 2, N)) for _ in range(5)]
    found = derived.value_of(bound("spread"), runs)
    accuracies = [each.ok.mean() for each in runs]
    assert found.value == pytest.approx(np.std(accuracies, ddof=1))
    assert found.interval == pytest.approx((0.599 * found.value, 2.874 * found.value), rel=1e-3)


def test_runs_are_attacks_or_trainings():
    for vary in ("seed", "train_seed"):
        made = derived.bindings_of(bound("spread", runs=3, vary=vary), 1)
        assert [getattr(each, vary) for each in made] == [0, 1, 2]
    with pytest.raises(InputError, match="train_seed"):
        derived.bindings_of(bound("spread", vary="trainseed"), 1)


def test_a_claim_without_a_measure_says_why():
    assert "two series" in judged({"curve": ONE, "holds": "widens"}, {}).holds
    assert "did you mean 'rises'" in judged({"curve": ONE, "holds": "risse"}, {}).holds
    single = {"figure": "f", "series": ["single"]}
    assert "two of them" in judged({"curve": single, "holds": "positive"}, {}).holds
    assert judged({"number": "a", "value": 1}, {"a": None}).holds == ""
    unknown = judged({"curve": {"figure": "f", "series": ["ups"]}, "holds": "rises"}, {})
    assert "unknown series 'ups'" in unknown.holds


def test_a_claim_has_one_counterpart():
    with pytest.raises(ValueError, match="one of number, bind, differ, most, least, order"):
        Claim(what="w", where="1", number="a", text="b")


def test_bibtex_has_a_balanced_entry_for_every_paper():
    for key in ("enresnet", "ito", "pang", "pdd", "sdr"):
        entry = latex.bibtex(load(key))
        assert re.match(rf"@\w+{{{key},\n", entry)
        assert entry.count("{") == entry.count("}")
        assert len(re.findall(r"^  title = ", entry, re.MULTILINE)) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder into which one table was measured, and what was printed meanwhile."""
    out = tmp_path_factory.mktemp("papers")
    call = ["reproduce", "enresnet:table7", "--scale", "smoke", "--out", str(out), "--workers", "1"]
    text, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(err):
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as left:
            main(call)
    assert not left.value.code, err.getvalue()
    return out, text.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def out(run):
    return run[0]


def test_a_table_is_measured_and_printed(run):
    _, text, err = run
    assert "trainings" in err and "goes on where it was" in err
    assert max(map(len, text.splitlines())) <= 80
    assert "digits · quick(width=4) · n = 10 · 1 epoch" in text
    assert re.search(r"ifgsm20 +46\.03 +\d+\.\d \(\d", text)


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_a_scale_is_estimated_without_its_images(robbench, tmp_path, scale):
    call = ("reproduce", "sdr:table2", "--scale", scale, "--estimate", "--data-dir", tmp_path)
    code, text, err = robbench(*call, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert text.startswith("4 trainings, about ")


def shown(robbench, out, form, what="enresnet:table7"):
    call = ("reproduce", what, "--scale", "smoke", "--out", out, "--show", "--format", form)
    code, text, err = robbench(*call)
    assert (code, err) == (0, "")
    return text


def test_formats_agree(robbench, out):
    tree = json.loads(shown(robbench, out, "json"))
    rows = tree["tables"]["table7"]["rows"]
    lines = list(csv.DictReader(io.StringIO(shown(robbench, out, "csv"))))
    assert len(rows) == len(lines) == 8
    for row, line in zip(rows, lines, strict=True):
        assert line["number"] == row["number"] and float(line["measured"]) == row["measured"]
        assert row["low"] <= row["measured"] <= row["high"]
        assert (row["dataset"], row["n"], row["epochs"]) == ("digits", "10", "1")
    text, markdown, tex = (shown(robbench, out, form) for form in ("text", "markdown", "latex"))
    for form, dash in ((text, "–"), (markdown, "–"), (tex, "--")):
        plain = " ".join(form.split())
        assert f"{rows[1]['measured']:.1f} ({rows[1]['low']:.1f}{dash}" in plain
        assert "strongest" in plain and "95 %" in plain.replace("\\", "") and "verdict" in plain
        for note in load("enresnet").tables["table7"].notes:
            assert latex.escaped(note) in plain if form == tex else note in plain
    assert tree["tables"]["table7"]["notes"] == list(load("enresnet").tables["table7"].notes)
    assert sum(line.count(" & ") == 4 for line in tex.splitlines()) == 1 + len(rows)
    assert "digits $\\cdot$ quick(width=4) $\\cdot$ n = 10 $\\cdot$ 1 epoch" in tex
    assert r"\cite{enresnet}" in tex
    assert shown(robbench, out, "bibtex").startswith("@")


def test_a_footnote_names_the_flags_for_which_numbers_do_not_count():
    half = Measure(0.5, Interval(0.4, 0.6))

    def line(*flags, measure=half):
        raised = [Flag(name, verdict, 0, 0, 1, (), "") for name, verdict in flags]
        return SimpleNamespace(measure=measure, audited=Audited(tuple(raised), (), True))

    over, warn = "OVERESTIMATE", "WARN"
    lines = [line(("F24", over), ("F5", over), ("F8", warn)), line(("F4", over), measure=None)]
    named = [f"{name} {CHECKS[name].title}" for name in ("F5", "F24")]
    assert wording._flags(lines) == [f"Flags: {'; '.join(named)}."]
    assert wording._flags([line(("F8", warn)), line()]) == []


@given(st.lists(st.floats(0, 10), min_size=2, max_size=9))
def test_a_mean_length_is_not_below_0(lengths):
    record = SimpleNamespace(distance=np.array(lengths))
    value, (low, high) = derived._distance([record], {})
    assert 0 <= low <= value <= high


@pytest.mark.parametrize(
    ("key", "what", "why"),
    [
        ("pdd", "an epoch of DEG", "another machine"),
        ("pdd", "second derivatives make DEG", None),
        ("sdr", "trained parameters of ResNet-18 with", "another network at this scale"),
        ("sdr", "SDR-Learnable doubles the parameters", None),
    ],
)
def test_levels_of_other_machines_and_networks_are_not_judged_but_ratios_are(key, what, why):
    part = part_of(f"{key}:claims", "smoke", Path("nowhere"), dataset)
    (claim,) = (claim for claim in part.paper.claims if claim.what.startswith(what))
    number = part._every[claims._path(claims._asked(claim)[0])]
    line = part.reproduction.line(number, None, Known.of([], 1))
    assert claims._elsewhere(claim, line) == why


def test_claims_that_nothing_was_measured_for_say_so(robbench, out):
    text = shown(robbench, out, "text", "enresnet:claims")
    assert re.match(r"\d+ claims: \d+ hold at this scale", text)
    assert "not measured" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"number": "a", "value": 2}, NEAR),
        ({"number": "a", "holds": "above:1.5"}, "more than 1.5"),
        ({"number": "a", "holds": "below:5"}, "less than 5"),
        ({"differ": ["a", "b"], "holds": "zero"}, "within ±2"),
        ({"differ": ["a", "b"], "holds": "negative"}, "less than 0"),
        ({"order": [["a", "b"]]}, "more than 0"),
        ({"order": [["a", "b"], ["b", "c"]]}, "each of 2 pairs in this order, clearly"),
        ({"curve": {"figure": "f", "series": ["up"]}, "holds": "zero:3"}, "f: within ±3"),
        (
            {"most": [["a", "b"], ["b", "c"]], "value": 2},
            f"of the largest of 2 differences: {NEAR}",
        ),
        (
            {"count": {"of": ["a", "b"], "below": 50}, "value": 2},
            f"of how many are below 50: {NEAR}",
        ),
        (
            {"curve": {"figure": "f", "series": ["up", "down"], "left": 1}, "holds": "above:2"},
            "f: the first x where 1 or less is left, of the first curve over that of the second:"
            " more than 2",
        ),
        ({"text": "a setting"}, ""),
    ],
)
def test_a_rule_is_said_in_words(claim, words):
    assert wording.rule(Claim(what="w", where="1", **claim)) == words


def test_every_rule_of_the_papers_has_words():
    said = [wording.rule(claim) for key in keys() for claim in load(key).claims]
    assert not [words for words in said if re.fullmatch(r"[a-z-]+(:.*)?", words)]


def test_every_format_of_a_claim_has_its_rule_its_note_and_what_it_was_measured_on(robbench, out):
    what = "sdr:claims"
    rows = json.loads(shown(robbench, out, "json", what))["claims"]
    (row,) = [row for row in rows if row["claim"].startswith("clean accuracy by which SDR-L")]
    assert (row["dataset"], row["n"], row["epochs"]) == ("digits", "10", "1")
    assert row["rule"] == "more than 0" and row["note"] and row["networks"] and row["cells"]
    lines = list(csv.DictReader(io.StringIO(shown(robbench, out, "csv", what))))
    assert row.items() - {("published", row["published"])} <= lines[rows.index(row)].items()
    grounds = f"{row['dataset']} · {row['networks']} · n = {row['n']} · {row['epochs']} epoch"
    for form in ("text", "markdown", "latex"):
        plain = " ".join(shown(robbench, out, form, what).split())
        said = [row["claim"], row["rule"], row["note"]]
        said += [row["networks"]] if form == "markdown" else [grounds]
        for each in said:
            assert (latex.escaped(each) if form == "latex" else each) in plain
    (cost,) = [row for row in rows if row["claim"] == "trained parameters of ResNet-18"]
    assert (cost["dataset"], cost["n"]) == ("digits", "") and cost["networks"]


def test_a_page_and_what_is_printed_beside_it_judge_the_claims_once(tmp_path, monkeypatch):
    part, known, asked = part_of("sdr", "smoke", tmp_path, dataset), Known.of([], 1), []
    real = claims.judge
    monkeypatch.setattr(claims, "judge", lambda *given: asked.append(given) or real(*given))
    page_files(part, known), rendered(part, known, "json")
    assert len(asked) == len(part.paper.claims)
    part.judged(Known.of([], 1))  # of other records
    assert len(asked) == 2 * len(part.paper.claims)


def test_claims_are_a_file_beside_the_page(tmp_path):
    part = part_of("sdr", "smoke", tmp_path, dataset)
    files = page_files(part, Known.of([], part.least))
    lines = list(csv.DictReader(io.StringIO(files[tmp_path / "papers" / "sdr.smoke.claims.csv"])))
    assert [line["claim"] for line in lines] == [
        claim.what for claim in sorted(part.paper.claims, key=lambda claim: bool(claim.text))
    ]


def test_a_table_of_words_is_its_words_in_every_format(robbench, tmp_path):
    for form in ("text", "markdown", "latex", "csv", "json"):
        assert "engineered" in shown(robbench, tmp_path, form, "pang:text_attacks")


def test_a_caption_is_escaped_as_the_rows_are(robbench, tmp_path):
    (caption,) = re.findall(r"\\caption.*", shown(robbench, tmp_path, "latex", "ito:table2"))
    assert r"20 models $\times$ 20 inferences" in caption and caption.isascii()


def test_no_sign_of_the_papers_is_unknown_to_latex():
    for key in keys():
        assert re.sub("ô", "", latex.escaped(load(key).model_dump_json())).isascii()


def test_a_long_table_comes_as_several_floats(robbench, tmp_path):
    tex = shown(robbench, tmp_path, "latex", "pang:mmc_whitebox")
    floats = tex.count(r"\begin{table*}")
    assert floats > 1 and f"Part {floats} of {floats}." in tex
    assert len(set(re.findall(r"\\label{.*}", tex))) == floats


def test_a_figure_is_its_data_or_says_how_to_draw_it(robbench, tmp_path):
    what, files = "sdr:figure7", tmp_path / "papers" / "sdr"
    for form in ("text", "markdown"):
        text = shown(robbench, tmp_path, form, what)
        assert "not drawn yet; write robbench reproduce sdr:figure7 --scale smoke" in text
        assert ".svg" not in text
    call = ("reproduce", what, "--scale", "smoke", "--out", tmp_path, "--show", "--format")

    def drawn(form):
        code, text, _ = robbench(*call, form)
        assert code == 0
        return text

    for form in ("latex", "csv", "json"):
        code, text, err = robbench(*call, form)
        assert (code, text, err.count("\n")) == (2, "", 1) and "not drawn yet" in err
    files.mkdir(parents=True)
    for kind in ("svg", "png", "csv"):
        (files / f"figure7.smoke.{kind}").write_text("x,y\n1,2\n")
    assert drawn("csv") == "x,y\n1,2\n"
    assert json.loads(drawn("json"))["figures"]["figure7"]["rows"] == [{"x": "1", "y": "2"}]
    assert r"\includegraphics" in drawn("latex") and ".svg" in drawn("text")


def test_a_mere_diagram_has_no_data(robbench, tmp_path):
    assert "not drawn, " in shown(robbench, tmp_path, "text", "sdr:figure2")
    call = ("reproduce", "sdr:figure2", "--out", tmp_path, "--show", "--format", "csv")
    code, _, err = robbench(*call)
    assert code == 2 and "a diagram of the architecture" in err


def test_a_table_says_which_cells_it_shares_with_another():
    paper = load("enresnet")
    first, second = [
        [claims.Line(number, None, (record([1], seed=k).cell,), None, "") for k, number in chosen]
        for chosen in (
            list(enumerate(paper.tables["table1"].numbers("table1")))[:3],
            list(enumerate(paper.tables["table2"].numbers("table2"), 1))[:4],
        )
    ]
    notes = wording.notes_of(paper, {"table1": first, "table2": second})
    assert notes["table1"] == list(paper.tables["table1"].notes)
    assert notes["table2"][-1] == (
        "At this scale 2 of 4 numbers share their cells with another table: 2 with table1."
    )


def test_a_number_of_several_cells_states_all_of_them():
    made = record([1]).cell
    other = made.model_copy(update={"dataset": "mnist", "n": 7})
    number = load("enresnet").numbers()[0]
    line = claims.Line(number, None, (made, other, made), None, "")
    assert wording.stated(line.behind)[::2] == ["digits; mnist", "1; 7"]


def test_an_estimate_runs_nothing(robbench, tmp_path):
    code, text, _ = robbench(
        "reproduce", "enresnet:table7", "--scale", "smoke", "--out", tmp_path, "--estimate"
    )
    assert code == 0 and re.match(r"\d+ trainings, about .* on 8 cells", text)
    assert not list(tmp_path.rglob("*.json"))


def test_trainings_for_figures_alone_are_estimated_and_run_as_tasks(robbench, tmp_path):
    call = ("reproduce", "sdr:figure8", "--scale", "smoke", "--out", tmp_path, "--workers", "1")
    code, text, _ = robbench(*call, "--estimate")
    assert code == 0
    assert re.match(r"\d+ trainings, about .*; 0 shards of attacks on 0 cells", text)
    assert re.search(r"For figures alone \d trainings and 0 attacks more", text)
    code, _, err = robbench(*call)
    assert code == 0 and err.count("  trained ") == int(text.split()[0])
    assert robbench(*call, "--estimate")[1] == "No training and no attack is missing.\n"


@pytest.mark.parametrize(
    ("what", "needed"),
    [
        ("ito:figure1", {"ito(", "standard("}),
        ("pdd:figure5", {"pdd+deg("}),
        ("enresnet:table7", set()),
    ],
)
def test_a_part_names_what_its_figures_deploy(tmp_path, what, needed):
    found = part_of(what, "smoke", tmp_path, dataset).trainings()
    assert {each.defense.partition("(")[0] + "(" for each in found} == needed


def test_the_time_of_trainings_has_that_of_oracles(tmp_path):
    part = part_of("pdd:table4_type2", "smoke", tmp_path, dataset)
    sources = {cell.source for cell in part.cells()} - {cell.defense for cell in part.cells()}
    (tmp_path / "checkpoints").mkdir()
    for source in sources:
        key = key_of(resolve(source)[0], dataset("digits"), 0)
        recipe = {"key": key, "sha256": "", "curve": [{"epoch": 0, "seconds": 2.0}]}
        (tmp_path / "checkpoints" / f"{key}.json").write_text(json.dumps(recipe))
    assert sources and part.trained() == 2.0 * len(sources)


def test_data_that_is_not_here_is_described_by_a_record_that_has_its_hash(tmp_path):
    early = record([1]).cell.model_copy(update={"dataset": "mnist", "defense": "a"})
    failed = Record(id=early.id, cell=early, status="failed", reason="it was not trained")
    cell = early.model_copy(update={"defense": "b"})
    said = {"provenance": {"dataset_hash": "0" * 64}, "cell": cell, "id": cell.id}
    load_described = loader(tmp_path, tmp_path / "nowhere")
    Store(tmp_path).put(failed)
    with pytest.raises(InputError, match="has no record of it"):
        load_described("mnist")
    Store(tmp_path).put(record([1]).model_copy(update=said))
    assert load_described("mnist").hash == "0" * 64


def test_what_needs_a_failed_training_is_told_why(tmp_path):
    shared = Shared(tmp_path, None, torch.device("cpu"))
    wanted = Training("digits", "standard(epochs=1, lr=1e+30, network=mlp, optimizer=sgd)")
    assert not list(measure_cells([], None, shared, trainings=[wanted]))
    with pytest.raises(InputError, match="is not trained: Diverged"):
        shared.deploy(wanted.defense, dataset("digits"), 0)


def test_an_estimate_takes_the_passes_of_recorded_attacks(tmp_path, monkeypatch):
    kept = record(np.ones(N))
    asked = kept.cell.model_copy(update={"seed": 1})
    shared = Shared(tmp_path, None, torch.device("cpu"))
    threads = []
    monkeypatch.setattr(estimate, "_timed", lambda *_: threads.append(torch.get_num_threads()) or 1)
    monkeypatch.setattr(estimate, "_trained", lambda *_: 0)
    monkeypatch.setattr(estimate._Clock, "runs", {})
    tasks = plan([asked], shared)
    torch.set_num_threads(2)
    try:
        guessed = estimate.seconds(tasks, [], [], shared).attack
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert guessed == N * (20 + 1)  # steps, and the judge
    run = estimate.Run(kept.cell, Passes(3, 2), 1, None)
    monkeypatch.setattr(estimate._Clock, "runs", {"pgd": [run]})
    assert estimate.seconds(tasks, [], [], shared).attack == N * (3 + 1)
    assert set(threads) == {1}  # as many as a worker has
    run = estimate.Run(kept.cell, Passes(0, 0), 1, 0.0)  # as of noise, which asks nobody
    monkeypatch.setattr(estimate._Clock, "runs", {"pgd": [run]})
    assert estimate.seconds(tasks, [], [], shared).attack == N * 1  # the judge


@pytest.mark.parametrize(
    ("attack", "defense", "forwards", "backwards"),
    [
        ("pgd(restarts=2, steps=5)", "standard", 10, 10),
        ("spsa(samples=3, steps=5)", "standard", 2 * 3 * 5, 0),
        ("square(queries=50)", "ensemble(members=3)", 3 * 50, 0),
        ("cw(search=2, steps=5)", "ensemble(members=3)[0]", 10, 10),
    ],
)
def test_passes_are_what_the_settings_of_an_attack_say(attack, defense, forwards, backwards):
    made = record([1]).cell.model_copy(update={"attack": attack, "defense": defense})
    assert attack_passes(made) == Passes(forwards, backwards)


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
        (["sdr", "--show", "--timeout", "-1"], "timeout = -1.0: write a positive number"),
        (["sdr", "--estimate", "--timeout", "nan"], "timeout = nan: write a positive number"),
        (["sdr", "--show", "--out", __file__], "is a file; write the folder of the records"),
        (["enresnet:table1", "--scale", "paper"], "robbench data cifar10"),
    ],
)
def test_a_mistake_is_one_line(robbench, tmp_path, arguments, message):
    call = ["reproduce", "--out", tmp_path, "--data-dir", tmp_path, *arguments]
    code, out, err = robbench(*call)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def taking(*seconds):
    """A function of costs whose rounds take these seconds, and the order in which it was asked."""
    asked, left = [], {}

    def prepare(spec, data, shared, arguments):
        left[spec] = iter(seconds[len(left)])

        def take():
            asked.append(spec)
            return next(left[spec])

        return take

    return costs.Function(prepare, 3), asked


SMOKE = Scale(recipe={"epochs": 1})
EPOCH = Binding(
    kind="cost",
    function="epoch-seconds",
    dataset="digits",
    defense="pgd-at(network=quick(width=4))",
    arguments={"over": {"defense": "standard(network=quick(width=4))"}},
)


def shared_in(folder):
    return Shared(folder, None, torch.device("cpu"))


def test_a_ratio_of_costs_is_the_median_of_rounds_in_turn(monkeypatch, tmp_path):
    function, asked = taking((2.0, 9.0, 3.0), (1.0, 1.0, 2.0))
    monkeypatch.setitem(costs.FUNCTIONS, "epoch-seconds", function)
    found = costs.measure_cost(EPOCH, SMOKE, dataset, shared_in(tmp_path))
    assert (found.value, found.interval) == (2.0, (1.5, 9.0))
    assert len(asked) == 6 and asked[::2] == asked[:1] * 3 and asked[1::2] == asked[1:2] * 3
    assert list(found.inputs.versions) == asked[:2] and found.inputs.threads == 1


def test_all_fields_of_what_a_cost_is_over_are_those_that_are_measured(monkeypatch, tmp_path):
    asked = []

    def prepare(spec, data, shared, arguments):
        asked.append((data.name, arguments))
        return lambda: 1.0

    monkeypatch.setitem(costs.FUNCTIONS, "epoch-seconds", costs.Function(prepare))
    over = {"dataset": "mnist", "arguments": {"batch": 2}}
    ratio = EPOCH.model_copy(update={"arguments": {"batch": 1, "over": over}})
    data = {"digits": dataset("digits"), "few": first(dataset("digits"), 20, "few")}
    scale = SMOKE.model_copy(update={"datasets": {"mnist": "few"}})
    costs.measure_cost(ratio, scale, data.__getitem__, shared_in(tmp_path))
    assert asked == [("digits", {"batch": 1}), ("few", {"batch": 2})]
    assert [each.dataset for each in costs.deployed(ratio, scale)] == ["digits", "few"]
    own, other = costs.cost_key(ratio, scale).split(" · over ")
    assert own.endswith("digits · batch=1") and other.endswith("few · batch=2")


def test_a_cost_that_the_system_does_not_tell_is_not_kept(monkeypatch, tmp_path):
    function, _ = taking((float("nan"),) * 3, (1.0,) * 3)
    monkeypatch.setitem(costs.FUNCTIONS, "epoch-seconds", function)
    with pytest.raises(InputError, match="cannot be measured on cpu"):
        costs.measure_cost(EPOCH, SMOKE, dataset, shared_in(tmp_path))


def test_an_epoch_is_timed_by_its_first_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "BATCHES", 2)
    sizes = []
    real = costs.train
    monkeypatch.setattr(costs, "train", lambda *a: sizes.append(len(a[2].train.y)) or real(*a))
    found = costs.measure_cost(EPOCH, SMOKE, dataset, shared_in(tmp_path))
    assert sizes == [256] * 8 and found.value > 2  # two defenses: once to warm up, three rounds
    assert not list(tmp_path.iterdir())


def test_costs_of_two_processes_are_all_kept(monkeypatch, tmp_path):
    part = part_of("sdr:claims", "smoke", tmp_path, dataset)
    kept = costs.Kept(value=1.0, inputs=inputs_on(torch.device("cpu")))
    wanted = list(part.costs.every)

    def measured(*arguments):
        others = costs.read_costs(part.costs.file)
        costs.write_costs(part.costs.file, {**others, wanted[-1]: kept})  # the other process
        return kept

    monkeypatch.setattr(ledger, "measure_cost", measured)
    assert part.measure_costs(shared_in(tmp_path)) == []
    assert costs.read_costs(part.costs.file).keys() == part.costs.known.keys() == set(wanted)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_cost_was_measured_on_must_be_what_is_there(tmp_path):
    cpu, shelf, key = torch.device("cpu"), Shelf([tmp_path]), "0" * 64
    data = {"digits": dataset("digits").hash}
    made = inputs_on(cpu, datasets=data, versions={"standard": "1"}, weights={key: "a" * 64})
    assert made.outdated(dataset, shelf) is None and made.made_here(cpu)
    (tmp_path / f"{key}.json").write_text(json.dumps({"key": key, "sha256": "b" * 64}))
    assert "trained again" in made.outdated(dataset, shelf)
    assert not made.model_copy(update={"threads": 99}).made_here(cpu)
    elsewhere = made.environment.model_copy(update={"device": "NVIDIA"})
    assert not made.model_copy(update={"environment": elsewhere}).made_here(cpu)


def test_costs_of_another_device_are_measured_again(monkeypatch, tmp_path):
    part = part_of("sdr:claims", "smoke", tmp_path, dataset)
    made = inputs_on(torch.device("cpu"))
    there = made.environment.model_copy(update={"device": "NVIDIA"})
    old = costs.Kept(value=2.0, inputs=made.model_copy(update={"environment": there}))
    costs.write_costs(part.costs.file, dict.fromkeys(part.costs.every, old))
    part.costs.look_up()
    assert len(part.costs.known) == len(part.costs.every)  # --show takes them as they are
    new = costs.Kept(value=1.0, inputs=made)
    monkeypatch.setattr(ledger, "measure_cost", lambda *arguments: new)
    part.measure_costs(shared_in(tmp_path))
    for key, measure in part.costs.known.items():
        assert measure.value == (1.0 if costs.timed(part.costs.every[key]) else 2.0)


def test_computed_data_is_made_again_where_it_is_cut_or_of_something_else(tmp_path, monkeypatch):
    part, known = part_of("pang:fig_mmd", "smoke", tmp_path, dataset), Known.of([], 1)
    file = part.figures.data_of("fig_mmd")
    assert part.figures.draw(shared_in(tmp_path), known) == []
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "not as it was written" in " ".join(part.doubts(known))
    part.figures.draw(shared_in(tmp_path), known)
    assert file.read_text() == whole and part.doubts(known) == []
    name = str(part.figures.asked["fig_mmd"].draw)
    monkeypatch.setitem(figures.drawings._entries, name, newer(figures.drawings.get(name)))
    assert "the figure or the scale has changed" in " ".join(part.doubts(known))


def newer(drawing):
    return drawing._replace(version=drawing.version + 1)


@pytest.mark.parametrize("text", ["series,x,y\na,1", "series,x,y\na,1\n", "a\n1,2\n", 'a\n"1'])
def test_broken_data_of_a_figure_is_a_line(tmp_path, text):
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InputError, match="f.csv is broken; delete the file and run"):
        figures.read(tmp_path / "f.csv")


def test_a_figure_whose_records_are_missing_stops_no_page(tmp_path):
    part, known = part_of("ito", "smoke", tmp_path, dataset), Known.of([], 1)
    figures.write(part.figures.data_of("figure2"), [{"series": "a", "x": 1, "y": 2}])
    pages = page_files(part, known)
    assert part.figures.data_of("figure2") not in pages and len(pages) == 3
    assert "figure2.smoke.csv is stale" in " ".join(part.doubts(known))


def test_show_says_what_is_stale_in_a_line(robbench, tmp_path):
    part = part_of("sdr:claims", "smoke", tmp_path, dataset)
    old = inputs_on(torch.device("cpu"), versions={"standard": "0"})
    key = next(iter(part.costs.every))
    costs.write_costs(part.costs.file, {key: costs.Kept(value=2.0, inputs=old)})
    call = ("reproduce", "sdr:claims", "--scale", "smoke", "--out", tmp_path, "--show")
    code, _, err = robbench(*call)
    assert code == 0 and err.count("\n") == 1 and "stale, standard has another version" in err
    part.costs.file.write_text("[1]")
    code, out, err = robbench(*call)
    assert (code, out, err.count("\n")) == (2, "", 1) and "delete the file" in err


def test_suites_and_probes_are_run_for_tables_alone():
    def told(name):
        return described(name, "0" * 64)

    def attacks(what):
        return {cell.attack for cell in part_of(what, "cpu", Path("nowhere"), told).cells()}

    beside = {"strongest(budget=smoke)", "probe"}
    assert not attacks("pdd:claims") & beside
    assert attacks("pdd:table4_type1") > beside


def test_a_footnote_says_where_the_strongest_attack_sees_more():
    def line(own, strongest):
        cell, other = (SimpleNamespace(setting=Setting(kind=kind)) for kind in (own, strongest))
        return SimpleNamespace(cells=[cell], strongest=SimpleNamespace(cell=other))

    assert wording._other_settings([line("blackbox", "adaptive")])
    assert not wording._other_settings([line("blackbox", "blackbox")])
    assert not wording._other_settings([line("whitebox", "adaptive")])
