"""What --device_check found, in Markdown."""

from collections.abc import Sequence

from cnn_jax.studies import markdown
from cnn_jax.studies.benchmark.figures import OURS, OURS_BF16, TORCH_BF16
from cnn_jax.studies.device_check.speed import TORCH


def line(found: dict) -> str:
    """One part's status, time, summary and first error."""
    texts = [f"{found['status']} in {found['seconds']:.0f} s", summary(found), *errors(found)[:1]]
    return ". ".join(text for text in texts if text)


def summary(found: dict) -> str:
    """The last summary among a part's findings, "" without one."""
    return next((f["summary"] for f in reversed(found["findings"]) if "summary" in f), "")


def errors(found: dict) -> list[str]:
    """What went wrong in a part, or how its log ends where it could not say."""
    said = []
    for finding in found["findings"]:
        place = " ".join(str(finding[k]) for k in ("network", "precision") if k in finding)
        said += [": ".join(filter(None, (place, finding["error"])))] if "error" in finding else []
    return [*said, *(f'its log ends with "{text}"' for text in found.get("log", ()))]


def render(report: dict) -> str:
    """The device, a line for each part, and the tables of the parts that have one."""
    device, parts = report["device"], report["parts"]
    about = f"{device['devices']} x {device['kind']} ({device['platform']}), jax {device['jax']}"
    text = [
        f"## {device['kind']}: the check of an accelerator",
        f"`./launch.sh benchmark --device_check` on {report['date']}; {about}.",
    ]
    rows = [
        [name, found["status"], f"{found['seconds']:.0f}", summary(found) or "-"]
        for name, found in parts.items()
    ]
    text.append(markdown.markdown_table(["part", "status", "seconds", "found"], rows))
    for name, make in (("agreement", _agreement), ("speed", _speed)):
        text += make(parts[name]["findings"]) if name in parts else []
    wrong = [f"- {name}: {error}" for name, found in parts.items() for error in errors(found)]
    text += ["\n".join(wrong)] if wrong else []
    return "\n\n".join(text) + "\n"


def _agreement(findings: Sequence[dict]) -> list[str]:
    """The relative differences from the CPU."""
    places = dict.fromkeys(f["network"] for f in findings if "loss" in f)
    kinds = [(p, k) for p in ("highest", "default") for k in ("loss", "gradient")]
    found = {(f["network"], f["precision"]): f for f in findings if "loss" in f}
    rows = [
        [network, *(_short(found.get((network, p), {}).get(k)) for p, k in kinds)]
        for network in places
    ]
    if not rows:
        return []
    head = ["network", *(f"{kind}, {precision}" for precision, kind in kinds)]
    return [
        "One step against the CPU, |a - b| / |b|, by the precision of matmuls:",
        markdown.markdown_table(head, rows),
    ]


def _short(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def _speed(findings: Sequence[dict]) -> list[str]:
    """The rates, and ours as a multiple of PyTorch's in the same type."""
    measured = [f for f in findings if f.get("rates")]
    if not measured:
        return []
    names = [
        n for n in (OURS, OURS_BF16, TORCH, TORCH_BF16) if any(n in f["rates"] for f in measured)
    ]
    pairs = [p for p in ((OURS, TORCH), (OURS_BF16, TORCH_BF16)) if set(p) <= set(names)]
    rows = []
    for finding in measured:
        rates = finding["rates"]
        cells = [f"{rates[n]:,.0f}" if n in rates else "-" for n in names]
        cells += [
            f"**{rates[a] / rates[b]:.2f}**" if {a, b} <= set(rates) else "-" for a, b in pairs
        ]
        rows.append([finding["network"], f"{finding['batch']:,}", *cells])
    head = ["network", "batch", *names, *(f"{a} / {b}" for a, b in pairs)]
    return [
        "Training, images/s; medians of three rounds, in turn. float32 (TF32 on an NVIDIA GPU), but "
        "for bf16:",
        markdown.markdown_table(head, rows),
    ]
