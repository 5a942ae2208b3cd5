import contextlib
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cnn_jax.common import files as output
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.train import checkpoint, checkpoint_writer, parallel
from cnn_jax.train.checkpoint import Checkpoints, DamagedCheckpoint
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.step import TrainState, empty_sums

pytestmark = pytest.mark.oldest


def make_state(step=1, seed=0):
    """A state on one device with float32, bfloat16, int32 and uint32 arrays, some of rank 0."""
    random = np.random.default_rng([seed, step])
    params = {
        "Conv_0": {"kernel": random.normal(size=(3, 3, 1, 4)), "bias": random.normal(size=4)},
        "Dense_0": {"kernel": random.normal(size=(16, 10)), "bias": np.zeros(10)},
    }
    params = jax.tree.map(np.float32, params)
    state = TrainState(
        step=np.int32(step),
        params=params,
        model_state={
            "batch_stats": {"BatchNorm_0": {"mean": np.float32([1, 2]), "var": np.float32([3, 4])}}
        },
        opt_state=optax.adam(1e-3, mu_dtype="bfloat16").init(params),
        rng=np.array([7, 2**31 + step], np.uint32),
        sums=empty_sums(),
    )
    return parallel.replicate(state, parallel.make_mesh(1))


def save(workdir, *steps, keep=9, **notes):
    checkpoints = CheckpointWriter(workdir, keep=keep)
    checkpoints.start_writing(max(checkpoints.steps(), default=None))
    for step in steps:
        checkpoints.save(parallel.to_host(make_state(step)), {"epoch_seconds": 0.5, **notes})
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 1, 2 and 3; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "a run #1 100%")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


def assert_equal(restored, state):
    expected = checkpoint.names(state)
    assert restored.arrays.keys() == expected.keys()
    for name, value in expected.items():
        assert restored.arrays[name].dtype == value.dtype, name
        np.testing.assert_array_equal(restored.arrays[name], np.asarray(value), err_msg=name)


# -------------------------------------------------------------------------------- what is saved


def test_a_state_comes_back_as_it_was(saved):
    restored = Checkpoints(saved).read(2)
    assert restored.step == 2
    assert restored.notes == {"epoch_seconds": 0.5}
    assert_equal(restored, make_state(2))
    state = checkpoint.fill(make_state(3), restored)
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert_equal(checkpoint.Restored(2, checkpoint.names(state), {}), make_state(2))


def test_evaluation_reads_the_variables_alone(saved):
    restored = Checkpoints(saved).read(3, training=False)
    assert {name.split("/")[0] for name in restored.arrays} == {"params", "batch_stats"}
    wanted = make_state(0).variables
    filled = checkpoint.fill(wanted, restored)
    np.testing.assert_array_equal(
        filled["params"]["Conv_0"]["kernel"], make_state(3).params["Conv_0"]["kernel"]
    )


def test_a_state_changed_after_save_returns_does_not_change_the_checkpoint(tmp_path):
    """The train step reuses the state's buffers while the checkpoint is being written."""
    checkpoints = CheckpointWriter(tmp_path)
    checkpoints.start_writing(None)
    state = make_state(1)
    checkpoints.save(parallel.to_host(state), {})
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    )
    checkpoints.close()
    assert_equal(checkpoints.read(1), make_state(1))


def test_the_manifest_holds_the_sums_of_the_arrays(saved):
    manifest = next(path for path in files(saved / "checkpoints/3") if "manifest" in path.parts)
    text = "".join(p.read_text(errors="ignore") for p in files(manifest.parent))
    kernel = np.asarray(make_state(3).params["Dense_0"]["kernel"])
    assert hashlib.sha256(kernel.tobytes()).hexdigest() in text


# ------------------------------------------------------------------------------------- damage


def damaged_or_harmless(workdir, step):
    """The reason for which the checkpoint was refused, or None if it holds what was saved."""
    try:
        restored = Checkpoints(workdir).read(step)
    except DamagedCheckpoint as error:
        return str(error)
    assert_equal(restored, make_state(step))
    return None


@pytest.mark.parametrize("seed", range(15))
def test_a_flipped_byte_is_detected_or_harmless(workdir, seed):
    random = np.random.default_rng(seed)
    paths = [path for path in files(workdir / "checkpoints/3") if path.stat().st_size]
    path = paths[random.integers(len(paths))]
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= random.integers(1, 256)
    path.write_bytes(data)
    damaged_or_harmless(workdir, 3)


