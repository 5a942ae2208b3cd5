"""Results as tables on the terminal."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import rich.console
import rich.markup
import rich.table
import rich.text

from cnn_jax.analysis.convert import IMAGES, Converted
from cnn_jax.analysis.dataset import Description as Dataset
from cnn_jax.analysis.explain.explanation import Explanation, Grid
from cnn_jax.analysis.predict import Prediction
from cnn_jax.config.serialize import to_json
from cnn_jax.config.types import Description
from cnn_jax.models.summary import Summary


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise  # main.py handles it; rich would exit with 1


def _console() -> rich.console.Console:
    """A console wider than any line: the terminal can wrap a row, but no digit is cut off.

    Names are shown as they are, also [red] and :dog:.
    """
    return _Console(highlight=False, markup=False, emoji=False, width=1000)


def _table(*columns: str, left: int = 1) -> rich.table.Table:
    """A plain table: the first `left` columns are aligned left, the others right."""
    table = rich.table.Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def print_evaluation(report: dict) -> None:
    """Prints evaluation.json: the metrics, accuracy per class, the confusion matrix."""
    names = [*report["class_accuracy"]]
    matrix = report["confusion_matrix"]
    table = _table("class", "accuracy", "examples", *(f"-> {i}" for i in range(len(names))))
    if len(names) > 20:  # too wide; evaluation.json has the matrix
        table = _table("class", "accuracy", "examples")
    for i, (name, accuracy) in enumerate(report["class_accuracy"].items()):
        shown = "-" if accuracy is None else f"{accuracy:.4f}"
        cells = [f"{i} {name}", shown, str(sum(matrix[i]))]
        if len(names) <= 20:
            cells += [str(n) if n else "." for n in matrix[i]]
        table.add_row(*cells)
    console = _console()
    console.print(table)
    console.print(
        f"{report['dataset']}/{report['split']}, checkpoint {report['checkpoint']}: accuracy "
        f"{report['accuracy']:.4f}, loss {report['loss']:.4f} over {report['examples']:,} examples",
        soft_wrap=True,
    )


def print_row(row: dict) -> None:
    """Prints one evaluation of several in a line, when it is done."""
    _print_lines([f"{_evaluated(row)}: accuracy {row['accuracy']:.4f}, loss {row['loss']:.4f}"])


def _evaluated(row: dict) -> str:
    change = row["change"]
    shown = f", {change['kind']} {change['amount']}" if change else ""
    return f"{row['workdir']} {row['checkpoint']}, {row['dataset']}/{row['split']}{shown}"


def print_rows(rows: Sequence[dict], tests: Sequence[dict]) -> None:
    """Prints evaluations.json: a row for each evaluation, the tests of every two runs."""
    columns = "examples accuracy interval top-5 macro-F1 loss Brier ECE"
    with_temperature = any("with_temperature" in row for row in rows)
    more = ("temperature", "loss then", "ECE then") if with_temperature else ()
    table = _table("evaluated", *columns.split(), *more)
    for row in rows:
        low, high = row["intervals"]["accuracy"]
        five = row["top_5_accuracy"]
        cells = [f"{row['examples']:,}", f"{row['accuracy']:.4f}", f"{low:.4f} to {high:.4f}"]
        cells += ["-" if five is None else f"{five:.4f}"]
        cells += [f"{n:.4f}" for n in (row["macro"]["f1"], row["loss"], row["brier"], row["ece"])]
        if found := row.get("with_temperature"):
            cells += [f"{found[name]:.4f}" for name in ("temperature", "loss", "ece")]
        table.add_row(_evaluated(row), *cells)
    _console().print(table)
    _print_lines(
        [
            f"McNemar on {test['dataset']}/{test['split']}: {test['first']} alone is right on "
            f"{test['only_first_right']:,} of {test['examples']:,}, {test['second']} alone on "
            f"{test['only_second_right']:,}; p = {test['p']:.2g}"
            for test in tests
        ]
    )


MOST_LINES = 10


def print_dataset(found: Dataset) -> None:
    """Prints the classes and splits of a dataset, what is wrong with it, and the fields to set."""
    table = _table("class", *found.counts)
    for i, name in enumerate(found.class_names):
        table.add_row(f"{i} {name}", *(f"{n[i]:,}" for n in found.counts.values()))
    table.add_row("all", *(f"{n.sum():,}" for n in found.counts.values()))
    _console().print(table)
    height, width, channels = found.image_shape
    lines = [
        f"images: {height}x{width}x{channels}" + (f"; files: {found.sizes}" if found.sizes else ""),
        *found.remarks,
        *_first("broken", found.broken),
        *_first("twins, equal in all pixels", found.twins),
    ]
    if found.twins:
        lines.append(
            f"of these twins {found.twins_across} are in two splits, {found.twins_apart} in two classes"
        )
    lines.append("to train on it, add: " + " ".join(f"--set {field}" for field in found.settings))
    _print_lines(lines)


def _first(what: str, lines: Sequence[str]) -> list[str]:
    """The number of lines, and the first of them."""
    more = len(lines) - MOST_LINES
    rest = [f"  and {more} more"] if more > 0 else []
    return [f"{what}: {len(lines)}", *(f"  {line}" for line in lines[:MOST_LINES]), *rest]


def print_predictions(predictions: list[Prediction]) -> None:
    """Prints one line per image: the classes with their probabilities."""
    table = _table("file", *(str(i + 1) for i in range(len(predictions[0].classes))))
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = [f"{name} {probability:.3f}" for name, probability in pairs]
        table.add_row(prediction.file, *cells)
    _console().print(table)


def print_summary(summary: Summary) -> None:
    """Prints layers, output shapes, parameters, FLOPs and receptive fields, with totals."""
    columns = ("layer", "kind", "output", "parameters", "FLOPs", "sees", "step", "from")
    table = _table(*columns, left=2)
    for layer in summary.layers:
        shape = "x".join(map(str, layer.shape))
        flops = f"{layer.flops:,}" if layer.flops else ""
        seen = layer.field.shown() if layer.field else ("?", "?", "?")
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}", flops, *seen)
    console = _console()
    height, width, channels = summary.image_shape
    console.print(f"{summary.model} on {height}x{width}x{channels}")
    console.print(table)
    elsewhere = summary.parameters - sum(layer.parameters for layer in summary.layers)
    console.print(
        f"{summary.parameters:,} parameters ({4 * summary.parameters / 1e6:.1f} MB"
        + (f", {elsewhere:,} of them outside of these layers" if elsewhere else "")
        + f"), {summary.flops:,} FLOPs an image forward, {summary.training_flops:,} in training",
        soft_wrap=True,
    )


def print_fields(parts: Mapping[str, Sequence[Description]]) -> None:
    """Prints each field, with its type, default, range and meaning; `parts` maps prefixes to fields."""
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column("field", no_wrap=True)
    table.add_column("type", max_width=10)
    table.add_column("default", no_wrap=True)
    table.add_column("may be", max_width=24)
    table.add_column("what it is")
    for prefix, fields in parts.items():
        for field in fields:
            row = (field.type_name, _default(field), field.allowed, field.help)
            table.add_row(prefix + field.name, *row)
    console = _Console(highlight=False)
    # A pipe or a log has no width. In a narrower table, each line of text would hold one word.
    width = max(console.width, 100) if console.is_terminal else 120
    _Console(highlight=False, width=width).print(table)


def _default(field: Description) -> str:
    if field.default is dataclasses.MISSING:
        return "(no default)"
    value = to_json(field.default)
    if isinstance(value, dict):
        return value.get("function", "")
    return (
        "none"
        if value is None
        else ",".join(map(str, value))
        if isinstance(value, list | tuple)
        else str(value)
    )


def print_conversion(made: Converted) -> None:
    """Prints the converted kernels, and how much the two networks differ."""
    table = _table("layer", "is now", "dense kernel", "convolution's kernel", left=2)
    for name, before, after in made.kernels:
        shapes = ("x".join(map(str, shape)) for shape in (before, after))
        table.add_row(name, f"a {after[0]}x{after[1]} convolution", *shapes)
    _console().print(table)
    size, step, _ = made.field.shown() if made.field else ("?", "?", "")
    _print_lines(
        [
            f"on {IMAGES} images of noise: logits up to {made.largest:.3g}, differing by at most "
            f"{made.difference:.1g}",
            f"on larger images: a map of scores, each seeing {size} pixels, {step} further than the "
            "one before",
            f"written to {made.run.workdir}",
        ]
    )


def print_class_map(report: dict) -> None:
    """Prints the content of class_map.json in sentences."""
    model, side = report["model"], report["canvas"]
    scores, window = ("x".join(map(str, report[name])) for name in ("scores", "window"))
    stride = "x".join(map(str, dict.fromkeys(report["stride"])))
    compared, total = report["cut_out_compared"], report["cut_out"]
    sample = f" ({compared:,} of them compared and timed)" if compared < total else ""
    lines = [
        f"{model}, checkpoint {report['checkpoint']}, on a canvas of {side}x{side} pixels with "
        f"{report['images']} test images of {report['dataset']}",
        f"map: {scores} scores; each sees {window} pixels, {stride} further than the one before",
        f"found where they are: {report['found']} of {report['images']}; "
        f"each alone, as in training: {report['recognised_alone']}",
        f"the network on {report['windows']:,} windows that scores see, their true neighbours in "
        f"place of padding: logits up to {report['largest_logit']:.1f}, the map's differ by at most "
        f"{report['largest_difference']:.2g}",
        f"the network on {total:,} windows of the training size{sample}, padded as in training: the "
        f"same class in {report['cut_out_same_class']:.1%}, logits differ by at most "
        f"{report['cut_out_largest_difference']:.2g}",
        f"seconds: map {report['map_seconds']:.3f}, those windows {report['sliding_seconds']:.3f}: "
        f"{report['speed_ratio']:.1f} times as long (median of {report['rounds']}, in turn); "
        f"FLOPs: {report['flops_ratio']:.1f} times as many",
    ]
    _print_lines(lines)


def print_explanation(explanation: Explanation) -> None:
    """Prints the title, the grids side by side, the table, the arithmetic."""
    console = _console()
    console.print(rich.text.Text(explanation.title, "bold"), soft_wrap=True)
    for row in explanation.rows:
        beside = rich.table.Table.grid(padding=(0, 2))
        cells: list[str | rich.text.Text] = []
        for grid in row:
            if grid.sign:
                cells.append(f"\n{grid.sign}")
            cells.append(_numbers(grid))
        beside.add_row(*cells)
        console.print(beside)
        console.print()
    if explanation.table:
        header, *rows = explanation.table
        table = _table(*header, left=2)
        for texts in rows:
            table.add_row(*texts)
        console.print(table)
    _print_lines(explanation.lines)


def _numbers(grid: Grid) -> rich.text.Text:
    """A grid as lines of text: marked numbers are bold, padding is dimmed."""
    cells = np.vectorize(lambda value: f"{value:g}")(grid.values)
    width = max(map(len, cells.ravel()))
    text = rich.text.Text(grid.title)
    for i, row in enumerate(cells):
        text.append("\n")
        for j, cell in enumerate(row):
            styles = ["bold"] * grid.is_marked(i, j) + ["dim"] * grid.is_padding(i, j)
            text.append(f"{cell:>{width + 1}}", " ".join(styles))
    return text


def _print_lines(lines: Sequence[str]) -> None:
    console = _console()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
