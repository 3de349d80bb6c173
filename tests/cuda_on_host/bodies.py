"""Small kernels for tests of the emulator: a body, launched, and a product by wgmma that tests may break."""

import torch

from .runner import run

LANE = "const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;"


def launch(body, *, block=32, grid=1, shared_bytes=1024, arguments=None, **options):
    """Run a kernel with this body; its parameters are the arguments."""
    arguments = arguments or {}
    parameters = "".join(f"{_type(value)} {name}, " for name, value in arguments.items())
    source = f"using namespace vllm_compile;\nstatic void kernel({parameters}void* shared) {{\n{LANE}\n{body}\n}}\n"
    call = f"kernel({''.join(f'{name}, ' for name in arguments)}shared)"
    return run(
        "ptx.cuh",
        call,
        grid=grid,
        block=block,
        arguments=arguments,
        shared_bytes=shared_bytes,
        source=source,
        **options,
    )


def _type(value):
    if not isinstance(value, torch.Tensor):
        return "int"
    return {"bfloat16": "__nv_bfloat16*", "float32": "float*", "int32": "int*"}[str(value.dtype).removeprefix("torch.")]


def random(generator, *shape):
    return torch.randn(*shape, generator=generator).bfloat16()


# How B [columns, 64] is stored in shared memory, and the descriptor of 16 of its columns of k, from `from` on.
SWIZZLED = """
  auto store = [&](int column, int k, __nv_bfloat16 value) {
    const int at = column * 128 + k * 2;
    *reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(shared) + (at ^ (at >> 7 & 7) << 4)) = value;
  };
  auto descriptor = [&](int k) {
    const uint32_t from = shared_address(shared) + k * 2;
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | 1 << 16 | from >> 4;
  };
"""
UNSWIZZLED = """
  auto store = [&](int column, int k, __nv_bfloat16 value) {
    const int at = k / 8 * (COLUMNS * 16) + column * 16 + k % 8 * 2;
    *reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(shared) + at) = value;
  };
  auto descriptor = [&](int k) {
    const uint32_t from = shared_address(shared) + k / 8 * (COLUMNS * 16);
    return uint64_t{128 >> 4} << 32 | (COLUMNS * 16 >> 4) << 16 | from >> 4;
  };
"""
WGMMA = """
  for (int i = threadIdx.x; i < COLUMNS * 64; i += 128) store(i / 64, i % 64, b[i]);
  proxy_fence();
  __syncthreads();
  auto word = [](const __nv_bfloat16* from) { return *reinterpret_cast<const uint32_t*>(from); };
  const int row = threadIdx.x / 32 * 16 + g;
  float own[COLUMNS / 8][4] = {};
  uint32_t fragment[4][4];
  for (int step = 0; step < 4; step++)
    for (int i = 0; i < 4; i++)
      fragment[step][i] = word(a + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + 2 * t);
  wgmma_fence();
  for (int step = 0; step < 4; step++) {
    wgmma<COLUMNS>(own, fragment[step], descriptor(step * 16));
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int j = 0; j < COLUMNS / 8; j++)
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * COLUMNS + j * 8 + 2 * t + i % 2] = own[j][i];
"""


def wgmma(generator, columns=24, stored=SWIZZLED, changed=lambda body: body):
    a, b, out = random(generator, 64, 64), random(generator, columns, 64), torch.full((64, columns), float("nan"))
    body = changed(f"constexpr int COLUMNS = {columns};" + stored + WGMMA)
    launch(body, block=128, shared_bytes=columns * 128, arguments={"a": a, "b": b, "out": out})
    return out.double(), a.double() @ b.double().T
