/*
 * A model from C: reads one image, prints its class and the scores. Needs horq.h, the library, libc.
 *
 *     cc -I "$(python3 -c 'import horq_tvm; print(horq_tvm.__path__[0])')/runtime" on_device.c ./model.so -o classify
 *     ./classify image.f32          # the input's float32 values, nothing else: numpy's image.tofile("image.f32")
 */
#include <horq.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what, const char *why) {
  fprintf(stderr, "classify: %s: %s\n", what, why);
  return 1;
}

/* Memory that the model uses in place. */
static void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

int main(int argc, char **argv) {
  const horq_tensor_info *input = horq_input(0), *output = horq_output(0);
  if (argc != 2) return fail("usage", "classify IMAGE");
  if (horq_abi_version() != HORQ_ABI_VERSION) return fail("model", "built for another version of horq.h");

  float *image = room(input->bytes), *scores = room(output->bytes);
  if (image == NULL || scores == NULL) return fail("memory", "there is not enough");
  FILE *file = fopen(argv[1], "rb");
  if (file == NULL) return fail(argv[1], "cannot be opened");
  size_t found = fread(image, 1, input->bytes, file);
  fclose(file);
  if (found != input->bytes) return fail(argv[1], "holds fewer values than the model reads");

  horq_context *context;
  const void *inputs[] = {image};
  void *outputs[] = {scores};
  int status = horq_create(1, &context);
  if (status == HORQ_ERROR_CPU) {
    const char *missing[1];
    horq_missing_features(missing, 1);
    return fail("this CPU lacks", missing[0]);
  }
  if (status == HORQ_OK) status = horq_run(context, inputs, outputs);
  if (status != HORQ_OK) return fail("model", horq_status_text(status));

  size_t best = 0, count = output->bytes / sizeof *scores;
  for (size_t i = 1; i < count; ++i) {
    if (scores[i] > scores[best]) best = i;
  }
  printf("%zu:", best);
  for (size_t i = 0; i < count; ++i) printf(" %.6g", scores[i]);
  printf("\n");
  horq_destroy(context);
  free(image);
  free(scores);
  return 0;
}
