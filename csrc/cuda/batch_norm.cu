// Batch normalisation's forward: statistics in one pass over the map, then normalisation with residual, ReLU and 2×2 max-pool.
#include "../passes.h"
#include "batch_norm.h"

namespace fastconv {

// Of two groups of values as one (Chan, Golub & LeVeque, 1979). An infinity leaves a mean of ±∞ and no variance, as in torch.
template <class Float>
FASTCONV_DEVICE void add_moments(Float& count, Float& mean, Float& squares, Float other_count, Float other_mean, Float other_squares) {
  if (other_count == 0) return;
  const Float total = count + other_count, share = other_count / total, distance = other_mean - mean;
  mean += distance - distance == 0 ? distance * share : other_mean;
  squares += other_squares + distance * distance * count * share;
  count = total;
}

template <class T>
struct StatisticsParams {
  const T* x;
  float *rows, *mean, *var;  // rows: [run, (origin, mean as distance from it, squares), channel]
  Runs runs;
};

FASTCONV_DEVICE float finite_or_zero(float value) { return value - value == 0.0f ? value : 0.0f; }

// Each thread takes its pixels by Welford's update, as distances from its first one; threads of a block are put together in
// order, as distances from the first thread's mean. So digits are lost neither to a mean far from 0 nor to a far first value.
template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) statistics_kernel(const StatisticsParams<T> p) {
  const Runs& runs = p.runs;
  const int channel = channel_of<V>(runs);
  float count = 0.0f, pivot[V], mean[V], squares[V], sum[V];
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) pivot[i] = mean[i] = squares[i] = sum[i] = 0.0f;
  over_pixels<1, V>(runs, nullptr, [&](int pixel, float (&)[1][V]) {
    float x[V];
    load_values<T, V>(x, p.x + static_cast<int64_t>(pixel) * runs.channels + channel);
    if (count == 0.0f) {
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) pivot[i] = finite_or_zero(x[i]);
    }
    count += 1.0f;
    const float share = 1.0f / count;
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) {
      const float value = x[i] - pivot[i], distance = value - mean[i];
      mean[i] += distance * share;
      squares[i] += distance * (value - mean[i]);
      sum[i] += value;
    }
  });
  constexpr int kBytes = (1 + 3 * V) * 4;
  const uint32_t own = shared_memory() + threadIdx.x * kBytes;
  store_shared(own, count);
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) {
    store_shared(own + 4 + i * 12, pivot[i]);
    store_shared(own + 8 + i * 12, mean[i] == mean[i] ? mean[i] : sum[i]);  // of infinities
    store_shared(own + 12 + i * 12, squares[i]);
  }
  block_barrier();
  const int lines = kPassThreads / runs.lanes;
  for (int index = threadIdx.x; index < runs.lanes * V; index += kPassThreads) {
    const int to = blockIdx.x % runs.tiles * runs.lanes * V + index;
    if (to >= runs.channels) continue;
    const uint32_t first = shared_memory() + index / V * kBytes, values = 4 + index % V * 12;
    const float origin = finite_or_zero(load_shared<float>(first + values) + load_shared<float>(first + values + 4));
    float total = 0.0f, total_mean = 0.0f, total_squares = 0.0f;
    for (int line = 0; line < lines; ++line) {
      const uint32_t from = first + line * runs.lanes * kBytes;
      const float line_mean = load_shared<float>(from + values) - origin + load_shared<float>(from + values + 4);
      const float line_count = load_shared<float>(from), line_squares = load_shared<float>(from + values + 8);
      add_moments(total, total_mean, total_squares, line_count, line_mean, line_squares);
    }
    float* const row = p.rows + static_cast<int64_t>(blockIdx.x / runs.tiles) * 3 * runs.channels + to;
    store(row, origin);
    store(row + runs.channels, total_mean);
    store(row + 2 * runs.channels, total_squares);
  }
}

