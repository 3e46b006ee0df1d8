//! The HBM tier: how a bound on its size is divided, and what a step reports.
//!
//! Where a device has a tier of its own, DRAM holds every page that is full, and HBM four kinds of frames:
//!
//! * *local* frames: the last pages of every sequence, whose partitions are still open. Pinned; tokens are written there.
//! * *fresh* frames: the pages that the prompt tokens of a step write in one layer. The next layer uses them again.
//! * *cache* frames: copies of DRAM pages that were selected, found through [`crate::residency`].
//! * *wave* frames: what a selection needs beyond its quota passes through them, a wave at a time.
//!
//! A page is *open* while tokens are written to it, *saving* from the step in which it fills until its copy in DRAM is
//! complete, then *clean*. Only clean pages are ever in the cache, so an eviction writes nothing back.

use crate::cluster::OrderedCopy;
use crate::residency::{EXTENT_FRAMES, EvictionRule, ResidencyShape, SeatCounters};
use crate::{BlockIndex, KvGeometry, SPLIT_TOKENS};
use std::time::Duration;

/// What an HBM tier is asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierSpec {
    /// Bytes of frames and of the tables that lead to them. Digests and activations are not among them.
    pub bytes: u64,
    /// Sequences at once.
    pub seats: usize,
    /// Tokens of the longest context.
    pub context_max: usize,
    /// Rows of a step beyond one per sequence.
    pub inject_tokens_max: usize,
    /// Rows of answers in a step beyond one per sequence: those that are run again after a preemption.
    pub replay_rows: usize,
    /// Tokens of the longest partition of any method.
    pub partition_tokens_max: usize,
    /// Copies of the pages in the order of clusters: see [`OrderedCopy`].
    pub copies: usize,
    /// Which pages give way in the cache.
    pub eviction: EvictionRule,
    /// In how many calls pages move between the tiers.
    pub transfer: Transfer,
    /// What a link between the tiers costs that the device does not have; `None` adds nothing.
    pub link: Option<LinkSpec>,
    /// Whether frames that hold nothing are filled with NaN, so that reading one shows, and saves take their time: for tests.
    pub poison: bool,
}

/// In how many calls pages move between the tiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transfer {
    /// All that a layer misses in one call, and what it saves off the path of the step (SparseServe's FlashH2D and FlashD2H).
    #[default]
    Fused,
    /// Each page of each head by a call of its own, one after the other, while the step waits (the naive offload that
    /// SparseServe compares itself with).
    PerPage,
}

impl Transfer {
    /// As flags call it.
    pub const fn name(self) -> &'static str {
        match self {
            Transfer::Fused => "fused",
            Transfer::PerPage => "per-page",
        }
    }
}

/// What moving pages costs on a link, in each direction alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSpec {
    /// Bytes that it moves in a second.
    pub bytes_per_second: u64,
    /// Nanoseconds that each call takes beside.
    pub call_nanos: u64,
}

impl LinkSpec {
    /// The time of `bytes` in `calls` calls.
    pub fn time(&self, bytes: u64, calls: u64) -> Duration {
        let moving = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let all = moving + u128::from(calls) * u128::from(self.call_nanos);
        Duration::from_nanos(u64::try_from(all).unwrap_or(u64::MAX))
    }
}

/// The frames of an HBM tier by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierLayout {
    /// Pages that a (seat, layer, KV head) keeps locally: those of partitions that may be open.
    pub local_pages: usize,
    /// All local frames.
    pub local_frames: usize,
    /// Fresh frames: blocks, times KV heads.
    pub fresh_blocks: usize,
    /// Wave frames.
    pub wave_frames: usize,
    /// Extents of cache frames.
    pub extents: usize,
    /// Bytes of frames.
    pub frame_bytes: u64,
    /// Bytes of residency tables, were all leaves in use.
    pub table_bytes: u64,
}

/// An HBM tier that is too small for a single wave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// The least that would do, in bytes.
    pub smallest: u64,
}

/// Blocks of prompts that may be on their way to DRAM through staging memory.
const STAGED_OF_PROMPTS: usize = 64;

/// Bytes of a page in the lists of a step.
const LISTED_BYTES: usize = 32;

/// Splits per layer that a wave can hold where there is room for more.
const WAVE_SPLITS_MAX: usize = 8;

