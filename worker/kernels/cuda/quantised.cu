// Weights in integers, as `matrix.rs` lays them: sixteen rows a tile, 32 columns a run, runs by twos and fours so that a lane
// takes sixteen bytes at once. A weight is scale * (u - ZERO) + min.
//
// u is never turned into a float: its bits are those of the f16 number u * 2^-24, which tensor cores multiply exactly with
// activations in f16 (`activations.cu`). A run's product, a float, meets its row's scale and is added up over a step of four
// runs; what ZERO and min add is one more product, of the step's scales or mins with the sums of its activations; then the
// step meets its token's scale. So from five tokens on (`OfIntegers`). Up to four meet u as bytes (`OfBytes`), with activations
// in two bytes each. Warps take the steps of a tile in turn (`stream.cu`).

// Of kernels that look at each step once.
#define PACK_THREADS 256
#define PACK_WARPS 8

// How scale and min of a run are kept; `blocks.rs` has the same.
#define PLAIN 0  // f16 scale of each row
#define MIN 1    // f16 scale and f16 min
#define SUPER 2  // scale = d * sc, min = -(m * mc): bytes sc, mc of each run, f16 d, m of eight runs
#define HALVES 3 // scale = d * sc of columns 0 to 15, d * mc of the rest: signed bytes, f16 d

// A matrix: pointers to its planes, and its shape. Lane 4g + t of a warp multiplies rows g and g + 8; words of the two
// stand side by side. Runs are padded to whole steps, by zeros. Planes by tile, then:
//   quants  of 8 bits [run][lane] four words; else [pair of runs][lane] two words of either run
//   tops    the bits above the fourth: of 5 bits [pair][g] two words of either run, a bit a column; of 6 bits
//           [pair][g][t / 2] two words of either run; else null
//   scales  [four runs][g] a word each; of MIN [pair][g] two words of either run
//   supers  [super-block][g] two words of SUPER, one of HALVES; else null
struct Quantised {
    const u32* quants;
    const u32* tops;
    const u32* scales;
    const u32* supers;
    u32 rows, n_runs;
    u32 first_run; // of the super-block that the first run lies in, the runs before it
    u32 n_supers;
};

// What a warp takes of a step, in sixteen bytes: where each plane begins in shared memory.
template <int BITS, int SCALES>
struct Stage {
    static constexpr u32 QUANTS = BITS == 8 ? 32 * STEP : 32 * STEP / 2;
    static constexpr u32 TOPS = BITS == 5 ? 8 * STEP / 2 : BITS == 6 ? 16 * STEP / 2 : 0;
    static constexpr u32 SCALES_ = SCALES == MIN ? 8 * STEP / 2 : 8 * STEP / 4;
    static constexpr u32 SUPERS = SCALES == SUPER ? 4 : SCALES == HALVES ? 2 : 0; // of one super-block
    static constexpr u32 TOPS_AT = QUANTS, SCALES_AT = TOPS_AT + TOPS, SUPERS_AT = SCALES_AT + SCALES_;
    static constexpr u32 LEN = SUPERS_AT + 2 * SUPERS; // a step may begin in one super-block and end in the next
};

// Where a lane's share of a tile's next step lies. Steps of one warp are WARPS apart: an even number, so that all begin in
// the same half of a super-block.
template <int BITS, int SCALES, int WARPS>
struct IntegerCursor {
    typedef Stage<BITS, SCALES> At;
    static constexpr int N_REST = (At::LEN - At::QUANTS + 31) / 32; // of the other planes, counted through
    const uint4* quants;       // of the first step of the first tile
    const uint4* rest[N_REST]; // the same, or of the first super-block
    u32 units[N_REST];         // of a step, or of a super-block; 0: nothing. The highest bit: of a super-block.
    u32 step, super;           // from the first tile's first on

    DEVICE_MEMBER void enter(const Quantised& w, u32 lane) {
        quants = (const uint4*)w.quants + lane;
#pragma unroll
        for (int i = 0; i < N_REST; i++) {
            const u32 at = i * 32 + lane, of_scales = at - At::TOPS, of_supers = of_scales - At::SCALES_;
            rest[i] = quants;
            units[i] = 0;
            if (At::TOPS > 0 && at < At::TOPS) {
                rest[i] = (const uint4*)w.tops + at;
                units[i] = At::TOPS;
            } else if (of_scales < At::SCALES_) {
                rest[i] = (const uint4*)w.scales + of_scales;
                units[i] = At::SCALES_;
            } else if (At::SUPERS > 0 && of_supers < (w.first_run % STEP ? 2 : 1) * At::SUPERS) { // steps lie in one, or in two
                rest[i] = (const uint4*)w.supers + of_supers;
                units[i] = At::SUPERS | 1u << 31;
            }
        }
    }

