"""The command `run`, and what other commands that compute share with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from robbench.cli import check_installation
from robbench.cli.options import attack_option, common, defense_option, timeout_option
from robbench.errors import InputError

BLOCK_OPTIONS = {
    "defense", "attack", "norm", "eps", "setting", "oracle", "eot", "target", "baseline", "dataset",
    "count", "seeds", "train_seeds", "assignments", "detector", "fpr", "goal", "max_queries",
    "budget",
}  # fmt: skip

if TYPE_CHECKING:
    from robbench.audit import Audited
    from robbench.cell import Cell
    from robbench.grid import Block
    from robbench.records import Record, Store
    from robbench.runner import Shared, Training


@click.command("run")
@defense_option(required=False)
@attack_option
@click.option(
    "--norm", help="linf, l2, l1, …: one or several.  [default: linf, or the attack's own]"
)
@click.option("--eps", help="ε such as 8/255 or 0.1,0.2.  [default: the dataset's list]")
@click.option("--setting", help="whitebox, adaptive, transfer, blackbox.")
@click.option(
    "--oracle",
    help="Defenses that transfer attacks are crafted on; or what they are to the target: twin,"
    " noise-off, undetected, base, member, members, adversarial, type-i, type-ii.",
)
@click.option("--eot", help="Draws behind a gradient, or auto: chosen by evidence.  [default: 20]")
@click.option("--goal", help="error or denial (no right answer), or both.  [default: error]")
@click.option("--budget", help="Of --attack strongest: smoke, standard or thorough.")
@click.option("--max-queries", type=click.IntRange(1), help="For each image, in blackbox.")
@click.option(
    "--target", default="none", show_default=True, help="A label, random, or least-likely."
)
@click.option("--baseline", default="standard,pgd-at", show_default=True, help="Or none.")
@click.option("--dataset", default="digits", show_default=True, help="A name or folder:PATH.")
@click.option("-n", "count", type=int, help="Test images.  [default: 500]")
@click.option("--preset", default="quick", show_default=True, help="quick or paper.")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Attack seeds 0, 1, …."
)
@click.option(
    "--train-seeds", type=click.IntRange(1), default=1, show_default=True, help="Trained models."
)
@click.option("--detector", help="confidence, non-me, k-density, lid or union.")
@click.option("--fpr", help="Clean images that the detector may refuse.  [default: 5%]")
@click.option("--set", "assignments", multiple=True, help="defense.KEY=V or attack.KEY=V.")
@click.option("--grid", type=click.Path(path_type=Path), help="A YAML file instead of the above.")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one per core]")
@timeout_option
@click.option(
    "--precision",
    help="Half an interval, such as 1%: with fewer images no number is called sound.",
)
@click.option("--keep-images", is_flag=True, help="Also write x', an .npz beside each record.")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON on stdout, no progress.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the table.")
@common
def run_command(**options: Any) -> None:
    """Run attacks on a defense and on baselines, write records and the leaderboard.

    What is already recorded is not run again; an interrupted run goes on where it was.

    \b
    robbench run --defense ito --attack pgd
    robbench run --defense 'ito(omega=0.2)' --attack pgd,fgsm --norm linf,l2
    robbench run --defense ito --attack pgd --setting transfer --oracle standard
    robbench run --grid grid.yaml
    """
    _check_options()
    precision = _precision(options["precision"])
    blocks = _blocks(options)
    if any("torchattacks:" in attack for block in blocks for attack in block.attack):
        check_installation()  # torchattacks imports torchvision, which costs a second: see below
    from robbench.audit import audit
    from robbench.audit.planning import probes
    from robbench.cli.terminal import Console
    from robbench.environment import choose_device
    from robbench.records import Store
    from robbench.runner import Shared
    from robbench.tables import rows

    shared = Shared(options["out"], options["data_dir"], choose_device(options["device"]))
    shared.keep_images = options["keep_images"]
    asked = _cells(blocks, options)
    looked = probes(asked, lambda name: len(shared.dataset(name).test.y))
    cells = list({cell.id: cell for cell in (*asked, *looked)}.values())
    silent = options["quiet"] or options["as_json"]
    for reason in dict.fromkeys(reason for block in blocks for reason in block.left_out):
        if not silent:
            click.echo(f"left out: {reason}", err=True)
    store = Store(options["out"])
    store.check_writable()
    known = {cell.id: store.get(cell, images=shared.keep_images) for cell in cells}
    missing = [cell for cell in cells if known[cell.id] is None]
    if missing:
        check_installation()
    strict = all(known[cell.id] is None for cell in asked)
    for record in measured(missing, store, shared, options, strict):
        known[record.cell.id] = record
    found = [record for record in known.values() if record is not None]
    audits: dict[str, Audited] = {}
    for name in dict.fromkeys(cell.dataset for cell in cells):
        new = any(cell.dataset == name for cell in missing)
        if new and not silent:
            click.echo(f"writing the tables of {name}", err=True)
        beside = list(store.all(name))
        found_here = audit(beside, None if new else known)
        audits |= found_here
        if new:
            write_board(store, name, beside, found_here)
    made = rows(found, audits)
    if options["as_json"]:
        from robbench.tables import flat

        click.echo(json.dumps([flat(row, precision) for row in made], indent=1))
    else:
        Console(quiet=silent).table(made, options["out"], precision)
    failed = [row for row in made if row.metrics is None]
    if failed:
        click.get_current_context().exit(1)


def _check_options() -> None:
    """Options that do not go together, before anything slow is imported."""
    context = click.get_current_context()
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }
    if "grid" in given:
        if clash := [option for name, option in given.items() if name in BLOCK_OPTIONS]:
            raise InputError(f"--grid is instead of {', '.join(clash)}; write these into the file")
        return
    if not context.params["defense"]:
        raise InputError("say what to attack: --defense ito (see 'robbench list defenses')")
    if "oracle" in given and "transfer" not in (context.params["setting"] or ""):
        raise InputError("--oracle is for the setting transfer; add --setting transfer")
    if "fpr" in given and "detector" not in given:
        raise InputError("--fpr is what a detector refuses; add --detector, such as k-density")


def _cells(blocks: Sequence[Block], options: dict[str, Any]) -> list[Cell]:
    """All cells in reading order, each once."""
    from robbench import registry
    from robbench.audit import is_diagnostic
    from robbench.grid import nothing

    cells: dict[str, Cell] = {}
    for block in blocks:
        dataset = registry.dataset(block.dataset, options["data_dir"])
        for cell in block.cells(dataset, options["preset"]):
            cells.setdefault(cell.id, cell)
    if not cells:
        raise nothing(blocks)
    if tests := {cell.attack for cell in cells.values() if is_diagnostic(cell)}:
        raise InputError(
            f"{', '.join(sorted(tests))}: no attack, but a test of one; write 'robbench audit' with"
            " --test binarization or backdoor"
        )
    return list(cells.values())


def _blocks(options: dict[str, Any]) -> list[Block]:
    from robbench.grid import block, read_blocks

    if options["grid"]:
        return read_blocks(options["grid"])
    defense = _with_settings(options["defense"], "defense", options["assignments"])
    defense = _with_detector(defense, options["detector"], options["fpr"])
    attack = _with_settings(options["attack"], "attack", options["assignments"])
    attack = _with_budget(attack, options["budget"])
    baseline = options["baseline"]
    names = ",".join([defense, *([] if baseline in ("none", "") else [baseline])])
    fields = {
        "dataset": options["dataset"],
        "n": options["count"],
        "defense": names,
        "attack": attack,
        "norm": options["norm"],
        "eps": options["eps"],
        "setting": options["setting"],
        "oracle": options["oracle"] or [],
        "eot": _number(options["eot"]),
        "goal": options["goal"],
        "max_queries": options["max_queries"],
        "target": options["target"],
        "seed": list(range(options["seeds"])),
        "train_seed": list(range(options["train_seeds"])),
    }
    return [block(**fields)]


def _with_settings(text: str, kind: str, assignments: Sequence[str]) -> str:
    """Apply --set KIND.KEY=VALUE to every spec of a comma list."""
    from robbench.registry import Spec, split_list

    settings: dict[str, object] = {}
    for assignment in assignments:
        left, equals, value = assignment.partition("=")
        owner, dot, key = left.partition(".")
        if not equals or not dot or owner not in ("defense", "attack"):
            raise InputError(f"--set {assignment!r}: write defense.KEY=VALUE or attack.KEY=VALUE")
        parsed = dict(Spec.parse(f"{kind}({key}={value})").settings)
        if list(parsed) != [key]:
            raise InputError(f"--set {assignment!r}: write one setting; repeat --set for more")
        if owner == kind:
            settings |= parsed
    if not settings:
        return text
    specs = [Spec.parse(item) for item in split_list(text)]
    if joined := [spec for spec in specs if spec.parts]:
        raise InputError(
            f"--set cannot tell the parts of {joined[0]} apart; write it into the spec"
        )
    return ",".join(str(spec.with_settings(settings)) for spec in specs)


def _precision(text: str | None) -> float | None:
    """Half the length of an interval: 1% or 0.01."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 0.5:
        raise InputError(f"--precision {text}: write half an interval, such as 1% or 0.01")
    return value


