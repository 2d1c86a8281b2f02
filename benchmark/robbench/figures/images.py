"""Pictures of images: attacked ones beside their originals, and those that get no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.figures import (
    COLUMN,
    PALETTE,
    Drawing,
    Rows,
    Sources,
    canvas,
    drawings,
    no_cells,
)
from robbench.grid import Cell
from robbench.judge import SCORING_DRAWS
from robbench.papers.cells import cell_of, training_of
from robbench.papers.paper import Binding
from robbench.papers.reproduction import Reproduction
from robbench.randomness import preserved_random_state, seed_everything
from robbench.registry import Spec
from robbench.rules import ABSTAIN
from robbench.runner import Shared, Training, run_shard, shards
from robbench.threat import format_eps, within
from robbench.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LARGEST = 128  # pixels of a side: a cell of a CSV file that is to be read has its limits
AT_ONCE = 50  # images of one pass through a large ensemble
RIGHT, WRONG = PALETTE[0], PALETTE[1]
NONE = "no answer"
SHORT = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1", "l0": "ℓ0", "none": "ℓ2"}


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


def _named(label: int, labels: Sequence[str]) -> str:
    return NONE if label == ABSTAIN else labels[label]


# --- adversarial-panels ---


def _panel_cells(reproduction: Reproduction, arguments: Mapping[str, Any]) -> list[Cell]:
    """The attack of every column, on the same images."""
    pool = int(arguments.get("pool", 50))
    fields = [{**arguments["bind"], **column} for column in arguments["columns"].values()]
    cells = [
        cell_of(Binding(**{"n": pool, **each}), reproduction.overlay, reproduction.load)
        for each in fields
    ]
    n = min(cell.n for cell in cells)  # the scale has fewer images of an attack that is dear
    return [cell.model_copy(update={"n": n}) for cell in cells]


def _panel_data(sources: Sources, arguments: Mapping[str, Any]) -> Rows:
    """Of every image shown a row for the original and one per column."""
    shared, cells = sources.shared, _panel_cells(sources.reproduction, arguments)
    made = [attacked(cell, shared) for cell in cells]
    names = shared.dataset(cells[0].dataset).labels
    clean, after = [], []
    for cell, each in zip(cells, made, strict=True):
        target = shared.deploy(cell.defense, shared.dataset(cell.dataset), cell.train_seed)
        seeds = [derive(cell.seed, cell.id, 0, role) for role in ("clean", "score")]
        clean.append(answers(target.deployed, each.x, seeds[0]))
        after.append(answers(target.deployed, each.adversarial, seeds[1]))
    ids, x, y = made[0][:3]
    right = torch.stack([each.label == y for each in clean]).all(dim=0)
    broken = torch.stack([each.label != y for each in after]).sum(dim=0)
    label = [names[i] for i in y.tolist()]
    wanted = arguments.get("labels", [])
    shown = chosen(label, wanted, (right * (1 + broken)).tolist(), int(arguments.get("images", 1)))
    gains = [_gain(each.adversarial[shown] - x[shown]) for each in made]
    rows: list[dict[str, Any]] = []
    for image, i in enumerate(shown):
        same = {"image": image, "id": int(ids[i]), "label": label[i]}
        rows.append({**same, "column": "original", **pixels(x[i])})
        for title, cell, each, gain, before, now in zip(
            arguments["columns"], cells, made, gains, clean, after, strict=True
        ):
            change = each.adversarial[i] - x[i]
            rows.append(
                {
                    **same,
                    "column": title,
                    "dataset": cell.dataset,
                    "defense": cell.defense,
                    "attack": cell.attack,
                    "setting": str(cell.setting),
                    "norm": cell.threat.norm,
                    "eps": format_eps(cell.threat.eps),
                    "distance": round(float(each.distance[i]), 6),
                    "clean_prediction": _named(int(before.label[i]), names),
                    "prediction": _named(int(now.label[i]), names),
                    "confidence": round(float(now.confidence[i]), 4),
                    **pixels(each.adversarial[i]),
                    "gain": round(gain, 2),
                    **pixels(0.5 + gain * change, "difference"),
                }
            )
    return rows


def _gain(change: Tensor) -> float:
    """By what the largest change is half of the range."""
    largest = float(change.abs().max())
    return 0.5 / largest if largest else 1.0


def _panel_plot(rows: Rows, arguments: Mapping[str, Any]) -> Canvas:
    """Images in lines, attacks in columns; below an attacked image what was added to it."""
    titles = list(dict.fromkeys(row["column"] for row in rows))
    images = list(dict.fromkeys(row["image"] for row in rows))
    differs = bool(arguments.get("differences", True))
    beside = differs and len(titles) == 2  # a line of three is better than two lines of one
    columns = len(titles) + beside
    lines = len(images) * (1 + (differs and not beside))
    width = COLUMN if columns > 2 else COLUMN * 2 / 3
    side = width / columns
    made, axes = canvas(
        width, lines * (side + 0.22) + 0.3, nrows=lines, ncols=columns, squeeze=False
    )
    close_up(made, axes)
    step = lines // len(images)
    for row in rows:
        line, column = images.index(row["image"]) * step, titles.index(row["column"])
        axis = axes[line, column]
        show(axis, picture(row))
        if line == 0:
            axis.set_title(row["column"], fontsize=7, pad=3)
        if column == 0:
            axis.set_xlabel(brief(row["label"]), fontsize=7, labelpad=2)
            continue
        _say(axis, row, "\n" if columns > 3 else " ")
        if differs:
            other = axes[line, column + 1] if beside else axes[line + 1, column]
            show(other, picture(row, "difference"))
            length = f"{SHORT[row['norm']]} {float(row['distance']):.2g}"
            gain = f"× {float(row['gain']):.3g}" if line + step == lines else ""
            text = f"{gain}, {length}" if beside else f"{length}\n{gain}".strip()
            other.set_xlabel(text, fontsize=7, labelpad=2)
            if beside and line == 0:
                other.set_title("difference", fontsize=7, pad=3)
            elif not beside and column == 1:
                middle = {"ha": "center", "va": "center", "fontsize": 7}
                left = axes[line + 1, 0]
                left.text(0.5, 0.5, "difference,\nmagnified", transform=left.transAxes, **middle)
    return made


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


def _say(axis: Any, row: Mapping[str, Any], between: str) -> None:
    """The prediction below an image: wrong ones in bold and another colour."""
    right = row["prediction"] == row["label"]
    share = f"{100 * float(row['confidence']):.0f} %" if row["prediction"] != NONE else ""
    text = f"{brief(row['prediction'])}{between}{share}".strip()
    color, weight = (RIGHT, "normal") if right else (WRONG, "bold")
    axis.set_xlabel(text, fontsize=7, labelpad=2, color=color, weight=weight)


# --- abstentions ---


def _abstention_data(sources: Sources, arguments: Mapping[str, Any]) -> Rows:
    """A row per image: those without an answer first, of them the ones that two labels share."""
    dataset = sources.dataset(arguments["dataset"])
    spec = sources.defense(arguments["defense"], arguments["dataset"])
    deployed = sources.shared.deploy(spec, dataset, 0).deployed
    original = original_of(spec)
    plain = sources.shared.deploy(original, dataset, 0).deployed
    size = int(arguments.get("pool", 500))
    subset = dataset.subset(min(size, sources.scale.n or size, len(dataset.test.y)))
    x, y = subset.x.to(sources.shared.device), subset.y
    label, votes = ballots(deployed, x, derive("abstentions", spec, subset.hash))
    first = answers(plain, x, derive("original", original, subset.hash))
    top = votes.topk(min(3, votes.shape[1]), dim=1)
    silent = label == ABSTAIN
    fit = 10 * silent.double() + 2 * top.values[:, :2].sum(dim=1) - top.values[:, 0]
    names = [dataset.labels[i] for i in y.tolist()]
    rows: list[dict[str, Any]] = []
    count = int(arguments.get("images", 4))
    for image, i in enumerate(chosen(names, [], fit.tolist(), count)):
        shares = zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
        rows.append(
            {
                "image": image,
                "id": int(subset.ids[i]),
                "dataset": dataset.name,
                "defense": spec,
                "original": original,
                "label": names[i],
                "original_prediction": _named(int(first.label[i]), dataset.labels),
                "original_confidence": round(float(first.confidence[i]), 4),
                "prediction": _named(int(label[i]), dataset.labels),
                "abstained": round(float(silent.double().mean()), 4),  # of all images looked at
                "n": len(y),
                **pixels(x[i]),
                **{
                    key: value
                    for place, (vote, share) in enumerate(shares, 1)
                    for key, value in (
                        (f"vote{place}", dataset.labels[vote]),
                        (f"share{place}", round(share, 4)),
                    )
                },
            }
        )
    return rows


def _abstention_trainings(
    reproduction: Reproduction, arguments: Mapping[str, Any]
) -> list[Training]:
    made = training_of(arguments["defense"], arguments["dataset"], reproduction.overlay)
    return [made, made._replace(defense=original_of(made.defense))]


def original_of(spec: str) -> str:
    """The spec of the network that a defense was fine-tuned from, downloaded weights too."""
    (part,) = resolve(spec)
    if part.base is None:
        raise InputError(f"{spec} was fine-tuned from nothing; name a defense with a base")
    base = part.base_spec()
    fields = {"base": part.base, "epochs": 0, "network": part.network}
    return str(base or Spec(name="standard", settings=tuple(sorted(fields.items()))))


def ballots(deployed: Deployed, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Of one call: (N,) the answers, ABSTAIN among them, and (N, L) the shares of the votes, one
    per draw and member."""
    labels, shares = [], []
    with preserved_random_state():
        seed_everything(seed)
        for part in x.split(AT_ONCE):
            draw = deployed.draw(part, deployed.draws)
            labels.append(deployed.rule.decide(draw).cpu())
            votes = F.one_hot(draw.logits.argmax(dim=-1), deployed.labels)  # (S, M, N, L)
            shares.append(votes.double().mean(dim=(0, 1)).cpu())
    return torch.cat(labels), torch.cat(shares)


