/*
 * run_library LIBRARY FOLDER: runs a library on the files FOLDER/in0, in1, ... and writes FOLDER/out0, out1, ...; for
 * the kernels of another architecture, whose emulator runs it. Exit status: 0, or 1 with one line on standard error.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "horq.h"

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "no symbol %s\n", name);
    exit(1);
  }
  return found;
}

static void *room(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (memory == NULL) exit(1);
  return memory;
}

int main(int argc, char **argv) {
  if (argc != 3) return 1;
  void *library = dlopen(argv[1], RTLD_NOW);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const char *missing[64];
  size_t count = ((size_t(*)(const char **, size_t))symbol(library, "horq_missing_features"))(missing, 64);
  if (count > 0) {
    fprintf(stderr, "the CPU lacks %s\n", missing[0]);
    return 1;
  }
  const horq_tensor_info *(*input)(size_t) = symbol(library, "horq_input");
  const horq_tensor_info *(*output)(size_t) = symbol(library, "horq_output");
  size_t inputs = ((size_t(*)(void))symbol(library, "horq_input_count"))();
  size_t outputs = ((size_t(*)(void))symbol(library, "horq_output_count"))();
  const void **in = malloc((inputs + 1) * sizeof *in);
  void **out = malloc((outputs + 1) * sizeof *out);
  char name[4096];
  for (size_t i = 0; i < inputs; i++) {
    void *memory = room(input(i)->bytes);
    snprintf(name, sizeof name, "%s/in%zu", argv[2], i);
    FILE *file = fopen(name, "rb");
    if (file == NULL || fread(memory, 1, input(i)->bytes, file) != input(i)->bytes) {
      fprintf(stderr, "cannot read %s\n", name);
      return 1;
    }
    fclose(file);
    in[i] = memory;
  }
  for (size_t i = 0; i < outputs; i++) out[i] = room(output(i)->bytes);
  horq_context *context;
  int status = ((int (*)(int, horq_context **))symbol(library, "horq_create"))(1, &context);
  if (status == HORQ_OK) {
    status = ((int (*)(horq_context *, const void *const *, void *const *))symbol(library, "horq_run"))(context, in, out);
  }
  if (status != HORQ_OK) {
    fprintf(stderr, "%s\n", ((const char *(*)(int))symbol(library, "horq_status_text"))(status));
    return 1;
  }
  for (size_t i = 0; i < outputs; i++) {
    snprintf(name, sizeof name, "%s/out%zu", argv[2], i);
    FILE *file = fopen(name, "wb");
    if (file == NULL || fwrite(out[i], 1, output(i)->bytes, file) != output(i)->bytes || fclose(file) != 0) {
      fprintf(stderr, "cannot write %s\n", name);
      return 1;
    }
  }
  return 0;
}
