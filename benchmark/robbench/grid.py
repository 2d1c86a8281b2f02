"""Grids: which cells are to be measured, as data, checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from robbench import defense as defenses
from robbench import registry
from robbench.attacks import Attack, Configured
from robbench.attacks.suite import MEANS
from robbench.cell import KINDS, MODEL, Cell, Draws, Kind, Setting, suite_digest
from robbench.checkpoints import Trained, common_rule
from robbench.datasets import Dataset
from robbench.errors import InputError, unknown
from robbench.registry import Spec, split_list
from robbench.siblings import RELATIONS, members_of, siblings
from robbench.threat import GOALS, Eps, Goal, Norm, Threat, check_budget, parse_norm

EOT = 20


def _items(value: object) -> object:
    """A list stays one, 'a,b(c=1, d=2)' is split at its outer commas, a scalar is one item."""
    if isinstance(value, str):
        return split_list(value)
    return value if isinstance(value, (list, tuple)) else [value]


def _by_norm(value: object) -> object:
    """ε of each norm; without norms the list is that of every norm, under the key ''."""
    return value if isinstance(value, dict) else {"": value}


def _defense(text: str) -> str:
    if not text.startswith(MODEL):
        spec = Spec.parse(text)
        defenses.resolve(spec.model_copy(update={"member": None}) if spec.member == "*" else spec)
    return text


def _oracle(text: str) -> str:
    if text in RELATIONS:
        return text
    name = Spec.parse(text).name if not text.startswith(MODEL) else ""
    if name and "&" not in name and name not in registry.defenses:
        raise unknown("oracle", name, [*registry.defenses, *RELATIONS])
    return _defense(text)


def _attack(text: str) -> str:
    Configured.of(text)
    return text


def _norm(value: object) -> object:
    return parse_norm(str(value)) if value != "" else value


def _setting(text: str) -> str:
    if text not in KINDS:
        raise unknown("setting", text, KINDS)
    return text


def _draws(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and value != "auto" and not number:
        raise InputError(f"{value} is no number of draws; write one from 1 on, or auto")
    return value


def _goal(value: object) -> object:
    if value not in GOALS:
        raise unknown("goal", str(value), GOALS)
    return value


def _target(value: object) -> str | int:
    text = str(value)
    if text not in ("none", "random", "least-likely") and not re.fullmatch(r"\d+", text):
        raise InputError(f"{text!r} is not a label; write a number, random or least-likely")
    return int(text) if text.isdecimal() else text


T = TypeVar("T")
Listed = Annotated[list[T], BeforeValidator(_items), Field(min_length=1)]
DefenseText = Annotated[str, AfterValidator(_defense)]
Budgets = Annotated[
    dict[Annotated[str, BeforeValidator(_norm)], Listed[Eps]], BeforeValidator(_by_norm)
]


class Block(BaseModel):
    """One block of a grid: every combination of its lists is a cell. Unset lists are defaults."""

    model_config = ConfigDict(extra="forbid")
    dataset: str = "digits"
    n: Annotated[int, Field(ge=1)] | None = None
    defense: Listed[DefenseText]
    attack: Listed[Annotated[str, AfterValidator(_attack)]]
    norm: Listed[Annotated[Norm, BeforeValidator(_norm)]] | None = None
    eps: Budgets | None = None
    setting: Listed[Annotated[Kind, BeforeValidator(_setting)]] | None = None
    oracle: Annotated[list[Annotated[str, AfterValidator(_oracle)]], BeforeValidator(_items)] = []
    eot: Annotated[Draws | None, BeforeValidator(_draws)] = None
    goal: Listed[Annotated[Goal, BeforeValidator(_goal)]] = ["error"]
    max_queries: Annotated[int, Field(ge=1)] | None = None
    target: Annotated[str | int, BeforeValidator(_target)] = "none"
    train_seed: Listed[int] = [0]
    seed: Listed[int] = [0]
    _place: str = PrivateAttr("")  # the file it was read from, for what only a dataset can tell
    _equal: dict[str, None] = PrivateAttr(default_factory=dict)  # why cells would be others again
    _without: dict[str, None] = PrivateAttr(default_factory=dict)  # why there are none of a kind

    @property
    def left_out(self) -> list[str]:
        """What was asked for and some defense has not, once the cells are made."""
        return list(self._without)

    @property
    def reasons(self) -> list[str]:
        """Why combinations gave no cell, once the cells are made."""
        return [*self._without, *self._equal]

    @model_validator(mode="after")
    def _possible(self) -> Block:
        """Refuse combinations that no dataset makes possible, all at once."""
        entries = [Configured.of(text).entry for text in self.attack]
        problems = [problem for entry in entries for problem in self._problems(entry)]
        if problems:
            raise InputError("; ".join(dict.fromkeys(problems)))
        return self

    def _problems(self, attack: Attack) -> Iterator[str]:
        queries = attack.needs != "gradients"
        if attack.suite and (self.setting or ["adaptive"]) != ["adaptive"]:
            yield (
                f"setting: {attack.name} is a suite of attacks in all settings; leave the setting"
                " out, or write adaptive"
            )
            return
        kinds = self.setting or (["blackbox"] if queries else ["whitebox", "adaptive"])
        if self.max_queries and (not queries or "blackbox" not in kinds):
            yield (
                "max_queries: it limits attacks that ask queries, in the setting blackbox; of a"
                " suite the budget does"
            )
        if self.eot is not None and not {"adaptive", "transfer"} & set(kinds) and not attack.suite:
            yield "eot: draws behind a gradient are for the settings adaptive and transfer"
        if self.target != "none" and "denial" in self.goal:
            yield "goal: denial is reached by any answer but the label, so it has no target"
        for kind in self.setting or []:
            if queries and kind in ("whitebox", "adaptive"):
                yield (
                    f"setting: {attack.name} only asks queries, so its setting is blackbox"
                    f" (or transfer), not {kind}"
                )
            if not queries and kind == "blackbox":
                yield (
                    f"setting: {attack.name} needs gradients, which the setting blackbox does not"
                    " give; use whitebox, adaptive or transfer, or a query attack such as"
                    " torchattacks:Square"
                )
            if kind == "transfer" and not self.oracle:
                yield "setting: transfer needs an oracle, such as oracle: standard"
        if self.target != "none" and not attack.targeted:
            yield f"target: {attack.name} cannot be targeted; leave the target out"
        known = sorted(attack.norms)
        for norm in self._norms(attack):
            if norm not in known:
                yield f"norm: {attack.name} cannot do the norm {norm}; it does {', '.join(known)}"
            for eps in self._listed(norm) or []:
                try:
                    check_budget(norm, eps)
                except InputError as error:
                    yield f"eps: {error}"

    def _norms(self, attack: Attack) -> Sequence[Norm]:
        return self.norm or ["linf" if "linf" in attack.norms else min(attack.norms)]

    def _listed(self, norm: Norm) -> Sequence[Fraction] | None:
        """ε given for a norm; None for the dataset's list."""
        if norm == "none" or self.eps is None:
            return None
        return self.eps.get(norm, self.eps.get(""))

    def cells(
        self,
        dataset: Dataset,
        preset: str | None = "quick",
        models: Mapping[str, Trained] = MappingProxyType({}),
    ) -> Iterator[Cell]:
        """The cells in reading order; what the dataset has not got is an InputError.

        preset: whose fields stand below those of every spec; None for specs that say all.
        models: the caller's own ones by the name that stands in `defense` and `oracle`.
        """
        try:
            yield from self._cells(dataset, preset, models)
        except InputError as error:
            raise InputError(f"{self._place}{error}") from None

    def _cells(
        self, dataset: Dataset, preset: str | None, models: Mapping[str, Trained]
    ) -> Iterator[Cell]:
        n = self.n if self.n is not None else min(500, len(dataset.test.y))
        dataset.check_count(n)

        def known(text: str) -> _Target:
            return _Target.of(text, preset, dataset.name, models)

        def listed(text: str) -> list[str]:
            return [text] if text.startswith(MODEL) else members_of(text, preset, dataset.name)

        targets = [known(each) for text in self.defense for each in listed(text)]
        attacks = [Configured.of(text) for text in self.attack]
        for attack, target in itertools.product(attacks, targets):
            related = [
                known(each)
                for text in self.oracle
                for each in (
                    self._related(text, target.text, dataset.name)
                    if text in RELATIONS
                    else listed(text)
                )
            ]
            oracles = list({oracle.text: oracle for oracle in related}.values())
            for setting in self._settings(attack, target, oracles, dataset.name):
                for threat in self._threats(attack, dataset, target):
                    for train_seed, seed in itertools.product(self.train_seed, self.seed):
                        cell = Cell(
                            dataset=dataset.name,
                            data=dataset.hash[:16],
                            n=n,
                            defense=target.text,
                            defense_version=target.version,
                            attack=str(attack.spec),
                            attack_version=attack.version,
                            threat=threat,
                            setting=setting,
                            train_seed=train_seed,
                            seed=seed,
                        )
                        if stages := cell.stages(models):
                            suite = {"suite": suite_digest(stages)}
                            changed = setting.model_copy(update=suite)
                            cell = cell.model_copy(update={"setting": changed})
                        yield cell

    def _related(self, text: str, target: str, dataset: str) -> list[str]:
        """The oracles in a relation to one target."""
        found = [] if target.startswith(MODEL) else siblings(target, dataset, text)
        if not found:
            self._without[f"{defenses.shown(target, dataset)} has no {text}"] = None
        return found

    def _settings(
        self, attack: Configured, target: _Target, oracles: Sequence[_Target], dataset: str
    ) -> Iterator[Setting]:
        queries = attack.entry.needs != "gradients"
        default: list[Kind] = ["blackbox"] if queries else ["whitebox", "adaptive"]
        draws: Any = self.eot or EOT
        if attack.entry.suite:
            default = ["adaptive"]
            means = MEANS[attack.settings["budget"]]  # type: ignore[index]
            draws = self.eot or means.eot
        for kind in self.setting or default:
            if kind == "transfer":
                for oracle in oracles:
                    if oracle.text == target.text:
                        self._equal["an oracle is not transferred to itself"] = None
                    else:
                        eot = draws if oracle.stochastic else 1
                        yield Setting(
                            kind=kind, oracle=oracle.text, oracle_version=oracle.version, eot=eot
                        )
            elif kind == "adaptive":
                if target.adaptive or attack.entry.suite:
                    eot = draws if target.stochastic else 1
                    yield Setting(kind=kind, eot=eot)
                else:
                    name = defenses.shown(target.text, dataset)
                    self._equal[
                        f"{name} is deterministic and has no loss of its own: its adaptive cell"
                        " equals whitebox"
                    ] = None
            else:
                yield Setting(kind=kind, queries=self.max_queries if kind == "blackbox" else None)

    def _threats(self, attack: Configured, dataset: Dataset, target: _Target) -> Iterator[Threat]:
        labels = len(dataset.labels)
        if isinstance(self.target, int) and self.target >= labels:
            raise InputError(
                f"target = {self.target}, but labels of {dataset.name} are 0 to {labels - 1}"
            )
        goals = [goal for goal in self.goal if goal == "error" or target.abstains]
        if len(goals) < len(self.goal):
            name = defenses.shown(target.text, dataset.name)
            self._without[f"{name} always answers, so that it has no denial"] = None
        for norm, goal in itertools.product(self._norms(attack.entry), goals):
            for eps in self._eps(norm, dataset):
                yield Threat(norm=norm, eps=eps, target=self.target, goal=goal)

    def _eps(self, norm: Norm, dataset: Dataset) -> Sequence[Fraction | None]:
        if norm == "none":
            return [None]
        listed = self._listed(norm)
        if listed is None and norm not in dataset.eps:
            raise InputError(f"dataset {dataset.name} has no default ε for {norm}; give --eps")
        return listed if listed is not None else dataset.eps[norm]


