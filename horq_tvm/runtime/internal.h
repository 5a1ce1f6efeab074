/*
 * What the parts of the C runtime and the generated model.c share. Names are hq_*, none is exported.
 *
 * The structures that a kernel sees are those of DLPack 1 and of tvm-ffi's c_api.h, declared here so that a library can
 * be built with no header but libc's.
 */
#ifndef HORQ_INTERNAL_H_
#define HORQ_INTERNAL_H_

#include "horq.h"

#define HQ_ALIGNMENT 64 /* what TVM's code generator assumes of every tensor's data */

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} hq_dtype; /* DLDataType */

typedef struct {
  void *data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  hq_dtype dtype;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
} hq_tensor; /* DLTensor */

typedef struct {
  int32_t type_index;
  uint32_t zero_padding;
  union {
    int64_t v_int64;
    void *v_ptr;
  } value;
} hq_any; /* TVMFFIAny */

#define HQ_ANY_NONE 0
#define HQ_ANY_DLTENSOR 7
#define HQ_DEVICE_CPU 1

typedef int (*hq_kernel)(void *self, const hq_any *args, int count, hq_any *result);

/* Where a tensor's data lie: `place` is a byte offset for arena and weights, an index for inputs and outputs. */
typedef enum { HQ_INPUT, HQ_OUTPUT, HQ_WEIGHTS, HQ_ARENA } hq_space;

typedef struct {
  hq_space space;
  uint32_t ndim;
  hq_dtype dtype;
  uint32_t shape;   /* first extent, an index into hq_model.extents */
  uint32_t strides; /* first stride, likewise */
  size_t place;
} hq_view;

typedef struct {
  const char *name;
  hq_kernel kernel;
  uint32_t first; /* its arguments are hq_model.arguments[first ... first + count - 1] */
  uint32_t count;
} hq_step;

/* An output that no kernel writes into directly, filled after the last step. */
typedef struct {
  uint32_t view;
  uint32_t output;
  size_t bytes;
} hq_copy;

/* How to ask the CPU for a feature; which fields mean what is up to the architecture's cpu_*.c. */
typedef struct {
  const char *name;
  uint32_t leaf;
  uint32_t subleaf;
  uint32_t word;
  uint32_t bit;
  uint32_t os_state;
} hq_feature;

typedef struct {
  const horq_tensor_info *inputs, *outputs;
  size_t input_count, output_count;
  const hq_feature *features;
  size_t feature_count;
  const int64_t *extents;
  const hq_view *views;
  size_t view_count;
  const uint32_t *bound; /* the views of inputs and outputs, whose data pointer every run sets */
  size_t bound_count;
  const uint32_t *arguments; /* view of each kernel argument, step by step */
  size_t argument_count;
  const hq_step *steps;
  size_t step_count;
  const hq_copy *copies;
  size_t copy_count;
  size_t arena_bytes;
} hq_model;

extern const hq_model hq_the_model;     /* model.c, generated */
extern const unsigned char hq_weights[];  /* data.S, generated */
extern const char hq_manifest_text[];

int hq_cpu_has(const hq_feature *feature); /* cpu_*.c */

/* pool.c */
typedef struct hq_pool hq_pool;

typedef struct {
  void *sync_handle;
  int32_t num_task;
} hq_parallel_env; /* TVMParallelGroupEnv */

typedef int (*hq_task)(int task_id, hq_parallel_env *env, void *data);

/* A pool of `threads` >= 2 threads, the caller of hq_pool_run() counted; its workers act for `owner`. */
int hq_pool_create(int threads, horq_context *owner, hq_pool **pool);
void hq_pool_destroy(hq_pool *pool);
int hq_pool_run(hq_pool *pool, hq_task task, void *data);

/* horq.c: the context that the calling thread works for at the moment. Zero where it was set. */
int hq_enter(horq_context *context);

#endif /* HORQ_INTERNAL_H_ */
