"""LeNet on Fashion-MNIST (lecture, Padding, LeNet and exercise 1).

./launch.sh train --experiment=fashion_mnist/lenet
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet


def config() -> Config:
    return Config(model=LeNet(), data=DataConfig("fashion_mnist"))
