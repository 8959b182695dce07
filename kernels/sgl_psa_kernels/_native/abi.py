"""The structs of ``src/psa_abi.h`` for ctypes, field by field in the same order."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

ABI_VERSION = 11

OK = 0
BAD_SEQ_LEN = 1
BAD_PAGE = 2
BAD_MODE = 3
NO_LOG_MASS = 4
BAD_SLOT = 5
BAD_FILL = 6
BAD_DTYPE = 7
BAD_THRESHOLD = 8
NO_MEMORY = 9
BAD_KIND = 10
BAD_POSITION = 11
BAD_ROWS = 12
SHORT_PAGE = 13
GAP = 14
HOST_STORE = 15
NO_FRAME = 16

# PsaTierCommand.
TIER_RELEASE, TIER_CLEAR, TIER_VICTIMS, TIER_QUOTA = range(4)
TIER_DRAIN, TIER_COUNTERS, TIER_CHECK, TIER_DESTROY = range(4, 8)

#: Most rows of psa_skinny_linear.
SKINNY_ROWS = 8

Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> Fields:
    return [(name, kind) for name in names.split()]


class Rows(ctypes.Structure):
    """PsaRows."""

    _fields_ = [
        *_fields(c_int32, "batch num_qo_heads num_kv_heads head_dim"),
        *_fields(c_int32, "page_size max_pages num_pages dtype num_threads error_index"),
        *_fields(c_float, "sm_scale"),
        *_fields(c_int32, "reserved"),
        *_fields(c_int64, "q_row_stride q_head_stride page_table_stride"),
        *_fields(c_void_p, "q page_table seq_lens"),
    ]


class DecodeArgs(ctypes.Structure):
    """PsaDecodeArgs."""

    _fields_ = [
        ("rows", Rows),
        *_fields(c_int32, "sink_pages recent_pages group_pages group_percent"),
        *_fields(c_int64, "k_token_stride k_head_stride v_token_stride v_head_stride"),
        *_fields(c_void_p, "k v log_mass mode threshold kappa_floor kappa_std out lse stats"),
        *_fields(c_void_p, "first_pages attended kappa_start residuals"),
    ]


class SketchScoreArgs(ctypes.Structure):
    """PsaSketchScoreArgs."""

    _fields_ = [
        ("rows", Rows),
        *_fields(c_int32, "bits affine_width"),
        *_fields(c_void_p, "codes affine watermark active candidates log_mass signs"),
    ]


class SummaryScoreArgs(ctypes.Structure):
    """PsaSummaryScoreArgs."""

    _fields_ = [
        ("rows", Rows),
        *_fields(c_int32, "kind reserved"),
        *_fields(c_void_p, "summary affine watermark active log_mass"),
    ]


class SketchWriteArgs(ctypes.Structure):
    """PsaSketchWriteArgs."""

    _fields_ = [
        *_fields(c_int32, "num_kv_heads head_dim page_size dtype bits num_threads"),
        *_fields(c_int64, "count num_slots error_index k_token_stride k_head_stride"),
        *_fields(c_void_p, "k slots codes affine signs second_codes second_affine watermark"),
        *_fields(c_int32, "second_bits in_order"),
    ]


class SummaryUpdateArgs(ctypes.Structure):
    """PsaSummaryUpdateArgs."""

    _fields_ = [
        *_fields(c_int32, "num_kv_heads head_dim page_size dtype num_pages num_threads"),
        *_fields(c_int32, "kind reserved"),
        *_fields(c_int64, "count error_index k_token_stride k_head_stride"),
        *_fields(c_void_p, "k pages fill summary affine"),
    ]


class CandidateArgs(ctypes.Structure):
    """PsaCandidateArgs."""

    _fields_ = [
        *_fields(c_int32, "batch num_qo_heads num_kv_heads page_size"),
        *_fields(c_int32, "max_pages count num_threads error_index"),
        *_fields(c_void_p, "log_mass seq_lens active candidates chosen"),
    ]


class RmsNormArgs(ctypes.Structure):
    """PsaRmsNormArgs."""

    _fields_ = [
        *_fields(c_int64, "rows dim x_row_stride residual_row_stride"),
        *_fields(c_int32, "dtype num_threads error_index"),
        *_fields(c_float, "eps"),
        *_fields(c_void_p, "x residual weight out residual_out"),
    ]


class RopeArgs(ctypes.Structure):
    """PsaRopeArgs."""

    _fields_ = [
        *_fields(c_int64, "tokens max_positions q_row_stride k_row_stride"),
        *_fields(c_int32, "num_qo_heads num_kv_heads head_dim rotary_dim"),
        *_fields(c_int32, "dtype interleaved num_threads error_index"),
        *_fields(c_void_p, "positions cos_sin q k"),
    ]


class SkinnyLinearArgs(ctypes.Structure):
    """PsaSkinnyLinearArgs."""

    _fields_ = [
        *_fields(c_int64, "rows in_features out_features x_row_stride weight_row_stride"),
        *_fields(c_int32, "dtype num_threads error_index reserved"),
        *_fields(c_void_p, "x weight bias out"),
    ]


class SiluAndMulArgs(ctypes.Structure):
    """PsaSiluAndMulArgs."""

    _fields_ = [
        *_fields(c_int64, "rows dim x_row_stride"),
        *_fields(c_int32, "dtype num_threads error_index reserved"),
        *_fields(c_void_p, "x out"),
    ]


class KvWriteArgs(ctypes.Structure):
    """PsaKvWriteArgs."""

    _fields_ = [
        *_fields(c_int64, "count num_slots k_row k_head v_row v_head"),
        *_fields(c_int64, "k_slot k_cache_head v_slot v_cache_head k_bytes v_bytes"),
        *_fields(c_int32, "num_kv_heads num_threads error_index reserved"),
        *_fields(c_void_p, "k v k_cache v_cache slots"),
    ]


class PrefillArgs(ctypes.Structure):
    """PsaPrefillArgs."""

    _fields_ = [
        *_fields(c_int64, "tokens keys q_token q_head k_token k_head v_token v_head"),
        *_fields(c_int32, "num_kv_heads group head_dim dtype"),
        *_fields(c_int32, "causal num_threads error_index"),
        *_fields(c_float, "sm_scale"),
        *_fields(c_void_p, "q k v out lse"),
    ]


class TierError(ctypes.Structure):
    """PsaTierError."""

    _fields_ = [
        *_fields(c_int64, "index offset bytes"),
        *_fields(c_int32, "code writing layer page have want"),
    ]


class TierCreateArgs(ctypes.Structure):
    """PsaTierCreateArgs."""

    _fields_ = [
        *_fields(c_int32, "num_layers num_kv_heads head_dim page_size"),
        *_fields(c_int32, "dtype itemsize int8_host pipeline host_fd reserved"),
        *_fields(c_int64, "num_pages num_frames record_bytes"),
        *_fields(c_void_p, "host k_frames v_frames"),
        *_fields(c_void_p, "frame_of owner saved filled stamp uses came busy tier"),
        ("error", TierError),
    ]


class TierRowsArgs(ctypes.Structure):
    """PsaTierRowsArgs."""

    _fields_ = [
        *_fields(c_void_p, "tier"),
        *_fields(c_int32, "layer num_threads"),
        *_fields(c_int64, "count k_token_stride k_head_stride v_token_stride v_head_stride"),
        *_fields(c_void_p, "index k v"),
        ("error", TierError),
    ]


class TierDecodeArgs(ctypes.Structure):
    """PsaTierDecodeArgs."""

    _fields_ = [
        ("decode", DecodeArgs),
        *_fields(c_void_p, "tier"),
        *_fields(c_int32, "layer step"),
        ("error", TierError),
    ]


class TierControlArgs(ctypes.Structure):
    """PsaTierControlArgs."""

    _fields_ = [
        *_fields(c_void_p, "tier"),
        *_fields(c_int32, "command rows"),
        *_fields(c_int64, "count"),
        *_fields(c_void_p, "data"),
        ("counters", c_int64 * 8),
        ("error", TierError),
    ]


FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "psa_progressive_decode": DecodeArgs,
    "psa_sketch_score": SketchScoreArgs,
    "psa_summary_score": SummaryScoreArgs,
    "psa_sketch_write": SketchWriteArgs,
    "psa_summary_update": SummaryUpdateArgs,
    "psa_candidate_pages": CandidateArgs,
    "psa_rms_norm": RmsNormArgs,
    "psa_rope": RopeArgs,
    "psa_skinny_linear": SkinnyLinearArgs,
    "psa_tier_create": TierCreateArgs,
    "psa_tier_write": TierRowsArgs,
    "psa_tier_gather": TierRowsArgs,
    "psa_tier_decode": TierDecodeArgs,
    "psa_tier_control": TierControlArgs,
    "psa_silu_and_mul": SiluAndMulArgs,
    "psa_kv_write": KvWriteArgs,
    "psa_prefill": PrefillArgs,
}
