"""All coders: what they add, whom a chunk sees, and that padding has no say.

Shape legend: B networks, M chunks, K values of a chunk, G place features, C channels, R rows, X columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raywgen.nn.coders import (
    CODERS,
    Coder,
    CoderKind,
    ConvolutionCoder,
    TransformerCoder,
    build_coder,
    check_coder,
    perceptron,
)
from raywgen.nn.coders.convolution import fold

K, G, WIDTH, CONTEXT = 6, 5, 16, 3
B, M = 2, 8


def coder_of(kind: CoderKind, *, is_trained: bool = True, num_layers: int = 1) -> Coder:
    torch.manual_seed(0)
    built = build_coder(kind, K, G, WIDTH, num_layers=num_layers, context=CONTEXT)
    if is_trained:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return built


def inputs(num_chunks: int = M) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, num_chunks, K, generator=generator), torch.randn(num_chunks, G, generator=generator)


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("num_chunks", [1, 3, 8])
def test_what_is_added_has_the_chunks_shape_and_is_zero_until_trained(kind: CoderKind, num_chunks: int) -> None:
    x_BMK, positions_MG = inputs(num_chunks)
    assert torch.equal(coder_of(kind, is_trained=False)(x_BMK, positions_MG), torch.zeros_like(x_BMK))
    added_BMK = coder_of(kind)(x_BMK, positions_MG)
    assert added_BMK.shape == x_BMK.shape
    assert float(added_BMK.detach().abs().min()) > 0


@pytest.mark.parametrize("kind", CODERS)
def test_places_and_masks_may_differ_from_network_to_network(kind: CoderKind) -> None:
    x_BMK, positions_MG = inputs()
    mask_MK = torch.ones(M, K)
    mask_MK[-1, 2:] = 0
    coder = coder_of(kind)
    expected = coder(x_BMK, positions_MG, mask_MK)
    each = coder(x_BMK, positions_MG.expand(B, -1, -1), mask_MK.expand(B, -1, -1))
    torch.testing.assert_close(each, expected)
    other_BMG = torch.stack([positions_MG, positions_MG.flip(0)])
    assert not torch.allclose(coder(x_BMK, other_BMG, mask_MK)[1], expected[1])


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_long_network_is_coded_in_passes_without_gradients(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x_BMK, positions_MG = inputs(11)
    if not is_shared:
        positions_MG = torch.stack([positions_MG, positions_MG.flip(0)])
    coder = coder_of("mlp")
    expected_BMK = coder(x_BMK, positions_MG)
    monkeypatch.setattr(perceptron, "_UNITS_OF_A_PASS", 3 * B * WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(coder(x_BMK, positions_MG), expected_BMK.detach())


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_padding_has_no_say(kind: CoderKind) -> None:
    x_BMK, positions_MG = inputs()
    mask_MK = torch.ones(M, K)
    mask_MK[-2, 2:] = 0
    mask_MK[-1] = 0
    garbage_BMK = torch.where(mask_MK > 0, x_BMK, torch.full_like(x_BMK, 1e3))
    strange_MG = positions_MG.clone()
    strange_MG[-1] = 1e3
    coder = coder_of(kind)
    clean, dirty = coder(x_BMK, positions_MG, mask_MK), coder(garbage_BMK, strange_MG, mask_MK)
    assert torch.equal(clean[:, :-1], dirty[:, :-1])
    # Without the mask it would have had.
    assert not torch.allclose(coder(garbage_BMK, positions_MG)[:, -2], clean[:, -2])


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("chunk", range(M))
def test_a_chunk_sees_its_block_and_nothing_else(kind: CoderKind, chunk: int) -> None:
    coder, (x_BMK, positions_MG) = coder_of(kind, num_layers=2), inputs()
    x_BMK.requires_grad_()
    (grad_BMK,) = torch.autograd.grad(coder(x_BMK, positions_MG)[0, chunk].square().sum(), x_BMK)
    seen = grad_BMK[0].abs().sum(dim=1) > 0
    block = chunk // coder.context
    assert seen.tolist() == [m // coder.context == block for m in range(M)]
    assert float(grad_BMK[1].abs().max()) == 0
    assert coder.context == (CONTEXT if kind == "transformer" else 1)


def test_attention_is_that_of_every_block_on_its_own() -> None:
    coder, (x_BMK, positions_MG) = coder_of("transformer", num_layers=2).double(), inputs()
    assert isinstance(coder, TransformerCoder)
    x_BMK, positions_MG = x_BMK.double(), positions_MG.double()
    added_BMK = coder(x_BMK, positions_MG)
    for b in range(B):
        for first in range(0, M, CONTEXT):
            block = slice(first, first + CONTEXT)
            states = coder.value(x_BMK[b : b + 1, block]) + coder.position(positions_MG[block])
            torch.testing.assert_close(added_BMK[b, block], coder.out(coder.trunk(states))[0], rtol=1e-12, atol=1e-12)


def test_convolution_by_hand() -> None:
    coder, (x_BMK, positions_MG) = coder_of("conv").double(), inputs()
    assert isinstance(coder, ConvolutionCoder)
    x_BMK, positions_MG = x_BMK.double(), positions_MG.double()
    added_BMK = coder(x_BMK, positions_MG)
    net = [coder.blocks[0].get_submodule(f"net.{position}") for position in range(6)]
    for b, m in ((0, 0), (1, 5)):
        image = convolved(x_BMK[b, m].reshape(1, 2, 3), coder.lift)
        image = image + (coder.position.weight @ positions_MG[m] + coder.position.bias)[:, None, None] + coder.pixel_CRX
        hidden = convolved(swish(normed(image, net[0])), net[2])
        image = image + convolved(swish(normed(hidden, net[3])), net[5])
        out = convolved(swish(normed(image, coder.out[0])), coder.out[2])
        torch.testing.assert_close(added_BMK[b, m], out.flatten(), rtol=1e-10, atol=1e-10)


def convolved(image_CRX: Tensor, layer: nn.Module) -> Tensor:
    """3 x 3, zeros around the image, pixel by pixel."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    rows, columns = image_CRX.shape[1:]
    out = torch.zeros(layer.out_channels, rows, columns, dtype=image_CRX.dtype)
    for r in range(rows):
        for x in range(columns):
            total = layer.bias.clone()
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= r + i < rows and 0 <= x + j < columns:
                        total = total + layer.weight[:, :, i + 1, j + 1] @ image_CRX[:, r + i, x + j]
            out[:, r, x] = total
    return out


