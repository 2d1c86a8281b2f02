"""Max-Mahalanobis training, part I of paper 003: MMLDA (Pang et al. 2018, arXiv:1802.09308) and
MMC (Pang et al. 2020, arXiv:1905.10626).

Features z = W h + b are pulled to fixed class centres μ_l, as far from each other as L points of
one norm can be: the smallest distance of two Gaussians then is the largest possible, and with it
the robustness RB of linear discriminant analysis (Theorem 1 and what follows it). The score of a
label is -½‖z - μ_l‖², or <z, μ_l>, which has the same softmax. MMLDA trains that softmax; MMC,
without one, ½‖z - μ_y‖² alone.

How it is attacked: at its centre z is ahead by 111 at the norm 10, where the softmax of all other
labels is 0 in float32 and with it the gradient of cross-entropy. The attack losses are made of
the scores alone. Log-odds have the direction of cross-entropy where that has one, and fade nowhere;
the linear margin is their hard form; the distance is what the authors ascend, which also rewards
what changes no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor, nn

from robbench.attacks.losses import Scored, log_odds
from robbench.attacks.suite import MEANS, Budget, Stage
from robbench.defense import Defense, defense
from robbench.recipes import CENTRES_RECIPE
from robbench.rules import Draw, Loss, MeanLogits, Rule


@lru_cache
def unit_centres(labels: int, dimension: int) -> np.ndarray:
    """(L, d) unit vectors whose largest pairwise cosine is the smallest possible; float64.

    d >= L - 1: the regular simplex with all cosines -1 / (L - 1), by the paper's algorithm
    (arXiv:1802.09308, algorithm 1), whose rows are those of the Gram matrix's Cholesky factor.
    Below, where no simplex fits: numerically, from one fixed start.
    """
    if dimension < labels - 1:
        return _spread(labels, dimension)
    column = np.arange(labels - 1)
    pivots = np.sqrt(labels * (labels - 1 - column) / ((labels - 1) * (labels - column)))
    centres = np.zeros((labels, dimension))
    below = np.tril(np.broadcast_to(-pivots / (labels - 1 - column), (labels, labels - 1)), -1)
    centres[:, : labels - 1] = below
    centres[column, column] = pivots
    return centres


def _spread(labels: int, dimension: int) -> np.ndarray:
    """The largest cosine as a logsumexp that hardens step by step, minimised by L-BFGS.

    The authors take 10,000 steps of Adam on the maximum itself.
    """
    points = np.random.default_rng(0).standard_normal((labels, dimension))
    for hardness in (10.0, 100.0, 1e3, 1e4):
        found = minimize(
            _largest_cosine,
            points.ravel(),
            args=(points.shape, hardness),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 200},
        )
        points = found.x.reshape(points.shape)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def _largest_cosine(
    flat: np.ndarray, shape: tuple[int, int], hardness: float
) -> tuple[float, np.ndarray]:
    """The softened largest cosine between rows, and its gradient by them."""
    points = flat.reshape(shape)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    units = points / lengths
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    top = cosines.max()
    weights = np.exp(hardness * (cosines - top))
    total = weights.sum()
    slope = 2 * (weights / total) @ units
    slope = (slope - (slope * units).sum(axis=1, keepdims=True) * units) / lengths
    return top + np.log(total) / hardness, slope.ravel()


class CentreReadout(nn.Module):
    """Hidden activations (..., D) -> z = W h + b, (..., d) -> scores -c ‖z - μ_l‖², (..., L).

    `embed` is the linear layer, which activations behind a ReLU need to reach every centre;
    `centres` (L, d) are a buffer that no training moves.
    """

    centres: Tensor

    def __init__(self, inputs: int, centres: Tensor, factor: float) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, centres.shape[1])
        self.factor = factor
        self.register_buffer("centres", centres)

    def forward(self, hidden: Tensor) -> Tensor:
        # squares of differences: expanded into products, small distances would round to below 0
        offsets = self.embed(hidden).unsqueeze(-2) - self.centres
        return -self.factor * offsets.square().sum(dim=-1)


class ProductReadout(CentreReadout):
    """The same up to a shift that all labels share: scores 2 c <z, μ_l>.

    A softmax has no gradient along that shift. Taken of squares, it has one of rounding noise,
    which Adam blows up to full steps: ‖z‖ then grows to where float32 has no digits left.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * self.factor * F.linear(self.embed(hidden), self.centres)


LOG_ODDS = Scored(MeanLogits(), log_odds)


