"""The two standard CNNs of the public model zoos.

Source: Schürholt et al., "Model Zoos: A Dataset of Diverse Populations of Neural Network Models", NeurIPS 2022
(arXiv 2209.14764), its small and its larger CNN, and the code published with it. Nothing is padded; each layer is a
convolution, then max-pooling, then the activation. The `state_dict` names are those of that code (`module_list.0`,
`module_list.3`, ...), so that a network of its zoos loads with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


class TinyCnn(nn.Module):
    """Layers that run one after another on square images of one size.

    Args:
        modules: The layers, numbered as the published code numbers them.
        in_channels: Channels of an image.
        image_size: Height and width of an image.
    """

    def __init__(self, modules: Sequence[nn.Module], in_channels: int, image_size: int) -> None:
        super().__init__()
        self.module_list = nn.Sequential(*modules)
        self.in_channels = in_channels
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`.

        Args:
            x: Floats `(S, in_channels, image_size, image_size)`, or the same flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        return self.module_list(as_images(x, self.in_channels, self.image_size))


def tiny_cnn(activation: str = "tanh", num_classes: int = 10, in_channels: int = 1) -> TinyCnn:
    """The small CNN for 28x28 images: 2,464 values on grey ones (2,864 with `in_channels=3`).

    Args:
        activation: `tanh`, `gelu` or `relu`.
        num_classes: C.
        in_channels: 1 for grey, 3 for RGB.

    Raises:
        TaskError: The activation is unknown, or a size is below 1.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    act = _activation(activation)
    modules = [
        *(nn.Conv2d(in_channels, 8, 5), nn.MaxPool2d(2), act()),
        *(nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), act()),
        *(nn.Conv2d(6, 4, 2), act()),
        *(nn.Flatten(), nn.Linear(4 * 3 * 3, 20), act()),
        nn.Linear(20, num_classes),
    ]
    return TinyCnn(modules, in_channels, image_size=28)


def tiny_cnn_rgb(activation: str = "gelu", num_classes: int = 10, in_channels: int = 3) -> TinyCnn:
    """The larger CNN for 32x32 images: 10,853 values on RGB ones.

    The published code has a dropout layer after each activation also where nothing is dropped. Here an `nn.Identity`
    stands for it, so that the names agree and stacks of networks can be trained without a random operation. GELU as
    the default is raywgen's choice.

    Args:
        activation: `tanh`, `gelu` or `relu`.
        num_classes: C.
        in_channels: 1 for grey, 3 for RGB.

    Raises:
        TaskError: The activation is unknown, or a size is below 1.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    act = _activation(activation)
    modules = [
        *(nn.Conv2d(in_channels, 16, 3), nn.MaxPool2d(2), act(), nn.Identity()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), act(), nn.Identity()),
        *(nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), act(), nn.Identity()),
        *(nn.Flatten(), nn.Linear(15 * 2 * 2, 20), act(), nn.Identity()),
        nn.Linear(20, num_classes),
    ]
    return TinyCnn(modules, in_channels, image_size=32)


def _activation(name: str) -> Callable[[], nn.Module]:
    if name not in ACTIVATIONS:
        raise TaskError(f"unknown activation '{name}'; give one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