    // `like`: any matrix of these columns.
    DEVICE_MEMBER void begin(const Quantised& like, u32 tile, u32 of_tile, u32) {
        step = tile * steps_of(like.n_runs * RUN) + of_tile;
        super = tile * like.n_supers + (like.first_run + of_tile * STEP) / 8;
    }

    // Begins to fetch a step, and goes on to the next. The second of two super-blocks need not be there: the planes end with a
    // spare one.
    DEVICE_MEMBER void fetch(uint4* stage, const Quantised&, u32 lane) {
        const uint4* from = quants + step * At::QUANTS;
#pragma unroll
        for (u32 i = 0; i < At::QUANTS; i += 32) copy_begin(stage + i + lane, from + i);
#pragma unroll
        for (int i = 0; i < N_REST; i++) {
            const u32 unit = units[i] & 0xffffu, at = At::SUPERS > 0 && units[i] >> 31 ? super : step;
            if (unit) copy_begin(stage + At::QUANTS + i * 32 + lane, rest[i] + at * unit);
        }
        step += WARPS;
        super += WARPS * STEP / 8;
    }
};

DEVICE u32 word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// The weights that a lane multiplies of one run, a byte each: u of rows g and g + 8, columns 4t to 4t + 3, then 16 + 4t...
struct Bytes {
    u32 of[2][2];
};

// Of run `i` of the step.
template <int BITS, int SCALES>
DEVICE Bytes bytes_of(const uint4* stage, int i, u32 lane) {
    typedef Stage<BITS, SCALES> At;
    Bytes bytes;
    const uint4 quants = stage[(BITS == 8 ? i : i / 2) * 32 + lane];
    uint4 tops = {0, 0, 0, 0};
    if (BITS == 5) tops = stage[At::TOPS_AT + i / 2 * 8 + lane / 4];
    if (BITS == 6) tops = stage[At::TOPS_AT + i / 2 * 16 + lane / 2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32* of_row = bytes.of[row];
        if (BITS == 8) {
            of_row[0] = word_of(quants, 2 * row), of_row[1] = word_of(quants, 2 * row + 1);
            continue;
        }
        const u32 word = word_of(quants, i % 2 * 2 + row);
        of_row[0] = word & 0x0f0f0f0fu, of_row[1] = word >> 4 & 0x0f0f0f0fu;
        if (BITS == 5) {
            const u32 top = word_of(tops, i % 2 * 2 + row) >> lane % 4;
            of_row[0] |= (top << 4 & 0x00100010u) | (top << 8 & 0x10001000u);
            of_row[1] |= (top >> 4 & 0x00100010u) | (top & 0x10001000u);
        }
        if (BITS == 6) {
            const u32 top = word_of(tops, i % 2 * 2 + row) >> lane % 2 * 4;
            of_row[0] |= top << 4 & 0x30303030u;
            of_row[1] |= top << 2 & 0x30303030u;
        }
    }
    return bytes;
}

// The same, two columns a word: 4t and 4t + 2, 4t + 1 and 4t + 3, then those of 16 + 4t.
struct Fragment {
    u32 pairs[2][4];
};

template <int BITS, int SCALES>
DEVICE Fragment fragment_of(const uint4* stage, int i, u32 lane) {
    const Bytes bytes = bytes_of<BITS, SCALES>(stage, i, lane);
    Fragment f;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        for (int j = 0; j < 4; j++) f.pairs[row][j] = bytes.of[row][j / 2] >> j % 2 * 8 & 0x00ff00ffu;
    }
    return f;
}

// The word of scales of rows g and g + 8, or of their mins where those have a word of their own.
template <int BITS, int SCALES>
DEVICE u32 scales_word(const uint4* stage, int i, bool of_min, u32 g) {
    const u32* words = (const u32*)(stage + Stage<BITS, SCALES>::SCALES_AT);
    return SCALES == MIN ? words[(i / 2 * 8 + g) * 4 + i % 2 * 2 + of_min] : words[g * 4 + i];
}

DEVICE float half_of(u32 word, int row) { return half_to_float((u16)(row ? word >> 16 : word)); }

