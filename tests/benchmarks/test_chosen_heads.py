from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.chosen_heads import chosen_accuracies, chosen_classifier
from raywgen.benchmarks.few_shot_parts import Side
from raywgen.evaluation.few_shot import accuracy
from raywgen.generators import DataSpec
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.tasks import build_network
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.episodes import EpisodeSampler
from raywgen.tasks.image_tasks import images_of
from raywgen.tasks.images import channel_statistics
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.weights import Layout, Normalizer

FEATURES, WAY, NUM = 16, 3, 5


@pytest.mark.parametrize("shot", [1, 3])
def test_each_task_is_judged_by_its_own_examples_and_by_those_of_the_task_before(shot: int) -> None:
    torch.manual_seed(0)
    data = images_of("digits", 16, 1, None)
    sampler = EpisodeSampler(data, range(10), way=WAY, shot=shot, num_query=8, seed=0)
    side = Side(features=sampler.batch(0, 1), pixels=sampler, statistics=channel_statistics(data.x_SCHW))
    encoder = FrozenEncoder(Conv4(width=FEATURES, image_size=16), name="untrained", identity="")
    layout = Layout.from_state_dict(
        build_network({"name": "head", "num_features": FEATURES, "num_classes": WAY}).state_dict()
    )
    known = Normalizer(layout, torch.zeros(2), torch.full((2,), 0.5))
    config = McDiConfig(network=NetworkConfig(width=16, num_layers=1))
    generator = McDi(config, {layout.id: (layout, known)}, DataSpec(num_features=FEATURES, max_classes=WAY)).eval()
    found = chosen_accuracies(generator, encoder, side, NUM)
    made = [chosen_classifier(generator, encoder, side, index) for index in range(NUM)]
    for index in range(NUM):
        episode = side.pixels.episode(index)
        query = side.prepare(episode.query_x)
        assert found["adapt"][index] == accuracy(made[index](query), episode.query_y)
        assert found["shuffled_adapt"][index] == accuracy(made[index - 1](query), episode.query_y)
    # Even an untrained encoder tells digits apart, but not by the examples of other digits.
    assert float(found["adapt"].mean()) > float(found["shuffled_adapt"].mean()) + 0.1
