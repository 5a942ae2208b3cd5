"""Each field of the configuration says all about itself where it is defined."""

import dataclasses

import pytest

from cnn_jax import main
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.types import described
from cnn_jax.config.validate import validate
from cnn_jax.models import MLP

FIELDS = {"": described(Config), "data.": described(DataConfig)}


@pytest.mark.parametrize("prefix", FIELDS)
def test_each_field_has_a_help_and_its_default_is_in_its_range(prefix):
    for field in FIELDS[prefix]:
        assert len(field.help) > 10, field
        if field.range and field.default not in (None, dataclasses.MISSING):
            assert field.range.holds(field.default), field


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (field.name, {int: -1, float: -1.0}[kind], field.allowed)
        for field in FIELDS[""]
        for kind in (int, float)
        if field.range and kind.__name__ in str(field.hint) and "tuple" not in str(field.hint)
    ],
)
def test_a_number_out_of_its_range_is_refused_with_what_is_allowed(name, value, allowed):
    config = Config(MLP(), DataConfig("x"))
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(config, **{name: value}))
    assert str(caught.value) == f"{name}={value}: must be {allowed}"


def test_the_command_prints_every_field(capsys):
    assert main.main(["fields"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    for prefix, fields in FIELDS.items():
        for field in fields:
            assert f"\n{prefix}{field.name} " in printed


def test_the_types_of_fields():
    found = {f"{prefix}{f.name}": f.type_name for prefix, part in FIELDS.items() for f in part}
    expected = {
        "seed": "int",
        "clip_norm": "float",
        "schedule": "str",
        "optimizer": "function",
        "model": "Module",
        "data.mean": "floats or str",
        "data.image_size": "ints",
        "data.flip": "bool",
    }
    assert {name: found[name] for name in expected} == expected
