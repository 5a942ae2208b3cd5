"""The convolution stack on Fashion-MNIST with a better recipe: the same architecture, fewer epochs.

./launch.sh train --experiment=fashion_mnist/conv_stack_tuned
Test accuracy 0.9047 ± 0.0017 (n = 3), about 210 s an epoch on two Zen 4 cores.

The lecture's architecture and batches of 32. Mirrored images, weight decay, a learning rate that falls
to 0. On 5,000 validation images, three epochs in batches of 128 reached 0.887, and 0.858 with a
learning rate of 3e-4; batches of 32 as in strided_tuned.
"""

import optax

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import ConvStack


def config() -> Config:
    return Config(
        model=ConvStack(),
        data=DataConfig("fashion_mnist", flip=True),
        epochs=4,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.05,
    )
