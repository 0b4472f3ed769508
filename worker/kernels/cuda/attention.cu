// Attention over the paged cache (cache.cu): `attend` for few rows of long sequences, whose parts it spreads over blocks,
// and `merge_attended` which adds them; `attend_tiles` for many rows of one sequence, on tensor cores.

#define ATTEND_THREADS 256
#define ATTEND_WARPS 8
// Positions that a block takes at once: 32 a warp.
#define SPLIT 256
// Query heads that read one KV head together.
#define GROUP 8
#define CHUNKS (HEAD_DIM / 32)
#define MINUS_INFINITY float_of(0xff800000u)

// What one block does: some splits of one row's sequence.
struct Item {
    u32 row, first_split, n_splits, reserved;
};

// Four neighbouring columns of a key.
DEVICE float4 four_of(const Kept* at) {
#if KV_FORMAT == 0
    const uint2 bits = *(const uint2*)at;
    return {half_to_float((u16)bits.x), half_to_float((u16)(bits.x >> 16)), half_to_float((u16)bits.y),
            half_to_float((u16)(bits.y >> 16))};
#elif KV_FORMAT == 1
    return *(const float4*)at;
#else
    const u32 bits = *(const u32*)at;
    return {(float)(signed char)bits, (float)(signed char)(bits >> 8), (float)(signed char)(bits >> 16),
            (float)(signed char)(bits >> 24)};
#endif
}

// Of each item and query head of the KV head: the largest score, the sum of e^(score - largest), and the values' sum with
// those weights, not yet divided. Grid: items, KV heads. `heads`: where the query heads of each KV head begin, and where
// the last end. `tables`: KV blocks of each sequence, `first_blocks`: where a row's run of them begins. `parts`:
// [item][head][HEAD_DIM + 2]: the values' sums, the largest, the sum.
//
// Shared: queries [GROUP][HEAD_DIM], scores [GROUP][SPLIT], a place for sums [ATTEND_WARPS][HEAD_DIM], of GROUP the
// largest, the sum and what the last largest is worth.
KERNEL(ATTEND_THREADS)
attend(const float* q, u8* cache, const Item* items, const u32* positions, const u32* first_blocks, const u32* tables,
       const u32* heads, float* parts, u32 n_heads, u32 n_kv_heads, float scale) {
    float* queries = (float*)shared_memory();
    float* scores = queries + GROUP * HEAD_DIM;
    float* place = scores + GROUP * SPLIT;
    float* largest = place + ATTEND_WARPS * HEAD_DIM;
    float *sums = largest + GROUP, *worth = sums + GROUP;
    const Item item = items[blockIdx.x];
    if (item.n_splits == 0) return; // it pads the bucket
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 context = positions[item.row] + 1;
    const u32* table = tables + first_blocks[item.row];
    for (u32 first_head = heads[kv_head]; first_head < heads[kv_head + 1]; first_head += GROUP) {
        const u32 n_queries = min(GROUP, heads[kv_head + 1] - first_head);
        const float* from = q + ((u64)item.row * n_heads + first_head) * HEAD_DIM;
        block_sync();
        for (u32 i = threadIdx.x; i < GROUP * HEAD_DIM; i += ATTEND_THREADS) {
            queries[i] = i < n_queries * HEAD_DIM ? from[i] * scale : 0.0f;
        }
        if (threadIdx.x < GROUP) {
            largest[threadIdx.x] = MINUS_INFINITY;
            sums[threadIdx.x] = 0.0f;
        }
        float values[GROUP][CHUNKS];
        for (int j = 0; j < GROUP; j++) {
            for (int c = 0; c < CHUNKS; c++) values[j][c] = 0.0f;
        }
        for (u32 split = item.first_split; split < item.first_split + item.n_splits; split++) {
            block_sync();
            // Scores. Eight lanes a position, each with four columns of every 32.
            for (u32 i = 0; i < 32; i += 4) {
                const u32 within = warp * 32 + i + lane / 8, position = split * SPLIT + within;
                const bool is_there = position < context;
                float dots[GROUP];
                for (int j = 0; j < GROUP; j++) dots[j] = 0.0f;
                float key_scale = 1.0f;
                if (is_there) {
                    const u32 page = table[position / BLOCK_LEN] * n_kv_heads + kv_head, at = position % BLOCK_LEN;
                    const Kept* key = keys_of(cache, page) + at * HEAD_DIM + lane % 8 * 4;
#if KV_FORMAT == 2
                    key_scale = scales_of(cache, page)[at];
#endif
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        const float4 k = four_of(key + c * 32);
                        for (int j = 0; j < GROUP; j++) {
                            const float4 x = *(const float4*)(queries + j * HEAD_DIM + c * 32 + lane % 8 * 4);
                            dots[j] = fmaf(x.x, k.x, fmaf(x.y, k.y, fmaf(x.z, k.z, fmaf(x.w, k.w, dots[j]))));
                        }
                    }
                }
                for (int j = 0; j < GROUP; j++) {
                    for (int mask = 4; mask > 0; mask /= 2) dots[j] += shuffle_xor(dots[j], mask);
                    if (lane % 8 == 0) scores[j * SPLIT + within] = is_there ? dots[j] * key_scale : MINUS_INFINITY;
                }
            }
            block_sync();
            // Warp j turns the scores of query j to weights.
            {
                float* of_query = scores + warp * SPLIT;
                float top = MINUS_INFINITY;
                for (u32 i = lane; i < SPLIT; i += 32) top = fmaxf(top, of_query[i]);
                const float before = largest[warp];
                top = fmaxf(warp_max(top), before); // finite: the first position of a split is always there
                float sum = 0.0f;
                for (u32 i = lane; i < SPLIT; i += 32) {
                    const float weight = exponential(of_query[i] - top);
                    of_query[i] = weight;
                    sum += weight;
                }
                sum = warp_sum(sum);
                if (lane == 0) {
                    const float old = exponential(before - top);
                    worth[warp] = old;
                    sums[warp] = sums[warp] * old + sum;
                    largest[warp] = top;
                }
            }
            block_sync();
            // Values. A warp takes its 32 positions, a lane a column of every 32.
            for (int j = 0; j < GROUP; j++) {
                for (int c = 0; c < CHUNKS; c++) values[j][c] *= worth[j];
            }
            for (u32 b = 0; b < 2; b++) {
                const u32 within = warp * 32 + b * BLOCK_LEN, position = split * SPLIT + within;
                if (position >= context) break;
                const u32 page = table[position / BLOCK_LEN] * n_kv_heads + kv_head;
                // Of a block's last positions nothing is known yet, and 0 times what lies there may be no number.
                const u32 n_there = min(BLOCK_LEN, context - position);
                for (u32 first = 0; first < n_there; first += 4) {
                    float4 weights[GROUP];
                    for (int j = 0; j < GROUP; j++) weights[j] = *(const float4*)(scores + j * SPLIT + within + first);
#if KV_FORMAT == 2
                    const float4 s = *(const float4*)(scales_of(cache, page) + BLOCK_LEN + first);
#endif
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        float4 v = four_of(values_of(cache, page) + (c * 32 + lane) * BLOCK_LEN + first);
#if KV_FORMAT == 2
                        v.x *= s.x, v.y *= s.y, v.z *= s.z, v.w *= s.w;
#endif
                        if (first + 1 >= n_there) v.y = 0.0f;
                        if (first + 2 >= n_there) v.z = 0.0f;
                        if (first + 3 >= n_there) v.w = 0.0f;
                        for (int j = 0; j < GROUP; j++) {
                            const float4 w = weights[j];
                            values[j][c] = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, values[j][c]))));
                        }
                    }
                }
            }
        }
        // The warps' sums, in order, a query at a time.
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            block_sync();
            for (int c = 0; c < CHUNKS; c++) place[warp * HEAD_DIM + c * 32 + lane] = values[j][c];
            block_sync();
            if ((u32)j >= n_queries) continue;
            float* part = parts + ((u64)blockIdx.x * n_heads + first_head + j) * (HEAD_DIM + 2);
            for (u32 i = threadIdx.x; i < HEAD_DIM; i += ATTEND_THREADS) {
                float sum = 0.0f;
                for (u32 w = 0; w < ATTEND_WARPS; w++) sum += place[w * HEAD_DIM + i];
                part[i] = sum;
            }
            if (threadIdx.x == 0) {
                part[HEAD_DIM] = largest[j];
                part[HEAD_DIM + 1] = sums[j];
            }
        }
    }
}

