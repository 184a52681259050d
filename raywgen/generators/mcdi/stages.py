"""The stages that train Mc-Di: local consistency, meta-learned by Reptile or jointly; then the task's own loss.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, Z values of a denoised state. A
counts local targets. D values may also be those of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from raywgen.generators.common.denoisers import Denoiser, Place
from raywgen.generators.common.reptile import adapt, pseudo_gradient_loss
from raywgen.generators.common.targets import normalised_targets
from raywgen.generators.common.task_loss import BYTES_PER_VALUE, all_samples, task_loss
from raywgen.generators.common.writing import Rows, write_networks
from raywgen.generators.mcdi.config import DenoiserConfig, DiffusionConfig, McDiConfig, McDiSampling, McDiTaskLossConfig
from raywgen.generators.mcdi.local_consistency import local_consistency_loss, noised
from raywgen.generators.mcdi.samplers import sample
from raywgen.generators.stage import ParameterUse, Stage, StageLoss, StageNeeds
from raywgen.weights import Condition, KeyedNoise, Layout, NormalizerTable, WeightBatch, Windows


class Draws(NamedTuple):
    """The inputs of the denoiser in a step: n noised versions of one local target of each of B networks.

    Attributes:
        target_BnD: The local target, in generator units.
        eps_BnD: The noise.
        time_Bn: Fraction of the chain that is done, in [0, 1).
        abar_Bn: Signal of the global chain.
        local_abar_Bn: Signal of the local target's chain.
    """

    target_BnD: Tensor
    eps_BnD: Tensor
    time_Bn: Tensor
    abar_Bn: Tensor
    local_abar_Bn: Tensor


def draw(
    targets_BAD: Tensor, config: DiffusionConfig, noise: KeyedNoise, num_draws: int, num_steps: int = 1
) -> list[Draws]:
    """Draws one of the k targets of each network, and for each of `num_steps` n noised versions of it.

    Args:
        targets_BAD: Local targets in generator units.
        config: Settings of the chain.
        noise: B rows of keyed noise.
        num_draws: n.
        num_steps: Number of entries of the result.
    """
    schedule = config.chain()
    B, k, D = targets_BAD.shape
    assert k == config.num_targets, f"{k} targets in the batch, {config.num_targets} in the config"
    device = targets_BAD.device
    index_B = noise.integers(k)
    ends_k = torch.tensor(schedule.ends if config.targets == "consistent" else [schedule.num_steps] * k)
    begins_k = torch.zeros_like(ends_k)
    if config.targets == "consistent" and config.spans == "own":
        begins_k[1:] = ends_k[:-1]
    begin_B1, end_B1 = (edges_k[index_B.cpu()].unsqueeze(1) for edges_k in (begins_k, ends_k))
    target_BnD = targets_BAD[torch.arange(B, device=device), index_B].unsqueeze(1).expand(B, num_draws, D)
    steps = []
    for _ in range(num_steps):
        eps_BnD = noise.normal(num_draws, D)
        t_Bn = begin_B1 + (noise.uniform(num_draws).cpu() * (end_B1 - begin_B1)).long()
        steps.append(
            Draws(
                target_BnD=target_BnD,
                eps_BnD=eps_BnD,
                time_Bn=(t_Bn / schedule.num_steps).to(device),
                abar_Bn=schedule.signal(t_Bn).to(device),
                local_abar_Bn=schedule.signal(t_Bn, end_B1).to(device),
            )
        )
    return steps


def consistency_loss(
    predict: Callable[[Tensor, Tensor], Tensor], draws: Draws, config: DiffusionConfig, place: Place | None = None
) -> Tensor:
    """Returns the mean local consistency loss of some draws, with `place` over values that exist in the windows.

    `predict` takes noised weights and time.
    """
    x_BnD = noised(draws.target_BnD, draws.local_abar_Bn, draws.eps_BnD)
    return local_consistency_loss(
        predict(x_BnD, draws.time_Bn),
        draws.target_BnD,
        draws.eps_BnD,
        draws.abar_Bn,
        draws.local_abar_Bn,
        parameterisation=config.parameterisation,
        weighting=config.weighting,
        weight_BD=None if place is None else place.weight_BX.unsqueeze(1),
    ).mean()


class _McDiStage(Stage):
    """The denoiser that both stages train, and their settings."""

    def __init__(self, config: McDiConfig, denoiser: Denoiser, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.denoiser = denoiser
        self.normalizers = normalizers

    def _measure(self, batches: Iterable[WeightBatch]) -> None:
        self.denoiser.setup(batches, predicts_weights=self._config.diffusion.parameterisation == "weights")

    def _targets(self, batch: WeightBatch) -> Tensor:
        """Returns the batch's local targets as states, `(B, A, Z)`."""
        targets_BAD = normalised_targets(batch, self.normalizers)
        return self.denoiser.encode(targets_BAD, batch.condition, batch.layout, batch.windows)


