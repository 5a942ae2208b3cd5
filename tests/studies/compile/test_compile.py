"""`compile` for this machine's processor, what it refuses, and its arithmetic."""

import dataclasses
import importlib.util

import flax.linen as nn
import jax
import pytest

from cnn_jax import main
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.compile import programs, table, targets
from cnn_jax.studies.compile.findings import Findings
from tests.networks import Linear

NOTHING = Findings(0, 0, 0, (), {}, {}, (), (), (), (), 0, False)
RATES = targets.Rates(2e12, 4e12, 1e9, 1e11, 1e10, 8, "")
GPU = dataclasses.replace(RATES, highest=1e12, target_config="x")


def compiled(**fields) -> programs.Compiled:
    memory = programs.Memory(0, 0, 0, 0, 0)
    about = {
        "name": "training",
        "batch_size": 8,
        "devices": 1,
        "compute_dtype": "float32",
        "matmul_precision": "default",
        "seconds": 1.0,
        "memory": memory,
        "flops": 0.0,
        "outputs": 0,
        "text": "",
        "findings": NOTHING,
    }
    return programs.Compiled(**{**about, **fields})


def config(**fields) -> Config:
    return Config(Linear(), DataConfig("mine"), **{"batch_size": 16, **fields})


@pytest.fixture(scope="module")
def steps() -> dict[str, programs.Compiled]:
    target = targets.Target("cpu", jax.devices(), None)
    found = programs.compile_steps(config(eval_batch_size=30), (4, 4, 1), target)
    return {compiled.name: compiled for compiled in found}


def test_both_steps_on_four_devices(steps):
    training, evaluation = steps["training"], steps["evaluation"]
    parameters = 4 * (16 * 10 + 10)
    assert (training.devices, training.batch_size, evaluation.batch_size) == (4, 16, 32)
    assert training.memory.parameters == evaluation.memory.parameters == parameters
    # Adam's two averages and two counters; step, key and five sums of the state.
    assert training.memory.state == 2 * parameters + 4 * (2 + 1 + 2 + 5)
    assert evaluation.memory.state == 0
    batch = 4 * (4 * 4 + 4 + 4 + 4)  # four images; label, index and epoch
    assert training.memory.arguments <= parameters + training.memory.state + batch
    # Two matmuls of the layer, forward and for the kernel, are most of it.
    assert training.flops == pytest.approx(2 * 2 * 4 * 16 * 10, rel=3)
    assert training.flops >= 2 * 2 * 4 * 16 * 10


def test_the_state_is_reused_and_nothing_leaves_the_device(steps):
    found = steps["training"].findings
    assert found.aliased == steps["training"].outputs - 1  # all but the loss
    assert not found.float64
    assert found.host == ()
    assert sum(size for name, size in found.collectives if name == "all-reduce") >= 4 * 170


def test_what_a_run_takes_from_its_data_is_a_constant():
    """And freezing and averaging are in the state, as in a run."""
    data = DataConfig("mine", mean="auto", std="auto")
    fields = {"data": data, "class_weights": "balanced", "ema_decay": 0.9, "freeze": ("*/bias",)}
    target = targets.Target("cpu", jax.devices()[:1], None)
    changed = dataclasses.replace(config(batch_size=2), **fields)
    training = next(programs.compile_steps(changed, (2, 2, 1), target))
    # Adam's averages are of the kernel alone, the last one of all parameters.
    kernel, bias = 4 * 4 * 10, 4 * 10
    assert training.memory.state == 2 * kernel + (kernel + bias) + 4 * (2 + 1 + 2 + 5)


def test_float64_is_found():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            return nn.Dense(10)(image.reshape(len(image), -1).astype("float64")).astype("float32")

    with jax.enable_x64(True):
        target = targets.Target("cpu", jax.devices()[:1], None)
        wide = Config(Wide(), DataConfig("mine"), batch_size=2)
        found = next(programs.compile_steps(wide, (2, 2, 1), target)).findings
    assert found.float64


def test_what_does_not_fit_is_refused():
    few = targets.Rates(1.0, 1.0, 2000.0, 1.0, 1.0, 8, "")
    target = targets.Target("few", jax.devices()[:1], few)
    with pytest.raises(ConfigError, match=r"batch of 16: needs .* which has 2,000"):
        next(programs.compile_steps(config(), (4, 4, 1), target))


