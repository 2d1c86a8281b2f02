"""What a defense is: fields that a spec takes, networks, training, decision rule, and the losses
of the attacker who knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn

from robbench import networks, registry
from robbench.attacks import check_settings
from robbench.attacks.losses import Votes
from robbench.attacks.suite import Budget, Stage, compose
from robbench.datasets import kind as kind_of
from robbench.detectors import DetectorSpec, Rate
from robbench.errors import InputError, unknown
from robbench.recipes import AdversarialSpec, Batch, Optimisation
from robbench.registry import Spec
from robbench.rules import Draw, Loss, MeanProbabilities, Rule, Vote

if TYPE_CHECKING:
    from robbench.datasets import Dataset

D = TypeVar("D", bound="type[Defense]")
# presets that hold for datasets that have none of their own: of as many images, or in colour,
# where the budgets of training are other ones
ALIKE: Mapping[str, tuple[str, ...]] = {
    "fashion-mnist": ("mnist",),
    "cifar10": ("mnist",),
    "cifar10-jpeg": ("cifar10", "mnist"),
    "cifar100": ("cifar10", "mnist"),
    "tiny-imagenet": ("cifar10", "mnist"),
    "imagenet": ("cifar10", "mnist"),
}
# relations to a defense whose adversarial examples its suite tries first (robbench.siblings)
SIBLINGS = ("noise-off", "undetected", "base", "member", "adversarial", "twin")
INFERENCE = "inference"  # marks a field that changes the decision, never the trained weights


class Defense(Optimisation):
    """A recipe. Its fields are what a spec takes; their defaults are the preset `quick`.

    Subclasses override what is their own, mostly prepare, criterion, rule and losses. Fields
    annotated with INFERENCE are no part of a checkpoint's key. `features`: criterion is given the
    last hidden activations too. `wraps`: members are those of the base, each inside the module
    (with an attribute `network`) that prepare puts around it; nothing is trained unless
    epochs > 0. `quiet`: the fields, all of inference, that switch its randomness off.

    detector: what refuses to answer, a spec of robbench.detectors such as k-density; fpr: the
    share of clean images in [0, 1) that it may refuse, as 0.05 or 5%.

    known_seed: of draws that are the same in every answer, and that the attacker knows: the regime
    between fresh draws and none (`quiet`).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the same fields give other numbers
    source: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quick": {}}
    features: ClassVar[bool] = False
    wraps: ClassVar[bool] = False
    quiet: ClassVar[Mapping[str, object]] = {}

    network: str = "quick"
    members: Annotated[int, Field(ge=1)] = 1
    base: str | None = None  # the defense whose weights training starts from
    adversarial: AdversarialSpec = None
    draws: Annotated[int, Field(ge=1), INFERENCE] = 1
    detector: Annotated[DetectorSpec | None, INFERENCE] = None
    fpr: Annotated[Rate, INFERENCE] = 0.05
    known_seed: Annotated[int | None, Field(ge=0), INFERENCE] = None

    @field_validator("base")
    @classmethod
    def _in_one_form(cls, base: str | None) -> str | None:
        """Two ways to write a base must not become two trainings."""
        if base is None or base.startswith("torchvision:"):
            return base
        if any(part.detector for part in resolve(base)):
            raise ValueError("the detector of a base is never asked; give it to what builds on it")
        if any(part.known_seed is not None for part in resolve(base)):
            raise ValueError("a base draws afresh; give known_seed to what builds on it")
        return str(canonical(base))

    @model_validator(mode="after")
    def _trained(self) -> Defense:
        if not self.epochs and self.base is None:
            raise ValueError("epochs = 0 keeps the weights of a base, and there is none")
        if not self.epochs and self.adversarial is not None:
            raise ValueError("epochs = 0 trains nothing, so adversarial has no part in it")
        if self.wraps and self.members != type(self).model_fields["members"].default:
            raise ValueError("members are those of the base; write base=ensemble(members=3)")
        if self.detector is None and self.fpr != type(self).model_fields["fpr"].default:
            raise ValueError("fpr is what a detector refuses, and there is none; add detector=lid")
        if self.known_seed is not None and not self.random:
            raise ValueError("known_seed fixes draws, and nothing here is drawn; leave it out")
        return self

    @property
    def size(self) -> int:
        """How many members there are: those of the base, for what goes around one."""
        return sum(base.size for base in self.bases()) if self.wraps else self.members

    @property
    def joint(self) -> bool:
        """Whether members are optimised together, or one after the other."""
        return True

    def build(self, shape: tuple[int, int, int], labels: int) -> nn.ModuleList:
        """Fresh members for images of (C, H, W) and this many labels."""
        if self.wraps:
            built = [base.build(shape, labels) for base in self.bases()]
            return nn.ModuleList(self.prepare(network) for group in built for network in group)
        spec = Spec.parse(self.network)
        return nn.ModuleList(
            self.prepare(networks.build(spec.name, dict(spec.settings), shape, labels))
            for _ in range(self.members)
        )

    def prepare(self, network: nn.Module) -> nn.Module:
        """Insert what the defense adds to a network; called on every fresh member."""
        return network

    def start(self, members: nn.ModuleList, sources: nn.ModuleList) -> None:
        """Take over the weights of the base's members; noise modules have none of their own."""
        for index, member in enumerate(members):
            inner = member.network if self.wraps else member
            assert isinstance(inner, nn.Module)
            inner.load_state_dict(sources[index % len(sources)].state_dict())

    def batch(self, members: nn.ModuleList, batch: Batch, rng: Generator) -> Batch:
        """What one step trains on: adversarial examples where the recipe has them."""
        if self.adversarial is None:
            return batch

        def ascended(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
            return self.objective(self.forward(members, x), y, target)

        x = self.adversarial.perturb(ascended, lambda x: self.scores(members, x), batch, rng)
        return batch._replace(x=x)

    def loss(self, members: nn.ModuleList, batch: Batch) -> Tensor:
        """(N,) what training minimises: the criterion, where adversarial training wants it."""

        def minimised(x: Tensor, y: Tensor) -> Tensor:
            return self.loss_on(members, x, y)

        if self.adversarial is None:
            return minimised(batch.x, batch.y)
        return self.adversarial.loss(minimised, lambda x: self.scores(members, x), batch)

    def loss_on(self, members: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
        """(N,) the criterion of one draw on these images; for what also needs the members."""
        return self.criterion(self.forward(members, x), y, x)

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        """(N,) the loss of one training draw of members on images x: base loss + regularisers."""
        return F.cross_entropy(self.rule().scores(draw), y, reduction="none")

    def objective(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        """(N,) what adversarial training maximises: the cross-entropy of the scores."""
        scores = self.rule().scores(draw)
        if target is None:
            return F.cross_entropy(scores, y, reduction="none")
        return -F.cross_entropy(scores, target, reduction="none")

    def forward(self, members: nn.ModuleList, x: Tensor) -> Draw:
        """One draw of the members, while training."""
        if not self.features:
            return Draw(torch.stack([member(x) for member in members])[None])
        hidden = [member.features(x) for member in members]  # type: ignore[operator]
        logits = [member.readout(h) for member, h in zip(members, hidden, strict=True)]  # type: ignore[operator]
        return Draw(torch.stack(logits)[None], torch.stack(hidden)[None])

    def scores(self, members: nn.ModuleList, x: Tensor) -> Tensor:
        """(N, L) scores of one draw of the members by the decision rule, while training."""
        return self.rule().scores(self.forward(members, x))

    def start_training(self, members: nn.ModuleList, steps: int) -> None:
        """Called once before the first, or the first resumed, epoch of members that are trained
        together; an epoch has so many steps."""

    def start_epoch(self, members: nn.ModuleList, epoch: int) -> None:
        """Called before every epoch, from 0, of members that are trained together."""

    def after_step(self, members: nn.ModuleList, step: int) -> None:
        """Called after every optimiser step, from 0, of members that are trained together; their
        parameters still have the gradients of that step."""

    def calibrate(self, members: nn.ModuleList, dataset: Dataset) -> None:
        """Fill buffers that depend on training data, once, after training: pools, statistics."""

    def rule(self) -> Rule:
        """How draws of members become a decision."""
        return MeanProbabilities()

    @property
    def losses(self) -> Mapping[str, Loss]:
        """Of the attacker who knows the defense, strongest first: against a vote its margins, else
        none but cross-entropy. Subclasses may have a class variable of this name."""
        return {"vote": Votes()} if isinstance(self.rule(), Vote) else {}

    def suite(self, budget: Budget) -> list[Stage]:
        """The attacks of which `strongest` takes the worst point per image."""
        return compose(
            list(self.losses),
            budget,
            members=self.size,
            stochastic=self.stochastic,
            detector=self.detector is not None,
            oracles=SIBLINGS,
            own=self.own_attacks(budget),
        )

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """What the attacker who knows this defense adds to the suite that suits any."""
        return []

    @property
    def random(self) -> bool:
        """Whether an answer is made of random draws."""
        return self.wraps and any(base.random for base in self.bases())

    @property
    def stochastic(self) -> bool:
        """Whether two answers to the same image may differ: such a defense is attacked by EOT."""
        return self.random and self.known_seed is None

    def bases(self) -> tuple[Defense, ...]:
        """The defenses behind `base`, one per part of `A & B`; none for downloaded weights."""
        spec = self.base_spec()
        return resolve(spec) if spec else ()

    def base_spec(self) -> Spec | None:
        """The canonical spec of the base, on this defense's network unless it names one."""
        if self.base is None or self.base.startswith("torchvision:"):
            if self.wraps:
                raise InputError(f"{self.name} goes around a defense; write base=standard")
            return None
        spec = Spec.parse(self.base)
        if any(part.member is not None for part in spec.parts or (spec,)):
            raise InputError(f"base = {spec}: a base is a whole defense, not one member of it")
        if self.wraps:
            return canonical(self._on_network(spec))
        if spec.parts:
            raise InputError(f"{self.name} cannot start from {spec}: base is one defense, not two")
        if "network" not in dict(spec.settings):
            spec = spec.with_settings({"network": self.network})
        return canonical(spec)

    def _on_network(self, spec: Spec) -> Spec:
        """The base of a wrapper on the network that is given for the wrapper, if one is."""
        if self.network == type(self).model_fields["network"].default:
            return spec
        parts = [
            part
            if "network" in dict(part.settings)
            else part.with_settings({"network": self.network})
            for part in spec.parts or (spec,)
        ]
        return spec.model_copy(update={"parts": tuple(parts)}) if spec.parts else parts[0]

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


def known_attack(parts: Sequence[Defense]) -> bool:
    """Whether the attacker who knows these joined defenses has a loss of his own against them."""
    return any(part.losses or part.detector for part in parts)


def suite_of(text: str | Spec, budget: Budget) -> list[Stage]:
    """The suite against a defense: of joined ones, the stages of all parts."""
    parts = resolve(text)
    if len(parts) == 1:
        return parts[0].suite(budget)
    shared = len({tuple(part.losses) for part in parts}) == 1
    return compose(
        list(parts[0].losses) if shared else [],
        budget,
        members=len(parts),
        stochastic=any(part.stochastic for part in parts),
        detector=parts[0].detector is not None,
        oracles=SIBLINGS,
        own=[stage for part in parts for stage in part.own_attacks(budget)],
    )


def summed_cross_entropy(draw: Draw, y: Tensor) -> Tensor:
    """(N,) the sum of the members' cross-entropies, in one draw."""
    members = [F.cross_entropy(logits, y, reduction="none") for logits in draw.logits[0]]
    return torch.stack(members).sum(dim=0)


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
    the mean softmax; their draws are the most that one of them takes. They have one detector.
    """
    spec = Spec.parse(text)
    parts = tuple(_configure(part) for part in (spec.parts or (spec,)))
    for part, one in zip(parts, spec.parts or (spec,), strict=True):
        if one.member == "*":
            raise InputError(f"{one} is a list of defenses; give it to --defense or --oracle alone")
        if one.member is not None and one.member >= part.size:
            raise InputError(f"{one}: members of {part.name} are 0 to {part.size - 1}")
    whole = [(part.spec, one.member) for part, one in zip(parts, spec.parts, strict=False)]
    if len(set(whole)) < len(whole):
        raise InputError(
            f"{spec} joins the same weights twice; write ensemble(members=2, training=separate)"
            f" or {parts[0].name}(draws=2)"
        )
    if len({(part.detector, part.fpr) for part in parts}) > 1:
        raise InputError(f"{spec}: all parts need the same detector and fpr, they decide together")
    if len({part.known_seed for part in parts if part.random}) > 1:
        raise InputError(f"{spec}: all random parts need the same known_seed, they draw together")
    return parts


def canonical(text: str | Spec) -> Spec:
    """The canonical form of a defense spec; an InputError for anything unknown in it."""
    given = Spec.parse(text)
    specs = [
        defense.spec.model_copy(update={"member": part.member})
        for part, defense in zip(given.parts or (given,), resolve(given), strict=True)
    ]
    if len(specs) == 1:
        return specs[0]
    return Spec(name="&".join(spec.name for spec in specs), parts=tuple(specs))


def with_preset(text: str | Spec, preset: str | None, dataset: str) -> Spec:
    """The spec with a preset's fields below its own; `paper:imagenet` precedes `paper`. None: as it
    is written.

    A base takes the same preset, but for its network, which is that of what is built on it; what
    goes around a base leaves it its own.
    """
    spec = Spec.parse(text)
    if preset is None:
        return canonical(spec)
    if spec.parts:
        parts = tuple(with_preset(part, preset, dataset) for part in spec.parts)
        return spec.model_copy(update={"parts": parts})
    cls = _look_up(spec.name)
    if preset not in cls.presets:
        known = [key for key in cls.presets if ":" not in key]
        raise unknown(f"preset of {spec.name}", preset, known)
    kind = kind_of(dataset)
    alike = ALIKE.get(kind, ()) if preset == "quick" else ()
    keys = [*(f"{preset}:{name}" for name in (kind, *alike)), preset]
    fields: dict[str, Any] = dict(next(cls.presets[key] for key in keys if key in cls.presets))
    fields |= dict(spec.settings)
    base = fields.get("base", cls.model_fields["base"].default)
    if isinstance(base, str) and not base.startswith("torchvision:"):
        below = with_preset(base, preset, dataset)
        named = {part.name for part in Spec.parse(base).parts or (Spec.parse(base),)}
        if not cls.wraps and len(named) == 1 and "network" not in dict(Spec.parse(base).settings):
            left = tuple(setting for setting in below.settings if setting[0] != "network")
            below = below.model_copy(update={"settings": left})
        fields["base"] = str(below)
    return canonical(spec.model_copy(update={"settings": ()}).with_settings(fields))


def version_of(text: str | Spec) -> str:
    """The versions of all that a spec is made of: those of `A & B` joined, a base's behind `<`
    once it is not the first."""
    parts = []
    for configured in resolve(text):
        spec = configured.base_spec()
        below = version_of(spec) if spec else "1"
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
        if "base" in left:
            left["base"] = shown(str(left["base"]), dataset)
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