class DenoiserStage(_McDiStage):
    """Minimises the local consistency loss, by Reptile over (task, local target) or on all of them jointly."""

    name = "denoiser"
    is_optional = True

    @property
    def config(self) -> DenoiserConfig:
        """Returns the settings of this stage."""
        return self._config.denoiser

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks, and local targets of trajectories; windows suffice where the denoiser sees windows."""
        num_targets = self._config.diffusion.num_targets
        return StageNeeds(num_targets=num_targets, whole_networks=self.denoiser.window == 0)

    @property
    def bytes_per_value(self) -> float:
        """Every draw evaluates the denoiser once, beside the local targets as they are and in units of the scale."""
        return 8 * self.needs.num_targets + self.config.num_draws * (8 + self.denoiser.bytes_per_value)

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a random window of each network that is longer than the denoiser's, the same for all its targets."""
        return self.denoiser.draw_windows(layout, noise)

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the denoiser's statistics of support sets."""
        self._measure(batches)

    @property
    def parameter_use(self) -> ParameterUse:
        """Reptile's inner steps change copies of the parameters."""
        return "functional" if self.config.meta == "reptile" else "modules"

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns Reptile's pseudo-gradient loss in meta-training, else (also in validation) the plain loss."""
        batch = self.see(batch, noise)
        targets_BAD, place = self._targets(batch), self.denoiser.place(batch.layout, batch.windows)
        if self.training and self.config.meta == "reptile":
            return self._reptile(targets_BAD, batch, noise, place)
        (draws,) = draw(targets_BAD, self._config.diffusion, noise, self.config.num_draws)
        condition = batch.condition

        def predict(x_BnD: Tensor, time_Bn: Tensor) -> Tensor:
            return self.denoiser(x_BnD, time_Bn, condition.samples_BSF, condition.labels_BS, batch.layout, place)

        loss = consistency_loss(predict, draws, self._config.diffusion, place)
        return StageLoss(loss=loss, metrics={"consistency": loss.detach()})

    def _reptile(self, targets_BAD: Tensor, batch: WeightBatch, noise: KeyedNoise, place: Place | None) -> StageLoss:
        config, diffusion, layout = self.config, self._config.diffusion, batch.layout
        parameters = dict(self.denoiser.named_parameters())

        def loss_of_item(own: dict[str, Tensor], *tensors: Tensor) -> Tensor:
            samples_1SF, labels_1S, *rest = (tensor.unsqueeze(0) for tensor in tensors)
            draws, where = Draws(*rest[: len(Draws._fields)]), rest[len(Draws._fields) :]
            own_place = Place(*where) if where else None

            def predict(x_1nD: Tensor, time_1n: Tensor) -> Tensor:
                return functional_call(self.denoiser, own, (x_1nD, time_1n, samples_1SF, labels_1S, layout, own_place))

            return consistency_loss(predict, draws, diffusion, own_place)

        steps = draw(targets_BAD, diffusion, noise, config.num_draws, config.inner_steps)
        support = (batch.condition.samples_BSF, batch.condition.labels_BS)
        adapted, first_loss_B = adapt(
            parameters, loss_of_item, [(*support, *draws, *(place or ())) for draws in steps], config.inner_rate
        )
        loss = pseudo_gradient_loss(parameters, adapted)
        return StageLoss(loss=loss, metrics={"consistency": first_loss_B.mean()})


