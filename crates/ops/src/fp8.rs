//! fp8 digests: values in e4m3 (OCP 8-bit Floating Point, 2023) with a shared power of two, rounded outward.
//!
//! The upper values `hi` and the lower ones `lo` of a digest share `2^s`, with the least `s` of [`EXPONENTS`] for which
//! `448 * 2^s >= max |v|`. An upper value becomes the least number `x * 2^s >= hi` with `x` in e4m3, a lower one the greatest
//! `x * 2^s <= lo`. So for every query `sum_c max(q_c hi_c, q_c lo_c)` only grows: what was an upper bound remains one, whatever
//! the finite values. Zero stays +0; NaN and infinities, of which nothing is promised, take the largest number.
//!
//! e4m3 and not e5m2: with a power of two per digest the range of 2^17 suffices, and a step is an eighth, not a quarter.

use std::ops::RangeInclusive;

/// Largest number of e4m3.
pub const LARGEST: f32 = 448.0;

/// Exponents of the shared power of two. From the largest on every finite f32 has a number above it; the smallest is a normal
/// f32, and smaller values are rounded to steps of 2^-135.
pub const EXPONENTS: RangeInclusive<i32> = -126..=120;

/// Bytes of the shared power of two, which lies after the values as f32.
pub const SCALE_BYTES: usize = size_of::<f32>();

/// The number that `code` stands for: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no normal number below 2^-6.
/// Codes 0x7f and 0xff stand for none and are never written.
pub fn number(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code >> 7 == 0 { magnitude } else { -magnitude }
}

/// The value of `number` under the power of two `scale`. What is beyond f32 is its largest value.
pub fn value(number: f32, scale: f32) -> f32 {
    (number * scale).clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_standard() {
        assert_eq!(
            [0x00, 0x01, 0x07, 0x08, 0x38, 0x39, 0xb8, 0x7e].map(number),
            [0.0, 2f32.powi(-9), 7.0 * 2f32.powi(-9), 2f32.powi(-6), 1.0, 1.125, -1.0, LARGEST]
        );
        assert!((0..0x7e).all(|code| number(code) < number(code + 1)), "codes have the order of numbers");
        let largest = 2f32.powi(*EXPONENTS.end());
        assert_eq!((value(LARGEST, largest), value(-LARGEST, largest)), (f32::MAX, f32::MIN));
    }
}
