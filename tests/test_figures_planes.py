"""Drawings that compute their data, against closed forms, Monte Carlo, torch and scikit-learn."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, ttest_1samp
from torch.nn import functional as F

from robbench import datasets, figures
from robbench.errors import InputError
from robbench.figures import diffusion, features
from robbench.figures import toy as toys
from robbench.figures.centres import centres
from robbench.papers.paper import Paper, Scale
from robbench.papers.reproduction import Known, Reproduction
from robbench.runner import Shared

SMALL = {
    "convection-diffusion": {"points": 32, "step": 0.02, "every": 4, "viscosity": 50},
    "max-mahalanobis-centres": {"draws": 3},
    "loss-contours": {},
    "rce-domains": {},
    "mmc-toy": {"points": 60, "batches": [60, 5], "steps": 6, "runs": 2, "kept": 20},
    "tsne": {"dataset": "mnist", "defenses": {"CE": "standard", "RCE": "rce"}, "n": 40},
}
TRAINED = Scale(
    datasets={"mnist": "digits"},
    networks={"resnet20": "mlp(hidden=[8])", "resnet32": "mlp(hidden=[8])"},
    recipe={"epochs": 1, "optimizer": "adam", "schedule": "one-cycle", "amp": False},
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    paper = Paper(
        key="try", number="000", title="", authors=(), venue="", bibtex={}, tables={},
        scales={"smoke": TRAINED},
    )  # fmt: skip
    whole = datasets.load("digits")
    some = replace(whole, train=type(whole.train)(*(part[:200] for part in whole.train)))
    device = torch.device("cpu")
    shared = Shared(tmp_path_factory.mktemp("out"), None, device, given={"digits": some})
    return figures.Sources(Reproduction(paper, "smoke", shared.dataset), Known.of([], 1), shared)


@pytest.fixture(scope="module")
def made(sources):
    """The rows of a drawing at a small size, computed once."""
    found = {}

    def rows(name):
        if name not in found:
            found[name] = figures.drawings.get(name).data(sources, SMALL[name])
        return found[name]

    return rows


@pytest.mark.parametrize("name", SMALL)
def test_rows_from_csv_are_plotted_to_the_same_bytes(made, name, tmp_path):
    drawing = figures.drawings.get(name)
    assert drawing.bindings(SMALL[name]) == []
    path, texts = tmp_path / "figure.csv", []
    figures.write(path, made(name))
    for _ in range(2):
        figures.save(drawing.plot(figures.read(path), SMALL[name]), path)
        texts.append(figures.plots_of(path)[0].read_bytes())
    assert texts[0] == texts[1]
    assert figures.read_series(path)  # every row has numbers under x and y


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_the_same_again(made, sources, name):
    assert figures.drawings.get(name).data(sources, SMALL[name]) == made(name)


@pytest.mark.parametrize("name", SMALL)
def test_an_argument_that_is_no_argument_is_named(sources, name):
    with pytest.raises(InputError, match="colour"):
        figures.drawings.get(name).data(sources, {**SMALL[name], "colour": 1})


# the convection-diffusion equation


def grid(points):
    return np.meshgrid(*[np.arange(points) / points] * 2, indexing="ij")


def smooth(x, y):
    """A sum of a few waves."""
    tau = 2 * np.pi
    return np.sin(tau * x) * np.cos(2 * tau * y) + 0.5 * np.cos(tau * (x + y))


def test_a_constant_velocity_without_diffusion_is_a_shift():
    x, y = grid(24)
    velocity = np.stack([np.full_like(x, 0.3), np.full_like(x, -0.7)])
    found = diffusion.solve(smooth(x, y), velocity, sigma=0.0, step=0.1)
    assert found == pytest.approx(smooth(x + 0.3, y - 0.7), abs=1e-12)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_diffusion_alone_decays_every_wave_by_its_exponent(sigma):
    x, y = grid(24)
    wave = np.cos(2 * np.pi * (2 * x - 3 * y))
    found = diffusion.solve(wave, np.zeros((2, 24, 24)), sigma, step=0.1)
    decay = math.exp(-(sigma**2) / 2 * (2 * np.pi) ** 2 * (2**2 + 3**2))
    assert found == pytest.approx(decay * wave, abs=1e-12)


def winds(x, y):
    """A smooth velocity with divergence and rotation."""
    tau = 2 * np.pi
    return np.stack([0.2 + 0.25 * np.sin(tau * y), 0.3 * np.cos(tau * x) * np.sin(tau * y)])


def test_the_solution_is_the_expectation_of_feynman_and_kac():
    """u(x, 0) = E[f(X(1))] with dX = v dt + σ dB, by Heun's scheme of weak order two."""
    points, sigma, paths, steps = 32, 0.15, 20_000, 50
    u = diffusion.solve(smooth(*grid(points)), winds(*grid(points)), sigma, step=5e-3)
    random = np.random.default_rng(0)
    for i, j in ((0, 0), (5, 20), (16, 9), (27, 30)):
        at = np.repeat([[i / points], [j / points]], paths, axis=1)
        for _ in range(steps):
            noise = sigma * math.sqrt(1 / steps) * random.standard_normal(at.shape)
            first = winds(*at)
            at = at + (first + winds(*(at + first / steps + noise))) / 2 / steps + noise
        payoff = smooth(*at)
        error = payoff.std(ddof=1) / math.sqrt(paths)
        assert error < 0.01
        assert abs(payoff.mean() - u[i, j]) < 3 * error


