import dataclasses
import functools
import json
import shutil
import signal
import time
import types

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from cnn_jax.analysis import restore as restored
from cnn_jax.common import cache
from cnn_jax.common.errors import CheckpointError, ConfigError, NotFiniteError, Preempted
from cnn_jax.config import CHANGEABLE_ON_RESUME, Config, DataConfig
from cnn_jax.data.splits import Splits
from cnn_jax.train import dry_run, evaluation, loop, saving
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.reporting import Reporter
from cnn_jax.train.saving import Saver
from tests.networks import Linear, Small
from tests.tiny import make_examples

pytestmark = pytest.mark.oldest

STEPS = 5  # of an epoch: 160 examples, 32 at a time
TIMES = ("epoch_seconds", "images_per_second")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_kept():
    """As in a run from the command line; and a second run of one configuration starts at once."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    cache.enable_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def make_config(**fields):
    data = DataConfig("tiny", flip=True, crop_padding=2)
    defaults = {"epochs": 2, "batch_size": 32, "eval_batch_size": 48, "devices": 1}
    return Config(**{"model": Small(), "data": data, **defaults, **fields})


def simple(**fields):
    """As `make_config`, without what takes time to compile."""
    return make_config(**{"model": Linear(), "data": DataConfig("tiny"), **fields})


def lines_of(workdir):
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in workdirs.metrics(workdir)
    ]


def assert_same_run(workdir, other):
    """Everything of the newest checkpoints, bit for bit, and every line of the metrics."""
    one, two = Checkpoints(workdir).newest(), Checkpoints(other).newest()
    assert one.step == two.step
    assert one.arrays.keys() == two.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == two.arrays[name].dtype, name
        assert array.tobytes() == two.arrays[name].tobytes(), name
    assert lines_of(workdir) == lines_of(other)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal right after that step; the run notes it in another thread, so wait for that."""
    intact = Saver.asked_to_stop

    def asked_to_stop(saver, done):
        if done == step and not saver.signals.exit_code:
            signal.raise_signal(number)
            give_up = time.monotonic() + 60
            while not saver.signals.exit_code and time.monotonic() < give_up:
                pass
        return intact(saver, done)

    monkeypatch.setattr(Saver, "asked_to_stop", asked_to_stop)


@pytest.fixture(scope="module")
def undisturbed(splits, tmp_path_factory):
    """Workdirs of the two epochs of `make_config()`, by number of devices."""

    @functools.cache
    def run(devices=1):
        workdir = tmp_path_factory.mktemp(f"undisturbed{devices}")
        loop.train(make_config(devices=devices), workdir, splits=splits)
        return workdir

    return run


# ------------------------------------------------------------------------------ resume, bits


@pytest.mark.parametrize("devices", [1, 4])
def test_data_on_the_devices_give_the_bits_of_data_from_the_host(
    splits, undisturbed, tmp_path, monkeypatch, devices
):
    """Calls of two steps, cut after step 3 for a checkpoint, from which another run goes on."""
    fields = {"resident_data": True, "checkpoint_every_steps": 3, "devices": devices}
    config = make_config(steps_per_call=2, **fields)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Preempted, match="after step 3 of 10, and saved"):
            loop.train(config, tmp_path, splits=splits)
    loop.train(config, tmp_path, splits=splits)
    assert_same_run(tmp_path, undisturbed(devices))


@pytest.mark.parametrize(
    ("step", "devices"), [(3, 1), (STEPS, 1), (2 * STEPS - 1, 1), (STEPS, 4), (STEPS + 2, 4)]
)
def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(
    splits, undisturbed, tmp_path, monkeypatch, step, devices
):
    config = make_config(devices=devices)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Preempted, match=f"after step {step} of 10, and saved"):
            loop.train(config, tmp_path, splits=splits)
    restored = Checkpoints(tmp_path).newest()
    assert restored.step == step
    # An epoch's line is written after its evaluation, for which a signal leaves no time.
    assert len(lines_of(tmp_path)) == (step - 1) // STEPS
    loop.train(config, tmp_path, splits=splits)
    assert_same_run(tmp_path, undisturbed(devices))


