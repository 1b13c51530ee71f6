// One open engine with a KV cache of one row. docs/targets.md describes the files and the step.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "host.h"

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::String;
using tvm::ffi::Tensor;

// Zeroed memory on 2 MB pages where the system gives them; a page becomes resident when it is written.
class Pages {
 public:
  explicit Pages(size_t size) : size_((size + kHuge - 1) / kHuge * kHuge + kHuge) {
    region_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region_ == MAP_FAILED) throw std::bad_alloc();
    madvise(region_, size_, MADV_HUGEPAGE);
    auto address = reinterpret_cast<uintptr_t>(region_);
    data = reinterpret_cast<char*>((address + kHuge - 1) / kHuge * kHuge);
  }
  ~Pages() { munmap(region_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  char* data;

 private:
  static constexpr size_t kHuge = 2 << 20;
  size_t size_;
  void* region_;
};

class Engine {
 public:
  Engine(const std::string& folder, int64_t positions, int64_t threads)
      : index_(ReadJson(folder + "/engine.json")),
        hidden_size_(Number(index_, "hidden_size")),
        vocabulary_(Number(index_, "vocab_size")),
        chunk_(Number(index_, "chunk")),
        positions_(positions),
        weights_(WeightsBytes()),
        cache_(CacheBytes(positions)),
        step_(StepBytes()) {
    if (positions > Number(index_, "max_seq_len")) {
      throw UsageError("prompt and answer are longer than the engine's " +
                       std::to_string(Number(index_, "max_seq_len")) + " positions");
    }
    // Engines of earlier versions do not say it: they all generate.
    if (index_.count(String("head_size")) && Number(index_, "head_size") != vocabulary_) {
      throw UsageError("the engine tells labels apart, this program generates");
    }
    ReadWeights(folder + "/weights.bin");
    auto library = Global("ffi.ModuleLoadFromFile")(String(folder + "/engine.so")).cast<Module>();
    auto machine = Member(library, "vm_load_executable")().cast<Module>();
    constexpr int kCpu = 1, kPooled = 2;
    Member(machine, "vm_initialization")(kCpu, 0, kPooled);
    Member(library, "threads")(threads);
    forward_ = Member(machine, "forward");
    weight_tensors_ = WeightTensors();
    cache_tensors_ = CacheTensors();
  }

  // Append tokens to the row -> the most probable next token.
  int32_t Append(const std::vector<int32_t>& ids) {
    for (int32_t id : ids) {
      if (id >= vocabulary_) throw UsageError("token id " + std::to_string(id) + " is not in the vocabulary");
    }
    if (length_ + static_cast<int64_t>(ids.size()) > positions_) throw UsageError("the row is full");
    for (size_t start = 0; start < ids.size(); start += chunk_) {
      Step(ids.data() + start, std::min<int64_t>(chunk_, ids.size() - start));
    }
    const float* logits = reinterpret_cast<float*>(step_.data + LogitsOffset());
    return static_cast<int32_t>(std::max_element(logits, logits + vocabulary_) - logits);
  }

 private:
  static constexpr int64_t kAlign = 4096;
  struct Borrowed {
    void AllocData(DLTensor* tensor, void* memory) { tensor->data = memory; }
    void FreeData(DLTensor*) {}
  };

  static int64_t Round(int64_t size, int64_t multiple = kAlign) { return (size + multiple - 1) / multiple * multiple; }
  static int64_t Number(const Json& json, const char* name) { return json.at(String(name)).cast<int64_t>(); }
  static Function Global(const char* name) { return Function::GetGlobalRequired(name); }
  static Function Member(const Module& module, const char* name) {
    return Global("ffi.ModuleGetFunction")(module, String(name), true).cast<Function>();
  }

  static Tensor View(void* memory, const std::vector<int64_t>& shape, const std::string& type) {
    DLDataType dtype{kDLFloat, 32, 1};
    if (type == "float16") dtype = {kDLFloat, 16, 1};
    if (type == "int32") dtype = {kDLInt, 32, 1};
    if (type == "int8") dtype = {kDLInt, 8, 1};
    if (type == "uint8") dtype = {kDLUInt, 8, 1};
    if (type == "uint16") dtype = {kDLUInt, 16, 1};
    return Tensor::FromNDAlloc(Borrowed(), tvm::ffi::ShapeView(shape.data(), shape.size()), dtype, {kDLCPU, 0}, memory);
  }

  // Weights -----------------------------------------------------------------------------------------------------------

  int64_t WeightsBytes() const {
    int64_t end = 0;
    for (const auto& [name, entry] : index_.at(String("tensors")).cast<Json>()) {
      end = std::max(end, Number(entry.cast<Json>(), "offset") + Number(entry.cast<Json>(), "bytes"));
    }
    return end;
  }

  void ReadWeights(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw UsageError("cannot read " + path);
    int64_t size = WeightsBytes(), done = 0;
    while (done < size) {
      ssize_t count = pread(file, weights_.data + done, size - done, done);
      if (count <= 0) break;
      done += count;
    }
    close(file);
    if (done < size) throw UsageError(path + " is too short");
  }

  Array<Any> WeightTensors() const {
    Array<Any> parts;
    parts.push_back(WeightsOf(index_.at(String("embedding")).cast<JsonList>()));
    for (const auto& names : index_.at(String("layers")).cast<JsonList>()) parts.push_back(WeightsOf(names.cast<JsonList>()));
    parts.push_back(WeightsOf(index_.at(String("head")).cast<JsonList>()));
    return parts;
  }

  Array<Any> WeightsOf(const JsonList& names) const {
    auto tensors = index_.at(String("tensors")).cast<Json>();
    Array<Any> found;
    for (const auto& name : names) {
      auto entry = tensors.at(name).cast<Json>();
      std::vector<int64_t> shape;
      for (const auto& size : entry.at(String("shape")).cast<JsonList>()) shape.push_back(size.cast<int64_t>());
      found.push_back(View(weights_.data + Number(entry, "offset"), shape, entry.at(String("dtype")).cast<std::string>()));
    }
    return found;
  }

  // Cache -------------------------------------------------------------------------------------------------------------

  struct CachePart {
    std::vector<int64_t> shape;
    std::string type;
    int64_t bytes;
  };

  std::vector<CachePart> CacheParts(int64_t positions) const {
    auto cache = index_.at(String("cache")).cast<Json>();
    const std::string kind = cache.at(String("kind")).cast<std::string>();
    const int64_t block = Number(cache, "block"), width = Number(cache, "value_width");
    const int64_t heads = Number(index_, "num_kv_heads"), head_dim = Number(index_, "head_dim");
    const int64_t capacity = Round(positions, block);
    const std::string type = kind == "fp32" ? "float32" : kind == "fp16" ? "float16" : "int8";
    const int64_t size = kind == "fp32" ? 4 : kind == "fp16" ? 2 : 1;
    std::vector<CachePart> parts{{{1, heads, capacity / block, head_dim, block}, type, heads * capacity * head_dim * size},
                                 {{1, heads, capacity, width}, type, heads * capacity * width * size}};
    if (kind == "int8") parts.insert(parts.end(), 2, {{1, heads, capacity}, "float32", heads * capacity * 4});
    return parts;
  }

  int64_t CacheBytes(int64_t positions) const {
    int64_t size = 0;
    for (const auto& part : CacheParts(positions)) size += Round(part.bytes);
    return size * Number(index_, "num_layers");
  }

  Array<Any> CacheTensors() const {
    Array<Any> layers;
    char* memory = cache_.data;
    for (int64_t layer = 0; layer < Number(index_, "num_layers"); ++layer) {
      Array<Any> tensors;
      for (const auto& part : CacheParts(positions_)) {
        tensors.push_back(View(memory, part.shape, part.type));
        memory += Round(part.bytes);
      }
      layers.push_back(tensors);
    }
    return layers;
  }

  // Steps -------------------------------------------------------------------------------------------------------------

  // ids, positions, rows [chunk] and segment, wanted row on pages of their own; then hidden and logits.
  int64_t IntsBytes() const { return Round(chunk_ * 4); }
  int64_t HiddenOffset() const { return 3 * IntsBytes() + 2 * kAlign; }
  int64_t LogitsOffset() const { return HiddenOffset() + Round(chunk_ * hidden_size_ * 4); }
  int64_t StepBytes() const { return LogitsOffset() + Round(vocabulary_ * 4); }

  void Step(const int32_t* ids, int64_t count) {
    auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(step_.data + offset); };
    const int64_t size = IntsBytes(), segment = 3 * size, wanted = segment + kAlign;
    for (int64_t i = 0; i < count; ++i) {
      ints(0)[i] = ids[i];
      ints(size)[i] = static_cast<int32_t>(length_ + i);
      ints(2 * size)[i] = 0;
    }
    const int32_t row[] = {0, 0, static_cast<int32_t>(count), static_cast<int32_t>(length_)};
    std::memcpy(ints(segment), row, sizeof row);
    *ints(wanted) = static_cast<int32_t>(count - 1);
    forward_(View(ints(0), {count}, "int32"), View(ints(size), {count}, "int32"), View(ints(2 * size), {count}, "int32"),
             View(ints(segment), {1, 4}, "int32"), View(ints(wanted), {1}, "int32"),
             View(step_.data + HiddenOffset(), {count, hidden_size_}, "float32"),
             View(step_.data + LogitsOffset(), {1, vocabulary_}, "float32"), cache_tensors_, weight_tensors_);
    length_ += count;
  }

  Json index_;
  int64_t hidden_size_, vocabulary_, chunk_, positions_, length_ = 0;
  Pages weights_, cache_, step_;
  Function forward_{nullptr};
  Array<Any> weight_tensors_, cache_tensors_;
};
