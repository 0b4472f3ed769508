// Weights in floats. Of bf16: rows [rows, columns] as in the file, padded with zeros to sixteen rows;
// activations as two bf16 numbers each, the second holding what the first lost, so that a product is as good as one in f32
// with weights of bf16; on tensor cores, for few tokens. Many tokens go to cublasLt. Of f16 and f32: plain multiplications,
// for what is small.

// Of x, two bf16 numbers whose sum is x to 16 bits: [padded tokens][columns] each; zeros beyond. A block a token.
KERNEL(LINEAR_THREADS)
split_bf16(const float* in, u16* first, u16* second, u32 columns, u32 n_tokens) {
    const u64 begin = (u64)blockIdx.x * columns;
    for (u32 i = threadIdx.x; i < columns; i += LINEAR_THREADS) {
        const float x = blockIdx.x < n_tokens ? in[begin + i] : 0.0f;
        const u16 rounded = float_to_bf16(x);
        first[begin + i] = rounded;
        second[begin + i] = float_to_bf16(x - bf16_to_float(rounded));
    }
}

// As `multiply` of quantised.cu, with runs of bf16: a lane holds columns 8t to 8t + 7 of a run, which are any eight to the
// product as long as both sides take the same. `x`: first and second numbers, [token][run][4] times eight.
template <int TOKEN_TILES>
DEVICE void multiply_bf16(const uint4* w, const uint4* first, const uint4* second, const u32* parts, float* out, u32 rows,
                          u32 n_runs, u32 n_tokens) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 tile = blockIdx.x, part = blockIdx.z, first_token = blockIdx.y * 8 * TOKEN_TILES;
    const u32 n_padded = padded(n_tokens);
    float sums[TOKEN_TILES][4];
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    for (u32 run = parts[part] + warp; run < parts[part + 1]; run += WARPS) {
        const uint4 a = w[((u64)(tile * TILE_ROWS + g) * n_runs + run) * 4 + t];
        const uint4 below = w[((u64)(tile * TILE_ROWS + g + 8) * n_runs + run) * 4 + t];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            const u32 token = first_token + 8 * n;
            if (token >= n_padded) break;
            const u64 at = ((u64)(token + g) * n_runs + run) * 4 + t;
            const uint4 b = first[at], rest = second[at];
            mma_bf16(sums[n], a.x, below.x, a.y, below.y, b.x, b.y);
            mma_bf16(sums[n], a.x, below.x, a.y, below.y, rest.x, rest.y);
            mma_bf16(sums[n], a.z, below.z, a.w, below.w, b.z, b.w);
            mma_bf16(sums[n], a.z, below.z, a.w, below.w, rest.z, rest.w);
        }
    }
    add_warps<TOKEN_TILES>(sums, out, rows, n_tokens);
}

KERNEL(LINEAR_THREADS)
linear_bf16_8(const uint4* w, const uint4* first, const uint4* second, const u32* parts, float* out, u32 rows, u32 n_runs,
              u32 n_tokens) {
    multiply_bf16<1>(w, first, second, parts, out, rows, n_runs, n_tokens);
}

KERNEL(LINEAR_THREADS)
linear_bf16_32(const uint4* w, const uint4* first, const uint4* second, const u32* parts, float* out, u32 rows, u32 n_runs,
               u32 n_tokens) {
    multiply_bf16<4>(w, first, second, parts, out, rows, n_runs, n_tokens);
}

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

// A warp for each row and token. `w`: [rows][columns]; `parts` are in runs of 32 columns.
template <class Of>
DEVICE void multiply_plain(const typename Of::Number* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns,
                           u32 n_tokens) {
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32, token = blockIdx.y, part = blockIdx.z;
    if (row >= rows) return;
    float sum = 0.0f;
    for (u32 i = parts[part] * RUN + lane; i < parts[part + 1] * RUN; i += 32) {
        sum = fmaf(Of::value(w[(u64)row * columns + i]), x[(u64)token * columns + i], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) out[((u64)part * n_tokens + token) * rows + row] = sum;
}

KERNEL(LINEAR_THREADS)
linear_f32(const float* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns, u32 n_tokens) {
    multiply_plain<OfF32>(w, x, parts, out, rows, columns, n_tokens);
}

KERNEL(LINEAR_THREADS)
linear_f16(const u16* w, const float* x, const u32* parts, float* out, u32 rows, u32 columns, u32 n_tokens) {
    multiply_plain<OfF16>(w, x, parts, out, rows, columns, n_tokens);
}

template <class Of>
DEVICE void look_up_plain(const typename Of::Number* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    for (u32 i = threadIdx.x; i < columns; i += LINEAR_THREADS) {
        const float value = row < rows ? Of::value(w[(u64)row * columns + i]) + 0.0f : 0.0f;
        out[(u64)blockIdx.x * columns + i] = value;
    }
}

KERNEL(LINEAR_THREADS)
embed_f32(const float* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfF32>(w, tokens, out, first_row, rows, columns);
}

KERNEL(LINEAR_THREADS)
embed_f16(const u16* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfF16>(w, tokens, out, first_row, rows, columns);
}

KERNEL(LINEAR_THREADS)
embed_bf16(const u16* w, const u32* tokens, float* out, u32 first_row, u32 rows, u32 columns) {
    look_up_plain<OfBf16>(w, tokens, out, first_row, rows, columns);
}