impl TierSpec {
    /// Divides the bytes: what cannot be done without first, then more room for waves, and the rest is cache.
    ///
    /// # Errors
    /// When there is not even room for one wave.
    pub fn layout(&self, geometry: &KvGeometry) -> Result<TierLayout, TooSmall> {
        let KvGeometry { num_layers, kv_heads, page_tokens, .. } = *geometry;
        let page_bytes = geometry.page_bytes() as u64;
        let local_pages = (self.open_tokens_max(page_tokens) - 1).div_ceil(page_tokens) + 1;
        let local_frames = self.seats * num_layers * kv_heads * local_pages;
        // A sequence with several rows begins and ends within pages, and brings the open ones along.
        let prompts = self.seats.min(self.inject_tokens_max);
        let fresh_blocks = self.inject_tokens_max.div_ceil(page_tokens) + prompts * (local_pages + 2);
        let split_frames = kv_heads * (SPLIT_TOKENS / page_tokens);
        let shape = |extents| ResidencyShape {
            seats: self.seats,
            layers: num_layers,
            kv_heads,
            pages_max: self.known_pages(page_tokens),
            extents,
            eviction: self.eviction,
        };
        let pinned = local_frames + fresh_blocks * kv_heads + split_frames;
        let smallest = pinned as u64 * page_bytes + shape(0).fixed_bytes();
        let Some(left) = self.bytes.checked_sub(smallest) else { return Err(TooSmall { smallest }) };
        let more_splits = (left / 8 / (split_frames as u64 * page_bytes)) as usize;
        let wave_frames = split_frames * (1 + more_splits.min(WAVE_SPLITS_MAX - 1));
        let left = left - (wave_frames - split_frames) as u64 * page_bytes;
        let extent_bytes = EXTENT_FRAMES as u64 * page_bytes + (shape(1).bytes() - shape(0).bytes());
        // More frames than pages could ever be resident buy nothing.
        let useful = self.seats * num_layers * (shape(0).pages_max * kv_heads).div_ceil(EXTENT_FRAMES);
        let addressable = (u32::MAX as usize).saturating_sub(pinned + wave_frames) / EXTENT_FRAMES;
        let extents = (left / extent_bytes).min(useful.min(addressable) as u64) as usize;
        let frames = pinned - split_frames + wave_frames + extents * EXTENT_FRAMES;
        Ok(TierLayout {
            local_pages,
            local_frames,
            fresh_blocks,
            wave_frames,
            extents,
            frame_bytes: frames as u64 * page_bytes,
            table_bytes: shape(extents).bytes(),
        })
    }

    /// Page `page` of a sequence, or its place in a copy, as the residency tables know it.
    pub const fn known_page(&self, page: usize, copy: Option<OrderedCopy>, page_tokens: usize) -> usize {
        match copy {
            None => page,
            Some(copy) => copy.page(page, self.context_max.div_ceil(page_tokens)),
        }
    }

    /// The block of the pool or its copies in which a page of a sequence is that the residency tables know as `known`.
    pub fn block_of(
        &self,
        known: usize,
        table: &[BlockIndex],
        num_blocks: usize,
        page_tokens: usize,
    ) -> BlockIndex {
        let pages = self.context_max.div_ceil(page_tokens);
        let block = table[known % pages];
        match known / pages {
            0 => block,
            copy => OrderedCopy(copy - 1).block(block, num_blocks),
        }
    }

    /// Pages of a sequence that the residency tables may know.
    const fn known_pages(&self, page_tokens: usize) -> usize {
        (1 + self.copies) * self.context_max.div_ceil(page_tokens)
    }

    /// Tokens of the longest partition or page that can be open.
    fn open_tokens_max(&self, page_tokens: usize) -> usize {
        self.partition_tokens_max.max(page_tokens)
    }

    /// The first page that a sequence whose rows begin at `first_position` keeps locally: no partition that a row completes or
    /// finds open, of whatever size, begins before it.
    pub fn local_start(&self, first_position: usize, page_tokens: usize) -> usize {
        (first_position + 1).saturating_sub(self.open_tokens_max(page_tokens)) / page_tokens
    }

    /// Blocks of one layer that may be on their way to DRAM: some of prompts, and one of each answer.
    pub const fn staging_chunks(&self) -> usize {
        STAGED_OF_PROMPTS + self.seats
    }

    /// Pages that the rows of a step attend to in a layer: of each sequence those of its prompt's rows together, and those of each row
    /// of an answer.
    pub const fn pages_listed(&self, geometry: &KvGeometry) -> usize {
        let pages = geometry.kv_heads * self.context_max.div_ceil(geometry.page_tokens);
        (2 * self.seats + self.replay_rows) * pages
    }

    /// Bytes of host memory beside the frames and the tables: staging, and lists of pages to attend to and to fetch.
    pub const fn host_bytes(&self, geometry: &KvGeometry) -> u64 {
        let staging = self.staging_chunks() * geometry.kv_heads * geometry.page_bytes();
        staging as u64 + self.list_bytes(geometry)
    }

    /// Bytes of the lists of pages to attend to and to fetch, of a step in a layer.
    pub const fn list_bytes(&self, geometry: &KvGeometry) -> u64 {
        (self.pages_listed(geometry) * LISTED_BYTES) as u64
    }

    /// The residency tables that go with `layout`.
    pub fn residency(&self, geometry: &KvGeometry, layout: &TierLayout) -> ResidencyShape {
        ResidencyShape {
            seats: self.seats,
            layers: geometry.num_layers,
            kv_heads: geometry.kv_heads,
            pages_max: self.known_pages(geometry.page_tokens),
            extents: layout.extents,
            eviction: self.eviction,
        }
    }
}

