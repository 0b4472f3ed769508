// Attention over the paged cache (cache.cu): `attend` for few rows of long sequences, whose parts it spreads over blocks,
// and `merge_attended` which adds them. Of a cache in f16 on tensor cores. Many rows of one sequence are for tiles.cu.

// Query heads that read one KV head together.
#define GROUP 8
#define CHUNKS (HEAD_DIM / 32)
#define MINUS_INFINITY float_of(0xff800000u)
// Numbers of a part: the values' sums, the largest score, the sum of weights, and two that are nothing.
#define PART (HEAD_DIM + 4)

// What one block does: some splits of one row's sequence.
struct Item {
    u32 row;
    u32 splits; // the first, and from bit 16 on how many; 0 pads the bucket
    u32 position, first_block; // of the row, in its sequence and of that in the tables
};

#if KV_FORMAT == 0

#define ATTEND_THREADS 128
#define ATTEND_WARPS (ATTEND_THREADS / 32)
// Positions that a block of `attend` takes at once: a KV block a warp.
#define SPLIT (ATTEND_WARPS * BLOCK_LEN)
// Scores here are of base 2: queries come with a scale that log2(e) is part of.
#define LOG2_E 1.44269504f

// What lanes take of a KV block. Of lane 4g + t: keys of the positions 4(g/2) + g%2 and two on, of 32 columns 8t to 8t + 7;
// values of columns 8n + g, positions 4t to 4t + 3. So a tile of scores, whose rows or columns are positions in this order,
// gives a lane the weights of neighbours among the values.
struct KvBlock {
    uint4 keys[2][CHUNKS];
    uint2 values[HEAD_DIM / 8];
};

// Asks for a page, both its planes; all lanes of a warp are here.
DEVICE void prefetch_page(u8* cache, u32 page, u32 lane) {
#pragma unroll
    for (u32 first = 0; first < PAGE_BYTES; first += 32 * 128) {
        const u32 at = first + lane * 128;
        if (at < PAGE_BYTES) prefetch((const u8*)keys_of(cache, page) + at);
    }
}

DEVICE u32 position_of(u32 g) { return g / 2 * 4 + g % 2; }

DEVICE KvBlock read_block(u8* cache, u32 page, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
    const uint4* keys = (const uint4*)keys_of(cache, page);
    const uint2* values = (const uint2*)values_of(cache, page);
    KvBlock block;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        for (int c = 0; c < CHUNKS; c++) block.keys[n][c] = keys[(position_of(g) + 2 * n) * (HEAD_DIM / 8) + c * 4 + t];
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) block.values[n] = values[(n * 8 + g) * (BLOCK_LEN / 4) + t];
    return block;
}

// Values of a block of which `n_there` positions are known: the others are taken as zeros, whatever lies there.
DEVICE uint2 known_of(uint2 values, u32 n_there, u32 t) {
    if (n_there < BLOCK_LEN) {
        if (4 * t >= n_there) values.x = 0;
        if (4 * t + 1 >= n_there) values.x &= 0xffffu;
        if (4 * t + 2 >= n_there) values.y = 0;
        if (4 * t + 3 >= n_there) values.y &= 0xffffu;
    }
    return values;
}

// Attention of up to eight query vectors, the other way round: scores are [position][vector] and sums [column][vector], so
// that no tensor core multiplies rows that are not there. Of lane 4g + t: vectors 2t and 2t + 1.
struct AttendingFew {
    u32 queries[HEAD_DIM / 16][2]; // f16, of vector g; of 32 columns lane t has 8t to 8t + 7
    float sums[HEAD_DIM / 16][4];  // columns g and g + 8 of sixteen
    float top[2], total[2];
};

// `from`: where vector g begins, null for zeros.
DEVICE void start_few(AttendingFew& at, const float* from, float scale, u32 t) {
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; c++) {
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
        if (from) v = ((const float4*)(from + c / 2 * 32))[t * 2 + c % 2];
        at.queries[c][0] = pair(float_to_half_saturated(v.x * scale), float_to_half_saturated(v.y * scale));
        at.queries[c][1] = pair(float_to_half_saturated(v.z * scale), float_to_half_saturated(v.w * scale));
        for (int i = 0; i < 4; i++) at.sums[c][i] = 0.0f;
    }
    for (int i = 0; i < 2; i++) at.top[i] = MINUS_INFINITY, at.total[i] = 0.0f;
}

