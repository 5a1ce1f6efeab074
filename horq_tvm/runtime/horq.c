/* The model's life in C: create, run, destroy. What the model is stands in hq_the_model, which is constant. */
#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

_Static_assert(sizeof(hq_any) == 16, "TVMFFIAny is 16 bytes");
_Static_assert(offsetof(hq_any, value) == 8, "TVMFFIAny's value is at byte 8");
_Static_assert(offsetof(hq_tensor, ndim) == sizeof(void *) + 8, "DLTensor: data, device, ndim");
_Static_assert(offsetof(hq_tensor, dtype) == sizeof(void *) + 12, "DLTensor: data, device, ndim, dtype");

#define ERROR_CAPACITY 512

struct horq_context {
  hq_tensor *tensors; /* one a view, and one argument each, made once */
  hq_any *arguments;
  unsigned char *arena;
  void **staging;     /* inputs then outputs; NULL until a caller's memory is not aligned */
  hq_pool *pool;      /* NULL with one thread */
  uint64_t *step_ns;
  int profiling;
  atomic_flag error_taken; /* several threads may fail at once: the first one's message stays */
  char error[ERROR_CAPACITY];
};

/*
 * Kernels call back without saying for whom (TVMBackendParallelLaunch), so the context of a run goes with its thread. A
 * thread key rather than _Thread_local, whose access would make the library need ld-linux beside libc.
 */
static pthread_key_t current_key;
static int current_key_made;

__attribute__((constructor)) static void make_key(void) {
  current_key_made = pthread_key_create(&current_key, NULL) == 0;
}

__attribute__((destructor)) static void delete_key(void) {
  if (current_key_made) pthread_key_delete(current_key);
}

int hq_enter(horq_context *context) { return pthread_setspecific(current_key, context); }

/* What kernels call, by the names that TVM's code generator gives. */
int TVMBackendParallelLaunch(hq_task task, void *data, int num_task) {
  horq_context *context = pthread_getspecific(current_key);
  hq_parallel_env alone = {NULL, 1};
  (void)num_task; /* always 0 in generated code: as many as there are */
  if (context == NULL || context->pool == NULL) return task(0, &alone, data);
  return hq_pool_run(context->pool, task, data);
}

int (*__TVMBackendParallelLaunch)(hq_task, void *, int) = TVMBackendParallelLaunch;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  horq_context *context = pthread_getspecific(current_key);
  if (context == NULL || atomic_flag_test_and_set(&context->error_taken)) return;
  size_t used = 0;
  for (int32_t i = -1; i < count; ++i) {
    const char *part = i < 0 ? kind : parts[i];
    for (; part != NULL && *part != '\0' && used + 3 < ERROR_CAPACITY; ++part) context->error[used++] = *part;
    if (i < 0) context->error[used++] = ':', context->error[used++] = ' ';
  }
  context->error[used] = '\0';
}

int horq_abi_version(void) { return HORQ_ABI_VERSION; }
const char *horq_manifest(void) { return hq_manifest_text; }
size_t horq_input_count(void) { return hq_the_model.input_count; }
size_t horq_output_count(void) { return hq_the_model.output_count; }
size_t horq_step_count(void) { return hq_the_model.step_count; }
size_t horq_arena_bytes(void) { return hq_the_model.arena_bytes; }

const horq_tensor_info *horq_input(size_t index) {
  return index < hq_the_model.input_count ? &hq_the_model.inputs[index] : NULL;
}

const horq_tensor_info *horq_output(size_t index) {
  return index < hq_the_model.output_count ? &hq_the_model.outputs[index] : NULL;
}

const char *horq_step_name(size_t index) {
  return index < hq_the_model.step_count ? hq_the_model.steps[index].name : NULL;
}

const char *horq_last_error(const horq_context *context) { return context == NULL ? "" : context->error; }

void horq_set_profiling(horq_context *context, int on) {
  if (context != NULL) context->profiling = on != 0;
}

const uint64_t *horq_step_nanoseconds(const horq_context *context) { return context == NULL ? NULL : context->step_ns; }

const char *horq_status_text(int status) {
  switch (status) {
    case HORQ_OK: return "no error";
    case HORQ_ERROR_ARGUMENT: return "an argument is a null pointer or out of range";
    case HORQ_ERROR_MEMORY: return "out of memory";
    case HORQ_ERROR_THREADS: return "the system gave no more threads or thread keys";
    case HORQ_ERROR_CPU: return "the CPU lacks a feature that the kernels need";
    case HORQ_ERROR_KERNEL: return "a kernel failed";
    default: return "unknown status";
  }
}

