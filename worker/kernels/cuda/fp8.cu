// Weights of eight bits, e4m3 (`quant/fp8.rs`): rows [rows, columns] of one byte a number, padded with zeros to sixteen rows
// and to whole steps, and a float for each row that its numbers are multiplied with. Of the 32 columns of a run, byte
// 8t + 4h + i is column 16h + 4t + (0, 2, 1, 3)[i]: lane t of four takes eight bytes, in the order in which activations come.
//
// A number is one of f16 too, so products are those of f16 with the activations' f16 numbers (`activations.cu`), added up over
// a step; a step meets its token's scale, and the sum its row's.

// A matrix.
struct Fp8 {
    const uint4* w;
    const float* scales; // [row], 2^-24 times the scale: tokens' are 2^24 times theirs
    u32 rows, n_runs;
};

#define FP8_STEP_BYTES (STEP * RUN)

// Where the first of a row's two 16-byte words of a run stands in shared memory, eight of them a row: lanes that fetch a row,
// and lanes that multiply four rows, each meet all banks.
DEVICE u32 place_of_row(u32 row, u32 run) { return row * 8 + (2 * run ^ row % 4 * 2); }

// A step is 128 bytes of each row.
struct OfFp8 : TensorSums {
    typedef Fp8 Matrix;
    static constexpr u32 RUNS = STEP, LEN = TILE_ROWS * FP8_STEP_BYTES / 16;

    // Halves of a step, two in a float, then its scale, which a tile of eight tokens has.
    static DEVICE_MEMBER u32 made_floats(u32 columns) { return steps_of(columns) * (STEP_COLUMNS / 2 + 8); }
    static DEVICE_MEMBER Made made_at(const Made& like, float* place) {
        Made made = {};
        made.halves = (uint2*)place, made.scales = place + steps_of(like.columns) * (STEP_COLUMNS / 2);
        made.columns = like.columns, made.n_tokens = 1;
        return made;
    }

    // Eight lanes fetch a row of a step: whole lines.
    template <int WARPS>
    struct Cursor {
        const uint4* row; // the lane's first of the first tile
        u32 at;           // from there on, in sixteen bytes

        DEVICE_MEMBER void enter(const Fp8& m, u32 lane) {
            row = m.w + (u64)(lane / 8) * steps_of(m.n_runs * RUN) * 8 + lane % 8;
        }

        // `like`: any matrix of these columns.
        DEVICE_MEMBER void begin(const Fp8& like, u32 tile, u32 step, u32) {
            at = (tile * TILE_ROWS * steps_of(like.n_runs * RUN) + step) * 8;
        }

        DEVICE_MEMBER void fetch(uint4* stage, const Fp8& like, u32 lane) {
            const uint4* from = row + at;
            uint4* to = stage + place_of_row(lane / 8, lane % 8 / 2) + lane % 2;
#pragma unroll
            for (int i = 0; i < 4; i++) copy_begin(to + i * 4 * 8, from + i * 4 * 8 * steps_of(like.n_runs * RUN));
            at += WARPS * 8;
        }
    };

    static DEVICE_MEMBER bool is_plain(const Fp8& m, u32 begin, u32 end) {
        return begin % STEP == 0 && (end % STEP == 0 || end == m.n_runs);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void finish(float sums[TOKEN_TILES][4], const Several<Fp8>& all, u32 matrix, u32 tile, u32 lane) {
        const float* scales = pick(all.of, matrix).scales + tile * TILE_ROWS + lane / 4;
        const float of_row[2] = {scales[0], scales[8]};
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            for (int i = 0; i < 4; i++) sums[n][i] *= of_row[i / 2];
        }
    }

