// Weights in integers, as `matrix.rs` lays them: sixteen rows a tile, 32 columns a run, runs by twos and fours so that a lane
// takes sixteen bytes at once. A weight is scale * (u - ZERO) + min.
//
// u is never turned into a float: its bits are those of the f16 number u * 2^-24, which tensor cores multiply exactly with
// activations in f16 (`activations.cu`). A run's product, a float, meets its row's scale and is added up over a step of four
// runs; what ZERO and min add is one more product, of the step's scales or mins with the sums of its activations; then the
// step meets its token's scale. Warps take the steps of a tile in turn (`stream.cu`). The floats added, and their order, do
// not depend on how many tokens there are.

#define STEP 4 // runs

// How scale and min of a run are kept; `blocks.rs` has the same.
#define PLAIN 0  // f16 scale of each row
#define MIN 1    // f16 scale and f16 min
#define SUPER 2  // scale = d * sc, min = -(m * mc): bytes sc, mc of each run, f16 d, m of eight runs
#define HALVES 3 // scale = d * sc of columns 0 to 15, d * mc of the rest: signed bytes, f16 d

// A matrix: pointers to its planes, and its shape. Lane 4g + t of a warp multiplies rows g and g + 8; words of the two
// stand side by side. Planes by tile, then:
//   quants  of 8 bits [run][lane] four words; else [pair of runs][lane] two words of either run
//   tops    the bits above the fourth: of 5 bits [pair][g] two words of either run, a bit a column; of 6 bits
//           [pair][g][t / 2] two words of either run; else null
//   scales  [four runs][g] a word each; of MIN [pair][g] two words of either run
//   supers  [super-block][g] two words of SUPER, one of HALVES; else null
struct Quantised {
    const u32* quants;
    const u32* tops;
    const u32* scales;
    const u32* supers;
    u32 rows, n_runs;
    u32 first_run; // of the super-block that the first run lies in, the runs before it
    u32 n_supers;
};

// What a warp takes of a step, in sixteen bytes: where each plane begins in shared memory.
template <int BITS, int SCALES>
struct Stage {
    static constexpr u32 QUANTS = BITS == 8 ? 32 * STEP : 32 * STEP / 2;
    static constexpr u32 TOPS = BITS == 5 ? 8 * STEP / 2 : BITS == 6 ? 16 * STEP / 2 : 0;
    static constexpr u32 SCALES_ = SCALES == MIN ? 8 * STEP / 2 : 8 * STEP / 4;
    static constexpr u32 SUPERS = SCALES == SUPER ? 4 : SCALES == HALVES ? 2 : 0; // of one super-block
    static constexpr u32 TOPS_AT = QUANTS, SCALES_AT = TOPS_AT + TOPS, SUPERS_AT = SCALES_AT + SCALES_;
    static constexpr u32 LEN = SUPERS_AT + 2 * SUPERS; // a step may begin in one super-block and end in the next
};

// Begins to fetch a step of a tile; what lies beyond the matrix is left alone.
template <int BITS, int SCALES>
DEVICE void fetch(const Quantised& w, uint4* stage, u32 tile, u32 step, u32 lane) {
    typedef Stage<BITS, SCALES> At;
    const u32 n_pairs = (w.n_runs + 1) / 2, n_fours = (w.n_runs + 3) / 4, pair = step * (STEP / 2);
    if (BITS == 8) {
        const uint4* from = (const uint4*)w.quants + ((u64)tile * w.n_runs + step * STEP) * 32 + lane;
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            if (step * STEP + i < w.n_runs) copy_begin(stage + i * 32 + lane, from + i * 32);
        }
    } else {
        const uint4* from = (const uint4*)w.quants + ((u64)tile * n_pairs + pair) * 32 + lane;
#pragma unroll
        for (int i = 0; i < STEP / 2; i++) {
            if (pair + i < n_pairs) copy_begin(stage + i * 32 + lane, from + i * 32);
        }
    }
    if (BITS == 5 || BITS == 6) {
        const u32 n = At::TOPS / (STEP / 2), at = pair * n + lane; // of a pair; 16 or 32 lanes for both
        const uint4* from = (const uint4*)w.tops + (u64)tile * n_pairs * n + at;
        if (lane < At::TOPS && at < n_pairs * n) copy_begin(stage + At::TOPS_AT + lane, from);
    }
    if (SCALES == MIN) {
        const u32 at = pair * 8 + lane;
        const uint4* from = (const uint4*)w.scales + (u64)tile * n_pairs * 8 + at;
        if (lane < At::SCALES_ && at < n_pairs * 8) copy_begin(stage + At::SCALES_AT + lane, from);
        return;
    }
    if (lane < 8) {
        const uint4* from = (const uint4*)w.scales + ((u64)tile * n_fours + step) * 8 + lane;
        copy_begin(stage + At::SCALES_AT + lane, from);
    } else if (At::SUPERS > 0 && lane < 8 + 2 * At::SUPERS) {
        const u32 super = (w.first_run + step * STEP) / 8, at = super * At::SUPERS + lane - 8;
        const bool is_read = lane < 8 + At::SUPERS || (w.first_run + step * STEP) % 8 > 8 - STEP;
        const uint4* from = (const uint4*)w.supers + (u64)tile * w.n_supers * At::SUPERS + at;
        if (is_read && at < w.n_supers * At::SUPERS) copy_begin(stage + At::SUPERS_AT + lane - 8, from);
    }
}

