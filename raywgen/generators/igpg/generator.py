"""IGPG behind the generator interface (arXiv 2504.02012).

It differs from the paper in these points (docs/results shows their effects):

- Weights are coded relative to the shared start and scaled per tensor. Networks that share a start differ little from
  it, so tokens spend their bits on the difference.
- Short chunks are quantised residually, where the paper has one code per patch of a folded image. That gives more bits
  per value at equal sequence length.
- Text and data encoders are by default small and trained with the prior, in place of LLaMA and CLIP, so no download is
  needed. `prior.text_encoder` and `prior.data_encoder` take any frozen encoders, also CLIP. The set encoder reads the
  features of each image with its label, where the paper takes the mean over all images.
- Networks are decoded from the expected code, and a last stage trains the prior by the task's loss. With a diversity
  weight a second residual head adds the difference between the drawn and the expected code.
- A window reads no chunk before its first, and position features say where it lies, so windows can be written in
  parallel. Where scales are tokens, these are written first, and each window is given the scales of its own values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raywgen.generators.common.tokenizer import Tokenizer, TokenizerStage
from raywgen.generators.common.tokenizer.encoder import TokenizerEncoder
from raywgen.generators.igpg.config import IGPGConfig, SamplingConfig
from raywgen.generators.igpg.pieces import HEADER_CHUNKS, earlier_chunks, kept_chunks, pieces_of
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.shuffled_conditions import shuffled_conditions
from raywgen.generators.igpg.stages import IGPGTaskLossStage, PriorStage, task_loss_chunks
from raywgen.generators.igpg.token_sampling import (
    TokenSample,
    TokenWriter,
    WrittenChunks,
    joined_samples,
    mean_of_adjacent,
    token_groups,
    window_bytes,
)
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.pieces import GeneratedPiece, Piece
from raywgen.generators.reporting import Ablation, WeightCode
from raywgen.generators.settings import Sampling
from raywgen.generators.stage import Stage
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.nn.coders import PerceptronCoder
from raywgen.weights import (
    Condition,
    Layout,
    Normalizer,
    NormalizerTable,
    layout_normalizer,
)

# A noise stream of its own, because windows use stream 0.
_AVERAGE_STREAM = 1
# The hidden states of a decoder take many times the memory of chunks; more are decoded a group of windows at a time.
_CHUNKS_AT_ONCE = 1 << 14
# Products of fewer rows may round differently from those of a whole network.
_LEAST_CHUNKS = 8


class IGPG(Generator[IGPGConfig]):
    """A VQ-VAE tokeniser and a causal transformer: one model for all layouts and tasks of a corpus."""

    method = "igpg"
    ablations = (
        Ablation(
            stage=PriorStage.name,
            row="token_prior",
            label="Without the task-loss stage",
            help="The same prior before training by task loss.",
        ),
    )
    Config = IGPGConfig
    Sampling = SamplingConfig

    def __init__(self, config: IGPGConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, normalizers, data)
        sizes = config.tokenizer
        self.tokenizer = Tokenizer(sizes)
        num_position_features = self.tokenizer.num_position_features
        self.prior = Prior(
            config.prior,
            sizes.quantiser.num_levels,
            sizes.quantiser.num_codes,
            sizes.chunk_length,
            data,
            num_position_features,
            reads_scales=sizes.codes_scales and self._trains_on_windows,
        )
        self.residual_head = PerceptronCoder(sizes.chunk_length, num_position_features, sizes.width)
        # Created only if used, because ZeRO hangs on parameters without gradients.
        is_spread = config.task_loss.num_steps > 0 and config.task_loss.diversity_weight > 0
        self.sample_residual_head = (
            PerceptronCoder(sizes.chunk_length, num_position_features, sizes.width) if is_spread else None
        )

    def all_stages(self) -> list[Stage]:
        """Returns the stages of tokeniser and prior, and the task-loss stage."""
        return [
            TokenizerStage(self.tokenizer, self.normalizers),
            PriorStage(self.prior, self.tokenizer, self.normalizers),
            IGPGTaskLossStage(
                self.config.task_loss,
                self.prior,
                self.residual_head,
                self.sample_residual_head,
                self.tokenizer,
                self.normalizers,
            ),
        ]

    def weight_code(self) -> WeightCode:
        """Returns the tokeniser's code."""
        tokenizer = self.tokenizer
        return WeightCode(
            coder=tokenizer.config.coder,
            quantiser=tokenizer.config.quantiser.kind,
            num_levels=tokenizer.quantiser.num_tokens,
            num_codes=tokenizer.quantiser.num_codes,
            num_codebook_values=tokenizer.quantiser.num_codebook_values,
            num_decoder_values=sum(parameter.numel() for parameter in tokenizer.decoder.parameters()),
            encode=self.tokens,
            real_tokens=tokenizer.real_tokens,
        )

    def token_encoder(self) -> TokenEncoder:
        """Returns the tokeniser as it encodes whole corpora."""
        return TokenizerEncoder(self.tokenizer, self.normalizers)

    @property
    def reads_parts(self) -> bool:
        """Whether the prior was trained without parts of its condition."""
        return self.prior.condition.dropped is not None

    def encoders(self) -> dict[str, str]:
        """Returns the encoder of the samples, if there is one."""
        encoder = self.config.prior.data_encoder
        return {"prior.data_encoder": encoder} if encoder else {}

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes tokens, then decodes the expected code along them (or the tokens themselves).

        Raises:
            GuidanceError: Guidance is asked for, but the prior was never trained without its condition.
            ShuffleError: Shuffled conditions are asked for, but there are not enough different ones.
        """
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, SamplingConfig)
        condition, layout, num = request.condition, request.layout, sampling.num_averaged
        if sampling.chunks == "shuffled":
            condition = shuffled_conditions(condition)
        writer = self._writer(request, condition, sampling)
        written = writer.write(writer.groups, WrittenChunks())
        if self.tokenizer.decoder.context == 1 and self.tokenizer.num_chunks(layout) > _CHUNKS_AT_ONCE:
            parts = [(self._chunks(sample, layout, group.chunks), sample.log_prob_BM) for group, sample in written]
            chunks_BMK, log_prob_BM = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        else:
            sample = joined_samples([sample for _, sample in written])
            chunks_BMK, log_prob_BM = self._chunks(sample, layout, slice(None)), sample.log_prob_BM
        values_BD = self.tokenizer.values(chunks_BMK, layout, self.normalizer(layout, request.normalizer))
        return Generated(
            values_BD=mean_of_adjacent(values_BD, num),
            log_prob_B=mean_of_adjacent(log_prob_BM.sum(dim=1), num),
        )

    def pieces(self, layout: Layout, sampling: Sampling, num: int, max_values: int) -> list[Piece]:
        """Returns runs of groups of windows; whole networks where groups cannot be decoded by themselves."""
        assert isinstance(sampling, SamplingConfig)
        tokenizer = self.tokenizer
        table = tokenizer.chunk_inputs(layout)
        groups = token_groups(self.prior, table, tokenizer.quantiser, sampling, num * sampling.num_averaged)
        num_header_chunks = tokenizer.num_header_chunks(layout)
        is_mixed = num_header_chunks > 0 and not groups[0].is_header
        if len(groups) == 1 or is_mixed or tokenizer.decoder.context > 1 or sampling.chunks == "shuffled":
            return super().pieces(layout, sampling, num, max_values)
        sizes = tokenizer.config.chunk_length, layout.num_values
        pieces = pieces_of(groups, num_header_chunks, *sizes, max_values)
        is_whole = any(piece.num_values == layout.num_values for piece in pieces)
        return super().pieces(layout, sampling, num, max_values) if is_whole else pieces

    def bytes_at_once(self, layout: Layout, sampling: Sampling, num: int) -> tuple[float, float]:
        """Returns the memory of one window of each network, and of the most windows that are written at once."""
        assert isinstance(sampling, SamplingConfig)
        tokenizer = self.tokenizer
        table, rows = tokenizer.chunk_inputs(layout), num * sampling.num_averaged
        num_codes = tokenizer.quantiser.num_levels * tokenizer.quantiser.num_codes
        counts: dict[int, int] = {}
        for group in token_groups(self.prior, table, tokenizer.quantiser, sampling, rows):
            length = group.windows[0].stop - group.windows[0].start
            counts[length] = max(counts.get(length, 0), len(group.windows))
        each = {
            length: rows * window_bytes(self.prior, length, len(table.mean_position_G), num_codes, sampling)
            for length in counts
        }
        return max(each.values()), max(count * each[length] for length, count in counts.items())

    @torch.no_grad()
    def generate_piece(self, request: GenerationRequest, piece: Piece, kept: Mapping[str, Tensor]) -> GeneratedPiece:
        """Writes some groups of windows, given the header and the tokens before them where they read these."""
        layout, sampling = request.layout, self.resolve_sampling(request.sampling)
        assert isinstance(sampling, SamplingConfig)
        if piece.num_values == layout.num_values:
            return super().generate_piece(request, piece, kept)
        writer = self._writer(request, request.condition, sampling)
        earlier, header_BYK = earlier_chunks(kept, self.device), kept.get(HEADER_CHUNKS)
        header_BYK = None if header_BYK is None else header_BYK.to(self.device)
        normalizer, num = self.normalizer(layout, request.normalizer), sampling.num_averaged
        own_header, values, log_probs = [], [], []
        for group, sample in writer.write(writer.groups[slice(*piece.units)], earlier):
            chunks_BXK = self._chunks(sample, layout, group.chunks)
            log_probs.append(sample.log_prob_BM.double().sum(dim=1))
            if group.is_header:
                own_header.append(chunks_BXK)
                continue
            first = group.chunks.start
            values_BX = self.tokenizer.values_of_chunks(chunks_BXK, first, layout, normalizer, header_BYK)
            values.append(mean_of_adjacent(values_BX, num))
        nothing_B0 = torch.zeros(len(request.condition), 0, device=self.device)
        return GeneratedPiece(
            values_BX=torch.cat([nothing_B0, *values], dim=1),
            log_prob_B=mean_of_adjacent(torch.stack(log_probs).sum(dim=0), num),
            kept=kept_chunks(earlier, torch.cat(own_header, dim=1) if own_header else None),
        )

    def _writer(self, request: GenerationRequest, condition: Condition, sampling: SamplingConfig) -> TokenWriter:
        num, tokenizer = sampling.num_averaged, self.tokenizer
        return TokenWriter(
            self.prior,
            condition.repeat(num),
            tokenizer.chunk_inputs(request.layout),
            tokenizer.quantiser,
            request.noise.split(torch.arange(num), _AVERAGE_STREAM),
            request.temperature,
            sampling,
        )

    def _chunks(self, sample: TokenSample, layout: Layout, part: slice) -> Tensor:
        """Decodes the expected code along some chunks' tokens (or the tokens themselves) to normalised chunks."""
        tokenizer = self.tokenizer
        start, stop, _ = part.indices(tokenizer.num_chunks(layout))
        if stop - start < min(_LEAST_CHUNKS, tokenizer.num_chunks(layout)):
            repeats = torch.arange(_LEAST_CHUNKS, device=self.device).clamp(max=stop - start - 1)
            return self._decoded(sample.take(repeats), layout, start + repeats)[:, : stop - start]
        return self._decoded(sample, layout, torch.arange(start, stop, device=self.device))

    def _decoded(self, sample: TokenSample, layout: Layout, index_X: Tensor) -> Tensor:
        tokenizer = self.tokenizer
        positions_XG, mask_XK = tokenizer.chunk_inputs(layout).positions(index_X), tokenizer.mask(layout, index_X)
        if sample.expected_BMK is None:
            return tokenizer.decode(sample.codes_BML, positions_XG, mask_XK)
        drawn_BXK = tokenizer.quantiser.decode(sample.codes_BML)
        heads = self.residual_head, self.sample_residual_head
        return task_loss_chunks(tokenizer, *heads, sample.expected_BMK, drawn_BXK, positions_XG, mask_XK)

    @torch.no_grad()
    def log_prob(
        self, values_BD: Tensor, condition: Condition, layout: Layout, sampling: SamplingConfig | None = None
    ) -> Tensor:
        """Returns the log-probability `(B,)`, in nats, that `generate` draws the tokens of given weights."""
        table, codes_BML = self.tokenizer.table(layout), self.tokens(values_BD, layout)
        sampling = sampling or self.config.sampling
        return self.prior.log_likelihood(codes_BML, condition, table, self.tokenizer.quantiser, sampling).sum(dim=1)

    @torch.no_grad()
    def reconstruct(self, values_BD: Tensor, layout: Layout) -> Tensor:
        """Encodes to tokens and decodes again."""
        return self.tokenizer.decoded_values(self.tokens(values_BD, layout), layout, self.normalizer(layout))

    @torch.no_grad()
    def tokens(self, values_BD: Tensor, layout: Layout) -> Tensor:
        """Returns the tokens int64 `(B, M, L)` of given weights."""
        return self.tokenizer.tokens(values_BD, layout, self.normalizer(layout))

    def normalizer(self, layout: Layout, given: Normalizer | None = None) -> Normalizer:
        """Returns a layout's normaliser; with scale tokens and no shared base, an unknown layout has its own."""
        if self.config.tokenizer.codes_scales and given is None and not self.knows(layout) and not self._shares_start:
            return layout_normalizer(layout, device=self.device)
        return super().normalizer(layout, given)

    def estimate_normalizer(self, layout: Layout, start_D: Tensor) -> Normalizer:
        """Returns an estimate, or, where scales are tokens, the layout's own units about the shared base, if any."""
        if not self.config.tokenizer.codes_scales:
            return super().estimate_normalizer(layout, start_D)
        return layout_normalizer(layout, start_D.to(self.device) if self._shares_start else None, self.device)

    @property
    def _trains_on_windows(self) -> bool:
        """Whether the prior is trained on windows that begin after a network's first chunk."""
        prior, layouts = self.config.prior, self.layouts
        is_longer = not layouts or any(self.tokenizer.num_chunks(layout) > prior.window for layout in layouts)
        return prior.window > 0 and (prior.independent_share > 0 or is_longer)

    @property
    def _shares_start(self) -> bool:
        return any(normalizer.start_D is not None for _, normalizer in self.normalizers.values())
