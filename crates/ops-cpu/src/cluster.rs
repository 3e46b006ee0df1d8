//! Selections of clusters, and attention to those that enter as one pseudo-token each.
//!
//! A pseudo-token's score was computed already, by `score`; so all that attention lacks are weighted sums of mean values. They are
//! made here, and `attention` merges the result like that of one more split.
//!
//! Mean values lie far apart, so what costs is to fetch them: each is read and widened once for all query heads of a group, and the
//! next ones are fetched while these are worked on. Sizes come with the scores, as a line of their own. Measured as
//! [`crate::select`] says: 10.3 ms a step where each query head read sizes and mean values for itself, 5.0 now, 4.6 since 20 mean
//! values and not 8 are fetched ahead.

use ops::BlockIndex;
use ops::DType;
use ops::sparse::{RowPlan, mark};

use crate::digest::Digests;
use crate::memory::LINE_BYTES;
use crate::merge::{carry_stride, head_stride};
use crate::select::each_best;
use crate::simd::{LANES, Simd};
use crate::tile::{Bf16, Element, F16, F32};

/// Mean values that are fetched ahead.
const AHEAD: usize = 20;

/// Vectors of a mean value whose sums are in flight at a time, for each of as many query heads where there are 32 registers.
const TOGETHER: usize = 4;
const LINES: usize = 4;

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
    pub(crate) narrowed: &'a mut [u32],
    /// Tokens.
    pub(crate) sizes: &'a [u32],
    pub(crate) picked: &'a mut Vec<u32>,
    /// Where mean values are.
    pub(crate) offsets: &'a mut Vec<usize>,
    /// One per candidate and query head.
    pub(crate) weights: &'a mut [f32],
}

/// Bytes of 16 values of a digest.
const fn vector_bytes<E: Element>() -> usize {
    E::VECTOR_BYTES / E::K_PER_STEP
}

impl Clusters<'_> {
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
        let ClusterScratch { keys, narrowed, sizes, picked, offsets, weights } = work;
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
            each_best(s, keys, estimated, narrowed, |i| picked.push(i as u32));
            offsets.clear();
            offsets.extend(picked.iter().map(|&cluster| self.value_at(cluster as usize)));
            self.estimate::<S, E>(s, offsets, sizes, picked, weights, line);
        }
        estimated
    }

    /// Where in its layer the mean value of a cluster is.
    #[inline(always)]
    fn value_at(&self, cluster: usize) -> usize {
        let (block, within) = self.digests.block(self.table, cluster);
        let layout = self.digests.layout();
        block + layout.values_at + (self.head * layout.per_block + within) * layout.value_bytes
    }

    /// Weighted mean values, maximum and sum for each query head: with `x = q . c log2(e) / sqrt(head_dim)` the weight of a cluster
    /// of `n` tokens is `n 2^(x - max)`. Sums run over `clusters`, which ascend and whose mean values are at `offsets`.
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
        let (d, n) = (self.digests.head_dim(), clusters.len());
        let (stride, of_line) = (head_stride(d), carry_stride(d));
        let factor = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let group = self.to.len() / of_line;
        let values = self.digests.layer(self.layer);
        // The first of them, while their weights are computed.
        for &offset in &offsets[..AHEAD.min(n)] {
            for ahead in (0..d * vector_bytes::<E>() / LANES).step_by(LINE_BYTES) {
                s.prefetch(values.as_ptr().wrapping_add(offset + ahead));
            }
        }
        for (g, weights) in weights.chunks_exact_mut(n).enumerate().take(group) {
            let scores = line(g);
            for (weight, &cluster) in weights.iter_mut().zip(clusters) {
                *weight = scores[cluster as usize];
            }
            let mut max = s.splat(f32::NEG_INFINITY);
            let (vectors, rest) = weights.as_chunks::<LANES>();
            for vector in vectors {
                // SAFETY: a vector.
                max = s.max(unsafe { s.load(vector.as_ptr()) }, max);
            }
            let max = rest.iter().copied().fold(s.reduce_max(max), f32::max);
            for some in weights.chunks_mut(LANES) {
                let n = some.len();
                // SAFETY: so many there are.
                unsafe {
                    let x = s.sub(s.load_part(some.as_ptr(), n), s.splat(max));
                    s.store_part(some.as_mut_ptr(), s.exp2(s.mul(x, s.splat(factor))), n);
                }
            }
            for (weight, &cluster) in weights.iter_mut().zip(clusters) {
                *weight *= sizes[cluster as usize] as f32;
            }
            self.to[g * of_line + stride] = max * factor;
        }
        // Each in order, and several at a time, since an addition waits for the one before.
        for first in (0..group).step_by(LINES) {
            let mut sums = [0.0; LINES];
            let lines: [&[f32]; LINES] =
                std::array::from_fn(|l| &weights[(first + l).min(group - 1) * n..][..n]);
            for i in 0..n {
                for l in 0..LINES {
                    sums[l] += lines[l][i];
                }
            }
            for (l, &sum) in sums.iter().enumerate().take(group - first) {
                self.to[(first + l) * of_line + stride + 1] = sum;
            }
        }
        let mut sums = WeightedSums { values, offsets, weights, to: self.to, of_line };
        for first in (0..stride).step_by(TOGETHER * LANES) {
            let vectors = ((stride - first) / LANES).min(TOGETHER);
            let mut g = 0;
            while const { S::TILE_VECTORS > 1 } && g + LINES <= group {
                sums.add::<S, E, LINES>(s, g, first, vectors);
                g += LINES;
            }
            while g < group {
                sums.add::<S, E, 1>(s, g, first, vectors);
                g += 1;
            }
        }
    }
}

/// Sums of values at `offsets`, with weights `[line][value]`, to lines of `of_line` floats.
struct WeightedSums<'a> {
    values: &'a [u8],
    offsets: &'a [usize],
    weights: &'a [f32],
    to: &'a mut [f32],
    of_line: usize,
}

impl WeightedSums<'_> {
    /// Those of `L` lines from `line` on, `vectors` vectors of each from channel `first` on.
    #[inline(always)]
    fn add<S: Simd, E: Element, const L: usize>(&mut self, s: S, line: usize, first: usize, vectors: usize) {
        let at = first * vector_bytes::<E>() / LANES;
        let mut sums = [[s.splat(0.0); TOGETHER]; L];
        for (i, &offset) in self.offsets.iter().enumerate() {
            if let Some(&next) = self.offsets.get(i + AHEAD) {
                let next = self.values.as_ptr().wrapping_add(next + at);
                for ahead in (0..vectors * vector_bytes::<E>()).step_by(LINE_BYTES) {
                    s.prefetch(next.wrapping_add(ahead));
                }
            }
            let values = &self.values[offset + at..][..vectors * vector_bytes::<E>()];
            for v in 0..TOGETHER {
                if v < vectors {
                    // SAFETY: 16 values of their type.
                    let value = unsafe { E::widen(s, values.as_ptr().add(v * vector_bytes::<E>())) };
                    for l in 0..L {
                        let weight = s.splat(self.weights[(line + l) * self.offsets.len() + i]);
                        sums[l][v] = s.mul_add(value, weight, sums[l][v]);
                    }
                }
            }
        }
        for l in 0..L {
            for v in 0..vectors {
                let to = &mut self.to[(line + l) * self.of_line + first + v * LANES..][..LANES];
                // SAFETY: a vector is there.
                unsafe { s.store(to.as_mut_ptr(), sums[l][v]) };
            }
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
