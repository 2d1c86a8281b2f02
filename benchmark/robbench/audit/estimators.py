"""Flags of an estimator: what a probe saw of it, and what diagnostics say of an attack on it."""

from __future__ import annotations

import math

import numpy as np

from robbench.audit.case import Case, settings_of
from robbench.audit.flags import Raised, check

NOISY, AGREEING, WRONG = 0.1, 0.2, 0.05
DIFFERENT = 1e-4  # of the spread of an image's logits, as AutoAttack has it
WIDE = 50  # logits further apart saturate a softmax in float32
FOUND, TRIGGERED = 0.95, 0.98
HALF_POINT = 0.005
CHANCE_ERRORS, FEWEST = 3, 20  # standard errors above chance; images that can tell
SURPRISING = 4  # standard errors: the paths of a random defense differ by 2 once in 20 estimators


@check("F13", "the loss is rough")
def rough(case: Case) -> list[Raised] | None:
    """How the margin changes half a grey level away, over the same draws."""
    probe = case.probe()
    if probe is None or not case.climbs:
        return None
    if 0 <= probe["noise"] <= NOISY:
        return []
    text = (
        f"half a grey level away the margin differs by {probe['noise']:.2f} of the scores' spread"
    )
    return [Raised("WARN", probe["noise"], NOISY, text)]


@check("F14", "autograd's derivative is not the function's")
def derivative(case: Case) -> list[Raised] | None:
    """Central differences in float64 over common draws; a declared BPDA is no fault."""
    probe = case.probe()
    if probe is None or not case.climbs:
        return None
    seen = probe["derivative"]
    if "declared" in seen:
        text = f"BPDA in use: {', '.join(seen['declared'])}"
        return [Raised("INFO", 1, 0, text)]
    if "error" not in seen:
        return None
    if 0 <= seen["error"] <= WRONG:
        return []
    text = f"derivatives along random directions differ by {100 * seen['error']:.0f} % (median)"
    return [Raised("INVALID", seen["error"], WRONG, text)]


@check("F15", "gradients of independent draws disagree")
def variance(case: Case) -> list[Raised] | None:
    """Their mean cosine at the probe's number of draws."""
    probe = case.probe()
    if probe is None or not case.stochastic or not case.climbs:
        return None
    if probe["agreement"] >= AGREEING:
        return []
    text = f"two gradients of as many draws have the cosine {probe['agreement']:.2f}: take more"
    return [Raised("WARN", probe["agreement"], AGREEING, text)]


@check("F17", "the same question, another answer")
def repeatability(case: Case) -> list[Raised] | None:
    """From call to call, with one seed, alone and in another order."""
    probe = case.probe()
    if probe is None or case.record.status != "ok":
        return None
    seen = probe["repeatability"]
    found = []
    if seen["batch"] > DIFFERENT:
        text = "the answer to an image depends on the images beside it"
        found.append(Raised("WARN", seen["batch"], DIFFERENT, text))
    if seen["seeded"] > DIFFERENT:
        text = "with the same seed the answers differ: it draws from a stream of its own"
        found.append(Raised("WARN", seen["seeded"], DIFFERENT, text))
    if case.stochastic:
        kind = "call" if "call" in seen["kinds"] else "image"
        text = (
            f"random per {kind}; logits of two calls differ by {seen['calls']:.2g} of their spread"
        )
        found.append(Raised("INFO", seen["calls"], DIFFERENT, text))
    return found


@check("F20", "attacks and judge see another defense")
def paths(case: Case) -> list[Raised] | None:
    """Clean accuracy by the path of the attacks and by that of the judge."""
    probe = case.probe()
    if probe is None or case.record.status != "ok":
        return None
    seen, found = probe["paths"], []
    gap, limit = abs(seen["judge"] - seen["attack"]), max(HALF_POINT, SURPRISING * seen["error"])
    if seen["error"] >= 0 and gap > limit:  # of a single image nothing can be said
        text = (
            f"clean images are {100 * seen['attack']:.1f} % right where attacks look,"
            f" {100 * seen['judge']:.1f} % where it is judged"
        )
        found.append(Raised("INVALID", gap, limit, text))
    assert case.record.clean_ok is not None
    n, chance = case.cell.n, 1 / probe["outputs"]["labels"]
    clean = float(case.record.clean_ok.mean()) / case.record.draws
    limit = chance + CHANCE_ERRORS * math.sqrt(chance * (1 - chance) / n)
    if n >= FEWEST and clean <= limit:
        text = (
            f"clean images are {100 * clean:.1f} % right, as by chance: labels or pixels are wrong"
        )
        found.append(Raised("INVALID", clean, limit, text))
    return found


@check("F28", "the attack misses a planted boundary")
def binarization(case: Case) -> list[Raised] | None:
    """Zimmermann et al. 2022: the share of images in which this attack finds the one other class
    that a binary read-out has inside the ball."""
    return _planted(case, "binarization", FOUND)


@check("F29", "the attack misses a planted trigger")
def backdoor(case: Case) -> list[Raised] | None:
    """The share of images in which this attack finds a smooth trigger inside the ball."""
    return _planted(case, "backdoor", TRIGGERED)


def _planted(case: Case, test: str, least: float) -> list[Raised] | None:
    records = [
        peer
        for peer in case.peers
        if peer.cell.attack.partition("(")[0] == test
        and settings_of(peer).get("attack") == case.cell.attack
        and peer.cell.threat.norm == case.cell.threat.norm
    ]
    if not case.climbs or not records:
        return None
    trace = records[-1].trace
    counted = trace["usable"] > 0
    if not counted.any():
        return None
    found = np.nan_to_num(trace["found"].astype(float)) >= 0.5
    share = float(found[counted].mean())
    if share >= least:
        return []
    text = f"it finds what was planted in {100 * share:.1f} % of {int(counted.sum())} images"
    return [Raised("INVALID", share, least, text, np.flatnonzero(counted & ~found))]


@check("F31", "answers are no plain logits")
def outputs(case: Case) -> list[Raised] | None:
    """Probabilities, their logarithms, only negative numbers, a wide range, few labels."""
    probe = case.probe()
    if probe is None or case.record.status != "ok":
        return None
    seen, found = probe["outputs"], []
    if seen["kind"] in ("probabilities", "log-probabilities"):
        text = (
            f"the members answer with {seen['kind']}: cross-entropy takes a softmax of them again"
        )
        verdict = "WARN" if seen["kind"] == "probabilities" else "INFO"
        found.append(Raised(verdict, 1, 0, text))  # type: ignore[arg-type]
    if seen["kind"] == "all-negative":
        text = "all logits are negative: attacks that mask the label with 0 do nothing"
        found.append(Raised("INFO", 1, 0, text))
    if seen["range"] > WIDE:
        text = f"logits are up to {seen['range']:.3g} apart: a softmax saturates"
        found.append(Raised("INFO", seen["range"], WIDE, text))
    if seen["labels"] < 4:
        text = f"{seen['labels']} labels: APGD-T and targeted DLR need four"
        found.append(Raised("INFO", seen["labels"], 4, text))
    return found


@check("F32", "it optimises while it answers")
def optimises(case: Case) -> list[Raised] | None:
    """Derivatives inside a forward pass, which a gradient does not go through."""
    probe = case.probe()
    if probe is None or not case.climbs:
        return None
    if not probe["optimises"] or case.record.provenance.get("bpda"):
        return []
    text = "an answer takes derivatives of its own: attack it unrolled, or by a declared BPDA"
    return [Raised("OVERESTIMATE", 1, 0, text)]
