//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use super::{LANES, Simd};
use crate::isa::Kernel;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The entry point of this level.
    ///
    /// # Safety
    /// The processor has AVX2, FMA, F16C and BMI2.
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx2(()))
    }
}

/// 16 lanes: the low half, then the high half.
#[derive(Clone, Copy, Debug)]
pub struct Two<T>(T, T);

/// The sum of 8 lanes in one fixed order.
///
/// # Safety
/// AVX.
#[inline(always)]
pub(super) unsafe fn sum_8(v: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)))
    }
}

/// The sums of four times 8 lanes, each in the order of [`sum_8`].
///
/// # Safety
/// AVX.
#[inline(always)]
pub(super) unsafe fn sums_8(a: __m256, b: __m256, c: __m256, d: __m256) -> [f32; 4] {
    // SAFETY: the caller's promise; both results are 16 bytes of plain data.
    unsafe {
        // Four lanes of `a` and of `b`, then two of each of the four, then one.
        let ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
        let cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
        let acbd =
            _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0b01_00_01_00), _mm256_shuffle_ps(ab, cd, 0b11_10_11_10));
        let acbd = _mm256_add_ps(acbd, _mm256_shuffle_ps(acbd, acbd, 0b10_11_00_01));
        let (ac, bd) = (_mm256_castps256_ps128(acbd), _mm256_extractf128_ps(acbd, 1));
        std::mem::transmute::<__m128, [f32; 4]>(_mm_blend_ps(
            ac,
            _mm_shuffle_ps(bd, bd, 0b10_11_00_01),
            0b1010,
        ))
    }
}

/// Lanes `first..first + 8` of a mask of 16 bits, as sign bits.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn mask_of(mask: u16, first: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_set1_epi32(i32::from(mask >> first));
        let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        _mm256_cmpeq_epi32(_mm256_and_si256(bits, lane), lane)
    }
}

/// A mask of the first `n` of 16 lanes.
#[inline(always)]
fn first(n: usize) -> u16 {
    ((1u32 << n) - 1) as u16
}

/// Rounds to bf16, nearest even; the bits end up in the low halves.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn narrow(v: __m256) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        _mm256_srli_epi32(rounded, 16)
    }
}

/// `2^n` for `n` in `-126..=127`.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn power(n: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)) }
}

/// `v * 2^n` in two steps, so that both factors are normal numbers.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn scale(v: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32(n, 1);
        _mm256_mul_ps(_mm256_mul_ps(v, power(half)), power(_mm256_sub_epi32(n, half)))
    }
}

/// The lower values of pairs, widened.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn low(pairs: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)) }
}

/// The upper values of pairs, widened.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn high(pairs: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
}

/// # Safety
/// AVX2 and FMA.
#[inline(always)]
unsafe fn dot(acc: __m256, a: __m256i, b: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), acc)) }
}

impl Simd for Avx2 {
    // Eight accumulators; beside them both halves of a widened pair of weights and one of the left operand.
    const TILE_ROWS: usize = 4;
    const TILE_VECTORS: usize = 1;

