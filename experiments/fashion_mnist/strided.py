"""Down-sampling by strides on Fashion-MNIST (lecture, Down-sampling, example 2).

./launch.sh train --experiment=fashion_mnist/strided
The lecture: test accuracy 0.9055; Keras, run again with the same settings, 0.886.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import StridedCNN


def config() -> Config:
    return Config(model=StridedCNN(), data=DataConfig("fashion_mnist"))
