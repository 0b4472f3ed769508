// The vocabulary of the kernels on a card. `emulator.hpp` says the same words on a processor, so that every kernel runs
// in tests; a kernel uses these and plain C++, and nothing else of CUDA.
//
// NVRTC finds no header, not even stdint.h: this file is put in front of the kernels as text. It is compiled with
// --fmad=false: where a multiplication is to be fused with an addition, the code says fmaf.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// Of so many threads a block, at least so many blocks to a multiprocessor.
#define KERNEL_AT_LEAST(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

extern __shared__ uint4 dynamic_shared[];

// The memory that the threads of a block share; its size is the launch's.
DEVICE void* shared_memory() { return dynamic_shared; }
DEVICE void block_sync() { __syncthreads(); }

// Lets the kernel that comes after this one begin, up to its own `depend`; then waits until all that was asked before this
// kernel is done. To be called by every thread of every kernel, before it touches what another kernel writes: weights may
// be read before. (PTX ISA, "griddepcontrol"; launches say so, `card.rs`.)
DEVICE void depend() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void warp_sync() { __syncwarp(); }

// Begins to copy sixteen bytes that nobody reads again soon to shared memory. Copies begun since the last `copy_commit` are a
// group; `copy_wait<N>` waits until all of this thread's groups but the last N are there.
DEVICE void copy_begin(uint4* to, const uint4* from) {
    const u32 place = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Asks for what lies there, so that it is near when it is read: it may be read before `depend`, whoever writes it.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Four bytes of x, by the digits of `which`, the lowest first; 4 is a zero.
DEVICE u32 pick_bytes(u32 x, u32 which) { return __byte_perm(x, 0, which); }

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of a warp take part.
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Whether it is so in any lane of the warp; all 32 take part.
DEVICE bool any_of_warp(bool is_so) { return __any_sync(0xffffffffu, is_so); }

// 2^x to about 22 bits; 0 where that is below the normal numbers, and of minus infinity.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of an [8, 8] matrix of 16 bits, of which lane 4g + t holds columns 2t and 2t + 1 of row g, the transposed. (PTX ISA,
// "movmatrix".)
DEVICE u32 transpose(u32 two) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(two));
    return transposed;
}

DEVICE float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// To the nearest, ties to even; what is too large becomes infinite.
DEVICE u16 float_to_half(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Four numbers of e4m3 (a sign, four bits of exponent, three of mantissa) as four of f16, exactly: the lower two, and the
// upper two. Not of 0x7f and 0xff, which are no numbers. (PTX ISA, "cvt"; of sm_89 and newer.)
DEVICE uint2 halves_of_e4m3(u32 four) {
    uint2 halves;
#if __CUDA_ARCH__ >= 890
    asm("{\n\t"
        ".reg .b16 low, high;\n\t"
        "mov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n\t"
        "}"
        : "=r"(halves.x), "=r"(halves.y)
        : "r"(four));
#else
    // The bits, moved, are those of 2^-8 times the number.
    const u32 low = __byte_perm(four, 0, 0x1404), high = __byte_perm(four, 0, 0x3424);
    const u32 of_low = (low >> 1 & 0x3f803f80u) | (low & 0x80008000u);
    const u32 of_high = (high >> 1 & 0x3f803f80u) | (high & 0x80008000u);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves.x) : "r"(of_low), "r"(0x5c005c00u)); // 2^8
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves.y) : "r"(of_high), "r"(0x5c005c00u));
#endif
    return halves;
}

// Two at once, the first lowest. (PTX ISA, "cvt".)
DEVICE u32 float_to_halves(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// c += a * b, with a [16, 16] and b [16, 8] of 16-bit floats, two in a register, the lower column lowest. Lane 4g + t
// holds of a row g in a0 (columns 2t, 2t + 1) and a2 (8 + 2t..), row g + 8 in a1 and a3; of b column g in b0 (rows 2t..)
// and b1 (rows 8 + 2t..); of c rows g (c[0], c[1]) and g + 8 (c[2], c[3]) in columns 2t and 2t + 1. (PTX ISA, "Matrix
// Fragments for mma.m16n8k16 with floating point type".)
DEVICE void mma_bf16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void mma_f16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += a * b, with a [16, 32] of bytes without a sign and b [32, 8] of bytes that have one, four in a register, the lowest
// column lowest. Lane 4g + t holds of a row g in a0 (columns 4t to 4t + 3) and a2 (16 + 4t..), row g + 8 in a1 and a3; of b
// column g in b0 (rows 4t..) and b1 (rows 16 + 4t..); c as above. (PTX ISA, "Matrix Fragments for mma.m16n8k32".)
DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of the first sixteen columns of a and rows of b.
DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
