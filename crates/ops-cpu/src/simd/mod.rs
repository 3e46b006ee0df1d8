//! Vectors of 16 lanes, whatever the instruction set: one 512-bit register, two of 256 bits, or an array.
//!
//! So packed weights and pages look the same at every level, and a kernel is written once. A [`Simd`] value is proof that
//! the processor has the level (only the entry point of its level makes one), hence arithmetic is safe and only memory access
//! is not.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::{Avx512, Avx512Bf16};
pub use scalar::Scalar;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// The largest power at which `2^x` is rounded to 0.
const EXP2_ZERO: f32 = -150.0;

/// Coefficients of 2^f, |f| <= 1/2, highest power first; relative error 2.6e-9 before rounding.
const EXP2: [f32; 7] =
    [1.546_144_5e-4, 1.340_042_8e-3, 9.618_057e-3, 5.550_327e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];

/// Vector operations of one instruction set.
///
/// All methods are `#[inline(always)]`. Pointers need no alignment. A *pair* is two neighbouring bf16 values in one
/// u32, the lower one first.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Rows of the register tile: as many as fit in registers beside [`Simd::TILE_VECTORS`] columns of vectors.
    const TILE_ROWS: usize;
    /// Vectors per row of the register tile: 4 or 1.
    const TILE_VECTORS: usize;

    /// 16 f32 values.
    type V: Copy;
    /// 16 pairs of bf16.
    type Pairs: Copy;

    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::V;
    /// 16 values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// Writes 16 values.
    ///
    /// # Safety
    /// They are writable.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// Fetches a line into the cache, if there is such an instruction. Any address will do.
    fn prefetch(self, from: *const u8);
    /// Fetches a line into the second-level cache, if there is such an instruction. Any address will do.
    fn prefetch_second(self, from: *const u8);
    /// The first `n <= 16` values, zeros after them.
    ///
    /// # Safety
    /// `n` values are readable.
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self::V;
    /// Writes the first `n <= 16` values.
    ///
    /// # Safety
    /// `n` values are writable.
    unsafe fn store_part(self, to: *mut f32, v: Self::V, n: usize);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once except at [`crate::Isa::Scalar`].
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair of lanes; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes whose bit in `mask` is 0 become `-inf`.
    fn keep(self, v: Self::V, mask: u16) -> Self::V;
    /// The lanes of `v` where those of `x` are above `least`, 0 elsewhere and where `x` is NaN.
    fn where_above(self, x: Self::V, least: f32, v: Self::V) -> Self::V;
    /// A bit for each lane in which both are equal, the lowest for the first.
    fn equal(self, a: Self::V, b: Self::V) -> u16;
    /// A bit for each integer that is at least `least`, the lowest for the first.
    fn at_least(self, keys: &[u32; LANES], least: u32) -> u16;
    /// Writes the integers with a bit in `mask`, in order, and after them anything.
    #[inline(always)]
    fn compress(self, keys: &[u32; LANES], mask: u16, to: &mut [u32; LANES]) {
        let mut count = 0;
        for (i, &key) in keys.iter().enumerate() {
            // Never beyond the end: as many were kept as came before, at most.
            to[count] = key;
            count += usize::from(mask >> i & 1);
        }
    }
    /// Largest lane.
    fn reduce_max(self, v: Self::V) -> f32;
    /// Sum of the lanes, always in the same order.
    fn reduce_sum(self, v: Self::V) -> f32;
    /// The sums of four vectors, each as [`Simd::reduce_sum`] has it.
    fn reduce_sums(self, v: [Self::V; 4]) -> [f32; 4];
    /// The sums of four times four vectors, each as [`Simd::reduce_sum`] has it.
    #[inline(always)]
    fn reduce_all(self, v: [[Self::V; 4]; 4]) -> [[f32; 4]; 4] {
        v.map(|four| self.reduce_sums(four))
    }
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `v * 2^n` for integral `n` in `-160..=127`.
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V;

    /// 16 f16 values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_f16(self, from: *const u16) -> Self::V;
    /// 8 values, and 8 more from elsewhere.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_halves(self, low: *const f32, high: *const f32) -> Self::V;
    /// 8 f16 values, and 8 more from elsewhere.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_f16_halves(self, low: *const u16, high: *const u16) -> Self::V;
    /// 16 numbers of e4m3, times [`crate::fp8::E4M3_UNIT`].
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V;
    /// Rounds to f16 (nearest even) and writes.
    ///
    /// # Safety
    /// 16 values are writable.
    unsafe fn store_f16(self, to: *mut u16, v: Self::V);
    /// 16 bf16 values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_bf16(self, from: *const u16) -> Self::V;
    /// Rounds to bf16 (nearest even) and writes.
    ///
    /// # Safety
    /// 16 values are writable.
    unsafe fn store_bf16(self, to: *mut u16, v: Self::V);
    /// Each lane rounded to bf16 (nearest even).
    fn round_bf16(self, v: Self::V) -> Self::V;

    /// 16 pairs.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_pairs(self, from: *const u32) -> Self::Pairs;
    /// 8 pairs, and 8 more from elsewhere.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_pairs_halves(self, low: *const u32, high: *const u32) -> Self::Pairs;
    /// All lanes `pair`.
    fn splat_pair(self, pair: u32) -> Self::Pairs;
    /// `acc + a.0 * b.0 + a.1 * b.1` per lane, in an order and with roundings fixed per instruction set.
    fn dot_pairs(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;

    /// `2^x`, relative error below 2e-7; 0 for `-inf`. `x <= 127`.
    ///
    /// `x = n + f` with integral n and |f| <= 1/2 is exact, so a polynomial for 2^f is all there is to it. Its
    /// coefficients interpolate 2^f at the seven Chebyshev nodes of the interval.
    ///
    /// What is too small for any number but 0 is not computed: an instruction whose result underflows takes 150 to 200 cycles on
    /// Emerald Rapids, and each masked slot is such a one. There, in decode of four sequences after 32,000
    /// tokens, attention of `retroinfer` went from 14.3 to 9.3 ms a step, selections of `shadowkv` from 8.0 to 5.4.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        let power = self.where_above(x, EXP2_ZERO, x);
        let n = self.round(power);
        let f = self.sub(power, n);
        let mut p = self.splat(EXP2[0]);
        p = self.mul_add(p, f, self.splat(EXP2[1]));
        p = self.mul_add(p, f, self.splat(EXP2[2]));
        p = self.mul_add(p, f, self.splat(EXP2[3]));
        p = self.mul_add(p, f, self.splat(EXP2[4]));
        p = self.mul_add(p, f, self.splat(EXP2[5]));
        p = self.mul_add(p, f, self.splat(EXP2[6]));
        self.where_above(x, EXP2_ZERO, self.scale_by_power(p, n))
    }

    /// `x / (1 + exp(-x))` (Elfwing et al. 2018).
    #[inline(always)]
    fn silu(self, x: Self::V) -> Self::V {
        // Below -87 the result is below 1e-35 and `exp2` would overflow. In this order `max` keeps a NaN.
        let x = self.max(self.splat(-87.0), x);
        let power = self.mul(x, self.splat(-std::f32::consts::LOG2_E));
        self.div(x, self.add(self.splat(1.0), self.exp2(power)))
    }
}

