//! Which instruction set the kernels use, chosen once at run time.

/// Instruction sets with kernels of their own. All give the same bits. Only [`Isa::detect`] and
/// [`Isa::available`] make those that not every machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// As [`Isa::Avx512Vnni`], with AMX's int8 and bf16 tiles.
    #[non_exhaustive]
    Avx512Amx,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    #[non_exhaustive]
    Avx512Vnni,
    /// AVX2, FMA and F16C, as the compiler vectorises the portable code.
    #[non_exhaustive]
    Avx2,
    /// Whatever the machine is.
    Portable,
}

impl Isa {
    /// The best one this machine has.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                return if tiles_allowed() { Self::Avx512Amx } else { Self::Avx512Vnni };
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// All that this machine can run, best first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        match Self::detect() {
            Self::Avx512Amx => vec![Self::Avx512Amx, Self::Avx512Vnni, Self::Avx2, Self::Portable],
            Self::Avx512Vnni => vec![Self::Avx512Vnni, Self::Avx2, Self::Portable],
            Self::Avx2 => vec![Self::Avx2, Self::Portable],
            Self::Portable => vec![Self::Portable],
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Amx => "avx512-amx",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Whether the CPU has AMX tiles and the system lets this process use them; asking is enough to get
/// the leave for all of its threads.
#[cfg(target_arch = "x86_64")]
fn tiles_allowed() -> bool {
    static ALLOWED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ALLOWED.get_or_init(|| {
        // Leaf 7 of cpuid: EDX bits 22 (amx-bf16), 24 (amx-tile) and 25 (amx-int8).
        const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        let has = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("gfni")
            && std::arch::x86_64::__cpuid_count(7, 0).edx & NEEDED == NEEDED;
        has && request_tiles()
    })
}

/// Linux gives the 8 KB of tile state to those who ask.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    // SAFETY: this call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn request_tiles() -> bool {
    false
}

/// Compiles one body of `#[inline(always)]` code for every instruction set and calls the right one;
/// `<N>` names a `const N: usize` of the body, if it has one.
macro_rules! dispatch {
    ($isa:expr, fn $(<$n:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)? => $body:expr) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $out)? { $body }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2 $(<const $n: usize>)? ($($arg: $ty),*) $(-> $out)? { $body }
        fn portable $(<const $n: usize>)? ($($arg: $ty),*) $(-> $out)? { $body }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa` values other than Portable come from `Isa::detect` or
            // `Isa::available`, which checked the CPU's features.
            $crate::isa::Isa::Avx512Amx | $crate::isa::Isa::Avx512Vnni => unsafe {
                avx512 $(::<$n>)? ($($arg),*)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::isa::Isa::Avx2 => unsafe { avx2 $(::<$n>)? ($($arg),*) },
            _ => portable $(::<$n>)? ($($arg),*),
        }
    }};
}
pub(crate) use dispatch;