def test_a_streamed_run_has_the_bits_of_one_in_memory(tfds_dir, tmp_path, monkeypatch):
    """Also stopped within an epoch, going on with other workers, and with a corrupt record."""
    shutil.copytree(tfds_dir, tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"PNG")] ^= 1
    shard.write_bytes(content)

    def run(name, **fields):
        fields |= {"validation_examples": 20, "skip_corrupt": 1, "flip": True}
        config = simple(data=DataConfig("tiny_squares", **fields))
        loop.train(config, tmp_path / name, data_dir=str(tmp_path / "data"))

    run("memory", streaming=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # four steps an epoch
        with pytest.raises(Preempted):
            run("streamed", streaming=True, workers=1)
    run("streamed", streaming=True, workers=2)
    assert_same_run(tmp_path / "streamed", tmp_path / "memory")
    assert [line["skipped_examples"] for line in lines_of(tmp_path / "streamed")] == [1, 1]


def test_augmented_mixed_and_balanced_examples_are_the_same_after_a_stop(
    splits, tmp_path, monkeypatch
):
    changes = {"rotation": 15.0, "erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
    data = DataConfig("tiny", balanced=True, **changes)
    config = simple(data=data, class_weights="balanced", devices=2)
    loop.train(config, tmp_path / "whole", splits=splits)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        with pytest.raises(Preempted):
            loop.train(config, tmp_path / "stopped", splits=splits)
    resident = dataclasses.replace(config, resident_data=True)
    loop.train(resident, tmp_path / "stopped", splits=splits)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(splits, undisturbed, tmp_path):
    loop.train(make_config(), tmp_path / "again", splits=splits)
    assert_same_run(tmp_path / "again", undisturbed())
    loop.train(make_config(seed=1), tmp_path / "other", splits=splits)
    assert lines_of(tmp_path / "other") != lines_of(undisturbed())


def test_the_state_holds_every_part(undisturbed):
    """What the comparisons above compare."""
    arrays = Checkpoints(undisturbed()).newest().arrays
    tops = {name.split("/")[0] for name in arrays}
    assert tops == {"step", "params", "batch_stats", "opt_state", "rng", "sums"}
    assert any("mu/Conv_0/kernel" in name for name in arrays)
    assert arrays["step"] == 2 * STEPS


def test_saved_on_two_devices_restored_on_one(splits, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Preempted):
            loop.train(make_config(devices=2), tmp_path, splits=splits)
    loop.train(make_config(devices=1), tmp_path, splits=splits)
    one, two = Checkpoints(undisturbed()).newest(), Checkpoints(tmp_path).newest()
    for name, array in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], array, rtol=2e-3, atol=2e-4, err_msg=name)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["devices"] == 1


def test_a_run_killed_after_a_save_within_an_epoch_goes_on_from_it(splits, tmp_path, monkeypatch):
    """The workdir as it was on disk in the middle of an epoch, which is what SIGKILL leaves."""
    config = simple(checkpoint_every_steps=2)
    intact = Saver.asked_to_stop

    def copy_the_workdir(saver, done):
        if done == STEPS + 4:
            saver.checkpoints.wait()
            shutil.copytree(saver.folder, tmp_path / "killed")
        return intact(saver, done)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "asked_to_stop", copy_the_workdir)
        loop.train(config, tmp_path / "whole", splits=splits)
    assert Checkpoints(tmp_path / "killed").newest().step == STEPS + 3
    assert len(lines_of(tmp_path / "killed")) == 1
    loop.train(config, tmp_path / "killed", splits=splits)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_damaged_steps_are_trained_again(splits, tmp_path, caplog):
    config = simple(epochs=3)
    loop.train(config, tmp_path, splits=splits)
    whole = shutil.copytree(tmp_path, tmp_path / "whole", ignore=lambda *_: ["lock"])
    for path in (tmp_path / f"checkpoints/{3 * STEPS}").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    loop.train(config, tmp_path, splits=splits)
    assert "skipped" in caplog.text
    assert_same_run(tmp_path, whole)
    assert (tmp_path / f"checkpoints/damaged-{3 * STEPS}").is_dir()


