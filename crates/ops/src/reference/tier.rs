//! The HBM tier as a naive model: what is resident, by the rules alone, with a copy of each page.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{Pages, Selections};
use crate::cluster::{OrderedCopy, OrderedSlots};
use crate::coverage::Inspections;
use crate::residency::{EXTENT_FRAMES, EvictionRule, LEAF_PAGES, STAMPS, SeatCounters};
use crate::sparse::Attention;
use crate::tier::{TierLayout, TierSpec, TierState};
use crate::{Batch, HeadShape, KvGeometry, SeatIndex, SequenceRows};

/// A page in a frame.
#[derive(Clone, Debug)]
struct Resident {
    seat: SeatIndex,
    head: usize,
    page: usize,
    /// Step of its pool in which it was last needed.
    needed: u64,
    values: Vec<f32>,
}

/// Frames that give way to each other.
#[derive(Clone, Debug, Default)]
struct Pool {
    frames: Vec<Option<Resident>>,
    step: u64,
}

/// An HBM tier.
#[derive(Debug)]
pub(super) struct NaiveTier {
    spec: TierSpec,
    layout: TierLayout,
    geometry: KvGeometry,
    /// Blocks of the pool in DRAM, without those of copies.
    pool_blocks: usize,
    /// By seat, where each has frames of its own, and layer.
    pools: BTreeMap<(Option<SeatIndex>, usize), Pool>,
    counters: BTreeMap<SeatIndex, SeatCounters>,
    /// Of requests that left their seats.
    gone: SeatCounters,
    /// First local page of a seat in this step.
    local: BTreeMap<SeatIndex, usize>,
    /// Pages that are full, by (seat, layer).
    full: BTreeMap<(SeatIndex, usize), usize>,
    /// Pages that stay local after a step, by (seat, layer).
    kept: BTreeMap<(SeatIndex, usize), Range<usize>>,
    /// Pages that pass through in this layer.
    passing: BTreeMap<(SeatIndex, usize, usize), Vec<f32>>,
    /// What `gather` has to fetch: seat, layer, head, page, DRAM block, and the frame that it is for.
    missing: Vec<Missing>,
    /// Steps so far, and frames by layer with a page that another sequence holds, too.
    steps: usize,
    duplicates: BTreeMap<usize, u64>,
    saved_bytes: u64,
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
    pub(super) fn new(spec: TierSpec, layout: TierLayout, geometry: KvGeometry, pool_blocks: usize) -> Self {
        let layers = geometry.num_layers;
        let mut pools = BTreeMap::new();
        if spec.eviction == EvictionRule::Global {
            let frames = vec![None; layout.extents / layers * EXTENT_FRAMES];
            pools.extend((0..layers).map(|layer| ((None, layer), Pool { frames: frames.clone(), step: 0 })));
        }
        NaiveTier {
            spec,
            layout,
            geometry,
            pool_blocks,
            pools,
            counters: BTreeMap::new(),
            gone: SeatCounters::default(),
            local: BTreeMap::new(),
            full: BTreeMap::new(),
            kept: BTreeMap::new(),
            passing: BTreeMap::new(),
            missing: Vec::new(),
            steps: 0,
            duplicates: BTreeMap::new(),
            saved_bytes: 0,
        }
    }

    /// The pool in which the pages of (seat, layer) are.
    fn pool_of(&self, seat: SeatIndex, layer: usize) -> (Option<SeatIndex>, usize) {
        match self.spec.eviction {
            EvictionRule::Bucketed | EvictionRule::Exact => (Some(seat), layer),
            EvictionRule::Global => (None, layer),
        }
    }

    /// Sets the quotas of the sequences of `batch`, and counts what they hold twice in the next layer.
    pub(super) fn balance(&mut self, batch: &Batch) {
        let layers = self.geometry.num_layers;
        self.set_quotas(batch);
        let layer = self.steps % layers;
        self.steps += 1;
        let mut held = BTreeMap::new();
        let tables: BTreeMap<_, _> = batch.sequences.iter().map(|s| (s.seat, batch.block_table(s))).collect();
        for (seat, table) in tables {
            for (head, page) in self.resident(seat, layer) {
                let block = self.spec.block_of(page, table, self.pool_blocks, self.geometry.page_tokens);
                *held.entry((block, head)).or_insert(0) += 1;
            }
        }
        self.duplicates.insert(layer, held.values().map(|copies| copies - 1).sum());
    }

