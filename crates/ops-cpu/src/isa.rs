//! Instruction sets: which there are, which this machine has, and the one place where code enters them.

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Avx512Bf16};
use crate::simd::{Scalar, Simd};

/// An instruction set level. Bits of results are equal within a level, not across levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// No intrinsics: any processor, and the oracle of the others.
    Scalar,
    /// AVX2, FMA, F16C and BMI2 (x86-64-v3): Haswell (2013), Zen (2017).
    Avx2,
    /// AVX-512 F, BW, DQ, VL: Skylake-SP (2017), Zen 4 (2022).
    Avx512,
    /// AVX-512 with bf16 dot products: Cooper Lake (2020), Zen 4 (2022).
    Avx512Bf16,
}

/// A computation that is written once and compiled for every instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Runs with the vectors of `simd`. Implementations are `#[inline(always)]`, as everything they call, so that all
    /// of it is compiled with the target features of the entry point that [`Isa::run`] calls.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// All levels, worst first.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The name used in flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
        }
    }

    /// Whether this machine has the level.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("bmi2")
            };
            let avx512 = || {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            };
            match self {
                Isa::Scalar => true,
                Isa::Avx2 => avx2(),
                Isa::Avx512 => avx512(),
                Isa::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// The best level of this machine.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Scalar)
    }

    /// Runs `kernel` at this level.
    ///
    /// # Panics
    /// When the machine does not have it. (The detection is cached: one load and a test.)
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.available(), "this machine lacks {}", self.name());
        match self {
            // SAFETY: the level was just found available, for this and the next arms.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => unsafe { Avx512Bf16::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { Avx512::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { Avx2::run(kernel) },
            _ => kernel.run(Scalar),
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = || Isa::ALL.map(Isa::name).join(", ");
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| format!("unknown instruction set {name:?}: expected one of {}", names()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().unwrap_err().contains("avx512-bf16"));
    }

    #[test]
    fn the_detected_level_is_available() {
        assert!(Isa::Scalar.available() && Isa::detect().available());
    }
}
