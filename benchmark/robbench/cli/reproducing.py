"""The command reproduce: a published table beside what is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from robbench.cli import check_installation
from robbench.cli.options import common, timeout_option
from robbench.cli.running import measured, workers_of
from robbench.errors import InputError
from robbench.papers.paper import SCALES

if TYPE_CHECKING:
    from robbench.cell import Cell
    from robbench.records import Store
    from robbench.runner import Shared, Training

FORMATS = ("text", "markdown", "latex", "bibtex", "csv", "json")


@click.command("reproduce")
@click.argument("what", required=False)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="cpu",
    show_default=True,
    help="smoke: a minute; cpu: small networks and subsets; paper: as published.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--estimate", is_flag=True, help="Say what it would cost, and run nothing.")
@click.option("--show", is_flag=True, help="From the records there are; run nothing.")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one per core]")
@timeout_option
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
        if options["form"] != "text":
            raise InputError(f"--format {options['form']} of what? write PAPER or PAPER:PART")
        for name in ("estimate", "show"):
            if options[name]:
                raise InputError(f"--{name} what? write PAPER or PAPER:PART")
        from robbench.papers.listing import listing

        click.echo(listing())
        return
    if options["estimate"] and options["show"]:
        raise InputError("--estimate says what is to come and --show what is there; write one")
    if options["form"] == "bibtex":
        from robbench.papers import select
        from robbench.papers.latex import bibtex

        click.echo(bibtex(select(options["what"])[0]))
        return
    check_installation()
    from robbench.environment import choose_device
    from robbench.papers.estimate import estimate
    from robbench.records import Store, write_text
    from robbench.rendering import page_files, rendered
    from robbench.reproducing import known_of, loader, part_of
    from robbench.runner import Shared

    out, data_dir = options["out"], options["data_dir"]
    load = loader(out, data_dir, options["estimate"])
    part = part_of(options["what"], options["scale"], out, load)
    cells = part.cells()
    if options["show"]:
        if options["device"] != "auto":
            part.costs.look_up(choose_device(options["device"]))
        known = known_of(part, cells)
        for doubt in part.doubts(known):
            click.echo(doubt, err=True)
        click.echo(rendered(part, known, options["form"]))
        return
    shared, store = Shared(out, data_dir, choose_device(options["device"])), Store(out)
    part.costs.look_up(shared.device, shared.shelf)
    missing = [cell for cell in cells if store.get(cell) is None]
    trainings, shown = part.trainings(shared.shelf), part.figures.attacked(shared.shelf)
    if options["estimate"]:
        names = {cell.dataset for cell in cells} | {each.dataset for each in trainings}
        shared.given |= {name: load(name) for name in names}
    if options["estimate"] or ((missing or trainings or shown) and not options["quiet"]):
        said = estimate(missing, shared, workers_of(options), trainings, shown)
        click.echo(said, err=not options["estimate"])
    if options["estimate"]:
        return
    store.check_writable()
    failed = _run(missing, trainings, store, shared, options)
    unmeasured = part.measure_costs(shared)
    known = known_of(part, cells)
    problems = [*unmeasured, *part.figures.draw(shared, known)]
    for problem in problems:
        click.echo(problem, err=True)
    if part.part is None:
        for path, text in page_files(part, known).items():
            write_text(path, text)
    click.echo(rendered(part, known, options["form"]))
    if failed or problems:
        click.get_current_context().exit(1)


def _run(
    missing: Sequence[Cell],
    trainings: Sequence[Training],
    store: Store,
    shared: Shared,
    options: dict[str, Any],
) -> bool:
    """Run what is missing, trainings for costs and figures with it; whether a cell failed."""
    options = {**options, "as_json": False}
    made = measured(missing, store, shared, options, False, trainings)
    return any([record.status != "ok" for record in made])  # all of them, not up to the first