DEVICE u32 word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// The weights that a lane multiplies of one run: u of rows g and g + 8, two columns a word: 4t and 4t + 2, 4t + 1 and
// 4t + 3, then the same of 16 + 4t.
struct Fragment {
    u32 pairs[2][4];
};

// Of run `i` of the step.
template <int BITS, int SCALES>
DEVICE Fragment fragment_of(const uint4* stage, int i, u32 lane) {
    typedef Stage<BITS, SCALES> At;
    Fragment f;
    const uint4 quants = stage[(BITS == 8 ? i : i / 2) * 32 + lane];
    uint4 tops = {0, 0, 0, 0};
    if (BITS == 5) tops = stage[At::TOPS_AT + i / 2 * 8 + lane / 4];
    if (BITS == 6) tops = stage[At::TOPS_AT + i / 2 * 16 + lane / 2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32* pairs = f.pairs[row];
        if (BITS == 8) {
            const u32 low = word_of(quants, 2 * row), high = word_of(quants, 2 * row + 1);
            pairs[0] = low & 0x00ff00ffu, pairs[1] = low >> 8 & 0x00ff00ffu;
            pairs[2] = high & 0x00ff00ffu, pairs[3] = high >> 8 & 0x00ff00ffu;
            continue;
        }
        const u32 word = word_of(quants, i % 2 * 2 + row);
        pairs[0] = word & 0x000f000fu, pairs[1] = word >> 8 & 0x000f000fu;
        pairs[2] = word >> 4 & 0x000f000fu, pairs[3] = word >> 12 & 0x000f000fu;
        if (BITS == 5) {
            const u32 top = word_of(tops, i % 2 * 2 + row) >> lane % 4;
            pairs[0] |= top << 4 & 0x00100010u, pairs[1] |= top & 0x00100010u;
            pairs[2] |= top >> 4 & 0x00100010u, pairs[3] |= top >> 8 & 0x00100010u;
        }
        if (BITS == 6) {
            const u32 top = word_of(tops, i % 2 * 2 + row) >> lane % 2 * 4;
            pairs[0] |= top << 4 & 0x00300030u, pairs[1] |= top >> 4 & 0x00300030u;
            pairs[2] |= top << 2 & 0x00300030u, pairs[3] |= top >> 6 & 0x00300030u;
        }
    }
    return f;
}

// The word of scales of rows g and g + 8, or of their mins where those have a word of their own.
template <int BITS, int SCALES>
DEVICE u32 scales_word(const uint4* stage, int i, bool of_min, u32 g) {
    const u32* words = (const u32*)(stage + Stage<BITS, SCALES>::SCALES_AT);
    return SCALES == MIN ? words[(i / 2 * 8 + g) * 4 + i % 2 * 2 + of_min] : words[g * 4 + i];
}

DEVICE float half_of(u32 word, int row) { return half_to_float((u16)(row ? word >> 16 : word)); }

// Of rows g and g + 8 in run `i`: the factor of a product, and of HALVES that of the second half, both without d.
struct Factors {
    float first[2], second[2];
};

template <int BITS, int SCALES>
DEVICE Factors factors_of(const uint4* stage, int i, u32 g) {
    const u32 word = scales_word<BITS, SCALES>(stage, i, false, g);
    Factors f;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        if (SCALES == PLAIN || SCALES == MIN) f.first[row] = half_of(word, row);
        if (SCALES == SUPER) f.first[row] = (float)(u8)(word >> 8 * row); // sc and sc, then mc and mc
        if (SCALES == HALVES) f.first[row] = (float)(signed char)(word >> 8 * row);
        f.second[row] = SCALES == HALVES ? (float)(signed char)(word >> (16 + 8 * row)) : 0.0f;
    }
    return f;
}

