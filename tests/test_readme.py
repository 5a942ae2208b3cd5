"""What the READMEs show: commands run or parse, listings run, links, paths and figures are right."""

import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from cnn_jax import main
from cnn_jax.cli import commands
from cnn_jax.config import experiment
from cnn_jax.data.tfds_builder import quiet
from cnn_jax.studies import sweep
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.reproduce import plan
from tests.quick import unoptimised
from tests.tiny import REPOSITORY, make_examples

FOLDERS = (
    "",
    "experiments",
    "experiments/clusters",
    "cnn_jax",
    "cnn_jax/analysis",
    "cnn_jax/data",
    "cnn_jax/train",
    "cnn_jax/ops",
)
PAGES = {folder: (REPOSITORY / folder / "README.md").read_text() for folder in FOLDERS}
# Commands that take hours; of them everything is checked that is checked before the first step.
CHECKED = {
    "train": lambda values: experiment.load(values.experiment, values.set),
    "sweep": lambda values: sweep.settings(values.experiment, values.set),
    "reproduce": lambda values: plan.choose(plan.ROWS, values.only, values.seeds),
    "compile": lambda values: [experiment.load(name, values.set) for name in values.experiment],
    "benchmark": lambda values: [NETWORKS[name] for name in values.networks],
}
# What makes the others quick.
QUICK = {"class_map": ["--canvas=64", "--rounds=1"]}
TINY = "--set epochs=1 --set batch_size=10 --set devices=1"


class Shown(NamedTuple):
    """A command of a page, without "./launch.sh" where it begins so, and what it is said to print."""

    program: str
    arguments: list[str]
    output: str


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language; "" is the console's."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def shown(page: str) -> list[Shown]:
    """The commands in a page's console blocks, in order."""
    found = []
    for block in blocks(page, ""):
        for line in re.sub(r" \\\n\s*", " ", block).splitlines():
            start = re.match(r"\$ (?:\w+=\S+ )*|(?:\w+=\S+ )*(?=\./launch)", line)
            if start:
                program, *arguments = shlex.split(line[start.end() :], comments=True)
                found.append(Shown(program, arguments, ""))
            else:
                found[-1] = found[-1]._replace(output=f"{found[-1].output}{line}\n")
    return found


def mentioned(page: str) -> list[Shown]:
    """The commands in a page's sentences, some of them by name alone."""
    texts = re.findall(r"`(?:source <\()?(\./launch\.sh[^`)]*)\)?`", page)
    return [Shown(program, rest, "") for program, *rest in map(shlex.split, texts)]


def listings(page: str) -> list[tuple[str, str]]:
    """The Python listings of a page, with the file name that the first line of some has."""
    texts = blocks(page, "python")
    return [((re.match(r"# (\w+\.py): ", text) or ["", ""])[1], text) for text in texts]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a reader: listings saved under their names, and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for page in PAGES.values():
        for name, text in listings(page):
            if name:
                Path(name).write_text(text)
    random = np.random.default_rng(0)
    splits = ("train/rose", "train/daisy", "test/rose", "test/daisy")
    photos = [f"photos/{folder}/{i}.webp" for folder in splits for i in range(10)]
    for name in [*photos, "photos/1.jpg", "more_photos/1.png", "street.png"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(name)
    return tmp_path


# ---------------------------------------------------------------------------------- commands


def check(name: str, rest: list[str]) -> None:
    """Fails where `./launch.sh NAME REST` would be refused."""
    if name in ("setup", "test"):
        launcher = (REPOSITORY / "launch.sh").read_text()
        if rest[:1] == ["-m"]:
            assert f"    {rest[1]}: " in (REPOSITORY / "setup.cfg").read_text()
            rest = rest[2:]
        assert all(text in launcher for text in rest if text[0] == "-"), rest
        assert all((REPOSITORY / text).exists() for text in rest if text[0] != "-"), rest
    elif rest:
        values = commands.find(name).parse(rest)
        CHECKED.get(name, lambda _: None)(values)
    else:
        commands.find(name)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page, folder):
    for program, arguments, _ in [*shown(PAGES[page]), *mentioned(PAGES[page])]:
        if program == "./launch.sh" and arguments and "--help" not in arguments:
            check(arguments[0], arguments[1:])


def prepare(name: str, shape: tuple[int, int, int], data_dir: Path) -> None:
    """Writes noise as one of TFDS's own datasets, under its name, version and class names."""
    import tensorflow_datasets as tfds

    def generate(count: int) -> Iterator[tuple[int, dict]]:
        examples = make_examples(count, shape)
        for i in range(count):
            encoded = io.BytesIO()
            Image.fromarray(examples.image[i].squeeze()).save(encoded, "PNG")
            encoded.seek(0)
            features = {"image": encoded, "label": int(examples.label[i])}
            yield i, features | ({"id": f"{i}"} if name == "cifar10" else {})

    with quiet():
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder._split_generators = lambda _: {"train": generate(1200), "test": generate(100)}
        builder.download_and_prepare()


