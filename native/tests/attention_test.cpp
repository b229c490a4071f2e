// Attention of one query token against loops in double precision that are obviously right.
#include <cmath>
#include <vector>

#include "check.h"
#include "lightgptq.h"

namespace {

constexpr double kHalfStep[] = {0x1p-24, 0x1p-8, 0x1p-11};  // of each lgq_dtype

// Random numbers in one of the three formats, and the same as floats.
struct Numbers {
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Numbers(int64_t count, int32_t dtype, Random &random) {
    for (int64_t i = 0; i < count; ++i) {
      const float f = random.normal();
      if (dtype == LGQ_F32) {
        floats.push_back(f);
        continue;
      }
      // Seven bits of a fraction fit both formats: (-1)^s (1 + m / 128) / 2, times 2^-e.
      const int64_t m = random.below(128), e = random.below(3);
      const uint32_t sign = f < 0 ? 0x8000u : 0u;
      floats.push_back(static_cast<float>(std::ldexp(1.0 + m / 128.0, static_cast<int>(-1 - e)) * (f < 0 ? -1 : 1)));
      halves.push_back(static_cast<uint16_t>(sign | (dtype == LGQ_BF16 ? (126 - e) << 7 | m : (14 - e) << 10 | m << 3)));
    }
  }
  const void *data() const { return halves.empty() ? static_cast<const void *>(floats.data()) : halves.data(); }
};

double value(const std::vector<uint8_t> &y, int32_t dtype, int64_t i) {
  if (dtype == LGQ_F32) return reinterpret_cast<const float *>(y.data())[i];
  const uint32_t h = reinterpret_cast<const uint16_t *>(y.data())[i];
  const int width = dtype == LGQ_BF16 ? 7 : 10, bias = dtype == LGQ_BF16 ? 127 : 15;
  const int exponent = static_cast<int>(h >> width & (dtype == LGQ_BF16 ? 255u : 31u));
  const double fraction = (h & ((1u << width) - 1)) / std::ldexp(1.0, width);
  return std::ldexp((exponent > 0) + fraction, (exponent > 0 ? exponent : 1) - bias) * (h >> 15 ? -1 : 1);
}

void check_attention(int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int32_t dtype) {
  Random random(static_cast<uint64_t>(heads * 1000 + tokens * 10 + dim + dtype));
  // A cache that is longer than what is read of it, and of which k is half of each row.
  const int64_t row = 2 * dim, head = (tokens + 3) * row, sequence = kv_heads * head;
  const int64_t last = (batch - 1) * sequence + (kv_heads - 1) * head + (tokens - 1) * row + dim;
  const Numbers q(batch * heads * dim, dtype, random), k(last, dtype, random);
  const Numbers v(batch * kv_heads * tokens * dim, dtype, random);  // tokens before heads
  std::vector<uint8_t> y(static_cast<size_t>(batch * heads * dim * (dtype == LGQ_F32 ? 4 : 2)));
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  CHECK(lgq_attend(q.data(), k.data(), sequence, head, row, v.data(), kv_heads * tokens * dim, dim, kv_heads * dim,
                   batch, heads, kv_heads, tokens, dim, scale, y.data(), dtype) == LGQ_OK);
  std::vector<double> weight(static_cast<size_t>(tokens));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from = h / (heads / kv_heads), at = (b * heads + h) * dim;
      double largest = -INFINITY, widest = 0, all = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        double sum = 0, size = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double key = k.floats[b * sequence + from * head + t * row + d], term = key * scale * q.floats[at + d];
          sum += term;
          size += std::fabs(term);
        }
        weight[t] = sum;
        largest = std::fmax(largest, sum);
        widest = std::fmax(widest, size);
      }
      for (double &w : weight) all += w = std::exp(w - largest);
      // Roundings of a score move its weight; those of the weights, their sum and the sum of values come to it.
      const double steps = 2 * (dim + 2) * widest + 2 * tokens + 16;
      for (int64_t d = 0; d < dim; ++d) {
        double sum = 0, size = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          const double term = weight[t] / all * v.floats[((b * tokens + t) * kv_heads + from) * dim + d];
          sum += term;
          size += std::fabs(term);
        }
        const double allowed = steps * 0x1p-24 * size + kHalfStep[dtype] * std::fabs(sum) * 1.01 + 1e-7;
        CHECK(std::fabs(value(y, dtype, at + d) - sum) <= allowed);
      }
    }
}

