//! No intrinsics. The compiler may vectorise the lane loops; nothing depends on it.

use half::{bf16, f16};

use super::{LANES, Simd};

/// Arrays of lanes.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(i);
    }
    out
}

/// `2^n` for `n` in `-126..=127`.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

/// Value `i` of 8 from `low` on and 8 from `high` on.
#[inline(always)]
fn half<T>(low: *const T, high: *const T, i: usize) -> *const T {
    if i < LANES / 2 { low.wrapping_add(i) } else { high.wrapping_add(i - LANES / 2) }
}

impl Simd for Scalar {
    const TILE_ROWS: usize = 2;
    const TILE_VECTORS: usize = 1;

    type V = [f32; LANES];
    type Pairs = [u32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_second(self, _: *const u8) {}

    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller's promise; lanes from `n` on are not read.
        lanes(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, v: Self::V, n: usize) {
        for i in 0..n.min(LANES) {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = v[i] };
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `f32::mul_add`: without the instruction that is a library call of many nanoseconds.
        lanes(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn keep(self, v: Self::V, mask: u16) -> Self::V {
        lanes(|i| if mask >> i & 1 == 1 { v[i] } else { f32::NEG_INFINITY })
    }

    #[inline(always)]
    fn where_above(self, x: Self::V, least: f32, v: Self::V) -> Self::V {
        lanes(|i| if x[i] > least { v[i] } else { 0.0 })
    }

    #[inline(always)]
    fn equal(self, a: Self::V, b: Self::V) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | u16::from(a[i] == b[i]) << i)
    }

    #[inline(always)]
    fn at_least(self, keys: &[u32; LANES], least: u32) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | u16::from(keys[i] >= least) << i)
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn reduce_sum(self, v: Self::V) -> f32 {
        v.into_iter().sum()
    }

    #[inline(always)]
    fn reduce_sums(self, v: [Self::V; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for i in 0..4 {
            sums[i] = self.reduce_sum(v[i]);
        }
        sums
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        lanes(|i| v[i].round_ties_even())
    }

    #[inline(always)]
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V {
        // In two steps, so that both factors are normal numbers.
        lanes(|i| {
            let n = n[i] as i32;
            v[i] * power(n / 2) * power(n - n / 2)
        })
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        lanes(|i| f16::from_bits(unsafe { *from.add(i) }).to_f32())
    }

    #[inline(always)]
    unsafe fn load_halves(self, low: *const f32, high: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        lanes(|i| unsafe { *half(low, high, i) })
    }

    #[inline(always)]
    unsafe fn load_f16_halves(self, low: *const u16, high: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        lanes(|i| f16::from_bits(unsafe { *half(low, high, i) }).to_f32())
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V {
        lanes(|i| {
            // SAFETY: the caller's promise.
            let code = u32::from(unsafe { *from.add(i) });
            // The bits of e4m3 where f32 has them make 2^-120 of its number.
            f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * power(112)
        })
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: Self::V) {
        for i in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = f16::from_f32(v[i]).to_bits() };
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        lanes(|i| bf16::from_bits(unsafe { *from.add(i) }).to_f32())
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: Self::V) {
        for i in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = bf16::from_f32(v[i]).to_bits() };
        }
    }

    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        lanes(|i| bf16::from_f32(v[i]).to_f32())
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const u32) -> Self::Pairs {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::Pairs>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_pairs_halves(self, low: *const u32, high: *const u32) -> Self::Pairs {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| unsafe { *half(low, high, i) })
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> Self::Pairs {
        [pair; LANES]
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
        lanes(|i| acc[i] + low(a[i]) * low(b[i]) + high(a[i]) * high(b[i]))
    }
}