def _abstention_plot(rows: Rows, arguments: Mapping[str, Any]) -> Canvas:
    """Images above the votes on them."""
    per_line = min(4, len(rows))
    lines = -(-len(rows) // per_line)
    made, axes = canvas(
        COLUMN,
        2.05 * lines,
        nrows=2 * lines,
        ncols=per_line,
        squeeze=False,
        height_ratios=[1.25, 1] * lines,
    )
    close_up(made, axes)
    for place, row in enumerate(rows):
        line, column = divmod(place, per_line)
        above, below = axes[2 * line, column], axes[2 * line + 1, column]
        show(above, picture(row))
        above.set_title(f"label: {brief(row['label'])}", fontsize=7, pad=3)
        share = 100 * float(row["original_confidence"])
        said = brief(row["original_prediction"])
        right = row["original_prediction"] == row["label"]
        color, weight = (RIGHT, "normal") if right else (WRONG, "bold")
        text = f"original says\n{said} {share:.0f} %"
        above.set_xlabel(text, fontsize=7, labelpad=2, color=color, weight=weight)
        _votes(below, row)
    return made


def _votes(axis: Any, row: Mapping[str, Any]) -> None:
    """Bars of the labels voted for, up to the half that an answer needs."""
    places = [place for place in (1, 2, 3) if float(row.get(f"share{place}") or 0) > 0]
    shares = [float(row[f"share{place}"]) for place in places]
    colors = (PALETTE[0], PALETTE[4], "0.75")[: len(places)]
    axis.barh(range(len(places)), shares, 0.38, color=colors, edgecolor="k", linewidth=0.5)
    for bar, place in enumerate(places):
        text = f"{brief(row[f'vote{place}'])} {100 * shares[bar]:.0f} %"
        axis.text(0, bar - 0.25, text, fontsize=7, va="bottom")
        axis.vlines(0.5, bar - 0.26, bar + 0.26, color="k", linewidth=1, linestyle=(0, (2, 1)))
    axis.set(xlim=(0, 1), ylim=(2.4, -0.8))
    answer = row["prediction"]
    axis.set_xlabel(
        "abstains" if answer == NONE else f"says {brief(answer)}", fontsize=7, labelpad=2
    )


drawings.add(
    "adversarial-panels", Drawing(no_cells, _panel_data, _panel_plot, attacks=_panel_cells)
)
drawings.add(
    "abstentions", Drawing(no_cells, _abstention_data, _abstention_plot, _abstention_trainings)
)
