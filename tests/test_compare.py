"""Paired comparison: p-values by enumeration, the records that are paired, what is refused."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench.cell import Cell, Setting
from robbench.compare import compare
from robbench.defense import with_preset
from robbench.errors import InputError
from robbench.metrics import metrics
from robbench.records import COSTS, Record, Store
from robbench.threat import Threat

WHITEBOX, ADAPTIVE = Setting(kind="whitebox"), Setting(kind="adaptive", eot=20)
COST = dict.fromkeys(COSTS, 1.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def record(defense="standard", right=(1, 1, 0, 0), draws=1, subset="s", cost=COST, **changes):
    """A record whose images are right in `right` of the draws."""
    right = np.array(right, dtype=np.uint8)
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": len(right),
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(norm="linf", eps="1/10"),
        "setting": WHITEBOX,
    }
    cell = Cell(defense=defense, **(fields | changes))
    wrong = (draws - right).astype(np.uint8)
    return Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        ok=right,
        err=wrong,
        clean_ok=right,
        clean_err=wrong,
        distance=np.zeros(len(right), dtype=np.float32),
        cost=cost,
        provenance={"subset_hash": subset},
    )


def rows(text):
    """The rows of a comparison, as lists of cells, each a list of its lines of text."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    columns = [slice(*match.span()) for match in re.finditer("-+", lines[rule])]
    body = [line for line in lines[rule + 1 :] if not line.startswith(("Left out", "Budget"))]
    return [
        [[text[column].strip() for text in pair] for column in columns]
        for pair in zip(body[::2], body[1::2], strict=True)
    ]


def table(store, a, b, *records, dataset="digits"):
    """The rows of a comparison: attack, norm, ε, n, setting, both accuracies, difference with its
    interval, p, p after Holm; where the sides differ, `A / B`."""
    for each in records:
        store.put(each)
    found = []
    for *cells, first, second, (difference, interval), p, _ in rows(
        compare(a, b, dataset, store.root)
    ):
        sides = [" / ".join(filter(None, cell)) for cell in cells]
        found.append([*sides, first[0], second[0], f"{difference} ({interval})", *p])
    return found


def p_value(line):
    return float(line[-2])


def test_deterministic_defenses_are_compared_by_mcnemars_exact_test(store):
    a, b = np.repeat([1, 1, 0, 0], [30, 12, 3, 5]), np.repeat([1, 0, 1, 0], [30, 12, 3, 5])
    (line,) = table(store, "standard", "pgd-at", record(right=a), record("pgd-at", b))
    closed = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15  # 12 against 3
    assert p_value(line) == pytest.approx(closed, rel=0.05)
    assert p_value(line) == pytest.approx(stats.binomtest(12, 15).pvalue, rel=0.05)


def test_stochastic_defenses_are_compared_by_all_sign_flips(store):
    a, b = np.array([10, 7, 9, 3, 8, 5, 6]), np.array([2, 6, 4, 3, 9, 1, 6])
    (line,) = table(store, "ito", "enresnet", record("ito", a, 10), record("enresnet", b, 10))
    d = a - b
    flips = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    assert p_value(line) == pytest.approx(np.mean(np.array(flips) >= abs(d.sum())), rel=0.05)


def test_one_image_is_no_evidence(store):
    (line,) = table(
        store, "ito", "enresnet", record("ito", (9, 9), 10), record("enresnet", (9, 0), 10)
    )
    assert p_value(line) == 1  # its sign could be either


def test_a_defense_does_not_differ_from_itself(store):
    (line,) = table(store, "ito", "ito", record("ito", (20, 3, 0), 20))
    assert line[7] == "+0.0 (-70.8..+70.8)"  # nothing seen in three images is little evidence
    assert line[-2:] == ["1", "1"]
    (line,) = table(store, "standard", "standard", record())
    assert line[-2:] == ["1", "1"]


def test_the_difference_has_its_paired_interval(store):
    a, b = np.repeat([20, 15], 50), np.repeat([15, 10], 50)
    a[0] = 19
    (line,) = table(store, "ito", "enresnet", record("ito", a, 20), record("enresnet", b, 20))
    d = (a - b) / 20
    low, high = stats.ttest_1samp(d, 0).confidence_interval()
    assert line[7] == f"{100 * d.mean():+.1f} ({100 * low:+.1f}..{100 * high:+.1f})"


