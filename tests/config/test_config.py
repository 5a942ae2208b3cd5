import dataclasses
import functools
import json
import math
from collections.abc import Sequence

import flax.linen as nn
import numpy as np
import optax
import pytest

from cnn_jax import models
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.overrides import override
from cnn_jax.config.serialize import data_from_json, differences, model_from_json, to_json
from cnn_jax.config.validate import check_init_examples, validate

BASE = Config(model=models.LeNet(), data=DataConfig("tiny"))


class Widths(nn.Module):
    """A module of a user's own, with the kinds of fields that the project's have not."""

    widths: tuple[int, ...] = (8, 16)
    depths: Sequence[int] = (1, 2)
    rate: int | float | None = 0.5
    act: object = nn.relu

    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dense(10)(image.reshape(len(image), -1))


# ---------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("epochs=3", 3),
        ("batch_size= 128 ", 128),
        ("learning_rate=3e-4", 3e-4),
        ("learning_rate=1", 1.0),
        ("schedule=cosine", "cosine"),
        ("compute_dtype=bfloat16", "bfloat16"),
        ("clip_norm=0.5", 0.5),
        ("clip_norm=none", None),
        ("clip_norm=None", None),
        ("devices=2", 2),
        ("checkpoint_every_minutes=2.5", 2.5),
        ("data.name=mnist:3.0.1", "mnist:3.0.1"),
        ("data.train_split=train[:50%]", "train[:50%]"),
        ("data.flip=true", True),
        ("data.flip=False", False),
        ("data.image_size=64,48", (64, 48)),
        ("data.image_size=(64, 48)", (64, 48)),
        ("data.image_size=none", None),
        ("data.mean=0.5", (0.5,)),
        ("data.mean=0.1,-0.2,3", (0.1, -0.2, 3.0)),
        ("model.num_classes=20", 20),
    ],
)
def test_an_override_is_typed_by_its_field(assignment, expected):
    changed = override(BASE, [assignment])
    path = assignment.partition("=")[0]
    value = functools.reduce(getattr, path.split("."), changed)
    assert value == expected
    assert type(value) is type(expected)
    # ... and nothing else changed
    left = differences(to_json(BASE), to_json(changed))
    assert len(left) <= 1
    assert all(line.startswith(f"{path}: ") for line in left)


def test_overrides_are_applied_in_order_and_leave_the_original_alone():
    changed = override(BASE, ["epochs=3", "data.flip=true", "epochs=4", "model.num_classes=7"])
    assert (changed.epochs, changed.data.flip, changed.model.num_classes) == (4, True, 7)
    assert (BASE.epochs, BASE.data.flip, BASE.model.num_classes) == (10, False, 10)
    assert override(BASE, []) is BASE


def test_a_partials_keywords_are_fields():
    factory = functools.partial(optax.sgd, momentum=0.9, nesterov=False)
    config = dataclasses.replace(BASE, optimizer=factory)
    changed = override(config, ["optimizer.momentum=0.5", "optimizer.nesterov=true"]).optimizer
    assert changed.func is optax.sgd
    assert changed.keywords == {"momentum": 0.5, "nesterov": True}
    assert factory.keywords == {"momentum": 0.9, "nesterov": False}
    with pytest.raises(ConfigError, match=r"optimizer has no field 'momentun'; nearest: momentum"):
        override(config, ["optimizer.momentun=1"])
    with pytest.raises(ConfigError, match=r"'fast' is not a number"):
        override(config, ["optimizer.momentum=fast"])


