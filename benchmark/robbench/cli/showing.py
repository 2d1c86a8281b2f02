"""Commands that show: list, leaderboard, compare, completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli import check_installation
from robbench.cli.options import out_option
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
@out_option("Folder of records.")
@click.option(
    "--check", is_flag=True, help="Write nothing; exit 1 where a page or record is wrong."
)
@click.option(
    "--findings",
    "finding",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A page whose tables of published evaluations are written too (docs/findings.md).",
)
def leaderboard_command(out: Path, check: bool, finding: Path | None) -> None:
    """Write DATASET.md, DATASET.csv and DATASET.flags.json from the records below OUT, and the
    pages of papers that are there.

    --check also says what is wrong with the records, costs and figures themselves, and which files
    are missing or nobody's (CONTRIBUTING.md).
    """
    from robbench.audit import audit
    from robbench.boards import pages
    from robbench.contributions import collect, problems
    from robbench.contributions.files import file_problems
    from robbench.contributions.pages import paper_pages
    from robbench.records import Store, write_text
    from robbench.reproducing import begun

    store = Store(out)
    if check:
        found, wrong = collect(store)
        if wrong := [*wrong, *problems(store, found)]:
            click.echo("\n".join([*wrong, "pages are compared once the records are right"]))
            click.get_current_context().exit(1)
        records = list(found.values())
    else:
        records = list(store.all())
    if not records:
        raise InputError(f"there are no records below {store.folder}; 'robbench run' writes some")
    by_dataset: dict[str, list[Record]] = {}
    for record in records:
        by_dataset.setdefault(record.cell.dataset, []).append(record)
    texts: dict[Path, str] = {}
    audits: dict[str, Audited] = {}
    for dataset, beside in by_dataset.items():
        audits |= (assessed := audit(beside))
        texts |= {out / name: text for name, text in pages(dataset, beside, assessed).items()}
    papers = paper_pages(store, records, audits)
    texts |= papers.texts
    if finding is not None:
        from robbench.findings import page

        try:
            old = finding.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{finding} is no page in UTF-8: {error}") from None
        texts[finding] = page(old, records, audits)
    lines = [*papers.broken, *papers.doubts]
    if not check:
        for path, text in texts.items():
            write_text(path, text)
    else:
        lines += file_problems(store, texts)
        if differing := [str(path) for path, text in texts.items() if _text(path) != text]:
            names = ", ".join(differing)
            lines.append(f"not what the records say: {names}; run 'robbench leaderboard'")
    for line in lines:
        click.echo(line, err=not check)
    if papers.broken or check and lines:
        click.get_current_context().exit(1)
    made = [*by_dataset, *(f"{key} at {scale}" for key, scale in begun(out))]
    click.echo(f"{'checked' if check else 'wrote'} {', '.join(made)} in {out}")


def _text(path: Path) -> str | None:
    """What a page says now; None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--dataset", default="digits", show_default=True)
@out_option("Folder of records.")
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