// Of rows g and g + 8 in run `i`: the factor of a product, and of HALVES that of the second half, both without d.
struct Factors {
    float first[2], second[2];
};

template <int SCALES>
DEVICE Factors factors_of(u32 word) {
    Factors f;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        if (SCALES == PLAIN || SCALES == MIN) f.first[row] = half_of(word, row);
        if (SCALES == SUPER) f.first[row] = (float)(u8)(word >> 8 * row); // sc and sc, then mc and mc
        if (SCALES == HALVES) f.first[row] = (float)(signed char)(word >> 8 * row);
        f.second[row] = SCALES == HALVES ? (float)(signed char)(word >> (16 + 8 * row)) : 0.0f;
    }
    return f;
}

// d and m of the super-block that run `i` of a step lies in, the step's first being `first` of its super-block.
template <int BITS, int SCALES>
DEVICE uint2 super_of(const uint4* stage, u32 first, int i, u32 g) {
    typedef Stage<BITS, SCALES> At;
    const u32* words = (const u32*)(stage + At::SUPERS_AT) + (first + i >= 8 ? 4 * At::SUPERS : 0);
    if (SCALES == SUPER) return {words[2 * g], words[2 * g + 1]};
    return {words[g], 0};
}

// What multiplies the sums of activations over half a run, as f16 twice in a word: by format a scale, a min, the integer of
// a min or of a scale, these as bits of 2^-24 times themselves or as they are. `word`: of the run's scales or mins.
template <int SCALES>
DEVICE u32 offset_of(u32 word, u32 half, int row) {
    if (SCALES == PLAIN || SCALES == MIN) return row ? pick_bytes(word, 0x3232) : pick_bytes(word, 0x1010);
    if (SCALES == SUPER) return row ? pick_bytes(word, 0x4343) : pick_bytes(word, 0x4242); // byte 4 is zero
    return float_to_half((float)(signed char)(word >> (16 * half + 8 * row))) * 0x10001u;
}

// 2^-20: products are of 2^-24 u, and sums of activations come as 2^-4 times themselves.
#define OF_SUMS 9.5367431640625e-7f

// Adds one step's product to the sums of each token tile, of a step whose runs all count and lie in one super-block.
template <int BITS, int SCALES, int ZERO, int TOKEN_TILES>
DEVICE void multiply_step(float sums[TOKEN_TILES][4], const uint4* stage, const Made& x, u32 step, u32 first_token,
                          u32 n_tokens, u32 lane) {
    typedef Stage<BITS, SCALES> At;
    const u32 g = lane / 4, t = lane % 4, n_padded = padded(n_tokens), n_steps = steps_of(x.columns);
    const uint4* b_of[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        const u32 token = min(first_token + 8 * n + g, n_tokens - 1); // what is beyond is not looked at
        b_of[n] = (const uint4*)x.halves + (u64)(token * n_steps + step) * (4 * STEP) + t;
    }
    float of_step[TOKEN_TILES][4];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        for (int j = 0; j < 4; j++) of_step[n][j] = 0.0f;
    }
    // Of MIN [pair]: scale and min of one run, then of the other; else [run].
    constexpr int SECOND = SCALES == MIN;
    uint4 words[SECOND + 1];
    words[0] = stage[At::SCALES_AT + g];
    if (SCALES == MIN) words[SECOND] = stage[At::SCALES_AT + 8 + g];
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        const Fragment a = fragment_of<BITS, SCALES>(stage, i, lane);
        const Factors factors =
            factors_of<SCALES>(SCALES == MIN ? word_of(words[i / 2], i % 2 * 2) : word_of(words[0], i));
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            if (n > 0 && first_token + 8 * n >= n_padded) break;
            const uint4 b = b_of[n][4 * i];
            float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_f16(product, a.pairs[0][0], a.pairs[1][0], a.pairs[0][1], a.pairs[1][1], b.x, b.y);
            if (SCALES == HALVES) {
                float second[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma_f16(second, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
                for (int j = 0; j < 4; j++) of_step[n][j] = fmaf(second[j], factors.second[j / 2], of_step[n][j]);
            } else {
                mma_f16(product, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
            }
            for (int j = 0; j < 4; j++) of_step[n][j] = fmaf(product[j], factors.first[j / 2], of_step[n][j]);
        }
    }
    // The offsets: lane t holds the halves t and 4 + t of the step's eight, of runs t / 2 and 2 + t / 2.
    u32 low_word = t < 2 ? words[0].x : words[0].y, high_word = t < 2 ? words[0].z : words[0].w;
    if (SCALES == MIN) low_word = t < 2 ? words[0].y : words[0].w, high_word = t < 2 ? words[SECOND].y : words[SECOND].w;
    u32 low[2], high[2];
    float d[2], by[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        low[row] = offset_of<SCALES>(low_word, t % 2, row), high[row] = offset_of<SCALES>(high_word, t % 2, row);
        d[row] = 1.0f, by[row] = SCALES == PLAIN ? -(float)ZERO * OF_SUMS : OF_SUMS;
    }
    if (SCALES >= SUPER) {
        const uint2 super = super_of<BITS, SCALES>(stage, 0, 0, g);
        for (int row = 0; row < 2; row++) {
            d[row] = half_of(super.x, row);
            by[row] = SCALES == SUPER ? half_of(super.y, row) * -16.0f : d[row] * (-(float)ZERO * OF_SUMS);
        }
    }
    const u64 of_totals = (u64)(step * 2 * STEP + t) * n_padded + first_token + g;
    const u64 of_scales = ((u64)step * n_padded + first_token) / 2 + t;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if (n > 0 && first_token + 8 * n >= n_padded) break;
        const u32* totals = x.totals + of_totals + 8 * n;
        const float2 scales = ((const float2*)x.scales)[of_scales + 4 * n];
        float offset[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_f16(offset, low[0], low[1], high[0], high[1], totals[0], totals[4 * n_padded]);
        for (int j = 0; j < 4; j++) {
            const float product = SCALES >= SUPER ? of_step[n][j] * d[j / 2] : of_step[n][j];
            sums[n][j] = fmaf(fmaf(offset[j], by[j / 2], product), j % 2 ? scales.y : scales.x, sums[n][j]);
        }
    }
}

