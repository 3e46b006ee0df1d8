//! The HBM tier as a naive model: what is resident, by the rules alone, with a copy of each page.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Pages, Selections};
use crate::residency::{EXTENT_FRAMES, STAMPS, SeatCounters};
use crate::sparse::Attention;
use crate::tier::{TierLayout, TierSpec, TierState};
use crate::{Batch, HeadShape, SeatIndex, SequenceRows};

/// A page in a frame.
#[derive(Clone, Debug)]
struct Resident {
    head: usize,
    page: usize,
    /// Step of its owner in which it was last needed.
    needed: u64,
    values: Vec<f32>,
}

/// The frames of a (seat, layer).
#[derive(Clone, Debug, Default)]
struct Owner {
    frames: Vec<Option<Resident>>,
    step: u64,
}

/// An HBM tier.
#[derive(Debug)]
pub(super) struct NaiveTier {
    spec: TierSpec,
    layout: TierLayout,
    owners: BTreeMap<(SeatIndex, usize), Owner>,
    counters: BTreeMap<SeatIndex, SeatCounters>,
    /// First local page of a seat in this step.
    local: BTreeMap<SeatIndex, usize>,
    /// Pages that are full, by (seat, layer).
    full: BTreeMap<(SeatIndex, usize), usize>,
    /// Pages that pass through in this layer.
    passing: BTreeMap<(SeatIndex, usize, usize), Vec<f32>>,
    /// What `gather` has to fetch: seat, layer, head, page, DRAM block, and the frame that it is for.
    missing: Vec<Missing>,
    fetched_pages: u64,
}

#[derive(Debug)]
struct Missing {
    seat: SeatIndex,
    layer: usize,
    head: usize,
    page: usize,
    block: crate::BlockIndex,
    frame: Option<usize>,
}

/// The rows of a batch that attend alike: those of a sequence that attend to all, and every sparse row by itself.
pub(super) struct Item<'a> {
    sequence: &'a SequenceRows,
    /// Positions of its rows.
    positions: Range<usize>,
    /// The place of its selection.
    place: Option<usize>,
}

/// The items of a batch, in order.
fn items<'a>(batch: &'a Batch, selection: bool) -> Vec<Item<'a>> {
    let mut place = 0;
    let mut items = Vec::new();
    for sequence in batch.sequences {
        let (first, end) = (sequence.first_position as usize, sequence.context_tokens());
        let sparse = selection && sequence.attention != Attention::Dense;
        let sparse_from = if sparse { (sequence.prompt_len as usize).clamp(first, end) } else { end };
        if sparse_from > first {
            items.push(Item { sequence, positions: first..sparse_from, place: None });
        }
        for position in sparse_from..end {
            items.push(Item { sequence, positions: position..position + 1, place: Some(place) });
            place += 1;
        }
    }
    items
}

impl NaiveTier {
    pub(super) fn new(spec: TierSpec, layout: TierLayout) -> Self {
        NaiveTier {
            spec,
            layout,
            owners: BTreeMap::new(),
            counters: BTreeMap::new(),
            local: BTreeMap::new(),
            full: BTreeMap::new(),
            passing: BTreeMap::new(),
            missing: Vec::new(),
            fetched_pages: 0,
        }
    }

    /// Sets the quotas of the sequences of `batch`.
    pub(super) fn balance(&mut self, layers: usize, batch: &Batch) {
        for grow in [false, true] {
            for sequence in batch.sequences {
                for layer in 0..layers {
                    let frames = sequence.quota as usize * EXTENT_FRAMES;
                    let others: usize = self
                        .owners
                        .iter()
                        .filter(|(k, _)| **k != (sequence.seat, layer))
                        .map(|(_, o)| o.frames.len())
                        .sum();
                    let owner = self.owners.entry((sequence.seat, layer)).or_default();
                    if !grow && frames < owner.frames.len() {
                        owner.step += 1;
                        let held = owner.frames.iter().flatten().count();
                        let spill = held.saturating_sub(frames);
                        owner.evict(spill);
                        self.counters.entry(sequence.seat).or_default().evictions += spill as u64;
                        for frame in frames..owner.frames.len() {
                            if let Some(page) = owner.frames[frame].take() {
                                let free = owner.lowest_free();
                                owner.frames[free] = Some(page);
                            }
                        }
                        owner.frames.truncate(frames);
                    } else if grow && frames > owner.frames.len() {
                        let all = self.layout.extents * EXTENT_FRAMES;
                        owner.frames.resize_with(frames.min(all - others), || None);
                    }
                }
            }
        }
    }

