"""A cell: one number to be measured, and what its attacker has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from robbench import defense as defenses
from robbench.attacks import Configured
from robbench.attacks.suite import MEANS, Budget, Stage, compose, distinct, frozen
from robbench.checkpoints import Trained
from robbench.siblings import RELATIONS, siblings
from robbench.threat import Threat

Kind = Literal["whitebox", "adaptive", "transfer", "blackbox"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Draws = int | Literal["auto"]
MODEL = "model:"  # begins the name of a model of the caller, which no registry knows


class Setting(BaseModel):
    """What the attacker has; eot counts the draws behind each gradient (auto: chosen by evidence),
    queries limits those of each image, suite is the digest of all that a suite is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    oracle: str | None = None
    oracle_version: str = "1"
    eot: Draws = 1
    queries: int | None = None
    suite: str = ""

    def __str__(self) -> str:
        oracle = f" from {self.oracle}" if self.oracle else ""
        draws = f" EOT {self.eot}" if self.eot != 1 else ""
        limit = f" {self.queries} queries" if self.queries else ""
        return f"{self.kind}{oracle}{draws}{limit}"


class Cell(BaseModel):
    """One number to be measured. data is the start of the dataset's hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dataset: str
    data: str
    n: int
    defense: str
    defense_version: str
    attack: str
    attack_version: int
    threat: Threat
    setting: Setting
    train_seed: int = 0
    seed: int = 0

    def canonical(self) -> dict[str, Any]:
        """What differs from the defaults, so that a new neutral field orphans no record."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def id(self) -> str:
        return _digest(self.canonical())

    @property
    def source(self) -> str:
        """The defense that the attack works on: the oracle's, or the target itself."""
        return self.setting.oracle or self.defense

    @property
    def place(self) -> str:
        """The id without the suite: a record of an older suite makes room for one of the newer."""
        setting = self.setting.model_copy(update={"suite": ""})
        return self.model_copy(update={"setting": setting}).id

    def stages(self, models: Mapping[str, Trained] = MappingProxyType({})) -> list[Stage]:
        """Of the suite that the attack runs, those on an oracle with its spec; none for another
        attack. models: the caller's own by their names."""
        attack = Configured.of(self.attack)
        if not attack.entry.suite:
            return []
        budget: Any = attack.settings["budget"]
        if self.defense.startswith(MODEL):
            found = _suite_of_model(models[self.defense], budget)
        else:
            found = []
            for stage in defenses.suite_of(self.defense, budget):
                related: list[str | None] = [stage.oracle]
                if stage.oracle in RELATIONS:
                    related = list(siblings(self.defense, self.dataset, stage.oracle))
                found += [replace(stage, oracle=oracle) for oracle in related]
        if self.threat.goal == "denial":
            found.insert(0, Stage(f"apgd(loss=denial, steps={MEANS[budget].steps})"))
        return distinct(found)

    def sources(self, models: Mapping[str, Trained] = MappingProxyType({})) -> list[str]:
        """All defenses that the attack works on."""
        oracles = [stage.oracle for stage in self.stages(models) if stage.oracle]
        return list(dict.fromkeys([self.source, *oracles]))

    def attack_key(self) -> str:
        """Cells with the same key share x': a minimum-norm attack at every ε, a transfer attack
        for every target of an oracle."""
        fields = self.canonical()
        if Configured.of(self.attack).entry.minimal:
            fields["threat"].pop("eps", None)
        if self.setting.oracle:
            fields.pop("defense_version")
            fields["defense"] = "any"
        return _digest(fields)

    def __str__(self) -> str:
        setting = self.setting
        if setting.oracle:
            oracle = defenses.shown(setting.oracle, self.dataset)
            setting = setting.model_copy(update={"oracle": oracle})
        defense = defenses.shown(self.defense, self.dataset)
        return f"{defense} · {self.attack} · {self.threat} · {setting}"


def _suite_of_model(model: Trained, budget: Budget) -> list[Stage]:
    """The suite that suits a model of the caller, which has no siblings."""
    deployed = model.deployed
    fixed = [frozen(budget)] if deployed.stochastic else []
    return compose(
        list(model.losses),
        budget,
        members=len(deployed.members),
        stochastic=deployed.stochastic,
        own=fixed,
    )


def suite_digest(stages: Sequence[Stage]) -> str:
    """Of all that decides what a suite computes: attacks and oracles with their versions."""
    made = [
        (
            stage.attack,
            Configured.of(stage.attack).version,
            stage.oracle,
            stage.oracle and defenses.version_of(stage.oracle),
        )
        for stage in stages
    ]
    return _digest({"stages": made})[:12]


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