#[cfg(test)]
mod tests {
    use ops::{DType, Random};

    use super::*;
    use crate::isa::{Isa, Kernel};

    const SEED: u64 = 5;

    /// What a level makes of 16 values.
    struct Try([f32; LANES]);

    #[derive(Debug)]
    struct Made {
        exp2: [f32; LANES],
        silu: [f32; LANES],
        bf16: [u16; LANES],
        bf16_rounded: [f32; LANES],
        f16: [f32; LANES],
        bf16_loaded: [f32; LANES],
        kept: [f32; LANES],
        equal: u16,
        at_least: u16,
        compressed: Vec<u32>,
        part: [f32; LANES],
        sum: f32,
        sums: [f32; 4],
        max: f32,
        dot: [f32; LANES],
    }

    impl Kernel for Try {
        type Output = Made;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Made {
            let zeros = [0.0; LANES];
            let mut made = Made {
                exp2: zeros,
                silu: zeros,
                bf16: [0; LANES],
                bf16_rounded: zeros,
                f16: zeros,
                bf16_loaded: zeros,
                kept: zeros,
                equal: 0,
                at_least: 0,
                compressed: Vec::new(),
                part: [9.0; LANES],
                sum: 0.0,
                sums: [0.0; 4],
                max: 0.0,
                dot: zeros,
            };
            let mut f16 = [0u16; LANES];
            let pairs = self.0.map(|x| (x.to_bits() & 0xffff_0000) | 0x4000);
            // SAFETY: every array has 16 elements.
            unsafe {
                let v = s.load(self.0.as_ptr());
                s.store(made.exp2.as_mut_ptr(), s.exp2(v));
                s.store(made.silu.as_mut_ptr(), s.silu(v));
                s.store_bf16(made.bf16.as_mut_ptr(), v);
                s.store(made.bf16_rounded.as_mut_ptr(), s.round_bf16(v));
                s.store_f16(f16.as_mut_ptr(), v);
                s.store(made.f16.as_mut_ptr(), s.load_f16(f16.as_ptr()));
                s.store(made.bf16_loaded.as_mut_ptr(), s.load_bf16(made.bf16.as_ptr()));
                let bits = self.0.map(f32::to_bits);
                made.at_least = s.at_least(&bits, bits[3]);
                let mut kept = [0; LANES];
                s.compress(&bits, made.at_least, &mut kept);
                made.compressed = kept[..made.at_least.count_ones() as usize].to_vec();
                made.equal = s.equal(v, s.keep(v, 0b0100_0000_1010_0011));
                s.store(made.kept.as_mut_ptr(), s.keep(v, 0b1000_0000_0111_0001));
                s.store_part(made.part.as_mut_ptr(), s.load_part(self.0.as_ptr(), 11), 13);
                (made.sum, made.max) = (s.reduce_sum(v), s.reduce_max(v));
                let (double, square) = (s.add(v, v), s.mul(v, v));
                made.sums = s.reduce_sums([v, square, double, s.splat(1.0)]);
                assert_eq!(made.sums[1].to_bits(), s.reduce_sum(square).to_bits());
                let vectors: [[S::V; 4]; 4] = std::array::from_fn(|i| {
                    std::array::from_fn(|j| s.mul(v, s.splat((3 * i + j) as f32 - 5.3)))
                });
                let all = s.reduce_all(vectors);
                for (sum, vector) in all.as_flattened().iter().zip(vectors.as_flattened()) {
                    assert_eq!(sum.to_bits(), s.reduce_sum(*vector).to_bits());
                }
                // Two halves from anywhere are one vector.
                let (other, mut halves) = (self.0.map(|x| x + 1.0), [0.0; LANES]);
                let joined: [f32; LANES] =
                    std::array::from_fn(|i| if i < 8 { other[i + 8] } else { self.0[i - 8] });
                s.store(halves.as_mut_ptr(), s.load_halves(other.as_ptr().add(8), self.0.as_ptr()));
                let bits = |values: [f32; LANES]| values.map(f32::to_bits);
                assert_eq!(bits(halves), bits(joined));
                s.store(halves.as_mut_ptr(), s.load_f16_halves(f16.as_ptr().add(8), f16.as_ptr()));
                assert_eq!(bits(halves), bits(std::array::from_fn(|i| made.f16[(i + 8) % LANES])));
                let turned: [u32; LANES] = std::array::from_fn(|i| pairs[(i + 8) % LANES]);
                let dot_of = |pairs| s.dot_pairs(v, s.splat_pair(0x4040_4000), pairs);
                let in_halves = dot_of(s.load_pairs_halves(pairs.as_ptr().add(8), pairs.as_ptr()));
                s.store(halves.as_mut_ptr(), in_halves);
                let mut whole = [0.0; LANES];
                s.store(whole.as_mut_ptr(), dot_of(s.load_pairs(turned.as_ptr())));
                assert_eq!(bits(halves), bits(whole));
                // (3, 2) . (x rounded down to bf16, 2): 0x4000 is 2 in bf16, 0x4040 is 3.
                let dot = s.dot_pairs(v, s.splat_pair(0x4040_4000), s.load_pairs(pairs.as_ptr()));
                s.store(made.dot.as_mut_ptr(), dot);
            }
            made
        }
    }

