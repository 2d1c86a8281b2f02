"""Pages and rows as pure functions of records."""

from __future__ import annotations

import csv
import io
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench import boards, statistics, tables
from robbench.audit import Audited, Flag
from robbench.cell import Cell, Setting
from robbench.metrics import Measure, contributions, metrics
from robbench.records import Record
from robbench.statistics import Interval
from robbench.threat import Threat

WHITEBOX = Setting(kind="whitebox")


def cell(**changes):
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": 4,
        "defense": "standard",
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(norm="linf", eps="1/10"),
        "setting": WHITEBOX,
    }
    return Cell(**(fields | changes))


def record(of=None, draws=1, seconds=1.0, right=(1, 1, 0, 0), **changes):
    """A record whose images were all right when clean and are right in `right` draws under
    attack."""
    of = of or cell()
    right = np.array(right, dtype=np.uint8)
    fields = {
        "id": of.id,
        "cell": of,
        "draws": draws,
        "ok": right,
        "err": (draws - right).astype(np.uint8),
        "clean_ok": np.full(of.n, draws, dtype=np.uint8),
        "clean_err": np.zeros(of.n, dtype=np.uint8),
        "distance": np.zeros(of.n, dtype=np.float32),
        "cost": {"forwards": 21.0, "backwards": 20.0, "queries": 21.0, "seconds": seconds},
        "provenance": {"device": "some GPU", "commit": "abc", "threads": 1},
    }
    return Record(**(fields | changes))


@pytest.fixture
def many():
    """Records of several norms, attacks, settings, ε and seeds."""
    settings = [WHITEBOX, Setting(kind="transfer", oracle="pgd-at")]
    return [
        record(cell(threat=Threat(norm=norm, eps=eps), attack=attack, setting=setting, seed=seed))
        for norm in ("l2", "linf")
        for eps in ("1/10", "8/255", "1")
        for attack in ("pgd", "fgsm")
        for setting in settings
        for seed in (0, 1)
    ]


def failed(of=None):
    of = of or cell(seed=9)
    return Record(id=of.id, cell=of, status="failed", reason="the attack left the ball")


def page(*records):
    pages = boards.pages("digits", list(records))
    return pages["digits.md"] + pages["digits.cells.md"]


def sheet(*records):
    return list(csv.DictReader(io.StringIO(boards.pages("digits", list(records))["digits.csv"])))


