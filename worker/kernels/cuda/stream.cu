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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
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
// Sixteen bytes that a warp's ring has, of one token and of more: three steps of any format, and two, for then activations
// are to stay in the cache that lies beside shared memory.
#define ONE_RING 408
#define RING 288
// Steps of a row that a warp keeps while it norms.
#define NORMED_STEPS 3
// Floats that a block which norms adds up in, before its activations.
#define NORM_PLACE 16

#define MOST_MATRICES 3

// Matrices of one format on one input, tile after tile. `first_tiles`: where the tiles of each begin; of those that are
// not there, beyond the last; then how many there are.
template <class Matrix>
struct Several {
    Matrix of[MOST_MATRICES];
    float* outs[MOST_MATRICES]; // [part][token][row] each
    u32 first_tiles[MOST_MATRICES];
    u32 n_tiles;
    u32 adds; // whether what is in `outs` is to be added to
};

// One token's row, of which activations are to be made by every block for itself: row / rms(row) * weight. No row: they are
// made already.
struct Normed {
    const float *row, *weight;
    float eps;
};

// Which matrix a tile is of, and which tiles are that matrix's.
struct Owner {
    u32 matrix, first, end;
};

template <class Matrix>
DEVICE Owner owner_of(const Several<Matrix>& all, u32 tile) {
    if (tile >= all.first_tiles[2]) return {2, all.first_tiles[2], all.n_tiles};
    if (tile >= all.first_tiles[1]) return {1, all.first_tiles[1], min(all.first_tiles[2], all.n_tiles)};
    return {0, 0, min(all.first_tiles[1], all.n_tiles)};
}

// The `at`-th of three. (An index would put all of them into local memory.)
template <class Any>
DEVICE Any pick(const Any of[MOST_MATRICES], u32 at) {
    return at == 2 ? of[2] : at == 1 ? of[1] : of[0];
}

// Not of what `pick` gives, all of whose words would take registers.
template <class Matrix>
DEVICE u32 rows_of(const Several<Matrix>& all, u32 at) {
    return at == 2 ? all.of[2].rows : at == 1 ? all.of[1].rows : all.of[0].rows;
}

// Sums that lie as the products of tensor cores do, and are done when all steps are.
struct TensorSums {
    static DEVICE_MEMBER u32 token_of(u32 t, u32 i) { return 2 * t + i; }
    template <int TOKEN_TILES, class Matrix>
    static DEVICE_MEMBER void finish(float[TOKEN_TILES][4], const Several<Matrix>&, u32, u32, u32) {}
};

// Waits for the row, then makes its activations in `place`, which is shared. Grid and `to` are of one token; all threads of
// the block are here.
template <class Of, int WARPS>
DEVICE Made norm_here(const Normed& normed, const Made& to, float* place) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_fours = to.columns / 4;
    float4 weights[NORMED_STEPS], kept[NORMED_STEPS];
#pragma unroll
    for (int i = 0; i < NORMED_STEPS; i++) {
        const u32 at = (i * WARPS + warp) * 32 + lane;
        if (at < n_fours) weights[i] = ((const float4*)normed.weight)[at];
    }
    depend();
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < NORMED_STEPS; i++) {
        const u32 at = (i * WARPS + warp) * 32 + lane;
        kept[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (at < n_fours) kept[i] = ((const float4*)normed.row)[at];
        const float4 v = kept[i];
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
    }
    const Made made = Of::made_at(to, place + NORM_PLACE);
    const float scale = 1.0f / sqrtf(block_sum(square, place) / (float)to.columns + normed.eps);
#pragma unroll
    for (int i = 0; i < NORMED_STEPS; i++) {
        const u32 step = i * WARPS + warp, at = step * 32 + lane;
        if (step >= steps_of(to.columns)) break;
        float4 v = kept[i];
        const float4 w = weights[i];
        if (at < n_fours) v = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
        make(made, 0, step, lane, v, at < n_fours);
    }
    block_sync();
    return made;
}

