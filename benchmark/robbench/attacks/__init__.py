"""Attacks: what one is, how it is registered, and how a spec becomes one that runs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Generator, Tensor

from robbench import registry
from robbench.access import Access
from robbench.errors import InputError, unknown
from robbench.registry import Spec
from robbench.threat import Norm, Threat

Needs = Literal["gradients", "scores", "labels"]
Run = Callable[..., Tensor]  # (access, x, y, threat, rng, **settings) -> x'
R = TypeVar("R", bound=Run)
LIBRARIES = ("torchattacks", "art")


@dataclass(frozen=True)
class Attack:
    """A registered attack: its function and what it can do and needs.

    minimal: searches the smallest perturbation and is read at every ε. suite: runs the stages that
    the attacked defense names. diagnostic: says something about an estimator or about another
    attack, so that its records stand in the audit and in no table of accuracies. inner: specs of
    the attacks that it is made of, by its settings. faults: known defects, as `list attacks` shows
    them. refusal: why it cannot be believed at all, None where it can.
    """

    name: str
    run: Run
    norms: frozenset[Norm]
    needs: Needs = "gradients"
    minimal: bool = False
    targeted: bool = True
    version: int = 1
    faults: str = ""
    refusal: str | None = None
    suite: bool = False
    diagnostic: bool = False
    inner: Callable[[Mapping[str, Any]], Sequence[str]] | None = field(default=None, compare=False)
    open_settings: type[BaseModel] | None = field(default=None, compare=False)

    @cached_property
    def settings(self) -> type[BaseModel]:
        """The pydantic model of the function's keyword-only parameters."""
        if self.open_settings:
            return self.open_settings
        fields: dict[str, Any] = {
            parameter.name: (parameter.annotation, parameter.default)
            for parameter in inspect.signature(self.run, eval_str=True).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        config = ConfigDict(extra="forbid", frozen=True)
        return create_model(f"{self.name} settings", __config__=config, **fields)


def attack(
    name: str, *, norms: tuple[Norm, ...], aliases: tuple[str, ...] = (), **traits: Any
) -> Callable[[R], R]:
    """Register `fn(access, x, y, threat, rng, *, settings…) -> x'` under its name and aliases."""

    def register(run: R) -> R:
        entry = Attack(name, run, frozenset(norms), **traits)
        for key in (name, *aliases):
            registry.attacks.add(key, entry)
        return run

    return register


def find(name: str) -> Attack:
    """The attack of this name: native, plugin, or a class of a library as `torchattacks:NAME`."""
    library, colon, inner = name.partition(":")
    if colon and library in LIBRARIES:
        found: Attack = _adapter(library).find(inner)
        return found
    if name not in registry.attacks and (alike := _in_libraries(name)):
        raise InputError(f"unknown attack {name!r}; did you mean {' or '.join(alike)}?")
    entry = registry.attacks.get(name)
    if not isinstance(entry, Attack):  # a plugin's bare function
        entry = Attack(name, entry, frozenset({"linf", "l2", "l1"}))
    return entry


def _adapter(library: str) -> Any:
    return importlib.import_module(f"robbench.attacks.{library}")


def _in_libraries(name: str) -> list[str]:
    """The full names of the libraries' classes that are called so."""
    names = [(library, inner) for library in LIBRARIES for inner in _adapter(library).names()]
    return [f"{library}:{inner}" for library, inner in names if inner.lower() == name.lower()]


@dataclass(frozen=True)
class Configured:
    """An attack with checked settings; spec is its canonical form."""

    entry: Attack
    spec: Spec
    settings: Mapping[str, object]

    @classmethod
    def of(cls, text: str | Spec) -> Configured:
        """Look the attack up and check every setting; an InputError lists all that is wrong."""
        spec = Spec.parse(text)
        if spec.parts:
            raise InputError(f"attacks cannot be joined by '&': {spec}; run them one by one")
        entry = find(spec.name)
        given = check_settings("attack", entry.name, entry.settings, dict(spec.settings))
        canonical = given.model_dump(mode="json", exclude_defaults=True)
        settings = tuple(sorted(canonical.items()))
        return cls(entry, Spec(name=entry.name, settings=settings), dict(given))

    def given(self, threat: Threat) -> Threat:
        """The threat as the attack gets it: a search for the smallest change has no ε."""
        return threat.model_copy(update={"eps": None}) if self.entry.minimal else threat

    @property
    def version(self) -> int:
        """That of the attack, raised with those of the attacks that it is made of."""
        inner = self.entry.inner(self.settings) if self.entry.inner else ()
        return self.entry.version + sum(Configured.of(spec).version - 1 for spec in inner)

    def __call__(
        self, access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator
    ) -> Tensor:
        return self.entry.run(access, x, y, threat, rng, **self.settings)


def wrapped(name: str, spec: str, norm: Norm, such: str) -> Configured:
    """The attack inside another one, of this spec; InputError for what is no single attack, and for
    one without the norm. such: an example."""
    inner = Configured.of(spec)
    if inner.entry.suite or inner.entry.diagnostic:
        raise InputError(f"{name}(attack={inner.entry.name}): write one attack, such as {such}")
    if norm not in inner.entry.norms:
        known = ", ".join(sorted(inner.entry.norms))
        raise InputError(f"{name}: {inner.entry.name} has no norm {norm}; it has {known}")
    return inner


def wrapped_specs(settings: Mapping[str, object]) -> list[str]:
    """The spec of the attack inside another one, by that one's settings."""
    return [str(settings["attack"])]


def check_settings(
    kind: str, name: str, model: type[BaseModel], given: Mapping[str, object]
) -> BaseModel:
    """Validate settings against a pydantic model, all errors in one InputError."""
    problems = []
    known = set(model.model_fields)
    if model.model_config.get("extra") != "allow":
        for key in set(given) - known:
            problems.append(str(unknown(f"setting of {kind} {name}", key, known)))
    try:
        return model(**given)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "extra_forbidden":
                place = ".".join(map(str, problem["loc"]))
                text = problem["msg"].removeprefix("Value error, ")
                given_as = f"{place} = {problem['input']!r}: " if place else ""
                problems.append(f"{kind} {name}: {given_as}{text}")
        raise InputError("; ".join(problems)) from None


def attacked_label(
    access: Access, x: Tensor, y: Tensor, label: Literal["truth", "predicted"]
) -> Tensor:
    """(N,) the true labels, or those that the answer to x itself has: published attacks that guess
    the label work on them, and can repair an image that was wrong."""
    if label == "truth":
        return y
    with torch.no_grad():
        return access.scores(x).argmax(dim=1)


def choose_targets(
    access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator
) -> Tensor | None:
    """(N,) target labels by the threat's rule, never the true label; None when untargeted."""
    labels = access.deployed.labels
    if threat.target == "none":
        return None
    if threat.target == "random":
        shift = torch.randint(1, labels, (len(y),), generator=rng).to(y.device)
        return (y + shift) % labels
    if threat.target == "least-likely":
        with torch.no_grad():
            scores = access.scores(x)
        return scores.scatter(1, y[:, None], float("inf")).argmin(dim=1)
    if not 0 <= threat.target < labels:
        raise InputError(f"target = {threat.target}, but labels are 0 to {labels - 1}")
    target = torch.full_like(y, threat.target)
    # an image of the target class has nothing to reach: it takes the next label
    return torch.where(target == y, (target + 1) % labels, target)


def picked(labels: Tensor | None, ids: Tensor) -> Tensor | None:
    """The labels of these images, if there are labels."""
    return None if labels is None else labels[ids]


def column(values: Tensor, images: Tensor) -> Tensor:
    """(N,) numbers as (N, 1, 1, 1), to go with images."""
    return values.view(-1, *[1] * (images.dim() - 1))
