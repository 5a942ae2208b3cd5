"""The errors a person can cause or meet, each with the exit code of the process it ends.

A message is one line: the field or file, its value, and what is allowed.
"""


class CnnJaxError(Exception):
    """An error that ends the command with one clear line instead of a traceback."""

    exit_code = 1


class ConfigError(CnnJaxError):
    """A flag, an experiment or a configuration field is wrong."""

    exit_code = 2


class DataError(CnnJaxError):
    """A dataset or an image is missing, unsuitable or damaged."""

    exit_code = 3


class WorkdirError(CnnJaxError):
    """A folder of runs or of results is missing, unsuitable or damaged, or cannot be written."""

    exit_code = 4


class CheckpointError(WorkdirError):
    """A run's workdir or a checkpoint is missing, unsuitable or damaged."""


class NotFiniteError(CnnJaxError):
    """A loss, parameters or an evaluation became infinite or NaN."""

    exit_code = 5


class Preempted(CnnJaxError):
    """A signal ended the run after it saved; the same command goes on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
