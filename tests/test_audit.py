"""Every check on records made by hand: on both sides of its threshold, and without its evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robbench
from robbench import datasets
from robbench.attacks import Configured
from robbench.audit import CHECKS, Audited, Flag, audit, badge, cases, is_adaptive
from robbench.audit.flags import VERDICTS, enough
from robbench.audit.planning import plan, probe_of
from robbench.audit.verdicts import number
from robbench.cell import Cell, Setting
from robbench.records import COSTS, Record
from robbench.threat import Threat

N = 100
NOISY = "smoothing"
MOVED = "random-resize-pad"  # a decision of it takes one draw
QUIET = "smoothing(noise=false)"
BASED = "smoothing(base=pgd-at, epochs=0)"
STILL = "smoothing(base=pgd-at, epochs=0, noise=false)"
TRAINED = "smoothing(base=pgd-at)"
RANDOM = (NOISY, MOVED, BASED, TRAINED)
FAR = {"eps": "1", "attack": "pgd(steps=200)"}


def cell(
    attack="pgd", defense="standard", norm="linf", eps="1/10", goal="error", n=N, kind=None, **more
):
    """A cell of digits; the setting is the one that the attack and the defense have by default."""
    names = ("oracle", "eot")
    if kind is None:
        queries = Configured.of(attack).entry.needs != "gradients"
        kind = "blackbox" if queries else "adaptive" if defense in RANDOM else "whitebox"
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": n,
        "defense": defense,
        "defense_version": "1",
        "attack": attack,
        "attack_version": 1,
        "threat": Threat(norm=norm, eps=None if norm == "none" else eps, goal=goal),
        "setting": Setting(kind=kind, **{key: more.pop(key) for key in names if key in more}),
    }
    return Cell(**(fields | more))


def shares(what, n, draws):
    """All draws of the first so many images, or of those listed."""
    listed = range(what) if isinstance(what, int) else what
    return np.where(np.isin(np.arange(n), list(listed)), draws, 0).astype(np.uint8)


def record(
    lost=0, *, refused=0, wrong=0, silent=0, trace=None, seen=None, best=None, distance=0.1, **of
):
    """Images lost under attack, in all draws: the first so many, or those listed.

    refused: those without an answer under attack; wrong: on clean images; silent: without an answer
    on clean images. seen: the provenance.
    """
    cost = {**dict.fromkeys(COSTS, 1.0), "queries": of.pop("queries", 21.0)}
    draws = of.pop("draws", 20 if of.get("defense") in RANDOM else 1)
    made = cell(**of)
    n = made.n
    err, gone = shares(lost, n, draws), shares(refused, n, draws)
    clean_err, clean_gone = shares(wrong, n, draws), shares(silent, n, draws)
    return Record(
        id=made.id,
        cell=made,
        draws=draws,
        ok=(draws - err - gone).astype(np.uint8),
        err=err,
        clean_ok=(draws - clean_err - clean_gone).astype(np.uint8),
        clean_err=clean_err,
        best=best,
        distance=np.full(n, distance, dtype=np.float32),
        trace=trace or {},
        cost=cost,
        provenance=seen or {},
    )


def failed(reason, **of):
    made = cell(**of)
    return Record(id=made.id, cell=made, status="failed", reason=reason)


def probed(defense="standard", **changes):
    """What a probe of a sound estimator sees, but for these changes."""
    sound = {"path": True, "dead": [], "not_finite": [], "zeros": 0.1}
    seen = {
        "repeatability": {"kinds": ["none"], "calls": 0.0, "seeded": 0.0, "labels": 0, "batch": 0},
        "outputs": {"kind": "logits", "range": 20.0, "labels": 10},
        "paths": {"judge": 0.9, "attack": 0.9, "error": 0.0},
        "optimises": False,
        "abstained": {"clean": 0.0, "noise": 0.0},
        "gradients": {"vote": sound, "ce": sound, "margin": sound, "dlr": sound},
        "noise": 0.01,
        "agreement": 0.9,
        "derivative": {"error": 1e-9, "images": 32},
        "changed": [],
        "reseeds": False,
    }
    for key, value in changes.items():
        seen[key] = seen[key] | value if isinstance(value, dict) else value
    of = {"attack": "probe", "norm": "none", "kind": "whitebox"}
    return record(defense=defense, seen={"probe": seen}, **of)


def flags(name, main, *others):
    """What the check raises for the first record beside the others; None: not assessed."""
    return CHECKS[name](case_of(main, *others))


def case_of(main, *others):
    (case,) = (case for case in cases([main, *others]) if case.record.id == main.id)
    return case


def verdicts(name, main, *others):
    found = flags(name, main, *others)
    return None if found is None else [flag.verdict for flag in found]


def climb(*values, n=N):
    """The trace of a loss: at five steps, for all images, or per image."""
    rows = [np.broadcast_to(np.asarray(value, dtype=np.float32), n) for value in values]
    return {"loss": np.stack(rows)}


def gradients(dead, n=N, zeros=0.0):
    """The trace of gradients that are all zero in the steps of the first images."""
    return {"dead": (np.arange(n) < dead).astype(np.float16), "zero_gradient": np.full(n, zeros)}


def seen_lost(images, n=N):
    """The trace of the attack's own draws: the share of each image at its worst evaluation."""
    return {"lost_seen": np.stack([np.asarray(images, dtype=np.float32)] * 2)}


