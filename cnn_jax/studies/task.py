"""A task of a study: the commands of one run, wherever they run."""

import dataclasses
from collections.abc import Callable

from cnn_jax.common.errors import CnnJaxError, Preempted
from cnn_jax.studies.subprocesses import CommandFailed

Failure = CommandFailed | CnnJaxError


@dataclasses.dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
      name: no other task of the study has it.
      place: of this task among all of the study, from 1.
      total: how many the study has.
      work: is called as work(run, *arguments), where run is `Processes.run`.
      arguments: of `work`; they can be pickled.
    """

    name: str
    place: int
    total: int
    work: Callable[..., None]
    arguments: tuple

    @property
    def label(self) -> str:
        return f"{self.name} ({self.place} of {self.total})"

    def fails(self, run: Callable[..., None]) -> Failure | None:
        """Does the work; returns its error, None if there is none.

        Raises:
          Preempted: a signal stopped it.
        """
        try:
            self.work(run, *self.arguments)
        except Preempted:
            raise
        except (CommandFailed, CnnJaxError) as error:
            return error
        return None
