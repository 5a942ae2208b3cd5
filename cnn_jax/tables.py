"""Results as tables on the terminal."""

import rich.console
import rich.markup
import rich.table

from cnn_jax.predict import Prediction
from cnn_jax.summary import Summary


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise  # main.py answers it; rich would exit with 1


def _console() -> rich.console.Console:
    console = _Console(highlight=False)
    # A pipe or a log has no width; 80 columns would cut the names short.
    return console if console.is_terminal else _Console(highlight=False, width=120)


def _table(*columns: str, left: int = 1) -> rich.table.Table:
    """A plain table: the first `left` columns to the left, the others to the right."""
    table = rich.table.Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def print_evaluation(report: dict) -> None:
    """The content of evaluation.json: the figures, accuracy a class, the confusion matrix."""
    names = [*report["class_accuracy"]]
    matrix = report["confusion_matrix"]
    table = _table("class", "accuracy", "examples", *(f"-> {i}" for i in range(len(names))))
    if len(names) > 20:  # a wider matrix is for evaluation.json
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


def print_predictions(predictions: list[Prediction]) -> None:
    """A line an image: the classes with their probabilities."""
    table = _table("file", *(str(i + 1) for i in range(len(predictions[0].classes))))
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = [f"{name} {probability:.3f}" for name, probability in pairs]
        table.add_row(rich.markup.escape(prediction.file), *cells)
    _console().print(table)


def print_summary(summary: Summary) -> None:
    """Layers, output shapes, parameters and FLOPs, with their totals."""
    table = _table("layer", "kind", "output", "parameters", "FLOPs", left=2)
    for layer in summary.layers:
        shape = "x".join(map(str, layer.shape))
        flops = f"{layer.flops:,}" if layer.flops else ""
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}", flops)
    console = _console()
    height, width, channels = summary.image_shape
    console.print(f"{summary.model} on {height}x{width}x{channels}")
    console.print(table)
    console.print(
        f"{summary.parameters:,} parameters ({4 * summary.parameters / 1e6:.1f} MB), "
        f"{summary.flops:,} FLOPs an image forward, {3 * summary.flops:,} in training (about)",
        soft_wrap=True,
    )
