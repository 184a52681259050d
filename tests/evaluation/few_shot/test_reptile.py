import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.evaluation.few_shot import (
    FewShotError,
    Learner,
    ReptileConfig,
    ReptileState,
    accuracy_by_steps,
    fewest_steps,
    train_reptile,
    warm_start,
)
from raywgen.evaluation.few_shot.reptile import meta_update, minibatches
from raywgen.tasks.episodes import EpisodeSampler
from raywgen.tasks.images import ImageData, normalise
from raywgen.tasks.networks.conv4 import Conv4

# Legend: S samples, C channels, H height, W width.

CONFIG = ReptileConfig(
    learning_rate=3e-3, inner_steps=3, inner_batch=6, meta_batch=2, train_shots=4, num_meta_steps=40, meta_rate=0.8
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations this small only wait for each other on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _prepare(x: Tensor) -> Tensor:
    """In double precision: a bias before batch norm has no gradient, of whose rounding errors Adam would make steps."""
    return normalise(x, mean=[0.5], std=[0.25]).double()


def _data(num_classes: int = 12) -> ImageData:
    """Each class a pattern of its own with noise, 16x16."""
    rng = torch.Generator().manual_seed(0)
    pattern_NCHW = torch.rand(num_classes, 1, 4, 4, generator=rng).repeat_interleave(4, -1).repeat_interleave(4, -2)
    clean_SCHW = pattern_NCHW.repeat_interleave(8, dim=0)
    noisy_SCHW = clean_SCHW + 0.2 * torch.randn(clean_SCHW.shape, generator=rng)
    return ImageData(
        name="patterns",
        x_SCHW=(255 * noisy_SCHW.clamp(0, 1)).to(torch.uint8),
        y_S=torch.arange(num_classes).repeat_interleave(8),
        class_names=tuple(map(str, range(num_classes))),
        source="drawn",
    )


def _sampler(classes: range, shot: int, num_query: int = 1) -> EpisodeSampler:
    return EpisodeSampler(_data(), classes, way=3, shot=shot, num_query=num_query, seed=0)


def _module() -> nn.Module:
    torch.manual_seed(0)
    return Conv4(num_classes=3, width=8, image_size=16).double()


def _one_task(start: ReptileState, sampler: EpisodeSampler, index: int) -> dict[str, Tensor]:
    """Weights after one task, by torch's plain Adam in plain memory format."""
    module = _module().train()
    module.load_state_dict(start.weights, strict=False)
    optimizer = torch.optim.Adam(module.parameters(), lr=CONFIG.learning_rate, betas=(0.0, 0.999), foreach=False)
    for name, parameter in module.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(start.num_steps)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": start.second_moments[name].clone(),
        }
    episode = sampler.episode(index)
    x_SCHW = _prepare(episode.support_x)
    for batch_T in minibatches(12, CONFIG.inner_batch, CONFIG.inner_steps, seed=CONFIG.seed, index=index):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x_SCHW[batch_T]), episode.support_y[batch_T]).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_meta_steps_go_to_the_mean_of_two_single_tasks(num_workers: int) -> None:
    """Two of them: the second goes on with Adam's memory of the first, at a lower meta rate."""
    sampler, module = _sampler(range(8), CONFIG.train_shots), _module()
    config = replace(CONFIG, num_meta_steps=2)
    start = ReptileState.of(module)
    first = train_reptile(module, sampler, replace(CONFIG, num_meta_steps=1), prepare=_prepare)
    both = train_reptile(module, sampler, config, prepare=_prepare, num_workers=num_workers)
    assert (first.num_steps, both.num_steps) == (3, 6)
    for before, after, tasks, rate in ((start, first, (0, 1), 0.8), (first, both, (2, 3), 0.4)):
        ends = [_one_task(before, sampler, index) for index in tasks]
        for name, phi in before.weights.items():
            expected = phi + rate * ((ends[0][name] - phi) + (ends[1][name] - phi)) / 2
            torch.testing.assert_close(after.weights[name], expected, rtol=0, atol=1e-9)


def test_without_carried_moments_each_task_begins_as_the_first() -> None:
    sampler, module = _sampler(range(8), CONFIG.train_shots), _module()
    config = replace(CONFIG, carry_moments=False, num_meta_steps=2)
    end = train_reptile(module, sampler, config, prepare=_prepare)
    assert end.num_steps == 0
    assert not any(bool(moment.any()) for moment in end.second_moments.values())


