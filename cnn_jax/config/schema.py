"""The configuration of a run: frozen dataclasses, each field with its type, default, range and meaning.

An experiment file returns a `Config`; `--set field=value` changes it. It holds modules and Optax
factories as Python objects. The command `fields` prints the descriptions below.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import flax.linen as nn
import optax


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed values of a field.

    Attributes:
      allowed: in words that follow "must be".
      holds: tells whether a value is allowed; the value has the field's type and is not None.
    """

    allowed: str
    holds: Callable[[Any], bool]


AUTO: Final = "auto"
SEED = Range("from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)
COUNT = Range("from 1 to 2**31 - 1", lambda value: 1 <= value < 2**31)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
AT_LEAST_1_OR_AUTO = Range("at least 1, or auto", lambda value: value == AUTO or value >= 1)
AT_LEAST_0 = Range("0 or more", lambda value: value >= 0)
ANY_NUMBER = Range("0 or more, or all", lambda value: value == "all" or value >= 0)
POSITIVE = Range("greater than 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("0 or more, and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY = Range("from 0 to 1", lambda value: 0 <= value <= 1)
ANGLE = Range("from 0 to 180", lambda value: 0 <= value <= 180)
GIVEN = Range("given", bool)
PATTERNS = Range("patterns such as Conv_*, separated by commas", lambda value: all(value))
ASCENDING = Range(
    "epochs greater than 0, in ascending order",
    lambda value: all(map(lambda a, b: a < b < math.inf, (0, *value), value)),
)
SIZE = Range("at least 1,1", lambda value: min(value) >= 1)
MEANS = Range(
    "finite numbers, or auto",
    lambda value: value == AUTO or (value and all(map(math.isfinite, value))),
)
DEVIATIONS = Range(
    "numbers greater than 0 and finite, or auto",
    lambda value: value == AUTO or (value and all(0 < one < math.inf for one in value)),
)
TEST_SHARE = Range("in (0, 1)", lambda value: 0 < value < 1)
WEIGHTS = Range(
    "balanced, or numbers of 0 or more, one a class and not all 0",
    lambda value: value == "balanced" or (all(0 <= one < math.inf for one in value) and any(value)),
)


def rate_factors(entries: tuple[str, ...]) -> dict[str, float]:
    """The factor of each pattern in `learning_rate_of`, whose entries are "PATTERN=FACTOR".

    Raises:
      ValueError: an entry has no pattern, or no positive number after its last "=".
    """
    found = {}
    for entry in entries:
        pattern, _, factor = entry.rpartition("=")
        found[pattern] = float(factor)
        if not pattern or not 0 < found[pattern] < math.inf:
            raise ValueError(entry)
    return found


def _are_factors(entries: tuple[str, ...]) -> bool:
    try:
        return len(rate_factors(entries)) == len(entries)
    except ValueError:
        return False


FACTORS = Range(
    "PATTERN=FACTOR, as Conv_*=0.1, separated by commas; a factor is greater than 0", _are_factors
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, how they are split, scaled and augmented."""

    name: Annotated[
        str,
        GIVEN,
        'a TFDS dataset of labelled images ("fashion_mnist", "mnist:3.*.*"), or "garments"; or your '
        "own images: a folder with one folder a class, or a .csv, .tsv or .jsonl file that names files "
        "and labels. It is a path if it begins with /, ./, ../ or ~, ends in one of these three, or "
        "names a folder that holds images",
    ]
    train_split: Annotated[
        str, GIVEN, 'a split of that dataset in TFDS\'s notation ("train[:90%]"), for training'
    ] = "train"
    test_split: Annotated[str, GIVEN, "the split that is evaluated; it chooses nothing"] = "test"
    validation_examples: Annotated[
        int,
        AT_LEAST_0,
        "examples taken from the training split to choose the best checkpoint by, the same for every "
        "seed; 0 trains on all of them, or takes the validation split that your own images have",
    ] = 0
    test_fraction: Annotated[
        float | None,
        TEST_SHARE,
        "of your own images without a test split, the share of each class that becomes one, the same "
        "for every seed; none: 0.2",
    ] = None
    skip_corrupt: Annotated[
        int | Literal["all"],
        ANY_NUMBER,
        "how many images that cannot be decoded are left out of a split, instead of ending; a run then "
        "decodes all images once before it begins, and metrics.jsonl counts those that were left out",
    ] = 0
    streaming: Annotated[
        Literal["auto", True, False],
        "reads and decodes images while they are used, instead of keeping all of them in memory; auto: "
        "where the decoded images of a split take more than half of the memory that is available",
    ] = "auto"
    workers: Annotated[
        int | None,
        AT_LEAST_0,
        "processes that decode what is streamed; 0: threads of the program itself; none: one a core",
    ] = None
    balanced: Annotated[
        bool,
        "draws the examples of an epoch so that each class is as frequent as the others; the number of "
        "steps stays",
    ] = False
    image_size: Annotated[
        tuple[int, int] | None,
        SIZE,
        "height, width to which every image is resized, in pixels; needed where sizes differ",
    ] = None
    mean: Annotated[
        tuple[float, ...] | Literal["auto"],
        MEANS,
        "subtracted from the pixels in [0, 1], one value or one a channel; auto: those of the training "
        "split, which config.json keeps as numbers",
    ] = (0.0,)
    std: Annotated[
        tuple[float, ...] | Literal["auto"], DEVIATIONS, "divides them after that, likewise"
    ] = (1.0,)
    flip: Annotated[bool, "mirrors half of the training images, at random"] = False
    alternating_flip: Annotated[
        bool,
        "mirrors half of the training images, at random, in the first epoch, and each of them in every "
        "other epoch after that (arXiv 2404.00498); instead of flip",
    ] = False
    crop_padding: Annotated[
        int,
        AT_LEAST_0,
        "pixels of reflected border from which a training image is cropped at random",
    ] = 0
    rotation: Annotated[
        float,
        ANGLE,
        "degrees up to which a training image is turned at random, either way; its border is mirrored",
    ] = 0.0
    erasing: Annotated[
        float,
        PROBABILITY,
        "probability that a rectangle of a training image is filled with random pixels "
        "(arXiv 1708.04896)",
    ] = 0.0
    colour_jitter: Annotated[
        float,
        PROBABILITY,
        "brightness, contrast and saturation of a training image are each multiplied by a random "
        "factor from 1 - this to 1 + this; grey images have no saturation to change",
    ] = 0.0
    trivial_augment: Annotated[
        bool,
        "TrivialAugment: one of 14 changes of place or colour, of random strength, for each training "
        "image (arXiv 2103.10158)",
    ] = False
    mixup: Annotated[
        float,
        NOT_NEGATIVE,
        "alpha: training images and their labels are averaged in pairs, with a share drawn from "
        "Beta(alpha, alpha); 0 is off (arXiv 1710.09412)",
    ] = 0.0
    cutmix: Annotated[
        float,
        NOT_NEGATIVE,
        "alpha of CutMix: a rectangle comes from another image, and its share of the label too; with "
        "mixup, each image gets one of the two (arXiv 1905.04899)",
    ] = 0.0
    test_time_augmentation: Annotated[
        Literal["none", "mirror", "mirror_shift"],
        "the views of an image whose logits are averaged in evaluation and prediction: the image "
        "alone, with its mirror image, or both also shifted by a pixel",
    ] = "none"


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. The defaults are the lecture's (that is, Keras's)."""

    model: Annotated[
        nn.Module,
        "a linen module, called as model(image, train=False), that maps float32 images [N, H, W, C] to "
        "logits",
    ]
    data: Annotated[DataConfig, "the dataset"]
    seed: Annotated[
        int, SEED, "of the initialisation, the order of the examples, augmentation and dropout"
    ] = 0
    epochs: Annotated[int, COUNT, "passes over the training examples"] = 10
    batch_size: Annotated[
        int, AT_LEAST_1, "examples a step, over all devices; a last incomplete batch is left out"
    ] = 32
    eval_batch_size: Annotated[
        int,
        AT_LEAST_1,
        "examples a step of evaluation, raised to a multiple of the devices; every example counts",
    ] = 500
    # Its name and keywords are recorded, and compared when a run resumes. The code of a user's own
    # function is not.
    optimizer: Annotated[
        Callable[..., optax.GradientTransformation],
        "an Optax factory that takes learning_rate, as optax.adam or "
        "functools.partial(optax.sgd, momentum=0.9)",
    ] = optax.adam
    learning_rate: Annotated[float, POSITIVE, "the highest one of the schedule"] = 1e-3
    schedule: Annotated[
        Literal["constant", "cosine", "linear", "step", "one_cycle"],
        "the course of the rate after the warm-up; step: multiplied by step_factor at each of the "
        "milestones; one_cycle: rises from learning_rate / 25 and falls along cosines "
        "(arXiv 1708.07120), momentum stays",
    ] = "constant"
    warmup_epochs: Annotated[
        float,
        NOT_NEGATIVE,
        "epochs of linear rise from 0; of one_cycle, epochs of its rise, where 0 is 0.3 of the run",
    ] = 0.0
    final_learning_rate: Annotated[
        float, NOT_NEGATIVE, "where the cosine, linear and one_cycle schedules end"
    ] = 0.0
    milestones: Annotated[
        tuple[float, ...], ASCENDING, "epochs after which the step schedule lowers the rate"
    ] = ()
    step_factor: Annotated[
        float, POSITIVE, "by which the step schedule multiplies the rate at a milestone"
    ] = 0.1
    learning_rate_of: Annotated[
        tuple[str, ...],
        FACTORS,
        "parameters with another rate: PATTERN=FACTOR multiplies their updates, also the decoupled "
        "weight decay; patterns as of freeze, the first that fits counts",
    ] = ()
    freeze: Annotated[
        tuple[str, ...],
        PATTERNS,
        "patterns of parameters (Conv_0/kernel) or modules (Conv_*) that are not trained: no gradient, "
        "no weight decay; a frozen BatchNorm uses its running statistics and keeps them",
    ] = ()
    weight_decay: Annotated[
        float,
        NOT_NEGATIVE,
        "of kernels, not of biases and scales; decoupled where the optimizer takes weight_decay and a "
        "mask (adamw, lion, ...), otherwise an L2 term in the gradient",
    ] = 0.0
    ema_decay: Annotated[
        float,
        SHARE,
        "of the mean of the parameters over the steps, each step weighted by this power of its age; "
        "the mean is evaluated and predicts, BatchNorm's statistics are those of training; 0: no mean",
    ] = 0.0
    accumulate_steps: Annotated[
        int,
        AT_LEAST_1,
        "equal parts of a batch whose gradients are computed one after the other, in less memory, and "
        "averaged; BatchNorm sees one part at a time",
    ] = 1
    clip_norm: Annotated[float | None, POSITIVE, "limit of the gradient's global norm"] = None
    class_weights: Annotated[
        Literal["balanced"] | tuple[float, ...] | None,
        WEIGHTS,
        "one number a class, by which the loss of its training examples is multiplied before the mean "
        "over the batch; balanced: examples / (classes * examples of the class). Evaluation has none",
    ] = None
    label_smoothing: Annotated[float, SHARE, "share of a label that is spread over all classes"] = (
        0.0
    )
    compute_dtype: Annotated[
        Literal["float32", "bfloat16"],
        "of activations and of the kernels' copies that they meet; parameters stay float32",
    ] = "float32"
    matmul_precision: Annotated[
        Literal["default", "tensorfloat32", "highest"],
        "of float32 matmuls and convolutions; default: the fastest, which is TF32 on "
        "an NVIDIA GPU from the A100 on and one product in bfloat16 on a TPU "
        "(JAX_DEFAULT_MATMUL_PRECISION changes it); tensorfloat32: on a TPU three products; highest: "
        "float32, on a TPU by six, on a CPU without Winograd's and Fourier's algorithms, which round "
        "more",
    ] = "default"
    deterministic: Annotated[
        bool,
        "on a GPU, XLA takes only algorithms that give the same bits each time; a program that needs "
        "another one is not compiled",
    ] = False
    init_examples: Annotated[
        int,
        AT_LEAST_0,
        "training examples that the initialisation sees, for models that take their first parameters "
        "from the data, as SpeedrunCNN does",
    ] = 0
    devices: Annotated[
        int | None, AT_LEAST_1, "how many of the visible ones are used; none: all"
    ] = None
    resident_data: Annotated[
        bool | Literal["auto"],
        "keeps the decoded training images on every device, which gathers its batches itself; auto: on "
        "a GPU or TPU where they take at most a quarter of its memory, not on a CPU",
    ] = AUTO
    steps_per_call: Annotated[
        int | Literal["auto"],
        AT_LEAST_1_OR_AUTO,
        "with resident_data, training steps in one call of a compiled program, cut where a checkpoint "
        "or log_every_steps is due; signals wait for it; auto: 8 on a TPU, else 1",
    ] = AUTO
    eval_every_epochs: Annotated[
        int, AT_LEAST_1, "epochs between evaluations; the last epoch is always evaluated"
    ] = 1
    early_stopping_epochs: Annotated[
        int | None,
        AT_LEAST_1,
        "epochs without a new best validation accuracy after which the run ends; none: never",
    ] = None
    checkpoint_every_epochs: Annotated[
        int, AT_LEAST_1, "epochs between checkpoints; the last epoch is always saved"
    ] = 1
    checkpoint_every_steps: Annotated[
        int | None, AT_LEAST_1, "steps between further checkpoints within an epoch"
    ] = None
    checkpoint_every_minutes: Annotated[
        float | None, POSITIVE, "minutes between further checkpoints within an epoch"
    ] = None
    keep_checkpoints: Annotated[
        int,
        AT_LEAST_1,
        "how many of the latest are kept, besides the best one by validation accuracy",
    ] = 2
    log_every_steps: Annotated[
        int,
        AT_LEAST_1,
        "steps between two points of the TensorBoard curves and the progress bar, and between two "
        "looks at whether the loss is finite; of several processes also at checkpoint_every_minutes",
    ] = 100
    grace_seconds: Annotated[
        float,
        POSITIVE,
        "seconds to save after a signal that asks to end; then the process ends without",
    ] = 30.0
    heartbeat_seconds: Annotated[
        int,
        AT_LEAST_1,
        "with several processes, seconds of silence after which one is taken for dead",
    ] = 100


# The fields that may change when a run resumes. None of them changes the mathematics.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "data.streaming",
        "data.workers",
        "devices",
        "resident_data",
        "steps_per_call",
        "eval_every_epochs",
        "early_stopping_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "log_every_steps",
        "grace_seconds",
        "heartbeat_seconds",
    }
)
