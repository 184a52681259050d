"""Forward policy, backward policy and flow of Lo-Hp, on Gaussian steps from one local target to the next.

A sub-trajectory starts at a state a and has L steps of standard deviation sigma. Its end x has the reward

    log R(x) = log N(x; theta, L sigma^2)                      theta: the local target

The forward policy predicts the end and moves there in even steps, `P_F = N(x + (theta_hat - a) / L, sigma^2)`. The
backward policy is the Brownian bridge pinned at a, or a learned one that is initialised as this bridge. The flow
predicts the end, too:

    log F(x_n) = log N(x_n; a + n (theta_hat_F - a) / L, n sigma^2) + log Z,   log F(x_L) = log R(x_L)

With theta_hat = theta_hat_F = theta and log Z = 0 every sub-trajectory is in balance, whatever a is. So no network has
to model a curvature, and a policy that has erred is led to the right target from its current state.

Here A counts sub-trajectories (one for each local target), L the steps of each, D the values of a state, and T the
values of an embedded condition.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raywgen.generators.common.denoisers import Denoiser, Place, build_denoiser
from raywgen.generators.interface import DataSpec
from raywgen.generators.lohp.config import LoHpConfig
from raywgen.weights import Condition, Layout, NormalizerTable, WeightBatch, Windows


class EmbeddedCondition(NamedTuple):
    """The embedded conditions of a batch, for each network that reads them, and `log Z` of each sub-trajectory.

    Where the batch holds windows, `place` says where they lie, and `log Z` is that of a window.
    """

    forward: Tensor
    flow: Tensor
    backward: Tensor | None
    log_z_BA: Tensor
    place: Place | None = None


class Policy(nn.Module):
    """Predicts the end of each sub-trajectory from any of its states.

    Args:
        config: Sizes and path.
        normalizers: Layouts with their normalisers.
        data: Sizes of support sets, and the optimisers that a condition may name.
    """

    def __init__(self, config: LoHpConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__()
        self.path, self.names = config.path, data.policies
        self.forward_net = build_denoiser(config.network, normalizers, data)
        self.flow_net = build_denoiser(config.network, normalizers, data)
        is_learned = config.policy.backward == "learned"
        self.backward_net = build_denoiser(config.network, normalizers, data) if is_learned else None
        width = self.forward_net.condition_width()
        self.names_net = nn.Parameter(torch.zeros(max(1, len(self.names)), width))
        self.log_z_net = nn.Linear(width, self.path.num_targets)
        # Zero, so that it is initialised as the bridge. Not a scalar, which DeepSpeed cannot send to other workers.
        self.backward_share = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.log_z_net.weight)
        nn.init.zeros_(self.log_z_net.bias)

    def setup(self, batches: Iterable[WeightBatch]) -> None:
        """Initialises the networks from samples; policy and flow may start from known good weights."""
        seen = list(batches)
        for net in (self.forward_net, self.flow_net):
            net.setup(seen, predicts_weights=True)
        if self.backward_net is not None:
            self.backward_net.setup(seen, predicts_weights=False)

    def embed_condition(
        self, condition: Condition, layout: Layout, windows: Windows | None = None
    ) -> EmbeddedCondition:
        """Embeds support sets, the named optimisers, and where windows lie."""
        known = (condition.samples_BSF, condition.labels_BS, layout)
        named = self._named(condition)
        nets = (self.forward_net, self.flow_net, self.backward_net)
        forward, flow, backward = (None if net is None else _with(net.embed_condition(*known), named) for net in nets)
        assert forward is not None
        assert flow is not None
        pooled = flow if flow.dim() == 2 else flow.mean(dim=1)
        log_z_BA, place = self.log_z_net(pooled), self.forward_net.place(layout, windows)
        return EmbeddedCondition(forward=forward, flow=flow, backward=backward, log_z_BA=log_z_BA, place=place)

    def embed_forward_condition(self, condition: Condition, layout: Layout) -> Tensor:
        """Embeds the condition of the forward policy alone, as generation needs it."""
        condition_embedding = self.forward_net.embed_condition(condition.samples_BSF, condition.labels_BS, layout)
        return _with(condition_embedding, self._named(condition))

    def ends(
        self,
        net: Denoiser,
        x_BnD: Tensor,
        step_n: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Evaluates a network on states `(B, n, D)` at steps int64 `(n,)` of the whole path; returns `(B, n, D)`."""
        time_Bn = (step_n / self.path.num_steps).expand(x_BnD.shape[:2]).to(x_BnD.device)
        return net.predict(x_BnD, time_Bn, condition_embedding, layout, place)

    def _named(self, condition: Condition) -> Tensor:
        """Returns the embedding of each named optimiser, `(B, T)`; without a name, the mean of all."""
        index_of = {name: number for number, name in enumerate(self.names)}
        mean_T = self.names_net.mean(dim=0)
        named = condition.policies or ("",) * len(condition)
        return torch.stack([self.names_net[index_of[name]] if name in index_of else mean_T for name in named])


def _with(condition_embedding: Tensor, named_BT: Tensor) -> Tensor:
    """Adds the optimiser's embedding, equally for all classes of a head, so that their order still does not matter."""
    return condition_embedding + (named_BT if condition_embedding.dim() == 2 else named_BT.unsqueeze(1))
