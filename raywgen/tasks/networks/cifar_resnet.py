"""Residual networks for CIFAR.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), section 4.2, with the
parameter-free shortcuts that section 3.3 calls option A. The `state_dict` names are those of the public checkpoints
(`conv1`, `bn1`, `layer{1,2,3}.{i}.{conv,bn}{1,2}`, `linear`).

Shape legend: S samples, F features of a sample, D channels, H height, W width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

DEPTHS = range(8, 111, 6)


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2: a first convolution, three stages of n blocks, average pooling, a linear head.

    Args:
        depth: 8, 14, 20, ... 110.
        widths: Channels of the three stages, none narrower than the one before it.
        num_classes: C.
        in_channels: Channels of an image.

    Raises:
        TaskError: There is no such depth, the widths are not three that grow, or a size is below 1.
    """

    def __init__(
        self, depth: int, widths: Sequence[int] = (16, 32, 64), num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        if depth not in DEPTHS:
            raise TaskError(f"depth={depth}: give 6n + 2 from 8 to 110, for instance {_nearest_depth(depth)}")
        if len(widths) != 3 or min(widths) < 1 or list(widths) != sorted(widths):
            raise TaskError(f"widths={list(widths)}: give three widths that do not shrink, for instance [16, 32, 64]")
        num_blocks = (depth - 2) // 6
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], 1, num_blocks)
        self.layer2 = _stage(widths[0], widths[1], 2, num_blocks)
        self.layer3 = _stage(widths[1], widths[2], 2, num_blocks)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`.

        Args:
            x: Floats `(S, in_channels, H, W)` (32x32 for CIFAR), or square images flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        x_SDHW = F.relu(self.bn1(self.conv1(as_images(x, self.in_channels))))
        x_SDHW = self.layer3(self.layer2(self.layer1(x_SDHW)))
        return self.linear(x_SDHW.mean(dim=(2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.width = width
        self.stride = stride
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x_SDHW: Tensor) -> Tensor:
        out_SDHW = F.relu(self.bn1(self.conv1(x_SDHW)))
        return F.relu(self.bn2(self.conv2(out_SDHW)) + option_a_shortcut(x_SDHW, self.width, self.stride))


def option_a_shortcut(x_SDHW: Tensor, width: int, stride: int) -> Tensor:
    """Returns the parameter-free shortcut: every `stride`-th pixel, and zeros for the new channels.

    The paper says only that zeros are added for the new channels. As in the public checkpoints, half of them come
    before the old channels and half (the larger half) after. The result is `(S, width, H', W')` with
    H' = ceil(H / stride) and W' = ceil(W / stride).

    Args:
        x_SDHW: A block's input, of any dtype, which is kept.
        width: Channels of the result, at least D.
        stride: Stride of the block.
    """
    extra = width - x_SDHW.shape[1]
    if extra == 0 and stride == 1:
        return x_SDHW
    return F.pad(x_SDHW[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))


def _stage(width_in: int, width: int, stride: int, num_blocks: int) -> nn.Module:
    rest = [_BasicBlock(width, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(_BasicBlock(width_in, width, stride), *rest)


def _nearest_depth(depth: int) -> int:
    return min(DEPTHS, key=lambda known: abs(known - depth))
