// The vocabulary of `device.cuh` on a processor: a block's threads are fibers of one thread of the system, so that every
// kernel runs in tests, on machines without a card. Slow, and exact about what a card leaves open: each launch runs the
// threads of a block in another order, so that a missing block_sync shows; shared memory starts as NaNs, and copies to it
// come only when they are waited for; a kernel that reads or writes beyond its shared memory, or waits where others do not
// come, ends the process with a sentence.
//
// It shows that a kernel computes the right thing. It shows nothing about speed, nor about what a card's memory model
// permits beyond block_sync and whole-warp exchanges.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim3 { u32 x, y, z; };

#define KERNEL(threads) extern "C" void
#define KERNEL_AT_LEAST(threads, blocks) extern "C" void
#define DEVICE static inline
#define DEVICE_MEMBER inline

namespace emulator {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t GUARD_BYTES = 64;
constexpr u8 POISON = 0xff; // floats of it are NaN

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulated kernel: %s\n", what);
    abort();
}

// What the lanes of a warp show each other. Two places, used in turn, so that one meeting a turn is enough.
struct Warp {
    u32 words[2][32][6];
    u32 n_arrived = 0, n_meetings = 0;
};

// Sixteen bytes on their way to shared memory.
struct Copy {
    uint4* to;
    const uint4* from;
    u32 group;
};

struct Fiber {
    jmp_buf at;
    std::unique_ptr<u8[]> stack;
    Dim3 index;
    u32 number = 0, n_exchanges = 0, n_groups = 0;
    std::vector<Copy> copies;
    bool is_done = false;
    Fiber* next = nullptr;
};

struct Block {
    std::vector<Fiber>* fibers;
    std::vector<Warp> warps;
    std::vector<u8> shared;
    Dim3 index, size, grid;
    u32 n_live = 0, n_arrived = 0, n_meetings = 0, n_idle_turns = 0;
    Fiber* running = nullptr;
    jmp_buf back;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
};

inline thread_local Block* block = nullptr;

// Lets the next fiber go on. A turn of all in which nobody gets past a meeting is a deadlock.
inline void yield() {
    if (++block->n_idle_turns > 4 * block->fibers->size() + 64) {
        fail("a thread waits for others that do not come");
    }
    Fiber* from = block->running;
    Fiber* to = from->next;
    while (to->is_done) to = to->next;
    if (to == from) return;
    block->running = to;
    if (_setjmp(from->at) == 0) _longjmp(to->at, 1);
}

inline void meet(u32& n_arrived, u32& n_meetings, u32 n_expected) {
    const u32 meeting = n_meetings;
    if (++n_arrived == n_expected) {
        n_arrived = 0;
        n_meetings += 1;
        block->n_idle_turns = 0;
        return;
    }
    while (n_meetings == meeting) yield();
}

inline Warp& warp() { return block->warps[block->running->number / 32]; }
inline u32 lane() { return block->running->number % 32; }

// Shows this lane's words to its warp, and gives those of all lanes, until the next but one exchange.
inline u32 (*exchange(const u32* words, u32 n))[6] {
    Warp& mine = warp();
    u32(*place)[6] = mine.words[block->running->n_exchanges++ % 2];
    for (u32 i = 0; i < n; i++) place[lane()][i] = words[i];
    meet(mine.n_arrived, mine.n_meetings, 32);
    return place;
}

// The first and last thing that a fiber does.
inline void live() {
    for (;;) {
        block->body(block->arguments);
        Fiber* self = block->running;
        self->is_done = true;
        block->n_idle_turns = 0;
        if (--block->n_live == 0) {
            if (_setjmp(self->at) == 0) _longjmp(block->back, 1);
        } else {
            Fiber* to = self->next;
            while (to->is_done) to = to->next;
            block->running = to;
            if (_setjmp(self->at) == 0) _longjmp(to->at, 1);
        }
    }
}

// Fibers that stand at the beginning of `live`. A thread of the system makes those of each size of block once.
inline std::vector<Fiber>& fibers_of(u32 n) {
    static thread_local std::map<u32, std::vector<Fiber>> made;
    std::vector<Fiber>& fibers = made[n];
    if (!fibers.empty()) return fibers;
    if (n == 0 || n > 1024 || n % 32 != 0) fail("a block is not of whole warps, at most 32");
    fibers.resize(n);
    for (Fiber& fiber : fibers) {
        fiber.number = &fiber - fibers.data();
        fiber.stack.reset(new u8[STACK_BYTES]);
        ucontext_t first;
        getcontext(&first);
        first.uc_stack.ss_sp = fiber.stack.get();
        first.uc_stack.ss_size = STACK_BYTES;
        first.uc_link = nullptr;
        makecontext(&first, +[] {
            Fiber* self = block->running;
            if (_setjmp(self->at) == 0) _longjmp(block->back, 1);
            live();
        }, 0);
        block->running = &fiber;
        if (_setjmp(block->back) == 0) setcontext(&first);
    }
    return fibers;
}

