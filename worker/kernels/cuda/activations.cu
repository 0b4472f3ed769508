// Activations as products take them, and the kernels that make them: from plain rows, from a norm, from the gate. (Those
// of attention: `merge_attended` of attention.cu.)
//
// For weights in integers: f16 numbers with a scale for each step of 128 columns, a power of two that brings the step's
// largest to 2^14 and above; of few tokens integers of 15 bits, two bytes each, with a scale that makes the step's largest
// LARGEST. For weights of bf16: two bf16 numbers each, the second holding what the first lost.

#define RUN 32
#define STEP 4 // runs that share a scale
#define STEP_COLUMNS (STEP * RUN) // four for each lane of a warp
// The largest integer whose upper byte, rounded, has 127 at most.
#define LARGEST 16319.0f
#define MAKE_THREADS 128
#define NORM_THREADS 512
// Stretches of NORM_THREADS * 4 columns whose numbers a thread of `rms_norm` keeps.
#define NORM_KEPT 4

// Where they go. Null is what nobody reads.
struct Made {
    // [token][run, padded to whole steps][t of 0 to 3] four words, the pairs of columns (4t, 4t + 2), (4t + 1, 4t + 3) and
    // the same of 16 + 4t..: `quantised.cu` takes weights apart in this order.
    uint2* halves;
    float* scales; // [step][padded tokens], 2^24 times the scale: `quantised.cu` takes integers u for u * 2^-24
    // [half a run][padded tokens]: 2^-4 times the sum of its f16 numbers, as two f16 numbers whose sum it is to 22 bits.
    u32* totals;
    u16 *first, *second; // [token][columns]
    float* plain;        // [token][columns]
    // [token][pair of runs, padded to whole steps][upper, lower][t of 0 to 3]: bytes of columns 4t to 4t + 3 and 16 + 4t.. of
    // one run, then of the other; an integer is 128 times its upper byte plus its lower one.
    uint4* bytes;
    float* byte_scales; // [token][step]
    int2* byte_sums;    // [token][run]: of the integers of either half
    u32 columns, n_tokens;
};

// Tokens of planes by run: a whole number of tensor tiles. What is beyond the tokens is unknown.
DEVICE u32 padded(u32 n_tokens) { return (n_tokens + 7) / 8 * 8; }

DEVICE u32 steps_of(u32 columns) { return (columns + STEP_COLUMNS - 1) / STEP_COLUMNS; }

