//! AVX-512, with and without bf16 dot products.

use std::arch::x86_64::*;

use super::Simd;
use crate::isa::Kernel;

/// AVX-512 F, BW, DQ, VL: bf16 is widened.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// AVX-512 with the bf16 extension.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Bf16(());

impl Avx512 {
    /// The entry point of this level.
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL, and what AVX2 needs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512(()))
    }
}

impl Avx512Bf16 {
    /// The entry point of this level.
    ///
    /// # Safety
    /// As for [`Avx512::run`], and AVX512_BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512Bf16(()))
    }
}

/// Rounds to nearest even in integers; the bf16 bits end up in the low halves.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn narrow(v: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm512_srli_epi32(rounded, 16)
    }
}

/// 32 bytes, and 32 more from elsewhere.
///
/// # Safety
/// AVX-512 F; they are readable.
#[inline(always)]
unsafe fn join(low: *const u8, high: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.cast()));
        _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.cast()))
    }
}

/// The lower values of pairs, widened.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn low(pairs: __m512i) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)) }
}

/// The upper values of pairs, widened.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn high(pairs: __m512i) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32))) }
}

/// The lower 8 lanes plus the upper ones.
///
/// # Safety
/// AVX-512 F and DQ.
#[inline(always)]
unsafe fn halves(v: __m512) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)) }
}

/// The sums of 16 vectors, in their order, each in the order of [`super::avx2::sum_8`] of its [`halves`].
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn sums_16(v: [[__m512; 4]; 4]) -> __m512 {
    // Each step adds one half of two vectors to the other.
    // SAFETY: the caller's promise; so in all steps.
    let eighths = |a, b| unsafe {
        _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0b01_00_11_10))
    };
    // SAFETY: as above.
    let fours = |a, b| unsafe {
        let (low, high) =
            (_mm512_shuffle_f32x4(a, b, 0b10_00_10_00), _mm512_shuffle_f32x4(a, b, 0b11_01_11_01));
        _mm512_add_ps(low, high)
    };
    // SAFETY: as above.
    let twos = |a, b| unsafe {
        let crossed = _mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), 0b0101_0101);
        _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_castpd_ps(crossed))
    };
    // SAFETY: as above.
    let ones = |a, b| unsafe {
        _mm512_add_ps(_mm512_shuffle_ps(a, b, 0b10_00_10_00), _mm512_shuffle_ps(a, b, 0b11_01_11_01))
    };
    // Four lanes of one column of the four rows.
    let column = |i: usize| fours(eighths(v[0][i], v[1][i]), eighths(v[2][i], v[3][i]));
    ones(twos(column(0), column(1)), twos(column(2), column(3)))
}

