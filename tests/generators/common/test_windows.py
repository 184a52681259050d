"""Mc-Di, Lo-Hp and the direct map on windows of networks: what they train on, and how networks are put together.

Shape legend: B networks, A local targets, D values, W chunks and X values of a window, M chunks of a network.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raywgen.benchmarks.strategy_cases import CASES, Case, batch_of, build_stage, noise_of
from raywgen.config import merge_config
from raywgen.corpus import Corpus
from raywgen.generators import GenerationRequest, Generator, method
from raywgen.generators.bundle import build_generator
from raywgen.generators.common.denoisers import ChunkWeights, LatentWeights, Place, build_denoiser
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.targets import normalised_targets
from raywgen.generators.common.tokenizer import Tokenizer, VQVAEConfig
from raywgen.generators.common.writing import Rows, write_networks
from raywgen.generators.lohp.replay import Rollout
from raywgen.generators.lohp.stages import PolicyStage
from raywgen.generators.mcdi.stages import DenoiserStage, consistency_loss, draw
from raywgen.generators.stage import StageNeeds
from raywgen.tasks import build_task
from raywgen.tasks.no_task import BLANK
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.batch_plan import StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.rows import LayoutRows, layout_rows
from raywgen.weights import KeyedNoise, Layout, Normalizer, TensorSpec, Windows
from raywgen.weights.chunks import position_features
from tests.builders import SMALL, condition, layout_of, noise_for, normalizers
from tests.generators.mcdi.builders import DATA, chunk_batch
from tests.training.whole_plan import WholePlan

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWED = [name for name in CASES if name.endswith("windows")]
NETWORK: dict[str, Any] = {"kind": "chunks", "width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8}


def with_window(case: Case, window: int) -> Case:
    return replace(case, settings={**case.settings, "network": {**case.settings["network"], "window": window}})


def generator_of(name: str, corpus: Corpus | None = None, window: int = 2, **settings: Any) -> Generator:
    """Six steps to three local targets, in windows of few chunks."""
    steps: dict[str, Any] = {
        "mcdi": {"diffusion": {"num_steps": 6}, "sampling": {"num_steps": 3, "sampler": "stochastic"}},
        "lohp": {"path": {"num_steps": 6, "length": 2}},
        "direct": {},
    }[name]
    config = merge_config(method(name).Config, [(name, steps | {"network": NETWORK | {"window": window}} | settings)])
    table, data = (normalizers(SMALL), DATA) if corpus is None else (measure_normalizers(corpus), data_spec(corpus))
    return build_generator(name, config, table, data, seed=0).eval()


# Where a network is one window, or windows are switched off


@pytest.mark.parametrize("name", [*WINDOWED, "direct-regression", "direct-task-loss", "mcdi-task-loss"])
def test_a_network_that_fits_is_trained_on_as_a_whole_to_the_last_bit(name: str) -> None:
    case = CASES[name]
    case = replace(case, settings={**case.settings, "network": NETWORK})
    batch, losses = batch_of(case, 0, 4), []
    for window in (0, 5, 512):  # 38 values are 5 chunks.
        stage = build_stage(with_window(case, window), 4).train()
        assert stage.see(batch, noise_of(batch)) is batch
        losses.append(stage(batch, noise_of(batch)).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], build_stage(with_window(case, 2), 4).train()(batch, noise_of(batch)).loss)


@pytest.mark.parametrize("name", ["mcdi", "lohp", "direct"])
def test_a_network_that_fits_is_written_as_a_whole_to_the_last_bit(name: str) -> None:
    whole, fitting, windowed = (draw_networks(generator_of(name, window=window)) for window in (0, 5, 2))
    assert torch.equal(whole, fitting)
    assert not torch.allclose(whole, windowed)


def draw_networks(generator: Generator, **sampling: Any) -> Tensor:
    given = generator.resolve_sampling(sampling or None)
    request = GenerationRequest(
        condition=condition(3), layout=layout_of(SMALL), noise=noise_for(3), sampling=given if sampling else None
    )
    return generator.generate(request).values_BD


@pytest.mark.parametrize("kind", ["head", "flat"])
def test_heads_and_flat_networks_have_no_windows(kind: str) -> None:
    widths = (6, 3) if kind == "head" else SMALL
    denoiser = build_denoiser(NetworkConfig(kind=kind, window=1), normalizers(widths), DATA)  # pyright: ignore[reportArgumentType]
    assert denoiser.draw_windows(layout_of(widths), noise_for(2)) is None
    assert denoiser.all_windows(layout_of(widths)) is None


# What a stage sees of a long network


@pytest.mark.parametrize("name", ["mcdi", "lohp", "direct"])
def test_a_stage_sees_in_windows_what_it_sees_of_whole_networks(name: str, zoo_corpus: Corpus) -> None:
    """The trainer reads the windows alone; a stage that is given whole networks cuts the same ones out of them."""
    sparse = {"mcdi": {"diffusion": {"num_targets": 2}}, "lohp": {"path": {"num_steps": 4, "length": 2}}}
    generator = generator_of(name, zoo_corpus, window=5, **sparse.get(name, {}), **sampling_of(name))
    stage = generator.stages()[0].train()
    plan = plan_of(layout_rows(zoo_corpus, ["train"]), generator.needs)
    firsts = []
    for step in range(4):
        batch, noise = plan.for_stage(step, 8, StageView(stage, 0, 5))
        whole = plan.batch(step, 8)
        assert batch.windows is not None
        assert batch.targets_BAD is not None
        assert whole.targets_BAD is not None
        assert batch.targets_BAD.shape == (8, whole.targets_BAD.shape[1], 40)
        in_windows = stage(batch, noise).loss
        assert torch.equal(in_windows, stage(whole, KeyedNoise(0, whole.sample_index_B, 5)).loss)
        assert not torch.equal(in_windows, stage(whole, KeyedNoise(1, whole.sample_index_B, 5)).loss)
        firsts += batch.windows.first_B.tolist()
    assert len(set(firsts)) > 10  # Networks of a batch have windows of their own.


def sampling_of(name: str) -> dict[str, Any]:
    return {"sampling": {"num_steps": 2}} if name == "lohp" else {}


def plan_of(rows: list[LayoutRows], needs: StageNeeds) -> WholePlan:
    num_targets = needs.num_targets
    return WholePlan(rows, seed=3, num_condition_samples=5, num_query_samples=7, num_targets=num_targets)


@pytest.mark.parametrize("meta", ["joint", "reptile"])
def test_the_loss_of_windows_is_that_of_their_real_values_alone(meta: str) -> None:
    """Network by network: slices of the targets, of the position features and of the noise, without masks."""
    generator = generator_of("mcdi", denoiser={"meta": meta, "inner_steps": 1, "inner_rate": 0.01})
    stage, batch = generator.stages()[0].train(), chunk_batch(16)
    assert isinstance(stage, DenoiserStage)
    reference = copy.deepcopy(stage)
    net: Any = reference.denoiser.net
    noise, layout, config = noise_for(16), batch.layout, stage._config.diffusion
    windows = stage.windows(layout, noise)
    assert windows is not None
    targets_BAD = normalised_targets(batch, stage.normalizers)
    starts = [8 * int(first) for first in windows.first_B]
    assert any(start + 16 > layout.num_values for start in starts)
    assert len(set(starts)) > 2
    padded_BAD = nn.functional.pad(targets_BAD, (0, 2))
    windows_BAX = torch.stack([row_AD[:, start : start + 16] for row_AD, start in zip(padded_BAD, starts, strict=True)])
    (draws,) = draw(windows_BAX, config, noise, stage.config.num_draws)
    losses = []
    for b, start in enumerate(starts):
        num_real = min(16, layout.num_values - start)
        positions_WG = position_features(layout, 8)[start // 8 : start // 8 + 2]
        condition = reference.denoiser.embed_condition(
            batch.condition.samples_BSF[b : b + 1], batch.condition.labels_BS[b : b + 1], layout
        )

        def predict(x_1nX: Tensor, time_1n: Tensor, condition=condition, positions_WG=positions_WG) -> Tensor:
            chunks = nn.functional.pad(x_1nX, (0, 16 - x_1nX.shape[-1])).unflatten(-1, (2, 8))
            return net(chunks, time_1n, condition, positions_WG).flatten(2)[..., : x_1nX.shape[-1]]

        own = draws._make(tensor[b : b + 1] for tensor in draws)
        own = own._replace(target_BnD=own.target_BnD[..., :num_real], eps_BnD=own.eps_BnD[..., :num_real])
        losses.append(consistency_loss(predict, own, config))
    wanted = torch.stack(losses).mean()
    wanted.backward()
    result = stage(batch, noise_for(16))
    result.loss.backward()
    torch.testing.assert_close(result.metrics["consistency"], wanted.detach())
    # One inner step of Reptile is its rate times the gradient, but for differences of parameters near 1 in float32.
    share, atol = (1.0, 1e-6) if meta == "joint" else (0.01, 3e-7)
    for (name, mine), theirs in zip(stage.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, share * theirs.grad, rtol=1e-3, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    "policy", [{}, {"flow": "joint"}, {"objective": "trajectory"}, {"objective": "detailed", "backward": "learned"}]
)
def test_the_balance_of_windows_is_that_of_whole_networks_restricted_to_them(policy: dict[str, Any]) -> None:
    """For networks without attention between chunks; other values have the weight 0."""
    generator = generator_of("lohp", policy=policy)
    stage, batch, noise = generator.stages()[0], chunk_batch(6), noise_for(6)
    assert isinstance(stage, PolicyStage)
    for part in stage.modules():
        if hasattr(part, "trunk"):
            part.trunk = nn.Identity()
    for parameter in stage.parameters():  # The normaliser and the backward policy begin at zero.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    layout, windows = batch.layout, stage.windows(batch.layout, noise)
    assert windows is not None
    cut = batch.cut(windows)
    states_BALD = torch.randn(6, 3, 3, layout.num_values, generator=torch.Generator().manual_seed(0))
    position_BX = windows.position_BX
    index = position_BX.clamp(max=layout.num_values - 1)[:, None, None].expand(-1, 3, 3, -1)
    cut_states = states_BALD.gather(-1, index)
    seen_BD = torch.zeros(6, layout.num_values + 2).scatter(1, position_BX, 1.0)[:, : layout.num_values]
    place = Place(position_features(layout, 8).expand(6, -1, -1), seen_BD / seen_BD.mean(dim=1, keepdim=True))
    results = []
    for rollout in (Rollout(batch=batch, states_BALD=states_BALD), Rollout(batch=cut, states_BALD=cut_states)):
        embedded = stage.policy.embed_condition(batch.condition, layout, rollout.batch.windows)
        if rollout.batch is batch:
            embedded = embedded._replace(place=place)
        loss, metrics = stage._balance(rollout, stage._targets(rollout.batch), embedded)
        gradients = torch.autograd.grad(loss, list(stage.parameters()), allow_unused=True, materialize_grads=True)
        results.append([loss.detach(), metrics["distance"], *gradients])
    assert float(results[0][0]) > 0.1
    for whole, of_windows in zip(*results, strict=True):
        # Sums of float32 in another order, of gradients up to some tens.
        torch.testing.assert_close(of_windows, whole, rtol=1e-4, atol=1e-4)


def test_a_window_beyond_the_end_does_not_see_what_stands_there() -> None:
    denoiser = build_denoiser(NetworkConfig(**NETWORK, window=2), normalizers(SMALL), DATA)  # pyright: ignore[reportArgumentType]
    layout, conditions = layout_of(SMALL), condition(2)
    windows = Windows(chunk_length=8, num_chunks=2, first_B=torch.tensor([0, 3]))
    place = denoiser.place(layout, windows)
    assert place is not None
    torch.testing.assert_close(place.weight_BX[0], torch.ones(16))
    torch.testing.assert_close(place.weight_BX[1], torch.cat([torch.full((14,), 16 / 14), torch.zeros(2)]))
    x_BnX, time_Bn = torch.randn(2, 1, 16), torch.rand(2, 1)
    found = []
    for junk in (0.0, 5.0):
        x_BnX[1, :, 14:] = junk
        found.append(denoiser(x_BnX, time_Bn, conditions.samples_BSF, conditions.labels_BS, layout, place))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["mcdi", "lohp"])
def test_a_step_holds_nothing_of_the_size_of_a_network(name: str) -> None:
    """Every tensor of a step has the shape that it has for a network of a hundredth of the size."""
    largest = []
    for width in (8_000, 800_000):  # 50 thousand and 5 million values.
        layout = Layout(
            (TensorSpec("weight", (width, 6), "float32", "weight"), TensorSpec("other", (5, 3), "float32", "weight"))
        )
        table = {layout.id: (layout, Normalizer(layout, torch.zeros(2), torch.ones(2)))}
        settings = {"network": NETWORK | {"kind": "auto", "window": 64}}
        config = merge_config(method(name).Config, [(name, settings)])
        stage = build_generator(name, config, table, DATA, seed=0).stages()[0].train()
        num = 8 * stage.needs.num_targets
        rows = LayoutRows(
            layout=layout,
            module=nn.Module(),
            weights=MadeUp(num),
            index_N=torch.arange(num),
            tasks=[build_task({"name": BLANK, "instruction": "any"})] * num,
            trajectories=[str(number % 8) for number in range(num)],
            steps=[1 + number // 8 for number in range(num)],
            policies=[""] * num,
            ids=[str(number) for number in range(num)],
        )
        with Sizes() as sizes:
            batch, noise = plan_of([rows], stage.needs).for_stage(0, 8, StageView(stage, 0, 5))
            batch = replace(batch, condition=condition(8))
            stage(batch, noise).loss.backward()
        largest.append(sizes.largest)
    assert largest[0] == largest[1]


class Sizes(TorchDispatchMode):
    """Notes the most values of a tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