// The order of turns: every `stride`-th thread, which visits all if it shares no factor with their number.
inline void link(std::vector<Fiber>& fibers, Dim3 size, u32 seed) {
    const u32 n = fibers.size();
    u32 stride = 1 + 2 * (seed % 61);
    while (std::gcd(stride, n) != 1) stride += 2;
    for (u32 i = 0; i < n; i++) {
        fibers[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        fibers[i].next = &fibers[(i + stride) % n];
    }
}

struct Launch {
    Dim3 grid, size;
    u32 shared_bytes, seed, n_arguments;
    const u32* argument_bytes;
    void* const* arguments;
};

inline void run(const Launch& launch, void (*body)(void*), void* arguments) {
    Block made;
    block = &made;
    std::vector<Fiber>& fibers = fibers_of(launch.size.x * launch.size.y * launch.size.z);
    link(fibers, launch.size, launch.seed);
    made.fibers = &fibers;
    made.warps.resize(fibers.size() / 32);
    made.size = launch.size;
    made.grid = launch.grid;
    made.body = body;
    made.arguments = arguments;
    made.shared.resize(launch.shared_bytes + 2 * GUARD_BYTES);
    const u64 n_blocks = (u64)launch.grid.x * launch.grid.y * launch.grid.z;
    for (u64 i = 0; i < n_blocks; i++) {
        // Blocks too come in another order.
        const u64 at = launch.seed % 2 ? n_blocks - 1 - i : i;
        made.index = {(u32)(at % launch.grid.x), (u32)(at / launch.grid.x % launch.grid.y),
                      (u32)(at / launch.grid.x / launch.grid.y)};
        memset(made.shared.data(), POISON, made.shared.size());
        for (Warp& warp : made.warps) warp.n_arrived = 0;
        for (Fiber& fiber : fibers) {
            fiber.is_done = false;
            fiber.n_exchanges = 0;
            fiber.n_groups = 0;
            fiber.copies.clear();
        }
        made.n_live = fibers.size();
        made.n_arrived = made.n_meetings = made.n_idle_turns = 0;
        made.running = &fibers[launch.seed % fibers.size()];
        if (_setjmp(made.back) == 0) _longjmp(made.running->at, 1);
        const u8* guard = made.shared.data();
        for (size_t g = 0; g < GUARD_BYTES; g++) {
            if (guard[g] != POISON || guard[made.shared.size() - 1 - g] != POISON) {
                fail("it wrote beyond its shared memory");
            }
        }
    }
    block = nullptr;
}

// Calls a kernel with arguments that come as pointers, once it is sure that they are as many and as large.
template <class... A>
inline int call(void (*kernel)(A...), const Launch* launch) {
    const u32 sizes[] = {(u32)sizeof(A)...};
    if (launch->n_arguments != sizeof...(A)) return 1;
    for (u32 i = 0; i < sizeof...(A); i++) {
        if (launch->argument_bytes[i] != sizes[i]) return 2;
    }
    std::tuple<void (*)(A...), std::tuple<A...>> bound;
    std::get<0>(bound) = kernel;
    [&]<size_t... I>(std::index_sequence<I...>) {
        ((std::get<I>(std::get<1>(bound)) = *(A*)launch->arguments[I]), ...);
    }(std::index_sequence_for<A...>());
    run(*launch, +[](void* p) {
        auto& [kernel, arguments] = *(decltype(bound)*)p;
        std::apply(kernel, arguments);
    }, &bound);
    return 0;
}

} // namespace emulator

#define threadIdx (emulator::block->running->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

DEVICE void* shared_memory() { return emulator::block->shared.data() + emulator::GUARD_BYTES; }

DEVICE void block_sync() {
    using emulator::block;
    if (block->n_live != block->fibers->size()) emulator::fail("a thread has left before a block_sync");
    emulator::meet(block->n_arrived, block->n_meetings, block->fibers->size());
}

DEVICE void warp_sync() {
    emulator::Warp& mine = emulator::warp();
    emulator::meet(mine.n_arrived, mine.n_meetings, 32);
}

DEVICE void copy_begin(uint4* to, const uint4* from) {
    emulator::Fiber* self = emulator::block->running;
    self->copies.push_back({to, from, self->n_groups});
}
DEVICE void copy_commit() { emulator::block->running->n_groups += 1; }
template <int N>
DEVICE void copy_wait() {
    emulator::Fiber* self = emulator::block->running;
    std::erase_if(self->copies, [&](const emulator::Copy& copy) {
        if (copy.group + N >= self->n_groups) return false;
        *copy.to = *copy.from;
        return true;
    });
}

