// Weights in integers, as `pack.rs` lays them: sixteen rows a tile, 32 columns a run, what each lane of a warp multiplies
// beside what the next one does. A weight is scale * (u - ZERO) + min.
//
// Activations come as integers of 16 bits with a scale for each run, taken apart into a high byte with a sign and a low
// one without. So a product of a run is exact: two integer multiplications on tensor cores, then one float added to the
// sum of its output. Every warp of a block adds up every WARPS-th run, in order; then the warps' sums are added in order.
// The floats added, and their order, do not depend on how many tokens there are.

#define WARPS 8
#define LINEAR_THREADS 256
#define TILE_ROWS 16
#define RUN 32

// How scale and min of a run are kept; `blocks.rs` has the same.
#define PLAIN 0  // f16 scale of each row
#define MIN 1    // f16 scale and f16 min
#define SUPER 2  // scale = d * sc, min = -(m * mc): bytes sc, mc of each run, f16 d, m of eight runs
#define HALVES 3 // scale = d * sc of columns 0 to 15, d * mc of the rest: signed bytes, f16 d

// A matrix: pointers to its planes, each [tile][run][...], and its shape. `supers` is [tile][super-block][...].
struct Quantised {
    const u32* quants;
    const u32* tops;   // the bits above the fourth; null of 4 and 8 bits
    const u32* scales;
    const u32* supers; // null of PLAIN and MIN
    u32 rows, n_runs;
    u32 first_run; // of the super-block that the first run lies in, the runs before it
    u32 n_supers;
};

// Tokens of the activations' planes: a whole number of tensor tiles. What is beyond the tokens is zero.
DEVICE u32 padded(u32 n_tokens) { return (n_tokens + 7) / 8 * 8; }

// The weights that a lane multiplies of one run: u of rows g and g + 8, columns 4t to 4t + 3 (low) and 16 + 4t.. (high).
struct Fragment {
    u32 low[2], high[2];
};

DEVICE u32 spread_bits(u32 four) { return four * 0x00204081u & 0x01010101u; }

template <int BITS>
DEVICE Fragment fragment_of(const Quantised& w, u64 run, u32 lane) {
    Fragment f;
    if (BITS == 8) {
        const uint4 words = ((const uint4*)w.quants)[run * 32 + lane];
        f.low[0] = words.x, f.high[0] = words.y, f.low[1] = words.z, f.high[1] = words.w;
        return f;
    }
    const uint2 words = ((const uint2*)w.quants)[run * 32 + lane];
    f.low[0] = words.x & 0x0f0f0f0fu, f.high[0] = words.x >> 4 & 0x0f0f0f0fu;
    f.low[1] = words.y & 0x0f0f0f0fu, f.high[1] = words.y >> 4 & 0x0f0f0f0fu;
    const u32 g = lane / 4, t = lane % 4;
    if (BITS == 5) {
        const uint2 fifths = ((const uint2*)w.tops)[run * 8 + g]; // a bit a column
        f.low[0] |= spread_bits(fifths.x >> 4 * t & 15u) << 4, f.high[0] |= spread_bits(fifths.x >> (16 + 4 * t) & 15u) << 4;
        f.low[1] |= spread_bits(fifths.y >> 4 * t & 15u) << 4, f.high[1] |= spread_bits(fifths.y >> (16 + 4 * t) & 15u) << 4;
    }
    if (BITS == 6) {
        const uint2 tops = ((const uint2*)w.tops)[run * 16 + g * 2 + t / 2]; // two lanes share a word
        const u32 a = tops.x >> t % 2 * 4, b = tops.y >> t % 2 * 4;
        f.low[0] |= (a & 0x03030303u) << 4, f.high[0] |= (a >> 2 & 0x03030303u) << 4;
        f.low[1] |= (b & 0x03030303u) << 4, f.high[1] |= (b >> 2 & 0x03030303u) << 4;
    }
    return f;
}

// Of rows g and g + 8 in one run. Of HALVES `scale` is that of the first half and `min` that of the second.
struct Scaling {
    float scale[2], min[2];
};

