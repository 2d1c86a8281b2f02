"""How far an attack had to go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from robbench.errors import InputError


class Distortion(NamedTuple):
    """Distances of the adversarial examples that were found; nan where none was."""

    mean: float
    median: float
    failures: float  # share of the attacked images in [0, 1] without an adversarial example
    n: int  # attacked images


def distortion(distances: np.ndarray, success: np.ndarray) -> Distortion:
    """Mean and median distance over successes alone; a failure has no distance and is counted.

    Leave out images that are wrong without an attack: their distance is 0 by definition.
    distances (N,) in any norm, >= 0; success (N,), bool.
    """
    distances, success = np.asarray(distances, dtype=np.float64), np.asarray(success, dtype=bool)
    if distances.shape != success.shape or not distances.size:
        raise InputError(
            f"{distances.size} distances with {success.size} outcomes; give one of each per image"
        )
    found = distances[success]
    failures = float(1 - success.mean())
    if not found.size:
        return Distortion(float("nan"), float("nan"), failures, distances.size)
    return Distortion(float(found.mean()), float(np.median(found)), failures, distances.size)