// The same of any step, run by run: `begin` and `end` are the runs that count. For parts and ranks whose columns do not
// begin or end with a step.
template <int BITS, int SCALES, int ZERO, int TOKEN_TILES>
DEVICE void multiply_any_step(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x, u32 step,
                              u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
    const u32 g = lane / 4, t = lane % 4, n_padded = padded(n_tokens), n_steps = steps_of(w.n_runs * RUN);
    const u32 first = (w.first_run + step * STEP) % 8;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        if (first_token + 8 * n >= n_padded) break;
        const u32 token = min(first_token + 8 * n + g, n_tokens - 1);
        const float2 scales = ((const float2*)x.scales)[((u64)step * n_padded + first_token + 8 * n) / 2 + t];
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            const u32 run = step * STEP + i;
            if (run < begin || run >= end) continue;
            const Fragment a = fragment_of<BITS, SCALES>(stage, i, lane);
            const Factors factors = factors_of<SCALES>(scales_word<BITS, SCALES>(stage, i, false, g));
            const uint4 b = ((const uint4*)x.halves)[((u64)token * n_steps * STEP + run) * 4 + t];
            float product[4] = {0.0f, 0.0f, 0.0f, 0.0f}, second[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_f16(product, a.pairs[0][0], a.pairs[1][0], a.pairs[0][1], a.pairs[1][1], b.x, b.y);
            mma_f16(second, a.pairs[0][2], a.pairs[1][2], a.pairs[0][3], a.pairs[1][3], b.z, b.w);
            // Of the step's eight halves the two of this run, at lanes of 2i and 2i + 1; the rest is nothing.
            const u32 word = scales_word<BITS, SCALES>(stage, i, true, g);
            const bool is_mine = t / 2 == (u32)i % 2;
            const u32 total = is_mine ? x.totals[(u64)(run * 2 + t % 2) * n_padded + first_token + 8 * n + g] : 0;
            const u32 one = is_mine ? offset_of<SCALES>(word, t % 2, 0) : 0;
            const u32 other = is_mine ? offset_of<SCALES>(word, t % 2, 1) : 0;
            float offset[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_f16(offset, one, other, 0, 0, total, 0);
            uint2 super = {0, 0};
            if (SCALES >= SUPER) super = super_of<BITS, SCALES>(stage, first, i, g);
            for (int j = 0; j < 4; j++) {
                const int row = j / 2;
                const float d = SCALES >= SUPER ? half_of(super.x, row) : 1.0f;
                float by = SCALES == PLAIN ? -(float)ZERO * OF_SUMS : OF_SUMS;
                if (SCALES == SUPER) by = half_of(super.y, row) * -16.0f;
                if (SCALES == HALVES) by = d * (-(float)ZERO * OF_SUMS);
                const float both = SCALES == HALVES ? fmaf(second[j], factors.second[row], product[j] * factors.first[row])
                                                    : (product[j] + second[j]) * factors.first[row];
                sums[n][j] = fmaf(fmaf(offset[j], by, both * d), j % 2 ? scales.y : scales.x, sums[n][j]);
            }
        }
    }
}

