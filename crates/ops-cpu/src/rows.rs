//! Operations that treat each row alone: normalisation, activation, rotation angles, copies.

use std::ops::Range;

use ops::Tensor;

use crate::isa::{Isa, Kernel};
use crate::pack::{Linear, Vector};
use crate::pool::Pool;
use crate::simd::{LANES, Simd};
use crate::tensor::CpuTensor;

/// Values that are worth a task of their own; a fork for less costs more than it gains.
const VALUES_PER_TASK: usize = 16 * 1024;

/// Runs `row(i, out_row)` for all rows of `out`, several per task.
fn for_rows(pool: &mut Pool, out: &mut CpuTensor, row: impl Fn(usize, &mut [f32]) + Sync) {
    let (rows, cols, stride) = (out.rows(), out.cols(), out.stride());
    let to = out.shared();
    let per_task = (VALUES_PER_TASK / cols.max(1)).max(1);
    pool.run(rows.div_ceil(per_task), &|task, _| {
        for i in task * per_task..((task + 1) * per_task).min(rows) {
            // SAFETY: row `i` belongs to this task alone.
            row(i, unsafe { std::slice::from_raw_parts_mut(to.at(i * stride), cols) });
        }
    });
}

/// `out[at + i] = x[rows.start + i]`.
pub fn copy_rows(pool: &mut Pool, out: &mut CpuTensor, at: usize, x: &CpuTensor, rows: Range<usize>) {
    let (cols, stride) = (out.cols(), out.stride());
    assert_eq!(cols, x.cols(), "columns of rows that are copied");
    assert!(at + rows.len() <= out.rows() && rows.end <= x.rows(), "rows that are copied");
    let to = out.shared();
    let per_task = (VALUES_PER_TASK / cols.max(1)).max(1);
    pool.run(rows.len().div_ceil(per_task), &|task, _| {
        for i in task * per_task..((task + 1) * per_task).min(rows.len()) {
            // SAFETY: row `at + i` exists and belongs to this task alone.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at((at + i) * stride), cols) };
            out.copy_from_slice(x.row(rows.start + i));
        }
    });
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(isa: Isa, pool: &mut Pool, out: &mut CpuTensor, x: &CpuTensor, weight: &Vector, eps: f32) {
    assert_eq!((out.cols(), weight.dim()), (x.cols(), x.cols()), "columns of the normalisation");
    out.set_rows(x.rows());
    for_rows(pool, out, |i, out| isa.run(RmsNormRow { out, x: x.row(i), weight: weight.padded(), eps }));
}

/// `out = silu(gate) * up`.
pub fn swiglu(isa: Isa, pool: &mut Pool, out: &mut CpuTensor, gate_up: &CpuTensor) {
    let cols = out.cols();
    assert_eq!(gate_up.cols(), 2 * cols, "columns of gate and up");
    out.set_rows(gate_up.rows());
    for_rows(pool, out, |i, out| {
        let (gate, up) = gate_up.row(i).split_at(cols);
        isa.run(SwigluRow { out, gate, up });
    });
}

/// `[cos | sin] * scale` of `positions[i] * inv_freq[sets[i]]`. Once per step, not per layer, so the library's
/// functions, exact to the last bit or two at any angle, are fast enough.
pub fn rope_angles(
    pool: &mut Pool,
    out: &mut CpuTensor,
    positions: &[u32],
    inv_freq: &[f32],
    sets: &[u32],
    scale: f32,
) {
    let half = out.cols() / 2;
    assert_eq!(out.cols() % 2, 0, "angles come in pairs");
    assert_eq!(positions.len(), sets.len(), "one set per row");
    out.set_rows(positions.len());
    for_rows(pool, out, |i, out| {
        let set = &inv_freq[sets[i] as usize * half..][..half];
        let (cos, sin) = out.split_at_mut(half);
        for ((cos, sin), &f) in cos.iter_mut().zip(sin).zip(set) {
            let (s, c) = (positions[i] as f32 * f).sin_cos();
            (*cos, *sin) = (c * scale, s * scale);
        }
    });
}

/// `out[i] = table[tokens[i]]`.
pub fn embed(pool: &mut Pool, out: &mut CpuTensor, table: &Linear, tokens: &[u32]) {
    assert_eq!(out.cols(), table.cols(), "columns of the embedding");
    out.set_rows(tokens.len());
    for_rows(pool, out, |i, out| table.read_row(tokens[i] as usize, out));
}

/// `out[i] = x[rows[i]]`.
pub fn select_rows(pool: &mut Pool, out: &mut CpuTensor, x: &CpuTensor, rows: &[u32]) {
    assert_eq!(out.cols(), x.cols(), "columns of the selection");
    out.set_rows(rows.len());
    for_rows(pool, out, |i, out| out.copy_from_slice(x.row(rows[i] as usize)));
}

struct RmsNormRow<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: three slices of one length (the weight may be longer).
        unsafe {
            rms_norm_row(
                s,
                self.out.as_mut_ptr(),
                self.x.as_ptr(),
                self.weight.as_ptr(),
                self.x.len(),
                self.eps,
            )
        }
    }
}

/// Normalises `len` values; `out` and `x` may be the same.
///
/// # Safety
/// All pointers are valid for `len` values.
#[inline(always)]
pub(crate) unsafe fn rms_norm_row<S: Simd>(
    s: S,
    out: *mut f32,
    x: *const f32,
    weight: *const f32,
    len: usize,
    eps: f32,
) {
    // Four sums, since one would wait for its own latency.
    let mut sums = [s.splat(0.0); 4];
    let mut c = 0;
    // SAFETY: every access is below `len`.
    unsafe {
        while c + 4 * LANES <= len {
            for i in 0..4 {
                let v = s.load(x.add(c + i * LANES));
                sums[i] = s.mul_add(v, v, sums[i]);
            }
            c += 4 * LANES;
        }
        while c < len {
            let v = s.load_part(x.add(c), (len - c).min(LANES));
            sums[0] = s.mul_add(v, v, sums[0]);
            c += LANES;
        }
        let sum = s.reduce_sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
        let scale = s.splat(1.0 / (sum / len as f32 + eps).sqrt());
        c = 0;
        while c < len {
            let n = (len - c).min(LANES);
            let v = s.mul(s.mul(s.load_part(x.add(c), n), scale), s.load_part(weight.add(c), n));
            s.store_part(out.add(c), v, n);
            c += LANES;
        }
    }
}

struct SwigluRow<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SwigluRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut c = 0;
        while c < self.out.len() {
            let n = (self.out.len() - c).min(LANES);
            // SAFETY: three slices of one length, accessed below it.
            unsafe {
                let gate = s.load_part(self.gate.as_ptr().add(c), n);
                let up = s.load_part(self.up.as_ptr().add(c), n);
                s.store_part(self.out.as_mut_ptr().add(c), s.mul(s.silu(gate), up), n);
            }
            c += LANES;
        }
    }
}