/// The state of a tier between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierState {
    /// Cache frames.
    pub cache_frames: u64,
    /// Cache frames that hold a page.
    pub cache_used: u64,
    /// Frames that cannot be evicted: local, fresh and wave frames.
    pub pinned_frames: u64,
    /// Extents of cache frames that nobody owns.
    pub free_extents: u64,
    /// Bytes of cache frames with a page that a frame of another sequence of the step holds, too: frames are not shared, not even those of a
    /// prefix. Each step looks at one layer, in turn, and this is the sum of what was found last.
    pub duplicate_bytes: u64,
    /// Pages on their way to DRAM.
    pub saving_pages: u64,
    /// Bytes of residency tables in use.
    pub table_bytes: u64,
    /// Bytes copied from HBM to DRAM, since the start.
    pub saved_bytes: u64,
    /// Calls that moved pages or digests between the tiers, since the start: to HBM, and to DRAM.
    pub link_calls: [u64; 2],
    /// Time that steps spent waiting for pages, since the start, in nanoseconds.
    pub stall_nanos: u64,
    /// Waves beyond one per layer, since the start.
    pub extra_waves: u64,
    /// What happened to the pages of all seats, since the start.
    pub pages: SeatCounters,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    const GEOMETRY: KvGeometry =
        KvGeometry { num_layers: 4, kv_heads: 2, head_dim: 64, page_tokens: 16, dtype: DType::Bf16 };

    fn spec(bytes: u64) -> TierSpec {
        TierSpec {
            bytes,
            seats: 3,
            context_max: 4096,
            inject_tokens_max: 128,
            replay_rows: 0,
            partition_tokens_max: 32,
            copies: 0,
            eviction: EvictionRule::Bucketed,
            transfer: Transfer::Fused,
            link: None,
            poison: false,
        }
    }

    #[test]
    fn the_smallest_tier_has_one_wave_and_no_cache() {
        let TooSmall { smallest } = spec(0).layout(&GEOMETRY).unwrap_err();
        let layout = spec(smallest).layout(&GEOMETRY).expect("the smallest tier is legal");
        assert_eq!(spec(smallest - 1).layout(&GEOMETRY), Err(TooSmall { smallest }));
        assert_eq!((layout.extents, layout.wave_frames), (0, 2 * 32));
        assert_eq!((layout.local_pages, layout.local_frames), (3, 3 * 4 * 2 * 3));
        assert_eq!(layout.fresh_blocks, 8 + 3 * 5);
        assert!(layout.frame_bytes <= smallest);
    }

    #[test]
    fn all_of_it_stays_within_the_bound_and_more_buys_cache() {
        let TooSmall { smallest } = spec(0).layout(&GEOMETRY).unwrap_err();
        let mut before = 0;
        for more in [0, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 40] {
            let layout = spec(smallest + more).layout(&GEOMETRY).expect("large enough");
            assert!(layout.frame_bytes + layout.table_bytes <= smallest + more, "{layout:?} of {more} more");
            assert!(layout.extents >= before);
            before = layout.extents;
        }
        assert_eq!(before, 3 * 4 * 16, "every page of every context");
    }

    #[test]
    fn a_link_takes_time_for_bytes_and_for_calls() {
        let pcie4 = LinkSpec { bytes_per_second: 25_000_000_000, call_nanos: 4_000 };
        assert_eq!(pcie4.time(0, 0), Duration::ZERO);
        assert_eq!(pcie4.time(8_192, 1), Duration::from_nanos(4_327));
        // A page a call: 1.9 GB/s of 25.
        assert_eq!(pcie4.time(1_000 * 8_192, 1_000), Duration::from_nanos(4_327_680));
        assert_eq!(pcie4.time(u64::MAX, u64::MAX), Duration::from_nanos(u64::MAX));
    }

    /// Wider stamps are paid for in frames.
    #[test]
    fn tables_of_every_rule_are_counted() {
        let [bucketed, exact, global] = EvictionRule::ALL.map(|eviction| {
            let spec = TierSpec { eviction, ..spec(8 << 20) };
            let layout = spec.layout(&GEOMETRY).expect("large enough");
            assert!(layout.frame_bytes + layout.table_bytes <= 8 << 20, "{layout:?}");
            let TierSpec { seats, .. } = spec;
            (
                layout.table_bytes,
                (layout.extents * EXTENT_FRAMES) as u64,
                (seats * GEOMETRY.num_layers) as u64,
            )
        });
        let (tables, frames, pools) = bucketed;
        assert_eq!(exact.1, frames, "so few bytes are no extent");
        assert_eq!(exact.0, tables + 3 * frames);
        // Whose page it is; but there is only one pool per layer.
        assert_eq!(global.0, tables + 7 * frames - 20 * (pools - GEOMETRY.num_layers as u64));
    }
}
