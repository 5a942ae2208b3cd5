"""The table of all commands."""

import difflib
from collections.abc import Callable

from cnn_jax import PROGRAM
from cnn_jax.cli.flags import FLAGS, Command
from cnn_jax.common.errors import ConfigError

COMMANDS: dict[str, Command] = {}


def command(*names: str, words: str = "", **defaults: object) -> Callable:
    """Registers a function as a command with the function's name.

    Args:
      *names: its flags.
      words: the flags whose values may follow the command without --name=, in this order.
      **defaults: defaults that differ from those in FLAGS.
    """

    def register(run: Callable) -> Callable:
        own = {name: defaults.get(name, FLAGS[name].default) for name in (*names, "debug")}
        name = run.__name__.rstrip("_")  # list_: the name list would hide Python's list
        COMMANDS[name] = Command(name, run, own, tuple(words.split()))
        return run

    return register


def find(name: str) -> Command:
    """The command called `name`.

    Raises:
      ConfigError: there is none.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise ConfigError(
            f"{name}: no such command; {'nearest' if near else 'there are'}: "
            + ", ".join(near or COMMANDS)
        )
    return COMMANDS[name]


def overview() -> str:
    """The text of `./launch.sh --help`."""
    lines = [f"usage: {PROGRAM} COMMAND [--flags]", ""]
    lines += [f"  {name:12}{entry.title}" for name, entry in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help shows a command's flags."])
