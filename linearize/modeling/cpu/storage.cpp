// Exact keys and values brought to how they are stored, and back.
#include "storage.h"

namespace {

using storage::Eight;
using storage::Four;

template <class Form>
void keep(const float* x, uint8_t* bytes, float* values, Index rows, Index channels) {
#pragma omp parallel if (rows * channels > 1 << 15)
  {
    std::vector<float> held;
#pragma omp for
    for (Index i = 0; i < rows; i++)
      Form::keep(x + i * channels, channels, bytes ? bytes + i * Form::bytes(channels) : nullptr,
                 values ? values + i * channels : nullptr, held);
  }
}

template <class Form>
void open(const uint8_t* bytes, float* values, Index rows, Index channels) {
#pragma omp parallel if (rows * channels > 1 << 15)
  {
    std::vector<float> held;
#pragma omp for
    for (Index i = 0; i < rows; i++) Form::open(bytes + i * Form::bytes(channels), channels, values + i * channels, held);
  }
}

}  // namespace

// x (rows, channels) as it is stored, and what is read of it; either may be null.
extern "C" void storage_keep(const float* x, uint8_t* bytes, float* values, Index rows, Index channels, Index four) {
  four ? keep<Four>(x, bytes, values, rows, channels) : keep<Eight>(x, bytes, values, rows, channels);
}

extern "C" void storage_open(const uint8_t* bytes, float* values, Index rows, Index channels, Index four) {
  four ? open<Four>(bytes, values, rows, channels) : open<Eight>(bytes, values, rows, channels);
}
