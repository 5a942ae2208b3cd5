"""The lecture's network for CIFAR-10 (lecture, Image classification).

./launch.sh train --experiment=cifar10/cifar
Test accuracy 0.7079 (n = 1), about 500 s an epoch on one core of an Intel Xeon with AVX-512.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import CifarCNN


def config() -> Config:
    return Config(model=CifarCNN(), data=DataConfig("cifar10"))
