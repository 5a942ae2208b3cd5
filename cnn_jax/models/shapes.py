"""The errors of a model that does not fit the shape of its images."""

import flax.linen as nn

from cnn_jax.common.errors import ConfigError


def takes_no(image_shape: tuple[int, ...], model: nn.Module, error: Exception) -> ConfigError:
    """The error if `model` fails on such images; names the exception unless it is a ValueError."""
    reason = " ".join(str(error).splitlines()[:1])[:200]
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}; --debug shows where"
    return ConfigError(
        f"model={type(model).__name__}: takes no images of {_shown(image_shape)} ({reason})"
    )


def too_small(image_shape: tuple[int, ...], model: nn.Module) -> ConfigError:
    """The error if such images are too small for the layers of `model`."""
    name = type(model).__name__
    return ConfigError(
        f"model={name}: images of {_shown(image_shape)} are too small for its layers"
    )


def _shown(image_shape: tuple[int, ...]) -> str:
    return "x".join(map(str, image_shape))
