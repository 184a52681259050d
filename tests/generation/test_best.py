from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raywgen.generation import generate_best
from raywgen.generation.best import candidate_logits
from raywgen.generators import Generated, GenerationRequest, Generator
from raywgen.tasks import balanced_cross_entropy
from raywgen.weights import KeyedNoise, Layout
from tests.builders import condition, hypernetwork, igpg, layout_of, network

NUM, BEST_OF = 3, 4


class Scripted:
    """Stands in for a generator: writes what it is given."""

    device = torch.device("cpu")

    def __init__(self, values_BD: Tensor) -> None:
        self.values_BD = values_BD

    def generate(self, _: object) -> Generated:
        return Generated(values_BD=self.values_BD, log_prob_B=torch.arange(len(self.values_BD)).float())


def best(generator: Generator, best_of: int = BEST_OF, seed: int = 0, module: nn.Module | None = None):
    return generate_best(
        generator,
        condition(NUM),
        layout_of(),
        module or network(),
        best_of=best_of,
        temperature=1.0,
        seed=seed,
    )


def test_the_kept_network_is_the_best_of_all_candidates_by_brute_force() -> None:
    generator, conditions = igpg(), condition(NUM)
    kept = best(generator)
    noise = KeyedNoise(0, torch.arange(NUM * BEST_OF), 0)
    every = generator.generate(
        GenerationRequest(condition=conditions.repeat(BEST_OF), layout=layout_of(), noise=noise, temperature=1.0)
    )
    for b in range(NUM):
        losses = []
        for n in range(BEST_OF):
            module = copy.deepcopy(network())
            module.load_state_dict(layout_of().unflatten(every.values_BD[b * BEST_OF + n]))
            logits_SC = module(conditions.samples_BSF[b])
            losses.append(float(balanced_cross_entropy(logits_SC.unsqueeze(0), conditions.labels_BS[b]).detach()))
        winner = b * BEST_OF + losses.index(min(losses))
        assert len(set(losses)) == BEST_OF, "the candidates must differ for the choice to mean anything"
        assert torch.equal(kept.values_BD[b], every.values_BD[winner])
        assert kept.log_prob_B is not None
        assert every.log_prob_B is not None
        assert kept.log_prob_B[b] == every.log_prob_B[winner]
        assert float(kept.loss_B[b]) == pytest.approx(min(losses), rel=1e-5)


def test_more_candidates_never_fit_worse() -> None:
    # Noise is keyed by row, so the first candidate of one condition is the same whatever n is.
    conditions = condition(1)
    losses = [
        float(
            generate_best(igpg(), conditions, layout_of(), network(), best_of=n, temperature=1.0, seed=0).loss_B[0],
        )
        for n in (1, 2, 4, 8)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_seed_decides() -> None:
    generator = igpg()
    assert torch.equal(best(generator).values_BD, best(generator).values_BD)
    assert not torch.equal(best(generator).values_BD, best(generator, seed=1).values_BD)


def test_a_candidate_that_gives_nan_is_never_kept() -> None:
    sane_D = layout_of().flatten(network().state_dict())
    values_BD = sane_D.repeat(NUM * 2, 1)
    values_BD[::2] = torch.nan
    kept = best(Scripted(values_BD), best_of=2)  # pyright: ignore[reportArgumentType]
    assert torch.equal(kept.values_BD, sane_D.repeat(NUM, 1))
    assert kept.loss_B.isfinite().all()
    assert kept.log_prob_B is not None
    assert kept.log_prob_B.tolist() == [1.0, 3.0, 5.0]


def test_a_generator_without_density_gives_none() -> None:
    kept = best(hypernetwork())
    assert kept.log_prob_B is None
    assert kept.values_BD.shape == (NUM, layout_of().num_values)


def test_the_module_stays_as_it_was_and_its_dropout_is_off() -> None:
    module = nn.Sequential(network()[0], nn.Dropout(0.9), network()[2]).train()  # pyright: ignore[reportIndexIssue]
    before = copy.deepcopy(module.state_dict())
    layout = Layout.from_state_dict(module.state_dict())
    values_BD = layout.flatten(module.state_dict()).repeat(NUM, 1)
    kept = best(Scripted(values_BD), best_of=1, module=module)  # pyright: ignore[reportArgumentType]
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    conditions = condition(NUM)
    logits = torch.stack([copy.deepcopy(module).eval()(conditions.samples_BSF[b]) for b in range(NUM)])
    torch.testing.assert_close(kept.loss_B, balanced_cross_entropy(logits, conditions.labels_BS).detach())


def test_candidates_are_compared_on_the_samples_that_the_module_takes() -> None:
    """A generator of features gets features; its networks may take the images themselves."""
    conditions, generator = condition(NUM), igpg()
    other_BSF = -2 * conditions.samples_BSF
    drawn = {"best_of": BEST_OF, "temperature": 1.0, "seed": 0}
    kept = generate_best(generator, conditions, layout_of(), network(), samples_BSF=other_BSF, **drawn)  # pyright: ignore[reportArgumentType]
    noise = KeyedNoise(0, torch.arange(NUM * BEST_OF), 0)
    every = generator.generate(
        GenerationRequest(condition=conditions.repeat(BEST_OF), layout=layout_of(), noise=noise, temperature=1.0)
    ).values_BD
    logits = candidate_logits(network(), layout_of(), every, other_BSF.repeat_interleave(BEST_OF, 0))
    loss_Bn = balanced_cross_entropy(logits, conditions.labels_BS.repeat_interleave(BEST_OF, 0)).view(NUM, BEST_OF)
    torch.testing.assert_close(kept.loss_B, loss_Bn.min(dim=1).values)
    torch.testing.assert_close(kept.values_BD, every.view(NUM, BEST_OF, -1)[torch.arange(NUM), loss_Bn.argmin(dim=1)])


def test_none_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="best_of=0: at least 1"):
        best(igpg(), best_of=0)


def test_conditions_do_not_disturb_each_other() -> None:
    """The network for a condition depends on its place and seed, not on what else is asked for."""
    whole = condition(NUM)
    generator = igpg()
    other = replace(whole, samples_BSF=torch.cat([whole.samples_BSF[:1], -whole.samples_BSF[1:]]))
    kept = [
        generate_best(generator, conditions, layout_of(), network(), best_of=2, temperature=1.0, seed=0).values_BD[0]
        for conditions in (whole, other)
    ]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=1e-6)
