"""The topics of explain, and the numbers that each takes."""

from collections.abc import Callable, Collection, Mapping

from cnn_jax.analysis.explain import arithmetic, counts
from cnn_jax.analysis.explain.explanation import Explanation
from cnn_jax.common.errors import ConfigError

# A topic: its function, and its numbers as (default, smallest, largest). `padding` is text.
SIDE = (1, 12)
TOPICS: dict[str, tuple[Callable[..., Explanation], dict[str, tuple]]] = {
    "conv": (
        arithmetic.conv,
        {
            "size": (4, *SIDE),
            "kernel": (3, *SIDE),
            "stride": (1, *SIDE),
            "padding": ("0",),
            "channels": (1, 1, 4),
            "filters": (1, 1, 4),
        },
    ),
    "pool": (arithmetic.pool, {"size": (4, *SIDE), "kernel": (2, *SIDE)}),
    "padding": (
        arithmetic.padding,
        {"size": (4, *SIDE), "kernel": (3, *SIDE), "stride": (1, *SIDE)},
    ),
    "dense": (
        counts.dense,
        {"size": (1, 1, 32), "channels": (6, 1, 1024), "filters": (3, 1, 1024)},
    ),
    "parameters": (
        counts.parameters,
        {
            "size": (3, 1, 256),
            "kernel": (2, 1, 256),
            "channels": (1, 1, 512),
            "filters": (1, 1, 512),
        },
    ),
}
OF_A_NETWORK = "receptive_field"


def check(topic: str, given: Mapping[str, int | str | None], allowed: Collection[str]) -> None:
    """Refuses a number that the topic does not take.

    Raises:
      ConfigError: `given` has one; names it, and those that the topic takes.
    """
    for name, value in given.items():
        if value is not None and name not in allowed:
            names = ", ".join(f"--{known}" for known in allowed)
            raise ConfigError(f"--{name}={value}: {topic} has no such flag; it takes {names}")


def explain(topic: str, given: Mapping[str, int | str | None]) -> Explanation:
    """Explains one of TOPICS.

    Args:
      topic: its name.
      given: its numbers by name; None, or left out: the default.

    Raises:
      ConfigError: there is no such topic, it does not take a number, or one is out of range.
    """
    if topic not in TOPICS:
        raise ConfigError(f"--topic={topic}: must be one of {', '.join(TOPICS)}, {OF_A_NETWORK}")
    function, numbers = TOPICS[topic]
    check(topic, given, numbers)
    values = {}
    for name, (default, *limits) in numbers.items():
        value = default if given.get(name) is None else given[name]
        if limits and not limits[0] <= value <= limits[1]:
            raise ConfigError(f"--{name}={value}: must be from {limits[0]} to {limits[1]}")
        values[name] = value
    return function(**values)