template <int BITS, int SCALES, int ZERO>
struct OfIntegers : TensorSums {
    typedef Quantised Matrix;
    template <int WARPS>
    using Cursor = IntegerCursor<BITS, SCALES, WARPS>;
    static constexpr u32 LEN = Stage<BITS, SCALES>::LEN, RUNS = STEP;

    // Whether all steps are as `multiply_step` takes them.
    static DEVICE_MEMBER bool is_plain(const Quantised& w, u32 begin, u32 end) {
        return w.first_run % STEP == 0 && begin % STEP == 0 && (end % STEP == 0 || end == w.n_runs);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x, u32 step,
                                       u32 first_token, u32 n_tokens, u32 lane) {
        multiply_step<BITS, SCALES, ZERO, TOKEN_TILES>(sums, stage, x, step, first_token, n_tokens, lane);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_any(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x,
                                           u32 step, u32 begin, u32 end, u32 first_token, u32 n_tokens, u32 lane) {
        multiply_any_step<BITS, SCALES, ZERO, TOKEN_TILES>(sums, stage, w, x, step, begin, end, first_token, n_tokens, lane);
    }
};

// A scale or a min of HALVES and SUPER, a byte of their word.
template <int SCALES>
DEVICE int whole_of(u32 word, int byte) {
    return SCALES == HALVES ? (int)(signed char)(word >> 8 * byte) : (int)(u8)(word >> 8 * byte);
}

// Up to TOKENS tokens, one or four: bytes of weights with bytes of activations on tensor cores. Of a product's eight columns
// two are a token's upper and lower bytes; where there is one token, two are those of each run of a step, so that every lane
// has a run's sum to scale. Sums of a run, or of a step where a super-block has one scale for its runs, are integers.
template <int BITS, int SCALES, int ZERO, int TOKENS>
struct OfBytes {
    typedef Quantised Matrix;
    template <int WARPS>
    using Cursor = IntegerCursor<BITS, SCALES, WARPS>;
    static constexpr u32 LEN = Stage<BITS, SCALES>::LEN, RUNS = STEP;

    static DEVICE_MEMBER u32 token_of(u32 t, u32 i) { return t + 4 * i; }
    // Of one token a lane's sums are those of its runs.
    template <int TOKEN_TILES>
    static DEVICE_MEMBER void finish(float sums[TOKEN_TILES][4], const Several<Quantised>&, u32, u32, u32) {
        for (int row = 0; row < 2 && TOKENS == 1; row++) {
            for (int mask = 2; mask > 0; mask /= 2) sums[0][2 * row] += shuffle_xor(sums[0][2 * row], mask);
        }
    }
    static DEVICE_MEMBER bool is_plain(const Quantised& w, u32 begin, u32 end) {
        return OfIntegers<BITS, SCALES, ZERO>::is_plain(w, begin, end);
    }

    // Bytes of a step, four in a float, the sums of its half runs, and its scale.
    static DEVICE_MEMBER u32 made_floats(u32 columns) { return steps_of(columns) * (STEP_COLUMNS / 2 + 2 * STEP + 1); }
    static DEVICE_MEMBER Made made_at(const Made& like, float* place) {
        const u32 n_steps = steps_of(like.columns);
        Made made = {};
        made.bytes = (uint4*)place, made.byte_sums = (int2*)(place + n_steps * (STEP_COLUMNS / 2));
        made.byte_scales = place + n_steps * (STEP_COLUMNS / 2 + 2 * STEP);
        made.columns = like.columns, made.n_tokens = 1;
        return made;
    }

    // What runs gave the lane so far: of SUPER and HALVES integers, [row][upper, lower], else of each row in full.
    struct Sums {
        int whole[4], offset[2];
        float of_row[2];
    };

