"""The one loop that every recipe is trained by, and adversarial training as a part of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from torch import Generator, Tensor, nn

from robbench.attacks import check_settings
from robbench.errors import InputError, unknown
from robbench.registry import Spec
from robbench.threat import Eps, ascend, check_budget, project, random_start

if TYPE_CHECKING:
    from robbench.datasets import Dataset
    from robbench.defense import Defense

Progress = Callable[[int, int], None]  # (steps done, steps in all)


class Batch(NamedTuple):
    """What a recipe's loss sees: x is trained on, clean is where it came from."""

    x: Tensor  # (N, C, H, W)
    y: Tensor  # (N,)
    clean: Tensor  # (N, C, H, W)


class Adversarial(BaseModel):
    """Adversarial training, written as a spec: fgsm, pgd(eps=0.2, steps=5) or trades(beta=6).

    pgd: Madry et al. 2018, arXiv:1706.06083. fgsm: with random start and a step of 1.25 ε, Wong
    et al. 2020, arXiv:2001.03994. trades: Zhang et al. 2019, arXiv:1901.08573, eq. 5. Networks
    are attacked in training mode, with the noise and the batch statistics that the step minimises
    over; the authors of TRADES switch to evaluation mode here, which has neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["fgsm", "pgd", "trades"] = "pgd"
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Eps = Fraction(8, 255)
    steps: Annotated[int, Field(ge=1)] = 10
    step: Eps | None = None
    random: bool = True
    beta: Annotated[float, Field(ge=0)] = 6.0

    @field_validator("eps")
    @classmethod
    def _plausible(cls, eps: Fraction, given: ValidationInfo) -> Fraction:
        if "norm" in given.data:
            check_budget(given.data["norm"], eps)
        return eps

    @field_validator("steps", "random", "beta")
    @classmethod
    def _used(cls, value: Any, given: ValidationInfo) -> Any:
        """A setting that changes nothing would be believed to do something."""
        users = {"steps": ("pgd", "trades"), "random": ("pgd", "fgsm"), "beta": ("trades",)}
        kinds = users[str(given.field_name)]
        if given.data.get("kind") not in kinds:
            raise ValueError(f"only {' and '.join(kinds)} use it; leave it out")
        return value

    @property
    def step_size(self) -> float:
        """The paper of EnResNet and Madry: ε/4 for 10 steps; scaled so that steps reach 2.5 ε."""
        if self.step is not None:
            return float(self.step)
        return float(self.eps) * (1.25 if self.kind == "fgsm" else 2.5 / self.steps)

    def perturb(
        self, scores: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, rng: Generator
    ) -> Tensor:
        """x' that maximises the loss of `scores` (images -> logits) inside the ball."""
        eps, clean = float(self.eps), x
        if self.kind == "trades":
            with torch.no_grad():
                reference = F.log_softmax(scores(x), dim=1)
            x = (x + 0.001 * torch.randn(x.shape, generator=rng).to(x)).clamp(0, 1)
        elif self.random:
            x = random_start(x, self.norm, eps, rng)
        for _ in range(1 if self.kind == "fgsm" else self.steps):
            x = x.detach().requires_grad_()
            logits = scores(x)
            if self.kind == "trades":
                loss = F.kl_div(
                    F.log_softmax(logits, 1), reference, reduction="sum", log_target=True
                )
            else:
                loss = F.cross_entropy(logits, y, reduction="sum")
            gradient = torch.autograd.grad(loss, x)[0]
            x = project(
                x.detach() + self.step_size * ascend(gradient, x, self.norm), clean, self.norm, eps
            )
        return x.detach()

    def loss(self, scores: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """(N,) cross-entropy on x'; trades: on the clean image, plus β times the divergence."""
        if self.kind != "trades":
            return F.cross_entropy(scores(batch.x), batch.y, reduction="none")
        clean = scores(batch.clean)
        divergence = F.kl_div(
            F.log_softmax(scores(batch.x), 1),
            F.log_softmax(clean, 1),
            reduction="none",
            log_target=True,
        ).sum(dim=1)
        return F.cross_entropy(clean, batch.y, reduction="none") + self.beta * divergence


def _adversarial(value: object) -> object:
    if not isinstance(value, str):
        return value
    spec = Spec.parse(value)
    if spec.name == "none":
        return None
    if spec.name not in ("fgsm", "pgd", "trades"):
        raise unknown("adversarial training", spec.name, ["fgsm", "pgd", "trades", "none"])
    given = {"kind": spec.name, **dict(spec.settings)}
    return check_settings("adversarial training", spec.name, Adversarial, given)


def _written(value: Adversarial | None) -> str | None:
    if value is None:
        return None
    settings = value.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    return str(Spec(name=value.kind, settings=tuple(sorted(settings.items()))))


AdversarialSpec = Annotated[
    Adversarial | None, BeforeValidator(_adversarial), PlainSerializer(_written)
]


class Optimisation(BaseModel):
    """The fields of a recipe that say how it is optimised; part of every defense's spec."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 0.01
    schedule: Literal["one-cycle", "steps", "constant"] = "one-cycle"
    # shares of all epochs after which schedule=steps divides lr by 10
    decay_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.4, 0.6, 0.8)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    crop: Annotated[int, Field(ge=0)] = 0  # pixels of padding for random crops
    flip: bool = False

    def stepper(
        self, parameters: list[nn.Parameter], total: int
    ) -> tuple[torch.optim.Optimizer, Any]:
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, lr=self.lr, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=0.9,
                nesterov=True,
                weight_decay=self.weight_decay,
            )
        if self.schedule == "one-cycle":
            return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total)
        milestones = [round(total * part) for part in self.decay_at]
        if self.schedule == "constant":
            milestones = []
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


# Paper 000, section 3.1: 200 epochs, lr / 10 at epochs 80, 120 and 160; batch size, weight decay
# and Nesterov momentum, on which the text is silent, are those of its code.
CIFAR_RECIPE: Mapping[str, object] = {
    "network": "resnet20",
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "schedule": "steps",
    "weight_decay": 5e-4,
    "crop": 4,
    "flip": True,
}


class Diverged(RuntimeError):
    """Training produced a loss that is not a number."""


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train(
    defense: Defense,
    members: nn.ModuleList,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> None:
    """Optimise the members in place: together, or one after the other where the recipe says so.

    Every group has its own seed, so that a member does not depend on which others are trained.
    """
    if len(dataset.train.y) < 2:
        raise InputError(
            f"dataset {dataset.name} has no training images; {defense.name} needs some"
        )
    groups = [members] if defense.joint else [nn.ModuleList([member]) for member in members]
    total = len(groups) * defense.epochs * _steps(defense, dataset)
    for index, group in enumerate(groups):
        rng = torch.Generator().manual_seed(derive("train", seed, index))
        torch.manual_seed(derive("noise", seed, index))
        for step in _optimise(defense, group, dataset, rng, device):
            progress(index * total // len(groups) + step, total)
    members.eval()


def _steps(defense: Defense, dataset: Dataset) -> int:
    return math.ceil(len(dataset.train.y) / defense.batch_size)


def _optimise(
    defense: Defense, group: nn.ModuleList, dataset: Dataset, rng: Generator, device: torch.device
) -> Iterator[int]:
    """Train one group of members; yields the number of steps that are done."""
    x, y = (tensor.to(device) for tensor in dataset.train)
    total = defense.epochs * _steps(defense, dataset)
    optimizer, schedule = defense.stepper(list(group.parameters()), total)
    step = 0
    group.train()
    for epoch in range(defense.epochs):
        defense.start_epoch(group, epoch)
        for clean, labels in _batches(x, y, defense, rng):
            loss = defense.loss(group, defense.batch(group, clean, labels, rng)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            defense.after_step(group, step)
            step += 1
            yield step
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"training of {defense.name} diverged: loss {loss.item()} after {epoch + 1} epochs;"
                " lower lr"
            )


def _batches(
    x: Tensor, y: Tensor, defense: Defense, rng: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a fresh order."""
    order = torch.randperm(len(y), generator=rng).to(x.device)
    for picked in order.split(defense.batch_size):
        if len(picked) == 1:  # batch normalisation cannot learn from one image
            picked = order[:2]
        yield _augment(x[picked], defense, rng), y[picked]


def _augment(x: Tensor, defense: Defense, rng: Generator) -> Tensor:
    """Random crops after zero padding and horizontal flips, one choice per image."""
    if defense.crop:
        pad, (height, width) = defense.crop, x.shape[2:]
        padded = F.pad(x, (pad,) * 4)
        offsets = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=rng).to(x.device)
        rows = offsets[0][:, None] + torch.arange(height, device=x.device)
        columns = offsets[1][:, None] + torch.arange(width, device=x.device)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        x = x.permute(0, 3, 1, 2).contiguous()
    if defense.flip:
        mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x
