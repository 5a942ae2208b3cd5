"""Ends a run whose validation accuracy no longer rises (`early_stopping_epochs`)."""

from pathlib import Path

from cnn_jax.config import Config
from cnn_jax.train import parallel
from cnn_jax.train.progress import Progress
from cnn_jax.train.workdir import metrics


def stale_epochs(config: Config, folder: Path) -> int:
    """The epochs since the best validation accuracy if they end the run, else 0.

    Args:
      config: of the run.
      folder: its workdir, whose metrics.jsonl is read.
    """
    patience = config.early_stopping_epochs
    if patience is None:
        return 0
    stale = 0
    if parallel.is_main_process():  # another process may not see its last line yet
        accuracy = {
            line["epoch"]: line["validation_accuracy"]
            for line in metrics(folder)
            if "validation_accuracy" in line
        }
        stale = max(accuracy) - max(accuracy, key=accuracy.__getitem__) if accuracy else 0
    return parallel.largest(stale if stale >= patience else 0)


def is_over(config: Config, folder: Path, progress: Progress, epochs: int) -> bool:
    """Whether the run ends after this many epochs; says why.

    Args:
      config: of the run.
      folder: its workdir.
      progress: says it.
      epochs: those that are done.
    """
    if stale := stale_epochs(config, folder):
        progress.message(
            f"stopped early after epoch {epochs}: the best validation accuracy is that of epoch "
            f"{epochs - stale}; a larger early_stopping_epochs continues the run"
        )
    return stale > 0
