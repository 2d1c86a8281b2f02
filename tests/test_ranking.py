"""Who is ranked where and by which number, and what the pages say of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench import boards, ranking, tables
from robbench.audit import Audited, Flag, audit
from robbench.cell import Cell, Setting
from robbench.metrics import metrics
from robbench.records import Record
from robbench.threat import Threat

MADE = ("F8", "F17", "F18", "F20", "F31")  # checks without which no number is sound
SOUND = Audited((), MADE, adaptive=True, challenged=True)
UNAWARE = Audited((), MADE, adaptive=False)


def flagged(verdict, images=()):
    flag = Flag("F3", verdict, 5.0, 3.0, 4, tuple(images), "one step breaks more")
    return Audited((flag,), MADE, adaptive=True, challenged=True)


def row(right=(1, 1, 0, 0), audited=SOUND, draws=1, refused=0, **of):
    """A row of images that are right in so many draws under attack, and in all when clean.

    refused: draws of every image that is not right without an answer.
    """
    threat = {key: of.pop(key) for key in ("norm", "eps", "goal", "target") if key in of}
    right = np.array(right, dtype=np.uint8)
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": len(right),
        "defense": "standard",
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(**({"eps": "1/10"} | threat)),
        "setting": Setting(kind="whitebox"),
    }
    cell = Cell(**(fields | of))
    record = Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        ok=right,
        err=np.where(right < draws, draws - right - refused, 0).astype(np.uint8),
        clean_ok=np.full(len(right), draws, dtype=np.uint8),
        clean_err=np.zeros(len(right), dtype=np.uint8),
        distance=np.zeros(len(right), dtype=np.float32),
        cost={"forwards": 1.0, "backwards": 1.0, "queries": 1.0, "seconds": 1.0},
    )
    return tables.Row(cell, metrics(record), record, "", audited)


def standings(*rows):
    """The standings of the only threat that there is."""
    ((_, placed),) = ranking.standings(rows)
    return placed


def order(*rows):
    return [(each.place, each.row.cell.defense) for each in standings(*rows)]


# ------------------------------------------------------------------------------- who stands where


@pytest.mark.parametrize(
    "unsound",
    [UNAWARE, flagged("INVALID"), flagged("OVERESTIMATE"), Audited((), ("F17",), True)],
    ids=["not adaptive", "invalid", "overestimate", "not audited"],
)
def test_what_is_not_sound_stands_below_all_that_is_and_has_no_place(unsound):
    rows = [row((1, 1, 1, 1), unsound, defense="ito"), row((0, 0, 0, 0)), row(defense="mmc")]
    assert order(*rows) == [(1, "mmc"), (2, "standard"), (None, "ito")]


@pytest.mark.parametrize("verdict", ["WARN", "INFO"])
def test_a_warning_costs_no_place(verdict):
    assert order(row(audited=flagged(verdict))) == [(1, "standard")]


def test_a_threat_without_a_sound_number_has_no_ranking():
    rows = [row(audited=UNAWARE), row(eps="1/5")]
    assert [threat.eps for threat, _ in ranking.standings(rows)] == [rows[1].cell.threat.eps]


def test_a_defense_stands_by_its_strongest_sound_attack():
    weak, strong = row((1, 1, 1, 0), attack="pgd"), row((1, 0, 0, 1), attack="apgd")
    lower = row((0, 0, 0, 0), flagged("OVERESTIMATE"), attack="bim")
    (placed,) = standings(weak, strong, lower)
    assert placed.row is strong


def test_an_unsound_defense_is_shown_by_its_lowest_direct_number():
    rows = [
        row((1, 1, 0, 0), UNAWARE, defense="ito"),
        row((1, 1, 1, 0), UNAWARE, defense="ito", attack="mim"),
        row((0, 0, 0, 0), UNAWARE, defense="ito", setting=Setting(kind="blackbox")),
    ]
    placed = standings(row(), *rows)
    assert placed[-1].row is rows[0]


def test_attacks_on_several_n_are_compared_on_the_images_that_both_had():
    many = row((1, 0, 1, 1) * 30, attack="pgd")  # of the first hundred more are right than
    few = row((1, 0, 0, 1) * 25, attack="apgd")
    assert standings(many, few)[0].row is few
    alike = row((1, 0, 1, 1) * 25, attack="apgd")
    assert standings(many, alike)[0].row is many  # as strong, and known of more images


def test_a_number_on_few_images_ranks_nobody_who_has_others():
    many, few = row((1, 0) * 50), row((0,) * 99, attack="apgd")
    assert standings(many, few)[0].row is many
    assert standings(few)[0].row is few
    assert standings(row((1, 0)), few)[0].row is few


def test_the_trained_model_that_was_attacked_most_stands_for_a_defense():
    twice = [row(train_seed=1), row((1, 1, 1, 0), train_seed=1, attack="mim")]
    (placed,) = standings(row((1, 0, 0, 0)), *twice)
    assert placed.row is twice[0]
    (placed,) = standings(row(train_seed=1), row((1, 0, 0, 0)))
    assert placed.row.cell.train_seed == 0


def test_an_older_version_of_a_defense_is_not_ranked():
    old, new = row((0, 0, 0, 0), defense_version="9"), row(defense_version="10")
    (placed,) = standings(old, new)
    assert placed.row is new


def test_attack_seeds_are_attempts_at_the_same_defense():
    (placed,) = standings(row(seed=0), row((1, 0, 0, 0), seed=1))
    assert placed.row.cell.seed == 1


@pytest.mark.parametrize(
    "threat",
    [{"goal": "denial"}, {"target": "random"}, {"target": 3}, {"norm": "none", "eps": None}],
    ids=str,
)
def test_only_untargeted_errors_within_a_budget_are_ranked(threat):
    assert ranking.standings([row(**threat)]) == []


def test_a_failed_cell_and_one_that_nobody_looked_at_are_not_ranked():
    finished = row()
    assert ranking.standings([finished._replace(audited=None)]) == []
    assert ranking.standings([finished._replace(metrics=None)]) == []


def test_equals_share_a_place_in_the_order_of_their_names_whatever_the_order_of_rows():
    rows = [row(defense=name) for name in ("mmc", "adp", "ito")] + [
        row((1, 0, 0, 0), defense="rce")
    ]
    orders = {tuple(order(*each)) for each in itertools.permutations(rows)}
    assert orders == {((1, "adp"), (1, "ito"), (1, "mmc"), (4, "rce"))}


def test_threats_come_by_norm_and_budget():
    wanted = [("linf", "0.1"), ("linf", "0.2"), ("l2", "0.5"), ("l2", "1")]
    rows = [row(norm=norm, eps=eps) for norm, eps in reversed(wanted)]
    found = [str(threat) for threat, _ in ranking.standings(rows)]
    assert found == [f"{norm} {eps}" for norm, eps in wanted]


def test_to_refuse_under_attack_is_worth_as_much_as_to_be_right():
    answers, refuses = row((1, 1, 1, 0)), row((1, 0, 0, 0), defense="rce", refused=1)
    assert order(answers, refuses) == [(1, "rce"), (2, "standard")]


# ------------------------------------------------------------------------- what is left per image


@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_left_is_what_no_attack_has_broken(outcomes):
    rows = [row(right, attack=f"pgd(steps={1 + at})") for at, right in enumerate(outcomes)]
    (placed,) = standings(*rows)
    left = sum(all(right[image] for right in outcomes) for image in range(5)) / 5
    assert placed.worst.value == left <= placed.row.metrics.robust_with_detection.value


def test_what_is_left_counts_attacks_on_at_least_as_many_images_sound_or_not():
    best = row((1, 1, 0, 1), attack="apgd")
    rows = [
        row((0, 1, 1, 1, 0, 0), UNAWARE, attack="mim", setting=Setting(kind="blackbox")),
        row((1, 1), attack="bim"),
    ]
    (placed,) = standings(best, *rows)
    assert placed.row is best
    assert placed.worst.value == 2 / 4  # images 1 and 3


def test_no_worst_of_several_numbers_is_taken_where_draws_would_make_it_too_low():
    rows = [row((9, 5), draws=10, defense="ito"), row((5, 9), draws=10, defense="ito", seed=1)]
    (placed,) = standings(*rows)
    assert placed.worst is None
    assert ranking.ranking_lines([placed])[0][ranking.RANKED.index("all records %")] is None


# ------------------------------------------------------------------------------------- the pages


def test_the_board_has_the_ranking_before_everything_else():
    placed, unplaced = row((1, 1, 1, 0)), row((1, 1, 1, 1), UNAWARE, defense="ito")
    text = boards.board("digits", [placed, unplaced])
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Ranking, linf 0.1", "## Clean"]
    table = [line for line in text.splitlines() if line.startswith("|")][:4]
    first, last = ([part.strip() for part in line.split("|")[1:-1]] for line in table[2:])
    assert first[:2] + first[-1:] == ["1", "`standard`", "sound"]
    assert last[:2] + last[-1:] == ["–", "`ito`", "not adaptive"]
    assert first[2].startswith("75.0 (") and first[4] == "`pgd`, whitebox"


def test_the_page_of_cells_has_every_row_of_the_ranking_and_its_badge():
    rows = [row((1, 1, 1, 0)), row(audited=flagged("OVERESTIMATE"), defense="mmc")]
    lines = boards.cells("digits", rows).splitlines()
    badges = [line.split("|")[-2].strip() for line in lines if line.startswith("| `")]
    assert badges == ["sound", "overestimate: F3"]


def test_pages_and_flags_are_the_same_for_records_in_any_order():
    records = [row(defense=name).record for name in ("standard", "mmc")]
    broken = records[0].cell.model_copy(update={"seed": 1})
    failed = Record(id=broken.id, cell=broken, status="failed", reason="the attack left the ball")
    found = [boards.pages("digits", each) for each in itertools.permutations([*records, failed])]
    assert all(each == found[0] for each in found)
    flags = json.loads(found[0]["digits.flags.json"])
    assert {name: each["badge"].split(":")[0] for name, each in flags.items()} == {
        failed.id: "invalid", records[0].id: "not audited", records[1].id: "not adaptive"
    }  # fmt: skip


def images_of(text):
    """The places that ranges such as 0-3,7 name."""
    ends = [list(map(int, part.split("-"))) for part in text.split(",") if part]
    return [image for each in ends for image in range(each[0], each[-1] + 1)]


@given(st.sets(st.integers(0, 60), max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_images_of_a_flag_survive_as_ranges(images):
    text = boards.flags_text({"id": flagged("WARN", images)})
    (flag,) = json.loads(text)["id"]["flags"]
    assert images_of(flag["images"]) == sorted(images)
    runs = flag["images"].count(",") + 1 if images else 0
    assert runs == sum(image - 1 not in images for image in images)  # none could be joined


def test_the_file_of_flags_says_all_that_the_checks_said():
    found = {"b": flagged("OVERESTIMATE", (1, 2, 3)), "a": UNAWARE}
    text = boards.flags_text(found)
    values = json.loads(text)
    assert list(values) == ["a", "b"] and len(text.splitlines()) == 4  # a record is a line
    assert values["a"] == {"badge": "not adaptive", "assessed": " ".join(MADE), "flags": []}
    (flag,) = values["b"]["flags"]
    assert Flag(**flag | {"images": tuple(images_of(flag["images"]))}) == found["b"].flags[0]


def test_flags_of_records_on_disk_are_those_of_the_records():
    records = [row(defense=name).record for name in ("standard", "mmc")]
    read = [Record.model_validate_json(record.text()) for record in records]
    assert boards.flags_text(audit(read)) == boards.flags_text(audit(records))
