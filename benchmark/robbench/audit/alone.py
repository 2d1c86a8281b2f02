"""Flags that one record raises by itself, from its counts and its trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from robbench.audit.case import Case, kind
from robbench.audit.flags import Raised, check, enough
from robbench.metrics import LOST, outcomes
from robbench.threat import parse_eps

SIGN_STEPS = ("fgsm", "bim", "pgd", "mim")
STEPPING = ("bim", "pgd", "mim", "apgd", "ilcm")
FEWEST = 10  # steps of an attack that calls itself iterative
STUCK = 0.1  # of the images on which a loss does not grow
MOVING = 0.05  # of the range of the loss, in its last quarter
ONCE = 0.1  # of the images that exactly one of several restarts breaks
IDLE = 0.05  # of the clean-correct images that come back as they were
SLACK = 0.03  # between draws that select and draws that score
SILENT = 0.005
DEAD = 0.01
PROBED = 32  # images that a probe looks at, where there are as many


def _finished(case: Case) -> bool:
    return case.record.status == "ok" and case.attack is not None and not case.attack.diagnostic


def _right_after(case: Case) -> np.ndarray:
    """Images that are right when clean, and mostly so under attack."""
    record = case.record
    assert record.clean_ok is not None
    right: np.ndarray = record.clean_ok > record.draws / 2
    return right & (case.harm < 0.5)


@check("F5b", "the attack can hardly reach the surface of the ball")
def reachable(case: Case) -> list[Raised] | None:
    """Steps times their length, against the diameter 2 ε of the ball."""
    steps, eps = case.settings.get("steps"), case.cell.threat.eps
    if not _finished(case) or not case.climbs or steps is None or eps is None:
        return None
    if kind(case.record) in STEPPING and steps < FEWEST:
        text = f"{steps} step{'s' * (steps > 1)} are no iterative attack: {FEWEST} at least"
        return [Raised("OVERESTIMATE", steps, FEWEST, text)]
    step = _step_length(case)
    if step is None:
        return None
    reach = steps * step / float(eps)
    if reach >= 2 - 1e-9:
        return []
    return [Raised("WARN", reach, 2, f"{steps} steps of {step:.4g} come {reach:.2g} ε far at most")]


def _step_length(case: Case) -> float | None:
    """Of a step; None where the attack chooses it by itself."""
    settings, eps = case.settings, float(case.cell.threat.eps or 0)
    if pace := settings.get("pace"):
        return float(pace) * eps
    if "step" not in settings:
        return None
    step = settings["step"]
    return 2.5 * eps / settings["steps"] if step is None else float(parse_eps(step))


@check("F7", "the attack's loss does not grow")
def growing(case: Case) -> Iterator[Raised] | None:
    """Per image of deterministic defenses, of the mean over images where draws are noise; one
    draw tells nothing."""
    loss = case.record.trace.get("loss")
    minimal = case.attack is not None and case.attack.minimal  # these leave x and come back
    if not case.climbs or loss is None or minimal or not case.averaged:
        return None
    if int(case.settings.get("steps") or 1) < len(loss):
        return None
    return _growing(case, loss.astype(np.float64))


def _growing(case: Case, loss: np.ndarray) -> Iterator[Raised]:
    there = np.isfinite(loss[[0, 1, -1]]).all(axis=0) & (np.abs(loss[[0, 1, -1]]) < 65504).all(
        axis=0
    )
    first, second, last = loss[:, there][[0, 1, -1]]
    if not enough(len(first), case.cell.n):
        return
    places = np.flatnonzero(there)
    for begins, ends, when in ((first, second, "in the first quarter"), (first, last, "at all")):
        if case.stochastic:
            share = float(ends.mean() <= begins.mean())
            stuck = places if share else places[:0]
            text = f"the mean loss over images does not grow {when}"
        else:
            stuck = places[ends <= begins]
            share = len(stuck) / case.cell.n
            text = f"the loss of {100 * share:.1f} % of the images does not grow {when}"
        if share > STUCK:
            yield Raised("OVERESTIMATE", share, STUCK, text, stuck)
            return
    if not case.stochastic:
        spans = np.ptp(loss[:, there], axis=0)
        moved = np.abs(loss[-1, there] - loss[-2, there]) / np.where(spans > 0, spans, 1)
        if moved.mean() > MOVING:
            text = f"in its last quarter the loss still moves by {moved.mean():.2f} of its range"
            yield Raised("INFO", float(moved.mean()), MOVING, text)


@check("F8", "no gradient to climb by")
def gradient(case: Case) -> list[Raised] | None:
    """In the trace of the attack, at x and near it for the loss in use, and in what failed."""
    record, n = case.record, case.cell.n
    if record.status == "failed":
        reason = record.reason or ""
        broken = any(word in reason for word in ("not finite", "does not require grad", "NaN"))
        return [Raised("INVALID", 1, 0, f"the cell failed: {reason}")] if broken else None
    if not case.climbs:
        return None
    dead, zeros = record.trace.get("dead"), record.trace.get("zero_gradient")
    seen = _probed(case)
    if dead is None or zeros is None:
        return [*_as_probed(seen)] or None  # a probe can accuse an attack, and not acquit it
    found = []
    # a loss that is content with a refusal has nothing to climb, and has not failed
    still = _right_after(case) & (outcomes(record) >= 0.5)
    images = np.flatnonzero((dead >= 0.5) & still)
    counted = enough(int(still.sum()), n)
    share, zero = len(images) / n, float(zeros[still].mean()) if counted else 0.0
    if share > DEAD and enough(len(images), n):
        text = f"the gradient of {len(images)} images that the attack leaves right is all zero"
        found.append(Raised("INVALID", share, DEAD, text, images))
    elif zero > 0.5:
        text = f"{100 * zero:.0f} % of the gradient's pixels are zero where it breaks nothing"
        # black pixels behind a ReLU have none in sound networks too
        found.append(Raised("WARN", zero, 0.5, text))
    return found or [*_as_probed(seen)]


def _probed(case: Case) -> dict[str, Any] | None:
    """What the probe saw of the loss that the attack climbs; None for suites, which have many."""
    probe = case.probe()
    name = case.settings.get("loss")
    if probe is None or not isinstance(name, str):
        return None
    gradients: dict[str, Any] = probe["gradients"]
    if name == "auto":
        own = probe.get("losses", []) if case.cell.setting.kind == "adaptive" else []
        name = next(iter(own), "ce")
    return gradients.get(name)


def _as_probed(seen: dict[str, Any] | None) -> Iterator[Raised]:
    if seen is None:
        return
    if not seen["path"]:
        yield Raised("INVALID", 1, 0, f"the loss has no gradient: {seen['reason']}")
    elif seen["not_finite"]:
        count = len(seen["not_finite"])
        text = f"at x or near it the gradient of {count} images is not finite"
        yield Raised("INVALID", count, 0, text, seen["not_finite"])
    elif enough(len(seen["dead"]), PROBED):
        text = f"at x or near it the gradient of {len(seen['dead'])} of {PROBED} images is all zero"
        yield Raised("INVALID", len(seen["dead"]), 0, text, seen["dead"])
    elif seen["zeros"] > 0.5:
        text = f"at x or near it {100 * seen['zeros']:.0f} % of the gradient's pixels are zero"
        yield Raised("WARN", seen["zeros"], 0.5, text, seen["dead"])


@check("F16", "more restarts would break more")
def restarts(case: Case) -> list[Raised] | None:
    """Images that exactly one of several restarts breaks."""
    lost = case.record.trace.get("restarts_lost")
    if lost is None or not case.climbs:
        return None
    broken = (lost >= (LOST if case.stochastic else 1)).sum(axis=0)
    once = np.flatnonzero(broken == 1)
    share = len(once) / case.cell.n
    if share <= ONCE or not enough(len(once), case.cell.n):
        return []
    text = f"{100 * share:.1f} % of the images fall to one of {len(lost)} restarts alone"
    return [Raised("OVERESTIMATE", share, ONCE, text, once)]


@check("F18", "the attack changed the defense")
def integrity(case: Case) -> list[Raised] | None:
    """Modes, buffers and weights after the attack, and after a prediction."""
    probe = case.probe()
    changed = list(case.record.provenance.get("changed", []))
    if case.record.status != "ok" or (probe is None and not changed):
        return None
    found = []
    if changed:
        names = ", ".join(changed[:3])
        text = f"the attack changed the mode, a buffer or a weight of {names}"
        found.append(Raised("INVALID", len(changed), 0, text))
    if probe and probe["changed"]:
        text = f"an answer changes {', '.join(probe['changed'][:3])}"
        found.append(Raised("INVALID", len(probe["changed"]), 0, text))
    if probe and probe["reseeds"]:
        text = "an answer sets the global random stream, which repeats the same draws"
        found.append(Raised("INVALID", 1, 0, text))
    return found


@check("F19", "what the attack returned is no adversarial example")
def valid(case: Case) -> list[Raised] | None:
    """As the judge found it; a violation fails the cell."""
    reason = case.record.reason or ""
    if case.record.status == "failed" and reason.startswith("the attack "):
        return [Raised("INVALID", 1, 0, reason)]
    return [] if case.record.status == "ok" else None


@check("F21", "one look at a random defense is not its accuracy")
def looks(case: Case) -> list[Raised] | None:
    """What an attack reports that counts its first lost look, beside the expectation; fewer draws
    than a decision takes are no look at all."""
    seen = case.record.trace.get("lost_seen")
    if not case.stochastic or seen is None or not case.climbs or case.cell.n < 2:
        return None
    if any(part.draws > case.eot for part in case.parts):
        return None
    expected = float(1 - case.harm.mean())
    first = float(1 - (np.nan_to_num(seen[0].astype(np.float64)) > 0.5).mean())
    error = float(case.harm.std(ddof=1)) / np.sqrt(case.cell.n)
    if abs(first - expected) <= 2 * error:
        return []
    text = (
        f"stopping at the first lost look would have printed {100 * first:.1f} %,"
        f" the expectation is {100 * expected:.1f} %"
    )
    return [Raised("INFO", first - expected, 2 * error, text)]


@check("F22", "the attack overfits its draws")
def overfitted(case: Case) -> list[Raised] | None:
    """The share lost to the draws that selected x', against that of fresh ones."""
    trace = case.record.trace
    selected = trace.get("surrogate_lost", trace.get("selected_lost"))
    if not case.stochastic or selected is None or not case.climbs:
        return None
    there = np.isfinite(selected)
    if not there.any():
        return []
    gaps = selected[there].astype(np.float64) - case.lost[there]
    gap, error = float(gaps.mean()), float(gaps.std()) / np.sqrt(len(gaps))
    if gap <= SLACK or gap <= 2 * error:
        return []
    text = f"the draws that chose x' are lost {100 * gap:.1f} points more often than fresh ones"
    return [Raised("WARN", gap, SLACK, text)]


