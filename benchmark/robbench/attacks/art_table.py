"""Every evasion class of ART 1.20, a line of traits each; art.py runs them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np

from robbench.attacks.library import Job, Traits
from robbench.threat import Norm, format_eps

_LP: tuple[Norm, ...] = ("linf", "l2", "l1")


def _spatial(job: Job) -> str | None:
    settings = job.settings
    if not (settings["max_rotation"] or settings["max_translation"]):
        return "its defaults turn and shift nothing; set max_rotation or max_translation"
    if settings["num_rotations"] + settings["num_translations"] < 3:
        return "a grid of one turn and one shift is no search; set num_rotations, num_translations"
    return None


def _dlr(job: Job) -> str | None:
    labels = job.access.deployed.labels
    if job.settings["loss_type"] == "difference_logits_ratio" and labels < 3:
        return f"the ratio of logits needs at least 3 labels, the defense has {labels}"
    return None


def _evolution(job: Job) -> str | None:
    if job.settings["es"] == 0 and not _installed("cma"):
        return "es=0 needs the package cma; pip install 'robbench[attacks]' or write es=1"
    if job.threat.norm == "linf" and job.threat.eps and job.threat.eps * 255 < 1:
        return f"moves in steps of 1/255, ε = {format_eps(job.threat.eps)} is less"
    return None


def _simba(job: Job) -> str | None:
    height, width = job.x.shape[2:]
    free = height - job.settings["freq_dim"]
    if job.settings["attack"] == "dct" and (height != width or free < 0):
        return f"attack=dct needs square images not below freq_dim, these are {height}x{width}"
    if free % job.settings["stride"]:
        return "image height - freq_dim must be a multiple of stride"
    return None


def _zoo(job: Job) -> str | None:
    if job.settings["use_resize"] and min(job.x.shape[2:]) < 32:
        return "use_resize starts from 32x32 images; write use_resize=false for smaller ones"
    at_once, values = job.settings["nb_parallel"], job.x[0].numel()
    if at_once > values:
        return f"nb_parallel={at_once} is more than an image has; write at most {values}"
    return None


def _composite(job: Job) -> str | None:
    if job.x.shape[2:] != (32, 32):
        return f"works on images of 32x32 only, these are {job.x.shape[2]}x{job.x.shape[3]}"
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _sign(norms: tuple[Norm, ...] = _LP, **traits: Any) -> Traits:
    """The family of PGD: steps of length eps_step inside the ball."""
    shared: dict[str, Any] = {"moves": True, "step": "eps_step", "steps": "max_iter"}
    shared |= {"decimals": ("decay",), "faults": _LAST}
    return Traits(norms, **shared | traits)


def _auto(faults: str) -> Traits:
    choices = {"loss_type": (None, "cross_entropy", "difference_logits_ratio")}
    return Traits(
        _LP, moves=True, step="eps_step", pace=2.0, guard=_dlr, choices=choices, faults=faults
    )


_LAST = "one draw of the defense per step; returns the last iterate"
_BLIND = "starts from the label that one draw predicts, blind to the true label"
_DRAW = "one draw of the defense decides success"
_APGD = "judges the last iterate and not the best; one draw of the defense per step"
_ES: dict[str, Any] = {
    "choices": {"es": (0, 1)},
    "guard": _evolution,
    "faults": "works on whole values of 0 to 255; slow; " + _DRAW,
}
_UNIVERSAL = "one perturbation for the whole batch"

TABLE: dict[str, Traits] = {
    "FastGradientMethod": Traits(_LP, moves=True, drops=("eps_step", "minimal"), faults=_LAST),
    "BasicIterativeMethod": _sign(("linf",), decimals=()),
    "MomentumIterativeMethod": _sign(),
    "ProjectedGradientDescent": _sign(),
    "ProjectedGradientDescentNumpy": _sign(),
    "ProjectedGradientDescentPyTorch": _sign(),
    "AutoProjectedGradientDescent": _auto(_APGD),
    "AutoConjugateGradient": _auto(_APGD),
    "RescalingAutoConjugateGradient": _auto(_APGD),
    "AutoAttack": Traits(
        _LP,
        targeted=False,
        labels=3,
        step="eps_step",
        pace=2.0,
        drops=("parallel_pool_size",),
        faults="not AutoAttack: DeepFool in place of FAB, no APGD-T; " + _APGD,
    ),
    "SquareAttack": Traits(("linf", "l2"), "scores", targeted=False, faults=_DRAW),
    "CarliniL2Method": Traits(
        ("l2",), minimal=True, faults="10 steps per search by default; " + _DRAW
    ),
    "CarliniLInfMethod": Traits(
        ("linf",),
        minimal=True,
        targeted=False,
        faults="10 steps by default; targeted it keeps what misses the target; " + _DRAW,
    ),
    "CarliniL0Method": Traits(
        ("l0",),
        minimal=True,
        single=True,
        faults="10 steps by default; stops after channels + 1 fixed values; " + _DRAW,
    ),
    "ElasticNet": Traits(
        ("l1", "l2"), minimal=True, choices={"decision_rule": ("EN", "L1", "L2")}, faults=_DRAW
    ),
    "DeepFool": Traits(("l2",), minimal=True, targeted=False, faults=_BLIND),
    "NewtonFool": Traits(("l2",), minimal=True, targeted=False, faults=_BLIND),
    "BrendelBethgeAttack": Traits(
        _LP,
        minimal=True,
        single=True,
        faults="no random image of the wanted label, no attack; compiles first; " + _DRAW,
    ),
    "SaliencyMapMethod": Traits(
        ("l0",),
        minimal=True,
        aims=True,
        faults="two best pixels, not the best pair; untargeted it gets random targets",
    ),
    "ShadowAttack": Traits(
        ("none",),
        single=True,
        aims=True,
        moves=True,
        channels=(1, 3),
        overrides={"batch_size": 1},
        keeps=("batch_size",),
        faults="any label given becomes its target: untargeted it gets random ones; divides its"
        " gradient twice by batch_size, so that 400 does nothing; 1 here",
    ),
    "Wasserstein": Traits(
        ("none",),
        single=True,
        choices={"ball": ("wasserstein", "1", "2", "inf")},
        overrides={"regularization": 100.0},
        keeps=("eps",),
        eps="",
        faults="overflows at its default regularization of 3000; 100 here; ε is its own"
        " setting and grows while it fails",
    ),
    "UniversalPerturbation": Traits(
        ("linf", "l2"),
        targeted=False,
        choices={"attacker": ("deepfool", "carlini", "carlini_inf", "ead", "fgsm", "bim", "pgd",
                              "newtonfool")},
        faults=_UNIVERSAL,
    ),
    "TargetedUniversalPerturbation": Traits(
        ("linf", "l2"),
        aims=True,
        choices={"attacker": ("fgsm",)},
        faults=_UNIVERSAL + " although targets differ; untargeted it gets random ones",
    ),
    "SpatialTransformation": Traits(
        ("none",),
        "labels",
        targeted=False,
        guard=_spatial,
        faults="one turn and shift for the whole batch; columns are taken for channels, so that"
        " it hardly shifts sideways",
    ),
    "VirtualAdversarialMethod": Traits(
        ("l2",),
        "scores",
        targeted=False,
        moves=True,
        faults="climbs the KL to its own prediction, even towards more confidence; a query per"
        " pixel",
    ),
    "ZooAttack": Traits(("l2",), "scores", minimal=True, single=True, guard=_zoo, faults=_DRAW),
    "SimBA": Traits(
        ("l2",),
        "scores",
        minimal=True,
        single=True,
        choices={"attack": ("dct", "px"), "order": ("random", "diag")},
        guard=_simba,
        faults=_DRAW,
    ),
    "PixelAttack": Traits(("l0",), "scores", eps="th", **_ES),
    "ThresholdAttack": Traits(("linf",), "scores", eps="th", **_ES),
    "BoundaryAttack": Traits(("l2",), "labels", minimal=True, faults=_BLIND),
    "HopSkipJump": Traits(("linf", "l2"), "labels", minimal=True, faults=_BLIND),
    "SignOPTAttack": Traits(
        ("l2",), "labels", minimal=True, targeted=False, drops=("eval_perform",), faults=_BLIND
    ),
    "GeoDA": Traits(("linf", "l2", "l1"), "labels", minimal=True, targeted=False, faults=_DRAW),
    "CompositeAdversarialAttackPyTorch": Traits(
        ("none",),
        targeted=False,
        channels=(3,),
        guard=_composite,
        choices={"attack_order": ("scheduled", "random", "fixed")},
        faults="ε are its own settings; " + _DRAW,
    ),
}  # fmt: skip

_REFUSED = {
    "makes one patch for many images and no x' per image": "AdversarialPatch"
    " AdversarialPatchNumpy AdversarialPatchPyTorch AdversarialPatchTensorFlowV2",
    "needs a TensorFlow model": "ProjectedGradientDescentTensorFlowV2 MalwareGDTensorFlow"
    " FeatureAdversariesTensorFlowV2",
    "needs a guide image per image and a layer of a sequential model": "FeatureAdversariesNumpy"
    " FeatureAdversariesPyTorch",
    "needs an object detector": "DPatch RobustDPatch OverloadPyTorch SNAL",
    "needs an object tracker": "AdversarialTexturePyTorch",
    "needs a speech recogniser": "CarliniWagnerASR ImperceptibleASR ImperceptibleASRPyTorch",
    "needs videos": "FrameSaliencyAttack OverTheAirFlickeringPyTorch",
    "needs tables of features and their importance": "LowProFool",
    "needs a decision tree": "DecisionTreeAttack",
    "needs a Gaussian process": "HighConfidenceLowUncertainty",
    "draws stickers on a photographed object, which needs its outline": "GRAPHITEBlackbox"
    " GRAPHITEWhiteboxPyTorch",
    "needs a generator of laser beams, which no setting can name": "LaserAttack",
}
TABLE |= {
    name: Traits(("none",), refusal=f"{reason}; robbench attacks image classifiers only")
    for reason, classes in _REFUSED.items()
    for name in classes.split()
}
_PACKAGES = {
    "BrendelBethgeAttack": "numba",
    "CompositeAdversarialAttackPyTorch": "kornia",
    "AutoAttack": "multiprocess",
}


def available(name: str) -> Traits:
    """Refused too: what lacks a package that ART does not declare, or needs an old NumPy."""
    package, reason = _PACKAGES.get(name), None
    if package and not _installed(package):
        reason = f"needs the package {package}; pip install {package}"
    if name == "GeoDA" and not hasattr(np, "mat"):
        reason = f"uses np.mat, which NumPy {np.__version__} no longer has; needs NumPy below 2"
    return replace(TABLE[name], refusal=reason) if reason else TABLE[name]
