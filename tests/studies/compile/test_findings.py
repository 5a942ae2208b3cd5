"""Programs as XLA prints them, cut to a few lines, of which everything can be counted by hand."""

# ruff: noqa: E501

import pytest

from cnn_jax.studies.compile import findings, hlo

# For one of four TPUs. S(1) is memory on the chip; {0,3,2,1} puts the batch innermost.
TPU = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, x={(f32[6])->f32[6]}

%inner (param_0.1: f32[5,5,1,6]) -> f32[5,5,1,6] {
  %param_0.1 = f32[5,5,1,6]{3,2,1,0:T(1,128)} parameter(0)
  ROOT %copy.9 = f32[5,5,1,6]{2,3,1,0:T(1,128)} copy(%param_0.1)
}

%fused (param_0: bf16[32,28,28,1], param_1: f32[5,5,1,6]) -> (f32[32,28,28,6], f32[32,28,28,6]) {
  %param_0 = bf16[32,28,28,1]{0,3,2,1:T(2,128)(2,1)S(1)} parameter(0)
  %param_1 = f32[5,5,1,6]{3,2,1,0:T(1,128)} parameter(1)
  %fusion.9 = f32[5,5,1,6]{2,3,1,0:T(1,128)} fusion(%param_1), kind=kLoop, calls=%inner
  %convolution.1 = f32[32,28,28,6]{0,3,2,1:T(8,128)} convolution(%param_0, %fusion.9), window={size=5x5 pad=2_2x2_2}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(step)/jvp(LeNet)/Conv_0/cond/branch_0_fun/conv_general_dilated"}
  ROOT %tuple.1 = (f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)}, f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)}) tuple(%convolution.1, %convolution.1)
}

ENTRY %main.1_spmd (param.1: f32[5,5,1,6], param.2: bf16[32,28,28,1], param.3: s32[]) -> (f32[5,5,1,6]) {
  %param.1 = f32[5,5,1,6]{3,2,1,0:T(1,128)} parameter(0), metadata={op_name="state.params[\\'Conv_0\\'][\\'kernel\\']"}
  %param.2 = bf16[32,28,28,1]{0,3,2,1:T(2,128)(2,1)} parameter(1)
  %param.3 = s32[]{:T(128)} parameter(2)
  %copy.1 = s32[]{:T(128)S(6)} copy(%param.3), backend_config={"flag_configs":[]}
  %copy-start.1 = (bf16[32,28,28,1]{0,3,2,1:T(2,128)(2,1)S(1)}, bf16[32,28,28,1]{0,3,2,1:T(2,128)(2,1)}, u32[]{:S(2)}) copy-start(%param.2)
  %copy-done.1 = bf16[32,28,28,1]{0,3,2,1:T(2,128)(2,1)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[5,5,1,6]{3,2,1,0:T(1,128)}), f32[1,5,1,6]{3,2,1,0:T(1,128)S(1)}, s32[]{:S(2)}) slice-start(%param.1), slice={[0:1], [0:5], [0:1], [0:6]}
  %slice-done.1 = f32[1,5,1,6]{3,2,1,0:T(1,128)S(1)} slice-done(%slice-start.1)
  %fusion.1 = (f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)}, f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)}) fusion(%copy-done.1, /*index=1*/%param.1), kind=kOutput, calls=%fused
  %get-tuple-element.1 = f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)} get-tuple-element(%fusion.1), index=0
  %select-and-scatter = f32[32,28,28,6]{0,3,2,1:T(8,128)S(1)} select-and-scatter(%get-tuple-element.1, %get-tuple-element.1), window={size=1x2x2x1 stride=1x2x2x1}, select=%a, scatter=%b, metadata={op_name="jit(step)/transpose(jvp(LeNet))/MaxPool_1/cond/branch_0_fun/select_and_scatter"}
  %convolution.2 = f32[5,5,1,6]{3,2,1,0:T(1,128)S(1)} convolution(%copy-done.1, %select-and-scatter), window={size=28x28 pad=2_2x2_2}, dim_labels=f01b_i01o->01bf
  %convolution.3 = f32[32,10]{1,0:T(8,128)S(1)} convolution(%get-tuple-element.1, %get-tuple-element.1), dim_labels=bf_io->bf
  %all-reduce.1 = (f32[5,5,1,6]{3,2,1,0:T(1,128)S(1)}, f32[]{:T(128)}) all-reduce(%convolution.2, %param.3), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %tuple.9 = (f32[5,5,1,6]{3,2,1,0:T(1,128)S(1)}) tuple(%all-reduce.1)
}
"""

GPU = """\
HloModule jit_step, is_scheduled=true

