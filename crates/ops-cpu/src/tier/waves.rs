//! From what a layer attends to, to frames: look up, take, cut into waves, fetch.

use std::ops::Range;
use std::time::Instant;

use ops::cluster::OrderedSlots;
use ops::sparse::Attention;
use ops::tier::Transfer;
use ops::{Batch, BlockIndex, HeadShape, SPLIT_TOKENS, SeatIndex, SequenceRows};

use super::Tier;
use crate::link::Direction;
use crate::memory::Shared;
use crate::pages::Layers;
use crate::pool::Pool;
use crate::selection::Selections;
use crate::simd::LANES;

/// Pages per task of a copy.
const PAGES_PER_TASK: usize = 4;

/// No frame yet.
const NONE: u32 = u32::MAX;

/// Rows that attend alike: those of a sequence that attend to everything, or one sparse row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    seat: SeatIndex,
    /// Page of its first entry, where its pages are consecutive.
    first_page: u32,
    /// Splits, absolute ones where its pages are consecutive.
    splits: (u32, u32),
    /// Whether some of its pages pass through wave frames.
    streams: bool,
}

/// A page that is attended to, and its frame.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Page of the sequence.
    pub page: u32,
    /// How the residency tables know it: it may be of a copy.
    known: u32,
    /// Where it lies in DRAM, once it is full.
    block: BlockIndex,
    /// Frame of the arena.
    pub frame: u32,
}

/// What of an item is attended to in a wave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wave {
    number: u32,
    item: u32,
    splits: (u32, u32),
}

/// The part of an item in a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WavePart {
    /// Its splits.
    pub splits: Range<usize>,
    /// Whether nothing of the item came before.
    pub starts: bool,
    /// Whether nothing of it follows.
    pub ends: bool,
}

/// A page to copy to a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    seat: SeatIndex,
    pub(super) head: u32,
    known: u32,
    pub(super) block: BlockIndex,
    pub(super) frame: u32,
}

impl Tier {
    /// Finds frames for all that the rows of `batch` attend to; returns the number of waves.
    pub fn resolve(
        &mut self,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) -> usize {
        self.begin(layer, self.geometry.page_bytes());
        self.list(heads, window, batch, selection);
        let mut first = 0;
        while first < self.items.len() {
            let seat = self.items[first].seat;
            let of_step = |item: &&Item| self.residency.share_frames(item.seat, seat);
            let count = self.items[first..].iter().take_while(of_step).count();
            self.find(first..first + count);
            first += count;
        }
        let waves = self.cut();
        self.extra_waves += waves as u64 - 1;
        waves
    }

    /// Forgets what the last layer attended to.
    fn begin(&mut self, layer: usize, fetched_part: usize) {
        self.items.clear();
        self.ranges.clear();
        self.entries.clear();
        self.fetches.clear();
        self.waves.clear();
        (self.layer, self.fetched_part) = (layer, fetched_part);
    }

    /// Finds the keys of everything up to the last row of `s`, the first slots `ordered`, as item 0, without changing what is resident; returns the number
    /// of waves, which [`Tier::gather`] fetches.
    pub fn look(
        &mut self,
        layer: usize,
        heads: HeadShape,
        s: &SequenceRows,
        ordered: OrderedSlots,
        batch: &Batch,
    ) -> usize {
        // Keys come first in a page.
        self.begin(layer, self.geometry.page_bytes() / 2);
        let end = s.context_tokens();
        self.list_all(s, heads, end - 1..end, None, ordered, batch);
        let mut streams = false;
        self.each_cold(0..heads.kv_heads, |tier, at, _, head| {
            match tier.residency.find(s.seat, layer, head, tier.entries[at].known as usize) {
                Some(frame) => tier.entries[at].frame = frame.0,
                None => streams = true,
            }
        });
        self.items[0].streams = streams;
        self.cut()
    }

