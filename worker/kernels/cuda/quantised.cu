// Weights in integers, as `matrix.rs` lays them: sixteen rows a tile, 32 columns a run, and runs by twos and fours so that a
// lane reads sixteen bytes at once. A weight is scale * (u - ZERO) + min.
//
// u is never turned into a float: its bits are those of the f16 number u * 2^-24, which tensor cores multiply exactly with
// activations in f16 (`activations.cu`); a run's product, a float, then meets the scales of its row and of its token. Every
// warp of a block adds up every WARPS-th unit of eight runs, in order; then the warps' sums are added in order. The floats
// added, and their order, do not depend on how many tokens there are.

#define WARPS 8
#define LINEAR_THREADS 256
#define TILE_ROWS 16
#define UNIT 8 // runs that a warp takes at once

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

// What a lane reads of one unit.
template <int BITS, int SCALES>
struct Unit {
    uint4 quants[BITS == 8 ? UNIT : UNIT / 2];
    uint4 tops[BITS == 5 || BITS == 6 ? UNIT / 2 : 1];
    uint4 scales[SCALES == MIN ? UNIT / 2 : UNIT / 4];
    uint2 supers[2]; // a unit may begin within a super-block
};

template <int BITS, int SCALES>
DEVICE Unit<BITS, SCALES> unit_of(const Quantised& w, u32 tile, u32 unit, u32 lane) {
    Unit<BITS, SCALES> u;
    const u32 g = lane / 4, n_pairs = (w.n_runs + 1) / 2, n_fours = (w.n_runs + 3) / 4;
    const u32 pair = unit * (UNIT / 2), four = unit * (UNIT / 4);
    if (BITS == 8) {
        const uint4* from = (const uint4*)w.quants + ((u64)tile * w.n_runs + unit * UNIT) * 32 + lane;
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            if (unit * UNIT + i < w.n_runs) u.quants[i] = read_once(from + i * 32);
        }
    } else {
        const uint4* from = (const uint4*)w.quants + ((u64)tile * n_pairs + pair) * 32 + lane;
#pragma unroll
        for (int i = 0; i < UNIT / 2; i++) {
            if (pair + i < n_pairs) u.quants[i] = read_once(from + i * 32);
        }
    }
    if (BITS == 5 || BITS == 6) {
        const u32 lanes = BITS == 5 ? 8 : 16, mine = BITS == 5 ? g : g * 2 + lane % 4 / 2;
        const uint4* from = (const uint4*)w.tops + ((u64)tile * n_pairs + pair) * lanes + mine;
#pragma unroll
        for (int i = 0; i < UNIT / 2; i++) {
            if (pair + i < n_pairs) u.tops[i] = read_once(from + i * lanes);
        }
    }
    if (SCALES == MIN) {
        const uint4* from = (const uint4*)w.scales + ((u64)tile * n_pairs + pair) * 8 + g;
#pragma unroll
        for (int i = 0; i < UNIT / 2; i++) {
            if (pair + i < n_pairs) u.scales[i] = read_once(from + i * 8);
        }
    } else {
        const uint4* from = (const uint4*)w.scales + ((u64)tile * n_fours + four) * 8 + g;
#pragma unroll
        for (int i = 0; i < UNIT / 4; i++) {
            if (four + i < n_fours) u.scales[i] = read_once(from + i * 8);
        }
    }
    if (SCALES == SUPER || SCALES == HALVES) {
        const u32 super = unit + w.first_run / UNIT;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (super + i >= w.n_supers || (i == 1 && w.first_run % UNIT == 0)) continue;
            const u64 at = ((u64)tile * w.n_supers + super + i) * 8 + g;
            if (SCALES == SUPER) u.supers[i] = ((const uint2*)w.supers)[at];
            else u.supers[i].x = w.supers[at];
        }
    }
    return u;
}

DEVICE u32 word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// The weights that a lane multiplies of one run: u of rows g and g + 8, two columns a word: 4t and 4t + 2, 4t + 1 and
// 4t + 3, then the same of 16 + 4t.
struct Fragment {
    u32 pairs[2][4];
};