    /// Sets the quotas of the sequences of `batch`, where there are any.
    fn set_quotas(&mut self, batch: &Batch) {
        let layers = self.geometry.num_layers;
        if self.spec.eviction == EvictionRule::Global {
            return;
        }
        for grow in [false, true] {
            for sequence in batch.sequences {
                for layer in 0..layers {
                    self.set_quota(sequence.seat, layer, sequence.quota as usize, grow);
                }
            }
        }
    }

    /// Takes from (seat, layer) what it has beyond `extents` extents, or with `grow` gives it what it lacks, as far as there is any.
    fn set_quota(&mut self, seat: SeatIndex, layer: usize, extents: usize, grow: bool) {
        let frames = extents * EXTENT_FRAMES;
        let own = (Some(seat), layer);
        let others = self.pools.iter().filter(|(k, _)| **k != own).map(|(_, p)| p.frames.len());
        let others: usize = others.sum();
        let pool = self.pools.entry(own).or_default();
        if !grow && frames < pool.frames.len() {
            pool.step += 1;
            let held = pool.frames.iter().flatten().count();
            pool.evict(self.spec.eviction, held.saturating_sub(frames), &mut self.counters);
            for frame in frames..pool.frames.len() {
                if let Some(page) = pool.frames[frame].take() {
                    let free = pool.lowest_free();
                    pool.frames[free] = Some(page);
                }
            }
            pool.frames.truncate(frames);
        } else if grow && frames > pool.frames.len() {
            let all = self.layout.extents * EXTENT_FRAMES;
            pool.frames.resize_with(frames.min(all - others), || None);
        }
    }

    /// Sets the quota of (seat, layer), where there are any.
    pub(super) fn grant(&mut self, seat: SeatIndex, layer: usize, extents: usize) {
        if self.spec.eviction != EvictionRule::Global {
            self.set_quota(seat, layer, extents, false);
            self.set_quota(seat, layer, extents, true);
        }
    }

    fn block_bytes(&self) -> u64 {
        (self.geometry.kv_heads * self.geometry.page_bytes()) as u64
    }

    /// Makes the last pages of each sequence local, those that hold tokens from DRAM if the step before did not keep them.
    pub(super) fn begin(&mut self, layer: usize, batch: &Batch) {
        let (page_tokens, block_bytes) = (self.geometry.page_tokens, self.block_bytes());
        for s in batch.sequences {
            let first = s.first_position as usize;
            let (start, end) =
                (self.spec.local_start(first, page_tokens), s.context_tokens().div_ceil(page_tokens));
            self.local.insert(s.seat, start);
            let stay = if s.num_rows() > 1 { self.layout.local_pages } else { end };
            let kept = self.kept.insert((s.seat, layer), start.max(end.saturating_sub(stay))..end);
            let is_there = |page: &usize| kept.as_ref().is_some_and(|kept| kept.contains(page));
            let fetched = (start..first.div_ceil(page_tokens)).filter(|page| !is_there(page)).count();
            self.counters.entry(s.seat).or_default().fetched_bytes += fetched as u64 * block_bytes;
        }
    }

    /// Has the sequences of `batch` hold locally what a row at the end of their context would.
    pub(super) fn settle(&mut self, batch: &Batch) {
        for s in batch.sequences {
            self.local.insert(s.seat, self.spec.local_start(s.context_tokens(), self.geometry.page_tokens));
        }
    }

    /// Notes the pages that `batch` fills, and has those of prompts stay where there is room.
    pub(super) fn save(
        &mut self,
        layer: usize,
        batch: &Batch,
        copy: impl Fn(crate::BlockIndex, usize) -> Vec<f32>,
    ) {
        let KvGeometry { page_tokens, kv_heads, .. } = self.geometry;
        for s in batch.sequences {
            let before = s.first_position as usize / page_tokens;
            let full = s.context_tokens() / page_tokens;
            self.full.insert((s.seat, layer), full);
            self.counters.entry(s.seat).or_default().saved += ((full - before) * kv_heads) as u64;
            self.saved_bytes += (full - before) as u64 * self.block_bytes();
            if s.num_rows() > 1 {
                let key = self.pool_of(s.seat, layer);
                let pool = self.pools.entry(key).or_default();
                for page in before..full {
                    for head in 0..kv_heads {
                        let known = pool.frames.iter().flatten();
                        let is_new =
                            known.filter(|r| (r.seat, r.head, r.page) == (s.seat, head, page)).count() == 0;
                        if let Some(free) = pool.frames.iter().position(Option::is_none).filter(|_| is_new) {
                            let values = copy(batch.block_table(s)[page], head);
                            let seat = s.seat;
                            pool.frames[free] =
                                Some(Resident { seat, head, page, needed: pool.step, values });
                        }
                    }
                }
            }
        }
    }

