"""Detectors: what a defense refuses to answer, by a score of how normal an image looks to it.

Any defense takes one, as `detector=` and `fpr=`. Its threshold is set on clean validation images,
never on adversarial ones, so that it refuses the share fpr of them; what scores below it gets no
answer (ABSTAIN). Symbols: S draws, M members, N images, L labels, D features, R references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from torch import Tensor

from robbench.attacks import check_settings
from robbench.attacks.losses import margin
from robbench.datasets import Dataset
from robbench.datasets.dataset import take
from robbench.deployed import Deployed, gives_activations
from robbench.errors import InputError, unknown
from robbench.metrics.detection import k_density, lid, log_odds, non_me, threshold
from robbench.randomness import preserved_random_state, seed_everything
from robbench.registry import Spec
from robbench.rules import ABSTAIN, Answer, Draw, Loss, Rule, answer

MEDIAN_OF = 100  # references per label that the default bandwidth is measured on
TAIL = 0.05  # the quantile of clean scores that a union of detectors puts at -1


class Detector(BaseModel):
    """A score of a defense's draws, larger = more normal; its fields are what a spec takes.

    per: one threshold for `all` images, or one per predicted `label` (that of all images for a
    label that no validation image is given).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    per: Literal["all", "label"] = "all"

    @property
    def features(self) -> bool:
        """Whether it looks at the last hidden activations."""
        return False

    def score(self, draw: Draw, scores: Tensor) -> Tensor:
        """(N,), differentiable: of one call's draws and the rule's scores (N, L) of them."""
        return self.joined(self.parts(draw, scores))

    def parts(self, draw: Draw, scores: Tensor) -> Tensor:
        """(P, N) what the score is made of, each part on its own scale."""
        return self.score(draw, scores)[None]

    def standardised(self, parts: Tensor) -> Detector:
        """The detector that knows these parts (P, N) of clean images."""
        return self

    def joined(self, parts: Tensor) -> Tensor:
        """(N,) the score of its parts (P, N)."""
        return parts[0]


class Confidence(Detector):
    """The largest probability, Hendrycks & Gimpel 2017, arXiv:1610.02136, as its log-odds."""

    name: ClassVar[str] = "confidence"

    def score(self, draw: Draw, scores: Tensor) -> Tensor:
        return log_odds(scores)


class NonME(Detector):
    """The entropy of the prediction without its largest part, paper 003, part III."""

    name: ClassVar[str] = "non-me"

    def score(self, draw: Draw, scores: Tensor) -> Tensor:
        return non_me(scores)


class OfFeatures(Detector):
    """A detector that looks at the last hidden activations, and compares them with those of at
    most `images` training images per label, picked at random."""

    images: Annotated[int, Field(ge=1)]

    @property
    def features(self) -> bool:
        return True

    def fit(self, references: Sequence[Tensor]) -> OfFeatures:
        """The detector that knows these references, (M, R, D) for each label."""
        raise NotImplementedError