def test_lines_that_are_torn_or_ahead_are_written_anew(splits, tmp_path):
    config = simple(epochs=3, keep_checkpoints=3)
    loop.train(config, tmp_path, splits=splits)
    whole = shutil.copytree(tmp_path, tmp_path / "whole", ignore=lambda *_: ["lock"])
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    # Cut in the middle of a line, and of a UTF-8 character.
    metrics.write_bytes(lines[0].encode() + lines[1].encode()[:20] + b"\xc3")
    shutil.rmtree(tmp_path / f"checkpoints/{3 * STEPS}")
    loop.train(config, tmp_path, splits=splits)
    assert lines_of(tmp_path)[1:] == lines_of(whole)[1:]
    # The newest checkpoint is of the first epoch, the lines are of all three.
    for epoch in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoints/{epoch * STEPS}")
    loop.train(config, tmp_path, splits=splits)
    assert_same_run(tmp_path, whole)
    assert [line["epoch"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_finished_run_has_nothing_left_to_do(splits, tmp_path, capsys):
    config = simple(epochs=1)
    before = loop.train(config, tmp_path, splits=splits)
    assert loop.train(config, tmp_path, splits=splits) == before
    assert "nothing left to do: 5 steps are done" in capsys.readouterr().out
    assert Checkpoints(tmp_path).steps() == [STEPS]


def test_a_second_signal_changes_nothing(splits, tmp_path, monkeypatch):
    intact = CheckpointWriter.save

    def save(checkpoints, state, notes):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        intact(checkpoints, state, notes)

    monkeypatch.setattr(CheckpointWriter, "save", save)
    stop_at(monkeypatch, 2, signal.SIGUSR1)
    with pytest.raises(Preempted) as caught:
        loop.train(simple(), tmp_path, splits=splits)
    assert caught.value.exit_code == 143
    assert Checkpoints(tmp_path).newest().step == 2


def test_handlers_are_those_from_before_when_training_ends(splits, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    loop.train(simple(epochs=1), tmp_path, splits=splits)
    assert [signal.getsignal(number) for number in numbers] == before


# -------------------------------------------------------------------------------- not finite


def bad_batch(config, step, total=160):
    """Indices of the batch of `step`, counted from 0, from the definition of the order."""
    epoch, place = divmod(step, total // config.batch_size)
    order = np.random.Generator(np.random.PCG64([config.seed, epoch])).permutation(total)
    return order[place * config.batch_size :][: config.batch_size].tolist()


@pytest.mark.parametrize("fields", [{}, {"resident_data": True, "steps_per_call": 5}])
def test_the_first_step_whose_loss_is_not_finite_is_named(splits, tmp_path, fields):
    """The loop looks at the end of the epoch only; the state remembers the first bad step."""
    config = simple(optimizer=optax.sgd, learning_rate=3e38, log_every_steps=1000, **fields)
    with pytest.raises(
        NotFiniteError, match=r"loss=(nan|inf) at step 1 \(epoch 1\): not finite"
    ) as e:
        loop.train(config, tmp_path, splits=splits)
    assert "no checkpoint yet" in str(e.value)
    assert e.value.exit_code == 5
    dump = json.loads((tmp_path / "not_finite.json").read_text())
    assert dump["step"] == 1
    assert dump["epoch"] == 1
    assert dump["indices"] == bad_batch(config, 1)
    assert not Checkpoints(tmp_path).steps()
    assert lines_of(tmp_path) == []


def sgd_that_breaks(learning_rate, at, value=np.nan):
    """Plain descent whose update number `at`, counted from 0, is `value`."""

    def update(updates, count, params=None):
        factor = jax.numpy.where(count == at, value, -learning_rate(count))
        return jax.tree.map(lambda g: g * 0 + factor, updates), count + 1

    return optax.GradientTransformation(lambda params: np.int32(0), update)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.inf, "params/Dense_0/bias is not finite after step 9"),
        (
            3e38,
            "test_loss=(nan|inf) after step 9",
        ),  # the parameters are finite, their logits are not
    ],
)
def test_what_the_last_step_spoils_is_found(value, said, splits, tmp_path):
    optimizer = functools.partial(sgd_that_breaks, at=9, value=value)
    with pytest.raises(NotFiniteError, match=said):
        loop.train(simple(optimizer=optimizer, epochs=2), tmp_path, splits=splits)
    json.loads((tmp_path / "not_finite.json").read_text())
    assert [line["epoch"] for line in lines_of(tmp_path)] == [1]


def test_an_optimizer_whose_own_number_is_infinite_is_saved(splits, tmp_path):
    """reduce_on_plateau's best value, until it has seen as many losses as it takes for one."""

    def optimizer(learning_rate):
        plateau = optax.contrib.reduce_on_plateau(accumulation_size=100)
        return optax.chain(optax.sgd(learning_rate), plateau)

    loop.train(simple(optimizer=optimizer, epochs=1), tmp_path, splits=splits)
    (step,) = Checkpoints(tmp_path).steps()
    arrays = Checkpoints(tmp_path).read(step).arrays
    assert np.isinf(arrays["opt_state/0/1/best_value"])


@pytest.mark.parametrize("every", [1, 2, 1000])
def test_a_state_that_is_not_finite_is_never_saved(splits, tmp_path, every):
    """Update 6 spoils the parameters though its loss was finite; loss 7 is the first bad one."""
    config = simple(
        optimizer=functools.partial(sgd_that_breaks, at=6),
        checkpoint_every_steps=every,
        log_every_steps=1000,
        keep_checkpoints=100,
    )
    with pytest.raises(NotFiniteError) as caught:
        loop.train(config, tmp_path, splits=splits)
    saved = Checkpoints(tmp_path)
    assert saved.steps()[-1] == {1: 6, 2: 6, 1000: 5}[every]
    for step in saved.steps():
        for name, array in saved.read(step).arrays.items():
            assert np.isfinite(array).all(), (step, name)
    assert f"the checkpoint of step {saved.steps()[-1]} is kept" in str(caught.value)
    # The state after step 6 is looked at only where it would be saved.
    blamed = 6 if every == 1 else 7
    assert f"step {blamed}" in str(caught.value)
    dump = json.loads((tmp_path / "not_finite.json").read_text())
    assert dump["step"] == blamed
    assert dump["indices"] == bad_batch(config, blamed)


# ---------------------------------------------------------------------------------- cadence


def saved_steps(config, workdir, splits, monkeypatch):
    """The steps that a run saved, in order."""
    steps = []
    intact = CheckpointWriter.save

    def save(checkpoints, state, notes):
        steps.append(int(state.step))
        intact(checkpoints, state, notes)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", save)
        loop.train(config, workdir, splits=splits)
    return steps


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [5, 10, 15]),
        ({"checkpoint_every_epochs": 2}, [10, 15]),
        ({"checkpoint_every_epochs": 9}, [15]),
        ({"checkpoint_every_steps": 2}, [2, 4, 5, 6, 8, 10, 12, 14, 15]),
        ({"checkpoint_every_steps": 4, "checkpoint_every_epochs": 9}, [4, 8, 12, 15]),
    ],
)
def test_checkpoints_come_as_often_as_asked(splits, tmp_path, monkeypatch, fields, expected):
    config = simple(epochs=3, **fields)
    assert saved_steps(config, tmp_path, splits, monkeypatch) == expected
    assert Checkpoints(tmp_path).steps() == expected[-2:]