// The sums of a block's warps, added in order of the steps that they took, to out[part][token][row]: this warp took every
// WARPS-th from `first` on. `place` is shared: [warp][token of eight][row].
template <class Of, int WARPS, int TOKEN_TILES>
DEVICE void add_warps(const float sums[TOKEN_TILES][4], float* place, u32 first, float* out, bool adds, u32 tile, u32 rows,
                      u32 n_tokens) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 row_of_tile = threadIdx.x % TILE_ROWS, token_of_tile = threadIdx.x / TILE_ROWS;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if ((blockIdx.y * TOKEN_TILES + n) * 8 >= n_tokens) break;
        const u32 row = tile * TILE_ROWS + row_of_tile;
        const u32 token = (blockIdx.y * TOKEN_TILES + n) * 8 + token_of_tile;
        const bool is_mine = token_of_tile < 8 && token < n_tokens && row < rows;
        float* to = out + ((u64)blockIdx.z * n_tokens + token) * rows + row;
        const float before = is_mine && adds ? *to : 0.0f;
        block_sync();
        float* mine = place + (first * 8 + Of::token_of(t, 0)) * TILE_ROWS + g;
        const u32 next = (Of::token_of(0, 1) - Of::token_of(0, 0)) * TILE_ROWS;
        for (int i = 0; i < 4; i++) mine[i % 2 * next + i / 2 * 8] = sums[n][i];
        block_sync();
        if (is_mine) {
            float sum = 0.0f;
            for (int i = 0; i < WARPS; i++) sum += place[i * 8 * TILE_ROWS + threadIdx.x];
            *to = before + sum;
        }
    }
}

// What a block multiplies, once it is there: what was `given`, or its `own` of a row to be normed, which then lies in front of
// what is left of `place`.
template <class Of, int WARPS, bool IS_ONE>
DEVICE const Made& activations_of(const Made& given, const Normed& normed, Made& own, float*& place) {
    if constexpr (IS_ONE) {
        own = given;
        if (normed.row) {
            own = norm_here<Of, WARPS>(normed, given, place);
            place += NORM_PLACE + Of::made_floats(given.columns);
        } else {
            depend();
        }
        return own;
    } else {
        depend();
        return given;
    }
}

// Which steps of a block's tiles a warp takes: every WARPS-th, from another on in each tile, so that none has more than its
// share of tiles whose steps the warps do not divide.
template <int WARPS>
struct Turns {
    u32 first; // of this tile
    u32 back;  // by how many it is another in the next

    DEVICE_MEMBER void next() { first = first < back ? first + WARPS - back : first - back; }
    // Of `n` steps.
    DEVICE_MEMBER u32 share_of(u32 n) const { return (n + WARPS - 1 - first) / WARPS; }
};

