"""Networks that are trained and compiled at once."""

import flax.linen as nn

from cnn_jax.models.layers import Conv, Dense, Dropout, Flatten, MaxPool


class Small(nn.Module):
    """All that a state can consist of: BatchNorm statistics, dropout, several parameters."""

    num_classes: int = 10
    window: int = 4
    rate: float = 0.25
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, train=False):
        x = MaxPool((self.window, self.window))(image)
        # Without a bias: BatchNorm takes it away, so that its gradient is rounding noise.
        x = Conv(4, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = Dropout(self.rate, self.axis_name)(nn.relu(x), train)
        return Dense(self.num_classes)(Flatten()(x))


class Linear(nn.Module):
    """Softmax regression, of which everything can be calculated by hand."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(self.num_classes)(Flatten()(image))