    /// Lists items, their pages, and the frames of those that are local.
    fn list(
        &mut self,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) {
        let page_tokens = self.geometry.page_tokens;
        let per_split = SPLIT_TOKENS / page_tokens;
        let mut place = 0;
        for s in batch.sequences {
            let table = batch.block_table(s);
            let (first, end) = (s.first_position as usize, s.context_tokens());
            let sparse = selection.is_some() && s.attention != Attention::Dense;
            let sparse_from = if sparse { (s.prompt_len as usize).clamp(first, end) } else { end };
            if sparse_from > first {
                self.list_all(s, heads, first..sparse_from, window, OrderedSlots::NONE, batch);
            }
            for position in sparse_from..end {
                let selection = selection.expect("sparse rows are counted where there is one");
                if selection.get(place, 0).is_none() {
                    self.list_all(s, heads, position..position + 1, window, OrderedSlots::NONE, batch);
                } else {
                    let (mut longest, ordered) = (0, selection.ordered(place));
                    for head in 0..heads.kv_heads {
                        let selected = selection.get(place, head).expect("all heads select or none");
                        let start = self.entries.len();
                        let local = self.local[s.seat.at()].pages.0 as usize;
                        let (mut cold, mut slots) = (0, 0);
                        for page in selected.each_page() {
                            let entry = self.entry(page, ordered, table);
                            self.entries.push(entry);
                            if entry.known != page as u32 || page < local {
                                (cold, slots) =
                                    (cold + 1, slots + selected.of_page(page).count_ones() as usize);
                            }
                        }
                        self.residency.counters_mut(s.seat).select(cold, slots, page_tokens);
                        self.ranges.push(start as u32..self.entries.len() as u32);
                        longest = longest.max(selected.counts.pages as usize);
                    }
                    let splits = (0, longest.div_ceil(per_split) as u32);
                    self.items.push(Item { seat: s.seat, first_page: 0, splits, streams: false });
                }
                place += 1;
            }
        }
    }

    /// Page `page` of a sequence, in no frame yet.
    fn entry(&self, page: usize, ordered: OrderedSlots, table: &[BlockIndex]) -> Entry {
        let page_tokens = self.geometry.page_tokens;
        let copy = ordered.of(page * page_tokens);
        let known = self.spec.known_page(page, copy, page_tokens) as u32;
        let block = copy.map_or(table[page], |copy| copy.block(table[page], self.pool_blocks));
        Entry { page: page as u32, known, block, frame: NONE }
    }

    /// Lists an item whose rows, at `positions`, attend to everything within the window.
    fn list_all(
        &mut self,
        s: &SequenceRows,
        heads: HeadShape,
        positions: Range<usize>,
        window: Option<usize>,
        ordered: OrderedSlots,
        batch: &Batch,
    ) {
        let table = batch.block_table(s);
        let page_tokens = self.geometry.page_tokens;
        let first = window.map_or(0, |w| (positions.start + 1).saturating_sub(w));
        // Whole vectors are read.
        let run = page_tokens.max(LANES);
        let pages = first / run * run / page_tokens..positions.end.div_ceil(page_tokens);
        for _ in 0..heads.kv_heads {
            let start = self.entries.len() as u32;
            for page in pages.clone() {
                self.entries.push(self.entry(page, ordered, table));
            }
            self.ranges.push(start..self.entries.len() as u32);
        }
        let splits = ((first / SPLIT_TOKENS) as u32, positions.end.div_ceil(SPLIT_TOKENS) as u32);
        self.items.push(Item { seat: s.seat, first_page: pages.start as u32, splits, streams: false });
    }