    // Scales what a run gave, `product` and of HALVES `second`; `halves`: the sums of its activations.
    static DEVICE_MEMBER void add_run(Sums& sums, const int product[4], const int second[4], int2 halves, const uint4* stage,
                                      int run, u32 g) {
        const u32 word = scales_word<BITS, SCALES>(stage, run, false, g);
        const u32 of_min = SCALES == MIN ? scales_word<BITS, SCALES>(stage, run, true, g) : 0;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            int* whole = sums.whole + 2 * row;
            if (SCALES >= SUPER) {
                const int by = whole_of<SCALES>(word, row), by_2 = whole_of<SCALES>(word, 2 + row);
                whole[0] += product[2 * row] * by, whole[1] += product[2 * row + 1] * by;
                if (SCALES == HALVES) whole[0] += second[2 * row] * by_2, whole[1] += second[2 * row + 1] * by_2;
                sums.offset[row] += SCALES == SUPER ? (halves.x + halves.y) * by_2 : halves.x * by + halves.y * by_2;
            } else {
                const int sum = product[2 * row] * 128 + product[2 * row + 1] - ZERO * (halves.x + halves.y);
                sums.of_row[row] = fmaf((float)sum, half_of(word, row), sums.of_row[row]);
                const float of_run = (float)(halves.x + halves.y);
                if (SCALES == MIN) sums.of_row[row] = fmaf(of_run, half_of(of_min, row), sums.of_row[row]);
            }
        }
    }

    // A super-block's integers to what they stand for.
    static DEVICE_MEMBER void end_super(Sums& sums, uint2 super) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            int* whole = sums.whole + 2 * row;
            const float sum = fmaf((float)whole[0], 128.0f, (float)whole[1]), d = half_of(super.x, row);
            const float by = SCALES == SUPER ? -half_of(super.y, row) : -(float)ZERO * d;
            sums.of_row[row] += fmaf(sum, d, (float)sums.offset[row] * by);
            whole[0] = whole[1] = sums.offset[row] = 0;
        }
    }

    // Adds the products of runs `begin` to `end` that are of the step. ARE_ALL: all of them are, and lie in one super-block.
    template <bool ARE_ALL>
    static DEVICE_MEMBER void multiply_runs(float sums[4], const uint4* stage, const Quantised& w, const Made& x, u32 step,
                                            u32 begin, u32 end, u32 n_tokens, u32 lane) {
        const u32 g = lane / 4, t = lane % 4, n_steps = steps_of(x.columns), first = (w.first_run + step * STEP) % 8;
        auto counts = [&](u32 run) { return ARE_ALL || (step * STEP + run >= begin && step * STEP + run < end); };
        Sums all = {};
        // Column g of the products, and what they give lane t. What is beyond the last token is not looked at.
        const u32 shown = TOKENS == 1 ? step : min(g / 2, n_tokens - 1) * n_steps + step;
        const u32 mine = TOKENS == 1 ? step : min(t, n_tokens - 1) * n_steps + step;
        const uint2* b = (const uint2*)(x.bytes + shown * 16 + g % 2 * 4 + t);
        const float scale = x.byte_scales[mine];
        uint2 of_lane = {0, 0}; // the run that column g is of
        if (TOKENS == 1 && counts(g / 2)) of_lane = b[g / 4 * 16 + g / 2 % 2];
        int product[4] = {0, 0, 0, 0}, second[4] = {0, 0, 0, 0};
#pragma unroll(ARE_ALL ? STEP : 1)
        for (int i = 0; i < STEP; i++) {
            if (!counts(i)) continue;
            const Bytes a = bytes_of<BITS, SCALES>(stage, i, lane);
            uint2 q = {0, 0};
            if (TOKENS > 1) {
                q = b[i / 2 * 16 + i % 2];
                for (int j = 0; j < 4; j++) product[j] = second[j] = 0;
            } else if (g / 2 == i) {
                q = of_lane;
            }
            if (SCALES == HALVES) {
                mma_bytes(product, a.of[0][0], a.of[1][0], q.x);
                mma_bytes(second, a.of[0][1], a.of[1][1], q.y);
            } else {
                mma_bytes(product, a.of[0][0], a.of[1][0], a.of[0][1], a.of[1][1], q.x, q.y);
            }
            if (TOKENS == 1) continue;
            add_run(all, product, second, x.byte_sums[mine * STEP + i], stage, i, g);
            // A super-block's sums end with the step, or with its last run.
            const bool ends = i == STEP - 1 || (!ARE_ALL && (first + i == 7 || step * STEP + i == end - 1));
            if (SCALES >= SUPER && ends) {
                end_super(all, super_of<BITS, SCALES>(stage, ARE_ALL ? 0 : first, ARE_ALL ? 0 : i, g));
            }
        }
        if (TOKENS == 1 && counts(t)) {
            add_run(all, product, second, x.byte_sums[mine * STEP + t], stage, t, g);
            if (SCALES >= SUPER) end_super(all, super_of<BITS, SCALES>(stage, ARE_ALL ? 0 : first, ARE_ALL ? 0 : t, g));
        }
        for (int row = 0; row < 2; row++) sums[2 * row] = fmaf(all.of_row[row], scale, sums[2 * row]);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x, u32 step,
                                       u32, u32 n_tokens, u32 lane) {
        multiply_runs<true>(sums[0], stage, w, x, step, 0, 0, n_tokens, lane);
    }

    template <int TOKEN_TILES>
    static DEVICE_MEMBER void multiply_any(float sums[TOKEN_TILES][4], const uint4* stage, const Quantised& w, const Made& x,
                                           u32 step, u32 begin, u32 end, u32, u32 n_tokens, u32 lane) {
        multiply_runs<false>(sums[0], stage, w, x, step, begin, end, n_tokens, lane);
    }
};

