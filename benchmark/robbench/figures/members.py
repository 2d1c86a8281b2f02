"""How the members of an ensemble differ: where they look, and by their features and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.deployed import Deployed
from robbench.errors import InputError, unknown
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
from robbench.figures.images import brief, chosen, close_up, picture, pixels, show
from robbench.figures.styles import SMALL, TEXT
from robbench.metrics.diversity import discrimination, gradient_angles
from robbench.metrics.gradcam import centre, centre_distance, grad_cam
from robbench.papers.cells import training_of
from robbench.papers.reproduction import Reproduction
from robbench.runner import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BATCH = 100  # images of one pass
QUANTITIES = {
    "discrimination": "discrimination score",
    "angle": "angle of loss gradients (degrees)",
}
SUMMARY = ("mean", "lower quartile", "median", "upper quartile", "outliers")


class Common(NamedTuple):
    """Images that all of several defenses answer rightly; or, where there is none, `right` of
    them."""

    ids: NDArray[np.int64]
    x: Tensor
    y: Tensor
    right: int


def _trainings(reproduction: Reproduction, arguments: Fields) -> list[Training]:
    """The defense of every method."""
    return [
        training_of(each, arguments["dataset"], reproduction.overlay)
        for each in arguments["methods"].values()
    ]


def _ensembles(sources: Sources, arguments: Fields) -> dict[str, Deployed]:
    """The trained defense of every method."""
    name = arguments["dataset"]
    dataset = sources.dataset(name)
    specs = {title: sources.defense(each, name) for title, each in arguments["methods"].items()}
    return {
        title: sources.shared.deploy(spec, dataset, 0).deployed for title, spec in specs.items()
    }


def common(
    ensembles: Sequence[Deployed], sources: Sources, name: str, wanted: int | None
) -> Common:
    """The first `wanted` test images, or as many as there are, that all ensembles answer rightly;
    at a scale no more than it has images. If there is none, those that most ensembles do."""
    dataset, device = sources.dataset(name), sources.shared.device
    size = len(dataset.test.y)
    limit = min(wanted or size, sources.scale.n or size)
    subset = dataset.subset(size)
    right = torch.zeros(0, dtype=torch.int64)
    while len(right) < size and int((right == len(ensembles)).sum()) < limit:
        part = slice(len(right), len(right) + BATCH)
        x, y = (tensor[part].to(device) for tensor in (subset.x, subset.y))
        answered = torch.stack([deployed.decide(x, 1)[0] == y for deployed in ensembles])
        right = torch.cat([right, answered.sum(dim=0).cpu()])
    kept = (right == right.max()).nonzero()[:limit, 0]
    x, y = (tensor[kept].to(device) for tensor in (subset.x, subset.y))
    return Common(subset.ids[kept.numpy()], x, y, int(right.max()))


def member_maps(member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, H, W) in [0, 1]: Grad-CAM for the labels, of the feature maps that the last mean is over.

    InputError for a network without a `head` that gives such maps.
    """
    head = getattr(member, "head", None)
    if not isinstance(head, nn.Module):
        raise InputError(f"{type(member).__name__} has no last feature maps to look at; use resnet")
    found: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        logits = member(x.detach().requires_grad_())
    finally:
        handle.remove()
    (maps,) = found
    (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), maps)
    size = (x.shape[-2], x.shape[-1])
    return grad_cam(maps.detach(), slope, size)


def _maps(deployed: Deployed, images: Common) -> Tensor:
    """(K, N, H, W) of all members."""
    batches = list(zip(images.x.split(BATCH), images.y.split(BATCH), strict=True))
    return torch.stack(
        [torch.cat([member_maps(m, x, y) for x, y in batches]) for m in deployed.members]
    ).cpu()


