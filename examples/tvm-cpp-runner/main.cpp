// Greedy generation with a tvm engine of enginesmith, without Python: token ids in, token ids out.
//
//   tvm-runner ENGINE --prompt-ids 1,2,3 [--max-new-tokens N] [--threads N]
//
// ENGINE is an artifact directory: manifest.json, engine.json, engine.so, weights.bin. File digests are not checked
// here; `enginesmith inspect ENGINE` does that. Needs libtvm_ffi.so and libtvm_runtime.so (README.md).
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"
#include "host.h"

namespace {

struct Options {
  std::string engine;
  std::vector<int32_t> prompt;
  int64_t new_tokens = 32;
  int64_t threads = 0;
};

int64_t Number(const std::string& text, int64_t least) {
  char* end = nullptr;
  errno = 0;
  int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || errno || value < least || value > INT32_MAX) throw UsageError("bad number: " + text);
  return value;
}

std::vector<int32_t> Numbers(const std::string& text) {
  std::vector<int32_t> values;
  for (size_t start = 0; start <= text.size();) {
    size_t comma = std::min(text.find(',', start), text.size());
    values.push_back(static_cast<int32_t>(Number(text.substr(start, comma - start), 0)));
    start = comma + 1;
  }
  return values;
}

Options Parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word.rfind("--", 0) != 0 && options.engine.empty()) {
      options.engine = word;
      continue;
    }
    if (i + 1 == count) throw UsageError(word + " needs a value");
    std::string value = words[++i];
    if (word == "--prompt-ids") options.prompt = Numbers(value);
    else if (word == "--max-new-tokens") options.new_tokens = Number(value, 1);
    else if (word == "--threads") options.threads = Number(value, 1);
    else throw UsageError("unknown option " + word);
  }
  if (options.engine.empty() || options.prompt.empty()) throw UsageError("ENGINE and --prompt-ids are needed");
  return options;
}

void Generate(const Options& options) {
  CheckHost(options.engine);
  if (!dlopen("libtvm_runtime.so", RTLD_NOW | RTLD_GLOBAL)) throw UsageError(dlerror());
  int64_t positions = static_cast<int64_t>(options.prompt.size()) + options.new_tokens;
  Engine engine(options.engine, positions, options.threads ? options.threads : CoresAllowed());
  int32_t token = engine.Append(options.prompt);
  for (int64_t i = 0; i < options.new_tokens; ++i) {
    std::printf(i ? ",%d" : "%d", token);
    std::fflush(stdout);
    if (i + 1 < options.new_tokens) token = engine.Append({token});
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** words) {
  try {
    Generate(Parse(count, words));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const HostError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 5;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
