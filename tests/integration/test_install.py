"""What setup.cfg says is what is installed: modules, experiments, requirements, the command."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import REPOSITORY

# Where an import and its package have different names.
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "wandb",  # it requires protobuf
    "mlflow": "mlflow-skinny",
    "orbax": "orbax-checkpoint",
}
# The benchmark installs them into an environment of their own.
PEERS = {"torch", "keras", "networks", "worker"}


@pytest.fixture(scope="module")
def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel alone was installed into, made from a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "records")
    for name in ("cnn_jax", "experiments"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=unwanted)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return folder / "site"


def run(command: list, installed: Path, folder: Path) -> str:
    """What a command prints outside the repository, with the installed package alone."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path, *suffixes: str) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.suffix in suffixes)
    return {str(path.relative_to(folder)) for path in paths}


def test_every_module_template_and_experiment_is_installed(installed):
    kinds = (".py", ".j2", ".html", ".css")
    assert files(installed / "cnn_jax", *kinds) == files(REPOSITORY / "cnn_jax", *kinds)
    assert files(installed / "cnn_jax_experiments", ".py") == files(
        REPOSITORY / "experiments", ".py"
    )


@pytest.mark.parametrize("way", [["cnn_jax"], ["-m", "cnn_jax"], ["-m", "cnn_jax.main"]])
def test_the_installed_program_runs_without_the_checkout(installed, tmp_path, way):
    path = installed / "bin" / way[0]
    start = [sys.executable, "-P", *way] if way[0] == "-m" else [sys.executable, "-P", path]
    assert "fashion_mnist/lenet " in run([*start, "list"], installed, tmp_path)
    where = "import cnn_jax; print(cnn_jax.__file__)"
    assert str(installed) in run([sys.executable, "-P", "-c", where], installed, tmp_path)


def test_the_installed_program_trains_in_an_empty_folder(installed, tfds_dir, tmp_path):
    start = [sys.executable, "-P", installed / "bin/cnn_jax", "train"]
    settings = ["--set", "data.name=tiny_squares", "--set", "epochs=1", "--data_dir", tfds_dir]
    printed = run([*start, "--experiment=fashion_mnist/mlp", *settings], installed, tmp_path)
    assert "test accuracy" in printed
    assert (tmp_path / "runs/fashion_mnist/mlp/metrics.jsonl").is_file()


def requirements(settings: configparser.ConfigParser) -> list[Requirement]:
    """All that launch.sh installs but what a GPU or TPU needs."""
    extras = settings["options.extras_require"]
    text = "\n".join((settings["options"]["install_requires"], extras["prepare"], extras["test"]))
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    return [Requirement(line) for line in lines]


def test_every_imported_package_is_required(settings):
    imported = set()
    for path in (REPOSITORY / "cnn_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    # jax2onnx asks for another Orbax, so no extra can hold it; launch.sh adds it with the extra onnx.
    imported -= {"cnn_jax", "jax2onnx", *PEERS, *sys.stdlib_module_names}
    required = {canonicalize_name(requirement.name) for requirement in requirements(settings)}
    for extra in ("gcs", "mlflow", "onnx", "slurm", "wandb"):
        lines = settings["options.extras_require"][extra].split()
        required |= {Requirement(line).name for line in lines}
    assert {canonicalize_name(PACKAGES.get(name, name)) for name in imported} <= required


@pytest.mark.parametrize(("python", "jax"), [("3.11", "0.10.1"), ("3.13", "0.12.0.1")])
def test_pinned_versions_are_allowed_and_complete(settings, python, jax):
    pins = {}
    for line in (REPOSITORY / ".ci/constraints.txt").read_text().splitlines():
        pin = Requirement(line) if not line.startswith("#") else None
        if pin and (pin.marker is None or pin.marker.evaluate({"python_version": python})):
            (version,) = pin.specifier
            assert version.operator == "=="
            assert pins.setdefault(canonicalize_name(pin.name), version.version) == version.version
    assert pins["jax"] == pins["jaxlib"] == jax
    for requirement in requirements(settings):
        if requirement.name not in ("pip", "setuptools"):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
