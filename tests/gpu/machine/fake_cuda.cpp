// Eight CUDA devices without a driver, for the CPU build of torch: the parts that autograd and
// torch.accelerator ask for in C++. Tensors on them have no values (FakeTensorMode).

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;

// The current device, per thread: index-less devices and autograd's threads use it.
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace {

struct FakeHooks : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  c10::DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  c10::DeviceIndex current_device() const override { return Guard::getDeviceIndex(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

} // namespace

namespace at {
C10_REGISTER_TYPED_CREATOR(
    CUDAHooksRegistry, "CUDAHooks",
    [](CUDAHooksArgs args) -> std::unique_ptr<CUDAHooksInterface> {
      return std::make_unique<FakeHooks>(args);
    })
} // namespace at

// Replaces torch's own function: the CPU build has no accelerator. The library must therefore be
// loaded before torch, with its symbols visible to it.
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
} // namespace at::accelerator
