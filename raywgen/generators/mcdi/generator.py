"""Mc-Di behind the generator interface (arXiv 2502.01117, v3; section numbers are those of that version).

| paper | here |
|---|---|
| phase A, weight preparation with SAM and augmentation | `raywgen.zoo`; k local targets: `raywgen.training.data` |
| local chains, `abar_t^i` | `schedule.Schedule` |
| local consistency loss `L_i^loc` | `local_consistency.local_consistency_loss` |
| phase B, inner and outer loop | `raywgen.generators.common.reptile`, `stages.DenoiserStage` |
| sampling | `samplers.sample` |

It differs from the paper, or fills its gaps, in these points (`jobs/benchmark.py mcdi-ablation` shows their effects):

- The denoiser predicts weights by default, and the default sampler adds no noise. Both raised accuracy.
- The loss is by default weighted uniformly in the local target; the paper's own weighting is a setting.
- A local chain is trained on the steps after the previous local target. The paper trains it on all steps before its end
  (`spans=whole`). Then several chains demand different weights in the same state, which no denoiser can give: at the
  first of 20 steps with k = 3 they demand 1.91, 1.17 and 1 times their targets.
- A linear head is denoised class by class, so that the order of classes does not matter. A single small layout is
  denoised as one vector, any other layouts as chunks or as the latents of a tokeniser.
- The denoiser embeds the support set itself, or the features of a frozen encoder if the corpus was made with one, in
  place of a ResNet-101.
- AdamW takes Reptile's outer step on the pseudo-gradient; `denoiser.optimizer.kind=sgd` is the paper's own.
- The task-loss stage is not in the paper; it is off by default.
- Networks longer than `network.window` chunks are trained on and written in windows, independent of each other given
  condition and position; a window is at the same place of all local targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, LatentWeights, build_denoiser
from raywgen.generators.common.support_set import WindowGenerator
from raywgen.generators.common.tokenizer import Tokenizer, TokenizerStage
from raywgen.generators.interface import DataSpec, GenerationRequest
from raywgen.generators.mcdi.config import McDiConfig, McDiSampling
from raywgen.generators.mcdi.stages import DenoiserStage, McDiTaskLossStage, write_by_sampler
from raywgen.generators.stage import Stage
from raywgen.weights import Layout, NormalizerTable


class McDi(WindowGenerator[McDiConfig]):
    """Meta-learned local-consistency diffusion of weights, conditioned on a task's support set."""

    method = "mcdi"
    Config = McDiConfig
    Sampling = McDiSampling

    def __init__(self, config: McDiConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.tokenizer = Tokenizer(config.tokenizer) if config.network.kind == "latents" else None
        self.denoiser = build_denoiser(config.network, self.normalizers, data, self.tokenizer)

    @property
    def network(self) -> Denoiser:
        """Returns the denoiser itself."""
        return self.denoiser

    def all_stages(self) -> list[Stage]:
        """Returns the stages: the tokeniser's if latents are denoised, the denoiser's, and the task-loss stage."""
        return [
            *([TokenizerStage(self.tokenizer, self.normalizers)] if self.tokenizer is not None else []),
            DenoiserStage(self.config, self.denoiser, self.normalizers),
            McDiTaskLossStage(self.config, self.denoiser, self.normalizers),
        ]

    def write(self, request: GenerationRequest, groups: slice) -> Tensor:
        """Runs the sampler from noise to weights; the temperature scales all noise."""
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, McDiSampling)
        condition, layout = request.condition, request.layout
        return write_by_sampler(
            self.denoiser,
            self.denoiser.embed_condition(condition.samples_BSF, condition.labels_BS, layout),
            condition,
            layout,
            self.config.diffusion,
            sampling,
            request.noise,
            request.temperature,
            groups,
        )

    @torch.no_grad()
    def reconstruct(self, values_BD: Tensor, layout: Layout) -> Tensor:
        """Encodes weights to latents and decodes them, if latents are denoised; otherwise returns the weights."""
        if not isinstance(self.denoiser, LatentWeights):
            return values_BD
        normalizer = self.normalizer(layout)
        states_B1Z = self.denoiser.latents(normalizer.normalise(values_BD).unsqueeze(1), layout)
        return normalizer.denormalise(self.denoiser.weights(states_B1Z.squeeze(1), layout))