def body(markdown):
    """The cells of every line of the markdown tables, headers left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [
        [each.strip() for each in line]
        for line in split
        if line[0].strip() != "defense" and set("".join(line)) - set(":-")
    ]


def test_pages_do_not_depend_on_the_order_of_records(many):
    expected = boards.pages("digits", many)
    for seed in range(5):
        shuffled = random.Random(seed).sample(many, len(many))
        assert boards.pages("digits", shuffled) == expected


def test_pages_survive_the_files(many):
    read = [Record.model_validate_json(each.text()) for each in many]
    assert boards.pages("digits", read) == boards.pages("digits", many)


def test_pages_do_not_depend_on_the_machine():
    here = record(seconds=1.0)
    there = record(seconds=99.0, provenance={"device": "cpu", "commit": None, "threads": 8})
    assert boards.pages("digits", [here]) == boards.pages("digits", [there])


def test_a_page_mentions_no_time():
    assert not re.search(r"second|time\b|wall", page(record()))


def test_rows_are_sorted_by_norm_attack_setting_and_budget(many):
    made = tables.rows(many)
    order = [
        (
            row.cell.threat.norm != "linf",
            row.cell.attack,
            row.cell.seed,
            row.cell.setting.kind == "transfer",
        )
        for row in made
    ]
    assert order == sorted(order)
    budgets = [row.cell.threat.eps for row in made[:3]]
    assert budgets == sorted(budgets)


def test_failed_cells_are_rows_but_on_no_page():
    made = tables.rows([failed(), record()])
    assert [row.note for row in made if row.metrics is None] == ["failed: the attack left the ball"]
    beside, alone = (boards.pages("digits", each) for each in ([failed(), record()], [record()]))
    assert {name for name in beside if beside[name] != alone[name]} == {"digits.flags.json"}


def test_a_page_leaves_out_older_versions_and_says_how_many():
    old = [
        record(cell(threat=Threat(eps=eps), attack_version=1), right=(0, 0, 0, 0))
        for eps in ("1/10", "1/5")
    ]
    new = [record(cell(threat=Threat(eps=eps), attack_version=2)) for eps in ("1/10", "1/5")]
    alone, both = boards.pages("digits", new), boards.pages("digits", old + new)
    line = "Left out: 2 records of older versions of a defense or an attack."
    assert both["digits.csv"] == alone["digits.csv"]
    assert both["digits.md"].replace(f"{line}\n\n", "") == alone["digits.md"] != both["digits.md"]
    assert "Left out" not in alone["digits.md"]
    assert "Left out: 1 record of" in page(*old, new[0])


def test_a_cell_whose_newest_version_failed_shows_no_older_number():
    assert body(page(record(), failed(cell(attack_version=2)))) == []


def test_an_empty_page_is_a_page():
    assert page(failed()).startswith("# digits\n")


def test_a_page_shows_shares_with_intervals_and_n():
    text = page(record())
    (clean,), (attacked,) = (
        [line for line in body(text) if len(line) == 5],
        [line for line in body(text) if len(line) > 5],
    )
    half = statistics.proportion(2, 4)
    interval = f"{100 * half.low:.1f}–{100 * half.high:.1f}"
    assert clean[:2] == ["`standard`", "100.0 (39.8–100.0)"]  # 0.025 ** (1 / 4)
    assert attacked[2:4] == ["0.1", f"50.0 ({interval})"]
    assert attacked[-2:] == ["41", "not audited"]
    assert "## pgd, linf, n = 4" in text


def test_each_setting_has_its_name():
    records = [
        record(cell()),
        record(cell(setting=Setting(kind="transfer", oracle="pgd-at"))),
        record(cell(setting=Setting(kind="blackbox"))),
        record(cell(defense="ito"), draws=5),
        record(cell(defense="ito", setting=Setting(kind="adaptive", eot=20)), draws=5),
        record(cell(defense="ito(omega=0)")),
    ]
    shown = {(line[0], line[1]) for line in body(page(*records)) if len(line) > 5}
    assert shown == {
        ("`standard`", "whitebox = adaptive"),
        ("`standard`", "transfer from pgd-at"),
        ("`standard`", "blackbox"),
        ("`ito`", "whitebox"),
        ("`ito`", "adaptive EOT 20"),
        ("`ito(omega=0)`", "whitebox"),  # deterministic, but its own loss is another attack
    }


def test_the_clean_table_is_of_the_newest_version_where_one_attack_alone_was_run_again():
    wrong = {"clean_ok": np.zeros(4, np.uint8), "clean_err": np.ones(4, np.uint8)}
    old = [record(cell(attack=name, defense_version="9")) for name in ("fgsm", "mim", "pgd")]
    new = record(cell(attack="pgd", defense_version="10"), right=(0, 0, 0, 0), **wrong)
    clean = boards.pages("digits", [*old, new])["digits.md"].partition("## Clean")[2]
    ((_, accuracy, *_),) = body(clean)
    assert accuracy.startswith("0.0")


def test_the_clean_table_has_one_line_a_defense_and_seed():
    records = [record(cell(threat=Threat(eps=eps))) for eps in ("1/10", "1/5")]
    records += [record(cell(defense="ito")), record(cell(train_seed=1))]
    assert len([line for line in body(page(*records)) if len(line) == 5]) == 3


@given(st.text(alphabet="ab|`\n\\ *", max_size=12))
@settings(max_examples=60)
def test_no_name_breaks_a_table(name):
    strange = f"model:x{name}"
    text = page(
        record(cell(defense=strange)),
        record(cell(setting=Setting(kind="transfer", oracle=strange))),
    )
    lengths = {len(line) for line in body(text)}
    headers = [line for line in text.splitlines() if line.startswith("| defense")]
    assert lengths == {header.count("|") - 1 for header in headers}
    assert len(body(text)) == 4


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.12345, 0.1, 0.15, ("12.3", "10.0–15.0")),
        (1.0, 0.9634, 1.0, ("100.0", "96.3–100.0")),
        (0.0, 0.0, 0.0004, ("0.0", "0.0–0.0")),
        (float("nan"), float("nan"), float("nan"), ("n.a.", "")),
    ],
)
def test_shares_are_written_as_percent(value, low, high, expected):
    measure = Measure(value, Interval(low, high))
    assert (tables.percent(measure), tables.interval(measure)) == expected


@pytest.mark.parametrize(
    ("passes", "expected"),
    [(41, "41 2s"), (999, "999 2s"), (1000, "1.0k 2s"), (2_345_678, "2.3M 2s")],
)
def test_cost_has_a_unit(passes, expected):
    spent = {"forwards": passes - 20.0, "backwards": 20.0, "queries": 1.0, "seconds": 2.4}
    assert tables.cost(record(cost=spent)) == expected


def test_a_sheet_has_every_share_and_its_interval():
    stochastic = record(cell(defense="ito"), draws=20, right=(20, 20, 10, 0))
    (line,) = sheet(stochastic)
    found = metrics(stochastic)
    for name in (*tables.SHARES, "conditional", "clean", "clean_abstained"):
        measure = getattr(found, name)
        assert float(line[name]) == pytest.approx(measure.value, abs=1e-6)
        assert float(line[f"{name}_low"]) == pytest.approx(measure.interval.low, abs=1e-6)
        assert float(line[f"{name}_high"]) == pytest.approx(measure.interval.high, abs=1e-6)
    assert (line["id"], line["n"], line["eps"], line["draws"]) == (stochastic.id, "4", "0.1", "20")
    assert "seconds" not in line


def test_a_persistent_attacker_stands_beside_the_accuracy():
    (line,) = sheet(record(cell(defense="ito"), draws=20, right=(20, 20, 10, 0)))
    survives = np.prod([(10 - i) / (20 - i) for i in range(10)])  # ten draws, all among the right
    assert float(line["ra_at_10"]) == pytest.approx((2 + survives) / 4, abs=1e-6)
    (line,) = sheet(record())
    assert line["ra_at_10"] == line["accuracy"]


def test_rows_are_valid_json_even_where_nothing_was_right():
    nothing = np.zeros(4, dtype=np.uint8)
    hopeless = record(clean_ok=nothing, clean_err=nothing + 1, right=(0, 0, 0, 0))
    (row,) = tables.rows([hopeless])
    values = json.loads(json.dumps(tables.flat(row), allow_nan=False))
    assert values["conditional"] is None
    assert sheet(hopeless)[0]["conditional"] == ""


def test_a_failed_row_says_why():
    (row,) = tables.rows([failed()])
    values = tables.flat(row)
    assert values["status"] == "failed"
    assert "left the ball" in values["reason"]


def test_file_names_are_portable():
    endings = ("md", "cells.md", "csv", "flags.json")
    assert set(boards.pages("folder:a/b c", [])) == {f"folder_a_b_c.{end}" for end in endings}


def test_two_targets_of_two_oracles_make_a_matrix():
    def crossed(defense, oracle, right):
        setting = Setting(kind="transfer", oracle=oracle)
        return record(cell(defense=defense, setting=setting), right=right)

    pairs = [("ito", "standard", (1, 1, 1, 0)), ("ito", "pgd-at", (1, 1, 1, 1)),
             ("mmc", "standard", (0, 0, 0, 0))]  # fmt: skip
    text = page(*(crossed(*pair) for pair in pairs))
    rows = [
        [word.strip() for word in line.strip("|").split("|")]
        for line in text.partition("Accuracy % by oracle:")[2].splitlines()
        if line.startswith("| `")
    ]
    assert rows[:2] == [["`ito`", "0.1", "100.0", "75.0"], ["`mmc`", "0.1", "", "0.0"]]
    alone = page(crossed("ito", "standard", (1, 1, 0, 0)), crossed("ito", "pgd-at", (1, 1, 0, 0)))
    assert "by oracle" not in alone


def suite(lost, winner, **changes):
    trace = {
        "suite_lost": np.array(lost, dtype=np.float16),
        "suite_winner": np.array(winner, dtype=np.int8),
        "suite_passes": np.full((len(lost), len(winner)), 7, dtype=np.float32),
    }
    provenance = {"suite": ["fgsm", "pgd"], "device": "some GPU", "commit": "abc", "threads": 1}
    return record(trace=trace, provenance=provenance, **changes)


def test_a_suite_says_which_stage_broke_what():
    nan = float("nan")
    deterministic = suite([[1, 0, 0, 1], [nan, 0.5, 1, nan]], [0, -1, 1, 0])
    found = contributions(deterministic)
    assert [(part.attacked, part.broken, part.worst) for part in found] == [(4, 2, 2), (2, 1, 1)]
    assert tables.broken_by(deterministic) == "fgsm 2, pgd 1"
    assert "standard 0.1 fgsm 4 2 2 7" in " ".join(re.findall(r"[\w.]+", page(deterministic)))
    random = suite([[0.96, 0.5, 0.2, 1], [nan, 0.94, 1, nan]], [0, 1, 1, 0], draws=20)
    assert [part.broken for part in contributions(random)] == [2, 1]
    assert contributions(record()) == []
    assert tables.broken_by(record()) == ""


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"threat": Threat(norm="linf", eps="1/10", goal="denial")}, "goal denial"),
        ({"setting": Setting(kind="adaptive", eot="auto")}, "adaptive EOT auto"),
        ({"setting": Setting(kind="blackbox", queries=500)}, "blackbox 500 queries"),
    ],
)
def test_goals_draws_and_limits_are_said(changes, part):
    of = cell(**changes)
    assert part in page(record(of))
    flat = tables.flat(tables.rows([record(of)])[0])
    assert flat["goal"] == of.threat.goal
    assert flat["eot"] == of.setting.eot
    assert flat["max_queries"] == (of.setting.queries or "")


def test_what_is_remarkable_about_a_number_is_said():
    auto = cell(setting=Setting(kind="adaptive", eot="auto"))
    made = record(auto, provenance={"eot": {"chosen": 5}})
    assert tables.remarks(made) == ["at 0.1 EOT auto took 5 draws"]
    idle = record(trace={"unchanged": np.array([True, True, True, True])})
    assert tables.remarks(idle) == ["at 0.1 the attack changed no image that is right when clean"]
    busy = record(trace={"unchanged": np.array([True, False, True, True])})
    assert tables.remarks(busy) == []
    assert "changed no image" in page(idle) and "changed no image" not in page(busy)


def rated(eps="1/10", verdict=None, n=4, **changes):
    """A row that was audited: sound, or with a flag of this verdict."""
    of = cell(threat=Threat(norm="linf", eps=eps), n=n)
    flags = () if verdict is None else (Flag("F3", verdict, 5.0, 3.0, n, (), "one step does more"),)
    found = Audited(flags, ("F8", "F17", "F18", "F20", "F31"), adaptive=True, challenged=True)
    (row,) = tables.rows([record(of, right=(1, 0) * (n // 2), **changes)])
    return row._replace(audited=found)


def test_verdicts_say_why_and_of_which_budgets():
    assert tables.verdicts([rated(), rated("1/5")]) == ["sound by 5 checks"]
    mixed = [rated("1/20"), rated(), rated("1/5", "OVERESTIMATE"), rated("3/10")]
    assert tables.verdicts(mixed) == [
        "at 0.05, 0.1, 0.3 sound by 5 checks",
        "at 0.2 overestimate: F3 (one step does more)",
    ]


def test_of_what_nobody_looked_at_no_verdict_is_said():
    assert tables.verdicts([row._replace(audited=None) for row in (rated(), rated("1/5"))]) == []
    assert tables.verdicts([rated()._replace(audited=None), rated("1/5")]) == ["sound by 5 checks"]


@pytest.mark.parametrize("n", [4, 20, 100, 1000])
def test_a_number_is_sound_where_its_interval_is_as_short_as_was_asked(n):
    row = rated(n=n)
    low, high = row.metrics.robust_with_detection.interval
    for precision in (0.4, 0.2, 0.1, 0.05, 0.02):
        (said,) = tables.verdicts([row], precision)
        assert said.startswith("sound") is ((high - low) / 2 <= precision)
        needed = tables.flat(row, precision)["n_needed"]
        assert needed > n if said.startswith("too few") else needed == n
        assert said.startswith("sound") or f"n = {needed} for ± {100 * precision:g} %" in said


def test_more_images_make_no_number_sound_that_is_not():
    unaware = rated()._replace(audited=Audited((), ("F8",), adaptive=False))
    accused = rated(verdict="OVERESTIMATE")
    assert tables.verdicts([accused], 0.01) == tables.verdicts([accused])
    (said,) = tables.verdicts([unaware], 0.01)
    assert said.startswith("not adaptive; too few images")


def test_a_sheet_names_the_badge_and_each_flag_once():
    row = rated(verdict="INVALID")
    twice = row._replace(audited=row.audited._replace(flags=row.audited.flags * 2))
    values = tables.flat(twice)
    assert (values["badge"], values["flags"]) == ("invalid: F3", "F3")
    assert [tables.flat(row._replace(audited=None))[key] for key in ("badge", "flags")] == ["", ""]