def test_every_kind_of_file_matters_when_it_is_cut_or_gone(workdir):
    """Each file, truncated to its half and deleted: the arrays are refused or those saved."""
    refused = 0
    for path in files(workdir / "checkpoints/3"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        refused += damaged_or_harmless(workdir, 3) is not None
        path.unlink()
        refused += damaged_or_harmless(workdir, 3) is not None
        path.write_bytes(data)
    assert damaged_or_harmless(workdir, 3) is None
    assert refused >= 10


def test_a_step_without_content_or_that_is_a_file_is_damaged(workdir):
    (workdir / "checkpoints/4").mkdir()
    (workdir / "checkpoints/5").write_text("not a folder")
    checkpoints = Checkpoints(workdir)
    assert checkpoints.steps() == [1, 2, 3, 4, 5]
    for step in (4, 5):
        with pytest.raises(DamagedCheckpoint, match=f"checkpoints/{step}: damaged"):
            checkpoints.read(step)


def test_a_checkpoint_under_another_step_s_name_is_damaged(workdir):
    os.rename(workdir / "checkpoints/2", workdir / "checkpoints/7")
    with pytest.raises(DamagedCheckpoint, match="step 2"):
        Checkpoints(workdir).read(7)


def damage(workdir, step):
    """Changes one byte of the stored arrays so that the step is refused."""
    for path in files(workdir / f"checkpoints/{step}/variables"):
        data = path.read_bytes()
        if len(data) > 1000:
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
            if damaged_or_harmless(workdir, step):
                return
            path.write_bytes(data)
    raise AssertionError("no file of the step matters")


def test_the_sums_find_what_the_files_do_not_tell(workdir, monkeypatch):
    """A value that changes without a trace in the file format: only the SHA-256 sum can tell."""
    intact = checkpoint._read

    def one_value_changed(folder, names):
        arrays = intact(folder, names)
        if "params/Dense_0/kernel" in arrays:
            arrays["params/Dense_0/kernel"] = arrays["params/Dense_0/kernel"].copy()
            arrays["params/Dense_0/kernel"][5, 5] += 1e-6
        return arrays

    monkeypatch.setattr(checkpoint, "_read", one_value_changed)
    with pytest.raises(DamagedCheckpoint, match="params/Dense_0/kernel differs from its checksum"):
        Checkpoints(workdir).read(3)
    Checkpoints(workdir).read(3, verify=False)


def test_damaged_checkpoints_are_named_and_skipped(workdir, caplog):
    damage(workdir, 3)
    (workdir / "checkpoints/12").mkdir()
    assert Checkpoints(workdir).newest().step == 2
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "cnn_jax.train.checkpoint"
    ]
    assert len(lines) == 2
    assert "checkpoints/12: damaged" in lines[0]
    assert "checkpoints/3: damaged" in lines[1]
    assert all("\n" not in line and len(line) < 700 for line in lines)


def test_a_damaged_file_is_told_in_our_words_alone(workdir, capfd):
    """Orbax's own restore leaves tracebacks of its threads."""
    shutil.rmtree(workdir / "checkpoints/3/variables/d")
    shutil.rmtree(workdir / "checkpoints/3/training/d")
    with pytest.raises(DamagedCheckpoint):
        Checkpoints(workdir).read(3)
    assert "Traceback" not in capfd.readouterr().err


def test_none_valid_is_an_error_that_changes_nothing(workdir):
    for step in (1, 2, 3):
        damage(workdir, step)
    before = content(workdir)
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is valid; nothing was"):
        Checkpoints(workdir).newest()
    assert content(workdir) == before


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path):
    assert Checkpoints(tmp_path).newest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path).select("latest")


def test_checkpoints_that_vanish_while_they_are_looked_for_are_none(tmp_path, monkeypatch):
    listed = iter([[1], []])
    monkeypatch.setattr(Checkpoints, "steps", lambda self: next(listed))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path).select("latest")


@pytest.mark.parametrize("payload", ["pickle", "object array"])
def test_a_workdir_full_of_pickles_runs_no_code(workdir, payload, tmp_path):
    """Every file is replaced, in one step each by each kind; none is unpickled."""
    trace = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    for path in files(workdir / "checkpoints"):
        if payload == "pickle":
            path.write_bytes(pickle.dumps(Evil()))
        else:
            with open(path, "wb") as file:
                np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError):
        Checkpoints(workdir).newest()
    assert checkpoint.verify(workdir) == 4
    assert not trace.exists()
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(Evil()))
    assert trace.exists()  # it would have run


# -------------------------------------------------------------------------------------- select


def test_select_takes_latest_or_a_step(workdir):
    checkpoints = Checkpoints(workdir)
    assert checkpoints.select("latest").step == 3
    assert checkpoints.select("1").step == 1
    for which in ("4", "last", "-1", "1.0", "²", "../1"):
        with pytest.raises(CheckpointError, match=r"must be latest, best or a step in .*: 1, 2, 3"):
            checkpoints.select(which)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* has a validation accuracy"):
        checkpoints.select("best")
    damage(workdir, 2)
    with pytest.raises(DamagedCheckpoint):
        checkpoints.select("2")


