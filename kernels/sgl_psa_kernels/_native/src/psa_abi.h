/* Plain C interface of the CPU kernels. Mirrored field by field in _native/abi.py.
 *
 * Strides are in elements. Every call returns a PsaStatus; on failure `error_index` holds the batch
 * row (or the element of the slot / page list) that is at fault and nothing useful was written.
 */
#ifndef PSA_ABI_H
#define PSA_ABI_H

#include <stdint.h>

#define PSA_ABI_VERSION 11
#define PSA_SKINNY_ROWS 8 /* most rows of psa_skinny_linear */
#define PSA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum PsaDtype { PSA_BF16 = 0, PSA_FP16 = 1, PSA_FP32 = 2 };

enum PsaMode { PSA_DENSE = 0, PSA_MARGINAL = 1, PSA_COVERAGE = 2, PSA_CONSERVATIVE = 3 };

/* Kinds of page summaries: their vectors are listed in page_summary/kinds.py. */
enum PsaSummaryKind {
  PSA_HYBRID = 0,
  PSA_MEAN = 1,
  PSA_GAUSSIAN = 2,
  PSA_CUBOID_MEAN = 3,
  PSA_BOX = 4
};

enum PsaStatus {
  PSA_OK = 0,
  PSA_BAD_SEQ_LEN = 1,   /* negative, or more pages than the page table has */
  PSA_BAD_PAGE = 2,      /* page number outside of the pool */
  PSA_BAD_MODE = 3,
  PSA_NO_LOG_MASS = 4,   /* a row with a rule, but no estimates */
  PSA_BAD_SLOT = 5,
  PSA_BAD_FILL = 6,
  PSA_BAD_DTYPE = 7,
  PSA_BAD_THRESHOLD = 8, /* NaN */
  PSA_NO_MEMORY = 9,
  PSA_BAD_KIND = 10,
  PSA_BAD_POSITION = 11, /* outside of the table of cosines and sines */
  PSA_BAD_ROWS = 12,
  PSA_SHORT_PAGE = 13,   /* a page holds fewer tokens than are asked for */
  PSA_GAP = 14,          /* a slot whose page is not filled up to it */
  PSA_HOST_STORE = 15,   /* a transfer failed, now or before */
  PSA_NO_FRAME = 16      /* pages that are not full hold the frames */
};

enum PsaStat {
  PSA_PAGES_ATTENDED = 0,
  PSA_TOKENS_ATTENDED = 1,
  PSA_PAGES_SCORED = 2,
  PSA_ROUNDS = 3,
  PSA_ESTIMATED_COVERAGE = 4,
  PSA_STALE_PAGES = 5,
  PSA_NUM_STATS = 6
};

/* Batch rows and their pages: part of the arguments of every op that walks requests. */
typedef struct {
  int32_t batch, num_qo_heads, num_kv_heads, head_dim;
  int32_t page_size, max_pages, num_pages, dtype;
  int32_t num_threads, error_index;
  float sm_scale;
  int32_t reserved;
  int64_t q_row_stride, q_head_stride, page_table_stride;
  const void *q;             /* [batch, num_qo_heads, head_dim] */
  const int32_t *page_table; /* [batch, max_pages] */
  const int32_t *seq_lens;   /* [batch] */
} PsaRows;

typedef struct {
  PsaRows rows;
  int32_t sink_pages, recent_pages, group_pages, group_percent;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const void *k, *v;
  const float *log_mass; /* [batch, num_qo_heads, max_pages] or NULL */
  const int32_t *mode;
  const float *threshold, *kappa_floor, *kappa_std;
  void *out;    /* [batch, num_qo_heads, head_dim] */
  float *lse;   /* [batch, num_qo_heads] */
  float *stats; /* [batch, num_kv_heads, PSA_NUM_STATS] */
  const int32_t *first_pages; /* [batch, num_kv_heads] or NULL */
  uint8_t *attended;          /* [batch, num_kv_heads, max_pages] or NULL */
  const float *kappa_start;   /* [batch, num_qo_heads] or NULL */
  float *residuals;           /* [batch, num_qo_heads, 3] or NULL: count, sum, sum of squares */
} PsaDecodeArgs;

typedef struct {
  PsaRows rows;
  int32_t bits, affine_width; /* 2: (scale, zero); 1: scale of rotated sketches */
  const uint8_t *codes;       /* [num_pages, num_kv_heads, page_size, head_dim * bits / 8], as
                                 sketch_layout.h orders the last two dimensions */
  const uint16_t *affine;     /* fp16 [num_pages, num_kv_heads, page_size, affine_width] */
  const int32_t *watermark;
  const uint8_t *active;
  const uint8_t *candidates; /* [batch, num_kv_heads, max_pages] or NULL: all pages */
  float *log_mass;           /* pages that are no candidates keep what is there */
  const float *signs;        /* [head_dim]: rotate q so; NULL: it is as the codes are */
} PsaSketchScoreArgs;

