"""Lo-Hp behind the generator interface (arXiv 2511.00543; no equation of it could be read, so the choices are ours).

| the paper's words | here |
|---|---|
| stage I, weight preparation from offline optimisers | `raywgen.zoo`, trajectories as queries of a corpus |
| stage II, policy learning | `stages.PolicyStage` |
| sub-trajectory balance | `balance/`, one file per objective |
| hybrid policy: offline sub-trajectories in online rollouts | `paths.make_paths` |

The choices, and why:

- Every local target ends a sub-trajectory of its own, whose reward is the distance of its end to the target. So the
  policy is local, and training needs no task's loss.
- Policy and flow predict the end of a sub-trajectory. Both are then exact for a known target, from any state.
- Every coordinate has a balance of its own (`flow: factored`): one scalar residual for thousands of values says little
  about each of them.
- Stored sub-trajectories end at a draw from the reward, not at the target itself. At the target the reward would always
  be the same, and the flow could absorb what the policy should learn.
- Generation follows the policy's mean from one predicted end to the next, by default with one evaluation for each.
"""

from __future__ import annotations

import torch

from raywgen.generators.common.denoisers import Denoiser
from raywgen.generators.common.support_set import SupportSetGenerator
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Stage
from raywgen.generators.lohp.config import LoHpConfig, LoHpSampling
from raywgen.generators.lohp.policy import Policy
from raywgen.generators.lohp.stages import PolicyStage
from raywgen.weights import NormalizerTable


class LoHp(SupportSetGenerator[LoHpConfig]):
    """Learned local optimisation policies, conditioned on a task's support set and on an optimiser's name."""

    method = "lohp"
    Config = LoHpConfig
    Sampling = LoHpSampling

    def __init__(self, config: LoHpConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.policy = Policy(config, self.normalizers, data)

    @property
    def network(self) -> Denoiser:
        """Returns the network of the forward policy."""
        return self.policy.forward_net

    @property
    def policies(self) -> tuple[str, ...]:
        """The optimisers of the corpus, each of which has an embedding of its own."""
        return self.data.policies

    def all_stages(self) -> list[Stage]:
        """Returns the stage of policy learning; `raywgen.zoo` does the preparation."""
        return [PolicyStage(self.config, self.policy, self.normalizers)]

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Follows the policy; the temperature scales the spread of its steps."""
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, LoHpSampling)
        condition, layout, temperature = request.condition, request.layout, request.temperature
        path, net = self.config.path, self.policy.forward_net
        condition_embedding = self.policy.embed_forward_condition(condition, layout)
        x_BD = condition_embedding.new_zeros(len(condition), net.num_states(layout))
        each = sampling.num_steps // path.num_targets
        for i in range(path.num_targets):
            start_BD = x_BD
            for n in range(each):
                step_1 = torch.tensor([i * path.length + n * path.length // each])
                ends_BD = self.policy.ends(net, x_BD.unsqueeze(1), step_1, condition_embedding, layout).squeeze(1)
                x_BD = x_BD + (ends_BD - start_BD) / each
                if temperature > 0:
                    x_BD = x_BD + temperature * path.noise / each**0.5 * request.noise.normal(x_BD.shape[1])
        values_BD = self.normalizer(layout, request.normalizer).denormalise(net.decode(x_BD, condition, layout))
        return Generated(values_BD=values_BD, log_prob_B=None)
