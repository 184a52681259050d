"""Bottleneck residual networks for ImageNet: ResNet-50 and ResNet-101.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), section 4.1, table 1;
projection shortcuts where the shape changes (option B of section 3.3). As in torchvision, whose `state_dict` names
and shapes these are, a block that halves the image does so in its 3x3 convolution, not in its first 1x1.

Shape legend: S samples, F features of a sample, D channels, H height, W width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

EXPANSION = 4


class ResNet(nn.Module):
    """A 7x7 convolution and pooling, four stages of bottleneck blocks, average pooling, a linear head.

    Args:
        num_blocks: Blocks of the four stages.
        num_classes: C.
        in_channels: Channels of an image.

    Raises:
        TaskError: A size is below 1.
    """

    def __init__(self, num_blocks: Sequence[int], num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 1, num_blocks[0])
        self.layer2 = _stage(256, 128, 2, num_blocks[1])
        self.layer3 = _stage(512, 256, 2, num_blocks[2])
        self.layer4 = _stage(1024, 512, 2, num_blocks[3])
        self.fc = nn.Linear(512 * EXPANSION, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`.

        Args:
            x: Floats `(S, in_channels, H, W)` (224x224 for ImageNet), or square images flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        x_SDHW = F.relu(self.bn1(self.conv1(as_images(x, self.in_channels))))
        x_SDHW = F.max_pool2d(x_SDHW, 3, stride=2, padding=1)
        x_SDHW = self.layer4(self.layer3(self.layer2(self.layer1(x_SDHW))))
        return self.fc(x_SDHW.mean(dim=(2, 3)))


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-50: 25,557,032 parameters for 1000 classes; arguments and errors as `ResNet`."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels)


def resnet101(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-101: 44,549,160 parameters for 1000 classes; arguments and errors as `ResNet`."""
    return ResNet((3, 4, 23, 3), num_classes, in_channels)


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = width * EXPANSION
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.downsample = None
        if stride != 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x_SDHW: Tensor) -> Tensor:
        out_SDHW = F.relu(self.bn1(self.conv1(x_SDHW)))
        out_SDHW = F.relu(self.bn2(self.conv2(out_SDHW)))
        shortcut_SDHW = x_SDHW if self.downsample is None else self.downsample(x_SDHW)
        return F.relu(self.bn3(self.conv3(out_SDHW)) + shortcut_SDHW)


def _stage(width_in: int, width: int, stride: int, num_blocks: int) -> nn.Module:
    rest = [_Bottleneck(width * EXPANSION, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(_Bottleneck(width_in, width, stride), *rest)