def test_a_batch_must_divide():
    target = targets.Target("cpu", jax.devices(), None)
    with pytest.raises(ConfigError, match="batch_size=10: must be divisible by the 4 devices"):
        next(programs.compile_steps(config(batch_size=10), (4, 4, 1), target))
    with pytest.raises(ConfigError, match="devices=5: only 4 visible"):
        next(programs.compile_steps(config(devices=5), (4, 4, 1), target))


def test_the_bounds_of_a_step():
    exchanged = dataclass_with(
        collectives=(("all-reduce", 1000), ("all-gather", 1000)), traffic=5000
    )
    step = compiled(devices=4, flops=8e6, findings=exchanged)
    target = targets.Target("x", [], RATES)
    expected = {"arithmetic": 4e-6, "memory": 5e-8, "exchange": 3 * 1000 * 0.75 / 1e10}
    assert table.bounds(step, target) == pytest.approx(expected)
    half = compiled(devices=4, flops=8e6, findings=exchanged, compute_dtype="bfloat16")
    assert table.bounds(half, target)["arithmetic"] == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("rates", "compute_dtype", "precision", "expected"),
    [
        (GPU, "float32", "default", 2e12),
        (GPU, "float32", "tensorfloat32", 2e12),
        (GPU, "float32", "highest", 1e12),
        (GPU, "bfloat16", "highest", 4e12),
        (RATES, "float32", "default", 2e12),
        (RATES, "float32", "tensorfloat32", 2e12 / 3),
        (RATES, "float32", "highest", 2e12 / 6),
    ],
)
def test_the_rate_depends_on_the_precision(rates, compute_dtype, precision, expected):
    assert rates.arithmetic(compute_dtype, precision) == expected


def dataclass_with(**fields) -> Findings:
    return Findings(**{**vars(NOTHING), **fields})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 "), (999, "999 "), (999.6, "1 k"), (2345678, "2.35 M"), (1.23e-5, "12.3 u")],
)
def test_numbers_have_three_digits_and_a_prefix(value, expected):
    assert table.number(value) == expected


def test_the_devices_have_rates_and_sources():
    known = targets.known()
    assert set(known) == {"v5e", "v5p", "v6e", "h100", "a100", "rtx4090"}
    for name, rates in known.items():
        assert rates.source.startswith("https://"), name
        assert 8e13 < rates.float32 <= rates.bfloat16 < 2e15, name
        assert 1e10 < rates.memory < 2e11, name
        assert bool(rates.highest) == bool(rates.target_config), name
        assert rates.highest <= rates.float32, name
        assert rates.interconnect_bandwidth < rates.memory_bandwidth, name
        if config := rates.target_config:
            assert f"device_memory_size: {rates.memory}\n" in config, name
            assert f"memory_bandwidth: {rates.memory_bandwidth:.0f}\n" in config, name


ADDS = "which is missing; ./launch.sh setup --with=compile"


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("tpu", "must be cpu or one of v5e, v5p, v6e, h100, a100, rtx4090"),
        ("v5e", "a TPU's must have a slice, as in v5e:2x2"),
        ("v5e:0x2", "a TPU's must have a slice, as in v5e:2x2"),
        ("h100:x4", "a GPU's must have a number or HOSTSxNUMBER, as in h100:2x4"),
        ("v5e:2x2", f"needs libtpu, {ADDS}-tpu adds it"),
        ("h100", f"needs jax_cuda13_plugin, {ADDS}-cuda adds it"),
    ],
)
def test_topologies_that_are_refused(monkeypatch, caplog, topology, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main.main(["compile", "quickstart", f"--topology={topology}"]) == 2
    assert caplog.messages[-1] == f"error: --topology={topology}: {expected}"


def test_the_command(capsys, tmp_path):
    arguments = ["compile", "quickstart", "--topology=cpu", f"--dump={tmp_path / 'text'}"]
    assert main.main([*arguments, "--set", "devices=1", "--set", "batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("compiled in") == 2
    assert "training, batch 2 on 1 device of cpu" in printed
    assert (tmp_path / "text").read_text().count("ENTRY") == 2


def test_a_topology_without_rates_has_no_place_in_the_results(caplog):
    assert main.main(["compile", "quickstart", "--topology=cpu", "--write"]) == 2
    assert "--write: takes another topology than cpu" in caplog.text
