"""How far a figure would move: with another draw, other images, another seed, another model.

Pure functions of records; symbols: N images, K records or trained models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robbench import statistics
from robbench.errors import InputError
from robbench.metrics import Measure, counts, detected, outcomes, share
from robbench.statistics import Interval

if TYPE_CHECKING:
    from robbench.records import Record


class Looks(NamedTuple):
    """The accuracy of one defense on the same x', by who looks how often."""

    expected: Measure  # the mean over the scoring draws; also the mean of a single look
    image_error: float  # its standard error: sd of the per-image shares / sqrt(N); nan for N = 1
    draw_error: float  # the part of it that fresh draws of the same images cause; nan for one draw
    single_sd: float  # between single looks at all images; nan for one draw
    any_iteration: Measure  # images that no look of the attack saw answered other than rightly


def looks(record: Record) -> Looks:
    """What the draws of a stochastic defense do to its accuracy under attack.

    Enough draws were scored where draw_error is below a third of image_error, which contains it.
    single_sd is the standard deviation over draws of the accuracy that one look at all images would
    have printed, for draws that are independent between images; where a batch shares its noise it
    is larger. any_iteration is what an attack reports that calls an image broken at its first lost
    look: at any iterate, in any of its draws, or at the x' that it returns, once. With randomness
    it is below the expected accuracy by luck alone (Lucas et al. 2023). An image that was given up
    before the first step was lost by then. nan for traces without lost_seen, for transfer, where
    they are of the oracle, and for targeted attacks, which count what else.
    """
    error = statistics.draw_error(counts(record).right, record.draws)
    shares, cell, seen = outcomes(record), record.cell, record.trace.get("lost_seen")
    unbroken = Measure(math.nan, Interval(math.nan, math.nan))
    if seen is not None and not cell.setting.oracle and not cell.threat.targeted:
        unbroken = share((seen[0] == 0) * shares, record.draws)
    return Looks(
        expected=share(shares, record.draws),
        image_error=float(shares.std(ddof=1)) / math.sqrt(len(shares)) if cell.n > 1 else math.nan,
        draw_error=error,
        single_sd=error * math.sqrt(record.draws),
        any_iteration=unbroken,
    )


def precise_enough(record: Record, precision: float) -> int | None:
    """None where the 95 % interval of the robust accuracy with detection is within ± precision,
    else how many images it takes, should the share stay what it is.

    precision in (0, 0.5): half the length of the interval. The n that `statistics.needed` says,
    times the images that one right-or-wrong image stands for: fewer than one where shares of draws
    are known better.
    """
    found = share(detected(record), record.draws)
    half = (found.interval.high - found.interval.low) / 2
    enough = statistics.needed(found.value, precision)
    if half <= precision:
        return None
    return math.ceil(record.cell.n * enough / statistics.needed(found.value, half))


class Variability(NamedTuple):
    """A mean over seeds or trained models, and the parts of its uncertainty; nan where unknown."""

    mean: float
    interval: Interval  # 95 %, over images and over seeds or trained models
    seed_sd: float  # between attack seeds of one trained model
    training_sd: float  # between trained models, each the mean of its seeds
    image_error: float  # standard error from the images
    seed_error: float  # standard error from the trained models; of one model, from the attack seeds
    error: float  # of both
    records: int
    trainings: int  # trained models among them


def variability(
    records: Sequence[Record], of: Callable[[Record], np.ndarray] = outcomes
) -> Variability:
    """The mean of a cell over other seeds and train_seeds, with both parts of its error.

    of: the (N,) per-image shares of a record, such as `outcomes` or `detected`.

    Images and trained models (of one model: attack seeds) are crossed: all were measured on the
    same images. The images' part is that of the per-image means, and contains the noise of single
    draws; so that noise is subtracted from the variance between models by the residual mean square
    of the two-way table, except for two models, whose single degree of freedom cannot tell noise
    from difference. The interval adds the squares of the images' half-width (`statistics.mean`, on
    either side) and of the models' (t with K - 1 degrees of freedom): Banerjee (Sankhyā 22, 1960),
    Zou & Donner (Stat. Med. 27, 2008). Where one part dominates it is that part's interval: t of K
    models, Wilson of N images. Where both count it covers more than it promises, whereas degrees of
    freedom by Satterthwaite cover too rarely for two or three models.
    """
    from scipy import stats

    _check_alike(records)
    trained: dict[int, list[np.ndarray]] = {}
    for record in records:
        trained.setdefault(record.cell.train_seed, []).append(of(record))
    averaged = [np.mean(group, axis=0) for group in trained.values()]
    table = np.stack(averaged if len(trained) > 1 else trained[records[0].cell.train_seed])
    k, n = table.shape
    each, images, center = table.mean(axis=1), table.mean(axis=0), float(table.mean())
    image_error = float(images.std(ddof=1)) / math.sqrt(n)
    seed_error = float(each.std(ddof=1)) / math.sqrt(k)
    residual = table - each[:, None] - images + center
    noise = float((residual**2).sum()) / ((k - 1) * (n - 1)) / (n * k) if k > 2 else 0.0
    between = math.sqrt(max(0.0, seed_error**2 - noise))
    half = float(stats.t.ppf(0.975, k - 1)) * between
    low, high = statistics.mean(np.clip(images, 0, 1))
    return Variability(
        mean=center,
        interval=Interval(
            max(0.0, center - math.hypot(center - low, half)),
            min(1.0, center + math.hypot(high - center, half)),
        ),
        seed_sd=_pooled([[float(shares.mean()) for shares in group] for group in trained.values()]),
        training_sd=_pooled([[float(shares.mean()) for shares in averaged]]),
        image_error=image_error,
        seed_error=seed_error,
        error=math.hypot(image_error, between),
        records=len(records),
        trainings=len(trained),
    )


def _pooled(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation within groups; nan where none has two values."""
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return math.sqrt(squares / degrees) if degrees else math.nan


def _check_alike(records: Sequence[Record]) -> None:
    seeds = {(record.cell.train_seed, record.cell.seed) for record in records}
    if len(seeds) < 2 or len(seeds) < len(records):
        raise InputError(
            f"{len(records)} records of {len(seeds)} seeds show no spread; give two or more, each"
            " of another seed or train_seed (run with --seeds or --train-seeds)"
        )
    neutral = {"seed": 0, "train_seed": 0}
    cells = {record.cell.model_copy(update=neutral) for record in records}
    images = {record.provenance.get("subset_hash") for record in records}
    if len(cells) > 1 or len(images) > 1:
        raise InputError(
            "the records differ in more than seed and train_seed; give those of one defense,"
            " attack, threat and setting on the same images"
        )
    if records[0].cell.n < 2:
        raise InputError("one image shows no spread; run with -n 2 or more")
