//! Clusters of keys, span by span (RetroInfer, Chen et al. 2025, arXiv 2505.02922): how they are found, and what of them is kept.
//!
//! The keys of a span, `n` tokens without the sinks, become `k` clusters:
//!
//! 1. `m = mean_j k_j`, `x_j = k_j - m`.
//! 2. Centroid `i` is at first `x_j` of the `floor(i n / k)`-th key.
//! 3. Ten times: each key goes to the cluster with the largest `x_j . c_i / |c_i|`, of equal ones the first; then `c_i` becomes
//!    the mean of its keys. A cluster that no key goes to keeps its centroid.
//! 4. The last assignment counts. Centroids are `m + c_i`, mean values those of the same tokens, sizes how many there are. An
//!    empty cluster has size 0, and zeros.
//!
//! Which slots a cluster has follows from this, and a sum in another order could move a token to another cluster. So this is no
//! formula that devices approximate: all of it is f32, rounded after every multiplication and every addition, and each sum has
//! the order that is written here.
//!
//! Clusters lie with the blocks of their span, as many as there are partitions: cluster `i` where partition `i` has its digest.
//!
//! The tokens of a cluster are scattered over its span, so every block has a second copy of its pages *in the order of clusters*:
//! [`order`] says which token is in which slot. What a row selects of spans it reads from there, in few pages.

use crate::BlockIndex;
use crate::sparse::padded_width;

/// Assignments of keys to clusters.
pub const ITERATIONS: usize = 10;

/// Clusters of a span at most: bf16 holds numbers up to this exactly.
pub const CLUSTERS_MAX: usize = 256;

/// Tokens of a partition whose digest is a cluster, at most: so many have a cluster on average.
pub const CLUSTER_TOKENS_MAX: usize = 64;

/// The cluster of a token that belongs to none.
pub const NO_CLUSTER: u16 = CLUSTERS_MAX as u16;

/// Clusters whose scores are computed side by side, and keys at a time.
const LANES: usize = 16;
const ROWS: usize = 4;

/// The digest of a partition: `[centroid | mean value | size / 256, size % 256 | cluster of each token]`. The first three are of
/// the cluster with the partition's number, the last of the partition's own tokens: clusters are numbered within their span.
/// Centroid and mean value are whole vectors, zeros at their end; counts are small, so that every type holds them exactly. How a
/// device stores it is another matter: [`DigestLayout`](crate::sparse::DigestLayout).
#[derive(Clone, Copy, Debug)]
pub struct ClusterLayout {
    /// Channels.
    pub head_dim: usize,
}

impl ClusterLayout {
    /// Where the mean value begins.
    pub const fn value_at(self) -> usize {
        padded_width(self.head_dim)
    }

    /// Where the size is.
    pub const fn size_at(self) -> usize {
        2 * padded_width(self.head_dim)
    }

    /// Where the clusters of the tokens begin.
    pub const fn ids_at(self) -> usize {
        self.size_at() + 2
    }

    /// The size of which [`ClusterLayout::size_at`] holds two digits.
    pub fn size(high: f32, low: f32) -> usize {
        high as usize * 256 + low as usize
    }

    /// The two digits of a size.
    pub const fn digits(size: usize) -> [f32; 2] {
        [(size / 256) as f32, (size % 256) as f32]
    }
}

/// A copy of the pages of all blocks in the order of clusters ([`order`]), beside those in the order of positions. A
/// device has one for each way in which it clusters keys, numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderedCopy(pub usize);

impl OrderedCopy {
    /// Where this copy of `block` is, behind a pool of `num_blocks` blocks and the copies before it.
    pub const fn block(self, block: BlockIndex, num_blocks: usize) -> BlockIndex {
        BlockIndex(block.0 + ((self.0 + 1) * num_blocks) as u32)
    }

    /// The same of a page of a sequence that has `pages` pages at most: how residency tables know it.
    pub const fn page(self, page: usize, pages: usize) -> usize {
        page + (self.0 + 1) * pages
    }
}

/// The first slots of a row may be those of a copy in the order of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderedSlots {
    /// Slots below this one are.
    pub end: usize,
    /// Of this copy.
    pub copy: OrderedCopy,
}

impl OrderedSlots {
    /// No slots.
    pub const NONE: Self = OrderedSlots { end: 0, copy: OrderedCopy(0) };

