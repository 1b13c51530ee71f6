// Files, JSON, and whether this machine runs an engine: the manifest's triple and CPU features.
#pragma once
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct HostError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Json = tvm::ffi::Map<tvm::ffi::Any, tvm::ffi::Any>;
using JsonList = tvm::ffi::Array<tvm::ffi::Any>;

// The JSON object in a file. Functions are looked up by name: errors then come as tvm::ffi::Error, whichever
// C++ library this program is linked with.
inline Json ReadJson(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw UsageError("cannot read " + path + ": not an engine");
  std::ostringstream text;
  text << file.rdbuf();
  return tvm::ffi::Function::GetGlobalRequired("ffi.json.Parse")(tvm::ffi::String(text.str())).cast<Json>();
}

inline int64_t CoresAllowed() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

// What the CPU can do, in the words of /proc/cpuinfo.
inline std::set<std::string> CpuFeatures() {
  std::set<std::string> found;
#if defined(__aarch64__)
  // The kernel's order of bits (asm/hwcap.h); the words are those it prints.
  static const char* first =
      "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
      "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg";
  static const char* second =
      "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
      "dgh rng bti";
  for (auto [words, bits] : {std::pair(first, getauxval(AT_HWCAP)), std::pair(second, getauxval(AT_HWCAP2))}) {
    std::istringstream names(words);
    std::string name;
    for (int bit = 0; names >> name; ++bit) {
      if (bits >> bit & 1) found.insert(name);
    }
  }
#else
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream names(line.substr(line.find(':') + 1));
    for (std::string name; names >> name;) found.insert(name);
    break;
  }
#endif
  return found;
}

// Throws HostError unless this machine is the one that the engine was built for, or can do all that it can.
inline void CheckHost(const std::string& engine) {
#if defined(__aarch64__)
  const std::string triple = "aarch64-linux";
#else
  const std::string triple = "x86_64-linux";
#endif
  Json manifest = ReadJson(engine + "/manifest.json");
  auto built_for = manifest.at(tvm::ffi::String("triple")).cast<std::string>();
  if (built_for != triple) throw HostError("the engine was built for " + built_for + ", this is " + triple);
  auto requirements = manifest.at(tvm::ffi::String("requirements")).cast<Json>();
  const std::set<std::string> here = CpuFeatures();
  std::string missing;
  for (const auto& name : requirements.at(tvm::ffi::String("cpu_features")).cast<JsonList>()) {
    if (!here.count(name.cast<std::string>())) missing += " " + name.cast<std::string>();
  }
  if (!missing.empty()) throw HostError("the engine needs CPU features that this machine lacks:" + missing);
}
