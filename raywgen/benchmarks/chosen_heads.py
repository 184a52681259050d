"""Scores what `raywgen adapt` makes of the support set of each episode, beside the heads that it chooses from.

Shape letters beyond the legend in `raywgen.weights`: B episodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.benchmarks.few_shot_parts import Side
from raywgen.evaluation.few_shot import accuracy
from raywgen.generation import Classifier
from raywgen.generation.fill import ADAPT_INSTRUCTION
from raywgen.generation.heads import Drawn, choose_classifier
from raywgen.generators import Generator
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.user_data import UserData


@torch.no_grad()
def chosen_accuracies(generator: Generator, encoder: FrozenEncoder, side: Side, num_episodes: int) -> dict[str, Tensor]:
    """Returns the accuracy `(B,)` of the chosen heads, `adapt`, and of those of another task, `shuffled_adapt`.

    Ink and paper are not among the choices: a benchmark exchanges them for all methods, or for none.

    Args:
        generator: The generator whose head is one of those that are chosen from.
        encoder: Its encoder.
        side: The episodes.
        num_episodes: B; each has the support set of the one before it in `shuffled_adapt`, the first that of the last.
    """
    own, shuffled = [], []
    before = chosen_classifier(generator, encoder, side, num_episodes - 1)
    for index in range(num_episodes):
        episode, made = side.pixels.episode(index), chosen_classifier(generator, encoder, side, index)
        query = side.prepare(episode.query_x)
        own.append(accuracy(made(query), episode.query_y))
        shuffled.append(accuracy(before(query), episode.query_y))
        before = made
    return {"adapt": torch.stack(own), "shuffled_adapt": torch.stack(shuffled)}


def chosen_classifier(generator: Generator, encoder: FrozenEncoder, side: Side, index: int) -> Classifier:
    """Returns what `raywgen adapt` makes of the support set of one episode; arguments as in `chosen_accuracies`."""
    episode = side.pixels.episode(index)
    data = UserData(x=side.prepare(episode.support_x), y_S=episode.support_y)
    return choose_classifier(generator, encoder, None, data, "best", Drawn(instruction=ADAPT_INSTRUCTION))
