"""LSTM that reads an image as a sequence."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robbench.networks.network import Network, Shape


class LSTM(Network):
    """Row by row, or pixel by pixel in reading order; the features are the last hidden state."""

    def __init__(
        self,
        shape: Shape,
        labels: int,
        *,
        hidden: int = 128,
        layers: int = 1,
        sequence: Literal["rows", "pixels"] = "rows",
    ) -> None:
        super().__init__(shape[0])
        self.sequence = sequence
        inputs = shape[0] * shape[2] if sequence == "rows" else shape[0]
        self.recurrent = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.readout = nn.Linear(hidden, labels)

    def features(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        if self.sequence == "rows":
            steps = x.transpose(1, 2).flatten(2)  # (N, H, C*W)
        else:
            steps = x.flatten(2).transpose(1, 2)  # (N, H*W, C)
        # cuDNN gives no gradient for an LSTM in eval mode, where attacks need it; without dropout
        # both modes compute the same. What a defense has put inside keeps its own mode.
        mode = self.recurrent.training
        self.recurrent.training = True
        try:
            hidden, _ = self.recurrent(steps)  # (N, steps, D)
        finally:
            self.recurrent.training = mode
        return hidden[:, -1]