def test_fields_of_a_users_own_module():
    config = dataclasses.replace(BASE, model=Widths())
    changed = override(config, ["model.widths=4,8,16", "model.depths=3", "model.rate=0.25"]).model
    assert (changed.widths, changed.depths, changed.rate) == ((4, 8, 16), (3,), 0.25)
    assert override(config, ["model.rate=2"]).model.rate == 2
    assert override(config, ["model.rate=none"]).model.rate is None
    for assignment in ("model.rate=x", "model.widths=a", "model.act=tanh", "model.name=a"):
        with pytest.raises(ConfigError) as caught:
            override(config, [assignment])
        assert str(caught.value).startswith(f"--set {assignment}: ")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("batchsize=3", "the configuration has no field 'batchsize'; nearest: batch_size"),
        ("learning-rate=3", "no field 'learning-rate'; nearest: learning_rate"),
        ("data.flipp=true", "data has no field 'flipp'; nearest: flip"),
        ("model.classes=3", "model has no field 'classes'; nearest: num_classes"),
        ("model.parent=3", "model has no field 'parent'"),
        ("data.name.x=3", "name = tiny has no fields"),
        ("epochs.x=3", "epochs = 10 has no fields"),
        ("optimizer.momentum=0.9", "optimizer = optax.adam has no fields"),
        ("xyzzy=3", "there are: accumulate_steps, batch_size, "),
        ("=3", "no field ''"),
        ("data.=3", "data has no field ''"),
        (".=3", "no field ''"),
        ("epochs=ten", "'ten' is not a whole number"),
        ("epochs=1.5", "'1.5' is not a whole number"),
        ("epochs=1e3", "'1e3' is not a whole number"),
        ("epochs=", "'' is not a whole number"),
        ("epochs=none", "'none' is not a whole number"),
        ("devices=two", "'two' is not a whole number"),
        ("learning_rate=fast", "'fast' is not a number"),
        ("learning_rate=1,5", "'1,5' is not a number"),
        ("clip_norm=x", "'x' is not a number"),
        ("data.flip=yes", "'yes' is not true or false"),
        ("data.flip=1", "'1' is not true or false"),
        ("schedule=cosin", "'cosin' is not one of constant, cosine, linear"),
        ("schedule=Cosine", "'Cosine' is not one of"),
        ("compute_dtype=float16", "'float16' is not one of float32, bfloat16"),
        ("data.image_size=64", "'64' is not a list of 2 values"),
        ("data.image_size=64,64,3", "'64,64,3' is not a list of 2 values"),
        ("data.image_size=64,x", "'x' is not a whole number"),
        ("data.image_size=64.0,64", "'64.0' is not a whole number"),
        ("data.mean=", "'' is not a number"),
        ("data.mean=0.1,,0.2", "'' is not a number"),
        ("data.std=__import__('os')", "is not a number"),
        (
            "model=LeNet",
            "change it in an experiment file, or set one of its fields: n",
        ),
        ("data=mnist", "set one of its fields: name, train_split, "),
        ("optimizer=optax.sgd", "--set cannot change this field"),
    ],
)
def test_what_set_refuses(assignment, said):
    with pytest.raises(ConfigError) as caught:
        override(BASE, [assignment])
    assert str(caught.value).startswith(f"--set {assignment}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("assignment", ["epochs", "", "--epochs"])
def test_set_without_a_value(assignment):
    with pytest.raises(ConfigError, match=r"^--set .*: write field=value, as in --set batch_size"):
        override(BASE, [assignment])


# ------------------------------------------------------------------------------------ ranges

RANGES = [  # field, values that are allowed, values that are not
    ("seed", [0, 2**31 - 1], [-1, 2**31]),
    ("epochs", [1, 2**31 - 1], [0, -1, 2**31]),
    ("batch_size", [1], [0, -32]),
    ("eval_batch_size", [1], [0]),
    ("learning_rate", [1e-9, 100.0], [0.0, -1e-3, math.inf, math.nan]),
    ("warmup_epochs", [0.0, 0.5, 10.0], [-0.1, 10.5, math.inf, math.nan]),
    ("final_learning_rate", [0.0], [-1.0, math.inf, math.nan]),
    ("milestones", [()], [(0.0,), (2.0, 1.0), (1.0, math.inf)]),
    ("step_factor", [0.5], [0.0, math.inf]),
    ("freeze", [(), ("Conv_*", "Dense_0/bias")], [("",)]),
    (
        "learning_rate_of",
        [(), ("Conv_*=0.1", "a=b=2")],
        [("Conv_*",), ("=1",), ("a=x",), ("a=0",), ("a=nan",), ("a=1", "a=2")],
    ),
    ("ema_decay", [0.0, 0.999], [1.0, -0.1]),
    ("accumulate_steps", [1, 2], [0]),
    ("steps_per_call", [1, 8, "auto"], [0, -1]),
    ("early_stopping_epochs", [None, 1], [0]),
    ("weight_decay", [0.0, 1.0], [-1e-4, math.inf, math.nan]),
    ("clip_norm", [None, 0.1], [0.0, -1.0, math.inf, math.nan]),
    ("label_smoothing", [0.0, 0.99], [1.0, -0.1, math.nan]),
    ("devices", [None, 1], [0, -1]),
    ("eval_every_epochs", [1], [0]),
    ("checkpoint_every_epochs", [1], [0]),
    ("checkpoint_every_steps", [None, 1], [0, -5]),
    ("checkpoint_every_minutes", [None, 0.1], [0.0, -1.0, math.inf, math.nan]),
    ("keep_checkpoints", [1], [0]),
    ("log_every_steps", [1], [0]),
    ("grace_seconds", [0.1], [0.0, -1.0, math.inf, math.nan]),
    ("heartbeat_seconds", [1], [0]),
    ("data.name", ["x"], [""]),
    ("data.train_split", ["train[:10%]"], [""]),
    ("data.test_split", ["validation"], [""]),
    ("data.validation_examples", [0, 5], [-1]),
    ("data.skip_corrupt", [0, 5, "all"], [-1]),
    ("data.workers", [None, 0, 5], [-1]),
    ("data.crop_padding", [0, 4], [-1]),
    ("data.rotation", [0.0, 180.0], [-1.0, 180.5, math.nan]),
    ("data.colour_jitter", [0.0, 1.0], [-0.1, 1.1, math.nan]),
    ("data.erasing", [0.0, 1.0], [-0.1, 1.1, math.nan]),
    ("data.mixup", [0.0, 2.0], [-0.1, math.inf, math.nan]),
    ("data.cutmix", [0.0, 2.0], [-0.1, math.inf, math.nan]),
    (
        "class_weights",
        [None, "balanced", (0.0, 2.5)],
        [(), (0.0, 0.0), (1.0, -1.0), (1.0, math.inf), (1.0, math.nan)],
    ),
    ("init_examples", [0, 1, 5000], [-1]),
    ("data.image_size", [None, (1, 1)], [(0, 8), (8, 0), (-1, 8)]),
    ("data.test_fraction", [None, 0.01, 0.99], [0.0, 1.0, -0.1, math.nan]),
    (
        "data.mean",
        [(0.0,), (1.0, 0.5, 0.0), "auto"],
        [(), (math.nan,), (0.0, math.inf), (72.9,), (-0.1,)],
    ),
    (
        "data.std",
        [(1.0,), (0.1, 0.5)],
        [(), (0.0,), (1.0, -1.0), (math.inf,), (math.nan,), (58.0,)],
    ),
    ("model.num_classes", [1, 1000], [0, -1]),
]


def with_field(config, path, value):
    first, _, rest = path.partition(".")
    inner = with_field(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


def flat(cases):
    return [(field, value) for field, values in cases for value in values]


@pytest.mark.parametrize(("field", "value"), flat((f, good) for f, good, _ in RANGES))
def test_a_value_in_range(field, value):
    config = with_field(BASE, field, value)
    assert validate(config) is config


@pytest.mark.parametrize(("field", "value"), flat((f, bad) for f, _, bad in RANGES))
def test_a_value_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}=.*: must be \S") as caught:
        validate(with_field(BASE, field, value))
    assert str(to_json(value)) in str(caught.value)


NO_EFFECT = [  # fields, how the first may stand beside the others, and how not
    ({"schedule": "cosine"}, {"schedule": "constant"}, "schedule=constant"),
    ({"schedule": "linear"}, {}, "schedule=constant"),
    (
        {"schedule": "linear", "warmup_epochs": 9.5},
        {"schedule": "linear", "warmup_epochs": 10.0},
        "warmup_epochs=10 of epochs=10",
    ),
]


@pytest.mark.parametrize(("good", "bad", "named"), NO_EFFECT)
def test_a_final_rate_that_no_schedule_comes_to(good, bad, named):
    base = dataclasses.replace(BASE, epochs=10, final_learning_rate=0.1)
    validate(dataclasses.replace(base, **good))
    with pytest.raises(ConfigError, match=rf"^final_learning_rate=0.1: must be 0 with {named}"):
        validate(dataclasses.replace(base, **bad))


def test_a_run_that_was_trained_with_pixels_in_the_mean_can_be_read():
    data = DataConfig("tiny", mean=(72.9,), std=(58.0,))
    validate(dataclasses.replace(BASE, data=data), trained=True)


@pytest.mark.parametrize("model", [models.LeNet(), models.CifarCNN()])
def test_examples_for_an_initialisation_that_does_not_look_at_them(model):
    config = dataclasses.replace(BASE, model=model, init_examples=5)
    with pytest.raises(ConfigError, match=r"^init_examples=5: must be 0, as .* model="):
        check_init_examples(config, (32, 32, 3))
    check_init_examples(dataclasses.replace(config, model=models.SpeedrunCNN()), (32, 32, 3))


def test_numbers_that_json_does_not_have():
    optimizer = functools.partial(optax.adam, eps=math.inf)
    found = to_json(dataclasses.replace(BASE, optimizer=optimizer))
    assert found["optimizer"]["eps"] == "inf"
    json.dumps(found, allow_nan=False)


def test_two_kinds_of_flips_at_once():
    both = dataclasses.replace(BASE, data=DataConfig("tiny", flip=True, alternating_flip=True))
    with pytest.raises(ConfigError, match=r"^data\.alternating_flip=True: must be False"):
        validate(both)


def test_every_field_has_a_range_or_a_type_of_few_values():
    named = {field for field, _, _ in RANGES}
    free = {"model", "data", "optimizer", "schedule", "compute_dtype", "data.flip"}
    free |= {"resident_data", "deterministic", "matmul_precision"}
    free |= {"data.alternating_flip", "data.test_time_augmentation"}
    free |= {"data.trivial_augment", "data.balanced", "data.streaming"}
    fields = {f.name for f in dataclasses.fields(Config)}
    fields |= {f"data.{f.name}" for f in dataclasses.fields(DataConfig)}
    assert fields - free == named - {"model.num_classes"}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", "10", "int"),
        ("epochs", True, "int"),
        ("epochs", 1.0, "int"),
        ("epochs", None, "int"),
        ("learning_rate", "1e-3", "float"),
        ("learning_rate", None, "float"),
        ("learning_rate", False, "float"),
        ("devices", 2.0, "int or None"),
        ("clip_norm", "1", "float or None"),
        ("schedule", "exponential", "one of constant, cosine, linear, step"),
        ("compute_dtype", "float64", "one of float32, bfloat16"),
        ("data.name", 3, "str"),
        ("data.flip", 1, "bool"),
        ("data.mean", 0.5, "tuple"),
        ("data.mean", [0.5], "tuple"),
        ("data.mean", ("a",), "tuple"),
        ("data.std", 2.0, "tuple"),
        ("data.image_size", 28, "tuple[int, int] or None"),
        ("data.image_size", (28, 28, 1), "tuple[int, int] or None"),
        ("data.image_size", (28.0, 28), "tuple[int, int] or None"),
        ("model", models.LeNet, "an object of Module"),
        ("model", None, "an object of Module"),
        ("model.num_classes", "10", "int"),
        ("data", "mnist", "an object of DataConfig"),
    ],
)
def test_a_value_of_another_type(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        validate(with_field(BASE, field, value))
    assert str(caught.value).startswith(f"{field}={value!r}: must be {allowed}")


def test_whole_numbers_and_numpys_floats_are_numbers():
    validate(dataclasses.replace(BASE, learning_rate=1, weight_decay=np.float64(0.5)))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (3, "an Optax factory such as optax.adam"),
        ("adam", "an Optax factory such as optax.adam"),
        (optax.adam(1e-3), "an Optax factory such as optax.adam"),
        (len, "callable as optimizer(learning_rate="),
        (lambda: optax.adam(1e-3), "callable as optimizer(learning_rate="),
        (optax.masked, "callable as optimizer(learning_rate="),
        (functools.partial(optax.sgd, momentun=0.9), "callable as optimizer(learning_rate="),
        (functools.partial(optax.sgd, 0.1), "callable as optimizer(learning_rate="),
        (functools.partial(optax.sgd, learning_rate=0.1), "without learning_rate"),
        (functools.partial(optax.adamw, weight_decay=0.1), "without weight_decay"),
    ],
)
def test_what_is_no_optimizer(factory, said):
    with pytest.raises(ConfigError, match=r"^optimizer=.*: must be ") as caught:
        validate(dataclasses.replace(BASE, optimizer=factory))
    assert said in str(caught.value)


