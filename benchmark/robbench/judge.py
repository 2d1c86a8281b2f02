"""Judges what an attack returns; an attack is never believed.

Its x' is checked for shape, finite values, box and ε, and scored on draws that it never saw.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from robbench.checkpoints import Trained
from robbench.randomness import preserved_random_state, seed_everything
from robbench.rules import ABSTAIN
from robbench.threat import Threat, distance, within

SCORING_DRAWS = 20  # fresh draws per image of a stochastic defense


class Violation(Exception):
    """What an attack returned is not an adversarial example of its threat model."""


def check(adversarial: Tensor, x: Tensor, threat: Threat, bounded: bool = True) -> Tensor:
    """(N,) distances of a valid x'; a Violation says what is wrong and by how much."""
    if not isinstance(adversarial, Tensor):
        raise Violation(f"the attack returned {type(adversarial).__name__}, not a tensor")
    if adversarial.shape != x.shape:
        raise Violation(
            f"the attack returned the shape {tuple(adversarial.shape)}, not {tuple(x.shape)}"
        )
    if not adversarial.is_floating_point():
        raise Violation(f"the attack returned {adversarial.dtype}, not a floating-point type")
    if not bool(adversarial.isfinite().all()):
        bad = int((~adversarial.isfinite()).flatten(1).any(dim=1).sum())
        raise Violation(f"the attack returned values that are not finite in {bad} images")
    low, high = float(adversarial.min()), float(adversarial.max())
    if low < 0 or high > 1:
        raise Violation(f"the attack left the box [0, 1]: values from {low:.6g} to {high:.6g}")
    lengths = distance(adversarial, x, threat.norm)
    if bounded and threat.norm != "none" and not bool(within(lengths, threat).all()):
        bad = int((~within(lengths, threat)).sum())
        worst = float(lengths.max()) / float(threat.eps or 1)
        raise Violation(f"the attack left the ball: {bad} images, up to {worst:.4f} ε ({threat})")
    return lengths


def check_trace(trace: dict[str, np.ndarray], n: int) -> None:
    """A Violation for a trace that is not (..., n) numbers."""
    for name, values in trace.items():
        numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
        if not numbers or values.shape[-1:] != (n,):
            raise Violation(f"the attack left a trace {name!r} that is not (..., {n}) numbers")


class Outcome(NamedTuple):
    """What a defense says in fresh draws, per image (N,): uint8 counts of right, of
    wrong-and-accepted, and of right answers whether refused or not; and how sure it was, float32,
    the mean over the draws."""

    ok: np.ndarray
    err: np.ndarray
    best: np.ndarray
    score: np.ndarray


def score(target: Trained, x: Tensor, y: Tensor, draws: int, seed: int) -> Outcome:
    """The outcome of so many fresh calls of the whole defense on each image."""
    with preserved_random_state():
        seed_everything(seed)
        try:
            answers = target.deployed.answers(x.float(), draws)
        except FloatingPointError as error:
            raise Violation(str(error)) from None

    def count(what: Tensor) -> np.ndarray:
        return what.sum(dim=0).cpu().numpy().astype(np.uint8)

    return Outcome(
        ok=count(answers.label == y),
        err=count((answers.label != y) & (answers.label != ABSTAIN)),
        best=count(answers.best == y),
        score=answers.score.float().mean(dim=0).cpu().numpy(),
    )
