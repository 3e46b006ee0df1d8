//! How digests are stored and read by a score: in the type of K, or as e4m3 with a shared power of two ([`ops::fp8`]).
//!
//! e4m3 is widened to f32, and its queries stay f32 whatever K is: a bf16 pair of it would need a query scaled by 2^120, since
//! the products of bf16 flush what is below 2^-126.

use ops::fp8::{EXPONENTS, SCALE_BYTES, number, value};
use ops::sparse::padded_width;

use crate::simd::{LANES, Simd};
use crate::tile::Element;

/// What a score needs of the way in which digests are stored.
pub trait Stored: Copy {
    /// Values per step of the lifted query.
    const K_PER_STEP: usize;
    /// Bytes of the values of 16 steps.
    const VECTOR_BYTES: usize;
    /// What a lifted query holds per step.
    type Left: Copy;
    /// 16 steps of a digest.
    type Right<S: Simd>: Copy;

    /// Writes 16 values of a lifted query.
    ///
    /// # Safety
    /// 16 values are writable.
    unsafe fn store_left<S: Simd>(s: S, to: *mut Self::Left, v: S::V);
    /// Loads 16 steps of a digest.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> Self::Right<S>;
    /// As [`Element::mul_add_lanes`].
    ///
    /// # Safety
    /// 16 steps of the query are readable.
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const Self::Left, right: Self::Right<S>)
    -> S::V;
    /// The score of `digest`, of `width` values, with `sum` over its products.
    ///
    /// # Safety
    /// The digest is readable.
    unsafe fn finish(sum: f32, digest: *const u8, width: usize) -> f32;
    /// Writes a digest of `width` values, a multiple of 16; those after `used` are padding.
    ///
    /// # Safety
    /// The values are readable, the digest is writable.
    unsafe fn store<S: Simd>(s: S, to: *mut u8, values: *const f32, used: usize, width: usize);
}

impl<E: Element> Stored for E {
    const K_PER_STEP: usize = E::K_PER_STEP;
    const VECTOR_BYTES: usize = E::VECTOR_BYTES;
    type Left = E::Left;
    type Right<S: Simd> = E::Right<S>;

    #[inline(always)]
    unsafe fn store_left<S: Simd>(s: S, to: *mut E::Left, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { <E as Element>::store_left(s, to, v) }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> E::Right<S> {
        // SAFETY: the caller's promise.
        unsafe { <E as Element>::load(s, from) }
    }

    #[inline(always)]
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const E::Left, right: E::Right<S>) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { <E as Element>::mul_add_lanes(s, acc, left, right) }
    }

    #[inline(always)]
    unsafe fn finish(sum: f32, _: *const u8, _: usize) -> f32 {
        sum
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, to: *mut u8, values: *const f32, _: usize, width: usize) {
        let bytes_per_value = E::VECTOR_BYTES / LANES / E::K_PER_STEP;
        let mut c = 0;
        while c < width {
            // SAFETY: the caller's promise.
            unsafe { E::store_right(s, to.add(c * bytes_per_value), s.load(values.add(c))) };
            c += LANES;
        }
    }
}

/// e4m3 with a scale after the padded values.
#[derive(Clone, Copy, Debug)]
pub struct E4m3;

impl Stored for E4m3 {
    const K_PER_STEP: usize = 1;
    const VECTOR_BYTES: usize = LANES;
    type Left = f32;
    type Right<S: Simd> = S::V;

    #[inline(always)]
    unsafe fn store_left<S: Simd>(s: S, to: *mut f32, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to, v) }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_e4m3(from) }
    }

    #[inline(always)]
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const f32, right: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.mul_add(s.load(left), right, acc) }
    }

    #[inline(always)]
    unsafe fn finish(sum: f32, digest: *const u8, width: usize) -> f32 {
        // SAFETY: the caller's promise.
        let scale = unsafe { digest.add(width).cast::<f32>().read_unaligned() };
        // Not by both at once: the product of the largest scale with 2^8 is no number.
        sum * (1.0 / E4M3_UNIT) * scale
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(_: S, to: *mut u8, values: *const f32, used: usize, width: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let values = std::slice::from_raw_parts(values, used);
            encode(std::slice::from_raw_parts_mut(to, width + SCALE_BYTES), values);
        }
    }
}

/// What [`Simd::load_e4m3`] makes of 1: so the bits of e4m3 are those of an f16.
pub const E4M3_UNIT: f32 = 1.0 / 256.0;

/// Writes a two-sided digest, as [`ops::fp8`] says.
pub fn encode(digest: &mut [u8], values: &[f32]) {
    let (codes, scale) = digest.split_at_mut(padded_width(values.len()));
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs())).to_bits();
    // 448 is 1.75 * 2^8.
    let exponent = (largest >> 23) as i32 - 127 - 8 + i32::from(largest & 0x007f_ffff > 0x0060_0000);
    let exponent = exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end());
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    scale.copy_from_slice(&power(exponent).to_le_bytes());
    let inverse = power(-exponent);
    let middle = values.len() / 2;
    for (i, (code, &v)) in codes.iter_mut().zip(values).enumerate() {
        *code = code_of(v, inverse, v.is_sign_negative() != (i < middle));
    }
}

/// The code next to `v * inverse`: away from zero or towards it.
fn code_of(v: f32, inverse: f32, away: bool) -> u8 {
    let x = (v * inverse).abs();
    let (code, exact) = if x < 2f32.powi(-6) {
        // What underflows is inexact, too.
        let steps = x * 512.0;
        (steps as u32, steps.fract() == 0.0 && (x > 0.0 || v == 0.0))
    } else {
        ((x.to_bits() >> 20) - ((127 - 7) << 3), x.to_bits() & 0x000f_ffff == 0)
    };
    let code = (code + u32::from(away && !exact)).min(0x7e) as u8;
    if code > 0 && v.is_sign_negative() { code | 0x80 } else { code }
}

/// Value `index` of a digest that was written as fp8, of `width` values with padding.
pub fn read(digest: &[u8], width: usize, index: usize) -> f32 {
    let scale = f32::from_le_bytes(digest[width..][..SCALE_BYTES].try_into().expect("four bytes"));
    value(number(digest[index]), scale)
}
