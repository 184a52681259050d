from __future__ import annotations

import pytest
import torch

from raywgen.tasks import FitData, Inputs, build_network
from raywgen.tasks.train_loop import Execution
from raywgen.zoo.measure import measure

# Legend: N networks, S samples, F features, X samples that tasks share.

NUM, NUM_SAMPLES = 3, 2500


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("shared", [True, False])
def test_networks_are_judged_the_same_on_parts_as_on_copies(execution: Execution, shared: bool) -> None:
    """More samples than training loss is measured on, and than go through a stack at once."""
    generator = torch.Generator().manual_seed(0)
    module = build_network({"name": "mlp", "widths": [784, 4, 3]}).eval()
    state_N = {
        name: torch.randn(NUM, *tensor.shape, generator=generator) for name, tensor in module.state_dict().items()
    }
    x_XF = torch.randn(4000, 784, generator=generator)
    parts = [Inputs(x_XF, torch.randperm(4000, generator=generator)[:NUM_SAMPLES]) for _ in range(NUM)]
    inputs = parts[:1] * NUM if shared else parts
    labels_NS = torch.randint(3, (NUM, NUM_SAMPLES), generator=generator)
    joined = FitData.joined(inputs, labels_NS)
    assert joined.x is x_XF
    x = inputs[0][:] if shared else torch.stack([one[:] for one in inputs])
    copies = FitData(x=x, labels_NS=labels_NS)
    loss_N, accuracy_N = measure(module, state_N, joined, joined, execution)
    wanted_N, wanted_accuracy_N = measure(module, state_N, copies, copies, execution)
    assert torch.equal(loss_N, wanted_N)
    assert torch.equal(accuracy_N, wanted_accuracy_N)
    assert len(set(loss_N.tolist())) == NUM
