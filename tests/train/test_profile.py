"""The trace of some training steps."""

import re

import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import loop, profile, run
from tests.networks import Linear
from tests.quick import unoptimised


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.mark.parametrize(("steps", "traced"), [("1:3", 2), ("4:100", 1), ("5:6", None)])
def test_the_steps_are_traced(tmp_path, splits, capsys, steps, traced):
    """A run of 5 steps; its numbers are those of a run without a trace."""
    config = Config(Linear(), DataConfig("tiny"), epochs=1, eval_batch_size=48, devices=1)
    (line,) = loop.train(config, tmp_path / "run", splits=splits, profile=steps)
    printed = "".join(capsys.readouterr())
    if traced is None:
        assert "profile of" not in printed
        assert f"--profile={steps}: no trace, as the run did none of these steps" in printed
        return
    assert f"profile of {traced} step" in printed
    (file,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    spent = profile.operations(file)
    table = re.findall(r"^ +([\d.]+) +[\d.]+%  (\w\S* of jit_\w+)$", printed, re.MULTILINE)
    assert 1 <= len(table) <= 10
    for milliseconds, name in table:
        assert float(milliseconds) == pytest.approx(spent[name] / 1e6 / traced, abs=1e-3)
    values = [float(milliseconds) for milliseconds, _ in table]
    assert values == sorted(values, reverse=True)
    (alone,) = loop.train(config, tmp_path / "alone", splits=splits)
    assert alone["train_loss"] == line["train_loss"]


def test_a_run_that_stops_early_keeps_its_trace(tmp_path, splits, capsys, monkeypatch):
    config = Config(Linear(), DataConfig("tiny"), epochs=9, eval_batch_size=48, devices=1)
    monkeypatch.setattr(run.early_stopping, "is_over", lambda config, folder, progress, n: n == 1)
    loop.train(config, tmp_path / "run", splits=splits, profile="2:100")
    assert "profile of 3 steps in " in (printed := capsys.readouterr().out)
    assert "no trace" not in printed
    assert len([*(tmp_path / "run" / "profile").rglob("*.xplane.pb")]) == 1


@pytest.mark.parametrize("steps", ["3", "3:", "3:3", "5:2", "-1:4", "a:b", ""])
def test_other_texts_are_refused(tmp_path, steps):
    with pytest.raises(ConfigError, match=rf"^--profile={steps}: must be START:STOP, two steps"):
        profile.Profile(steps, tmp_path)
