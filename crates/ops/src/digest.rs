//! What is kept of the keys of a partition, and where it lies.

use std::ops::Range;

use crate::cluster::{CLUSTER_TOKENS_MAX, CLUSTERS_MAX, ClusterLayout, OrderedCopy};
use crate::{Error, Gate, KvGeometry, fp8};

/// What a digest keeps of the keys of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DigestKind {
    /// `[max_j k_j | min_j k_j]`, channel by channel (Quest, Tang et al. 2024).
    MinMax,
    /// `[c + r | c - r]` with `c = (min_j k_j + max_j k_j) / 2` and `r = mean_j |c - k_j|` (ArkVale, Chen et al. 2024,
    /// "cuboid-mean").
    CuboidMean,
    /// One of these, rounded outward to fp8: [`crate::fp8`] says how.
    Fp8(TwoSided),
    /// `mean_j k_j`.
    Mean,
    /// `[mean_j k_j | min_j cos(k_j, mean)]`: ShadowKV's landmark (Sun et al. 2024), and how well it stands for the worst of
    /// its keys.
    Landmark,
    /// What a learned gate makes of the keys' extremes and mean (SeerAttention-R, Gao et al. 2025): [`crate::Gate`] says how.
    Gate {
        /// Values per digest; 0 as long as nobody has read the weights, which say.
        dim: usize,
    },
    /// A cluster of the keys of a span (RetroInfer, Chen et al. 2025), and to which clusters the tokens of the partition belong:
    /// [`crate::cluster`] says how. So what partition `p` selects is not its own tokens but those of the `p`-th cluster.
    Cluster {
        /// Consecutive tokens that are clustered together: `[i * span_tokens, (i + 1) * span_tokens)`. A multiple of the page and
        /// of the partition.
        span_tokens: usize,
        /// The first tokens of a sequence belong to no cluster.
        sink_tokens: usize,
        /// Which of the [copies](OrderedCopy) of the pages is in their order.
        copy: usize,
    },
}

/// Digests of an upper and a lower value per channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TwoSided {
    /// [`DigestKind::MinMax`].
    MinMax,
    /// [`DigestKind::CuboidMean`].
    CuboidMean,
}

impl DigestKind {
    /// The same in the type of K.
    pub const fn unrounded(self) -> Self {
        match self {
            DigestKind::Fp8(TwoSided::MinMax) => DigestKind::MinMax,
            DigestKind::Fp8(TwoSided::CuboidMean) => DigestKind::CuboidMean,
            other => other,
        }
    }

    /// Values per digest, for heads of `head_dim` channels, without those of its tokens: see [`DigestSpec::width`].
    pub const fn width(self, head_dim: usize) -> usize {
        match self {
            DigestKind::MinMax | DigestKind::CuboidMean | DigestKind::Fp8(_) => 2 * head_dim,
            DigestKind::Mean => head_dim,
            DigestKind::Landmark => head_dim + 1,
            DigestKind::Gate { dim } => dim,
            DigestKind::Cluster { .. } => ClusterLayout { head_dim }.ids_at(),
        }
    }

    /// Values at the front of a digest that dot products are made of.
    pub const fn scored_width(self, head_dim: usize) -> usize {
        match self {
            DigestKind::Cluster { .. } | DigestKind::Landmark => head_dim,
            other => other.width(head_dim),
        }
    }
}

/// The digests of one kind, over one cut of the context into partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DigestSpec {
    /// What is kept.
    pub kind: DigestKind,
    /// Consecutive tokens per partition; divides [`KvGeometry::page_tokens`] or is a multiple of it.
    pub partition_tokens: usize,
}

impl DigestSpec {
    /// Digests that lie with a block: those of the partitions that end in it. A partition longer than a page leaves
    /// the places of its other blocks unused, because those may be shared with a sequence that goes on differently.
    pub const fn per_block(&self, page_tokens: usize) -> usize {
        let whole = page_tokens / self.partition_tokens;
        if whole == 0 { 1 } else { whole }
    }

    /// Values per digest, for heads of `head_dim` channels.
    pub const fn width(&self, head_dim: usize) -> usize {
        let of_tokens = match self.kind {
            DigestKind::Cluster { .. } => self.partition_tokens,
            _ => 0,
        };
        self.kind.width(head_dim) + of_tokens
    }

    /// Consecutive tokens whose digests are made together, when the last of them is there.
    pub const fn made_together(&self) -> usize {
        match self.kind {
            DigestKind::Cluster { span_tokens, .. } => span_tokens,
            _ => self.partition_tokens,
        }
    }

    /// Consecutive tokens, a multiple of `page_tokens`, that sequences share as a whole or not at all. Digests that lie with
    /// blocks before the last token that they depend on would else be made anew by a sequence that goes on differently.
    pub const fn shared_together(&self, page_tokens: usize) -> usize {
        match self.kind {
            DigestKind::Cluster { span_tokens, .. } => span_tokens,
            _ => page_tokens,
        }
    }

