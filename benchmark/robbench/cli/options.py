"""Options that several commands share, and what completes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from robbench.errors import InputError, check_timeout

F = TypeVar("F", bound=Callable[..., Any])


def _names(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def complete(ctx: click.Context, param: click.Parameter, text: str) -> list[str]:
        from robbench import registry

        return [name for name in getattr(registry, kind) if name.startswith(text)]

    return complete


def defense_option(required: bool) -> Callable[[F], F]:
    return click.option(
        "--defense",
        required=required,
        shell_complete=_names("defenses"),
        help="A spec such as ito or 'ito(omega=0.4)'; A & B joins; a comma list is a grid.",
    )


def attack_option(function: F) -> F:
    return click.option(
        "--attack",
        default="pgd",
        show_default=True,
        shell_complete=_names("attacks"),
        help="pgd, fgsm, …, torchattacks:NAME, art:NAME; a comma list is a grid.",
    )(function)


def _seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    check_timeout(value)
    return value


def timeout_option(function: F) -> F:
    return click.option(
        "--timeout",
        type=float,
        callback=_seconds,
        help="Seconds for each training and each shard of images.  [default: none]",
    )(function)


def _folder(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    if value.exists() and not value.is_dir():
        raise InputError(f"--out {value} is a file; write the folder of the records")
    return value


def out_option(text: str) -> Callable[[F], F]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path("leaderboards"),
        show_default=True,
        callback=_folder,
        help=text,
    )


def common(function: F) -> F:
    """--out, --data-dir and --device."""
    for option in (
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda", "mps"]),
            default="auto",
            show_default=True,
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            envvar="ROBBENCH_DATA",
            help="Where datasets lie.  [default: $ROBBENCH_DATA or the user's cache]",
        ),
        out_option("Folder of records and tables."),
    ):
        function = option(function)
    return function
