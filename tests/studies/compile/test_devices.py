"""The programs for TPUs and GPUs, as their real compilers make them; nothing runs.

`./launch.sh setup --with=compile-tpu --with=compile-cuda`, then `./launch.sh test -mcompile`. The
tests of a kind of device are skipped where its compiler is not installed.
"""

import dataclasses
import functools
import importlib.util
import os
import re

import jax
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig, experiment
from cnn_jax.studies.compile import programs, targets
from cnn_jax.studies.compile.programs import Compiled
from tests.networks import Linear, Small

pytestmark = pytest.mark.compile

SHAPES = {
    "fashion_mnist/mlp": (28, 28, 1),
    "fashion_mnist/conv_stack": (28, 28, 1),
    "fashion_mnist/max_pool": (28, 28, 1),
    "fashion_mnist/strided": (28, 28, 1),
    "fashion_mnist/same_padding": (28, 28, 1),
    "fashion_mnist/lenet": (28, 28, 1),
    "fashion_mnist/fully_conv": (28, 28, 1),
    "cifar10/cifar": (32, 32, 3),
    "cifar10/speedrun": (32, 32, 3),
}
MODULES = {"v5e:2x2": "libtpu", "h100:4": "jax_cuda13_plugin"}


@functools.cache
def target_of(topology: str) -> targets.Target:
    module = MODULES[topology]
    if not (
        importlib.util.find_spec(module)
        or (module == "libtpu" and "TPU_LIBRARY_PATH" in os.environ)
    ):
        pytest.skip(f"{module} is not installed")
    return targets.find(topology)


@functools.cache
def steps_of(name: str, topology: str, epochs: int = 10) -> tuple[Compiled, ...]:
    config = experiment.load(name, ["batch_size=128", f"epochs={epochs}"])
    return tuple(programs.compile_steps(config, SHAPES[name], target_of(topology)))


@pytest.mark.parametrize("topology", MODULES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_steps_compile_for_four_devices(name, topology):
    training, evaluation = steps_of(name, topology)
    found = training.findings
    for step in (training, evaluation):
        assert step.devices == 4
        assert step.findings.host == ()
        assert not step.findings.float64
        assert 0 < step.memory.peak < 2e9
    # The loss is new; every array of the state takes its old place.
    assert found.aliased == training.outputs - 1
    # One exchange for all gradients, not one a parameter; for GPUs, XLA puts at most about 30 MB into
    # one. The others are as small as the number of correct answers and, in the speedrun's network,
    # BatchNorm's means over the whole batch.
    assert {kind for kind, _ in found.collectives} == {"all-reduce"}
    gradients = [size for _, size in found.collectives if size > 50_000]
    assert sum(gradients) >= 0.99 * training.memory.parameters
    assert len(gradients) <= (2 if topology == "h100:4" else 1)


@pytest.mark.parametrize("topology", MODULES)
def test_a_program_does_not_grow_with_the_epochs(topology):
    once, often = (steps_of("fashion_mnist/lenet", topology, epochs)[0] for epochs in (10, 1000))
    assert once.findings == often.findings
    assert once.memory == often.memory


@pytest.mark.parametrize("topology", MODULES)
def test_a_batch_that_does_not_fit_is_refused(topology):
    config = Config(Small(), DataConfig("mine"), batch_size=4096)
    target = target_of(topology)
    few = dataclasses.replace(target.rates, memory=1e5)
    with pytest.raises(ConfigError, match="training with a batch of 4096: needs "):
        next(programs.compile_steps(config, (28, 28, 1), dataclasses.replace(target, rates=few)))


def test_the_compiler_refuses_what_a_tpu_cannot_hold():
    config = Config(Linear(), DataConfig("mine"), batch_size=2**26)
    with pytest.raises(ConfigError, match=r"needs [\d.]+G bytes on each device, which has 15.75G;"):
        next(programs.compile_steps(config, (28, 28, 1), target_of("v5e:2x2")))


@pytest.mark.parametrize("topology", MODULES)
def test_the_platform_stays_the_processor(topology):
    target = target_of(topology)
    assert jax.default_backend() == "cpu"
    assert len(target.devices) == 4
    assert {device.platform for device in target.devices} == {"tpu" if "v5" in topology else "gpu"}


def test_matmuls_and_convolutions_for_a_gpu_have_the_precision():
    """TF32 where nothing is said, which the text leaves out; all of both steps in float32 otherwise."""
    assert "operand_precision" not in steps_of("fashion_mnist/lenet", "h100:4")[0].text
    config = experiment.load("fashion_mnist/lenet", ["batch_size=128", "matmul_precision=highest"])
    for compiled in programs.compile_steps(config, (28, 28, 1), target_of("h100:4")):
        products = re.findall(r".* (?:dot|convolution)\(.*|.*__(?:cudnn|cublas).*", compiled.text)
        assert len(products) >= 5
        assert all("operand_precision={highest,highest" in line for line in products)


def test_a_step_for_a_gpu_has_no_scatter_and_can_be_deterministic():
    """Atomic additions of a scatter and Triton's matmuls may differ from run to run."""
    (plain, _) = steps_of("fashion_mnist/lenet", "h100:4")
    config = experiment.load("fashion_mnist/lenet", ["batch_size=128", "deterministic=true"])
    steps = list(programs.compile_steps(config, (28, 28, 1), target_of("h100:4")))
    assert plain.findings.scatters == steps[0].findings.scatters == ()
    matmul = r"__triton\w*gemm"  # its full name differs between versions of XLA
    assert re.search(matmul, plain.text)
    assert not any(re.search(matmul, step.text) for step in steps)