def low(count, n=N):
    """0 for the first images, 1 for the others."""
    return (np.arange(n) >= count).astype(np.float32)


# ---------------------------------------------------------- each check, on both sides, and without
# name, verdicts (None: not assessed), the record and those beside it


def restarts(once, both=0):
    """Two restarts: images that one alone breaks, and images that both break."""
    image = np.arange(N)
    second = (image >= once) & (image < once + both)
    return {"restarts_lost": np.stack([image < once + both, second]).astype(np.float16)}


def planted(test, usable, found):
    hits = (np.arange(N) < found).astype(np.float16)
    trace = {"usable": (np.arange(N) < usable).astype(np.float16), "found": hits}
    return record(attack=f"{test}(attack=pgd)", kind="whitebox", trace=trace)


def detected(lost, **of):
    return record(lost, defense="pgd-at(detector=confidence)", kind="adaptive", **of)


def cifar(lost, defense="standard"):
    return record(lost, dataset="cifar10", defense=defense, eps="8/255", n=1000)


CASES = [
    ("F1", [], record(), record(81, eps="1/2")),  # 0.1 + 3 * 0.03 of ten labels
    ("F1", ["INVALID"], record(), record(80, eps="1/2")),
    ("F1", ["INVALID"], record(80, eps="1/2"), probed()),
    ("F1", [], record(35, eps="1/2"), probed(outputs={"labels": 2})),
    ("F1", None, record(), record(80, eps="0.4")),
    ("F1", None, record(), record(80, eps="1/2", attack="apgd")),
    ("F1", None, record(), record(80, eps="1/2", attack="pgd(steps=10)")),
    ("F2", [], record(), record(98, wrong=[98, 99], **FAR)),
    ("F2", ["OVERESTIMATE"], record(), record(99, **FAR)),
    ("F2", ["OVERESTIMATE"], record(), record(95, **FAR)),
    ("F2", ["INVALID"], record(), record(94, **FAR)),
    ("F2", ["INVALID"], record(), record(50, refused=range(50, 100), **FAR)),
    ("F2", None, record(), record(94, eps="1")),
    ("F3", [], record(50), record(range(48, 52), attack="fgsm", wrong=[50])),  # 51 alone is luck
    ("F3", ["OVERESTIMATE"], record(50), record(range(48, 53), attack="fgsm")),
    ("F3", ["OVERESTIMATE"], record(50), record(range(48, 53), attack="fgsm", eps="0.05")),
    ("F3", None, record(50), record(range(48, 53), attack="fgsm", eps="0.2")),
    ("F3", ["OVERESTIMATE"], record(51), record(50, attack="fgsm")),
    ("F3", [], record(52), record(50, attack="fgsm")),
    ("F3", [], record(51, defense="pgd-at"), record(50, attack="fgsm", defense="pgd-at")),
    ("F3", [], record(1), record(0, attack="fgsm")),  # nothing to gain
    ("F3", None, record(50, attack="deepfool"), record(60, attack="fgsm")),
    ("F4", [], record(20), record(22, eps="0.05")),
    ("F4", ["OVERESTIMATE"], record(20), record(30, eps="0.05")),
    ("F4", [], record(20), record(10, eps="0.05"), record(60, eps="0.01")),  # neighbours alone
    ("F4", [], record(20), record(range(20, 40), eps="0.05")),  # as many, of other images
    ("F4", None, record(20), record(30, eps="0.2")),
    ("F5", [], record(20), record(22, attack="pgd(steps=40)")),
    ("F5", ["OVERESTIMATE"], record(20), record(23, attack="pgd(steps=40)")),
    ("F5", ["OVERESTIMATE"], record(20), record(23, attack="pgd(restarts=2)")),
    ("F5", [], record(20), record(23, attack="pgd(steps=39)")),  # 2 standard errors are 3.4
    ("F5", ["OVERESTIMATE"], record(20), record(24, attack="pgd(steps=39)")),
    ("F5", ["OVERESTIMATE"], record(20), record(24, attack="deepfool")),
    ("F5", None, record(20)),
    ("F5", None, record(20), record(30, attack="square")),
    ("F5", None, record(20), record(30, attack="fgsm")),
    (
        "F5",
        ["OVERESTIMATE"],
        record(20, defense=NOISY, eot=20),
        record(30, defense=NOISY, eot=40),
    ),
    ("F5b", [], record(attack="pgd(step=1/100)")),
    ("F5b", ["WARN"], record(attack="pgd(step=0.0099)")),
    ("F5b", [], record()),
    ("F5b", None, record(attack="apgd")),
    ("F5b", None, record(attack="fgsm")),
    ("F6", [], cifar(263, "pgd-at")),
    ("F6", ["OVERESTIMATE"], cifar(262, "pgd-at")),
    ("F6", ["OVERESTIMATE"], cifar(410)),  # 0.8 of 73.7 %
    ("F6", [], cifar(411)),
    ("F6", None, record()),
    ("F7", [], record(trace=climb(0, low(10), 1, 1, 1))),
    ("F7", ["OVERESTIMATE"], record(trace=climb(0, low(11), 1, 1, 1))),
    ("F7", ["OVERESTIMATE"], record(trace=climb(0, 1, 1, low(11), low(11)))),
    ("F7", [], record(trace=climb(0, 0.5, 0.8, 0.96, 1))),
    ("F7", ["INFO"], record(trace=climb(0, 0.5, 0.8, 0.94, 1))),
    ("F7", [], record(trace=climb(np.where(low(90), 0, np.nan), *[-1] * 4))),  # 10 still going
    ("F7", [], record(defense=NOISY, eot=10, trace=climb(0, low(80), 1, 1, 1))),
    ("F7", ["OVERESTIMATE"], record(defense=NOISY, eot=10, trace=climb(0, -0.1, 1, 1, 1))),
    ("F7", None, record(defense=NOISY, eot=9, trace=climb(0, -0.1, 1, 1, 1))),
    ("F7", None, record()),
    ("F7", None, record(attack="deepfool", trace=climb(1, 0, 0, 0, 0))),
    ("F7", None, record(attack="pgd(steps=4)", trace=climb(1, 0, 0, 0, 0))),
    ("F8", [], record(trace=gradients(2))),
    ("F8", ["INVALID"], record(trace=gradients(3))),
    ("F8", [], record(3, trace=gradients(3))),  # content where all is lost
    ("F8", [], record(trace=gradients(0, zeros=0.5))),
    ("F8", ["WARN"], record(trace=gradients(0, zeros=0.51))),  # black pixels have none
    ("F8", None, record(), probed()),  # a probe can accuse an attack, and not acquit it
    ("F8", [], record(trace=gradients(0)), probed()),
    ("F8", ["INVALID"], record(), probed(gradients={"ce": {"path": False, "reason": "none"}})),
    (
        "F8",
        ["INVALID"],
        record(),
        probed(gradients={"ce": {"path": True, "dead": [], "not_finite": [1], "zeros": 0}}),
    ),
    (
        "F8",
        [],
        record(attack="pgd(loss=dlr)", trace=gradients(0)),
        probed(gradients={"ce": {"path": False, "reason": "none"}}),
    ),
    ("F8", ["INVALID"], failed("FloatingPointError: the loss is not finite")),
    ("F8", None, failed("InputError: no")),
    ("F8", None, record()),
    ("F9", [], record(20), record(22, attack="pgd(loss=dlr)")),
    ("F9", ["OVERESTIMATE"], record(20), record(23, attack="pgd(loss=dlr)")),
    ("F9", ["OVERESTIMATE"], record(20), record(23, attack="pgd(loss=ce-t100)")),
    ("F9", None, record(20), record(23, attack="pgd(loss=margin)")),
    ("F9", None, record(20, attack="pgd(loss=dlr)"), record(23, attack="pgd(loss=ce-t10)")),
    ("F10", [], record(50), record(range(50, 52), attack="square")),
    ("F10", ["OVERESTIMATE"], record(50), record(range(50, 53), attack="square")),
    ("F10", ["OVERESTIMATE"], record(50), record(range(50, 53), attack="hopskipjump")),
    ("F10", None, record(50), record(range(50, 53), attack="random-search")),
    ("F10", None, record(50), record(range(50, 53), attack="square", norm="l2", eps="1")),
    ("F11", [], record(50), record(52, kind="transfer", oracle="pgd-at")),
    ("F11", ["OVERESTIMATE"], record(50), record(53, kind="transfer", oracle="pgd-at")),
    ("F11", None, record(50), record(53, attack="mim")),
    ("F12", [], record(50), record(52, attack="random-search")),
    ("F12", ["OVERESTIMATE"], record(50), record(53, attack="random-search")),
    ("F12", None, record(50), record(53, attack="square")),
    ("F13", [], record(), probed(noise=0.1)),
    ("F13", ["WARN"], record(), probed(noise=0.11)),
    ("F13", ["WARN"], record(), probed(noise=-1.0)),  # no number
    ("F13", None, record()),
    ("F14", [], record(), probed(derivative={"error": 0.05})),
    ("F14", ["INVALID"], record(), probed(derivative={"error": 0.06})),
    ("F14", ["INVALID"], record(), probed(derivative={"error": -1.0})),
    ("F14", ["INFO"], record(), probed(derivative={"declared": ["Rounded as Identity"]})),
    ("F14", None, record()),
    ("F15", [], record(defense=NOISY), probed(NOISY, agreement=0.2)),
    ("F15", ["WARN"], record(defense=NOISY), probed(NOISY, agreement=0.19)),
    ("F15", None, record(), probed(agreement=0.1)),
    ("F16", [], record(attack="pgd(restarts=2)", trace=restarts(10, 50))),
    ("F16", ["OVERESTIMATE"], record(attack="pgd(restarts=2)", trace=restarts(11, 50))),
    ("F16", None, record()),
    ("F17", [], record(), probed()),
    ("F17", ["WARN"], record(), probed(repeatability={"batch": 2e-4})),
    ("F17", [], record(), probed(repeatability={"batch": 1e-4})),
    ("F17", ["WARN", "INFO"], record(defense=NOISY), probed(NOISY, repeatability={"seeded": 1})),
    ("F17", None, record()),
    ("F18", [], record(), probed()),
    ("F18", ["INVALID"], record(seen={"changed": ["members.0"]})),
    ("F18", ["INVALID"], record(), probed(changed=["members.0.mean"])),
    ("F18", ["INVALID"], record(), probed(reseeds=True)),
    ("F18", None, record()),
    ("F19", [], record()),
    ("F19", ["INVALID"], failed("the attack left the ball: 3 images")),
    ("F19", None, failed("out of time")),
    ("F20", [], record(), probed(paths={"attack": 0.896})),
    ("F20", ["INVALID"], record(), probed(paths={"attack": 0.89})),
    ("F20", [], record(), probed(paths={"attack": 0.8, "error": 0.025})),
    ("F20", ["INVALID"], record(), probed(paths={"attack": 0.8, "error": 0.024})),
    ("F20", None, record()),
    ("F21", [], record(50, defense=MOVED, trace=seen_lost(1 - low(60)))),  # 2 * 5.03 points
    ("F21", ["INFO"], record(50, defense=MOVED, trace=seen_lost(1 - low(61)))),
    ("F21", ["INFO"], record(50, defense=MOVED, trace=seen_lost(1 - low(39)))),
    ("F21", None, record(50, trace=seen_lost(1 - low(61)))),
    ("F21", None, record(50, defense=NOISY, eot=20, trace=seen_lost(1 - low(61)))),  # of 100
    ("F21", None, record(50, defense=MOVED)),
    ("F22", [], record(50, defense=NOISY, trace={"selected_lost": 1 - low(53)})),
    ("F22", ["WARN"], record(50, defense=NOISY, trace={"selected_lost": 1 - low(60)})),
    ("F22", [], record(defense=NOISY, refused=50, trace={"selected_lost": (1 - low(50)) / 2})),
    ("F22", None, record(50, trace={"selected_lost": 1 - low(60)})),
    ("F24", [], record(50, trace=seen_lost(1 - low(52)))),
    ("F24", ["OVERESTIMATE"], record(50, trace=seen_lost(1 - low(53)))),
    ("F24", None, record(50, defense=NOISY, eot=1, trace=seen_lost(1 - low(60)))),
    ("F24", None, record(50)),
    ("F25", [], record(trace={"unchanged": low(95) == 1})),
    ("F25", ["INVALID"], record(trace={"unchanged": low(94) == 1})),
    ("F25", [], record(trace={"unchanged": low(94) == 1}, wrong=range(94, 100))),
    ("F25", ["INVALID"], record(trace={"unchanged": low(100) == 1}, distance=0.049)),
    ("F25", [], record(trace={"unchanged": low(100) == 1}, distance=0.05)),
    ("F25", [], record(attack="apgd", trace={"unchanged": low(100) == 1}, distance=0.01)),
    ("F25", ["WARN"], record(attack="torchattacks:PGD", trace={"unchanged": low(94) == 1})),
    ("F25", ["INVALID"], record(attack="torchattacks:PGD", trace={"unchanged": low(0) == 1})),
    ("F25", [], record(attack="deepfool", trace={"unchanged": low(5) == 1})),
    ("F25", ["INVALID"], record(attack="deepfool", trace={"unchanged": low(4) == 1})),
    ("F25", None, record()),
    ("F26", ["WARN"], record(50), record(50, eps="0.2")),
    ("F26", [], record(50), record([*range(49), 60], eps="0.2")),
    ("F26", [], record(50), record(50, attack="mim")),
    ("F26", ["WARN"], record(50, defense=NOISY), record(50, defense=NOISY, attack="mim")),
    ("F26", None, record(90), record(90, eps="0.2")),
    ("F28", [], record(), planted("binarization", 80, 76)),
    ("F28", ["INVALID"], record(), planted("binarization", 80, 75)),
    ("F28", None, record(), planted("binarization", 0, 0)),
    ("F28", None, record(attack="apgd"), planted("binarization", 80, 75)),
    ("F29", [], record(), planted("backdoor", 100, 98)),
    ("F29", ["INVALID"], record(), planted("backdoor", 100, 97)),
    ("F29", None, record(), planted("binarization", 100, 97)),
    ("F30", [], record(), record(98, eps="1/2")),
    ("F30", ["INVALID"], record(), record(97, eps="1/2")),
    ("F30", ["INVALID"], record(defense="pgd-at"), record(97, eps="1/2")),
    ("F30", None, record(), record(98, eps="0.4")),
    ("F31", [], record(), probed()),
    ("F31", ["WARN"], record(), probed(outputs={"kind": "probabilities"})),
    ("F31", ["INFO"], record(), probed(outputs={"kind": "log-probabilities"})),
    ("F31", ["INFO"], record(), probed(outputs={"range": 51})),
    ("F31", ["INFO"], record(), probed(outputs={"labels": 3})),
    ("F31", [], record(), probed(outputs={"range": 50, "labels": 4})),
    ("F31", None, record()),
    ("F32", [], record(), probed()),
    ("F32", ["OVERESTIMATE"], record(), probed(optimises=True)),
    ("F32", [], record(seen={"bpda": ["Purified as Identity"]}), probed(optimises=True)),
    ("F32", None, record()),
    ("F33", [], detected(0, silent=9)),  # 5 % and 2 * 2.9 points
    ("F33", ["WARN"], detected(0, silent=15)),
    ("F33", [], detected(0, refused=50, best=low(5).astype(np.uint8))),  # 5 of 50 wrong
    ("F33", ["WARN"], detected(0, refused=50, best=low(4).astype(np.uint8))),
    ("F33", None, record()),
    ("F34", [], detected(20), record(20, eps="0.05")),
    ("F34", [], detected(14), record(20, eps="0.05")),  # 2 standard errors are 7
    ("F34", ["OVERESTIMATE"], detected(13), record(20, eps="0.05")),
    ("F34", None, detected(19), record(20, eps="0.04")),
    ("F34", None, record(19), record(20, eps="0.05")),
    ("F35", [], record()),
    ("F35", ["INVALID"], failed("out of time")),
    ("F36", [], record(queries=21.0), record(defense="pgd-at", queries=60.0)),
    ("F36", ["INFO"], record(queries=21.0), record(defense="pgd-at", queries=64.0)),
    ("F36", None, record(queries=21.0), record(queries=84.0, seed=1)),
    ("F38", [], record(50), record(69, seed=1)),  # an interval of 2 * 1.96 * 5.03 points
    ("F38", ["WARN"], record(50), record(70, seed=1)),
    ("F38", ["WARN"], record(50), record(70, train_seed=1)),
    ("F38", None, record(50), record(70, seed=1, eps="0.2")),
]


