"""Images to which an ensemble gives no answer, and the votes on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.figures import (
    COLUMN,
    PALETTE,
    Drawing,
    Fields,
    Rows,
    Sources,
    canvas,
    drawings,
)
from robbench.figures.images import (
    NONE,
    RIGHT,
    WRONG,
    answers,
    brief,
    chosen,
    close_up,
    named,
    picture,
    pixels,
    show,
)
from robbench.figures.styles import SMALL
from robbench.papers.cells import training_of
from robbench.papers.reproduction import Reproduction
from robbench.randomness import preserved_random_state, seed_everything
from robbench.registry import Spec
from robbench.rules import ABSTAIN
from robbench.runner import Training
from robbench.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AT_ONCE = 50  # images of one pass through a large ensemble
LOOK = 500  # images that are looked at before it is asked whether enough have no answer


def _abstention_data(sources: Sources, arguments: Fields) -> Rows:
    """A row per image without an answer, the ones that two labels share first. As much of the test
    split is looked at as has enough of them."""
    dataset = sources.dataset(arguments["dataset"])
    spec = sources.defense(arguments["defense"], arguments["dataset"])
    deployed = sources.shared.deploy(spec, dataset, 0).deployed
    original = original_of(spec)
    plain = sources.shared.deploy(original, dataset, 0).deployed
    subset = dataset.subset(len(dataset.test.y))
    count, n = int(arguments.get("images", 4)), 0
    silent: dict[int, Tensor] = {}  # the votes on an image, by its place
    while len(silent) < count and n < len(subset.y):
        seed = derive("abstentions", spec, subset.hash, n)
        label, votes = ballots(deployed, subset.x[n : n + LOOK].to(deployed.device), seed)
        silent |= {n + i: votes[i] for i in (label == ABSTAIN).nonzero()[:, 0].tolist()}
        n += len(label)
    if not silent:
        raise InputError(f"{spec} answers to all of the {n} test images of {dataset.name}")
    places = list(silent)
    x, y = subset.x[places], subset.y[places]
    first = answers(plain, x.to(deployed.device), derive("original", original, subset.hash))
    every = torch.stack(list(silent.values()))
    top = every.topk(min(3, every.shape[1]), dim=1)
    fit = 2 * top.values[:, :2].sum(dim=1) - top.values[:, 0]
    names = [dataset.labels[i] for i in y.tolist()]
    rows: list[dict[str, Any]] = []
    for image, i in enumerate(chosen(names, [], fit.tolist(), count)):
        shares = zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
        rows.append(
            {
                "image": image,
                "id": int(subset.ids[places[i]]),
                "dataset": dataset.name,
                "defense": spec,
                "original": original,
                "label": names[i],
                "original_prediction": named(int(first.label[i]), dataset.labels),
                "original_confidence": round(float(first.confidence[i]), 4),
                "prediction": NONE,
                "abstained": len(silent),  # of the first n test images
                "n": n,
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


def _abstention_trainings(reproduction: Reproduction, arguments: Fields) -> list[Training]:
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


def _abstention_plot(rows: Rows, arguments: Fields) -> Canvas:
    """Images above the votes on them, and of how many they are."""
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
        above.set_title(f"label: {brief(row['label'])}", fontsize=SMALL, pad=3)
        share = 100 * float(row["original_confidence"])
        said = brief(row["original_prediction"])
        right = row["original_prediction"] == row["label"]
        color, weight = (RIGHT, "normal") if right else (WRONG, "bold")
        text = f"original says\n{said} {share:.0f} %"
        above.set_xlabel(text, fontsize=SMALL, labelpad=2, color=color, weight=weight)
        _votes(below, row)
    found = f"{rows[0]['abstained']} without an answer among {rows[0]['n']} test images"
    made.supxlabel(f"{len(rows)} of the {found}", fontsize=SMALL)
    return made


def _votes(axis: Any, row: Mapping[str, Any]) -> None:
    """Bars of the labels voted for, up to the half that an answer needs."""
    places = [place for place in (1, 2, 3) if float(row.get(f"share{place}") or 0) > 0]
    shares = [float(row[f"share{place}"]) for place in places]
    colors = (PALETTE[0], PALETTE[4], "0.75")[: len(places)]
    axis.barh(range(len(places)), shares, 0.38, color=colors, edgecolor="k", linewidth=0.5)
    for bar, place in enumerate(places):
        text = f"{brief(row[f'vote{place}'])} {100 * shares[bar]:.0f} %"
        axis.text(0, bar - 0.25, text, fontsize=SMALL, va="bottom")
        axis.vlines(0.5, bar - 0.26, bar + 0.26, color="k", linewidth=1, linestyle=(0, (2, 1)))
    axis.set(xlim=(0, 1), ylim=(2.4, -0.8))


drawings.add(
    "abstentions",
    Drawing(_abstention_data, _abstention_plot, trainings=_abstention_trainings, version=2),
)
