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
    /// Fetches a line into the second-level cache, if there is such an instruction. Any address will do. (Not into the
    /// first: Zen 4 then has a third fewer lines under way, see `split`.)
    fn prefetch(self, from: *const u8);
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
    /// The larger of each pair of lanes.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes whose bit in `mask` is 0 become `-inf`.
    fn keep(self, v: Self::V, mask: u16) -> Self::V;
    /// Largest lane.
    fn reduce_max(self, v: Self::V) -> f32;
    /// Sum of the lanes, always in the same order.
    fn reduce_sum(self, v: Self::V) -> f32;
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `v * 2^n` for integral `n` in `-160..=127`.
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V;

    /// 16 f16 values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_f16(self, from: *const u16) -> Self::V;
    /// Rounds to f16 (nearest even) and writes.
    ///
    /// # Safety
    /// 16 values are writable.
    unsafe fn store_f16(self, to: *mut u16, v: Self::V);
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
    /// All lanes `pair`.
    fn splat_pair(self, pair: u32) -> Self::Pairs;
    /// `acc + a.0 * b.0 + a.1 * b.1` per lane, in an order and with roundings fixed per instruction set.
    fn dot_pairs(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;

    /// `2^x`, relative error below 2e-7; 0 for `-inf`. `x <= 127`.
    ///
    /// `x = n + f` with integral n and |f| <= 1/2 is exact, so a polynomial for 2^f is all there is to it. Its
    /// coefficients interpolate 2^f at the seven Chebyshev nodes of the interval.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        let x = self.max(x, self.splat(-160.0));
        let n = self.round(x);
        let f = self.sub(x, n);
        let mut p = self.splat(EXP2[0]);
        p = self.mul_add(p, f, self.splat(EXP2[1]));
        p = self.mul_add(p, f, self.splat(EXP2[2]));
        p = self.mul_add(p, f, self.splat(EXP2[3]));
        p = self.mul_add(p, f, self.splat(EXP2[4]));
        p = self.mul_add(p, f, self.splat(EXP2[5]));
        p = self.mul_add(p, f, self.splat(EXP2[6]));
        self.scale_by_power(p, n)
    }

    /// `x / (1 + exp(-x))` (Elfwing et al. 2018).
    #[inline(always)]
    fn silu(self, x: Self::V) -> Self::V {
        // Beyond +-126 powers of two the result is x or 0 to the last bit.
        let power = self.mul(x, self.splat(-std::f32::consts::LOG2_E));
        let power = self.sub(self.splat(0.0), self.max(self.sub(self.splat(0.0), power), self.splat(-126.0)));
        self.div(x, self.add(self.splat(1.0), self.exp2(power)))
    }
}