def distance(draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
    """(N,) the MMC loss of the label, ½‖z - μ_y‖², or minus that of the target; -<z, μ_y> and
    <z, μ_t> where scores are products."""
    scores = MeanLogits().scores(draw)
    label, sign = (y, -1) if target is None else (target, 1)
    return sign * scores.gather(1, label[:, None])[:, 0]


class MaxMahalanobis(Defense):
    """What MMLDA and MMC share: a linear layer to z, fixed centres, scores by distance.

    dimension: d of z; from L - 1 on the centres are the regular simplex, below they are found
    numerically. centre_norm: ‖μ_l‖, so that ‖μ_l‖² is the paper's C (the 10 in MMC-10). factor:
    c of c ‖z - μ‖², 1/2 in the text, 1 in the authors' code. centres: `maximal`, or `random`,
    uniform on the sphere and drawn with the initial weights. The mean score over members decides,
    not their mean softmax, which is that of one member wherever it saturates.

    `paper` is the recipe of the authors' code on CIFAR; where its tables say Res.32 it has a
    pre-activation network of 47 layers in bottlenecks, and `resnet32` is the one of that name.
    """

    readout: ClassVar[type[CentreReadout]] = CentreReadout
    losses: ClassVar[Mapping[str, Loss]] = {
        "log-odds": LOG_ODDS,
        # with centres of one norm linear in z, max_j <z, μ_j> - <z, μ_y>
        "margin": Scored(MeanLogits()),
        "distance": distance,
    }
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": CENTRES_RECIPE,
        "paper:mnist": {**CENTRES_RECIPE, "epochs": 50, "decay_at": (0.6, 0.8)},
    }

    dimension: Annotated[int, Field(ge=2)] = 256
    centre_norm: Annotated[float, Field(gt=0)] = 10.0
    factor: Annotated[float, Field(gt=0)] = 0.5
    centres: Literal["maximal", "random"] = "maximal"

    def prepare(self, network: nn.Module) -> nn.Module:
        readout = network.readout
        assert isinstance(readout, nn.Linear)
        if self.centres == "random":
            units = F.normalize(torch.randn(readout.out_features, self.dimension))
        else:
            found = unit_centres(readout.out_features, self.dimension)
            units = torch.tensor(found, dtype=torch.float32)
        centres = self.centre_norm * units
        network.readout = self.readout(readout.in_features, centres, self.factor)
        return network

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Every wrong centre in turn, by the margin, which is linear in the features; and small
        steps, which the authors' 10 of ε / 4 are not."""
        steps = MEANS[budget].steps
        return [
            Stage(f"apgd(loss=margin, targets=9, steps={steps})"),
            Stage(f"pgd(loss=margin, steps={2 * steps})"),
        ]

    def rule(self) -> Rule:
        return MeanLogits()


@defense("mmlda")
class MMLDA(MaxMahalanobis):
    """Max-Mahalanobis linear discriminant analysis: cross-entropy of the scores <z, μ_l>, which
    are -½‖z - μ_l‖² but for what all labels share (paper 003, the slide of the MMC loss).

    Adversarial training ascends the log-odds: the cross-entropy that is minimised has no gradient
    at images that are fitted well.
    """

    source: ClassVar[str] = "paper 003: Pang et al. 2018, arXiv:1802.09308"
    readout: ClassVar[type[CentreReadout]] = ProductReadout

    def objective(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        return LOG_ODDS(draw, y, target)


@defense("mmc")
class MMC(MaxMahalanobis):
    """Max-Mahalanobis center loss ½‖z - μ_y‖², no softmax (paper 003; arXiv:1905.10626, eq. 8).

    ascend: what adversarial training maximises - the `loss` itself, as in the paper (targeted:
    minus the target's), or the `log-odds`. Training draws targets among the wrong labels;
    the authors' code also draws the right one. AT10-tar of paper 003 is
    `adversarial=pgd(eps=8/255, step=2/255, steps=10, targeted=true)`.
    """

    source: ClassVar[str] = "paper 003: Pang et al. 2020, arXiv:1905.10626"

    ascend: Literal["loss", "log-odds"] = "loss"

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        return distance(draw, y, None)

    def objective(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        return (distance if self.ascend == "loss" else LOG_ODDS)(draw, y, target)


@defense("mmc-rand")
class RandomMMC(MMC):
    """MMC with random centres: what the loss does without their construction (paper 003, table of
    adaptive attacks, MMC-10 (rand))."""

    centres: Literal["maximal", "random"] = "random"
