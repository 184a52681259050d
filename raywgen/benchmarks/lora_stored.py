"""Adapters for new tasks from the stored ones alone: their mean, the nearest, and ridge regression on conditions.

Only the product of an adapter's two factors matters, so regression is to products: its answer is a weighted sum of the
stored products, which is brought to the rank again by singular values.

Shape letters beyond the legend in `raywgen.weights`: T tasks, N stored adapters, E values of a condition's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raywgen.tasks import Task
from raywgen.tasks.sentence_tasks import encode_sentences
from raywgen.weights import Condition, Layout

STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 5))
_INSTRUCTION_TOKENS = 64
_FACTORS = (".lora_A", ".lora_B")


def instruction_features(texts: Sequence[str], task: Task) -> Tensor:
    """Returns features `(T, H)` of instructions by the tasks' own text encoder, each of unit length."""
    base, first_layer = task.recipe["base"], task.recipe["first_layer"]
    samples_TF = encode_sentences(list(texts), base, first_layer, _INSTRUCTION_TOKENS)
    return torch.nn.functional.normalize(samples_TF[:, : task.num_condition_features], dim=1)


def example_features(condition: Condition, num_features: int) -> Tensor:
    """Returns the difference of the mean features of two classes `(T, E)`, of unit length."""
    samples_TSF, labels_TS1 = condition.samples_BSF[..., :num_features], condition.labels_BS.unsqueeze(-1)
    means = [(samples_TSF * (labels_TS1 == side)).sum(1) / (labels_TS1 == side).sum(1).clamp(min=1) for side in (0, 1)]
    return torch.nn.functional.normalize(means[1] - means[0], dim=1)


def nearest(features_TE: Tensor, stored_NE: Tensor) -> Tensor:
    """Returns the place `(T,)` of the stored condition at the smallest angle to each."""
    return (features_TE @ stored_NE.T).argmax(dim=1)


def regression_weights(features_TE: Tensor, stored_NE: Tensor, strength: float) -> Tensor:
    """Returns weights `(T, N)` by which ridge regression on conditions sums what is stored, about its mean."""
    mean_E = stored_NE.mean(dim=0)
    known_NE, new_TE = stored_NE - mean_E, features_TE - mean_E
    gram_NN = known_NE @ known_NE.T
    scaled = strength * gram_NN.diagonal().mean()
    solved_TN = torch.linalg.solve(gram_NN + scaled * torch.eye(len(gram_NN)), known_NE @ new_TE.T).T
    return solved_TN + (1 - solved_TN.sum(dim=1, keepdim=True)) / len(stored_NE)


def combined(layout: Layout, stored_ND: Tensor, weight_TN: Tensor) -> Tensor:
    """Returns adapters `(T, D)` whose products are nearest to weighted sums of the stored adapters' products.

    Other tensors are summed as they are.

    Args:
        layout: Layout of the adapters.
        stored_ND: Stored adapters.
        weight_TN: Weights.
    """
    state_N = layout.unflatten(stored_ND)
    rows = []
    for weight_N in weight_TN:
        state = {}
        for name, tensor in state_N.items():
            if name.endswith(_FACTORS[1]):
                continue
            if name.endswith(_FACTORS[0]):
                b_name = name.removesuffix(_FACTORS[0]) + _FACTORS[1]
                state[name], state[b_name] = _factors(tensor, state_N[b_name], weight_N)
            else:
                state[name] = torch.einsum("n,n...->...", weight_N, tensor)
        rows.append(layout.flatten(state))
    return torch.stack(rows)


def _factors(a_NRI: Tensor, b_NOR: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors of the best approximation of `sum_n weight_n B_n A_n` by their rank."""
    rank = a_NRI.shape[1]
    product_OI = torch.einsum("n,nor,nri->oi", weight_N, b_NOR, a_NRI)
    left_OK, size_K, right_KI = torch.linalg.svd(product_OI, full_matrices=False)
    root_R = size_K[:rank].sqrt()
    return root_R.unsqueeze(1) * right_KI[:rank], left_OK[:, :rank] * root_R