    /// The copy in which `slot` is, if it is not that of a position.
    #[inline(always)]
    pub fn of(self, slot: usize) -> Option<OrderedCopy> {
        (slot < self.end).then_some(self.copy)
    }
}

/// Which token of a span is in each slot of the copy in the order of clusters: first those of no cluster, then cluster by cluster,
/// each by position. `ids` are the clusters of the tokens, below `clusters` or [`NO_CLUSTER`].
///
/// # Panics
/// When `tokens` has another length.
pub fn order(ids: &[u16], clusters: usize, tokens: &mut [u16]) {
    let mut next = [0u16; CLUSTERS_MAX + 2];
    let class = |id: u16| if usize::from(id) < clusters { 1 + usize::from(id) } else { 0 };
    for &id in ids {
        next[class(id) + 1] += 1;
    }
    for class in 1..next.len() {
        next[class] += next[class - 1];
    }
    assert_eq!(tokens.len(), ids.len(), "a slot for each token");
    for (token, &id) in ids.iter().enumerate() {
        let slot = &mut next[class(id)];
        tokens[usize::from(*slot)] = token as u16;
        *slot += 1;
    }
}

/// Memory to cluster the keys of one span and head.
#[derive(Debug)]
pub struct Clustering {
    span_tokens: usize,
    clusters: usize,
    head_dim: usize,
    /// `[token][channel]`, later without their mean.
    keys: Vec<f32>,
    mean: Vec<f32>,
    /// Directions, `[channel][cluster]`, so that neighbours are added side by side.
    directions: Vec<f32>,
    /// `[cluster][channel]`: means of keys, at last the centroids.
    centroids: Vec<f32>,
    /// `[cluster][channel]`.
    values: Vec<f32>,
    sizes: Vec<u32>,
    ids: Vec<u16>,
    /// Tokens in the order of clusters.
    order: Vec<u16>,
}