    /// The copy of the pages that comes with them, if any does.
    pub const fn copy(&self) -> Option<OrderedCopy> {
        match self.kind {
            DigestKind::Cluster { copy, .. } => Some(OrderedCopy(copy)),
            _ => None,
        }
    }

    /// The same with the copy of this number, if any comes with them.
    pub const fn with_copy(self, number: usize) -> Self {
        match self.kind {
            DigestKind::Cluster { span_tokens, sink_tokens, .. } => {
                DigestSpec { kind: DigestKind::Cluster { span_tokens, sink_tokens, copy: number }, ..self }
            }
            _ => self,
        }
    }

    /// Copies that come with all of `specs`.
    pub fn copies(specs: &[DigestSpec]) -> usize {
        specs.iter().filter_map(DigestSpec::copy).map(|copy| copy.0 + 1).max().unwrap_or(0)
    }

    /// Whether such digests can lie with pages of `page_tokens` tokens.
    ///
    /// # Errors
    /// Partitions and pages of which neither divides the other; spans that do not consist of whole pages and partitions or have
    /// too many.
    pub fn check(&self, page_tokens: usize) -> Result<(), Error> {
        let length = self.partition_tokens;
        if length == 0 || !(page_tokens.is_multiple_of(length) || length.is_multiple_of(page_tokens)) {
            return Err(Error::Unsupported(format!(
                "partitions of {length} tokens on pages of {page_tokens}; one must divide the other (--page-tokens)"
            )));
        }
        let DigestKind::Cluster { span_tokens: span, .. } = self.kind else { return Ok(()) };
        let whole = span > 0 && span.is_multiple_of(length) && span.is_multiple_of(page_tokens);
        if !whole || span / length > CLUSTERS_MAX || length > CLUSTER_TOKENS_MAX {
            return Err(Error::Unsupported(format!(
                "spans of {span} tokens with partitions of {length} on pages of {page_tokens}; a span is a multiple of both \
                 and has at most {CLUSTERS_MAX} partitions, of at most {CLUSTER_TOKENS_MAX} tokens"
            )));
        }
        Ok(())
    }

    /// Bytes that a block of `geometry` takes in DRAM because of them: digests, and a copy of its pages where one comes with them.
    pub const fn dram_block_bytes(&self, geometry: &KvGeometry) -> usize {
        self.block_bytes(geometry) + if self.copy().is_some() { geometry.block_bytes() } else { 0 }
    }

    /// Bytes that digests add to a block of `geometry`, over all layers and heads.
    pub const fn block_bytes(&self, geometry: &KvGeometry) -> usize {
        geometry.num_layers * DigestLayout::new(self, geometry).block_bytes
    }

    /// The same, with the size that the weights of `gate` give to its digests.
    pub fn with_gate(self, gate: Option<&Gate>) -> Self {
        match (self.kind, gate) {
            (DigestKind::Gate { .. }, Some(gate)) => {
                DigestSpec { kind: DigestKind::Gate { dim: gate.dim }, ..self }
            }
            _ => self,
        }
    }
}

/// A digest as it is stored, and where: part by part, `[head][partition of the block]` each, so that scores read what they need and
/// nothing else.
///
/// | part | of | |
/// |---|---|---|
/// | scored values | all | padded to [`padded_width`] |
/// | tag | fp8, landmarks, clusters | an f32: scale, cosine, number of tokens |
/// | mean value | clusters | padded like a centroid |
/// | clusters of the partition's tokens | clusters | |
///
/// Every part begins at a multiple of 64 bytes, and so does the next block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestLayout {
    /// Bytes of one digest's scored values.
    pub scored_bytes: usize,
    /// Of its tag.
    pub tag_bytes: usize,
    /// Of its mean value.
    pub value_bytes: usize,
    /// Of the clusters of its tokens.
    pub ids_bytes: usize,
    /// Partitions that end in a block.
    pub per_block: usize,
    /// Where the tags of a block begin; its scored values are at 0.
    pub tags_at: usize,
    /// Where mean values begin.
    pub values_at: usize,
    /// Where the clusters of tokens begin.
    pub ids_at: usize,
    /// Bytes of the digests of a block, in one layer.
    pub block_bytes: usize,
}

/// Parts begin at multiples of so many bytes: those of a cache line.
pub const PART_ALIGN: usize = 64;

