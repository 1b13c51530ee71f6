/* Calls one kernel of a library on tensors from a file and writes them back: kernel_runner LIBRARY FUNCTION FILE.
 *
 * FILE: int64 count, then per tensor int64 code, bits, ndim, shape..., and the data (sizes are rounded up to 64). */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MAX_TENSORS = 32, MAX_DIMENSIONS = 8, ALIGNMENT = 64 };

static void fail(const char* what) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  TVMFFIErrorCell* cell = error ? (TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject)) : NULL;
  const char* message = cell ? cell->message.data : "";
  fprintf(stderr, "%s: %s\n", what, message);
  exit(1);
}

static TVMFFIAny call(const char* name, TVMFFIObjectHandle function, TVMFFIAny* arguments, int count) {
  if (!function) {
    TVMFFIByteArray text = {name, strlen(name)};
    if (TVMFFIFunctionGetGlobal(&text, &function) || !function) fail(name);
  }
  TVMFFIAny result;
  memset(&result, 0, sizeof result);
  if (TVMFFIFunctionCall(function, arguments, count, &result)) fail(name);
  return result;
}

static TVMFFIAny any(int32_t type, const void* pointer) {
  TVMFFIAny value;
  memset(&value, 0, sizeof value);
  value.type_index = type;
  value.v_ptr = (void*)pointer;
  return value;
}

static TVMFFIAny whether(int value) {
  TVMFFIAny result = any(kTVMFFIBool, NULL);
  result.v_int64 = value;
  return result;
}

static void transfer(DLTensor* tensor, int64_t size, FILE* file, int write) {
  size_t done = write ? fwrite(tensor->data, 1, size, file) : fread(tensor->data, 1, size, file);
  if ((int64_t)done != size) fail("the file is too short");
}

int main(int count, char** words) {
  static DLTensor tensors[MAX_TENSORS];
  static int64_t shapes[MAX_TENSORS][MAX_DIMENSIONS], header[3], sizes[MAX_TENSORS], number;
  static long places[MAX_TENSORS];
  if (count != 4 || !dlopen("libtvm_runtime.so", RTLD_NOW | RTLD_GLOBAL)) fail(count == 4 ? dlerror() : "three words");
  FILE* file = fopen(words[3], "r+b");
  if (!file || fread(&number, 8, 1, file) != 1 || number > MAX_TENSORS) fail("bad file");
  TVMFFIAny arguments[MAX_TENSORS];
  for (int64_t i = 0; i < number; i++) {
    DLTensor* tensor = &tensors[i];
    if (fread(header, 8, 3, file) != 3 || header[2] > MAX_DIMENSIONS) fail("bad tensor");
    if ((int64_t)fread(shapes[i], 8, header[2], file) != header[2]) fail("bad shape");
    tensor->dtype = (DLDataType){(uint8_t)header[0], (uint8_t)header[1], 1};
    tensor->device = (DLDevice){kDLCPU, 0};
    tensor->ndim = (int32_t)header[2];
    tensor->shape = shapes[i];
    sizes[i] = header[1] / 8;
    for (int64_t d = 0; d < header[2]; d++) sizes[i] *= shapes[i][d];
    tensor->data = aligned_alloc(ALIGNMENT, (sizes[i] + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    places[i] = ftell(file);
    transfer(tensor, sizes[i], file, 0);
    arguments[i] = any(kTVMFFIDLTensorPtr, tensor);
  }
  TVMFFIAny path = any(kTVMFFIRawStr, words[1]);
  TVMFFIAny module = call("ffi.ModuleLoadFromFile", NULL, &path, 1);
  TVMFFIAny lookup[] = {module, any(kTVMFFIRawStr, words[2]), whether(1)};
  TVMFFIAny function = call("ffi.ModuleGetFunction", NULL, lookup, 3);
  call(words[2], function.v_ptr, arguments, (int)number);
  for (int64_t i = 0; i < number; i++) {
    fseek(file, places[i], SEEK_SET);
    transfer(&tensors[i], sizes[i], file, 1);
  }
  return fclose(file) ? 1 : 0;
}
