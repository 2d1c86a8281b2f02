"""The command `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli import check_installation
from robbench.cli.options import common
from robbench.errors import InputError

if TYPE_CHECKING:
    from robbench.cell import Cell
    from robbench.runner import Shared


@click.command("verify")
@click.argument("record", type=click.Path(path_type=Path))
@common
def verify_command(record: Path, out: Path, data_dir: Path | None, device: str) -> None:
    """Run a record again and say whether it holds: bitwise, within the interval, or not (exit 1).

    RECORD is the path of a record's JSON file; checkpoints are looked up beside it.
    """
    check_installation()
    from robbench.cell import MODEL
    from robbench.cli.terminal import Console
    from robbench.contributions import image_problems
    from robbench.environment import choose_device
    from robbench.executors import measure
    from robbench.metrics import metrics
    from robbench.records import read
    from robbench.runner import Shared

    if not record.exists() or record.suffix != ".json":
        raise InputError(f"{record} is no record; give the path of a .json file below records/")
    old = read(record)
    if old is None:
        raise InputError(f"the record {record} is of another schema version")
    if old.status != "ok":
        raise InputError(f"the record {record} is of a failed cell ({old.reason})")
    if old.cell.defense.startswith(MODEL) or (old.cell.setting.oracle or "").startswith(MODEL):
        raise InputError(f"the record {record} is of a model of yours: use robbench.evaluate again")
    beside = record.resolve().parents[3] if len(record.resolve().parents) > 3 else out
    shared = Shared(beside, data_dir, choose_device(device))
    _check_identity(old.cell, shared)
    if wrong := list(image_problems(record, old, shared.dataset(old.cell.dataset))):
        click.echo(f"does not hold: {'; '.join(wrong)}")
        click.get_current_context().exit(1)
    with Console().progress([old.cell], shared) as progress:
        new = next(measure([old.cell], None, shared, report=progress.report))
        progress.record(new)
    if new.status != "ok":
        click.echo(f"does not hold: the cell fails now ({new.reason})")
        click.get_current_context().exit(1)
    was, now = metrics(old), metrics(new)
    figures = (
        f"accuracy {100 * was.accuracy.value:.2f} % then, {100 * now.accuracy.value:.2f} % now"
    )
    same = all(
        bool((getattr(old, key) == getattr(new, key)).all()) for key in ("ok", "err", "distance")
    )
    low, high = was.accuracy.interval
    if new.provenance["weights"] != old.provenance.get("weights", new.provenance["weights"]):
        figures += "; with other weights: they were trained again since"
    if same:
        click.echo(f"holds bitwise: {figures}")
    elif low <= now.accuracy.value <= high:
        click.echo(f"holds within the interval {100 * low:.2f}–{100 * high:.2f} %: {figures}")
    else:
        click.echo(f"does not hold: {figures}, outside {100 * low:.2f}–{100 * high:.2f} %")
        click.get_current_context().exit(1)


def _check_identity(cell: Cell, shared: Shared) -> None:
    """A record of other data or of another version cannot be re-run, only contradicted."""
    from robbench.attacks import Configured
    from robbench.cell import suite_digest
    from robbench.defense import version_of

    data = shared.dataset(cell.dataset).hash[:16]
    if data != cell.data:
        raise InputError(f"the data differ: {cell.dataset} has the hash {data}, not {cell.data}")
    now = (version_of(cell.defense), Configured.of(cell.attack).version)
    oracle = cell.setting.oracle
    suite = suite_digest(cell.stages()) if cell.setting.suite else ""
    if (
        now != (cell.defense_version, cell.attack_version)
        or suite != cell.setting.suite
        or (oracle is not None and version_of(oracle) != cell.setting.oracle_version)
    ):
        raise InputError(
            f"another version of {cell} was recorded: what it is made of gives other numbers now"
        )
