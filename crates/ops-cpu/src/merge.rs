//! Results of splits, and what becomes of them: merged in ascending order, divided, written.

use crate::simd::{LANES, Simd};
use crate::tile::round_to_lanes;
use crate::view::HeadView;

/// Below any finite maximum: `-inf - LOWEST` is `-inf` where `-inf - -inf` would be no number.
const LOWEST: f32 = f32::MIN / 4.0;

/// Floats of one line of weighted values.
pub(crate) const fn head_stride(head_dim: usize) -> usize {
    round_to_lanes(head_dim)
}

/// The result of one split: per line the maximum of the scores, the sum of the weights, and the weighted values.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    pub(crate) max: *mut f32,
    pub(crate) sum: *mut f32,
    pub(crate) values: *mut f32,
}

impl Partial {
    /// Floats of a result.
    pub const fn len(height: usize, head_dim: usize) -> usize {
        2 * round_to_lanes(height) + height * head_stride(head_dim)
    }

    /// The result that lies at `start`.
    ///
    /// # Safety
    /// [`Partial::len`] floats from there are valid.
    pub unsafe fn at(start: *mut f32, height: usize) -> Self {
        let padded = round_to_lanes(height);
        // SAFETY: the caller's promise.
        unsafe { Partial { max: start, sum: start.add(padded), values: start.add(2 * padded) } }
    }
}

/// Results merged so far, laid out as one.
#[derive(Debug)]
pub struct Running(pub(crate) Partial);

/// Adds the result of a split to those merged before:
/// `m' = max(m, m_s)`, `l' = l 2^(m - m') + l_s 2^(m_s - m')`, and values as sums.
///
/// # Safety
/// Both are valid for the view's height.
#[inline(always)]
pub unsafe fn merge<S: Simd>(s: S, view: &HeadView, running: &mut Running, split: Partial) {
    let Running(old) = running;
    let height = view.height();
    let stride = head_stride(view.head_dim);
    let (mut old_scale, mut new_scale) = ([0.0; LANES], [0.0; LANES]);
    let mut first = 0;
    while first < height {
        // SAFETY: the caller's promise; maxima and sums have room for whole vectors. What lies in lanes past the height
        // is never used.
        unsafe {
            let (old_max, new_max) = (s.load(old.max.add(first)), s.load(split.max.add(first)));
            let max = s.max(old_max, new_max);
            let finite = s.max(max, s.splat(LOWEST));
            let a = s.exp2(s.sub(old_max, finite));
            let b = s.exp2(s.sub(new_max, finite));
            let sum = s.mul(s.load(old.sum.add(first)), a);
            s.store(old.max.add(first), max);
            s.store(old.sum.add(first), s.mul_add(s.load(split.sum.add(first)), b, sum));
            s.store(old_scale.as_mut_ptr(), a);
            s.store(new_scale.as_mut_ptr(), b);
            for i in 0..(height - first).min(LANES) {
                let (a, b) = (s.splat(old_scale[i]), s.splat(new_scale[i]));
                let mut c = 0;
                while c < stride {
                    let at = (first + i) * stride + c;
                    let v = s.mul(s.load(old.values.add(at)), a);
                    s.store(old.values.add(at), s.mul_add(s.load(split.values.add(at)), b, v));
                    c += LANES;
                }
            }
        }
        first += LANES;
    }
}

/// Floats that keep a line from one wave to the next: weighted values, then maximum and sum.
pub const fn carry_stride(head_dim: usize) -> usize {
    head_stride(head_dim) + LANES
}

/// Copies results merged so far to `carry`, which holds lines of [`carry_stride`] floats, those of a row `row_stride` lines
/// after those of the row before.
///
/// # Safety
/// The result is valid for the view's height, and `carry` for its lines.
#[inline(always)]
pub unsafe fn put_away(view: &HeadView, running: &Running, carry: *mut f32, row_stride: usize) {
    let Running(result) = running;
    let (stride, line_stride) = (head_stride(view.head_dim), carry_stride(view.head_dim));
    for line in 0..view.height() {
        let (row, g) = (line / view.group, line % view.group);
        // SAFETY: the caller's promise.
        unsafe {
            let to = carry.add((row * row_stride + g) * line_stride);
            to.copy_from_nonoverlapping(result.values.add(line * stride), stride);
            *to.add(stride) = *result.max.add(line);
            *to.add(stride + 1) = *result.sum.add(line);
        }
    }
}

/// Copies them back.
///
/// # Safety
/// As for [`put_away`].
#[inline(always)]
pub unsafe fn take_up(view: &HeadView, running: &mut Running, carry: *const f32, row_stride: usize) {
    let Running(result) = running;
    let (stride, line_stride) = (head_stride(view.head_dim), carry_stride(view.head_dim));
    for line in 0..view.height() {
        let (row, g) = (line / view.group, line % view.group);
        // SAFETY: the caller's promise.
        unsafe {
            let from = carry.add((row * row_stride + g) * line_stride);
            result.values.add(line * stride).copy_from_nonoverlapping(from, stride);
            *result.max.add(line) = *from.add(stride);
            *result.sum.add(line) = *from.add(stride + 1);
        }
    }
}

/// Divides by the sums and writes the output, and the natural logarithms of what the sums stand for where they are wanted.
///
/// # Safety
/// The view is valid and the result too, for its height.
#[inline(always)]
pub unsafe fn finish<S: Simd>(s: S, view: &HeadView, running: &Running) {
    let Running(result) = running;
    for line in 0..view.height() {
        let (row, g) = (line / view.group, line % view.group);
        // SAFETY: the caller's promise.
        unsafe {
            let scale = s.splat(1.0 / *result.sum.add(line));
            let out = view.out.add(row * view.out_stride + g * view.head_dim);
            let values = result.values.add(line * head_stride(view.head_dim));
            let mut c = 0;
            while c < view.head_dim {
                let n = (view.head_dim - c).min(LANES);
                s.store_part(out.add(c), s.mul(s.load(values.add(c)), scale), n);
                c += LANES;
            }
            if let Some((lse, stride)) = view.lse {
                // Scores are in powers of two.
                let log2 = *result.max.add(line) + (*result.sum.add(line)).log2();
                *lse.add(row * stride + g) = log2 * std::f32::consts::LN_2;
            }
        }
    }
}
