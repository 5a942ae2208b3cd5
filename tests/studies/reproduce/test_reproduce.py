"""The plan, the records of runs, and the tables that are made of them."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys

import pytest

from cnn_jax.common.errors import ConfigError, Preempted, WorkdirError
from cnn_jax.config import experiment as experiments
from cnn_jax.config.overrides import override
from cnn_jax.config.serialize import is_of, to_json
from cnn_jax.studies import markdown
from cnn_jax.studies.reproduce import plan, records, run, table
from cnn_jax.studies.reproduce.plan import Row
from cnn_jax.studies.subprocesses import CommandFailed, Processes
from cnn_jax.train import workdir as workdirs
from tests.faults import runs
from tests.tiny import REPOSITORY, run_command

HERE = "A processor, 2 cores"
EXPERIMENT = '''"""An MLP on tiny squares."""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP


def config() -> Config:
    return Config(model=MLP(), data=DataConfig("tiny_squares"), epochs=2, eval_batch_size=24)
'''


def put_record(
    folder, experiment, seed=0, test=0.9, device=HERE, parameters=1000, speed=1, **changes
):
    """A record as `records.write` leaves it, of two epochs; `changes` are of its config."""
    path = records.folder(folder, experiment, seed)
    path.mkdir(parents=True)
    config = to_json(experiments.load(experiment, [f"seed={seed}"])) | changes
    lines = [
        {"step": 1, "epoch": 1, "train_accuracy": 0.1, "epoch_seconds": 99.0},
        {"step": 2, "epoch": 2, "train_accuracy": 0.95, "epoch_seconds": 101.0},
    ]
    for line in lines:
        line["epoch_seconds"] /= speed
        line["images_per_second"] = 1000 * line["epoch"] * speed
    about = {"device": device, "parameters": parameters, "training_flops": 25e11}
    about["training_seconds"] = 200.0
    about["versions"] = dict.fromkeys(("python", "jax", "flax", "optax"), "1.2.3")
    (path / "config.json").write_text(json.dumps({"config": config}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "evaluation.json").write_text(json.dumps({"accuracy": test}))
    (path / "run.json").write_text(json.dumps(about))


def cells(text, experiment):
    """The table rows of an experiment, as lists of cells."""
    found = [line for line in text.splitlines() if line.startswith(f"| {experiment} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def paragraph(text, experiment):
    start = text.index(f"**{experiment}.**")
    return " ".join(text[start : text.index("\n\n", start)].split())


# ------------------------------------------------------------------------------------ the plan


def test_the_rows_are_chosen_by_name_with_as_many_seeds_as_are_asked_for():
    (row,) = plan.choose(plan.ROWS, ["fashion_mnist/strided"], None)
    assert (row.experiment, row.seeds, row.lecture_test) == ("fashion_mnist/strided", 3, 0.9055)
    assert [row.seeds for row in plan.choose(plan.ROWS[:2], [], 7)] == [7, 7]
    with pytest.raises(ConfigError, match=r"--only=lenett: .*nearest: .*cifar10/lenet"):
        plan.choose(plan.ROWS, ["lenett"], None)


def test_bad_flags_end_with_exit_code_2_and_one_line(tmp_path):
    for flag in ("--only=fashion_mnist/lenets", "--only=", "--seeds=0", "--seeds=two"):
        done = run_command("reproduce", flag, "--workdir", tmp_path / "w", CNN_JAX_CACHE="off")
        assert done.returncode == 2
        assert re.fullmatch(rf"error: {flag}: .*\n", done.stderr), done.stderr
    assert not (tmp_path / "w").exists()
    done = run_command("reproduce", "--rebuild", "--seeds=2", "--output", tmp_path / "w")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --seeds: must not be given with --rebuild, which trains nothing; leave it out\n",
    )


@pytest.mark.parametrize("name", experiments.names())
def test_the_head_of_an_experiment_gives_what_its_records_give(name):
    """If it gives any figure: mean and standard deviation of the first n seeds."""
    found = {run.seed: run for run in table.read_all(experiments.FOLDER / "records", name)}
    head = (experiments.FOLDER / f"{name}.py").read_text().split('"""')[1]
    quoted = re.search(r"Test accuracy (\S+(?: ± \S+)?) \(n = (\d+)\)", head)
    if quoted:
        tests = [found[seed].evaluation["accuracy"] for seed in range(int(quoted[2]))]
        assert quoted[1] == markdown.spread(tests)


# ---------------------------------------------------------------------------------- the tables