def test_a_symmetric_head_is_the_mean_over_all_ways_to_number_the_classes() -> None:
    config = replace(CONFIG, head_learning_rate=0.02, inner_steps=4)
    learner = Learner(_module(), config)
    start = ReptileState.of(_module()).with_symmetric_head()
    episode = _sampler(range(8), CONFIG.train_shots).episode(0)
    x_SCHW, batches_KT = _prepare(episode.support_x), minibatches(12, 6, 4, seed=0)
    ends = []
    for order in itertools.permutations(range(3)):
        learner.restart(start)
        learner.learn(x_SCHW, torch.tensor(order)[episode.support_y], batches_KT)
        ends.append(learner.state())
    mean = meta_update(start, ends, rate=1.0)
    alike = ends[0].with_symmetric_head()
    for name, value in mean.weights.items():
        torch.testing.assert_close(alike.weights[name], value, rtol=0, atol=1e-9)
        torch.testing.assert_close(alike.second_moments[name], mean.second_moments[name], rtol=0, atol=1e-9)
    config = replace(CONFIG, symmetric_head=True, num_meta_steps=1)
    trained = train_reptile(_module(), _sampler(range(8), CONFIG.train_shots), config, prepare=_prepare)
    assert torch.equal(trained.weights["head.weight"], trained.weights["head.weight"][:1].expand(3, -1))


def test_the_head_may_have_a_rate_of_its_own_and_steps_be_in_bfloat16() -> None:
    module = _module().float()
    start = ReptileState.of(module)
    episode = _sampler(range(8), CONFIG.train_shots).episode(0)
    x_SCHW, batches_KT = _prepare(episode.support_x).float(), minibatches(12, 12, 1, seed=0)
    moved = []
    for bf16 in (False, True):
        learner = Learner(module, replace(CONFIG, head_learning_rate=0.02, bf16=bf16))
        learner.restart(start)
        learner.learn(x_SCHW, episode.support_y, batches_KT)
        weights = learner.state().weights
        assert {value.dtype for value in weights.values()} == {torch.float32}
        moved.append({name: value - start.weights[name] for name, value in weights.items()})
        learner.normalise_by(x_SCHW)
        assert learner.logits(x_SCHW).dtype == torch.float32
    for step in moved:
        # Adam's first step is as long as the rate for each value that has a gradient.
        assert step["head.weight"].abs().max().item() == pytest.approx(0.02, rel=1e-3)
        assert step["blocks.3.conv.weight"].abs().max().item() == pytest.approx(CONFIG.learning_rate, rel=1e-3)
    alike = torch.sign(moved[0]["head.weight"]) == torch.sign(moved[1]["head.weight"])
    assert alike.float().mean() > 0.9


def test_images_of_a_task_may_be_augmented_alike_by_any_number_of_workers() -> None:
    sampler, module = _sampler(range(8), CONFIG.train_shots), _module()
    config = replace(CONFIG, augment="shift-2", num_meta_steps=1)
    plain = train_reptile(module, sampler, replace(config, augment=""), prepare=_prepare)
    shifted, again = (train_reptile(module, sampler, config, prepare=_prepare, num_workers=num) for num in (1, 2))
    name = "blocks.0.conv.weight"
    assert not torch.allclose(shifted.weights[name], plain.weights[name])
    torch.testing.assert_close(shifted.weights[name], again.weights[name], rtol=0, atol=0)


def test_training_beats_chance_on_new_classes_and_adaptation_the_start() -> None:
    sampler, test = _sampler(range(8), CONFIG.train_shots), _sampler(range(8, 12), 1, num_query=4)
    module, progress = _module(), []
    start = train_reptile(module, sampler, CONFIG, prepare=_prepare, on_progress=lambda *done: progress.append(done))
    assert progress[-1] == (40, 40)
    learners = [Learner(module, CONFIG), Learner(module, CONFIG)]
    steps = [0, 2, 5, 10]
    found = accuracy_by_steps(learners, start, test, prepare=_prepare, num_episodes=20, num_steps=steps)
    assert found.shape == (20, 4)
    assert abs(found[:, 0].mean() - 1 / 3) < 0.2
    assert found[:, 3].mean() > 0.8
    alone = accuracy_by_steps(learners[:1], start, test, prepare=_prepare, num_episodes=3, num_steps=steps)
    torch.testing.assert_close(alone, found[:3], rtol=0, atol=0)


def test_adapt_is_what_evaluation_does_and_a_restart_forgets() -> None:
    sampler = _sampler(range(8, 12), 2, num_query=3)
    module = _module()
    learner, start = Learner(module, CONFIG), ReptileState.of(module)
    by_steps = accuracy_by_steps([learner], start, sampler, prepare=_prepare, num_episodes=1, num_steps=[2, 6])
    episode = sampler.episode(0)
    for column, steps in enumerate((2, 6)):
        learner.adapt(start, _prepare(episode.support_x), episode.support_y, steps)
        guess_S = learner.logits(_prepare(episode.query_x)).argmax(dim=1)
        assert (guess_S == episode.query_y).float().mean() == by_steps[0, column]


