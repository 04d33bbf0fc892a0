// Drives the C++ kernels without Python, to be built under a sanitizer together with splat.cc, voxelize.cc and drr.cc.
//
// It plays XLA's part: call frames, a pool of eight threads and the few functions of XLA_FFI_Api that the kernels use.
// Every call is made from two threads at once that share the pool and the inputs, on ordinary, extreme and hostile
// numbers; every buffer is a heap block of its own, so that a step outside is seen. Two outputs of one call must be equal
// bit by bit, and no output of ordinary inputs may be NaN.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* RadgsSplatForward(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsSplatBackward(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsSplatBackwardOfCloud(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsVoxelizeForward(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsVoxelizeBackward(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsDrr(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsDrrPerRay(XLA_FFI_CallFrame*);
XLA_FFI_Error* RadgsDrrVolume(XLA_FFI_CallFrame*);
}

struct XLA_FFI_Error {
  std::string message;
};

// What the kernels see as their execution context.
struct XLA_FFI_ExecutionContext {
  explicit XLA_FFI_ExecutionContext(int size) {
    for (int i = 0; i < size; ++i) threads.emplace_back([this] { Work(); });
  }

  ~XLA_FFI_ExecutionContext() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closing = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void Schedule(XLA_FFI_Task* task, void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      tasks.emplace_back(task, data);
    }
    wake.notify_one();
  }

  // Runs whatever is left before it ends: a task frees its own memory.
  void Work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return closing || !tasks.empty(); });
      if (tasks.empty()) return;
      const auto [task, data] = tasks.front();
      tasks.pop_front();
      lock.unlock();
      task(data);
      lock.lock();
    }
  }

  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks;
  bool closing = false;
  std::vector<std::thread> threads;
};

namespace {

constexpr int kThreads = 8;

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
  api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    args->ctx->Schedule(args->task, args->data);
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = static_cast<int64_t>(args->ctx->threads.size());
    return nullptr;
  };
  return api;
}

// A float32 array of exactly its size on the heap.
struct Array {
  Array(std::vector<int64_t> dims, float value = 0.0f) : dims(std::move(dims)) {
    for (const int64_t n : this->dims) count *= n;
    data.reset(new float[count]);
    for (int64_t i = 0; i < count; ++i) data[i] = value;
  }

  float& operator[](int64_t i) { return data[i]; }

  std::vector<int64_t> dims;
  int64_t count = 1;
  std::unique_ptr<float[]> data;
};

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);
using Arrays = std::vector<Array>;
using Shapes = std::vector<std::vector<int64_t>>;

struct Attribute {
  const char* name;
  float value;
};

// One call; results start as NaN, so that what a kernel leaves unwritten is seen.
Arrays Call(Handler* handler, XLA_FFI_ExecutionContext& pool, Arrays& inputs, const Shapes& shapes,
            std::vector<Attribute> attributes) {
  static const XLA_FFI_Api api = MakeApi();
  Arrays outputs;
  for (const auto& shape : shapes) outputs.emplace_back(shape, std::numeric_limits<float>::quiet_NaN());
  const auto buffers = [](Arrays& arrays) {
    std::vector<XLA_FFI_Buffer> made;
    for (Array& a : arrays) {
      made.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_F32, a.data.get(),
                      static_cast<int64_t>(a.dims.size()), a.dims.data()});
    }
    return made;
  };
  const auto pointers = [](auto& items) {
    std::vector<void*> made;
    for (auto& item : items) made.push_back(&item);
    return made;
  };
  std::vector<XLA_FFI_Buffer> in = buffers(inputs), out = buffers(outputs);
  std::vector<void*> in_pointers = pointers(in), out_pointers = pointers(out);
  std::vector<XLA_FFI_ArgType> in_types(in.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> out_types(out.size(), XLA_FFI_RetType_BUFFER);

  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_ByteSpan> names;
  for (Attribute& a : attributes) {
    scalars.push_back({XLA_FFI_DataType_F32, &a.value});
    names.push_back({a.name, std::strlen(a.name)});
  }
  std::vector<void*> attributes_pointers = pointers(scalars);
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  for (XLA_FFI_ByteSpan& name : names) name_pointers.push_back(&name);
  std::vector<XLA_FFI_AttrType> attribute_types(scalars.size(), XLA_FFI_AttrType_SCALAR);

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &pool;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(in.size()), in_types.data(),
                in_pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(out.size()), out_types.data(),
                out_pointers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,    nullptr,
                 static_cast<int64_t>(scalars.size()), attribute_types.data(),
                 name_pointers.data(),         attributes_pointers.data()};
  if (XLA_FFI_Error* error = handler(&frame)) {
    std::fprintf(stderr, "a kernel refused its call: %s\n", error->message.c_str());
    std::exit(1);
  }
  return outputs;
}