def test_without_records_every_row_says_so_and_names_its_command(tmp_path):
    text = table.render(tmp_path)
    for row in plan.ROWS:
        ((*shown, command),) = cells(text, row.experiment)
        assert "not run" in shown
        assert command == f"`./launch.sh reproduce --only={row.experiment}`"


def test_a_row_has_mean_and_standard_deviation_of_its_runs(tmp_path):
    for seed, test in enumerate((0.91, 0.93, 0.92)):
        put_record(tmp_path, "fashion_mnist/max_pool", seed, test, parameters=1_588_490)
    put_record(tmp_path, "fashion_mnist/lenet", 0, 0.8)
    text = table.render(tmp_path)
    (row,) = cells(text, "fashion_mnist/max_pool")
    assert row[1:5] == ["1,588,490", "0-2 (n = 3)", "0.9500", "**0.9200 ± 0.0100**"]
    assert row[5:8] == ["0.9786", "0.9125", "-"]
    assert row[8:12] == ["100", "1,500", "0.00250", "A"]
    assert f"- A: {HERE}" in text
    assert cells(text, "fashion_mnist/lenet")[0][4] == "**0.8000**"


def test_runs_of_several_devices_share_their_accuracy_but_no_time(tmp_path):
    put_record(tmp_path, "cifar10/lenet", 0, 0.61)
    put_record(tmp_path, "cifar10/lenet", 1, 0.62)
    put_record(tmp_path, "cifar10/lenet", 3, 0.63, device="1 x An accelerator", speed=10)
    text = table.render(tmp_path)
    (row,) = cells(text, "cifar10/lenet")
    assert row[2:5] == ["0-1, 3 (n = 3)", "0.9500", "**0.6200 ± 0.0100**"]
    assert row[8:12] == ["100 / 10.0", "1,500 / 15,000", "0.00250", "A / B"]
    assert f"- A: {HERE}\n- B: 1 x An accelerator\n" in text


@pytest.mark.parametrize(
    ("pool", "stride", "said"),
    [
        (0.91, 0.90, "1.00 points below"),
        (0.90, 0.91, "1.00 points above"),
        (0.90, 0.90, "equal to"),
    ],
)
def test_what_is_said_of_pooling_and_strides_follows_the_figures(tmp_path, pool, stride, said):
    put_record(tmp_path, "fashion_mnist/max_pool", test=pool)
    put_record(tmp_path, "fashion_mnist/strided", test=stride)
    text = paragraph(table.render(tmp_path), "fashion_mnist/strided")
    assert f"It is {said} fashion_mnist/max_pool's" in text
    assert "no proof): too little to tell which is better." in text  # one run each


@pytest.mark.parametrize(
    ("strided", "pool", "probability", "order"),
    [
        # t = 3.54 with 2 degrees of freedom, whose distribution has a closed form: p = 0.0715.
        ((0.900, 0.904), (0.910, 0.914), "p = 0.0715", "too little to tell which is better"),
        ((0.900, 0.904), (0.960, 0.964), "p = 0.00221", "the lecture's order"),
        ((0.960, 0.964), (0.900, 0.904), "p = 0.00221", "not the lecture's order"),
        ((0.9, 0.9), (0.9, 0.9), "p = 1.00", "too little to tell which is better"),
    ],
)
def test_a_difference_is_held_against_chance(tmp_path, strided, pool, probability, order):
    for seed in (0, 1):
        put_record(tmp_path, "fashion_mnist/strided", seed, strided[seed])
        put_record(tmp_path, "fashion_mnist/max_pool", seed, pool[seed])
    text = paragraph(table.render(tmp_path), "fashion_mnist/strided")
    assert f"(Welch's t-test: {probability}): {order}." in text


@pytest.mark.parametrize(
    ("accuracies", "met"),
    [((0.939, 0.942), "yes"), ((0.939, 0.940), "no"), ((0.93994, 0.93998), "yes")],
)
def test_a_target_is_met_by_the_mean(tmp_path, monkeypatch, accuracies, met):
    monkeypatch.setattr(plan, "RECORDS", (Row("quickstart", 2, target=0.94),))
    for seed, test in enumerate(accuracies):
        put_record(tmp_path, "quickstart", seed, test)
    (row,) = cells(table.render(tmp_path, plan.RECORDS), "quickstart")
    assert row[3:5] == ["0.9400", met]  # by the mean as it is printed
    assert row[6:8] == ["0.00250", "200"]


def test_records_of_another_configuration_are_left_out(tmp_path, caplog):
    put_record(tmp_path, "cifar10/lenet", 0, 0.6, epochs=11)
    put_record(tmp_path, "cifar10/lenet", 1, 0.7, keep_checkpoints=9)  # changes no number
    (row,) = cells(table.render(tmp_path), "cifar10/lenet")
    assert row[2] == "1 (n = 1)"
    assert "record of cifar10/lenet, seed 0 is left out" in caplog.text