    /// The first page that a seat holds locally, when its rows begin at `first_position`.
    pub(super) fn begin(&mut self, page_tokens: usize, batch: &Batch) {
        for s in batch.sequences {
            self.local.insert(s.seat, self.spec.local_start(s.first_position as usize, page_tokens));
        }
    }

    /// Notes the pages that `batch` fills.
    pub(super) fn save(&mut self, page_tokens: usize, kv_heads: usize, layer: usize, batch: &Batch) {
        for s in batch.sequences {
            let before = s.first_position as usize / page_tokens;
            let full = s.context_tokens() / page_tokens;
            self.full.insert((s.seat, layer), full);
            self.counters.entry(s.seat).or_default().saved += ((full - before) * kv_heads) as u64;
        }
    }

    pub(super) fn saved_tokens(&self, layers: usize, page_tokens: usize, seat: SeatIndex) -> usize {
        let full = (0..layers).map(|layer| self.full.get(&(seat, layer)).copied().unwrap_or(0));
        full.min().unwrap_or(0) * page_tokens
    }

    /// Decides what becomes of every page that the rows of `batch` will read.
    pub(super) fn resolve(
        &mut self,
        pages: (usize, usize),
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) {
        let (layer, page_tokens) = pages;
        self.missing.clear();
        self.passing.clear();
        let items = items(batch, selection.is_some());
        let selected = |item: &Item, head: usize| {
            item.place.zip(selection).and_then(|(p, s)| s.bits[s.at(p, head)].as_ref())
        };
        let is_set =
            |bits: &[u64], slot: usize| bits.get(slot / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1);
        let needed = |tier: &Self, item: &Item, head: usize| -> Vec<usize> {
            let first = window.map_or(0, |w| (item.positions.start + 1).saturating_sub(w));
            // Whole vectors are read.
            let run = page_tokens.max(16);
            let first = first / run * run / page_tokens;
            let bits = selected(item, head);
            let touched = |page: &usize| {
                bits.is_none_or(|bits| {
                    (page * page_tokens..(page + 1) * page_tokens).any(|slot| is_set(bits, slot))
                })
            };
            let local = tier.local[&item.sequence.seat];
            (first..item.positions.end.div_ceil(page_tokens)).filter(|&p| p < local).filter(touched).collect()
        };
        let mut seats: Vec<SeatIndex> = items.iter().map(|i| i.sequence.seat).collect();
        seats.dedup();
        for seat in seats {
            let mut wanted = Vec::new();
            for item in items.iter().filter(|i| i.sequence.seat == seat) {
                let table = batch.block_table(item.sequence);
                for head in 0..heads.kv_heads {
                    if let Some(bits) = selected(item, head) {
                        let pages = needed(self, item, head);
                        let slots = pages.iter().flat_map(|p| p * page_tokens..(p + 1) * page_tokens);
                        let slots = slots.filter(|&slot| is_set(bits, slot)).count();
                        let counters = self.counters.entry(seat).or_default();
                        counters.select(pages.len(), slots, page_tokens);
                    }
                    wanted.extend(needed(self, item, head).into_iter().map(|page| (head, page, table[page])));
                }
            }
            let owner = self.owners.entry((seat, layer)).or_default();
            let counters = self.counters.entry(seat).or_default();
            owner.step += 1;
            let fits = wanted.len() <= owner.frames.len();
            if fits {
                let hits = wanted.iter().filter(|(head, page, _)| owner.need(*head, *page, counters)).count();
                let held = owner.frames.iter().flatten().count();
                let spill = (held + wanted.len() - hits).saturating_sub(owner.frames.len());
                owner.evict(spill);
                counters.evictions += spill as u64;
            }
            for (head, page, block) in wanted {
                if fits && owner.frames.iter().flatten().any(|r| (r.head, r.page) == (head, page)) {
                    continue;
                }
                if !fits && owner.need(head, page, counters) {
                    continue;
                }
                let free = owner.frames.iter().position(Option::is_none);
                match free {
                    Some(free) => {
                        counters.misses += 1;
                        owner.frames[free] =
                            Some(Resident { head, page, needed: owner.step, values: Vec::new() });
                    }
                    None => counters.streamed += 1,
                }
                self.missing.push(Missing { seat, layer, head, page, block, frame: free });
            }
        }
    }