// The parts of a row, in order, to its attention. Grid: rows, heads. `first_items`: where the items of each row begin, and
// where the last end; a row without items is left alone.
KERNEL(ROPE_THREADS)
merge_attended(const float* parts, const u32* first_items, float* out, u32 n_heads) {
    const u32 row = blockIdx.x, head = blockIdx.y;
    const u32 first = first_items[row], end = first_items[row + 1];
    if (first == end) return;
    float top = MINUS_INFINITY;
    for (u32 item = first; item < end; item++) {
        top = fmaxf(top, parts[((u64)item * n_heads + head) * (HEAD_DIM + 2) + HEAD_DIM]);
    }
    float total = 0.0f;
    for (u32 item = first; item < end; item++) {
        const float* part = parts + ((u64)item * n_heads + head) * (HEAD_DIM + 2);
        total += part[HEAD_DIM + 1] * exponential(part[HEAD_DIM] - top);
    }
    for (u32 i = threadIdx.x; i < HEAD_DIM; i += ROPE_THREADS) {
        float sum = 0.0f;
        for (u32 item = first; item < end; item++) {
            const float* part = parts + ((u64)item * n_heads + head) * (HEAD_DIM + 2);
            sum = fmaf(part[i], exponential(part[HEAD_DIM] - top), sum);
        }
        out[((u64)row * n_heads + head) * HEAD_DIM + i] = sum / total;
    }
}

#if KV_FORMAT == 0

#define TILE_THREADS 128
// Query vectors of a block: sixteen a warp.
#define TILE_VECTORS 64

