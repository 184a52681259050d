"""What a small generator needs, in memory: networks, references, conditions, batches.

The tasks ask for the sign of one of six features, so that a network of 38 values can learn them. All floats have
torch's default dtype, so that a test can ask for float64.

Shape legend: N networks, B networks of a batch, S samples, F features, D values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from raywgen.generators import DataSpec, GeneratorConfig, Stage
from raywgen.generators.common.tokenizer import TokenizerConfig, TokenizerStage
from raywgen.generators.hypernetwork import Hypernetwork, HypernetworkConfig
from raywgen.generators.igpg import IGPG, IGPGConfig
from raywgen.generators.igpg.config import IGPGTaskLossConfig, PriorConfig
from raywgen.generators.igpg.head import Codebooks, LevelHead
from raywgen.generators.settings import OptimizerConfig, StageConfig
from raywgen.generators.units import Units, UnitsConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks import build_network
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch

if TYPE_CHECKING:
    from raywgen.training import TrainConfig

NUM_FEATURES = 6
DATA = DataSpec(num_features=NUM_FEATURES, max_classes=2)
SMALL, DEEP = (6, 4, 2), (6, 3, 3, 2)


ConfigT = TypeVar("ConfigT", bound=GeneratorConfig)


def settings_of(run: TrainConfig, kind: type[ConfigT]) -> ConfigT:
    """The settings of a run's generator, which are of this kind."""
    assert isinstance(run.generator, kind)
    return run.generator


def network(widths: Sequence[int] = SMALL) -> nn.Module:
    """An MLP whose values are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network({"name": "mlp", "widths": list(widths)})


def layout_of(widths: Sequence[int] = SMALL) -> Layout:
    return Layout.from_state_dict(network(widths).state_dict())


def values_of(widths: Sequence[int] = SMALL, num: int = 32) -> Tensor:
    """N networks around the common start, in three directions and a little noise, `(N, D)`."""
    generator = torch.Generator().manual_seed(1)
    base_D = layout_of(widths).flatten(network(widths).state_dict())
    directions = torch.randn(3, len(base_D), generator=generator, dtype=torch.float32)
    offset_ND = torch.randn(num, 3, generator=generator, dtype=torch.float32) @ directions
    noise_ND = torch.randn(num, len(base_D), generator=generator, dtype=torch.float32)
    return base_D + 0.2 * offset_ND + 0.02 * noise_ND


def normalizers(*widths: Sequence[int]) -> NormalizerTable:
    table = {}
    for each in widths or (SMALL, DEEP):
        layout = layout_of(each)
        base_D = layout.flatten(network(each).state_dict())
        table[layout.id] = (layout, Normalizer.measure(layout, values_of(each), base_D))
    return table


def condition(num: int = 4, seed: int = 0, num_samples: int = 16) -> Condition:
    """B conditions; the one at place b asks for feature b, counted modulo six."""
    generator = torch.Generator().manual_seed(seed)
    samples_BSF = torch.randn(num, num_samples, NUM_FEATURES, generator=generator)
    features = [b % NUM_FEATURES for b in range(num)]
    labels_BS = torch.stack([(samples_BSF[b, :, f] > 0).long() for b, f in enumerate(features)])
    texts = tuple(f"Is feature {f} above zero?" for f in features)
    return Condition(instructions=texts, samples_BSF=samples_BSF, labels_BS=labels_BS)


def part_of(whole: Condition, index: slice) -> Condition:
    return replace(
        whole,
        instructions=whole.instructions[index],
        samples_BSF=whole.samples_BSF[index],
        labels_BS=whole.labels_BS[index],
    )


def weight_batch(widths: Sequence[int] = SMALL, num: int = 8, seed: int = 0) -> WeightBatch:
    return WeightBatch(
        values_BD=values_of(widths)[:num],
        layout=layout_of(widths),
        module=network(widths),
        condition=condition(num, seed),
        query=condition(num, seed + 100),
        sample_index_B=torch.arange(num),
    )


def igpg_config() -> IGPGConfig:
    def rate(peak: float) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=peak, warmup_steps=0)

    return IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=5,
            chunk_length=8,
            quantiser=QuantiserConfig(num_levels=2, num_codes=8),
            width=16,
            optimizer=rate(2e-3),
        ),
        prior=PriorConfig(num_steps=5, width=16, num_layers=2, num_heads=2, dropout=0.0, optimizer=rate(3e-3)),
        task_loss=IGPGTaskLossConfig(num_steps=5, optimizer=rate(1e-3)),
    )


def igpg(config: IGPGConfig | None = None, table: NormalizerTable | None = None, seed: int = 0) -> IGPG:
    """An untrained generator with k-means codebooks, in eval mode."""
    table = normalizers() if table is None else table
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = IGPG(config or igpg_config(), table, DATA)
    tokenizer = generator.tokenizer
    chunks = [
        tokenizer.chunks(values_of(_widths(layout)), layout, normalizer, by_code=False).flatten(0, 1)
        for layout, normalizer in table.values()
    ]
    tokenizer.quantiser.initialise(torch.cat(chunks), 5, torch.Generator().manual_seed(seed))
    return generator.eval()


def hypernetwork(num_steps: int = 5, seed: int = 0, **settings: Any) -> Hypernetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = HypernetworkConfig(width=16, task_loss=StageConfig(num_steps=num_steps), **settings)
        return Hypernetwork(config, normalizers(), DATA).eval()


def units(num_steps: int = 5, seed: int = 0, data: DataSpec = DATA, num_references: int = 16) -> Units:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = UnitsConfig(width=32, num_references=num_references, task_loss=StageConfig(num_steps=num_steps))
        return Units(config, normalizers(), data).eval()


def noise_for(num: int, seed: int = 0, first: int = 0) -> KeyedNoise:
    return KeyedNoise(seed, torch.arange(first, first + num))


def level_logits(head: LevelHead, hidden_XH: Tensor, chosen_XK: Tensor, level: int, rvq: Codebooks) -> Tensor:
    """One level's logits `(X, V)`, term by term: nearness of a query to each code vector, and free ones."""
    chosen_XH = torch.nn.functional.gelu(head.state(hidden_XH) + head.chosen(chosen_XK) + head.level[level])
    codebook_VK = rvq.codebooks_LVK[level]
    near_XV = chosen_XH @ head.query[level] @ (codebook_VK / codebook_VK.square().mean().sqrt()).t()
    return near_XV + chosen_XH @ head.free[level] + head.bias[level]


def same(tensor: Tensor) -> Tensor:
    """The all-reduce of a single worker."""
    return tensor


def train(stage: Stage, batches: Iterable[WeightBatch], learning_rate: float = 3e-3) -> list[float]:
    """What a trainer does with one worker; the losses of all steps."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=learning_rate)
    stage.train()
    losses = []
    for step, batch in enumerate(batches):
        result = stage(batch, KeyedNoise(0, batch.sample_index_B + 1000 * step))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        stage.after_step(same)
        losses.append(float(result.loss.detach()))
    stage.eval()
    return losses


def tokenizer_stage(generator: IGPG) -> TokenizerStage:
    return TokenizerStage(generator.tokenizer, generator.normalizers)


def _widths(layout: Layout) -> list[int]:
    matrices = [spec.shape for spec in layout.generated if len(spec.shape) == 2]
    return [matrices[0][1], *(shape[0] for shape in matrices)]