// One KV block, which begins at `first_position`, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). Vectors
// see positions up to `last`, at least the first.
DEVICE void attend_block_few(AttendingFew& at, u8* cache, u32 page, u32 first_position, u32 last, u32 lane) {
    const u32 g = lane / 4, t = lane % 4, n_there = last + 1 - first_position;
    KvBlock block = read_block(cache, page, lane);
    float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint4 k = block.keys[0][c], k_2 = block.keys[1][c];
        mma_f16(scores, k.x, k_2.x, k.y, k_2.y, at.queries[2 * c][0], at.queries[2 * c][1]);
        mma_f16(scores, k.z, k_2.z, k.w, k_2.w, at.queries[2 * c + 1][0], at.queries[2 * c + 1][1]);
    }
    float higher[2], worth[2];
    for (int i = 0; i < 4; i++) {
        if (position_of(g) + i / 2 * 2 >= n_there) scores[i] = MINUS_INFINITY; // unknown, and may be no number
    }
    for (int i = 0; i < 2; i++) {
        higher[i] = fmaxf(at.top[i], fmaxf(scores[i], scores[2 + i]));
        for (int mask = 4; mask < 32; mask *= 2) higher[i] = fmaxf(higher[i], shuffle_xor(higher[i], mask));
        worth[i] = power_of_two(at.top[i] - higher[i]); // finite: the first position is known
        at.top[i] = higher[i];
    }
    for (int i = 0; i < 4; i++) scores[i] = power_of_two(scores[i] - higher[i % 2]);
    for (int i = 0; i < 2; i++) at.total[i] = fmaf(at.total[i], worth[i], scores[i] + scores[2 + i]);
    if (any_of_warp(worth[0] != 1.0f || worth[1] != 1.0f)) { // seldom, after the first blocks
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 16; c++) {
            for (int i = 0; i < 4; i++) at.sums[c][i] *= worth[i % 2];
        }
    }
    const u32 weights[2] = {transpose(pair(float_to_half(scores[0]), float_to_half(scores[1]))),
                            transpose(pair(float_to_half(scores[2]), float_to_half(scores[3])))};
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) block.values[n] = known_of(block.values[n], n_there, t);
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; c++) {
        const uint2 v = block.values[2 * c], v_2 = block.values[2 * c + 1];
        mma_f16(at.sums[c], v.x, v_2.x, v.y, v_2.y, weights[0], weights[1]);
    }
}

// Of each item and query head of the KV head: the largest score, the sum of 2^(score - largest), and the values' sum with
// those weights, not yet divided. Grid: items, KV heads. `heads`: where the query heads of each KV head begin, and where
// the last end. `tables`: KV blocks of each sequence. `parts`: [item][head][PART].
//
// Each warp takes a KV block of a split. Shared: the warps' largest [ATTEND_WARPS][GROUP], sums [GROUP][HEAD_DIM + 1].
KERNEL(ATTEND_THREADS)
attend(const float* q, u8* cache, const Item* items, const u32* tables, const u32* heads, float* parts, u32 n_heads,
       u32 n_kv_heads, float scale) {
    float* tops = (float*)shared_memory();
    float* place = tops + ATTEND_WARPS * GROUP;
    const Item item = items[blockIdx.x];
    const u32 first_split = item.splits & 0xffffu, n_splits = item.splits >> 16, position = item.position;
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32* table = tables + item.first_block;
    // This warp's blocks are every ATTEND_WARPS-th.
    const u32 end = min((first_split + n_splits) * (SPLIT / BLOCK_LEN), position / BLOCK_LEN + 1);
    const u32 first_block = first_split * (SPLIT / BLOCK_LEN) + warp, first_page = first_block < end ? table[first_block] : 0;
    if (first_block < end) prefetch_page(cache, first_page * n_kv_heads + kv_head, lane);
    depend();
    if (n_splits == 0) return; // it pads the bucket
    for (u32 first_head = heads[kv_head]; first_head < heads[kv_head + 1]; first_head += GROUP) {
        const u32 n_queries = min(GROUP, heads[kv_head + 1] - first_head);
        // The next block's page is known before this one is read.
        u32 block = first_block, page = first_page;
        const float* of_row = q + ((u64)item.row * n_heads + first_head) * HEAD_DIM;
        AttendingFew at;
        start_few(at, g < n_queries ? of_row + g * HEAD_DIM : (const float*)0, scale * LOG2_E, t);
        for (; block < end; block += ATTEND_WARPS) {
            const u32 this_page = page;
            if (block + ATTEND_WARPS < end) page = table[block + ATTEND_WARPS];
            attend_block_few(at, cache, this_page * n_kv_heads + kv_head, block * BLOCK_LEN, position, lane);
        }
        for (int i = 0; i < 2; i++) {
            for (int mask = 4; mask < 32; mask *= 2) at.total[i] += shuffle_xor(at.total[i], mask);
        }
        block_sync(); // the last heads' parts are written
        if (g == 0) tops[warp * GROUP + 2 * t] = at.top[0], tops[warp * GROUP + 2 * t + 1] = at.top[1];
        block_sync();
        float top[2], worth[2];
        for (int i = 0; i < 2; i++) {
            top[i] = MINUS_INFINITY;
            for (u32 w = 0; w < ATTEND_WARPS; w++) top[i] = fmaxf(top[i], tops[w * GROUP + 2 * t + i]);
            worth[i] = power_of_two(at.top[i] - top[i]); // 0 of a warp that saw nothing; the first always did
        }
        for (u32 w = 0; w < ATTEND_WARPS; w++) { // in order
            if (w == warp) {
#pragma unroll
                for (int c = 0; c < HEAD_DIM / 16; c++) {
                    for (int i = 0; i < 4; i++) {
                        float* to = place + (2 * t + i % 2) * (HEAD_DIM + 1) + c * 16 + i / 2 * 8 + g;
                        const float sum = at.sums[c][i] * worth[i % 2];
                        *to = w == 0 ? sum : *to + sum;
                    }
                }
                for (int i = 0; i < 2; i++) {
                    float* to = place + (2 * t + i) * (HEAD_DIM + 1) + HEAD_DIM;
                    const float total = at.total[i] * worth[i];
                    if (g == 0) *to = w == 0 ? total : *to + total;
                }
            }
            block_sync();
        }
        float* part = parts + ((u64)blockIdx.x * n_heads + first_head) * PART;
        for (u32 i = threadIdx.x; i < n_queries * HEAD_DIM; i += ATTEND_THREADS) {
            part[i / HEAD_DIM * PART + i % HEAD_DIM] = place[i / HEAD_DIM * (HEAD_DIM + 1) + i % HEAD_DIM];
        }
        if (warp == 0 && g == 0) {
            for (int i = 0; i < 2; i++) {
                if (2 * t + i >= n_queries) continue;
                part[(2 * t + i) * PART + HEAD_DIM] = top[i];
                part[(2 * t + i) * PART + HEAD_DIM + 1] = place[(2 * t + i) * (HEAD_DIM + 1) + HEAD_DIM];
            }
        }
    }
}

