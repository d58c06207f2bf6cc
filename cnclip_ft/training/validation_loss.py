"""A stage's own objective over the pairs of the validation pool, in batches of the stage's size: what stands beside the training loss.

The features are those that were encoded for recall. Hard negatives and what a teacher says have no part in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cnclip_ft.collectives import rank, world_size
from cnclip_ft.data.batching import BatchOrder
from cnclip_ft.data.pairs import PairTable
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.context import Context
from cnclip_ft.training.loss import Objective
from cnclip_ft.training.stage_plan import StagePlan


@dataclass(frozen=True)
class PoolLoss:
    """`value`: the mean over `batches` batches of `pairs` pairs. Losses of other batch sizes cannot be compared with it."""

    value: float
    pairs: int
    batches: int


class ValidationLoss:
    """The loss of a pool, by the same batches at every call: a function of `seed`, with pairs kept apart as in training.

    What does not fill a batch is left out, unless there is nothing else. Each device computes its share of a batch, and all have the same
    value; nothing is exchanged but what a step exchanges.

    Args:
        batch_size: of the stage, on all devices together.
        tokenizer: says which texts read the same.
    """

    def __init__(self, objective: Objective, batch_size: int, tokenizer: Tokenizer, seed: int) -> None:
        self.objective, self.batch_size, self.tokenizer, self.seed = objective, batch_size, tokenizer, seed
        self._order: BatchOrder | None = None

    @classmethod
    def of(cls, context: Context, plan: StagePlan) -> ValidationLoss | None:
        """None for a stage that does not learn from pairs: its loss is of something the pool does not have."""
        if plan.apart is not None or not isinstance(plan.objective, Objective):
            return None
        return cls(plan.objective, plan.setting.batch_size, context.tokenizer, context.recipe.seed)

    def __call__(self, model: DualEncoder, features: SplitFeatures | None) -> PoolLoss | None:
        """The loss at the model's temperature and bias. Collective.

        Args:
            features: the same pool at every call, on every device.

        Returns:
            None where there is none: fewer than two pairs, or a sigmoid objective and a model that has no bias yet.
        """
        if features is None or (self.objective.biased and model.logit_bias is None):
            return None
        size = min(self.batch_size, len(features.positives))
        size -= size % world_size()
        if size < 2:
            return None
        if self._order is None:
            self._order = BatchOrder(self._table(features), size, seed=self.seed)
        order, share, losses = self._order, size // world_size(), []
        for step in range(order.steps_per_epoch):
            pairs = order.step(step)
            if self._all_alike(order.table, pairs):
                continue
            own = pairs[rank() * share : (rank() + 1) * share]
            images, texts = features.positives[own].T
            with torch.no_grad():
                out = self.objective(
                    features.image_features[images].to(model.device),
                    features.text_features[texts].to(model.device),
                    model.logit_scale,
                    torch.from_numpy(order.table.image_keys[own]),
                    torch.from_numpy(order.table.text_keys[own]),
                    model.logit_bias,
                )
            losses.append(out.loss)
        value = torch.stack(losses).mean().item() if losses else math.nan
        return PoolLoss(value, size, len(losses)) if math.isfinite(value) else None

    def _table(self, features: SplitFeatures) -> PairTable:
        """Pairs of the pool with their keys, as `data.pairs` gives them: equal texts are those that the tokenizer reads alike."""
        first: dict[str, int] = {}
        text_keys = np.array(
            [first.setdefault(self.tokenizer.prepare(text), number) for number, text in enumerate(features.texts)]
        )
        images, texts = features.positives.numpy().T
        nothing = np.zeros(len(images) + 1, dtype=np.int64)
        return PairTable(images.copy(), text_keys[texts], np.empty(0, dtype=np.int64), nothing, cut=0)

    def _all_alike(self, table: PairTable, pairs: np.ndarray) -> bool:
        """Whether the objective would refuse the batch, since all its pairs show one picture or carry one text."""
        keys = (table.image_keys[pairs], table.text_keys[pairs])
        return self.objective.positives == "exclude" and any(bool((each == each[0]).all()) for each in keys)
