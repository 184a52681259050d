"""Conv-4, the encoder of few-shot learning.

Source: Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016, section 4.1; Snell et al.,
"Prototypical Networks for Few-shot Learning", NeurIPS 2017, section 3.1.

Shape legend: S samples, F features of a sample, E features of the encoder, C classes.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

NUM_BLOCKS = 4


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling, with or without a linear head.

    Args:
        in_channels: Channels of an image.
        num_classes: C; None leaves the head out.
        width: Channels of every block.
        image_size: Height and width of an image; 28 gives E = `width`.

    Raises:
        TaskError: A size is below 1, or the image is smaller than the four poolings need.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int | None = None, width: int = 64, image_size: int = 28
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, num_classes=1 if num_classes is None else num_classes, width=width)
        side = image_size // 2**NUM_BLOCKS
        if side < 1:
            raise TaskError(f"image_size={image_size}: four poolings leave nothing of it; give at least 16")
        self.in_channels = in_channels
        self.image_size = image_size
        widths_in = [in_channels] + [width] * (NUM_BLOCKS - 1)
        self.blocks = nn.Sequential(*(_block(width_in, width) for width_in in widths_in))
        self.head = None if num_classes is None else nn.Linear(width * side**2, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns features `(S, E)`, E = `width * (image_size // 16)**2`.

        Args:
            x: Floats `(S, in_channels, image_size, image_size)`, or the same flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        return self.blocks(as_images(x, self.in_channels, self.image_size)).flatten(1)

    def last_blocks(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of the last two blocks, each flattened `(S, E)`; the last ones are `features(x)`."""
        before_last = self.blocks[:-1](as_images(x, self.in_channels, self.image_size))
        return [before_last.flatten(1), self.blocks[-1](before_last).flatten(1)]

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`, or features `(S, E)` without a head; inputs and errors as `features`."""
        features_SE = self.features(x)
        return features_SE if self.head is None else self.head(features_SE)


def _block(width_in: int, width_out: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(width_in, width_out, 3, padding=1),
            bn=nn.BatchNorm2d(width_out),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
        )
    )
