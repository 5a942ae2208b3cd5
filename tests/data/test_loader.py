"""Order, batches, and their preparation ahead of time."""

import threading

import numpy as np
import pytest

from cnn_jax.data import loader
from cnn_jax.data.examples import InMemory
from cnn_jax.data.prefetch import look_ahead


class Slow:
    """What is not in memory, as far as loader.py can see; notes who asks, and for what."""

    def __init__(self, examples: InMemory, fails_at: int | None = None):
        self.examples, self.fails_at = examples, fails_at
        self.threads: list[str] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: np.ndarray) -> dict:
        if len(self.threads) == self.fails_at:
            raise OSError("disk gone")
        self.threads.append(threading.current_thread().name)
        return self.examples[indices]


def small(count: int) -> InMemory:
    """Examples that tell their own index by pixel and label."""
    image = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return InMemory(image, np.arange(count, dtype=np.int32), tuple(map(str, range(count))))


@pytest.fixture(scope="module")
def examples() -> InMemory:
    return small(23)


def same(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


# ------------------------------------------------------------------------------------- order


def test_order_is_a_permutation_given_by_seed_and_epoch():
    orders = {(s, e): loader.epoch_order(s, e, 60) for s in range(3) for e in range(3)}
    for (seed, epoch), order in orders.items():
        assert sorted(order.tolist()) == list(range(60))
        np.random.default_rng(5).random()  # other draws do not matter
        np.testing.assert_array_equal(order, loader.epoch_order(seed, epoch, 60))
    assert len({tuple(order) for order in orders.values()}) == 9


def test_order_stays_the_same_between_versions():
    # A resumed run must go on with the order that it began with.
    assert loader.epoch_order(0, 0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert loader.epoch_order(7, 3, 8).tolist() == [3, 5, 0, 4, 2, 7, 1, 6]


def test_orders_of_different_epochs_are_unrelated():
    # Of 1,000 places, about one stays where it was.
    one, two = (loader.epoch_order(0, epoch, 1000) for epoch in (0, 1))
    assert np.sum(one == two) < 10
    assert np.sum(one == loader.epoch_order(1, 0, 1000)) < 10


# --------------------------------------------------------------------------- training batches


def test_training_batches_follow_the_order(examples: InMemory):
    order = loader.epoch_order(0, 0, len(examples))
    made = list(loader.training_batches(examples, order, 5))
    assert len(made) == 4  # of 23; the last three are left out
    for step, batch in enumerate(made):
        expected = order[5 * step : 5 * step + 5]
        assert batch.keys() == {"image", "label", "index", "epoch"}
        np.testing.assert_array_equal(batch["index"], expected)
        np.testing.assert_array_equal(batch["label"], expected)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], expected)
        assert batch["image"].shape == (5, 2, 2, 1)
        assert batch["index"].dtype == batch["label"].dtype == np.int32
        assert batch["image"].dtype == np.uint8


@pytest.mark.parametrize("start", range(6))
def test_resumed_epoch_goes_on_with_the_same_batches(examples: InMemory, start: int):
    order = loader.epoch_order(3, 2, len(examples))
    whole = list(loader.training_batches(examples, order, 5))
    same(list(loader.training_batches(examples, order, 5, start)), whole[start:])
    same(list(loader.training_batches(Slow(examples), order, 5, start)), whole[start:])


# ------------------------------------------------------------------------- evaluation batches


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 23])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("source", [lambda x: x, Slow])
def test_evaluation_counts_every_example_once(total: int, batch_size: int, source):
    made = list(loader.evaluation_batches(source(small(total)), batch_size))
    seen: list[int] = []
    for batch in made:
        assert batch["image"].shape == (batch_size, 2, 2, 1)
        assert batch["label"].shape == batch["mask"].shape == (batch_size,)
        assert batch["mask"].dtype == np.float32
        assert set(batch["mask"].tolist()) <= {0.0, 1.0}
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        seen += batch["label"][batch["mask"] == 1].tolist()
    assert seen == list(range(total))
    assert len(made) == -(-total // batch_size)


# --------------------------------------------------------------------------------- look-ahead


def test_what_is_not_in_memory_is_prepared_by_another_thread(examples: InMemory):
    slow = Slow(examples)
    own = threading.current_thread().name
    order = np.arange(len(examples))
    same(
        list(loader.training_batches(slow, order, 4)),
        list(loader.training_batches(examples, order, 4)),
    )
    same(list(loader.evaluation_batches(slow, 4)), list(loader.evaluation_batches(examples, 4)))
    assert len(slow.threads) == 5 + 6
    assert own not in slow.threads


def test_what_is_in_memory_needs_no_thread(examples: InMemory):
    before = threading.active_count()
    for data in (
        loader.training_batches(examples, np.arange(23), 4),
        loader.evaluation_batches(examples, 4),
    ):
        next(data)
        assert threading.active_count() == before


def test_the_next_item_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(4)]

    def items():
        for event in made:
            event.set()
            yield event

    ahead = look_ahead(items())
    assert not made[0].is_set()
    for i, _ in enumerate(ahead):
        assert all(event.wait(timeout=60) for event in made[: i + 2])
        assert not any(event.is_set() for event in made[i + 2 :])


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_exception_of_the_worker_reaches_the_consumer(examples: InMemory, fails_at: int):
    before = threading.active_count()
    slow = Slow(examples, fails_at)
    got: list[dict] = []
    data = loader.training_batches(slow, np.arange(23), 4)
    for _ in range(fails_at):
        got.append(next(data))
    with pytest.raises(OSError, match="disk gone"):
        next(data)
    same(got, list(loader.training_batches(examples, np.arange(23), 4))[:fails_at])
    assert threading.active_count() == before
    assert list(data) == []


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("how", ["close", "drop", "break", "raise"])
def test_abandoned_iterator_leaves_no_thread(examples: InMemory, taken: int, how: str):
    before = threading.active_count()
    data = loader.training_batches(Slow(examples), np.arange(23), 4)
    for _ in range(taken):
        next(data)
    if how == "close":
        data.close()
    elif how == "drop":
        del data
    elif how == "break":
        for _ in data:
            break
        del data
    else:
        with pytest.raises(KeyboardInterrupt):
            data.throw(KeyboardInterrupt)
    assert threading.active_count() == before


def test_closing_ends_what_was_being_read():
    closed = threading.Event()

    def items():
        try:
            yield from range(10)
        finally:
            closed.set()

    ahead = look_ahead(items())
    assert next(ahead) == 0
    ahead.close()
    del ahead
    assert closed.is_set()


def test_nothing_to_look_ahead_to():
    assert list(look_ahead([])) == []
    assert list(look_ahead([None, 0])) == [None, 0]


@pytest.mark.parametrize("source", [lambda examples: examples, Slow])
def test_each_process_reads_its_own_rows_and_together_they_are_the_batches(source):
    examples, order = small(23), np.random.default_rng(0).permutation(23)
    parts = [np.array([0, 3]), np.array([1, 2])]  # the devices of a process need not be neighbours
    for batches in (
        lambda rows=None: loader.training_batches(source(examples), order, 4, 1, 5, rows),
        lambda rows=None: loader.evaluation_batches(source(examples), 4, rows),
    ):
        for whole, *own in zip(batches(), *map(batches, parts), strict=True):
            for name, array in whole.items():
                for rows, part in zip(parts, own, strict=True):
                    np.testing.assert_array_equal(part[name], array[rows], err_msg=name)