@check("F24", "the attack passed by what it was looking for")
def silent(case: Case) -> list[Raised] | None:
    """Images that were broken at an evaluated iterate and are not at the returned one."""
    seen = case.record.trace.get("lost_seen")
    minimal = case.attack is not None and case.attack.minimal
    if seen is None or not case.climbs or not case.decided or minimal:
        return None
    won = np.nan_to_num(seen[0].astype(np.float64)) >= (LOST if case.stochastic else 1)
    passed = np.flatnonzero(won & (case.harm < 0.5))
    share = len(passed) / case.cell.n
    if share <= SILENT or not enough(len(passed), case.cell.n):
        return []
    text = f"{len(passed)} images were broken on the way and are right where the attack ended"
    return [Raised("OVERESTIMATE", share, SILENT, text, passed)]


@check("F25", "the attack did nothing")
def idle(case: Case) -> list[Raised] | None:
    """Clean-correct images that come back unchanged, or with less than half of ε used by an attack
    that steps along signs; all of them where a search for the smallest change may fail."""
    record = case.record
    same = record.trace.get("unchanged")
    direct = case.climbs or (_finished(case) and kind(record) in SIGN_STEPS)
    if not direct or same is None or case.attack is None:
        return None
    assert record.clean_ok is not None and record.distance is not None
    right = record.clean_ok > record.draws / 2
    total = max(int(right.sum()), 1)
    still = _right_after(case)
    unused = same & still
    eps = case.cell.threat.eps
    if kind(case.record) in SIGN_STEPS and eps and case.cell.threat.norm == "linf":
        unused = unused | (still & (record.distance < 0.5 * float(eps)))
    images, limit = np.flatnonzero(unused), IDLE
    if case.attack.minimal:
        limit = 1 - IDLE
        images = np.flatnonzero(same & right)
    share = len(images) / total
    if share <= limit or not enough(len(images), case.cell.n):
        return []
    text = f"{100 * share:.1f} % of the clean-correct images came back as good as unchanged"
    # a library that hands back x where it failed is right about what answers alike every time
    told = ":" in case.attack.name and not case.stochastic and not _idle_at_all(case, images)
    return [Raised("WARN" if told else "INVALID", share, limit, text, images)]


def _idle_at_all(case: Case, images: np.ndarray) -> bool:
    """Nothing that was right was moved."""
    assert case.record.clean_ok is not None
    return len(images) >= int((case.record.clean_ok > 0).sum())


@check("F35", "the cell has no number")
def crashed(case: Case) -> list[Raised]:
    """An exception, a time-out or a skipped batch: missing, never robust."""
    if case.record.status == "ok":
        return []
    return [Raised("INVALID", 1, 0, f"missing: {case.record.reason}")]
