"""Every evasion class of ART 1.20 (Nicolae et al. 2018, arXiv:1807.01069) as `art:NAME`.

Differences to the library as it is: labels are always given (never the defense's own guess), as
targets where a class wants targets; step sizes default to 2.5 ε / steps (2 ε for the adaptive
ones) instead of a constant that ignores ε; classes that expect probabilities get them; start
images come from the run's seed; what needs other data or another kind of model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.attacks import Attack
from robbench.attacks.art_table import TABLE, available
from robbench.attacks.library import Job, arguments, attack_of
from robbench.errors import InputError, unknown
from robbench.threat import Norm

_NORMS: dict[Norm, object] = {"linf": np.inf, "l2": 2, "l1": 1}
_PROBABILITIES = ("NewtonFool", "SimBA", "VirtualAdversarialMethod")
_INEXACT = ("CarliniL0Method", "PixelAttack", "ThresholdAttack")
_ROUNDING = 1e-5  # these go to [0, 255] or tanh space and back; a real step is 1/255 at least


class _Seeded(np.random.RandomState):
    """RandomState() without a seed continues the run's stream instead of starting anywhere."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(np.random.randint(2**31 - 1) if seed is None else seed)


def names() -> list[str]:
    """All classes of the library, those that are refused too."""
    return sorted(TABLE)


def find(name: str) -> Attack:
    """The attack of this class; the library's attacks are imported here and not before."""
    if name not in TABLE:
        raise unknown("art attack", name, TABLE)
    try:
        from art.attacks import evasion
    except ImportError as error:
        raise InputError(
            f"ART cannot be imported ({error}); install what is missing, or run"
            " pip install --force-reinstall robbench"
        ) from None

    constructor = getattr(evasion, name, None)  # None: ART hides it where a package is missing

    def craft(job: Job) -> Tensor:
        return _craft(name, constructor, job)

    start = getattr(constructor, "__init__", None)
    return attack_of(
        "art", name, start, available(name), craft, r"(art|cma|numpy\.matrixlib)(\.|$)"
    )


def _craft(name: str, constructor: Any, job: Job) -> Tensor:
    from robbench.estimator import Estimator, ProbabilityEstimator  # they import ART

    values = _arguments(name, constructor, job)
    probable = name in _PROBABILITIES or values.get("attacker") == "newtonfool"
    estimator = (ProbabilityEstimator if probable else Estimator)(job.access)
    labels = job.y if job.target is None else job.target
    one_hot = F.one_hot(labels, job.access.deployed.labels).float().cpu().numpy()
    with _mended(name):
        attack = constructor(estimator, **values)
        for part in getattr(attack, "attacks", ()):  # those that AutoAttack makes itself
            part.verbose = False
        made = _generate(name, attack, job.x.cpu().numpy().copy(), one_hot)
    result = torch.from_numpy(np.asarray(made, dtype=np.float32)).to(job.x.device)
    if name in _INEXACT:
        result = torch.where((result - job.x).abs() > _ROUNDING, result, job.x)
    if name == "ThresholdAttack":  # cuts to whole values of 0 to 255, up to one step too far
        eps = float(job.threat.eps)  # type: ignore[arg-type]
        result = result.clamp(job.x - eps, job.x + eps)
    return result


@contextmanager
def _mended(name: str) -> Iterator[None]:
    """Start images come from RandomState(), cma seeds by the clock, BrendelBethge shows a bar."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(np.random, "RandomState", _Seeded))
        stack.enter_context(patch.object(np.random, "seed"))
        if name == "BrendelBethgeAttack":
            stack.enter_context(patch("tqdm.auto.trange", range))
        yield


def _generate(name: str, attack: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    try:
        return attack.generate(x=x, y=labels)
    except AssertionError:
        if name != "BrendelBethgeAttack":
            raise
        return x  # its only assertion: none of the random start images has a label it wants


def _arguments(name: str, constructor: Any, job: Job) -> dict[str, Any]:
    """All arguments of the constructor: settings, and what follows from the job."""
    given = inspect.signature(constructor).parameters
    norm = _NORMS.__getitem__ if "norm" in given and job.threat.norm in _NORMS else None
    values = arguments(job, TABLE[name], norm)
    follow = {"targeted": job.threat.targeted, "verbose": False, "batch_size": len(job.x)}
    values |= {key: value for key, value in follow.items() if key in given.keys() - values.keys()}
    if name == "ThresholdAttack":
        values["th"] = int(job.threat.eps * 255)  # type: ignore[operator]
    if "attacker_params" in given:
        values["attacker_params"] = _attacker(name, values)
    return values


def _attacker(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the attack inside a universal one: the same ball, its own defaults else."""
    attacker, eps = values["attacker"], values["eps"]
    targeted = {"targeted": True} if name == "TargetedUniversalPerturbation" else {}
    if attacker == "fgsm":
        return {"norm": values["norm"], "eps": eps, "eps_step": eps} | targeted
    if attacker in ("bim", "pgd"):
        return {"norm": values["norm"], "eps": eps, "eps_step": 2.5 * eps / 100, "verbose": False}
    return {"verbose": False}