    /// Saves what is local and not full, too.
    pub(super) fn park(&mut self, seat: SeatIndex) {
        for layer in 0..self.geometry.num_layers {
            let full = self.full.get(&(seat, layer)).copied().unwrap_or(0);
            let kept = self.kept.get(&(seat, layer)).cloned().unwrap_or(0..0);
            self.saved_bytes += kept.filter(|&page| page >= full).count() as u64 * self.block_bytes();
        }
    }

    pub(super) fn saved_tokens(&self, seat: SeatIndex) -> usize {
        let KvGeometry { num_layers: layers, page_tokens, .. } = self.geometry;
        let full = (0..layers).map(|layer| self.full.get(&(seat, layer)).copied().unwrap_or(0));
        full.min().unwrap_or(0) * page_tokens
    }

    /// Decides what becomes of every page that the rows of `batch` will read.
    pub(super) fn resolve(
        &mut self,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) {
        let page_tokens = self.geometry.page_tokens;
        self.missing.clear();
        self.passing.clear();
        let items = items(batch, selection.is_some());
        let selected = |item: &Item, head: usize| {
            item.place.zip(selection).and_then(|(p, s)| s.bits[s.at(p, head)].as_ref())
        };
        let is_set =
            |bits: &[u64], slot: usize| bits.get(slot / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1);
        // A page, and where it is among those that the tables know.
        let spec = self.spec;
        let needed = |tier: &Self, item: &Item, head: usize| -> Vec<(usize, usize)> {
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
            let ordered = item.place.zip(selection).map_or(OrderedSlots::NONE, |(place, s)| s.ordered[place]);
            let known = |page: usize| match ordered.of(page * page_tokens) {
                copy @ Some(_) => Some((page, spec.known_page(page, copy, page_tokens))),
                None => (page < local).then_some((page, page)),
            };
            (first..item.positions.end.div_ceil(page_tokens)).filter(touched).filter_map(known).collect()
        };
        let mut pools: Vec<_> = items.iter().map(|i| self.pool_of(i.sequence.seat, layer)).collect();
        pools.dedup();
        for key in pools {
            let (mut wanted, mut selections) = (Vec::new(), Vec::new());
            for item in items.iter().filter(|i| self.pool_of(i.sequence.seat, layer) == key) {
                let (seat, table) = (item.sequence.seat, batch.block_table(item.sequence));
                for head in 0..heads.kv_heads {
                    if let Some(bits) = selected(item, head) {
                        let pages = needed(self, item, head);
                        let slots = pages.iter().flat_map(|(p, _)| p * page_tokens..(p + 1) * page_tokens);
                        let slots = slots.filter(|&slot| is_set(bits, slot)).count();
                        selections.push((seat, pages.len(), slots));
                    }
                    let pages = needed(self, item, head).into_iter();
                    wanted.extend(pages.map(|(_, known)| {
                        (seat, head, known, spec.block_of(known, table, self.pool_blocks, page_tokens))
                    }));
                }
            }
            let pool = self.pools.entry(key).or_default();
            let counters = &mut self.counters;
            for (seat, pages, slots) in selections {
                counters.entry(seat).or_default().select(pages, slots, page_tokens);
            }
            pool.step += 1;
            let missed = wanted.iter().filter(|(seat, head, page, _)| {
                !pool.need(*seat, *head, *page, counters.entry(*seat).or_default())
            });
            // Several rows may miss a page that takes one frame.
            let misses =
                missed.map(|&(seat, head, page, _)| (seat, head, page)).collect::<BTreeSet<_>>().len();
            let held = pool.frames.iter().flatten().count();
            let spill = (held + misses).saturating_sub(pool.frames.len());
            let spill = spill.min(pool.frames.iter().flatten().filter(|r| r.needed < pool.step).count());
            pool.evict(self.spec.eviction, spill, counters);
            for (seat, head, page, block) in wanted {
                if pool.frames.iter().flatten().any(|r| (r.seat, r.head, r.page) == (seat, head, page)) {
                    continue;
                }
                let free = pool.frames.iter().position(Option::is_none);
                let counters = counters.entry(seat).or_default();
                match free {
                    Some(free) => {
                        counters.misses += 1;
                        let values = Vec::new();
                        pool.frames[free] = Some(Resident { seat, head, page, needed: pool.step, values });
                    }
                    None => counters.streamed += 1,
                }
                self.missing.push(Missing { seat, layer, head, page, block, frame: free });
            }
        }
    }

