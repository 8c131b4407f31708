// The CUDA kernels on the emulated machine, by the names that the extension has.
#include "checks.h"
#include "fibers.h"

PYBIND11_MODULE(emulated, m) {
  ppo_fast::define_cuda_ops(m);
  m.def("set_seed", &emulator::set_seed);
}
