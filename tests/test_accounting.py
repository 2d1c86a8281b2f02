"""Tables of what an accuracy alone does not say, and none where there is nothing to say."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from robbench import accounting, boards, tables
from robbench.cell import Cell, Setting
from robbench.records import Record
from robbench.threat import Threat

RANDOM = "ito"
KNOWN = "ito(known_seed=0)"
QUIET = "ito(noise=false)"
DETECTED = "rce(detector=k-density)"


def row(right=(1, 1, 0, 0), draws=1, refused=0, silent=0, seen=None, **of):
    """A row of images that are right in so many draws under attack, and in all when clean.

    refused: draws of each image without an answer under attack; silent: clean images without one.
    seen: further fields of the record.
    """
    right = np.array(right, dtype=np.uint8)
    n = len(right)
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": n,
        "defense": "standard",
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(eps="1/10"),
        "setting": Setting(kind="whitebox"),
    }
    cell = Cell(**(fields | of))
    record = Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        ok=right,
        err=(draws - right - np.asarray(refused)).astype(np.uint8),
        clean_ok=np.where(np.arange(n) < silent, 0, draws).astype(np.uint8),
        clean_err=np.zeros(n, dtype=np.uint8),
        distance=np.zeros(n, dtype=np.float32),
        cost={"forwards": 1.0, "backwards": 1.0, "queries": 1.0, "seconds": 1.0},
        **(seen or {}),
    )
    (made,) = tables.rows([record])
    return made


def scores(best, score, clean_best, clean_score):
    """The fields of a record that say which label was the first one and how sure it was."""
    return {
        "best": np.array(best, dtype=np.uint8),
        "clean_best": np.array(clean_best, dtype=np.uint8),
        "score": np.array(score, dtype=np.float32),
        "clean_score": np.array(clean_score, dtype=np.float32),
    }


def lines_of(text):
    """The lines of a markdown table as dictionaries."""
    split = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(split[0], line, strict=True)) for line in split[2:]]


def line_of(text):
    (line,) = lines_of(text)
    return line


def value(text):
    """`51.3 (47.1–55.5)` without its interval."""
    return float(text.split()[0])


# ----------------------------------------------------------------------------------------- draws


def test_draws_are_no_matter_of_a_deterministic_defense():
    assert accounting.draws([row(), row(defense="mmc")]) == ""


def test_both_errors_of_a_random_defense_are_those_of_the_text_book():
    right, r = np.array([20, 18, 7, 0, 11]), 20
    line = line_of(accounting.draws([row(right, draws=r, defense=RANDOM), row()]))
    shares = right / r
    noise = math.sqrt((shares * (1 - shares) / (r - 1)).sum()) / len(shares)
    assert value(line["expected accuracy %"]) == pytest.approx(100 * shares.mean(), abs=0.05)
    assert value(line["± images"]) == pytest.approx(100 * stats.sem(shares), abs=0.05)
    assert value(line["± draws"]) == pytest.approx(100 * noise, abs=0.05)
    assert value(line["sd of a single look"]) == pytest.approx(100 * noise * 20**0.5, abs=0.05)


def test_what_the_attack_has_seen_lost_is_not_unbroken():
    seen = np.array([[0, 0.1, 0, 1], [0, 0, 0, 1]], dtype=np.float16)
    made = row((20, 18, 10, 0), 20, defense=RANDOM, seen={"trace": {"lost_seen": seen}})
    line = line_of(accounting.draws([made]))
    assert value(line["unbroken in any look of the attack %"]) == pytest.approx(100 * 1.5 / 4)


def test_what_no_trace_tells_is_not_available():
    line = line_of(accounting.draws([row((20, 18, 10, 0), 20, defense=RANDOM)]))
    assert line["unbroken in any look of the attack %"] == "n.a."


# -------------------------------------------------------------------------------------- refusals


def test_where_everybody_answers_there_is_no_table_of_refusals():
    assert accounting.refusals([row(), row((20, 5, 5, 0), 20, defense=RANDOM)]) == ""


@pytest.mark.parametrize("given", [{"refused": (0, 0, 1, 0)}, {"silent": 1}], ids=str)
def test_a_refusal_of_one_image_makes_the_table_be_it_attacked_or_clean(given):
    assert len(lines_of(accounting.refusals([row(), row(**given, defense=DETECTED)]))) == 2


def test_refusals_are_counted_and_priced():
    made = row((1, 0, 0, 0), refused=(0, 1, 0, 0), silent=1, defense=DETECTED)
    line = line_of(accounting.refusals([made]))
    assert value(line["clean coverage %"]) == 75
    assert value(line["coverage %"]) == 75
    assert value(line["right among answers %"]) == pytest.approx(100 / 3, abs=0.05)
    # of the images 1 to 3, which are right when clean, two are wrong and accepted
    assert value(line["evasion %"]) == pytest.approx(200 / 3, abs=0.05)
    priced = [50 + price * 25 for price in (0, 0.1, 0.5, 1)]
    header = "cost at 0 / 0.1 / 0.5 / 1"
    assert line[header] == " / ".join(f"{cost:.1f}" for cost in priced)


def test_a_defense_that_refuses_everything_is_right_among_no_answers():
    made = row((0, 0), refused=1, silent=2, defense=DETECTED)
    line = line_of(accounting.refusals([made]))
    assert line["right among answers %"] == line["evasion %"] == "n.a."
    assert value(line["coverage %"]) == 0


def test_who_never_refuses_has_the_same_option_in_the_table():
    refuses = row((0,) * 20, refused=1, defense=DETECTED)
    sure = np.arange(20)
    seen = scores(np.arange(20) >= 10, sure, np.ones(20), sure)
    answers = row((0,) * 10 + (1,) * 10, seen=seen)
    found = lines_of(accounting.refusals([refuses, answers]))
    assert found[0]["coverage at 95% clean"] == ""  # no scores, no threshold
    # one clean image of 20 may be refused: that of the lowest score, and the x' below it with it
    assert value(found[1]["coverage at 95% clean"]) == 95
    assert value(found[1]["wrong among these %"]) == pytest.approx(100 * 9 / 19, abs=0.05)


# ------------------------------------------------------------------------------------- detectors


def test_a_detector_is_judged_by_what_succeeded_and_the_area_is_sklearn_s():
    rng = np.random.default_rng(0)
    clean_score, score = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    best = rng.random(40) < 0.4
    seen = scores(best, score, np.ones(40), clean_score)
    refused = score < 0
    made = row((best & ~refused).astype(int), refused=refused.astype(int), defense=DETECTED,
               seen=seen)  # fmt: skip
    line = line_of(accounting.detections([made]))
    success = ~best
    truth = np.append(np.ones(40), np.zeros(success.sum()))
    expected = roc_auc_score(truth, np.append(clean_score, score[success]))
    assert float(line["AUC"]) == pytest.approx(expected, abs=5e-4)
    assert int(line["successes"]) == success.sum()
    shown = value(line["successes refused %"])
    assert shown == pytest.approx(100 * refused[success].mean(), abs=0.05)
    assert list(line)[-1] == "AUC"


def test_a_detector_that_nothing_got_past_has_no_rates():
    made = row((1, 1), defense=DETECTED, seen=scores([1, 1], [1, 2], [1, 1], [1, 2]))
    line = line_of(accounting.detections([made]))
    assert (line["successes"], line["successes refused %"], line["AUC"]) == ("0", "n.a.", "n.a.")


@pytest.mark.parametrize("defense", ["rce", "model:mine:abc", "unknown(detector=lid)"])
def test_only_defenses_that_are_known_to_detect_are_detectors(defense):
    seen = scores([0, 1], [1, 2], [1, 1], [1, 2])
    assert accounting.detections([row((0, 1), defense=defense, seen=seen)]) == ""


def test_a_detector_without_scores_has_no_line():
    assert accounting.detections([row(defense=DETECTED)]) == ""


# ----------------------------------------------------------------------------------------- seeds


def test_one_seed_shows_no_spread():
    assert accounting.seeds([row(), row(defense="mmc")]) == ""


def test_one_image_shows_no_spread_and_stops_no_page():
    rows = [row((1,), seed=seed) for seed in (0, 1)]
    assert accounting.seeds(rows) == ""
    assert boards.board("digits", rows).startswith("# digits\n")


def test_trained_models_have_a_mean_and_the_deviation_between_them():
    rng = np.random.default_rng(0)
    right = rng.random((3, 30)) < np.array([[0.4], [0.5], [0.8]])
    rows = [row(each.astype(int), train_seed=seed) for seed, each in enumerate(right)]
    line = line_of(accounting.seeds([*rows, row(defense="mmc")]))
    means = right.mean(axis=1)
    assert line["models × seeds"] == "3 × 1"
    assert value(line["robust with detection %"]) == pytest.approx(100 * means.mean(), abs=0.05)
    assert value(line["sd of models"]) == pytest.approx(100 * means.std(ddof=1), abs=0.05)
    assert value(line["± models or seeds"]) == pytest.approx(100 * stats.sem(means), abs=0.05)
    assert line["sd of seeds"] == "n.a."


def test_attack_seeds_of_one_model_have_no_deviation_of_models():
    rows = [row(right, seed=seed) for seed, right in enumerate([(1, 1, 0, 0), (1, 0, 0, 0)])]
    line = line_of(accounting.seeds(rows))
    assert (line["models × seeds"], line["sd of models"]) == ("1 × 2", "n.a.")
    assert value(line["sd of seeds"]) == pytest.approx(100 * np.std([0.5, 0.25], ddof=1), abs=0.05)


def test_models_with_unequal_seeds_have_so_many_on_average():
    rows = [
        row((1, 1, 0, 0), train_seed=model, seed=seed) for model, seed in [(0, 0), (0, 1), (1, 0)]
    ]
    assert line_of(accounting.seeds(rows))["models × seeds"] == "2 × 1.5"


def test_other_attacks_are_no_seeds():
    assert accounting.seeds([row(), row(attack="fgsm", seed=1)]) == ""


# --------------------------------------------------------------------------------------- regimes


def three(of=RANDOM, known=KNOWN, quiet=QUIET, **changes):
    """A random defense, with draws that are known, and with none."""
    return [
        row((20, 20, 10, 10), 20, defense=of, **changes),
        row((1, 1, 1, 0), defense=known, **changes),
        row((1, 0, 0, 0), defense=quiet, **changes),
    ]


def test_fresh_draws_known_ones_and_none_stand_side_by_side():
    line = line_of(accounting.regimes(three()))
    shares = [value(line[name]) for name in ("fresh draws %", "known seed %", "noise off %")]
    assert (line["defense"], shares) == ("`ito`", [75, 75, 25])


@pytest.mark.parametrize("missing", range(3), ids=["fresh", "known", "quiet"])
def test_a_regime_that_was_not_measured_leaves_no_line(missing):
    rows = three()
    del rows[missing]
    assert accounting.regimes(rows) == ""


@pytest.mark.parametrize(
    "changes",
    [{"attack": "fgsm"}, {"threat": Threat(eps="1/5")}, {"train_seed": 1}, {"n": 2}],
    ids=["attack", "threat", "model", "n"],
)
def test_regimes_are_compared_under_the_same_attack_only(changes):
    rows = three()
    right = (1, 1) if "n" in changes else (1, 1, 1, 0)
    rows[1] = row(right, defense=KNOWN, **changes)
    assert accounting.regimes(rows) == ""


def test_the_adaptive_number_of_fresh_draws_stands_before_the_white_box():
    rows = three()
    setting = Setting(kind="adaptive", eot=20)
    adaptive = row((20, 10, 0, 0), 20, defense=RANDOM, setting=setting)
    for order in ([*rows, adaptive], [adaptive, *rows]):
        line = line_of(accounting.regimes(order))
        assert value(line["fresh draws %"]) == 37.5
        assert line["setting"] == "adaptive EOT 20"


def test_transfer_is_no_regime():
    setting = Setting(kind="transfer", oracle="standard")
    assert accounting.regimes(three(setting=setting)) == ""


def test_one_member_with_known_draws_is_not_the_whole_defense_with_them():
    assert accounting.regimes(three(known="ito(known_seed=0)[0]")) == ""
    member = ("ito[0]", "ito(known_seed=0)[0]", "ito(noise=false)[0]")
    assert line_of(accounting.regimes(three(*member)))["defense"] == "`ito[0]`"


def test_a_defense_that_is_not_installed_stops_no_page():
    rows = three("lab-noise", "lab-noise(known_seed=0)", "lab-noise(noise=false)")
    assert accounting.regimes(rows) == ""


# ------------------------------------------------------------------------------------- the pages


def test_a_page_has_the_tables_that_say_something_and_no_others():
    names = (
        "Random defenses, draw by draw:", "Where something refuses:",
        "Detectors against what succeeded:",
    )  # fmt: skip
    sure = scores([0, 1], [1, 2], [1, 1], [1, 2])
    cases = [
        (row(), []),
        (row((20, 5, 5, 0), 20, defense=RANDOM), [0]),
        (row((0, 1), defense=DETECTED, seen=sure), [2]),
        (row((0, 0), refused=(1, 0), defense=DETECTED, seen=sure), [1, 2]),
    ]
    for made, expected in cases:
        text = boards.cells("digits", [made])
        assert [name for name in names if name in text] == [names[at] for at in expected]


def test_the_board_says_what_seeds_and_regimes_do():
    rows = [*three(), row((1, 1, 0, 0)), row((1, 0, 0, 0), seed=1)]
    found = re.findall(r"^## (.*)$", boards.board("digits", rows), re.MULTILINE)
    assert found == [
        "Several seeds and trained models", "Fresh draws, known draws, none", "Clean"
    ]  # fmt: skip
