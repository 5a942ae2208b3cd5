"""Strides on Fashion-MNIST with a better recipe: the same architecture in fewer epochs.

./launch.sh train --experiment=fashion_mnist/strided_tuned
Test accuracy 0.9170 ± 0.0018 (n = 3), about 65 s an epoch on two Zen 4 cores.

The lecture's architecture and batches of 32. Mirrored images, weight decay, a learning rate that falls
to 0. On 5,000 validation images, four epochs reached 0.911; in batches of 128 0.892, and with crops
as well 0.879.
"""

import optax

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import StridedCNN


def config() -> Config:
    return Config(
        model=StridedCNN(),
        data=DataConfig("fashion_mnist", flip=True),
        epochs=5,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.05,
    )
