/*
 * Does this x86 CPU have a feature? A feature is bit `bit` of register `word` (0 eax ... 3 edx) of CPUID leaf `leaf`,
 * subleaf `subleaf`; `os_state` are the XCR0 bits of the register state that the operating system must save for it.
 */
#include <cpuid.h>

#include "internal.h"

#define OSXSAVE_BIT 27 /* leaf 1, ecx: XGETBV exists and the system uses XSAVE */

static uint32_t saved_state(void) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !((ecx >> OSXSAVE_BIT) & 1)) return 0;
  /* The instruction's bytes, since the baseline that this file is compiled for may not know its name. */
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(eax), "=d"(edx) : "c"(0)); /* xgetbv */
  return eax;
}

int hq_cpu_has(const hq_feature *feature) {
  unsigned words[4];
  if (!__get_cpuid_count(feature->leaf, feature->subleaf, &words[0], &words[1], &words[2], &words[3])) return 0;
  if (!((words[feature->word] >> feature->bit) & 1)) return 0;
  return feature->os_state == 0 || (saved_state() & feature->os_state) == feature->os_state;
}
