// Attention of many rows of one sequence over the paged cache (cache.cu), on tensor cores: `attend_tiles`, of a cache in f16.
// As FlashAttention-2 does it (Dao 2023): a block keeps the sums of many query vectors in registers while keys and values
// pass by in shared memory.

#if KV_FORMAT == 0

#define TILE_THREADS 128
#define TILE_WARPS (TILE_THREADS / 32)
// Sixteens of query vectors of a warp: as many as a thread's registers hold the sums of. What is read of keys and values is
// multiplied with all of them.
#define SIXTEENS (HEAD_DIM <= 128 ? 2 : 1)
#define WARP_VECTORS (16 * SIXTEENS)
#define TILE_VECTORS (TILE_WARPS * WARP_VECTORS)
// KV blocks of a stage: what comes to shared memory at once, while the stage before it is worked on.
#define STAGE_BLOCKS (HEAD_DIM <= 128 ? 4 : 2)
#define STAGE (STAGE_BLOCKS * BLOCK_LEN)
// Positions whose scores a warp holds at once: of a row of values.
#define AT_ONCE 32
// Of the chunks of 32 columns of queries, those that stay in registers; the others are read again for every step.
#define KEPT (HEAD_DIM <= 64 ? CHUNKS : 0)
// Sixteen bytes each: of a KV block's keys or values, of a row of keys, of a stage's keys.
#define BLOCK_UNITS (BLOCK_LEN * HEAD_DIM / 8)
#define KEY_UNITS (HEAD_DIM / 8)
#define STAGE_UNITS (STAGE_BLOCKS * BLOCK_UNITS)
// How far, in powers of two, a score may be above what its vector's weights are measured by, before sums are measured anew:
// weights stay well within f16, and sums are seldom multiplied.
#define SLACK 8.0f

// Where units lie among a row's, so that all banks are read and written at once. A unit of a key: of two rows that are read
// together, one has the halves of its lines of 128 bytes swapped. (An odd number of chunks needs no swapping.)
DEVICE u32 key_unit(u32 unit, u32 position) {
    if (HEAD_DIM % 64 != 0) return unit;
    return unit ^ (position + (HEAD_DIM % 128 == 0 ? 0 : unit / 8)) % 2 * 4;
}
// A unit of values, of which a row is 32 positions of a column: four rows' halves are written together.
DEVICE u32 value_unit(u32 unit, u32 column) { return unit ^ (column & 2); }

// Begins to copy a warp's share of the KV block that is the `nth` of a stage. Stage: keys [position][column], then values
// [position / 32][column][position % 32].
DEVICE void begin_block(uint4* stage, u8* cache, u32 page, u32 nth, u32 share, u32 lane) {
    const u32 n_sharing = TILE_WARPS / STAGE_BLOCKS, stride = 32 * n_sharing, own = share * 32 + lane;
    const u32 position = own / KEY_UNITS, column = own / 2;
    const uint4* from = (const uint4*)keys_of(cache, page) + own;
    // Every stride is of whole lines, at least four, so that all that a lane copies is swapped or none.
    uint4* keys = stage + nth * BLOCK_UNITS + position * KEY_UNITS + key_unit(own % KEY_UNITS, position);
    uint4* values = stage + STAGE_UNITS + nth / 2 * 2 * BLOCK_UNITS + column * 4 + value_unit(nth % 2 * 2 + own % 2, column);
#pragma unroll
    for (u32 i = 0; i < BLOCK_UNITS / stride; i++) copy_begin(keys + i * stride, from + i * stride);
#pragma unroll
    for (u32 i = 0; i < BLOCK_UNITS / stride; i++) copy_begin(values + i * stride * 2, from + BLOCK_UNITS + i * stride);
}

// Two neighbouring values of which the first `n` are known; the others are taken as zeros, whatever lies there.
DEVICE u32 first_of(u32 two, int n) { return n >= 2 ? two : n == 1 ? two & 0xffffu : 0; }

// Of a stage's values, takes those from position `n_there` on as zeros. All threads of the block take part.
DEVICE void forget(uint4* values, u32 n_there) {
    for (u32 i = threadIdx.x; i < STAGE_UNITS; i += TILE_THREADS) {
        const u32 column = i / 4 % HEAD_DIM, first = i / (4 * HEAD_DIM) * 32 + value_unit(i % 4, column) * 8;
        const int n = (int)n_there - (int)first;
        if (n >= 8) continue;
        const uint4 v = values[i];
        values[i] = {first_of(v.x, n), first_of(v.y, n - 2), first_of(v.z, n - 4), first_of(v.w, n - 6)};
    }
}