    #[test]
    fn every_level_computes_the_formulas() {
        let mut random = Random::new(SEED);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for scale in [1.0, 30.0] {
                let mut x = [0.0; LANES];
                x.fill_with(|| scale * random.normal());
                let made = isa.run(Try(x));
                let what = format!("seed {SEED} {isa} {x:?} {made:?}");
                let close = |a: f32, b: f64, tolerance: f64| {
                    assert!((f64::from(a) - b).abs() <= tolerance * b.abs().max(1e-30), "{a} {b} {what}");
                };
                for i in 0..LANES {
                    let exact = f64::from(x[i]);
                    close(made.exp2[i], exact.exp2(), 2e-7);
                    close(made.silu[i], exact / (1.0 + (-exact).exp()), 4e-6);
                    assert_eq!(made.bf16[i], half::bf16::from_f32(x[i]).to_bits(), "{what}");
                    assert_eq!(made.bf16_rounded[i], DType::Bf16.round(x[i]), "{what}");
                    assert_eq!(made.bf16_loaded[i], made.bf16_rounded[i], "{what}");
                    assert_eq!(made.f16[i], DType::F16.round(x[i]), "{what}");
                    let kept = 0b1000_0000_0111_0001 >> i & 1 == 1;
                    assert_eq!(made.kept[i], if kept { x[i] } else { f32::NEG_INFINITY }, "{what}");
                    assert_eq!(
                        made.part[i],
                        [x[i], 0.0, 9.0][usize::from(i >= 11) + usize::from(i >= 13)],
                        "{what}"
                    );
                    let high = f64::from(f32::from_bits(x[i].to_bits() & 0xffff_0000));
                    let dot = exact + 3.0 * high + 4.0;
                    assert!((f64::from(made.dot[i]) - dot).abs() < 1e-4 * f64::from(scale), "{dot} {what}");
                }
                let bits = x.map(f32::to_bits);
                let compressed: Vec<u32> = bits.into_iter().filter(|&b| b >= bits[3]).collect();
                assert_eq!(made.compressed, compressed, "{what}");
                let at_least = |i: usize| u16::from(x[i].to_bits() >= x[3].to_bits()) << i;
                assert_eq!(made.at_least, (0..LANES).map(at_least).sum::<u16>(), "{what}");
                assert_eq!(made.equal, 0b0100_0000_1010_0011, "{what}");
                let sum = x.iter().map(|&x| f64::from(x)).sum::<f64>();
                assert!((f64::from(made.sum) - sum).abs() < 1e-4 * f64::from(scale), "{what}");
                assert_eq!(made.sums[0].to_bits(), made.sum.to_bits(), "{what}");
                assert_eq!((made.sums[2], made.sums[3]), (2.0 * made.sum, 16.0), "{what}");
                assert_eq!(made.max, x.into_iter().fold(f32::MIN, f32::max), "{what}");
            }
            let mut x = [0.0; LANES];
            x[..5].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -200.0, -140.0, 127.0]);
            let made = isa.run(Try(x));
            assert_eq!(made.exp2[..3], [0.0; 3], "{isa}: no underflow");
            assert!(made.exp2[3] > 0.0 && made.exp2[3] < 1e-41 && made.exp2[5] == 1.0, "{isa} {made:?}");
            assert!((made.exp2[4] / 127f32.exp2() - 1.0).abs() < 2e-7, "{isa}");
            assert!(made.silu[1].abs() < 1e-35 && made.silu[4] == 127.0, "{isa} {made:?}");
            x[0] = f32::NAN;
            assert!(isa.run(Try(x)).silu[0].is_nan(), "{isa}");
        }
    }

    /// All codes of e4m3.
    struct Widen;

    impl Kernel for Widen {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let codes: [u8; 256] = std::array::from_fn(|code| code as u8);
            let mut numbers = vec![0.0; 256];
            for c in (0..256).step_by(LANES) {
                // SAFETY: both have 256 elements.
                unsafe { s.store(numbers.as_mut_ptr().add(c), s.load_e4m3(codes.as_ptr().add(c))) };
            }
            numbers
        }
    }

    #[test]
    fn every_level_knows_e4m3() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (code, wide) in isa.run(Widen).into_iter().enumerate().filter(|(code, _)| code & 0x7f != 0x7f)
            {
                let number = ops::fp8::number(code as u8) * crate::fp8::E4M3_UNIT;
                assert_eq!(wide.to_bits(), number.to_bits(), "{isa} {code:#x}");
            }
        }
    }
}
