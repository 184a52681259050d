"""Stage II of Lo-Hp: hybrid-policy sub-trajectory balance. It needs no task's loss, unless this is part of the reward.

Stage I is the zoo: it makes trajectories of several optimisers, with and without SAM.

Here A counts sub-trajectories (one for each local target), L the steps of each, and D the values of a state, which may
be that of a window. Given condition and position, windows are independent of each other: policy, flow and the reward of
local targets factor over them, so each balances by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Place
from raywgen.generators.common.targets import normalised_targets
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.lohp.balance import (
    detailed_balance_loss,
    draw_stored,
    potentials,
    sub_trajectory_balance_loss,
    trajectory_balance_loss,
)
from raywgen.generators.lohp.config import LoHpConfig, PolicyConfig
from raywgen.generators.lohp.kernels import bridge_log_prob, forward_log_prob
from raywgen.generators.lohp.paths import make_paths
from raywgen.generators.lohp.policy import EmbeddedCondition, Policy
from raywgen.generators.lohp.replay import ReplayBuffer, Rollout
from raywgen.generators.stage import ParameterUse, Stage, StageLoss, StageNeeds
from raywgen.nn.quantisers import AllReduce
from raywgen.weights import KeyedNoise, Layout, NormalizerTable, WeightBatch, Windows


class PolicyStage(Stage):
    """Trains policy and flow to balance every sub-trajectory of rollouts and stored trajectories."""

    name = "policy"
    is_optional = True

    def __init__(self, config: LoHpConfig, policy: Policy, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.policy = policy
        self.normalizers = normalizers
        self._replay = ReplayBuffer(config.policy.replay_size)
        self._new: list[Rollout] = []

    @property
    def config(self) -> PolicyConfig:
        """Returns the settings of the policy's stage."""
        return self._config.policy

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks and local targets; whole networks only without windows, or for the task's loss."""
        whole_networks = self.policy.forward_net.window == 0 or self.config.task_reward > 0
        return StageNeeds(num_targets=self._config.path.num_targets, whole_networks=whole_networks)

    @property
    def bytes_per_value(self) -> float:
        """Every step of a sub-trajectory evaluates the policy, and every state within it the flow."""
        path, config = self._config.path, self.config
        num_evaluations = path.num_targets * (path.length if config.objective == "cloning" else 2 * path.length - 1)
        return 8 * path.num_targets + num_evaluations * (8 + self.policy.forward_net.bytes_per_value)

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a random window of each network that is longer than the policy's, the same for all its targets."""
        return self.policy.forward_net.draw_windows(layout, noise)

    @property
    def parameter_use(self) -> ParameterUse:
        """The policy is called again and again to roll out its paths."""
        return "whole"

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the networks from samples; policy and flow may start from known good weights."""
        self.policy.setup(batches)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the balance loss of this batch's paths, averaged with that of a replayed batch if there is one."""
        batch = self.see(batch, noise)
        if self.config.objective == "cloning":
            return self._cloning(batch)
        embedded = self.policy.embed_condition(batch.condition, batch.layout, batch.windows)
        targets_BAD = self._targets(batch)
        rollout = self._roll_out(batch, targets_BAD, embedded, noise)
        loss, metrics = self._balance(rollout, targets_BAD, embedded)
        if self.training and self.config.replay_size:
            if len(self._replay):
                past = self._replay.draw(self._step(batch))
                embedded = self.policy.embed_condition(past.batch.condition, past.batch.layout, past.batch.windows)
                replayed, _ = self._balance(past, self._targets(past.batch), embedded)
                loss = (loss + replayed) / 2
            self._new.append(rollout)
        return StageLoss(loss=loss, metrics=metrics)

    def after_step(self, all_reduce: AllReduce) -> None:
        """Adds the rollouts of the step, which may have been taken in several parts, to the replay buffer."""
        if self._new:
            self._replay.add(Rollout.join(self._new))
            self._new.clear()

    def state(self, all_reduce: AllReduce) -> dict[str, Tensor]:
        """Returns the replay buffer's paths of all workers, `(batch_size, A, L + 1, D)`, by the step that made them."""
        state = {}
        for rollout in self._replay:
            whole = rollout.states_BALD.new_zeros(self.config.batch_size, *rollout.states_BALD.shape[1:])
            whole[self._places(rollout.batch)] = rollout.states_BALD
            state[f"rollout.{self._step(rollout.batch)}"] = all_reduce(whole)
        return state

    def set_state(self, state: dict[str, Tensor], batch_at: Callable[[int], WeightBatch]) -> None:
        """Restores this worker's part of the replay buffer, with the batches that its paths were made for."""
        for step in sorted(int(name.removeprefix("rollout.")) for name in state):
            batch = batch_at(step)
            whole = state[f"rollout.{step}"].to(batch.values_BD.device)
            self._replay.add(Rollout(batch=batch, states_BALD=whole[self._places(batch)]))

    def _cloning(self, batch: WeightBatch) -> StageLoss:
        """Fits the forward policy to stored steps alone, by the squared error of the predicted ends."""
        k, L = self._config.path.num_targets, self._config.path.length
        targets_BAD = self._targets(batch)
        starts_BAD = torch.cat([torch.zeros_like(targets_BAD[:, :1]), targets_BAD[:, :-1]], dim=1)
        share_L1 = (torch.arange(L, device=targets_BAD.device) / L).unsqueeze(1)
        states_BALD = starts_BAD.unsqueeze(2) + share_L1 * (targets_BAD - starts_BAD).unsqueeze(2)
        embedded = self.policy.embed_forward_condition(batch.condition, batch.layout)
        net, step_n = self.policy.forward_net, torch.arange(k * L)
        place = net.place(batch.layout, batch.windows)
        ends_BnD = self.policy.ends(net, states_BALD.flatten(1, 2), step_n, embedded, batch.layout, place)
        loss = _mean_square(ends_BnD.unflatten(1, (k, L)) - targets_BAD.unsqueeze(2), place)
        return StageLoss(loss=loss, metrics={"distance": loss.detach()})

    def _roll_out(
        self, batch: WeightBatch, targets_BAD: Tensor, embedded: EmbeddedCondition, noise: KeyedNoise
    ) -> Rollout:
        config, net = self.config, self.policy.forward_net

        def ends(x_BD: Tensor, step: int) -> Tensor:
            at = torch.tensor([step])
            x_B1D = x_BD.unsqueeze(1)
            return self.policy.ends(net, x_B1D, at, embedded.forward, batch.layout, embedded.place).squeeze(1)

        is_stored_BA = draw_stored(noise, targets_BAD.shape[1], config.mix, config.hybrid)
        left = max(0.0, 1 - self._step(batch) / max(1, config.exploration_steps)) if self.training else 0.0
        states_BALD = make_paths(
            ends,
            targets_BAD,
            is_stored_BA,
            noise,
            self._config.path,
            hybrid=config.hybrid,
            exploration=config.exploration * left,
        )
        return Rollout(batch=batch, states_BALD=states_BALD)

    def _balance(
        self, rollout: Rollout, targets_BAD: Tensor, embedded: EmbeddedCondition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the objective over all sub-trajectories, and metrics."""
        g_BALD, ends_BALD = self._potentials(rollout, targets_BAD, embedded)
        place = embedded.place
        if self.config.flow == "joint":
            # Divided by the root of D, so that a sum over thousands of values keeps the size of one.
            real_BALD = g_BALD if place is None else g_BALD * place.is_real_BX[:, None, None]
            g_BALD = real_BALD.sum(dim=-1, keepdim=True) / _num_values(targets_BAD, place) ** 0.5
        elif place is not None:
            g_BALD = g_BALD * place.weight_BX[:, None, None].sqrt()  # Every objective is quadratic in g.
        loss = self._objective(g_BALD.flatten(0, 1))
        distance = _mean_square(ends_BALD - targets_BAD.unsqueeze(2), place)
        return loss, {"balance": loss.detach(), "distance": distance.detach()}

    def _objective(self, g_NLD: Tensor) -> Tensor:
        match self.config.objective:
            case "trajectory":
                return trajectory_balance_loss(g_NLD)
            case "detailed":
                return detailed_balance_loss(g_NLD)
            case _:
                return sub_trajectory_balance_loss(g_NLD, self.config.lam)

    def _potentials(self, rollout: Rollout, targets_BAD: Tensor, embedded: EmbeddedCondition) -> tuple[Tensor, Tensor]:
        """Returns `g`, whose differences are the residuals, `(B, A, L + 1, D)`, and the policy's predicted ends."""
        path, layout = self._config.path, rollout.batch.layout
        B, k, D = targets_BAD.shape
        L, sigma = path.length, path.sigma
        states_BALD, start_BA1D = rollout.states_BALD, rollout.states_BALD[:, :, :1]
        x_BALD, next_BALD = states_BALD[:, :, :-1], states_BALD[:, :, 1:]
        step_AL = torch.arange(k * L).view(k, L)

        def said(net, x: Tensor, step: Tensor, known: Tensor) -> Tensor:
            ends = self.policy.ends(net, x.flatten(1, 2), step.flatten(), known, layout, embedded.place)
            return ends.unflatten(1, (k, -1))

        ends_BALD = said(self.policy.forward_net, x_BALD, step_AL, embedded.forward)
        log_forward = forward_log_prob(next_BALD, x_BALD, (ends_BALD - start_BA1D) / L, sigma)
        pinned = start_BA1D
        if self.policy.backward_net is not None:
            assert embedded.backward is not None
            moved = said(self.policy.backward_net, next_BALD, step_AL + 1, embedded.backward)
            pinned = start_BA1D + self.policy.backward_share * moved
        n_L1, zero = torch.arange(L, device=states_BALD.device).unsqueeze(1), torch.zeros((), device=states_BALD.device)
        log_backward = bridge_log_prob(x_BALD, next_BALD, pinned, n_L1, sigma)
        log_z = embedded.log_z_BA.view(B, k, 1, 1) / _num_values(targets_BAD, embedded.place)
        log_flow = [log_z.expand(B, k, 1, D)]
        if L > 1:
            flow_ends = said(self.policy.flow_net, states_BALD[:, :, 1:-1], step_AL[:, 1:], embedded.flow)
            mean = start_BA1D + n_L1[1:] / L * (flow_ends - start_BA1D)
            inner = forward_log_prob(states_BALD[:, :, 1:-1], mean, zero, sigma * n_L1[1:].sqrt())
            log_flow.append(inner + log_z)
        log_flow.append(self._log_reward(rollout, targets_BAD).unsqueeze(2))
        g = potentials(torch.cat(log_flow, dim=2).flatten(0, 1), log_forward.flatten(0, 1), log_backward.flatten(0, 1))
        return g.unflatten(0, (B, k)), ends_BALD

    @torch.no_grad()
    def _log_reward(self, rollout: Rollout, targets_BAD: Tensor) -> Tensor:
        """Returns `log N(x; theta, noise^2)` of the ends, `(B, A, D)`, less the weighted task's loss."""
        ends_BAD = rollout.states_BALD[:, :, -1]
        reward = forward_log_prob(ends_BAD, targets_BAD, torch.zeros_like(targets_BAD), self._config.path.noise)
        if self.config.task_reward > 0:
            layout, net = rollout.batch.layout, self.policy.forward_net
            normalised_BD = net.decode(ends_BAD[:, -1], rollout.batch.condition, layout)
            loss_B, _ = task_loss(self.normalizers[layout.id][1].denormalise(normalised_BD), rollout.batch)
            reward[:, -1] -= self.config.task_reward * loss_B.unsqueeze(1) / reward.shape[-1]
        return reward

    def _step(self, batch: WeightBatch) -> int:
        """Returns the step of a batch, from its sample index, which is the same on every worker and after a resume."""
        return int(batch.sample_index_B[0]) // self.config.batch_size

    def _places(self, batch: WeightBatch) -> Tensor:
        """Returns the rows of this worker's samples in the batch of all workers."""
        return batch.sample_index_B % self.config.batch_size

    def _targets(self, batch: WeightBatch) -> Tensor:
        targets_BAD = normalised_targets(batch, self.normalizers)
        return self.policy.forward_net.encode(targets_BAD, batch.condition, batch.layout, batch.windows)


def _mean_square(error_BALD: Tensor, place: Place | None) -> Tensor:
    """Returns the mean squared error, over values that exist where these are windows."""
    square_BALD = error_BALD.square()
    return square_BALD.mean() if place is None else (square_BALD * place.weight_BX[:, None, None]).mean()


def _num_values(targets_BAD: Tensor, place: Place | None) -> int | Tensor:
    """Returns the number of values of a state, for windows that of those that exist, `(B, 1, 1, 1)`."""
    return targets_BAD.shape[-1] if place is None else place.is_real_BX.sum(dim=-1).view(-1, 1, 1, 1)
