"""The two stages that train the prior: by token likelihood, then by the task's own loss through soft tokens.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators.common.task_loss import BYTES_PER_VALUE, task_loss
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.common.tokenizer.chunk_table import ChunkTable
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg.config import IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.head import Codebooks
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.interface import ParameterUse, Stage, StageLoss, StageNeeds
from raywgen.nn.coders import Coder
from raywgen.weights import KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch, Windows

# A noise stream of its own, because sampling the same networks' tokens uses stream 0.
_LIKELIHOOD_STREAM = 1
# Smaller variances are rounding. A much larger bound would give nearly equal networks no gradient apart.
_LEAST_VARIANCE = 1e-8
# What a step on whole networks holds of each value, as measured: beside the windows that the prior sees, and beside the
# prior where it sees all of a network.
_BYTES_BESIDE_WINDOWS = 16.0
_BYTES_BESIDE_PRIOR = 16.0


def token_nll(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, normalizers: NormalizerTable, noise: KeyedNoise
) -> Tensor:
    """Returns `-E[log p(s | e_A, e_D)]`, nats per token, mean over a batch's networks (IGPG, section 3, stage 2).

    Padding tokens do not count. Of networks longer than the prior's window a random window is read. In training mode,
    some networks lose a part of their condition, and some have each chunk read independently; with
    `independent_share=1` chunks are independent in evaluation mode too.
    """
    config, rvq = prior.config, tokenizer.quantiser
    seen = _seen_tokens(prior, tokenizer, batch, normalizers, noise)
    is_dropped_B2 = None
    if prior.training and config.condition_dropout > 0:
        is_dropped_B2 = dropped_parts(noise, config.condition_dropout)
    mean_position_G = tokenizer.mean_position(batch.layout)
    prefix_BTH = prior.prefix(batch.condition, mean_position_G, is_dropped_B2)
    if config.independent_share == 0 or (not prior.training and config.independent_share < 1):
        return -_log_likelihood(prior, prefix_BTH, seen, rvq).mean()
    is_alone_B = noise.uniform(1)[:, 0] < config.independent_share
    return -_mixed_log_likelihood(prior, prefix_BTH, seen, rvq, is_alone_B) / seen.codes_BWL.numel()


class _TokenWindow(NamedTuple):
    """The part of each network that a step sees: all tokens, or those of a window.

    Attributes:
        codes_BWL: Tokens.
        positions_WG: Position features of their chunks, the same for all networks or `(B, W, G)`.
        padding_codes_WL: As in `ChunkTable`, the same for all networks or `(B, W, L)`.
        scales_BW4: Scales and means that windows are given; None where none are given.
        alone_BW4: Scales and means that independent chunks are given.
    """

    codes_BWL: Tensor
    positions_WG: Tensor
    padding_codes_WL: Tensor | None
    scales_BW4: Tensor | None
    alone_BW4: Tensor | None

    def of(self, rows_B: Tensor) -> _TokenWindow:
        """Selects some of the networks."""
        parts = (None if part is None else part.expand(len(self.codes_BWL), -1, -1)[rows_B] for part in self)
        return _TokenWindow(*parts)  # pyright: ignore[reportArgumentType]

    @property
    def weight(self) -> Tensor | float:
        """The weight of each token: 0 for padding, equal for all others, 1 on average."""
        if self.padding_codes_WL is None:
            return 1.0
        is_real_WL = (self.padding_codes_WL < 0).to(torch.float32)
        return is_real_WL / is_real_WL.mean(dim=(-2, -1), keepdim=True)


def _mixed_log_likelihood(
    prior: Prior, prefix_BTH: Tensor, seen: _TokenWindow, rvq: Codebooks, is_alone_B: Tensor
) -> Tensor:
    """Returns the weighted sum over all tokens; where `is_alone_B`, each chunk is a window of its own."""
    total = prefix_BTH.new_zeros(())
    if not bool(is_alone_B.all()):
        total = total + _log_likelihood(prior, prefix_BTH[~is_alone_B], seen.of(~is_alone_B), rvq).sum()
    if bool(is_alone_B.any()):
        alone = seen.of(is_alone_B)
        hidden_BWH = prior.states_alone(prefix_BTH[is_alone_B], alone.positions_WG, alone.alone_BW4)
        log_p_BWL = prior.head.log_likelihood(hidden_BWH, alone.codes_BWL, rvq, alone.padding_codes_WL)
        total = total + (log_p_BWL * alone.weight).sum()
    return total


def dropped_parts(noise: KeyedNoise, share: float) -> Tensor:
    """Draws whose instruction and samples are left out, bool `(B, 2)`: each alone, or both, a third of `share`."""
    u_B = noise.uniform(1)[:, 0] / share
    no_instruction_B = (u_B < 1 / 3) | ((u_B >= 2 / 3) & (u_B < 1))
    no_samples_B = (u_B >= 1 / 3) & (u_B < 1)
    return torch.stack([no_instruction_B, no_samples_B], dim=1)


def _log_likelihood(prior: Prior, prefix_BTH: Tensor, seen: _TokenWindow, rvq: Codebooks) -> Tensor:
    """Returns the weighted log-probability of each token, `(B, W, L)`."""
    hidden_BWH = prior.states(prefix_BTH, seen.positions_WG, rvq.decode(seen.codes_BWL), seen.scales_BW4)
    return prior.head.log_likelihood(hidden_BWH, seen.codes_BWL, rvq, seen.padding_codes_WL) * seen.weight


def prior_windows(prior: Prior, tokenizer: Tokenizer, layout: Layout, noise: KeyedNoise) -> Windows | None:
    """Draws a random window of the prior for each network, and the blocks of chunks that its tokens follow from.

    None where all of a network is one window, and where scales are tokens, which are measured over a whole network.
    """
    count, window = tokenizer.num_chunks(layout), prior.config.window
    if not takes_windows(prior, tokenizer) or count <= window:
        return None
    return tokenizer.windows_with(layout, random_windows(noise, count, window))


def takes_windows(prior: Prior, tokenizer: Tokenizer) -> bool:
    """Whether windows suffice to train a prior: scales, where they are tokens, are measured over whole networks."""
    return prior.config.window > 0 and not tokenizer.codes_scales


@torch.no_grad()
def _seen_tokens(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, normalizers: NormalizerTable, noise: KeyedNoise
) -> _TokenWindow:
    """Encodes the part of each network that the step sees, and little more, or takes its stored tokens."""
    layout, normalizer = batch.layout, normalizers[batch.layout.id][1]
    if batch.windows is None and (windows := prior_windows(prior, tokenizer, layout, noise)) is not None:
        batch = batch.cut(windows)
    if (windows := batch.windows) is not None and windows.inner_BW is not None:
        index_BW, codes_BWL = windows.inner_BW, batch.codes_BWL
        if codes_BWL is None:
            chunks_BXK = tokenizer.window_chunks(batch.values_BD, windows, layout, normalizer)
            codes_BWL = tokenizer.encode_windows(chunks_BXK, layout, windows)
        return _TokenWindow(
            codes_BWL, tokenizer.positions(layout, index_BW), tokenizer.padding_codes(layout, index_BW), None, None
        )
    return _seen_of_whole(prior, tokenizer, batch, tokenizer.table(layout), normalizer, noise)


def _seen_of_whole(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, table: ChunkTable, normalizer: Normalizer, noise: KeyedNoise
) -> _TokenWindow:
    """Takes whole networks or their tokens; where scales are tokens, a window of each and the header."""
    B, M, window = len(batch), len(table), prior.config.window
    codes_of = _codes_of(tokenizer, batch, table, normalizer)
    if 0 < window < M:
        index_BW = random_windows(noise, M, window).to(tokenizer.device)
        positions, padding_codes = table.positions_MG[index_BW], table.padding_codes(index_BW)
        codes_BWL = codes_of(index_BW)
    else:
        index_BW = torch.arange(M, device=tokenizer.device).expand(B, -1)
        positions, padding_codes, codes_BWL = table.positions_MG, table.padding_codes_ML, codes_of(None)
    seen = _TokenWindow(codes_BWL, positions, padding_codes, None, None)
    header = prior.header(table)
    if header is None:
        return seen
    header_codes_BXL = codes_of(torch.arange(header.num, device=tokenizer.device).expand(B, -1))
    alone_BW4 = header.chunk_scales(header_codes_BXL).of_each(index_BW)
    # A window that begins within the header gets no scales beside the tokens, here as in sampling.
    is_after_B11 = (index_BW[:, :1, None] >= header.num).to(alone_BW4.dtype)
    return seen._replace(scales_BW4=alone_BW4 * is_after_B11, alone_BW4=alone_BW4)


def _codes_of(
    tokenizer: Tokenizer, batch: WeightBatch, table: ChunkTable, normalizer: Normalizer
) -> Callable[[Tensor | None], Tensor]:
    """Returns the function that gives the tokens of some chunks of each network, int64 `(B, W)`, or with None of all.

    It encodes no other chunks than these.
    """
    layout, stored_BML = batch.layout, batch.codes_BWL
    rows_B1 = torch.arange(len(batch), device=tokenizer.device).unsqueeze(1)
    if stored_BML is not None:
        return lambda index_BW: stored_BML if index_BW is None else stored_BML[rows_B1, index_BW]
    chunks_BMK = tokenizer.chunks(batch.values_BD, layout, normalizer)

    def encode(index_BW: Tensor | None) -> Tensor:
        if index_BW is None:
            return tokenizer.encode(chunks_BMK, table.positions_MG, tokenizer.mask(layout))
        return tokenizer.encode_windows(chunks_BMK[rows_B1, index_BW], layout, tokenizer.windows_with(layout, index_BW))

    return encode


def diversity_loss(written_BD: Tensor, corpus_BD: Tensor) -> Tensor:
    """Returns `1/D sum_d |1 - S_d / S|` with `S_d = sqrt(Var_B(x_d) + eps)`: 0 if networks vary as the corpus does.

    It is the variance term of VICReg (Bardes et al., arXiv 2105.04906, equation 1); its unit S is the root of the mean
    variance of the corpus' networks. The term is taken value by value, so that a few unimportant values cannot make up
    for all others. It is two-sided, where VICReg has a hinge, because those few would otherwise grow without bound.

    Args:
        written_BD: At least 2 written networks, in units of each tensor's scale.
        corpus_BD: As many networks of the corpus.
    """
    unit = corpus_BD.var(dim=0).mean().clamp(min=_LEAST_VARIANCE).sqrt()
    deviation_D = (written_BD.var(dim=0) + _LEAST_VARIANCE).sqrt()
    return (1 - deviation_D / unit).abs().mean()


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
        """The stage needs no tasks, and windows suffice where the prior sees windows and scales are no tokens."""
        (tokenizer,) = self._frozen
        return StageNeeds(tasks=False, whole_networks=not takes_windows(self.prior, tokenizer))

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
        if config.window > 0:
            return _BYTES_BESIDE_WINDOWS
        num_levels, num_codes = tokenizer.quantiser.num_levels, tokenizer.config.quantiser.num_codes
        numbers = (21 * config.num_layers + 7 + 2 * num_levels) * config.width + num_levels * num_codes
        return _BYTES_BESIDE_PRIOR + 4 * numbers / tokenizer.config.chunk_length

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a random window of each network that is longer than the prior's."""
        (tokenizer,) = self._frozen
        return prior_windows(self.prior, tokenizer, layout, noise)

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

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the task's loss on the query samples, plus the weighted distance and token likelihood."""
        (tokenizer,) = self._frozen
        layout, rvq = batch.layout, tokenizer.quantiser
        table = tokenizer.table(layout)
        positions_MG = table.positions_MG
        temperature = self.config.temperature
        self.prior.eval()  # The tokens of a sample must be those that generation would write.
        only_tokens = SamplingConfig(decoding="tokens", windows=self.config.windows)
        sample = sample_tokens(self.prior, batch.condition, table, rvq, noise, temperature, only_tokens)
        self.prior.train(self.training)
        hidden_BMH = self.prior.hidden(sample.codes_BML, batch.condition, table, rvq, only_tokens)
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
            diversity = diversity_loss(normalised_BD, corpus_BD) if len(loss_B) > 1 else loss.new_zeros(())
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