typedef struct {
  int32_t batch, num_qo_heads, num_kv_heads, page_size;
  int32_t max_pages, count, num_threads, error_index;
  const float *log_mass; /* [batch, num_qo_heads, max_pages] */
  const int32_t *seq_lens;
  const uint8_t *active;
  uint8_t *candidates; /* [batch, num_kv_heads, max_pages] */
  int32_t *chosen;     /* [batch, num_kv_heads], how many */
} PsaCandidateArgs;

typedef struct {
  PsaRows rows;
  int32_t kind, reserved;
  const void *summary;    /* [num_pages, num_kv_heads, vectors of the kind, head_dim]: bf16, or
                             uint8 codes if affine */
  const uint16_t *affine; /* bf16 [num_pages, num_kv_heads, vectors of the kind, 2], scale and
                             zero, or NULL */
  const int32_t *watermark;
  const uint8_t *active;
  float *log_mass;
} PsaSummaryScoreArgs;

typedef struct {
  int32_t num_kv_heads, head_dim, page_size, dtype;
  int32_t bits, num_threads;
  int64_t count, num_slots, error_index;
  int64_t k_token_stride, k_head_stride;
  const void *k; /* [num_slots, ...], or [count, ...] if in_order: row i of slots[i] */
  const int64_t *slots; /* [count] */
  uint8_t *codes;
  uint16_t *affine;   /* two a key, or one if signs */
  const float *signs; /* [head_dim] for rotated sketches, or NULL */
  uint8_t *second_codes;   /* sketches of the same keys in second_bits besides, or NULL */
  uint16_t *second_affine;
  int32_t *watermark; /* tokens of each page that have sketches, moved slot by slot; or NULL */
  int32_t second_bits, in_order;
} PsaSketchWriteArgs;

typedef struct {
  int32_t num_kv_heads, head_dim, page_size, dtype;
  int32_t num_pages, num_threads;
  int32_t kind, reserved;
  int64_t count, error_index;
  int64_t k_token_stride, k_head_stride;
  const void *k;
  const int64_t *pages; /* [count] */
  const int32_t *fill;  /* [count] */
  void *summary; /* as in PsaSummaryScoreArgs */
  uint16_t *affine;
} PsaSummaryUpdateArgs;

/* Rows of x, residual and weight are contiguous in themselves; outputs are contiguous. */
typedef struct {
  int64_t rows, dim, x_row_stride, residual_row_stride;
  int32_t dtype, num_threads, error_index;
  float eps;
  const void *x, *residual, *weight; /* [rows, dim], the same or NULL, [dim] */
  void *out, *residual_out;          /* [rows, dim], the same or NULL */
} PsaRmsNormArgs;

typedef struct {
  int64_t tokens, max_positions, q_row_stride, k_row_stride;
  int32_t num_qo_heads, num_kv_heads, head_dim, rotary_dim;
  int32_t dtype, interleaved, num_threads, error_index;
  const int64_t *positions; /* [tokens] */
  const void *cos_sin;      /* [max_positions, rotary_dim]: cosines, then sines */
  void *q, *k;              /* [tokens, heads * head_dim] */
} PsaRopeArgs;

typedef struct {
  int64_t rows, in_features, out_features, x_row_stride, weight_row_stride;
  int32_t dtype, num_threads, error_index, reserved;
  const void *x, *weight, *bias; /* [rows, in], [out, in], [out] or NULL */
  void *out;                     /* [rows, out] */
} PsaSkinnyLinearArgs;

/* What went wrong in a tier. PSA_HOST_STORE: code is an errno, or 0 where the file ended.
 * PSA_SHORT_PAGE, PSA_GAP: page, how many tokens it has and how many it should have. PSA_NO_FRAME:
 * have: frames of pages that are not full. */
typedef struct {
  int64_t index, offset, bytes;
  int32_t code, writing, layer, page, have, want;
} PsaTierError;

/* A page tier on tables and frames that the caller owns; page_tier/shape.py describes them. */
typedef struct {
  int32_t num_layers, num_kv_heads, head_dim, page_size;
  int32_t dtype, itemsize, int8_host, pipeline, host_fd, reserved; /* host_fd: -1 for memory */
  int64_t num_pages, num_frames, record_bytes; /* of a page on the host */
  void *host, *k_frames, *v_frames;
  int32_t *frame_of;
  int64_t *owner;
  int32_t *saved, *filled, *stamp, *uses;
  int64_t *came;
  uint8_t *busy;
  void *tier; /* result */
  PsaTierError error;
} PsaTierCreateArgs;