impl Clustering {
    /// For spans of `span_tokens` tokens and `clusters` clusters.
    ///
    /// # Panics
    /// When there are more clusters than tokens or than [`CLUSTERS_MAX`].
    pub fn new(span_tokens: usize, clusters: usize, head_dim: usize) -> Self {
        assert!(clusters > 0 && clusters <= span_tokens.min(CLUSTERS_MAX), "clusters of a span");
        Clustering {
            span_tokens,
            clusters,
            head_dim,
            keys: vec![0.0; span_tokens * head_dim],
            mean: vec![0.0; head_dim],
            directions: vec![0.0; head_dim * clusters.next_multiple_of(LANES)],
            centroids: vec![0.0; clusters * head_dim],
            values: vec![0.0; clusters * head_dim],
            sizes: vec![0; clusters],
            ids: vec![NO_CLUSTER; span_tokens],
            order: vec![0; span_tokens],
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let floats = self.keys.len() + self.mean.len() + self.directions.len() + 2 * self.values.len();
        4 * (floats + self.sizes.len()) + 2 * (self.ids.len() + self.order.len())
    }

    /// The keys, `[token][channel]`, to be written before [`Clustering::run`].
    pub fn keys_mut(&mut self) -> &mut [f32] {
        &mut self.keys
    }

    /// Finds the clusters, of all tokens but the first `sinks`.
    #[inline(always)]
    pub fn run(&mut self, sinks: usize) {
        let (d, k) = (self.head_dim, self.clusters);
        let sinks = sinks.min(self.span_tokens - 1);
        let n = self.span_tokens - sinks;
        self.ids[..sinks].fill(NO_CLUSTER);
        self.mean.fill(0.0);
        for key in self.keys[sinks * d..].chunks_exact(d) {
            add(&mut self.mean, key);
        }
        self.mean.iter_mut().for_each(|m| *m /= n as f32);
        for key in self.keys[sinks * d..].chunks_exact_mut(d) {
            for (x, m) in key.iter_mut().zip(&self.mean) {
                *x -= m;
            }
        }
        for i in 0..k {
            let key = (sinks + i * n / k) * d;
            self.centroids[i * d..(i + 1) * d].copy_from_slice(&self.keys[key..key + d]);
        }
        for _ in 0..ITERATIONS {
            self.direct();
            self.assign(sinks);
            self.average(sinks);
        }
        for (centroid, &size) in self.centroids.chunks_exact_mut(d).zip(&self.sizes) {
            if size == 0 {
                centroid.fill(0.0);
            } else {
                add(centroid, &self.mean);
            }
        }
        self.values.fill(0.0);
        order(&self.ids, k, &mut self.order);
    }

    /// The tokens of the span, from 0, in the order of clusters; after [`Clustering::run`].
    pub fn order(&self) -> &[u16] {
        &self.order
    }

    /// Centroids become directions.
    #[inline(always)]
    fn direct(&mut self) {
        let stride = self.clusters.next_multiple_of(LANES);
        for (i, centroid) in self.centroids.chunks_exact(self.head_dim).enumerate() {
            let mut square = 0.0;
            for x in centroid {
                square += x * x;
            }
            let norm = f32::sqrt(square);
            let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            for (c, x) in centroid.iter().enumerate() {
                self.directions[c * stride + i] = x * scale;
            }
        }
    }

    /// Each key goes to the cluster whose direction it has most of. Sums run over channels in ascending order.
    #[inline(always)]
    fn assign(&mut self, sinks: usize) {
        let (d, k) = (self.head_dim, self.clusters);
        let stride = k.next_multiple_of(LANES);
        let mut token = sinks;
        while token < self.span_tokens {
            let rows = (self.span_tokens - token).min(ROWS);
            // The last rows again where fewer are left.
            let row = |r: usize| &self.keys[(token + r.min(rows - 1)) * d..][..d];
            let keys = [row(0), row(1), row(2), row(3)];
            let (mut best, mut ids) = ([f32::NEG_INFINITY; ROWS], [0; ROWS]);
            let mut first = 0;
            while first < k {
                let mut sums = [[0.0f32; LANES]; ROWS];
                for c in 0..d {
                    let directions = &self.directions[c * stride + first..][..LANES];
                    for r in 0..ROWS {
                        let x = keys[r][c];
                        for i in 0..LANES {
                            sums[r][i] += x * directions[i];
                        }
                    }
                }
                for r in 0..ROWS {
                    for i in 0..LANES.min(k - first) {
                        if sums[r][i] > best[r] {
                            (best[r], ids[r]) = (sums[r][i], (first + i) as u16);
                        }
                    }
                }
                first += LANES;
            }
            self.ids[token..token + rows].copy_from_slice(&ids[..rows]);
            token += rows;
        }
    }

    /// Centroids become the means of their keys, added in order.
    #[inline(always)]
    fn average(&mut self, sinks: usize) {
        let d = self.head_dim;
        self.sizes.fill(0);
        for &id in &self.ids[sinks..] {
            let first = self.sizes[id as usize] == 0;
            self.sizes[id as usize] += 1;
            if first {
                self.centroids[id as usize * d..][..d].fill(0.0);
            }
        }
        for (token, &id) in self.ids.iter().enumerate().skip(sinks) {
            add(&mut self.centroids[id as usize * d..][..d], &self.keys[token * d..][..d]);
        }
        for (centroid, &size) in self.centroids.chunks_exact_mut(d).zip(&self.sizes) {
            if size > 0 {
                centroid.iter_mut().for_each(|x| *x /= size as f32);
            }
        }
    }

    /// Adds the value of `token` to those of its cluster; all tokens in order, after [`Clustering::run`].
    #[inline(always)]
    pub fn add_value(&mut self, token: usize, value: &[f32]) {
        if let id @ ..NO_CLUSTER = self.ids[token] {
            add(&mut self.values[id as usize * self.head_dim..][..self.head_dim], value);
        }
    }

    /// Values of a digest.
    pub fn digest_width(&self) -> usize {
        ClusterLayout { head_dim: self.head_dim }.ids_at() + self.span_tokens / self.clusters
    }

    /// The digest of a partition, not rounded, as [`ClusterLayout`] says; after all values.
    #[inline(always)]
    pub fn digest(&self, partition: usize, to: &mut [f32]) {
        let d = self.head_dim;
        let layout = ClusterLayout { head_dim: d };
        let of = partition * d..(partition + 1) * d;
        let size = self.sizes[partition];
        to.fill(0.0);
        to[..d].copy_from_slice(&self.centroids[of.clone()]);
        for (to, sum) in to[layout.value_at()..].iter_mut().zip(&self.values[of]) {
            *to = if size > 0 { sum / size as f32 } else { 0.0 };
        }
        to[layout.size_at()..layout.ids_at()].copy_from_slice(&ClusterLayout::digits(size as usize));
        let tokens = self.span_tokens / self.clusters;
        let ids = &self.ids[partition * tokens..(partition + 1) * tokens];
        for (to, &id) in to[layout.ids_at()..].iter_mut().zip(ids) {
            *to = f32::from(id);
        }
    }
}

#[inline(always)]
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    const SEED: u64 = 31;

