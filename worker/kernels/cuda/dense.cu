// Weights in floats. Of bf16: rows [rows, columns] as in the file, padded with zeros to sixteen rows;
// activations as two bf16 numbers each, the second holding what the first lost, so that a product is as good as one in f32
// with weights of bf16; on tensor cores, for few tokens. Many tokens go to cublasLt. Of f16 and f32: plain multiplications,
// for what is small.

// A matrix of bf16.
struct Dense {
    const uint4* w;
    u32 rows, n_runs;
};

#define DENSE_UNIT 4 // runs that a warp takes at once

struct DenseUnit {
    uint4 rows[2][DENSE_UNIT];
};

// A lane holds columns 8t to 8t + 7 of a run, which are any eight to the product as long as both sides take the same.
DEVICE DenseUnit dense_unit_of(const Dense& m, u32 tile, u32 unit, u32 lane) {
    DenseUnit u;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const uint4* from = m.w + ((u64)(tile * TILE_ROWS + lane / 4 + 8 * row) * m.n_runs + unit * DENSE_UNIT) * 4 + lane % 4;
#pragma unroll
        for (int i = 0; i < DENSE_UNIT; i++) {
            if (unit * DENSE_UNIT + i < m.n_runs) u.rows[row][i] = read_once(from + i * 4);
        }
    }
    return u;
}

// As `multiply` of quantised.cu.
template <int TOKEN_TILES>
DEVICE void multiply_bf16(const Several<Dense>& all, const Made& x, const u32* parts, u32 n_tokens) {
    const Chosen<Dense> chosen = choose(all, blockIdx.x);
    const Dense m = chosen.matrix;
    const u32 tile = chosen.tile;
    const u32 n_padded = padded(n_tokens), first_token = blockIdx.y * 8 * TOKEN_TILES;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 begin = parts[blockIdx.z], end = parts[blockIdx.z + 1];
    u32 unit = begin / DENSE_UNIT + warp;
    DenseUnit next;
    if (unit * DENSE_UNIT < end) next = dense_unit_of(m, tile, unit, lane);
    depend();
    float sums[TOKEN_TILES][4];
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    for (; unit * DENSE_UNIT < end; unit += WARPS) {
        const DenseUnit u = next;
        if ((unit + WARPS) * DENSE_UNIT < end) next = dense_unit_of(m, tile, unit + WARPS, lane);
#pragma unroll
        for (int i = 0; i < DENSE_UNIT; i++) {
            const u32 run = unit * DENSE_UNIT + i;
            if (run < begin || run >= end) continue;
            const uint4 a = u.rows[0][i], below = u.rows[1][i];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                const u32 token = first_token + 8 * n;
                if (token >= n_padded) break;
                const u64 at = ((u64)(token + g) * m.n_runs + run) * 4 + t;
                uint4 b = {0, 0, 0, 0}, rest = {0, 0, 0, 0};
                if (token + g < n_tokens) {
                    b = ((const uint4*)x.first)[at];
                    rest = ((const uint4*)x.second)[at];
                }
                mma_bf16(sums[n], a.x, below.x, a.y, below.y, b.x, b.y);
                mma_bf16(sums[n], a.x, below.x, a.y, below.y, rest.x, rest.y);
                mma_bf16(sums[n], a.z, below.z, a.w, below.w, b.z, b.w);
                mma_bf16(sums[n], a.z, below.z, a.w, below.w, rest.z, rest.w);
            }
        }
    }
    add_warps<TOKEN_TILES>(sums, chosen.out, tile, m.rows, n_tokens);
}

KERNEL(LINEAR_THREADS)
linear_bf16_8(Several<Dense> all, Made x, const u32* parts, u32 n_tokens) { multiply_bf16<1>(all, x, parts, n_tokens); }

KERNEL(LINEAR_THREADS)
linear_bf16_32(Several<Dense> all, Made x, const u32* parts, u32 n_tokens) { multiply_bf16<4>(all, x, parts, n_tokens); }

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
    depend();
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
    depend();
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
