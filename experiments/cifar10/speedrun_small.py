"""CIFAR-10 above 90% on a laptop: the speedrun (arXiv 2404.00498) with half of its filters.

./launch.sh train --experiment=cifar10/speedrun_small

Test accuracy 0.9204 ± 0.0010 (n = 3): 497,528 parameters, 0.079 PFLOP of training, 15 minutes on two
Zen 3 cores without other work. The recipe is that of cifar10/speedrun. A run on 45,000 of the training
images reached 0.9262 on the other 5,000; so nothing else was tried.
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
        model=SpeedrunCNN(widths=(32, 128, 128)),
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
