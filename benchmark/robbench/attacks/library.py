"""What the adapters of torchattacks and ART share: traits of a class, its settings, the one run.

A class of a library is described by one line of a table (Traits). Its settings are the arguments
of its constructor with the library's own defaults; norm, ε, labels, seeds, devices and progress
bars are the adapter's business and no settings.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import Attack, Needs, choose_targets
from robbench.errors import InputError
from robbench.randomness import sandboxed
from robbench.threat import Eps, Norm, Threat, parse_eps

_HANDLES = ("self", "model", "classifier", "estimator", "estimator_orig", "summary_writer")
_FOLLOW = ("eps", "norm", "seed", "n_classes", "verbose", "targeted", "batch_size")
FILLED = frozenset(_HANDLES + _FOLLOW)  # arguments that the adapter fills in


class Job(NamedTuple):
    """What a library is asked to do with one batch; images are float32 in [0, 1], contiguous."""

    access: Access
    x: Tensor
    y: Tensor
    target: Tensor | None
    threat: Threat
    settings: Mapping[str, Any]
    seed: int


Guard = Callable[[Job], str | None]  # the reason why a result could not be believed, None if fine


@dataclass(frozen=True)
class Traits:
    """One class of a library, as its documentation and its code say.

    moves: moves every image, so that a batch that comes back untouched is a fault. single: is fed
    image by image. aims: its labels are targets, also in an untargeted run (random ones then).
    eps, step, steps: the names of its arguments; a step not given is `pace` ε / steps.
    decimals: arguments whose default is whole but which take decimals. keeps: arguments that the
    adapter fills in elsewhere. overrides: defaults that cannot work as the library has them.
    """

    norms: tuple[Norm, ...] = ("linf",)
    needs: Needs = "gradients"
    minimal: bool = False
    targeted: bool = True
    moves: bool = False
    single: bool = False
    aims: bool = False
    eps: str = "eps"
    step: str = ""
    steps: str = ""
    pace: float = 2.5
    labels: int = 2
    channels: tuple[int, ...] = ()
    decimals: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    overrides: Mapping[str, object] = field(default_factory=dict)
    guard: Guard | None = None
    faults: str = ""
    refusal: str | None = None


def _decimal(value: object) -> object:
    """'1/4' as well as 0.25."""
    return float(Fraction(value)) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_decimal)]


def settings_of(
    name: str, constructor: Callable[..., object] | None, traits: Traits
) -> type[BaseModel]:
    """The pydantic model of a constructor's arguments; a class that is refused has none."""
    fields: dict[str, Any] = {}
    filled = (FILLED | {traits.eps, *traits.drops}) - set(traits.keeps)
    parameters = inspect.signature(constructor).parameters.values() if constructor else ()
    for parameter in parameters:
        if parameter.name in filled or parameter.default is inspect.Parameter.empty:
            continue
        default = traits.overrides.get(parameter.name, parameter.default)
        kind = _kind(parameter.name, default, traits)
        if parameter.name == traits.step:
            fields[parameter.name] = (Eps | None, None)
        elif kind is not None:
            fields[parameter.name] = (kind, default)
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(f"{name} settings", __config__=config, **fields)


def _kind(name: str, default: object, traits: Traits) -> Any:
    """The type of an argument by its default; None for what no spec can write."""
    if name in traits.choices:
        return Literal[traits.choices[name]]
    if name in traits.decimals:
        return Number if default is not None else Number | None
    if isinstance(default, bool):
        return bool
    if isinstance(default, int):
        return Annotated[int, Field(ge=min(default, 1))]
    if isinstance(default, tuple):
        return tuple[int | float, ...]
    return {float: Number, str: str}.get(type(default))


def attack_of(
    library: str,
    name: str,
    constructor: Callable[..., object] | None,
    traits: Traits,
    craft: Callable[[Job], Tensor],
    quiet: str,
) -> Attack:
    """The Attack of one class; `craft` calls the library, `quiet` names its modules."""
    full = f"{library}:{name}"

    def run(
        access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator, **settings: Any
    ) -> Tensor:
        return _run(full, traits, craft, quiet, Job(access, x, y, None, threat, settings, 0), rng)

    return Attack(
        name=full,
        run=run,
        norms=frozenset(traits.norms),
        needs=traits.needs,
        minimal=traits.minimal,
        targeted=traits.targeted,
        faults=traits.faults,
        refusal=traits.refusal,
        open_settings=settings_of(full, None if traits.refusal else constructor, traits),
    )


