"""The architectures of the lecture. `module.apply({"params": params}, image)` returns logits."""

from cnn_jax.models.cifar import CifarCNN
from cnn_jax.models.convolutional import Convolutional
from cnn_jax.models.convs import ConvStack, MaxPoolCNN, SamePaddingCNN, StridedCNN
from cnn_jax.models.fully_conv import FullyConvCNN
from cnn_jax.models.lenet import LeNet
from cnn_jax.models.mlp import MLP
from cnn_jax.models.speedrun import SpeedrunCNN

__all__ = [
    "MLP",
    "CifarCNN",
    "ConvStack",
    "Convolutional",
    "FullyConvCNN",
    "LeNet",
    "MaxPoolCNN",
    "SamePaddingCNN",
    "SpeedrunCNN",
    "StridedCNN",
]
