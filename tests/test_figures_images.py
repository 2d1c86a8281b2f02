"""Pictures, maps and matrices against closed forms, the runner and other libraries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from robbench import figures
from robbench.attacks import Configured
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.executors import measure
from robbench.figures.abstentions import ballots, original_of
from robbench.figures.images import (
    NONE,
    answers,
    attacked,
    chosen,
    picture,
    pixels,
)
from robbench.figures.members import QUANTITIES, _summary, loss_gradients, member_maps
from robbench.metrics.diversity import transfer_matrix
from robbench.networks import build
from robbench.papers.cells import cell_of
from robbench.papers.paper import Binding, Paper, Scale
from robbench.papers.reproduction import Known, Reproduction
from robbench.records import Store
from robbench.rules import ABSTAIN, MeanProbabilities, Vote
from robbench.runner import Shared

RECIPE = {
    "epochs": 2,
    "optimizer": "adam",
    "lr": 0.01,
    "schedule": "one-cycle",
    "batch_size": 64,
    "weight_decay": 0.0,
    "crop": 0,
    "flip": False,
}
SMALL = Scale(
    datasets={"cifar10": "digits", "imagenet": "digits"},
    networks={"resnet20": "quick(width=4)", "resnet50": "quick(width=4)", "mlp": "mlp(hidden=[9])"},
    n=30,
    recipe=RECIPE,
    members={3: 2, 20: 2},
    draws={20: 2},
)
WHITE = {"dataset": "cifar10", "norm": "linf", "eps": "0.1", "setting": "whitebox"}
PGD = "pgd(steps=4)"
MLP = "standard(network=mlp)"
ARGUMENTS = {
    "adversarial-panels": {
        "bind": {**WHITE, "defense": MLP},
        "columns": {"PGD": {"attack": PGD}, "FGSM": {"attack": "fgsm"}},
        "images": 2,
        "labels": ["7"],
        "pool": 20,
    },
    "abstentions": {"dataset": "imagenet", "defense": "ito", "images": 3},
    "grad-cam-members": {
        "dataset": "cifar10",
        "methods": {"A": "ensemble", "B": "adp(beta=0)"},
        "labels": ["4"],
    },
    "member-boxes": {
        "quantity": "angle",
        "dataset": "cifar10",
        "methods": {"A": "ensemble", "B": "adp(beta=0)"},
        "images": 20,
    },
    "transfer-matrix": {
        "bind": {**WHITE, "attack": PGD, "n": 20},
        "panels": {
            "members": {"ensemble": "ensemble"},
            "networks": {"networks": {"M": {"defense": MLP}, "A": {"defense": "ensemble"}}},
        },
    },
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("figures"), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(shared):
    """A paper at a small scale, with the cells that the matrices are made of."""
    paper = Paper(
        key="p",
        number="000",
        title="t",
        authors=("a",),
        venue="v",
        bibtex={},
        tables={},
        scales={"smoke": SMALL},
    )
    made = Reproduction(paper, "smoke", shared.dataset)
    fields = figures.drawings.get("transfer-matrix").bindings(ARGUMENTS["transfer-matrix"])
    cells = {cell.id: cell for each in fields for cell in made.cells_of(Binding(**each))}
    records = list(measure(list(cells.values()), Store(shared.out), shared))
    assert {record.status for record in records} == {"ok"}
    return figures.Sources(made, Known({each.id: each for each in records}, {}, {}, {}), shared)


@pytest.fixture(scope="module")
def rows(sources):
    """The data of every drawing, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = figures.drawings.get(name).data(sources, ARGUMENTS[name])
        return made[name]

    return of


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_from_its_row(channels):
    values = torch.randint(256, (channels, 5, 4), generator=torch.Generator().manual_seed(0))
    shown = picture(pixels(values / 255))
    assert shown.dtype == np.uint8
    assert shown.shape == (5, 4, 3)
    assert (shown == values.permute(1, 2, 0).expand(5, 4, 3).numpy()).all()


