import functools
import types

import jax
import numpy as np
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.data.examples import InMemory, OnDemand
from cnn_jax.data.splits import Splits
from cnn_jax.train import calls, loop, optim, parallel, start, step
from tests.networks import Linear
from tests.tiny import make_examples

EXAMPLES = make_examples(100)
BYTES = 100 * (28 * 28 + 4)


def config(**fields):
    return Config(**{"model": Linear(), "data": DataConfig("tiny"), "batch_size": 10, **fields})


def mesh_of(platform, memory):
    stats = {"bytes_limit": memory} if memory else None
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    return types.SimpleNamespace(local_devices=[device])


@pytest.mark.parametrize(
    ("platform", "memory", "wanted", "resident"),
    [
        ("gpu", 4 * BYTES, "auto", True),
        ("gpu", 4 * BYTES - 1, "auto", False),
        ("gpu", 4 * BYTES - 1, True, True),
        ("gpu", 4 * BYTES, False, False),
        ("tpu", 4 * BYTES, "auto", True),
        ("gpu", None, "auto", False),
        ("cpu", None, "auto", False),
        ("cpu", None, True, True),
    ],
)
def test_where_the_examples_are(platform, memory, wanted, resident):
    found = calls.is_resident(config(resident_data=wanted), EXAMPLES, mesh_of(platform, memory))
    assert found is resident


@pytest.mark.parametrize(
    ("memory", "examples", "fields", "said"),
    [
        (BYTES - 1, EXAMPLES, {"resident_data": True}, rf"{BYTES:,} bytes, .* {BYTES - 1:,}"),
        (
            BYTES,
            OnDemand(None, np.arange(5), 0),
            {"resident_data": True},
            "resident_data=true: .*auto",
        ),
        (BYTES, EXAMPLES, {"steps_per_call": 4}, "steps_per_call=4: .*resident_data=true"),
    ],
)
def test_what_cannot_be_is_refused(memory, examples, fields, said):
    with pytest.raises(ConfigError, match=said):
        calls.is_resident(config(**fields), examples, mesh_of("gpu", memory))


class Counted(calls.Resident):
    """Programs that do nothing but tell which examples they were given."""

    def __init__(self, config, examples: InMemory):
        self._config, self._mesh = config, parallel.make_mesh(1)
        self._steps, self._held = len(examples) // config.batch_size, {}
        self._programs = {1: 1, config.steps_per_call: config.steps_per_call}
        self._length = config.steps_per_call


@pytest.mark.parametrize(
    ("fields", "epoch", "done", "expected"),
    [
        ({}, 0, 0, [4, 8, 9, 10]),
        ({}, 0, 3, [7, 8, 9, 10]),
        ({"log_every_steps": 5}, 0, 0, [4, 5, 9, 10]),
        ({"checkpoint_every_steps": 4}, 0, 0, [4, 8, 9, 10]),
        # Step 12 of the run is step 2 of the second epoch.
        ({"checkpoint_every_steps": 6}, 1, 0, [1, 2, 6, 7, 8, 9, 10]),
    ],
)
def test_calls_are_cut_where_the_run_looks_at_its_state(fields, epoch, done, expected):
    order = np.random.default_rng(0).permutation(100)
    found = list(Counted(config(steps_per_call=4, **fields), EXAMPLES).epoch(order, epoch, done))
    assert [after for after, *_ in found] == expected
    assert [length for _, length, _ in found] == np.diff([done, *expected]).tolist()
    seen = [np.asarray(rows["index"]) for *_, (_, rows) in found]
    np.testing.assert_array_equal(np.concatenate(seen).ravel(), order[10 * done :])
    assert all((np.asarray(rows["epoch"]) == epoch).all() for *_, (_, rows) in found)


class Loss:
    """A call's loss, which notes who waits for it."""

    def __init__(self, events, number, loss):
        self.events, self.number, self.loss = events, number, loss

    def block_until_ready(self):
        self.events.append(("wait", self.number))

    def __float__(self):
        return float(self.loss)


@pytest.mark.parametrize("every", [1, 2])
def test_the_host_never_waits_for_the_last_call(tmp_path, monkeypatch, every):
    """It fetches the metrics of a call, once, while the next one runs."""
    events, epoch, to_host = [], calls.Resident.epoch, parallel.to_host

    def noted(self, *arguments):
        for number, (done, program, batch) in enumerate(epoch(self, *arguments), 1):

            def call(state, batch, number=number, program=program):
                events.append(("call", number))
                state, loss = program(state, batch)
                return state, Loss(events, number, loss)

            yield done, call, batch

    def fetch(tree):
        if isinstance(tree, dict) and "correct" in tree:
            events.append(("fetch", int(tree["count"]) // (10 * every)))
        return to_host(tree)

    monkeypatch.setattr(calls.Resident, "epoch", noted)
    monkeypatch.setattr(parallel, "to_host", fetch)
    fields = {"resident_data": True, "steps_per_call": every, "log_every_steps": every}
    splits = Splits(EXAMPLES, None, make_examples(20))
    loop.train(config(epochs=1, devices=1, **fields), tmp_path, splits=splits)
    count = 10 // every
    assert [number for kind, number in events if kind == "call"] == list(range(1, count + 1))
    last = events.index(("call", count))
    running = 0
    for kind, number in events[: last + 1]:
        running = number if kind == "call" else running
        assert kind == "call" or number < running, events
    fetched = [number for kind, number in events if kind == "fetch"]
    assert fetched == [*range(1, count + 1), count]  # the last also for the epoch's line


def test_a_loop_of_steps_does_the_same():
    """What a GPU or TPU runs; a CPU's own form is compared bit for bit in test_loop.py."""
    mesh, run = parallel.make_mesh(2), config(data=DataConfig("tiny", flip=True))
    optimizer = optim.make_optimizer(run, 10)
    one = functools.partial(step.train_step, model=run.model, optimizer=optimizer, config=run)
    state = start.first_state(run, optimizer, EXAMPLES, mesh)
    index = np.random.default_rng(0).permutation(100)[:30].reshape(3, 10).astype(np.int32)
    rows = {"index": index, "epoch": np.zeros((3, 10), np.int32)}
    held = {"image": EXAMPLES.image, "label": EXAMPLES.label}
    several = functools.partial(calls.train_steps, step=one, mesh=mesh, loop=True)
    looped, loss = jax.jit(several)(state, (held, rows))
    for row in index:
        batch = EXAMPLES[row] | {"index": row, "epoch": np.zeros(10, np.int32)}
        state, expected = jax.jit(one)(state, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        (looped, loss),
        (state, expected),
    )