@pytest.mark.parametrize("a", [(1,) * 8 + (0,) * 2, (9, 7, 8, 1, 4, 5, 0, 3, 2, 6)])
def test_an_accuracy_stands_above_the_interval_of_its_leaderboard(store, a):
    draws = max(a)
    for each in (record("ito", a, draws), record("enresnet", a, draws)):
        store.put(each)
    ((*_, first, second, _, _, _),) = rows(compare("ito", "enresnet", "digits", store.root))
    low, high = metrics(record("ito", a, draws)).accuracy.interval
    assert first == second == [f"{10 * sum(a) / draws:.1f}", f"{100 * low:.1f}–{100 * high:.1f}"]


@pytest.mark.parametrize(
    ("efforts", "said"),
    [
        (((40, 0), (50, 31)), "Budget: in 1 of 1 rows one side met more than 2 times the passes"),
        (((50, 31), (40, 0)), "Budget: in 1 of 1 rows one side met more than 2 times the passes"),
        (((40, 0), (50, 30)), None),  # just twice
    ],
)
def test_a_side_that_met_more_than_twice_the_effort_is_named_below_the_table(store, efforts, said):
    paths = [
        store.put(record(name, cost={**COST, "forwards": forwards, "backwards": backwards}))
        for name, (forwards, backwards) in zip(("standard", "pgd-at"), efforts, strict=True)
    ]
    text = compare(*map(str, paths), "digits", store.root)
    assert rows(text)[0][-1] == [str(sum(cost)) for cost in efforts]
    assert text.splitlines()[-1].startswith(said) if said else "Budget" not in text


def test_plain_names_fit_a_page_of_a_hundred_columns(store):
    both = record("ito", (10, 0), 20), record("enresnet", (9, 0), 20, setting=ADAPTIVE)
    text = compare(*(str(store.put(each)) for each in both), "digits", store.root)
    assert max(map(len, text.splitlines())) <= 100


def test_p_values_are_adjusted_over_the_table(store):
    a, b = np.repeat([1, 0], [9, 1]), np.zeros(10)
    records = [
        record(defense, right, threat=Threat(eps=eps))
        for defense, right in (("standard", a), ("pgd-at", b))
        for eps in ("1/10", "1/5", "3/10")
    ]
    lines = table(store, "standard", "pgd-at", *records)
    assert [line[-2:] for line in lines] == [["0.0039", "0.012"]] * 3


def test_only_cells_that_were_attacked_alike_are_paired(store):
    records = [
        record(threat=Threat(eps="1/10")),
        record(threat=Threat(eps="1/5")),
        record(seed=1),
        record("pgd-at", threat=Threat(eps="1/10")),
        record("pgd-at", threat=Threat(eps="1/5"), attack="fgsm"),
        record("pgd-at", threat=Threat(norm="l2", eps="1/10")),
        record("pgd-at", train_seed=1),
    ]
    (line,) = table(store, "standard", "pgd-at", *records)
    assert line[:4] == ["pgd", "linf", "0.1", "4"]


def test_lines_are_sorted_by_norm_attack_and_budget(store):
    records = [
        record(defense, attack=attack, threat=Threat(norm=norm, eps=eps))
        for defense in ("standard", "pgd-at")
        for attack in ("pgd", "fgsm")
        for norm in ("l2", "linf")
        for eps in ("8/255", "1/10", "1")
    ]
    lines = table(store, "standard", "pgd-at", *records)
    assert [line[1] for line in lines] == ["linf"] * 6 + ["l2"] * 6
    assert [line[0] for line in lines[:6]] == ["fgsm"] * 3 + ["pgd"] * 3
    assert [line[2] for line in lines[:3]] == ["8/255", "0.1", "1"]


OWN = [WHITEBOX, ADAPTIVE, Setting(kind="adaptive", eot=5)]


