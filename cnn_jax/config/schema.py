"""The configuration of a run: frozen dataclasses.

An experiment file returns a `Config`; `--set field=value` changes it. Modules and Optax factories
stand in it as themselves.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import optax


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, how they are split, scaled and augmented.

    Attributes:
      name: a TFDS dataset of labelled images ("fashion_mnist", "mnist:3.*.*"), or "garments".
      train_split: a TFDS split of that dataset, for training.
      test_split: the split that is evaluated; it chooses nothing.
      validation_examples: examples taken from the training split, by the seed 0 whatever the run's
        seed, to choose the best checkpoint by; 0 trains on all of them.
      image_size: (height, width) to which every image is resized; needed where sizes differ.
      mean: subtracted from the pixels in [0, 1], one value or one a channel.
      std: divides them after that, likewise.
      flip: mirrors half of the training images, at random.
      alternating_flip: mirrors half of the training images, at random, in the first epoch, and each
        of them in every other epoch after that (arXiv 2404.00498); instead of `flip`.
      crop_padding: pixels of reflected border from which a training image is cropped at random.
      test_time_augmentation: the views of an image whose logits are averaged in evaluation and
        prediction: the image alone, with its mirror image, or both also shifted by a pixel.
    """

    name: str
    train_split: str = "train"
    test_split: str = "test"
    validation_examples: int = 0
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip: bool = False
    alternating_flip: bool = False
    crop_padding: int = 0
    test_time_augmentation: Literal["none", "mirror", "mirror_shift"] = "none"


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. The defaults are the lecture's (that is, Keras's).

    Attributes:
      model: a linen module, called as model(image, train=False), that maps float32 images
        [N, H, W, C] to logits.
      data: the dataset.
      seed: of the initialisation, the order of the examples, augmentation and dropout.
      epochs: passes over the training examples.
      batch_size: examples a step, over all devices; a last incomplete batch is left out.
      eval_batch_size: examples a step of evaluation, raised to a multiple of the devices; every
        example counts.
      optimizer: an Optax factory that takes `learning_rate`, as in optax.adam or
        functools.partial(optax.sgd, momentum=0.9). Its name and these keywords are what is recorded,
        and compared when a run goes on; what stands inside a function of your own is not.
      learning_rate: the highest one of the schedule.
      schedule: its course after the warm-up.
      warmup_epochs: epochs of linear rise from 0.
      final_learning_rate: where the cosine and linear schedules end.
      weight_decay: of kernels, not of biases and scales. Decoupled where the optimizer takes
        `weight_decay` and a mask (adamw, lion, ...), otherwise an L2 term in the gradient.
      clip_norm: limit of the gradient's global norm.
      label_smoothing: in [0, 1).
      compute_dtype: of activations and of the kernels' copies they meet; parameters stay float32.
      init_examples: training examples that the initialisation sees, for models that take their
        first parameters from the data, as SpeedrunCNN does.
      devices: how many of the visible ones are used; None: all.
      eval_every_epochs: epochs between evaluations; the last epoch is always evaluated.
      checkpoint_every_epochs: epochs between checkpoints; the last epoch is always saved.
      checkpoint_every_steps: steps between further checkpoints within an epoch.
      checkpoint_every_minutes: minutes between further checkpoints within an epoch.
      keep_checkpoints: how many of the latest are kept, besides the best one by validation accuracy.
      log_every_steps: steps between two points of the TensorBoard curves and the progress bar, and
        between two looks at whether the loss is finite; of several processes also at signals and
        checkpoint_every_minutes.
      grace_seconds: time to save after a signal that asks to end; then the process ends without.
      heartbeat_seconds: with several processes, silence after which one is taken for dead.
    """

    model: nn.Module
    data: DataConfig
    seed: int = 0
    epochs: int = 10
    batch_size: int = 32
    eval_batch_size: int = 500
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_epochs: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    init_examples: int = 0
    devices: int | None = None
    eval_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int = 2
    log_every_steps: int = 100
    grace_seconds: float = 30.0
    heartbeat_seconds: int = 100


# What a run may change when it goes on: none of these touches the mathematics.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "devices",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "log_every_steps",
        "grace_seconds",
        "heartbeat_seconds",
    }
)