#else

#define PLAIN_THREADS 256
#define PLAIN_WARPS (PLAIN_THREADS / 32)
// Positions that a block takes at once: 32 a warp.
#define PLAIN_SPLIT 256

// Four neighbouring columns of a key.
DEVICE float4 four_of(const Kept* at) {
#if KV_FORMAT == 1
    return *(const float4*)at;
#else
    const u32 bits = *(const u32*)at;
    return {(float)(signed char)bits, (float)(signed char)(bits >> 8), (float)(signed char)(bits >> 16),
            (float)(signed char)(bits >> 24)};
#endif
}

// As `attend`, of a cache that tensor cores do not read; scores are of base e.
//
// Shared: queries [GROUP][HEAD_DIM], scores [GROUP][PLAIN_SPLIT], a place for sums [PLAIN_WARPS][HEAD_DIM], of GROUP the
// largest, the sum and what the last largest is worth.
KERNEL_AT_LEAST(PLAIN_THREADS, 1)
attend_plain(const float* q, u8* cache, const Item* items, const u32* tables, const u32* heads, float* parts, u32 n_heads,
             u32 n_kv_heads, float scale) {
    depend();
    float* queries = (float*)shared_memory();
    float* scores = queries + GROUP * HEAD_DIM;
    float* place = scores + GROUP * PLAIN_SPLIT;
    float* largest = place + PLAIN_WARPS * HEAD_DIM;
    float *sums = largest + GROUP, *worth = sums + GROUP;
    const Item item = items[blockIdx.x];
    const u32 first_split = item.splits & 0xffffu, n_splits = item.splits >> 16;
    if (n_splits == 0) return; // it pads the bucket
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 context = item.position + 1;
    const u32* table = tables + item.first_block;
    for (u32 first_head = heads[kv_head]; first_head < heads[kv_head + 1]; first_head += GROUP) {
        const u32 n_queries = min(GROUP, heads[kv_head + 1] - first_head);
        const float* from = q + ((u64)item.row * n_heads + first_head) * HEAD_DIM;
        block_sync();
        for (u32 i = threadIdx.x; i < GROUP * HEAD_DIM; i += PLAIN_THREADS) {
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
        for (u32 split = first_split; split < first_split + n_splits; split++) {
            block_sync();
            // Scores. Eight lanes a position, each with four columns of every 32.
            for (u32 i = 0; i < 32; i += 4) {
                const u32 within = warp * 32 + i + lane / 8, position = split * PLAIN_SPLIT + within;
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
                    if (lane % 8 == 0) scores[j * PLAIN_SPLIT + within] = is_there ? dots[j] * key_scale : MINUS_INFINITY;
                }
            }
            block_sync();
            // Warp j turns the scores of query j to weights.
            {
                float* of_query = scores + warp * PLAIN_SPLIT;
                float top = MINUS_INFINITY;
                for (u32 i = lane; i < PLAIN_SPLIT; i += 32) top = fmaxf(top, of_query[i]);
                const float before = largest[warp];
                top = fmaxf(warp_max(top), before); // finite: the first position of a split is always there
                float sum = 0.0f;
                for (u32 i = lane; i < PLAIN_SPLIT; i += 32) {
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
                const u32 within = warp * 32 + b * BLOCK_LEN, position = split * PLAIN_SPLIT + within;
                if (position >= context) break;
                const u32 page = table[position / BLOCK_LEN] * n_kv_heads + kv_head;
                // Of a block's last positions nothing is known yet, and 0 times what lies there may be no number.
                const u32 n_there = min(BLOCK_LEN, context - position);
                for (u32 first = 0; first < n_there; first += 4) {
                    float4 weights[GROUP];
                    for (int j = 0; j < GROUP; j++) weights[j] = *(const float4*)(scores + j * PLAIN_SPLIT + within + first);
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
            float* part = parts + ((u64)blockIdx.x * n_heads + first_head + j) * PART;
            for (u32 i = threadIdx.x; i < HEAD_DIM; i += PLAIN_THREADS) {
                float sum = 0.0f;
                for (u32 w = 0; w < PLAIN_WARPS; w++) sum += place[w * HEAD_DIM + i];
                part[i] = sum;
            }
            if (threadIdx.x == 0) {
                part[HEAD_DIM] = largest[j];
                part[HEAD_DIM + 1] = sums[j];
            }
        }
    }
}

#endif

#define MERGE_THREADS 128
#define MERGE_WARPS (MERGE_THREADS / 32)

// The parts of a row, to its attention. Grid: rows, heads. `first_items`: where the items of each row begin, and where the
// last end; a row without items is left alone. Each warp adds up every MERGE_WARPS-th part, in order; then the warps' sums
// are added in order. Shared: [MERGE_WARPS][PART]. Halves are made of a cache in f16 only.
KERNEL(MERGE_THREADS)
merge_attended(const float* parts, const u32* first_items, Made to, u32 n_heads) {
    float* place = (float*)shared_memory();
    const u32 row = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first = first_items[row], end = first_items[row + 1];
    depend();
    if (first == end) return;
    float top = MINUS_INFINITY;
    for (u32 item = first + lane; item < end; item += 32) {
        top = fmaxf(top, parts[((u64)item * n_heads + head) * PART + HEAD_DIM]);
    }
    top = warp_max(top);
    float sums[CHUNKS], total = 0.0f;
    for (int c = 0; c < CHUNKS; c++) sums[c] = 0.0f;
    for (u32 item = first + warp; item < end; item += MERGE_WARPS) {
        const float* part = parts + ((u64)item * n_heads + head) * PART;
        const float weight = KV_FORMAT == 0 ? power_of_two(part[HEAD_DIM] - top) : exponential(part[HEAD_DIM] - top);
        total = fmaf(part[HEAD_DIM + 1], weight, total);
        for (int c = 0; c < CHUNKS; c++) sums[c] = fmaf(part[c * 32 + lane], weight, sums[c]);
    }
    for (int c = 0; c < CHUNKS; c++) place[warp * PART + c * 32 + lane] = sums[c];
    if (lane == 0) place[warp * PART + HEAD_DIM] = total;
    block_sync();
    const u32 column = threadIdx.x * 4;
    if (column / 128 * 128 >= HEAD_DIM) return; // whole warps
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    const bool is_there = column < HEAD_DIM;
    if (is_there) {
        float all = 0.0f;
        for (u32 w = 0; w < MERGE_WARPS; w++) {
            const float4 of_warp = *(const float4*)(place + w * PART + column);
            v = {v.x + of_warp.x, v.y + of_warp.y, v.z + of_warp.z, v.w + of_warp.w};
            all += place[w * PART + HEAD_DIM];
        }
        v = {v.x / all, v.y / all, v.z / all, v.w / all};
    }
    const u32 four = head * (HEAD_DIM / 4) + threadIdx.x;
#if HEAD_DIM % 128 == 0
    if (to.bytes) { // whole steps: a scale of their own is at hand
        make(to, row, four / 32, four % 32, v, is_there);
        return;
    }
#endif
    if (is_there) make_floats(to, (u64)row * to.columns + four * 4, v);
    // A mean of values of f16, below 2^16: one scale does for all, that of an exponent of 15.
    if (to.halves) {
        const float sum = v.x + v.y + v.z + v.w;
        make_halves(to, row, four / 32, four % 32, v, 127 + 15, sum == sum, is_there);
    }
}
