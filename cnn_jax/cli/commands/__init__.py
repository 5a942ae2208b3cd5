"""The commands of ./launch.sh: the flags of each, and the function it calls."""

# Each module adds its commands to the table; the order is that of ./launch.sh --help.
# isort: off
from cnn_jax.cli.commands import training, trained, showing, speed
# isort: on

from cnn_jax.cli.registry import COMMANDS, find, overview

__all__ = ["COMMANDS", "find", "overview", "showing", "speed", "trained", "training"]
