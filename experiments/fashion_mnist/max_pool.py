"""Down-sampling by max pooling on Fashion-MNIST (lecture, Down-sampling, example 1).

./launch.sh train --experiment=fashion_mnist/max_pool
The lecture: test accuracy 0.9125.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MaxPoolCNN


def config() -> Config:
    return Config(model=MaxPoolCNN(), data=DataConfig("fashion_mnist"))