void Fail(const char* name, const char* reason) {
  std::fprintf(stderr, "%s: %s\n", name, reason);
  std::exit(1);
}

// The same call from two threads at once.
Arrays Twice(const char* name, Handler* handler, XLA_FFI_ExecutionContext& pool, Arrays& inputs, const Shapes& shapes,
             bool ordinary, const std::vector<Attribute>& attributes = {}) {
  Arrays other;
  std::thread second([&] { other = Call(handler, pool, inputs, shapes, attributes); });
  Arrays one = Call(handler, pool, inputs, shapes, attributes);
  second.join();
  for (size_t i = 0; i < one.size(); ++i) {
    if (std::memcmp(one[i].data.get(), other[i].data.get(), one[i].count * sizeof(float)) != 0) {
      Fail(name, "two calls on the same arrays differ");
    }
    for (int64_t j = 0; ordinary && j < one[i].count; ++j) {
      if (!std::isfinite(one[i][j])) Fail(name, "an output of ordinary inputs is not finite");
    }
  }
  return one;
}

class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}

  float Uniform(float low, float high) { return low + (high - low) * static_cast<float>(generator_() * 0x1p-32); }

  // Log-uniform over 10^low to 10^high.
  float Scale(float low, float high) { return std::pow(10.0f, Uniform(low, high)); }

  bool Chance(float p) { return Uniform(0.0f, 1.0f) < p; }

  // Any bits in half the cases, else a number that has broken a kernel somewhere.
  float Hostile() {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    constexpr float kNumbers[] = {0.0f,   -0.0f,  1e-45f, -1e-45f, 1.1754944e-38f, 1e-20f, -1e-12f, 1e-6f, -1.0f, 1.0f,
                                  2.5f,   1e6f,   -1e9f,  1e12f,   2147483648.0f,  1e19f,  -1e20f,  3e38f, -3e38f,
                                  kInf,   -kInf,  std::numeric_limits<float>::quiet_NaN()};
    if (Chance(0.5f)) return kNumbers[generator_() % (sizeof kNumbers / sizeof *kNumbers)];
    const uint32_t bits = generator_();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void Spoil(Array& array, float share) {
    for (int64_t i = 0; i < array.count; ++i) {
      if (Chance(share)) array[i] = Hostile();
    }
  }

 private:
  std::mt19937 generator_;
};

// L L' for a random lower triangle L: positive definite, with half-axes of about 10^-high to 10^-low.
void FillPrecision(Random& random, Array& precision, float low, float high) {
  for (int64_t i = 0; i < precision.count; i += 6) {
    float l[6];  // xx, yx, yy, zx, zy, zz
    for (const int j : {0, 2, 5}) l[j] = random.Scale(low, high);
    l[1] = random.Uniform(-0.7f, 0.7f) * l[2], l[3] = random.Uniform(-0.7f, 0.7f) * l[5];
    l[4] = random.Uniform(-0.7f, 0.7f) * l[5];
    precision[i] = l[0] * l[0], precision[i + 1] = l[0] * l[1], precision[i + 2] = l[0] * l[3];
    precision[i + 3] = l[1] * l[1] + l[2] * l[2], precision[i + 4] = l[1] * l[3] + l[2] * l[4];
    precision[i + 5] = l[3] * l[3] + l[4] * l[4] + l[5] * l[5];
  }
}

void Fill(Random& random, Array& array, float low, float high) {
  for (int64_t i = 0; i < array.count; ++i) array[i] = random.Uniform(low, high);
}

