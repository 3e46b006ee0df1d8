//! Selections of clusters, and attention to those that enter as one pseudo-token each.
//!
//! A pseudo-token's score was computed already, by `score`; so all that attention lacks are weighted sums of mean values. They are
//! made here, beside the clusters' sizes, and `attention` merges the result like that of one more split.

use ops::BlockIndex;
use ops::cluster::{ClusterLayout, NO_CLUSTER};
use ops::sparse::{RowPlan, order_key};

use crate::digest::Digests;
use crate::merge::{carry_stride, head_stride};
use crate::pages::HEAD_DIM_MAX;
use crate::simd::{LANES, Simd};

/// A cluster is neither attended to nor estimated.
const LEFT_OUT: u32 = 0;
/// Its tokens are attended to.
const TAKEN: u32 = 1;
/// It becomes a pseudo-token of so many tokens, plus this.
const ESTIMATED: u32 = 2;

/// The clusters of a row and KV head.
pub(crate) struct Clusters<'a> {
    pub(crate) digests: &'a Digests,
    pub(crate) layer: usize,
    /// Block table of the sequence.
    pub(crate) table: &'a [BlockIndex],
    pub(crate) head: usize,
    pub(crate) span_tokens: usize,
    /// Where attention to pseudo-tokens goes: a line of [`carry_stride`] floats per query head of the group.
    pub(crate) to: &'a mut [f32],
}

/// Memory of a selection, each of one value per candidate.
pub(crate) struct Chosen<'a> {
    pub(crate) plan: &'a RowPlan,
    pub(crate) order: &'a mut [u64],
    /// Sizes of clusters, then what becomes of them.
    pub(crate) fates: &'a mut [u32],
    pub(crate) masked: &'a mut [f32],
}

