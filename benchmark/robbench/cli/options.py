"""Options that several commands share, and what completes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=Path("leaderboards"),
            show_default=True,
            help="Folder of records, checkpoints and tables.",
        ),
    ):
        function = option(function)
    return function
