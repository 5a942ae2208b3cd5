"""The strided network with 'same' padding on Fashion-MNIST (lecture, Padding).

./launch.sh train --experiment=fashion_mnist/same_padding
Test accuracy 0.9085 (n = 1), about 250 s an epoch on one core of an Intel Xeon with AVX-512.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import SamePaddingCNN


def config() -> Config:
    return Config(model=SamePaddingCNN(), data=DataConfig("fashion_mnist"))
