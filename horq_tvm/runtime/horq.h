/*
 * A model compiled by horq-tvm: the C interface that every library exports.
 *
 *     horq_context *context;
 *     int status = horq_create(1, &context);
 *     const void *inputs[] = {image};
 *     void *outputs[] = {scores};
 *     if (status == HORQ_OK) status = horq_run(context, inputs, outputs);
 *     if (status != HORQ_OK) fprintf(stderr, "%s\n", horq_status_text(status));
 *     horq_destroy(context);
 *
 * Tensors are dense, row-major, in the native byte order. Nothing is read from the environment and nothing is shared
 * between contexts but constants. A context serves one call at a time: a program that runs the model in several threads
 * makes a context for each.
 */
#ifndef HORQ_H_
#define HORQ_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HORQ_ABI_VERSION 1
#define HORQ_MAX_THREADS 256

#if defined(__GNUC__)
#define HORQ_API __attribute__((visibility("default")))
#else
#define HORQ_API
#endif

typedef enum {
  HORQ_OK = 0,
  HORQ_ERROR_ARGUMENT = 1, /* a null pointer, or threads not in 1 ... HORQ_MAX_THREADS */
  HORQ_ERROR_MEMORY = 2,   /* out of memory */
  HORQ_ERROR_THREADS = 3,  /* the system gave no more threads or thread keys */
  HORQ_ERROR_CPU = 4,      /* the CPU lacks what horq_missing_features() names */
  HORQ_ERROR_KERNEL = 5    /* a kernel failed: horq_last_error() says which, and why */
} horq_status;

/* What the model reads or writes. Every pointer is valid for as long as the library is loaded. */
typedef struct {
  const char *name;
  const char *dtype;    /* as numpy names it: "float32", "uint8", ... */
  const int64_t *shape; /* `ndim` extents */
  size_t ndim;
  size_t bytes;
} horq_tensor_info;

typedef struct horq_context horq_context;

/* HORQ_ABI_VERSION of the build. A caller compares it before it uses anything else. */
HORQ_API int horq_abi_version(void);

/* The manifest, a NUL-terminated JSON object. Also the ELF section ".horq.manifest". */
HORQ_API const char *horq_manifest(void);

/*
 * The features that the kernels need and this CPU, or its operating system, lacks, named as in /proc/cpuinfo. Writes at
 * most `capacity` names and returns how many there are. Runs on any CPU of the architecture.
 */
HORQ_API size_t horq_missing_features(const char **names, size_t capacity);

HORQ_API size_t horq_input_count(void);
HORQ_API size_t horq_output_count(void);

/* The input or output at `index`, NULL past the last. */
HORQ_API const horq_tensor_info *horq_input(size_t index);
HORQ_API const horq_tensor_info *horq_output(size_t index);

/* Bytes of working memory that horq_create() allocates for intermediate tensors. */
HORQ_API size_t horq_arena_bytes(void);

/*
 * A context that runs the model on `threads` threads, the calling one and threads - 1 that sleep between runs.
 * Allocates all working memory. On failure `*context` is NULL.
 */
HORQ_API int horq_create(int threads, horq_context **context);

/* Ends the threads and frees the memory. NULL is allowed. */
HORQ_API void horq_destroy(horq_context *context);

/*
 * Runs the model: inputs[i] holds horq_input(i)->bytes bytes, outputs[i] has room for horq_output(i)->bytes, and no
 * output overlaps an input or another output. Memory aligned to 64 bytes is used in place; any other is copied through
 * a buffer that the context allocates once, on the first such call.
 */
HORQ_API int horq_run(horq_context *context, const void *const *inputs, void *const *outputs);

/* What went wrong in the last run on this context, "" if nothing did or nothing is known beyond the status. */
HORQ_API const char *horq_last_error(const horq_context *context);

/* A status in words. */
HORQ_API const char *horq_status_text(int status);

/* The kernels that a run calls, in order. NULL past the last. */
HORQ_API size_t horq_step_count(void);
HORQ_API const char *horq_step_name(size_t index);

/*
 * Times every step of the runs that follow (on != 0) or stops (0, the default, at no cost). horq_step_nanoseconds()
 * gives the horq_step_count() times of the last timed run.
 */
HORQ_API void horq_set_profiling(horq_context *context, int on);
HORQ_API const uint64_t *horq_step_nanoseconds(const horq_context *context);

#ifdef __cplusplus
}
#endif
#endif /* HORQ_H_ */