    type V = Two<__m256>;
    type Pairs = Two<__m256i>;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        // SAFETY: `self` proves the features; so in every method here.
        let v = unsafe { _mm256_set1_ps(value) };
        Two(v, v)
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: features as above; the caller vouches for the memory.
        unsafe { Two(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: as for `load`.
        unsafe {
            _mm256_storeu_ps(to, v.0);
            _mm256_storeu_ps(to.add(8), v.1);
        }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    fn prefetch_second(self, from: *const u8) {
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self::V {
        let mask = first(n);
        // SAFETY: as for `load`; masked lanes are not accessed, and a wrapping address is not an access.
        unsafe {
            Two(
                _mm256_maskload_ps(from, mask_of(mask, 0)),
                _mm256_maskload_ps(from.wrapping_add(8), mask_of(mask, 8)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, v: Self::V, n: usize) {
        let mask = first(n);
        // SAFETY: as for `load_part`.
        unsafe {
            _mm256_maskstore_ps(to, mask_of(mask, 0), v.0);
            _mm256_maskstore_ps(to.wrapping_add(8), mask_of(mask, 8), v.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn keep(self, v: Self::V, mask: u16) -> Self::V {
        // SAFETY: features as above.
        unsafe {
            let never = _mm256_set1_ps(f32::NEG_INFINITY);
            Two(
                _mm256_blendv_ps(never, v.0, _mm256_castsi256_ps(mask_of(mask, 0))),
                _mm256_blendv_ps(never, v.1, _mm256_castsi256_ps(mask_of(mask, 8))),
            )
        }
    }

    #[inline(always)]
    fn where_above(self, x: Self::V, least: f32, v: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe {
            let least = _mm256_set1_ps(least);
            Two(
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(x.0, least), v.0),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(x.1, least), v.1),
            )
        }
    }

    #[inline(always)]
    fn equal(self, a: Self::V, b: Self::V) -> u16 {
        // SAFETY: features as above.
        unsafe {
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a.0, b.0));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a.1, b.1));
            (low | high << 8) as u16
        }
    }

    #[inline(always)]
    fn at_least(self, keys: &[u32; 16], least: u32) -> u16 {
        // SAFETY: features as above; the array holds two registers.
        unsafe {
            let least = _mm256_set1_epi32(least as i32);
            let mask = |half: usize| {
                let keys = _mm256_loadu_si256(keys.as_ptr().cast::<__m256i>().add(half));
                let above = _mm256_cmpeq_epi32(_mm256_max_epu32(keys, least), keys);
                _mm256_movemask_ps(_mm256_castsi256_ps(above))
            };
            (mask(0) | mask(1) << 8) as u16
        }
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        // SAFETY: features as above.
        unsafe {
            let v = _mm256_max_ps(v.0, v.1);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps(v, v, 1)))
        }
    }

    #[inline(always)]
    fn reduce_sum(self, v: Self::V) -> f32 {
        // SAFETY: features as above.
        unsafe { sum_8(_mm256_add_ps(v.0, v.1)) }
    }

    #[inline(always)]
    fn reduce_sums(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: features as above.
        unsafe {
            sums_8(
                _mm256_add_ps(a.0, a.1),
                _mm256_add_ps(b.0, b.1),
                _mm256_add_ps(c.0, c.1),
                _mm256_add_ps(d.0, d.1),
            )
        }
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            Two(_mm256_round_ps(v.0, NEAREST), _mm256_round_ps(v.1, NEAREST))
        }
    }

    #[inline(always)]
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(scale(v.0, n.0), scale(v.1, n.1)) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::V {
        // SAFETY: features as above; the caller vouches for the memory.
        unsafe {
            Two(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_halves(self, low: *const f32, high: *const f32) -> Self::V {
        // SAFETY: features as above; the caller vouches for the memory.
        unsafe { Two(_mm256_loadu_ps(low), _mm256_loadu_ps(high)) }
    }

    #[inline(always)]
    unsafe fn load_f16_halves(self, low: *const u16, high: *const u16) -> Self::V {
        // SAFETY: as for `load_f16`.
        unsafe {
            Two(_mm256_cvtph_ps(_mm_loadu_si128(low.cast())), _mm256_cvtph_ps(_mm_loadu_si128(high.cast())))
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V {
        // SAFETY: as for `load_f16`. The sign moves to the top, the other bits to where f16 has them.
        unsafe {
            let wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())), 7);
            let bits = _mm256_and_si256(wide, _mm256_set1_epi16(0xbfff_u16 as i16));
            Two(
                _mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
                _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: Self::V) {
        // SAFETY: as for `load_f16`.
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph(v.0, _MM_FROUND_TO_NEAREST_INT));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph(v.1, _MM_FROUND_TO_NEAREST_INT));
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::V {
        // SAFETY: as for `load_f16`.
        unsafe {
            let wide = |at: *const u16| low(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())));
            Two(wide(from), wide(from.add(8)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: Self::V) {
        // SAFETY: as for `load_f16`. The pack works within 128-bit lanes, the permutation puts them in order.
        unsafe {
            let packed = _mm256_packus_epi32(narrow(v.0), narrow(v.1));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64(packed, 0b11_01_10_00));
        }
    }

    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(low(narrow(v.0)), low(narrow(v.1))) }
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const u32) -> Self::Pairs {
        // SAFETY: as for `load_f16`.
        unsafe { Two(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LANES / 2).cast())) }
    }

    #[inline(always)]
    unsafe fn load_pairs_halves(self, low: *const u32, high: *const u32) -> Self::Pairs {
        // SAFETY: as for `load_f16`.
        unsafe { Two(_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(high.cast())) }
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> Self::Pairs {
        // SAFETY: features as above.
        let v = unsafe { _mm256_set1_epi32(pair as i32) };
        Two(v, v)
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
        // SAFETY: features as above.
        unsafe { Two(dot(acc.0, a.0, b.0), dot(acc.1, a.1, b.1)) }
    }
}