// How far inputs are from ordinary.
enum Kind { kOrdinary, kExtreme, kHostile, kKinds };

constexpr float kSpoiled[kKinds] = {0.0f, 0.0f, 0.08f};

void Splat(Random& random, XLA_FFI_ExecutionContext& pool, Kind kind, int64_t batch, int64_t n, int64_t height,
           int64_t width) {
  Arrays inputs;
  inputs.emplace_back(std::vector<int64_t>{batch, n});
  inputs.emplace_back(std::vector<int64_t>{batch, n, 3});
  inputs.emplace_back(std::vector<int64_t>{batch, n, 6});
  inputs.emplace_back(std::vector<int64_t>{batch, 4});
  Array &density = inputs[0], &mean = inputs[1], &camera = inputs[3];
  const bool ordinary = kind == kOrdinary;
  Fill(random, density, 0.0f, 0.05f);
  for (int64_t i = 0; i < batch * n; ++i) {
    mean[3 * i] = random.Uniform(-60.0f, 60.0f), mean[3 * i + 1] = random.Uniform(-50.0f, 50.0f);
    mean[3 * i + 2] = random.Uniform(500.0f, 800.0f);
    for (int axis = 0; !ordinary && axis < 3; ++axis) mean[3 * i + axis] *= random.Scale(-3.0f, 2.0f);
    if (!ordinary && random.Chance(0.1f)) mean[3 * i + 2] *= -1.0f;
  }
  FillPrecision(random, inputs[2], ordinary ? -2.0f : -4.0f, ordinary ? 0.5f : 4.0f);
  for (int64_t i = 0; i < batch; ++i) {
    for (const int axis : {0, 1}) {
      camera[4 * i + axis] = (ordinary ? 1.0f : random.Scale(-3.0f, 4.0f)) * random.Uniform(300.0f, 600.0f);
      camera[4 * i + 2 + axis] = random.Uniform(0.2f, 0.8f) * static_cast<float>(axis == 0 ? width : height);
    }
  }
  for (Array& input : inputs) random.Spoil(input, kSpoiled[kind]);
  Twice("splat forward", RadgsSplatForward, pool, inputs, {{batch, height, width}}, ordinary);
  Array& cotangent = inputs.emplace_back(std::vector<int64_t>{batch, height, width});
  Fill(random, cotangent, -1.0f, 1.0f);
  random.Spoil(cotangent, 0.1f * kSpoiled[kind]);
  Shapes results = {{batch, n}, {batch, n, 3}, {batch, n, 6}};
  Twice("splat backward of cloud", RadgsSplatBackwardOfCloud, pool, inputs, results, ordinary);
  results.push_back({batch, n, 4});
  Twice("splat backward", RadgsSplatBackward, pool, inputs, results, ordinary);
}

void Voxelize(Random& random, XLA_FFI_ExecutionContext& pool, Kind kind, int64_t batch, int64_t n, int64_t x, int64_t y,
              int64_t z) {
  Arrays inputs;
  inputs.emplace_back(std::vector<int64_t>{batch, n});
  inputs.emplace_back(std::vector<int64_t>{batch, n, 3});
  inputs.emplace_back(std::vector<int64_t>{batch, n, 6});
  const bool ordinary = kind == kOrdinary;
  Fill(random, inputs[0], 0.0f, 0.05f);
  Fill(random, inputs[1], -3.0f, static_cast<float>(std::max({x, y, z}) + 3));
  for (int64_t i = 0; !ordinary && i < inputs[1].count; ++i) inputs[1][i] *= random.Scale(-2.0f, 1.0f);
  FillPrecision(random, inputs[2], ordinary ? -1.0f : -4.0f, ordinary ? 0.5f : 4.0f);
  for (Array& input : inputs) random.Spoil(input, kSpoiled[kind]);
  Twice("voxelize forward", RadgsVoxelizeForward, pool, inputs, {{batch, x, y, z}}, ordinary);
  Array& cotangent = inputs.emplace_back(std::vector<int64_t>{batch, x, y, z});
  Fill(random, cotangent, -1.0f, 1.0f);
  random.Spoil(cotangent, 0.1f * kSpoiled[kind]);
  Twice("voxelize backward", RadgsVoxelizeBackward, pool, inputs, {{batch, n}, {batch, n, 3}, {batch, n, 6}}, ordinary);
}

