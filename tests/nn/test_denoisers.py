"""Denoisers: what a permutation of classes or samples does, who sees whom, any number of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.nn.denoisers import ChunkDenoiser, FlatDenoiser, HeadDenoiser, TimeEncoder
from raywgen.nn.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

B, N, F, R, S, D = 2, 3, 5, 6, 12, 11
M, K, G, H, MAX_CLASSES = 7, 4, 9, 16, 4


@pytest.fixture(scope="module")
def head() -> HeadDenoiser:
    torch.manual_seed(0)
    return HeadDenoiser(F, width=H, num_layers=2).double()


@pytest.fixture(scope="module")
def flat() -> FlatDenoiser:
    torch.manual_seed(0)
    return FlatDenoiser(D, F, MAX_CLASSES, width=H, num_layers=2).double()


@pytest.fixture(scope="module")
def chunks() -> ChunkDenoiser:
    torch.manual_seed(0)
    return ChunkDenoiser(
        chunk_length=K,
        num_position_features=G,
        num_features=F,
        max_classes=MAX_CLASSES,
        width=H,
        num_layers=2,
        num_heads=2,
    ).double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support(num_classes: int, num_samples: int = S) -> tuple[Tensor, Tensor]:
    """Samples `(B, S, F)` and labels `(B, S)` that hold every class."""
    labels_BS = torch.stack([(torch.arange(num_samples) * (b + 1) + b) % num_classes for b in range(B)])
    return drawn(B, num_samples, F, seed=1) + labels_BS.unsqueeze(-1), labels_BS


def times() -> Tensor:
    return torch.tensor([[0.0, 0.35, 0.9], [0.1, 0.1, 0.5]], dtype=torch.float64)


@given(permutation=st.permutations(range(4)))
@settings(max_examples=24)
def test_permuted_classes_permute_the_rows_of_a_head(head: HeadDenoiser, permutation: list[int]) -> None:
    x_BnCR, (samples_BSF, labels_BS) = drawn(B, N, 4, R), support(4)
    order = torch.tensor(permutation)
    plain = head(x_BnCR, times(), head.embed_condition(samples_BSF, labels_BS, 4))
    # What was class order[c] is class c now.
    condition_embedding = head.embed_condition(samples_BSF, order.argsort()[labels_BS], 4)
    # Sums over classes in another order.
    torch.testing.assert_close(
        head(x_BnCR[:, :, order], times(), condition_embedding), plain[:, :, order], rtol=1e-10, atol=1e-12
    )


def test_permuting_labels_alone_changes_a_head(head: HeadDenoiser) -> None:
    """So the test above could fail."""
    x_BnCR, (samples_BSF, labels_BS) = drawn(B, N, 4, R), support(4)
    plain = head(x_BnCR, times(), head.embed_condition(samples_BSF, labels_BS, 4))
    other = head(x_BnCR, times(), head.embed_condition(samples_BSF, (labels_BS + 1) % 4, 4))
    assert float((plain - other).detach().abs().mean()) > 1e-2


@pytest.mark.parametrize("num_classes", [2, 3, 5, 20])
def test_a_head_takes_any_number_of_classes(head: HeadDenoiser, num_classes: int) -> None:
    samples_BSF, labels_BS = support(num_classes, num_samples=2 * num_classes)
    condition_embedding = head.embed_condition(samples_BSF, labels_BS, num_classes)
    assert condition_embedding.shape[:2] == (B, num_classes)
    out = head(drawn(B, N, num_classes, R), times(), condition_embedding)
    assert out.shape == (B, N, num_classes, R)
    assert bool(out.isfinite().all())


def test_classes_see_each_other_through_their_means(head: HeadDenoiser) -> None:
    x_BnCR, (samples_BSF, labels_BS) = drawn(B, N, 3, R), support(3)
    condition_embedding = head.embed_condition(samples_BSF, labels_BS, 3)
    other = x_BnCR.clone()
    other[:, :, 2] += 1.0
    moved_BnCR = (head(x_BnCR, times(), condition_embedding) - head(other, times(), condition_embedding)).detach().abs()
    assert float(moved_BnCR[:, :, 0].min()) > 1e-6


@given(order=st.permutations(range(S)))
@settings(max_examples=20)
def test_the_order_of_support_samples_does_not_matter(
    head: HeadDenoiser, flat: FlatDenoiser, chunks: ChunkDenoiser, order: list[int]
) -> None:
    samples_BSF, labels_BS = support(4)
    for embed_condition in (lambda x, y: head.embed_condition(x, y, 4), flat.embed_condition, chunks.embed_condition):
        plain, shuffled = (
            embed_condition(samples_BSF, labels_BS),
            embed_condition(samples_BSF[:, order], labels_BS[:, order]),
        )
        torch.testing.assert_close(plain, shuffled, rtol=1e-10, atol=1e-12)


def test_a_head_is_told_means_and_scatter_of_the_classes_in_the_support_sets_frame(head: HeadDenoiser) -> None:
    samples_BSF, labels_BS = support(3)
    known_BCI = head.known(samples_BSF, labels_BS, 3)
    for b in range(B):
        classes = [samples_BSF[b][labels_BS[b] == c] for c in range(3)]
        centre_F = torch.stack([class_XF.mean(dim=0) for class_XF in classes]).mean(dim=0)
        spread = (samples_BSF[b] - centre_F).square().mean().sqrt()
        for c, class_XF in enumerate(classes):
            mean_F, scatter_F = (class_XF.mean(dim=0) - centre_F) / spread, class_XF.var(dim=0, unbiased=False)
            # A variance as a difference of squares.
            expected_I = torch.cat([mean_F, scatter_F / spread.square()])
            torch.testing.assert_close(known_BCI[b, c], expected_I, rtol=1e-10, atol=1e-12)


def test_one_sample_of_a_class_has_no_scatter_and_an_absent_class_lies_at_the_centre(head: HeadDenoiser) -> None:
    samples_BSF, labels_BS = drawn(B, 2, F), torch.tensor([[0, 1], [1, 0]])
    known_BCI = head.known(samples_BSF, labels_BS, 3)
    assert float(known_BCI[..., F:].abs().max()) < 1e-12
    torch.testing.assert_close(head.frame(samples_BSF, labels_BS, 3).centre_BF, samples_BSF.mean(dim=1))
    assert bool((known_BCI[:, 2] == 0).all())


@given(scale=st.floats(0.05, 20.0), shift=st.floats(-50.0, 50.0))
@settings(max_examples=20)
def test_a_shift_and_a_scale_of_all_features_change_no_logit(head: HeadDenoiser, scale: float, shift: float) -> None:
    (samples_BSF, labels_BS), query_BQF = support(3), drawn(B, 9, F, seed=3)
    shift_F = shift * drawn(F, seed=4)

    def logits_of(alpha: float, offset_F: Tensor) -> Tensor:
        shown_BSF = alpha * samples_BSF + offset_F
        frame = head.frame(shown_BSF, labels_BS, 3)
        rows_BnCR = head(drawn(B, N, 3, R), times(), head.embed_condition(shown_BSF, labels_BS, 3))
        rows_BnCR = head.out_of_frame(rows_BnCR, frame)
        weight, bias = rows_BnCR[..., :-1], rows_BnCR[..., -1] * F**0.5
        return torch.einsum("bncf,bqf->bnqc", weight, alpha * query_BQF + offset_F) + bias.unsqueeze(2)

    plain = logits_of(1.0, torch.zeros(F, dtype=torch.float64))
    # Offsets of some hundreds cost digits.
    torch.testing.assert_close(logits_of(scale, shift_F), plain, rtol=1e-7, atol=1e-7)


@given(num_classes=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_head_into_the_frame_is_the_same_function_and_comes_back(
    head: HeadDenoiser, num_classes: int, seed: int
) -> None:
    samples_BSF, labels_BS = support(num_classes)
    rows_BACR = drawn(B, 2, num_classes, R, seed=seed)
    frame = head.frame(samples_BSF, labels_BS, num_classes)
    inside_BACR = head.into_frame(rows_BACR, frame)
    torch.testing.assert_close(head.out_of_frame(inside_BACR, frame), rows_BACR, rtol=1e-10, atol=1e-10)
    scaled_BSF = (samples_BSF - frame.centre_BF.unsqueeze(1)) / frame.spread_B[:, None, None]

    def logits(rows: Tensor, x_BSF: Tensor) -> Tensor:
        return torch.einsum("bkcf,bsf->bksc", rows[..., :-1], x_BSF) + rows[..., -1].unsqueeze(2) * F**0.5

    expected = logits(rows_BACR, samples_BSF)
    found = logits(torch.cat([inside_BACR[..., :-1] * head.spread, inside_BACR[..., -1:]], dim=-1), scaled_BSF)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_chunks_come_back_in_their_shape(chunks: ChunkDenoiser) -> None:
    condition_BH = chunks.embed_condition(*support(MAX_CLASSES))
    assert condition_BH.shape == (B, H)
    for num_chunks in (1, M):
        out = chunks(drawn(B, N, num_chunks, K), times(), condition_BH, drawn(num_chunks, G, seed=2))
        assert out.shape == (B, N, num_chunks, K)


def test_a_later_chunk_reaches_an_earlier_one(chunks: ChunkDenoiser) -> None:
    x_BnMK, positions_MG, condition_BH = (
        drawn(B, N, M, K),
        drawn(M, G, seed=2),
        chunks.embed_condition(*support(MAX_CLASSES)),
    )
    other = x_BnMK.clone()
    other[:, :, -1] += 1.0
    moved = (
        chunks(x_BnMK, times(), condition_BH, positions_MG) - chunks(other, times(), condition_BH, positions_MG)
    ).abs()
    assert bool((moved.amax(dim=-1) > 1e-6).all())


@pytest.mark.parametrize("is_causal", [True, False])
def test_only_a_causal_transformer_hides_what_comes_later(is_causal: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer(H, num_layers=2, num_heads=2, is_causal=is_causal).double().eval()
    x_BTH = drawn(B, M, H)
    other = x_BTH.clone()
    other[:, -1] += 1.0
    moved_BT = (transformer(x_BTH) - transformer(other)).abs().amax(dim=-1)
    assert bool((moved_BT[:, -1] > 1e-6).all())
    assert bool((moved_BT[:, :-1] == 0).all()) == is_causal
    assert bool((moved_BT[:, :-1] > 1e-6).all()) != is_causal


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_noised_versions_and_tasks_do_not_see_each_other(
    kind: str, head: HeadDenoiser, flat: FlatDenoiser, chunks: ChunkDenoiser
) -> None:
    samples_BSF, labels_BS = support(MAX_CLASSES)
    positions_MG = drawn(M, G, seed=2)

    def predict(x: Tensor, time_Bn: Tensor, part: slice = slice(None)) -> Tensor:
        if kind == "head":
            return head(x, time_Bn, head.embed_condition(samples_BSF[part], labels_BS[part], MAX_CLASSES))
        if kind == "flat":
            return flat(x, time_Bn, flat.embed_condition(samples_BSF[part], labels_BS[part]))
        return chunks(x, time_Bn, chunks.embed_condition(samples_BSF[part], labels_BS[part]), positions_MG)

    x = drawn(B, N, *{"head": (MAX_CLASSES, R), "flat": (D,), "chunks": (M, K)}[kind])
    whole = predict(x, times())
    for b in range(B):
        for n in range(N):
            alone = predict(x[b : b + 1, n : n + 1], times()[b : b + 1, n : n + 1], slice(b, b + 1))
            # Matrix products of other sizes round differently.
            torch.testing.assert_close(alone[0, 0], whole[b, n], rtol=1e-9, atol=1e-11)
    other_times = times()
    other_times[0, 1] += 0.2
    changed = (predict(x, other_times) - whole).abs().reshape(B, N, -1).amax(dim=-1) > 1e-6
    assert changed.tolist() == [[False, True, False], [False, False, False]]


def test_times_of_long_chains_are_told_apart() -> None:
    torch.manual_seed(0)
    encoded_TH = TimeEncoder(H)(torch.arange(101) / 100)
    distance_TT = (torch.cdist(encoded_TH, encoded_TH) + torch.eye(101)).detach()
    assert encoded_TH.shape == (101, H)
    assert float(distance_TT.min()) > 1e-2


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "head":
        denoiser = HeadDenoiser(F, width=H, num_layers=2).double()
        out = denoiser(drawn(B, N, 4, R), times(), denoiser.embed_condition(*support(4), 4))
    elif kind == "flat":
        denoiser = FlatDenoiser(D, F, MAX_CLASSES, width=H, num_layers=2).double()
        out = denoiser(drawn(B, N, D), times(), denoiser.embed_condition(*support(4)))
    else:
        denoiser = ChunkDenoiser(
            chunk_length=K,
            num_position_features=G,
            num_features=F,
            max_classes=MAX_CLASSES,
            width=H,
            num_layers=2,
            num_heads=2,
        ).double()
        out = denoiser(drawn(B, N, M, K), times(), denoiser.embed_condition(*support(4)), drawn(M, G, seed=2))
    out.square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
