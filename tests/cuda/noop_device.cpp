// A CUDA device without a GPU, for a torch that was built without CUDA. Its guard and hooks do nothing, so tensors of
// FakeTensorMode may lie on cuda:0: autograd, autocast and torch's meta kernels then run as they do with a GPU.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct NoopCudaGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override {
    return Device(DeviceType::CUDA, 0);
  }
  Device exchangeDevice(Device) const override {
    return getDevice();
  }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    return getStream(stream.device());
  }
};

// torch looks hooks up by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  DeviceIndex exchangeDevice(DeviceIndex) const override {
    return 0;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override {
    return 0;
  }
  void setCurrentDevice(DeviceIndex) const override {}
};

} // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoopCudaGuard);
}

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
} // namespace at
