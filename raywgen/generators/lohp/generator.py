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
- This path is differentiable, so a last stage may train the policy through it by the task's own loss.
- Networks longer than a window are trained on and written in windows, each of which balances by itself. The task's loss
  belongs to whole networks, so as a part of the reward it takes networks that are one window.
"""

from __future__ import annotations

from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser
from raywgen.generators.common.support_set import WindowGenerator
from raywgen.generators.common.writing import Rows, write_networks
from raywgen.generators.interface import DataSpec, GenerationRequest
from raywgen.generators.lohp.config import LoHpConfig, LoHpSampling
from raywgen.generators.lohp.following import follow
from raywgen.generators.lohp.policy import Policy
from raywgen.generators.lohp.stages import PolicyStage
from raywgen.generators.lohp.task_loss import LoHpTaskLossStage
from raywgen.generators.stage import Stage
from raywgen.weights import NormalizerTable


class LoHp(WindowGenerator[LoHpConfig]):
    """Learned local optimisation policies, conditioned on a task's support set and on an optimiser's name."""

    method = "lohp"
    Config = LoHpConfig
    Sampling = LoHpSampling

    def __init__(self, config: LoHpConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.policy = Policy(config, self.normalizers, data)
        if config.policy.task_reward > 0:
            self._check_whole()

    @property
    def network(self) -> Denoiser:
        """Returns the network of the forward policy."""
        return self.policy.forward_net

    @property
    def policies(self) -> tuple[str, ...]:
        """The optimisers of the corpus, each of which has an embedding of its own."""
        return self.data.policies

    def all_stages(self) -> list[Stage]:
        """Returns the stages of policy learning and of the task's loss; `raywgen.zoo` does the preparation."""
        return [
            PolicyStage(self.config, self.policy, self.normalizers),
            LoHpTaskLossStage(self.config, self.policy, self.normalizers),
        ]

    def write(self, request: GenerationRequest, groups: slice) -> Tensor:
        """Follows the policy; the temperature scales the spread of its steps."""
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, LoHpSampling)
        condition, layout, temperature = request.condition, request.layout, request.temperature
        net, condition_embedding = self.policy.forward_net, self.policy.embed_forward_condition(condition, layout)

        def followed(rows: Rows) -> Tensor:
            return follow(self.policy, rows, layout, sampling.num_steps, temperature)

        return write_networks(
            net, followed, condition_embedding, condition, layout, request.noise, sampling.max_rows, groups
        )

    def _check_whole(self) -> None:
        """Refuses a reward that takes whole networks where only windows of them are seen.

        Raises:
            ValueError: A layout is longer than a window.
        """
        net, config = self.policy.forward_net, self.config
        for layout in self.layouts:
            windows = net.all_windows(layout)
            if windows is not None:
                raise ValueError(
                    f"policy.task_reward={config.policy.task_reward:g} takes the task's loss of whole networks, but of "
                    f"those of {layout.num_values:,} values network.window={net.window} sees {windows.num_values:,} at "
                    "once; give policy.task_reward=0, or network.window=0 if whole networks fit into memory"
                )