def test_a_large_image_is_shown_by_the_means_of_its_blocks():
    image = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0))
    row = pixels(image)
    assert len(row["pixels"]) < 131072  # what a reader of CSV takes in one cell
    blocks = 255 * image.numpy().reshape(3, 112, 2, 112, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
    assert np.abs(picture(row) - blocks).max() <= 0.51


def test_images_are_chosen_by_label_then_fitness_then_new_labels():
    labels = ["cat", "deer", "deer", "cat", "red deer, elk", "ship"]
    assert chosen(labels, ["Deer"], [9, 1, 2, 8, 7, 0], 4) == [2, 0, 4, 5]
    assert chosen(labels, ["elk", "unknown"], [0] * 6, 2) == [4, 0]
    assert chosen(["a", "a"], [], [0, 1], 3) == [1, 0]


@pytest.mark.parametrize(("attack", "eps"), [(PGD, "0.1"), ("deepfool", "0.3")])
def test_pictures_are_of_the_examples_that_the_runner_counts(shared, attack, eps):
    fields = {**WHITE, "norm": "l2", "eps": eps, "n": 20, "defense": MLP, "attack": attack}
    cell = cell_of(Binding(**fields), SMALL, shared.dataset)
    (record,) = measure([cell], None, shared)
    made = attacked(cell, shared)
    known = torch.tensor(record.distance)
    inside = known <= float(cell.threat.eps) * (1 + 1e-5)
    assert torch.equal(made.distance.float()[inside], known[inside])
    assert not made.distance[~inside].any()
    deployed = shared.deploy(cell.defense, shared.dataset("digits"), 0).deployed
    label = answers(deployed, made.adversarial, 0).label
    assert np.array_equal((label == made.y).numpy(), record.ok == 1)


def test_there_is_no_picture_of_an_attack_that_fails(shared):
    cell = cell_of(Binding(**WHITE, n=5, defense=MLP, attack=PGD), SMALL, shared.dataset)
    with pytest.raises(InputError, match="BOOM"):
        attacked(cell.model_copy(update={"attack": "pgd(loss=BOOM)"}), shared)


class Fixed(nn.Module):
    """A member that gives the same logits to every image, those of one label."""

    def __init__(self, label):
        super().__init__()
        self.register_buffer("logits", 3.0 * nn.functional.one_hot(torch.tensor(label), 4))

    def forward(self, x):
        return self.logits.expand(len(x), 4)


def fixed(labels, rule):
    return Deployed(nn.ModuleList(Fixed(label) for label in labels), rule, (1, 2, 2), 4)


def test_ballots_are_counted():
    label, votes = ballots(fixed([0, 1, 1, 3], Vote()), torch.zeros(70, 1, 2, 2), 0)
    assert (label == ABSTAIN).all()  # two of four are not more than half
    assert torch.equal(votes, torch.tensor([[0.25, 0.5, 0, 0.25]]).double().expand(70, 4))
    label, _ = ballots(fixed([2, 1, 2], Vote()), torch.zeros(3, 1, 2, 2), 0)
    assert (label == 2).all()


def test_answers_are_as_sure_as_the_mean_of_the_members():
    found = answers(fixed([1, 1, 2], MeanProbabilities()), torch.zeros(2, 1, 2, 2), 0)
    high, low = np.exp(3) / (np.exp(3) + 3), 1 / (np.exp(3) + 3)
    assert found.label.tolist() == [1, 1]
    assert found.confidence.tolist() == pytest.approx([(2 * high + low) / 3] * 2, rel=1e-6)
    silent = answers(fixed([0, 0, 3, 3], Vote()), torch.zeros(1, 1, 2, 2), 0)
    assert silent.label.tolist() == [ABSTAIN]
    assert silent.confidence.tolist() == pytest.approx([(high + low) / 2], rel=1e-6)


def test_the_original_is_what_was_fine_tuned():
    assert original_of("ito(network=quick(width=4))") == "standard(network=quick(width=4))"
    large = "ito(base=torchvision:IMAGENET1K_V1, network=resnet50(form=imagenet))"
    assert original_of(large) == (
        "standard(base=torchvision:IMAGENET1K_V1, epochs=0, network=resnet50(form=imagenet))"
    )
    with pytest.raises(InputError, match="nothing"):
        original_of("ensemble")


def test_every_image_shown_has_no_answer(rows):
    found = rows("abstentions")
    assert len(found) == 3
    for row in found:
        assert row["prediction"] == NONE and 3 <= row["abstained"] <= row["n"] <= 500
        assert 0.5 >= row["share1"] >= row["share2"] >= row["share3"] >= 0


@pytest.mark.parametrize(("enough", "shown", "n"), [(4, 4, 10), (6, 6, 500), (9, 6, 500)])
def test_images_are_looked_at_until_enough_have_no_answer(sources, monkeypatch, enough, shown, n):
    """Where the test split has fewer, all of them are shown."""
    silent = {2, 3, 5, 9, 20, 499}
    monkeypatch.setattr("robbench.figures.abstentions.LOOK", 5)
    places = itertools.count()

    def counted(deployed, x, seed):
        label = [ABSTAIN if place in silent else 0 for _, place in zip(x, places, strict=False)]
        return torch.tensor(label), torch.full((len(x), 10), 0.1, dtype=torch.float64)

    monkeypatch.setattr("robbench.figures.abstentions.ballots", counted)
    arguments = {**ARGUMENTS["abstentions"], "images": enough}
    found = figures.drawings.get("abstentions").data(sources, arguments)
    assert (len(found), found[0]["n"]) == (shown, n)
    ids = sources.dataset("imagenet").subset(n).ids
    assert {row["id"] for row in found} <= {ids[i] for i in silent if i < n}
    assert found[0]["abstained"] == sum(i < n for i in silent)


def test_a_defense_that_answers_to_all_images_has_no_such_picture(sources, monkeypatch):
    answered = lambda deployed, x, seed: (torch.zeros(len(x)), None)  # noqa: E731
    monkeypatch.setattr("robbench.figures.abstentions.ballots", answered)
    with pytest.raises(InputError, match="answers to all of the 500 test images"):
        figures.drawings.get("abstentions").data(sources, ARGUMENTS["abstentions"])


def test_panels_show_what_was_added(rows):
    found = rows("adversarial-panels")
    assert [row["column"] for row in found] == ["original", "PGD", "FGSM"] * 2
    assert found[0]["label"] == "7"
    for place in (0, 3):
        original, *others = found[place : place + 3]
        for row in others:
            change = picture(row).astype(float) - picture(original)
            assert np.abs(change).max() / 255 == pytest.approx(row["distance"], abs=1 / 255)
            shown = picture(row, "difference") / 255.0 - 0.5
            assert np.abs(shown / row["gain"] - change / 255).max() < 1.5 / 255


def test_maps_of_a_linear_readout_are_class_activation_maps():
    """Zhou et al. 2016: with a mean and a linear layer on top, the label's weights alone."""
    torch.manual_seed(0)
    member = build("quick", {"width": 4}, (1, 8, 8), 10).eval()
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([1, 5, 5])
    with torch.no_grad():
        maps = member.head(member.stages(member.stem(member.normalize(x))))
        cam = torch.einsum("ncij,nc->nij", maps, member.readout.weight[y]).relu()
        cam = nn.functional.interpolate(cam[:, None], (8, 8), mode="bilinear")[:, 0]
    expected = cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    assert torch.allclose(member_maps(member, x, y), expected, atol=1e-5)
    with pytest.raises(InputError, match="feature maps"):
        member_maps(build("mlp", {}, (1, 8, 8), 10), x, y)


def test_loss_gradients_have_the_direction_of_cross_entropys():
    torch.manual_seed(0)
    members = nn.ModuleList(build("quick", {"width": 4}, (1, 8, 8), 10) for _ in range(2)).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 3, 3, 9])
    found = loss_gradients(Deployed(members, MeanProbabilities(), (1, 8, 8), 10), x, y)
    for member, gradient in zip(members, found, strict=True):
        point = x.clone().requires_grad_()
        nn.functional.cross_entropy(member(point), y).backward()
        cosine = nn.functional.cosine_similarity(gradient.flatten(1), point.grad.flatten(1))
        assert torch.allclose(cosine, torch.ones(4), atol=1e-5)


