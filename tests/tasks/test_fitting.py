import pytest
import torch
from torch import Tensor, nn

from raywgen.tasks import build_network, fit_stack, repeat_state

# Legend: N networks, S samples, F features.

RECIPE = {"name": "mlp", "widths": [6, 5, 3]}
NUM_SAMPLES = 50


def _problem(num: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = build_network(RECIPE)
    x_SF = torch.randn(NUM_SAMPLES, 6)
    labels_NS = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), num * NUM_SAMPLES, replacement=True).view(num, -1)
    return module, x_SF, labels_NS


def _plain_loop(
    start: dict[str, Tensor], x_SF: Tensor, labels_S: Tensor, seed: int, num_steps: int, batch_size: int
) -> dict[str, Tensor]:
    """One network, `torch.optim.Adam`, class weights by scikit-learn's "balanced" formula."""
    module = build_network(RECIPE)
    module.load_state_dict(start)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    count_C = labels_S.bincount(minlength=3)
    weight_C = len(labels_S) / ((count_C > 0).sum() * count_C.clamp(min=1))
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for _ in range(num_steps):
        if not batches:
            order_S = torch.randperm(len(labels_S), generator=generator)
            batches = [part for part in order_S.split(batch_size) if len(part) == batch_size]
        index_T = batches.pop(0)
        loss_T = nn.functional.cross_entropy(module(x_SF[index_T]), labels_S[index_T], reduction="none")
        optimizer.zero_grad()
        (loss_T * weight_C[labels_S[index_T]]).mean().backward()
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch_size", [16, NUM_SAMPLES])
def test_a_stack_is_as_many_single_loops(shared: bool, batch_size: int) -> None:
    module, x_SF, labels_NS = _problem(3)
    x_NSF = torch.stack([x_SF, x_SF + 0.5, -x_SF])
    seeds = [5, 6, 5]
    (final_N,) = fit_stack(
        module,
        repeat_state(module.state_dict(), 3),
        x_SF if shared else x_NSF,
        labels_NS,
        num_steps=20,
        batch_size=batch_size,
        learning_rate=0.01,
        order_seeds=seeds,
        record_steps=[20],
    )
    for index, seed in enumerate(seeds):
        alone = _plain_loop(
            module.state_dict(), x_SF if shared else x_NSF[index], labels_NS[index], seed, 20, batch_size
        )
        for name, tensor in alone.items():
            # Adam divides by the gradient's size, so rounding differences may grow to about 1e-4 of a step of 0.01.
            torch.testing.assert_close(final_N[name][index], tensor, rtol=1e-4, atol=1e-5)


def test_records_the_asked_steps_in_the_asked_order() -> None:
    module, x_SF, labels_NS = _problem(2)
    start_N = repeat_state(module.state_dict(), 2)
    options = {"batch_size": 16, "learning_rate": 0.01, "order_seeds": [1, 2]}
    late, begin, early = fit_stack(module, start_N, x_SF, labels_NS, num_steps=6, record_steps=[6, 0, 3], **options)
    (three,) = fit_stack(module, start_N, x_SF, labels_NS, num_steps=3, record_steps=[3], **options)
    for name, tensor in start_N.items():
        torch.testing.assert_close(begin[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(early[name], three[name], rtol=0, atol=0)
        assert not torch.equal(late[name], early[name])
        assert not late[name].requires_grad


def test_neither_the_start_nor_the_module_is_changed() -> None:
    module, x_SF, labels_NS = _problem(2)
    start_N = repeat_state(module.state_dict(), 2)
    before = [tensor.clone() for tensor in (*start_N.values(), *module.state_dict().values())]
    fit_stack(
        module, start_N, x_SF, labels_NS,
        num_steps=2, batch_size=16, learning_rate=0.1, order_seeds=[0, 0], record_steps=[2],
    )  # fmt: skip
    for old, new in zip(before, (*start_N.values(), *module.state_dict().values()), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_full_batches_know_no_order() -> None:
    module, x_SF, labels_NS = _problem(1)
    ends = [
        fit_stack(
            module, repeat_state(module.state_dict(), 1), x_SF, labels_NS[0],
            num_steps=10, batch_size=8, learning_rate=0.01, order_seeds=[seed], record_steps=[10], full_batch=True,
        )[0]
        for seed in (1, 2)
    ]  # fmt: skip
    alone = _plain_loop(module.state_dict(), x_SF, labels_NS[0], 0, 10, NUM_SAMPLES)
    for name, tensor in alone.items():
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=0)
        torch.testing.assert_close(ends[0][name][0], tensor, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_written_by_the_network_not_by_adam() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x_SF = torch.randn(NUM_SAMPLES, 6)
    (end_N,) = fit_stack(
        module, repeat_state(module.state_dict(), 2), x_SF, torch.arange(NUM_SAMPLES) % 3,
        num_steps=1, batch_size=NUM_SAMPLES, learning_rate=0.01, order_seeds=[0, 1], record_steps=[1],
    )  # fmt: skip
    module(x_SF)
    assert end_N["1.num_batches_tracked"].tolist() == [1, 1]
    for index in range(2):
        torch.testing.assert_close(end_N["1.running_mean"][index], module.state_dict()["1.running_mean"])


def test_a_class_that_is_missing_is_ignored() -> None:
    module, x_SF, _ = _problem(1)
    (end_N,) = fit_stack(
        module, repeat_state(module.state_dict(), 1), x_SF, torch.full((NUM_SAMPLES,), 2),
        num_steps=3, batch_size=16, learning_rate=0.01, order_seeds=[0], record_steps=[3],
    )  # fmt: skip
    assert all(bool(tensor.isfinite().all()) for tensor in end_N.values())