template <int SCALES>
DEVICE Scaling scaling_of(const Quantised& w, u32 tile, u32 run, u32 g) {
    const u64 at = (u64)tile * w.n_runs + run;
    Scaling s;
    if (SCALES == PLAIN) {
        const u32 d = w.scales[at * 8 + g];
        s.scale[0] = half_to_float((u16)d), s.scale[1] = half_to_float((u16)(d >> 16));
        s.min[0] = s.min[1] = 0.0f;
        return s;
    }
    if (SCALES == MIN) {
        const uint2 dm = ((const uint2*)w.scales)[at * 8 + g];
        s.scale[0] = half_to_float((u16)dm.x), s.scale[1] = half_to_float((u16)(dm.x >> 16));
        s.min[0] = half_to_float((u16)dm.y), s.min[1] = half_to_float((u16)(dm.y >> 16));
        return s;
    }
    const u32 bytes = w.scales[at * 8 + g]; // sc and sc of the two rows, then mc and mc
    const u64 of_super = (u64)tile * w.n_supers + (w.first_run + run) / 8;
    if (SCALES == SUPER) {
        const uint2 dm = ((const uint2*)w.supers)[of_super * 8 + g];
        s.scale[0] = half_to_float((u16)dm.x) * (float)(bytes & 255u);
        s.scale[1] = half_to_float((u16)(dm.x >> 16)) * (float)(bytes >> 8 & 255u);
        s.min[0] = -(half_to_float((u16)dm.y) * (float)(bytes >> 16 & 255u));
        s.min[1] = -(half_to_float((u16)(dm.y >> 16)) * (float)(bytes >> 24));
        return s;
    }
    const u32 d = w.supers[of_super * 8 + g];
    const float d0 = half_to_float((u16)d), d1 = half_to_float((u16)(d >> 16));
    s.scale[0] = d0 * (float)(signed char)bytes, s.scale[1] = d1 * (float)(signed char)(bytes >> 8);
    s.min[0] = d0 * (float)(signed char)(bytes >> 16), s.min[1] = d1 * (float)(signed char)(bytes >> 24);
    return s;
}

// Adds the product of one run to the sums of two rows and two tokens. `scale`: of the tokens; `total`: the sum of the
// token's integers in these columns.
template <int ZERO>
DEVICE void add_run(float sum[4], const int high[4], const int low[4], const float* of_row, const float scale[2],
                    const int total[2]) {
    for (int i = 0; i < 4; i++) {
        const int product = (high[i] << 8) + low[i] - ZERO * total[i % 2];
        sum[i] = fmaf((float)product, of_row[i / 2] * scale[i % 2], sum[i]);
    }
}

