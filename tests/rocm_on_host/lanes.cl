/* What intrinsics.py asks of the hardware, for work items that run one after the other: waves are 64 neighbours.
 *
 * Lane selections are those of AMD's "CDNA3 Instruction Set Architecture", sections on DPP and DS_BPERMUTE_B32. */
#define WAVE 64

/* The value of another lane of the wave; all work items of the group come here. */
int of_lane(int value, int lane, __local int* scratch) {
  const int item = get_local_id(0);
  barrier(CLK_LOCAL_MEM_FENCE);
  scratch[item] = value;
  barrier(CLK_LOCAL_MEM_FENCE);
  return scratch[item / WAVE * WAVE + lane % WAVE];
}

int update_dpp(int value, int control, __local int* scratch) {
  const int lane = get_local_id(0) % WAVE;
  int from = -1;
  if (control <= 0xff) from = (lane & ~3) | (control >> 2 * (lane & 3) & 3); /* quad_perm */
  if (control == 0x140) from = (lane & ~15) | (15 - (lane & 15));            /* row_mirror */
  if (control == 0x141) from = (lane & ~7) | (7 - (lane & 7));               /* row_half_mirror */
  return of_lane(value, from, scratch);
}

/* Row and column of lanes, of AMD's matrix instruction calculator for v_mfma_f32_16x16x16_bf16: a[i][k] and b[k][j] are
 * in lanes 16 * (k / 4) + i and + j, c[i][j] in lane 16 * (i / 4) + j; k % 4 and i % 4 say which of a lane's. */
float4 mfma(ushort4 a, ushort4 b, float4 c, __local int* scratch) {
  __local ushort4* const lanes = (__local ushort4*)scratch; /* a and b of each lane */
  const int item = get_local_id(0), wave = item / WAVE * WAVE, lane = item % WAVE;
  barrier(CLK_LOCAL_MEM_FENCE);
  lanes[2 * item] = a, lanes[2 * item + 1] = b;
  barrier(CLK_LOCAL_MEM_FENCE);
  float sums[4] = {c.x, c.y, c.z, c.w};
#pragma unroll 1 /* PoCL inlines this wherever it is called */
  for (int r = 0; r < 4; r++)
#pragma unroll 1
    for (int k = 0; k < 16; k++) {
      const int row = wave + 16 * (k / 4) + lane / 16 * 4 + r, column = wave + 16 * (k / 4) + lane % 16;
      const ushort of_a = ((__local ushort*)&lanes[2 * row])[k % 4];
      const ushort of_b = ((__local ushort*)&lanes[2 * column + 1])[k % 4];
      sums[r] = fma(as_float((uint)of_a << 16), as_float((uint)of_b << 16), sums[r]);
    }
  return (float4)(sums[0], sums[1], sums[2], sums[3]);
}

#define llvm_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, x, y, z) mfma(a, b, c, scratch)
#define llvm_amdgcn_readfirstlane_i32(value) of_lane(value, 0, scratch)
#define llvm_amdgcn_update_dpp_i32(old, value, control, rows, banks, bound) update_dpp(value, control, scratch)
#define llvm_amdgcn_ds_bpermute(address, value) of_lane(value, (address) / 4, scratch)
#define llvm_amdgcn_sched_barrier(mask)
#define llvm_amdgcn_rcp_f32(value) (1.0f / (value))
#define llvm_fma(a, b, c) fma(a, b, c)
#define llvm_nearbyint(value) rint(value)
