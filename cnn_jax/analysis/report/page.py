"""Writes the report of workdirs: a self-contained index.html, and its pictures as PNG files."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cnn_jax.analysis.report import formatting, one_run, run_data, several_runs
from cnn_jax.common.files import check_folder, writing
from cnn_jax.train.workdir import write_text

PICTURES = "pictures"


def report(
    workdirs_: Sequence[str | Path],
    which: str = "latest",
    own: str | None = None,
    data_dir: str | None = None,
    output: str | Path | None = None,
    verify: bool = True,
) -> Path:
    """Writes index.html about one run, or about several compared.

    Args:
      workdirs_: the folders of the runs.
      which: the checkpoint of each: "latest", "best" or a step.
      own: the experiment that defines a model that is not one of cnn_jax.models.
      data_dir: where the datasets lie.
      output: the folder to write into; None: report/ in the workdir, or comparison/ beside several.
      verify: compares restored arrays with their checksums.

    Returns:
      The path of index.html.

    Raises:
      ConfigError: `output` is a file or cannot be written, or a model is not known without `own`.
      CheckpointError, DataError: as `run_data.gather`.
    """
    folders = [Path(path) for path in dict.fromkeys(workdirs_)]
    if output is not None:
        target = Path(output)
    elif len(folders) == 1:
        target = folders[0] / "report"
    else:
        target = folders[0].absolute().parent / "comparison"
    check_folder(target)
    runs = [run_data.gather(folder, which, own, data_dir, verify) for folder in folders]
    if len(runs) == 1:
        template, (values, charts) = "run.html.j2", one_run.content(runs[0])
    else:
        template, (values, charts) = "comparison.html.j2", several_runs.content(runs)
    page = _render(template, values)
    with writing(target):
        (target / PICTURES).mkdir(exist_ok=True)
        for chart in charts:
            (target / PICTURES / f"{chart.name}.png").write_bytes(chart.light)
        write_text(target / "index.html", page)
    return target / "index.html"


def _render(template: str, values: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnn_jax.analysis.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "short", "percent", "duration", "shape", "plural"):
        environment.filters[name] = getattr(formatting, name)
    environment.filters["what"] = one_run.what
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["size"] = lambda data: Image.open(io.BytesIO(data)).size
    return environment.get_template(template).render(values)
