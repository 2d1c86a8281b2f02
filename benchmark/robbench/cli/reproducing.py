"""The command reproduce: a published table beside what is measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from robbench.cli import check_installation
from robbench.cli.options import common
from robbench.errors import InputError

if TYPE_CHECKING:
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
    check_installation()
    from robbench.environment import choose_device
    from robbench.records import Store
    from robbench.reproducing import known_of, loader, part_of, rendered
    from robbench.runner import Shared

    out, data_dir = options["out"], options["data_dir"]
    part = part_of(options["what"], options["scale"], out, loader(out, data_dir))
    shared = Shared(out, data_dir, choose_device(options["device"]))
    store = Store(out)
    if options["form"] != "bibtex" and not options["show"]:
        failed = _run(part, store, shared, options)
        if options["estimate"]:
            return
    click.echo(rendered(part, known_of(part), options["form"]))
    if options["form"] != "bibtex" and not options["show"] and failed:
        click.get_current_context().exit(1)


def _run(part: Part, store: Store, shared: Shared, options: dict[str, Any]) -> bool:
    """Run what is missing, with its estimate first; whether a cell failed."""
    from robbench.cli.running import measured
    from robbench.papers.estimate import estimate
    from robbench.reproducing import workers_of, write_pages

    cells = part.cells()
    missing = [cell for cell in cells if store.get(cell) is None]
    if options["estimate"] or (missing and not options["quiet"]):
        said = estimate(missing, shared, workers_of(options))
        click.echo(said, err=not options["estimate"])
    if options["estimate"]:
        return False
    store.check_writable()
    failed = False
    for record in measured(missing, store, shared, {**options, "as_json": False}, False):
        failed |= record.status != "ok"
    part.measure_costs(shared)
    for problem in part.draw(shared):
        click.echo(problem, err=True)
        failed = True
    if part.part is None:
        write_pages(part)
    return failed
