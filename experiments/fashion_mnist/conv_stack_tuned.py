"""The convolution stack on Fashion-MNIST with a better recipe: the same architecture, fewer epochs.

./launch.sh train --experiment=fashion_mnist/conv_stack_tuned
The lecture's architecture. Mirrored and cropped images, weight decay, a learning rate that falls to 0.
"""

import optax

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import ConvStack


def config() -> Config:
    return Config(
        model=ConvStack(),
        data=DataConfig("fashion_mnist", flip=True, crop_padding=2),
        epochs=4,
        batch_size=128,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.05,
    )