// All runs of a channel, in order.
template <class T>
__global__ void __launch_bounds__(kSumThreads) combine_statistics_kernel(const StatisticsParams<T> p) {
  const int channel = blockIdx.x * kSumThreads + threadIdx.x;
  if (channel >= p.runs.channels) return;
  double count = 0, mean = 0, squares = 0;
  for (int run = 0; run < p.runs.runs; ++run) {
    const float* const row = p.rows + static_cast<int64_t>(run) * 3 * p.runs.channels + channel;
    const double run_mean = static_cast<double>(load<float>(row)) + load<float>(row + p.runs.channels);
    const int left = p.runs.pixels - run * p.runs.run_pixels;
    const double pixels = left < p.runs.run_pixels ? left : p.runs.run_pixels;
    add_moments<double>(count, mean, squares, pixels, run_mean, load<float>(row + 2 * p.runs.channels));
  }
  if (count == 0) {
    store(p.mean + channel, 0.0f);
    store(p.var + channel, 0.0f);
    return;
  }
  store(p.mean + channel, static_cast<float>(mean));
  store(p.var + channel, static_cast<float>(squares / count));
}

template <class T>
struct NormaliseParams {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* code;
  Terms terms;
  Runs runs;  // over pixels of y
  int height, width, out_height, out_width;
  bool relu;
};

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) normalise_kernel(const NormaliseParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const auto normalise = Normalisation<V>::template of<T>(p.terms, channel, p.runs.channels);
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
    float y[V], residual[V];
    load_values<T, V>(y, p.x + offset);
    if (p.residual != nullptr) load_values<T, V>(residual, p.residual + offset);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) {
      y[i] = normalise(y[i], i);
      if (p.residual != nullptr) y[i] += residual[i];
      if (p.relu) y[i] = relu(y[i]);
    }
    store_values<T, V>(p.y + offset, y);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) normalise_pool_kernel(const NormaliseParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const auto normalise = Normalisation<V>::template of<T>(p.terms, channel, p.runs.channels);
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const Position at = Position::of(pixel, p.out_height, p.out_width);
    float best[V];
    int code[V];
    FASTCONV_UNROLL
    for (int member = 0; member < 4; ++member) {
      const int64_t from = pixel_of(at.n, 2 * at.row + member / 2, 2 * at.column + member % 2, p.height, p.width);
      const int64_t offset = from * p.runs.channels + channel;
      float y[V], residual[V];
      load_values<T, V>(y, p.x + offset);
      if (p.residual != nullptr) load_values<T, V>(residual, p.residual + offset);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) {
        y[i] = normalise(y[i], i);
        if (p.residual != nullptr) y[i] += residual[i];
        const bool wins = member == 0 || is_update(y[i], best[i]);
        best[i] = wins ? y[i] : best[i];
        code[i] = wins ? 1 + member : code[i];
      }
    }
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) {
      code[i] = best[i] <= 0.0f ? 0 : code[i];
      best[i] = relu(best[i]);
    }
    const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
    store_values<T, V>(p.y + offset, best);
    store_codes<uint8_t, V>(p.code + offset, code);
  });
}

// running = (1 − momentum) · running + momentum · factor · batch
template <class T>
struct UpdateParams {
  T* running;
  ChannelValues batch;
  int64_t stride;
  float momentum, factor;
  int channels;
};

template <class T>
__global__ void __launch_bounds__(kSumThreads) update_kernel(const UpdateParams<T> p) {
  const int channel = blockIdx.x * kSumThreads + threadIdx.x;
  if (channel >= p.channels) return;
  T* const running = p.running + channel * p.stride;
  const float moved = p.momentum * (p.factor * p.batch.template at<T>(channel, 0.0f));
  store(running, narrow<T>((1.0f - p.momentum) * widen(load_own<T>(running)) + moved));
}