def test_a_record_from_before_a_field_was_added_still_counts(tmp_path):
    put_record(tmp_path, "cifar10/lenet")
    path = records.folder(tmp_path, "cifar10/lenet", 0) / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["clip_norm"], saved["config"]["data"]["flip"]
    path.write_text(json.dumps(saved))
    assert is_of(saved["config"], experiments.load("cifar10/lenet"))
    assert not is_of(saved["config"], experiments.load("cifar10/lenet", ["clip_norm=1"]))
    assert not is_of(saved["config"], experiments.load("cifar10/lenet", ["data.flip=true"]))


def test_a_run_from_before_a_field_was_added_goes_on(tmp_path):
    config = experiments.load("cifar10/lenet")
    saved = {"experiment": "x", "class_names": [], "image_shape": [32, 32, 3]}
    saved["config"] = to_json(config)
    del saved["config"]["init_examples"], saved["config"]["data"]["flip"]
    workdirs.write_json(tmp_path / "config.json", saved)
    workdirs.check_same_run(tmp_path, config, {})
    with pytest.raises(ConfigError, match=r"data\.flip: False -> True"):
        workdirs.check_same_run(tmp_path, override(config, ["data.flip=true"]), {})


def test_a_damaged_record_is_named(tmp_path):
    put_record(tmp_path, "cifar10/lenet")
    path = records.folder(tmp_path, "cifar10/lenet", 0)
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(WorkdirError, match=re.escape(f"{path}: damaged record")):
        table.render(tmp_path)


