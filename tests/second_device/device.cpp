// A device of its own for tests: memory and arithmetic are the CPU's, but tensors on it do not mix with those of the CPU.
// Single headers, not torch/extension.h: they compile in a fourth of the time.
#define TORCH_ASSERT_ONLY_METHOD_OPERATORS
#include <ATen/core/Tensor.h>
#include <torch/library.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using at::Tensor;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr auto KIND = c10::DeviceType::PrivateUse1;

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, at::Device(KIND, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device d) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, {KIND, 0}); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};

// The same memory, seen as the CPU's.
Tensor seen_by_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != KIND) return tensor;
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
      at::DataPtr(tensor.storage().mutable_data(), at::Device(at::kCPU)), c10::GetAllocator(at::kCPU), false);
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sym_sizes(), tensor.sym_strides(), tensor.sym_storage_offset());
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype));
}
Tensor on_device(const Tensor& cpu) {
  Tensor made = at::detail::empty_strided_generic(cpu.sizes(), cpu.strides(), &memory, c10::DispatchKeySet(KEY), cpu.scalar_type());
  seen_by_cpu(made).copy_(cpu);
  return made;
}
Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  seen_by_cpu(target).copy_(seen_by_cpu(self));
  return target;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}
const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}
c10::Scalar item(const Tensor& self) { return seen_by_cpu(self).item(); }

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(w.device() == x.device(), "convolution: input on ", x.device(), ", weight on ", w.device());
  std::optional<Tensor> bias;
  if (b.has_value() && b->defined()) bias = seen_by_cpu(*b);
  return on_device(at::convolution(seen_by_cpu(x), seen_by_cpu(w), bias, stride, padding, dilation, transposed, output_padding, groups));
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  auto [a, b, c] = at::convolution_backward(seen_by_cpu(g), seen_by_cpu(x), seen_by_cpu(w),
      mask[2] ? at::OptionalIntArrayRef(w.size(transposed ? 1 : 0) * (transposed ? groups : 1)) : at::OptionalIntArrayRef(), stride, padding, dilation, transposed, output_padding, groups, mask);
  return {a.defined() ? on_device(a) : a, b.defined() ? on_device(b) : b, c.defined() ? on_device(c) : c};
}
int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // plain mathematics
}

// Everything else: on the CPU, once all tensors were found to be on this device. Numbers (0-d) may come from the CPU, as on a GPU.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  bool any = false;
  for (const auto& value : arguments) {
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().device().type() == KIND) any = true;
    if (value.isTensorList()) for (const Tensor& t : value.toTensorList()) any |= t.defined() && t.device().type() == KIND;
  }
  auto check = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || t.device().type() == KIND || t.dim() == 0,
        schema.name(), ": expected all tensors to be on the same device, but found one of shape ", t.sizes(), " on ", t.device(), " beside others on the second device");
  };
  const auto name = schema.name();
  const bool indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  if (any && !indexing) {
    for (const auto& value : arguments) {
      if (value.isTensor()) check(value.toTensor());
      if (value.isTensorList()) for (const Tensor& t : value.toTensorList()) check(t);
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_fused_sdp_choice", &attention_choice);
  // torch's own for devices without: not for channels-last
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("native_group_norm_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
// copying resolves these itself
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

bool begun = [] {
  c10::SetAllocator(KIND, &memory);
  return true;
}();
}  // namespace

extern "C" void begin() {
  static bool once = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);
  (void)once;
}
