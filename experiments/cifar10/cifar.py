"""The lecture's network for CIFAR-10 (lecture, Image classification).

./launch.sh train --experiment=cifar10/cifar
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import CifarCNN


def config() -> Config:
    return Config(model=CifarCNN(), data=DataConfig("cifar10"))
