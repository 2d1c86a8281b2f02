"""`NAME:as-published`: the attacks of the five papers with their settings, weaknesses included.

They are there so that a table can be reproduced, and to be compared with the attacks that have the
plain names. What is deliberately kept: the label that the model guesses in place of the true one,
steps that add up to ε and no more, the last iterate, one draw, a search that stops early. What is
not: arrays that overwrite each other, boxes of the wrong data, one-hot vectors of ± 1/2, and images
that are left out of the count - with those no number says anything about an attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from torch import Generator, Tensor

# the modules of the plain names, so that they are registered before their variants
import robbench.attacks.carlini_wagner
import robbench.attacks.carlini_wagner_linf
import robbench.attacks.corruptions
import robbench.attacks.deepfool
import robbench.attacks.elastic_net
import robbench.attacks.gradient
import robbench.attacks.jsma
import robbench.attacks.line_search
import robbench.attacks.local_search
import robbench.attacks.spsa  # noqa: F401
from robbench import registry
from robbench.access import Access
from robbench.attacks import Attack, Configured, find
from robbench.errors import InputError
from robbench.registry import Spec
from robbench.threat import Threat

PREDICTED = {"label": "predicted"}
# ten steps of ε / 10: the surface of the ball is reached by a straight line alone
TENTHS: Mapping[str, Any] = {"steps": 10, "pace": Fraction(1, 10), "keep": "last", **PREDICTED}
ADP_PENALTY = {"search": 1, "steps": 1000, "lr": 0.01, "confidence": 0.1, **PREDICTED}

# of variants that once ran otherwise; all others have their attack's
VERSIONS = {"jsma": 2, "deepfool": 2, "local-search": 2, "fgsm-line-search": 2}

# Attack -> paper -> settings. pace: the step in ε. target: the rule of an untargeted threat. once:
# as many steps as there are features to be changed, and no more. lucky: one draw that errs ends the
# search. Of a list of losses the first that the defense has. Sources: the texts, and where they say
# nothing the code that their authors released.
TABLE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fgsm": {
        "enresnet": {"loss": "ce"},
        "adp": {"loss": "ce", **PREDICTED},
        "mmc": {"loss": "ce", **PREDICTED},
        "rce": {"loss": "ce", **PREDICTED},
        "pdd": {"loss": "ce", **PREDICTED},
    },
    "bim": {
        "enresnet": {"steps": 20, "step": "2/255", "loss": "ce", "keep": "last"},
        "adp": {**TENTHS, "loss": "ce"},
        "rce": {**TENTHS, "loss": "ce"},
        "pdd": {**TENTHS, "loss": "ce"},
    },
    "pgd": {
        "adp": {**TENTHS, "loss": "ce"},
        "mmc": {
            "steps": 10, "step": "1/128", "keep": "last", "loss": ["distance", "ce"], **PREDICTED
        },
        "mixup-inference": {
            "steps": 10, "step": "2/255", "keep": "last", "loss": "ce", **PREDICTED
        },
        "pdd": {**TENTHS, "loss": "ce"},
    },
    "mim": {"adp": {**TENTHS, "loss": "ce"}},
    "ilcm": {"rce": {"steps": 10, "pace": Fraction(1, 10), "keep": "last", "loss": "ce"}},
    "jsma": {
        "adp": {"theta": -0.1, "pairs": False, "gamma": 0.05, "targets": 1, "once": True},
        "rce": {"theta": 0.1, "pairs": False, "steps": 100, "gamma": 1.0,
                "target": "least-likely"},
        "pdd": {"theta": 0.1, "gamma": 0.05, "target": "random", "once": True},
    },
    "cw": {
        "adp": {**ADP_PENALTY, "c": 0.01},
        "mmc": {"search": 9, "steps": 1000, "lr": 0.005, "c": 0.01, **PREDICTED},
        "rce": {"search": 9, "steps": 10, "lr": 0.01, "c": 1.0, "target": "random"},
        "pdd": {"search": 5, "steps": 1000, "lr": 0.01, "c": 0.01, "confidence": 0.01},
        "mixup-inference": {**ADP_PENALTY, "c": 0.01},
    },
    "ead": {"adp": {**ADP_PENALTY, "c": 1.0, "beta": 0.01}},
    "cw-linf": {"enresnet": {"form": "released"}},
    "deepfool": {"sdr": {"steps": 100, "lucky": True}},
    "local-search": {"sdr": {"p": 10.0, "undo": False, "rest": 0, "lucky": True}},
    "fgsm-line-search": {"sdr": {"loss": "ce", "lucky": True}},
    "spsa": {"mmc": {"steps": 10, "samples": 128, "delta": 0.01, "lr": 0.01}},
    "gaussian-noise": {"mmc": {"sigma": 0.05}},
    "rotation": {"mmc": {"degrees": 30.0}},
}  # fmt: skip


def _variant(name: str, papers: Mapping[str, Mapping[str, Any]]) -> Attack:
    base = find(name)
    first = next(iter(papers))

    def run(
        access: Access,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        rng: Generator,
        *,
        paper: str = first,
        **changed: Any,
    ) -> Tensor:
        given = {key: value for key, value in changed.items() if value is not None}
        settings = {**papers[paper], **given}
        if "pace" in settings:
            if threat.eps is None:
                raise InputError(f"attack {name}:as-published: its steps are shares of ε; give one")
            settings.setdefault("step", str(threat.eps * settings.pop("pace")))
        if settings.pop("once", False):
            per_step = 1 + settings.get("pairs", True)
            changed_at_most = int(settings["gamma"] * x[0].numel() + 1e-9)
            settings.setdefault("steps", max(1, changed_at_most // per_step))
        access.lucky = settings.pop("lucky", False)
        if "target" in settings:
            rule = settings.pop("target")
            threat = threat if threat.targeted else threat.model_copy(update={"target": rule})
        if isinstance(settings.get("loss"), list):
            known = {*access.losses, "ce"}
            settings["loss"] = next(loss for loss in settings["loss"] if loss in known)
        attack = Configured.of(Spec(name=name, settings=tuple(sorted(settings.items()))))
        return attack(access, x, y, threat, rng)

    return replace(
        base,
        inner=None,
        name=f"{name}:as-published",
        version=VERSIONS.get(name, base.version),
        run=run,
        faults="as the papers ran it; the plain name is the attack to use",
        open_settings=_settings(name, base.settings, tuple(papers)),
    )


def effective(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """All settings that a variant runs with, those of its attack that nobody changed too."""
    plain = name.removesuffix(":as-published")
    given = {key: value for key, value in settings.items() if value is not None and key != "paper"}
    return {**Configured.of(plain).settings, **TABLE[plain][settings["paper"]], **given}


def in_effect(attack: Configured) -> Mapping[str, Any]:
    """All settings that an attack runs with, a variant's those of its paper."""
    variant = attack.entry.name.endswith(":as-published")
    return effective(attack.entry.name, attack.settings) if variant else attack.settings


def _settings(name: str, base: type[BaseModel], papers: tuple[str, ...]) -> type[BaseModel]:
    """Which paper, and the attack's own settings where they shall differ from it."""
    fields: dict[str, Any] = {"paper": (Literal[papers], papers[0])}
    for key, field in base.model_fields.items():
        kind: Any = field.annotation
        for limit in field.metadata:
            kind = Annotated[kind, limit]
        fields[key] = (kind | None, None)
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(f"{name}:as-published settings", __config__=config, **fields)


for _name, _papers in TABLE.items():
    _made = _variant(_name, _papers)
    registry.attacks.add(_made.name, _made)
