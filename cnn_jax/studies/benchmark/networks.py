"""The compared networks as plain data, from which every contender builds its model.

Standard library only. The parameter counts of all contenders are compared before the measurement.
"""

from typing import NamedTuple


class Network(NamedTuple):
    """One network.

    Attributes:
      model: its class in cnn_jax.models.
      image_shape: (H, W, C).
      layers: ("conv", features, kernel, stride, padding), each followed by ReLU; ("pool", window);
        ("flatten",); ("dense", features, relu); each contender builds ("speedrun",) by hand.
    """

    model: str
    image_shape: tuple[int, int, int]
    layers: tuple[tuple, ...]


def _convs(padding: str, *shapes: tuple[int, int, int]) -> tuple[tuple, ...]:
    return tuple(("conv", features, kernel, stride, padding) for features, kernel, stride in shapes)


HEAD = (("flatten",), ("dense", 10, False))
NETWORKS = {
    "mlp": Network("MLP", (28, 28, 1), (("flatten",), ("dense", 128, True), ("dense", 10, False))),
    "conv_stack": Network(
        "ConvStack",
        (28, 28, 1),
        _convs("valid", (32, 7, 1), (64, 7, 1), (128, 7, 1), (256, 7, 1)) + HEAD,
    ),
    "max_pool": Network(
        "MaxPoolCNN",
        (28, 28, 1),
        (
            *_convs("valid", (32, 3, 1), (64, 3, 1)),
            ("pool", 2),
            *_convs("valid", (128, 3, 1), (256, 3, 1)),
            ("pool", 2),
            *_convs("valid", (512, 3, 1)),
            *HEAD,
        ),
    ),
    "strided": Network(
        "StridedCNN",
        (28, 28, 1),
        _convs("valid", (32, 3, 1), (64, 3, 2), (128, 3, 1), (256, 3, 2), (512, 3, 1)) + HEAD,
    ),
    "same_padding": Network(
        "SamePaddingCNN",
        (28, 28, 1),
        _convs("same", (32, 3, 1), (64, 3, 2), (128, 3, 1), (256, 3, 2), (512, 3, 1)) + HEAD,
    ),
    "lenet": Network(
        "LeNet",
        (28, 28, 1),
        (
            *_convs("same", (6, 5, 1)),
            ("pool", 2),
            *_convs("valid", (16, 5, 1)),
            ("pool", 2),
            ("flatten",),
            ("dense", 120, True),
            ("dense", 84, True),
            ("dense", 10, False),
        ),
    ),
    "fully_conv": Network(
        "FullyConvCNN",
        (28, 28, 1),
        (
            *_convs("same", (32, 3, 1), (64, 3, 2), (128, 3, 1), (256, 3, 2)),
            *_convs("valid", (512, 7, 1)),
            # On 28x28 the 1x1 convolution is a dense layer over a 1x1 map.
            ("flatten",),
            ("dense", 10, False),
        ),
    ),
    "cifar": Network(
        "CifarCNN",
        (32, 32, 3),
        (
            *_convs(
                "same", (32, 3, 1), (64, 3, 2), (128, 3, 1), (256, 3, 2), (512, 3, 1), (1024, 3, 2)
            ),
            ("flatten",),
            ("dense", 512, True),
            ("dense", 10, False),
        ),
    ),
    "speedrun": Network("SpeedrunCNN", (32, 32, 3), (("speedrun",),)),
}