// The weights of a tile's run, as a lane multiplies them, in floats. [row of two][column: 4t.. then 16 + 4t..]
template <int BITS, int SCALES, int ZERO>
DEVICE void floats_of(const uint4* stage, int i, u32 first, u32 lane, float out[2][8]) {
    const u32 g = lane / 4;
    const Fragment f = fragment_of<BITS, SCALES>(stage, i, lane);
    const Factors factors = factors_of<SCALES>(scales_word<BITS, SCALES>(stage, i, false, g));
    uint2 super = {0, 0};
    if (SCALES >= SUPER) super = super_of<BITS, SCALES>(stage, first, i, g);
    for (int row = 0; row < 2; row++) {
        const u32 mins = scales_word<BITS, SCALES>(stage, i, true, g);
        const float min =
            SCALES == MIN ? half_of(mins, row) : -(half_of(super.y, row) * (float)(u8)(mins >> (16 + 8 * row)));
        for (int j = 0; j < 8; j++) {
            // Columns 0 to 3 of either half are the first of pair 0, the first of pair 1, the second of pair 0, ...
            const u32 word = f.pairs[row][j / 4 * 2 + j % 2];
            const float v = (float)((int)(word >> j % 4 / 2 * 16 & 0xffffu) - ZERO);
            float scale = SCALES == HALVES && j / 4 ? factors.second[row] : factors.first[row];
            if (SCALES >= SUPER) scale = half_of(super.x, row) * scale;
            out[row][j] = SCALES == MIN || SCALES == SUPER ? fmaf(v, scale, min) : v * scale;
        }
    }
}

// Rows of a matrix as bf16: out[row - first row][column]. Grid: steps of a row, tiles; a warp a step. Shared: a stage a warp.
template <int BITS, int SCALES, int ZERO>
DEVICE void to_bf16(const Quantised& w, u16* out, u32 first_tile) {
    depend();
    const u32 warp = threadIdx.x / 32, step = blockIdx.x * PACK_WARPS + warp, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (step * STEP >= w.n_runs) return;
    uint4* stage = (uint4*)shared_memory() + warp * Stage<BITS, SCALES>::LEN;
    IntegerCursor<BITS, SCALES, PACK_WARPS> cursor;
    cursor.enter(w, lane);
    cursor.begin(w, first_tile + blockIdx.y, step, lane);
    cursor.fetch(stage, w, lane);
    copy_commit();
    copy_wait<0>();
    warp_sync();
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        const u32 run = step * STEP + i;
        if (run >= w.n_runs) break;
        float v[2][8];
        floats_of<BITS, SCALES, ZERO>(stage, i, (w.first_run + step * STEP) % 8, lane, v);
        for (int row = 0; row < 2; row++) {
            for (int half = 0; half < 2; half++) {
                u16 x[4];
                for (int j = 0; j < 4; j++) x[j] = float_to_bf16(v[row][half * 4 + j]);
                const u64 at = ((u64)(blockIdx.y * TILE_ROWS + g + 8 * row) * w.n_runs + run) * RUN + half * 16 + 4 * t;
                *(uint2*)(out + at) = {pair(x[0], x[1]), pair(x[2], x[3])};
            }
        }
    }
}

