"""`compile --scaling`: work and bytes of compiled steps, and the arithmetic for more devices."""

import jax
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.compile import scaling, targets
from tests.networks import Linear

RATES = targets.Rates(1e12, 1e12, 1e9, 1e11, 1e9, 8, "", network_bandwidth=1e8)


def rows(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def value(text):
    """ "1.03 kB" -> 1030."""
    count, unit = text.split(" ")
    return float(count) * (1000 if unit.startswith("k") else 1)


def tables(devices, rates=None):
    config = Config(Linear(), DataConfig("mine"), batch_size=16)
    target = targets.Target("these", jax.devices()[:devices], rates)
    return [rows(table) for table in scaling.tables(config, (4, 4, 1), target)]


def test_devices_share_the_work_and_exchange_the_gradients():
    (compiled,) = tables(4)
    assert [row[:2] for row in compiled] == [["1", "16"], ["2", "8"], ["4", "4"]]
    flops = [value(row[2]) for row in compiled]
    assert flops[0] / flops[2] == pytest.approx(4, rel=0.2)
    # 170 parameters of four bytes, and the loss and the accuracy.
    sent = [value(row[5]) for row in compiled]
    assert sent[0] == 0
    assert 4 * 170 <= sent[1] <= 4 * 180
    assert sent[2] == pytest.approx(1.5 * sent[1], rel=0.01)


def test_from_eight_devices_on_it_is_arithmetic():
    _, estimated = tables(2, RATES)
    assert [row[0] for row in estimated] == ["8", "16", "32", "64", "128", "256", "512"]
    assert [row[1] for row in estimated] == ["2", "1", *"-----"]  # of a batch of 16
    assert all(int(row[6].replace(",", "")) % int(row[0]) == 0 for row in estimated)


def step(reduced=1000, arithmetic=(0.0, 1e-6), memory=(0.0, 0.0), rates=RATES):
    return scaling.Step(scaling.Line(*arithmetic), scaling.Line(*memory), reduced, rates)


def ring(count, devices):
    """The bytes that a device sends: a part to the next one, n - 1 times to add and to hand on."""
    return sum(count / devices for _ in range(2) for _ in range(devices - 1))


def test_an_exchange_beyond_the_interconnect_is_that_of_whole_groups():
    assert step().exchanging(4) == pytest.approx(ring(1000, 4) / 1e9)
    # Two groups of eight, each with eight ports of 1e8 bytes/s.
    assert step().exchanging(16) == pytest.approx(max(ring(1000, 8) / 1e9, ring(1000, 2) / 8e8))
    assert step(10**9).exchanging(512) == pytest.approx(ring(10**9, 64) / 8e8)


@pytest.mark.parametrize("memory", [(0.0, 0.0), (5e-6, 2e-6), (1e-5, 1e-9)])
def test_half_of_the_time_is_lost_below_a_batch(memory):
    found = step(30_100, memory=memory)

    def lost(examples):
        whole = found.computing(examples) + found.exchanging(4)
        return (found.computing(0) + found.exchanging(4)) / whole

    least = next(examples for examples in range(1, 10**4) if lost(examples) <= 0.5)
    assert found.half_lost_below(4) == 4 * least


def test_one_device_is_refused():
    with pytest.raises(ConfigError, match="has one device, and must have several"):
        tables(1)
