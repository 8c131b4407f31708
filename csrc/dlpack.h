// A block of memory as a DLPack capsule (version 0, which every consumer takes): https://dmlc.github.io/dlpack
#pragma once

#include <cstdint>

namespace ppo_fast {

struct DLDevice {
  std::int32_t type;  // 1: CPU
  std::int32_t id;
};

struct DLDataType {
  std::uint8_t code;  // 1: unsigned integer
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

}  // namespace ppo_fast