def write_metrics(workdir, **accuracy_by_step):
    lines = [
        {"step": int(step.lstrip("_")), "validation_accuracy": accuracy}
        for step, accuracy in accuracy_by_step.items()
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_best_is_the_highest_validation_accuracy(workdir):
    write_metrics(workdir, _1=0.25, _2=0.75, _3=0.5, _9=0.99)
    assert Checkpoints(workdir).select("best").step == 2


# ---------------------------------------------------------------------------- writing, pruning


def test_start_writing_clears_what_a_dead_run_left(workdir):
    folder = workdir / "checkpoints"
    for name in ("4.orbax-checkpoint-tmp-17", ".deleting-0/variables"):
        (folder / name).mkdir(parents=True)
    damage(workdir, 3)
    damaged = content(folder / "3")
    (folder / "5").write_text("not a folder")
    (folder / "damaged-3").write_text("from an earlier time")
    checkpoints = CheckpointWriter(workdir, keep=9)
    checkpoints.start_writing(checkpoints.newest().step)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "damaged-3", "damaged-5"]
    assert content(folder / "damaged-3") == damaged
    checkpoints.save(parallel.to_host(make_state(3)), {})
    checkpoints.close()
    assert checkpoints.newest().step == 3


def test_the_latest_and_the_best_are_kept(tmp_path):
    write_metrics(tmp_path, _1=0.5, _2=0.75, _3=0.25, _4=0.75, _5=0.5, _6=0.5)
    checkpoints = save(tmp_path, 1, 2, 3, 4, 5, 6, keep=2)
    assert checkpoints.steps() == [2, 5, 6]
    assert not [p for p in checkpoints.folder.iterdir() if not p.name.isdigit()]


def test_a_save_that_cannot_be_written_is_an_error_and_harms_nothing(workdir):
    checkpoints = CheckpointWriter(workdir, keep=9)
    checkpoints.start_writing(3)
    (workdir / "checkpoints/4").write_text("in the way")
    checkpoints.save(parallel.to_host(make_state(4)), {})
    with pytest.raises(CheckpointError, match="checkpoints/4: could not be written"):
        checkpoints.close()
    assert checkpoints.newest().step == 3


def test_a_workdir_deleted_during_the_run_is_not_made_anew(workdir):
    checkpoints = CheckpointWriter(workdir)
    checkpoints.start_writing(3)
    shutil.rmtree(workdir)
    checkpoints.save(parallel.to_host(make_state(4)), {})
    with pytest.raises(CheckpointError, match="checkpoints/4: could not be written"):
        checkpoints.close()
    assert not workdir.exists()


@pytest.mark.parametrize("fault", ["a value", "an array", "the manifest"])
def test_a_checkpoint_that_does_not_read_back_is_told_removed_and_saved_again(
    workdir, monkeypatch, caplog, fault
):
    """The older ones are kept until a newer one is proven, though only one is to be kept."""
    checkpoints = CheckpointWriter(workdir, keep=1)
    checkpoints.start_writing(3)
    with monkeypatch.context() as patch:
        if fault == "the manifest":
            other = ocp.args.JsonSave({"step": 4})
            patch.setattr(checkpoint_writer.ocp.args, "JsonSave", lambda _: other)
        else:
            intact = checkpoint._read

            def damaged(folder, names):
                arrays = intact(folder, names)
                if fault == "an array":
                    raise ValueError("NOT_FOUND")
                return {name: array + 1 for name, array in arrays.items()}

            patch.setattr(checkpoint, "_read", damaged)
        checkpoints.save(parallel.to_host(make_state(4)), {})
        with pytest.raises(CheckpointError, match="checkpoints/4: does not read back: "):
            checkpoints.wait()
    assert "checkpoints/4: does not read back: " in caplog.text
    assert checkpoints.failing()
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.save(parallel.to_host(make_state(4)), {})
    checkpoints.close()
    assert not checkpoints.failing()
    assert checkpoints.steps() == [4]
    assert_equal(checkpoints.newest(), make_state(4))


def test_a_failed_save_is_tried_again_after_a_pause_that_grows(workdir, monkeypatch):
    clock = iter(range(0, 1000))
    now = [next(clock)]
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: now[0])
    checkpoints = CheckpointWriter(workdir)
    checkpoints.start_writing(3)
    pauses = []
    for step in range(4, 12):
        (workdir / f"checkpoints/{step}").write_text("in the way")
        checkpoints.save(parallel.to_host(make_state(step)), {})
        failed = now[0]
        while not checkpoints.retry_is_due():
            now[0] = next(clock)
        pauses.append(now[0] - failed)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    with pytest.raises(CheckpointError):
        checkpoints.close()


