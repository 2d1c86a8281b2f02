"""Commands that show: list, leaderboard, compare, completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli import check_installation
from robbench.errors import InputError, unknown

if TYPE_CHECKING:
    from robbench.audit import Audited
    from robbench.records import Record

KINDS = ("defenses", "attacks", "datasets", "networks")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), metavar="|".join(KINDS))
@click.argument("name", required=False)
def list_command(kind: str, name: str | None) -> None:
    """List what specs can name, with what each can do; one defense or attack with its settings.

    \b
    robbench list defenses
    robbench list defenses ito
    robbench list attacks apgd
    """
    check_installation()
    from robbench import listing

    if name is None:
        click.echo(getattr(listing, kind)())
    elif kind in ("defenses", "attacks"):
        click.echo(getattr(listing, kind)(name))
    else:
        raise InputError(f"{kind} are listed all at once: write 'robbench list {kind}'")


@click.command("leaderboard")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("leaderboards"),
    show_default=True,
    help="Folder of records.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page differs.")
@click.option(
    "--findings",
    "finding",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A page whose tables of published evaluations are written too (docs/findings.md).",
)
def leaderboard_command(out: Path, check: bool, finding: Path | None) -> None:
    """Write DATASET.md, DATASET.csv and DATASET.flags.json from the records below OUT."""
    from robbench.audit import audit
    from robbench.boards import pages
    from robbench.cli.running import write_board, write_page
    from robbench.records import Store

    store = Store(out)
    by_dataset: dict[str, list[Record]] = {}
    for record in store.all():
        by_dataset.setdefault(record.cell.dataset, []).append(record)
    if not by_dataset:
        raise InputError(f"there are no records below {store.folder}; 'robbench run' writes some")
    differing: list[str] = []
    audits: dict[str, Audited] = {}
    for dataset, records in by_dataset.items():
        found = audit(records)
        audits |= found
        if not check:
            write_board(store, dataset, records, found)
            continue
        for name, text in pages(dataset, records, found).items():
            path = out / name
            if not path.exists() or path.read_text() != text:
                differing.append(str(path))
    if finding is not None:
        from robbench.findings import page

        old = finding.read_text()
        new = page(old, [each for records in by_dataset.values() for each in records], audits)
        if check and new != old:
            differing.append(str(finding))
        elif not check:
            write_page(finding, new)
    if differing:
        click.echo(f"not what the records say: {', '.join(differing)}; run 'robbench leaderboard'")
        click.get_current_context().exit(1)
    click.echo(f"{'checked' if check else 'wrote'} {', '.join(by_dataset)} in {out}")


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--dataset", default="digits", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("leaderboards"),
    show_default=True,
    help="Folder of records.",
)
def compare_command(a: str, b: str, dataset: str, out: Path) -> None:
    """Compare A and B on the same images wherever both were attacked alike.

    A and B are defense specs, with @SETTING to choose one (ito@whitebox ito@adaptive), or paths of
    two records. p: exact McNemar for deterministic defenses, else a paired sign-flip permutation
    test; then Holm over the table.
    """
    from robbench.compare import compare

    click.echo(compare(a, b, dataset, out))


@click.command("completion")
@click.argument("shell")
def completion_command(shell: str) -> None:
    """Print the completion script of bash, zsh or fish.

    \b
    robbench completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    from robbench.cli import cli

    found = get_completion_class(shell)
    if found is None:
        raise unknown("shell", shell, ["bash", "zsh", "fish"])
    click.echo(found(cli, {}, "robbench", "_ROBBENCH_COMPLETE").source())