// d and m of the super-block that run `i` of a step lies in, the step's first being `first` of its super-block.
template <int BITS, int SCALES>
DEVICE uint2 super_of(const uint4* stage, u32 first, int i, u32 g) {
    typedef Stage<BITS, SCALES> At;
    const u32* words = (const u32*)(stage + At::SUPERS_AT) + (first + i >= 8 ? 4 * At::SUPERS : 0);
    if (SCALES == SUPER) return {words[2 * g], words[2 * g + 1]};
    return {words[g], 0};
}

// What multiplies the sums of activations over half a run, as f16 twice in a word: by format a scale, a min, the integer of
// a min or of a scale, these as bits of 2^-24 times themselves or as they are.
template <int BITS, int SCALES>
DEVICE u32 offset_of(const uint4* stage, int i, int half, int row, u32 g) {
    const u32 word = scales_word<BITS, SCALES>(stage, i, true, g);
    u32 bits;
    if (SCALES == PLAIN || SCALES == MIN) bits = row ? word >> 16 : word & 0xffffu;
    else if (SCALES == SUPER) bits = word >> (16 + 8 * row) & 255u;
    else bits = float_to_half((float)(signed char)(word >> (16 * half + 8 * row)));
    return bits * 0x10001u;
}

// Adds one step's product to the sums of each token tile. `begin` and `end`: the runs that count; IS_WHOLE if all of the
// step's do.
template <int BITS, int SCALES, int ZERO, int TOKEN_TILES, bool IS_WHOLE>
DEVICE void multiply_step(float sums[TOKEN_TILES][4], const uint4* stage, u32 first_run, u32 n_runs, const Made& x, u32 step,
                          u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
    const u32 g = lane / 4, t = lane % 4, n_padded = padded(n_tokens), first = (first_run + step * STEP) % 8;
    const bool is_one = SCALES < SUPER || first + min(STEP, n_runs - step * STEP) <= 8; // one super-block has all runs
    float of_step[TOKEN_TILES][4];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int j = 0; j < 4; j++) of_step[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        const u32 run = step * STEP + i;
        if (!IS_WHOLE && (run < begin || run >= end)) continue;
        const Fragment a = fragment_of<BITS, SCALES>(stage, i, lane);
        Factors factors = factors_of<BITS, SCALES>(stage, i, g);
        if (!is_one) { // then d meets each run
            const uint2 super = super_of<BITS, SCALES>(stage, first, i, g);
            for (int row = 0; row < 2; row++) factors.first[row] *= half_of(super.x, row), factors.second[row] *= half_of(super.x, row);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            if (n > 0 && first_token + 8 * n >= n_padded) break;
            const u32 token = min(first_token + 8 * n + g, n_tokens - 1); // what is beyond is not looked at
            const uint4 b = ((const uint4*)x.halves)[((u64)token * n_runs + run) * 4 + t];
            float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_f16(product, a.pairs[0][0], a.pairs[1][0], a.pairs[0][1], a.pairs[1][1], b.x, b.y);
            if (SCALES == HALVES) {
                float second[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma_f16(second, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
                for (int j = 0; j < 4; j++) of_step[n][j] = fmaf(second[j], factors.second[j / 2], of_step[n][j]);
            } else {
                mma_f16(product, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
            }
            for (int j = 0; j < 4; j++) of_step[n][j] = fmaf(product[j], factors.first[j / 2], of_step[n][j]);
        }
    }
    // The offsets: lane t holds the halves t and 4 + t of the step's eight, of runs t / 2 and 2 + t / 2.
    u32 offsets[2][2];
    bool counts[2];
    float d[2] = {1.0f, 1.0f}, by[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const u32 i = 2 * k + t / 2, run = step * STEP + i;
        counts[k] = IS_WHOLE || (run >= begin && run < end);
        for (int row = 0; row < 2; row++) {
            offsets[k][row] = counts[k] ? offset_of<BITS, SCALES>(stage, i, t % 2, row, g) : 0;
        }
    }
    // Units: products are of 2^-24 u, sums of activations come as 2^-4 times themselves.
    for (int row = 0; row < 2; row++) {
        by[row] = SCALES == PLAIN ? -(float)ZERO * 9.5367431640625e-7f : 9.5367431640625e-7f; // 2^-20
    }
    if (SCALES >= SUPER) {
        const uint2 super = super_of<BITS, SCALES>(stage, first, 0, g);
        for (int row = 0; row < 2; row++) {
            if (is_one) d[row] = half_of(super.x, row);
            by[row] = SCALES == SUPER ? -half_of(super.y, row) * 16.0f : -(float)ZERO * 9.5367431640625e-7f * half_of(super.x, row);
        }
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if (n > 0 && first_token + 8 * n >= n_padded) break;
        const u32* totals = x.totals + (u64)(step * 2 * STEP + t) * n_padded + first_token + 8 * n + g;
        const float2 scales = ((const float2*)x.scales)[((u64)step * n_padded + first_token + 8 * n) / 2 + t];
        const u32 low = counts[0] ? totals[0] : 0, high = counts[1] ? totals[4 * n_padded] : 0;
        float of_offsets[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        if (is_one) {
            mma_f16(of_offsets[0], offsets[0][0], offsets[0][1], offsets[1][0], offsets[1][1], low, high);
            for (int j = 0; j < 4; j++) {
                const float both = fmaf(of_offsets[0][j], by[j / 2], of_step[n][j] * d[j / 2]);
                sums[n][j] = fmaf(both, j % 2 ? scales.y : scales.x, sums[n][j]);
            }
            continue;
        }
        // Two super-blocks: each lane's offsets go to the product of theirs.
        const uint2 next = super_of<BITS, SCALES>(stage, 0, 8, g);
        const bool is_next[2] = {first + t / 2 >= 8, first + 2 + t / 2 >= 8};
        for (int k = 0; k < 2; k++) {
            const u32 a = is_next[0] == (k == 1) ? low : 0, b = is_next[1] == (k == 1) ? high : 0;
            mma_f16(of_offsets[k], offsets[0][0], offsets[0][1], offsets[1][0], offsets[1][1], a, b);
        }
        for (int j = 0; j < 4; j++) {
            const int row = j / 2;
            const float by_next = SCALES == SUPER ? -half_of(next.y, row) * 16.0f : -(float)ZERO * 9.5367431640625e-7f * half_of(next.x, row);
            const float both = fmaf(of_offsets[1][j], by_next, fmaf(of_offsets[0][j], by[row], of_step[n][j]));
            sums[n][j] = fmaf(both, j % 2 ? scales.y : scales.x, sums[n][j]);
        }
    }
}

template <int BITS, int SCALES, int ZERO>
struct OfIntegers {
    typedef Quantised Matrix;
    static constexpr u32 LEN = Stage<BITS, SCALES>::LEN, RUNS = STEP;

    static DEVICE_MEMBER void fetch_step(const Quantised& w, uint4* stage, u32 tile, u32 step, u32 lane) {
        fetch<BITS, SCALES>(w, stage, tile, step, lane);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x, u32 step,
                                       u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
        if (step * STEP >= begin && (step + 1) * STEP <= end) {
            multiply_step<BITS, SCALES, ZERO, TOKEN_TILES, true>(sums, stage, w.first_run, w.n_runs, x, step, begin, end,
                                                                 first_token, n_tokens, lane);
        } else {
            multiply_step<BITS, SCALES, ZERO, TOKEN_TILES, false>(sums, stage, w.first_run, w.n_runs, x, step, begin, end,
                                                                  first_token, n_tokens, lane);
        }
    }
};

// The weights of a tile's run, as a lane multiplies them, in floats. [row of two][column: 4t.. then 16 + 4t..]
template <int BITS, int SCALES, int ZERO>
DEVICE void floats_of(const uint4* stage, int i, u32 first, u32 lane, float out[2][8]) {
    const u32 g = lane / 4;
    const Fragment f = fragment_of<BITS, SCALES>(stage, i, lane);
    const Factors factors = factors_of<BITS, SCALES>(stage, i, g);
    uint2 super = {0, 0};
    if (SCALES >= SUPER) super = super_of<BITS, SCALES>(stage, first, i, g);
    for (int row = 0; row < 2; row++) {
        const u32 mins = scales_word<BITS, SCALES>(stage, i, true, g);
        const float min = SCALES == MIN ? half_of(mins, row) : SCALES == SUPER ? -(half_of(super.y, row) * (float)(u8)(mins >> (16 + 8 * row))) : 0.0f;
        for (int j = 0; j < 8; j++) {
            // Columns 0 to 3 of either half are the first of pair 0, the first of pair 1, the second of pair 0, ...
            const u32 word = f.pairs[row][j / 4 * 2 + j % 2];
            const float v = (float)((int)(word >> j % 4 / 2 * 16 & 0xffffu) - ZERO);
            float scale = SCALES == HALVES && j / 4 ? factors.second[row] : factors.first[row];
            if (SCALES >= SUPER) scale = half_of(super.x, row) * scale;
            out[row][j] = SCALES == MIN || SCALES == SUPER ? fmaf(v, scale, min) : v * scale;
        }
    }
}

// Rows of a matrix as bf16: out[row - first row][column]. Grid: steps of a row, tiles; a warp a step. Shared: a stage a warp.
template <int BITS, int SCALES, int ZERO>
DEVICE void to_bf16(const Quantised& w, u16* out, u32 first_tile) {
    depend();
    const u32 warp = threadIdx.x / 32, step = blockIdx.x * WARPS + warp, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (step * STEP >= w.n_runs) return;
    uint4* stage = (uint4*)shared_memory() + warp * Stage<BITS, SCALES>::LEN;
    fetch<BITS, SCALES>(w, stage, first_tile + blockIdx.y, step, lane);
    copy_commit();
    copy_wait<0>();
    warp_sync();
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        const u32 run = step * STEP + i;
        if (run >= w.n_runs) break;
        float v[2][8];
        floats_of<BITS, SCALES, ZERO>(stage, i, (w.first_run + step * STEP) % 8, lane, v);
        for (int row = 0; row < 2; row++) {
            for (int half = 0; half < 2; half++) {
                u16 x[4];
                for (int j = 0; j < 4; j++) x[j] = float_to_bf16(v[row][half * 4 + j]);
                const u64 at = ((u64)(blockIdx.y * TILE_ROWS + g + 8 * row) * w.n_runs + run) * RUN + half * 16 + 4 * t;
                *(uint2*)(out + at) = {pair(x[0], x[1]), pair(x[2], x[3])};
            }
        }
    }
}

// out[token] = table[tokens[token] - first_row], or zeros where this rank does not hold the row. A block a token, a warp a
// step. Shared: a stage a warp.
template <int BITS, int SCALES, int ZERO>
DEVICE void look_up(const Quantised& w, const u32* tokens, float* out, u32 first_row) {
    depend();
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4* stage = (uint4*)shared_memory() + warp * Stage<BITS, SCALES>::LEN;
    for (u32 step = blockIdx.y * WARPS + warp; step * STEP < w.n_runs; step += gridDim.y * WARPS) {
        warp_sync(); // the last step was read
        if (row < w.rows) fetch<BITS, SCALES>(w, stage, row / TILE_ROWS, step, lane);
        copy_commit();
        copy_wait<0>();
        warp_sync();
        if (g != (row < w.rows ? row % 8 : 0)) continue; // one lane of eight has the row, or writes the zeros
        for (int i = 0; i < STEP; i++) {
            const u32 run = step * STEP + i;
            if (run >= w.n_runs) break;
            float v[2][8];
            if (row < w.rows) floats_of<BITS, SCALES, ZERO>(stage, i, (w.first_run + step * STEP) % 8, lane, v);
            for (int j = 0; j < 8; j++) {
                // + 0: no -0 is left, whose sign would depend on which ranks add zeros to it.
                const float value = row >= w.rows ? 0.0f : (row % TILE_ROWS < 8 ? v[0][j] : v[1][j]) + 0.0f;
                out[((u64)blockIdx.x * w.n_runs + run) * RUN + j / 4 * 16 + 4 * t + j % 4] = value;
            }
        }
    }
}

#define QUANTISED_KERNELS(FORMAT, BITS, SCALES, ZERO)                                                                   \
    KERNEL(LINEAR_THREADS)                                                                                             \
    linear_##FORMAT##_8(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                               \
        stream<OfIntegers<BITS, SCALES, ZERO>, 1>(all, x, parts, n_tokens);                                             \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    linear_##FORMAT##_32(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                              \
        stream<OfIntegers<BITS, SCALES, ZERO>, 4>(all, x, parts, n_tokens);                                             \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    to_bf16_##FORMAT(Quantised w, u16* out, u32 first_tile) {                                                           \
        to_bf16<BITS, SCALES, ZERO>(w, out, first_tile);                                                                \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    embed_##FORMAT(Quantised w, const u32* tokens, float* out, u32 first_row) {                                         \
        look_up<BITS, SCALES, ZERO>(w, tokens, out, first_row);                                                         \
    }

QUANTISED_KERNELS(q4_0, 4, PLAIN, 8)
QUANTISED_KERNELS(q4_1, 4, MIN, 0)
QUANTISED_KERNELS(q5_0, 5, PLAIN, 16)
QUANTISED_KERNELS(q5_1, 5, MIN, 0)
QUANTISED_KERNELS(q8_0, 8, PLAIN, 128)
QUANTISED_KERNELS(q4_k, 4, SUPER, 0)
QUANTISED_KERNELS(q5_k, 5, SUPER, 0)
QUANTISED_KERNELS(q6_k, 6, HALVES, 32)
