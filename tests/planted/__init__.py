"""Defenses that look robust and are not, evaluations that are wrong, and what must accuse them.

Each defense is put around the undefended network of the boards and attacked as if nothing were the
matter. PLANTED says which flags the audit has to raise, SOUND what must go free of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.planted import (
    batch_normalisation,
    cut_gradient,
    distance_detector,
    inner_optimisation,
    labels_as_targets,
    median_filter,
    probabilities,
    quantised_input,
    random_resize,
    saturated_softmax,
    scaled_logits,
    sign_activations,
    silenced_dropout,
    single_draw_noise,
)
from torch import nn

from robbench.attacks import Run
from robbench.rules import MeanProbabilities, Rule


@dataclass(frozen=True)
class Planted:
    """A defense around a network, the attack whose number is on trial, and what must be said of it.

    expected: flags with their verdicts. run: what the attack is, where that is planted too.
    setting: of the number on trial, where it is not the one that plan() chooses. beside: blocks of
    further cells, for flags that the depth `quick` has no evidence for.
    """

    expected: Mapping[str, str]
    defend: Callable[[nn.Module], nn.Module] = lambda network: network
    rule: Callable[[], Rule] = MeanProbabilities
    attack: str = "pgd"
    run: Run | None = None
    eps: str = "0.1"
    setting: str | None = None
    beside: Sequence[Mapping[str, Any]] = ()


UNDEFENDED = "standard(network=mlp)"  # what the defenses are put around
TRANSFER = {"attack": "mim", "setting": "transfer", "oracle": [UNDEFENDED]}
PLANTED = {
    "scaled-logits": Planted(
        {"F8": "INVALID", "F9": "OVERESTIMATE"},
        scaled_logits.defend,
        beside=[{"attack": "pgd(loss=dlr)"}],
    ),
    "quantised-input": Planted(
        {"F8": "INVALID", "F1": "INVALID", "F11": "OVERESTIMATE"},
        quantised_input.defend,
        beside=[{"attack": "pgd", "eps": "0.5"}, TRANSFER],
    ),
    "sign-activations": Planted(
        {"F8": "INVALID", "F10": "OVERESTIMATE", "F12": "OVERESTIMATE"},
        sign_activations.defend,
        beside=[{"attack": "square(queries=300)"}, {"attack": "random-search"}],
    ),
    "saturated-softmax": Planted(
        {"F8": "INVALID", "F11": "OVERESTIMATE"}, saturated_softmax.defend, beside=[TRANSFER]
    ),
    "single-draw-noise": Planted(
        {"F21": "INFO", "F22": "WARN"}, single_draw_noise.defend, setting="whitebox"
    ),
    "random-resize": Planted({"F21": "INFO"}, random_resize.defend, setting="whitebox"),
    "median-filter": Planted({"F8": "INVALID", "F35": "INVALID"}, median_filter.defend),
    "probabilities": Planted({"F31": "WARN"}, probabilities.defend),
    "batch-normalisation": Planted({"F17": "WARN"}, batch_normalisation.defend),
    "cut-gradient": Planted(
        {"F14": "INVALID", "F11": "OVERESTIMATE"}, cut_gradient.defend, beside=[TRANSFER]
    ),
    "distance-detector": Planted(
        {"F2": "INVALID", "F4": "OVERESTIMATE"},
        distance_detector.defend,
        distance_detector.rule,
        attack="pgd(keep=last)",
        eps="0.3",
        beside=[
            {"attack": "pgd(keep=last)", "eps": "0.1"},
            {"attack": "pgd(keep=last, steps=200)", "eps": "1"},
        ],
    ),
    "inner-optimisation": Planted(
        {"F32": "OVERESTIMATE", "F11": "OVERESTIMATE"}, inner_optimisation.defend, beside=[TRANSFER]
    ),
    "silenced-dropout": Planted(
        {"F18": "INVALID"},
        silenced_dropout.defend,
        attack="silencing",
        run=silenced_dropout.silencing,
    ),
    "labels-as-targets": Planted(
        {"F25": "INVALID"}, attack="towards-labels", run=labels_as_targets.towards_labels
    ),
    "short-steps": Planted(
        {"F5b": "WARN", "F5": "OVERESTIMATE"},
        attack="pgd(step=0.005)",
        beside=[{"attack": "pgd(step=0.005, steps=80)"}],
    ),
}

SOUND = {  # defense -> an attack that converges on it: one start leaves 2 points on `standard`
    UNDEFENDED: "pgd",  # the attack on what is planted
    "standard": "apgd(restarts=5)",
    "pgd-at": "apgd",
    "trades": "apgd",
    "smoothing": "apgd(loss=ce, steps=50)",  # its own loss seeks no majority for a wrong label
}
