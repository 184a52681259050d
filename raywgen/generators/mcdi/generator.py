"""Mc-Di behind the generator interface (arXiv 2502.01117, v3; section numbers are those of that version).

| paper | here |
|---|---|
| phase A, weight preparation with SAM and augmentation | `raywgen.zoo`; k local targets: `raywgen.training.data` |
| local chains, `abar_t^i` | `schedule.Schedule` |
| local consistency loss `L_i^loc` | `local_consistency.local_consistency_loss` |
| phase B, inner and outer loop | `raywgen.generators.reptile`, `stages.DenoiserStage` |
| sampling | `samplers.sample` |

Where the paper is silent, or this differs, and why (effects: README, and `jobs/benchmark.py mcdi-ablation`):

- The denoiser predicts weights by default and the mean step leaves out the noise: both were worth points.
- The loss is weighted uniformly in the local target; the paper's own weighting is a choice.
- A local chain is trained on the steps after the local target before it. On all steps before its end, as the paper has
  it (`spans=whole`), several chains ask for different weights in the same state, and no denoiser can give them: at the
  first of 20 steps with k = 3 they ask for 1.91, 1.17 and 1 times their targets.
- A linear head is denoised class by class, so that the order of classes does not matter; one small layout all values at
  once; any others chunk by chunk, or as the latents of a tokeniser.
- The task embedding is made of the support set by the denoiser itself, on features of a frozen encoder where the corpus
  was made on such, in place of a ResNet-101.
- Reptile's outer step is taken by AdamW on the pseudo-gradient; `denoiser.optimizer.kind=sgd` is the paper's own.
- The task-loss stage is not of the paper; it is off by default and reported apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, LatentWeights, build_denoiser
from raywgen.generators.common.support_set import SupportSetGenerator
from raywgen.generators.common.tokenizer import Tokenizer, TokenizerStage
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Stage
from raywgen.generators.mcdi.config import McDiConfig, McDiSampling
from raywgen.generators.mcdi.stages import DenoiserStage, McDiTaskLossStage, run_sampler
from raywgen.weights import Layout, NormalizerTable


class McDi(SupportSetGenerator):
    """Meta-learned local-consistency diffusion of weights, conditioned on a task's support set."""

    method = "mcdi"
    Config = McDiConfig
    Sampling = McDiSampling

    def __init__(self, config: McDiConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.config: McDiConfig
        self.tokenizer = Tokenizer(config.tokenizer) if config.network.kind == "latents" else None
        self.denoiser = build_denoiser(config.network, self.normalizers, data, self.tokenizer)

    @property
    def network(self) -> Denoiser:
        """Returns the denoiser itself."""
        return self.denoiser

    def all_stages(self) -> list[Stage]:
        """The tokeniser where latents are denoised, the denoiser, and the task-loss stage."""
        return [
            *([TokenizerStage(self.tokenizer, self.normalizers)] if self.tokenizer is not None else []),
            DenoiserStage(self.config, self.denoiser, self.normalizers),
            McDiTaskLossStage(self.config, self.denoiser, self.normalizers),
        ]

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Walks from noise to weights, all noise scaled by the temperature; the instruction is not used."""
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, McDiSampling)
        condition, layout, temperature = request.condition, request.layout, request.temperature
        condition_embedding = self.denoiser.embed_condition(condition.samples_BSF, condition.labels_BS, layout)
        start_BD = temperature * request.noise.normal(self.denoiser.num_states(layout))
        diffusion = self.config.diffusion
        states_BD = run_sampler(
            self.denoiser, condition_embedding, layout, start_BD, diffusion, sampling, request.noise, temperature
        )
        normalised_BD = self.denoiser.decode(states_BD, condition, layout)
        return Generated(
            values_BD=self.normalizer(layout, request.normalizer).denormalise(normalised_BD), log_prob_B=None
        )

    @torch.no_grad()
    def reconstruct(self, values_BD: Tensor, layout: Layout) -> Tensor:
        """Takes weights to latents and back, where latents are denoised."""
        if not isinstance(self.denoiser, LatentWeights):
            return values_BD
        normalizer = self.normalizer(layout)
        states_B1Z = self.denoiser.latents(normalizer.normalise(values_BD).unsqueeze(1), layout)
        return normalizer.denormalise(self.denoiser.weights(states_B1Z.squeeze(1), layout))