def around(lost, still, base):
    """A noisy defense around another network, its quiet sibling, and that network."""
    return (
        record(lost, defense=BASED),
        record(still, defense=STILL),
        record(base, defense="pgd-at"),
    )


CASES += [
    ("F23", [], *around(10, 48, 50)),
    ("F23", ["OVERESTIMATE"], *around(10, 47, 50)),
    (  # it was trained on, which may be why
        "F23",
        ["WARN"],
        record(10, defense=TRAINED),
        record(47, defense="smoothing(base=pgd-at, noise=false)"),
        record(50, defense="pgd-at"),
    ),
    ("F23", None, *around(10, 47, 50)[:2]),
    ("F23", None, *around(10, 47, 50)[::2]),
    ("F27", ["WARN"], record(50, defense=NOISY), record(51, defense=QUIET)),
    ("F27", [], record(50, defense=NOISY), record(60, defense=QUIET)),
    ("F27", [], record(50, defense=NOISY), record(40, defense=QUIET)),
    ("F27", None, record(96, defense=NOISY), record(96, defense=QUIET)),
    ("F27", None, record(50, defense=NOISY)),
]


@pytest.mark.parametrize(
    ("name", "expected", "records"),
    [(name, expected, records) for name, expected, *records in CASES],
    ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)],
)
def test_a_check_says_what_its_threshold_says(name, expected, records):
    assert verdicts(name, *records) == expected