def normed(image_CRX: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    groups = image_CRX.reshape(layer.num_groups, -1)
    mean, variance = groups.mean(dim=1, keepdim=True), groups.var(dim=1, keepdim=True, unbiased=False)
    scaled = ((groups - mean) / (variance + layer.eps).sqrt()).view(image_CRX.shape)
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


def swish(image_CRX: Tensor) -> Tensor:
    return image_CRX / (1 + torch.exp(-image_CRX))


@pytest.mark.parametrize(("length", "shape"), [(1, (1, 1)), (6, (2, 3)), (7, (1, 7)), (16, (4, 4)), (48, (6, 8))])
def test_chunks_fold_into_the_image_nearest_to_a_square(length: int, shape: tuple[int, int]) -> None:
    assert fold(length) == shape


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_parameters_are_as_many_as_the_docstrings_say(kind: CoderKind, num_layers: int) -> None:
    H, C = WIDTH, WIDTH // 4
    expected = {
        "mlp": H * H + H * (2 * K + G + 3) + K,
        "conv": num_layers * (18 * C * C + 6 * C) + C * (K + G + 22) + 1,
        "transformer": num_layers * (12 * H * H + 7 * H) + H * (2 * K + G + 3) + K,
    }
    assert sum(parameter.numel() for parameter in coder_of(kind, num_layers=num_layers).parameters()) == expected[kind]


@pytest.mark.parametrize("kind", CODERS)
def test_every_parameter_but_the_last_layers_waits_for_it(kind: CoderKind) -> None:
    """Zero at the start stops the gradient of all other layers for one step, and for no longer."""
    coder, (x_BMK, positions_MG) = coder_of(kind, is_trained=False), inputs()
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.1)
    target_BMK = torch.randn(x_BMK.shape, generator=torch.Generator().manual_seed(2))
    for step in range(2):
        optimizer.zero_grad()
        (coder(x_BMK, positions_MG) - target_BMK).square().mean().backward()
        moved = [
            float(parameter.grad.abs().max()) > 0 for parameter in coder.parameters() if parameter.grad is not None
        ]
        assert all(moved) == (step == 1)
        assert any(moved)
        optimizer.step()


def test_impossible_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="width=10: coder=conv takes a multiple of 4"):
        check_coder("conv", 10, 1, 1)
    with pytest.raises(ValueError, match="context=0"):
        check_coder("transformer", 16, 1, 0)
    check_coder("mlp", 7, 1, 1)
