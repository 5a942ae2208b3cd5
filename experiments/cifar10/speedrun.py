"""The 94% CIFAR-10 speedrun (arXiv 2404.00498) in its version with Muon: 0.28 PFLOP of training.

./launch.sh train --experiment=cifar10/speedrun
Test accuracy 0.9408 (n = 1), 54 minutes on two Zen 4 cores that had other work too.
"""

import functools

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import SpeedrunCNN
from cnn_jax.optim import muon_and_sgd

BATCH = 2000


def config() -> Config:
    data = DataConfig(
        "cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        alternating_flip=True,
        crop_padding=2,
        test_time_augmentation="mirror_shift",
    )
    optimizer = functools.partial(
        muon_and_sgd,
        bias_learning_rate=0.053 * BATCH,
        head_learning_rate=0.67 * BATCH,
        decay=2e-6 * BATCH,
    )
    return Config(
        model=SpeedrunCNN(),
        data=data,
        epochs=8,
        batch_size=BATCH,
        optimizer=optimizer,
        learning_rate=0.24,
        schedule="linear",
        label_smoothing=0.2,
        init_examples=5000,
        eval_every_epochs=8,
        eval_batch_size=500,
        log_every_steps=5,
    )
