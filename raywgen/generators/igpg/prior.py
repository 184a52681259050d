"""The causal transformer that writes tokens, given task, data and layout (IGPG, section 3, stage 2).

`p(s | e_A, e_D) = prod_i p(s_i | s_<i, e_A, e_D)`. One position is one chunk; its L residual tokens are
predicted level after level by a small head that sees the sum of the code vectors chosen so far.

Besides hard tokens the prior gives the **expected code**: at every level the probability-weighted mean of the code
vectors, where each level reads the expectations of the levels before it. It is differentiable in all parameters.

**Windows.** A window is a sequence of its own: the prefix, then its chunks. Its first chunk reads no chunk before it.
Only the position features say where in the network a window lies. So the prior reads every window in the same way,
whether it is the first or a later one, long or a single chunk; a window that holds all chunks is the whole network.
Where scales are tokens, a window that begins after the header is given the scales of its own values (`chunk_table.py`).

Shape letters beyond the legend in `raywgen.weights`: N windows, M chunks of a network, G position features, T prefix
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raywgen.generators.common.tokenizer.chunk_table import NUM_CHUNK_SCALES, ChunkInputs, ChunkTable, HeaderChunks
from raywgen.generators.igpg.config import PriorConfig, SamplingConfig
from raywgen.generators.igpg.data_encoder import DataEncoder
from raywgen.generators.igpg.head import Codebooks, LevelHead
from raywgen.generators.igpg.windows import chunks_of, plan_parts, side_by_side
from raywgen.generators.interface import DataSpec
from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PositionEncoder
from raywgen.nn.transformer import Transformer
from raywgen.weights import Condition
from raywgen.weights.chunks import num_position_features


class Prior(nn.Module):
    """Writes the tokens of a network, chunk after chunk."""

    def __init__(
        self,
        config: PriorConfig,
        num_levels: int,
        num_codes: int,
        K: int,
        data: DataSpec,
        G: int | None = None,
        *,
        reads_scales: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        H, G = config.width, G or num_position_features()
        self.data = DataEncoder(config.data_encoder, data.num_features) if config.data_encoder else None
        self.condition = ConditionEncoder(
            num_features=data.num_features if self.data is None else self.data.num_features,
            max_classes=data.max_classes,
            num_position_features=G,
            width=H,
            text_encoder=config.text_encoder,
            can_drop=config.condition_dropout > 0,
        )
        self.condition_summary = ConditionSummary(H)
        self.position = PositionEncoder(G, H)
        self.previous = nn.Linear(K, H)
        # No bias: a zero input must add zero. Created only if used, because ZeRO hangs on parameters without gradients.
        self.scales = nn.Linear(NUM_CHUNK_SCALES, H, bias=False) if reads_scales else None
        self.trunk = Transformer(
            H,
            config.num_layers,
            config.num_heads,
            config.dropout,
            num_kv_heads=config.num_kv_heads or config.num_heads,
        )
        self.head = LevelHead(H, num_levels, num_codes, K)

    def prefix(self, cond: Condition, mean_position_G: Tensor) -> Tensor:
        """Returns the condition tokens `(B, T, H)`.

        Args:
            cond: The conditions of B networks.
            mean_position_G: Mean of the position features of the layout's chunks.
        """
        samples_BSF = cond.samples_BSF if self.data is None else self.data(cond.samples_BSF)
        return self.condition(cond.instructions, samples_BSF, cond.labels_BS, mean_position_G, cond.is_dropped_B2)

    def inputs(self, prefix_BTH: Tensor, positions_WH: Tensor, scales_BW4: Tensor | None) -> Tensor:
        """Embeds the inputs of every position except the chunk before it, `(B, W, H)`."""
        inputs_BWH = self.condition_summary(prefix_BTH, positions_WH)
        return inputs_BWH if self.scales is None or scales_BW4 is None else inputs_BWH + self.scales(scales_BW4)

    def header(self, table: ChunkInputs) -> HeaderChunks | None:
        """The header whose scales are given to later windows; None where no scales are given."""
        return None if self.scales is None else table.header

    def states(
        self, prefix_BTH: Tensor, positions_WG: Tensor, latents_BWK: Tensor, scales_BW4: Tensor | None = None
    ) -> Tensor:
        """Returns the states `(B, W, H)` of one window per row, given the code vectors of its chunks (teacher forcing).

        Args:
            prefix_BTH: Condition tokens.
            positions_WG: Position features of the windows' chunks, the same in all rows or `(B, W, G)`.
            latents_BWK: Code vectors of the windows' chunks.
            scales_BW4: Scales and means of the windows' values; None where none are given.
        """
        before_BWK = torch.cat([torch.zeros_like(latents_BWK[:, :1]), latents_BWK[:, :-1]], dim=1)
        inputs_BWH = self.inputs(prefix_BTH, self.position(positions_WG), scales_BW4) + self.previous(before_BWK)
        return self.trunk(torch.cat([prefix_BTH, inputs_BWH], dim=1))[:, prefix_BTH.shape[1] :]

    def states_alone(self, prefix_BTH: Tensor, positions_BWG: Tensor, scales_BW4: Tensor | None = None) -> Tensor:
        """Returns the states `(B, W, H)` of chunks that are windows of their own, all of a row in one pass.

        Args:
            prefix_BTH: Condition tokens.
            positions_BWG: Position features of the chunks.
            scales_BW4: As in `states`.
        """
        num_prefix = prefix_BTH.shape[1]
        nothing_K = prefix_BTH.new_zeros(self.previous.in_features)
        inputs_BWH = self.inputs(prefix_BTH, self.position(positions_BWG), scales_BW4) + self.previous(nothing_K)
        return self.trunk(torch.cat([prefix_BTH, inputs_BWH], dim=1), num_common=num_prefix)[:, num_prefix:]

    def hidden(
        self,
        codes_BML: Tensor,
        cond: Condition,
        table: ChunkTable,
        rvq: Codebooks,
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """Returns the states `(B, M, H)` that given tokens would be drawn from, if written with these settings."""
        blocks = self._hidden_blocks(codes_BML, cond, table, rvq, sampling or SamplingConfig())
        return torch.cat([hidden_BWH for _, hidden_BWH in blocks], dim=1)

    def log_likelihood(
        self,
        codes_BML: Tensor,
        cond: Condition,
        table: ChunkTable,
        rvq: Codebooks,
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """Returns the log-probability `(B, M)` of every given chunk in nats, if written with these settings."""
        blocks = self._hidden_blocks(codes_BML, cond, table, rvq, sampling or SamplingConfig())
        parts = [
            self.head.log_likelihood(hidden_BWH, codes_BML[:, part], rvq, table.padding_codes(part)).sum(dim=-1)
            for part, hidden_BWH in blocks
        ]
        return torch.cat(parts, dim=1)

    def _hidden_blocks(
        self, codes_BML: Tensor, cond: Condition, table: ChunkTable, rvq: Codebooks, sampling: SamplingConfig
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields, for each group of windows, the chunks that it writes and their states."""
        prefix_BTH = self.prefix(cond, table.mean_position_G)
        B, M = codes_BML.shape[:2]
        header = self.header(table)
        for part in plan_parts(M, header, self.config.window, sampling):
            chunk_scales = header.chunk_scales(codes_BML) if header is not None and part.plan[0].start else None
            # Reading runs over all positions of a window at once, where writing runs over one at a time.
            num_positions = B * (part.plan[0].stop - part.plan[0].start)
            for group in side_by_side(part.plan, num_positions, sampling.max_rows):
                N, tail = len(group), group[0].new - group[0].start
                index_NW = chunks_of(group, part.stop, codes_BML.device)
                latents_BNWK = rvq.decode(codes_BML[:, index_NW])
                hidden_RWH = self.states(
                    prefix_BTH.repeat_interleave(N, dim=0),
                    table.positions_MG[index_NW].repeat(B, 1, 1),
                    latents_BNWK.flatten(0, 1),
                    None if chunk_scales is None else chunk_scales.of(index_NW).flatten(0, 1),
                )
                new = slice(group[0].new, min(group[-1].stop, part.stop))
                yield new, hidden_RWH[:, tail:].unflatten(0, (B, N)).flatten(1, 2)[:, : new.stop - new.start]