    // The weights that a lane multiplies of run `i`, of rows g and g + 8: columns 4t and 4t + 2, 4t + 1 and 4t + 3, then the
    // same of 16 + 4t.
    static DEVICE_MEMBER void fragment(const uint4* stage, int i, u32 lane, uint2 first[2], uint2 second[2]) {
        const u32 g = lane / 4, t = lane % 4;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint2 bytes = ((const uint2*)(stage + place_of_row(g, i) + row * 8 * 8))[t];
            first[row] = halves_of_e4m3(bytes.x);
            second[row] = halves_of_e4m3(bytes.y);
        }
    }

    // Adds the products of runs `from` to `to` of a step.
    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_runs(float sums[TOKEN_TILES][4], const uint4* stage, const Made& x, u32 step, u32 from,
                                            u32 to, u32 first_token, u32 n_tokens, u32 lane) {
        const u32 g = lane / 4, t = lane % 4, n_padded = padded(n_tokens), n_steps = steps_of(x.columns);
        const uint4* b_of[TOKEN_TILES];
        float of_step[TOKEN_TILES][4];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            const u32 token = min(first_token + 8 * n + g, n_tokens - 1); // what is beyond is not looked at
            b_of[n] = (const uint4*)x.halves + (u64)(token * n_steps + step) * (4 * STEP) + t;
            for (int j = 0; j < 4; j++) of_step[n][j] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            if (i < (int)from || i >= (int)to) continue;
            uint2 a[2], rest[2];
            fragment(stage, i, lane, a, rest);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                if (n > 0 && first_token + 8 * n >= n_padded) break;
                const uint4 b = b_of[n][4 * i];
                mma_f16(of_step[n], a[0].x, a[1].x, a[0].y, a[1].y, b.x, b.y);
                mma_f16(of_step[n], rest[0].x, rest[1].x, rest[0].y, rest[1].y, b.z, b.w);
            }
        }
        const u64 of_scales = ((u64)step * n_padded + first_token) / 2 + t;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            if (n > 0 && first_token + 8 * n >= n_padded) break;
            const float2 scales = ((const float2*)x.scales)[of_scales + 4 * n];
            for (int j = 0; j < 4; j++) sums[n][j] = fmaf(of_step[n][j], j % 2 ? scales.y : scales.x, sums[n][j]);
        }
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply(float sums[TOKEN_TILES][4], const uint4* stage, const Fp8&, const Made& x, u32 step,
                                       u32 first_token, u32 n_tokens, u32 lane) {
        multiply_runs<TOKEN_TILES>(sums, stage, x, step, 0, STEP, first_token, n_tokens, lane);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_any(float sums[TOKEN_TILES][4], const uint4* stage, const Fp8&, const Made& x, u32 step,
                                           u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
        const u32 first = step * STEP, from = begin > first ? begin - first : 0, to = min(end - first, (u32)STEP);
        multiply_runs<TOKEN_TILES>(sums, stage, x, step, from, to, first_token, n_tokens, lane);
    }
};

#ifdef HAS_FP8

KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)
linear_fp8_1(Several<Fp8> all, Made x, const u32* parts, u32 n_tokens, Normed normed) {
    stream<OfFp8, FEW_WARPS, 1, true>(all, x, parts, n_tokens, normed);
}

KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)
linear_fp8_8(Several<Fp8> all, Made x, const u32* parts, u32 n_tokens) {
    stream<OfFp8, FEW_WARPS, 1>(all, x, parts, n_tokens);
}

KERNEL_AT_LEAST(MANY_THREADS, MANY_BLOCKS)
linear_fp8_32(Several<Fp8> all, Made x, const u32* parts, u32 n_tokens) {
    stream<OfFp8, MANY_WARPS, 4>(all, x, parts, n_tokens);
}

// Rows of a matrix as bf16, which holds them exactly: out[row - first row][column]. Grid: 256 fours of columns, rows.
KERNEL(PACK_THREADS)
to_bf16_fp8(Fp8 m, u16* out, u32 first_row) {
    depend();
    const u32 at = blockIdx.x * PACK_THREADS + threadIdx.x, columns = m.n_runs * RUN;
    if (at >= columns / 4) return;
    const u32 row = first_row + blockIdx.y, run = at / 8, four = at % 8; // columns 4 * four of the run
    const u32 n_steps = steps_of(columns);
    const u64 word = ((u64)row * n_steps * STEP + run) * 8 + four % 4 * 2 + four / 4;
    const uint2 halves = halves_of_e4m3(((const u32*)m.w)[word]); // columns 0 and 2, 1 and 3
    const float scale = m.scales[row] * 16777216.0f; // 2^24
    u16 x[4];
    for (int i = 0; i < 4; i++) {
        const u32 two = i % 2 ? halves.y : halves.x;
        x[i] = float_to_bf16(half_to_float((u16)(i / 2 ? two >> 16 : two)) * scale);
    }
    *(uint2*)(out + (u64)blockIdx.y * columns + at * 4) = {pair(x[0], x[1]), pair(x[2], x[3])};
}

#endif
