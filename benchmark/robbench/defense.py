"""What a defense is: fields that a spec takes, networks, training, decision rule, and the losses
of the attacker who knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from robbench import networks, registry
from robbench.attacks import check_settings
from robbench.errors import InputError, unknown
from robbench.registry import Spec
from robbench.rules import Draw, Loss, MeanProbabilities, Rule
from robbench.training import AdversarialSpec, Batch, Optimisation

D = TypeVar("D", bound="type[Defense]")
INFERENCE = "inference"  # marks a field that changes the decision, never the trained weights


class Defense(Optimisation):
    """A recipe. Its fields are what a spec takes; their defaults are the preset `quick`.

    Subclasses override what is their own: build, start, loss, rule, losses. `joint` says whether
    members are optimised together. Fields annotated with "inference" are no part of a
    checkpoint's key.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the same fields give other numbers
    source: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quick": {}}
    losses: ClassVar[Mapping[str, Loss]] = {}  # strongest first
    joint: ClassVar[bool] = True

    network: str = "quick"
    members: Annotated[int, Field(ge=1)] = 1
    base: str | None = None  # the defense whose weights training starts from
    adversarial: AdversarialSpec = None
    draws: Annotated[int, Field(ge=1), INFERENCE] = 1

    def build(self, shape: tuple[int, int, int], labels: int) -> nn.ModuleList:
        """Fresh members for images of (C, H, W) and this many labels."""
        spec = Spec.parse(self.network)
        return nn.ModuleList(
            self.prepare(networks.build(spec.name, dict(spec.settings), shape, labels))
            for _ in range(self.members)
        )

    def prepare(self, network: nn.Module) -> nn.Module:
        """Insert what the defense adds to a network; called on every fresh member."""
        return network

    def batch(self, members: nn.ModuleList, clean: Tensor, y: Tensor, rng: Generator) -> Batch:
        """What one step trains on: adversarial examples where the recipe has them."""
        if self.adversarial is None:
            return Batch(clean, y, clean)
        x = self.adversarial.perturb(lambda images: self.scores(members, images), clean, y, rng)
        return Batch(x, y, clean)

    def loss(self, members: nn.ModuleList, batch: Batch) -> Tensor:
        """(N,) what training minimises."""
        if self.adversarial is None:
            return F.cross_entropy(self.scores(members, batch.x), batch.y, reduction="none")
        return self.adversarial.loss(lambda images: self.scores(members, images), batch)

    def scores(self, members: nn.ModuleList, x: Tensor) -> Tensor:
        """(N, L) logits of one draw of the members by the decision rule, while training."""
        logits = torch.stack([member(x) for member in members])[None]
        return self.rule().scores(Draw(logits))

    def start_epoch(self, members: nn.ModuleList, epoch: int) -> None:
        """Called before every epoch, from 0, of members that are trained together."""

    def after_step(self, members: nn.ModuleList, step: int) -> None:
        """Called after every optimiser step, from 0, of members that are trained together."""

    def rule(self) -> Rule:
        """How draws of members become a decision."""
        return MeanProbabilities()

    @property
    def stochastic(self) -> bool:
        """Whether two answers to the same image may differ: such a defense is attacked by EOT."""
        return False

    def base_spec(self) -> Spec | None:
        """The spec of the base, on this defense's network unless it names one."""
        if self.base is None or self.base.startswith("torchvision:"):
            return None
        spec = Spec.parse(self.base)
        if spec.parts:
            raise InputError(f"{self.name} cannot start from {spec}: base is one defense, not two")
        if "network" not in dict(spec.settings):
            spec = spec.with_settings({"network": self.network})
        return canonical(spec)

    @property
    def spec(self) -> Spec:
        """The canonical form: the name and what differs from the defaults."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        return Spec(name=self.name, settings=tuple(sorted(settings.items())))

    @property
    def training_spec(self) -> Spec:
        """The canonical form without the fields that do not change the weights."""
        kept = [
            (key, value)
            for key, value in self.spec.settings
            if INFERENCE not in type(self).model_fields[key].metadata
        ]
        return Spec(name=self.name, settings=tuple(kept))


def defense(name: str) -> Callable[[D], D]:
    """Register a Defense class under its name."""

    def register(cls: D) -> D:
        cls.name = name
        registry.defenses.add(name, cls)
        return cls

    return register


def resolve(text: str | Spec) -> tuple[Defense, ...]:
    """The configured defenses of a spec, one per part of `A & B`.

    Joined defenses decide together, over the members of all: by the rule that they share, else by
    the mean softmax; their draws are the most that one of them takes.
    """
    spec = Spec.parse(text)
    return tuple(_configure(part) for part in (spec.parts or (spec,)))


def canonical(text: str | Spec) -> Spec:
    """The canonical form of a defense spec; an InputError for anything unknown in it."""
    specs = [part.spec for part in resolve(text)]
    if len(specs) == 1:
        return specs[0]
    return Spec(name="&".join(spec.name for spec in specs), parts=tuple(specs))


def with_preset(text: str | Spec, preset: str, dataset: str) -> Spec:
    """The spec with a preset's fields below its own; `paper:imagenet` precedes `paper`."""
    spec = Spec.parse(text)
    if spec.parts:
        parts = tuple(with_preset(part, preset, dataset) for part in spec.parts)
        return spec.model_copy(update={"parts": parts})
    presets = _look_up(spec.name).presets
    if preset not in presets:
        raise unknown(f"preset of {spec.name}", preset, [key for key in presets if ":" not in key])
    fields: dict[str, Any] = dict(presets.get(f"{preset}:{dataset}", presets[preset]))
    return canonical(
        spec.model_copy(update={"settings": ()}).with_settings({**fields, **dict(spec.settings)})
    )


def version_of(text: str | Spec) -> str:
    """The versions of all that a spec is made of: those of `A & B` joined, a base's behind `<`
    once it is not the first."""
    parts = []
    for configured in resolve(text):
        base = configured.base_spec()
        below = version_of(base) if base else "1"
        parts.append(f"{configured.version}<{below}" if below != "1" else str(configured.version))
    return "&".join(parts)


@lru_cache
def shown(text: str, dataset: str) -> str:
    """The spec as a user of the dataset writes it: without what its preset `quick` sets anyway.

    What cannot be resolved (a model of the caller, a plugin that is not installed) stays as it is.
    """
    try:
        spec = Spec.parse(text)
        if spec.parts:
            return " & ".join(shown(str(part), dataset) for part in spec.parts)
        preset = dict(with_preset(spec.name, "quick", dataset).settings)
        left = {key: value for key, value in spec.settings if preset.get(key) != value}
        brief = spec.model_copy(update={"settings": tuple(left.items())})
        return str(brief) if str(with_preset(brief, "quick", dataset)) == text else text
    except InputError:
        return text


def _configure(spec: Spec) -> Defense:
    cls = _look_up(spec.name)
    configured = check_settings("defense", spec.name, cls, dict(spec.settings))
    assert isinstance(configured, Defense)
    network = Spec.parse(configured.network)
    networks.check(network.name, dict(network.settings))
    return configured


def _look_up(name: str) -> type[Defense]:
    cls = registry.defenses.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Defense)):
        raise InputError(f"the defense plugin {name!r} is {cls!r}, not a subclass of Defense")
    return cls
