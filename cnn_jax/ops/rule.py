"""The rule that chooses the formulation of a convolution on CPU, and the measurements behind it."""

import math
from typing import NamedTuple

from jax import lax

from cnn_jax.ops.formulations import Geometry, applies


class Formulations(NamedTuple):
    """Names of the formulations that serve the three passes."""

    forward: str
    image_gradient: str
    kernel_gradient: str


# Writing one value to memory and reading it again takes as long as this many multiplications.
_MOVE = 100


def formulations_for(g: Geometry) -> Formulations:
    """The rule: which formulation computes which pass on CPU.

    1. A kernel of one pixel, or as large as the image, is a dense layer; in the latter case the
       image's gradient has the batch in columns, as Eigen takes four times as long to multiply few
       rows by a transposed matrix (GFLOP/s at 7x7 256->512: 37, in columns 149; but at 14x14 64->64
       k1 170, in columns 62).
    2. A kernel at least 5 pixels wide, stride 1, at least 32 channels on both sides: Fourier along the
       width, and for the image's gradient patches along the height if the kernel is higher than the
       output.
    3. 3x3, stride 1, at least 64 channels on both sides (for the image's gradient 128): Winograd along
       the width for outputs from 6x6 up; in tiles for a smaller output of even size and at least 128
       channels. The kernel's gradient gets no faster.
       Winograd and Fourier round more than a sum of products does; see the errors in README.md. The
       highest precision leaves them out.
    4. Otherwise XLA's own convolution, except for
       - the forward pass from one to four channels, where Eigen has too little to work on at a time:
         patches, of several columns of the output where that has few channels as well (32x32 3->6 k5:
         XLA 7, patches of one column 9, of four 35);
       - the image's gradient: XLA multiplies the zeros between and around the cotangents and, if the
         kernel is larger than the output, runs a scalar loop. "rows" multiplies fewer zeros and
         "offsets" none, but both write more. The rule counts, and takes the cheaper one.

    GFLOP/s of the direct algorithm on two Zen 4 cores (AVX-512; matmul 190), batch 128, float32, from
    process time because the machine was shared; + marks the rule's choice, p padding "SAME":

    | layer                  | forward               | kernel | image: xla rows offsets winograd |
    |------------------------|-----------------------|--------|----------------------------------|
    | 28x28   1->6    k5   p | xla   6, patches  50+ |    18+ |                                  |
    | 28x28   1->32   k3     | xla  19, patches  71+ |    22+ |                                  |
    | 28x28   1->32   k7     | xla  52, patches  58+ |    72+ |                                  |
    | 32x32   3->32   k3   p | xla  40, patches  67+ |    50+ |                                  |
    | 32x32   3->24   k2     | xla  14, patches  48+ |    15+ |                                  |
    | 14x14   6->16   k5     | xla  53+              |    54+ |  16   48+   19                   |
    | 22x22  32->64   k7     | xla 172+              |   105+ |  83  134+   89                   |
    | 16x16  64->128  k7     | xla 180+              |   157+ |  64  116+   97                   |
    | 10x10 128->256  k7     | xla 184+              |   163+ |   3   75   120+                  |
    | 26x26  32->64   k3     | xla 161+              |    95+ | 127  118+  126                   |
    | 12x12  64->128  k3     | xla 174+              |   146+ | 103  133+  116                   |
    | 10x10 128->256  k3     | xla 185, winograd 309+|   131+ | 113  153   179      249+         |
    |  4x4  256->512  k3     | xla 162+              |   161+ |   2   84   133+                  |
    | 14x14  64->128  k3   p | xla 180+              |   120+ | 145  171+  125                   |
    |  7x7  256->512  k3   p | xla 174, winograd 263+|   157+ | 162  175   151      177+         |
    |  8x8  256->512  k3   p | xla 186, winograd 333+|   145+ | 168  182   163      263+         |
    |  7x7  256->256  k3   p | xla 177, winograd 239+|   153+ | 179  175   167      204+         |
    | 26x26  32->64   k3 s2  | xla 139+              |    57+ |  79   78   118+                  |
    | 14x14 128->256  k3 s2 p| xla 169+              |   135+ | 151  149   141+                  |
    |  8x8  512->1024 k3 s2 p| xla 192+              |   161+ | 171  164   159+                  |

    On two Zen 3 cores (AVX2; matmul 165), where "rows" was not measured, XLA and "offsets" gave 2 and
    136 at 4x4 256->512, 73 and 126 at 26x26 s2, 131 and 151 at 14x14 s2, and Winograd's forward pass
    285 at 10x10 128->256 (XLA 170) but 120 at 14x14 64->128 (XLA 176): hence 128 channels.

    Fourier, and Winograd on one tile, by wall time on the same Zen 4 cores; the rule's choice last:

    | layer                  | forward               | kernel gradient     | image gradient          |
    |------------------------|-----------------------|---------------------|-------------------------|
    | 22x22  32->64   k7     | xla 178, fourier 275  | xla 142 fourier 258 | rows 113, fourier 241   |
    | 16x16  64->128  k7     | xla 192, fourier 355  | xla 180 fourier 258 | rows 113, fourier 252   |
    | 10x10 128->256  k7     | xla 197, fourier 307  | xla 188 fourier 232 | offsets 103, fourier 161|
    | 26x26  32->64   k3     | fourier 62, xla 171   | fourier 55, xla 84  | fourier 55, rows 138    |
    |  4x4  256->512  k3     | xla 173, tiles 282    | tiles 74, xla 165   | offsets 129, tiles 178  |

    Winograd along the width, F(4, 3), likewise; in brackets in tiles, F(2x2, 3x3):

    | layer                  | forward               | kernel gradient     | image gradient          |
    |------------------------|-----------------------|---------------------|-------------------------|
    | 10x10 128->256  k3     | xla 185, 292 (185)    | 166, xla 155        | rows 153, 238 (152)     |
    |  8x8  256->512  k3   p | xla 206, 276 (223)    | 175, xla 179        | rows 195, 264 (196)     |
    |  7x7  256->512  k3   p | xla 192, 281 (187)    | 149, xla 170        | rows 190, 217 (145)     |
    | 15x15  64->64   k3   p | xla 144, 197 (80)     | 84, xla 84          | 167, rows 154           |
    | 14x14  64->128  k3   p | xla 167, 206 (101)    | 60, xla 82          | 110, rows 157           |
    | 12x12  64->128  k3     | xla 164, 169 (186)    | 103, xla 140        | 143, rows 134           |
    | 26x26  32->64   k3     | 140, xla 140 (65)     | 48, xla 63          | 137, rows 126           |
    """
    if applies("dense", g):
        return Formulations("dense", "dense_columns" if g.out == (1, 1) else "dense", "dense")
    channels = min(g.in_channels, g.out_channels)
    # The cost of each multiplication of the direct algorithm.
    offsets = 1 + _MOVE / g.out_channels
    rows = g.image[1] / g.out[1] * (1 + _MOVE / (g.out_channels * g.kernel[1]))
    image_gradient = "rows" if rows < offsets else "offsets"
    if math.prod(g.kernel) > 49:  # "offsets" would be hundreds of operations, slow to compile
        image_gradient = "rows"
    exact = is_exact(g)
    if not exact and applies("fourier", g) and g.kernel[1] >= 5 and channels >= 32:
        # Transposed, XLA's convolution is a scalar loop where the kernel is higher than the output.
        higher = g.kernel[0] > g.out[0]
        return Formulations("fourier", "fourier_patches" if higher else "fourier", "fourier")
    if not exact and applies("winograd", g) and channels >= 64:
        if min(g.out) >= 6:
            return Formulations(
                "winograd", "winograd" if channels >= 128 else image_gradient, "xla_apart"
            )
        if channels >= 128 and not any(size % 2 for size in g.out):
            return Formulations("winograd_tiles", "winograd_tiles", "xla_apart")
    few = g.in_channels < 5 and math.prod(g.kernel) <= 49
    return Formulations("patches" if few else "xla", image_gradient, "xla_apart")


def is_exact(g: Geometry) -> bool:
    """Whether the layer asks for the highest precision."""
    of_both = g.precision if isinstance(g.precision, tuple) else (g.precision,)
    return any(each in (lax.Precision.HIGHEST, "highest", "float32") for each in of_both)
