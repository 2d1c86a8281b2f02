"""Images as data of a figure, attacked ones among them, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from robbench.cell import Cell
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.figures import PALETTE
from robbench.judge import SCORING_DRAWS
from robbench.randomness import preserved_random_state, seed_everything
from robbench.rules import ABSTAIN
from robbench.runner import Shared, run_shard, shards
from robbench.threat import within

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LARGEST = 128  # pixels of a side: a cell of a CSV file that is to be read has its limits
RIGHT, WRONG = PALETTE[0], PALETTE[1]
NONE = "no answer"


def pixels(image: Tensor, name: str = "pixels") -> dict[str, str]:
    """An image (C, H, W) in [0, 1] as cells of a row: shape H×W×C, and its bytes as hex.

    Larger ones are shown at a whole fraction of their size.
    """
    shrink = -(-max(image.shape[1:]) // LARGEST)
    small = F.avg_pool2d(image[None], shrink)[0] if shrink > 1 else image
    values = (255 * small.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)  # (H, W, C)
    shape = "x".join(map(str, values.shape))
    return {"shape": shape, name: values.cpu().contiguous().numpy().tobytes().hex()}


def picture(row: Mapping[str, Any], name: str = "pixels") -> NDArray[np.uint8]:
    """(H, W, 3) of an image in a row; one channel stands for all three."""
    height, width, channels = map(int, row["shape"].split("x"))
    flat = np.frombuffer(bytes.fromhex(row[name]), dtype=np.uint8)
    values = flat.reshape(height, width, channels)
    return np.repeat(values, 3, axis=2) if channels == 1 else values


def chosen(
    labels: Sequence[str], wanted: Sequence[str], fit: Sequence[float], count: int
) -> list[int]:
    """Positions of `count` images: the fittest of every wanted label, then the fittest of labels
    that are not shown yet, then any; of equals the earlier. A wanted label may be part of a name,
    and one that the dataset has not got is passed over."""
    order = sorted(range(len(labels)), key=lambda i: -fit[i])
    found: list[int] = []
    for name in wanted:
        left = [i for i in order if i not in found]
        exact = [i for i in left if labels[i].casefold() == name.casefold()]
        inside = [i for i in left if name.casefold() in labels[i].casefold()]
        found += (exact or inside)[:1]
    for i in order:
        if labels[i] not in {labels[j] for j in found}:
            found.append(i)
    found += [i for i in order if i not in found]
    return found[:count]


class Attacked(NamedTuple):
    """The first shard of a cell: images, what the attack made of them, and how far that is."""

    ids: NDArray[np.int64]
    x: Tensor
    y: Tensor
    adversarial: Tensor
    distance: Tensor


def attacked(cell: Cell, shared: Shared) -> Attacked:
    """x' of a cell's first shard as the runner makes it; a search that ends beyond ε has x.

    InputError with the reason where the attack fails.
    """
    dataset = shared.dataset(cell.dataset)
    subset = dataset.subset(cell.n)
    (part,) = run_shard([cell], 0, replace(shared, keep_images=True))
    if part.reason or part.images is None:
        raise InputError(f"{cell}: {part.reason}")
    size = len(shards(cell.n, dataset.shape)[0])
    x, y = (tensor[:size].to(shared.device) for tensor in (subset.x, subset.y))
    found, lengths = (torch.tensor(each).to(x) for each in (part.images, part.arrays["distance"]))
    inside = within(lengths, cell.threat)
    found = torch.where(inside.view(-1, 1, 1, 1), found, x)
    return Attacked(subset.ids[:size], x, y, found, torch.where(inside, lengths, 0))


class Answers(NamedTuple):
    """What a defense says of images (N,): the label of most calls, and how probable it is to it."""

    label: Tensor
    confidence: Tensor


def answers(deployed: Deployed, x: Tensor, seed: int) -> Answers:
    """The answers of a defense to images, over the draws that a score is made of."""
    labels, scores = [], []
    with preserved_random_state():
        seed_everything(seed)
        for _ in range(SCORING_DRAWS if deployed.stochastic else 1):
            draw = deployed.draw(x, deployed.draws)
            labels.append(deployed.rule.decide(draw))
            scores.append(deployed.rule.scores(draw).softmax(dim=1))
    label = torch.stack(labels).mode(dim=0).values
    mean = torch.stack(scores).mean(dim=0)
    named = torch.where(label == ABSTAIN, mean.argmax(dim=1), label)
    return Answers(label, mean.gather(1, named[:, None])[:, 0])


def named(label: int, labels: Sequence[str]) -> str:
    """The name of an answer."""
    return NONE if label == ABSTAIN else labels[label]


def close_up(made: Canvas, axes: Any) -> None:
    """Axes without ticks and frames, close to each other."""
    engine: Any = made.get_layout_engine()
    engine.set(w_pad=0.01, h_pad=0.02, wspace=0.02, hspace=0.0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)


def show(axis: Any, image: NDArray[np.uint8]) -> None:
    axis.imshow(image, interpolation="nearest")


def brief(label: str) -> str:
    """The first name of a label that has several."""
    return label.partition(",")[0]