template <int BITS, int SCALES>
DEVICE Fragment fragment_of(const Unit<BITS, SCALES>& u, int run, u32 lane) {
    Fragment f;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32* pairs = f.pairs[row];
        if (BITS == 8) {
            const u32 low = word_of(u.quants[run], 2 * row), high = word_of(u.quants[run], 2 * row + 1);
            pairs[0] = low & 0x00ff00ffu, pairs[1] = low >> 8 & 0x00ff00ffu;
            pairs[2] = high & 0x00ff00ffu, pairs[3] = high >> 8 & 0x00ff00ffu;
            continue;
        }
        const u32 word = word_of(u.quants[run / 2], run % 2 * 2 + row);
        pairs[0] = word & 0x000f000fu, pairs[1] = word >> 8 & 0x000f000fu;
        pairs[2] = word >> 4 & 0x000f000fu, pairs[3] = word >> 12 & 0x000f000fu;
        if (BITS == 5) {
            const u32 top = word_of(u.tops[run / 2], run % 2 * 2 + row) >> lane % 4;
            pairs[0] |= top << 4 & 0x00100010u, pairs[1] |= top & 0x00100010u;
            pairs[2] |= top >> 4 & 0x00100010u, pairs[3] |= top >> 8 & 0x00100010u;
        }
        if (BITS == 6) {
            const u32 top = word_of(u.tops[run / 2], run % 2 * 2 + row) >> lane % 2 * 4;
            pairs[0] |= top << 4 & 0x00300030u, pairs[1] |= top >> 4 & 0x00300030u;
            pairs[2] |= top << 2 & 0x00300030u, pairs[3] |= top >> 6 & 0x00300030u;
        }
    }
    return f;
}

// Of rows g and g + 8 in one run. Of HALVES `scale` is that of the first half and `min` that of the second.
struct Scaling {
    float scale[2], min[2];
};

template <int BITS, int SCALES>
DEVICE Scaling scaling_of(const Unit<BITS, SCALES>& u, int run, u32 first_run) {
    Scaling s;
    if (SCALES == PLAIN) {
        const u32 d = word_of(u.scales[run / 4], run % 4);
        s.scale[0] = half_to_float((u16)d), s.scale[1] = half_to_float((u16)(d >> 16));
        s.min[0] = s.min[1] = 0.0f;
        return s;
    }
    if (SCALES == MIN) {
        const u32 d = word_of(u.scales[run / 2], run % 2 * 2), m = word_of(u.scales[run / 2], run % 2 * 2 + 1);
        s.scale[0] = half_to_float((u16)d), s.scale[1] = half_to_float((u16)(d >> 16));
        s.min[0] = half_to_float((u16)m), s.min[1] = half_to_float((u16)(m >> 16));
        return s;
    }
    const u32 bytes = word_of(u.scales[run / 4], run % 4); // sc and sc of the two rows, then mc and mc
    const uint2 dm = first_run % UNIT + run < UNIT ? u.supers[0] : u.supers[1];
    const float d[2] = {half_to_float((u16)dm.x), half_to_float((u16)(dm.x >> 16))};
    if (SCALES == SUPER) {
        s.scale[0] = d[0] * (float)(bytes & 255u), s.scale[1] = d[1] * (float)(bytes >> 8 & 255u);
        s.min[0] = -(half_to_float((u16)dm.y) * (float)(bytes >> 16 & 255u));
        s.min[1] = -(half_to_float((u16)(dm.y >> 16)) * (float)(bytes >> 24));
        return s;
    }
    s.scale[0] = d[0] * (float)(signed char)bytes, s.scale[1] = d[1] * (float)(signed char)(bytes >> 8);
    s.min[0] = d[0] * (float)(signed char)(bytes >> 16), s.min[1] = d[1] * (float)(signed char)(bytes >> 24);
    return s;
}

