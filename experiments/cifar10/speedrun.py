"""The 94% CIFAR-10 speedrun (arXiv 2404.00498) in its version with Muon: 0.28 PFLOP of training.

./launch.sh train --experiment=cifar10/speedrun
Test accuracy 0.9407 ± 0.0007 (n = 5): 22 minutes on two cores of an Intel Xeon with AVX-512 and
one heap for all threads (glibc.malloc.arena_max=1), 54 on two Zen 4 cores that had other work too.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import SpeedrunCNN
from cnn_jax.train.optim import airbench


def config() -> Config:
    data = DataConfig(
        "cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        alternating_flip=True,
        crop_padding=2,
        test_time_augmentation="mirror_shift",
    )
    return Config(
        model=SpeedrunCNN(),
        data=data,
        epochs=8,
        batch_size=2000,
        optimizer=airbench(2000),
        learning_rate=0.24,
        schedule="linear",
        label_smoothing=0.2,
        init_examples=5000,
        eval_every_epochs=8,
        eval_batch_size=500,
        log_every_steps=5,
    )