def test_the_summary_is_that_of_the_boxes():
    cbook = pytest.importorskip("matplotlib.cbook")
    values = np.random.default_rng(0).standard_cauchy(101)
    (box,) = cbook.boxplot_stats(values)
    expected = [box["mean"], box["q1"], box["med"], box["q3"], len(box["fliers"])]
    assert list(_summary(values)) == pytest.approx(expected)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_boxes_are_over_the_same_images(sources, quantity):
    arguments = {**ARGUMENTS["member-boxes"], "quantity": quantity}
    found = figures.drawings.get("member-boxes").data(sources, arguments)
    ids = [[r["x"] for r in found if r["kind"] == "image" and r["series"] == m] for m in "AB"]
    assert ids[0] == ids[1]
    assert 0 < len(ids[0]) <= 20
    means = [row["y"] for row in found if row["series"] == "mean"]
    for method, mean in zip("AB", means, strict=True):
        own = [r["y"] for r in found if r["kind"] == "image" and r["series"] == method]
        assert np.mean(own) == pytest.approx(mean, rel=1e-5)


def test_an_unknown_quantity_is_refused(sources):
    with pytest.raises(InputError, match="angle"):
        figures.drawings.get("member-boxes").data(
            sources, {**ARGUMENTS["member-boxes"], "quantity": "angel"}
        )