@given(st.permutations(range(3)))
@settings(max_examples=10, deadline=None)
def test_without_a_setting_the_lowest_outcome_of_each_cell_is_compared(order):
    """Whatever the settings are called: the white box of a deterministic defense stands for all."""
    shares = [(20 - 5 * rank, 0) for rank in order]
    with tempfile.TemporaryDirectory() as folder:
        records = [
            record("ito", share, 20, setting=setting)
            for share, setting in zip(shares, OWN, strict=True)
        ]
        (line,) = table(
            Store(Path(folder)), "ito", "standard", *records, record("standard", (1, 0))
        )
    strongest = str(OWN[order.index(2)])
    both = strongest if strongest == "whitebox" else f"{strongest} / whitebox"
    assert line[4:7] == [both, "25.0", "50.0"]


def test_each_budget_has_its_own_lowest_setting(store):
    low, high = (5, 0), (10, 0)
    records = [
        record("ito", share, 20, setting=setting, threat=Threat(eps=eps))
        for eps, shares in (("1/10", (low, high)), ("1/5", (high, low)))
        for share, setting in zip(shares, OWN[:2], strict=True)
    ]
    records += [record("standard", (1, 0), threat=Threat(eps=eps)) for eps in ("1/10", "1/5")]
    lines = table(store, "ito", "standard", *records)
    assert [[line[2], *line[4:6]] for line in lines] == [
        ["0.1", "whitebox", "12.5"],
        ["0.2", "adaptive EOT 20 / whitebox", "12.5"],
    ]


def test_equal_outcomes_are_those_of_the_attacker_who_had_more(store):
    records = [record("ito", (10, 0), 20, setting=setting) for setting in OWN]
    (line,) = table(store, "ito", "standard", *records, record("standard", (1, 0)))
    assert line[4] == "adaptive EOT 20 / whitebox"


def test_a_setting_that_only_one_of_two_stochastic_defenses_met_is_not_held_against_it(store):
    records = [record("ito", (20, 0), 20), record("ito", (1, 0), 20, setting=ADAPTIVE)]
    (line,) = table(store, "ito", "enresnet", *records, record("enresnet", (20, 0), 20))
    assert line[4:7] == ["whitebox", "50.0", "50.0"]
    (line,) = table(store, "ito@adaptive", "enresnet")
    assert line[4:7] == ["adaptive EOT 20 / whitebox", "2.5", "50.0"]


def test_only_settings_that_differ_are_no_pair(store):
    store.put(record("ito", (20, 0), 20))
    store.put(record("enresnet", (20, 0), 20, setting=ADAPTIVE))
    with pytest.raises(InputError, match="no cell below .* the same attack, norm, ε, setting, n"):
        compare("ito", "enresnet", "digits", store.root)


@pytest.mark.parametrize("change", [{"attack_version": 2}, {"data": "1" * 16}], ids=str)
def test_other_versions_of_an_attack_and_other_data_are_never_paired(store, change):
    store.put(record())
    store.put(record("pgd-at", **change))
    with pytest.raises(InputError, match="no cell below"):
        compare("standard", "pgd-at", "digits", store.root)


def test_superseded_versions_are_left_out_and_counted(store):
    """The old attack was better in its white box, the old defense worse: neither counts now."""
    records = [
        record("ito", (0, 0), 20, setting=WHITEBOX),
        record("ito", (20, 0), 20, setting=ADAPTIVE, attack_version=2),
        record("standard", (0, 0), defense_version="9", attack_version=2),
        record("standard", (1, 1), defense_version="10", attack_version=2),
    ]
    lines = table(store, "ito", "standard", *records)
    assert [line[4:7] for line in lines] == [["adaptive EOT 20 / whitebox", "50.0", "100.0"]]
    last = compare("ito", "standard", "digits", store.root).splitlines()[-1]
    assert last == "Left out: 2 records of older versions of a defense or an attack."


def test_a_setting_can_be_chosen(store):
    records = [
        record("ito", (20, 20, 0, 0), 20),
        record("ito", (10, 0, 0, 0), 20, setting=ADAPTIVE),
    ]
    (line,) = table(store, "ito@whitebox", "ito@adaptive", *records)
    assert line[4:7] == ["whitebox / adaptive EOT 20", "50.0", "12.5"]


def test_transfer_is_compared_with_transfer_from_the_same_oracle(store):
    transfer = [Setting(kind="transfer", oracle=name) for name in ("ito", "enresnet")]
    records = [record(defense, setting=transfer[0]) for defense in ("standard", "pgd-at")]
    records += [record("standard"), record("pgd-at"), record("standard", setting=transfer[1])]
    lines = table(store, "standard", "pgd-at", *records)
    assert sorted(line[4] for line in lines) == ["transfer from ito", "whitebox"]


