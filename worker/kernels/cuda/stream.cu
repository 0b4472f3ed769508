// Products of few tokens with weights that are read once: how blocks and warps share the work, and how weights come.
//
// A block takes tiles of sixteen rows, one after the other, and its warps the steps of a tile in turn. Each warp keeps a ring
// of steps on their way to shared memory, across tiles, and from before the activations are there: what it waits for is
// memory alone.

#define TILE_ROWS 16
// Of kernels for up to eight tokens, and for more: warps, threads, and blocks that a multiprocessor shall have room for. (For
// few tokens, 12 warps were the fastest of 8, 12 and 16 on an H200.)
#define FEW_WARPS 12
#define FEW_THREADS 384
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 900
#define FEW_BLOCKS 1 // with two, registers would be spilled
#else
#define FEW_BLOCKS 2
#endif
#define MANY_WARPS 8
#define MANY_THREADS 256
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MANY_BLOCKS 1 // as above
#else
#define MANY_BLOCKS 2
#endif
// Sixteen bytes that a warp's ring has; at least two steps of any format fit.
#define RING 288

#define MOST_MATRICES 3

// Matrices of one format on one input, tile after tile. `first_tiles`: where the tiles of each begin; of those that are
// not there, beyond the last; then how many there are.
template <class Matrix>
struct Several {
    Matrix of[MOST_MATRICES];
    float* outs[MOST_MATRICES]; // [part][token][row] each
    u32 first_tiles[MOST_MATRICES];
    u32 n_tiles;
};

// The matrix that a tile is of, and where it goes. (An index would put all of them into local memory.)
template <class Matrix>
struct Chosen {
    Matrix matrix;
    float* out;
    u32 tile;
};

template <class Matrix>
DEVICE Chosen<Matrix> choose(const Several<Matrix>& all, u32 tile) {
    if (tile >= all.first_tiles[2]) return {all.of[2], all.outs[2], tile - all.first_tiles[2]};
    if (tile >= all.first_tiles[1]) return {all.of[1], all.outs[1], tile - all.first_tiles[1]};
    return {all.of[0], all.outs[0], tile};
}

// The sums of a block's warps, added in order, to out[part][token][row]. `sums` lie as products of tensor cores do. `place` is
// shared: [warp][token of eight][row].
template <int WARPS, int TOKEN_TILES>
DEVICE void add_warps(const float sums[TOKEN_TILES][4], float* place, float* out, u32 tile, u32 rows, u32 n_tokens) {
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 row_of_tile = threadIdx.x % TILE_ROWS, token_of_tile = threadIdx.x / TILE_ROWS;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if ((blockIdx.y * TOKEN_TILES + n) * 8 >= n_tokens) break;
        block_sync();
        for (int i = 0; i < 4; i++) {
            place[(warp * 8 + 2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[n][i];
        }
        block_sync();
        const u32 row = tile * TILE_ROWS + row_of_tile;
        const u32 token = (blockIdx.y * TOKEN_TILES + n) * 8 + token_of_tile;
        if (token_of_tile < 8 && token < n_tokens && row < rows) {
            float sum = 0.0f;
            for (int i = 0; i < WARPS; i++) sum += place[(i * 8 + token_of_tile) * TILE_ROWS + row_of_tile];
            out[((u64)blockIdx.z * n_tokens + token) * rows + row] = sum;
        }
    }
}

// A block's share of a launch, of steps of one kind: IS_PLAIN if all are.
template <class Of, int WARPS, int TOKEN_TILES, bool IS_PLAIN>
DEVICE void stream_steps(const Several<typename Of::Matrix>& all, const Made& x, u32 begin, u32 end, u32 n_tokens) {
    constexpr int DEPTH = RING / Of::LEN;
    static_assert(DEPTH >= 2, "a step under way while another is multiplied");
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.y * 8 * TOKEN_TILES;
    const u32 first_step = begin / Of::RUNS + warp, end_step = (end + Of::RUNS - 1) / Of::RUNS;
    const u32 n_steps = first_step < end_step ? (end_step - first_step + WARPS - 1) / WARPS : 0; // of a tile, for this warp
    uint4* ring = (uint4*)shared_memory() + warp * RING;
    float* place = (float*)((uint4*)shared_memory() + WARPS * RING);
    // What is fetched next.
    typename Of::template Cursor<WARPS> cursor;
    u32 ahead_tile = blockIdx.x, n_ahead = 0, ahead_at = 0;
    auto fetch_next = [&] {
        if (n_ahead == 0 && ahead_tile < all.n_tiles && n_steps > 0) {
            const Chosen<typename Of::Matrix> ahead = choose(all, ahead_tile);
            cursor.begin(ahead.matrix, ahead.tile, first_step, lane);
            n_ahead = n_steps;
            ahead_tile += gridDim.x;
        }
        if (n_ahead > 0) {
            cursor.fetch(ring + ahead_at, lane);
            n_ahead -= 1;
            ahead_at = ahead_at == (DEPTH - 1) * Of::LEN ? 0 : ahead_at + Of::LEN;
        }
        copy_commit();
    };
    for (int i = 0; i < DEPTH - 1; i++) fetch_next();
    depend();
    u32 at = 0;
    for (u32 index = blockIdx.x; index < all.n_tiles; index += gridDim.x) {
        const Chosen<typename Of::Matrix> chosen = choose(all, index);
        const float2 scales = Of::row_scales(chosen.matrix, chosen.tile, lane);
        float sums[TOKEN_TILES][4];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
        }
#pragma unroll 1
        for (u32 step = first_step; step < end_step; step += WARPS) {
            copy_wait<DEPTH - 2>();
            warp_sync(); // all lanes' copies are there, and the step before was read
            fetch_next();
            if (IS_PLAIN) {
                Of::template multiply<TOKEN_TILES>(sums, ring + at, chosen.matrix, x, step, first_token, n_tokens, lane);
            } else {
                Of::template multiply_any<TOKEN_TILES>(sums, ring + at, chosen.matrix, x, step, begin, end, first_token, n_tokens,
                                                       lane);
            }
            at = at == (DEPTH - 1) * Of::LEN ? 0 : at + Of::LEN;
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            for (int i = 0; i < 4; i++) sums[n][i] *= i / 2 ? scales.y : scales.x;
        }
        add_warps<WARPS, TOKEN_TILES>(sums, place, chosen.out, chosen.tile, chosen.matrix.rows, n_tokens);
    }
}

// out[part][token][row] = sum over the part's columns of x[token] * w[row], for 8 * TOKEN_TILES tokens a block. Grid: blocks
// that share the tiles, tokens, parts. `parts`: where the runs of each part begin, and where the last ends. Shared: a ring a
// warp, then what `add_warps` takes.
//
// `Of` says of a kind of weights what a step is: RUNS of it, its LEN in sixteen bytes, a cursor that fetches it, how it is
// multiplied, and what a sum of rows g and g + 8 is multiplied with at last. All matrices have the same columns.
template <class Of, int WARPS, int TOKEN_TILES>
DEVICE void stream(const Several<typename Of::Matrix>& all, const Made& x, const u32* parts, u32 n_tokens) {
    const u32 begin = parts[blockIdx.z], end = parts[blockIdx.z + 1];
    if (Of::is_plain(all.of[0], begin, end)) {
        stream_steps<Of, WARPS, TOKEN_TILES, true>(all, x, begin, end, n_tokens);
    } else {
        stream_steps<Of, WARPS, TOKEN_TILES, false>(all, x, begin, end, n_tokens);
    }
}
