"""Flags that a record gets from other records of the same estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np

from robbench.attacks import Attack
from robbench.attacks.suite import MEANS
from robbench.audit.case import ONE_STEP, POINTS, Case, attack_of, harm, kind, settings_of
from robbench.audit.flags import Raised, check, enough
from robbench.metrics import outcomes
from robbench.records import Record
from robbench.threat import format_eps

GREY, WHOLE = Fraction(1, 2), Fraction(1)  # ε under linf: every image can become grey, or any other
LEAST_STEPS, MANY_STEPS = 20, 200
POINT = 0.01
HARMED = 0.7  # of the clean accuracy left by one step: where it takes less, many have little to add
CHANCE_ERRORS = 3  # standard errors above chance
SPARED = 0.1  # of the answers withheld under attack would have been wrong
ALIKE = (0.2, 0.8)  # an accuracy at which two attacks do not agree on every image by themselves


def _steps(record: Record) -> int:
    """Of the longest climb; a suite's and a search's are what they need."""
    settings = settings_of(record)
    if "budget" in settings:
        return MEANS[settings["budget"]].steps
    return int(settings.get("steps") or LEAST_STEPS)


def _name(record: Record) -> str:
    oracle = f" from {record.cell.setting.oracle}" if record.cell.setting.oracle else ""
    return f"{record.cell.attack}{oracle}"


def _far(case: Case, eps: Fraction, steps: int) -> list[Record]:
    """Records of the same attack at an ε at which nothing can stay right."""
    return [
        record
        for record in (case.record, *case.peers)
        if record.cell.threat.norm == "linf"
        and (record.cell.threat.eps or 0) >= eps
        and case.alike(record, "steps", "step", "budget")
        and _steps(record) >= steps
    ]


@check("F1", "accuracy survives where every image can become grey")
def grey(case: Case) -> list[Raised] | None:
    """The same attack at ε = 0.5 under linf, against chance; a refused grey image is not right."""
    if not case.climbs:
        return None
    far = _far(case, GREY, LEAST_STEPS)
    if not far:
        return None
    worst = min(far, key=lambda record: float(outcomes(record).mean()))
    share, labels = float(outcomes(worst).mean()), _labels(case)
    chance = 1 / labels
    limit = chance + CHANCE_ERRORS * np.sqrt(chance * (1 - chance) / worst.cell.n)
    if share <= limit:
        return []
    text = (
        f"at linf {format_eps(worst.cell.threat.eps)} {100 * share:.1f} % of the images stay right"
    )
    return [Raised("INVALID", share, limit, text, np.flatnonzero(outcomes(worst) > 0.5))]


def _labels(case: Case) -> int:
    probe = case.probe()
    return int(probe["outputs"]["labels"]) if probe else 10


@check("F2", "an unbounded attack leaves images right")
def unbounded(case: Case) -> list[Raised] | None:
    """The same attack with the whole box and at least 200 steps, for the attacker's own goal: an
    accepted image of another class is inside the ball."""
    far = _far(case, WHOLE, MANY_STEPS) if case.climbs else []
    if not far:
        return None
    worst = max(far, key=lambda record: float(harm(record).mean()))
    assert worst.clean_ok is not None
    right = worst.clean_ok > worst.draws / 2
    left = np.flatnonzero(right & (harm(worst) < 0.5))
    share = len(left) / max(int(right.sum()), 1)
    if not len(left):
        return []
    text = f"with the whole box {len(left)} images are never broken"
    return [Raised("INVALID" if share > 0.05 else "OVERESTIMATE", share, 0, text, left)]


@check("F3", "one step does better than many")
def one_step(case: Case) -> list[Raised] | None:
    """FGSM, from x or a random start, with the same loss and draws."""
    if not case.climbs or case.attack is None or case.attack.minimal:
        return None
    singles = [
        peer
        for peer in case.peers
        if kind(peer) == "fgsm"
        and case.same_threat(peer)
        and peer.cell.setting.kind in (case.cell.setting.kind, "whitebox")
        and peer.cell.setting.oracle is None
    ]
    if not singles:
        return None
    if accused := _accused(case, singles, "one step"):
        return accused
    same = [peer for peer in singles if case.same_threat(peer, weaker=False)]
    return _no_gain(case, same)


def _no_gain(case: Case, singles: list[Record]) -> list[Raised]:
    """Many steps that gain nothing over one, on a network that was not trained to make it so."""
    if not case.parts or not singles or _trained_against(case):
        return []
    single = min(singles, key=lambda record: float(outcomes(record).mean()))
    n = min(case.cell.n, single.cell.n)
    before, after = outcomes(single)[:n], outcomes(case.record)[:n]
    assert single.clean_ok is not None
    clean = float(single.clean_ok[:n].mean()) / single.draws
    gain = float(before.mean() - after.mean())
    # where one step hardly does anything, or everything, many have nothing to gain
    if gain >= POINTS or not 0.1 < before.mean() < HARMED * clean:
        return []
    text = f"{case.cell.attack} gains {100 * gain:.1f} points over one step"
    return [Raised("OVERESTIMATE", gain, POINTS, text)]


def _trained_against(case: Case) -> bool:
    """Adversarial training, or noise while training, flattens what many steps would use."""
    return any(
        part.adversarial or part.stochastic or any(base.adversarial for base in part.bases())
        for part in case.parts
    )


@check("F4", "a larger ε breaks less")
def monotone(case: Case) -> list[Raised] | None:
    """The next smaller ε of the same attack, paired over images."""
    smaller = [peer for peer in case.peers if case.same_threat(peer) and case.alike(peer, "step")]
    eps = case.cell.threat.eps
    smaller = [peer for peer in smaller if (peer.cell.threat.eps or 0) < (eps or 0)]
    if not case.climbs or not smaller or eps is None:
        return None
    below = max(smaller, key=lambda record: record.cell.threat.eps or 0)
    n = min(case.cell.n, below.cell.n)
    gaps = harm(below)[:n] - case.harm[:n]
    rise, error = float(gaps.mean()), float(gaps.std(ddof=1)) / np.sqrt(n)
    if rise > 2 * error and enough(round(rise * n), n):
        less = format_eps(below.cell.threat.eps)
        text = f"{100 * rise:.1f} points more survive than at the smaller ε = {less}"
        return [Raised("OVERESTIMATE", rise, 2 * error, text, np.flatnonzero(gaps >= 0.5))]
    before, after = float(outcomes(below)[:n].mean()), float(outcomes(case.record)[:n].mean())
    colour = case.cell.dataset.startswith("cifar") and case.cell.threat.norm == "linf"
    if colour and eps == Fraction(16, 255) and below.cell.threat.eps == Fraction(8, 255):
        drop = (before - after) / max(before, 1e-9)
        if drop < 0.1 and before > 0.1:
            text = f"from 8/255 to 16/255 the accuracy falls by {100 * drop:.1f} % of itself only"
            return [Raised("OVERESTIMATE", drop, 0.1, text)]
    return []


@check("F5", "another gradient attack breaks more")
def converged(case: Case) -> list[Raised] | None:
    """Twice the steps, restarts or draws, one at a time; and every other attack with gradients
    under the same threat. Paired over images."""
    if not case.climbs:
        return None
    longer = [peer for peer in case.peers if _doubled(case, peer)]
    others = [
        peer
        for peer in case.peers
        if case.same_threat(peer)
        and peer.cell.setting.kind in ("whitebox", "adaptive")
        and (found := attack_of(peer.cell.attack)) is not None
        and found.entry.needs == "gradients"
        and not found.entry.diagnostic
        and kind(peer) not in ONE_STEP
        and peer not in longer
    ]
    if not longer and not others:
        return None
    for other in longer:
        n = min(case.cell.n, other.cell.n)
        gaps = harm(other)[:n] - case.harm[:n]
        drop = float(gaps.mean())
        error = float(gaps.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
        if drop > max(POINT, error) and enough(round(drop * n), n):
            text = f"{_name(other)} ({other.cell.setting}) breaks {100 * drop:.1f} points more"
            return [Raised("OVERESTIMATE", drop, POINT, text, np.flatnonzero(gaps >= 0.5))]
    gains = {other.id: case.better(other)[1] for other in others}
    best = max(others, key=lambda other: (gains[other.id], other.id), default=None)
    if best is None or not gains[best.id]:
        return []
    text = f"{_name(best)} ({best.cell.setting}) wins {100 * gains[best.id]:.1f} points more"
    return [Raised("OVERESTIMATE", gains[best.id], POINTS, text)]


def _doubled(case: Case, other: Record) -> bool:
    """At least twice as much of one thing, and no less of the others."""
    if not case.same_threat(other, weaker=False):
        return False
    if not case.alike(other, "steps", "restarts", "step", "eot", "budget"):
        return False
    pairs = [(_steps(case.record), _steps(other))]
    first, second = case.settings.get("restarts"), settings_of(other).get("restarts")
    if isinstance(first, int) and isinstance(second, int):
        pairs.append((first, second))
    draws = case.cell.setting.eot, other.cell.setting.eot
    if isinstance(draws[0], int) and isinstance(draws[1], int):
        pairs.append(draws)  # type: ignore[arg-type]
    return all(b >= a for a, b in pairs) and any(b >= 2 * a for a, b in pairs)


@check("F9", "another scale of the logits changes the result")
def scale(case: Case) -> list[Raised] | None:
    """The same attack with a loss that the scale of the logits does not touch, or tempered."""
    free = ("dlr", "ce-t10", "ce-t100")
    if not case.climbs or case.settings.get("loss") in (None, *free):
        return None
    others = [
        peer
        for peer in case.peers
        if case.same_threat(peer, weaker=False)
        and case.alike(peer, "loss")
        and settings_of(peer).get("loss") in free
    ]
    if not others:
        return None
    for other in others:
        n = min(case.cell.n, other.cell.n)
        gaps = harm(other)[:n] - case.harm[:n]
        gain = float(gaps.mean())
        if gain > POINTS and enough(round(gain * n), n):
            text = f"with loss={settings_of(other)['loss']} it breaks {100 * gain:.1f} points more"
            return [Raised("OVERESTIMATE", gain, POINTS, text, np.flatnonzero(gaps >= 0.5))]
    return []


def _beaten(case: Case, fits: Callable[[Record, Attack], bool], what: str) -> list[Raised] | None:
    """The images that attacks of a kind break and this one does not."""
    if not case.climbs:
        return None
    others = [
        peer
        for peer in case.peers
        if case.same_threat(peer)
        and (found := attack_of(peer.cell.attack)) is not None
        and fits(peer, found.entry)
    ]
    if not others:
        return None
    return _accused(case, others, what)


def _accused(case: Case, others: Iterable[Record], what: str) -> list[Raised]:
    """By the one of them that breaks most of what this attack leaves, each by itself: of many
    attacks together some image or other is always broken."""
    found = [(other, *case.better(other)) for other in others]
    other, images, gain = max(found, key=lambda each: (len(each[1]), each[2], each[0].id))
    if len(images):
        text = f"{what} ({_name(other)}) breaks {len(images)} images that {case.cell.attack} leaves"
        return [Raised("OVERESTIMATE", len(images), 0, text, images)]
    if gain:
        text = f"{what} ({_name(other)}) wins {100 * gain:.1f} points more"
        return [Raised("OVERESTIMATE", gain, POINTS, text)]
    return []


@check("F10", "queries break what gradients do not")
def blackbox(case: Case) -> list[Raised] | None:
    """Square, HopSkipJump and other searches without gradients."""
    return _beaten(
        case,
        lambda peer, attack: (
            peer.cell.setting.kind == "blackbox" and attack.name != "random-search"
        ),
        "a search by queries",
    )


@check("F11", "what was made on another network breaks more")
def transfer(case: Case) -> list[Raised] | None:
    """x' from siblings, members, undefended and adversarially trained networks."""
    return _beaten(
        case, lambda peer, attack: peer.cell.setting.kind == "transfer", "a transferred attack"
    )