class MadeUp:
    """Weights that are made where they are read, and never whole."""

    def __init__(self, num: int) -> None:
        self._num = num

    def __len__(self) -> int:
        return self._num

    def values(self, index_B: Tensor) -> Tensor:
        raise AssertionError("whole networks are read")

    def windows(self, index_B: Tensor, start_B: Tensor, length: int) -> Tensor:
        return torch.sin(start_B.unsqueeze(1) + torch.arange(length) + index_B.unsqueeze(1))


# How networks are written


@given(num_values=st.integers(9, 60), window=st.integers(1, 5), max_rows=st.integers(1, 9), num=st.integers(1, 3))
@settings(max_examples=30)
def test_every_value_is_written_once_at_its_place(num_values: int, window: int, max_rows: int, num: int) -> None:
    layout = Layout((TensorSpec("weight", (num_values,), "float32", "weight"),))
    sizes: dict[str, Any] = NETWORK | {"chunk_length": 4, "window": window}
    config = NetworkConfig(**sizes)
    denoiser = Positions(config, DATA)
    conditions, asked = condition(num), []

    def follow(rows: Rows) -> Tensor:
        if rows.place is None:
            return torch.arange(num_values).expand(num, -1)
        asked.append(len(rows.condition_embedding))
        assert torch.equal(rows.condition_embedding, torch.arange(num).repeat_interleave(asked[-1] // num))
        return rows.place.positions_BWG

    written = write_networks(denoiser, follow, torch.arange(num), conditions, layout, noise_for(num), max_rows)
    assert torch.equal(written, torch.arange(num_values).expand(num, -1))
    num_chunks = -(-num_values // 4)
    assert sum(asked) == (num * -(-num_chunks // window) if num_chunks > window else 0)
    assert not asked or max(asked) <= max(max_rows, num)


class Positions(ChunkWeights):
    """Says the positions of values in place of their features."""

    def place(self, layout: Layout, windows: Windows | None) -> Place | None:
        return None if windows is None else Place(windows.position_BX, windows.position_BX)


@pytest.mark.parametrize("name", ["mcdi", "lohp"])
def test_windows_are_drawn_apart_whatever_is_written_beside_them(name: str) -> None:
    generator = generator_of(name)
    values = [draw_networks(generator, max_rows=rows) for rows in (1, 2, 16)]
    # Matrix products of other heights round otherwise.
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[2], values[0], rtol=1e-4, atol=1e-5)
    seen: list[Tensor] = []

    def follow(rows: Rows) -> Tensor:
        seen.append(rows.noise.normal(rows.num_states))
        return seen[-1]

    denoiser = build_denoiser(NetworkConfig(**NETWORK, window=2), normalizers(SMALL), DATA)  # pyright: ignore[reportArgumentType]
    conditions = condition(2)
    write_networks(denoiser, follow, torch.zeros(2, 4), conditions, layout_of(SMALL), noise_for(2), max_rows=2)
    drawn_RX = torch.cat([*seen, noise_for(2).normal(16)])
    assert len(drawn_RX.unique(dim=0)) == len(drawn_RX) == 8


@pytest.mark.parametrize("context", [1, 2])
def test_windows_of_latents_are_those_of_whole_networks(context: int) -> None:
    coder: dict[str, Any] = {"coder": "transformer", "context": 2} if context == 2 else {}
    tokenizer = Tokenizer(VQVAEConfig(chunk_length=4, width=16, **coder))
    for parameter in tokenizer.parameters():  # It begins at the identity.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    config = NetworkConfig(
        kind="latents", window=3, **{k: v for k, v in NETWORK.items() if k not in ("kind", "chunk_length")}
    )  # pyright: ignore[reportArgumentType]
    denoiser = LatentWeights(config, tokenizer, DATA)
    batch, table = chunk_batch(6), normalizers(SMALL)
    layout = batch.layout
    windows = denoiser.draw_windows(layout, noise_for(6))
    assert windows is not None
    assert windows.num_chunks == (3 if context == 1 else 2)
    whole = denoiser.encode(normalised_targets(batch, table), batch.condition, layout)
    cut = batch.cut(windows)
    found = denoiser.encode(normalised_targets(cut, table), batch.condition, layout, windows)
    X = windows.num_values
    wanted = torch.stack([row[:, 4 * first : 4 * first + X] for row, first in zip(whole, windows.first_B, strict=True)])
    torch.testing.assert_close(found, wanted)
    plan = denoiser.all_windows(layout)
    assert plan is not None
    assert bool((plan.first_B % context == 0).all())

    def follow(rows: Rows) -> Tensor:
        return denoiser.encode(slices, batch.condition, layout, plan)[:, 0]

    one = replace(batch.take(torch.zeros(len(plan.first_B), dtype=torch.int64)), windows=None)
    slices = normalised_targets(one.cut(plan), table)[:, -1:]
    conditions = batch.condition.first(1)
    written = write_networks(denoiser, follow, torch.zeros(1, 1), conditions, layout, noise_for(1))
    torch.testing.assert_close(written, denoiser.decode(whole[:1, -1], conditions, layout))


@pytest.mark.parametrize("name", ["mcdi", "lohp", "direct"])
def test_pieces_are_the_whole_network_bit_for_bit(name: str) -> None:
    """Each is a run of groups of windows, of which the last overlaps the one before."""
    generator, layout = generator_of(name), layout_of((6, 41, 2))
    sampling = generator.resolve_sampling(None if name == "direct" else {"max_rows": 2})
    generator.normalizers.update(normalizers((6, 41, 2)))
    num = 1 if name == "direct" else 2
    request = GenerationRequest(
        condition=condition(num), layout=layout, noise=noise_for(num), temperature=0.7, sampling=sampling
    )
    for max_values in (1, 70):
        pieces = generator.pieces(layout, sampling, num, max_values)
        assert len(pieces) > 1
        assert not any(piece.needs for piece in pieces)
        written = [generator.generate_piece(request, piece, {}) for piece in reversed(pieces)]
        assert [piece.values_BX.shape[1] for piece in written[::-1]] == [piece.num_values for piece in pieces]
        values_BD = torch.cat([piece.values_BX for piece in written[::-1]], dim=1)
        assert torch.equal(values_BD, generator.generate(request).values_BD)


# All together


def test_the_task_loss_reaches_every_window() -> None:
    generator = generator_of("mcdi", task_loss={"num_steps": 1}, denoiser={"num_steps": 0})
    stage, batch = generator.stages()[-1].train(), chunk_batch(6)
    assert stage.see(batch, noise_for(6)) is batch
    seen: list[Tensor] = []
    denoiser: Any = generator.denoiser
    decode = denoiser.decode

    def watched(states: Tensor, *rest: Any) -> Tensor:
        states.retain_grad()
        seen.append(states)
        return decode(states, *rest)

    denoiser.decode = watched
    stage(batch, noise_for(6)).loss.backward()
    assert sum(len(states) for states in seen) == 6 * 3
    assert all(states.grad is not None and bool((states.grad != 0).any(dim=1).all()) for states in seen)


def test_a_reward_by_the_tasks_loss_is_refused_where_networks_are_longer_than_a_window() -> None:
    with pytest.raises(ValueError, match=r"policy.task_reward=2 .* 38 values network.window=2 sees 16 .*window=0"):
        generator_of("lohp", policy={"task_reward": 2.0})
    generator_of("lohp", window=5, policy={"task_reward": 2.0})


@pytest.mark.parametrize("window", [-1])
def test_a_window_that_is_none_is_named(window: int) -> None:
    with pytest.raises(ValueError, match="window=-1: give a number of chunks, or 0"):
        NetworkConfig(window=window)


def test_a_run_with_replayed_windows_goes_on_where_it_stopped(zoo_corpus: Corpus, tmp_path: Path) -> None:
    generator = {
        "path": {"num_steps": 4, "length": 2},
        "sampling": {"num_steps": 2},
        "network": NETWORK | {"window": 5},
        "policy": {"num_steps": 6, "batch_size": 6, "replay_size": 2},
    }

    def losses(out: str, *shares: float) -> list[float]:
        shared = {"method": "lohp", "generator": generator, "log_every": 1, "validate_every": 9, "num_workers": 0}
        shared |= {"accumulate": 2, "corpus": zoo_corpus.location, "out": str(tmp_path / out)}
        for share in shares:
            launch([merge_config(TrainConfig, [("run", shared)])], stop_at=share)
        return [row["loss"] for row in read_metrics(shared["out"])]

    assert losses("stopped", 0.5, 1.0) == losses("whole", 1.0)
