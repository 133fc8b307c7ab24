"""The rule table: what each family of ATen calls does to feature labels.

Rules are looked up by the name of the ATen call ("add", "convolution"), without overload and without the trailing
underscore of in-place variants. Calls that PyTorch itself tags as pointwise need no row. A call with no row is a
barrier. Users extend the table with `fxzip.RULES | {"my_call": rule}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from . import contraction, elementwise, joining, movement, noise, reduction, scattering
from .axis_labels import FIXED, VOID, AxisLabels, Operand, compress, varying
from .constraint_store import Constraints, ConstraintStore, Pin
from .invocation import Invocation, Rule, is_pointwise, is_random
from .label_patterns import across
from .meeting import meet

__all__ = [
    "FIXED",
    "RULES",
    "VOID",
    "AxisLabels",
    "ConstraintStore",
    "Constraints",
    "Invocation",
    "Operand",
    "Pin",
    "Rule",
    "across",
    "compress",
    "elementwise",
    "is_pointwise",
    "is_random",
    "meet",
    "movement",
    "reduction",
    "varying",
]  # fmt: skip


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(movement.MOVES, movement.move),
        **_rows(movement.turn, "flip roll rot90"),
        **_rows(movement.triangle, "tril triu"),
        "view_as_real": movement.as_pairs,
        "view_as_complex": movement.as_complex,
        **_rows(
            elementwise.first_operand,
            """_to_copy to dropout native_dropout alpha_dropout feature_dropout relu6 relu hardtanh hardswish
            hardsigmoid hardshrink silu mish gelu celu elu selu leaky_relu threshold softplus softshrink
            log_sigmoid_forward nan_to_num""",
        ),
        **_rows(elementwise.elementwise, "prelu _prelu_kernel where masked_fill addcmul addcdiv lerp fmod clamp"),
        **_rows(
            elementwise.unlabelled,
            """zeros ones full empty arange zeros_like ones_like full_like empty_like new_zeros new_ones new_full
            new_empty scalar_tensor linspace eye fill zero new_empty_strided randperm
            empty_strided sym_size sym_numel sym_stride empty_permuted""",
        ),
        **_rows(
            noise.noise,
            """rand randn randint rand_like randn_like randint_like uniform exponential cauchy log_normal geometric
            random normal_functional""",
        ),
        **_rows(noise.given_noise, "bernoulli normal poisson binomial"),
        **_rows(noise.rrelu, "rrelu_with_noise rrelu_with_noise_functional"),
        "multinomial": noise.drawn,
        "glu": elementwise.gated,
        **_rows(movement.index, "index index_select _unsafe_index"),
        "gather": movement.gather,
        "copy": movement.copy,
        **_rows(scattering.scatter, "index_add index_copy index_reduce scatter scatter_add scatter_reduce"),
        **_rows(scattering.index_put, "index_put _unsafe_index_put _index_put_impl"),
        "slice_scatter": scattering.slice_scatter,
        "select_scatter": scattering.select_scatter,
        "embedding": movement.embedding,
        **_rows(movement.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
        "constant_pad_nd": movement.pad,
        "cat": joining.cat,
        "stack": joining.stack,
        "_weight_norm_interface": movement.weight_norm,
        **_rows(
            reduction.reduce,
            """sum mean amax amin prod logsumexp norm linalg_vector_norm var std var_mean std_mean max min any all
            aminmax""",
        ),
        **_rows(reduction.positional_reduce, "argmax argmin"),
        **_rows(reduction.ordered, "cumsum cumprod sort topk cummax cummin logcumsumexp"),
        **_rows(reduction.places_of, "nonzero nonzero_numpy nonzero_static argwhere masked_select"),
        **_rows(reduction.softmax, "_softmax _log_softmax softmax log_softmax _safe_softmax"),
        **_rows(reduction.layer_norm, "native_layer_norm layer_norm"),
        **_rows(
            reduction.batch_norm,
            """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
            _batch_norm_with_update _batch_norm_no_update batch_norm miopen_batch_norm""",
        ),
        "native_group_norm": reduction.group_norm,
        **_rows(
            reduction.positional,
            """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
            avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
            _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
            upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
            upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d
            _upsample_nearest_exact2d max_unpool2d mkldnn_max_pool2d""",
        ),
        **_rows(
            movement.padded,
            """reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
            replication_pad3d""",
        ),
        **_rows(reduction.grid_sample, "grid_sampler_2d grid_sampler_3d"),
        **_rows(reduction.transform, "_fft_r2c _fft_c2r _fft_c2c"),
        "im2col": reduction.im2col,
        "col2im": reduction.col2im,
        **_rows(contraction.product, "mm bmm mv dot vdot addmm baddbmm addmv"),
        **_rows(contraction.convolution, "convolution _convolution"),
    }
)