@pytest.mark.parametrize(
    "spec", ["ito", "ito(omega=0.4)", "ito(epochs=1, base=standard(epochs=3))"]
)
def test_a_spec_finds_what_the_preset_of_its_dataset_recorded(store, spec):
    recorded = str(with_preset("ito", "quick", "mnist"))
    assert recorded != "ito"
    records = [
        record(recorded, (20, 0), 20, dataset="mnist"),
        record("pgd-at", (1, 0), dataset="mnist"),
    ]
    (line,) = table(store, spec, "pgd-at", *records, dataset="mnist")
    assert line[5:7] == ["50.0", "50.0"]


def test_a_spec_finds_what_was_recorded_without_the_preset(store):
    records = [
        record("ito", (20, 0), 20, dataset="mnist"),
        record("pgd-at", dataset="mnist", right=(1, 1)),
    ]
    (line,) = table(store, "ito", "pgd-at", *records, dataset="mnist")
    assert line[5:7] == ["50.0", "100.0"]


def test_a_model_of_the_caller_is_found_by_its_name(store):
    records = [record("model:Sequential:0123"), record("pgd-at")]
    (line,) = table(store, "model:Sequential:0123", "pgd-at", *records)
    assert line[5:7] == ["50.0", "50.0"]


def test_two_files_are_compared_whatever_they_are(store):
    a = store.put(record())
    b = store.put(record("pgd-at", (1, 0, 0, 0), attack="fgsm", threat=Threat(eps="1/5")))
    text = compare(str(a), str(b), "digits", store.root)
    assert "A = standard" in text
    assert rows(text)[0][:3] == [["pgd", "fgsm"], ["linf", ""], ["0.1", "0.2"]]


@pytest.mark.parametrize("change", [{"subset": "t"}, {"data": "1" * 16}, {"right": (1, 0)}])
def test_records_of_different_images_are_not_paired(store, change):
    a, b = store.put(record()), store.put(record("pgd-at", **change))
    with pytest.raises(InputError, match="different images"):
        compare(str(a), str(b), "digits", store.root)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ("ito@whitebxo", "'whitebxo' in 'ito@whitebxo' is not a setting; write one of whitebox"),
        ("itto", "unknown defense 'itto'; did you mean 'ito'?"),
        ("enresnet", "no cell below .* was run on both enresnet and standard"),
        ("standard@transfer", "no cell below"),
    ],
)
def test_what_cannot_be_compared_is_refused(store, a, message):
    store.put(record())
    with pytest.raises(InputError, match=message):
        compare(a, "standard", "digits", store.root)


def test_files_that_cannot_be_compared_are_refused(store):
    cell = record().cell
    failed = Record(id=cell.id, cell=cell, status="failed", reason="no gradient")
    path = store.put(failed)
    with pytest.raises(InputError, match="of a failed cell"):
        compare(str(path), str(path), "digits", store.root)
    with pytest.raises(InputError, match="cannot read the record"):
        compare("absent.json", str(path), "digits", store.root)


def test_suites_of_different_make_are_compared(store):
    """A suite stands for all settings: neither its digest nor its draws keep it apart."""
    attack = {"attack": "strongest(budget=smoke)"}
    deterministic = Setting(kind="adaptive", suite="aaa")
    stochastic = Setting(kind="adaptive", eot=5, suite="bbb")
    one = record(right=(1, 1, 1, 0), setting=deterministic, **attack)
    other = record(str(with_preset("ito", "quick", "digits")), (9, 0, 0, 0), 20,
                   setting=stochastic, **attack)  # fmt: skip
    (line,) = table(store, "standard", "ito", one, other)
    assert line[0] == "strongest(budget=smoke)"


def test_a_line_says_which_goal_it_is_of(store):
    denial = Threat(norm="linf", eps="1/10", goal="denial")
    pairs = [record(name, threat=threat) for name in ("standard", "pgd-at")
             for threat in (denial, Threat(norm="linf", eps="1/10"))]  # fmt: skip
    lines = table(store, "standard", "pgd-at", *pairs)
    assert sorted(line[0] for line in lines) == ["pgd", "pgd goal=denial"]
