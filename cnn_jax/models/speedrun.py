"""The network of the CIFAR-10 speedrun, which reaches 94% in seconds on a GPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.layers import Conv, Dense, Flatten, MaxPool, one_image_size


def dirac(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Kernels [h, w, in, out] whose first `in` filters pass their channel on; the others are random.

    The random ones are PyTorch's default, uniform within 1 / sqrt(h * w * in).
    """
    height, width, channels, features = shape
    bound = (height * width * channels) ** -0.5
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    same = min(channels, features)
    identity = jnp.zeros((height, width, channels, same), dtype)
    identity = identity.at[height // 2, width // 2, jnp.arange(same), jnp.arange(same)].set(1)
    return kernel.at[..., :same].set(identity)


class ConvGroup(nn.Module):
    """Two 3x3 convolutions of `width` filters; the first one's map is halved by max pooling."""

    width: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(2):
            x = Conv(self.width, (3, 3), padding="SAME", use_bias=False, kernel_init=dirac)(x)
            x = MaxPool((2, 2))(x) if i == 0 else x
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.6,
                epsilon=1e-12,
                use_scale=False,
                axis_name=self.axis_name,
            )(x)
            x = nn.gelu(x, approximate=False)
        return x


class SpeedrunCNN(nn.Module):
    """A whitening convolution and three groups of two: 1,971,640 parameters on 32x32x3.

    Source: arXiv 2404.00498 (airbench). Input [N, 32, 32, 3] float32, normalised; output logits
    [N, num_classes].

    Attributes:
      num_classes: of the logits.
      logit_scale: multiplies them.
      axis_name: the pmap axis of BatchNorm's statistics, None under jit.
    """

    num_classes: int = 10
    logit_scale: float = 1 / 9
    axis_name: str | None = None

    @one_image_size
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.gelu(Conv(24, (2, 2), name="whitening")(image), approximate=False)  # [N, 31, 31, 24]
        x = ConvGroup(64, self.axis_name)(x, train)  # [N, 15, 15, 64]
        x = ConvGroup(256, self.axis_name)(x, train)  # [N, 7, 7, 256]
        x = ConvGroup(256, self.axis_name)(x, train)  # [N, 3, 3, 256]
        x = MaxPool((3, 3))(x)  # [N, 1, 1, 256]
        x = Flatten()(x)  # [N, 256]
        return self.logit_scale * Dense(self.num_classes, use_bias=False)(x)  # [N, 10]
