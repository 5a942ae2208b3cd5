"""LeNet on the embedded dataset of garment silhouettes: the first run, without a network.

./launch.sh
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet


def config() -> Config:
    return Config(model=LeNet(), data=DataConfig("garments"), epochs=8)
