"""The command reproduce: a published table beside what is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from robbench.cli import check_installation
from robbench.cli.options import common
from robbench.cli.running import measured, workers_of, write_page
from robbench.errors import InputError

if TYPE_CHECKING:
    from robbench.grid import Cell
    from robbench.papers.reproduction import Known
    from robbench.records import Store
    from robbench.reproducing import Part
    from robbench.runner import Shared

FORMATS = ("text", "markdown", "latex", "bibtex", "csv", "json")


@click.command("reproduce")
@click.argument("what", required=False)
@click.option(
    "--scale",
    type=click.Choice(["smoke", "cpu", "paper"]),
    default="cpu",
    show_default=True,
    help="smoke: a minute; cpu: small networks and subsets; paper: as published.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--estimate", is_flag=True, help="Say what it would cost, and run nothing.")
@click.option("--show", is_flag=True, help="From the records there are; run nothing.")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one per core]")
@click.option("--timeout", type=float, help="Seconds for each training and shard of images.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the table.")
@common
def reproduce_command(**options: Any) -> None:
    """Measure a published table, the paper's claims or a figure again, and print both.

    WHAT is PAPER:PART, such as enresnet:table1, ito:claims or pdd:figure4; PAPER is all of it;
    without it, what there is. What is recorded already is not run again.

    \b
    robbench reproduce enresnet:table1
    robbench reproduce sdr:table2 --format latex
    robbench reproduce ito --scale paper --estimate
    """
    if options["what"] is None:
        from robbench.papers.listing import listing

        click.echo(listing())
        return
    if options["estimate"] and options["show"]:
        raise InputError("--estimate says what is to come and --show what is there; write one")
    if options["form"] == "bibtex":
        from robbench.papers import select
        from robbench.papers.pages import bibtex

        click.echo(bibtex(select(options["what"])[0]))
        return
    check_installation()
    from robbench.environment import choose_device
    from robbench.papers.estimate import estimate
    from robbench.records import Store
    from robbench.reproducing import known_of, loader, part_of, rendered
    from robbench.runner import Shared

    out, data_dir = options["out"], options["data_dir"]
    part = part_of(options["what"], options["scale"], out, loader(out, data_dir))
    cells = part.cells()
    if options["show"]:
        click.echo(rendered(part, known_of(part, cells), options["form"]))
        return
    shared, store = Shared(out, data_dir, choose_device(options["device"])), Store(out)
    missing = [cell for cell in cells if store.get(cell) is None]
    if options["estimate"] or (missing and not options["quiet"]):
        said = estimate(missing, shared, workers_of(options))
        click.echo(said, err=not options["estimate"])
    if options["estimate"]:
        return
    store.check_writable()
    failed = _run(missing, store, shared, options)
    part.measure_costs(shared)
    known = known_of(part, cells)
    failed |= _draw(part, shared, known)
    click.echo(rendered(part, known, options["form"]))
    if failed:
        click.get_current_context().exit(1)


def _run(missing: Sequence[Cell], store: Store, shared: Shared, options: dict[str, Any]) -> bool:
    """Run what is missing; whether a cell failed."""
    made = measured(missing, store, shared, {**options, "as_json": False}, False)
    return any([record.status != "ok" for record in made])  # all of them, not up to the first


def _draw(part: Part, shared: Shared, known: Known) -> bool:
    """The figures, and the pages of a whole paper; whether a figure could not be drawn."""
    from robbench.reproducing import page_files

    problems = part.draw(shared, known)
    for problem in problems:
        click.echo(problem, err=True)
    if part.part is None:
        for path, text in page_files(part, known).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_page(path, text)
    return bool(problems)
