"""The lecture's network for 32x32 colour images."""

import flax.linen as nn
import jax

from cnn_jax.models.layers import Conv, Dense, Flatten, one_image_size


class CifarCNN(nn.Module):
    """Six convolutions, half of them strided: 14,682,442 parameters on 32x32x3.

    Source: lecture, Image classification. Input [N, 32, 32, 3] float32 (any other size and channels
    when initialised for it), output logits [N, num_classes].
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(32, (3, 3), padding="SAME")(image))  # [N, 32, 32, 32]
        x = nn.relu(Conv(64, (3, 3), strides=2, padding="SAME")(x))  # [N, 16, 16, 64]
        x = nn.relu(Conv(128, (3, 3), padding="SAME")(x))  # [N, 16, 16, 128]
        x = nn.relu(Conv(256, (3, 3), strides=2, padding="SAME")(x))  # [N, 8, 8, 256]
        x = nn.relu(Conv(512, (3, 3), padding="SAME")(x))  # [N, 8, 8, 512]
        x = nn.relu(Conv(1024, (3, 3), strides=2, padding="SAME")(x))  # [N, 4, 4, 1024]
        x = Flatten()(x)  # [N, 16384]
        x = nn.relu(Dense(512)(x))  # [N, 512]
        return Dense(self.num_classes)(x)  # [N, 10]