    /// Keys around `groups` far centres, in no order, and their clusters.
    fn clustered(groups: usize, span: usize, clusters: usize, sinks: usize) -> (Vec<usize>, Clustering) {
        let (d, mut random) = (12, Random::new(SEED));
        let centres: Vec<f32> = (0..groups * d).map(|_| 8.0 * random.normal()).collect();
        let mut clustering = Clustering::new(span, clusters, d);
        let mut of = Vec::new();
        for key in clustering.keys_mut().chunks_exact_mut(d) {
            let group = random.below(groups);
            of.push(group);
            for (c, x) in key.iter_mut().enumerate() {
                *x = centres[group * d + c] + 0.1 * random.normal();
            }
        }
        clustering.run(sinks);
        for token in 0..span {
            clustering.add_value(token, &[token as f32; 12]);
        }
        (of, clustering)
    }

    #[test]
    fn what_is_close_has_one_cluster_and_what_is_far_has_not() {
        let (of, found) = clustered(4, 256, 16, 0);
        for a in 0..256 {
            for b in 0..a {
                if found.ids[a] == found.ids[b] {
                    assert_eq!(of[a], of[b], "seed {SEED}: tokens {a} and {b}");
                }
            }
        }
    }

    #[test]
    fn digests_hold_means_sizes_and_members() {
        let (_, found) = clustered(9, 128, 8, 5);
        let layout = ClusterLayout { head_dim: 12 };
        assert_eq!((layout.value_at(), layout.size_at(), layout.ids_at()), (32, 64, 66));
        let mut digests = vec![vec![9.0; found.digest_width()]; 8];
        digests.iter_mut().enumerate().for_each(|(p, to)| found.digest(p, to));
        let ids: Vec<usize> = digests.iter().flat_map(|d| d[66..].iter().map(|&id| id as usize)).collect();
        assert_eq!(ids[..5], [NO_CLUSTER as usize; 5], "sinks");
        let mut all = 0;
        for (p, digest) in digests.iter().enumerate() {
            let members: Vec<usize> = (0..128).filter(|&t| ids[t] == p).collect();
            let size = ClusterLayout::size(digest[64], digest[65]);
            assert_eq!(size, members.len());
            all += size;
            let mean = members.iter().sum::<usize>() as f32 / size.max(1) as f32;
            assert!((digest[32] - mean).abs() < 1e-3 && digest[12] == 0.0 && digest[44] == 0.0);
        }
        assert_eq!(all, 123);
        assert_eq!(ClusterLayout::size(3.0, 2.0), 770);
    }

    #[test]
    fn tokens_are_ordered_by_cluster_then_position() {
        let mut tokens = [9; 8];
        order(&[1, NO_CLUSTER, 0, 1, 0, NO_CLUSTER, 2, 1], 3, &mut tokens);
        assert_eq!(tokens, [1, 5, 2, 4, 0, 3, 7, 6]);
        let (_, found) = clustered(9, 128, 8, 5);
        assert!(found.order().is_sorted_by_key(|&t| ((found.ids[t as usize] + 1) % (NO_CLUSTER + 1), t)));
        let mut all = found.order().to_vec();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..128), "seed {SEED}: each token once");
    }

    #[test]
    fn equal_keys_go_to_the_first_cluster() {
        let mut clustering = Clustering::new(64, 4, 8);
        clustering.keys_mut().fill(1.5);
        clustering.run(0);
        assert_eq!((&clustering.sizes[..], clustering.centroids[0]), (&[64, 0, 0, 0][..], 1.5));
        assert_eq!(clustering.centroids[8..], [0.0; 24], "empty ones are zeros");
    }

    #[test]
    fn as_many_clusters_as_keys_leave_each_alone() {
        let (_, found) = clustered(64, 64, 64, 0);
        assert!(found.sizes.iter().all(|&n| n == 1), "seed {SEED}: {:?}", found.sizes);
        assert_eq!(found.ids, (0..64).collect::<Vec<u16>>());
    }

    #[test]
    fn keys_that_are_no_numbers_do_no_harm() {
        let mut clustering = Clustering::new(64, 4, 8);
        clustering.keys_mut().fill(f32::NAN);
        clustering.run(4);
        assert_eq!(clustering.sizes.iter().sum::<u32>(), 60);
    }
}
