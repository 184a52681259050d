"""What leaving one out compares with."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from raywgen.benchmarks.domains import DomainsConfig
from raywgen.benchmarks.few_shot import shuffled_conditions
from raywgen.benchmarks.few_shot_parts import TaskSource
from raywgen.benchmarks.leave_one_out import (
    leave_out,
    nearest_head_accuracy,
    short_name,
    task_source,
)
from raywgen.benchmarks.transfer import TransferConfig
from raywgen.tasks.episodes import Episode


def test_the_nearest_head_is_that_of_the_lowest_loss_on_the_support_set() -> None:
    generator = torch.Generator().manual_seed(0)
    B, S, Q, E, C, N = 60, 6, 9, 5, 3, 7

    def images(num: int) -> torch.Tensor:
        return torch.randn(B, num, E, 1, 1, generator=generator)

    def labels(num: int) -> torch.Tensor:
        return torch.randint(C, (B, num), generator=generator)

    episodes = Episode(
        support_x=images(S), support_y=labels(S), query_x=images(Q), query_y=labels(Q), classes=torch.zeros(B, C)
    )
    weight_NCE, bias_NC = torch.randn(N, C, E, generator=generator), torch.randn(N, C, generator=generator)
    wanted = []
    for b in range(B):
        support_SE, query_QE = episodes.support_x[b].flatten(1), episodes.query_x[b].flatten(1)
        losses = [
            float(cross_entropy(support_SE @ weight_NCE[n].T + bias_NC[n], episodes.support_y[b])) for n in range(N)
        ]
        n = losses.index(min(losses))
        said = (query_QE @ weight_NCE[n].T + bias_NC[n]).argmax(dim=1)
        wanted.append((said == episodes.query_y[b]).float().mean())
    assert torch.equal(nearest_head_accuracy(weight_NCE, bias_NC, episodes), torch.stack(wanted))


def test_shuffled_conditions_are_the_support_sets_of_other_episodes() -> None:
    support_x = torch.arange(3.0).view(3, 1, 1, 1, 1)
    labels = torch.tensor([[0], [1], [2]])
    episodes = Episode(
        support_x=support_x, support_y=labels, query_x=support_x, query_y=labels, classes=torch.zeros(3, 1)
    )
    shuffled = shuffled_conditions(episodes)
    assert shuffled.support_x.flatten().tolist() == [2, 0, 1]
    assert shuffled.support_y.flatten().tolist() == [2, 0, 1]
    assert torch.equal(shuffled.query_x, support_x)
    assert torch.equal(shuffled.query_y, labels)


def test_what_is_left_out_comes_last_and_is_tested_on() -> None:
    domains = ["plain", "invert", "a/b.parquet::plain"]
    assert task_source(domains, "invert") == TaskSource(
        domains=("plain", "a/b.parquet::plain", "invert"), test_path="", test_domain="invert"
    )
    assert task_source(domains, "a/b.parquet::plain") == TaskSource(
        domains=("plain", "invert", "a/b.parquet::plain"), test_path="a/b.parquet", test_domain="plain"
    )
    assert [short_name(name) for name in ("invert", "a/b.parquet::plain", "b.parquet::invert")] == [
        "invert", "b", "b-invert",
    ]  # fmt: skip


def test_what_cannot_be_left_out_is_named() -> None:
    with pytest.raises(ValueError, match="held_out is empty"):
        TransferConfig(data="digits")
    with pytest.raises(ValueError, match="give `plain` first"):
        DomainsConfig(data="digits", domains=["invert", "plain"])
    with pytest.raises(ValueError, match="what is left out is tested on"):
        leave_out(DomainsConfig(data="digits", test_data="digits"), ["plain", "invert"])
    with pytest.raises(ValueError, match="two have one name"):
        leave_out(DomainsConfig(data="digits"), ["plain", "a/x.parquet::plain", "b/x.parquet::plain"])
    with pytest.raises(ValueError, match="give mcdi, mcdi_task_loss and others of"):
        DomainsConfig(data="digits", methods=["mcdi"])
