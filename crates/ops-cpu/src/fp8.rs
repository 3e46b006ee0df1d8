//! How digests are stored and read by a score: in the type of K, or as e4m3 with a shared power of two ([`ops::fp8`]).
//!
//! e4m3 is widened to f32, and its queries stay f32 whatever K is: a bf16 pair of it would need a query scaled by 2^120, since
//! the products of bf16 flush what is below 2^-126.

use ops::fp8::{EXPONENTS, number, value};

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
    /// Whether the tag of a digest is the scale of its values.
    const SCALED: bool;
    /// The score of a digest with this tag and `sum` over its products.
    fn finish(sum: f32, tag: f32) -> f32;
    /// Writes the scored values of a digest, `width` of them, a multiple of 16, and returns its scale; those after `used` are padding.
    ///
    /// # Safety
    /// The values are readable, the digest is writable.
    unsafe fn store<S: Simd>(s: S, to: *mut u8, values: *const f32, used: usize, width: usize) -> f32;
}

impl<E: Element> Stored for E {
    const K_PER_STEP: usize = E::K_PER_STEP;
    const VECTOR_BYTES: usize = E::VECTOR_BYTES;
    type Left = E::Left;
    type Right<S: Simd> = E::Right<S>;
    const SCALED: bool = false;

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
    fn finish(sum: f32, _: f32) -> f32 {
        sum
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, to: *mut u8, values: *const f32, _: usize, width: usize) -> f32 {
        let bytes_per_value = E::VECTOR_BYTES / LANES / E::K_PER_STEP;
        let mut c = 0;
        while c < width {
            // SAFETY: the caller's promise.
            unsafe { E::store_right(s, to.add(c * bytes_per_value), s.load(values.add(c))) };
            c += LANES;
        }
        1.0
    }
}

/// e4m3 with a scale in the tag.
#[derive(Clone, Copy, Debug)]
pub struct E4m3;

impl Stored for E4m3 {
    const K_PER_STEP: usize = 1;
    const VECTOR_BYTES: usize = LANES;
    type Left = f32;
    type Right<S: Simd> = S::V;
    const SCALED: bool = true;

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
    fn finish(sum: f32, tag: f32) -> f32 {
        // Not by both at once: the product of the largest scale with 2^8 is no number.
        sum * (1.0 / E4M3_UNIT) * tag
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(_: S, to: *mut u8, values: *const f32, used: usize, width: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            let values = std::slice::from_raw_parts(values, used);
            encode(std::slice::from_raw_parts_mut(to, width), values)
        }
    }
}

/// What [`Simd::load_e4m3`] makes of 1: so the bits of e4m3 are those of an f16.
pub const E4M3_UNIT: f32 = 1.0 / 256.0;

/// Writes the values of a two-sided digest, as [`ops::fp8`] says; returns their scale.
pub fn encode(codes: &mut [u8], values: &[f32]) -> f32 {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs())).to_bits();
    // 448 is 1.75 * 2^8.
    let exponent = (largest >> 23) as i32 - 127 - 8 + i32::from(largest & 0x007f_ffff > 0x0060_0000);
    let exponent = exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end());
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let inverse = power(-exponent);
    let middle = values.len() / 2;
    for (i, (code, &v)) in codes.iter_mut().zip(values).enumerate() {
        *code = code_of(v, inverse, v.is_sign_negative() != (i < middle));
    }
    power(exponent)
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

/// What `code` stands for beside this scale.
pub fn decode(code: u8, scale: f32) -> f32 {
    value(number(code), scale)
}
