"""The published evaluations on trial: valid claims beside what was measured, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from robbench import findings
from robbench.attacks import Configured
from robbench.audit import CHECKS, Audited, Flag
from robbench.cell import Cell, Setting
from robbench.defense import with_preset
from robbench.errors import InputError
from robbench.findings import BEGIN, END, on_trial, page
from robbench.records import Record
from robbench.threat import Threat

SCRIPTS = {"F37"}  # of the authors' own counting, which no record can show
OLD = f"# Findings\n\nBefore.\n\n{BEGIN}\nold tables\n{END}\n\nAfter, and {END} once more.\n"


def attack_of(defense):
    """The attack of the first claim on a defense."""
    return next(finding.attack for finding in on_trial() if finding.defense == defense)


MMC = attack_of("mmc")


def record(right=(1, 1, 0, 0), defense="mmc", attack=MMC, dataset="digits", **of):
    """A finished record of a deterministic defense, in the preset of its dataset."""
    right = np.array(right, dtype=np.uint8)
    n = len(right)
    fields = {
        "dataset": dataset,
        "data": "0" * 16,
        "n": n,
        "defense": str(with_preset(defense, "quick", dataset)),
        "defense_version": "1",
        "attack": str(Configured.of(attack).spec),
        "attack_version": 1,
        "threat": Threat(eps="1/10"),
        "setting": Setting(kind="whitebox"),
    }
    cell = Cell(**(fields | of))
    return Record(
        id=cell.id,
        cell=cell,
        ok=right,
        err=(1 - right).astype(np.uint8),
        clean_ok=np.ones(n, dtype=np.uint8),
        clean_err=np.zeros(n, dtype=np.uint8),
        distance=np.zeros(n, dtype=np.float32),
        cost={"forwards": 1.0, "backwards": 1.0, "queries": 1.0, "seconds": 1.0},
    )


def tables(*records, dataset="digits"):
    """The lines of the table of papers and of that of defenses, as lists of cells."""
    text = findings.findings(records, dataset)
    parts = text.split("### ")[1:]
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("|")
        ][2:]
        for part in parts
    ]


def tried(*records, defense="mmc"):
    """The lines of the papers on one defense."""
    return [line for line in tables(*records)[0] if line[1] == f"`{defense}`"]


# ------------------------------------------------------------------------------------ the claims


@pytest.mark.parametrize("finding", on_trial(), ids=lambda each: f"{each.defense} {each.attack}")
def test_a_claim_names_a_defense_an_attack_within_its_norm_and_checks_that_exist(finding):
    for defense in filter(None, (finding.defense, finding.measured)):
        with_preset(defense, "quick", "digits")
    assert finding.norm in Configured.of(finding.attack).entry.norms
    assert set(finding.foreseen) <= set(CHECKS) | SCRIPTS
    assert all(finding.foreseen.values()) and finding.claim


def test_every_paper_is_on_trial_and_no_claim_twice():
    assert {each.paper for each in on_trial()} == {f"00{number}" for number in range(5)}
    assert len({(each.defense, each.attack) for each in on_trial()}) == len(on_trial())


def test_a_check_that_no_record_can_make_is_not_registered():
    assert not SCRIPTS & set(CHECKS)


# ------------------------------------------------------------------------------------- the tables


def test_without_records_nothing_was_measured():
    papers, defenses = tables()
    assert len(papers) == len(on_trial()) and defenses == []
    assert all(line[4:8] == ["", "not measured", "", ""] for line in papers)


def test_a_claim_stands_beside_what_its_paper_s_attack_leaves_here():
    (line,) = tried(record((1, 1, 1, 0)))
    assert "24.8 % under PGD-50" in line[2]
    assert line[3:5] == [f"`{Configured.of(MMC).spec}`, whitebox", "4"]
    assert line[5].startswith("75.0 (")


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": "pgd"},
        {"threat": Threat(eps="1/5")},
        {"threat": Threat(norm="l2", eps="1/10")},
        {"threat": Threat(eps="1/10", goal="denial")},
        {"train_seed": 1},
        {"seed": 1},
        {"defense": "rce"},
        {"dataset": "mnist"},
    ],
    ids=str,
)
def test_another_cell_is_not_the_paper_s(changes):
    (line,) = tried(record(**changes))
    assert line[5] == "not measured"


def test_a_failed_cell_was_not_measured():
    cell = record().cell
    failed = Record(id=cell.id, cell=cell, status="failed", reason="no gradient")
    assert tried(failed)[0][5] == "not measured"


def test_the_record_of_most_images_counts():
    (line,) = tried(*(record((0,) * n) for n in range(1, 12)), record((1, 0, 1, 1) * 3))
    assert (line[4], line[5].split()[0]) == ("12", "75.0")


def test_where_a_detector_goes_around_a_defense_that_is_what_was_measured():
    attack = attack_of("rce")
    plain = record((0, 0), defense="rce", attack=attack)
    detected = record((1, 1), defense="rce(detector=k-density)", attack=attack)
    assert tried(plain, detected, defense="rce")[0][5].startswith("100.0")
    assert tried(plain, defense="rce")[0][5].startswith("0.0")


def test_the_setting_of_a_claim_is_kept():
    attack = attack_of("mixup-inference")
    direct = record(defense="mixup-inference", attack=attack)
    setting = Setting(kind="transfer", oracle="mixup")
    transfer = record((1, 1, 1, 1), defense="mixup-inference", attack=attack, setting=setting)
    assert tried(direct, defense="mixup-inference")[0][5] == "not measured"
    assert tried(direct, transfer, defense="mixup-inference")[0][5].startswith("100.0")


def test_what_is_only_said_is_in_brackets_and_what_is_raised_is_not(monkeypatch):
    made = record()
    flags = tuple(
        Flag(name, verdict, 1.0, 0.0, 4, (), "why")
        for name, verdict in [("F3", "OVERESTIMATE"), ("F9", "WARN"), ("F17", "INFO")]
    )
    found = {made.id: Audited(flags, ("F3", "F9", "F17"), adaptive=True)}
    monkeypatch.setattr(findings, "audit", lambda records: found)
    (line,) = tried(made)
    assert line[6:] == ["overestimate: F3", "F3, F9, (F17)", "F5 ?, F8 ?, F9 ✓"]


def test_the_strongest_attack_is_the_suite_of_the_largest_budget_then_of_most_images():
    suites = [
        record((0, 0, 0, 0, 0), attack="strongest(budget=smoke)"),
        record((1, 1, 1, 0), attack="strongest(budget=standard)"),
        record((1, 1), attack="strongest(budget=standard)", setting=Setting(kind="adaptive")),
    ]
    ((line,),) = tables(record(), *suites)[1:]
    assert line[0] == "`mmc`" and "24.8 %" in line[1]
    assert line[2].startswith("50.0 (") and line[3].startswith("75.0 (")
    assert Configured.of(line[4].strip("`")).settings["budget"] == "standard"
    assert line[5] == "4"


def test_a_defense_without_a_claim_is_listed_and_one_without_a_suite_is_not():
    suite = record(defense="trades", attack="strongest(budget=smoke)")
    ((line,),) = tables(record(), suite)[1:]
    assert line[:3] == ["`trades`", "", ""]


# --------------------------------------------------------------------------------------- the page


def test_a_page_changes_between_its_marks_and_nowhere_else():
    new = page(OLD, [record()])
    head, tail = OLD.split(BEGIN)[0], OLD.split(END, 1)[1]
    assert new.startswith(f"{head}{BEGIN}\n") and new.endswith(f"\n{END}{tail}")
    inside = new.removeprefix(f"{head}{BEGIN}").removesuffix(f"{END}{tail}")
    assert inside.strip() == findings.findings([record()], "digits")


def test_a_page_that_is_written_again_stays_as_it_is():
    once = page(OLD, [record()])
    assert page(once, [record()]) == once != page(once, [])


def test_a_page_does_not_depend_on_the_order_of_records():
    records = [record(), record((1, 0)), record(attack="strongest(budget=smoke)")]
    assert page(OLD, records) == page(OLD, records[::-1])


@pytest.mark.parametrize(
    "text",
    ["", "# Findings", f"only {BEGIN}", f"only {END}", f"{END} before {BEGIN}"],
    ids=["empty", "none", "no end", "no beginning", "reversed"],
)
def test_a_page_without_its_marks_is_refused_with_both(text):
    with pytest.raises(InputError, match="no place for the tables") as caught:
        page(text, [])
    assert BEGIN in str(caught.value) and END in str(caught.value)
