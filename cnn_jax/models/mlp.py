"""The multi-layer perceptron that the convolutional networks are compared with."""

import flax.linen as nn
import jax

from cnn_jax.models.layers import Dense, Flatten, one_image_size


class MLP(nn.Module):
    """Flattens the image, which loses its neighbourhoods: 101,770 parameters on 28x28x1.

    Source: lecture, From MLP to CNN (the slides give no sizes; these are ours).
    Input [N, H, W, C] float32, output logits [N, num_classes].
    """

    num_classes: int = 10

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = Flatten()(image)  # [N, 784]
        x = nn.relu(Dense(128)(x))  # [N, 128]
        return Dense(self.num_classes)(x)  # [N, 10]