@check("F12", "random points break what gradients do not")
def random_points(case: Case) -> list[Raised] | None:
    """Uniformly random corner points of the ball."""
    return _beaten(case, lambda peer, attack: attack.name == "random-search", "random search")


@check("F26", "two runs have the same result image by image")
def identical(case: Case) -> list[Raised] | None:
    """Another ε of the same attack, or of a random defense another attack."""
    share = float(outcomes(case.record).mean()) if case.record.status == "ok" else 0.0
    if not case.climbs or not ALIKE[0] < share < ALIKE[1]:
        return None
    assert case.record.ok is not None and case.attack is not None
    for peer in case.peers:
        one = case.cell.threat, case.cell.attack, case.cell.setting
        two = peer.cell.threat, peer.cell.attack, peer.cell.setting
        if peer.cell.n != case.cell.n or one[0].norm != two[0].norm:
            continue
        budget = one[0] != two[0] and one[1:] == two[1:] and not case.attack.minimal
        attack = case.stochastic and one[1] != two[1] and one[::2] == two[::2]
        if (budget or attack) and np.array_equal(peer.ok, case.record.ok):  # type: ignore[arg-type]
            text = f"the outcome of every image is that of {peer.cell.attack} at {peer.cell.threat}"
            return [Raised("WARN", 1, 1, text)]
    return []