def test_the_cases_show_every_check_raised_not_raised_and_without_evidence():
    shown = {
        what: {name for name, said, *_ in CASES if what(said)}
        for what in (lambda said: bool(said), lambda said: said == [], lambda said: said is None)
    }
    raised, passed, missing = shown.values()
    assert raised == passed == set(CHECKS)
    assert missing == set(CHECKS) - {"F35"}  # whether a cell has failed is always known


# --------------------------------------------------------------------- what holds for any records


@st.composite
def boards(draw):
    """Records of one estimator by several attacks, with any outcomes, and sometimes a probe."""
    images = st.sets(st.integers(0, 39), max_size=40)
    of = [
        {"attack": attack, "eps": eps}
        for attack in ("pgd", "pgd(steps=40)", "fgsm", "square", "random-search")
        for eps in ("0.05", "0.1", "0.5")
    ]
    chosen = draw(st.lists(st.sampled_from(of), min_size=1, max_size=6, unique_by=str))
    made = [record(draw(images), n=40, wrong=draw(images), **fields) for fields in chosen]
    # an image cannot be both wrong and without an answer, so that only errors vary
    return [*made, probed()] if draw(st.booleans()) else made


@settings(deadline=None)
@given(boards())
def test_flags_are_the_same_from_the_files(board):
    again = [Record.model_validate_json(each.text()) for each in board]
    assert audit(again) == audit(board)