// The sums of a block's warps, added in order, to out[part][token][row]. `sums` lie as products of tensor cores do.
template <int TOKEN_TILES>
DEVICE void add_warps(const float sums[TOKEN_TILES][4], float* out, u32 tile, u32 rows, u32 n_tokens) {
    float* place = (float*)shared_memory(); // [warp][token][row] of one token tile
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 row_of_tile = threadIdx.x % TILE_ROWS, token_of_tile = threadIdx.x / TILE_ROWS;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if ((blockIdx.y * TOKEN_TILES + n) * 8 >= n_tokens) break;
        block_sync();
        for (int i = 0; i < 4; i++) {
            place[(warp * 8 + 2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[n][i];
        }
        block_sync();
        const u32 row = tile * TILE_ROWS + row_of_tile;
        const u32 token = (blockIdx.y * TOKEN_TILES + n) * 8 + token_of_tile;
        if (token_of_tile < 8 && token < n_tokens && row < rows) {
            float sum = 0.0f;
            for (u32 i = 0; i < WARPS; i++) sum += place[(i * 8 + token_of_tile) * TILE_ROWS + row_of_tile];
            out[((u64)blockIdx.z * n_tokens + token) * rows + row] = sum;
        }
    }
}

#define MOST_MATRICES 3

// Matrices of one format on one input, tile after tile. `first_tiles`: where the tiles of each begin; of those that are
// not there, beyond the last.
template <class Matrix>
struct Several {
    Matrix of[MOST_MATRICES];
    float* outs[MOST_MATRICES]; // [part][token][row] each
    u32 first_tiles[4];
};

// The matrix that a tile is of, and where it goes. (An index would put all of them into local memory.)
template <class Matrix>
struct Chosen {
    Matrix matrix;
    float* out;
    u32 tile;
};

template <class Matrix>
DEVICE Chosen<Matrix> choose(const Several<Matrix>& all, u32 tile) {
    if (tile >= all.first_tiles[2]) return {all.of[2], all.outs[2], tile - all.first_tiles[2]};
    if (tile >= all.first_tiles[1]) return {all.of[1], all.outs[1], tile - all.first_tiles[1]};
    return {all.of[0], all.outs[0], tile};
}

// out[part][token][row] = sum over the part's columns of x[token] * w[row], for 8 * TOKEN_TILES tokens a block. Grid:
// tiles, tokens, parts. `parts`: where the runs of each part begin, and where the last ends.
template <int BITS, int SCALES, int ZERO, int TOKEN_TILES>
DEVICE void multiply(const Several<Quantised>& all, const Made& x, const u32* parts, u32 n_tokens) {
    const Chosen<Quantised> chosen = choose(all, blockIdx.x);
    const Quantised w = chosen.matrix;
    const u32 tile = chosen.tile;
    const u32 n_padded = padded(n_tokens), first_token = blockIdx.y * 8 * TOKEN_TILES;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 begin = parts[blockIdx.z], end = parts[blockIdx.z + 1];
    u32 unit = begin / UNIT + warp;
    Unit<BITS, SCALES> next;
    if (unit * UNIT < end) next = unit_of<BITS, SCALES>(w, tile, unit, lane);
    depend();
    float sums[TOKEN_TILES][4];
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    for (; unit * UNIT < end; unit += WARPS) {
        const Unit<BITS, SCALES> u = next;
        if ((unit + WARPS) * UNIT < end) next = unit_of<BITS, SCALES>(w, tile, unit + WARPS, lane);
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            const u32 run = unit * UNIT + i;
            if (run < begin || run >= end) continue;
            const Fragment a = fragment_of<BITS, SCALES>(u, i, lane);
            const Scaling s = scaling_of<BITS, SCALES>(u, i, w.first_run);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                const u32 token = first_token + 8 * n;
                if (token >= n_padded) break;
                uint4 b = {0, 0, 0, 0};
                if (token + g < n_tokens) b = ((const uint4*)x.halves)[((u64)(token + g) * w.n_runs + run) * 4 + t];
                const u64 of_tokens = ((u64)run * n_padded + token) / 2 + t;
                const float2 scales = ((const float2*)x.scales)[of_tokens];
                const float4 totals = ((const float4*)x.totals)[of_tokens]; // halves of one token, then of the next
                const float scale[2] = {scales.x, scales.y}, first[2] = {totals.x, totals.z}, rest[2] = {totals.y, totals.w};
                float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma_f16(product, a.pairs[0][0], a.pairs[1][0], a.pairs[0][1], a.pairs[1][1], b.x, b.y);
                if (SCALES == HALVES) {
                    float second[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    mma_f16(second, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
                    for (int j = 0; j < 4; j++) {
                        const float one = fmaf(-(float)ZERO, first[j % 2], product[j]) * s.scale[j / 2];
                        const float both = fmaf(fmaf(-(float)ZERO, rest[j % 2], second[j]), s.min[j / 2], one);
                        sums[n][j] = fmaf(both, scale[j % 2], sums[n][j]);
                    }
                    continue;
                }
                mma_f16(product, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
                for (int j = 0; j < 4; j++) {
                    const float total = first[j % 2] + rest[j % 2];
                    if (SCALES == PLAIN) {
                        const float exact = fmaf(-(float)ZERO, total, product[j]) * s.scale[j / 2];
                        sums[n][j] = fmaf(exact, scale[j % 2], sums[n][j]);
                    } else {
                        const float with_min = fmaf(total, s.min[j / 2], product[j] * s.scale[j / 2]);
                        sums[n][j] = fmaf(with_min, scale[j % 2], sums[n][j]);
                    }
                }
            }
        }
    }
    add_warps<TOKEN_TILES>(sums, chosen.out, tile, w.rows, n_tokens);
}

// The weights of a tile's run, as a lane multiplies them, in floats. [row of two][column: 4t.. then 16 + 4t..]
template <int BITS, int SCALES, int ZERO>
DEVICE void floats_of(const Unit<BITS, SCALES>& u, int run, u32 first_run, u32 lane, float out[2][8]) {
    const Fragment f = fragment_of<BITS, SCALES>(u, run, lane);
    const Scaling s = scaling_of<BITS, SCALES>(u, run, first_run);
    for (int row = 0; row < 2; row++) {
        for (int i = 0; i < 8; i++) {
            // Columns 0 to 3 of either half are the first of pair 0, the first of pair 1, the second of pair 0, ...
            const u32 word = f.pairs[row][i / 4 * 2 + i % 2];
            const float v = (float)((int)(word >> i % 4 / 2 * 16 & 0xffffu) - ZERO);
            if (SCALES == PLAIN) out[row][i] = v * s.scale[row];
            else if (SCALES == HALVES) out[row][i] = v * (i / 4 ? s.min[row] : s.scale[row]);
            else out[row][i] = fmaf(v, s.scale[row], s.min[row]);
        }
    }
}

// Rows of a matrix as bf16: out[row - first row][column]. Grid: units of a row, tiles; a warp a unit.
template <int BITS, int SCALES, int ZERO>
DEVICE void to_bf16(const Quantised& w, u16* out, u32 first_tile) {
    depend();
    const u32 unit = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (unit * UNIT >= w.n_runs) return;
    const Unit<BITS, SCALES> u = unit_of<BITS, SCALES>(w, first_tile + blockIdx.y, unit, lane);
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        const u32 run = unit * UNIT + i;
        if (run >= w.n_runs) break;
        float v[2][8];
        floats_of<BITS, SCALES, ZERO>(u, i, w.first_run, lane, v);
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
// unit.
template <int BITS, int SCALES, int ZERO>
DEVICE void look_up(const Quantised& w, const u32* tokens, float* out, u32 first_row) {
    depend();
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, tile = row / TILE_ROWS;
    for (u32 unit = threadIdx.x / 32; unit * UNIT < w.n_runs; unit += WARPS) {
        if (row < w.rows && row % 8 != g) continue; // one lane of eight has the row, or writes the zeros
        if (row >= w.rows && g != 0) continue;
        Unit<BITS, SCALES> u;
        if (row < w.rows) u = unit_of<BITS, SCALES>(w, tile, unit, lane);
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            const u32 run = unit * UNIT + i;
            if (run >= w.n_runs) break;
            float v[2][8];
            if (row < w.rows) floats_of<BITS, SCALES, ZERO>(u, i, w.first_run, lane, v);
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
        multiply<BITS, SCALES, ZERO, 1>(all, x, parts, n_tokens);                                                       \
    }                                                                                                                  \
    KERNEL(LINEAR_THREADS)                                                                                             \
    linear_##FORMAT##_32(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                              \
        multiply<BITS, SCALES, ZERO, 4>(all, x, parts, n_tokens);                                                       \
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