// Attention of a warp's query vectors. Of lane 4g + t: of each sixteen vectors g and g + 8, columns 8n + 2t and the one after
// it.
struct Attending {
    uint4 queries[SIXTEENS][KEPT ? KEPT : 1][2]; // f16, as mma takes them; of 32 columns lane t has 8t to 8t + 7
    float sums[SIXTEENS][HEAD_DIM / 8][4];
    // What weights are measured by: at most SLACK below the largest score so far; and this lane's share of their sum.
    float top[SIXTEENS][2], total[SIXTEENS][2];
};

DEVICE u32 two_halves(float low, float high) {
    return float_to_halves(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
}

// Queries of some chunks, to `place`: [chunk][sixteen][2][lane]. `from`: where the vectors g and g + 8 of each sixteen begin.
DEVICE void place_queries(uint4* place, const float* const from[SIXTEENS][2], float scale, u32 first_chunk, u32 end_chunk,
                          u32 lane) {
#pragma unroll 1
    for (u32 c = first_chunk; c < end_chunk; c++) {
#pragma unroll
        for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 column = c * 32 + lane % 4 * 8 + i * 4;
                const float4 v = *(const float4*)(from[m][0] + column), w = *(const float4*)(from[m][1] + column);
                *place = {two_halves(v.x * scale, v.y * scale), two_halves(w.x * scale, w.y * scale),
                          two_halves(v.z * scale, v.w * scale), two_halves(w.z * scale, w.w * scale)};
                place += 32;
            }
        }
    }
}

DEVICE void start(Attending& at) {
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            for (int i = 0; i < 4; i++) at.sums[m][n][i] = 0.0f;
        }
        for (int i = 0; i < 2; i++) at.top[m][i] = MINUS_INFINITY, at.total[m][i] = 0.0f;
    }
}

// The positions from `first_position` on, by online softmax (Milakov and Gimelshein 2018). `keys`, `values`: of the step, in
// shared memory. `sees`: how many positions each vector sees, ascending; position 0 comes first, and all see it.
DEVICE void attend_step(Attending& at, const uint4* keys, const uint4* values, const uint4* queries, u32 first_position,
                        const u32* sees, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
    // Tile n of scores is of positions 8(i / 2) + i % 2 + 2n, for i of 0 to 7: so lane t has those of 8t to 8t + 7, of which its
    // units of values are.
    float scores[SIXTEENS][AT_ONCE / 8][4];
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
        for (int n = 0; n < AT_ONCE / 8; n++) {
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0.0f;
        }
    }
    const u32 row = g / 2 * 8 + g % 2;
    uint4 q[SIXTEENS][2], k[2][2];
    for (int j = 0; j < 2; j++) k[0][j] = keys[(row + 2 * j) * KEY_UNITS + key_unit(t, row)];