@pytest.mark.parametrize("name", records.NEEDED)
def test_a_record_without_what_the_tables_need_is_damaged(tmp_path, name):
    put_record(tmp_path, "cifar10/lenet")
    path = records.folder(tmp_path, "cifar10/lenet", 0)
    saved = json.loads((path / "run.json").read_text())
    del saved[name]
    (path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(WorkdirError, match=rf"damaged record \(KeyError: '{name}'\)"):
        table.render(tmp_path)


def test_a_record_of_code_that_no_commit_holds_is_told(tmp_path, caplog):
    put_record(tmp_path, "cifar10/lenet")
    path = records.folder(tmp_path, "cifar10/lenet", 0) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dirty": True}))
    table.render(tmp_path)
    assert caplog.messages == [
        "warning: the record of cifar10/lenet, seed 0 was made with code that was not committed"
    ]


def test_numbers_are_short():
    shown = [table.short(x) for x in (0.0015211, 0.29, 7.128, 31.94, 577, 23456.7, 0)]
    assert shown == ["0.00152", "0.290", "7.13", "31.9", "577", "23,457", "0"]
    assert table.seeds([3, 0, 1, 7]) == "0-1, 3, 7"


def test_a_section_replaces_its_own_and_leaves_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    markdown.put_section(path, "speed", "fast")
    markdown.put_section(path, "accuracy", "old figures", first=True)
    before = path.read_text()
    markdown.put_section(path, "accuracy", "new figures", first=True)
    assert path.read_text() == before.replace("old figures", "new figures")
    assert re.fullmatch(
        r"# Results\n\n<!-- accuracy -->\nnew figures\n<!-- end of accuracy -->\n\n"
        r"<!-- speed -->\nfast\n<!-- end of speed -->\n",
        path.read_text(),
    )
    whole = path.read_text()
    path.write_text(whole.rstrip("\n"))  # as an editor may leave it
    markdown.put_section(path, "speed", "fast")
    assert path.read_text() == whole


def test_a_table_can_be_read_as_text():
    text = markdown.markdown_table(["a", "value"], [["long cell", "1"], ["x", "23456789"]])
    assert text.splitlines() == [
        "| a         |    value |",
        "| --------- | -------: |",
        "| long cell |        1 |",
        "| x         | 23456789 |",
    ]


# ------------------------------------------------------------------------------------ the runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.fixture(scope="module")
def reproduced(small, tfds_dir, tmp_path_factory):
    """Two seeds of an experiment behind one that does not exist: exit code, workdir, output."""
    folder = tmp_path_factory.mktemp("reproduced")
    rows = [Row(str(folder / "missing.py"), 1), Row(small, 2)]
    code = run.reproduce(rows, folder / "runs", folder / "output", str(tfds_dir), rows)
    return code, folder / "runs", folder / "output"


def test_a_run_that_fails_does_not_stop_the_others(reproduced):
    code, _, output = reproduced
    assert code == 2
    assert sorted(path.name for path in (output / "records" / "small").iterdir()) == [
        "seed_0",
        "seed_1",
    ]


def test_a_record_holds_what_the_run_left_and_no_path(reproduced, tfds_dir):
    _, workdir, output = reproduced
    own, record = workdir / "small" / "seed_1", output / "records" / "small" / "seed_1"
    assert sorted(path.name for path in record.iterdir()) == sorted(records.FILES)
    for name in ("config.json", "metrics.jsonl", "evaluation.json"):
        assert (record / name).read_bytes() == (own / name).read_bytes()
    saved = records.read(record)
    assert saved.seed == 1
    assert saved.evaluation["split"] == "test"
    assert saved.evaluation["accuracy"] == saved.metrics[-1]["test_accuracy"]
    about = saved.run
    assert about["training_images"] == 320  # 160 examples, twice
    # 784 -> 128 -> 10: forward and the kernels' gradients for both layers, the input's for one.
    assert about["training_flops"] == 320 * 2 * (2 * 784 * 128 + 3 * 128 * 10)
    assert about["parameters"] == 101_770
    assert about["wall_seconds"] > about["training_seconds"] > 0
    assert about["versions"].keys() >= {"jax", "flax", "optax"}
    everything = "".join(path.read_text() for path in record.iterdir())
    for folder in (workdir, output, tfds_dir, REPOSITORY):
        assert str(folder) not in everything


def test_the_results_are_those_of_the_records(reproduced, small):
    _, workdir, output = reproduced
    tests = [workdirs.metrics(workdir / "small" / f"seed_{s}")[-1]["test_accuracy"] for s in (0, 1)]
    (row,) = cells((output / "RESULTS.md").read_text(), small)
    assert row[4] == f"**{statistics.mean(tests):.4f} ± {statistics.stdev(tests):.4f}**"


def test_what_is_recorded_is_not_trained_again(reproduced, small, tfds_dir, tmp_path, monkeypatch):
    _, _, output = reproduced
    monkeypatch.setattr(Processes, "run", lambda *_, **__: pytest.fail("trains again"))
    rows = [Row(small, 2)]
    assert run.reproduce(rows, tmp_path / "elsewhere", output, str(tfds_dir), rows) == 0


def test_a_finished_run_is_only_recorded(reproduced, small, tfds_dir, tmp_path):
    _, workdir, output = reproduced
    before = (workdir / "small" / "seed_0" / "metrics.jsonl").read_bytes()
    rows = [Row(small, 1)]
    assert run.reproduce(rows, workdir, tmp_path, str(tfds_dir), rows) == 0
    record = records.read(tmp_path / "records" / "small" / "seed_0")
    assert (workdir / "small" / "seed_0" / "metrics.jsonl").read_bytes() == before
    first = records.read(output / "records" / "small" / "seed_0")
    assert record.run["training_seconds"] == first.run["training_seconds"]
    assert record.run["wall_seconds"] > first.run["wall_seconds"]  # of both calls


def test_a_run_is_of_the_commit_and_the_processor_it_began_with(
    small, tfds_dir, tmp_path, monkeypatch
):
    """Finished at another commit it is dirty; only recorded there, it is what it was."""
    rows, path = [Row(small, 1)], tmp_path / "records" / "small" / "seed_0"

    def reproduce(commit, processor):
        monkeypatch.setattr(records, "commit", lambda: {"commit": commit, "dirty": False})
        monkeypatch.setattr(run.cpu, "description", lambda: processor)
        assert run.reproduce(rows, tmp_path / "runs", tmp_path, str(tfds_dir), rows) == 0
        return [records.read(path).run[name] for name in ("commit", "dirty", "device")]

    assert reproduce("first", "this one") == ["first", False, "this one"]
    (path / "run.json").unlink()
    assert reproduce("second", "another") == ["first", False, "this one"]
    (path / "run.json").unlink()
    own = tmp_path / "runs" / "small" / "seed_0"
    half, _ = (own / "metrics.jsonl").read_text().splitlines()
    (own / "metrics.jsonl").write_text(half + "\n")
    assert reproduce("second", "another") == ["first", True, "this one"]


def test_missing_data_is_told_on_a_line_a_run(small, tmp_path, caplog):
    rows = [Row(small, 1)]
    code = run.reproduce(rows, tmp_path / "runs", tmp_path, str(tmp_path / "nothing"), rows)
    assert code == 3
    (line,) = [text for text in caplog.messages if text.startswith("error: ")]
    assert re.match(rf"error: {re.escape(small)}, seed 0 \(1 of 1\): .*tiny_squares", line)
    assert "not run" in (tmp_path / "RESULTS.md").read_text()


REPRODUCE = """
import sys
from pathlib import Path
from cnn_jax import main
from cnn_jax.studies.reproduce import plan, run
experiment, workdir, output, data_dir = sys.argv[1:]
rows = [plan.Row(experiment, 1)]
command = lambda: run.reproduce(rows, Path(workdir), Path(output), data_dir, rows)
from cnn_jax.cli import commands, flags
commands.COMMANDS["again"] = flags.Command("again", lambda values: command(), {})
sys.exit(main.main(["again"]))
"""


def test_a_signal_saves_the_run_and_the_same_command_goes_on(tfds_dir, tmp_path):
    experiment = tmp_path / "signalled.py"
    experiment.write_text(runs.EXPERIMENT)
    arguments = [str(experiment), str(tmp_path / "runs"), str(tmp_path), str(tfds_dir)]

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", REPRODUCE, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"XLA_FLAGS": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    process = start()
    own = tmp_path / "runs" / "signalled" / "seed_0"
    runs.signal_when(runs.has_saved(own, 3), process, signal.SIGTERM)
    ended, _, errors = runs.finish(process)
    assert ended == 143, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "and saved; run the same command again" in line
    assert not (tmp_path / "records").exists()
    ended, output, errors = runs.finish(start())
    assert (ended, "resumed from step" in output) == (0, True), errors
    record = records.read(tmp_path / "records" / "signalled" / "seed_0")
    assert [line["epoch"] for line in record.metrics] == [1, 2, 3, 4, 5, 6]


# -------------------------------------------------------------------------------- the processes


def test_a_command_that_fails_gives_its_line_and_its_code(capfd):
    with Processes() as processes, pytest.raises(CommandFailed) as failed:
        processes.run("train", "--experiment=nonsense")
    assert failed.value.exit_code == 2
    assert str(failed.value).startswith("--experiment=nonsense: no such experiment")
    assert "error:" not in capfd.readouterr().err


@pytest.fixture
def instead(monkeypatch):
    """Lets `Processes.run` run some Python instead of a command."""
    popen = subprocess.Popen

    def replace(body):
        command = [sys.executable, "-c", f"import os, signal, sys\n{body}"]
        monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(command, **options))

    return replace


