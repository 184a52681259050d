"""Plain convolutional networks of any channels and depth."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

_KERNEL = 3


class PlainCNN(nn.Module):
    """Layers of a 3x3 convolution, ReLU and max-pooling by 2 each, then a linear layer on all positions.

    Args:
        channels: Channels of each layer.
        num_classes: Classes.
        in_channels: Channels of an image.
        image_size: Height and width of an image; at least `2 ** len(channels)`.
        bias: Whether layers have biases.

    Raises:
        TaskError: There is no layer, a size is below 1, or the image is too small for so many layers.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        if not channels or min(channels) < 1 or image_size < 2 ** len(channels):
            raise TaskError(
                f"channels={list(channels)}, image_size={image_size}: give positive channels of at least one layer, "
                "and of no more layers than the image can be halved, for instance channels=[8, 16] for images of 8"
            )
        layers: list[nn.Module] = []
        size = image_size
        for width_in, width_out in zip([in_channels, *channels], channels, strict=False):
            padded = nn.Conv2d(width_in, width_out, _KERNEL, padding=_KERNEL // 2, bias=bias)
            layers += [padded, nn.ReLU(), nn.MaxPool2d(2)]
            size //= 2
        self.in_channels, self.image_size = in_channels, image_size
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels[-1] * size * size, num_classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`.

        Args:
            x: Floats `(S, in_channels, image_size, image_size)`, or the same flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        return self.head(self.features(as_images(x, self.in_channels, self.image_size)))