class KDensity(OfFeatures):
    """The kernel density of the last hidden activations among training images of the predicted
    label (Feinman et al. 2017, arXiv:1703.00410; paper 003, part III), as its logarithm.

    bandwidth: σ in exp(-d² / σ²), in units of the activations; none (default) is the median
    distance between training images of one label, which fits every network. The authors' code
    has one for each way of training: 1.961 (σ² = 1 / 0.26) for cross-entropy, 0.62
    (σ² = 0.1 / 0.26) for reverse cross-entropy. Of several draws and members the density is the
    mean of those of each among its own references.
    """

    name: ClassVar[str] = "k-density"
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    images: Annotated[int, Field(ge=2)] = 1000
    _references: Sequence[Tensor] = PrivateAttr(())
    _variances: Sequence[float] = PrivateAttr(())  # one per member

    def fit(self, references: Sequence[Tensor]) -> KDensity:
        fitted = self.model_copy()
        fitted._references = references
        fitted._variances = [
            self.bandwidth**2 if self.bandwidth else _median_distance(own) ** 2
            for own in zip(*references, strict=True)
        ]
        return fitted

    def score(self, draw: Draw, scores: Tensor) -> Tensor:
        assert draw.features is not None
        predicted = scores.argmax(dim=-1)
        places, densities = [], []
        for label in predicted.unique():  # only a tenth of the distances are needed
            place = (predicted == label).nonzero()[:, 0]
            places.append(place)
            densities.append(self._density(draw.features[:, :, place], int(label)))
        return torch.cat(densities)[torch.cat(places).argsort()]

    def _density(self, features: Tensor, label: int) -> Tensor:
        """(N,) of features (S, M, N, D) that are all given this label."""
        own = []
        for member, variance in enumerate(self._variances):
            flat, known = features[:, member].flatten(0, 1), self._references[label][member]
            predicted, labels = (torch.zeros(len(t), device=t.device) for t in (flat, known))
            density = k_density(flat, predicted, known, labels, variance)
            own.append(density.view(features.shape[0], -1))
        return torch.cat(own).logsumexp(dim=0) - math.log(features.shape[0] * features.shape[1])


def _median_distance(references: Sequence[Tensor]) -> float:
    """Between the features (R, D) of images of one label, over all labels."""
    return float(torch.cat([torch.pdist(own[:MEDIAN_OF]) for own in references]).median())


class LID(OfFeatures):
    """Minus the local intrinsic dimension of the last hidden activations, Ma et al. 2018,
    arXiv:1801.02613, among the k nearest of about a mini-batch of training images.

    The authors train a logistic regression on the dimensions in all layers of normal, noisy and
    adversarial images; here no adversarial image is known, and one layer decides.
    """

    name: ClassVar[str] = "lid"
    k: Annotated[int, Field(ge=2)] = 20
    images: Annotated[int, Field(ge=1)] = 10
    _references: Tensor = PrivateAttr()

    def fit(self, references: Sequence[Tensor]) -> LID:
        fitted = self.model_copy()
        fitted._references = torch.cat(list(references), dim=1)
        return fitted

    def score(self, draw: Draw, scores: Tensor) -> Tensor:
        assert draw.features is not None
        s, _, n, _ = draw.features.shape
        own = [
            lid(features.flatten(0, 1), known, self.k).view(s, n)
            for features, known in zip(draw.features.unbind(1), self._references, strict=True)
        ]
        return torch.cat(own).mean(dim=0)


Single = Literal["confidence", "non-me", "k-density", "lid"]
SINGLE: dict[str, type[Detector]] = {cls.name: cls for cls in (Confidence, NonME, KDensity, LID)}


class Union(OfFeatures):
    """Several detectors at once: the image is refused where any of them alarms.

    of: which ones, all four by default, each with its own defaults. The score is the smallest of
    theirs, each on the scale on which clean validation images have the median 0 and the 5 %
    quantile -1, so that alarms of all are about equally rare; one threshold on it makes fpr the
    rate of the union.
    """

    name: ClassVar[str] = "union"
    of: Annotated[tuple[Single, ...], Field(min_length=1)] = get_args(Single)
    images: Annotated[int, Field(ge=2)] = 1000
    _parts: Sequence[Detector] = PrivateAttr(())
    _medians: Tensor = PrivateAttr(torch.zeros(1, 1))  # (P, 1)
    _spreads: Tensor = PrivateAttr(torch.ones(1, 1))

    @property
    def features(self) -> bool:
        return any(issubclass(SINGLE[name], OfFeatures) for name in self.of)

    def fit(self, references: Sequence[Tensor]) -> Union:
        fitted, parts = self.model_copy(), [SINGLE[name]() for name in self.of]
        fitted._parts = [
            part.fit([own[:, : part.images] for own in references])
            if isinstance(part, OfFeatures)
            else part
            for part in parts
        ]
        return fitted

    def parts(self, draw: Draw, scores: Tensor) -> Tensor:
        return torch.stack([part.score(draw, scores) for part in self._parts])

    def standardised(self, parts: Tensor) -> Union:
        scaled, middle = self.model_copy(), parts.quantile(0.5, dim=1, keepdim=True)
        spread = middle - parts.quantile(TAIL, dim=1, keepdim=True)
        scaled._medians, scaled._spreads = middle, spread.where(spread > 0, 1)
        return scaled

    def joined(self, parts: Tensor) -> Tensor:
        return ((parts - self._medians.to(parts)) / self._spreads.to(parts)).amin(dim=0)