// The sums of a block's warps, added in order, to out[part][token][row]. `sums` lie as products of tensor cores do.
template <int TOKEN_TILES>
DEVICE void add_warps(const float sums[TOKEN_TILES][4], float* out, u32 rows, u32 n_tokens) {
    float* place = (float*)shared_memory(); // [warp][token][row] of one token tile
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 row_of_tile = threadIdx.x % TILE_ROWS, token_of_tile = threadIdx.x / TILE_ROWS;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        block_sync();
        for (int i = 0; i < 4; i++) {
            place[(warp * 8 + 2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[n][i];
        }
        block_sync();
        const u32 row = blockIdx.x * TILE_ROWS + row_of_tile;
        const u32 token = (blockIdx.y * TOKEN_TILES + n) * 8 + token_of_tile;
        if (token_of_tile < 8 && token < n_tokens && row < rows) {
            float sum = 0.0f;
            for (u32 i = 0; i < WARPS; i++) sum += place[(i * 8 + token_of_tile) * TILE_ROWS + row_of_tile];
            out[((u64)blockIdx.z * n_tokens + token) * rows + row] = sum;
        }
    }
}

// out[part][token][row] = sum over the part's columns of x[token] * w[row], for 8 * TOKEN_TILES tokens a block.
//
// `x`, `x_scales` and `x_totals` are as `quantise` writes them. `parts`: where the runs of each part begin, and where the
// last ends.
template <int BITS, int SCALES, int ZERO, int TOKEN_TILES>
DEVICE void multiply(const Quantised& w, const uint4* x, const float* x_scales, const int2* x_totals, const u32* parts,
                     float* out, u32 n_tokens) {
    const u32 n_padded = padded(n_tokens);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 tile = blockIdx.x, part = blockIdx.z, first_token = blockIdx.y * 8 * TOKEN_TILES;
    float sums[TOKEN_TILES][4];
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    for (u32 run = parts[part] + warp; run < parts[part + 1]; run += WARPS) {
        const Fragment a = fragment_of<BITS>(w, (u64)tile * w.n_runs + run, lane);
        const Scaling s = scaling_of<SCALES>(w, tile, run, g);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            const u32 token = first_token + 8 * n;
            if (token >= n_padded) break;
            const uint4 b = x[((u64)(token + g) * w.n_runs + run) * 4 + t];
            const u64 of_tokens = ((u64)run * n_padded + token) / 2 + t;
            const float2 scales = ((const float2*)x_scales)[of_tokens];
            const int4 totals = ((const int4*)x_totals)[of_tokens]; // halves of one token, then of the next
            const float scale[2] = {scales.x, scales.y};
            int high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
            if (SCALES == HALVES) {
                const int first[2] = {totals.x, totals.z}, second[2] = {totals.y, totals.w};
                mma_u8_s8(high, a.low[0], a.low[1], 0, 0, b.x, 0);
                mma_u8_u8(low, a.low[0], a.low[1], 0, 0, b.z, 0);
                add_run<ZERO>(sums[n], high, low, s.scale, scale, first);
                int high_2[4] = {0, 0, 0, 0}, low_2[4] = {0, 0, 0, 0};
                mma_u8_s8(high_2, a.high[0], a.high[1], 0, 0, b.y, 0);
                mma_u8_u8(low_2, a.high[0], a.high[1], 0, 0, b.w, 0);
                add_run<ZERO>(sums[n], high_2, low_2, s.min, scale, second);
                continue;
            }
            const int total[2] = {totals.x + totals.y, totals.z + totals.w};
            mma_u8_s8(high, a.low[0], a.low[1], a.high[0], a.high[1], b.x, b.y);
            mma_u8_u8(low, a.low[0], a.low[1], a.high[0], a.high[1], b.z, b.w);
            add_run<ZERO>(sums[n], high, low, s.scale, scale, total);
            if (SCALES == MIN || SCALES == SUPER) {
                for (int i = 0; i < 4; i++) {
                    sums[n][i] = fmaf((float)total[i % 2], s.min[i / 2] * scale[i % 2], sums[n][i]);
                }
            }
        }
    }
    add_warps<TOKEN_TILES>(sums, out, w.rows, n_tokens);
}

// Activations as integers. Of each run of 32 columns: scale = largest magnitude / 32767, q = x / scale to the nearest,
// q = 256 * high + low. A run that holds what is not finite has a scale that is none.
//
// `x`: [token][columns / 32][4] words of four: the high bytes of columns 4t to 4t + 3, of 16 + 4t.., then the low bytes of
// both, for t of 0 to 3. `scales` and `totals`: [columns / 32][padded tokens], the latter the sums of q over each half of
// the run. Eight lanes a run, a block 32 runs of a token; tokens up to the padded number, those beyond being zeros.
KERNEL(LINEAR_THREADS)
quantise(const float* in, u32* x, float* scales, int2* totals, u32 columns, u32 n_tokens) {
    const u32 n_runs = columns / RUN, token = blockIdx.y, lane = threadIdx.x % 8;
    const u32 run = blockIdx.x * (LINEAR_THREADS / 8) + threadIdx.x / 8;
    const bool is_there = token < n_tokens && run < n_runs;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (is_there) v = ((const float4*)(in + (u64)token * columns))[run * 8 + lane];
    const float of_lane[4] = {v.x, v.y, v.z, v.w};
    float largest = 0.0f, poison = 0.0f;
    for (int i = 0; i < 4; i++) {
        largest = fmaxf(largest, fabsf(of_lane[i]));
        poison = fmaf(of_lane[i], 0.0f, poison);
    }
    for (int mask = 4; mask > 0; mask /= 2) {
        largest = fmaxf(largest, shuffle_xor(largest, mask));
        poison += shuffle_xor(poison, mask);
    }
    const bool is_finite = poison == 0.0f;
    // A run so small that the inverse is not finite is taken as zeros.
    const bool is_zero = !is_finite || !(32767.0f / largest <= 3.402823466e38f);
    const float inverse = is_zero ? 0.0f : 32767.0f / largest;
    u32 high = 0, low = 0;
    int total = 0;
    for (int i = 0; i < 4; i++) {
        const int q = is_zero ? 0 : (int)((of_lane[i] * inverse + 12582912.0f) - 12582912.0f);
        high |= ((u32)(q >> 8) & 255u) << 8 * i;
        low |= ((u32)q & 255u) << 8 * i;
        total += q;
    }
    for (int mask = 2; mask > 0; mask /= 2) total += (int)shuffle_xor((u32)total, mask);
    if (run >= n_runs) return;
    const u32 half = lane / 4;
    u32* words = x + (((u64)token * n_runs + run) * 4 + lane % 4) * 4;
    words[half] = high;
    words[2 + half] = low;
    const u64 at = (u64)run * padded(n_tokens) + token;
    if (lane == 0) scales[at] = is_finite ? (is_zero ? 0.0f : largest / 32767.0f) : poison;
    if (lane % 4 == 0) ((int*)totals)[2 * at + half] = total;
}

