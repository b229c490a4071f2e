// Sweep, Hessian and OBQ against loops in double precision that are obviously right.
#include <cmath>
#include <vector>

#include "check.h"
#include "lightgptq.h"

namespace {

struct Problem {
  int64_t rows, cols, groups;
  int32_t max_code;
  std::vector<float> w, u, scales;
  std::vector<int32_t> zeros, group;

  Problem(int64_t r, int64_t c, int32_t max) : rows(r), cols(c), groups(c < 3 ? c : 3), max_code(max) {
    Random random(static_cast<uint64_t>(r * 1000 + c));
    w.resize(static_cast<size_t>(rows * cols));
    for (float &v : w) v = random.normal();
    u.assign(static_cast<size_t>(cols * cols), 0.0f);
    for (int64_t i = 0; i < cols; ++i)
      for (int64_t j = i; j < cols; ++j)
        u[i * cols + j] = i == j ? 1.0f + 0.1f * std::fabs(random.normal()) : random.normal() / std::sqrt(2.0f * cols);
    scales.resize(static_cast<size_t>(groups * rows));
    for (float &v : scales) v = (random.below(2) ? 1.0f : -1.0f) * (3.0f + 0.1f * random.below(9)) / max;
    zeros.resize(static_cast<size_t>(groups * rows));
    for (int32_t &v : zeros) v = static_cast<int32_t>(random.below(max + 1));
    group.resize(static_cast<size_t>(cols));
    for (int32_t &v : group) v = static_cast<int32_t>(random.below(groups));
  }

  // Level in steps from zero that w rounds to.
  double level(double value, int64_t row, int64_t column) const {
    const double scale = scales[group[column] * rows + row], zero = zeros[group[column] * rows + row];
    return std::fmin(std::fmax(std::nearbyint(value / scale), -zero), max_code - zero);
  }
  double scale(int64_t row, int64_t column) const { return scales[group[column] * rows + row]; }
  int32_t zero(int64_t row, int64_t column) const { return zeros[group[column] * rows + row]; }
};

// (U_BB^T U_BB)^-1 of every window, one after the other.
std::vector<float> window_curvatures(const Problem &p) {
  std::vector<float> all;
  for (int64_t b = 0, e = 0; e < p.cols; b += LGQ_KEPT) {
    e = b + LGQ_WINDOW < p.cols ? b + LGQ_WINDOW : p.cols;
    const int64_t n = e - b;
    std::vector<double> inverse(static_cast<size_t>(n * n), 0.0);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = j; i >= 0; --i) {
        double sum = i == j ? 1.0 : 0.0;
        for (int64_t k = i + 1; k <= j; ++k) sum -= p.u[(b + i) * p.cols + b + k] * inverse[k * n + j];
        inverse[i * n + j] = sum / p.u[(b + i) * p.cols + b + i];
      }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t k = i > j ? i : j; k < n; ++k) sum += inverse[i * n + k] * inverse[j * n + k];
        all.push_back(static_cast<float>(sum));
      }
  }
  return all;
}

// Follows the codes that the library chose: without descent each must be the nearest to what the errors before it left,
// within 1e-3 of a step, and the errors and the loss must follow from them in any case. Returns the loss of all rows.
double check_sweep(const Problem &p, bool want_errors, int32_t cycles) {
  const std::vector<float> curvatures = cycles > 0 ? window_curvatures(p) : std::vector<float>();
  double total = 0;
  std::vector<uint8_t> codes(p.w.size());
  std::vector<float> err(want_errors ? p.w.size() : 0);
  std::vector<double> loss(static_cast<size_t>(p.rows));
  CHECK(lgq_gptq_sweep(p.w.data(), p.cols, p.u.data(), p.cols, p.rows, p.cols, p.scales.data(), p.zeros.data(),
                       p.groups, p.group.data(), p.max_code, cycles, cycles > 0 ? curvatures.data() : nullptr, codes.data(),
                       p.cols, want_errors ? err.data() : nullptr, p.cols, loss.data()) == LGQ_OK);
  std::vector<double> w(static_cast<size_t>(p.cols));
  for (int64_t r = 0; r < p.rows; ++r) {
    double sum = 0;
    for (int64_t j = 0; j < p.cols; ++j) w[j] = p.w[r * p.cols + j];
    for (int64_t j = 0; j < p.cols; ++j) {
      const double level = codes[r * p.cols + j] - p.zero(r, j), step = p.scale(r, j);
      CHECK(codes[r * p.cols + j] <= p.max_code);
      CHECK(cycles > 0 || std::fabs(w[j] / step - level) <= std::fabs(w[j] / step - p.level(w[j], r, j)) + 1e-3);
      const double e = (w[j] - level * step) / p.u[j * p.cols + j];
      if (want_errors) CHECK(std::fabs(err[r * p.cols + j] - e) < 1e-3 * (1 + std::fabs(e)));
      for (int64_t k = j + 1; k < p.cols; ++k) w[k] -= e * p.u[j * p.cols + k];
      sum += e * e;
    }
    CHECK(std::fabs(loss[r] - sum) <= 1e-3 * sum + 1e-9);
    total += sum;
  }
  return total;
}

