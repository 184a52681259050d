import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, repeat_state, stacked_logits

# Legend: N networks, S samples, F features, C classes.


class Normed(nn.Module):
    """A network with float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.outer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.norm(self.inner(x))))


def _perturbed(module: nn.Module, num: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: tensor + 0.3 * torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for name, tensor in module.state_dict().items()
        }
        for _ in range(num)
    ]


def _stack(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "buffers"])
def test_stacked_logits_are_those_of_each_network_alone(kind: str, shared: bool) -> None:
    torch.manual_seed(0)
    module = (build_network({"name": "mlp", "widths": [6, 5, 3]}) if kind == "mlp" else Normed()).eval()
    states = _perturbed(module, 4)
    x_NSF = torch.randn(4, 7, 6)
    stacked = stacked_logits(module, _stack(states), x_NSF[0] if shared else x_NSF)
    for index, state in enumerate(states):
        module.load_state_dict(state)
        alone_SC = module(x_NSF[0 if shared else index])
        # float32: a batched and a plain matrix product may sum in another order.
        torch.testing.assert_close(stacked[index], alone_SC, rtol=1e-5, atol=1e-6)


def test_gradients_reach_each_network_and_only_its_own_weights() -> None:
    torch.manual_seed(0)
    module = build_network({"name": "mlp", "widths": [6, 5, 3]})
    states = _perturbed(module, 3)
    state_N = {name: tensor.requires_grad_() for name, tensor in _stack(states).items()}
    x_SF, labels_S = torch.randn(9, 6), torch.arange(9) % 3
    balanced_cross_entropy(stacked_logits(module, state_N, x_SF), labels_S)[1].backward()
    module.load_state_dict(states[1])
    nn.functional.cross_entropy(module(x_SF), labels_S).backward()
    for name, parameter in module.named_parameters():
        grad_N = state_N[name].grad
        assert grad_N is not None
        assert parameter.grad is not None
        torch.testing.assert_close(grad_N[1], parameter.grad, rtol=1e-4, atol=1e-6)
        assert not grad_N[[0, 2]].any()


def test_train_mode_updates_the_running_statistics_of_the_stack_not_of_the_module() -> None:
    torch.manual_seed(0)
    module = Normed()
    state_N = repeat_state(module.state_dict(), 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stacked_logits(module, state_N, torch.randn(2, 8, 6))
    assert state_N["norm.num_batches_tracked"].tolist() == [1, 1]
    assert not torch.equal(state_N["norm.running_mean"][0], state_N["norm.running_mean"][1])
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_balanced_metrics_by_hand() -> None:
    # Three samples of class 0 (two right), one of class 1 (wrong); class 2 is absent.
    logits_NSC = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]]))
    labels_S = torch.tensor([0, 0, 0, 1])
    assert balanced_accuracy(logits_NSC, labels_S).item() == pytest.approx((2 / 3 + 0) / 2)
    mean_of_class_0 = (2 * torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 3
    mean_of_class_1 = torch.tensor(10.0).log()
    expected = (mean_of_class_0 + mean_of_class_1) / 2
    assert balanced_cross_entropy(logits_NSC, labels_S).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_metrics_agree_with_scikit_learn_and_class_weights(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NSC = torch.randn(4, 50, 3, generator=generator)
    labels_NS = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 200, replacement=True, generator=generator).view(4, 50)
    accuracy_N, loss_N = balanced_accuracy(logits_NSC, labels_NS), balanced_cross_entropy(logits_NSC, labels_NS)
    for logits_SC, labels_S, accuracy, loss in zip(logits_NSC, labels_NS, accuracy_N, loss_N, strict=True):
        predicted_S = logits_SC.argmax(dim=1)
        assert accuracy.item() == pytest.approx(
            balanced_accuracy_score(labels_S.numpy(), predicted_S.numpy()), abs=1e-6
        )
        # With class weights torch divides by the sum of the weights, which is the balanced mean.
        weight_C = 1 / labels_S.bincount(minlength=3).clamp(min=1).float()
        assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits_SC, labels_S, weight_C).item(), rel=1e-5)


def test_shared_labels_are_those_of_every_network() -> None:
    logits_NSC = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0))
    labels_S = torch.arange(20) % 2
    for measure in (balanced_accuracy, balanced_cross_entropy):
        torch.testing.assert_close(measure(logits_NSC, labels_S), measure(logits_NSC, labels_S.expand(3, 20)))
