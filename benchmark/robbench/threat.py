"""Threat models: norms and ε. The only file that knows what a norm is.

Images x are float32 (N, C, H, W) in the box [0, 1]; ε is in the same units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from robbench.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import Generator, Tensor

Norm = Literal["linf", "l2", "l1", "l0", "none"]
Goal = Literal["error", "denial"]
GOALS: tuple[Goal, ...] = get_args(Goal)
NORM_NAMES: tuple[Norm, ...] = get_args(Norm)
ABSOLUTE_SLACK, RELATIVE_SLACK = 1e-6, 1e-5  # float32 rounding of x' itself, no gift to the attack


def parse_eps(text: object) -> Fraction:
    """ε from '8/255', '0.1' or a number, exactly; positive and finite, else an InputError."""
    if isinstance(text, Fraction):
        value = text
    else:
        literal = repr(float(text)) if isinstance(text, float) else str(text).strip()
        if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d{1,2})?(/\d*[1-9]\d*)?", literal):
            raise InputError(
                f"ε = {text} is not a number; write a fraction (8/255) or a decimal (0.1)"
            )
        top, _, bottom = literal.partition("/")
        value = Fraction(top) / Fraction(bottom or 1)
    if value <= 0:
        raise InputError(
            f"ε = {text} is not positive; the clean accuracy is part of every record,"
            " so write an ε above 0, such as 8/255"
        )
    return value


def format_eps(eps: Fraction | None) -> str:
    """The shortest exact way to write ε: '0.1', '8/255', '1', or '-' for none.

    >>> [format_eps(Fraction(text)) for text in ("1/10", "8/255", "1")]
    ['0.1', '8/255', '1']
    """
    if eps is None:
        return "-"
    if Fraction(repr(float(eps))) == eps:
        return repr(float(eps)).removesuffix(".0")
    if 255 % eps.denominator == 0:  # the field writes 8/255 and 16/255, never 16/255 reduced
        return f"{eps.numerator * (255 // eps.denominator)}/255"
    return f"{eps.numerator}/{eps.denominator}"


Eps = Annotated[Fraction, BeforeValidator(parse_eps), PlainSerializer(format_eps)]


class Threat(BaseModel):
    """What the attacker may do: norm, ε (None: unbounded or minimum-norm), and the target rule.

    goal: what the attacker wants of a defense that may give no answer - an `error` that it
    accepts, or `denial`: any answer but the label, none included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    norm: Norm = "linf"
    eps: Eps | None = None
    target: Literal["none", "random", "least-likely"] | int = "none"
    goal: Goal = "error"

    @property
    def targeted(self) -> bool:
        return self.target != "none"

    def __str__(self) -> str:
        target = "" if self.target == "none" else f" target={self.target}"
        goal = "" if self.goal == "error" else f" goal={self.goal}"
        return f"{self.norm} {format_eps(self.eps)}{target}{goal}"


def parse_norm(text: str) -> Norm:
    """One of the known norms; the aliases Linf, inf and 2 are understood."""
    name = text.lower()
    name = {"inf": "linf", "∞": "linf", "2": "l2", "1": "l1", "0": "l0"}.get(name, name)
    for norm in NORM_NAMES:
        if name == norm:
            return norm
    raise unknown("norm", text, NORM_NAMES)


def check_budget(norm: Norm, eps: Fraction | None) -> None:
    """Refuse what can only be a slip of the unit: ε = 8 under linf is 8/255."""
    if norm == "none":
        if eps is not None:
            raise InputError(f"ε = {format_eps(eps)} has no meaning for norm none; leave it out")
        return
    if eps is None:
        return
    if norm == "linf" and eps > 1:
        raise InputError(
            f"ε = {format_eps(eps)} is more than the whole box [0, 1] under linf;"
            f" write {math.ceil(eps)}/255"
        )
    if norm in ("l2", "l1") and eps > 255:
        raise InputError(
            f"ε = {format_eps(eps)} under {norm} is in units of [0, 1], not of 255;"
            f" write {math.ceil(eps)}/255"
        )
    if norm == "l0" and eps.denominator != 1:
        raise InputError(f"ε = {format_eps(eps)} under l0 counts pixels; write a whole number")


class _Ball(NamedTuple):
    """What gradient attacks need to know of one norm; every function works per image."""

    length: Callable[[Tensor], Tensor]  # (N, d) -> (N,)
    project: Callable[[Tensor, float], Tensor]  # delta (N, d), radius -> (N, d)
    steepest: Callable[[Tensor, Tensor], Tensor]  # gradient, x (N, d) -> unit ascent direction
    sample: Callable[[int, int, Generator], Tensor]  # n, d -> uniform in the unit ball


