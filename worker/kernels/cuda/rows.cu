// Kernels that look at one row at a time, or at single numbers: sums of parts, rows taken by their numbers, and what is
// largest in a row of logits.

#define ROW_THREADS 256
#define STRETCH 1024
#define STRETCH_LANES 16

// out = the parts' sum, in order; zeros where there is none. `parts`: [n_parts][n].
KERNEL(ROW_THREADS)
add_parts(const float* parts, float* out, u32 n, u32 n_parts) {
    depend();
    const u32 i = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (u32 part = 0; part < n_parts; part++) sum += parts[(u64)part * n + i];
    out[i] = sum;
}

// The largest logit of a row, and of equals the first: `out[2 row]` is the logit, `out[2 row + 1]` holds its index as
// bits. If one is not finite, the first such. A block a row; at least one column.
KERNEL(ROW_THREADS)
likeliest(const float* logits, float* out, u32 columns) {
    depend();
    const float* row = logits + (u64)blockIdx.x * columns;
    // What is not finite stands above everything: keys order first by that, then by the logit, then by the lower index.
    bool is_odd = false;
    float best = 0.0f;
    u32 at = 0xffffffffu;
    for (u32 i = threadIdx.x; i < columns; i += ROW_THREADS) {
        const float x = row[i];
        const bool odd = !(fabsf(x) <= 3.402823466e38f);
        if (at == 0xffffffffu || (odd && !is_odd) || (!odd && !is_odd && x > best)) {
            best = x;
            at = i;
            is_odd = odd;
        }
    }
    u32* places = (u32*)shared_memory(); // of each warp: whether it is odd, the logit's bits, the index
    for (int mask = 16; mask > 0; mask /= 2) {
        const u32 other_odd = shuffle_xor((u32)is_odd, mask);
        const float other = shuffle_xor(best, mask);
        const u32 other_at = shuffle_xor(at, mask);
        if (other_at == 0xffffffffu) continue;
        bool takes = at == 0xffffffffu || (other_odd && !is_odd);
        if (!takes && (bool)other_odd == is_odd) {
            takes = is_odd ? other_at < at : other > best || (other == best && other_at < at);
        }
        if (takes) {
            best = other;
            at = other_at;
            is_odd = other_odd;
        }
    }
    const u32 warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
        places[3 * warp] = is_odd;
        places[3 * warp + 1] = bits_of(best);
        places[3 * warp + 2] = at;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < ROW_THREADS / 32; w++) {
        const bool other_odd = places[3 * w];
        const float other = float_of(places[3 * w + 1]);
        const u32 other_at = places[3 * w + 2];
        if (other_at == 0xffffffffu) continue;
        bool takes = at == 0xffffffffu || (other_odd && !is_odd);
        if (!takes && other_odd == is_odd) {
            takes = is_odd ? other_at < at : other > best || (other == best && other_at < at);
        }
        if (takes) {
            best = other;
            at = other_at;
            is_odd = other_odd;
        }
    }
    out[2 * blockIdx.x] = best;
    out[2 * blockIdx.x + 1] = float_of(at);
}

// The peaks of `peaks.rs`: of each stretch of 1024 logits the maxima of its sixteen lanes; NaN where a lane holds what is
// not finite. A warp for each stretch of each row.
KERNEL(32)
peaks(const float* logits, float* out, u32 columns) {
    depend();
    const u32 n_stretches = (columns + STRETCH - 1) / STRETCH;
    const u32 first = blockIdx.x * STRETCH, end = min(columns, first + STRETCH);
    const float* row = logits + (u64)blockIdx.y * columns;
    float highest = float_of(0xff800000u), poison = 0.0f;
    for (u32 i = first + threadIdx.x; i < end; i += 32) {
        const float x = row[i];
        if (x > highest) highest = x;
        poison = fmaf(x, 0.0f, poison);
    }
    highest = fmaxf(highest, shuffle_xor(highest, 16));
    poison += shuffle_xor(poison, 16);
    if (threadIdx.x < STRETCH_LANES) {
        out[((u64)blockIdx.y * n_stretches + blockIdx.x) * STRETCH_LANES + threadIdx.x] = highest + poison;
    }
}
