//! Selections of clusters, and attention to those that enter as one pseudo-token each.
//!
//! A pseudo-token's score was computed already, by `score`; so all that attention lacks are weighted sums of mean values. They are
//! made here, and `attention` merges the result like that of one more split.
//!
//! Digests lie far apart, so what costs is to fetch them: their places are computed once, sizes and mean values are read
//! by whole vectors, and the next ones are fetched while these are worked on.

use ops::BlockIndex;
use ops::DType;
use ops::cluster::ClusterLayout;
use ops::sparse::{RowPlan, mark};

use crate::digest::Digests;
use crate::memory::LINE_BYTES;
use crate::merge::{carry_stride, head_stride};
use crate::select::each_best;
use crate::simd::{LANES, Simd};
use crate::tile::{Bf16, Element, F16, F32};

/// Digests that are fetched ahead.
const AHEAD: usize = 8;

/// Vectors of a mean value whose sums are in flight at a time: enough to hide the latency of an addition.
const TOGETHER: usize = 4;

/// The clusters of a row and KV head.
pub(crate) struct Clusters<'a> {
    pub(crate) digests: &'a Digests,
    pub(crate) layer: usize,
    /// Block table of the sequence.
    pub(crate) table: &'a [BlockIndex],
    pub(crate) head: usize,
    /// Where attention to pseudo-tokens goes: a line of [`carry_stride`] floats per query head of the group.
    pub(crate) to: &'a mut [f32],
}

/// Memory of a selection, each of one value per candidate.
pub(crate) struct ClusterScratch<'a> {
    /// Scores as integers of the same order.
    pub(crate) keys: &'a mut [u32],
    /// As [`Clusters::read_sizes`] made them.
    pub(crate) offsets: &'a [usize],
    pub(crate) sizes: &'a [u32],
    pub(crate) picked: &'a mut Vec<u32>,
    pub(crate) weights: &'a mut [f32],
}

/// Bytes of 16 values of a digest.
const fn vector_bytes<E: Element>() -> usize {
    E::VECTOR_BYTES / E::K_PER_STEP
}

