// What several kernels need: sums over a warp and over a block, an exponential, conversions of pairs.

// Of a warp's lanes, in a fixed order: all lanes get the same bits.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// Of the threads of a block, at most 1024 of them, in a fixed order. `place` is shared, one float for each warp.
DEVICE float block_sum(float x, float* place) {
    const u32 n_warps = blockDim.x / 32;
    x = warp_sum(x);
    block_sync(); // `place` may still be read
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = x;
    block_sync();
    float sum = 0.0f;
    for (u32 i = 0; i < n_warps; i++) sum += place[i];
    return sum;
}

// e^x as the CPU's kernels compute it (`math.rs`), bit for bit: Cody and Waite's reduction, then a polynomial. 0 below
// -87.3, saturated above 88.3.
DEVICE float exponential(float x) {
    const float clamped = fminf(fmaxf(x, -87.3f), 88.3f);
    const float n = fmaf(clamped, 1.44269504f, 12582912.0f) - 12582912.0f;
    float r = fmaf(n, -0.69314575f, clamped);
    r = fmaf(n, -1.4286068e-6f, r);
    float p = 1.0f / 720.0f;
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const float y = p * float_of((u32)((int)n + 127) << 23);
    return x < -87.3f ? 0.0f : y;
}

DEVICE float bf16_to_float(u16 bits) { return float_of((u32)bits << 16); }

// To the nearest, ties to even.
DEVICE u16 float_to_bf16(float x) {
    const u32 bits = bits_of(x);
    if (x != x) return 0x7fc0; // the addition below could make a number of it
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Beyond f16's range to its largest number: what is cached stays finite.
DEVICE u16 float_to_half_saturated(float x) { return float_to_half(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

DEVICE u32 pair(u16 low, u16 high) { return (u32)low | (u32)high << 16; }