def test_halving_the_step_divides_the_error_by_sixteen():
    f, v = smooth(*grid(24)), winds(*grid(24))
    coarse, fine, exact = (diffusion.solve(f, v, 0.05, step) for step in (0.1, 0.05, 0.005))
    ratio = np.abs(coarse - exact).max() / np.abs(fine - exact).max()
    assert ratio == pytest.approx(16, rel=0.3)


def test_random_fields_keep_their_range_and_are_what_was_drawn_at_the_mesh():
    problem = diffusion.Problem(points=40, velocity_mesh=5, terminal_mesh=10)
    terminal, velocity = diffusion.fields(problem)
    drawn = np.random.default_rng(0).uniform(-1, 1, (10, 10))
    assert terminal[::4, ::4] == pytest.approx(drawn)
    assert terminal[2, 0] == pytest.approx((drawn[0, 0] + drawn[1, 0]) / 2)
    assert terminal[38, 0] == pytest.approx((drawn[9, 0] + drawn[0, 0]) / 2)  # periodic
    assert np.abs(velocity).max() <= 1


def test_with_viscosity_the_maximum_principle_holds_and_diffusion_makes_it_smoother():
    problem = diffusion.Problem(points=64, step=5e-3)
    terminal, velocity = diffusion.fields(problem)
    found = [diffusion.solve(terminal, velocity, sigma, 5e-3, 100.0) for sigma in problem.sigmas]
    assert all(np.abs(u).max() <= 1.02 * np.abs(terminal).max() for u in found)
    slopes = [diffusion.roughness(u) for u in found]
    assert slopes == sorted(slopes, reverse=True)


def test_roughness_of_a_wave():
    x, y = grid(16)
    wave = np.sin(2 * np.pi * (x + 2 * y))
    assert diffusion.roughness(wave) == pytest.approx(2 * np.pi * math.sqrt(5 / 2))


# feature spaces


@pytest.mark.parametrize("labels", [2, 3, 4, 10])
def test_centres_are_a_regular_simplex(labels):
    found = centres(labels, 4.0)
    assert np.linalg.norm(found, axis=1) == pytest.approx(4.0, rel=1e-6)
    between = [math.dist(a, b) for a, b in itertools.combinations(found, 2)]
    assert between == pytest.approx([4 * math.sqrt(2 * labels / (labels - 1))] * len(between))


def test_no_random_centres_are_as_far_apart_as_the_nearest_maximal_ones(made):
    rows = [row for row in made("max-mahalanobis-centres") if row["kind"] == "distance"]
    nearest = {
        name: min(r["y"] for r in rows if r["series"] == name) for name in ("maximal", "random")
    }
    assert nearest["maximal"] > 1.2 * nearest["random"]
    assert len(rows) == 2 * 45


def test_every_point_of_a_contour_has_its_loss(made):
    """By the cross-entropy of torch, of the logits h_i = -σ_i ‖z - μ_i‖²."""
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    sigmas = {"g-SCE, σ_k > σ_k~": (2.0, 1.0), "g-SCE, σ_k < σ_k~": (1.0, 2.0)}
    rows = [row for row in made("loss-contours") if row["kind"] == "contour"]
    assert {row["panel"] for row in rows} == {*sigmas, "MMC"}
    for row in rows:
        z = torch.tensor([row["x"], row["y"]], dtype=torch.float64)
        squares = (z - centres).square().sum(dim=1)
        if row["panel"] == "MMC":
            assert float(squares[0]) / 2 == pytest.approx(row["level"], rel=0.01)
            continue
        logits = -torch.tensor(sigmas[row["panel"]], dtype=torch.float64) * squares
        loss = F.cross_entropy(logits[None], torch.tensor([0]))
        assert float(loss) == pytest.approx(row["level"], rel=0.01)


def probabilities(z):
    """Of three labels at equal angles, by what `rce-domains` says of itself."""
    angles = math.pi / 2 + 2 * math.pi / 3 * np.arange(3)
    return softmax(z @ np.stack([np.cos(angles), np.sin(angles)]), axis=-1)


def rest(z):
    """The label, and the entropy of the others."""
    p = probabilities(z)
    return int(p.argmax()), entropy(np.delete(p, p.argmax()))