// Four columns of a step, the `lane`-th four; four neighbouring lanes are here. `exponent`: of the step's largest, e + 127
// where that is from 2^e to 2^(e + 1). `is_finite`: all of it.
DEVICE void make_halves(const Made& to, u32 token, u32 step, u32 lane, float4 v, u32 exponent, bool is_finite, bool is_there) {
    // A step below 2^-102 is taken as zeros; what holds a number that is none has a scale that is none.
    const bool is_zero = !is_finite || exponent < 25;
    const float inverse = is_zero ? 0.0f : float_of((127 + 14 + 127 - exponent) << 23);
    const float of_lane[4] = {v.x, v.y, v.z, v.w};
    u16 half[4];
    float total = 0.0f;
    for (int i = 0; i < 4; i++) {
        half[i] = is_finite ? float_to_half(of_lane[i] * inverse) : 0;
        total += half_to_float(half[i]);
    }
    for (int mask = 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    if (!is_there) return;
    const u32 run = step * STEP + lane / 8, four = lane % 8, n_padded = padded(to.n_tokens);
    const u64 of_run = ((u64)token * steps_of(to.columns) * STEP + run) * 4;
    to.halves[(of_run + four % 4) * 2 + four / 4] = {pair(half[0], half[2]), pair(half[1], half[3])};
    if (lane % 4 == 0 && to.totals) {
        total *= 0.0625f;
        const u16 high = float_to_half(total);
        to.totals[(u64)(run * 2 + four / 4) * n_padded + token] = pair(high, float_to_half(total - half_to_float(high)));
    }
    // 2^24 * 2^(exponent - 127 - 14), in two factors: the product may be beyond a float's range, and is infinite then.
    const float scale = is_zero ? 0.0f : float_of(exponent << 23) * 1024.0f;
    if (lane == 0) to.scales[(u64)step * n_padded + token] = is_finite ? scale : float_of(0x7fc00000u);
}

// Four columns of a step, the `lane`-th four; all lanes of a warp are here. `largest`: of the step's magnitudes.
DEVICE void make_bytes(const Made& to, u32 token, u32 step, u32 lane, float4 v, float largest, bool is_finite, bool is_there) {
    const float inverse = LARGEST / largest;
    const bool is_zero = !is_finite || !(inverse <= 3.402823466e38f); // what is that small is taken as zeros
    const float of_lane[4] = {v.x, v.y, v.z, v.w};
    u32 upper = 0, lower = 0, sum = 0;
    for (int i = 0; i < 4; i++) {
        const float rounded = is_zero ? 0.0f : (of_lane[i] * inverse + 12582912.0f) - 12582912.0f;
        const int whole = (int)rounded, high = (whole + 64) >> 7;
        upper |= (u32)(high & 255) << 8 * i;
        lower |= (u32)((whole - high * 128) & 255) << 8 * i;
        sum += (u32)whole;
    }
    for (int mask = 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (!is_there) return;
    const u32 of_step = token * steps_of(to.columns) + step, run = lane / 8, four = lane % 8;
    u32* words = (u32*)(to.bytes + (u64)of_step * 16 + run / 2 * 8 + four % 4) + run % 2 * 2 + four / 4;
    words[0] = upper, words[4 * 4] = lower;
    if (lane % 4 == 0) ((int*)(to.byte_sums + (u64)of_step * STEP))[lane / 4] = (int)sum;
    const float scale = is_zero ? 0.0f : largest / LARGEST;
    if (lane == 0) to.byte_scales[of_step] = is_finite ? scale : float_of(0x7fc00000u);
}

// As rows of f32 and of bf16.
DEVICE void make_floats(const Made& to, u64 at, float4 v) {
    if (to.plain) *(float4*)(to.plain + at) = v;
    if (!to.first) return;
    const float of_lane[4] = {v.x, v.y, v.z, v.w};
    u16 first[4], second[4];
    for (int i = 0; i < 4; i++) {
        first[i] = float_to_bf16(of_lane[i]);
        second[i] = float_to_bf16(of_lane[i] - bf16_to_float(first[i]));
    }
    *(uint2*)(to.first + at) = {pair(first[0], first[1]), pair(first[2], first[3])};
    if (to.second) *(uint2*)(to.second + at) = {pair(second[0], second[1]), pair(second[2], second[3])};
}

// Four columns of a step, the `lane`-th four; all lanes of a warp are here, and hold the step.
DEVICE void make(const Made& to, u32 token, u32 step, u32 lane, float4 v, bool is_there) {
    if (is_there) make_floats(to, (u64)token * to.columns + step * STEP_COLUMNS + lane * 4, v);
    if (!to.halves && !to.bytes) return;
    const float of_lane[4] = {v.x, v.y, v.z, v.w};
    float largest = 0.0f, poison = 0.0f;
    for (int i = 0; i < 4; i++) {
        largest = fmaxf(largest, fabsf(of_lane[i]));
        poison = fmaf(of_lane[i], 0.0f, poison);
    }
    largest = warp_max(largest);
    poison = warp_sum(poison);
    // What is beyond the columns of the last step is zeros.
    const bool is_finite = poison == 0.0f, is_step = step < steps_of(to.columns);
    if (to.halves) make_halves(to, token, step, lane, v, bits_of(largest) >> 23, is_finite, is_step);
    if (to.bytes) make_bytes(to, token, step, lane, v, largest, is_finite, is_step);
}

// Of rows of `in`, [..][columns]: those that `rows` names, or each, where it is null. Grid: 512 columns, tokens.
KERNEL(MAKE_THREADS)
make_plain(const float* in, const u32* rows, Made to) {
    depend();
    const u32 at = blockIdx.x * MAKE_THREADS + threadIdx.x, token = blockIdx.y;
    const u64 row = rows ? rows[token] : token;
    const bool is_there = at < to.columns / 4;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (is_there) v = ((const float4*)(in + row * to.columns))[at];
    make(to, token, at / 32, at % 32, v, is_there);
}

// residual += delta where there is a delta (it may be null); then residual / rms(residual) * weight. A block a row.
KERNEL(NORM_THREADS)
rms_norm(float* residual, const float* delta, const float* weight, Made to, float eps) {
    float* place = (float*)shared_memory();
    const u32 token = blockIdx.x, n_fours = to.columns / 4;
    for (u32 at = threadIdx.x * 8; at < n_fours; at += NORM_THREADS * 8) prefetch((const float4*)weight + at);
    depend();
    float4* row = (float4*)(residual + (u64)token * to.columns);
    const float4* more = (const float4*)(delta + (u64)token * to.columns);
    float4 kept[NORM_KEPT];
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        const u32 at = i * NORM_THREADS + threadIdx.x;
        kept[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (at >= n_fours) continue;
        kept[i] = row[at];
        if (delta) {
            const float4 d = more[at];
            kept[i] = {kept[i].x + d.x, kept[i].y + d.y, kept[i].z + d.z, kept[i].w + d.w};
            row[at] = kept[i];
        }
    }
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        const float4 v = kept[i];
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
    }
    for (u32 at = NORM_KEPT * NORM_THREADS + threadIdx.x; at < n_fours; at += NORM_THREADS) {
        float4 v = row[at];
        if (delta) {
            const float4 d = more[at];
            v = {v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w};
            row[at] = v;
        }
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
    }
    const float mean = block_sum(square, place) / (float)to.columns;
    const float scale = 1.0f / sqrtf(mean + eps);
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        const u32 at = i * NORM_THREADS + threadIdx.x;
        if (i * NORM_THREADS >= n_fours) break;
        float4 v = kept[i];
        if (at < n_fours) {
            const float4 w = ((const float4*)weight)[at];
            v = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
        }
        make(to, token, at / 32, at % 32, v, at < n_fours);
    }
    for (u32 first = NORM_KEPT * NORM_THREADS; first < n_fours; first += NORM_THREADS) {
        const u32 at = first + threadIdx.x;
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
        if (at < n_fours) {
            const float4 x = row[at], w = ((const float4*)weight)[at];
            v = {x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w};
        }
        make(to, token, at / 32, at % 32, v, at < n_fours);
    }
}

// gate / (1 + e^-gate) * up, both [tokens][columns]. Grid: 512 columns, tokens.
KERNEL(MAKE_THREADS)
silu_gate(const float* gate, const float* up, Made to) {
    depend();
    const u32 at = blockIdx.x * MAKE_THREADS + threadIdx.x, token = blockIdx.y;
    const bool is_there = at < to.columns / 4;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (is_there) {
        const u64 from = ((u64)token * to.columns) / 4 + at;
        const float4 g = ((const float4*)gate)[from], u = ((const float4*)up)[from];
        v = {g.x / (1.0f + exponential(-g.x)) * u.x, g.y / (1.0f + exponential(-g.y)) * u.y,
             g.z / (1.0f + exponential(-g.z)) * u.z, g.w / (1.0f + exponential(-g.w)) * u.w};
    }
    make(to, token, at / 32, at % 32, v, is_there);
}
