from __future__ import annotations

import torch

from raywgen.generation.judge import judge
from raywgen.tasks.standing import standing
from tests.builders import condition, layout_of, network


def test_a_network_is_judged_by_the_labels_that_the_user_gave() -> None:
    """With labels that it answers rightly, and with those that it answers wrongly."""
    module, x_SF = network().eval(), condition(1, num_samples=16).samples_BSF[0]
    logits_SC = module(x_SF).detach()
    # Labels of both classes, whatever this network prefers.
    right_S = (logits_SC[:, 1] - logits_SC[:, 0] > (logits_SC[:, 1] - logits_SC[:, 0]).median()).long()
    values_D = layout_of().flatten(module.state_dict())
    for labels_S in (right_S, 1 - right_S):
        found = judge(module, layout_of(), values_D, x_SF, labels_S)
        expected = standing(logits_SC, labels_S)
        assert abs(found.loss - expected.loss) < 1e-5
        assert found.share_right == float((logits_SC.argmax(dim=1) == labels_S).float().mean())
    assert not torch.equal(logits_SC.argmax(dim=1), right_S)