def _cam_data(sources: Sources, arguments: Fields) -> Rows:
    """Of the image shown a row for itself and one per method and member; then of all images that
    every method answers rightly the distance between the members' centres, a series per method."""
    ensembles = _ensembles(sources, arguments)
    name = arguments["dataset"]
    images = common(list(ensembles.values()), sources, name, int(arguments.get("images", 500)))
    labels = sources.dataset(name).labels
    names = [labels[i] for i in images.y.tolist()]
    threshold = float(arguments.get("threshold", 0.9))
    maps = {title: _maps(deployed, images) for title, deployed in ensembles.items()}
    centres = {title: centre(each, threshold) for title, each in maps.items()}
    distances = {title: centre_distance(each, threshold) for title, each in maps.items()}
    whole = torch.stack(list(distances.values())).isfinite().all(dim=0)
    (at,) = chosen(names, arguments.get("labels", []), whole.tolist(), 1)
    same = {"label": names[at], "id": int(images.ids[at])}
    shown = {"kind": "image", "series": "image", "x": 0, "y": 0, **same}
    rows: list[dict[str, Any]] = [{**shown, **pixels(images.x[at])}]
    for title in ensembles:
        for member, (heat, place) in enumerate(
            zip(maps[title][:, at], centres[title][:, at].tolist(), strict=True), start=1
        ):
            row = {"kind": "member", "series": f"{title}, member {member}", **same}
            row |= {"method": title, "member": member, "x": place[1], "y": place[0]}
            row |= {"threshold": threshold, "distance": round(float(distances[title][at]), 4)}
            rows.append({**row, **pixels(heat[None])})
    for title, each in distances.items():
        for i in whole.nonzero()[:, 0].tolist():
            row = {"kind": "distance", "series": title, "method": title}
            rows.append({**row, "x": int(images.ids[i]), "y": round(float(each[i]), 4)})
    return rows


def _cam_plot(rows: Rows, arguments: Fields) -> Canvas:
    """The image, then a line of heat maps per method, each with its region and its centre."""
    (image,) = (row for row in rows if row["kind"] == "image")
    below = picture(image).mean(axis=2) / 255
    members = [row for row in rows if row["kind"] == "member"]
    methods = list(dict.fromkeys(row["method"] for row in members))
    columns = 1 + max(sum(row["method"] == title for row in members) for title in methods)
    side = COLUMN / columns
    made, axes = canvas(
        COLUMN, len(methods) * (side + 0.16) + 0.3, nrows=len(methods), ncols=columns, squeeze=False
    )
    close_up(made, axes)
    show(axes[0, 0], picture(image))
    axes[0, 0].set_title(brief(image["label"]), fontsize=SMALL, pad=3)
    for line, title in enumerate(methods):
        own = [row for row in members if row["method"] == title]
        for column, row in enumerate(own, 1):
            if line == 0:
                axes[0, column].set_title(f"member {row['member']}", fontsize=SMALL, pad=3)
            _heat(axes[line, column], below, row)
        every = [float(r["y"]) for r in rows if r["kind"] == "distance" and r["method"] == title]
        text = f"centres {float(own[0]['distance']):.1f} px apart"
        if every:
            text += f"; {np.mean(every):.1f} over {len(every)} images"
        # below all members: its width must not move them, and a blank keeps its line free
        place = {"fontsize": 7, "va": "top", "transform": axes[line, 1].transAxes}
        axes[line, 1].text(0, -0.05, text, **place).set_in_layout(False)
        axes[line, 1].set_xlabel(" ", fontsize=SMALL, labelpad=2)
        axes[line, 1].set_ylabel(title, fontsize=TEXT, labelpad=2)
    return made


def _heat(axis: Any, below: NDArray[np.float64], row: Mapping[str, Any]) -> None:
    """A heat map over the image, the region above the threshold outlined, its centre crossed."""
    heat = picture(row)[:, :, 0] / 255
    axis.imshow(0.4 + 0.6 * below, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.65, interpolation="nearest")
    threshold = float(row["threshold"])
    if heat.min() < threshold < heat.max():
        axis.contour(heat, [threshold], colors="k", linewidths=0.8)
    axis.plot(float(row["x"]), float(row["y"]), "+", color="k", markersize=6, markeredgewidth=1.2)