class McDiTaskLossStage(_McDiStage):
    """Trains the denoiser through a short sampler by the task's loss on support and query samples.

    Networks longer than the denoiser's window are written window by window, as in generation, and run as a whole.
    """

    name = "task_loss"
    is_optional = True

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks, whole networks to run, and local targets of trajectories."""
        return StageNeeds(num_targets=self._config.diffusion.num_targets)

    @property
    def config(self) -> McDiTaskLossConfig:
        """Returns the settings of this stage."""
        return self._config.task_loss

    @property
    def bytes_per_value(self) -> float:
        """Every step of the sampler evaluates the denoiser; the consistency loss may see windows alone."""
        return BYTES_PER_VALUE + self.config.sampling_steps * self.denoiser.bytes_per_value

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the denoiser's statistics of support sets, unless the stage before has."""
        if self._config.denoiser.num_steps == 0:
            self._measure(batches)

    @property
    def parameter_use(self) -> ParameterUse:
        """The sampler calls the denoiser again and again."""
        return "whole"

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the task's loss of the sampled networks, plus the weighted consistency loss."""
        condition, layout = batch.condition, batch.layout
        sampling = replace(self._config.sampling, num_steps=self.config.sampling_steps)
        condition_embedding = self.denoiser.embed_condition(condition.samples_BSF, condition.labels_BS, layout)
        written_BD = write_by_sampler(
            self.denoiser, condition_embedding, condition, layout, self._config.diffusion, sampling, noise
        )
        values_BD = self.normalizers[layout.id][1].denormalise(written_BD)
        loss_B, accuracy_B = task_loss(values_BD, batch, all_samples(batch))
        windows = self.denoiser.draw_windows(layout, noise)
        seen = batch if windows is None else batch.cut(windows)
        (draws,) = draw(self._targets(seen), self._config.diffusion, noise, 1)
        place = self.denoiser.place(layout, windows)

        def predict(x_BnD: Tensor, time_Bn: Tensor) -> Tensor:
            return self.denoiser.predict(x_BnD, time_Bn, condition_embedding, layout, place)

        consistency = consistency_loss(predict, draws, self._config.diffusion, place)
        metrics = {
            "task_loss": loss_B.mean().detach(),
            "accuracy": accuracy_B.mean().detach(),
            "consistency": consistency.detach(),
        }
        return StageLoss(loss=loss_B.mean() + self.config.consistency * consistency, metrics=metrics)


def write_by_sampler(
    denoiser: Denoiser,
    condition_embedding: Tensor,
    condition: Condition,
    layout: Layout,
    config: DiffusionConfig,
    sampling: McDiSampling,
    noise: KeyedNoise,
    temperature: float = 1.0,
    groups: slice = slice(None),
) -> Tensor:
    """Runs the sampler from noise to weights in generator units, `(B, D)`; the temperature scales all noise.

    It writes some `groups` of windows alone, as `write_networks` does, where these are given.
    """

    def follow(rows: Rows) -> Tensor:
        start_RZ = temperature * rows.noise.normal(rows.num_states)
        return run_sampler(denoiser, rows, layout, start_RZ, config, sampling, temperature)

    return write_networks(denoiser, follow, condition_embedding, condition, layout, noise, sampling.max_rows, groups)


def run_sampler(
    denoiser: Denoiser,
    rows: Rows,
    layout: Layout,
    start_RZ: Tensor,
    config: DiffusionConfig,
    sampling: McDiSampling,
    temperature: float = 1.0,
) -> Tensor:
    """Returns the states of some rows at the end of the chain, `(R, Z)`, given those at its start."""
    T = config.num_steps

    def predict(x_RZ: Tensor, t_R: Tensor) -> Tensor:
        x_R1Z, time_R1 = x_RZ.unsqueeze(1), (t_R / T).unsqueeze(1)
        return denoiser.predict(x_R1Z, time_R1, rows.condition_embedding, layout, rows.place).squeeze(1)

    return sample(
        predict,
        start_RZ,
        config.chain(),
        parameterisation=config.parameterisation,
        sampler=sampling.sampler,
        num_steps=sampling.num_steps,
        noise=rows.noise,
        temperature=temperature,
    )
