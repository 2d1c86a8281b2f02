"""The command audit: can this number be believed?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from robbench.cli import check_installation
from robbench.cli.options import attack_option, common, defense_option, timeout_option
from robbench.errors import InputError

if TYPE_CHECKING:
    from fractions import Fraction

    from robbench.audit import Audited
    from robbench.cell import Cell
    from robbench.records import Record
    from robbench.threat import Norm

TESTS = ("binarization", "backdoor")
SHOWN = 8  # images that a line names


@click.command("audit")
@defense_option(required=True)
@attack_option
@click.option("--norm", default="linf", show_default=True)
@click.option("--eps", help="ε such as 8/255.  [default: the second of the dataset's list]")
@click.option("--dataset", default="digits", show_default=True, help="A name or folder:PATH.")
@click.option("-n", "count", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--thorough",
    is_flag=True,
    help="Also longer, larger, rescaled, transferred, queried, random, planted; other seeds.",
)
@click.option("--test", type=click.Choice(TESTS), help="That test of the attack alone.")
@click.option("--preset", default="quick", show_default=True, help="quick or paper.")
@click.option("--train-seed", type=int, default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one per core]")
@timeout_option
@click.option("--json", "as_json", is_flag=True, help="Flags as JSON on stdout, no progress.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the verdict.")
@common
def audit_command(**options: Any) -> None:
    """Say whether the number of an attack on a defense can be believed, and why not.

    Runs the attack and what speaks for or against it, as far as there are no records yet, and
    raises the flags F1 to F38 (docs/flags.md).

    \b
    robbench audit --defense ito
    robbench audit --defense 'adp' --attack 'pgd(steps=50)' --thorough
    robbench audit --defense mmc --test binarization
    """
    from robbench.registry import Spec, split_list
    from robbench.threat import parse_eps, parse_norm

    norm = parse_norm(options["norm"])
    eps = None if options["eps"] is None else parse_eps(options["eps"])
    for kind in ("defense", "attack"):
        listed = split_list(options[kind])
        if len(listed) != 1 or Spec.parse(listed[0]).member == "*":
            raise InputError(f"--{kind} {options[kind]}: an audit is of one {kind}; write one")
    if options["thorough"] and options["test"]:
        raise InputError(f"--thorough has the test {options['test']} in it; write one of them")
    check_installation()
    from robbench.audit import audit
    from robbench.cli.running import measured, write_board
    from robbench.environment import choose_device
    from robbench.records import Store
    from robbench.runner import Shared

    shared = Shared(options["out"], options["data_dir"], choose_device(options["device"]))
    cells = _cells(options, norm, eps)
    store = Store(options["out"])
    store.check_writable()
    missing = [cell for cell in cells if store.get(cell) is None]
    for _ in measured(missing, store, shared, options, strict=len(missing) == len(cells)):
        pass  # they are in the store
    beside = list(store.all(cells[0].dataset))
    audits = audit(beside, None if missing else [cells[0].id])
    if missing:
        write_board(store, cells[0].dataset, beside, audits)
    subject = next((record for record in beside if record.id == cells[0].id), None)
    if subject is None:
        raise InputError(f"{cells[0]} has no record: it was not finished")
    failed = [record for record in beside if record.cell in cells and record.status != "ok"]
    found = audits[subject.id]
    show = _json if options["as_json"] else _text
    click.echo(show(subject, found, failed))
    if failed:
        click.get_current_context().exit(1)


def _cells(options: dict[str, Any], norm: Norm, eps: Fraction | None) -> list[Cell]:
    """What the audit needs, the cell on trial first."""
    from robbench import registry
    from robbench.audit.planning import plan

    dataset = registry.dataset(options["dataset"], options["data_dir"])
    source = click.get_current_context().get_parameter_source("count")
    if source is ParameterSource.COMMANDLINE:
        dataset.subset(options["count"])  # refuses more than there are
    return plan(
        options["defense"],
        dataset,
        attack=options["attack"],
        norm=norm,
        eps=eps,
        n=options["count"],
        depth=options["test"] or ("thorough" if options["thorough"] else "quick"),
        preset=options["preset"],
        train_seed=options["train_seed"],
    )


def _json(record: Record, found: Audited, failed: Sequence[Record]) -> str:
    from robbench.audit import badge

    values = {
        "cell": str(record.cell),
        "id": record.id,
        "badge": badge(found),
        "flags": [flag._asdict() for flag in found.flags],
        "assessed": found.assessed,
        "failed": {str(each.cell): each.reason for each in failed},
    }
    return json.dumps(values, indent=1, ensure_ascii=False)


def _text(record: Record, found: Audited, failed: Sequence[Record]) -> str:
    from robbench.audit import CHECKS, badge
    from robbench.audit.verdicts import number
    from robbench.metrics import metrics
    from robbench.tables import interval, percent

    lines = [f"{record.cell}, n = {record.cell.n}"]
    if record.status == "ok":
        share = metrics(record).robust_with_detection
        lines.append(f"robust with detection {percent(share)} % ({interval(share)})")
    lines += [f"verdict: {badge(found)}", ""]
    for flag in found.flags:
        images = ", ".join(map(str, flag.images[:SHOWN])) + ", …" * (len(flag.images) > SHOWN)
        lines += [
            f"{flag.id:<4} {flag.verdict:<12} {CHECKS[flag.id].title}",
            f"     {flag.line}",
            f"     {flag.figure:.4g} against {flag.threshold:.4g}"
            + (f"; images {images}" if images else ""),
        ]
    raised = {flag.id for flag in found.flags}
    clear = [name for name in found.assessed if name not in raised]
    unknown = sorted(set(CHECKS) - set(found.assessed), key=number)
    lines += [f"nothing found by {len(clear)} checks: {' '.join(clear)}"] * bool(clear)
    lines += [f"no evidence for {len(unknown)}: {' '.join(unknown)}"] * bool(unknown)
    lines += [f"failed: {record.cell}: {record.reason}" for record in failed]
    return "\n".join([*lines, "What they mean: docs/flags.md."])
