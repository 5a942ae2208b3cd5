"""LeNet, the network of the 1990s."""

import flax.linen as nn
import jax

from cnn_jax.models.layers import Conv, Dense, Flatten, MaxPool, one_image_size


class LeNet(nn.Module):
    """Convolution, pooling, dense: 61,706 parameters on 28x28x1, 83,126 on 32x32x3.

    Source: lecture, Padding, LeNet. Input [N, 28, 28, 1] float32 (any other size and channels when
    initialised for it), output logits [N, num_classes].
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(6, (5, 5), padding="SAME")(image))  # [N, 28, 28, 6]
        x = MaxPool((2, 2))(x)  # [N, 14, 14, 6]
        x = nn.relu(Conv(16, (5, 5))(x))  # [N, 10, 10, 16]
        x = MaxPool((2, 2))(x)  # [N, 5, 5, 16]
        x = Flatten()(x)  # [N, 400]
        x = nn.relu(Dense(120)(x))  # [N, 120]
        x = nn.relu(Dense(84)(x))  # [N, 84]
        return Dense(self.num_classes)(x)  # [N, 10]