@settings(deadline=None)
@given(boards(), st.randoms())
def test_the_order_of_records_changes_nothing(board, random):
    shuffled = random.sample(board, len(board))
    assert audit(shuffled) == audit(board)


@settings(deadline=None)
@given(boards())
def test_the_worst_verdict_comes_first_then_the_number(board):
    for audited in audit(board).values():
        places = [(VERDICTS.index(flag.verdict), number(flag.id)) for flag in audited.flags]
        assert places == sorted(places)
        assert audited.worst == (audited.flags[0].verdict if audited.flags else None)


@settings(deadline=None)
@given(boards())
def test_what_is_raised_was_assessed_and_names_images_of_the_record(board):
    for audited in audit(board).values():
        assert {flag.id for flag in audited.flags} <= set(audited.assessed)
        assert all(0 <= image < 40 for flag in audited.flags for image in flag.images)


@settings(deadline=None)
@given(st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)))
def test_the_images_of_a_better_search_are_the_difference_of_two_sets(mine, theirs, wrong):
    found = flags("F10", record(mine, n=40, wrong=wrong), record(theirs, n=40, attack="square"))
    missed = sorted(theirs - mine - wrong)
    images = [flag.images for flag in found if flag.images]  # without: more is lost in the mean
    assert images == ([tuple(missed)] if len(missed) >= 3 else [])


