"""The configuration of a run; experiment files import `Config` and `DataConfig` from here."""

from cnn_jax.config.schema import CHANGEABLE_ON_RESUME, Config, DataConfig

__all__ = ["CHANGEABLE_ON_RESUME", "Config", "DataConfig"]