impl Clusters<'_> {
    fn layout(&self) -> ClusterLayout {
        ClusterLayout { head_dim: self.digests.head_dim() }
    }

    /// How many tokens each cluster has.
    pub(crate) fn sizes(&self, to: &mut [u32]) {
        let (at, dtype) = (self.layout().size_at(), self.digests.dtype());
        for (partition, to) in to.iter_mut().enumerate() {
            let digest = self.digests.digest(self.layer, self.table, partition, self.head);
            *to = ClusterLayout::size(dtype.read(digest, at), dtype.read(digest, at + 1)) as u32;
        }
    }

    /// Marks the slots of the best clusters by `scores`, and attends to the best of the others by what `line` says of each query
    /// head; returns how many those are.
    #[inline(always)]
    pub(crate) fn select<'l, S: Simd>(
        self,
        s: S,
        scores: &[f32],
        chosen: Chosen,
        line: impl Fn(usize) -> &'l [f32],
        bits: &mut [u64],
    ) -> usize {
        let Chosen { plan, order, fates, masked } = chosen;
        let mut filled = 0;
        for (partition, (&score, &size)) in scores.iter().zip(&*fates).enumerate() {
            if size > 0 {
                order[filled] = u64::from(!order_key(score)) << 32 | partition as u64;
                filled += 1;
            }
        }
        let order = &mut order[..filled];
        // Each that is taken has a token at least.
        let looked_at = (plan.room + 1 + plan.estimated).min(filled);
        if looked_at < filled {
            order.select_nth_unstable(looked_at);
        }
        let order = &mut order[..looked_at];
        order.sort_unstable();
        let cluster = |key: u64| key as u32 as usize;
        let mut room = plan.room;
        let taken = order.iter().take_while(|&&key| {
            let size = fates[cluster(key)] as usize;
            let fits = size <= room;
            room -= if fits { size } else { 0 };
            fits
        });
        let taken = taken.count();
        let estimated = plan.estimated.min(looked_at - taken);
        // Sizes of the others are needed no more.
        for partition in order[taken..taken + estimated].iter().map(|&key| cluster(key)) {
            fates[partition] |= 1 << 31;
        }
        for fate in fates.iter_mut() {
            *fate = if *fate >> 31 == 1 { (*fate & !(1 << 31)) + ESTIMATED } else { LEFT_OUT };
        }
        order[..taken].iter().for_each(|&key| fates[cluster(key)] = TAKEN);
        if taken > 0 {
            self.mark(fates, bits);
        }
        if estimated > 0 {
            self.estimate(s, fates, masked, line);
        }
        estimated
    }

    /// Marks the slots of the clusters that are taken.
    fn mark(&self, fates: &[u32], bits: &mut [u64]) {
        let (at, dtype) = (self.layout().ids_at(), self.digests.dtype());
        let length = self.digests.spec().partition_tokens;
        let per_span = self.span_tokens / length;
        for (span, fates) in fates.chunks_exact(per_span).enumerate() {
            if !fates.contains(&TAKEN) {
                continue;
            }
            for partition in span * per_span..(span + 1) * per_span {
                let digest = self.digests.digest(self.layer, self.table, partition, self.head);
                for token in 0..length {
                    let id = dtype.read(digest, at + token) as u16;
                    if id != NO_CLUSTER && fates[id as usize] == TAKEN {
                        let slot = partition * length + token;
                        bits[slot / 64] |= 1 << (slot % 64);
                    }
                }
            }
        }
    }

    /// Weighted mean values, maximum and sum for each query head: with `x = q . c log2(e) / sqrt(head_dim)` the weight of a cluster
    /// of `n` tokens is `n 2^(x - max)`. Sums run over clusters in ascending order.
    #[inline(always)]
    fn estimate<'l, S: Simd>(
        self,
        s: S,
        fates: &[u32],
        weights: &mut [f32],
        line: impl Fn(usize) -> &'l [f32],
    ) {
        let d = self.digests.head_dim();
        let (at, dtype, stride) = (self.layout().value_at(), self.digests.dtype(), head_stride(d));
        let factor = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let is_estimated = |partition: &usize| fates[*partition] >= ESTIMATED;
        for (g, to) in self.to.chunks_exact_mut(carry_stride(d)).enumerate() {
            let scores = line(g);
            let mut max = f32::NEG_INFINITY;
            for partition in (0..fates.len()).filter(is_estimated) {
                max = max.max(scores[partition]);
            }
            let (values, rest) = to.split_at_mut(stride);
            values.fill(0.0);
            let mut sum = 0.0;
            let mut value = [0.0; HEAD_DIM_MAX];
            for first in (0..fates.len()).step_by(LANES) {
                let n = (fates.len() - first).min(LANES);
                if !(first..first + n).any(|p| is_estimated(&p)) {
                    continue;
                }
                // SAFETY: `n` scores and weights are there.
                unsafe {
                    let x = s.sub(s.load_part(scores[first..first + n].as_ptr(), n), s.splat(max));
                    let x = s.exp2(s.mul(x, s.splat(factor)));
                    s.store_part(weights[first..first + n].as_mut_ptr(), x, n);
                }
                for partition in (first..first + n).filter(is_estimated) {
                    let weight = weights[partition] * (fates[partition] - ESTIMATED) as f32;
                    sum += weight;
                    let digest = self.digests.digest(self.layer, self.table, partition, self.head);
                    for (c, v) in value[..d].iter_mut().enumerate() {
                        *v = dtype.read(digest, at + c);
                    }
                    let mut c = 0;
                    while c < stride {
                        // SAFETY: both hold whole vectors.
                        unsafe {
                            let to = values[c..c + LANES].as_mut_ptr();
                            let v = s.load(value[c..c + LANES].as_ptr());
                            s.store(to, s.mul_add(v, s.splat(weight), s.load(to)));
                        }
                        c += LANES;
                    }
                }
            }
            (rest[0], rest[1]) = (max * factor, sum);
        }
    }
}
