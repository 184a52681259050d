"""Makes the condition of a generator from a user's instruction and data, and checks it against the training data."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators import Generator
from raywgen.tasks.no_task import blank_condition
from raywgen.tasks.user_data import ConditionError
from raywgen.weights import Condition


def make_condition(
    generator: Generator, instruction: str, data: tuple[Tensor, Tensor] | None, policy: str = ""
) -> Condition:
    """Makes one condition from what a user gives; a generator trained on weights alone takes no data.

    Raises:
        ConditionError: The instruction is empty, samples and labels do not fit the generator's data, or the generator
            has learned no optimiser of that name, or several.
    """
    if not generator.data.has_tasks:
        if data is not None:
            raise ConditionError(
                "this generator was trained on weights alone and takes no data; leave data out, or describe its "
                "corpus by `raywgen corpus describe` and train anew"
            )
        return blank_condition(instruction)
    if data is None:
        raise ConditionError("data is missing: this generator writes for a task; give labelled samples of it")
    samples, labels = (torch.as_tensor(array) for array in data)
    if not instruction.strip():
        raise ConditionError("the instruction is empty; say in words what the network should do")
    if not samples.dim() or labels.dim() != 1:
        raise ConditionError(
            f"data holds samples {list(samples.shape)} and labels {list(labels.shape)}; "
            "give samples of shape [S, ...] and labels of shape [S]"
        )
    if len(samples) != len(labels) or not len(labels):
        raise ConditionError(f"data holds {len(samples)} samples and {len(labels)} labels; give one label per sample")
    samples_SF = samples.reshape(len(samples), -1).to(torch.float32)
    spec = generator.data
    num_values = spec.num_sample_values or spec.num_features
    if samples_SF.shape[1] != num_values:
        raise ConditionError(
            f"a sample has {samples_SF.shape[1]} values, the generator was trained on {num_values}; "
            "give data of the same form"
        )
    if not bool(samples_SF.isfinite().all()):
        raise ConditionError("data holds NaN or infinity; drop those samples")
    labels_S = labels.to(torch.int64)
    most = generator.max_classes
    if int(labels_S.min()) < 0 or (most is not None and int(labels_S.max()) >= most):
        raise ConditionError(f"labels must lie between 0 and {'any number' if most is None else most - 1}")
    return Condition(
        instructions=(instruction,),
        samples_BSF=samples_SF.unsqueeze(0),
        labels_BS=labels_S.unsqueeze(0),
        policies=(_known_policy(generator, policy),),
    )


def _known_policy(generator: Generator, wanted: str) -> str:
    """Returns the one optimiser of this name, or with this part of a name."""
    names = generator.policies
    if not wanted or wanted in names:
        return wanted
    found = [name for name in names if wanted in name]
    if len(found) != 1:
        known = f"give one of {', '.join(names)}" if names else f"leave it out; '{generator.method}' learns none"
        raise ConditionError(f"policy={wanted}: {known}")
    return found[0]