    /// Copies what was missed.
    pub(super) fn gather(&mut self, copy: impl Fn(usize, crate::BlockIndex, usize) -> Vec<f32>) {
        for Missing { seat, layer, head, page, block, frame } in std::mem::take(&mut self.missing) {
            let values = copy(layer, block, head);
            let page_bytes = self.geometry.page_bytes() as u64;
            self.counters.entry(seat).or_default().fetched_bytes += page_bytes;
            match frame {
                None => {
                    self.passing.insert((seat, head, page), values);
                }
                Some(frame) => {
                    let key = self.pool_of(seat, layer);
                    let pool = self.pools.get_mut(&key).expect("a frame is in a pool");
                    pool.frames[frame].as_mut().expect("a frame that was taken").values = values;
                }
            }
        }
    }

    /// Counts the keys that checks of selections read: those of all pages that are neither local nor resident.
    pub(super) fn look(
        &mut self,
        inspections: &Inspections,
        layer: usize,
        batch: &Batch,
        selection: &Selections,
    ) {
        let page_tokens = self.geometry.page_tokens;
        for asked in inspections.asked.iter().filter(|asked| asked.layer as usize == layer) {
            let rows = batch.sparse_rows().enumerate().filter(|(_, row)| row.sequence.seat == asked.seat);
            let (place, row) = rows.last().expect("a row that is inspected selects");
            if selection.bits[selection.at(place, 0)].is_none() {
                continue;
            }
            let (local, resident) = (self.local[&asked.seat], self.resident(asked.seat, layer));
            let known = |page: usize| match selection.ordered[place].of(page * page_tokens) {
                copy @ Some(_) => Some(self.spec.known_page(page, copy, page_tokens)),
                None => (page < local).then_some(page),
            };
            let pages = (0..(row.position + 1).div_ceil(page_tokens)).filter_map(known);
            let of_heads = pages.flat_map(|page| (0..self.geometry.kv_heads).map(move |head| (head, page)));
            let cold = of_heads.filter(|page| !resident.contains(page)).count();
            let bytes = cold as u64 * self.geometry.page_bytes() as u64 / 2;
            self.counters.entry(asked.seat).or_default().fetched_bytes += bytes;
        }
    }

    /// The copy of a page that attention may read, or of its place in `copy`; `None` for local pages.
    ///
    /// # Panics
    /// When it was not fetched.
    pub(super) fn page(
        &self,
        seat: SeatIndex,
        layer: usize,
        head: usize,
        page: usize,
        copy: Option<OrderedCopy>,
    ) -> Option<&[f32]> {
        if copy.is_none() && page >= self.local[&seat] {
            return None;
        }
        let page = self.spec.known_page(page, copy, self.geometry.page_tokens);
        let resident = self.pools[&self.pool_of(seat, layer)].frames.iter().flatten();
        let found =
            resident.filter(|r| (r.seat, r.head, r.page) == (seat, head, page)).map(|r| &r.values).next();
        let passing = || self.passing.get(&(seat, head, page));
        Some(found.or_else(passing).expect("a page that attention reads was resolved and gathered"))
    }

    pub(super) fn release(&mut self, seat: SeatIndex) {
        self.pools.retain(|(owner, _), _| *owner != Some(seat));
        for frame in self.pools.values_mut().flat_map(|pool| &mut pool.frames) {
            if frame.as_ref().is_some_and(|r| r.seat == seat) {
                *frame = None;
            }
        }
        self.full.retain(|(s, _), _| *s != seat);
        self.kept.retain(|(s, _), _| *s != seat);
        self.gone.add(&self.counters.remove(&seat).unwrap_or_default());
        self.local.remove(&seat);
    }