# --------------------------------------------------------------------------------- JSON form


@pytest.mark.parametrize("name", models.__all__)
def test_a_model_survives_its_json_form(name):
    if name == "Convolutional":
        model = models.Convolutional(models.LeNet(num_classes=7), (5, 4))
    else:
        model = getattr(models, name)(num_classes=7)
    saved = json.loads(json.dumps(to_json(model)))
    assert saved["class"] == name
    assert model_from_json(saved) == model


def test_data_survives_its_json_form():
    data = DataConfig(
        "mnist",
        "train[:1%]",
        "train[1%:]",
        5,
        test_fraction=0.3,
        skip_corrupt="all",
        streaming=True,
        workers=3,
        balanced=True,
        image_size=(8, 9),
        mean=(0.5, 0.25),
        std=(2.0, 3.0),
        flip=True,
        alternating_flip=True,
        crop_padding=2,
        rotation=5.0,
        erasing=0.1,
        colour_jitter=0.2,
        trivial_augment=True,
        mixup=0.3,
        cutmix=0.4,
        test_time_augmentation="mirror",
    )
    assert all(
        getattr(data, f.name) != f.default for f in dataclasses.fields(data)
    )  # or the test would miss a field
    assert data_from_json(json.loads(json.dumps(to_json(data)))) == data


