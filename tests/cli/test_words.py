"""What may stand alone on the command line, and what completes it."""

import re
import shutil
import subprocess

import pytest

from cnn_jax.cli import commands, completion
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import experiment


def parsed(line: str):
    name, *arguments = line.split()
    return commands.find(name).parse(arguments)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train quickstart", {"experiment": "quickstart", "workdir": None}),
        ("train quickstart --dry_run", {"experiment": "quickstart", "dry_run": True}),
        (
            "train --dry_run quickstart --set=epochs=1",
            {"experiment": "quickstart", "dry_run": True},
        ),
        ("train --experiment=quickstart", {"experiment": "quickstart"}),
        ("evaluate runs/x", {"workdir": ["runs/x"], "split": ["test"], "dataset": []}),
        ("evaluate runs/x --split validation", {"workdir": ["runs/x"], "split": ["validation"]}),
        (
            "evaluate runs/x runs/y --split=a --split=b --dataset=d",
            {"workdir": ["runs/x", "runs/y"], "split": ["a", "b"], "dataset": ["d"]},
        ),
        ("predict runs/x a.png b *.jpg", {"workdir": "runs/x", "images": ["a.png", "b", "*.jpg"]}),
        ("predict a.png --workdir=runs/x", {"workdir": "runs/x", "images": ["a.png"]}),
        ("predict runs/x a.png --images=b", {"workdir": "runs/x", "images": ["b", "a.png"]}),
        ("report runs/a runs/b", {"workdir": ["runs/a", "runs/b"]}),
        ("report --workdir=runs/a runs/b", {"workdir": ["runs/a", "runs/b"]}),
        ("summary fashion_mnist/lenet", {"experiment": "fashion_mnist/lenet"}),
        ("data photos --set data.flip=true", {"dataset": "photos", "set": ["data.flip=true"]}),
        ("verify runs/x", {"workdir": "runs/x"}),
        ("export runs/x", {"workdir": "runs/x"}),
        ("convert runs/x --output=y", {"workdir": "runs/x", "output": "y"}),
        ("class_map runs/x", {"workdir": "runs/x"}),
        ("sweep quickstart --seeds 2", {"experiment": "quickstart", "seeds": 2}),
        ("explain conv --size=3", {"topic": "conv", "size": 3}),
        ("completion zsh", {"shell": "zsh"}),
    ],
)
def test_words_stand_for_flags(line, expected):
    values = parsed(line)
    assert {name: values[name].value for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "train quickstart more",
            "more: train cannot use this word; it takes EXPERIMENT and flags",
        ),
        ("list quickstart", "quickstart: list cannot use this word; it takes no word and flags"),
        ("train", "--experiment: train needs it"),
        ("predict runs/x", "--images: predict needs it"),
        (
            "train quickstart --experiment=x",
            "quickstart: train cannot use this word; it takes EXPERIMENT and flags, which are "
            "written --name=value; "
            "--experiment=x is given",
        ),
        ("sweep quickstart --seeds=0", "--seeds=0: must be at least 1"),
        ("reproduce --seeds=0", "--seeds=0: must be at least 1"),
        ("train quickstart --processes=0", "--processes=0: must be at least 1"),
        ("explain conv --size=x", "--size=x: must be a whole number"),
        ("benchmark --seconds=x", "--seconds=x: must be a number"),
        ("tarin quickstart", "tarin: no such command; nearest: train"),
        ("train quickstart --wrokdir=x", "--wrokdir: train has no such flag; nearest: --workdir"),
        (
            "train quickstart --epoch=3",
            "--epoch: train has no such flag; nearest: --set epochs=VALUE",
        ),
        ("train quickstart --workdir=a --workdir=b", "--workdir=b: is given twice; leave one"),
        ("train quickstart --dry_run --nodry_run", "--dry_run=false: is given twice; leave one"),
        ("predict x y --top_k=1 --top_k=1", "--top_k=1: is given twice; leave one"),
        ("train quickstart --epochs=3", "--epochs: is a field of the configuration; write --set"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(line, says):
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}"):
        parsed(line)


def test_help_names_the_words():
    usage = commands.find("predict").usage()
    assert "predict WORKDIR IMAGES ...: " in usage
    assert "train EXPERIMENT: " in commands.find("train").usage()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cnn_jax tra", {"train"}),
        ("cnn_jax e", {"evaluate", "explain", "export"}),
        ("cnn_jax train fashion_mnist/le", {"fashion_mnist/lenet"}),
        ("./launch.sh train --dr", {"--dry_run"}),
        ("./launch.sh train --work", {"--workdir="}),
        ("cnn_jax report pyproj", {"pyproject.toml"}),
        ("cnn_jax explain p", {"pool", "padding", "parameters", "pyproject.toml"}),
        ("cnn_jax completion z", {"zsh"}),
    ],
)
def test_a_shell_completes_commands_flags_experiments_and_files(tmp_path, shell, line, expected):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} on PATH")
    text = completion.script(shell, "cnn_jax", commands.COMMANDS, experiment.names())
    (tmp_path / "pyproject.toml").touch()
    position = len(line.split()) - 1
    ask = {
        "bash": f"COMP_WORDS=({line}); COMP_CWORD={position}; _cnn_jax; echo ${{COMPREPLY[*]}}",
        # Its own `compadd` works in the line editor alone.
        "zsh": f"words=({line}); CURRENT={position + 1}; PREFIX=$words[CURRENT]; _cnn_jax",
    }
    stand_in = {
        "bash": "",
        "zsh": """
            compdef() { :; }
            compadd() { while [[ $1 != -- ]] shift; shift; print -l -- ${(M)@:#$PREFIX*} }
            _files() { compadd -- *(N) }
        """,
    }
    done = subprocess.run(
        [shell, "-c", "\n".join((stand_in[shell], text, ask[shell]))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == expected


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match=r"^fish: must be bash or zsh"):
        completion.script("fish", "cnn_jax", commands.COMMANDS, [])
