"""Fashion-MNIST for a small budget: the network and the method of arXiv 2404.00498, 0.4 PFLOP at most.

./launch.sh train --experiment=fashion_mnist/record
Test accuracy 0.9520 ± 0.0003 (n = 3): 33 minutes on two cores of an Intel Xeon with AVX-512 and
one heap for all threads (glibc.malloc.arena_max=1), 49 on two Zen 4 cores that had other work too.

1,962,152 parameters on 28x28x1, 0.39 PFLOP of training. The recipe is that of cifar10/speedrun, with
more epochs.
"""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import SpeedrunCNN
from cnn_jax.train.optim import airbench


def config() -> Config:
    data = DataConfig(
        "fashion_mnist",
        mean=(0.2860,),
        std=(0.3530,),
        alternating_flip=True,
        crop_padding=2,
        test_time_augmentation="mirror_shift",
    )
    return Config(
        model=SpeedrunCNN(),
        data=data,
        epochs=13,
        batch_size=2000,
        optimizer=airbench(2000),
        learning_rate=0.24,
        schedule="linear",
        label_smoothing=0.2,
        init_examples=5000,
        eval_every_epochs=13,
        eval_batch_size=500,
        log_every_steps=5,
    )
