// A gated MLP in one call against its three products and a gate in double precision, and rotation against its formula.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "convert.h"
#include "lightgptq.h"

namespace {

constexpr int32_t kDtypes[] = {LGQ_F32, LGQ_BF16, LGQ_F16};
constexpr double kHalfStep[] = {0x1p-24, 0x1p-8, 0x1p-11};

int64_t size_of(int32_t dtype) { return dtype == LGQ_F32 ? 4 : 2; }

// Numbers in one of the three formats, as many bytes as they take and no more.
std::vector<uint8_t> normal(int64_t count, int32_t dtype, Random &random) {
  std::vector<uint8_t> numbers(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t i = 0; i < count; ++i) lgq::store_float(numbers.data(), dtype, i, random.normal());
  return numbers;
}

struct Layer {
  lgq_factor factor{};
  void *memory = nullptr;
  std::vector<float> bias;

  Layer(int64_t in, int64_t out, bool biased, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> qweight((in * 4 + 31) / 32 * out), qzeros((out * 4 + 31) / 32, 0x77777777), g_idx(in, 0);
    for (int32_t &word : qweight) word = static_cast<int32_t>(random.bits());
    std::vector<uint16_t> scales(out);
    for (uint16_t &scale : scales) scale = lgq::float_to_half(0.02f + 0.0001f * static_cast<float>(random.below(100)));
    int64_t bytes = 0;
    CHECK(lgq_packed_bytes(in, out, 1, 4, g_idx.data(), &bytes) == LGQ_OK);
    CHECK(posix_memalign(&memory, 64, static_cast<size_t>(bytes)) == 0);
    CHECK(lgq_pack(in, out, 1, 4, 1, qweight.data(), qzeros.data(), scales.data(), g_idx.data(), memory, bytes) == LGQ_OK);
    for (int64_t o = 0; biased && o < out; ++o) bias.push_back(random.normal());
    factor = {memory, bytes, biased ? bias.data() : nullptr, LGQ_F32};
  }
  Layer(const Layer &) = delete;
  ~Layer() { std::free(memory); }
};

std::vector<uint8_t> product(const Layer &layer, const std::vector<uint8_t> &x, int64_t rows, int64_t in, int64_t out,
                             int32_t dtype, int32_t mode) {
  std::vector<uint8_t> y(static_cast<size_t>(rows * out * size_of(dtype)));
  const lgq_factor &f = layer.factor;
  CHECK(lgq_matmul(f.packed, f.packed_bytes, rows, x.data(), in, f.bias, f.bias_dtype, y.data(), out, dtype, mode) == LGQ_OK);
  return y;
}

double activation_of(double x, int32_t activation) {
  if (activation == LGQ_SILU) return x / (1 + std::exp(-x));
  const double z = std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * z));
}

void check_mlp(int64_t rows, int64_t in, int64_t width, int64_t out, bool biased, int32_t activation, int32_t dtype,
               int32_t mode) {
  Random random(static_cast<uint64_t>(rows * 100 + width + dtype));
  const Layer gate(in, width, biased, 1), up(in, width, biased, 2), down(width, out, biased, 3);
  const std::vector<uint8_t> x = normal(rows * in, dtype, random);
  const lgq_factor factors[3] = {gate.factor, up.factor, down.factor};
  std::vector<uint8_t> y(static_cast<size_t>(rows * out * size_of(dtype)));
  CHECK(lgq_gated_mlp(factors, activation, rows, x.data(), in, y.data(), dtype, mode) == LGQ_OK);
  std::vector<uint8_t> g = product(gate, x, rows, in, width, dtype, mode);
  const std::vector<uint8_t> u = product(up, x, rows, in, width, dtype, mode);
  // Each number between the products must be right, which only the last product shows: its gradient is the weight's.
  std::vector<double> wrong(static_cast<size_t>(rows * width));
  for (int64_t i = 0; i < rows * width; ++i) {
    const double exact = activation_of(lgq::load_float(g.data(), dtype, i), activation) * lgq::load_float(u.data(), dtype, i);
    wrong[i] = (kHalfStep[dtype] * 1.01 + 64 * 0x1p-24) * std::fabs(exact) + 0x1p-25;
    lgq::store_float(g.data(), dtype, i, static_cast<float>(exact));
  }
  std::vector<float> weight(static_cast<size_t>(width * out));
  CHECK(lgq_dequantize(down.factor.packed, down.factor.packed_bytes, weight.data(), LGQ_F32) == LGQ_OK);
  const std::vector<uint8_t> expected = product(down, g, rows, width, out, dtype, mode);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o) {
      double allowed = 0, size = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double w = std::fabs(weight[o * width + i]);
        allowed += w * wrong[r * width + i];
        size += w * std::fabs(lgq::load_float(g.data(), dtype, r * width + i));
      }
      const double want = lgq::load_float(expected.data(), dtype, r * out + o);
      // In 8 bits a number on the boundary between two may fall to either.
      allowed += 2.02 * kHalfStep[dtype] * std::fabs(want) + (mode == LGQ_INT8 ? 2.0 / 127 : 0x1p-20) * size + 1e-7;
      CHECK(std::fabs(lgq::load_float(y.data(), dtype, r * out + o) - want) <= allowed);
    }
}

void check_rotation(int64_t batch, int64_t heads, int64_t dim, bool shared, int32_t dtype) {
  Random random(static_cast<uint64_t>(heads * dim));
  const std::vector<uint8_t> x = normal(batch * heads * dim, dtype, random);
  const std::vector<uint8_t> cos = normal((shared ? 1 : batch) * dim, dtype, random);
  const std::vector<uint8_t> sin = normal((shared ? 1 : batch) * dim, dtype, random);
  std::vector<uint8_t> y(x.size());
  CHECK(lgq_rotate(x.data(), batch, heads, dim, cos.data(), sin.data(), shared ? 0 : dim, y.data(), dtype) == LGQ_OK);
  for (int64_t i = 0; i < batch * heads; ++i)
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t at = i * dim + d, turn = (shared ? 0 : i / heads * dim) + d;
      const double other = d < dim / 2 ? -lgq::load_float(x.data(), dtype, at + dim / 2)
                                       : lgq::load_float(x.data(), dtype, at - dim / 2);
      const double a = static_cast<double>(lgq::load_float(x.data(), dtype, at)) * lgq::load_float(cos.data(), dtype, turn);
      const double b = other * lgq::load_float(sin.data(), dtype, turn);
      const double allowed = 1.01 * kHalfStep[dtype] * (std::fabs(a) + std::fabs(b) + std::fabs(a + b)) + 1e-7;
      CHECK(std::fabs(lgq::load_float(y.data(), dtype, at) - (a + b)) <= allowed);
    }
}

}  // namespace

void test_gated_mlp() {
  for (const int32_t dtype : kDtypes) {
    for (const int32_t activation : {LGQ_SILU, LGQ_GELU_TANH})
      for (const int32_t mode : {LGQ_EXACT, LGQ_INT8}) {
        check_mlp(1, 32, 64, 32, false, activation, dtype, mode);
        check_mlp(3, 44, 77, 9, true, activation, dtype, mode);
      }
    check_mlp(LGQ_MOST_GATED_ROWS, 32, 600, 8, false, LGQ_SILU, dtype, LGQ_EXACT);  // the gate on threads
    check_rotation(1, 32, 64, true, dtype);
    check_rotation(3, 2, 2, false, dtype);
    check_rotation(2, 1, 250, true, dtype);
  }
}
