"""The audit accuses what is planted, by the flag that it must, and lets go what is sound."""

from __future__ import annotations

from functools import cache

import pytest
from tests.planted import PLANTED, SOUND, probabilities, table
from tests.planted.trial import accused, cleared, trial

from robbench.audit import CHECKS, badge
from robbench.errors import InputError
from robbench.evaluation import deploy

ONE_DRAW = ["single-draw-noise", "random-resize"]  # evaluations that are weak, and no more


@pytest.fixture(scope="module")
def found():
    """What the audit says of one of them, planted or sound, each run once."""
    shared = trial()
    return cache(lambda name: (accused if name in PLANTED else cleared)(name, shared))


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_gets_the_flags_that_it_must(found, name):
    raised = {(flag.id, flag.verdict) for flag in found(name).flags}
    assert PLANTED[name].expected.items() <= raised


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in ONE_DRAW])
def test_the_number_of_what_is_planted_is_not_ranked(found, name):
    assert found(name).worst in ("INVALID", "OVERESTIMATE")


@pytest.mark.parametrize("name", ONE_DRAW)
def test_an_attack_that_sees_one_draw_at_a_time_is_not_ranked(found, name):
    assert not found(name).adaptive and not found(name).sound


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_defense_gets_no_flag_under_a_converged_attack(found, name):
    assert [flag for flag in found(name).flags if flag.verdict != "INFO"] == []


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_defense_is_called_sound(found, name):
    assert badge(found(name)) == "sound"


def test_the_committed_table_is_what_the_run_gives(found):
    assert table.committed() == table.table({name: found(name) for name in (*PLANTED, *SOUND)})


def test_every_flag_has_a_section_of_its_own_in_the_page():
    lines = table.PAGE.read_text(encoding="utf-8").splitlines()
    headings = [line.split()[1] for line in lines if line.startswith("### F")]
    assert sorted(headings) == sorted({*CHECKS, "F37"})  # which nothing computes


def test_the_headings_of_the_page_are_the_titles_of_the_checks():
    page = table.PAGE.read_text(encoding="utf-8")
    assert all(f"### {name} · {check.title}\n" in page for name, check in CHECKS.items())


def test_probabilities_are_refused_before_they_are_attacked(network):
    with pytest.raises(InputError, match="returns probabilities"):
        deploy(probabilities.defend(network).eval(), "digits", device="cpu")