@settings(deadline=None)
@given(st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)))
def test_an_attack_that_breaks_ever_more_never_gets_F4(inner, more):
    assert flags("F4", record(inner | more, n=40), record(inner, n=40, eps="0.05")) == []


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 100))
def test_the_figure_of_F5_is_the_difference_of_two_accuracies(short, long):
    found = flags("F5", record(short), record(long, attack="pgd(restarts=2)"))
    assert [flag.figure for flag in found] == (
        [pytest.approx((long - short) / 100)] if long - short >= 3 else []
    )


def test_of_more_images_half_a_percent_must_show_it():
    assert [enough(count, 100) for count in (2, 3)] == [False, True]
    assert [enough(count, 2000) for count in (9, 10)] == [False, True]


def test_no_answer_is_half_an_error_to_an_attack_and_all_to_one_for_denial():
    lost = case_of(record(20, refused=range(50, 100))).lost
    assert lost.tolist() == [1.0] * 20 + [0.0] * 30 + [0.5] * 50
    denied = case_of(record(20, refused=range(50, 100), goal="denial")).lost
    assert denied.tolist() == [1.0] * 20 + [0.0] * 30 + [1.0] * 50


@pytest.mark.parametrize(("chosen", "assessed"), [(9, False), (10, True)])
def test_the_draws_that_auto_has_chosen_are_those_of_the_record(chosen, assessed):
    trace, seen = climb(0, 1, 1, 1, 1), {"eot": {"chosen": chosen}}
    found = verdicts("F7", record(defense=NOISY, eot="auto", trace=trace, seen=seen))
    assert (found is not None) == assessed