#pragma unroll
    for (int s = 0; s < CHUNKS * AT_ONCE / 16; s++) {
        const int c = s / (AT_ONCE / 16), n = s % (AT_ONCE / 16) * 2;
        if (n == 0) {
#pragma unroll
            for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    q[m][i] = c < KEPT ? at.queries[m][c < KEPT ? c : 0][i]
                                       : queries[(((c - KEPT) * SIXTEENS + m) * 2 + i) * 32 + lane];
                }
            }
        }
        if (s + 1 < CHUNKS * AT_ONCE / 16) {
            const int next_c = (s + 1) / (AT_ONCE / 16), next_n = (s + 1) % (AT_ONCE / 16) * 2;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                k[(s + 1) % 2][j] = keys[(row + 2 * (next_n + j)) * KEY_UNITS + key_unit(next_c * 4 + t, row)];
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint4 key = k[s % 2][j];
#pragma unroll
                for (int m = 0; m < SIXTEENS; m++) {
                    const uint4 a = q[m][i];
                    mma_f16(scores[m][n + j], a.x, a.y, a.z, a.w, i ? key.z : key.x, i ? key.w : key.y);
                }
            }
        }
    }
    if (first_position + AT_ONCE > sees[0]) {
#pragma unroll
        for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
            for (int n = 0; n < AT_ONCE / 8; n++) {
                const u32 position = first_position + 8 * t + 2 * n;
                for (int i = 0; i < 4; i++) {
                    // What lies beyond is unknown, and may be no number.
                    if (position + i % 2 >= sees[m * 16 + i / 2 * 8 + g]) scores[m][n][i] = MINUS_INFINITY;
                }
            }
        }
    }
    float highest[SIXTEENS][2];
    bool is_higher = false;
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[m][i] = fmaxf(scores[m][0][2 * i], scores[m][0][2 * i + 1]);
#pragma unroll
            for (int n = 1; n < AT_ONCE / 8; n++) {
                highest[m][i] = fmaxf(highest[m][i], fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
            }
            is_higher |= highest[m][i] > at.top[m][i] + SLACK;
        }
    }
    if (any_of_warp(is_higher)) { // seldom, after the first step
#pragma unroll
        for (int m = 0; m < SIXTEENS; m++) {
            float worth[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = fmaxf(highest[m][i], shuffle_xor(highest[m][i], 1));
                top = fmaxf(top, shuffle_xor(top, 2));
                // By its own scores alone: who shares the warp changes no bits.
                top = top > at.top[m][i] + SLACK ? top : at.top[m][i];
                worth[i] = power_of_two(at.top[m][i] - top);
                at.top[m][i] = top;
                at.total[m][i] *= worth[i];
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                for (int i = 0; i < 4; i++) at.sums[m][n][i] *= worth[i / 2];
            }
        }
    }
    u32 weights[SIXTEENS][AT_ONCE / 8][2];
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
        for (int n = 0; n < AT_ONCE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float low = power_of_two(scores[m][n][2 * i] - at.top[m][i]);
                const float high = power_of_two(scores[m][n][2 * i + 1] - at.top[m][i]);
                at.total[m][i] += low + high;
                weights[m][n][i] = float_to_halves(low, high);
            }
        }
    }
    const uint4* value = values + g * 4 + value_unit(t, g);
    uint4 v[2][2];
    for (int j = 0; j < 2; j++) v[0][j] = value[j * 8 * 4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) {
        if (s + 1 < HEAD_DIM / 16) {
#pragma unroll
            for (int j = 0; j < 2; j++) v[(s + 1) % 2][j] = value[(2 * (s + 1) + j) * 8 * 4];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint4 these = v[s % 2][j];
#pragma unroll
                for (int m = 0; m < SIXTEENS; m++) {
                    const u32 *w = weights[m][2 * i], *w_2 = weights[m][2 * i + 1];
                    mma_f16(at.sums[m][2 * s + j], w[0], w[1], w_2[0], w_2[1], i ? these.z : these.x, i ? these.w : these.y);
                }
            }
        }
    }
}

// What one block does: of the rows `first_row..first_row + n_rows` of one sequence, whose positions follow each other,
// TILE_VECTORS query vectors of a KV head. Vectors are counted row by row, the query heads of a KV head side by side.
struct Tile {
    u32 first_row, n_rows, first_vector, reserved;
};

// The query vectors of a block's KV head.
struct Vectors {
    u32 first_row, first, end; // the first of the tile, and the end of the sequence's
    u32 first_head, group;
    DEVICE_MEMBER u32 row(u32 vector) const { return vector / group; } // among the sequence's
    // Where it begins in a buffer of [row][head][column].
    DEVICE_MEMBER u64 begin(u32 vector, u32 n_heads) const {
        return ((u64)(first_row + row(vector)) * n_heads + first_head + vector % group) * HEAD_DIM;
    }
};

DEVICE Vectors vectors_of(const Tile* tiles, const u32* heads) {
    const Tile tile = tiles[blockIdx.y];
    const u32 first_head = heads[blockIdx.x], group = heads[blockIdx.x + 1] - first_head;
    return {tile.first_row, tile.first_vector, tile.n_rows * group, first_head, group};
}

// What a block looks up again and again, in shared memory: registers are for sums.
struct Known {
    u32 sees[TILE_VECTORS]; // positions that each vector sees, 0 in a warp that has none
    u32 context;            // positions that any sees
    u32 first_block;        // of the sequence, in the tables
    u32 reserved[2];
};