// What both levels share. A macro, since a token type is what carries the proof that the features are there.
macro_rules! common {
    () => {
        const TILE_ROWS: usize = 6;
        const TILE_VECTORS: usize = 4;

        type V = __m512;

        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: `self` proves the features; so in every method of this macro.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            // SAFETY: features as above; the caller vouches for the memory.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m512) {
            // SAFETY: as for `load`.
            unsafe { _mm512_storeu_ps(to, v) }
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
        unsafe fn load_part(self, from: *const f32, n: usize) -> __m512 {
            // SAFETY: as for `load`; masked lanes are not accessed.
            unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, from) }
        }

        #[inline(always)]
        unsafe fn store_part(self, to: *mut f32, v: __m512, n: usize) {
            // SAFETY: as for `load_part`.
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << n) - 1) as u16, v) }
        }

        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_div_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        fn keep(self, v: __m512, mask: u16) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_mask_blend_ps(mask, _mm512_set1_ps(f32::NEG_INFINITY), v) }
        }

        #[inline(always)]
        fn where_above(self, x: __m512, least: f32, v: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe {
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(least));
                _mm512_maskz_mov_ps(above, v)
            }
        }

        #[inline(always)]
        fn equal(self, a: __m512, b: __m512) -> u16 {
            // SAFETY: features as above.
            unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
        }

        #[inline(always)]
        fn at_least(self, keys: &[u32; 16], least: u32) -> u16 {
            // SAFETY: features as above; the array holds a vector.
            unsafe {
                let keys = _mm512_loadu_si512(keys.as_ptr().cast());
                _mm512_cmpge_epu32_mask(keys, _mm512_set1_epi32(least as i32))
            }
        }

        #[inline(always)]
        fn compress(self, keys: &[u32; 16], mask: u16, to: &mut [u32; 16]) {
            // SAFETY: features as above; the arrays hold a vector each.
            unsafe {
                let keys = _mm512_loadu_si512(keys.as_ptr().cast());
                _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_maskz_compress_epi32(mask, keys));
            }
        }

        #[inline(always)]
        fn reduce_max(self, v: __m512) -> f32 {
            // SAFETY: features as above.
            unsafe { _mm512_reduce_max_ps(v) }
        }

        #[inline(always)]
        fn reduce_sum(self, v: __m512) -> f32 {
            // SAFETY: features as above. Spelt out, since the order of the library's reduction is its own affair.
            unsafe { super::avx2::sum_8(halves(v)) }
        }

        #[inline(always)]
        fn reduce_sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
            // SAFETY: features as above.
            unsafe { super::avx2::sums_8(halves(a), halves(b), halves(c), halves(d)) }
        }

        #[inline(always)]
        fn reduce_all(self, v: [[__m512; 4]; 4]) -> [[f32; 4]; 4] {
            // SAFETY: features as above; both are 64 bytes of plain data.
            unsafe { std::mem::transmute::<__m512, [[f32; 4]; 4]>(sums_16(v)) }
        }

        #[inline(always)]
        fn round(self, v: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) }
        }

        #[inline(always)]
        fn scale_by_power(self, v: __m512, n: __m512) -> __m512 {
            // SAFETY: features as above.
            unsafe { _mm512_scalef_ps(v, n) }
        }

        #[inline(always)]
        unsafe fn load_f16(self, from: *const u16) -> __m512 {
            // SAFETY: features as above; the caller vouches for the memory.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn load_halves(self, low: *const f32, high: *const f32) -> __m512 {
            // SAFETY: features as above; the caller vouches for the memory.
            unsafe { _mm512_castsi512_ps(join(low.cast(), high.cast())) }
        }

        #[inline(always)]
        unsafe fn load_f16_halves(self, low: *const u16, high: *const u16) -> __m512 {
            // SAFETY: features as above; the caller vouches for the memory.
            unsafe {
                let (low, high) = (_mm_loadu_si128(low.cast()), _mm_loadu_si128(high.cast()));
                _mm512_cvtph_ps(_mm256_set_m128i(high, low))
            }
        }

        #[inline(always)]
        unsafe fn load_e4m3(self, from: *const u8) -> __m512 {
            // SAFETY: as for `load_f16`. The sign moves to the top, the other bits to where f16 has them.
            unsafe {
                let wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())), 7);
                _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(0xbfff_u16 as i16)))
            }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> __m512 {
            // SAFETY: as for `load`.
            unsafe { low(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn store_f16(self, to: *mut u16, v: __m512) {
            // SAFETY: as for `load_f16`.
            unsafe {
                _mm256_storeu_si256(
                    to.cast(),
                    _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                )
            }
        }
    };
}

impl Simd for Avx512 {
    common!();

    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: __m512) {
        // SAFETY: `self` proves the features; the caller vouches for the memory.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(narrow(v))) }
    }

    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(narrow(v), 16)) }
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const u32) -> __m512i {
        // SAFETY: `self` proves the features; the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_pairs_halves(self, low: *const u32, high: *const u32) -> __m512i {
        // SAFETY: `self` proves the features; the caller vouches for the memory.
        unsafe { join(low.cast(), high.cast()) }
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(pair as i32) }
    }

    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), acc)) }
    }
}

impl Simd for Avx512Bf16 {
    common!();

    type Pairs = __m512bh;

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: __m512) {
        // SAFETY: `self` proves the features; the caller vouches for the memory. Both are 32 bytes of plain data.
        unsafe { to.cast::<__m256bh>().write_unaligned(_mm512_cvtneps_pbh(v)) }
    }

    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(v)) }
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const u32) -> __m512bh {
        // SAFETY: the caller vouches for the memory; both are 64 bytes of plain data.
        unsafe { from.cast::<__m512bh>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_pairs_halves(self, low: *const u32, high: *const u32) -> __m512bh {
        // SAFETY: `self` proves the features; the caller vouches for the memory; both types are 64 bytes of plain data.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(join(low.cast(), high.cast())) }
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> __m512bh {
        // SAFETY: `self` proves the features; both are 64 bytes of plain data.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair as i32)) }
    }

    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_dpbf16_ps(acc, a, b) }
    }
}