size_t horq_missing_features(const char **names, size_t capacity) {
  size_t missing = 0;
  for (size_t i = 0; i < hq_the_model.feature_count; ++i) {
    if (hq_cpu_has(&hq_the_model.features[i])) continue;
    if (missing < capacity) names[missing] = hq_the_model.features[i].name;
    ++missing;
  }
  return missing;
}

static void *allocate_aligned(size_t bytes) {
  void *memory = NULL;
  return posix_memalign(&memory, HQ_ALIGNMENT, bytes > 0 ? bytes : HQ_ALIGNMENT) == 0 ? memory : NULL;
}

/* Tensors and kernel arguments never change after this, but for the data pointers of inputs and outputs. */
static void fill_tables(horq_context *context) {
  for (size_t i = 0; i < hq_the_model.view_count; ++i) {
    const hq_view *view = &hq_the_model.views[i];
    hq_tensor *tensor = &context->tensors[i];
    tensor->device_type = HQ_DEVICE_CPU;
    tensor->ndim = (int32_t)view->ndim;
    tensor->dtype = view->dtype;
    tensor->shape = (int64_t *)(hq_the_model.extents + view->shape);
    tensor->strides = (int64_t *)(hq_the_model.extents + view->strides);
    if (view->space == HQ_WEIGHTS) tensor->data = (void *)(hq_weights + view->place);
    if (view->space == HQ_ARENA) tensor->data = context->arena + view->place;
  }
  for (size_t i = 0; i < hq_the_model.argument_count; ++i) {
    context->arguments[i].type_index = HQ_ANY_DLTENSOR;
    context->arguments[i].value.v_ptr = &context->tensors[hq_the_model.arguments[i]];
  }
}

int horq_create(int threads, horq_context **result) {
  if (result == NULL) return HORQ_ERROR_ARGUMENT;
  *result = NULL;
  if (threads < 1 || threads > HORQ_MAX_THREADS) return HORQ_ERROR_ARGUMENT;
  if (!current_key_made) return HORQ_ERROR_THREADS;
  if (horq_missing_features(NULL, 0) > 0) return HORQ_ERROR_CPU;
  const hq_model *model = &hq_the_model;
  horq_context *context = calloc(1, sizeof *context);
  if (context == NULL) return HORQ_ERROR_MEMORY;
  atomic_flag_clear(&context->error_taken);
  /* One element more than there are: calloc(0) may return NULL. */
  context->tensors = calloc(model->view_count + 1, sizeof *context->tensors);
  context->arguments = calloc(model->argument_count + 1, sizeof *context->arguments);
  context->staging = calloc(model->input_count + model->output_count + 1, sizeof *context->staging);
  context->step_ns = calloc(model->step_count + 1, sizeof *context->step_ns);
  context->arena = allocate_aligned(model->arena_bytes);
  int status = HORQ_OK;
  if (!context->tensors || !context->arguments || !context->staging || !context->step_ns || !context->arena) {
    status = HORQ_ERROR_MEMORY;
  } else {
    fill_tables(context);
    if (threads > 1) status = hq_pool_create(threads, context, &context->pool);
  }
  if (status != HORQ_OK) {
    horq_destroy(context);
    return status;
  }
  *result = context;
  return HORQ_OK;
}

void horq_destroy(horq_context *context) {
  if (context == NULL) return;
  hq_pool_destroy(context->pool);
  if (context->staging != NULL) {
    for (size_t i = 0; i < hq_the_model.input_count + hq_the_model.output_count; ++i) free(context->staging[i]);
  }
  free(context->staging);
  free(context->arena);
  free(context->step_ns);
  free(context->arguments);
  free(context->tensors);
  free(context);
}

/* The memory to work on in place of `memory`: itself where it is aligned, else the slot's buffer; NULL without memory. */
static void *aligned_memory(horq_context *context, const void *memory, size_t slot, size_t bytes) {
  if ((uintptr_t)memory % HQ_ALIGNMENT == 0) return (void *)memory;
  if (context->staging[slot] == NULL) context->staging[slot] = allocate_aligned(bytes);
  return context->staging[slot];
}

