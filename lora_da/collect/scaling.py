"""How the loss is scaled and weighted, so that float16 gradients stay in their range, and what undoes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da.needs import Averaging
from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData

LOSS_SCALE = 1024.0  # a power of two, so that it changes no bit in bf16 and float32; float16 gradients need it
LOSS_SCALE_STEP = 16.0  # how much it falls when a float16 gradient overflows
MIN_LOSS_SCALE = LOSS_SCALE / LOSS_SCALE_STEP**4


class LossScaling:
    """The factor of the loss, and each token's weight in it.

    Args:
        data: the init samples.
        averaging: whether every loss token weighs the same, or every sample.

    Attributes:
        factor: of the loss.
    """

    def __init__(self, data: InitData, averaging: Averaging) -> None:
        self.factor = LOSS_SCALE
        # Under `samples` a token's loss is weighted by the mean number of loss tokens over its document's own: about 1,
        # so that float16 gradients stay in their range; what remains is part of the scale.
        self._mean_tokens = data.n_loss_tokens / data.n_samples if averaging == "samples" else None

    @property
    def of_gradients(self) -> float:
        """The factor that every d carries."""
        return self.factor * (self._mean_tokens or 1.0)

    @property
    def is_least(self) -> bool:
        """Whether it is not lowered any more."""
        return self.factor <= MIN_LOSS_SCALE

    def lower(self) -> float:
        """Lower it by one step; what gradients taken before are to be multiplied by."""
        self.factor /= LOSS_SCALE_STEP
        return 1 / LOSS_SCALE_STEP

    def weights(self, batch: Batch, device: torch.device) -> Tensor | None:
        """(p,) each position's weight; None where all are 1."""
        if self._mean_tokens is None:
            return None
        per_document = torch.nn.functional.pad(self._mean_tokens / batch.tokens.loss_tokens, (0, 1))
        return per_document[batch.tokens.document].to(device, non_blocking=True)
