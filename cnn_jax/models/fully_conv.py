"""A network of convolutions only, for images of any size from 28x28 up."""

import flax.linen as nn
import jax

from cnn_jax.models.layers import Conv


class FullyConvCNN(nn.Module):
    """Dense layers become convolutions: 6,816,010 parameters, for every size from 28x28 up.

    Source: lecture, 1x1 Convolution. Input [N, H, W, C] float32, output logits [N, h, w, num_classes]:
    a map of class scores, each seeing one window of the image; 1x1 on 28x28, 10x10 on 64x64.

    Raises:
      ValueError: the image is smaller than 28x28.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        height, width = image.shape[1:3]
        # The 7x7 convolution needs a map of at least 7x7. 25 pixels are enough for that, but the
        # lecture's window is 28x28, and every score must see a whole one.
        if height < 28 or width < 28:
            raise ValueError(f"FullyConvCNN takes images from 28x28 up, got {height}x{width}")
        x = nn.relu(Conv(32, (3, 3), padding="SAME")(image))  # [N, 28, 28, 32]
        x = nn.relu(Conv(64, (3, 3), strides=2, padding="SAME")(x))  # [N, 14, 14, 64]
        x = nn.relu(Conv(128, (3, 3), padding="SAME")(x))  # [N, 14, 14, 128]
        x = nn.relu(Conv(256, (3, 3), strides=2, padding="SAME")(x))  # [N, 7, 7, 256]
        x = nn.relu(Conv(512, (7, 7))(x))  # [N, 1, 1, 512]
        return Conv(self.num_classes, (1, 1))(x)  # [N, 1, 1, 10]