static int check_pointers(const void *const *inputs, void *const *outputs) {
  if ((inputs == NULL && hq_the_model.input_count > 0) || outputs == NULL) return HORQ_ERROR_ARGUMENT;
  for (size_t i = 0; i < hq_the_model.input_count; ++i) {
    if (inputs[i] == NULL && hq_the_model.inputs[i].bytes > 0) return HORQ_ERROR_ARGUMENT;
  }
  for (size_t i = 0; i < hq_the_model.output_count; ++i) {
    if (outputs[i] == NULL && hq_the_model.outputs[i].bytes > 0) return HORQ_ERROR_ARGUMENT;
  }
  return HORQ_OK;
}

static int bind(horq_context *context, const void *const *inputs, void *const *outputs) {
  const hq_model *model = &hq_the_model;
  for (size_t i = 0; i < model->bound_count; ++i) {
    const uint32_t index = model->bound[i];
    const size_t place = model->views[index].place;
    const int is_input = model->views[index].space == HQ_INPUT;
    const void *memory = is_input ? inputs[place] : outputs[place];
    const size_t bytes = is_input ? model->inputs[place].bytes : model->outputs[place].bytes;
    void *data = aligned_memory(context, memory, is_input ? place : model->input_count + place, bytes);
    if (data == NULL && bytes > 0) return HORQ_ERROR_MEMORY;
    context->tensors[index].data = data;
  }
  for (size_t i = 0; i < model->input_count; ++i) {
    void *staging = context->staging[i];
    if (staging != NULL && (uintptr_t)inputs[i] % HQ_ALIGNMENT != 0) memcpy(staging, inputs[i], model->inputs[i].bytes);
  }
  return HORQ_OK;
}

static uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The index of the step that failed, or step_count. */
static size_t run_steps(horq_context *context) {
  const hq_step *steps = hq_the_model.steps;
  const size_t count = hq_the_model.step_count;
  hq_any result = {HQ_ANY_NONE, 0, {0}};
  for (size_t i = 0; i < count; ++i) {
    if (steps[i].kernel(NULL, context->arguments + steps[i].first, (int)steps[i].count, &result) != 0) return i;
  }
  return count;
}

static size_t run_steps_timed(horq_context *context) {
  const hq_step *steps = hq_the_model.steps;
  const size_t count = hq_the_model.step_count;
  hq_any result = {HQ_ANY_NONE, 0, {0}};
  uint64_t before = nanoseconds();
  for (size_t i = 0; i < count; ++i) {
    if (steps[i].kernel(NULL, context->arguments + steps[i].first, (int)steps[i].count, &result) != 0) return i;
    const uint64_t after = nanoseconds();
    context->step_ns[i] = after - before;
    before = after;
  }
  return count;
}

/* Puts the step's name before whatever message the kernel left. */
static void name_failed_step(horq_context *context, size_t step) {
  char message[ERROR_CAPACITY];
  memcpy(message, context->error, sizeof message);
  const char *parts[] = {message};
  context->error[0] = '\0';
  atomic_flag_clear(&context->error_taken);
  TVMFFIErrorSetRaisedFromCStrParts(hq_the_model.steps[step].name, parts, 1);
}

int horq_run(horq_context *context, const void *const *inputs, void *const *outputs) {
  const hq_model *model = &hq_the_model;
  if (context == NULL || check_pointers(inputs, outputs) != HORQ_OK) return HORQ_ERROR_ARGUMENT;
  context->error[0] = '\0';
  atomic_flag_clear(&context->error_taken);
  int status = bind(context, inputs, outputs);
  if (status != HORQ_OK) return status;
  if (hq_enter(context) != 0) return HORQ_ERROR_THREADS;
  const size_t failed = context->profiling ? run_steps_timed(context) : run_steps(context);
  if (failed < model->step_count) name_failed_step(context, failed);
  hq_enter(NULL);
  if (failed < model->step_count) return HORQ_ERROR_KERNEL;
  for (size_t i = 0; i < model->copy_count; ++i) {
    const hq_copy *copy = &model->copies[i];
    memcpy(outputs[copy->output], context->tensors[copy->view].data, copy->bytes);
  }
  for (size_t i = 0; i < model->output_count; ++i) {
    const void *staging = context->staging[model->input_count + i];
    if (staging != NULL && (uintptr_t)outputs[i] % HQ_ALIGNMENT != 0) {
      memcpy(outputs[i], staging, model->outputs[i].bytes);
    }
  }
  return HORQ_OK;
}
