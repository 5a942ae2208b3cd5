"""Ends a run whose validation accuracy no longer rises (`early_stopping_epochs`)."""

from pathlib import Path

from cnn_jax.config import Config
from cnn_jax.train import parallel
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
        stale = max(accuracy) - max(accuracy, key=accuracy.get) if accuracy else 0
    return parallel.largest(stale if stale >= patience else 0)


def reason(epoch: int, stale: int) -> str:
    """Why a run ended after `epoch` epochs, of which the last `stale` brought nothing."""
    return (
        f"stopped early after epoch {epoch}: the best validation accuracy is that of epoch "
        f"{epoch - stale}; a larger early_stopping_epochs continues the run"
    )