    /// Finds or takes frames for items whose pages share them: those of one seat, or all.
    fn find(&mut self, items: Range<usize>) {
        let (kv_heads, layer) = (self.geometry.kv_heads, self.layer);
        let seat = self.items[items.start].seat;
        let ranges = items.start * kv_heads..items.end * kv_heads;
        self.residency.begin(seat, layer);
        let (mut wanted, mut misses) = (0, 0);
        let mut first = items.start;
        while first < items.end {
            let seat = self.items[first].seat;
            let own = self.items[first..items.end].iter().take_while(|item| item.seat == seat).count();
            let ranges = first * kv_heads..(first + own) * kv_heads;
            self.each_cold(ranges.clone(), |tier, at, _, head| {
                wanted += 1;
                let Entry { known, block, .. } = tier.entries[at];
                match tier.residency.need(seat, layer, head, known as usize) {
                    Some(frame) => tier.entries[at].frame = frame.0,
                    // Several rows may miss a page that takes one frame.
                    None => misses += usize::from(own == 1 || !tier.mark(block, head, true)),
                }
            });
            if own > 1 {
                self.each_cold(ranges, |tier, at, _, head| {
                    tier.mark(tier.entries[at].block, head, false);
                });
            }
            first += own;
        }
        let (bytes, poison) = (self.geometry.page_bytes(), self.spec.poison);
        let arena = self.arena.as_mut_slice();
        self.residency.fit(seat, layer, wanted, misses, &mut |frame| {
            if poison {
                arena[frame.at() * bytes..(frame.at() + 1) * bytes].fill(0xff);
            }
        });
        self.each_cold(ranges, |tier, at, item, head| {
            let Entry { known: page, block, frame, .. } = tier.entries[at];
            if frame != NONE {
                return;
            }
            let seat = tier.items[item].seat;
            // Another row of this step may have missed it, too.
            let known = tier.residency.find(seat, layer, head, page as usize);
            tier.entries[at].frame = if let Some(frame) = known {
                frame.0
            } else if tier.residency.has_room(seat, layer) {
                let frame = tier.residency.insert(seat, layer, head, page as usize).0;
                tier.fetches.push(Fetch { seat, head: head as u32, known: page, block, frame });
                frame
            } else {
                tier.residency.counters_mut(seat).streamed += 1;
                tier.items[item].streams = true;
                NONE
            };
        });
    }

    /// Marks a page as seen, or no more; returns whether it was.
    fn mark(&mut self, block: BlockIndex, head: usize, seen: bool) -> bool {
        let bit = block.at() * self.geometry.kv_heads + head;
        let word = &mut self.seen[bit / 64];
        let was = *word >> (bit % 64) & 1 == 1;
        *word = *word & !(1 << (bit % 64)) | u64::from(seen) << (bit % 64);
        was
    }

    /// Visits the entries in `ranges` that are not local, with their index, item and head, and sets the frames of those that are.
    fn each_cold(&mut self, ranges: Range<usize>, mut visit: impl FnMut(&mut Self, usize, usize, usize)) {
        let kv_heads = self.geometry.kv_heads;
        for i in ranges {
            let seat = self.items[i / kv_heads].seat;
            let (local_start, _) = self.local[seat.at()].pages;
            for at in self.ranges[i].start as usize..self.ranges[i].end as usize {
                let Entry { page, known, .. } = self.entries[at];
                if known != page || page < local_start {
                    visit(self, at, i / kv_heads, i % kv_heads);
                } else if self.entries[at].frame == NONE {
                    let frame = self.local_frame(seat, self.layer, page as usize).expect("a local page");
                    self.entries[at].frame = (frame + i % kv_heads) as u32;
                }
            }
        }
    }

    /// Cuts the items into waves; returns how many there are.
    fn cut(&mut self) -> usize {
        let kv_heads = self.geometry.kv_heads;
        let (mut wave, mut used) = (0, 0);
        for item in 0..self.items.len() {
            let Item { splits: (start, end), streams, .. } = self.items[item];
            if !streams {
                // All of its frames stay: as good in the first wave as in any.
                self.waves.push(Wave { number: 0, item: item as u32, splits: (start, end) });
                continue;
            }
            let mut from = start;
            for split in start..end {
                let passing: usize = (0..kv_heads)
                    .map(|head| {
                        let entries = self.split_entries(item, head, split as usize);
                        self.entries[entries].iter().filter(|e| e.frame == NONE).count()
                    })
                    .sum();
                assert!(passing <= self.layout.wave_frames, "a wave holds a split of all heads");
                if used + passing > self.layout.wave_frames {
                    if split > from {
                        self.waves.push(Wave { number: wave, item: item as u32, splits: (from, split) });
                    }
                    (wave, used, from) = (wave + 1, 0, split);
                }
                used += passing;
            }
            self.waves.push(Wave { number: wave, item: item as u32, splits: (from, end) });
        }
        wave as usize + 1
    }

