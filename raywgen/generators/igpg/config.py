"""Config of IGPG; sizes are chosen by measurement on two cores, see docs/results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raywgen.config_places import PLACE
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.settings import (
    GeneratorConfig,
    OptimizerConfig,
    Sampling,
    StageConfig,
    check_condition_dropout,
)
from raywgen.nn.batch_norm import Statistics
from raywgen.nn.decoding import Compile
from raywgen.nn.precision import Precision
from raywgen.nn.text_encoders import check_text_encoder
from raywgen.tasks.encoders import encoder_kind

Decoding = Literal["expected", "tokens"]
Chunks = Literal["coherent", "independent", "shuffled"]
Windows = Literal["sequential", "parallel"]


@dataclass(kw_only=True)
class PriorConfig(StageConfig):
    """The causal transformer.

    Attributes:
        width: H, the width of the transformer.
        num_layers: Number of blocks.
        num_heads: Number of attention heads; must divide `width` into even parts.
        num_kv_heads: Number of heads of keys and values, a divisor of `num_heads`; 0 for as many as `num_heads`.
        window: Most chunks that are seen at once, 0 for whole networks; longer networks are trained on random windows
            and written window after window. If scales are tokens, each window is given those of its values.
        text_encoder: `words` (hashed, trained along), `bytes` (convolutions over UTF-8, trained along) or `hf:NAME`,
            a frozen text model of the hub or in a folder.
        data_encoder: Frozen encoder that turns labelled samples into features: a folder that `raywgen encoder train`
            wrote, `package.module:Class` or `hf:NAME`; empty for the samples as they are.
        condition_dropout: Share of networks trained without a part of their condition: instruction, samples and both
            in equal parts. Guidance needs it above 0, and so does writing from instruction or samples alone.
        independent_share: Share of networks trained with chunks that do not see each other.
        dropout: Dropout rate of the residual branches; the only noise that depends on the number of workers.
        tokens: Source of the tokens that are learned: `none` encodes the weights of each batch, `auto` encodes the
            corpus once, into the run folder, and the path or URI of tokens (`raywgen corpus encode`) reads these. What
            is learned is the same.
    """

    num_steps: int = 250
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-3))
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 0
    window: int = 4096
    text_encoder: str = "words"
    data_encoder: str = ""
    condition_dropout: float = 0.0
    independent_share: float = 0.0
    dropout: float = 0.0
    tokens: str = field(default="none", metadata={PLACE: True})

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * num_heads={2 * self.num_heads}")
        if self.num_kv_heads < 0 or (self.num_kv_heads and self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}, or be 0")
        if self.window < 0:
            raise ValueError(f"window={self.window}: give a number of chunks, or 0 for whole networks")
        check_condition_dropout(self.condition_dropout)
        if not 0 <= self.independent_share <= 1:
            raise ValueError(f"independent_share={self.independent_share} must lie in [0, 1]")
        check_text_encoder(self.text_encoder)
        if self.data_encoder and encoder_kind(self.data_encoder) == "folder" and "://" not in self.data_encoder:
            # A worker starts in a folder of its own.
            self.data_encoder = str(Path(self.data_encoder).absolute())
        if self.tokens in ("", "False"):  # YAML reads `off` as False.
            raise ValueError("tokens: give none, auto, or the folder of a corpus of tokens")
        if self.tokens not in ("none", "auto") and "://" not in self.tokens:
            self.tokens = str(Path(self.tokens).absolute())


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Sampling):
    """The settings by which networks are written, beside the temperature that every generator takes (0 is argmax).

    Attributes:
        top_k: Number of likeliest codes that are drawn from; 0 for all.
        top_p: Probability that the likeliest codes that are drawn from hold together; 1 for all.
        guidance: Scale of classifier-free guidance: 0 ignores instruction and samples, 1 is none, above 1
            amplifies them.
        decoding: Codes that are decoded: `expected` ones along the tokens drawn, or the `tokens` themselves.
        num_averaged: Number of networks drawn for each that is written, which is the mean of their weights; its
            log-probability is their mean, too.
        chunks: Dependence of chunks: `coherent` draws each given all before it, `independent` given condition and
            position alone, `shuffled` coherently, but given the condition of another network of the batch.
        windows: Order of the windows of networks longer than `prior.window`: `sequential` gives each the tail of the
            one before (IGPG, section 3), `parallel` writes all at once, none seeing another.
        overlap: Share of a window that is the tail of the one before; at least one chunk.
        max_rows: Most windows of all networks that `parallel` and `independent` write at once; bounds the memory and
            changes nothing else.
        max_gib: Memory, in GiB, that these windows may take together, their cache above all; fewer are then written at
            once, but at least one of each network. More at once are faster. 0 is 0.6, and on a GPU 16.
        half_cache: Whether keys and values are cached in bfloat16.
        precision: Precision of matrix products: `fp32`, `bf16` (about three times as fast where the processor has units
            for it; tokens of nearly equal probability may come out otherwise) or `auto`: bf16 where it has.
        compile: Whether the transformer's blocks are compiled, which takes some seconds for each power of two of a
            window's length: `always`, `never`, or `auto` where thousands of chunks are written one after another.
    """

    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    decoding: Decoding = "expected"
    num_averaged: int = 1
    chunks: Chunks = "coherent"
    windows: Windows = "sequential"
    overlap: float = 0.25
    max_rows: int = 4096
    max_gib: float = 0.0
    half_cache: bool = False
    precision: Precision = "fp32"
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must be at least 0, top_p={self.top_p} in (0, 1]")
        if self.guidance < 0 or not 0 <= self.overlap < 1:
            raise ValueError(f"guidance={self.guidance} must be at least 0, overlap={self.overlap} in [0, 1)")
        if min(self.num_averaged, self.max_rows) < 1:
            raise ValueError(f"num_averaged={self.num_averaged} and max_rows={self.max_rows} must be at least 1")
        if self.max_gib < 0:
            raise ValueError(f"max_gib={self.max_gib}: give a number above 0, or 0 for the default")


@dataclass(kw_only=True)
class IGPGTaskLossConfig(StageConfig):
    """Training through soft tokens by the task's own loss; `num_steps=0` switches it off.

    Attributes:
        temperature: Temperature of the samples whose prefix the soft tokens continue.
        nll_weight: Weight of the token likelihood that is kept beside the task's loss.
        l2_anchor_weight: Weight of the mean squared distance to the corpus' network, in units of each tensor's scale.
            If each network has a start of its own, it pulls all towards one and should be 0.
        condition_dropout: As of the prior, for this stage; needs that of the prior above 0.
        diversity_weight: Weight of `diversity_loss`, which keeps networks of a batch apart, times their mean confidence
            in the right classes beyond chance. If all are of one task, that task's loss alone makes them nearly equal.
            Above 0 it also gives the generator a coder through which a chunk's draw affects that chunk.
        windows: Order of the windows of networks longer than `prior.window`, as in `SamplingConfig`; use the same when
            generating.
        statistics: Statistics of batch normalisation in the networks whose loss is taken: `stored` are those that the
            generator writes, `batch` those of the samples at hand. Deep networks learn by the latter; the statistics
            that are then written mean nothing until `raywgen.nn.batch_norm.reestimate_statistics` corrects them.
    """

    num_steps: int = 900
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-3))
    temperature: float = 0.5
    nll_weight: float = 0.1
    l2_anchor_weight: float = 0.1
    condition_dropout: float = 0.0
    diversity_weight: float = 0.0
    windows: Windows = "sequential"
    statistics: Statistics = "stored"

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        check_condition_dropout(self.condition_dropout)


@dataclass(kw_only=True)
class IGPGConfig(GeneratorConfig):
    """The settings of IGPG.

    Attributes:
        tokenizer: The tokeniser, and the stage that trains it.
        prior: The causal transformer, and the stage that trains it.
        task_loss: The stage that trains the prior by the task's loss.
        sampling: Sampling settings of requests that give none.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    task_loss: IGPGTaskLossConfig = field(default_factory=IGPGTaskLossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.task_loss.condition_dropout > 0 and self.prior.condition_dropout == 0:
            raise ValueError(
                f"task_loss.condition_dropout={self.task_loss.condition_dropout}: the prior leaves nothing out; give "
                "prior.condition_dropout=0.1 or more"
            )