// Attention of many rows. Grid: KV heads, tiles. Shared: two stages; what is known; of each warp the queries that are not kept.
KERNEL_AT_LEAST(TILE_THREADS, 2)
attend_tiles(const float* q, u8* cache, const Tile* tiles, const u32* positions, const u32* first_blocks, const u32* tables,
             const u32* heads, float* out, u32 n_heads, u32 n_kv_heads, float scale) {
    depend();
    const u32 kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 nth = warp % STAGE_BLOCKS, share = warp / STAGE_BLOCKS; // of a stage's blocks, what this warp copies
    uint4* stages = (uint4*)shared_memory();
    Known& known = *(Known*)(stages + 4 * STAGE_UNITS);
    uint4* queries = (uint4*)(&known + 1) + warp * (CHUNKS - KEPT) * SIXTEENS * 2 * 32;
    const u32* sees = known.sees + warp * WARP_VECTORS;
    Attending at;
    u32 page = 0; // of the next block to be copied
    {
        const Vectors vectors = vectors_of(tiles, heads);
        if (vectors.first >= vectors.end) return; // other KV heads have more query heads
        const u32 before = positions[vectors.first_row], first_block = first_blocks[vectors.first_row];
        const u32 context = before + vectors.row(min(vectors.first + TILE_VECTORS, vectors.end) - 1) + 1;
        // The first stage comes while queries are read.
        if (nth * BLOCK_LEN < context) {
            begin_block(stages, cache, tables[first_block + nth] * n_kv_heads + kv_head, nth, share, lane);
        }
        copy_commit();
        if ((nth + STAGE_BLOCKS) * BLOCK_LEN < context) page = tables[first_block + nth + STAGE_BLOCKS];
        if (threadIdx.x == 0) known.context = context, known.first_block = first_block;
        for (u32 i = threadIdx.x; i < TILE_VECTORS; i += TILE_THREADS) {
            // What is beyond the last vector repeats it, and is not written.
            const u32 vector = min(vectors.first + i, vectors.end - 1);
            known.sees[i] = vectors.first + i / WARP_VECTORS * WARP_VECTORS < vectors.end ? before + vectors.row(vector) + 1 : 0;
        }
        const float* from[SIXTEENS][2];
        for (int m = 0; m < SIXTEENS; m++) {
            for (int i = 0; i < 2; i++) {
                const u32 vector = vectors.first + warp * WARP_VECTORS + m * 16 + i * 8 + g;
                from[m][i] = q + vectors.begin(min(vector, vectors.end - 1), n_heads);
            }
        }
        // Those that are kept come by the second stage's memory.
        uint4* kept = stages + 2 * STAGE_UNITS + (warp * KEPT * SIXTEENS * 2) * 32 + lane;
        place_queries(kept, from, scale * LOG2_E, 0, KEPT, lane);
        place_queries(queries + lane, from, scale * LOG2_E, KEPT, CHUNKS, lane);
#pragma unroll
        for (int c = 0; c < KEPT; c++) {
            for (int m = 0; m < SIXTEENS; m++) {
                for (int i = 0; i < 2; i++) at.queries[m][c][i] = kept[((c * SIXTEENS + m) * 2 + i) * 32];
            }
        }
    }
    start(at);
    block_sync();
    for (u32 stage = 0; stage * STAGE < known.context; stage++) {
        uint4* keys = stages + stage % 2 * 2 * STAGE_UNITS;
        copy_wait<0>();
        block_sync(); // it is there, and all are done with the one before it
        {
            const u32 block = (stage + 1) * STAGE_BLOCKS + nth, context = known.context;
            if (block * BLOCK_LEN < context) {
                uint4* next = stages + (stage + 1) % 2 * 2 * STAGE_UNITS;
                begin_block(next, cache, page * n_kv_heads + kv_head, nth, share, lane);
            }
            copy_commit();
            if ((block + STAGE_BLOCKS) * BLOCK_LEN < context) page = tables[known.first_block + block + STAGE_BLOCKS];
            if ((stage + 1) * STAGE > context) {
                forget(keys + STAGE_UNITS, context - stage * STAGE);
                block_sync();
            }
        }
#pragma unroll 1
        for (u32 step = 0; step < STAGE && stage * STAGE + step < sees[WARP_VECTORS - 1]; step += AT_ONCE) {
            const uint4* of_step = keys + step * KEY_UNITS;
            attend_step(at, of_step, of_step + STAGE_UNITS, queries, stage * STAGE + step, sees, lane);
        }
    }
    // Asked again: until here registers are for sums.
    const Vectors vectors = vectors_of(tiles, heads);
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = at.total[m][i];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            const u32 vector = vectors.first + warp * WARP_VECTORS + m * 16 + i * 8 + g;
            if (vector >= vectors.end) continue;
            const float inverse = 1.0f / total;
            float* to = out + vectors.begin(vector, n_heads) + 2 * t;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                const float2 two = {at.sums[m][n][2 * i] * inverse, at.sums[m][n][2 * i + 1] * inverse};
                *(float2*)(to + n * 8) = two;
            }
        }
    }
}

#endif