// What one block does: of the rows `first_row..first_row + n_rows` of one sequence, 64 query vectors for each KV head.
// Vectors are counted row by row, the query heads of a KV head side by side.
struct Tile {
    u32 first_row, n_rows, first_vector, reserved;
};

// Attention of many rows, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over one KV block after the
// other. Queries, weights and what is cached are f16; sums are f32. Grid: tiles, KV heads.
KERNEL(TILE_THREADS)
attend_tiles(const float* q, u8* cache, const Tile* tiles, const u32* positions, const u32* first_blocks, const u32* tables,
             const u32* heads, float* out, u32 n_heads, u32 n_kv_heads, float scale) {
    const Tile tile = tiles[blockIdx.x];
    const u32 kv_head = blockIdx.y, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 group = heads[kv_head + 1] - heads[kv_head], n_vectors = tile.n_rows * group;
    const u32 first = tile.first_vector + threadIdx.x / 32 * 16;
    if (first >= n_vectors) return;
    const u32* table = tables + first_blocks[tile.first_row];
    // Of this lane's two vectors, g and g + 8: where they begin, and the last position they see. What is beyond the last
    // vector repeats it, and is not written.
    u64 at[2];
    u32 last[2];
    for (int i = 0; i < 2; i++) {
        const u32 vector = min(first + g + 8 * i, n_vectors - 1), row = tile.first_row + vector / group;
        at[i] = ((u64)row * n_heads + heads[kv_head] + vector % group) * HEAD_DIM;
        last[i] = positions[row];
    }
    const u32 last_vector = min(first + 15, n_vectors - 1);
    const u32 context = positions[tile.first_row + last_vector / group] + 1;
    u32 queries[HEAD_DIM / 16][4];
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; c++) {
        for (int i = 0; i < 4; i++) {
            const float* two = q + at[i % 2] + c * 16 + i / 2 * 8 + 2 * t;
            queries[c][i] = pair(float_to_half_saturated(two[0] * scale), float_to_half_saturated(two[1] * scale));
        }
    }
    float sums[HEAD_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f};
    for (u32 block = 0; block * BLOCK_LEN < context; block++) {
        const u32 page = table[block] * n_kv_heads + kv_head, first_position = block * BLOCK_LEN;
        // Scores: two tiles of eight positions.
        float scores[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        const u16* keys = keys_of(cache, page);
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 16; c++) {
            for (int n = 0; n < 2; n++) {
                const u32* key = (const u32*)(keys + (n * 8 + g) * HEAD_DIM + c * 16 + 2 * t);
                mma_f16(scores[n], queries[c][0], queries[c][1], queries[c][2], queries[c][3], key[0], key[4]);
            }
        }
        float higher[2] = {top[0], top[1]};
        for (int n = 0; n < 2; n++) {
            for (int i = 0; i < 4; i++) {
                // What lies beyond is unknown, and may be no number.
                const u32 position = first_position + n * 8 + 2 * t + i % 2;
                if (position > last[i / 2]) scores[n][i] = MINUS_INFINITY;
                higher[i / 2] = fmaxf(higher[i / 2], scores[n][i]);
            }
        }
        float worth[2];
        for (int i = 0; i < 2; i++) {
            higher[i] = fmaxf(higher[i], shuffle_xor(higher[i], 1));
            higher[i] = fmaxf(higher[i], shuffle_xor(higher[i], 2)); // finite from the first block on: position 0 is seen
            worth[i] = exponential(top[i] - higher[i]);
            top[i] = higher[i];
            total[i] *= worth[i];
        }
        u32 weights[4];
        for (int n = 0; n < 2; n++) {
            for (int i = 0; i < 2; i++) {
                const float w0 = exponential(scores[n][2 * i] - top[i]), w1 = exponential(scores[n][2 * i + 1] - top[i]);
                total[i] += w0 + w1;
                weights[2 * n + i] = pair(float_to_half(w0), float_to_half(w1));
            }
        }
        // Values; of the last block those that are unknown are taken as zeros.
        const u32 n_there = min(BLOCK_LEN, context - first_position);
        const u16* values = values_of(cache, page);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            const u32* value = (const u32*)(values + (n * 8 + g) * BLOCK_LEN + 2 * t);
            u32 low = value[0], high = value[4];
            if (n_there < BLOCK_LEN) {
                if (2 * t >= n_there) low = 0;
                if (2 * t + 1 >= n_there) low &= 0xffffu;
                if (8 + 2 * t >= n_there) high = 0;
                if (9 + 2 * t >= n_there) high &= 0xffffu;
            }
            for (int i = 0; i < 4; i++) sums[n][i] *= worth[i / 2];
            mma_f16(sums[n], weights[0], weights[1], weights[2], weights[3], low, high);
        }
    }
    for (int i = 0; i < 2; i++) {
        total[i] += shuffle_xor(total[i], 1);
        total[i] += shuffle_xor(total[i], 2);
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        for (int i = 0; i < 4; i++) {
            if (first + g + i / 2 * 8 < n_vectors) out[at[i / 2] + n * 8 + 2 * t + i % 2] = sums[n][i] / total[i / 2];
        }
    }
}

#endif