def run(line: str) -> None:
    assert main.main(shlex.split(line)) == 0, line


@pytest.fixture
def runs(folder, monkeypatch):
    """The folders of runs that the pages name, trained on noise for an epoch."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
    prepare("fashion_mnist", (28, 28, 1), folder / "tfds")
    prepare("cifar10", (32, 32, 3), folder / "tfds")
    with unoptimised(), quiet():
        runpy.run_path("flowers.py", run_name="__main__")
        for name in ("fashion_mnist/lenet", "fashion_mnist/mlp", "cifar10/lenet"):
            run(f"train --experiment={name} {TINY} --set data.validation_examples=100")
        shutil.copytree("runs/fashion_mnist/lenet", "runs/picture")
        yield


def test_commands_run_and_print_what_is_shown(runs, capsys):
    seen = []
    for page in PAGES.values():
        for program, arguments, output in shown(page):
            if program != "./launch.sh" or not arguments or arguments in seen:
                continue
            seen.append(arguments)
            name, *rest = arguments
            if name == "train" and {"--data_dir=data", "data.name=photos"} & {*rest}:
                rest += TINY.split()
            elif name in (*CHECKED, "setup", "test") or any("://" in each for each in rest):
                continue
            capsys.readouterr()
            assert main.main([name, *rest, *QUICK.get(name, [])]) == 0, arguments
            parts = [part for part in output.split("...\n") if part]
            printed = re.sub(r" +$", "", capsys.readouterr().out, flags=re.MULTILINE)
            assert all(part in printed for part in parts), (arguments, printed)
    assert Path("runs/fashion_mnist/lenet/export/classify.py").is_file()  # named without a command
    for page in PAGES.values():
        for name, text in listings(page):
            if not name:
                exec(compile(text, "README.md", "exec"), {"__name__": "readme"})


# ------------------------------------------------------------------- links, names and figures


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files(page):
    here = REPOSITORY / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page])
    for path, heading in links:
        target = here / (path or "README.md")  # a heading of the page itself
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs
    named = re.findall(r"`((?:cnn_jax|tests|experiments|\.ci)/[\w./]*)`", PAGES[page])
    assert all((REPOSITORY / path).exists() for path in named), named


def test_the_results_are_those_of_results_md():
    results = (REPOSITORY / "experiments" / "RESULTS.md").read_text()
    rows = re.findall(r"^\| (\w+/\w+) (\|.*)$", PAGES[""], re.MULTILINE)
    measured = {row.experiment: row for row in plan.ROWS}
    names = [name for name in measured if name != "quickstart" and not name.endswith("_tuned")]
    assert [name for name, _ in rows] == names

    def figures_of(name: str) -> list[str]:
        return re.search(rf"^\| {name} \|(.*)$", results, re.MULTILINE)[1].split(" | ")

    for name, row in rows:
        *_, parameters, lecture, keras, ours, better, _ = re.split(r" *\| *", row)
        expected = measured[name]
        assert {parameters, f"**{ours}**"} <= {text.strip() for text in figures_of(name)}
        for text, figure in ((lecture, expected.lecture_test), (keras, expected.keras_test)):
            assert text == ("-" if figure is None else f"{figure:.4f}")
        assert (better != "-") == (f"{name}_tuned" in measured)
        if better != "-":
            assert f"**{better}**" in figures_of(f"{name}_tuned")


def test_a_page_for_a_newcomer_is_short():
    assert len(PAGES[""].splitlines()) <= 160
    picture = REPOSITORY / re.search(r"!\[.*\]\((.*)\)", PAGES[""])[1]
    assert picture.stat().st_size < 300_000
    assert f"--screenshot={picture.relative_to(REPOSITORY)}" in PAGES[""]  # what made it


def test_every_folder_of_the_code_is_told_of():
    rows = re.findall(r"^\| \[(\w+)\]", PAGES["cnn_jax"], re.MULTILINE)
    folders = [path.parent.name for path in (REPOSITORY / "cnn_jax").glob("*/__init__.py")]
    assert sorted(rows) == sorted(folders)


def test_every_command_is_shown():
    texts = [command for page in PAGES.values() for command in [*shown(page), *mentioned(page)]]
    assert set(commands.COMMANDS) <= {text.arguments[0] for text in texts if text.arguments}
