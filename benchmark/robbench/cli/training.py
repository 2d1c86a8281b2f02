"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli import check_installation
from robbench.cli.options import common, defense_option

if TYPE_CHECKING:
    from robbench.datasets import Dataset


@click.command("train")
@defense_option(required=True)
@click.option("--dataset", default="digits", show_default=True, help="A name or folder:PATH.")
@click.option("--preset", default="quick", show_default=True, help="quick or paper.")
@click.option("--train-seed", type=int, default=0, show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@common
def train_command(
    defense: str,
    dataset: str,
    preset: str,
    train_seed: int,
    quiet: bool,
    out: Path,
    data_dir: Path | None,
    device: str,
) -> None:
    """Train a defense, and what it is built on, unless a checkpoint is there; say where it lies."""
    check_installation()
    from robbench import registry
    from robbench.checkpoints import key_of
    from robbench.cli.terminal import Console
    from robbench.defense import resolve, with_preset
    from robbench.environment import choose_device
    from robbench.runner import Shared
    from robbench.training import Diverged

    shared = Shared(out, data_dir, choose_device(device))
    data: Dataset = registry.dataset(dataset, data_dir)
    spec = with_preset(defense, preset, data.name)
    try:
        with Console(quiet=quiet).training(str(spec)) as report:
            shared.deploy(str(spec), data, train_seed, report)
    except Diverged as error:
        click.echo(f"robbench: {error}", err=True)
        click.get_current_context().exit(1)
    for part in resolve(spec):
        key = key_of(part, data, train_seed)
        click.echo(f"{part.spec}: {shared.shelf.find(key)}")