/* psa_tier_write: `count` tokens at `index`, slots. psa_tier_gather: the first `count` tokens of
 * the pages `index`, to contiguous k and v. */
typedef struct {
  void *tier;
  int32_t layer, num_threads;
  int64_t count, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const int64_t *index;
  void *k, *v;
  PsaTierError error;
} PsaTierRowsArgs;

typedef struct {
  PsaDecodeArgs decode; /* k, v and their strides are not looked at */
  void *tier;
  int32_t layer, step;
  PsaTierError error;
} PsaTierDecodeArgs;

enum PsaTierCommand {
  PSA_TIER_RELEASE = 0,  /* data: int64 [count], pages */
  PSA_TIER_CLEAR = 1,
  PSA_TIER_VICTIMS = 2,  /* data: int32 [rows, count], frames */
  PSA_TIER_QUOTA = 3,    /* count: frames a layer */
  PSA_TIER_DRAIN = 4,
  PSA_TIER_COUNTERS = 5, /* to counters, in the order of TierCounters */
  PSA_TIER_CHECK = 6,    /* to counters[0]: bits, 1 pins, 2 queue, 4 free list, 8 frames of layers,
                            16 states */
  PSA_TIER_DESTROY = 7
};

typedef struct {
  void *tier;
  int32_t command, rows;
  int64_t count;
  const void *data;
  int64_t counters[8];
  PsaTierError error;
} PsaTierControlArgs;

typedef struct {
  int64_t rows, dim, x_row_stride;
  int32_t dtype, num_threads, error_index, reserved;
  const void *x; /* [rows, 2 * dim] */
  void *out;     /* [rows, dim] */
} PsaSiluAndMulArgs;

/* Strides and sizes in bytes; k_bytes and v_bytes: of one head of a row. */
typedef struct {
  int64_t count, num_slots, k_row, k_head, v_row, v_head;
  int64_t k_slot, k_cache_head, v_slot, v_cache_head, k_bytes, v_bytes;
  int32_t num_kv_heads, num_threads, error_index, reserved;
  const void *k, *v;
  void *k_cache, *v_cache;
  const int64_t *slots; /* [count] */
} PsaKvWriteArgs;

/* Adds keys to the attention that `out` and `lse` hold; lse -inf: none so far. */
typedef struct {
  int64_t tokens, keys, q_token, q_head, k_token, k_head, v_token, v_head;
  int32_t num_kv_heads, group, head_dim, dtype;
  int32_t causal, num_threads, error_index; /* causal: token i sees keys 0..i */
  float sm_scale;
  const void *q;    /* [tokens, num_kv_heads * group, head_dim] */
  const void *k, *v; /* [keys, num_kv_heads, head_dim] */
  float *out;       /* [tokens, num_kv_heads * group, head_dim] */
  float *lse;       /* [tokens, num_kv_heads * group] */
} PsaPrefillArgs;

PSA_EXPORT int psa_abi_version(void);
PSA_EXPORT int psa_struct_size(int index); /* of the args of the functions below, in order */
PSA_EXPORT const char *psa_isa(void);
PSA_EXPORT int psa_progressive_decode(PsaDecodeArgs *args);
PSA_EXPORT int psa_sketch_score(PsaSketchScoreArgs *args);
PSA_EXPORT int psa_summary_score(PsaSummaryScoreArgs *args);
PSA_EXPORT int psa_sketch_write(PsaSketchWriteArgs *args);
PSA_EXPORT int psa_summary_update(PsaSummaryUpdateArgs *args);
PSA_EXPORT int psa_candidate_pages(PsaCandidateArgs *args);
PSA_EXPORT int psa_rms_norm(PsaRmsNormArgs *args);
PSA_EXPORT int psa_rope(PsaRopeArgs *args);
PSA_EXPORT int psa_skinny_linear(PsaSkinnyLinearArgs *args);
PSA_EXPORT int psa_tier_create(PsaTierCreateArgs *args);
PSA_EXPORT int psa_tier_write(PsaTierRowsArgs *args);
PSA_EXPORT int psa_tier_gather(PsaTierRowsArgs *args);
PSA_EXPORT int psa_tier_decode(PsaTierDecodeArgs *args);
PSA_EXPORT int psa_tier_control(PsaTierControlArgs *args);
PSA_EXPORT int psa_silu_and_mul(PsaSiluAndMulArgs *args);
PSA_EXPORT int psa_kv_write(PsaKvWriteArgs *args);
PSA_EXPORT int psa_prefill(PsaPrefillArgs *args);

#ifdef __cplusplus
}
#endif
#endif
