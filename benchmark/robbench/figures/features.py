"""The last hidden features of trained networks in two dimensions, by t-SNE (paper 003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robbench.deployed import gives_activations
from robbench.errors import InputError
from robbench.figures import (
    COLUMN,
    MARKERS,
    PALETTE,
    Drawing,
    Fields,
    Rows,
    Sources,
    canvas,
    checked,
    drawings,
)
from robbench.figures.styles import SMALL, TEXT
from robbench.papers.cells import training_of
from robbench.papers.paper import Strict
from robbench.papers.reproduction import Reproduction
from robbench.randomness import preserved_random_state, seed_everything
from robbench.runner import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MANY = 10  # labels that markers tell apart


class Map(Strict):
    """What `tsne` draws: defenses by their names in the figure, on n test images of a dataset.

    Of a defense the features of its first member, in one draw. perplexity: less where there are
    few images.
    """

    dataset: str
    defenses: Mapping[str, str]
    n: Annotated[int, Field(ge=4)] = 500
    perplexity: Annotated[float, Field(gt=0)] = 30.0
    train_seed: int = 0
    seed: int = 0


def _trainings(reproduction: Reproduction, arguments: Fields) -> list[Training]:
    made = checked(Map, arguments)
    return [
        training_of(defense, made.dataset, reproduction.overlay, made.train_seed)
        for defense in made.defenses.values()
    ]


def embedded(features: NDArray[np.float64], perplexity: float, seed: int) -> NDArray[np.float64]:
    """(N, D) -> (N, 2) by t-SNE, which starts from the first two principal components."""
    from sklearn.manifold import TSNE

    least = max(1.0, min(perplexity, (len(features) - 1) / 3))
    made = TSNE(2, perplexity=least, init="pca", random_state=seed).fit_transform(features)
    return np.asarray(made, dtype=np.float64)


def _data(sources: Sources, arguments: Fields) -> Rows:
    made = checked(Map, arguments)
    dataset = sources.dataset(made.dataset)
    n = min(made.n, sources.scale.n or made.n, len(dataset.test.y))
    subset = dataset.subset(n)
    rows: list[dict[str, Any]] = []
    for name, defense in made.defenses.items():
        spec = sources.defense(defense, made.dataset)
        deployed = sources.shared.deploy(spec, dataset, made.train_seed).deployed
        if not gives_activations(deployed.members[0]):
            raise InputError(f"figure: {spec} does not give its last hidden features")
        with preserved_random_state():
            seed_everything(made.seed)
            draw = deployed.draw(subset.x.to(deployed.device), 1, features=True)
        assert draw.features is not None
        decided = deployed.rule.decide(draw)
        features = draw.features[0, 0].double().cpu().numpy()
        places = embedded(features, made.perplexity, made.seed)
        shown = zip(places, subset.ids, subset.y.tolist(), decided.tolist(), strict=True)
        for (x, y), image, label, prediction in shown:
            rows.append(
                {
                    "series": name,
                    "image": int(image),
                    "label": label,
                    "name": dataset.labels[label],
                    "prediction": prediction,
                    "x": round(float(x), 3),
                    "y": round(float(y), 3),
                }
            )
    return rows


def _plot(rows: Rows, arguments: Fields) -> Canvas:
    panels = list(dict.fromkeys(str(row["series"]) for row in rows))
    names = {int(row["label"]): str(row["name"]) for row in rows}
    shown = sorted(names)[:MANY]
    figure, axes = canvas(COLUMN, 2.3, ncols=len(panels), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=True):
        here = [row for row in rows if row["series"] == panel]
        wrong = sum(int(row["prediction"]) != int(row["label"]) for row in here)
        for index, label in enumerate(shown):
            for right in (True, False):
                places = [
                    (float(row["x"]), float(row["y"]))
                    for row in here
                    if int(row["label"]) == label and (int(row["prediction"]) == label) == right
                ]
                if places:
                    axis.plot(*np.array(places).T, **_style(index, right))
        axis.set_title(f"{panel} ({wrong} of {len(here)} wrong)", fontsize=TEXT)
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_linewidth(0.5)
    handles = [_handle(_style(index, True)) for index in range(len(shown))]
    labels = [names[label] for label in shown]
    handles.append(_handle({**_style(0, False), "markeredgecolor": "black"}))
    labels.append("wrong: hollow")
    figure.legend(
        handles, labels, fontsize=SMALL, frameon=False, loc="outside lower center", ncols=4,
        handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
    return figure


def _style(index: int, right: bool) -> dict[str, Any]:
    """Colour and marker of a label, no pair twice; hollow where the prediction is wrong."""
    colour = PALETTE[index % len(PALETTE)]
    return {
        "linestyle": "none",
        "marker": MARKERS[(index + index // len(PALETTE)) % len(MARKERS)],
        "markersize": 3.2,
        "markerfacecolor": colour if right else "none",
        "markeredgecolor": "black" if right else colour,
        "markeredgewidth": 0.2 if right else 0.7,
    }


def _handle(style: Mapping[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


drawings.add("tsne", Drawing(_data, _plot, trainings=_trainings))