// Directions that are tiny but not 0 would march for minutes, which is their due; they are kept out of the inputs.
float NoCrawl(float direction) {
  return direction != 0.0f && std::fabs(direction) < 0.02f ? std::copysign(0.02f, direction) : direction;
}

void Drr(Random& random, XLA_FFI_ExecutionContext& pool, Kind kind, int64_t views, int64_t x, int64_t y, int64_t z,
         int64_t height, int64_t width) {
  Arrays inputs;
  inputs.emplace_back(std::vector<int64_t>{x, y, z});
  inputs.emplace_back(std::vector<int64_t>{views, 3});
  inputs.emplace_back(std::vector<int64_t>{views, height, width, 3});
  Array &volume = inputs[0], &origin = inputs[1], &direction = inputs[2];
  const bool ordinary = kind == kOrdinary;
  Fill(random, volume, 0.0f, 0.05f);
  Fill(random, origin, ordinary ? -30.0f : -8.0f, ordinary ? -10.0f : 20.0f);
  Fill(random, direction, 0.1f, 1.0f);
  for (int64_t i = 0; !ordinary && i < direction.count; ++i) {
    // Along an axis, backwards, or not moving at all.
    if (random.Chance(0.3f)) direction[i] = 0.0f;
    if (random.Chance(0.2f)) direction[i] *= -1.0f;
  }
  for (Array& input : inputs) random.Spoil(input, kSpoiled[kind]);
  for (int64_t i = 0; i < direction.count; ++i) direction[i] = NoCrawl(direction[i]);
  const std::vector<Attribute> step = {{"step_mm", 0.75f}};
  Twice("drr forward", RadgsDrr, pool, inputs, {{views, height, width}}, ordinary, step);
  const std::vector<std::vector<int64_t>> per_ray = {
      {views, height, width}, {views, height, width, 3}, {views, height, width, 3}};
  Twice("drr per ray", RadgsDrrPerRay, pool, inputs, per_ray, ordinary, step);
  Array& cotangent = inputs.emplace_back(std::vector<int64_t>{views, height, width});
  Fill(random, cotangent, -1.0f, 1.0f);
  random.Spoil(cotangent, 0.1f * kSpoiled[kind]);
  inputs.erase(inputs.begin());
  Twice("drr backward, volume", RadgsDrrVolume, pool, inputs, {{x, y, z}}, ordinary, step);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 4;
  XLA_FFI_ExecutionContext pool(kThreads);
  for (int round = 0; round < rounds; ++round) {
    for (int kind = 0; kind < kKinds; ++kind) {
      Random random(3 * round + kind);
      const Kind k = static_cast<Kind>(kind);
      // One large output is cut into slabs, many small ones are not; sides of 1 leave no room for a vector of lanes.
      Splat(random, pool, k, 1, 60, 45, 61);
      Splat(random, pool, k, 40, 6, 9, 7);
      Splat(random, pool, k, 3, 5, 1, 1);
      Splat(random, pool, k, 2, 0, 9, 7);
      Splat(random, pool, k, 2, 300, 5, 17);
      Voxelize(random, pool, k, 1, 60, 11, 21, 26);
      Voxelize(random, pool, k, 40, 6, 4, 5, 6);
      Voxelize(random, pool, k, 3, 5, 1, 1, 1);
      Voxelize(random, pool, k, 2, 0, 4, 5, 6);
      Voxelize(random, pool, k, 2, 300, 5, 3, 17);
      Drr(random, pool, k, 2, 11, 13, 9, 21, 26);
      Drr(random, pool, k, 40, 4, 5, 6, 3, 5);
      Drr(random, pool, k, 2, 1, 1, 1, 5, 7);
      Drr(random, pool, k, 2, 1, 6, 2, 5, 7);
    }
  }
  std::puts("all calls done");
  return 0;
}