impl DigestLayout {
    /// Of digests that lie with blocks of `geometry`.
    pub const fn new(spec: &DigestSpec, geometry: &KvGeometry) -> Self {
        let (d, bytes) = (geometry.head_dim, geometry.dtype.bytes());
        let (scored_bytes, tag_bytes) = match spec.kind {
            DigestKind::Fp8(_) => (padded_width(spec.kind.scored_width(d)), fp8::SCALE_BYTES),
            DigestKind::Landmark | DigestKind::Cluster { .. } => (padded_width(d) * bytes, size_of::<f32>()),
            _ => (padded_width(spec.kind.scored_width(d)) * bytes, 0),
        };
        let (value_bytes, ids_bytes) = match spec.kind {
            DigestKind::Cluster { .. } => (padded_width(d) * bytes, spec.partition_tokens * bytes),
            _ => (0, 0),
        };
        let per_block = spec.per_block(geometry.page_tokens);
        let count = geometry.kv_heads * per_block;
        let tags_at = (count * scored_bytes).next_multiple_of(PART_ALIGN);
        let values_at = (tags_at + count * tag_bytes).next_multiple_of(PART_ALIGN);
        let ids_at = (values_at + count * value_bytes).next_multiple_of(PART_ALIGN);
        let block_bytes = (ids_at + count * ids_bytes).next_multiple_of(PART_ALIGN);
        DigestLayout {
            scored_bytes,
            tag_bytes,
            value_bytes,
            ids_bytes,
            per_block,
            tags_at,
            values_at,
            ids_at,
            block_bytes,
        }
    }

    /// Where, within a block, the parts of the digest of its partition `within` for `head` are, in the order of the table.
    pub fn parts(&self, head: usize, within: usize) -> [Range<usize>; 4] {
        let i = head * self.per_block + within;
        let part = |at: usize, bytes: usize| at + i * bytes..at + (i + 1) * bytes;
        [
            part(0, self.scored_bytes),
            part(self.tags_at, self.tag_bytes),
            part(self.values_at, self.value_bytes),
            part(self.ids_at, self.ids_bytes),
        ]
    }

    /// Bytes of one digest, all parts together.
    pub const fn digest_bytes(&self) -> usize {
        self.scored_bytes + self.tag_bytes + self.value_bytes + self.ids_bytes
    }
}

/// Digests are stored in whole runs of this many values, zeros at their end.
pub const DIGEST_ALIGN: usize = 32;

/// `width` rounded up to [`DIGEST_ALIGN`].
pub const fn padded_width(width: usize) -> usize {
    width.next_multiple_of(DIGEST_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    const GEOMETRY: KvGeometry =
        KvGeometry { num_layers: 2, kv_heads: 3, head_dim: 128, page_tokens: 16, dtype: DType::Bf16 };

    #[test]
    fn digests_are_a_sixteenth_of_kv_for_a_page() {
        let bytes = |kind, partition_tokens| DigestSpec { kind, partition_tokens }.block_bytes(&GEOMETRY);
        assert_eq!(bytes(DigestKind::MinMax, 16) * 16, GEOMETRY.block_bytes());
        assert_eq!(bytes(DigestKind::MinMax, 32) * 16, GEOMETRY.block_bytes());
        assert_eq!(bytes(DigestKind::Mean, 8) * 16, GEOMETRY.block_bytes());
        let fp8 = bytes(DigestKind::Fp8(TwoSided::MinMax), 16);
        assert_eq!(fp8, 2 * (3 * 256 + PART_ALIGN), "a byte per value, and a cache line for three scales");
    }

    #[test]
    fn parts_follow_one_another_and_fill_a_block() {
        let cluster = DigestKind::Cluster { span_tokens: 64, sink_tokens: 4, copy: 0 };
        let kinds = [DigestKind::Fp8(TwoSided::MinMax), DigestKind::Landmark, DigestKind::Mean, cluster];
        for (head_dim, kv_heads) in [(2, 1), (16, 1), (40, 5), (128, 3), (256, 1)] {
            let geometry = KvGeometry { kv_heads, head_dim, ..GEOMETRY };
            for (kind, partition_tokens) in
                kinds.into_iter().flat_map(|kind| [8, 16, 32].map(|tokens| (kind, tokens)))
            {
                let layout = DigestLayout::new(&DigestSpec { kind, partition_tokens }, &geometry);
                let mut parts = vec![Vec::new(); 4];
                for head in 0..kv_heads {
                    for within in 0..layout.per_block {
                        let digest = layout.parts(head, within);
                        let bytes: usize = digest.iter().map(ExactSizeIterator::len).sum();
                        assert_eq!(bytes, layout.digest_bytes());
                        parts.iter_mut().zip(digest).for_each(|(parts, part)| parts.push(part));
                    }
                }
                let mut end: usize = 0;
                for (part, begins) in parts.iter().zip([0, layout.tags_at, layout.values_at, layout.ids_at]) {
                    assert_eq!(begins, end.next_multiple_of(PART_ALIGN), "{layout:?}");
                    end = begins;
                    for part in part {
                        assert_eq!(part.start, end, "{layout:?}");
                        end = part.end;
                    }
                }
                assert_eq!(layout.block_bytes, end.next_multiple_of(PART_ALIGN), "{layout:?}");
            }
        }
    }
}
