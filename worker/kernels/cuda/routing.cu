// Mixtures of experts: which experts a token takes, its rows to and from an expert, and the sum of what they make.

// `routes[t]`: the numbers of the `n_used` of the largest logits, of equals the first, ascending, as floats; then their
// softmax. A warp a token; a word of shared memory for each expert.
KERNEL(32)
route_tokens(const float* logits, float* routes, u32 n, u32 n_used) {
    depend();
    logits += (u64)blockIdx.x * n;
    routes += (u64)blockIdx.x * 2 * n_used;
    u32* taken = (u32*)shared_memory();
    for (u32 e = threadIdx.x; e < n; e += 32) {
        u32 n_ahead = 0;
        for (u32 other = 0; other < n; other++) {
            n_ahead += logits[other] > logits[e] || (logits[other] == logits[e] && other < e);
        }
        taken[e] = n_ahead < n_used;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    float highest = float_of(0xff800000u), sum = 0.0f;
    for (u32 e = 0, k = 0; e < n && k < n_used; e++) {
        if (!taken[e]) continue;
        routes[k++] = (float)e;
        highest = fmaxf(highest, logits[e]);
    }
    for (u32 k = 0; k < n_used; k++) {
        const float weight = exponential(logits[(u32)routes[k]] - highest);
        routes[n_used + k] = weight;
        sum += weight;
    }
    for (u32 k = 0; k < n_used; k++) routes[n_used + k] /= sum;
}

// to[i] = from[places[i] / n_used], rows of `columns`. Grid: columns, rows.
KERNEL(ROW_THREADS)
gather_rows(const float* from, const u32* places, float* to, u32 n_used, u32 columns) {
    depend();
    const u32 column = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (column >= columns) return;
    to[(u64)blockIdx.y * columns + column] = from[(u64)(places[blockIdx.y] / n_used) * columns + column];
}

// to[part][places[i]] = from[part][i], rows of `columns`, `n_to` of them in a part. Grid: columns, rows, parts.
KERNEL(ROW_THREADS)
scatter_rows(const float* from, const u32* places, float* to, u32 n_to, u32 columns) {
    depend();
    const u32 column = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (column >= columns) return;
    const u64 row = (u64)blockIdx.z * gridDim.y + blockIdx.y, place = (u64)blockIdx.z * n_to + places[blockIdx.y];
    to[place * columns + column] = from[row * columns + column];
}

// out[t] = the sum of routes[t][n_used + k] * outputs[t][k], in order of k. Grid: columns, tokens.
KERNEL(ROW_THREADS)
combine_experts(const float* outputs, const float* routes, float* out, u32 n_used, u32 columns) {
    depend();
    const u32 column = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (column >= columns) return;
    const float* weights = routes + (u64)(2 * blockIdx.y + 1) * n_used;
    float sum = 0.0f;
    for (u32 k = 0; k < n_used; k++) {
        sum = fmaf(weights[k], outputs[((u64)blockIdx.y * n_used + k) * columns + column], sum);
    }
    out[(u64)blockIdx.y * columns + column] = sum;
}