def test_checkpoints_by_the_minute(splits, tmp_path, monkeypatch):
    """A clock on which every reading is twenty seconds after the one before."""
    seconds = iter(range(0, 10**6, 20))
    clock = types.SimpleNamespace(
        monotonic=lambda: next(seconds), perf_counter=time.perf_counter, time=time.time
    )
    monkeypatch.setattr(saving, "time", clock)
    config = simple(checkpoint_every_minutes=1.0, checkpoint_every_epochs=9, epochs=1)
    steps = saved_steps(config, tmp_path, splits, monkeypatch)
    assert steps == [3, 5]


def test_keep_checkpoints(splits, tmp_path):
    loop.train(simple(epochs=4, keep_checkpoints=3), tmp_path, splits=splits)
    assert Checkpoints(tmp_path).steps() == [10, 15, 20]


def test_the_best_by_validation_is_kept_besides(tmp_path, monkeypatch):
    """Falling accuracies: the first epoch's stays."""
    accuracies = iter([0.5, 0.25, 0.75, 0.5, 0.25, 0.75, 0.125, 0.0])
    intact = evaluation.evaluate_examples

    def scripted(*arguments, **options):
        return dataclasses.replace(intact(*arguments, **options), accuracy=next(accuracies))

    monkeypatch.setattr(evaluation, "evaluate_examples", scripted)
    three = Splits(make_examples(160), make_examples(20, seed=2), make_examples(48, seed=1))
    data = DataConfig("tiny", validation_examples=20)
    loop.train(simple(epochs=4, keep_checkpoints=1, data=data), tmp_path, splits=three)
    assert [line["validation_accuracy"] for line in lines_of(tmp_path)] == [0.5, 0.75, 0.25, 0.125]
    assert Checkpoints(tmp_path).steps() == [10, 20]
    assert Checkpoints(tmp_path).select("best").step == 10


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_eval_every_epochs(splits, tmp_path, every, expected):
    lines = loop.train(simple(epochs=3, eval_every_epochs=every), tmp_path, splits=splits)
    assert [line["epoch"] for line in lines if "test_accuracy" in line] == expected
    assert [line["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5, 7, 9, 10]), (100, [5, 10])])
def test_log_every_steps(splits, tmp_path, monkeypatch, every, expected):
    steps = []
    monkeypatch.setattr(Reporter, "steps", lambda reporter, step, *_: steps.append(step))
    loop.train(simple(log_every_steps=every), tmp_path, splits=splits)
    assert steps == expected


# ------------------------------------------------------------------------------- the same run


def test_another_experiment_is_refused_with_the_difference(splits, tmp_path):
    loop.train(simple(epochs=1), tmp_path, splits=splits)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    other = simple(epochs=1, learning_rate=0.5, data=DataConfig("tiny", flip=True))
    with pytest.raises(ConfigError, match=r"data.flip: False -> True; learning_rate: 0.001 -> 0.5"):
        loop.train(other, tmp_path, splits=splits)
    assert before == {p: p.read_bytes() for p in before}
    fewer = dataclasses.replace(splits, train=make_examples(96))
    with pytest.raises(ConfigError, match="160 -> 96"):
        loop.train(simple(epochs=1), tmp_path, splits=fewer)


def test_what_does_not_touch_the_mathematics_may_change(splits, tmp_path):
    splits = dataclasses.replace(splits, validation=splits.test)
    loop.train(simple(epochs=1), tmp_path, splits=splits)
    changed = {
        "checkpoint_every_epochs": 3,
        "checkpoint_every_minutes": 9.0,
        "checkpoint_every_steps": 7,
        "data": DataConfig("tiny", streaming=True, workers=2),
        "devices": 2,
        "early_stopping_epochs": 3,
        "eval_every_epochs": 2,
        "grace_seconds": 5.0,
        "heartbeat_seconds": 50,
        "keep_checkpoints": 4,
        "log_every_steps": 3,
        "resident_data": True,
        "steps_per_call": 2,
    }
    named = (changed.keys() - {"data"}) | {"data.streaming", "data.workers"}
    assert named == CHANGEABLE_ON_RESUME
    loop.train(simple(epochs=1, **changed), tmp_path, splits=splits)


def test_epochs_may_be_added_where_the_learning_rate_does_not_depend_on_them(splits, tmp_path):
    loop.train(simple(epochs=1), tmp_path, splits=splits)
    loop.train(simple(epochs=2), tmp_path, splits=splits)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["epochs"] == 2
    loop.train(simple(epochs=2), tmp_path / "whole", splits=splits)
    assert_same_run(tmp_path, tmp_path / "whole")
    cosine = tmp_path / "cosine"
    loop.train(simple(epochs=1, schedule="cosine"), cosine, splits=splits)
    with pytest.raises(ConfigError, match="epochs: 1 -> 2"):
        loop.train(simple(epochs=2, schedule="cosine"), cosine, splits=splits)


def test_fewer_epochs_than_were_done_are_refused(splits, tmp_path):
    loop.train(simple(epochs=2), tmp_path, splits=splits)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"epochs=1: must be at least the 2 that workdir=.* has"):
        loop.train(simple(epochs=1), tmp_path, splits=splits)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(splits, tmp_path):
    loop.train(simple(epochs=1), tmp_path, splits=splits)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["config"]["model"] = {"class": "Small", "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"batch_stats/BatchNorm_0/mean: nothing saved"):
        loop.train(simple(model=Small(), epochs=1), tmp_path, splits=splits)
    assert Checkpoints(tmp_path).newest().step == STEPS


def test_a_dry_run_leaves_nothing(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "load_splits", lambda *_: splits)
    monkeypatch.setattr(dry_run.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = dry_run.dry_run(simple(epochs=30))
    assert [line["step"] for line in lines] == [2]
    assert list(tmp_path.iterdir()) == []


def test_evaluation_skips_a_damaged_checkpoint_and_changes_none(splits, tmp_path):
    loop.train(simple(), tmp_path, splits=splits)
    for path in (tmp_path / f"checkpoints/{2 * STEPS}").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert restored.load_run(tmp_path, model=Linear()).step == STEPS
    assert before == {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}


# ------------------------------------------------------------------------------ errors at the end


def test_a_failing_save_does_not_hide_the_error_before_it(splits, tmp_path, monkeypatch, caplog):
    def fails(checkpoints):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(CheckpointWriter, "wait", fails)
    config = simple(optimizer=optax.sgd, learning_rate=3e38)
    with pytest.raises(NotFiniteError):
        loop.train(config, tmp_path, splits=splits)
    assert "warning: the disk is full" in caplog.text
