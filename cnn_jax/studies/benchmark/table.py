"""The benchmark's tables in Markdown, and their section in RESULTS.md, one per processor."""

import datetime
import statistics
from pathlib import Path

from cnn_jax.common import cpu
from cnn_jax.studies import markdown
from cnn_jax.studies.benchmark import figures
from cnn_jax.studies.benchmark.figures import OURS, OURS_BF16, TORCH_BF16, Measured


def render(
    results: dict[str, dict[str, Measured]], batch_size: int, rounds: int, seconds: float
) -> str:
    """The tables of one call: training, evaluation, cnn_jax in detail."""
    names = list(dict.fromkeys(name for measured in results.values() for name in measured))
    versions = dict.fromkeys(m.version for measured in results.values() for m in measured.values())
    lines = [
        f"## Speed on {cpu.description()}, batch {batch_size}",
        "",
        f"`./launch.sh benchmark --batch_size={batch_size}{' --peers' if len(names) > 1 else ''} "
        f"--rounds={rounds} --seconds={seconds:g} --write` on {datetime.date.today()}; "
        f"{', '.join(versions)}. float32 but for bf16; Adam; medians of "
        f"{rounds} interleaved rounds of {seconds:g} s.",
        "",
    ]
    for mode, title in (
        ("train", "Training"),
        ("eval", "The forward pass alone, as in evaluation"),
    ):
        lines += [f"{title}, images/s:", ""]
        lines += _rates(results, names, mode)
    lines += ["cnn_jax in detail:", ""]
    head = [
        "network",
        "training MFLOP an image",
        "GFLOP/s",
        "of the matmul peak",
        "compile s",
        "memory MiB",
    ]
    rows = []
    for network, measured in results.items():
        ours = measured[OURS]
        gflops, share = figures.peak_share(network, ours)
        torch = [m.peak_memory for name, m in measured.items() if name == "torch default"]
        memory = f"{ours.peak_memory / 2**20:,.0f}"
        if torch:
            memory += f" ({ours.peak_memory / torch[0]:.2f} x torch)"
        flops = f"{figures.training_flops(network) / 1e6:,.1f}"
        seconds_to_compile = f"{ours.compile_seconds['train']:.1f}"
        rows.append([network, flops, f"{gflops:,.0f}", f"{share:.0%}", seconds_to_compile, memory])
    return "\n".join([*lines, markdown.markdown_table(head, rows)])


def put_into(path: Path, text: str, batch_size: int) -> None:
    """Replaces the section of this processor and batch size, or adds it at the end."""
    mark = f"benchmark {cpu.description()} batch {batch_size}"
    markdown.put_section(path, mark, text)


def _rates(results: dict, names: list[str], mode: str) -> list[str]:
    peers = len(names) > 1
    both_bf16 = {OURS_BF16, TORCH_BF16} <= set(names)
    head = ["network", *names, *(["ratio to the fastest float32 peer"] if peers else [])]
    head += ["bf16, ratio to torch"] if both_bf16 else []
    rows = []
    for network, measured in results.items():
        cells = [network]
        for name in names:
            there = name in measured
            cells.append(f"{statistics.median(measured[name].rates[mode]):,.0f}" if there else "-")
        if peers:
            peer = figures.fastest_peer(measured, mode)
            cells.append(f"**{figures.ratio(measured, peer, mode):.2f}** ({peer})" if peer else "-")
        if both_bf16:
            there = {OURS_BF16, TORCH_BF16} <= set(measured)
            cells.append(
                f"**{figures.ratio(measured, TORCH_BF16, mode, OURS_BF16):.2f}**" if there else "-"
            )
        rows.append(cells)
    return [markdown.markdown_table(head, rows), ""]