# ------------------------------------------------------------------------- verdicts and badges


SOUND = {"trace": climb(0, 1, 1, 1, 1) | {"unchanged": low(0) == 0}}


def judged(main, *others):
    return audit([main, *others])[main.id]


def test_a_converged_attack_on_a_probed_estimator_is_sound():
    found = judged(record(50, **SOUND), probed(), record(50, attack="square"))
    assert (found.flags, badge(found), found.sound) == ((), "sound", True)


def test_what_no_other_attack_was_held_against_is_not_sound():
    found = judged(record(50, **SOUND), probed())
    assert (found.flags, badge(found), found.sound) == ((), "not audited", False)


def test_without_a_probe_nothing_is_sound():
    found = judged(record(50, **SOUND))
    assert (badge(found), found.sound) == ("not audited", False)


def test_without_a_trace_nothing_is_sound():
    found = judged(record(50, attack="autoattack"), record(attack="mim"))
    assert (badge(found), found.sound) == ("not audited", False)


@pytest.mark.parametrize("of", [{"kind": "whitebox"}, {"attack": "square"}, {"attack": "fgsm"}])
def test_who_does_not_know_the_defense_or_makes_one_step_is_not_adaptive(of):
    found = judged(record(50, defense=NOISY, **of), probed(NOISY))
    assert (badge(found), found.sound) == ("not adaptive", False)


def test_where_there_is_nothing_to_know_a_white_box_is_adaptive():
    assert is_adaptive(case_of(record()))
    assert not is_adaptive(case_of(record(defense="pgd-at(detector=confidence)")))


def test_the_badge_names_the_flags_of_the_worst_verdict_once_each_in_order():
    main = record(50, trace=gradients(100) | climb(1, 0, 0, 0, 0))
    found = judged(main, probed(optimises=True, reseeds=True, changed=["members.0"]))
    assert badge(found) == "invalid: F8, F18"
    milder = judged(record(50, trace=climb(1, 0, 0, 0, 0)), probed(optimises=True))
    assert badge(milder) == "overestimate: F7, F32"


@pytest.mark.parametrize("verdict", VERDICTS)
def test_warnings_and_notes_leave_a_number_ranked(verdict):
    raised = Flag("F0", verdict, 1.0, 0.0, N, (), "")
    everything = tuple(sorted(CHECKS, key=number))
    sound = Audited((raised,), everything, adaptive=True, challenged=True).sound
    assert sound == (verdict in ("WARN", "INFO"))


def test_a_failed_cell_is_missing():
    assert badge(judged(failed("out of time"), probed())) == "invalid: F35"


def test_F5b_stands_between_F5_and_F6():
    assert sorted(["F10", "F6", "F5b", "F5"], key=number) == ["F5", "F5b", "F6", "F10"]


