"""Every class of torchattacks 3.5 (Kim 2020, arXiv:2010.01950) as `torchattacks:NAME`.

Differences to the library as it is: step sizes default to 2.5 ε / steps instead of a constant that
ignores ε, the number of labels is the defense's, seeds come from the run instead of being 0 for
every batch, and what is known to be wrong is refused (see `faults` and the guards).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robbench.attacks import Attack
from robbench.attacks.library import Job, Traits, arguments, attack_of
from robbench.errors import unknown

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_ONE_DRAW = "one draw of the defense per step"


def _negative(job: Job) -> str | None:
    """CW and EAD take a maximum with 0 where a masked-out logit was meant (issue 184)."""
    with torch.no_grad():
        best = job.access.scores(job.x.to(job.access.device)).amax(dim=1)
    if bool((best < 0).any()):
        return (
            f"all logits of {int((best < 0).sum())} images are negative, where its margin is"
            " always 0 and it does nothing; use art:CarliniL2Method or art:ElasticNet"
        )
    return None


def _cw(job: Job) -> str | None:
    binary = ((job.x == 0) | (job.x == 1)).flatten(1).all(dim=1)
    if bool(binary.any()):
        return (
            f"every pixel of {int(binary.sum())} images is 0 or 1, which its change of variables"
            " cannot move; use art:CarliniL2Method"
        )
    return _negative(job)


def _ead(job: Job) -> str | None:
    if job.settings["abort_early"] and job.settings["max_iterations"] < 10:
        return "max_iterations below 10 divides by zero; write at least 10 or abort_early=false"
    return _negative(job)


def _jsma(job: Job) -> str | None:
    labels, pixels = job.access.deployed.labels, job.x[0].numel()
    if job.target is None and labels != 10:
        return f"untargeted it aims at (label + 1) % 10, the defense has {labels} labels"
    if pixels > 3 * 32 * 32:
        return f"it holds matrices of {pixels} x {pixels}; images up to 3x32x32 fit"
    return None


def _dlr(job: Job) -> str | None:
    needed = {"dlr": 3 if job.target is None else 4, "rand": 3, "standard": 4, "plus": 4}
    mode = job.settings.get("version") or job.settings.get("loss")
    labels = job.access.deployed.labels
    if labels < needed.get(mode, 0):  # type: ignore[arg-type]
        return f"{mode} needs at least {needed[mode]} labels, the defense has {labels}"  # type: ignore[index]
    return None


def _sign(faults: str = _ONE_DRAW, **traits: Any) -> Traits:
    """Iterated steps of length alpha inside the ball: the family of PGD."""
    shared: dict[str, Any] = {"moves": True, "step": "alpha", "steps": "steps", "faults": faults}
    return Traits(**shared | traits)


_FREEZES = "a zero gradient becomes NaN in its momentum and stops the image for good"
_THREE: dict[str, Any] = {"channels": (3,)}
_EAD: dict[str, Any] = {
    "minimal": True,
    "decimals": ("kappa",),
    "guard": _ead,
    "faults": "kappa is added to the labels of all batch mates; the reference image can move, out"
    " of the box too: clipped here",
}

TABLE: dict[str, Traits] = {
    "VANILA": Traits(("none",), "labels", targeted=False, faults="returns the image itself"),
    "GN": Traits(("none",), "labels", targeted=False, moves=True, faults="noise, no attack"),
    "FGSM": Traits(moves=True, faults=_ONE_DRAW),
    "BIM": _sign(),
    "RFGSM": _sign(),
    "PGD": _sign(),
    "PGDL2": _sign(norms=("l2",)),
    "EOTPGD": _sign("2 draws per step by default; returns the last iterate"),
    "FFGSM": _sign(steps="", pace=1.25),
    "TPGD": _sign("maximises the KL to its own prediction, blind to the label", targeted=False),
    "MIFGSM": _sign(_FREEZES),
    "NIFGSM": _sign(_FREEZES),
    "SINIFGSM": _sign(_FREEZES),
    "VMIFGSM": _sign(_FREEZES, decimals=("beta",)),
    "VNIFGSM": _sign(_FREEZES, decimals=("beta",)),
    "DIFGSM": _sign(_FREEZES),
    "TIFGSM": _sign(_FREEZES + "; hard-wired to 3 channels", decimals=("nsig",), **_THREE),
    "Jitter": _sign(decimals=("scale",)),
    "PGDRS": _sign("attacks the mean over Gaussian noise of deviation 0.5"),
    "PGDRSL2": _sign("attacks the mean over Gaussian noise of deviation 0.5", norms=("l2",)),
    "UPGD": _sign(
        _FREEZES + "; loss margin is wrong for negative logits",
        choices={"loss": ("ce", "dlr", "margin")},
        guard=_dlr,
    ),
    "PIFGSM": Traits(eps="max_epsilon", targeted=False, moves=True, faults=_ONE_DRAW, **_THREE),
    "PIFGSMPP": Traits(eps="max_epsilon", moves=True, faults=_ONE_DRAW, **_THREE),
    "SPSA": Traits(
        needs="scores",
        targeted=False,
        faults="1 step of 0.01 by default; one direction for the whole batch; targeted it would"
        " aim at the true label",
    ),
    "APGD": Traits(
        ("linf", "l2"),
        targeted=False,
        choices={"loss": ("ce", "dlr")},
        guard=_dlr,
        faults="10 steps by default; the last draw decides success",
    ),
    "APGDT": Traits(
        ("linf", "l2"),
        targeted=False,
        labels=4,
        faults="10 steps by default; the last draw decides success",
    ),
    "FAB": Traits(
        ("linf", "l2"),
        targeted=False,
        faults="10 steps by default; its targeted mode mixes up the targets of a batch",
    ),
    "Square": Traits(
        ("linf", "l2"),
        "scores",
        choices={"loss": ("margin", "ce")},
        faults="keeps the minimum of a noisy margin; one draw decides success; gives back the"
        " image itself where it fails",
    ),
    "AutoAttack": Traits(
        ("linf", "l2"),
        targeted=False,
        choices={"version": ("standard", "plus", "rand")},
        guard=_dlr,
        faults="not AutoAttack: APGD, APGD-T and FAB run 10 steps instead of 100",
    ),
    "CW": Traits(
        ("l2",),
        minimal=True,
        decimals=("c", "kappa"),
        guard=_cw,
        faults="no search for c; pixels at 0 and 1 never move; stops by the sum over the batch",
    ),
    "DeepFool": Traits(
        ("l2",),
        minimal=True,
        targeted=False,
        faults="ends so near the boundary that rounding decides, write overshoot=0.2; stops at"
        " the first draw that errs",
    ),
    "EADL1": Traits(("l1",), **_EAD),
    "EADEN": Traits(("l1", "l2"), **_EAD),
    "SparseFool": Traits(
        ("l0",),
        minimal=True,
        targeted=False,
        decimals=("lam",),
        faults="stops at the first draw that errs",
    ),
    "JSMA": Traits(
        ("l0",),
        minimal=True,
        guard=_jsma,
        faults="untargeted it aims at (label + 1) % 10; seconds per image",
    ),
    "OnePixel": Traits(("l0",), "scores", eps="pixels", faults="10 generations by default"),
    "Pixle": Traits(
        ("l0",),
        "scores",
        minimal=True,
        single=True,
        choices={
            "pixel_mapping": (
                "random", "similarity", "similarity_random", "distance", "distance_random"
            )
        },
        faults="stops at the first draw that errs",
    ),
    "LGV": Traits(
        refusal="trains copies of the defense on data that an attack is not given; train"
        " surrogates and use the transfer setting"
    ),
    "MultiAttack": Traits(
        refusal="is a list of other attacks; run them one by one"
    ),
}  # fmt: skip
_MAPPED = ("Jitter", "UPGD")  # these need the true labels next to the targets
_UNBOXED = ("EADEN", "EADL1")


def names() -> list[str]:
    """All classes of the library, those that are refused too."""
    return sorted(TABLE)


def find(name: str) -> Attack:
    """The attack of this class; the library is imported here and not before."""
    if name not in TABLE:
        raise unknown("torchattacks attack", name, TABLE)
    import torchattacks

    constructor = getattr(torchattacks, name)

    def craft(job: Job) -> Tensor:
        return _craft(name, constructor, job)

    return attack_of("torchattacks", name, constructor, TABLE[name], craft, r"torchattacks(\.|$)")


def _craft(name: str, constructor: Any, job: Job) -> Tensor:
    traits = TABLE[name]
    norm = _NORMS.__getitem__ if len(traits.norms) > 1 and name != "EADEN" else None
    values = arguments(job, traits, norm)
    if name in ("APGD", "APGDT", "FAB", "Square", "AutoAttack"):
        values["seed"] = job.seed
    if name in ("APGDT", "FAB", "AutoAttack"):
        values["n_classes"] = job.access.deployed.labels
    attack = constructor(job.access, **values)
    attack.set_device(job.access.device)
    labels = job.y
    if job.target is not None and name in _MAPPED:
        targets = job.target.to(job.access.device)
        attack.set_mode_targeted_by_function(lambda images, labels: targets, quiet=True)
    elif job.target is not None:
        attack.set_mode_targeted_by_label(quiet=True)
        labels = job.target
    adversarial: Tensor = attack(job.x, labels)
    return adversarial.clamp(0, 1) if name in _UNBOXED else adversarial