void batch_norm_statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const Map map = map_of(x, "x");
  check_floats(mean, "mean", 1, map);
  check_floats(var, "var", 1, map);
  const Call call(x);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::T;
    StatisticsParams<T> p{call.read<T>(x), nullptr, call.write<float>(mean), call.write<float>(var), {}};
    by_vector<T>(map.channels, {p.x}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(map.pixels(), map.channels, V);
      const Tensor rows = scratch(x, {3 * p.runs.rows(), map.channels});
      p.rows = call.write<float>(rows);
      launch(call.stream(), statistics_kernel<T, V>, p.runs.blocks(), kPassThreads, kPassThreads * (1 + 3 * V) * 4, p);
      launch(call.stream(), combine_statistics_kernel<T>, ceil_div(map.channels, kSumThreads), kSumThreads, 0, p);
    });
  });
}

void batch_norm_relu(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, bool relu, const Tensor& output) {
  const Map map = map_of(x, "x");
  const ScalarType dtype = x.scalar_type();
  check_same(output, "output", map, dtype);
  if (residual) check_same(*residual, "residual", map, dtype);
  const Call call(x);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    NormaliseParams<T> p{};
    p.x = call.read<T>(x);
    p.residual = call.read<T>(residual);
    p.y = call.write<T>(output);
    p.terms = Terms::of(call, mean, var, weight, bias, eps, map, dtype);
    p.relu = relu;
    by_vector<T>(map.channels, {p.x, p.residual, p.y}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(map.pixels(), map.channels, V);
      launch(call.stream(), normalise_kernel<T, V>, p.runs.blocks(), kPassThreads, 0, p);
    });
  });
}

void batch_norm_relu_max_pool2d(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, const Tensor& output,
    const Tensor& code) {
  const Map map = map_of(x, "x");
  const Map pooled{map.batch, map.channels, map.height / 2, map.width / 2};
  const ScalarType dtype = x.scalar_type();
  check_same(output, "output", pooled, dtype);
  check_same(code, "code", pooled, ScalarType::Byte);
  if (residual) check_same(*residual, "residual", map, dtype);
  const Call call(x);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    NormaliseParams<T> p{};
    p.x = call.read<T>(x);
    p.residual = call.read<T>(residual);
    p.y = call.write<T>(output);
    p.code = call.write<uint8_t>(code);
    p.terms = Terms::of(call, mean, var, weight, bias, eps, map, dtype);
    p.height = static_cast<int>(map.height);
    p.width = static_cast<int>(map.width);
    p.out_height = static_cast<int>(pooled.height);
    p.out_width = static_cast<int>(pooled.width);
    by_vector<T>(map.channels, {p.x, p.residual, p.y, p.code}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(pooled.pixels(), map.channels, V);
      launch(call.stream(), normalise_pool_kernel<T, V>, p.runs.blocks(), kPassThreads, 0, p);
    });
  });
}

void batch_norm_update(
    const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var, double momentum,
    double unbiased) {
  const Map map{1, mean.numel(), 1, 1};
  const Call call(mean);
  const auto update = [&](const Tensor& running, const char* name, const Tensor& batch, double factor) {
    STD_TORCH_CHECK(
        running.dim() == 1 && running.size(0) == map.channels, "fastconv_native: ", name, " must have one value for each channel");
    by_dtype(running.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::T;
      UpdateParams<T> p{};
      p.running = call.write_strided<T>(running);
      p.stride = running.stride(0);
      p.batch = channel_values(call, batch, name, map, running.scalar_type());
      p.momentum = static_cast<float>(momentum);
      p.factor = static_cast<float>(factor);
      p.channels = static_cast<int>(map.channels);
      launch(call.stream(), update_kernel<T>, ceil_div(map.channels, kSumThreads), kSumThreads, 0, p);
    });
  };
  update(running_mean, "running_mean", mean, 1);
  update(running_var, "running_var", var, unbiased);
}

}  // namespace fastconv
