"""What the benchmark of IGPG on unseen tasks adds up."""

from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.igpg_tasks import IGPGTasksConfig, chosen_percent, zoo_of
from raywgen.benchmarks.unseen_tasks import UnseenTasks
from raywgen.generators.igpg import IGPGConfig
from tests.benchmarks.test_unseen_tasks import unseen

__all__ = ["unseen"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_task_takes_its_candidate_with_the_lowest_loss_on_its_examples(unseen: UnseenTasks) -> None:
    values_TnD = torch.randn(2, 6, unseen.layout.num_values, generator=torch.Generator().manual_seed(0))
    percent = []
    for index, task in enumerate(unseen.tasks):
        losses = []
        for values_D in values_TnD[index]:
            unseen.module.load_state_dict(unseen.layout.unflatten(values_D))
            logits_SC = unseen.module(unseen.condition.samples_BSF[index])
            losses.append(
                float(torch.nn.functional.cross_entropy(logits_SC, unseen.condition.labels_BS[index]).detach())
            )
        unseen.module.load_state_dict(unseen.layout.unflatten(values_TnD[index, losses.index(min(losses))]))
        right_S = unseen.module(task.test_x_SF).argmax(dim=1) == task.test_y_S
        percent.append(torch.stack([right_S[task.test_y_S == c].float().mean() for c in range(3)]).mean())
    assert chosen_percent(unseen, values_TnD) == pytest.approx(100 * float(torch.stack(percent).mean()), abs=1e-3)


@pytest.mark.parametrize(("kind", "start"), [("subsets", "shared"), ("subsets", "own"), ("domains", "shared")])
def test_the_zoo_has_the_start_and_the_data_that_were_asked_for(kind: str, start: str) -> None:
    config = IGPGTasksConfig(data="a.parquet", zoo=["num_seen_tasks=7"])
    zoo = zoo_of(config, kind, start, 3)
    assert (zoo.start, zoo.seed, zoo.tasks.path) == (start, 3, "a.parquet")
    assert zoo.tasks.kind == ("class-subsets" if kind == "subsets" else "domains")
    assert (zoo.num_seen_tasks == 7) == (kind == "subsets")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["sets"]}, "subsets, domains"),
        ({"starts": ["branched"]}, "shared, own"),
        ({"kinds": [], "starts": []}, "nothing is left"),
        ({"best_of": 0}, "best_of=0"),
        ({"igpg": IGPGConfig()}, "independent_share"),
    ],
)
def test_settings_that_measure_nothing_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IGPGTasksConfig(**settings)
