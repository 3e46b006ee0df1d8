//! Digests and queries of a learned gate: see [`ops::Gate`].
//!
//! Both are products of a small matrix with one vector. Weights lie with outputs innermost, so that a product vectorises over
//! outputs and its sums run over inputs in ascending order. A digest is made once per partition; of its cost, sines and cosines
//! of the positions are as much as the product, so all KV heads share them. A query is made once per row and layer, before
//! its candidates are scored.

use ops::{Error, HeadShape};

use crate::digest::Keys;
use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, PerThread};
use crate::pages::HEAD_DIM_MAX;
use crate::simd::{LANES, Simd};

/// Vectors of outputs that are summed together: enough to hide the latency of an addition.
const TOGETHER: usize = 4;

/// The weights of a gate, as the kernels read them.
#[derive(Debug)]
pub(crate) struct Gate {
    isa: Isa,
    heads: HeadShape,
    dim: usize,
    /// `[layer][kv head][3 * head_dim][padded dim]`.
    k: Buffer<f32>,
    /// `[layer][kv head][group * head_dim][padded dim]`.
    q: Buffer<f32>,
    inv_freq: Vec<f32>,
    /// Of the digest's own pairs.
    inv_freq_own: Vec<f32>,
    scale: f32,
    /// Cosines, then sines, of the positions of a partition: `[position][head_dim / 2]` each.
    angles: PerThread<Vec<f32>>,
}

impl Gate {
    /// Packs `gate` for partitions of `partition_tokens`.
    ///
    /// # Errors
    /// Memory.
    pub(crate) fn new(
        isa: Isa,
        gate: &ops::Gate,
        partition_tokens: usize,
        threads: usize,
    ) -> Result<Self, Error> {
        let HeadShape { head_dim, .. } = gate.heads;
        let (dim, padded) = (gate.dim, gate.dim.next_multiple_of(LANES));
        let pack = |weights: &[f32], cols: usize| {
            let mut packed = Buffer::zeroed(weights.len() / dim * padded, "the gate")?;
            let matrices = packed.as_mut_slice().chunks_exact_mut(cols * padded);
            for (to, from) in matrices.zip(weights.chunks_exact(cols * dim)) {
                for (output, row) in from.chunks_exact(cols).enumerate() {
                    row.iter().enumerate().for_each(|(input, &w)| to[input * padded + output] = w);
                }
            }
            Ok::<_, Error>(packed)
        };
        Ok(Gate {
            isa,
            heads: gate.heads,
            dim,
            k: pack(&gate.k, 3 * head_dim)?,
            q: pack(&gate.q, gate.heads.group() * head_dim)?,
            inv_freq: gate.inv_freq.clone(),
            inv_freq_own: (0..dim / 2).map(|c| gate.inv_freq_of(c)).collect(),
            scale: gate.scale,
            angles: PerThread::new(threads, || vec![0.0; partition_tokens * head_dim]),
        })
    }

    /// Computes the angles of `positions` for the digests of their partition that `thread` makes next.
    ///
    /// # Safety
    /// `thread` is the running one.
    pub(crate) unsafe fn turn_to(&self, positions: std::ops::Range<usize>, thread: usize) -> &[f32] {
        // SAFETY: the caller's promise.
        let angles = unsafe { &mut *self.angles.get(thread) };
        let half = self.heads.head_dim / 2;
        let (cos, sin) = angles.split_at_mut(positions.len() * half);
        for (i, position) in positions.enumerate() {
            for (c, &f) in self.inv_freq.iter().enumerate() {
                (sin[i * half + c], cos[i * half + c]) = (position as f32 * f).sin_cos();
            }
        }
        angles
    }

    /// The digest of `keys`, in f32 and not rounded, with the angles of their positions.
    pub(crate) fn digest(&self, keys: &Keys, angles: &[f32], to: &mut [f32; 2 * HEAD_DIM_MAX]) {
        let d = self.heads.head_dim;
        let half = d / 2;
        let (count, start) = (keys.positions.len(), keys.positions.start);
        let mut max = [f32::NEG_INFINITY; HEAD_DIM_MAX];
        let mut min = [f32::INFINITY; HEAD_DIM_MAX];
        let mut mean = [0.0; HEAD_DIM_MAX];
        let (cos, sin) = angles.split_at(count * half);
        keys.each_key(|i, key| {
            let angle = (&cos[i * half..][..half], &sin[i * half..][..half]);
            unrotate(key, angle, self.scale, |c, k| {
                max[c] = max[c].max(k);
                min[c] = min[c].min(k);
                mean[c] += k;
            });
        });
        mean[..d].iter_mut().for_each(|sum| *sum /= count as f32);
        let mut sums = [0.0; HEAD_DIM_MAX];
        for (part, pooled) in [&max, &min, &mean].into_iter().enumerate() {
            self.add(&self.k, (keys.layer, keys.head), (part, 3), &pooled[..d], &mut sums);
        }
        self.rotate(&sums, start, 1.0, to);
    }