    /// The entries of an item and head that lie in `split`.
    fn split_entries(&self, item: usize, head: usize, split: usize) -> Range<usize> {
        let per_split = SPLIT_TOKENS / self.geometry.page_tokens;
        let first_page = self.items[item].first_page as usize;
        let range = &self.ranges[item * self.geometry.kv_heads + head];
        let len = range.len();
        let first = (split * per_split).saturating_sub(first_page).min(len);
        let end = ((split + 1) * per_split).saturating_sub(first_page).min(len);
        range.start as usize + first..range.start as usize + end
    }

    /// What of an item is attended to in `wave`.
    pub fn part(&self, item: usize, wave: usize) -> Option<WavePart> {
        let whole = self.items[item].splits;
        let found = self.waves.iter().find(|w| w.item as usize == item && w.number as usize == wave)?;
        Some(WavePart {
            splits: found.splits.0 as usize..found.splits.1 as usize,
            starts: found.splits.0 == whole.0,
            ends: found.splits.1 == whole.1,
        })
    }

    /// The pages of an item and head, in order, and the number of the first where they are consecutive.
    pub fn entries(&self, item: usize, head: usize) -> (&[Entry], usize) {
        let range = &self.ranges[item * self.geometry.kv_heads + head];
        let entries = &self.entries[range.start as usize..range.end as usize];
        (entries, self.items[item].first_page as usize)
    }

    /// Fetches what `wave` needs.
    pub fn gather(&mut self, pool: &mut Pool, dram: &Layers, wave: usize) {
        // Pages that stay are fetched before the first wave.
        if wave > 0 {
            self.fetches.clear();
        }
        if self.spec.poison {
            self.poison(self.wave_base()..self.frames());
        }
        self.pass(wave);
        if self.fetches.is_empty() {
            return;
        }
        let start = Instant::now();
        let layer = self.layer;
        for i in 0..self.fetches.len() {
            // Copies are clean at once, and no page that was sent has such a number.
            let Fetch { seat, known, .. } = self.fetches[i];
            self.wait_for(seat, layer, known as usize);
        }
        let bytes = self.fetched_part;
        match self.spec.transfer {
            Transfer::PerPage => self.fetch_per_page(dram),
            Transfer::Fused => self.fetch_together(pool, dram),
        }
        for Fetch { seat, .. } in &self.fetches {
            self.residency.counters_mut(*seat).fetched_bytes += bytes as u64;
        }
        self.stall_nanos += start.elapsed().as_nanos() as u64;
    }

    /// Fetches what is listed in one call, on all threads.
    fn fetch_together(&mut self, pool: &mut Pool, dram: &Layers) {
        let (layer, page_bytes, bytes) = (self.layer, self.geometry.page_bytes(), self.fetched_part);
        let done = self.link.send(Direction::ToHbm, self.fetches.len() * bytes, 1);
        let arena = Shared(self.arena.as_mut_ptr());
        let fetches = &self.fetches;
        pool.run(fetches.len().div_ceil(PAGES_PER_TASK), &|task, _| {
            for fetch in fetches.iter().skip(task * PAGES_PER_TASK).take(PAGES_PER_TASK) {
                let page = dram.page_bytes(layer, fetch.block, fetch.head as usize);
                // SAFETY: each frame is the target of one copy, and lies in the arena.
                unsafe {
                    arena
                        .at(fetch.frame as usize * page_bytes)
                        .copy_from_nonoverlapping(page.as_ptr(), bytes);
                }
            }
        });
        self.link.wait(done);
    }

    /// Gives the pages that pass through in `wave` a frame each.
    fn pass(&mut self, wave: usize) {
        let mut next = self.wave_base() as u32;
        for i in 0..self.waves.len() {
            let Wave { number, item, splits } = self.waves[i];
            let Item { seat, streams, .. } = self.items[item as usize];
            if number as usize != wave || !streams {
                continue;
            }
            for split in splits.0..splits.1 {
                for head in 0..self.geometry.kv_heads {
                    for at in self.split_entries(item as usize, head, split as usize) {
                        let Entry { known, block, frame, .. } = self.entries[at];
                        if frame == NONE {
                            self.entries[at].frame = next;
                            self.fetches.push(Fetch { seat, head: head as u32, known, block, frame: next });
                            next += 1;
                        }
                    }
                }
            }
        }
        assert!(next as usize <= self.frames(), "a wave fits its frames");
    }
}
