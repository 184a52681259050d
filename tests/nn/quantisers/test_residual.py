"""Residual quantisation: greedy, better with every level, and the same on all workers.

Shape legend: N vectors, L levels, V codes of a level, K values of a vector.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from raywgen.nn.quantisers import ResidualQuantiser, nearest_code
from raywgen.nn.quantisers.kmeans import code_gain, half_squares

NUM_CODES, WIDTH = 8, 4


def vectors(num: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(5, WIDTH, generator=generator)
    return centres[torch.arange(num) % 5] + 0.5 * torch.randn(num, WIDTH, generator=generator)


def quantiser(num_levels: int = 3, num_iterations: int = 8, seed: int = 0) -> ResidualQuantiser:
    rvq = ResidualQuantiser(num_levels, NUM_CODES, WIDTH, decay=0.9)
    rvq.initialise(vectors(), num_iterations, torch.Generator().manual_seed(seed))
    return rvq


def error(rvq: ResidualQuantiser, vectors_NK: Tensor) -> float:
    return float((rvq.decode(rvq.encode(vectors_NK)) - vectors_NK).square().mean())


def whole(tensor: Tensor) -> Tensor:
    return tensor


def test_every_level_improves_the_reconstruction() -> None:
    errors = [error(quantiser(num_levels), vectors()) for num_levels in (1, 2, 3, 4)]
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(errors))


def test_greedy_codes_are_the_nearest_per_level_by_brute_force_in_float64() -> None:
    rvq, vectors_NK = quantiser(), vectors(300, seed=1)
    codes_NL = rvq.encode(vectors_NK)
    assert codes_NL.dtype == torch.int64
    residual = vectors_NK.double().numpy()
    codebooks = rvq.codebooks_LVK.double().numpy()
    rows = np.arange(len(residual))
    for level in range(rvq.num_levels):
        distance = ((residual[:, None, :] - codebooks[level][None]) ** 2).sum(-1)
        chosen = codes_NL[:, level].numpy()
        # Two codes may be equally near to float32: the chosen one is nearest to within its roundings.
        assert np.all(distance[rows, chosen] <= distance.min(axis=1) + 1e-5)
        assert np.mean(chosen == distance.argmin(axis=1)) > 0.99
        residual = residual - codebooks[level][chosen]
    decoded = rvq.decode(codes_NL).double().numpy()
    np.testing.assert_allclose(decoded, vectors_NK.double().numpy() - residual, atol=1e-5)


def test_nearest_code_by_hand() -> None:
    codebook_VK = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    vectors_NK = torch.tensor([[1.4, 0.0], [1.6, 0.0], [0.1, 1.1], [-5.0, -5.0]])
    assert nearest_code(vectors_NK, codebook_VK).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("is_masked", [False, True])
def test_nearest_codes_of_several_passes_are_those_of_one(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors_NK, codebook_VK = torch.randn(5_000, 4, generator=generator), torch.randn(256, 4, generator=generator)
    mask_NK = (torch.rand(5_000, 4, generator=generator) < 0.8).float() if is_masked else None
    real_NK = torch.ones(5_000, 4) if mask_NK is None else mask_NK
    error_NV = ((vectors_NK.unsqueeze(1) - codebook_VK).square() * real_NK.unsqueeze(1)).sum(dim=2)
    chosen_N = nearest_code(vectors_NK, codebook_VK, mask_NK)
    torch.testing.assert_close(error_NV.gather(1, chosen_N.unsqueeze(1)).squeeze(1), error_NV.amin(dim=1))


@pytest.mark.parametrize(("num_codes", "width"), [(2, 1), (256, 16), (1000, 64), (64, 200)])
@pytest.mark.parametrize("padding", ["none", "no padding", "last vector", "anywhere"])
def test_nearest_codes_are_the_first_of_the_greatest_gains(num_codes: int, width: int, padding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors_NK = torch.randn(1_100, width, generator=generator)
    codebook_VK = 0.8 * torch.randn(num_codes, width, generator=generator)
    codebook_VK[num_codes // 2 :] = codebook_VK[: num_codes - num_codes // 2].clone()
    vectors_NK[5], vectors_NK[6, 0], vectors_NK[7, 0] = codebook_VK[-1], torch.nan, torch.inf
    mask_NK = torch.ones_like(vectors_NK)
    if padding == "last vector":
        mask_NK[-1, width // 2 :] = 0
    elif padding == "anywhere":
        mask_NK = (torch.rand(mask_NK.shape, generator=generator) < 0.7).float()
    real_NK = None if padding == "none" else mask_NK
    expected_N = code_gain(vectors_NK, codebook_VK, real_NK).argmax(dim=1)
    assert torch.equal(nearest_code(vectors_NK, codebook_VK, real_NK), expected_N)
    assert nearest_code(vectors_NK[:0], codebook_VK, real_NK if real_NK is None else real_NK[:0]).shape == (0,)


@pytest.mark.parametrize("is_masked", [True, False])
def test_scores_of_whole_vectors_are_rounded_as_the_gains(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors_NK, codebook_VK = torch.randn(100, 16, generator=generator), torch.randn(256, 16, generator=generator)
    gain_NV = code_gain(vectors_NK, codebook_VK, torch.ones_like(vectors_NK) if is_masked else None)
    score_NV = vectors_NK @ codebook_VK.t() - half_squares(codebook_VK, is_masked)
    assert torch.equal(score_NV, gain_NV)


@pytest.mark.parametrize("is_trained", [True, False])
def test_codes_are_those_of_the_greatest_gains_level_after_level(is_trained: bool) -> None:
    rvq, vectors_NK = quantiser() if is_trained else random_codebooks(3, NUM_CODES), vectors(300, seed=1)
    residual_NK, codes_NL = vectors_NK, rvq.encode(vectors_NK)
    for level, codebook_VK in enumerate(rvq.codebooks_LVK):
        code_N = code_gain(residual_NK, codebook_VK, None).argmax(dim=1)
        assert torch.equal(codes_NL[:, level], code_N)
        residual_NK = residual_NK - codebook_VK[code_N]


def test_decode_takes_any_leading_dimensions() -> None:
    rvq, vectors_NK = quantiser(), vectors(24)
    codes_NL = rvq.encode(vectors_NK)
    assert torch.equal(rvq.decode(codes_NL.view(4, 6, 3)).flatten(0, 1), rvq.decode(codes_NL))


def test_more_kmeans_iterations_never_raise_the_error() -> None:
    errors = [error(quantiser(1, num_iterations), vectors()) for num_iterations in range(10)]
    # Each iteration's means and assignments can only lower the sum of squares; 1e-6 is its rounding.
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_kmeans_survives_more_codes_than_different_vectors() -> None:
    few_NK = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]).repeat(5, 1)
    rvq = ResidualQuantiser(2, NUM_CODES, WIDTH)
    rvq.initialise(few_NK, 20, torch.Generator().manual_seed(0))
    assert bool(rvq.codebooks_LVK.isfinite().all())
    assert error(rvq, few_NK) < 1e-10


def test_updates_follow_vectors_that_move() -> None:
    rvq = quantiser()
    moved_NK = vectors(seed=3) + 1.0
    before = error(rvq, moved_NK)
    for _ in range(40):
        rvq.collect(moved_NK, rvq.encode(moved_NK))
        rvq.update(whole)
    assert error(rvq, moved_NK) < 0.5 * before


def test_update_is_the_moving_average_by_hand() -> None:
    rvq = quantiser(num_levels=1)
    counts_V, sums_VK = rvq.counts_LV[0].double(), rvq.sums_LVK[0].double()
    vectors_NK = vectors(64, seed=4)
    codes_NL = rvq.encode(vectors_NK)
    rvq.collect(vectors_NK, codes_NL)
    rvq.update(whole)
    member_NV = torch.nn.functional.one_hot(codes_NL[:, 0], NUM_CODES).double()
    scale = len(vectors_NK) / NUM_CODES
    counts_V = 0.9 * counts_V + 0.1 * member_NV.sum(0) / scale
    sums_VK = 0.9 * sums_VK + 0.1 * (member_NV.t() @ vectors_NK.double()) / scale
    torch.testing.assert_close(rvq.codebooks_LVK[0].double(), sums_VK / counts_V.unsqueeze(1), rtol=1e-5, atol=1e-5)
    assert float(rvq.new_counts_LV.abs().sum() + rvq.new_sums_LVK.abs().sum()) == 0.0


def test_an_unused_code_keeps_its_place_for_a_while() -> None:
    rvq = quantiser(num_levels=1)
    one_NK = vectors(1).expand(32, -1)
    unused = torch.arange(NUM_CODES) != rvq.encode(one_NK[:1])[0, 0]
    before_VK = rvq.codebooks_LVK[0, unused].clone()
    for _ in range(5):
        rvq.collect(one_NK, torch.zeros(32, 1, dtype=torch.int64) + int((~unused).nonzero()))
        rvq.update(whole)
    torch.testing.assert_close(rvq.codebooks_LVK[0, unused], before_VK, rtol=1e-5, atol=1e-6)


def test_two_halves_summed_equal_the_whole_batch_bit_for_bit() -> None:
    # Multiples of 1/64 below 16: their float32 sums are exact in any order, so that equality can be asked for.
    vectors_NK = (vectors(128, seed=5) * 64).round() / 64
    alone, left, right = (quantiser() for _ in range(3))
    for rvq in (alone, left, right):
        rvq.codebooks_LVK.copy_((rvq.codebooks_LVK * 64).round() / 64)
    alone.collect(vectors_NK, alone.encode(vectors_NK))
    for rvq, part_NK in ((left, vectors_NK[:50]), (right, vectors_NK[50:])):
        rvq.collect(part_NK, rvq.encode(part_NK))
    total_counts_LV = left.new_counts_LV + right.new_counts_LV
    total_sums_LVK = left.new_sums_LVK + right.new_sums_LVK

    def summed(tensor: Tensor) -> Tensor:
        return tensor.copy_(total_counts_LV if tensor.dim() == 2 else total_sums_LVK)

    alone.update(whole)
    left.update(summed)
    right.update(summed)
    for name, expected in alone.state_dict().items():
        assert torch.equal(left.state_dict()[name], expected), name
        assert torch.equal(right.state_dict()[name], expected), name


def test_codebooks_are_buffers_and_statistics_of_a_step_are_not_saved() -> None:
    rvq = quantiser()
    assert not list(rvq.parameters())
    assert set(rvq.state_dict()) == {"codebooks_LVK", "counts_LV", "sums_LVK"}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    rvq = quantiser()
    for step in range(5):
        part_NK = vectors(64, seed=10 + step)[rank::2]
        rvq.collect(part_NK, rvq.encode(part_NK))
        rvq.update(all_reduce)
    torch.save(rvq.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_real_processes_hold_bit_equal_codebooks(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = quantiser()
    for step in range(5):
        vectors_NK = vectors(64, seed=10 + step)
        alone.collect(vectors_NK, alone.encode(vectors_NK))
        alone.update(whole)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Sums of halves round differently from the whole sum.
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["codebooks_LVK", "counts_LV", "sums_LVK"])
def test_statistics_stay_float32(name: str) -> None:
    assert getattr(quantiser(), name).dtype == torch.float32


def random_codebooks(num_levels: int, num_codes: int, **options: float) -> ResidualQuantiser:
    rvq = ResidualQuantiser(num_levels, num_codes, WIDTH, **options)  # pyright: ignore[reportArgumentType]
    rvq.codebooks_LVK.copy_(torch.randn(rvq.codebooks_LVK.shape, generator=torch.Generator().manual_seed(7)))
    return rvq


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_full_beam_finds_the_best_codes_by_exhaustive_search(is_masked: bool) -> None:
    # With as many paths as there are codes of all levels but the last, no partial sum is dropped.
    rvq, vectors_NK = random_codebooks(3, 4, beam=16), vectors(50)
    mask_NK = torch.ones_like(vectors_NK)
    mask_NK[::2, 1:3] = 1.0 - float(is_masked)
    every_CL = torch.tensor(list(itertools.product(range(4), repeat=3)))
    errors_NC = ((rvq.decode(every_CL) - vectors_NK.unsqueeze(1)).square() * mask_NK.unsqueeze(1)).sum(2)
    codes_NL = rvq.encode(vectors_NK, mask_NK if is_masked else None)
    found_N = ((rvq.decode(codes_NL) - vectors_NK).square() * mask_NK).sum(1)
    torch.testing.assert_close(found_N, errors_NC.min(dim=1).values, rtol=1e-4, atol=1e-4)


def test_a_wider_beam_lowers_the_error() -> None:
    errors = []
    for beam in (1, 2, 8):
        rvq = random_codebooks(4, 8, beam=beam)
        errors.append(error(rvq, vectors()))
    assert errors[2] < errors[1] < errors[0]


def test_a_dead_code_is_revived_on_a_vector_of_the_batch() -> None:
    rvq = ResidualQuantiser(1, NUM_CODES, WIDTH, decay=0.5, revive_below=0.2)
    rvq.initialise(vectors(), 8, torch.Generator().manual_seed(0))
    rvq.codebooks_LVK[0, 3] = 1e3
    rvq.counts_LV[0, 3], rvq.sums_LVK[0, 3] = 0.1, 100.0
    vectors_NK = vectors(64, seed=2)
    rvq.collect(vectors_NK, rvq.encode(vectors_NK))
    rvq.update(whole)
    assert any(torch.equal(rvq.codebooks_LVK[0, 3], vector_K) for vector_K in vectors_NK)
    assert float(rvq.counts_LV[0, 3]) == 1.0


@pytest.mark.parametrize(("count", "is_revived"), [(0.19, True), (0.21, False)])
def test_a_code_is_revived_below_its_share_of_the_mean_use(count: float, is_revived: bool) -> None:
    rvq = ResidualQuantiser(1, NUM_CODES, WIDTH, decay=1.0, revive_below=0.2)
    rvq.initialise(vectors(), 8, torch.Generator().manual_seed(0))
    rvq.codebooks_LVK[0, 3] = 1e3
    rvq.counts_LV[0, 3], rvq.sums_LVK[0, 3] = count, 1e3 * count
    vectors_NK = vectors(64, seed=2)
    rvq.collect(vectors_NK, rvq.encode(vectors_NK))
    rvq.update(whole)
    assert any(torch.equal(rvq.codebooks_LVK[0, 3], vector_K) for vector_K in vectors_NK) == is_revived


def test_padding_pulls_a_code_nowhere() -> None:
    rvq, vectors_NK = quantiser(1), vectors(64)
    mask_NK = torch.ones_like(vectors_NK)
    mask_NK[:, -1] = 0
    codes_NL = rvq.encode(vectors_NK, mask_NK)
    before_VK = rvq.codebooks_LVK[0].clone()
    rvq.collect(torch.where(mask_NK > 0, vectors_NK, torch.full_like(vectors_NK, 50.0)), codes_NL, mask_NK)
    rvq.update(whole)
    torch.testing.assert_close(rvq.codebooks_LVK[0, :, -1], before_VK[:, -1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rvq.codebooks_LVK[0, :, :-1], before_VK[:, :-1], atol=1e-3)


def test_without_revival_a_dead_code_stays_dead() -> None:
    rvq = ResidualQuantiser(1, NUM_CODES, WIDTH, decay=0.5)
    rvq.initialise(vectors(), 8, torch.Generator().manual_seed(0))
    rvq.codebooks_LVK[0, 3] = 1e3
    rvq.counts_LV[0, 3], rvq.sums_LVK[0, 3] = 0.1, 100.0
    for _ in range(3):
        rvq.collect(vectors(64), rvq.encode(vectors(64)))
        rvq.update(whole)
    assert float(rvq.codebooks_LVK[0, 3].min()) == pytest.approx(1e3)


def test_revival_puts_more_codes_to_use() -> None:
    used = []
    for revive_below in (0.0, 0.2):
        rvq = ResidualQuantiser(1, 32, WIDTH, decay=0.8, revive_below=revive_below)
        rvq.initialise(vectors(), 5, torch.Generator().manual_seed(0))
        for step in range(30):
            moved_NK = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(step)) + 6.0
            rvq.collect(moved_NK, rvq.encode(moved_NK))
            rvq.update(whole)
        last_NK = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(99)) + 6.0
        used.append(len(rvq.encode(last_NK).unique()))
    assert used[1] > 2 * used[0]