@check("F33", "answers are withheld instead of being right")
def coverage(case: Case) -> list[Raised] | None:
    """The share without an answer on clean images against what was declared, and whether those
    withheld under attack would have been wrong at all."""
    record = case.record
    if not case.climbs:
        return None
    assert record.clean_ok is not None and record.clean_err is not None
    assert record.ok is not None and record.err is not None
    refused = 1 - (record.clean_ok.astype(float) + record.clean_err) / record.draws
    withheld = 1 - (record.ok.astype(float) + record.err) / record.draws
    declared = [part.fpr for part in case.parts if part.detector]
    if not declared and not withheld.any() and not refused.any():
        return None
    found = []
    share, error = float(refused.mean()), float(refused.std(ddof=1)) / np.sqrt(len(refused))
    if declared and share > declared[0] + 2 * error:
        said = f"{100 * declared[0]:.3g} % were said to"
        if probe := case.probe():
            said += f", and {100 * probe['abstained']['noise']:.3g} % of uniform noise"
        text = f"{100 * share:.1f} % of clean images get no answer, {said}"
        found.append(Raised("WARN", share, declared[0], text, np.flatnonzero(refused > 0.5)))
    share = float(withheld.mean())
    if record.best is not None and share > POINTS:
        wrong = float((1 - (record.best.astype(float) + record.err) / record.draws).mean()) / share
        if wrong < SPARED:
            text = f"{100 * share:.1f} % get no answer, of which {100 * wrong:.0f} % would be wrong"
            found.append(Raised("WARN", wrong, SPARED, text))
    return found
