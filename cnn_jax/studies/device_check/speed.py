"""Images/s in training on the device, beside PyTorch's where it can be imported."""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnn_jax.studies.benchmark import contenders
from cnn_jax.studies.benchmark.contenders import Contender
from cnn_jax.studies.benchmark.figures import OURS, OURS_BF16, TORCH_BF16

TORCH = "torch compile"
SIZES = (1024, 128)
# Seconds in which a contender must have compiled, or have measured.
_PATIENCE = 90.0


def speed(
    networks: Sequence[str],
    tiny: bool,
    found: Callable[..., None],
    left: Callable[[], float],
) -> bool:
    """Measures row by row, a network at a batch size, until the time is up.

    Args:
      networks: their names in `NETWORKS`.
      tiny: one row of ours alone, for a moment.
      found: called with each row.
      left: the seconds that are left.

    Returns:
      Whether all of ours could be measured, as far as time allowed.
    """
    rows = [(network, size) for size in ((128,) if tiny else SIZES) for network in networks]
    names = [OURS] if tiny else [OURS, OURS_BF16]
    if not tiny and importlib.util.find_spec("torch"):
        names += [TORCH, TORCH_BF16]
    good, longest, began = True, 0.0, left()
    for number, (network, batch) in enumerate(rows, 1):
        rates, errors = measure(network, batch, names, 0.05 if tiny else 1.0)
        good = good and not {OURS, OURS_BF16} & set(errors)
        if any("no GPU" in error for error in errors.values()):
            names = [OURS, OURS_BF16]  # the same of each other row
        text = f"{number} of {len(rows)} rows; the last, {network} at batch {batch}, images/s: "
        text += ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) or "none"
        more = {"errors": errors} if errors else {}
        found(network=network, batch=batch, rates=rates, **more, summary=text)
        longest, began = max(longest, began - left()), left()
        if began < longest:
            break
    return good


def measure(
    network: str, batch: int, names: Sequence[str], seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """The rates of contenders in one row, and the errors of the others, both by name.

    Ours start one after the other and before the others, so that nothing disturbs XLA's choice of the
    fastest algorithms. Each is measured three times, in turn.
    """
    ours = [name for name in names if name in (OURS, OURS_BF16)]
    started = {name: _start(name, network, batch) for name in ours}
    others = [name for name in names if name not in ours]
    with ThreadPoolExecutor() as pool:
        started |= zip(others, pool.map(lambda n: _start(n, network, batch), others), strict=True)
    errors = {name: found for name, found in started.items() if isinstance(found, str)}
    running = {name: found for name, found in started.items() if not isinstance(found, str)}
    platforms = {name: contender.about["device"] for name, contender in running.items()}
    if not any(platforms.get(name) == "cpu" for name in ours):
        for name in [name for name in others if platforms.get(name) == "cpu"]:
            errors[name] = "PyTorch finds no GPU for CUDA"
            running.pop(name).stop()
    for _ in range(3):
        for name, contender in list(running.items()):
            try:
                contender.measure("train", seconds / 3, batch)
            except (RuntimeError, OSError) as error:
                errors[name] = str(error)
                running.pop(name)
    measured = {name: contender.stop().rates["train"] for name, contender in running.items()}
    return {name: statistics.median(rates) for name, rates in measured.items()}, errors


def _start(name: str, network: str, batch: int) -> Contender | str:
    """The contender, compiled, or its error."""
    try:
        return Contender(name, _command(name, network, str(batch)), True, _PATIENCE)
    except (RuntimeError, OSError) as error:
        return str(error)


def _command(name: str, network: str, batch: str) -> list[str]:
    if name in (OURS, OURS_BF16):
        dtype = "bfloat16" if name == OURS_BF16 else "float32"
        module = ["-m", "cnn_jax.studies.benchmark.ours"]
        return [sys.executable, *module, network, batch, dtype, "train"]
    script = str(Path(contenders.__file__).with_name("peer_torch.py"))
    return [sys.executable, script, network, batch, name.removeprefix("torch "), "train"]
