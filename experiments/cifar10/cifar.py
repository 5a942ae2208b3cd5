"""The lecture's network for CIFAR-10 (lecture, Image classification).

./launch.sh train --experiment=cifar10/cifar
Test accuracy 0.7079 ± 0.0120 (n = 3), about 320 s an epoch on one Zen 5 core.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import CifarCNN


def config() -> Config:
    return Config(model=CifarCNN(), data=DataConfig("cifar10"))
