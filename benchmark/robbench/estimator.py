"""A trained defense as an ART classifier. Importing this imports ART, which takes a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from robbench.access import Access


class Estimator(PyTorchClassifier):  # type: ignore[misc]
    """The defense as an ART classifier: loss and class gradients through Access, scores of the
    deployed draws from predict(). It cannot be trained."""

    def __init__(self, access: Access) -> None:
        deployed = access.deployed
        super().__init__(
            model=access,
            loss=nn.CrossEntropyLoss(),
            input_shape=deployed.shape,
            nb_classes=deployed.labels,
            clip_values=(0.0, 1.0),
            device_type="gpu" if access.device.type == "cuda" else "cpu",
        )
        self.access = access

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """(N, L) float32 log-scores over the deployed draws: never shares of a vote."""
        access = self.access
        images = torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float32)
        draws = access.deployed.draws
        access.count(len(images), draws)
        draw = access.deployed.draw(images.to(access.device), draws)
        return access.deployed.rule.scores(draw).cpu().numpy()

    def fit(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a deployed defense cannot be trained; use 'robbench train'")

    fit_generator = fit


class ProbabilityEstimator(Estimator):
    """The defense for classes that want probabilities instead of log-scores."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self._model = self._make_model_wrapper(nn.Sequential(access, nn.Softmax(dim=1)))

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        scores = torch.from_numpy(super().predict(x, batch_size))
        return scores.softmax(dim=1).numpy()