def block(**fields: object) -> Block:
    """A block of these keys, those that are None left out; all mistakes in one InputError."""
    try:
        return Block(**{key: value for key, value in fields.items() if value is not None})
    except ValidationError as error:
        raise InputError("; ".join(invalid(error))) from None


class _Target(BaseModel):
    """A defense as a grid needs it."""

    text: str
    version: str
    stochastic: bool
    adaptive: bool
    abstains: bool

    @classmethod
    def of(
        cls, text: str, preset: str | None, dataset: str, models: Mapping[str, Trained]
    ) -> _Target:
        if text in models:
            stochastic = models[text].deployed.stochastic
            adaptive = stochastic or bool(models[text].losses)
            return cls(
                text=text,
                version="1",
                stochastic=stochastic,
                adaptive=adaptive,
                abstains=models[text].deployed.rule.abstains,
            )
        spec = defenses.with_preset(text, preset, dataset)
        parts = defenses.resolve(spec)
        stochastic = any(part.stochastic for part in parts)
        return cls(
            text=str(spec),
            version=defenses.version_of(spec),
            stochastic=stochastic,
            adaptive=stochastic or defenses.known_attack(parts),
            abstains=bool(parts[0].detector) or common_rule(parts).abstains,
        )


def nothing(blocks: Iterable[Block]) -> InputError:
    """What to say where blocks made no cell at all."""
    reasons = dict.fromkeys(reason for block in blocks for reason in block.reasons)
    return InputError(f"nothing to run: {'; '.join(reasons)}")


def read_blocks(path: Path) -> list[Block]:
    """Blocks of a YAML file: either one block, or defaults with a list `grid` of blocks.

    All mistakes are reported at once, each with its file and key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        place = f"{path}: grid[{index}]: " if len(entries) > 1 else f"{path}: "
        try:
            block = Block(**{**data, **entry})
        except ValidationError as error:
            problems += [f"{place}{problem}" for problem in invalid(error)]
        else:
            block._place = place
            blocks.append(block)
    if problems:
        raise InputError("; ".join(dict.fromkeys(problems)))
    return blocks


def invalid(error: ValidationError) -> Iterator[str]:
    """What is wrong with a block, a line for each key."""
    for problem in error.errors():
        # the message quotes the item, its number in the list would only puzzle
        place = [part for part in problem["loc"] if isinstance(part, str)]
        key = ".".join(part for part in place if part not in ("", "[key]"))
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield str(unknown("key", key, Block.model_fields))
        elif problem["type"] == "missing":
            yield f"{key} is missing"
        elif problem["type"] == "too_short":
            yield f"{key} is empty"
        elif problem["type"] == "value_error":
            yield f"{key}: {text}" if key else text
        else:
            yield f"{key} = {problem['input']!r}: {text}"