def test_the_matrix_is_the_transfer_matrix(sources, shared, rows):
    found = [row for row in rows("transfer-matrix") if row["panel"] == "members"]
    entries = {(row["source"], row["target"]): row["y"] for row in found if row["source"]}
    spec = sources.defense("ensemble", "cifar10")
    examples = []
    for member in (0, 1):
        fields = {**ARGUMENTS["transfer-matrix"]["bind"], "defense": f"ensemble[{member}]"}
        alone = attacked(cell_of(Binding(**fields), SMALL, shared.dataset), shared)
        other = {"oracle": fields["defense"], "defense": f"ensemble[{1 - member}]"}
        fields |= {"setting": "transfer", **other}
        carried = attacked(cell_of(Binding(**fields), SMALL, shared.dataset), shared)
        examples.append((alone.adversarial, carried.adversarial))
    deployed = shared.deploy(spec, shared.dataset("digits"), 0).deployed

    def logits(x):
        return deployed.draw(x, 1).logits[0]

    alone, carried = (
        100 * (1 - transfer_matrix(each, logits, shared.dataset("digits").subset(20).y))
        for each in zip(*examples, strict=True)
    )
    for i in (0, 1):
        for j in (0, 1):
            expected = float((alone if i == j else carried)[i, j])
            assert entries[f"member {i + 1}", f"member {j + 1}"] == pytest.approx(expected)
    (mean,) = (row["y"] for row in found if not row["source"])
    assert mean == pytest.approx((float(carried[0, 1]) + float(carried[1, 0])) / 2)


def test_networks_attack_each_other_once(rows):
    found = [row for row in rows("transfer-matrix") if row["panel"] == "networks"]
    assert [(row["source"], row["target"], row["setting"]) for row in found] == [
        ("M", "M", "whitebox"),
        ("M", "A", "transfer"),
        ("A", "M", "transfer"),
        ("A", "A", "whitebox"),
    ]
    assert all(row["low"] <= row["y"] <= row["high"] for row in found)
    assert Configured.of(found[0]["attack"]).entry.name == "pgd"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_data_is_the_same_again(sources, rows, name):
    assert figures.drawings.get(name).data(sources, ARGUMENTS[name]) == rows(name)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_plot_needs_its_csv_alone(rows, tmp_path, name):
    pytest.importorskip("matplotlib")
    data, texts = tmp_path / "a.csv", []
    figures.write(data, rows(name))
    read = figures.read(data)
    for _ in range(2):
        figures.save(figures.drawings.get(name).plot(read, ARGUMENTS[name]), data)
        texts.append(figures.plots_of(data)[0].read_bytes())
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"<?xml")


@pytest.mark.parametrize("name", ["grad-cam-members", "member-boxes", "transfer-matrix"])
def test_claims_can_read_the_series(rows, tmp_path, name):
    figures.write(tmp_path / "a.csv", rows(name))
    found = figures.read_series(tmp_path / "a.csv")
    wanted = {"mean off the diagonal"} if name == "transfer-matrix" else {"A", "B"}
    assert wanted <= found.keys()
    if name != "transfer-matrix":
        places = [[point.x for point in found[each]] for each in "AB"]
        assert places[0] == places[1]  # the same images, so that they can be paired
