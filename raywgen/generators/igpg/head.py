"""The head of the prior: predicts the residual tokens of a chunk from its state, level after level.

Shape letters beyond the legend in `raywgen.weights`: X positions in any shape, R rows, M chunks of a network. Here S
counts the sides of guidance: with the condition, and without it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from raywgen.generators.igpg.config import SamplingConfig
from raywgen.nn.sampling import guided, truncated

# Finite, because log-probabilities are subtracted; so low that no noise at any temperature makes up for it.
_NEVER = -1e9


class Codebooks(Protocol):
    """The interface that the prior needs of a quantiser whose code vectors add up."""

    @property
    def codebooks_LVK(self) -> Tensor:
        """Code vectors of every level."""
        ...

    @property
    def num_levels(self) -> int:
        """Returns L, the number of levels."""
        ...

    @property
    def num_codes(self) -> int:
        """Returns V, the number of codes."""
        ...

    def decode(self, codes_NL: Tensor) -> Tensor:
        """The sum of the chosen code vectors."""
        ...


class Levels(NamedTuple):
    """The tables that the head computes from the codebooks, once for all positions.

    Attributes:
        weight_LHV: Maps a level's hidden state to its logits; its dtype is that of this product.
        code_embedding_LVH: Embedding of each code, an input of later levels.
        codebooks_LVK: Code vectors.
    """

    weight_LHV: Tensor
    code_embedding_LVH: Tensor
    codebooks_LVK: Tensor


class LevelHead(nn.Module):
    """Predicts a chunk's residual tokens; a level sees the sum of the code vectors of the levels before.

    Padding tokens, whose codes are given by `padding_codes_XL` (-1 for any other token; None where there are none),
    have probability 1: whether they are drawn, expected or read, they add nothing to a log-probability.
    """

    def __init__(self, width: int, num_levels: int, num_codes: int, chunk_length: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, width)
        self.chosen = nn.Linear(chunk_length, width, bias=False)
        self.level = nn.Parameter(torch.randn(num_levels, width) * 0.02)
        self.query = nn.Parameter(torch.randn(num_levels, width, chunk_length) * 0.02)
        self.free = nn.Parameter(torch.randn(num_levels, width, num_codes) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_levels, num_codes))

    def levels(self, rvq: Codebooks) -> Levels:
        """Computes the tables of a quantiser; they are valid until the head or the quantiser is trained."""
        codebooks_LVK = rvq.codebooks_LVK
        size_L11 = codebooks_LVK.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        # The product with a query gives similar codes similar probabilities, so few examples suffice.
        near_LHV = self.query @ (codebooks_LVK / size_L11).transpose(1, 2)
        return Levels(
            weight_LHV=near_LHV + self.free,
            code_embedding_LVH=codebooks_LVK @ self.chosen.weight.t(),
            codebooks_LVK=codebooks_LVK,
        )

    def logits(
        self, state_XH: Tensor, chosen_XH: Tensor, level: int, levels: Levels, padding_codes_XL: Tensor | None = None
    ) -> Tensor:
        """Returns the logits `(X, V)` of one level.

        Args:
            state_XH: The trunk's states of the chunks, after the layer `state`.
            chosen_XH: Sum of `code_embedding_LVH` over the codes of earlier levels, chosen or in expectation.
            level: The level.
            levels: The tables of all levels.
            padding_codes_XL: Codes of padding tokens.
        """
        hidden_XH = nn.functional.gelu(state_XH + chosen_XH + self.level[level])
        weight_HV = levels.weight_LHV[level]
        logits_XV = (hidden_XH.to(weight_HV.dtype) @ weight_HV).to(hidden_XH.dtype) + self.bias[level]
        return logits_XV if padding_codes_XL is None else _with_padding_codes(logits_XV, padding_codes_XL[..., level])

    def log_likelihood(
        self, hidden_BMH: Tensor, codes_BML: Tensor, rvq: Codebooks, padding_codes_BML: Tensor | None = None
    ) -> Tensor:
        """Returns the log-probability of every given token, `(B, M, L)`."""
        levels, state_BMH = self.levels(rvq), self.state(hidden_BMH)
        chosen_BMH = torch.zeros_like(state_BMH)
        log_prob = []
        for level in range(rvq.num_levels):
            code_BM = codes_BML[..., level]
            log_p = self.logits(state_BMH, chosen_BMH, level, levels, padding_codes_BML).log_softmax(dim=-1)
            log_prob.append(log_p.gather(-1, code_BM.unsqueeze(-1)).squeeze(-1))
            chosen_BMH = chosen_BMH + levels.code_embedding_LVH[level][code_BM]
        return torch.stack(log_prob, dim=-1)

    def expected_latents(
        self,
        hidden_XH: Tensor,
        rvq: Codebooks,
        unconditional_XH: Tensor | None = None,
        *,
        guidance: float = 1.0,
        padding_codes_XL: Tensor | None = None,
    ) -> Tensor:
        """Returns the expected code `(X, K)`: `sum_l sum_j p_lj e_lj`; each level reads expectations of earlier levels.

        Args:
            hidden_XH: States.
            rvq: Code vectors.
            unconditional_XH: States without the condition, for guidance.
            guidance: Strength of classifier-free guidance.
            padding_codes_XL: Codes of padding tokens.
        """
        levels, state_XH = self.levels(rvq), self.state(hidden_XH)
        without_XH = None if unconditional_XH is None else self.state(unconditional_XH)
        expected_XK = hidden_XH.new_zeros(*hidden_XH.shape[:-1], rvq.codebooks_LVK.shape[2])
        for level in range(rvq.num_levels):
            chosen_XH = self.chosen(expected_XK)
            scores_XV = self.logits(state_XH, chosen_XH, level, levels, padding_codes_XL)
            if without_XH is not None:
                without_XV = self.logits(without_XH, chosen_XH, level, levels, padding_codes_XL).log_softmax(dim=-1)
                scores_XV = guided(scores_XV.log_softmax(dim=-1), without_XV, guidance)
            expected_XK = expected_XK + scores_XV.softmax(dim=-1) @ rvq.codebooks_LVK[level]
        return expected_XK

    def draw(
        self,
        state_SRH: Tensor,
        levels: Levels,
        gumbel_RLV: Tensor | None,
        temperature: float,
        sampling: SamplingConfig,
        padding_codes_RL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws the tokens `(R, L)` of one chunk; returns them, their code vector `(R, K)` and log-probability `(R,)`.

        The log-probability is that of the tokens at temperature 1, given the condition, with nothing truncated.

        Args:
            state_SRH: States with the condition and, where S is 2, without it.
            levels: The tables of all levels.
            gumbel_RLV: Noise; None takes the likeliest code.
            temperature: Divides the log-probabilities.
            sampling: Guidance and truncation.
            padding_codes_RL: Codes of padding tokens.
        """
        state_SRH = self.state(state_SRH)
        chosen_RH = torch.zeros_like(state_SRH[0])
        log_prob_R = state_SRH.new_zeros(state_SRH.shape[1])
        codes = []
        for level in range(len(levels.weight_LHV)):
            log_p_SRV = self.logits(state_SRH, chosen_RH, level, levels, padding_codes_RL).log_softmax(dim=-1)
            score_RV = log_p_SRV[0]
            if len(log_p_SRV) == 2:
                score_RV = guided(score_RV, log_p_SRV[1], sampling.guidance)
            if gumbel_RLV is not None:
                score_RV = truncated(score_RV / temperature, sampling.top_k, sampling.top_p) + gumbel_RLV[:, level]
            code_R = score_RV.argmax(dim=-1)
            log_prob_R = log_prob_R + log_p_SRV[0].gather(-1, code_R.unsqueeze(-1)).squeeze(-1)
            chosen_RH = chosen_RH + levels.code_embedding_LVH[level][code_R]
            codes.append(code_R)
        codes_RL = torch.stack(codes, dim=-1)
        level_L = torch.arange(codes_RL.shape[1], device=codes_RL.device)
        return codes_RL, levels.codebooks_LVK[level_L, codes_RL].sum(dim=1), log_prob_R


def _with_padding_codes(logits_XV: Tensor, padding_code_X: Tensor) -> Tensor:
    """Puts all probability on a padding token's code; where that is -1, the logits stay."""
    codes_V = torch.arange(logits_XV.shape[-1], device=logits_XV.device)
    only_XV = torch.where(codes_V == padding_code_X.unsqueeze(-1), 0.0, _NEVER).to(logits_XV.dtype)
    return torch.where(padding_code_X.unsqueeze(-1) < 0, logits_XV, only_XV)
