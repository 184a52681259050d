"""Vision transformers: Ti, S, B and L with patches of 16 pixels.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929), section 3.1, equations 1-4,
and table 1 (B, L); Touvron et al., "Training data-efficient image transformers", ICML 2021, table 1 (Ti, S). The
`state_dict` names are timm's (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.{i}.attn.qkv`, ..., `head`).

Shape legend: S samples, F features of a sample, T tokens (class token and patches), A heads, E width of a head,
H width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.images import as_images

MLP_RATIO = 4
NORM_EPS = 1e-6


class VisionTransformer(nn.Module):
    """Patches and a class token through pre-norm transformer blocks; the class token is read out.

    Args:
        width: H, a multiple of `num_heads`.
        num_layers: Blocks.
        num_heads: A.
        num_classes: C.
        image_size: Height and width of an image, a multiple of `patch_size`.
        patch_size: Height and width of a patch.
        in_channels: Channels of an image.

    Raises:
        TaskError: A size is below 1, or does not divide as it must.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(width=width, num_layers=num_layers, num_heads=num_heads, num_classes=num_classes)
        check_sizes(image_size=image_size, patch_size=patch_size, in_channels=in_channels)
        if width % num_heads:
            raise TaskError(f"width={width}: give a multiple of num_heads={num_heads}")
        if image_size % patch_size:
            raise TaskError(f"image_size={image_size}: give a multiple of patch_size={patch_size}")
        self.in_channels = in_channels
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, width))
        self.patch_embed = _PatchEmbedding(in_channels, width, patch_size)
        self.blocks = nn.Sequential(*(_EncoderBlock(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, C)`.

        Args:
            x: Floats `(S, in_channels, image_size, image_size)`, or the same flattened to `(S, F)`.

        Raises:
            TaskError: The inputs have another shape.
        """
        patches_STH = self.patch_embed(as_images(x, self.in_channels, self.image_size))
        class_S1H = self.cls_token.expand(len(patches_STH), -1, -1)
        x_STH = torch.cat([class_S1H, patches_STH], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x_STH)[:, 0]))

    def _initialise(self) -> None:
        """Starts as timm does: truncated normals of deviation 0.02, biases at zero, the class token close to it."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def vit_ti(num_classes: int = 1000, image_size: int = 224, patch_size: int = 16, in_channels: int = 3) -> nn.Module:
    """ViT-Ti: 5,717,416 parameters at 1000 classes and 224 pixels; arguments and errors as `VisionTransformer`."""
    return VisionTransformer(192, 12, 3, num_classes, image_size, patch_size, in_channels)


def vit_s(num_classes: int = 1000, image_size: int = 224, patch_size: int = 16, in_channels: int = 3) -> nn.Module:
    """ViT-S: 22,050,664 parameters at 1000 classes and 224 pixels; arguments and errors as `VisionTransformer`."""
    return VisionTransformer(384, 12, 6, num_classes, image_size, patch_size, in_channels)


def vit_b(num_classes: int = 1000, image_size: int = 224, patch_size: int = 16, in_channels: int = 3) -> nn.Module:
    """ViT-B: 86,567,656 parameters at 1000 classes and 224 pixels; arguments and errors as `VisionTransformer`."""
    return VisionTransformer(768, 12, 12, num_classes, image_size, patch_size, in_channels)


def vit_l(num_classes: int = 1000, image_size: int = 224, patch_size: int = 16, in_channels: int = 3) -> nn.Module:
    """ViT-L: 304,326,632 parameters at 1000 classes and 224 pixels; arguments and errors as `VisionTransformer`."""
    return VisionTransformer(1024, 24, 16, num_classes, image_size, patch_size, in_channels)


class _PatchEmbedding(nn.Module):
    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = _Mlp(width)

    def forward(self, x_STH: Tensor) -> Tensor:
        x_STH = x_STH + self.attn(self.norm1(x_STH))
        return x_STH + self.mlp(self.norm2(x_STH))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_STH: Tensor) -> Tensor:
        qkv = self.qkv(x_STH).unflatten(-1, (3, self.num_heads, -1))
        query_SATE, key_SATE, value_SATE = qkv.permute(2, 0, 3, 1, 4)
        mixed_SATE = F.scaled_dot_product_attention(query_SATE, key_SATE, value_SATE)
        return self.proj(mixed_SATE.transpose(1, 2).flatten(-2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_STH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_STH)))
