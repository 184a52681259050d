"""Inputs that are remembered from training, and the labels that are predicted for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raywgen.generators.units.references import References
from raywgen.generators.units.samples import Activations
from raywgen.tasks import balanced_cross_entropy
from tests.builders import SMALL, noise_for, train, units, weight_batch

M, F, H = 24, 6, 16


def test_it_remembers_query_inputs_that_a_seed_draws() -> None:
    batches = [weight_batch(SMALL, 2, seed=step) for step in range(3)]
    inputs_XF = torch.cat([batch.query.samples_BSF.flatten(0, 1) for batch in batches])
    found = [References(M, F, 2, H) for _ in range(3)]
    for references, seed in zip(found, (0, 0, 1), strict=True):
        references.remember(iter(batches), seed)
        assert all(bool((inputs_XF == row_F).all(dim=1).any()) for row_F in references.inputs_MF)
    assert torch.equal(found[0].inputs_MF, found[1].inputs_MF)
    assert not torch.equal(found[0].inputs_MF, found[2].inputs_MF)
    many = References(5000, F, 2, H)  # More than there are: some twice.
    many.remember(iter(batches), 0)
    assert len(torch.unique(many.inputs_MF, dim=0)) == len(torch.unique(inputs_XF, dim=0))


def labelled(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two tasks, one the other's opposite, that a predictor can be told by their vector."""
    generator = torch.Generator().manual_seed(seed)
    x_BSF = torch.randn(1, 512, F, generator=generator).expand(2, -1, -1)
    labels_S = x_BSF[0].sum(dim=1).gt(0).long()
    return x_BSF, torch.stack([labels_S, 1 - labels_S]), torch.eye(2, H) * 4


def fitted(references: References, steps: int = 150) -> None:
    x_BSF, labels_BS, task_BH = labelled()
    optimizer = torch.optim.Adam(references.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        balanced_cross_entropy(references.predictor(x_BSF, task_BH), labels_BS).mean().backward()
        optimizer.step()


def test_they_count_as_much_as_the_predictor_knows_of_the_task() -> None:
    """A predictor that is right makes whole members of them, one that is wrong on the samples makes none."""
    torch.manual_seed(0)
    references = References(M, F, 2, H)
    references.inputs_MF.copy_(labelled(1)[0][0, :M])
    fitted(references)
    x_BSF, labels_BS, task_BH = labelled(2)
    right = references.beside(Activations.of_samples(x_BSF[:, :20], labels_BS[:, :20], 2), task_BH)
    assert right.values_BSnP.shape == (2, 20 + M, F, 1)
    assert torch.equal(right.values_BSnP[:, 20:, :, 0], references.inputs_MF.expand(2, -1, -1))
    members_BMC = right.member_BSC[:, 20:]
    assert float(members_BMC.detach().sum(dim=2).min()) > 0.7
    truth_BM = torch.stack([references.inputs_MF.sum(dim=1).gt(0).long()] * 2)
    truth_BM[1] = 1 - truth_BM[1]
    assert float((members_BMC.argmax(dim=2) == truth_BM).float().mean()) > 0.9
    wrong = references.beside(Activations.of_samples(x_BSF[:, :20], 1 - labels_BS[:, :20], 2), task_BH)
    assert not wrong.member_BSC[:, 20:].any()


def test_samples_that_count_nothing_leave_all_moments_as_they_are() -> None:
    x_BSF, labels_BS, task_BH = labelled()
    support = Activations.of_samples(x_BSF[:, :20], labels_BS[:, :20], 2)
    references = References(M, F, 2, H)
    references.inputs_MF.normal_()
    beside = references.beside(support, task_BH)
    beside = replace(beside, member_BSC=torch.cat([support.member_BSC, torch.zeros(2, M, 2)], dim=1))
    for one, other in zip(_moments(support), _moments(beside), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def _moments(samples: Activations) -> tuple[Tensor, Tensor, Tensor]:
    facts = samples.facts()
    return facts.mean_BX, facts.variance_BX, facts.class_BCX


def test_the_stage_remembers_and_trains_the_predictor() -> None:
    generator = units(num_references=M)
    (stage,) = generator.stages()
    batches = [weight_batch(SMALL, 16, seed=step) for step in range(60)]
    stage.setup(iter(batches[:2]), 0)
    references = generator.references
    assert references is not None
    assert references.inputs_MF.any()

    def accuracy() -> float:
        return float(stage(batches[0], noise_for(16)).metrics["predictor_accuracy"])

    before = accuracy()
    train(stage, batches)
    assert accuracy() > before + 0.1


def test_without_references_nothing_is_remembered_or_fitted() -> None:
    generator = units(num_references=0)
    assert generator.references is None
    assert generator.writer.fitted is None
    (stage,) = generator.stages()
    stage.setup(iter([weight_batch(SMALL, 2)]), 0)
    assert "predictor_accuracy" not in stage(weight_batch(SMALL, 2), noise_for(2)).metrics
