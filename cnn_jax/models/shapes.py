"""What to raise where a model and the shape of its images do not fit."""

import flax.linen as nn

from cnn_jax.common.errors import ConfigError


def takes_no(image_shape: tuple[int, ...], model: nn.Module, error: Exception) -> ConfigError:
    """What to raise where `model` fails on such images; one of its own mistakes is called by name."""
    reason = " ".join(str(error).splitlines()[:1])[:200]
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}; --debug shows where"
    return ConfigError(
        f"model={type(model).__name__}: takes no images of {_shown(image_shape)} ({reason})"
    )


def too_small(image_shape: tuple[int, ...], model: nn.Module) -> ConfigError:
    """What to raise where the layers of `model` leave nothing of such images."""
    name = type(model).__name__
    return ConfigError(
        f"model={name}: images of {_shown(image_shape)} are too small for its layers"
    )


def _shown(image_shape: tuple[int, ...]) -> str:
    return "x".join(map(str, image_shape))