    /// Copies what was missed.
    pub(super) fn gather(&mut self, copy: impl Fn(usize, crate::BlockIndex, usize) -> Vec<f32>) {
        for Missing { seat, layer, head, page, block, frame } in self.missing.drain(..) {
            let values = copy(layer, block, head);
            self.fetched_pages += 1;
            match frame {
                None => {
                    self.passing.insert((seat, head, page), values);
                }
                Some(frame) => {
                    let owner = self.owners.get_mut(&(seat, layer)).expect("a frame has an owner");
                    owner.frames[frame].as_mut().expect("a frame that was taken").values = values;
                }
            }
        }
    }

    /// The copy of a page that attention may read; `None` for local pages.
    ///
    /// # Panics
    /// When it was not fetched.
    pub(super) fn page(&self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> Option<&[f32]> {
        if page >= self.local[&seat] {
            return None;
        }
        let resident = self.owners[&(seat, layer)].frames.iter().flatten();
        let found = resident.filter(|r| (r.head, r.page) == (head, page)).map(|r| &r.values).next();
        let passing = || self.passing.get(&(seat, head, page));
        Some(found.or_else(passing).expect("a page that attention reads was resolved and gathered"))
    }

    pub(super) fn release(&mut self, seat: SeatIndex) {
        self.owners.retain(|(s, _), _| *s != seat);
        self.full.retain(|(s, _), _| *s != seat);
        self.counters.remove(&seat);
        self.local.remove(&seat);
    }

    pub(super) fn state(&self, page_bytes: usize) -> TierState {
        let frames: usize = self.owners.values().map(|o| o.frames.len()).sum();
        TierState {
            cache_frames: (self.layout.extents * EXTENT_FRAMES) as u64,
            cache_used: self.owners.values().map(|o| o.frames.iter().flatten().count() as u64).sum(),
            free_extents: (self.layout.extents - frames / EXTENT_FRAMES) as u64,
            fetched_bytes: self.fetched_pages * page_bytes as u64,
            ..TierState::default()
        }
    }

    pub(super) fn counters(&self, layers: usize, seat: SeatIndex) -> (SeatCounters, usize) {
        let held = (0..layers).filter_map(|l| self.owners.get(&(seat, l)));
        let held = held.map(|o| o.frames.iter().flatten().count()).sum();
        (self.counters.get(&seat).copied().unwrap_or_default(), held)
    }

    pub(super) fn resident(&self, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        let owner = self.owners.get(&(seat, layer)).into_iter();
        let mut pages: Vec<_> =
            owner.flat_map(|o| o.frames.iter().flatten()).map(|r| (r.head, r.page)).collect();
        pages.sort_unstable();
        pages
    }

    /// Compares every resident page with its copy in DRAM.
    pub(super) fn check(&self, kv: &Pages, batch: &Batch) {
        for s in batch.sequences {
            for (_, owner) in self.owners.iter().filter(|((seat, _), _)| *seat == s.seat) {
                assert!(owner.frames.len() <= self.layout.extents * EXTENT_FRAMES, "quotas fit");
            }
            for ((_, layer), owner) in self.owners.iter().filter(|((seat, _), _)| *seat == s.seat) {
                for r in owner.frames.iter().flatten() {
                    let block = batch.block_table(s)[r.page];
                    assert_eq!(r.values, kv.copy(*layer, block, r.head), "a clean page equals its copy");
                }
            }
        }
    }
}

impl Owner {
    /// Whether a page is resident; then it is the youngest.
    fn need(&mut self, head: usize, page: usize, counters: &mut SeatCounters) -> bool {
        let step = self.step;
        let Some(found) = self.frames.iter_mut().flatten().find(|r| (r.head, r.page) == (head, page)) else {
            return false;
        };
        let age = (step - found.needed).min(STAMPS as u64 - 1);
        found.needed = step;
        counters.hits += 1;
        counters.hits_by_age[age as usize] += 1;
        true
    }

    /// Drops the `count` pages that were not needed for longest, by age up to the greatest that is told apart; of equal age,
    /// those in the lowest frames.
    fn evict(&mut self, count: usize) {
        let age = |r: &Resident| (self.step - r.needed).min(STAMPS as u64 - 1);
        let mut order: Vec<(u64, usize)> = (0..self.frames.len())
            .filter_map(|frame| self.frames[frame].as_ref().map(|r| (age(r), frame)))
            .collect();
        order.sort_by_key(|&(age, frame)| (std::cmp::Reverse(age), frame));
        for &(age, frame) in &order[..count] {
            assert!(age > 0, "what a step needs is never evicted");
            self.frames[frame] = None;
        }
    }

    fn lowest_free(&self) -> usize {
        self.frames.iter().position(Option::is_none).expect("there is room for what stays")
    }
}
