"""A stack of 7x7 convolutions on Fashion-MNIST (lecture, From MLP to CNN).

./launch.sh train --experiment=fashion_mnist/conv_stack
The lecture: test accuracy 0.8858.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import ConvStack


def config() -> Config:
    return Config(model=ConvStack(), data=DataConfig("fashion_mnist"))