def test_the_json_form_names_modules_and_functions():
    factory = functools.partial(optax.sgd, momentum=0.9)
    saved = to_json(dataclasses.replace(BASE, optimizer=factory))
    assert saved["model"] == {"class": "LeNet", "num_classes": 10}
    assert saved["optimizer"] == {"function": "optax.sgd", "momentum": 0.9}
    assert to_json(BASE)["optimizer"] == "optax.adam"
    assert saved["data"]["std"] == [1.0]
    assert saved["clip_norm"] is None
    assert json.loads(json.dumps(saved)) == saved


def test_a_module_of_ones_own_gets_the_fields_it_was_trained_with():
    trained = Widths(widths=(4,), depths=(3, 4, 5), rate=None)
    saved = json.loads(json.dumps(to_json(trained)))
    assert model_from_json(saved, Widths()) == trained
    inside = json.loads(json.dumps(to_json(models.Convolutional(trained, (5, 5)))))
    assert model_from_json(inside, Widths()) == models.Convolutional(trained, (5, 5))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (models.LeNet(), "--experiment: its model is LeNet, must be Widths as in the run"),
        (Widths(act=nn.gelu), r"model.act=jax.gelu in the file of --experiment: must be jax.relu"),
    ],
)
def test_a_module_that_is_not_the_trained_one_is_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        model_from_json(to_json(Widths()), own)


