"""The benchmark compares the same networks, counts FLOPs rightly, and keeps other people's tables."""

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from cnn_jax import main, models
from cnn_jax.common import cpu
from cnn_jax.ops.rule import formulations_for
from cnn_jax.studies.benchmark import contenders, figures, formulations, run, table
from cnn_jax.studies.benchmark.figures import Measured
from cnn_jax.studies.benchmark.networks import NETWORKS


def parameters_of(layers, shape):
    """Counts a peer network's parameters with nothing but its description."""
    height, channels, total = shape[0], shape[2], 0
    for kind, *options in layers:
        if kind == "conv":
            features, kernel, stride, padding = options
            total += (kernel * kernel * channels + 1) * features
            height = -(-height // stride) if padding == "same" else (height - kernel) // stride + 1
            channels = features
        elif kind == "pool":
            height //= options[0]
        elif kind == "flatten":
            channels *= height * height
        elif kind == "dense":
            total += (channels + 1) * options[0]
            channels = options[0]
    return total


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "speedrun"])
def test_the_peers_build_the_network_that_we_build(name):
    network = NETWORKS[name]
    model = vars(models)[network.model]()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *network.image_shape)))
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert parameters_of(network.layers, network.image_shape) == ours


def test_training_flops_by_hand():
    # 28x28: conv 6 5x5 same, conv 16 5x5 valid on 14x14, dense 400-120-84-10; two FLOPs a product.
    first = 2 * 28 * 28 * 6 * 25
    rest = 2 * (10 * 10 * 16 * 25 * 6 + 400 * 120 + 120 * 84 + 84 * 10)
    assert figures.training_flops("lenet") == 2 * first + 3 * rest


def measured(train, evaluation):
    rates = {"train": train, "eval": evaluation, "peak": [100.0] * len(train)}
    return Measured(rates, {"train": 1.0, "eval": 0.5}, 2**30, 61_706, "some 1.0")


def test_the_ratio_is_taken_round_by_round_against_the_fastest_float32_peer():
    results = {
        figures.OURS: measured([10.0, 40.0, 20.0], [1.0, 1.0, 1.0]),
        "torch default": measured([5.0, 20.0, 20.0], [2.0, 2.0, 2.0]),
        "torch compile": measured([1.0, 1.0, 1.0], [4.0, 4.0, 4.0]),
        "torch bf16": measured([99.0, 99.0, 99.0], [99.0, 99.0, 99.0]),
        "cnn_jax bf16": measured([99.0, 198.0, 297.0], [99.0, 99.0, 99.0]),
    }
    assert figures.fastest_peer(results, "train") == "torch default"
    assert figures.ratio(results, "torch default", "train") == 2.0  # of 2, 2 and 1
    assert figures.ratio(results, "torch bf16", "train", "cnn_jax bf16") == 2.0  # of 1, 2 and 3
    assert figures.fastest_peer(results, "eval") == "torch compile"
    assert figures.ratio(results, "torch compile", "eval") == 0.25


def test_a_table_replaces_its_own_and_leaves_the_others(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(cpu, "description", lambda: "Old (AVX2), 2 cores")
    table.put_into(path, "old figures", 128)
    monkeypatch.setattr(cpu, "description", lambda: "New (AVX-512), 2 cores")
    table.put_into(path, "figures at 32", 32)
    table.put_into(path, "first figures", 128)
    table.put_into(path, "second figures", 128)
    text = path.read_text()
    assert "first figures" not in text
    assert [text.count(s) for s in ("old figures", "figures at 32", "second figures")] == [1, 1, 1]


def test_the_rendered_table_names_rates_and_ratio():
    results = {
        "lenet": {
            figures.OURS: measured([300.0] * 3, [600.0] * 3),
            "torch default": measured([200.0] * 3, [300.0] * 3),
        }
    }
    text = table.render(results, 128, 3, 1.0)
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert "|lenet|300|200|**1.50**(torchdefault)|" in lines
    assert "|lenet|600|300|**2.00**(torchdefault)|" in lines


def test_one_round_for_real():
    results = run.measure("mlp", 8, contenders.contenders(peers=False), rounds=1, seconds=0.1)
    ours = results[figures.OURS]
    assert ours.parameters == 101_770
    assert all(len(ours.rates[mode]) == 1 for mode in ("train", "eval", "peak"))
    assert all(rates[0] > 0 for rates in ours.rates.values())


def test_every_convolution_of_a_network_is_measured():
    # By hand from the lecture: 28x28, 14x14 after a stride, 14x14, 7x7 after a stride, 7x7.
    same, strided = ((1, 1), (1, 1)), ((0, 1), (0, 1))
    assert [g[:7] for g in formulations.geometries("same_padding")] == [
        ((28, 28), (3, 3), (28, 28), (1, 1), same, 1, 32),
        ((28, 28), (3, 3), (14, 14), (2, 2), strided, 32, 64),
        ((14, 14), (3, 3), (14, 14), (1, 1), same, 64, 128),
        ((14, 14), (3, 3), (7, 7), (2, 2), strided, 128, 256),
        ((7, 7), (3, 3), (7, 7), (1, 1), same, 256, 512),
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_rule_chooses_among_the_measured_formulations(network):
    for g in formulations.geometries(network):
        for name, chosen in formulations_for(g)._asdict().items():
            assert chosen in formulations.candidates(g, name), (g, name)


def test_formulations_for_real(tmp_path, monkeypatch, capsys):
    def two(g, name):  # all would take ten seconds to compile
        return [getattr(formulations_for(g), name), "offsets"]

    monkeypatch.setattr(formulations, "RESULTS", tmp_path)
    monkeypatch.setattr(formulations, "candidates", two)
    flags = ["--networks=lenet", "--batch_size=2", "--rounds=1", "--seconds=1e-6", "--write"]
    assert main.main(["benchmark", "--formulations", *flags, f"--output={tmp_path}/x.png"]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000
    passes = ["28x28 1->6 k5 p"] * 2 + ["14x14 6->16 k5"] * 3  # the input needs no gradient
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[: len(passes)]] == passes
    text = (tmp_path / "RESULTS.md").read_text()
    assert "batch 2" in text
    assert text.count("kernel_gradient") == 2


@pytest.mark.parametrize(
    ("flag", "named"), [("--networks=alexnet", "alexnet"), ("--rounds=0", "rounds=0")]
)
def test_bad_flags_are_named(flag, named, capsys, caplog):
    assert main.main(["benchmark", flag]) == 2
    assert named in caplog.text
