from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.generators import GenerationRequest, OptimizerConfig, StageConfig
from raywgen.generators.bundle import load_bundle
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.tasks import build_task
from raywgen.training import TrainConfig, launch
from raywgen.tuning import ObjectiveConfig
from raywgen.tuning.objective import judge
from raywgen.weights import Condition, KeyedNoise


@pytest.fixture(scope="module")
def bundle(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    # Trained until it is above chance: at chance every split of tasks has the same score, and no test tells them apart.
    task_loss = StageConfig(num_steps=150, batch_size=8, optimizer=OptimizerConfig(learning_rate=3e-3))
    generator = HypernetworkConfig(width=16, task_loss=task_loss)
    config = TrainConfig(
        method="hypernetwork", generator=generator, corpus=zoo_corpus.location, out=str(out), num_workers=0
    )
    launch([config])
    return out / "generator"


def test_it_is_the_mean_over_validation_tasks_and_architectures(bundle: Path, zoo_corpus: Corpus) -> None:
    """Against one network at a time, by a plain forward pass in numbers of right answers."""
    generator = load_bundle(bundle).eval()
    facts = [task for task in zoo_corpus.tasks.values() if task.split == "validation"]
    means = []
    for network in zoo_corpus.networks.values():
        scores = []
        for task in facts:
            condition = Condition(
                instructions=(task.instruction,),
                samples_BSF=task.samples_SF.unsqueeze(0),
                labels_BS=task.labels_S.unsqueeze(0),
            )
            with torch.no_grad():
                noise = KeyedNoise(0, torch.tensor([0]), 0)
                written = generator.generate(
                    GenerationRequest(condition=condition, layout=network.layout, noise=noise, temperature=0.0)
                )
            state = {name: t[0] for name, t in network.layout.unflatten(written.values_BD).items()}
            test = build_task(task.recipe)
            x = test.test_x_SF
            weights = [name for name in state if name.endswith("weight")]
            for name in weights:
                x = x @ state[name].T + state[name.removesuffix("weight") + "bias"]
                x = x if name == weights[-1] else x.relu()
            right = x.argmax(dim=1) == test.test_y_S
            scores.append(torch.stack([right[test.test_y_S == c].double().mean() for c in (0, 1)]).mean())
        means.append(torch.stack(scores).mean())
    found = judge(bundle, zoo_corpus, 0, ObjectiveConfig(best_of=1, temperature=0.0))
    assert found == pytest.approx(float(torch.stack(means).mean()), abs=1e-6)
    assert found > 0.55


def test_the_same_budget_gives_the_same_score(bundle: Path, zoo_corpus: Corpus) -> None:
    config = ObjectiveConfig(num_tasks=2, best_of=2)
    assert judge(bundle, zoo_corpus, 0, config) == judge(bundle, zoo_corpus, 0, config)
    assert 0 <= judge(bundle, zoo_corpus, 4, config) <= 1
