// Weights in floats. Of bf16: rows [rows, columns] as in the file, padded with zeros to sixteen rows; activations as two bf16
// numbers each, so that a product is as good as one in f32 with weights of bf16; on tensor cores, for few tokens. Many tokens
// go to cublasLt. Of f16 and f32: plain multiplications, for what is small.

// A matrix of bf16.
struct Dense {
    const uint4* w;
    u32 rows, n_runs;
};

// A step is two runs, 128 bytes of each row. A lane multiplies columns 8t to 8t + 7 of each run, which are any eight to the
// product as long as both sides take the same.
struct OfBf16Rows : TensorSums {
    typedef Dense Matrix;
    static constexpr u32 RUNS = 2, LEN = 4 * 32;

    static DEVICE_MEMBER u32 made_floats(u32 columns) { return columns; }
    static DEVICE_MEMBER Made made_at(const Made& like, float* place) {
        Made made = {};
        made.first = (u16*)place, made.second = made.first + like.columns;
        made.columns = like.columns, made.n_tokens = 1;
        return made;
    }

    // Eight lanes fetch a row of a step: whole lines. In shared memory it lies by run, then as lanes multiply it: rows 0 to 7
    // and the rest.
    template <int WARPS>
    struct Cursor {
        const uint4* row; // the lane's first of the first tile
        u32 at;           // from there on, in sixteen bytes
        u32 runs_left;    // of the row, from this lane's run on

        DEVICE_MEMBER void enter(const Dense& m, u32 lane) { row = m.w + (u64)(lane / 8) * m.n_runs * 4 + lane % 8; }

        // `like`: any matrix of these columns.
        DEVICE_MEMBER void begin(const Dense& like, u32 tile, u32 step, u32 lane) {
            at = tile * TILE_ROWS * like.n_runs * 4 + step * RUNS * 4;
            runs_left = like.n_runs - step * RUNS - lane % 8 / 4;
        }

        DEVICE_MEMBER void fetch(uint4* stage, const Dense& like, u32 lane) {
            // Of a last step that is one run, half of the lanes have nothing.
            const bool is_there = (int)runs_left > 0;
            const uint4* from = row + at;
            uint4* to = stage + lane % 8 / 4 * 64 + lane / 8 * 4 + lane % 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (is_there) copy_begin(to + i * 16, from + i * 16 * like.n_runs);
            }
            at += WARPS * RUNS * 4;
            runs_left -= WARPS * RUNS;
        }
    };

    static DEVICE_MEMBER bool is_plain(const Dense& m, u32 begin, u32 end) { return begin % RUNS == 0 && end % RUNS == 0; }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_run(float sums[TOKEN_TILES][4], const uint4* stage, int i, const Dense& m, const Made& x,
                                           u32 run, u32 first_token, u32 n_tokens, u32 lane) {
        const uint4 a = stage[2 * i * 32 + lane], below = stage[(2 * i + 1) * 32 + lane];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            if (n > 0 && first_token + 8 * n >= n_tokens) break;
            const u32 token = min(first_token + 8 * n + lane / 4, n_tokens - 1); // what is beyond is not looked at
            const u64 at = (u64)(token * m.n_runs + run) * 4 + lane % 4;
            const uint4 b = ((const uint4*)x.first)[at], rest = ((const uint4*)x.second)[at];
            float product[4] = {0.0f, 0.0f, 0.0f, 0.0f}; // a shorter chain
            mma_bf16(product, a.x, below.x, a.y, below.y, rest.x, rest.y);
            mma_bf16(product, a.z, below.z, a.w, below.w, rest.z, rest.w);
            mma_bf16(sums[n], a.x, below.x, a.y, below.y, b.x, b.y);
            mma_bf16(sums[n], a.z, below.z, a.w, below.w, b.z, b.w);
            for (int j = 0; j < 4; j++) sums[n][j] += product[j];
        }
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply(float sums[TOKEN_TILES][4], const uint4* stage, const Dense& m, const Made& x, u32 step,
                                       u32 first_token, u32 n_tokens, u32 lane) {
#pragma unroll
        for (int i = 0; i < (int)RUNS; i++) {
            multiply_run<TOKEN_TILES>(sums, stage, i, m, x, step * RUNS + i, first_token, n_tokens, lane);
        }
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_any(float sums[TOKEN_TILES][4], const uint4* stage, const Dense& m, const Made& x, u32 step,
                                           u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
#pragma unroll
        for (int i = 0; i < (int)RUNS; i++) {
            const u32 run = step * RUNS + i;
            if (run < begin || run >= end) continue;
            multiply_run<TOKEN_TILES>(sums, stage, i, m, x, run, first_token, n_tokens, lane);
        }
    }
};