def _values(quantity: str, deployed: Deployed, images: Common) -> Tensor:
    """(N,) of a quantity, image by image."""
    parts = []
    for x, y in zip(images.x.split(BATCH), images.y.split(BATCH), strict=True):
        if quantity == "discrimination":
            features = deployed.draw(x, 1, features=True).features
            assert features is not None
            parts.append(discrimination(features[0]))
        else:
            parts.append(gradient_angles(loss_gradients(deployed, x, y)).mean(dim=0))
    return torch.cat(parts).cpu()


def loss_gradients(deployed: Deployed, x: Tensor, y: Tensor) -> Tensor:
    """(K, N, C, H, W) gradients of log((1 - p_y) / p_y) of every member: those of its cross-entropy
    up to the factor 1 / (1 - p_y), which has no part in an angle and would let sure ones vanish."""
    x = x.detach().requires_grad_()
    logits = deployed.sample(x, 1).logits[0].double()  # (K, N, L)
    true = nn.functional.one_hot(y, logits.shape[-1]).bool()
    odds = logits.masked_fill(true, float("-inf")).logsumexp(dim=-1) - logits[:, true]
    return torch.stack([torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in odds])


def _box_data(sources: Sources, arguments: Fields) -> Rows:
    """A series per method over the images, then its quartiles and such, a series each."""
    quantity = arguments["quantity"]
    if quantity not in QUANTITIES:
        raise unknown("quantity", quantity, QUANTITIES)
    ensembles = _ensembles(sources, arguments)
    limit = arguments.get("images")
    images = common(list(ensembles.values()), sources, arguments["dataset"], limit)
    values = {title: _values(quantity, each, images) for title, each in ensembles.items()}
    whole = torch.stack(list(values.values())).isfinite().all(dim=0)
    rows = [
        {"kind": "image", "series": title, "x": int(id), "y": float(f"{value:.6g}")}
        for title, each in values.items()
        for id, value in zip(images.ids[whole.numpy()], each[whole].tolist(), strict=True)
    ]
    for place, (title, each) in enumerate(values.items()):
        for name, value in zip(SUMMARY, _summary(each[whole].numpy()), strict=True):
            rows.append({"kind": "summary", "series": name, "x": place, "y": value})
            rows[-1] |= {"method": title, "n": int(whole.sum()), "right": images.right}
    return rows


def _summary(values: NDArray[np.float64]) -> Iterator[float]:
    """Mean, quartiles, and how many lie more than 1.5 times the box beyond it."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 1.5 * (high - low)
    yield from (float(values.mean()), float(low), float(middle), float(high))
    yield float(((values < low - reach) | (values > high + reach)).sum())


def _box_plot(rows: Rows, arguments: Fields) -> Canvas:
    """A box per method: quartiles, whiskers to 1.5 times the box, outliers, a diamond as mean."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "image":
            found.setdefault(row["series"], []).append(float(row["y"]))
    made, axis = canvas(COLUMN, 2.3)
    boxes = axis.boxplot(
        list(found.values()),
        showmeans=True,
        patch_artist=True,
        widths=0.55,
        medianprops={"color": "k", "linewidth": 1.2},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "w", "markeredgecolor": "k"},
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": "0.4"},
    )
    for box, color in zip(boxes["boxes"], PALETTE * 2, strict=False):
        box.set(facecolor=color, alpha=0.6, linewidth=0.8)
    axis.set_xticks(range(1, len(found) + 1), list(found), fontsize=7.5)
    axis.set_ylabel(QUANTITIES[arguments["quantity"]], fontsize=TEXT)
    if arguments.get("log"):
        axis.set_yscale("log")
    axis.tick_params(axis="y", labelsize=TEXT)
    axis.grid(axis="y", linewidth=0.4, color="0.85")
    axis.set_axisbelow(True)
    n, right = next((row["n"], int(row["right"])) for row in rows if row["kind"] == "summary")
    who = "every method answers" if right == len(found) else f"{right} methods answer"
    axis.set_title(f"{n} images that {who} rightly", fontsize=TEXT)
    return made


drawings.add("grad-cam-members", Drawing(_cam_data, _cam_plot, trainings=_trainings, version=2))
drawings.add("member-boxes", Drawing(_box_data, _box_plot, trainings=_trainings))
