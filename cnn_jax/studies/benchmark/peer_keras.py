"""The contender Keras, in its own environment. Arguments: NETWORK BATCH BACKEND.

Backends: tensorflow, jax. Adam 1e-3, sparse categorical cross-entropy from logits,
`train_on_batch` on a batch that is already in memory as float32.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = sys.argv[3] if len(sys.argv) > 3 else "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS, Network
from worker import serve


def build(network: Network) -> keras.Model:
    """`network` as the lecture's Sequential model, whose outputs are logits."""
    model = keras.Sequential([layers.Input(network.image_shape)])
    for kind, *options in network.layers:
        if kind == "conv":
            features, kernel, stride, padding = options
            model.add(
                layers.Conv2D(features, kernel, strides=stride, padding=padding, activation="relu")
            )
        elif kind == "pool":
            model.add(layers.MaxPooling2D(options[0]))
        elif kind == "flatten":
            model.add(layers.Flatten())
        elif kind == "dense":
            model.add(layers.Dense(options[0], activation="relu" if options[1] else None))
        elif kind == "speedrun":
            add_speedrun(model)
    return model


def add_speedrun(model: keras.Model) -> None:
    """The network of the CIFAR-10 speedrun (arXiv 2404.00498), as cnn_jax.models.SpeedrunCNN."""

    def norm() -> layers.Layer:
        return layers.BatchNormalization(momentum=0.6, epsilon=1e-12, scale=False)

    def gelu() -> layers.Layer:
        return layers.Activation(keras.activations.gelu)

    model.add(layers.Conv2D(24, 2))
    model.add(gelu())
    for width in (64, 256, 256):
        model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
        model.add(layers.MaxPooling2D(2))
        model.add(norm())
        model.add(gelu())
        model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
        model.add(norm())
        model.add(gelu())
    model.add(layers.MaxPooling2D(3))
    model.add(layers.Flatten())
    model.add(layers.Dense(10, use_bias=False))
    model.add(layers.Rescaling(1 / 9))


def main(network: str, batch_size: int, backend: str) -> None:
    """Serves the modes train and eval."""
    keras.utils.set_random_seed(0)
    model = build(NETWORKS[network])
    random = np.random.default_rng(0)
    image = random.random((batch_size, *NETWORKS[network].image_shape), np.float32)
    label = random.integers(0, 10, batch_size).astype(np.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    if backend == "tensorflow":
        import tensorflow as tf

        image, label = tf.constant(image), tf.constant(label)

    def train(steps: int) -> None:
        for _ in range(steps):
            model.train_on_batch(image, label)

    def evaluation(steps: int) -> None:
        for _ in range(steps):
            model.predict_on_batch(image)

    parameters = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    modes = {"train": train, "eval": evaluation}
    serve(modes, version=f"keras {keras.__version__}", parameters=parameters)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