def test_a_command_that_is_killed_is_named_so(instead):
    instead("os.kill(os.getpid(), signal.SIGKILL)")
    with (
        Processes() as processes,
        pytest.raises(CommandFailed, match="killed by SIGKILL") as failed,
    ):
        processes.run("train")
    assert failed.value.exit_code == 1


@pytest.fixture
def no_nohup():
    """The tests themselves may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_goes_on_to_the_command_and_nothing_follows(instead, number, code):
    instead(f"""
def stop(*_):
    print("error: saved, run again", file=sys.stderr)
    sys.exit({code})

signal.signal({int(number)}, stop)
os.kill(os.getppid(), {int(number)})
signal.pause()
""")
    with Processes() as processes:
        for reason in ("saved, run again", "stopped by a signal"):  # the second time at once
            with pytest.raises(Preempted, match=reason) as stopped:
                processes.run("train")
            assert stopped.value.exit_code == code


@pytest.mark.parametrize(
    ("body", "code"), [("sys.exit(143)", 143), ("signal.raise_signal(2)", 130)]
)
def test_a_command_that_somebody_stops_stops_all(instead, body, code):
    instead(f"signal.signal(2, signal.SIG_DFL)\n{body}")
    with Processes() as processes, pytest.raises(Preempted) as stopped:
        processes.run("train")
    assert stopped.value.exit_code == code


def test_warnings_of_a_command_are_passed_on(instead, capfd):
    instead("print('warning: mind this', file=sys.stderr)\nprint('loss 1')")
    with Processes() as processes:
        processes.run("train")
        processes.run("train", quiet=True)
    shown = capfd.readouterr()
    assert shown.out == "loss 1\n"
    assert shown.err == "warning: mind this\n" * 2


def test_an_error_of_our_own_ends_the_command(instead, tmp_path, monkeypatch):
    """As when nobody reads what is passed on; the command gets to save first."""
    instead(f"""
def stop(*_):
    open({str(tmp_path / "saved")!r}, "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
print("warning: ready", file=sys.stderr, flush=True)
signal.pause()
""")
    monkeypatch.setattr(sys.stderr, "write", lambda text: (_ for _ in ()).throw(BrokenPipeError))
    with pytest.raises(BrokenPipeError), Processes() as processes:
        processes.run("train")
    assert (tmp_path / "saved").exists()


def test_the_handlers_of_signals_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Processes():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
