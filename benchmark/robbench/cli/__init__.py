"""The command line: parse, call, print. torch is imported only inside commands that need it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from robbench.errors import InputError, unknown

COMMANDS = {
    "run": ("robbench.cli.running", "Run attacks on defenses and print the table."),
    "audit": ("robbench.cli.auditing", "Say whether a number can be believed, and why not."),
    "train": ("robbench.cli.training", "Train a defense and keep its checkpoint."),
    "list": ("robbench.cli.showing", "List defenses, attacks, datasets or networks."),
    "reproduce": ("robbench.cli.reproducing", "Measure a published table, claim or figure again."),
    "leaderboard": ("robbench.cli.showing", "Write the tables of a folder from its records."),
    "compare": ("robbench.cli.showing", "Compare two defenses, paired, with p-values."),
    "verify": ("robbench.cli.verifying", "Run a record again and say whether it holds."),
    "data": ("robbench.cli.data", "Fetch a dataset, check it, say where it is and what it holds."),
    "completion": ("robbench.cli.showing", "Print the completion script of a shell."),
}


class Mistake(click.ClickException):
    """A mistake of the user: one line, exit code 2."""

    exit_code = 2


class Lazy(click.Group):
    """Commands by name; a module is imported when its command is called or its help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        found = getattr(importlib.import_module(COMMANDS[name][0]), f"{name}_command")
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise Mistake(str(unknown("command", args[0], COMMANDS)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise Mistake(str(error)) from None


@click.group(
    cls=Lazy,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="robbench", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """What an adversarial defense is really worth.

    \b
    robbench run --defense ito --attack pgd
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. An interrupted run keeps every finished cell."""
    try:
        code = cli.main(arguments, prog_name="robbench", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo(
            "robbench: interrupted; finished cells are kept, run it again to go on", err=True
        )
        sys.exit(130)
    except click.ClickException as error:  # click shows its own ones in three lines
        click.echo(f"robbench: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def check_installation() -> None:
    """torch and torchvision that do not fit together fail here, in words, and not later."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision.ops")
    except Exception as error:
        from importlib.metadata import version

        raise InputError(
            f"torch {version('torch')} and torchvision {version('torchvision')} do not fit together"
            f" ({' '.join(str(error).split())[:120]}); install a pair that does:"
            " pip install --force-reinstall torch torchvision"
        ) from None
