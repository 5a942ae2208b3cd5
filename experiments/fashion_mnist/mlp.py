"""The multi-layer perceptron on Fashion-MNIST (lecture, From MLP to CNN).

./launch.sh train --experiment=fashion_mnist/mlp
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP


def config() -> Config:
    return Config(model=MLP(), data=DataConfig("fashion_mnist"))