def test_what_lies_in_the_way_of_later_steps_does_not_push_out_the_newest(workdir):
    checkpoints = CheckpointWriter(workdir, keep=1)
    checkpoints.start_writing(3)
    (workdir / "checkpoints/9").mkdir()
    checkpoints.save(parallel.to_host(make_state(4)), {})
    checkpoints.close()
    assert checkpoints.newest().step == 4


STRANGE = [
    "run[1]",
    "[2024] runs",
    "a\\b",
    "a*b?",
    "{a}",
    "x.__lock",
    "100% #1",
    "a@2",
    "-a",
    "two\nlines",
    "naïve 中",
    os.fsdecode(b"\xff"),
]


@pytest.mark.parametrize("name", [*STRANGE, "up/../x", "x[1]/y", "link/x", "up//x"], ids=ascii)
def test_every_path_that_the_file_system_takes_can_be_saved_into(tmp_path, monkeypatch, name):
    (tmp_path / "up").mkdir()
    (tmp_path / "link").symlink_to("up")
    monkeypatch.chdir(tmp_path)
    workdir = Path(name)
    save(workdir, 1)
    assert_equal(Checkpoints(workdir).newest(), make_state(1))
    assert_equal(Checkpoints(workdir.resolve()).newest(), make_state(1))
    assert not [p for p in workdir.resolve().parent.iterdir() if "orbax" in p.name]


def test_a_path_that_cannot_be_saved_into_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_OPEN_FOLDERS", tmp_path / "as on other systems")
    (tmp_path / "run[1]").mkdir()
    assert output.library_path(tmp_path) == tmp_path
    with pytest.raises(
        ConfigError, match=r"run\[1\]: on this system, a path must consist of letters, digits"
    ):
        output.library_path(tmp_path / "run[1]")


# ---------------------------------------------------------------------------------------- fill


def test_differences_are_listed_and_nothing_is_cast(saved):
    restored = Checkpoints(saved).read(3)
    state = make_state(3)
    params = state.params | {
        "Conv_0": {"kernel": np.zeros((5, 5, 1, 4), np.float32)},
        "Dense_0": state.params["Dense_0"] | {"bias": np.zeros(10, np.float16)},
        "Dense_1": {"bias": np.zeros(2, np.float32)},
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoint.fill({"params": params, **state.model_state}, restored)
    assert str(caught.value) == (
        "checkpoint 3 does not fit the model: "
        "params/Conv_0/bias: float32[4] saved, nothing expected; "
        "params/Conv_0/kernel: float32[3, 3, 1, 4] saved, float32[5, 5, 1, 4] expected; "
        "params/Dense_0/bias: float32[10] saved, float16[10] expected; "
        "params/Dense_1/bias: nothing saved, float32[2] expected"
    )


def test_many_differences_are_counted(saved):
    restored = Checkpoints(saved).read(3)
    params = {f"Other_{i}": np.zeros(1, np.float32) for i in range(10)}
    with pytest.raises(CheckpointError, match=r" and \d+ more$"):
        checkpoint.fill({"params": params, "batch_stats": {}}, restored)


# -------------------------------------------------------------------------------------- verify


def test_verify_tells_what_each_is_worth_and_changes_nothing(workdir, capsys):
    assert checkpoint.verify(workdir) == 0
    assert "3 of 3 checkpoints are valid" in capsys.readouterr().out
    damage(workdir, 3)
    before = content(workdir)
    assert checkpoint.verify(workdir) == 4
    lines = capsys.readouterr().out.splitlines()
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(make_state())) / 1e6
    count = len(jax.tree.leaves(make_state()))
    assert [line.split(maxsplit=2)[2] for line in lines[:2]] == [
        f"valid, {count} arrays, {size:.1f} MB"
    ] * 2
    assert lines[2].startswith("step        3  damaged (")
    assert lines[3] == "2 of 3 checkpoints are valid; training and evaluation go on from step 2"
    damage(workdir, 1)
    damage(workdir, 2)
    assert checkpoint.verify(workdir) == 4
    assert capsys.readouterr().out.endswith("0 of 3 checkpoints are valid; none is valid\n")
    Checkpoints(workdir).steps()
    assert before.keys() == content(workdir).keys()


def test_orbax_itself_can_read_a_checkpoint(saved):
    """So that a checkpoint outlives this project."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        abstract = jax.tree.map(np.asarray, {"params": make_state(2).params})
        abstract["batch_stats"] = jax.tree.map(np.asarray, make_state(2).model_state["batch_stats"])
        tree = reader.restore(
            (saved / "checkpoints/2/variables").absolute(), args=ocp.args.StandardRestore(abstract)
        )
    jax.tree.map(np.testing.assert_array_equal, tree["params"], make_state(2).params)