# ------------------------------------------------------------------------------------- planning


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def planned(defense, dataset, **options):
    return [
        (str(each.attack), str(each.threat.eps or ""), each.setting.kind, each.defense)
        for each in plan(defense, dataset, **options)
    ]


def test_a_quick_plan_is_the_attack_one_step_some_queries_and_a_probe(digits):
    assert [(attack, kind) for attack, _, kind, _ in planned("standard", digits)] == [
        ("pgd", "whitebox"),
        ("fgsm", "whitebox"),
        ("square(queries=100)", "blackbox"),
        ("probe", "whitebox"),
    ]


def test_what_can_be_known_is_attacked_by_one_who_knows_it(digits):
    cells = plan(NOISY, digits)
    kinds = ["adaptive", "adaptive", "blackbox", "transfer", "whitebox"]
    assert [each.setting.kind for each in cells] == kinds
    assert cells[-1].attack == "probe" and cells[-2].setting.oracle == QUIET


def test_a_thorough_plan_has_the_evidence_of_every_check_of_other_records(digits):
    cells = planned("standard", digits, depth="thorough")
    attacks = {attack for attack, *_ in cells}
    assert attacks >= {"fgsm", "square(queries=1000)", "hopskipjump", "random-search"}
    assert attacks >= {"pgd(steps=40)", "pgd(loss=dlr)", "pgd(loss=ce-t100)"}
    assert attacks >= {"binarization", "backdoor"}  # of pgd, unless they say another
    assert ("pgd", "1/2", "whitebox", "standard") in cells
    assert ("pgd(steps=200)", "1", "whitebox", "standard") in cells
    assert {"1/20", "1/10", "1/5", "3/10"} <= {eps for attack, eps, *_ in cells if attack == "pgd"}


def test_a_thorough_plan_attacks_the_relatives_and_transfers_from_them(digits):
    cells = planned(NOISY, digits, depth="thorough")
    assert {(kind, defense) for *_, kind, defense in cells} >= {
        ("transfer", NOISY),
        ("whitebox", QUIET),
        ("whitebox", "standard"),
    }


@pytest.mark.parametrize("test", ["binarization", "backdoor"])
def test_a_test_by_name_is_planned_with_the_attack_and_a_probe_alone(digits, test):
    attacks = [attack for attack, *_ in planned("standard", digits, attack="mim", depth=test)]
    assert attacks == ["mim", f"{test}(attack=mim)", "probe"]


def test_cells_of_a_plan_are_there_once(digits):
    cells = plan("standard", digits, depth="thorough")
    assert len({each.id for each in cells}) == len(cells)


def test_an_audit_plans_nothing_that_a_model_or_two_labels_cannot_do(digits):
    bare = robbench.deploy(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), digits)
    models = {"model:m": bare}
    names = {each.attack for each in plan("model:m", digits, depth="thorough", models=models)}
    assert not any("binarization" in name for name in names) and "pgd(loss=dlr)" in names
    two = robbench.from_tensors(torch.rand(8, 1, 8, 8), torch.tensor([0, 1] * 4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    models = {"model:m": robbench.deploy(net, two)}
    names = {each.attack for each in plan("model:m", two, depth="thorough", models=models)}
    assert "pgd(loss=dlr)" not in names and "pgd(loss=ce-t10)" in names


def test_the_probe_of_an_estimator_is_one_whatever_attacks_it():
    of = [cell(), cell(attack="mim", eps="0.3"), cell(seed=4), cell(norm="l2", eps="2")]
    assert len({probe_of(each, 100).id for each in of}) == 1
    assert probe_of(cell(defense="pgd-at"), 100).id != probe_of(cell(), 100).id


def test_thorough_evidence_is_found_by_the_checks_that_want_it(digits):
    """Records of the planned cells, whatever they hold, let these checks be made."""
    made = []
    for each in plan("standard", digits, depth="thorough", n=N):
        blank = np.zeros(each.n, dtype=np.uint8)
        outcome = {"ok": blank + 1, "err": blank, "clean_ok": blank + 1, "clean_err": blank}
        distance, cost = blank.astype(np.float32), dict.fromkeys(COSTS, 1.0)
        trace = {"usable": blank + 1, "found": blank + 1}
        made.append(
            Record(id=each.id, cell=each, distance=distance, cost=cost, trace=trace, **outcome)
        )
    assessed = audit(made)[made[0].id].assessed
    assert {"F1", "F2", "F3", "F4", "F5", "F9", "F10", "F12", "F28", "F29", "F38"} <= set(assessed)