// The weight of one row and column.
template <int BITS, int SCALES, int ZERO>
DEVICE float weight_at(const Quantised& w, u32 row, u32 column) {
    const u32 tile = row / TILE_ROWS, g = row % 8, below = row % TILE_ROWS / 8;
    const u32 run = column / RUN, half = column % RUN / 16, t = column % 16 / 4;
    const Fragment f = fragment_of<BITS>(w, (u64)tile * w.n_runs + run, g * 4 + t);
    const u32 word = half ? f.high[below] : f.low[below];
    const float u = (float)((int)(word >> column % 4 * 8 & 255u) - ZERO);
    const Scaling s = scaling_of<SCALES>(w, tile, run, g);
    if (SCALES == PLAIN) return u * s.scale[below];
    if (SCALES == HALVES) return u * (half ? s.min[below] : s.scale[below]);
    return fmaf(u, s.scale[below], s.min[below]);
}

// out[token] = table[tokens[token] - first_row], or zeros where this rank does not hold the row. A block a token.
template <int BITS, int SCALES, int ZERO>
DEVICE void look_up(const Quantised& w, const u32* tokens, float* out, u32 first_row, u32 columns) {
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    for (u32 column = threadIdx.x; column < columns; column += LINEAR_THREADS) {
        // + 0: no -0 is left, whose sign would depend on which ranks add zeros to it.
        const float value = row < w.rows ? weight_at<BITS, SCALES, ZERO>(w, row, column) + 0.0f : 0.0f;
        out[(u64)blockIdx.x * columns + column] = value;
    }
}

#define QUANTISED_KERNELS(FORMAT, BITS, SCALES, ZERO)                                                                   \
    KERNEL(LINEAR_THREADS)                                                                                             \
    linear_##FORMAT##_8(Quantised w, const uint4* x, const float* scales, const int2* totals, const u32* parts,         \
                        float* out, u32 n_tokens) {                                                                    \
        multiply<BITS, SCALES, ZERO, 1>(w, x, scales, totals, parts, out, n_tokens);                                    \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    linear_##FORMAT##_32(Quantised w, const uint4* x, const float* scales, const int2* totals, const u32* parts,        \
                         float* out, u32 n_tokens) {                                                                   \
        multiply<BITS, SCALES, ZERO, 4>(w, x, scales, totals, parts, out, n_tokens);                                    \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    embed_##FORMAT(Quantised w, const u32* tokens, float* out, u32 first_row, u32 columns) {                            \
        look_up<BITS, SCALES, ZERO>(w, tokens, out, first_row, columns);                                                \
    }

QUANTISED_KERNELS(q4_0, 4, PLAIN, 8)
QUANTISED_KERNELS(q4_1, 4, MIN, 0)
QUANTISED_KERNELS(q5_0, 5, PLAIN, 16)
QUANTISED_KERNELS(q5_1, 5, MIN, 0)
QUANTISED_KERNELS(q8_0, 8, PLAIN, 128)
QUANTISED_KERNELS(q4_k, 4, SUPER, 0)
QUANTISED_KERNELS(q5_k, 5, SUPER, 0)
QUANTISED_KERNELS(q6_k, 6, HALVES, 32)
