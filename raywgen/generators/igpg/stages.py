"""The two stages that train the prior: by token likelihood, then by the task's own loss through soft tokens.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from raywgen.generators.common.dropped import with_dropped_parts
from raywgen.generators.common.task_loss import BYTES_PER_VALUE, task_loss
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.igpg.config import IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.likelihood import prior_windows, token_nll
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.stage import ParameterUse, Stage, StageLoss, StageNeeds
from raywgen.nn.coders import Coder
from raywgen.nn.quantisers import AllReduce
from raywgen.weights import KeyedNoise, Layout, NormalizerTable, WeightBatch, Windows

# A noise stream of its own, because sampling the same networks' tokens uses stream 0.
_LIKELIHOOD_STREAM = 1
# Smaller variances are rounding. A much larger bound would give nearly equal networks no gradient apart.
_LEAST_VARIANCE = 1e-8
# What a step on whole networks holds of each value beside what the prior keeps, as measured.
_BYTES_BESIDE_PRIOR = 16.0


def diversity_loss(written_BD: Tensor, unit: Tensor) -> Tensor:
    """Returns `1/D sum_d |1 - S_d / S|` with `S_d = sqrt(Var_B(x_d) + eps)`: 0 if networks vary as the corpus does.

    It is the variance term of VICReg (Bardes et al., arXiv 2105.04906, equation 1). The term is taken value by value,
    so that a few unimportant values cannot make up for all others. It is two-sided, where VICReg has a hinge, because
    those few would otherwise grow without bound.

    Args:
        written_BD: At least 2 written networks, in units of each tensor's scale.
        unit: S, the `deviation` of the corpus' networks.
    """
    deviation_D = (written_BD.var(dim=0) + _LEAST_VARIANCE).sqrt()
    return (1 - deviation_D / unit).abs().mean()


def deviation(batches: Iterable[WeightBatch], normalizers: NormalizerTable) -> Tensor:
    """Returns the root of the variance of networks of one layout, mean over values and layouts, float64.

    It is that of many batches: two networks of one batch may be two states of one trajectory, which hardly differ.

    Args:
        batches: Batches of the corpus' networks.
        normalizers: The normaliser of each layout, which gives values in units of each tensor's scale.
    """
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for batch in batches:
        values_BD = normalizers[batch.layout.id][1].normalise(batch.values_BD).double()
        count, sum_D, squares_D = sums.get(batch.layout.id, (0, torch.zeros(()), torch.zeros(())))
        found = len(batch), values_BD.sum(dim=0), values_BD.square().sum(dim=0)
        sums[batch.layout.id] = count + found[0], sum_D + found[1], squares_D + found[2]
    variances = [
        ((squares_D - sum_D.square() / count) / (count - 1)).mean()
        for count, sum_D, squares_D in sums.values()
        if count > 1
    ]
    return torch.stack(variances).mean().clamp(min=_LEAST_VARIANCE).sqrt() if variances else torch.ones(())


def _confidence(loss_B: Tensor, batch: WeightBatch) -> Tensor:
    """Returns the mean confidence in the right classes, `exp(-loss)`, scaled so that chance is 0 and certainty 1."""
    chance = 1 / (batch.query.labels_BS.amax() + 1)
    return ((loss_B.neg().exp().mean() - chance) / (1 - chance)).clamp(min=0)


class PriorStage(Stage):
    """Maximises the likelihood of the tokens of the corpus' networks; the tokeniser is frozen."""

    name = "prior"

    def __init__(self, prior: Prior, tokenizer: Tokenizer, normalizers: NormalizerTable) -> None:
        super().__init__()
        self.prior = prior
        self._frozen = (tokenizer,)
        self.normalizers = normalizers

    @property
    def config(self) -> PriorConfig:
        """Returns the settings of the prior."""
        return self.prior.config

    @property
    def needs(self) -> StageNeeds:
        """The stage needs no tasks, and windows suffice where the prior sees windows."""
        return StageNeeds(tasks=False, whole_networks=self.config.window == 0)

    @property
    def parameter_use(self) -> ParameterUse:
        """The batch decides which modules run, and how often, if some networks have independent chunks."""
        return "modules" if self.config.independent_share in (0, 1) else "whole"

    @property
    def tokens(self) -> str:
        """The stage reads stored tokens if its settings say so."""
        return self.config.tokens

    @property
    def bytes_per_value(self) -> float:
        """The prior keeps 21 numbers for each unit of a block, and around the blocks those of its levels and codes."""
        (tokenizer,), config = self._frozen, self.config
        num_levels, num_codes = tokenizer.quantiser.num_levels, tokenizer.config.quantiser.num_codes
        numbers = (21 * config.num_layers + 7 + 2 * num_levels) * config.width + num_levels * num_codes
        return _BYTES_BESIDE_PRIOR + 4 * numbers / tokenizer.config.chunk_length

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a random window of each network that is longer than the prior's."""
        (tokenizer,) = self._frozen
        return prior_windows(self.prior, tokenizer, layout, noise)

    def see(self, batch: WeightBatch, noise: KeyedNoise) -> WeightBatch:
        """Returns a batch as the trainer would have given it, with the moments of its windows' header."""
        if batch.windows is not None or (windows := self.windows(batch.layout, noise)) is None:
            return batch
        (tokenizer,) = self._frozen
        return tokenizer.cut(batch, windows, self.normalizers[batch.layout.id][1])

    def num_tokens(self, batch: WeightBatch) -> int:
        """Counts the tokens of the windows that the prior sees."""
        (tokenizer,) = self._frozen
        num_chunks, window = tokenizer.num_chunks(batch.layout), self.config.window
        return len(batch) * min(num_chunks, window or num_chunks) * tokenizer.quantiser.num_levels

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the mean negative log-likelihood of the tokens."""
        (tokenizer,) = self._frozen
        nll = token_nll(self.prior, tokenizer, batch, self.normalizers, noise)
        return StageLoss(loss=nll, metrics={"nll": nll.detach()})


def task_loss_chunks(
    tokenizer: Tokenizer,
    residual_head: Coder,
    sample_residual_head: Coder | None,
    expected_BMK: Tensor,
    drawn_BMK: Tensor,
    positions_MG: Tensor,
    mask_MK: Tensor,
) -> Tensor:
    """Normalised chunks `(B, M, K)` that the task-loss stage trains and generation writes.

    Args:
        tokenizer: Decodes the expected code.
        residual_head: Corrects the decoded chunks, given the expected code.
        sample_residual_head: Adds a function of the difference between drawn and expected code. It alone lets a chunk
            depend on its own draw, and not only on those before it. None without a diversity weight.
        expected_BMK: Expected code along the tokens.
        drawn_BMK: Code vectors of the tokens.
        positions_MG: Position features of the chunks.
        mask_MK: 1 for values, 0 for padding.
    """
    chunks_BMK = tokenizer.decode_latents(expected_BMK, positions_MG, mask_MK) + residual_head(
        expected_BMK, positions_MG
    )
    if sample_residual_head is None:
        return chunks_BMK
    return chunks_BMK + sample_residual_head(drawn_BMK - expected_BMK, positions_MG)


class IGPGTaskLossStage(Stage):
    """Trains the prior and the residual heads by the task's loss of the decoded networks.

    The tokeniser is frozen, so reconstruction does not change. The prior first samples hard tokens without gradients.
    The expected code after each of their prefixes is decoded to a network, which is run on the task's labelled samples,
    and the task's loss is propagated back through all of it. The prefixes are the generator's own samples, so training
    sees what generation will see.

    Two small terms are added. The token likelihood keeps the prior close to the corpus. The squared distance to the
    corpus' network of the same task keeps units alive: the task's loss alone first lowers the confidence of all
    networks, which may switch off every ReLU for good. In a corpus of one task that distance is to an arbitrary other
    network and pulls all written ones together, as the task's loss does; there `diversity_loss` keeps them apart.

    This stage is not in the paper; evaluation has a row without it.
    """

    name = "task_loss"
    is_optional = True
    corpus_deviation: Tensor

    def __init__(
        self,
        config: IGPGTaskLossConfig,
        prior: Prior,
        residual_head: Coder,
        sample_residual_head: Coder | None,
        tokenizer: Tokenizer,
        normalizers: NormalizerTable,
    ) -> None:
        super().__init__()
        self._config = config
        self.prior = prior
        self.residual_head = residual_head
        self.sample_residual_head = sample_residual_head
        self._frozen = (tokenizer,)
        self.normalizers = normalizers
        # Shared among workers as all buffers are, so it lies where the prior does.
        self.register_buffer("corpus_deviation", torch.ones((), device=next(prior.parameters()).device))

    @property
    def config(self) -> IGPGTaskLossConfig:
        """Returns the settings of this stage."""
        return self._config

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks, and whole networks to run."""
        return StageNeeds()

    @property
    def bytes_per_value(self) -> float:
        """The prior keeps 25 numbers for each unit of a block, and 16 around the blocks, as measured."""
        (tokenizer,), prior = self._frozen, self.prior.config
        return BYTES_PER_VALUE + 4 * (25 * prior.num_layers + 16) * prior.width / tokenizer.config.chunk_length

    @property
    def parameter_use(self) -> ParameterUse:
        """The prior writes tokens one after another, each of which needs all its parameters."""
        return "whole"

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Measures how far the corpus' networks lie apart, where written ones shall lie as far."""
        if self.config.diversity_weight > 0:
            self.corpus_deviation.copy_(deviation(batches, self.normalizers))

    def state(self, all_reduce: AllReduce) -> dict[str, Tensor]:
        """Returns what `setup` measured."""
        return {"corpus_deviation": self.corpus_deviation} if self.config.diversity_weight > 0 else {}

    def set_state(self, state: dict[str, Tensor], batch_at: Callable[[int], WeightBatch]) -> None:
        """Restores what `setup` measured."""
        if state:
            self.corpus_deviation.copy_(state["corpus_deviation"])

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the task's loss on the query samples, plus the weighted distance and token likelihood."""
        (tokenizer,) = self._frozen
        layout, rvq = batch.layout, tokenizer.quantiser
        table = tokenizer.table(layout)
        positions_MG = table.positions_MG
        temperature = self.config.temperature
        self.prior.eval()  # The tokens of a sample must be those that generation would write.
        only_tokens = SamplingConfig(decoding="tokens", windows=self.config.windows)
        condition = with_dropped_parts(batch.condition, noise, self.config.condition_dropout, self.training)
        sample = sample_tokens(self.prior, condition, table, rvq, noise, temperature, only_tokens)
        self.prior.train(self.training)
        hidden_BMH = self.prior.hidden(sample.codes_BML, condition, table, rvq, only_tokens)
        expected_BMK = self.prior.head.expected_latents(hidden_BMH, rvq, padding_codes_XL=table.padding_codes_ML)
        drawn_BMK, mask_MK = rvq.decode(sample.codes_BML), tokenizer.mask(layout)
        chunks_BMK = task_loss_chunks(
            tokenizer, self.residual_head, self.sample_residual_head, expected_BMK, drawn_BMK, positions_MG, mask_MK
        )
        normalizer = self.normalizers[layout.id][1]
        values_BD = tokenizer.values(chunks_BMK, layout, normalizer)
        loss_B, accuracy_B = task_loss(values_BD, batch, statistics=self.config.statistics)
        normalised_BD = normalizer.normalise(values_BD)
        corpus_BD = normalizer.normalise(batch.values_BD)
        distance = (normalised_BD - corpus_BD).square().mean()
        loss = loss_B.mean() + self.config.l2_anchor_weight * distance
        metrics = {
            "task_loss": loss_B.mean().detach(),
            "accuracy": accuracy_B.mean().detach(),
            "distance": distance.detach(),
        }
        if self.config.diversity_weight > 0:
            # All workers give the same metrics, also one whose part is a single network.
            diversity = diversity_loss(normalised_BD, self.corpus_deviation) if len(loss_B) > 1 else loss.new_zeros(())
            metrics["diversity_loss"] = diversity.detach()
            # Weighted by confidence: at chance, the term would drive networks apart before they learn anything.
            loss = loss + self.config.diversity_weight * _confidence(loss_B.detach(), batch) * diversity
        if self.config.nll_weight > 0:
            # A quarter of the batch keeps the prior on the corpus at a quarter of the cost.
            part = batch.first(max(1, len(loss_B) // 4))
            part_noise = noise.split(torch.ones(1, dtype=torch.int64), _LIKELIHOOD_STREAM).first(len(part.values_BD))
            nll = token_nll(self.prior, tokenizer, part, self.normalizers, part_noise)
            metrics["nll"] = nll.detach()
            loss = loss + self.config.nll_weight * nll
        return StageLoss(loss=loss, metrics=metrics)
