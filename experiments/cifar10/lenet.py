"""LeNet on CIFAR-10 (lecture, exercise 1).

./launch.sh train --experiment=cifar10/lenet
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet


def config() -> Config:
    return Config(model=LeNet(), data=DataConfig("cifar10"))
