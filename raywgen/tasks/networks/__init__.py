"""Networks by registry name or import path, built from a recipe `{"name": NAME, **arguments}`."""

from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.tasks.networks.head import Head
from raywgen.tasks.networks.lora import LoRANetwork
from raywgen.tasks.networks.mlp import mlp
from raywgen.tasks.networks.registry import NETWORKS, build_network, network_name, network_recipe
from raywgen.tasks.networks.resnet import ResNet, resnet50, resnet101
from raywgen.tasks.networks.tiny_cnn import TinyCnn, tiny_cnn, tiny_cnn_rgb
from raywgen.tasks.networks.vit import VisionTransformer, vit_b, vit_l, vit_s, vit_ti

__all__ = [
    "NETWORKS",
    "CifarResNet",
    "Conv4",
    "Head",
    "LoRANetwork",
    "ResNet",
    "TinyCnn",
    "VisionTransformer",
    "build_network",
    "mlp",
    "network_name",
    "network_recipe",
    "resnet50",
    "resnet101",
    "tiny_cnn",
    "tiny_cnn_rgb",
    "vit_b",
    "vit_l",
    "vit_s",
    "vit_ti",
]
