#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "lightgptq.h"
#include "parallel.h"
#if defined(LGQ_X86)
#include <cpuid.h>
#elif defined(LGQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(LGQ_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lgq {
namespace {

constexpr const char *kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "neon"};

#if defined(LGQ_X86)
struct CpuBits {
  bool avx2, avx512, avx512_bf16, intel;

  // Asks the processor itself: not every compiler's __builtin_cpu_supports does (Zig 0.17 always says no).
  CpuBits() : avx2(false), avx512(false), avx512_bf16(false), intel(false) {
    unsigned a, b, c, d, a71 = 0, b7 = 0, c7 = 0, low = 0, high;
    if (__get_cpuid(0, &a, &b, &c, &d)) intel = b == 0x756e6547;  // "Genu"
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    // which registers the operating system saves
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool fma_avx_f16c = (c >> 12 & 1) && (c >> 28 & 1) && (c >> 29 & 1);
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return;
    const unsigned subleaves = a;
    if (subleaves >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    avx2 = fma_avx_f16c && (b7 >> 5 & 1) && (low & 0x6) == 0x6;
    const bool f_dq_bw_vl = (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);
    const bool vnni = c7 >> 11 & 1, bf16 = a71 >> 5 & 1;
    avx512 = avx2 && f_dq_bw_vl && vnni && (low & 0xe6) == 0xe6;
    avx512_bf16 = avx512 && bf16;
  }
};
#elif defined(LGQ_ARM64)
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP of Linux's interface
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#elif defined(__APPLE__)
  int32_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value == 1;
#else
  return false;
#endif
}
#endif

bool cpu_has(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(LGQ_X86)
    case Isa::avx2:
      return CpuBits().avx2;
    case Isa::avx512:
#if defined(LGQ_EMULATE_AVX512)
      return CpuBits().avx2;
#else
      return CpuBits().avx512;
#endif
    case Isa::avx512_bf16:
#if defined(LGQ_EMULATE_AVX512)
      return CpuBits().avx2;
#else
      return CpuBits().avx512_bf16;
#endif
#elif defined(LGQ_ARM64)
    case Isa::neon:
      return has_dot_product();
#endif
    default:
      return false;
  }
}

// The fastest of them; on Intel's processors that is not the one with bf16 dot products, see matmul_avx512_bf16.cpp.
Isa best_isa() {
  Isa best = Isa::portable;
#if defined(LGQ_X86)
  if (CpuBits().intel && CpuBits().avx512) return Isa::avx512;
#endif
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon})
    if (cpu_has(isa)) best = isa;
  return best;
}

std::atomic<Isa> g_isa{Isa::portable};

}  // namespace

Isa active_isa() { return g_isa.load(std::memory_order_relaxed); }

}  // namespace lgq

using lgq::Isa;

int32_t lgq_abi_version(void) { return LGQ_ABI_VERSION; }

int32_t lgq_init(const char *name) {
  if (name == nullptr || name[0] == '\0') {
    lgq::g_isa = lgq::best_isa();
    return LGQ_OK;
  }
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (std::strcmp(name, lgq::kNames[static_cast<int>(isa)]) != 0) continue;
    if (!lgq::cpu_has(isa)) return LGQ_UNSUPPORTED_ISA;
    lgq::g_isa = isa;
    return LGQ_OK;
  }
  return LGQ_UNKNOWN_ISA;
}

const char *lgq_isa(void) { return lgq::kNames[static_cast<int>(lgq::active_isa())]; }

const char *lgq_isa_list(void) {
  static char list[64] = "";
  static const bool built = [] {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
      if (!lgq::cpu_has(isa)) continue;
      if (list[0] != '\0') std::strcat(list, ",");
      std::strcat(list, lgq::kNames[static_cast<int>(isa)]);
    }
    return true;
  }();
  (void)built;
  return list;
}

int32_t lgq_num_threads(void) { return lgq::max_threads(); }
