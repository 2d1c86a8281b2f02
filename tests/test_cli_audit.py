"""The command audit: what it says, what it runs, and one line for what a user does wrong."""

from __future__ import annotations

import json

import pytest
import torch

from robbench import registry
from robbench.attacks import attack
from robbench.audit import CHECKS, audit, badge
from robbench.cli import main
from robbench.records import Store

TINY = "standard(epochs=3, network=mlp(hidden=[32]))"
OTHER = "standard(epochs=2, network=mlp(hidden=[32]))"
AUDIT = ["audit", "--defense", TINY, "--attack", "pgd(steps=3)", "--eps", "0.04", "-n", "20"]
SERIAL = ["--workers", "1"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A folder with an audit that nothing changes any more."""
    out = tmp_path_factory.mktemp("audited")
    with pytest.raises(SystemExit) as left:
        main([*AUDIT, *SERIAL, "--quiet", "--out", str(out)])
    assert not left.value.code
    return out


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def subject(folder):
    """The record on trial and what the checks say of it beside all others."""
    records = list(Store(folder).all())
    (record,) = (record for record in records if record.cell.attack == "pgd(steps=3)")
    return record, audit(records)[record.id]


def words(text, start):
    """The words of the line that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line.split()


# ------------------------------------------------------------------------------------ what it says


def test_an_audit_runs_the_attack_one_step_and_a_probe(audited):
    attacks = {record.cell.attack for record in Store(audited).all()}
    assert attacks == {"pgd(steps=3)", "fgsm", "square(queries=100)", "probe"}
    assert (audited / "digits.md").exists() and (audited / "digits.flags.json").exists()


def test_the_text_says_the_number_the_verdict_and_every_flag(robbench, audited):
    code, out, _ = robbench(*AUDIT, "--out", audited)
    record, found = subject(audited)
    assert code == 0
    assert out.splitlines()[0] == f"{record.cell}, n = 20"
    assert words(out, "robust with detection")[3] == f"{100 * record.ok.mean():.1f}"
    assert f"verdict: {badge(found)}\n" in out
    assert found.flags, "three steps on an easy network must look weak"
    for flag in found.flags:
        assert words(out, f"{flag.id} ")[1] == flag.verdict and flag.line in out


def test_every_check_is_named_once_as_raised_as_clear_or_without_evidence(robbench, audited):
    _, out, _ = robbench(*AUDIT, "--out", audited)
    _, found = subject(audited)
    raised = {flag.id for flag in found.flags}
    clear = words(out, "nothing found by")[5:]
    unknown = words(out, "no evidence for")[4:]
    assert sorted([*raised, *clear, *unknown]) == sorted(CHECKS)
    assert {*raised, *clear} == set(found.assessed)


def test_json_says_the_same_and_nothing_else(robbench, audited):
    code, out, err = robbench(*AUDIT, "--json", "--out", audited)
    record, found = subject(audited)
    values = json.loads(out)
    assert (code, err) == (0, "")
    assert (values["id"], values["badge"]) == (record.id, badge(found))
    assert tuple(values["assessed"]) == found.assessed
    assert values["flags"] == [
        flag._asdict() | {"images": list(flag.images)} for flag in found.flags
    ]
    assert values["failed"] == {}


def test_progress_is_on_stderr_and_quiet_has_none(robbench, tmp_path):
    code, out, err = robbench(*AUDIT, *SERIAL, "--out", tmp_path)
    assert code == 0 and "[4/4]" in err and "[4/4]" not in out
    other = [*AUDIT, "--train-seed", "1", *SERIAL, "--quiet", "--out", tmp_path]
    assert robbench(*other)[2] == ""


# ------------------------------------------------------------------------------------ what it runs


def test_a_second_call_runs_and_writes_nothing(robbench, audited):
    before = contents(audited)
    code, _, err = robbench(*AUDIT, "--out", audited)
    assert (code, err) == (0, "")
    assert contents(audited) == before


def test_what_a_run_has_measured_is_not_measured_again(robbench, tmp_path):
    _, out, _ = robbench("run", *AUDIT[1:], "--baseline", "none", *SERIAL, "--json", "--out",
                         tmp_path)  # fmt: skip
    before = contents(tmp_path / "records")
    code, _, err = robbench(*AUDIT, *SERIAL, "--out", tmp_path)
    assert code == 0 and "[2/2]" in err and "fgsm" in err and "square" in err
    after = contents(tmp_path / "records")
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 2


def test_an_audit_uses_records_of_other_attacks_too(robbench, tmp_path):
    _, alone, _ = robbench(*AUDIT, *SERIAL, "--json", "--out", tmp_path)
    more = ["run", *AUDIT[1:], "--attack", "mim(steps=10)", "--baseline", "none"]
    assert robbench(*more, *SERIAL, "--quiet", "--out", tmp_path)[0] == 0
    _, beside, _ = robbench(*AUDIT, "--json", "--out", tmp_path)
    assert "F5" in set(json.loads(beside)["assessed"]) - set(json.loads(alone)["assessed"])


def test_the_test_of_a_planted_trigger_runs_alone_and_is_assessed(robbench, tmp_path):
    code, out, _ = robbench(*AUDIT, "--test", "backdoor", *SERIAL, "--json", "--out", tmp_path)
    assert code == 0 and "F29" in json.loads(out)["assessed"]
    attacks = {record.cell.attack for record in Store(tmp_path).all()}
    assert attacks == {"pgd(steps=3)", "probe", "backdoor(attack=pgd(steps=3))"}


def test_without_a_budget_the_second_of_the_dataset_is_taken(robbench, tmp_path):
    arguments = [*AUDIT[:5], "-n", "5", *SERIAL, "--json", "--out", tmp_path]
    assert robbench(*arguments)[0] == 0
    budgets = {record.cell.threat.eps for record in Store(tmp_path).all()} - {None}
    assert budgets == {registry.dataset("digits", None).eps["linf"][1]}


# ------------------------------------------------------------------------------ what can go wrong

MISTAKES = {
    "an unknown defense": (["--defense", "itto"], "'itto'", "did you mean 'ito'"),
    "an unknown attack": (["--attack", "pdg"], "'pdg'", "did you mean 'pgd'"),
    "several defenses": (["--defense", f"{TINY},ito"], "of one defense; write one"),
    "all members of a defense": (["--defense", "adp[*]"], "of one defense; write one"),
    "no defense": (["--defense", ""], "of one defense; write one"),
    "several attacks": (["--attack", "pgd,fgsm"], "of one attack; write one"),
    "several attacks with settings": (["--attack", "pgd(steps=3),fgsm"], "of one attack"),
    "a test that is in it anyway": (
        ["--thorough", "--test", "backdoor"],
        "--thorough has the test backdoor in it",
    ),
    "an unknown test": (["--test", "backdor"], "'backdor'", "backdoor"),
    "an epsilon in the units of 255": (["--eps", "8"], "ε = 8", "write 8/255"),
    "an epsilon that is no number": (["--eps", "abc"], "ε = abc", "write a fraction"),
    "several epsilons": (["--eps", "0.1,0.2"], "ε = 0.1,0.2 is not a number"),
    "an unknown norm": (["--norm", "linv"], "'linv'", "did you mean 'linf'"),
    "a norm that the attack cannot do": (
        ["--attack", "torchattacks:FGSM", "--norm", "l2"],
        "torchattacks:FGSM cannot do the norm l2",
    ),
    "an unknown setting of the attack": (["--attack", "pgd(step_s=3)"], "'step_s'"),
    "an attack that is none": (["--attack", "probe"], "probe cannot do the norm linf"),
    "an unknown preset": (["--preset", "papr"], "'papr'", "did you mean 'paper'"),
    "an unknown dataset": (["--dataset", "mnits"], "did you mean 'mnist'"),
    "no images": (["-n", "0"], "-n", "0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(case, robbench, tmp_path):
    arguments, *parts = MISTAKES[case]
    code, out, err = robbench(*AUDIT, *arguments, "--out", tmp_path)
    assert (code, out) == (2, ""), err
    assert err.startswith("robbench: ") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == []
    assert contents(tmp_path) == {}


def test_a_defense_must_be_named(robbench):
    code, out, err = robbench("audit")
    assert (code, out) == (2, "") and "'--defense'" in err


def test_a_number_that_was_not_reached_is_invalid_and_the_exit_code_is_1(
    robbench, tmp_path, monkeypatch
):
    list(registry.attacks)
    monkeypatch.setattr(registry.attacks, "_entries", dict(registry.attacks._entries))

    @attack("cheat", norms=("linf",))
    def run(access, x, y, threat, rng):
        return x + 1.01 * float(threat.eps) * torch.where(x < 0.5, 1.0, -1.0)

    arguments = [*AUDIT, "--attack", "cheat", *SERIAL, "--out", tmp_path]
    code, out, _ = robbench(*arguments)
    assert code == 1
    assert "verdict: invalid: F19, F35" in out and "robust with detection" not in out
    assert words(out, "failed:")[0] == "failed:" and "1.0100 ε" in out
    code, out, _ = robbench(*arguments, "--json")
    assert code == 1 and "1.0100 ε" in " ".join(json.loads(out)["failed"].values())
