"""What a recipe says: how it is optimised, and adversarial training as a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

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
from robbench.errors import unknown
from robbench.registry import Spec
from robbench.threat import Eps, ascend, check_budget, project, random_start

Scores = Callable[[Tensor], Tensor]  # images -> (N, L) logits
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # images, y, target -> (N,)


class Batch(NamedTuple):
    """What a recipe's loss sees: x is trained on, clean is where it came from."""

    x: Tensor  # (N, C, H, W)
    y: Tensor  # (N,) labels, or (N, L) shares of labels that sum to one
    clean: Tensor  # (N, C, H, W)
    labels: int  # L


class Adversarial(BaseModel):
    """Adversarial training, written as a spec: fgsm, pgd(eps=0.2, steps=5) or trades(beta=6).

    pgd: Madry et al. 2018, arXiv:1706.06083. fgsm: with random start and a step of 1.25 ε, Wong
    et al. 2020, arXiv:2001.03994. trades: Zhang et al. 2019, arXiv:1901.08573, eq. 5. Networks
    are attacked in training mode, with the noise and the batch statistics that the step minimises
    over; the authors of TRADES switch to evaluation mode here, which has neither.

    low: ε is drawn anew for every batch, uniformly from [low, eps] (ADP: 0.01 to 0.05). reach: how
    far all steps go together, in ε, unless `step` says it (ADP, PDD: 1). targeted: towards a
    random wrong label (AT10-tar of paper 003). clean: weight of the loss on the clean images
    beside that on x' (0: x' only; ADP, PDD, paper 002: 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["fgsm", "pgd", "trades"] = "pgd"
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Eps = Fraction(8, 255)
    low: Eps | None = None
    steps: Annotated[int, Field(ge=1)] = 10
    step: Eps | None = None
    reach: Annotated[float, Field(gt=0)] = 2.5
    random: bool = True
    targeted: bool = False
    clean: Annotated[float, Field(ge=0)] = 0.0
    beta: Annotated[float, Field(ge=0)] = 6.0

    @field_validator("eps")
    @classmethod
    def _plausible(cls, eps: Fraction, given: ValidationInfo) -> Fraction:
        if "norm" in given.data:
            check_budget(given.data["norm"], eps)
        return eps

    @field_validator("low")
    @classmethod
    def _below(cls, low: Fraction | None, given: ValidationInfo) -> Fraction | None:
        if low is not None and low > given.data.get("eps", low):
            raise ValueError(f"ε is drawn from low to eps, and {low} is above it")
        return low

    @field_validator("steps", "reach", "random", "targeted", "clean", "beta")
    @classmethod
    def _used(cls, value: Any, given: ValidationInfo) -> Any:
        """A setting that changes nothing would be believed to do something."""
        users = {"steps": ("pgd", "trades"), "reach": ("pgd", "trades"), "beta": ("trades",)}
        kinds = users.get(str(given.field_name), ("pgd", "fgsm"))
        if given.data.get("kind") not in kinds:
            raise ValueError(f"only {' and '.join(kinds)} use it; leave it out")
        return value

    def step_size(self, eps: float) -> float:
        """Without `step`: 1.25 ε for fgsm, else what makes all steps reach so many ε."""
        if self.step is not None:
            return float(self.step)
        return eps * (1.25 if self.kind == "fgsm" else self.reach / self.steps)

    def perturb(self, ascended: Objective, scores: Scores, batch: Batch, rng: Generator) -> Tensor:
        """x' in the ball around the clean images that maximises `ascended`; trades: the divergence
        of `scores`."""
        eps, clean, y, target = float(self.eps), batch.clean, batch.y, None
        x = clean
        if self.low is not None:
            share = float(torch.rand((), generator=rng))
            eps = float(self.low) + share * (eps - float(self.low))
        if self.kind == "trades":
            with torch.no_grad():
                reference = F.log_softmax(scores(x), dim=1)
            x = (x + 0.001 * torch.randn(x.shape, generator=rng).to(x)).clamp(0, 1)
        elif self.random:
            x = random_start(x, self.norm, eps, rng)
        if self.targeted:
            shift = torch.randint(1, batch.labels, (len(y),), generator=rng).to(y.device)
            target = (y + shift) % batch.labels
        for _ in range(1 if self.kind == "fgsm" else self.steps):
            x = x.detach().requires_grad_()
            if self.kind == "trades":
                log = F.log_softmax(scores(x), 1)
                loss = F.kl_div(log, reference, reduction="sum", log_target=True)
            else:
                loss = ascended(x, y, target).sum()
            gradient = torch.autograd.grad(loss, x)[0]
            moved = x.detach() + self.step_size(eps) * ascend(gradient, x, self.norm)
            x = project(moved, clean, self.norm, eps)
        return x.detach()

    def loss(
        self, minimised: Callable[[Tensor, Tensor], Tensor], scores: Scores, batch: Batch
    ) -> Tensor:
        """(N,) `minimised` (images, y -> (N,)) on x', and on the clean images with their weight;
        trades: on the clean images, plus β times the divergence of the scores."""
        if self.kind == "trades":
            plain = minimised(batch.clean, batch.y)
            clean = scores(batch.clean)
            divergence = F.kl_div(
                F.log_softmax(scores(batch.x), 1),
                F.log_softmax(clean, 1),
                reduction="none",
                log_target=True,
            ).sum(dim=1)
            return plain + self.beta * divergence
        loss = minimised(batch.x, batch.y)
        return loss + self.clean * minimised(batch.clean, batch.y) if self.clean else loss


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
    """The fields of a recipe that say how it is optimised; part of every defense's spec.

    epochs: 0 keeps the weights of the base. decay_at: shares of all epochs after which
    schedule=steps divides lr by 10. lr_end: where schedule=cosine ends. crop: pixels of padding
    for random crops. select: keep the `last` weights, or those of the epoch that is `best` on the
    validation split (on x' where training is adversarial). amp: bfloat16 where CUDA computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    epochs: Annotated[int, Field(ge=0)] = 30
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 0.01
    schedule: Literal["one-cycle", "steps", "cosine", "constant"] = "one-cycle"
    decay_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.4, 0.6, 0.8)
    lr_end: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    select: Literal["last", "best"] = "last"
    amp: bool = False

    def stepper(
        self, parameters: list[nn.Parameter], total: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser of these parameters and its schedule over `total` steps."""
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
        if self.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, self.lr_end)
            return optimizer, cosine
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


# What the code behind part I of paper 003 does: SGD, lr / 10 after epochs 100 and 150 of 200,
# shifts by a tenth of the image. Its L2 penalty of 1e-4 has twice the gradient of the same weight
# decay, and spares what is no convolution, which ours does not; its momentum is not Nesterov's.
CENTRES_RECIPE: Mapping[str, object] = {
    "network": "resnet32",
    "epochs": 200,
    "batch_size": 50,
    "optimizer": "sgd",
    "lr": 0.01,
    "schedule": "steps",
    "decay_at": (0.5, 0.75),
    "weight_decay": 2e-4,
    "crop": 3,
    "flip": True,
}

# What the code of ADP, part II of paper 003, does, on all weights instead of kernels alone.
ADP_RECIPE: Mapping[str, object] = {
    "network": "resnet20",
    "epochs": 200,
    "lr": 1e-3,
    "schedule": "steps",
    "decay_at": (0.5, 0.75),
    "weight_decay": 2e-4,
}
ADP_MNIST_RECIPE: Mapping[str, object] = {**ADP_RECIPE, "epochs": 40, "decay_at": (0.375, 0.75)}
