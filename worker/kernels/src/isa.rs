//! Which instruction set the kernels use, chosen once at run time.

/// Instruction sets with kernels of their own. All give the same bits. Only [`Isa::detect`] and
/// [`Isa::available`] make those that not every machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
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
                return Self::Avx512Vnni;
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
            Self::Avx512Vnni => vec![Self::Avx512Vnni, Self::Avx2, Self::Portable],
            Self::Avx2 => vec![Self::Avx2, Self::Portable],
            Self::Portable => vec![Self::Portable],
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
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
            $crate::isa::Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
            _ => portable($($arg),*),
        }
    }};
}
pub(crate) use dispatch;