impl Clusters<'_> {
    fn layout(&self) -> ClusterLayout {
        ClusterLayout { head_dim: self.digests.head_dim() }
    }

    /// Where the digest of each cluster is in its layer, and how many tokens it has.
    #[inline(always)]
    pub(crate) fn read_sizes<S: Simd>(&self, s: S, offsets: &mut [usize], sizes: &mut [u32]) {
        self.digests.offsets(self.table, self.head, offsets);
        match self.digests.dtype() {
            DType::Bf16 => self.read_sizes_as::<S, Bf16>(s, offsets, sizes),
            DType::F16 => self.read_sizes_as::<S, F16>(s, offsets, sizes),
            DType::F32 => self.read_sizes_as::<S, F32>(s, offsets, sizes),
        }
    }

    #[inline(always)]
    fn read_sizes_as<S: Simd, E: Element>(&self, s: S, offsets: &[usize], sizes: &mut [u32]) {
        let at = self.layout().size_at() * self.digests.dtype().bytes();
        for (i, (&offset, size)) in offsets.iter().zip(sizes).enumerate() {
            self.fetch(s, offsets, i + AHEAD, at, 2);
            let mut values = [0.0; LANES];
            // SAFETY: the array holds a vector.
            unsafe { s.store(values.as_mut_ptr(), self.vector::<S, E>(s, offset, at)) };
            *size = ClusterLayout::size(values[0], values[1]) as u32;
        }
    }

    /// 16 values of the digest at `offset`, from byte `at` on.
    #[inline(always)]
    fn vector<S: Simd, E: Element>(&self, s: S, offset: usize, at: usize) -> S::V {
        let from = &self.digests.layer(self.layer)[offset + at..][..vector_bytes::<E>()];
        // SAFETY: 16 values of the digests' type.
        unsafe { E::widen(s, from.as_ptr()) }
    }

    /// Fetches `count` values of a digest into the cache, from byte `at` on, if there is an `i`-th.
    #[inline(always)]
    fn fetch<S: Simd>(&self, s: S, offsets: &[usize], i: usize, at: usize, count: usize) {
        let Some(&offset) = offsets.get(i) else { return };
        let from = self.digests.layer(self.layer).as_ptr().wrapping_add(offset + at);
        for line in (0..count * self.digests.dtype().bytes()).step_by(LINE_BYTES) {
            s.prefetch(from.wrapping_add(line));
        }
    }

    /// Marks the slots of the best clusters, and attends to the best of the others by what `line` says of each query head; returns
    /// how many those are.
    #[inline(always)]
    pub(crate) fn select<'l, S: Simd>(
        self,
        s: S,
        plan: &RowPlan,
        work: ClusterScratch,
        line: impl Fn(usize) -> &'l [f32],
        bits: &mut [u64],
    ) -> usize {
        match self.digests.dtype() {
            DType::Bf16 => self.select_as::<S, Bf16>(s, plan, work, line, bits),
            DType::F16 => self.select_as::<S, F16>(s, plan, work, line, bits),
            DType::F32 => self.select_as::<S, F32>(s, plan, work, line, bits),
        }
    }

    #[inline(always)]
    fn select_as<'l, S: Simd, E: Element>(
        self,
        s: S,
        plan: &RowPlan,
        work: ClusterScratch,
        line: impl Fn(usize) -> &'l [f32],
        bits: &mut [u64],
    ) -> usize {
        let ClusterScratch { keys, offsets, sizes, picked, weights } = work;
        let mut left = 0;
        for (key, &size) in keys.iter_mut().zip(sizes) {
            // Below every other.
            *key = if size == 0 { 0 } else { (*key).max(1) };
            left += usize::from(size > 0);
        }
        picked.clear();
        each_fitting(keys, sizes, plan.room, |i| picked.push(i as u32));
        // Behind the sinks clusters lie one after the other, and a span is as long as its clusters together.
        let (mut slot, mut cluster) = (plan.sink_end, 0);
        for taken in picked.iter().map(|&taken| taken as usize) {
            slot += sizes[cluster..taken].iter().sum::<u32>() as usize;
            let end = slot + sizes[taken] as usize;
            mark(bits, slot..end);
            (slot, cluster) = (end, taken + 1);
            keys[taken] = 0;
        }
        let estimated = plan.estimated.min(left - picked.len());
        picked.clear();
        if estimated > 0 {
            each_best(keys, estimated, |i| picked.push(i as u32));
            self.estimate::<S, E>(s, offsets, sizes, picked, weights, line);
        }
        estimated
    }

    /// Weighted mean values, maximum and sum for each query head: with `x = q . c log2(e) / sqrt(head_dim)` the weight of a cluster
    /// of `n` tokens is `n 2^(x - max)`. Sums run over `clusters`, which ascend.
    #[inline(always)]
    fn estimate<'l, S: Simd, E: Element>(
        self,
        s: S,
        offsets: &[usize],
        sizes: &[u32],
        clusters: &[u32],
        weights: &mut [f32],
        line: impl Fn(usize) -> &'l [f32],
    ) {
        let (d, bytes) = (self.digests.head_dim(), self.digests.dtype().bytes());
        let (at, stride) = (self.layout().value_at() * bytes, head_stride(d));
        let factor = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let weights = &mut weights[..clusters.len()];
        for g in 0..self.to.len() / carry_stride(d) {
            let scores = line(g);
            let mut max = f32::NEG_INFINITY;
            for (weight, &cluster) in weights.iter_mut().zip(clusters) {
                *weight = scores[cluster as usize];
                max = max.max(*weight);
            }
            for some in weights.chunks_mut(LANES) {
                let n = some.len();
                // SAFETY: so many there are.
                unsafe {
                    let x = s.sub(s.load_part(some.as_ptr(), n), s.splat(max));
                    s.store_part(some.as_mut_ptr(), s.exp2(s.mul(x, s.splat(factor))), n);
                }
            }
            let mut sum = 0.0;
            for (weight, &cluster) in weights.iter_mut().zip(clusters) {
                *weight *= sizes[cluster as usize] as f32;
                sum += *weight;
            }
            let mut first = 0;
            while first < stride {
                let vectors = ((stride - first) / LANES).min(TOGETHER);
                let mut sums = [s.splat(0.0); TOGETHER];
                for (i, (&weight, &cluster)) in weights.iter().zip(clusters).enumerate() {
                    if let Some(&next) = clusters.get(i + AHEAD) {
                        self.fetch(s, offsets, next as usize, at + first * bytes, vectors * LANES);
                    }
                    let (weight, at) = (s.splat(weight), at + first * bytes);
                    for v in 0..TOGETHER {
                        if v < vectors {
                            let at = at + v * vector_bytes::<E>();
                            let value = self.vector::<S, E>(s, offsets[cluster as usize], at);
                            sums[v] = s.mul_add(value, weight, sums[v]);
                        }
                    }
                }
                for v in 0..vectors {
                    let to = &mut self.to[g * carry_stride(d) + first + v * LANES..][..LANES];
                    // SAFETY: a vector is there.
                    unsafe { s.store(to.as_mut_ptr(), sums[v]) };
                }
                first += vectors * LANES;
            }
            let rest = &mut self.to[g * carry_stride(d) + stride..];
            (rest[0], rest[1]) = (max * factor, sum);
        }
    }
}

