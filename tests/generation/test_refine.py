"""Written networks, refined on inputs that their generator remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raywgen.generation.best import generate_best
from raywgen.generation.refine import refined
from raywgen.generators import Generator, Remembered
from raywgen.generators.units import Units, UnitsSampling
from raywgen.tasks import balanced_cross_entropy, stacked_logits
from raywgen.weights import Condition
from tests.builders import SMALL, hypernetwork, layout_of, network, units

F = SMALL[0]


def halves(num: int, num_tasks: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and their classes, by the sign of a sum that is another in each task."""
    generator = torch.Generator().manual_seed(seed)
    x_SF = torch.randn(num, F, generator=generator)
    way_FB = torch.randn(F, num_tasks, generator=torch.Generator().manual_seed(9))
    return x_SF, (x_SF @ way_FB).gt(0).long().T


def remembered(num_steps: int = 60) -> Remembered:
    inputs_MF, labels_BM = halves(200, seed=1)
    return Remembered(inputs_MF=inputs_MF, labels_BM=labels_BM, num_steps=num_steps)


def loss(values_BD: Tensor, x_BSF: Tensor, labels_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return balanced_cross_entropy(
            stacked_logits(network(SMALL), layout_of(SMALL).unflatten(values_BD), x_BSF), labels_BS
        )


def starts(num: int = 3) -> Tensor:
    torch.manual_seed(0)
    module = network(SMALL)
    return torch.stack([layout_of(SMALL).flatten(module.state_dict())] * num)


def test_each_network_learns_the_labels_of_its_own_task_alone() -> None:
    given, (x_SF, labels_BS) = remembered(300), halves(300, seed=2)
    found_BD = refined(network(SMALL), layout_of(SMALL), starts(), given)
    x_BSF = x_SF.expand(3, -1, -1)
    assert (loss(found_BD, x_BSF, labels_BS) < 0.8 * loss(starts(), x_BSF, labels_BS)).all()
    assert (loss(found_BD, x_BSF, labels_BS.roll(1, 0)) > loss(found_BD, x_BSF, labels_BS)).all()
    last = replace(given, labels_BM=given.labels_BM[2:])
    assert torch.equal(refined(network(SMALL), layout_of(SMALL), starts(1), last), found_BD[2:])


class Told(Units):
    """A generator that remembers what a test says."""

    said: Remembered

    def remembered(self, condition: Condition, sampling: object) -> Remembered | None:
        assert isinstance(sampling, UnitsSampling)
        return self.said if sampling.refine_steps else None


def told(said: Remembered) -> Told:
    generator = units()
    generator.__class__ = Told
    generator.said = said  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(generator, Told)
    return generator


def best(generator: Generator, given: Condition, **settings: object) -> tuple[Tensor, Tensor]:
    found = generate_best(
        generator,
        given,
        layout_of(SMALL),
        network(SMALL),
        best_of=2,
        temperature=1.0,
        seed=0,
        **settings,  # pyright: ignore[reportArgumentType]
    )
    return found.values_BD, found.loss_B


def test_the_users_samples_decide_whether_a_network_is_kept_as_refined() -> None:
    x_SF, labels_BS = halves(32)
    given = Condition(instructions=("which half?",) * 3, samples_BSF=x_SF.expand(3, -1, -1), labels_BS=labels_BS)
    right = remembered()
    # The last task is remembered the wrong way round.
    generator = told(replace(right, labels_BM=torch.cat([right.labels_BM[:2], 1 - right.labels_BM[2:]])))
    written_BD, written_loss_B = best(generator, given, sampling=UnitsSampling(refine_steps=0))
    values_BD, loss_B = best(generator, given)
    assert torch.equal(values_BD[2], written_BD[2])
    assert (loss_B[:2] < written_loss_B[:2]).all()
    assert torch.allclose(loss(values_BD, given.samples_BSF, labels_BS), loss_B, atol=1e-5)


def test_what_is_remembered_must_be_what_the_module_takes() -> None:
    x_SF, labels_BS = halves(32)
    given = Condition(instructions=("which half?",) * 3, samples_BSF=x_SF.expand(3, -1, -1), labels_BS=labels_BS)
    right = remembered()
    shorter = told(replace(right, inputs_MF=right.inputs_MF[:, :4]))
    for one, other in zip(
        best(shorter, given), best(units(), given, sampling=UnitsSampling(refine_steps=0)), strict=True
    ):
        assert torch.equal(one, other)


def test_units_predict_the_classes_of_what_they_remember_and_others_remember_nothing() -> None:
    generator = units(num_references=20)
    assert generator.references is not None
    generator.references.inputs_MF.normal_()
    x_SF, labels_BS = halves(32)
    given = Condition(instructions=("which half?",) * 3, samples_BSF=x_SF.expand(3, -1, -1), labels_BS=labels_BS)
    found = generator.remembered(given, UnitsSampling(refine_steps=7))
    assert found is not None
    assert found.num_steps == 7
    expected = generator.references.predictor(found.inputs_MF.expand(3, -1, -1), generator.tasks(given)).argmax(dim=2)
    assert torch.equal(found.labels_BM, expected)
    assert generator.remembered(given, UnitsSampling(refine_steps=0)) is None
    assert units(num_references=0).remembered(given, UnitsSampling()) is None
    assert hypernetwork().remembered(given, hypernetwork().resolve_sampling(None)) is None


def test_steps_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match="refine_steps=-1"):
        UnitsSampling(refine_steps=-1)