def _number(text: str | None) -> object:
    return int(text) if text is not None and text.isdecimal() else text


def _with_budget(text: str, budget: str | None) -> str:
    """Every spec of a comma list that has a budget, with this one."""
    from robbench.attacks import Configured
    from robbench.registry import Spec, split_list

    if budget is None:
        return text
    specs, found = [], False
    for spec in map(Spec.parse, split_list(text)):
        if "budget" in Configured.of(spec).entry.settings.model_fields:
            if dict(spec.settings).get("budget", budget) != budget:
                raise InputError(f"--budget {budget} contradicts {spec}; write one of them")
            spec, found = spec.with_settings({"budget": budget}), True
        specs.append(str(spec))
    if not found:
        raise InputError(f"--budget is for a suite of attacks, not {text}; add --attack strongest")
    return ",".join(specs)


def _with_detector(text: str, detectors: str | None, fpr: str | None) -> str:
    """Every spec of a comma list, in all its parts, with each detector of another one."""
    from robbench.registry import Spec, split_list

    specs = []
    for spec in map(Spec.parse, split_list(text)):
        for detector in split_list(detectors or ""):
            settings: dict[str, object] = {"detector": None if detector == "none" else detector}
            if fpr is not None and detector != "none":
                settings["fpr"] = fpr
            parts = [part.with_settings(settings) for part in spec.parts or (spec,)]
            specs.append(" & ".join(map(str, parts)))
    return ",".join(specs) or text


def measured(
    missing: Sequence[Cell],
    store: Store,
    shared: Shared,
    options: dict[str, Any],
    strict: bool,
    trainings: Sequence[Training] = (),
) -> Iterator[Record]:
    """The records of cells as they come, with progress unless --quiet or --json is given."""
    from robbench.cli.terminal import Console
    from robbench.executors import measure

    workers = workers_of(options)
    quiet = options["quiet"] or options["as_json"]
    with Console(quiet=quiet).progress(missing, shared, trainings) as progress:
        for record in measure(
            missing,
            store,
            shared,
            workers,
            progress.report,
            progress.finished,
            timeout=options["timeout"],
            strict=strict,
            trainings=trainings,
        ):
            progress.record(record)
            yield record


def write_board(
    store: Store, dataset: str, records: Sequence[Record], audits: Mapping[str, Audited]
) -> None:
    """The generated pages of one dataset, of its records and what the checks say of them."""
    from robbench.boards import pages
    from robbench.records import write_text

    for name, text in pages(dataset, records, audits).items():
        write_text(store.root / name, text)


def workers_of(options: dict[str, Any]) -> int:
    """--workers, or one per core."""
    return options["workers"] or os.cpu_count() or 1