void check_gram(int64_t tokens, int64_t cols, bool bf16) {
  Random random(static_cast<uint64_t>(tokens * 7 + cols));
  std::vector<float> x(static_cast<size_t>(tokens * cols)), h(static_cast<size_t>(cols * cols), 1.0f);
  std::vector<uint16_t> half(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    half[i] = static_cast<uint16_t>(0x3f80 + random.below(128));  // 1 to 2
    x[i] = 1.0f + static_cast<float>(half[i] - 0x3f80) / 128;
  }
  const void *data = bf16 ? static_cast<const void *>(half.data()) : x.data();
  CHECK(lgq_add_gram(h.data(), cols, data, cols, tokens, cols, bf16 ? LGQ_BF16 : LGQ_F32) == LGQ_OK);
  for (int64_t i = 0; i < cols; ++i)
    for (int64_t j = i; j < cols; ++j) {
      double sum = 1;
      for (int64_t t = 0; t < tokens; ++t) sum += static_cast<double>(x[t * cols + i]) * x[t * cols + j];
      CHECK(std::fabs(h[i * cols + j] - sum) <= 1e-5 * sum);
    }
}

void check_product(int64_t tokens, int64_t cols, bool bf16) {
  Random random(static_cast<uint64_t>(tokens * 5 + cols));
  const int64_t ld = cols + 3;
  std::vector<float> x(static_cast<size_t>(tokens * ld)), y(x.size()), m(static_cast<size_t>(cols * cols), 1.0f);
  std::vector<uint16_t> half_x(x.size()), half_y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    half_x[i] = static_cast<uint16_t>(0x3f80 + random.below(128));  // 1 to 2
    half_y[i] = static_cast<uint16_t>(0x3f80 + random.below(128));
    x[i] = 1.0f + static_cast<float>(half_x[i] - 0x3f80) / 128;
    y[i] = 1.0f + static_cast<float>(half_y[i] - 0x3f80) / 128;
  }
  const void *left = bf16 ? static_cast<const void *>(half_y.data()) : y.data();
  const void *right = bf16 ? static_cast<const void *>(half_x.data()) : x.data();
  CHECK(lgq_add_product(m.data(), cols, left, ld, right, ld, tokens, cols, bf16 ? LGQ_BF16 : LGQ_F32) == LGQ_OK);
  for (int64_t i = 0; i < cols; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 1;
      for (int64_t t = 0; t < tokens; ++t) sum += static_cast<double>(y[t * ld + i]) * x[t * ld + j];
      CHECK(std::fabs(m[i * cols + j] - sum) <= 1e-5 * sum);
    }
}

// Loss of every row in double precision.
std::vector<double> losses(const Problem &p, const std::vector<double> &h, const std::vector<uint8_t> &codes) {
  std::vector<double> loss(static_cast<size_t>(p.rows), 0.0), d(static_cast<size_t>(p.cols));
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t j = 0; j < p.cols; ++j)
      d[j] = p.w[r * p.cols + j] - (codes[r * p.cols + j] - p.zero(r, j)) * p.scale(r, j);
    for (int64_t i = 0; i < p.cols; ++i)
      for (int64_t j = 0; j < p.cols; ++j) loss[r] += d[i] * h[i * p.cols + j] * d[j];
  }
  return loss;
}

