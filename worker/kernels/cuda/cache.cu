// The paged cache of keys and values, and what writes to it. Compiled for one head dimension (HEAD_DIM, a multiple of 32)
// and one format (KV_FORMAT: 0 f16, 1 f32, 2 int8 with a scale for each position).
//
// A layer's cache is [block][KV head] pages. A page: keys [position][column], so that a query meets a key in one stretch;
// values [column][position], so that weights of neighbouring positions meet theirs; then, of int8, the scales of the keys
// and of the values, [position] each.

#define BLOCK_LEN 16
#define PAGE_NUMBERS (BLOCK_LEN * HEAD_DIM)

#if KV_FORMAT == 0
typedef u16 Kept;
#elif KV_FORMAT == 1
typedef float Kept;
#else
typedef signed char Kept;
#endif
#define PAGE_BYTES (2 * PAGE_NUMBERS * (u32)sizeof(Kept) + (KV_FORMAT == 2 ? 2 * BLOCK_LEN * 4 : 0))

DEVICE Kept* keys_of(u8* cache, u32 page) { return (Kept*)(cache + (u64)page * PAGE_BYTES); }
DEVICE Kept* values_of(u8* cache, u32 page) { return keys_of(cache, page) + PAGE_NUMBERS; }
// Of int8 only.
DEVICE float* scales_of(u8* cache, u32 page) { return (float*)(values_of(cache, page) + PAGE_NUMBERS); }

DEVICE float read_kept(Kept x) {
#if KV_FORMAT == 0
    return half_to_float(x);
#else
    return (float)x;
#endif
}

#define ROPE_THREADS 128
// A slot that is none: rows that pad a step to its bucket write nothing.
#define NO_SLOT 0xffffffffu

// Rotates the first `n_pairs` pairs of columns of one head, by the angles of the position.
DEVICE void rotate(float* x, const float* angles, u32 n_pairs, u32 is_adjacent) {
    for (u32 i = threadIdx.x; i < n_pairs; i += ROPE_THREADS) {
        const u32 a = is_adjacent ? 2 * i : i, b = is_adjacent ? 2 * i + 1 : i + n_pairs;
        const float cosine = angles[i], sine = angles[n_pairs + i], x_a = x[a], x_b = x[b];
        x[a] = x_a * cosine - x_b * sine;
        x[b] = x_a * sine + x_b * cosine;
    }
}

// One number to the cache. `scale` of int8: 127 / the largest magnitude.
DEVICE Kept kept(float x, float inverse) {
#if KV_FORMAT == 0
    return float_to_half_saturated(x);
#elif KV_FORMAT == 1
    return x;
#else
    return (signed char)(int)((x * inverse + 12582912.0f) - 12582912.0f);
#endif
}

#if KV_FORMAT == 2
// The largest magnitude of a head's columns. `place` is shared: a float for each warp.
DEVICE float largest_of(const float* x, float* place) {
    float largest = 0.0f;
    for (u32 i = threadIdx.x; i < HEAD_DIM; i += ROPE_THREADS) largest = fmaxf(largest, fabsf(x[i]));
    largest = warp_max(largest);
    block_sync();
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = largest;
    block_sync();
    for (u32 i = 0; i < ROPE_THREADS / 32; i++) largest = fmaxf(largest, place[i]);
    return largest;
}
#endif

// Rotates queries and keys in place, and writes keys and values to their slots. A block a token and head: the query heads
// first, then the KV heads. `angles`: [position][cosines, sines].
KERNEL(ROPE_THREADS)
rope_kv(float* q, float* k, const float* v, const u32* positions, const u32* slots, const float* angles, u8* cache,
        u32 n_heads, u32 n_kv_heads, u32 n_pairs, u32 is_adjacent) {
    depend();
    const u32 token = blockIdx.x, head = blockIdx.y;
    const float* turn = angles + (u64)positions[token] * 2 * n_pairs;
    if (head < n_heads) {
        rotate(q + ((u64)token * n_heads + head) * HEAD_DIM, turn, n_pairs, is_adjacent);
        return;
    }
    const u32 kv_head = head - n_heads, slot = slots[token];
    const u64 from = ((u64)token * n_kv_heads + kv_head) * HEAD_DIM;
    rotate(k + from, turn, n_pairs, is_adjacent);
    if (slot == NO_SLOT) return;
    block_sync();
    const u32 page = slot / BLOCK_LEN * n_kv_heads + kv_head, at = slot % BLOCK_LEN;
    float k_inverse = 0.0f, v_inverse = 0.0f;
#if KV_FORMAT == 2
    float* place = (float*)shared_memory();
    const float k_largest = largest_of(k + from, place), v_largest = largest_of(v + from, place);
    // A row of zeros, or one so small that its inverse is not finite, is kept as zeros.
    k_inverse = 127.0f / k_largest <= 3.402823466e38f ? 127.0f / k_largest : 0.0f;
    v_inverse = 127.0f / v_largest <= 3.402823466e38f ? 127.0f / v_largest : 0.0f;
    if (threadIdx.x == 0) {
        scales_of(cache, page)[at] = k_inverse == 0.0f ? 0.0f : k_largest / 127.0f;
        scales_of(cache, page)[BLOCK_LEN + at] = v_inverse == 0.0f ? 0.0f : v_largest / 127.0f;
    }
#endif
    Kept *keys = keys_of(cache, page), *values = values_of(cache, page);
    for (u32 i = threadIdx.x; i < HEAD_DIM; i += ROPE_THREADS) {
        keys[at * HEAD_DIM + i] = kept(k[from + i], k_inverse);
        values[i * BLOCK_LEN + at] = kept(v[from + i], v_inverse);
    }
}
