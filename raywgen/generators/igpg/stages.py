"""The two stages that train the prior: token likelihood, then the task's own loss through soft tokens.

Shape legend: B networks, M chunks, K values of a chunk, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators.igpg.config import FunctionalConfig, PriorConfig
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.tokenizer import PlacedCorrection, Tokenizer
from raywgen.generators.interface import Stage, StageLoss
from raywgen.generators.task_loss import task_loss
from raywgen.weights import KeyedNoise, ReferenceTable, WeightBatch


def token_nll(prior: Prior, tokenizer: Tokenizer, codes_BML: Tensor, batch: WeightBatch) -> Tensor:
    """`-E[log p(s | e_A, e_D)]`, nats per token (IGPG, section 3, stage 2)."""
    places_MG = tokenizer.places(batch.layout)
    hidden = prior.hidden(codes_BML, batch.condition, places_MG, tokenizer.quantiser)
    return -prior.head.log_likelihood(hidden, codes_BML, tokenizer.quantiser).mean()


class PriorStage(Stage):
    """Next-token likelihood of the corpus' networks; the tokeniser is frozen."""

    name = "prior"

    def __init__(self, prior: Prior, tokenizer: Tokenizer, references: ReferenceTable) -> None:
        super().__init__()
        self.prior = prior
        self._frozen = (tokenizer,)
        self.references = references

    @property
    def config(self) -> PriorConfig:
        """Of the prior."""
        return self.prior.config

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Mean negative log-likelihood of the tokens."""
        (tokenizer,) = self._frozen
        nll = token_nll(self.prior, tokenizer, _corpus_codes(tokenizer, batch, self.references), batch)
        return StageLoss(loss=nll, metrics={"nll": nll.detach()})


class FunctionalStage(Stage):
    """Trains the prior, and a correction of what is decoded, by what the decoded networks do.

    The tokeniser stays as it is, so that reconstruction means the same before and after. The prior first writes
    hard tokens without gradients; the expected code that continues each of their prefixes is decoded, put into
    a network, run on the task's labelled samples, and the task's loss goes back through all of it. Prefixes are
    the generator's own, so training sees what generation will see. A small token likelihood keeps the prior on
    the corpus, and a small squared distance to the corpus' network of the same task keeps the written networks
    alive: the task's loss alone first lowers the confidence of all of them alike, which may switch off every ReLU
    for good. Not in the paper; its effect is shown apart.
    """

    name = "functional"

    def __init__(
        self,
        config: FunctionalConfig,
        prior: Prior,
        correction: PlacedCorrection,
        tokenizer: Tokenizer,
        references: ReferenceTable,
    ) -> None:
        super().__init__()
        self._config = config
        self.prior = prior
        self.correction = correction
        self._frozen = (tokenizer,)
        self.references = references

    @property
    def config(self) -> FunctionalConfig:
        """Of this stage alone."""
        return self._config

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """The task's loss on the query samples, plus the weighted distance and token likelihood."""
        (tokenizer,) = self._frozen
        layout, rvq = batch.layout, tokenizer.quantiser
        places_MG = tokenizer.places(layout)
        temperature = self.config.temperature
        self.prior.eval()  # The tokens of a rollout must be those that generation would write.
        rollout = self.prior.rollout(batch.condition, places_MG, rvq, noise, temperature)
        self.prior.train(self.training)
        hidden_BMH = self.prior.hidden(rollout.codes_BML, batch.condition, places_MG, rvq)
        expected_BMK = self.prior.head.expected_latents(hidden_BMH, rvq)
        chunks_BMK = tokenizer.decode_latents(expected_BMK, places_MG) + self.correction(expected_BMK, places_MG)
        reference = self.references[layout.id][1]
        values_BD = tokenizer.values(chunks_BMK, layout, reference)
        loss_B, accuracy_B = task_loss(values_BD, batch)
        distance = (reference.normalise(values_BD) - reference.normalise(batch.values_BD)).square().mean()
        loss = loss_B.mean() + self.config.anchor * distance
        metrics = {
            "task_loss": loss_B.mean().detach(),
            "accuracy": accuracy_B.mean().detach(),
            "distance": distance.detach(),
        }
        if self.config.likelihood > 0:
            # A quarter of the batch keeps the prior on the corpus at a quarter of the cost.
            part = batch.first(max(1, len(loss_B) // 4))
            nll = token_nll(self.prior, tokenizer, _corpus_codes(tokenizer, part, self.references), part)
            metrics["nll"] = nll.detach()
            loss = loss + self.config.likelihood * nll
        return StageLoss(loss=loss, metrics=metrics)


@torch.no_grad()
def _corpus_codes(tokenizer: Tokenizer, batch: WeightBatch, references: ReferenceTable) -> Tensor:
    chunks_BMK = tokenizer.chunks(batch.values_BD, references[batch.layout.id][1])
    return tokenizer.encode(chunks_BMK, tokenizer.places(batch.layout))
