"""What a user did wrong, in one line; the command line prints it, no traceback, exit code 2."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input; the message says what came in, what is allowed and what to write instead."""


def check_timeout(seconds: float | None) -> None:
    """InputError for what no lock can wait; None is no limit."""
    if seconds is not None and not 0 < seconds <= threading.TIMEOUT_MAX:
        raise InputError(f"timeout = {seconds}: write a positive number of seconds or leave it out")


def problem_of(error: Exception) -> str:
    """The first line of what went wrong; of what a model refuses, the first field with it."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error).partition("\n")[0] or type(error).__name__
    first = error.errors()[0]
    text = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, first['loc']))}: {text}" if first["loc"] else text


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """The error for a name that does not exist, with the nearest ones that do.

    >>> str(unknown("defense", "itto", ["ito", "standard"]))
    "unknown defense 'itto'; did you mean 'ito'?"
    """
    options = sorted(known)
    folded = [option.lower() for option in options]
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, match, name.lower()).ratio() for match in close]
    near = [  # beside one that is nearly it, far ones would puzzle
        options[folded.index(match)]
        for match, ratio in zip(close, likeness, strict=True)
        if ratio > likeness[0] - 0.25
    ]
    if near:
        advice = f"did you mean {' or '.join(repr(option) for option in near)}?"
    else:
        advice = f"known: {', '.join(options)}" if len(options) <= 20 else "see 'robbench list'"
    return InputError(f"unknown {kind} {name!r}; {advice}" + (f" {hint}" if hint else ""))
