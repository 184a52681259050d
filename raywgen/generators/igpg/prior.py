"""The causal transformer that writes tokens, told task, data and layout (IGPG, section 3, stage 2).

`p(s | e_A, e_D) = prod_i p(s_i | s_<i, e_A, e_D)`. One position is one chunk; its L residual tokens are
predicted level after level by a small head that sees the sum of the code vectors chosen so far.

Besides hard tokens the prior gives the **expected code**: at every level the probability-weighted mean of the
code vectors, the levels below seen through their own expectation. It is differentiable in all parameters.

Shape legend: B networks, M chunks, K values of a chunk, L levels, V codes, H width, G place features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.generators.igpg.config import PriorConfig
from raywgen.generators.interface import DataSpec
from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PlaceEncoder
from raywgen.nn.residual_quantiser import ResidualQuantiser
from raywgen.nn.transformer import Transformer
from raywgen.weights import Condition, KeyedNoise
from raywgen.weights.chunks import num_place_features


@dataclass(frozen=True, slots=True)
class Rollout:
    """Tokens that the prior wrote.

    Attributes:
        codes_BML: int64.
        hidden_BMH: The state from which each chunk's tokens were drawn.
        log_prob_B: Nats, at temperature 1.
    """

    codes_BML: Tensor
    hidden_BMH: Tensor
    log_prob_B: Tensor


class Prior(nn.Module):
    """Writes the tokens of a network, chunk after chunk."""

    def __init__(self, config: PriorConfig, num_levels: int, num_codes: int, K: int, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        H = config.width
        self.condition = ConditionEncoder(
            num_features=data.num_features,
            max_classes=data.max_classes,
            num_place_features=num_place_features(),
            width=H,
        )
        self.told = ConditionSummary(H)
        self.place = PlaceEncoder(num_place_features(), H)
        self.previous = nn.Linear(K, H)
        self.trunk = Transformer(H, config.num_layers, config.num_heads, config.dropout)
        self.head = LevelHead(H, num_levels, num_codes, K)

    def hidden(self, codes_BML: Tensor, cond: Condition, places_MG: Tensor, rvq: ResidualQuantiser) -> Tensor:
        """States `(B, M, H)` for all chunks at once, given the tokens before each (teacher forcing)."""
        latents_BMK = rvq.decode(codes_BML)
        before_BMK = torch.cat([torch.zeros_like(latents_BMK[:, :1]), latents_BMK[:, :-1]], dim=1)
        prefix_BTH, inputs_BMH = self._inputs(cond, places_MG)
        inputs_BMH = inputs_BMH + self.previous(before_BMK)
        states = self.trunk(torch.cat([prefix_BTH, inputs_BMH], dim=1))
        return states[:, prefix_BTH.shape[1] :]

    @torch.no_grad()
    def rollout(
        self,
        cond: Condition,
        places_MG: Tensor,
        rvq: ResidualQuantiser,
        noise: KeyedNoise,
        temperature: float,
    ) -> Rollout:
        """Writes tokens one chunk at a time with a key-value cache."""
        prefix_BTH, inputs_BMH = self._inputs(cond, places_MG)
        B, M, _ = inputs_BMH.shape
        cache = self.trunk.new_cache(B, prefix_BTH.shape[1] + M)
        self.trunk(prefix_BTH, cache)
        previous_BK = inputs_BMH.new_zeros(B, rvq.codebooks_LVK.shape[2])
        log_prob_B = inputs_BMH.new_zeros(B)
        codes, states = [], []
        for m in range(M):
            step_B1H = (inputs_BMH[:, m] + self.previous(previous_BK)).unsqueeze(1)
            state_BH = self.trunk(step_B1H, cache)[:, 0]
            code_BL, previous_BK, added_B = self.head.draw(state_BH, rvq, noise, temperature)
            log_prob_B += added_B
            codes.append(code_BL)
            states.append(state_BH)
        return Rollout(torch.stack(codes, dim=1), torch.stack(states, dim=1), log_prob_B)

    def _inputs(self, cond: Condition, places_MG: Tensor) -> tuple[Tensor, Tensor]:
        prefix_BTH = self.condition(cond.instructions, cond.samples_BSF, cond.labels_BS, places_MG)
        return prefix_BTH, self.told(prefix_BTH, self.place(places_MG))


class LevelHead(nn.Module):
    """Predicts a chunk's residual tokens, level after level."""

    def __init__(self, width: int, num_levels: int, num_codes: int, chunk_length: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, width)
        self.chosen = nn.Linear(chunk_length, width, bias=False)
        self.level = nn.Parameter(torch.randn(num_levels, width) * 0.02)
        self.query = nn.Parameter(torch.randn(num_levels, width, chunk_length) * 0.02)
        self.free = nn.Parameter(torch.randn(num_levels, width, num_codes) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_levels, num_codes))

    def logits(self, state_XH: Tensor, chosen_XK: Tensor, level: int, rvq: ResidualQuantiser) -> Tensor:
        """Logits `(X, V)` of one level, given the sum of the code vectors of the levels before."""
        hidden_XH = nn.functional.gelu(self.state(state_XH) + self.chosen(chosen_XK) + self.level[level])
        query_XK = hidden_XH @ self.query[level]
        codebook_VK = rvq.codebooks_LVK[level]
        # Towards a code vector near the query: similar codes get similar probability from few examples.
        near_XV = query_XK @ (codebook_VK / codebook_VK.square().mean().sqrt().clamp(min=1e-6)).t()
        return near_XV + hidden_XH @ self.free[level] + self.bias[level]

    def log_likelihood(self, hidden_BMH: Tensor, codes_BML: Tensor, rvq: ResidualQuantiser) -> Tensor:
        """Log-probability of every given token, `(B, M, L)`."""
        chosen_BMK = hidden_BMH.new_zeros(*hidden_BMH.shape[:2], rvq.codebooks_LVK.shape[2])
        levels = []
        for level in range(rvq.num_levels):
            code_BM = codes_BML[..., level]
            log_p = self.logits(hidden_BMH, chosen_BMK, level, rvq).log_softmax(dim=-1)
            levels.append(log_p.gather(-1, code_BM.unsqueeze(-1)).squeeze(-1))
            chosen_BMK = chosen_BMK + rvq.codebooks_LVK[level][code_BM]
        return torch.stack(levels, dim=-1)

    def expected_latents(self, hidden_BMH: Tensor, rvq: ResidualQuantiser) -> Tensor:
        """The expected code `(B, M, K)`: `sum_l sum_j p_lj e_lj`, lower levels seen as their expectation."""
        expected_BMK = hidden_BMH.new_zeros(*hidden_BMH.shape[:2], rvq.codebooks_LVK.shape[2])
        for level in range(rvq.num_levels):
            p_BMV = self.logits(hidden_BMH, expected_BMK, level, rvq).softmax(dim=-1)
            expected_BMK = expected_BMK + p_BMV @ rvq.codebooks_LVK[level]
        return expected_BMK

    def draw(
        self, state_BH: Tensor, rvq: ResidualQuantiser, noise: KeyedNoise, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `(B, L)` of one chunk, their code vector `(B, K)` and log-probability `(B,)`."""
        chosen_BK = state_BH.new_zeros(len(state_BH), rvq.codebooks_LVK.shape[2])
        log_prob_B = state_BH.new_zeros(len(state_BH))
        gumbel_BLV = noise.gumbel(rvq.num_levels, rvq.num_codes) if temperature > 0 else None
        codes = []
        for level in range(rvq.num_levels):
            log_p_BV = self.logits(state_BH, chosen_BK, level, rvq).log_softmax(dim=-1)
            score_BV = log_p_BV
            if gumbel_BLV is not None:
                score_BV = log_p_BV / temperature + gumbel_BLV[:, level]
            code_B = score_BV.argmax(dim=-1)
            log_prob_B = log_prob_B + log_p_BV.gather(-1, code_B.unsqueeze(-1)).squeeze(-1)
            chosen_BK = chosen_BK + rvq.codebooks_LVK[level][code_B]
            codes.append(code_B)
        return torch.stack(codes, dim=-1), chosen_BK, log_prob_B