def test_level_lines_have_their_entropy_in_their_domain(made):
    lines = [r for r in made("rce-domains") if r["kind"] in ("level", "largest")]
    assert len(lines) == 3 * (2 + 4 * 2 * 2)
    for row in lines:
        z = np.array([row["x"], row["y"]])
        at_rim = np.hypot(*z) > 3.9
        if at_rim:  # the other end is on a border, where two labels are alike
            label, found = rest(z)
            assert label == row["label"]
            assert found == pytest.approx(row["level"] * math.log(2), rel=1e-3)


def test_no_nearer_point_of_the_other_domain_does(made):
    """Against a search over a fine grid."""
    point = {
        r["series"]: np.array([r["x"], r["y"]]) for r in made("rce-domains") if r["kind"] == "point"
    }
    axis = np.linspace(-4, 4, 401)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    p = probabilities(z)
    other = p.argmax(axis=1) == 1
    tail = p[:, [0, 2]] / p[:, [0, 2]].sum(axis=1, keepdims=True)
    normal = entropy(tail, axis=1) >= 0.95 * math.log(2)
    far = np.linalg.norm(z - point["z0"], axis=1)
    reached = {name: math.dist(at, point["z0"]) for name, at in point.items()}
    assert reached["z1"] == pytest.approx(far[other].min(), abs=0.03)
    assert reached["z2"] == pytest.approx(far[other & normal].min(), abs=0.03)
    assert reached["z2"] > reached["z1"]
    assert rest(point["z0"])[1] == pytest.approx(math.log(2))


def test_full_batch_steps_of_the_toy_are_those_of_gradient_descent():
    """One step of the MMC loss, whose gradient by the last layer is known in closed form."""
    toy = toys.Toy(points=30, batches=(30,), steps=2)
    defense = toy.losses["MMC loss"]
    found, y = toys.follow(toy, defense, 30, seed=3)
    torch.manual_seed(3)
    member = defense.prepare(toys.Plane(toy.hidden, toy.labels))
    x, _ = toys.clouds(toy, torch.Generator().manual_seed(3))
    hidden = member.features(x)
    z = member.readout.embed(hidden)
    assert torch.equal(found[0].features, z.detach())
    loss = (z - found[0].centres[y]).square().sum(dim=1).mean() / 2
    loss.backward()
    with torch.no_grad():
        for parameter in member.parameters():
            parameter -= toy.lr * parameter.grad
        moved = member.readout.embed(member.features(x))
    assert torch.allclose(found[1].features, moved, atol=1e-6)
    assert torch.equal(found[2].centres, found[0].centres)  # MMC's never move


def test_distances_of_the_toy_are_those_of_its_means(made):
    rows = made("mmc-toy")
    name = "MMC loss, full batch"
    means = [r for r in rows if r["series"].startswith(f"{name}: path")]
    last = [[r for r in means if r["label"] == k][-1] for k in range(3)]
    centres = [r for r in rows if r["series"].startswith(f"{name}: centre")]
    apart = [
        math.dist((a["x"], a["y"]), (b["x"], b["y"])) for a, b in zip(last, centres, strict=True)
    ]
    curve = [r for r in rows if r["series"] == name]
    assert [r["x"] for r in curve] == sorted({r["x"] for r in curve})
    assert curve[-1]["x"] == 6
    toy = toys.Toy(**SMALL["mmc-toy"])
    runs = [toys.follow(toy, toy.losses["MMC loss"], 60, seed)[0][6].distance for seed in (0, 1)]
    low, high = ttest_1samp(runs, 0).confidence_interval(0.95)
    assert runs[0] == pytest.approx(np.mean(apart), abs=1e-4)
    shown = [curve[-1][key] for key in ("low", "y", "high")]
    assert shown == pytest.approx([low, np.mean(runs), high], abs=1e-5)
    assert curve[-1]["y"] < curve[0]["y"]


# features of networks


def test_what_lies_apart_lies_apart_on_the_map():
    """Clouds far from each other keep their neighbours, by scikit-learn's trustworthiness."""
    from sklearn.manifold import trustworthiness
    from sklearn.neighbors import KNeighborsClassifier

    random = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 15)
    x = 8 * random.standard_normal((4, 12))[y] + random.standard_normal((60, 12))
    found = features.embedded(x, 30.0, 0)
    assert found.shape == (60, 2)
    assert trustworthiness(x, found, n_neighbors=5) > 0.85
    assert KNeighborsClassifier(3).fit(found, y).score(found, y) == 1


def test_the_map_has_the_test_images_of_the_evaluation_with_their_predictions(made, sources):
    rows = made("tsne")
    digits = sources.dataset("mnist")
    subset = digits.subset(40)
    for name in ("CE", "RCE"):
        here = [row for row in rows if row["series"] == name]
        assert [row["image"] for row in here] == subset.ids.tolist()
        assert [row["label"] for row in here] == subset.y.tolist()
        spec = sources.defense(SMALL["tsne"]["defenses"][name], "mnist")
        deployed = sources.shared.deploy(spec, digits, 0).deployed
        assert [row["prediction"] for row in here] == deployed.decide(subset.x, 1)[0].tolist()
