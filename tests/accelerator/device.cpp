// One CUDA device for a torch that was built without CUDA. Its memory is the machine's own and its operations are the CPU's, but whatever
// would go wrong for want of care goes wrong here too: tensors on two devices in one operation are refused, memory ends at a limit, and
// each time that the program would have waited for the device is counted. Loaded before torch is imported, which then finds the device.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

std::atomic<int64_t> limit{0}, waits{0};
thread_local int uncounted = 0;  // above 0, this thread's waits are not the program's own

void wait() {
  if (uncounted == 0) waits++;
}

// What is given back is given out again, of equal pieces the one that lies first: what is as large as before comes to lie where it lay, as
// with torch's own allocator. Fresh memory is full of ones: floating-point numbers that are none, and indices out of range.
struct Memory final : c10::DeviceAllocator {
  static constexpr size_t LINE = 64;  // before each piece its size is written
  std::atomic<int64_t> now{0}, peak{0};
  std::mutex mutex;
  std::map<size_t, std::set<char*>> spare;

  static Memory& one() {
    static auto* memory = new Memory;  // never destroyed: tensors live until the very end
    return *memory;
  }
  static void give_back(void* piece) {
    if (piece == nullptr) return;
    auto* start = static_cast<char*>(piece) - LINE;
    auto bytes = *reinterpret_cast<size_t*>(start);
    one().now -= static_cast<int64_t>(bytes);
    std::lock_guard<std::mutex> guard(one().mutex);
    one().spare[whole(bytes)].insert(start);
  }
  static size_t whole(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, DEVICE};
    auto size = static_cast<int64_t>(bytes), used = now += size, most = peak.load();
    if (limit > 0 && used > limit) {
      now -= size;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes beside ", used - size);
    }
    while (used > most && !peak.compare_exchange_weak(most, used)) {}
    std::lock_guard<std::mutex> guard(mutex);
    auto& pieces = spare[whole(bytes)];
    auto* start = pieces.empty() ? static_cast<char*>(std::aligned_alloc(LINE, LINE + whole(bytes))) : *pieces.begin();
    pieces.erase(start);
    *reinterpret_cast<size_t*>(start) = bytes;
    std::memset(start + LINE, 0xff, bytes);
    return {start + LINE, start + LINE, &give_back, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = now.load(); }
};

// One device and one stream, on which everything is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// Draws by a generator of the CPU with its seed.
struct Generator final : at::CPUGeneratorImpl {
  at::Generator on_cpu = at::make_generator<at::CPUGeneratorImpl>();

  Generator() {
    device_ = DEVICE;
    key_set_ = KEYS;
  }
  void set_current_seed(uint64_t seed) override {
    CPUGeneratorImpl::set_current_seed(seed);
    on_cpu.set_current_seed(seed);
  }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::make_generator<Generator>();
    return generator;
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

const bool has_allocator = (c10::SetAllocator(c10::DeviceType::CUDA, &Memory::one()), true);

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  auto found = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), t.options().device(c10::kCPU));
  if (t.is_conj()) found = found.conj();
  if (t.is_neg()) found._set_neg(true);
  return found;
}

using Type = std::optional<c10::ScalarType>;
using Layout = std::optional<c10::Layout>;
using Where = std::optional<c10::Device>;
using Flag = std::optional<bool>;
using Format = std::optional<c10::MemoryFormat>;

at::Tensor empty(c10::IntArrayRef size, Type type, Layout, Where, Flag, Format format) {
  return at::detail::empty_generic(size, &Memory::one(), KEYS, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, Type type, Layout, Where, Flag) {
  return at::detail::empty_strided_generic(size, stride, &Memory::one(), KEYS, c10::dtype_or_default(type));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  if (to.is_cpu()) wait();
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, Format) {
  auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == wanted) return self;  // and its strides stay what they are
  auto storage = self.storage();
  auto bytes = static_cast<size_t>(c10::multiply_integers(wanted)) * self.element_size();
  if (storage.nbytes() < bytes) {
    auto more = Memory::one().allocate(bytes);
    if (storage.nbytes() > 0) std::memcpy(more.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(more));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait();
  return on_cpu(self).item();
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor& set_same(at::Tensor& self, const at::Tensor& source) {
  return self.set_(source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  auto n = static_cast<int64_t>(source.nbytes() / self.element_size());
  return self.set_(source, 0, n, {1});
}

// Whether a device would have to tell the host before it knows the shape of the answer, or what to do next.
bool asks_the_device(const std::string& name, at::ArrayRef<c10::IValue> given) {
  static const std::set<std::string> asking{"nonzero", "equal", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim"};
  if (asking.count(name.substr(std::strlen("aten::")))) return true;
  if (name == "aten::repeat_interleave") return given.back().isNone();  // its size was not told
  if (name == "aten::index") return false;  // torch has called nonzero for the shape, where there is a mask
  for (const auto& one : given) {  // a mask as an index
    if (!one.isOptionalTensorList()) continue;
    for (const std::optional<at::Tensor>& index : one.toOptionalTensorVector())
      if (index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) return true;
  }
  return false;
}

// Everything else is the CPU's work on copies, as long as all of it lies on the device; numbers without a dimension may lie anywhere, and
// so may indices.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  const auto& arguments = op.schema().arguments();
  auto given = torch::jit::last(*stack, arguments.size());
  std::string strays;
  auto look = [&](const at::Tensor& t, size_t i) {
    if (t.defined() && t.is_cpu() && t.dim() > 0) strays += " " + arguments[i].name();
  };
  for (size_t i = 0; i < given.size(); i++) {
    if (given[i].isTensor()) look(given[i].toTensor(), i);
    if (given[i].isTensorList())
      for (const auto& t : given[i].toTensorVector()) look(t, i);
    if (given[i].isGenerator() && given[i].toGenerator().device() == DEVICE)
      stack->at(stack->size() - given.size() + i) = static_cast<Generator*>(given[i].toGenerator().unsafeGetGeneratorImpl())->on_cpu;
  }
  TORCH_CHECK(strays.empty(), "Expected all tensors to be on the same device: ", name, " was given on the CPU", strays);
  if (asks_the_device(name, given)) wait();
  struct Uncounted {
    Uncounted() { uncounted++; }
    ~Uncounted() { uncounted--; }
  } here;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

// The same memory, which may be given back meanwhile: all that a recorded graph knows of its arguments.
at::Tensor address(const at::Tensor& t) {
  auto* data = const_cast<void*>(t.const_data_ptr());
  return at::for_blob(data, t.sizes()).strides(t.strides()).options(t.options()).target_device(DEVICE).make_tensor();
}

}  // namespace

TORCH_LIBRARY(pretend, m) { m.def("address(Tensor t) -> Tensor"); }

TORCH_LIBRARY_IMPL(pretend, CUDA, m) { m.impl("address", address); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", as_strided);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("view.dtype", TORCH_FN(at::native::view_dtype));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", set_same);
  m.impl("set_.source_Storage", set_whole);
}

extern "C" {
void pretend_limit(int64_t bytes) { limit = bytes; }
int64_t pretend_now() { return Memory::one().now; }
int64_t pretend_peak() { return Memory::one().peak; }
void pretend_reset_peak() { Memory::one().peak = Memory::one().now.load(); }
int64_t pretend_waits() { return waits; }
void pretend_uncounted(int by) { uncounted += by; }
}