// What every row is said to have gained, it has; with H = I + v v^T, where a block's U is that of its own Cholesky factor.
void check_refine(Problem p, int64_t width, int32_t scales_move, int32_t cycles) {
  for (int64_t j = 0; j < p.cols; ++j) p.group[j] = static_cast<int32_t>(j / width);
  p.groups = (p.cols + width - 1) / width;
  p.scales.assign(static_cast<size_t>(p.groups * p.rows), 2.0f / static_cast<float>(p.max_code));
  p.zeros.assign(static_cast<size_t>(p.groups * p.rows), (p.max_code + 1) / 2);
  Random random(11);
  std::vector<double> h(static_cast<size_t>(p.cols * p.cols)), v(static_cast<size_t>(p.cols));
  for (double &x : v) x = random.normal();
  for (int64_t i = 0; i < p.cols; ++i)
    for (int64_t j = 0; j < p.cols; ++j) h[i * p.cols + j] = v[i] * v[j] + (i == j ? 1.0 : 0.0);
  std::vector<int32_t> order;
  std::vector<int64_t> first = {0};
  std::vector<float> u, float_h(h.begin(), h.end());
  for (int64_t begin = 0; begin < p.cols; begin += width) {
    const int64_t n = begin + width < p.cols ? width : p.cols - begin;
    for (int64_t j = n; j-- > 0;) order.push_back(static_cast<int32_t>(begin + j));  // from the last to the first
    first.push_back(begin + n);
    // H_BB = I + v v^T has the inverse I - v v^T / (1 + v v); its upper Cholesky factor, U^T U, row by row
    std::vector<double> inverse(static_cast<size_t>(n * n));
    double norm = 1;
    for (int64_t j = 0; j < n; ++j) norm += v[begin + j] * v[begin + j];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        inverse[i * n + j] = (i == j ? 1.0 : 0.0) - v[order[begin + i]] * v[order[begin + j]] / norm;
    for (int64_t i = 0; i < n; ++i) {
      const double pivot = std::sqrt(inverse[i * n + i]);
      for (int64_t j = 0; j < n; ++j) u.push_back(j < i ? 0.0f : static_cast<float>(inverse[i * n + j] / pivot));
      for (int64_t k = i + 1; k < n; ++k)
        for (int64_t j = i + 1; j < n; ++j)
          inverse[k * n + j] -= inverse[i * n + k] * inverse[i * n + j] / (pivot * pivot);
    }
  }
  std::vector<uint8_t> codes(p.w.size());
  for (uint8_t &code : codes) code = static_cast<uint8_t>(random.below(p.max_code + 1));
  std::vector<double> gained(static_cast<size_t>(p.rows), 0.0);
  const std::vector<double> before = losses(p, h, codes);
  CHECK(lgq_refine(p.w.data(), p.cols, float_h.data(), p.cols, p.rows, p.cols, order.data(), first.data(),
                   static_cast<int64_t>(first.size()) - 1, u.data(), p.group.data(), p.groups, scales_move, p.max_code,
                   cycles, p.scales.data(), p.zeros.data(), codes.data(), p.cols, gained.data()) == LGQ_OK);
  const std::vector<double> after = losses(p, h, codes);
  for (int64_t r = 0; r < p.rows; ++r) {
    CHECK(gained[r] >= 0.0);
    CHECK(std::fabs(before[r] - after[r] - gained[r]) <= 1e-4 * before[r]);
    CHECK(p.cols < 4 || after[r] < 0.9 * before[r]);  // random codes are far from the best ones
  }
}

// The loss is that of the codes: (w - q) H (w - q)^T with H = diagonal, where the order does not matter.
void check_obq(const Problem &p) {
  std::vector<double> inverse(static_cast<size_t>(p.cols * p.cols), 0.0), loss(static_cast<size_t>(p.rows));
  std::vector<uint8_t> codes(p.w.size());
  for (int64_t i = 0; i < p.cols; ++i) inverse[i * p.cols + i] = 1.0 + i % 5;
  CHECK(lgq_obq(p.w.data(), inverse.data(), p.rows, p.cols, p.scales.data(), p.zeros.data(), p.groups, p.group.data(),
                p.max_code, codes.data(), loss.data()) == LGQ_OK);
  for (int64_t r = 0; r < p.rows; ++r) {
    double sum = 0;
    for (int64_t j = 0; j < p.cols; ++j) {
      const double w = p.w[r * p.cols + j], level = p.level(w, r, j), e = w - level * p.scale(r, j);
      CHECK(codes[r * p.cols + j] == level + p.zero(r, j));
      sum += e * e / inverse[j * p.cols + j];
    }
    CHECK(std::fabs(loss[r] - sum) <= 1e-9 * (1 + sum));
  }
}