// Two heads, 70 tokens: one block and a part of the next.
std::vector<float> attend(std::vector<float> q, const std::vector<float> &k, const std::vector<float> &v) {
  std::vector<float> y(8);
  CHECK(lgq_attend(q.data(), k.data(), 0, 0, 4, v.data(), 0, 0, 4, 1, 2, 1, 70, 4, 1.0f, y.data(), LGQ_F32) == LGQ_OK);
  return y;
}

void check_special_values() {
  const std::vector<float> q = {1, 0, 0, 0, 1, 1, 0, 0}, v(280, 3.0f);
  for (const int64_t token : {0, 65}) {
    std::vector<float> k(280, 0.5f);
    k[token * 4 + 1] = NAN;  // 0 * NaN is one as well
    for (const float f : attend(q, k, v)) CHECK(std::isnan(f));
    k[token * 4 + 1] = 0.5f;
    k[token * 4] = INFINITY;
    for (const float f : attend(q, k, v)) CHECK(std::isnan(f));
    k[token * 4] = -INFINITY;  // weight 0
    for (const float f : attend(q, k, v)) CHECK(std::fabs(f - 3.0f) < 1e-5f);
  }
  std::vector<float> hidden(280, 0.5f);
  for (int64_t t = 0; t < 66; ++t) hidden[t * 4] = -INFINITY;  // a whole block without weight
  for (const float f : attend(q, hidden, v)) CHECK(std::fabs(f - 3.0f) < 1e-5f);
  for (int64_t t = 66; t < 70; ++t) hidden[t * 4] = -INFINITY;
  for (const float f : attend(q, hidden, v)) CHECK(std::isnan(f));
  std::vector<float> rising(280, 0.0f), values(280, 0.0f);  // each token outweighs all before it
  for (int64_t t = 0; t < 70; ++t) rising[t * 4] = 100.0f * static_cast<float>(t - 60);
  for (int64_t d = 0; d < 4; ++d) values[69 * 4 + d] = 7.0f;
  for (const float f : attend(q, rising, values)) CHECK(f == 7.0f);
}

// Of two tokens' weights, 1 and e^-x, the second one's part.
void check_exponential() {
  const float q = 1.0f, v[2] = {0.0f, 1.0f};
  for (float x = 0.0f; x < 87.0f; x += 0.0217f) {
    const float k[2] = {0.0f, -x};
    float y = 0.0f;
    CHECK(lgq_attend(&q, k, 0, 0, 1, v, 0, 0, 1, 1, 1, 1, 2, 1, 1.0f, &y, LGQ_F32) == LGQ_OK);
    const double exact = std::exp(-static_cast<double>(x)) / (1 + std::exp(-static_cast<double>(x)));
    CHECK(std::fabs(y - exact) <= 6 * 0x1p-24 * exact);  // half units: four of the exponential, one of sum and quotient
  }
}

}  // namespace

void test_attention() {
  for (const int32_t dtype : {LGQ_F32, LGQ_BF16, LGQ_F16}) {
    for (const int64_t dim : {1, 4, 20, 64, 80, 127, 512}) check_attention(1, 4, 2, 21, dim, dtype);
    for (const int64_t tokens : {1, 2, 3, 63, 64, 65, 300}) check_attention(2, 8, 2, tokens, 64, dtype);
    for (const int64_t group : {1, 2, 3, 5, 6, 7, 8, 9, 17}) check_attention(1, 2 * group, 2, 37, 48, dtype);
    check_attention(3, 8, 8, 400, 64, dtype);  // on threads
  }
  check_special_values();
  check_exponential();
}
