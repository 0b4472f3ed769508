// Sums of parts, and what is largest in a row of logits.

#define ROW_THREADS 256
#define STRETCH 1024
#define STRETCH_LANES 16
#define CANDIDATES 2048

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

// A candidate for the likeliest: what is not finite stands above everything, then the largest, and of equals the first.
struct Candidate {
    float value;
    u32 at; // 0xffffffff: none
};

DEVICE bool is_odd(float x) { return !(fabsf(x) <= 3.402823466e38f); }

DEVICE Candidate better(Candidate a, Candidate b) {
    if (a.at == 0xffffffffu || b.at == 0xffffffffu) return a.at == 0xffffffffu ? b : a;
    const bool odd_a = is_odd(a.value), odd_b = is_odd(b.value);
    if (odd_a != odd_b) return odd_a ? a : b;
    if (!odd_a && a.value != b.value) return a.value > b.value ? a : b;
    return a.at < b.at ? a : b;
}

DEVICE Candidate best_of_warp(Candidate best) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const Candidate other = {shuffle_xor(best.value, mask), shuffle_xor(best.at, mask)};
        best = better(best, other);
    }
    return best;
}

// Of each stretch of CANDIDATES logits of a row the best. `out`: [row][stretch]. Grid: stretches, rows.
KERNEL(ROW_THREADS)
candidates(const float* logits, Candidate* out, u32 columns) {
    depend();
    const float* row = logits + (u64)blockIdx.y * columns;
    const u32 end = min((blockIdx.x + 1) * CANDIDATES, columns);
    Candidate best = {0.0f, 0xffffffffu};
    for (u32 i = blockIdx.x * CANDIDATES + threadIdx.x; i < end; i += ROW_THREADS) best = better(best, {row[i], i});
    best = best_of_warp(best);
    Candidate* place = (Candidate*)shared_memory(); // one for each warp
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = best;
    block_sync();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < ROW_THREADS / 32; w++) best = better(best, place[w]);
    out[(u64)blockIdx.y * gridDim.x + blockIdx.x] = best;
}

// The best of a row's candidates: `out[2 row]` is the logit, `out[2 row + 1]` holds its index as bits. A warp a row.
KERNEL(32)
likeliest(const Candidate* candidates, float* out, u32 n) {
    depend();
    Candidate best = {0.0f, 0xffffffffu};
    for (u32 i = threadIdx.x; i < n; i += 32) best = better(best, candidates[(u64)blockIdx.x * n + i]);
    best = best_of_warp(best);
    if (threadIdx.x != 0) return;
    out[2 * blockIdx.x] = best.value;
    out[2 * blockIdx.x + 1] = float_of(best.at);
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