/// Visits, in ascending order, the places of the largest keys up to the first whose size is more than is left of `room`; of equal
/// keys the first come first. A size of 0 is nobody's.
#[inline(always)]
fn each_fitting(keys: &[u32], sizes: &[u32], room: usize, mut visit: impl FnMut(usize)) {
    let as_large = |least: u32| {
        let mut sum = 0u32;
        for (&key, &size) in keys.iter().zip(sizes) {
            sum += if key >= least { size } else { 0 };
        }
        sum as usize
    };
    // The largest key that does not fit with all that are as large; 0 if all fit.
    let mut cut = 0u32;
    for bit in (0..32).rev() {
        let candidate = cut | 1 << bit;
        if as_large(candidate) > room {
            cut = candidate;
        }
    }
    let mut left = room - cut.checked_add(1).map_or(0, as_large);
    for (i, (&key, &size)) in keys.iter().zip(sizes).enumerate() {
        if key > cut {
            visit(i);
        } else if key == cut && size > 0 {
            if size as usize <= left {
                left -= size as usize;
                visit(i);
            } else {
                // Those that are equal and come later are smaller in order.
                left = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    #[test]
    fn what_fits_is_what_a_sorted_list_takes() {
        let mut random = Random::new(12);
        for count in [1, 2, 17, 300] {
            for distinct in [1, 3, 1 << 30] {
                let sizes: Vec<u32> = (0..count).map(|_| random.below(6) as u32).collect();
                let key = |&size: &u32| if size == 0 { 0 } else { 1 + random.below(distinct) as u32 };
                let mut keys: Vec<u32> = sizes.iter().map(key).collect();
                keys[0] = if sizes[0] == 0 { 0 } else { u32::MAX };
                let mut order: Vec<usize> = (0..count).filter(|&i| sizes[i] > 0).collect();
                order.sort_by_key(|&i| (std::cmp::Reverse(keys[i]), i));
                for room in 0..=sizes.iter().sum::<u32>() as usize + 1 {
                    let mut left = room;
                    let mut expected = Vec::new();
                    for &i in &order {
                        if sizes[i] as usize > left {
                            break;
                        }
                        left -= sizes[i] as usize;
                        expected.push(i);
                    }
                    expected.sort_unstable();
                    let mut found = Vec::new();
                    each_fitting(&keys, &sizes, room, |i| found.push(i));
                    assert_eq!(found, expected, "seed 12: {room} of {keys:?} {sizes:?}");
                }
            }
        }
    }
}