def _rescale(length: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Shrink towards the centre: exact for l2; for l1 the rule of ART (keeps x' in the box)."""

    def project(delta: Tensor, radius: float) -> Tensor:
        return delta * (radius / length(delta).clamp_min(1e-30)).clamp_max(1)[:, None]

    return project


def _unit_l2(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _steepest_coordinate(gradient: Tensor, x: Tensor) -> Tensor:
    """The pixel that gains most; one at its end of the box cannot move and is passed over."""
    import torch

    stuck = ((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0))
    best = gradient.abs().masked_fill(stuck, -1).argmax(dim=1, keepdim=True)
    return torch.zeros_like(gradient).scatter(1, best, gradient.gather(1, best).sign())


def _sample_linf(n: int, d: int, rng: Generator) -> Tensor:
    import torch

    return torch.rand(n, d, generator=rng) * 2 - 1


def _sample_l2(n: int, d: int, rng: Generator) -> Tensor:
    import torch

    direction = torch.randn(n, d, generator=rng)
    radius = torch.rand(n, 1, generator=rng) ** (1 / d)
    return direction / direction.norm(dim=1, keepdim=True) * radius


def _sample_l1(n: int, d: int, rng: Generator) -> Tensor:
    import torch

    # d + 1 exponentials, normalised, are uniform on the simplex; the first d fill the l1 ball
    exponential = -torch.log1p(-torch.rand(n, d + 1, generator=rng))
    sign = torch.randint(0, 2, (n, d), generator=rng) * 2 - 1
    return exponential[:, :d] / exponential.sum(dim=1, keepdim=True) * sign


def _l1(delta: Tensor) -> Tensor:
    return delta.abs().sum(dim=1)


def _l2(delta: Tensor) -> Tensor:
    return delta.norm(dim=1)


_BALLS: dict[str, _Ball] = {
    "linf": _Ball(
        length=lambda delta: delta.abs().amax(dim=1),
        project=lambda delta, radius: delta.clamp(-radius, radius),
        steepest=lambda gradient, x: gradient.sign(),
        sample=_sample_linf,
    ),
    "l2": _Ball(_l2, _rescale(_l2), _unit_l2, _sample_l2),
    "l1": _Ball(_l1, _rescale(_l1), _steepest_coordinate, _sample_l1),
}


def distance(x_adv: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """(N,) float64 distances; l0 counts pixels (all channels together); none gives linf."""
    delta = (x_adv.double() - x.double()).detach()
    if norm == "l0":
        return (delta != 0).any(dim=1).flatten(1).sum(dim=1).double()
    return _BALLS["linf" if norm == "none" else norm].length(delta.flatten(1))


def within(distances: Tensor, threat: Threat) -> Tensor:
    """(N,) bool: inside ε, up to the rounding of float32."""
    if threat.eps is None:
        return distances.isfinite()
    return distances <= float(threat.eps) * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK


def project(x_adv: Tensor, x: Tensor, norm: Norm, eps: float) -> Tensor:
    """x_adv clipped to the box, then to the ball around x; x in the box keeps the result in it."""
    delta = (x_adv.clamp(0, 1) - x).flatten(1)
    return (x + _BALLS[norm].project(delta, eps).view_as(x)).clamp(0, 1)


def shrink(x_adv: Tensor, x: Tensor, norm: Norm, eps: float) -> Tensor:
    """x_adv clipped to the ball around x alone, whatever the box."""
    delta = (x_adv - x).flatten(1)
    return x + _BALLS[norm].project(delta, eps).view_as(x)


def surface_start(x: Tensor, norm: Norm, eps: float, rng: Generator) -> Tensor:
    """On the surface of the ball as AutoAttack starts (linf: from a cube, l2: in any direction, l1:
    the nearest point to Gaussian noise), then clipped to the box. Drawn on the CPU."""
    import torch

    if norm == "l1":
        return project_l1(x + torch.randn(x.shape, generator=rng).to(x), x, eps)
    if norm == "linf":
        drawn = 2 * torch.rand(x.shape, generator=rng) - 1
    else:
        drawn = torch.randn(x.shape, generator=rng)
    length = _BALLS[norm].length(drawn.flatten(1)).view(-1, *[1] * (x.dim() - 1))
    return (x + (eps * drawn / length.clamp_min(1e-12)).to(x)).clamp(0, 1)


def project_l1(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point in l2 of the intersection of box and l1 ball (Croce & Hein 2021,
    arXiv:2103.01208, section 3), by bisection for the one shrinkage λ that all pixels share; so
    far inside that the rounding of x' to float32, pixel by pixel, does not add up to more."""
    import torch

    eps = max(eps - 2**-24 * x[0].numel(), 0.9 * eps)
    delta = (x_adv - x).flatten(1).double()
    base = x.flatten(1).double()
    room = torch.where(delta > 0, 1 - base, base)
    size = delta.abs()

    def shrunk(by: Tensor) -> Tensor:
        return (size - by[:, None]).clamp_min(0).minimum(room)

    low, high = torch.zeros_like(size[:, 0]), size.amax(dim=1)
    for _ in range(60):
        middle = (low + high) / 2
        outside = shrunk(middle).sum(dim=1) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    inside = shrunk(torch.zeros_like(low)).sum(dim=1) <= eps
    kept = shrunk(high.masked_fill(inside, 0)) * delta.sign()
    return (x + kept.to(x).view_as(x)).clamp(0, 1)


def ascend(gradient: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """The direction of unit length that gains most, to first order; shape of the gradient."""
    return _BALLS[norm].steepest(gradient.flatten(1), x.flatten(1)).view_as(gradient)


def random_start(x: Tensor, norm: Norm, eps: float, rng: Generator) -> Tensor:
    """Uniform in the ball around x, then clipped to the box. Drawn on the CPU: equal everywhere."""
    n, d = len(x), x[0].numel()
    return (x + eps * _BALLS[norm].sample(n, d, rng).to(x).view_as(x)).clamp(0, 1)