%transposed (param_0: f32[6,5,5,3]) -> f32[5,5,3,6] {
  %param_0 = f32[6,5,5,3]{3,2,1,0} parameter(0)
  ROOT %transpose.1 = f32[5,5,3,6]{3,2,1,0} transpose(%param_0), dimensions={1,2,3,0}
}

%same_order (param_0: f32[1,8]) -> f32[8,1] {
  %param_0 = f32[1,8]{1,0} parameter(0)
  ROOT %transpose.2 = f32[8,1]{1,0} transpose(%param_0), dimensions={1,0}
}

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %gemm = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%x, %x)
}

ENTRY %main (image: f32[2,8,8,3], kernel: f32[6,5,5,3], wide: f64[2]) -> f32[5,5,3,6] {
  %image = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %kernel = f32[6,5,5,3]{3,2,1,0} parameter(1)
  %wide = f64[2]{0} parameter(2)
  %conv.1 = (f32[2,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=5x5 pad=2_2x2_2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(step)/jvp(LeNet)/Conv_0/conv_general_dilated"}
  %wrapped = f32[5,5,3,6]{3,2,1,0} fusion(%kernel), kind=kInput, calls=%transposed
  %wrapped.1 = f32[8,1]{1,0} fusion(%wide), kind=kInput, calls=%same_order
  %copy.1 = f32[2,8,8,3]{3,2,1,0} copy(%image)
  %t0 = (s32[], f32[4,4]{1,0}) tuple(%image)
  %while.1 = (s32[], f32[4,4]{1,0}) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce-start = ((f32[100]{0}), f32[100]{0}) all-reduce-start(%wide), to_apply=%sum
  %all-reduce-done = f32[100]{0} all-reduce-done(%all-reduce-start)
  %scatter.1 = f32[2,10]{1,0} scatter(%wide, %wide), to_apply=%sum, metadata={op_name="jit(step)/transpose(jvp(jit(take_along_axis)))/scatter-add"}
  %call.1 = f32[2]{0} custom-call(%wide), custom_call_target="xla_ffi_python_cpu_callback"
  ROOT %r = f32[5,5,3,6]{3,2,1,0} bitcast(%wrapped)
}
"""


def test_a_program_for_a_tpu():
    found = findings.find(hlo.Program(TPU))
    kernel, image = 5 * 5 * 6 * 4, 32 * 28 * 28 * 2
    assert found == findings.Findings(
        kernels=5,  # without the scalar's copy and the prefetches
        fusions=1,
        # The prefetches read the image and a fifth of the kernel, the fusion the kernel; the exchange
        # writes a scalar, and reads one as the copy does.
        traffic=image + kernel // 5 + kernel + 4 + 4 + 4,
        collectives=(("all-reduce", kernel + 4),),
        convolutions={("XLA", "HWCN"): 1, ("XLA", "kernel gradient"): 1},
        library={},
        copies=(kernel,),
        transpositions=(),  # swaps a dimension of size 1 with another: no byte moves
        scatters=("MaxPool_1 select_and_scatter",),
        host=(),
        aliased=1,
        float64=False,
    )


def test_a_program_for_a_gpu():
    found = findings.find(hlo.Program(GPU))
    kernel, image, result = 5 * 5 * 3 * 6 * 4, 2 * 8 * 8 * 3 * 4, 2 * 8 * 8 * 6 * 4
    gemm = 3 * 64 + 64
    assert found == findings.Findings(
        kernels=1 + 2 + 1 + 3 + 1 + 1 + 1,
        fusions=2,
        traffic=(
            (image + kernel + result)
            + 2 * kernel
            + 2 * image
            + 3 * gemm
            + (16 + 8 * 4)
            + (16 + 400)
            + (2 * 16 + 2 * 10 * 4)
            + (16 + 8)
        ),
        collectives=(("all-reduce", 400),),
        convolutions={("cuDNN", "NHWC"): 1},
        library={"cuBLAS": 3},
        copies=(image,),
        transpositions=(kernel,),
        scatters=("take_along_axis scatter-add",),
        host=("xla_ffi_python_cpu_callback",),
        aliased=0,
        float64=True,
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", [4]),
        ("(bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, pred[7]{0})", [30, 7]),
        ("c64[2]{0}", [16]),
        ("s4[6]{0}", [3]),
        ("token[]", [0]),
    ],
)
def test_bytes_of_a_shape(shape, expected):
    assert [array.bytes for array in hlo.arrays(shape)] == expected


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(f)/transpose(jvp(LeNet))/MaxPool_1/cond/branch_0_fun/scatter", "MaxPool_1 scatter"),
        ("jit(f)/jvp(jit(take_along_axis))/gather", "take_along_axis gather"),
        ("", "(made by XLA)"),
    ],
)
def test_source_of_an_operation(op_name, expected):
    assert findings.source_of(op_name) == expected