def test_queries_are_normalised_by_the_support_set_alone() -> None:
    module = _module()
    learner = Learner(module, CONFIG)
    episode = _sampler(range(8, 12), 2, num_query=3).episode(0)
    support_x, query_x = _prepare(episode.support_x), _prepare(episode.query_x)
    learner.adapt(ReptileState.of(module), support_x, episode.support_y, 2)
    together, one_by_one = learner.logits(query_x), torch.cat([learner.logits(x[None]) for x in query_x])
    torch.testing.assert_close(together, one_by_one)
    adapted = _module().train()
    adapted.load_state_dict(learner.state().weights, strict=False)
    torch.testing.assert_close(together, _by_support(adapted, support_x, query_x))


@torch.no_grad()
def _by_support(module: Any, support_SCHW: Tensor, query_SCHW: Tensor) -> Tensor:
    """Layer by layer, both side by side; the variance without bias, as torch keeps it."""
    support, query = support_SCHW, query_SCHW
    for block in module.blocks:
        support, query = block.conv(support), block.conv(query)
        mean, variance = support.mean(dim=(0, 2, 3)), support.var(dim=(0, 2, 3))
        query = nn.functional.batch_norm(query, mean, variance, block.bn.weight, block.bn.bias)
        support, query = block.pool(block.bn(support).relu()), block.pool(query.relu())
    return module.head(query.flatten(1))


def test_minibatches_pass_over_all_samples_again_and_again() -> None:
    places_KT = minibatches(10, 4, 5, seed=0, index=3)
    assert places_KT.shape == (5, 4)
    first, second = places_KT.flatten()[:10], places_KT.flatten()[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)
    assert minibatches(3, 4, 2, seed=0).shape == (2, 3)
    assert minibatches(3, 4, 0, seed=0).shape == (0, 3)
    assert not torch.equal(minibatches(10, 4, 5, seed=1, index=3), places_KT)


def test_a_warm_start_has_the_encoder_s_features_and_a_zero_head() -> None:
    torch.manual_seed(1)
    encoder, module = Conv4(width=8, image_size=16).double().eval(), _module().eval()
    warm_start(module, encoder.state_dict())
    assert isinstance(module, Conv4)
    x_SCHW = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(module.features(x_SCHW), encoder(x_SCHW))
    assert not module(x_SCHW).any()
    with pytest.raises(FewShotError, match="does not fit"):
        warm_start(module, Conv4(width=4, image_size=16).state_dict())


def test_a_state_survives_a_file() -> None:
    state = train_reptile(
        _module(), _sampler(range(8), CONFIG.train_shots), replace(CONFIG, num_meta_steps=1), prepare=_prepare
    )
    again = ReptileState.from_tensors(state.tensors())
    assert again.num_steps == state.num_steps == 3
    for name, value in state.weights.items():
        torch.testing.assert_close(again.weights[name], value, rtol=0, atol=0)
        torch.testing.assert_close(again.second_moments[name], state.second_moments[name], rtol=0, atol=0)
    with pytest.raises(FewShotError, match="no Reptile state"):
        ReptileState.from_tensors(state.weights)


def test_fewest_steps_are_the_first_that_come_near_the_best() -> None:
    accuracy_BK = torch.tensor([[0.90, 0.960, 0.961, 0.962], [0.92, 0.980, 0.983, 0.982]])
    assert fewest_steps(accuracy_BK, [1, 3, 5, 8]) == 3


def test_bad_settings_are_refused() -> None:
    with pytest.raises(FewShotError, match="inner_steps=0"):
        ReptileConfig(inner_steps=0)
    with pytest.raises(FewShotError, match="meta_rate=2"):
        ReptileConfig(meta_rate=2.0)
    with pytest.raises(FewShotError, match="learning_rate=0"):
        ReptileConfig(learning_rate=0.0)
    with pytest.raises(FewShotError, match="build the sampler with shot=4"):
        train_reptile(_module(), _sampler(range(8), 3), CONFIG, prepare=_prepare)
    with pytest.raises(FewShotError, match="num_workers=0"):
        train_reptile(_module(), _sampler(range(8), 4), CONFIG, prepare=_prepare, num_workers=0)
    with pytest.raises(FewShotError, match="ascending order"):
        accuracy_by_steps(
            [Learner(_module(), CONFIG)],
            ReptileState.of(_module()),
            _sampler(range(8), 1),
            prepare=_prepare,
            num_episodes=1,
            num_steps=[2, 1],
        )