// Kernels run one after the other.
DEVICE void depend() {}

DEVICE void prefetch(const void*) {}

DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }

DEVICE u32 pick_bytes(u32 x, u32 which) {
    u32 picked = 0;
    for (int i = 0; i < 4; i++) {
        const u32 digit = which >> 4 * i & 15;
        picked |= (digit < 4 ? x >> 8 * digit & 255 : 0) << 8 * i;
    }
    return picked;
}

DEVICE u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }

DEVICE u32 shuffle_xor(u32 x, int mask) { return emulator::exchange(&x, 1)[emulator::lane() ^ mask][0]; }
DEVICE float shuffle_xor(float x, int mask) { return float_of(shuffle_xor(bits_of(x), mask)); }

DEVICE bool any_of_warp(bool is_so) {
    const u32 word = is_so;
    u32(*all)[6] = emulator::exchange(&word, 1);
    bool any = false;
    for (u32 i = 0; i < 32; i++) any |= all[i][0] != 0;
    return any;
}

DEVICE float power_of_two(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

DEVICE u32 transpose(u32 two) {
    u32(*all)[6] = emulator::exchange(&two, 1);
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4, shift = g % 2 * 16;
    const u32 low = all[2 * t * 4 + g / 2][0] >> shift, high = all[(2 * t + 1) * 4 + g / 2][0] >> shift;
    return (low & 0xffff) | high << 16;
}

DEVICE float half_to_float(u16 bits) {
    const u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    const float magnitude =
        exponent == 0 ? fraction * 0x1p-24f : float_of((exponent + 112) << 23 | fraction << 13);
    return sign ? -magnitude : magnitude;
}

DEVICE u16 float_to_half(float x) {
    const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000;
    const float magnitude = fabsf(x);
    if (magnitude != magnitude) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // Adding a number of which f16's last place is the last rounds to the nearest even.
    const int exponent = magnitude < 0x1p-14f ? -14 : (int)(bits_of(magnitude) >> 23) - 127;
    const float step = ldexpf(1.0f, exponent - 10);
    const u32 n = (u32)nearbyintf(magnitude / step); // 0 to 2048
    return sign | (u16)(((u32)(exponent + 14) << 10) + n);
}
DEVICE u32 float_to_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }

DEVICE uint2 halves_of_e4m3(u32 four) {
    u32 halves[4];
    for (int i = 0; i < 4; i++) {
        const u32 code = four >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
        const float magnitude = exponent == 0 ? mantissa * 0x1p-9f : ldexpf(8 + mantissa, (int)exponent - 10);
        halves[i] = float_to_half(code & 128 ? -magnitude : magnitude);
    }
    return {halves[0] | halves[1] << 16, halves[2] | halves[3] << 16};
}

namespace emulator {

// The product that the lanes of a warp make together, by what each shows: a0 to a3, b0, b1.
template <class Product>
inline void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Product product) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    u32(*all)[6] = exchange(mine, 6);
    const u32 g = lane() / 4, t = lane() % 4;
    for (u32 i = 0; i < 4; i++) {
        const u32 row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = c[i];
        for (u32 k = 0; k < 16; k++) {
            const u32 half = k / 8, within = k % 8;
            const u32 a = all[row % 8 * 4 + within / 2][row / 8 + 2 * half];
            const u32 b = all[column * 4 + within / 2][4 + half];
            sum = product(sum, a, b, within % 2);
        }
        c[i] = sum;
    }
}

} // namespace emulator

DEVICE void mma_bf16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::mma(c, a0, a1, a2, a3, b0, b1, [](float sum, u32 a, u32 b, u32 i) {
        return sum + float_of(a >> 16 * i << 16) * float_of(b >> 16 * i << 16);
    });
}

DEVICE void mma_f16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::mma(c, a0, a1, a2, a3, b0, b1, [](float sum, u32 a, u32 b, u32 i) {
        return sum + half_to_float(a >> 16 * i) * half_to_float(b >> 16 * i);
    });
}

DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    u32(*all)[6] = emulator::exchange(mine, 6);
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (u32 i = 0; i < 4; i++) {
        const u32 column = 2 * t + i % 2;
        for (u32 k = 0; k < 32; k++) {
            const u32 half = k / 16, of_lane = k % 16 / 4, shift = k % 4 * 8;
            const u32 a = all[g * 4 + of_lane][i / 2 + 2 * half] >> shift, b = all[column * 4 + of_lane][4 + half] >> shift;
            c[i] += (int)(u8)a * (signed char)b;
        }
    }
}
DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 b0) { mma_bytes(c, a0, a1, 0, 0, b0, 0); }