def _run(
    name: str, traits: Traits, craft: Callable[[Job], Tensor], quiet: str, job: Job, rng: Generator
) -> Tensor:
    """Refuse what cannot be believed; else let the library work where it can do no harm."""
    access, x = job.access, job.x
    _refuse(name, traits, job)
    seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
    with sandboxed(access.deployed, seed), _silence(quiet):
        images = x.detach().to(torch.float32).contiguous().clone()
        aim = job.threat
        if traits.aims and not aim.targeted:
            aim = aim.model_copy(update={"target": "random"})
        target = choose_targets(access, images, job.y, aim, rng)
        job = job._replace(x=images, target=target, seed=seed)
        if traits.guard and (reason := traits.guard(job)):
            raise InputError(f"attack {name}: {reason}")
        parts = [craft(part) for part in (_singles(job) if traits.single else [job])]
        result = torch.cat(parts).detach().to(x.device, torch.float32).contiguous().clone()
        if traits.moves:
            _check_moved(name, job, result)
    return result


def _singles(job: Job) -> Iterator[Job]:
    for index in range(len(job.x)):
        one = slice(index, index + 1)
        target = None if job.target is None else job.target[one]
        seed = (job.seed + index) % 2**31
        yield job._replace(x=job.x[one], y=job.y[one], target=target, seed=seed)


def _refuse(name: str, traits: Traits, job: Job) -> None:
    """What can be known before anything is computed."""
    threat, labels, channels = job.threat, job.access.deployed.labels, job.x.shape[1]
    reason = traits.refusal
    if reason is None and threat.norm not in traits.norms:
        reason = f"has no norm {threat.norm}; it has {', '.join(traits.norms)}"
    elif reason is None and threat.targeted and not traits.targeted:
        reason = "has no targeted mode that works"
    elif reason is None and threat.eps is None and not traits.minimal and threat.norm != "none":
        reason = f"needs an ε under {threat.norm}"
    elif reason is None and labels < traits.labels:
        reason = f"needs at least {traits.labels} labels, the defense has {labels}"
    elif reason is None and traits.channels and channels not in traits.channels:
        wanted = " or ".join(map(str, traits.channels))
        reason = f"works on images of {wanted} channels only, these have {channels}"
    if reason:
        raise InputError(f"attack {name}: {reason}")


def _check_moved(name: str, job: Job, result: Tensor) -> None:
    """An attack that must move every image and moves none that counts has not run."""
    unchanged = (result.to(job.x.device) == job.x).flatten(1).all(dim=1)
    if not bool(unchanged.any()):
        return
    right = job.access.deployed.decide(job.x, 1)[0].to(job.y.device) == job.y
    if bool(right.any()) and bool(unchanged[right].all()):
        raise RuntimeError(
            f"attack {name} changed nothing on all {int(right.sum())} rightly classified of"
            f" {len(right)} images; its gradient is zero or not a number there"
        )


@contextlib.contextmanager
def _silence(modules: str) -> Iterator[None]:
    """Warnings that a library's own code causes are no business of our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=modules)
        yield


def arguments(job: Job, traits: Traits, norm: Callable[[Norm], object] | None) -> dict[str, Any]:
    """The settings plus norm, ε and step by the names that the constructor has for them."""
    values = dict(job.settings)
    if norm is not None:
        values["norm"] = norm(job.threat.norm)
    if job.threat.eps is None:
        return {key: value for key, value in values.items() if key != traits.step or value}
    eps = float(job.threat.eps)
    if not traits.minimal:
        values[traits.eps] = int(eps) if job.threat.norm == "l0" else eps
    if traits.step:
        given = values.get(traits.step)
        steps = values[traits.steps] if traits.steps else 1
        default = traits.pace * eps / steps
        values[traits.step] = default if given is None else float(parse_eps(given))
    return values