// out[token] = table[tokens[token] - first_row], or zeros where this rank does not hold the row. A block a token, a warp a
// step. Shared: a stage a warp.
template <int BITS, int SCALES, int ZERO>
DEVICE void look_up(const Quantised& w, const u32* tokens, float* out, u32 first_row) {
    depend();
    const u32 row = tokens[blockIdx.x] - first_row; // what is below wraps to beyond
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4* stage = (uint4*)shared_memory() + warp * Stage<BITS, SCALES>::LEN;
    for (u32 step = blockIdx.y * PACK_WARPS + warp; step * STEP < w.n_runs; step += gridDim.y * PACK_WARPS) {
        warp_sync(); // the last step was read
        if (row < w.rows) {
            IntegerCursor<BITS, SCALES, PACK_WARPS> cursor;
            cursor.enter(w, lane);
            cursor.begin(w, row / TILE_ROWS, step, lane);
            cursor.fetch(stage, w, lane);
        }
        copy_commit();
        copy_wait<0>();
        warp_sync();
        if (g != (row < w.rows ? row % 8 : 0)) continue; // one lane of eight has the row, or writes the zeros
        for (int i = 0; i < STEP; i++) {
            const u32 run = step * STEP + i;
            if (run >= w.n_runs) break;
            float v[2][8];
            if (row < w.rows) floats_of<BITS, SCALES, ZERO>(stage, i, (w.first_run + step * STEP) % 8, lane, v);
            for (int j = 0; j < 8; j++) {
                // + 0: no -0 is left, whose sign would depend on which ranks add zeros to it.
                const float value = row >= w.rows ? 0.0f : (row % TILE_ROWS < 8 ? v[0][j] : v[1][j]) + 0.0f;
                out[((u64)blockIdx.x * w.n_runs + run) * RUN + j / 4 * 16 + 4 * t + j % 4] = value;
            }
        }
    }
}

#define QUANTISED_KERNELS(FORMAT, BITS, SCALES, ZERO)                                                                  \
    KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)                                                                           \
    linear_##FORMAT##_1(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens, Normed normed) {               \
        stream<OfBytes<BITS, SCALES, ZERO, 1>, FEW_WARPS, 1, true>(all, x, parts, n_tokens, normed);                   \
    }                                                                                                                  \
    KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)                                                                           \
    linear_##FORMAT##_4(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                              \
        stream<OfBytes<BITS, SCALES, ZERO, 4>, FEW_WARPS, 1>(all, x, parts, n_tokens);                                 \
    }                                                                                                                  \
    KERNEL_AT_LEAST(FEW_THREADS, FEW_BLOCKS)                                                                           \
    linear_##FORMAT##_8(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                              \
        stream<OfIntegers<BITS, SCALES, ZERO>, FEW_WARPS, 1>(all, x, parts, n_tokens);                                 \
    }                                                                                                                  \
    KERNEL_AT_LEAST(MANY_THREADS, MANY_BLOCKS)                                                                         \
    linear_##FORMAT##_32(Several<Quantised> all, Made x, const u32* parts, u32 n_tokens) {                             \
        stream<OfIntegers<BITS, SCALES, ZERO>, MANY_WARPS, 4>(all, x, parts, n_tokens);                                \
    }                                                                                                                  \
    KERNEL(PACK_THREADS)                                                                                               \
    to_bf16_##FORMAT(Quantised w, u16* out, u32 first_tile) {                                                          \
        to_bf16<BITS, SCALES, ZERO>(w, out, first_tile);                                                               \
    }                                                                                                                  \
    KERNEL(PACK_THREADS)                                                                                               \
    embed_##FORMAT(Quantised w, const u32* tokens, float* out, u32 first_row) {                                        \
        look_up<BITS, SCALES, ZERO>(w, tokens, out, first_row);                                                        \
    }

#ifdef HAS_Q4_0
QUANTISED_KERNELS(q4_0, 4, PLAIN, 8)
#endif
#ifdef HAS_Q4_1
QUANTISED_KERNELS(q4_1, 4, MIN, 0)
#endif
#ifdef HAS_Q5_0
QUANTISED_KERNELS(q5_0, 5, PLAIN, 16)
#endif
#ifdef HAS_Q5_1
QUANTISED_KERNELS(q5_1, 5, MIN, 0)
#endif
#ifdef HAS_Q8_0
QUANTISED_KERNELS(q8_0, 8, PLAIN, 128)
#endif
#ifdef HAS_Q4_K
QUANTISED_KERNELS(q4_k, 4, SUPER, 0)
#endif
#ifdef HAS_Q5_K
QUANTISED_KERNELS(q5_k, 5, SUPER, 0)
#endif
#ifdef HAS_Q6_K
QUANTISED_KERNELS(q6_k, 6, HALVES, 32)
#endif
