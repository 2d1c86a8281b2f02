"""What a flag is, and the checks that raise flags, by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from robbench.audit.case import Case

Verdict = Literal["INVALID", "OVERESTIMATE", "WARN", "INFO"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # the worst first
LEAST = 3  # images: fewer are luck
SHARE = 0.005  # of the images, where that is more


class Flag(NamedTuple):
    """What a check found in a record: a figure beside its threshold, both as the line says, the
    images that show it (places in the evaluated order), and one line for the reader."""

    id: str
    verdict: Verdict
    figure: float
    threshold: float
    n: int
    images: tuple[int, ...]
    line: str


class Raised(NamedTuple):
    """What a check returns; its number is added by the registry."""

    verdict: Verdict
    figure: float
    threshold: float
    line: str
    images: Sequence[int] | np.ndarray = ()


Look = Callable[["Case"], "Iterable[Raised] | None"]


class Check(NamedTuple):
    """A registered check: None from `look` means that the records do not tell."""

    id: str
    title: str
    look: Look

    def __call__(self, case: Case) -> list[Flag] | None:
        found = self.look(case)
        if found is None:
            return None
        n = case.record.cell.n
        return [
            Flag(
                self.id,
                raised.verdict,
                round(float(raised.figure), 6),
                round(float(raised.threshold), 6),
                n,
                tuple(int(image) for image in raised.images),
                raised.line,
            )
            for raised in found
        ]


CHECKS: dict[str, Check] = {}


def check(name: str, title: str) -> Callable[[Look], Look]:
    """Register `look(case)` under a number such as F3; two of one number are an error."""

    def register(look: Look) -> Look:
        if name in CHECKS:
            raise RuntimeError(f"{name} is registered twice: {CHECKS[name].title}, {title}")
        CHECKS[name] = Check(name, title, look)
        return look

    return register


def enough(count: int, n: int) -> bool:
    """Whether so many images of n are more than luck."""
    return count >= max(LEAST, SHARE * n)
