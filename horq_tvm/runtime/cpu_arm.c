/*
 * Does this ARM CPU have a feature? The kernel says so in the auxiliary vector: bit `bit` of AT_HWCAP (`word` 0) or
 * AT_HWCAP2 (`word` 1). The bits mean other things to a process of other than `leaf` bits.
 */
#include <sys/auxv.h>

#include "internal.h"

#ifndef AT_HWCAP2
#define AT_HWCAP2 26
#endif

int hq_cpu_has(const hq_feature *feature) {
  if (feature->leaf != 8 * sizeof(void *)) return 0;
  return (int)((getauxval(feature->word ? AT_HWCAP2 : AT_HWCAP) >> feature->bit) & 1);
}