// A block's share of a launch, of steps of one kind: IS_PLAIN if all are. IS_ONE: there is one token.
template <class Of, int WARPS, int TOKEN_TILES, bool IS_ONE, bool IS_PLAIN>
DEVICE void stream_steps(const Several<typename Of::Matrix>& all, const Made& given, const Normed& normed, u32 begin, u32 end,
                         u32 n_tokens) {
    constexpr int RING_LEN = IS_ONE ? ONE_RING : RING, DEPTH = RING_LEN / Of::LEN;
    static_assert(DEPTH >= 2, "a step under way while another is multiplied");
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.y * 8 * TOKEN_TILES;
    const u32 begin_step = begin / Of::RUNS, end_step = (end + Of::RUNS - 1) / Of::RUNS, n_steps = end_step - begin_step;
    uint4* ring = (uint4*)shared_memory() + warp * RING_LEN;
    float* place = (float*)((uint4*)shared_memory() + WARPS * RING_LEN);
    // What is fetched next.
    typename Of::template Cursor<WARPS> cursor;
    constexpr bool TURNS = IS_ONE; // of more tokens there are no registers for them
    Turns<WARPS> turns = {warp, TURNS ? n_steps % WARPS : 0}, ahead_turns = turns;
    Owner ahead = {0, 0, 0};
    u32 ahead_tile = blockIdx.x, n_ahead = 0, ahead_at = 0;
    auto fetch_next = [&] {
        // A tile of whose steps none is this warp's is passed over.
        while (n_ahead == 0 && ahead_tile < all.n_tiles) {
            n_ahead = ahead_turns.share_of(n_steps);
            if (ahead_tile >= ahead.end) {
                ahead = owner_of(all, ahead_tile);
                cursor.enter(pick(all.of, ahead.matrix), lane);
            }
            cursor.begin(all.of[0], ahead_tile - ahead.first, begin_step + ahead_turns.first, lane);
            ahead_turns.next();
            ahead_tile += gridDim.x;
            if (!TURNS) break; // then it has one of each, or of none
        }
        if (n_ahead > 0) {
            cursor.fetch(ring + ahead_at, all.of[0], lane);
            n_ahead -= 1;
            ahead_at = ahead_at == (DEPTH - 1) * Of::LEN ? 0 : ahead_at + Of::LEN;
        }
        copy_commit();
    };
    for (int i = 0; i < DEPTH - 1; i++) fetch_next();
    Made own;
    const Made& x = activations_of<Of, WARPS, IS_ONE>(given, normed, own, place);
    u32 at = 0;
    for (u32 index = blockIdx.x; index < all.n_tiles; index += gridDim.x) {
        const Owner here = owner_of(all, index);
        const u32 tile = index - here.first;
        float sums[TOKEN_TILES][4];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
        }
#pragma unroll 1
        for (u32 step = begin_step + turns.first; step < end_step; step += WARPS) {
            copy_wait<DEPTH - 2>();
            warp_sync(); // all lanes' copies are there, and the step before was read
            fetch_next();
            if (IS_PLAIN) {
                Of::template multiply<TOKEN_TILES>(sums, ring + at, all.of[0], x, step, first_token, n_tokens, lane);
            } else {
                Of::template multiply_any<TOKEN_TILES>(sums, ring + at, all.of[0], x, step, begin, end, first_token, n_tokens,
                                                       lane);
            }
            at = at == (DEPTH - 1) * Of::LEN ? 0 : at + Of::LEN;
        }
        Of::template finish<TOKEN_TILES>(sums, all, here.matrix, tile, lane);
        add_warps<Of, WARPS, TOKEN_TILES>(sums, place, turns.first, pick(all.outs, here.matrix), all.adds, tile,
                                          rows_of(all, here.matrix), n_tokens);
        turns.next();
    }
}

// out[part][token][row] = sum over the part's columns of x[token] * w[row], for 8 * TOKEN_TILES tokens a block. Grid: blocks
// that share the tiles, tokens, parts. `parts`: where the runs of each part begin, and where the last ends. Shared: a ring a
// warp, then what `add_warps` takes.
//
// `Of` says of a kind of weights what a step is: RUNS of it, its LEN in sixteen bytes, a cursor that fetches it, how it is
// multiplied, what is left to do for a tile's sums, and which token of eight each of a lane's is of; of one token that is to be
// normed, where the activations that it takes lie in shared memory, and how many floats they are. All matrices have the same
// columns.
template <class Of, int WARPS, int TOKEN_TILES, bool IS_ONE = false>
DEVICE void stream(const Several<typename Of::Matrix>& all, const Made& x, const u32* parts, u32 n_tokens,
                   const Normed& normed = {}) {
    const u32 begin = parts[blockIdx.z], end = parts[blockIdx.z + 1];
    if (Of::is_plain(all.of[0], begin, end)) {
        stream_steps<Of, WARPS, TOKEN_TILES, IS_ONE, true>(all, x, normed, begin, end, n_tokens);
    } else {
        stream_steps<Of, WARPS, TOKEN_TILES, IS_ONE, false>(all, x, normed, begin, end, n_tokens);
    }
}