void check_refusals() {
  Problem p(4, 6, 15);
  std::vector<uint8_t> codes(24);
  std::vector<double> loss(4), inverse(36);
  std::vector<float> h(36);
  auto sweep = [&](const float *w, int64_t ldw, int64_t rows, int64_t groups, int32_t max_code) {
    return lgq_gptq_sweep(w, ldw, p.u.data(), 6, rows, 6, p.scales.data(), p.zeros.data(), groups, p.group.data(),
                          max_code, 0, nullptr, codes.data(), 6, nullptr, 0, loss.data());
  };
  CHECK(sweep(nullptr, 6, 4, 3, 15) == LGQ_NULL_POINTER);
  CHECK(sweep(p.w.data(), 5, 4, 3, 15) == LGQ_BAD_SIZE);
  CHECK(sweep(p.w.data(), 6, 0, 3, 15) == LGQ_BAD_SIZE);
  CHECK(sweep(p.w.data(), 6, -4, 3, 15) == LGQ_BAD_SIZE);
  CHECK(sweep(p.w.data(), 6, int64_t{1} << 40, 3, 15) == LGQ_BAD_SIZE);
  CHECK(sweep(p.w.data(), 6, 4, 3, 0) == LGQ_BAD_VALUE);
  CHECK(sweep(p.w.data(), 6, 4, 3, 256) == LGQ_BAD_VALUE);
  for (const int32_t cycles : {-1, 1})  // the second without a curvature
    CHECK(lgq_gptq_sweep(p.w.data(), 6, p.u.data(), 6, 4, 6, p.scales.data(), p.zeros.data(), 3, p.group.data(), 15, cycles,
                         nullptr, codes.data(), 6, nullptr, 0, loss.data()) ==
          (cycles < 0 ? LGQ_BAD_VALUE : LGQ_NULL_POINTER));
  p.group[5] = 3;
  CHECK(sweep(p.w.data(), 6, 4, 3, 15) == LGQ_BAD_GROUP);
  CHECK(lgq_obq(p.w.data(), inverse.data(), 4, 6, p.scales.data(), p.zeros.data(), 3, p.group.data(), 15,
                codes.data(), loss.data()) == LGQ_BAD_GROUP);
  p.group[5] = -1;
  CHECK(sweep(p.w.data(), 6, 4, 3, 15) == LGQ_BAD_GROUP);
  CHECK(lgq_obq(p.w.data(), nullptr, 4, 6, p.scales.data(), p.zeros.data(), 3, p.group.data(), 15, codes.data(),
                loss.data()) == LGQ_NULL_POINTER);
  CHECK(lgq_add_gram(h.data(), 6, nullptr, 6, 4, 6, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_add_gram(h.data(), 6, p.w.data(), 6, 4, 6, LGQ_F16) == LGQ_BAD_DTYPE);
  CHECK(lgq_add_gram(h.data(), 5, p.w.data(), 6, 4, 6, LGQ_F32) == LGQ_BAD_SIZE);
  CHECK(lgq_add_gram(h.data(), 6, p.w.data(), 6, 0, 6, LGQ_F32) == LGQ_BAD_SIZE);
  CHECK(lgq_add_product(h.data(), 6, nullptr, 6, p.w.data(), 6, 4, 6, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_add_product(h.data(), 6, p.w.data(), 6, p.w.data(), 6, 4, 6, LGQ_F16) == LGQ_BAD_DTYPE);
  CHECK(lgq_add_product(h.data(), 6, p.w.data(), 5, p.w.data(), 6, 4, 6, LGQ_F32) == LGQ_BAD_SIZE);
}

}  // namespace

void test_solver() {
  const int64_t sizes[][2] = {{1, 1}, {5, 3}, {33, 13}, {17, 97}, {3, 193}, {70, 172}, {530, 40}};
  for (const auto &size : sizes)
    for (const int32_t max_code : {3, 15, 255}) {
      const Problem p(size[0], size[1], max_code);
      const double plain = check_sweep(p, true, 0);
      check_sweep(p, false, 0);
      CHECK(check_sweep(p, true, 3) <= plain * (1 + 1e-3));
      if (size[0] < 100) check_obq(p);
      for (const int64_t width : {1, 13, 64, 193})
        for (const int32_t scales_move : {0, 1, 2}) check_refine(p, width, scales_move, scales_move == 1 ? 0 : 2);
    }
  for (const int64_t tokens : {1, 7, 513})
    for (const int64_t cols : {1, 5, 33, 200})
      for (const bool bf16 : {false, true}) {
        check_gram(tokens, cols, bf16);
        check_product(tokens, cols, bf16);
      }
  check_refusals();
}