DETECTORS: dict[str, type[Detector]] = {**SINGLE, Union.name: Union}


def configure(text: str) -> Detector:
    """The detector of a spec such as k-density(bandwidth=0.62); InputError for an unknown one."""
    spec = Spec.parse(text)
    if spec.parts:
        raise InputError(f"detectors cannot be joined by '&': {spec}; write one of them")
    if spec.name not in DETECTORS:
        raise unknown("detector", spec.name, [*DETECTORS, "none"])
    made = check_settings("detector", spec.name, DETECTORS[spec.name], dict(spec.settings))
    assert isinstance(made, Detector)
    return made


def _canonical(text: str) -> str:
    """The spec with what differs from the defaults, sorted."""
    settings = configure(text).model_dump(mode="json", exclude_defaults=True)
    return str(Spec(name=Spec.parse(text).name, settings=tuple(sorted(settings.items()))))


def _parse_rate(value: object) -> float:
    text = str(value).strip()
    try:
        rate = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < 1:
        raise InputError(f"{value} is no share from 0 to below 1; write one such as 5% or 0.05")
    return rate


DetectorSpec = Annotated[str, AfterValidator(_canonical)]
Rate = Annotated[float, BeforeValidator(_parse_rate)]  # 0.05 or 5%


@dataclass(frozen=True)
class Detected:
    """A rule without an answer where the detector's score is below the threshold of the predicted
    label; the scores are those of the rule."""

    abstains: ClassVar[bool] = True
    rule: Rule
    detector: Detector
    thresholds: Tensor  # (L,)

    def __str__(self) -> str:
        return f"{self.rule}, detector {self.detector.name}"

    @property
    def features(self) -> bool:
        """Whether draws need the last hidden activations."""
        return self.detector.features

    def scores(self, draw: Draw) -> Tensor:
        return self.rule.scores(draw)

    def decide(self, draw: Draw) -> Tensor:
        return self.answer(draw).label

    def answer(self, draw: Draw) -> Answer:
        """How sure it is, is how far the detector's score is above the threshold."""
        inner, excess = answer(self.rule, draw), self.excess(draw)
        return Answer(inner.label.masked_fill(excess < 0, ABSTAIN), inner.best, excess)

    def excess(self, draw: Draw) -> Tensor:
        """(N,) how far the detector's score is above the threshold, differentiable."""
        scores = self.rule.scores(draw)
        return self.detector.score(draw, scores) - self.thresholds[scores.argmax(dim=-1)]


def calibrate(deployed: Deployed, text: str, fpr: float, dataset: Dataset, seed: int) -> Detected:
    """The rule of a deployed defense with a detector that refuses at most the share fpr of the
    clean validation images.

    The same seed gives the same detector; the global random streams stay as they were. InputError
    for a dataset without validation images, and for members without the activations it needs.
    """
    detector, rule, clean = configure(text), deployed.rule, dataset.validation
    if not len(clean.y):
        raise InputError(f"detector = {text} needs validation images; {dataset.name} has none")
    with preserved_random_state():
        if isinstance(detector, OfFeatures):
            references = []
            if detector.features:
                _check_activations(deployed, text)
                seed_everything(seed)
                references = _references(deployed, text, dataset, detector.images)
            detector = detector.fit(references)
        seed_everything(seed)
        found, predicted = [], []
        for ids in torch.arange(len(clean.y)).split(deployed.chunk):
            x = take(clean, ids.tolist()).x.to(deployed.device)
            draw = deployed.draw(x, deployed.draws, detector.features)
            scores = rule.scores(draw)
            found.append(detector.parts(draw, scores))
            predicted.append(scores.argmax(dim=-1))
    parts = torch.cat(found, dim=1)
    detector = detector.standardised(parts)
    normal, labels = detector.joined(parts).cpu().numpy(), torch.cat(predicted).cpu().numpy()
    thresholds = torch.full((deployed.labels,), threshold(normal, fpr))
    if detector.per == "label":
        for label in set(labels.tolist()):
            thresholds[label] = threshold(normal[labels == label], fpr)
    return Detected(rule, detector, thresholds.to(deployed.device))


