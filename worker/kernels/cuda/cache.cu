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

#define ROPE_THREADS 128
#define ROPE_HEADS (ROPE_THREADS / 32)
// Of a head's pairs of columns, a lane's.
#define ROPE_PAIRS ((HEAD_DIM + 63) / 64)
// A slot that is none: rows that pad a step to its bucket write nothing.
#define NO_SLOT 0xffffffffu

// One number to the cache. `inverse` of int8: 127 / the largest magnitude.
DEVICE Kept kept(float x, float inverse) {
#if KV_FORMAT == 0
    return float_to_half_saturated(x);
#elif KV_FORMAT == 1
    return x;
#else
    return (signed char)(int)((x * inverse + 12582912.0f) - 12582912.0f);
#endif
}

// What int8 of a head are multiplied with to be kept: of a head of zeros, or one so small that the inverse is not finite, 0.
// Writes the scale that brings them back.
DEVICE float keep_scale(float largest, float* scale, u32 lane) {
    largest = warp_max(largest);
    const float inverse = 127.0f / largest <= 3.402823466e38f ? 127.0f / largest : 0.0f;
    if (lane == 0) *scale = inverse == 0.0f ? 0.0f : largest / 127.0f;
    return inverse;
}

// Rotates the first `n_pairs` pairs of columns of each head: queries in place, keys on their way to their slots, where values
// go too. A warp a token and head, the query heads first, then the KV heads. `angles`: [position][cosines, sines]. Shared: a
// head's columns for each warp.
KERNEL(ROPE_THREADS)
rope_kv(float* q, const float* k, const float* v, const u32* positions, const u32* slots, const float* angles, u8* cache,
        u32 n_heads, u32 n_kv_heads, u32 n_pairs, u32 is_adjacent) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x, head = blockIdx.y * ROPE_HEADS + warp;
    const bool is_query = head < n_heads;
    // Where the token stands, no kernel writes.
    const u32 kv_head = head - n_heads, slot = is_query ? NO_SLOT : slots[token];
    const float* turn = angles + (u64)positions[token] * 2 * n_pairs;
    float cosines[ROPE_PAIRS], sines[ROPE_PAIRS];
#pragma unroll
    for (u32 i = 0; i < ROPE_PAIRS; i++) {
        const u32 at = i * 32 + lane;
        if (at < n_pairs) cosines[i] = turn[at], sines[i] = turn[n_pairs + at];
    }
    depend();
    if (head >= n_heads + n_kv_heads || (!is_query && slot == NO_SLOT)) return;
    const u64 from = ((u64)token * (is_query ? n_heads : n_kv_heads) + (is_query ? head : kv_head)) * HEAD_DIM;
    const float* in = (is_query ? q : k) + from;
    float* x = (float*)shared_memory() + warp * HEAD_DIM;
    for (u32 i = lane; i < HEAD_DIM; i += 32) x[i] = in[i];
    warp_sync();
#pragma unroll
    for (u32 i = 0; i < ROPE_PAIRS; i++) {
        const u32 at = i * 32 + lane, a = is_adjacent ? 2 * at : at, b = is_adjacent ? 2 * at + 1 : at + n_pairs;
        if (at >= n_pairs) break;
        const float x_a = x[a], x_b = x[b];
        x[a] = x_a * cosines[i] - x_b * sines[i];
        x[b] = x_a * sines[i] + x_b * cosines[i];
    }
    warp_sync();
    if (is_query) {
        for (u32 i = lane; i < HEAD_DIM; i += 32) q[from + i] = x[i];
        return;
    }
    const u32 page = slot / BLOCK_LEN * n_kv_heads + kv_head, at = slot % BLOCK_LEN;
    float k_inverse = 0.0f, v_inverse = 0.0f;
#if KV_FORMAT == 2
    float k_largest = 0.0f, v_largest = 0.0f;
    for (u32 i = lane; i < HEAD_DIM; i += 32) {
        k_largest = fmaxf(k_largest, fabsf(x[i]));
        v_largest = fmaxf(v_largest, fabsf(v[from + i]));
    }
    k_inverse = keep_scale(k_largest, scales_of(cache, page) + at, lane);
    v_inverse = keep_scale(v_largest, scales_of(cache, page) + BLOCK_LEN + at, lane);
#endif
    Kept *keys = keys_of(cache, page), *values = values_of(cache, page);
    for (u32 i = lane; i < HEAD_DIM; i += 32) {
        keys[at * HEAD_DIM + i] = kept(x[i], k_inverse);
        values[i * BLOCK_LEN + at] = kept(v[from + i], v_inverse);
    }
}
