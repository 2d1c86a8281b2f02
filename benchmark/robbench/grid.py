"""Cells and grids: what is to be measured, as data, checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from robbench import defense as defenses
from robbench.attacks import Configured
from robbench.datasets import Dataset
from robbench.errors import InputError, unknown
from robbench.registry import Spec, split_list
from robbench.threat import Norm, Threat, check_budget, parse_eps, parse_norm

Kind = Literal["whitebox", "adaptive", "transfer", "blackbox"]
KINDS: tuple[Kind, ...] = ("whitebox", "adaptive", "transfer", "blackbox")
EOT = 20


class Setting(BaseModel):
    """What the attacker has; eot counts the draws behind each gradient."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    oracle: str | None = None
    eot: int = 1

    def __str__(self) -> str:
        oracle = f" from {self.oracle}" if self.oracle else ""
        return f"{self.kind}{oracle}" + (f" EOT {self.eot}" if self.eot > 1 else "")


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
        return f"{self.defense} · {self.attack} · {self.threat} · {self.setting}"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _items(value: object) -> object:
    """A list stays one, 'a,b(c=1, d=2)' is split at its outer commas, a scalar is one item."""
    if isinstance(value, str):
        return split_list(value)
    return value if isinstance(value, (list, tuple)) else [value]


def _texts(value: object) -> object:
    items = _items(value)
    return [str(item) if isinstance(item, (int, float)) else item for item in items]  # type: ignore[attr-defined]


Texts = Annotated[list[str], BeforeValidator(_texts)]
Numbers = Annotated[list[int], BeforeValidator(_items)]


class Block(BaseModel):
    """One block of a grid: every combination of its lists is a cell. Unset lists are defaults."""

    model_config = ConfigDict(extra="forbid")
    dataset: str = "digits"
    n: Annotated[int, Field(ge=1)] | None = None
    defense: Texts
    attack: Texts
    norm: Texts | None = None
    eps: Texts | dict[str, Texts] | None = None
    setting: Texts | None = None
    oracle: Texts = []
    eot: Annotated[int, Field(ge=1)] = EOT
    target: str = "none"
    train_seed: Numbers = [0]
    seed: Numbers = [0]

    def cells(self, dataset: Dataset, preset: str = "quick") -> Iterator[Cell]:
        """The cells in reading order; the first impossible combination is an InputError."""
        n = self.n if self.n is not None else min(500, len(dataset.test.y))
        dataset.subset(n)
        targets = [_Target.of(text, preset, dataset.name) for text in self.defense]
        oracles = [_Target.of(text, preset, dataset.name) for text in self.oracle]
        attacks = [Configured.of(text) for text in self.attack]
        for attack, target in itertools.product(attacks, targets):
            for setting in self._settings(attack, target, oracles):
                for threat in self._threats(attack, dataset):
                    for train_seed, seed in itertools.product(self.train_seed, self.seed):
                        yield Cell(
                            dataset=dataset.name,
                            data=dataset.hash[:16],
                            n=n,
                            defense=target.text,
                            defense_version=target.version,
                            attack=str(attack.spec),
                            attack_version=attack.entry.version,
                            threat=threat,
                            setting=setting,
                            train_seed=train_seed,
                            seed=seed,
                        )

    def _settings(
        self, attack: Configured, target: _Target, oracles: Sequence[_Target]
    ) -> Iterator[Setting]:
        queries = attack.entry.needs != "gradients"
        default = ["blackbox"] if queries else ["whitebox", "adaptive"]
        for kind in self.setting or default:
            if kind not in KINDS:
                raise unknown("setting", kind, KINDS)
            if queries and kind in ("whitebox", "adaptive"):
                raise InputError(
                    f"{attack.entry.name} only asks queries, so its setting is blackbox"
                    f" (or transfer), not {kind}"
                )
            if not queries and kind == "blackbox":
                raise InputError(
                    f"{attack.entry.name} needs gradients, which the setting blackbox does not"
                    " give; use whitebox, adaptive or transfer, or a query attack such as"
                    " torchattacks:Square"
                )
            if kind == "transfer":
                if not oracles:
                    raise InputError("the setting transfer needs --oracle, such as standard")
                for oracle in oracles:
                    if oracle.text != target.text:
                        eot = self.eot if oracle.stochastic else 1
                        yield Setting(kind=kind, oracle=oracle.text, eot=eot)
            elif kind == "adaptive":
                if target.adaptive:
                    yield Setting(kind=kind, eot=self.eot if target.stochastic else 1)
            else:
                yield Setting(kind=kind)

    def _threats(self, attack: Configured, dataset: Dataset) -> Iterator[Threat]:
        known = sorted(attack.entry.norms)
        default = "linf" if "linf" in known else known[0]
        target = int(self.target) if self.target.lstrip("-").isdigit() else self.target
        if target != "none" and not attack.entry.targeted:
            raise InputError(f"{attack.entry.name} cannot be targeted; leave --target out")
        for text in self.norm or [default]:
            norm = parse_norm(text)
            if norm not in known:
                raise InputError(
                    f"{attack.entry.name} cannot do the norm {norm}; it does {', '.join(known)}"
                )
            for eps in self._eps(norm, dataset):
                check_budget(norm, eps)
                yield _threat(norm, eps, target)

    def _eps(self, norm: Norm, dataset: Dataset) -> Sequence[Fraction | None]:
        if norm == "none":
            return [None]
        listed = self.eps
        if isinstance(listed, dict):
            listed = listed.get(norm)
        if listed is not None:
            return [parse_eps(text) for text in listed]
        if norm not in dataset.eps:
            raise InputError(f"dataset {dataset.name} has no default ε for {norm}; give --eps")
        return dataset.eps[norm]


def _threat(norm: Norm, eps: Fraction | None, target: str | int) -> Threat:
    try:
        return Threat(norm=norm, eps=eps, target=target)  # type: ignore[arg-type]
    except ValidationError:
        raise InputError(
            f"target = {target!r} is not a label; write a number, random or least-likely"
        ) from None


class _Target(BaseModel):
    """A defense as a grid needs it."""

    text: str
    version: str
    stochastic: bool
    adaptive: bool

    @classmethod
    def of(cls, text: str, preset: str, dataset: str) -> _Target:
        spec = defenses.with_preset(text, preset, dataset)
        parts = defenses.resolve(spec)
        stochastic = any(part.stochastic for part in parts)
        return cls(
            text=str(spec),
            version="&".join(str(part.version) for part in parts),
            stochastic=stochastic,
            adaptive=stochastic or any(part.losses for part in parts),
        )


def read_blocks(path: Path) -> list[Block]:
    """Blocks of a YAML file: either one block, or defaults with a list `grid` of blocks.

    All mistakes are reported at once, each with its file and key.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the grid {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"the grid {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"the grid {path} must be a mapping with keys such as defense and attack")
    entries = data.pop("grid", None)
    if entries is None:
        entries = [{}]
    problems, blocks = [], []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: grid must be a list of mappings")
    for index, entry in enumerate(entries):
        try:
            blocks.append(Block(**{**data, **entry}))
        except ValidationError as error:
            place = f"{path}: grid[{index}]" if len(entries) > 1 else str(path)
            problems += [f"{place}: {problem}" for problem in _problems(error)]
    if problems:
        raise InputError("; ".join(dict.fromkeys(problems)))
    return blocks


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield str(unknown("key", key, Block.model_fields))
        elif problem["type"] == "missing":
            yield f"{key} is missing"
        else:
            yield f"{key} = {problem['input']!r}: {problem['msg']}"