def _references(deployed: Deployed, text: str, dataset: Dataset, images: int) -> list[Tensor]:
    """(M, R, D) for each label: features of random training images of it, from one draw."""
    references = []
    for label in range(deployed.labels):
        ids = (dataset.train.y == label).nonzero()[:, 0]
        picked = ids[torch.randperm(len(ids))[:images]].tolist()
        if len(picked) < 2:
            raise InputError(
                f"detector = {text} needs training images of every label; {dataset.name} has"
                f" {len(picked)} of the label {label}"
            )
        draw = deployed.draw(take(dataset.train, picked).x.to(deployed.device), 1, features=True)
        assert draw.features is not None
        references.append(draw.features[0])
    return references


@torch.no_grad()
def _check_activations(deployed: Deployed, text: str) -> None:
    """InputError for members whose answers do not follow from activations of one width."""
    seed_everything(0)
    x, widths = torch.rand(2, *deployed.shape).to(deployed.device), set()
    for member in deployed.members:
        if not gives_activations(member):
            raise InputError(
                f"detector = {text} looks at the last hidden activations, and"
                f" {type(member).__name__} gives none; write detector=confidence or non-me"
            )
        seed_everything(0)
        hidden = member.features(x)  # type: ignore[operator]
        logits = member.readout(hidden)  # type: ignore[operator]
        seed_everything(0)
        # a module that hands on those of what it wraps would not be asked any more
        if not torch.allclose(logits, member(x), rtol=1e-3, atol=1e-5):
            raise InputError(
                f"detector = {text} looks at the last hidden activations, and those of"
                f" {type(member).__name__} are not what it answers by: readout(features(x)) differs"
            )
        widths.add(hidden.shape[1])
    if len(widths) > 1:
        raise InputError(
            f"detector = {text} looks at the last hidden activations, of which members have"
            f" {' and '.join(map(str, sorted(widths)))}; give all the same network, or write"
            " detector=confidence or non-me"
        )


@dataclass(frozen=True)
class Evasion:
    """What the attacker who knows the detector maximises: `base`, the loss against the defense
    without it, and where the prediction is wrong, minus `weight` times what the detector's score
    lacks to its threshold.

    The joint loss of Carlini & Wagner 2017, arXiv:1705.07263, with the switch of Bryniarski et al.
    2021, arXiv:2106.15023, instead of a search for the weight. Without it a normal-looking right
    answer is a trap: the detector's term, which is steep, holds the image there.
    """

    detected: Detected
    base: Loss
    weight: float = 0.3

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        wrong = margin(self.detected.scores(draw), y, target) > 0
        lacking = (-self.detected.excess(draw)).clamp_min(0)
        return self.base(draw, y, target) - self.weight * lacking.where(wrong, 0)


@dataclass(frozen=True)
class Denial:
    """What the attacker maximises who wants any answer but the label: the larger of `base`, the
    loss against the defense without it, and of what the detector's score is below its threshold;
    with the margin as its base positive once one of the two is reached.

    With a target there is nothing to gain by an alarm, and it is the base alone.
    """

    detected: Detected
    base: Loss

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        value = self.base(draw, y, target)
        return value if target is not None else torch.maximum(value, -self.detected.excess(draw))