@pytest.mark.parametrize(
    "saved", [{"class": "Widths"}, {"class": "os.system"}, {}, {"class": None}]
)
def test_another_class_than_the_projects_is_refused(saved):
    with pytest.raises(ConfigError, match=r"^model.class: .* --experiment$"):
        model_from_json(saved)


@pytest.mark.parametrize(
    "saved",
    [
        {"class": "LeNet", "depth": 3},
        {"class": "LeNet", "num_classes": "10"},
        {"class": "LeNet", "num_classes": [10]},
        {"class": "Convolutional", "model": {"class": "LeNet"}, "window": [5]},
        {"class": "Convolutional", "model": {"class": "Widths"}, "window": [5, 5]},
        {"class": "Convolutional", "model": 3, "window": [5, 5]},
    ],
)
def test_a_damaged_model_is_refused(saved):
    with pytest.raises(ConfigError, match=r"^model"):
        model_from_json(saved)


@pytest.mark.parametrize(
    "saved", [{}, {"name": "x", "nam": 1}, {"name": 3}, {"name": "x", "mean": 3}]
)
def test_damaged_data_is_refused(saved):
    with pytest.raises(ConfigError, match=r"^data"):
        data_from_json(saved)


def test_differences():
    other = override(BASE, ["epochs=3", "data.mean=0.5", "model.num_classes=7"])
    other = dataclasses.replace(other, optimizer=functools.partial(optax.sgd, momentum=0.9))
    assert differences(to_json(BASE), to_json(other)) == [
        "data.mean: [0.0] -> [0.5]",
        "epochs: 10 -> 3",
        "model.num_classes: 10 -> 7",
        "optimizer: optax.adam -> {'function': 'optax.sgd', 'momentum': 0.9}",
    ]
    assert differences(to_json(BASE), to_json(BASE)) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"accumulate_steps": 3}, "batch_size=32: must be divisible by accumulate_steps=3"),
        ({"schedule": "step"}, "milestones=[]: must be given with schedule=step, else empty"),
        ({"milestones": (1.0,)}, "milestones=[1.0]: must be given with schedule=step, else empty"),
        (
            {"schedule": "step", "milestones": (1.0, 10.0)},
            "milestones=[1.0, 10.0]: must be after warmup_epochs=0 and before the end, epochs=10",
        ),
        (
            {"schedule": "step", "milestones": (2.0, 1.0)},
            "milestones=[2.0, 1.0]: must be epochs greater than 0, in ascending order",
        ),
        (
            {"schedule": "one_cycle", "warmup_epochs": 10.0},
            "warmup_epochs=10.0: must be less than epochs=10 with one_cycle",
        ),
    ],
)
def test_fields_that_do_not_fit_together(fields, said):
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(BASE, epochs=10, **fields))
    assert str(caught.value) == said


def test_an_empty_text_is_an_empty_list():
    config = dataclasses.replace(BASE, freeze=("Conv_0",))
    assert override(config, ["freeze="]).freeze == ()
    assert override(config, ["learning_rate_of=a=1,b=2"]).learning_rate_of == ("a=1", "b=2")