#ifdef HAS_BF16

KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)
linear_bf16_1(Several<Dense> all, Made x, const u32* parts, u32 n_tokens, Normed normed) {
    stream<OfBf16Rows, FEW_WARPS, 1, true>(all, x, parts, n_tokens, normed);
}

KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)
linear_bf16_8(Several<Dense> all, Made x, const u32* parts, u32 n_tokens) {
    stream<OfBf16Rows, FEW_WARPS, 1>(all, x, parts, n_tokens);
}

KERNEL_AT_LEAST(MANY_THREADS, MANY_BLOCKS)
linear_bf16_32(Several<Dense> all, Made x, const u32* parts, u32 n_tokens) {
    stream<OfBf16Rows, MANY_WARPS, 4>(all, x, parts, n_tokens);
}

#endif

// Small kernels, which are always compiled.
struct OfF32 {
    typedef float Number;
    DEVICE float value(float x) { return x; }
};
struct OfF16 {
    typedef u16 Number;
    DEVICE float value(u16 x) { return half_to_float(x); }
};
struct OfBf16 {
    typedef u16 Number;
    DEVICE float value(u16 x) { return bf16_to_float(x); }
};

// A warp for each row and token. `w`: [rows][columns]; `parts` are in runs of 32 columns. `adds`: to what is in `out`.
template <class Of>
DEVICE void multiply_plain(const typename Of::Number* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns,
                           u32 n_tokens, u32 adds) {
    depend();
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * PACK_WARPS + threadIdx.x / 32, token = blockIdx.y, part = blockIdx.z;
    if (row >= rows) return;
    float sum = 0.0f;
    for (u32 i = parts[part] * RUN + lane; i < parts[part + 1] * RUN; i += 32) {
        sum = fmaf(Of::value(w[(u64)row * columns + i]), x[(u64)token * columns + i], sum);
    }
    sum = warp_sum(sum);
    float* to = out + ((u64)part * n_tokens + token) * rows + row;
    if (lane == 0) *to = adds ? *to + sum : sum;
}

KERNEL(PACK_THREADS)
linear_f32(const float* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns, u32 n_tokens,
           u32 adds) {
    multiply_plain<OfF32>(w, x, parts, out, rows, columns, n_tokens, adds);
}

KERNEL(PACK_THREADS)
linear_f16(const u16* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns, u32 n_tokens,
           u32 adds) {
    multiply_plain<OfF16>(w, x, parts, out, rows, columns, n_tokens, adds);
}

template <class Of>
DEVICE void look_up_plain(const typename Of::Number* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    depend();
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    for (u32 i = threadIdx.x; i < columns; i += PACK_THREADS) {
        const float value = row < rows ? Of::value(w[(u64)row * columns + i]) + 0.0f : 0.0f;
        out[(u64)blockIdx.x * columns + i] = value;
    }
}

KERNEL(PACK_THREADS)
embed_f32(const float* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfF32>(w, tokens, out, first_row, rows, columns);
}

KERNEL(PACK_THREADS)
embed_f16(const u16* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfF16>(w, tokens, out, first_row, rows, columns);
}

KERNEL(PACK_THREADS)
embed_bf16(const u16* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfBf16>(w, tokens, out, first_row, rows, columns);
}