    /// What a device says of itself, without what depends on time and on how it cuts waves.
    pub(super) fn state(&self) -> TierState {
        let kv_heads = self.geometry.kv_heads;
        let frames: usize = self.pools.values().map(|pool| pool.frames.len()).sum();
        let resident = || {
            self.pools
                .iter()
                .flat_map(|((_, layer), pool)| pool.frames.iter().flatten().map(move |r| (layer, r)))
        };
        let leaves: BTreeSet<_> =
            resident().map(|(layer, r)| (layer, r.seat, r.head, r.page / LEAF_PAGES)).collect();
        // A leaf has a frame for each page and a count; a frame knows its page, its age, and whose it is where all share.
        let frame = match self.spec.eviction {
            EvictionRule::Bucketed => 4 + 1,
            EvictionRule::Exact => 4 + 4,
            EvictionRule::Global => 4 + 4 + 4,
        };
        let tables = leaves.len() * (4 * LEAF_PAGES + 1) + resident().count() * frame;
        let mut pages = self.gone;
        self.counters.values().for_each(|counters| pages.add(counters));
        TierState {
            cache_frames: (self.layout.extents * EXTENT_FRAMES) as u64,
            cache_used: self.pools.values().map(|pool| pool.frames.iter().flatten().count() as u64).sum(),
            free_extents: (self.layout.extents - frames / EXTENT_FRAMES) as u64,
            duplicate_bytes: self.duplicates.values().sum::<u64>() * self.geometry.page_bytes() as u64,
            pinned_frames: (self.layout.local_frames
                + self.layout.fresh_blocks * kv_heads
                + self.layout.wave_frames) as u64,
            table_bytes: self.spec.residency(&self.geometry, &self.layout).fixed_bytes() + tables as u64,
            saved_bytes: self.saved_bytes,
            pages,
            ..TierState::default()
        }
    }

    pub(super) fn counters(&self, seat: SeatIndex) -> (SeatCounters, usize) {
        let held = (0..self.geometry.num_layers).map(|layer| self.resident(seat, layer).len()).sum();
        (self.counters.get(&seat).copied().unwrap_or_default(), held)
    }

    pub(super) fn resident(&self, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        let pool = self.pools.get(&self.pool_of(seat, layer)).into_iter();
        let of_seat = pool.flat_map(|pool| pool.frames.iter().flatten()).filter(|r| r.seat == seat);
        let mut pages: Vec<_> = of_seat.map(|r| (r.head, r.page)).collect();
        pages.sort_unstable();
        pages
    }

    /// Compares every resident page with its copy in DRAM.
    pub(super) fn check(&self, kv: &Pages, batch: &Batch) {
        for pool in self.pools.values() {
            assert!(pool.frames.len() <= self.layout.extents * EXTENT_FRAMES, "quotas fit");
        }
        for s in batch.sequences {
            for ((_, layer), pool) in &self.pools {
                for r in pool.frames.iter().flatten().filter(|r| r.seat == s.seat) {
                    let table = batch.block_table(s);
                    let block =
                        self.spec.block_of(r.page, table, self.pool_blocks, self.geometry.page_tokens);
                    assert_eq!(r.values, kv.copy(*layer, block, r.head), "a clean page equals its copy");
                }
            }
        }
    }
}

impl Pool {
    /// Whether a page is resident; then it is the youngest.
    fn need(&mut self, seat: SeatIndex, head: usize, page: usize, counters: &mut SeatCounters) -> bool {
        let step = self.step;
        let mut resident = self.frames.iter_mut().flatten();
        let Some(found) = resident.find(|r| (r.seat, r.head, r.page) == (seat, head, page)) else {
            return false;
        };
        let age = (step - found.needed).min(STAMPS as u64 - 1);
        found.needed = step;
        counters.hits += 1;
        counters.hits_by_age[age as usize] += 1;
        true
    }

    /// Drops the `count` pages that were not needed for longest, by age as far as `rule` tells it; of equal age, those in the
    /// lowest frames.
    fn evict(&mut self, rule: EvictionRule, count: usize, counters: &mut BTreeMap<SeatIndex, SeatCounters>) {
        let age = |r: &Resident| match rule {
            EvictionRule::Bucketed => (self.step - r.needed).min(STAMPS as u64 - 1),
            EvictionRule::Exact | EvictionRule::Global => self.step - r.needed,
        };
        let mut order: Vec<(u64, usize)> = (0..self.frames.len())
            .filter_map(|frame| self.frames[frame].as_ref().map(|r| (age(r), frame)))
            .collect();
        order.sort_by_key(|&(age, frame)| (std::cmp::Reverse(age), frame));
        for &(age, frame) in &order[..count] {
            assert!(age > 0, "what a step needs is never evicted");
            let gone = self.frames[frame].take().expect("it was in the order");
            counters.entry(gone.seat).or_default().evictions += 1;
        }
    }

    fn lowest_free(&self) -> usize {
        self.frames.iter().position(Option::is_none).expect("there is room for what stays")
    }
}
