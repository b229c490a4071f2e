// Runs everything on every instruction set that this machine has. Meant to be built with sanitizers: all buffers have
// exactly the size that the interface promises to stay within.
#include <cstring>
#include <string>

#include "check.h"
#include "lightgptq.h"

int main() {
  CHECK(lgq_init("") == LGQ_OK);
  CHECK(lgq_init("mmx") == LGQ_UNKNOWN_ISA);
  std::string names = std::string(lgq_isa_list()) + ",";
  for (size_t at; (at = names.find(',')) != std::string::npos; names.erase(0, at + 1)) {
    const std::string name = names.substr(0, at);
    CHECK(lgq_init(name.c_str()) == LGQ_OK);
    CHECK(name == lgq_isa());
    test_attention();
    test_solver();
    test_matmul();
    test_gated_mlp();
    test_hostile();
    std::printf("%s: ok\n", name.c_str());
  }
}
