#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "lightgptq.h"
#include "parallel.h"
#if defined(LGQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(LGQ_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lgq {
namespace {

constexpr const char *kNames[] = {"portable", "avx2", "avx512", "neon"};

#if defined(LGQ_ARM64)
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
    // These tests include the operating system's consent to save the wider registers.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#elif defined(LGQ_ARM64)
    case Isa::neon:
      return has_dot_product();
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  Isa best = Isa::portable;
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::neon})
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
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon}) {
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
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon}) {
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