    /// The query of KV head `head` for a row at `position` whose group has the rotated `queries`, `[group][head_dim]`: scaled, so
    /// that its dot product with a digest is a score.
    pub(crate) fn query(&self, layer: usize, head: usize, queries: &[f32], position: usize, to: &mut [f32]) {
        let (group, d) = (self.heads.group(), self.heads.head_dim);
        let mut angles = [[0.0; HEAD_DIM_MAX / 2]; 2];
        for (c, &f) in self.inv_freq.iter().enumerate() {
            (angles[1][c], angles[0][c]) = (position as f32 * f).sin_cos();
        }
        let mut sums = [0.0; HEAD_DIM_MAX];
        for (part, query) in queries.chunks_exact(d).enumerate() {
            let mut x = [0.0; HEAD_DIM_MAX];
            unrotate(query, (&angles[0][..d / 2], &angles[1][..d / 2]), self.scale, |c, q| x[c] = q);
            self.add(&self.q, (layer, head), (part, group), &x[..d], &mut sums);
        }
        self.rotate(&sums, position, 1.0 / (self.dim as f32).sqrt(), to);
    }

    /// Adds the product of `x` with its share of a matrix: `part` of `parts` times head_dim inputs.
    fn add(
        &self,
        weights: &Buffer<f32>,
        (layer, head): (usize, usize),
        (part, parts): (usize, usize),
        x: &[f32],
        sums: &mut [f32; HEAD_DIM_MAX],
    ) {
        let padded = self.dim.next_multiple_of(LANES);
        let at = ((layer * self.heads.kv_heads + head) * parts + part) * x.len() * padded;
        let weights = &weights.as_slice()[at..][..x.len() * padded];
        self.isa.run(Product { weights, x, sums: &mut sums[..padded] });
    }

    /// RoPE of a digest or query, times `factor`.
    fn rotate(&self, sums: &[f32; HEAD_DIM_MAX], position: usize, factor: f32, to: &mut [f32]) {
        let half = self.dim / 2;
        let scale = self.scale * factor;
        for (c, &f) in self.inv_freq_own.iter().enumerate() {
            let (sin, cos) = (position as f32 * f).sin_cos();
            let (a, b) = (sums[c], sums[c + half]);
            (to[c], to[c + half]) = ((a * cos - b * sin) * scale, (b * cos + a * sin) * scale);
        }
    }
}

/// Visits channel and value of `x` before RoPE.
fn unrotate(x: &[f32], (cos, sin): (&[f32], &[f32]), scale: f32, mut visit: impl FnMut(usize, f32)) {
    let (a, b) = x.split_at(x.len() / 2);
    for (c, ((&a, &b), (&cos, &sin))) in a.iter().zip(b).zip(cos.iter().zip(sin)).enumerate() {
        visit(c, (a * cos + b * sin) / scale);
        visit(c + x.len() / 2, (b * cos - a * sin) / scale);
    }
}

/// `sums += x W`, with `W` `[x.len()][sums.len()]` and whole vectors of outputs.
struct Product<'a> {
    weights: &'a [f32],
    x: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Product { weights, x, sums } = self;
        let mut at = 0;
        while at < sums.len() {
            if sums.len() - at >= TOGETHER * LANES {
                outputs::<S, TOGETHER>(s, weights, x, sums, at);
                at += TOGETHER * LANES;
            } else {
                outputs::<S, 1>(s, weights, x, sums, at);
                at += LANES;
            }
        }
    }
}

/// The `N` vectors of sums from output `at` on.
#[inline(always)]
fn outputs<S: Simd, const N: usize>(s: S, weights: &[f32], x: &[f32], sums: &mut [f32], at: usize) {
    let cols = sums.len();
    let to = sums[at..at + N * LANES].as_mut_ptr();
    let mut acc = [s.splat(0.0); N];
    for i in 0..N {
        // SAFETY: `N` vectors of outputs begin at `at`.
        acc[i] = unsafe { s.load(to.add(i * LANES)) };
    }
    for (input, &x) in x.iter().enumerate() {
        let row = weights[input * cols + at..][..N * LANES].as_ptr();
        let x = s.splat(x);
        for i in 0..N {
            // SAFETY: `N` vectors lie in the row.
            acc[i] = s.mul_add(x, unsafe { s.load(row.add(i * LANES)) }, acc[i]);
        }
    }
    for i in 0..N {
        // SAFETY: as above.
        unsafe { s.store(to.add(i * LANES), acc[i]) };
    }
}
