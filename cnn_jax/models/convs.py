"""The lecture's stacks of convolutions for 28x28 grayscale images.

Each takes float32 [N, 28, 28, 1] (any other size and channels when initialised for it) and returns
logits [N, num_classes]. The shape comments are for 28x28.
"""

import flax.linen as nn
import jax

from cnn_jax.models.layers import Conv, Dense, Flatten, MaxPool, one_image_size


class ConvStack(nn.Module):
    """Convolutions with large kernels: 2,150,410 parameters on 28x28x1.

    Source: lecture, From MLP to CNN.
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(32, (7, 7))(image))  # [N, 22, 22, 32]
        x = nn.relu(Conv(64, (7, 7))(x))  # [N, 16, 16, 64]
        x = nn.relu(Conv(128, (7, 7))(x))  # [N, 10, 10, 128]
        x = nn.relu(Conv(256, (7, 7))(x))  # [N, 4, 4, 256]
        x = Flatten()(x)  # [N, 4096]
        return Dense(self.num_classes)(x)  # [N, 10]


class MaxPoolCNN(nn.Module):
    """Down-sampling by max pooling: 1,588,490 parameters on 28x28x1.

    Source: lecture, Down-sampling, example 1.
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(32, (3, 3))(image))  # [N, 26, 26, 32]
        x = nn.relu(Conv(64, (3, 3))(x))  # [N, 24, 24, 64]
        x = MaxPool((2, 2))(x)  # [N, 12, 12, 64]
        x = nn.relu(Conv(128, (3, 3))(x))  # [N, 10, 10, 128]
        x = nn.relu(Conv(256, (3, 3))(x))  # [N, 8, 8, 256]
        x = MaxPool((2, 2))(x)  # [N, 4, 4, 256]
        x = nn.relu(Conv(512, (3, 3))(x))  # [N, 2, 2, 512]
        x = Flatten()(x)  # [N, 2048]
        return Dense(self.num_classes)(x)  # [N, 10]


class StridedCNN(nn.Module):
    """Learned down-sampling by strides: 1,588,490 parameters on 28x28x1.

    Source: lecture, Down-sampling, example 2.
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(32, (3, 3))(image))  # [N, 26, 26, 32]
        x = nn.relu(Conv(64, (3, 3), strides=2)(x))  # [N, 12, 12, 64]
        x = nn.relu(Conv(128, (3, 3))(x))  # [N, 10, 10, 128]
        x = nn.relu(Conv(256, (3, 3), strides=2)(x))  # [N, 4, 4, 256]
        x = nn.relu(Conv(512, (3, 3))(x))  # [N, 2, 2, 512]
        x = Flatten()(x)  # [N, 2048]
        return Dense(self.num_classes)(x)  # [N, 10]


class SamePaddingCNN(nn.Module):
    """The strided network with 'same' padding everywhere: 1,818,890 parameters on 28x28x1.

    Source: lecture, Padding, example.
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Conv(32, (3, 3), padding="SAME")(image))  # [N, 28, 28, 32]
        x = nn.relu(Conv(64, (3, 3), strides=2, padding="SAME")(x))  # [N, 14, 14, 64]
        x = nn.relu(Conv(128, (3, 3), padding="SAME")(x))  # [N, 14, 14, 128]
        x = nn.relu(Conv(256, (3, 3), strides=2, padding="SAME")(x))  # [N, 7, 7, 256]
        x = nn.relu(Conv(512, (3, 3), padding="SAME")(x))  # [N, 7, 7, 512]
        x = Flatten()(x)  # [N, 25088]
        return Dense(self.num_classes)(x)  # [N, 10]
