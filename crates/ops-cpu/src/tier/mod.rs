//! The HBM tier on a CPU: an arena of frames that plays its part, so that everything that moves pages is real.
//!
//! See [`ops::tier`] for the kinds of frames, and [`Backend`](ops::Backend) for what each operation promises. Copies between
//! the tiers run on all threads, one call per layer for all sequences and heads (SparseServe's FlashH2D); runs of adjacent
//! blocks are saved by plain copies, since their pages lie alike in both tiers, and single blocks through [`Saver`]. What a real
//! link would take for that, [`Link`] adds if it is asked to. The other way to copy is in [`per_page`].

mod per_page;
mod waves;

use std::ops::Range;
use std::time::Instant;

use ops::residency::{EXTENT_FRAMES, FrameIndex, Residency, SeatCounters};
use ops::tier::{TierLayout, TierSpec, TierState, Transfer};
use ops::{Batch, BlockIndex, Error, KvGeometry, SPLIT_TOKENS, SeatIndex, SequenceRows};

use crate::link::{Direction, Done, Link};
use crate::memory::{Buffer, Shared};
use crate::pages::Layers;
use crate::pool::Pool;
use crate::saver::Saver;
pub use waves::{Entry, WavePart};
use waves::{Fetch, Item, Wave};

/// An arena of frames and what is known about them.
#[derive(Debug)]
pub struct Tier {
    geometry: KvGeometry,
    /// Blocks of the pool in DRAM, without those of copies.
    pool_blocks: usize,
    spec: TierSpec,
    layout: TierLayout,
    /// Cache frames, then local, fresh and wave frames.
    arena: Buffer<u8>,
    residency: Residency,
    /// `[seat][layer]`.
    homes: Vec<Home>,
    /// Local pages of a seat in this step, `[seat]`.
    local: Vec<Local>,
    /// What the rows of a batch attend to in a layer, item by item.
    items: Vec<Item>,
    /// `[item][head]`: its entries.
    ranges: Vec<Range<u32>>,
    entries: Vec<Entry>,
    waves: Vec<Wave>,
    /// What is to be copied before the wave at hand.
    fetches: Vec<Fetch>,
    /// By layer, frames with a page that another sequence holds, too, and the layer that is next to be looked at.
    duplicates: Vec<u64>,
    turn: usize,
    /// Bits of (block, head), all 0 between two looks.
    seen: Vec<u64>,
    /// Of the last `resolve` or `look`.
    layer: usize,
    /// Bytes of a page that are fetched, from its start.
    fetched_part: usize,
    saver: Saver,
    link: Link,
    /// When the last pages have left fresh frames, which are written to again.
    fresh_free: Done,
    saved_bytes: u64,
    stall_nanos: u64,
    extra_waves: u64,
}

/// What is known of the last pages of a (seat, layer).
#[derive(Clone, Copy, Debug, Default)]
struct Home {
    /// Pages in its local frames.
    from: u32,
    end: u32,
    /// Pages that were sent to DRAM, and those of them that are known to be there.
    sent: u32,
    clean: u32,
    /// Of the last page that was sent: its copy, and its way over the link.
    ticket: u64,
    arrival: Done,
}

/// The local pages of a seat in a step.
#[derive(Clone, Copy, Debug, Default)]
struct Local {
    pages: (u32, u32),
    /// In fresh frames from this block of them on, or in its own local frames.
    fresh: Option<u32>,
}

impl Tier {
    /// Frames as `spec` says, before a pool of `pool_blocks` blocks.
    ///
    /// # Errors
    /// Too small a bound; memory.
    pub fn new(spec: TierSpec, geometry: KvGeometry, pool_blocks: usize) -> Result<Self, Error> {
        let layout = spec.layout(&geometry)?;
        let arena = Buffer::zeroed(layout.frame_bytes as usize, "HBM tier")?;
        let listed = spec.pages_listed(&geometry);
        let mut tier = Tier {
            geometry,
            pool_blocks,
            spec,
            layout,
            arena,
            residency: Residency::new(spec.residency(&geometry, &layout)),
            homes: vec![Home::default(); spec.seats * geometry.num_layers],
            local: vec![Local::default(); spec.seats],
            items: Vec::with_capacity(2 * spec.seats + spec.inject_tokens_max),
            ranges: Vec::new(),
            entries: Vec::with_capacity(listed),
            waves: Vec::with_capacity(
                (2 * spec.seats + spec.inject_tokens_max) * (1 + spec.context_max.div_ceil(SPLIT_TOKENS)),
            ),
            fetches: Vec::with_capacity(listed / 2),
            duplicates: vec![0; geometry.num_layers],
            turn: 0,
            seen: vec![0; ((1 + spec.copies) * pool_blocks * geometry.kv_heads).div_ceil(64)],
            layer: 0,
            fetched_part: geometry.page_bytes(),
            saver: Saver::new(spec.staging_chunks(), geometry.kv_heads * geometry.page_bytes(), spec.poison)?,
            link: Link::new(spec.link),
            fresh_free: Done::default(),
            saved_bytes: 0,
            stall_nanos: 0,
            extra_waves: 0,
        };
        tier.ranges.reserve(tier.items.capacity() * geometry.kv_heads);
        if spec.poison {
            tier.poison(0..tier.frames());
        }
        Ok(tier)
    }

    fn frames(&self) -> usize {
        self.local_base() + self.layout.local_frames + self.fresh_frames() + self.layout.wave_frames
    }

    fn fresh_frames(&self) -> usize {
        self.layout.fresh_blocks * self.geometry.kv_heads
    }

    fn local_base(&self) -> usize {
        self.layout.extents * EXTENT_FRAMES
    }

    fn fresh_base(&self) -> usize {
        self.local_base() + self.layout.local_frames
    }

    fn wave_base(&self) -> usize {
        self.fresh_base() + self.fresh_frames()
    }

    /// Fills frames with NaN, whatever the type.
    fn poison(&mut self, frames: Range<usize>) {
        let bytes = self.geometry.page_bytes();
        self.arena.as_mut_slice()[frames.start * bytes..frames.end * bytes].fill(0xff);
    }

    fn home(&self, seat: SeatIndex, layer: usize) -> usize {
        assert!(seat.at() < self.spec.seats, "{seat:?} of {}", self.spec.seats);
        seat.at() * self.geometry.num_layers + layer
    }

    /// The local frame of `page` for head 0; those of the other heads follow.
    fn ring_frame(&self, seat: SeatIndex, layer: usize, page: usize) -> usize {
        let pages = self.layout.local_pages;
        self.local_base() + (self.home(seat, layer) * pages + page % pages) * self.geometry.kv_heads
    }

    /// The frame of a local page for head 0, wherever it is in this step; `None` if it is not local.
    fn local_frame(&self, seat: SeatIndex, layer: usize, page: usize) -> Option<usize> {
        let Local { pages: (start, end), fresh } = self.local[seat.at()];
        if !(start as usize..end as usize).contains(&page) {
            return None;
        }
        Some(match fresh {
            None => self.ring_frame(seat, layer, page),
            Some(block) => {
                self.fresh_base() + (block as usize + page - start as usize) * self.geometry.kv_heads
            }
        })
    }

    /// The bytes of a frame.
    pub fn frame(&self, frame: usize) -> &[u8] {
        let bytes = self.geometry.page_bytes();
        &self.arena.as_slice()[frame * bytes..(frame + 1) * bytes]
    }

    /// The bytes of a local page; `None` if it is not local.
    pub fn local_page(&self, seat: SeatIndex, layer: usize, page: usize, head: usize) -> Option<&[u8]> {
        self.local_frame(seat, layer, page).map(|frame| self.frame(frame + head))
    }

    /// Panics when a page that is not local is not known to be in DRAM either. Pages of a seat that nobody has written to
    /// were filled from outside.
    pub fn check_clean(&self, seat: SeatIndex, layer: usize, page: usize) {
        let Home { sent, clean, .. } = self.homes[self.home(seat, layer)];
        assert!(sent == 0 || (page as u32) < clean, "{seat:?} page {page}: a digest is made of saved pages");
    }

    /// Offset in the arena at which head 0 of a local page is written.
    ///
    /// # Panics
    /// When the page is not local.
    pub fn local_offset(&self, seat: SeatIndex, layer: usize, page: usize) -> usize {
        let frame = self.local_frame(seat, layer, page).expect("tokens are written to local pages");
        frame * self.geometry.page_bytes()
    }

    /// The arena, for the tasks of a fork.
    pub fn shared(&mut self) -> Shared<u8> {
        Shared(self.arena.as_mut_ptr())
    }

    // ---- balance -------------------------------------------------------------------------------------------------

    /// Gives the seats of `batch` their quotas.
    pub fn balance(&mut self, batch: &Batch) {
        let done = self.saver.done();
        for s in batch.sequences {
            for layer in 0..self.geometry.num_layers {
                self.publish(s.seat, layer, done);
                self.shrink(s.seat, layer, s.quota as usize);
            }
        }
        for s in batch.sequences {
            for layer in 0..self.geometry.num_layers {
                self.residency.grow(s.seat, layer, s.quota as usize);
            }
        }
        self.count_duplicates(batch);
    }

    /// Sets the quota of (seat, layer).
    pub fn grant(&mut self, seat: SeatIndex, layer: usize, extents: usize) {
        self.shrink(seat, layer, extents);
        self.residency.grow(seat, layer, extents);
    }

    /// Counts the frames of a layer with a page that a frame before them holds. Who shares any block shares the first.
    fn count_duplicates(&mut self, batch: &Batch) {
        let KvGeometry { num_layers, kv_heads, page_tokens, .. } = self.geometry;
        let layer = self.turn;
        self.turn = (layer + 1) % num_layers;
        let first = |s: &SequenceRows| batch.block_table(s)[0];
        let shares =
            |s: &SequenceRows| batch.sequences.iter().any(|o| o.seat != s.seat && first(o) == first(s));
        let (mut any, mut count) = (false, 0);
        for (i, s) in batch.sequences.iter().enumerate() {
            // Rows of one sequence may be several entries.
            let again = batch.sequences[..i].iter().any(|before| before.seat == s.seat);
            if again || !shares(s) {
                continue;
            }
            any = true;
            for (head, known, _) in self.residency.resident(s.seat, layer) {
                let block = self.spec.block_of(known, batch.block_table(s), self.pool_blocks, page_tokens);
                let bit = block.at() * kv_heads + head;
                count += self.seen[bit / 64] >> (bit % 64) & 1;
                self.seen[bit / 64] |= 1 << (bit % 64);
            }
        }
        if any {
            self.seen.fill(0);
        }
        self.duplicates[layer] = count;
    }

    fn shrink(&mut self, seat: SeatIndex, layer: usize, extents: usize) {
        let bytes = self.geometry.page_bytes();
        let poison = self.spec.poison;
        let arena = self.arena.as_mut_slice();
        self.residency.shrink(seat, layer, extents, &mut |from: FrameIndex, to| {
            if let Some(to) = to {
                arena.copy_within(from.at() * bytes..(from.at() + 1) * bytes, to.at() * bytes);
            }
            if poison {
                arena[from.at() * bytes..(from.at() + 1) * bytes].fill(0xff);
            }
        });
    }

    /// Notes that what was sent is in DRAM, if it is.
    fn publish(&mut self, seat: SeatIndex, layer: usize, done: u64) {
        let home = self.home(seat, layer);
        let home = &mut self.homes[home];
        if home.ticket <= done && self.link.is_done(home.arrival) {
            home.clean = home.sent;
        }
    }

    /// Waits until pages below `page` are in DRAM; returns the nanoseconds that took.
    fn wait_for(&mut self, seat: SeatIndex, layer: usize, page: usize) -> u64 {
        let at = self.home(seat, layer);
        if (page as u32) < self.homes[at].clean || page >= self.homes[at].sent as usize {
            return 0;
        }
        let start = Instant::now();
        self.saver.wait(self.homes[at].ticket);
        self.link.wait(self.homes[at].arrival);
        self.homes[at].clean = self.homes[at].sent;
        start.elapsed().as_nanos() as u64
    }

    /// Notes that `bytes` of digests came to HBM in `calls` copies, which the step waits for.
    pub fn fetched_digests(&mut self, bytes: usize, calls: usize) {
        let calls = if self.spec.transfer == Transfer::Fused { 1 } else { calls };
        let done = self.link.send(Direction::ToHbm, bytes, calls);
        self.stall_nanos += self.link.wait(done);
    }

    /// Notes that `pages` pages in the order of clusters went to DRAM.
    pub fn sent_copies(&mut self, pages: usize) {
        let per_page = self.spec.transfer == Transfer::PerPage;
        let calls = if per_page { pages } else { 1 };
        let done = self.link.send(Direction::ToDram, pages * self.geometry.page_bytes(), calls);
        if per_page {
            self.stall_nanos += self.link.wait(done);
        }
    }

    // ---- append --------------------------------------------------------------------------------------------------

    /// Decides where the local pages of each sequence are in this step, and brings what they hold already.
    pub fn localize(&mut self, dram: &Layers, layer: usize, batch: &Batch) {
        let KvGeometry { page_tokens, kv_heads, .. } = self.geometry;
        let block_bytes = kv_heads * self.geometry.page_bytes();
        let (mut fresh_used, mut brought) = (0, 0);
        if self.spec.poison {
            self.poison(self.fresh_base()..self.wave_base());
        }
        for s in batch.sequences {
            let first = s.first_position as usize;
            let start = self.spec.local_start(first, page_tokens);
            let end = s.context_tokens().div_ceil(page_tokens);
            if s.num_rows() > 1 {
                self.stall_nanos += self.link.wait(self.fresh_free);
            }
            let fresh = (s.num_rows() > 1).then(|| {
                let block = fresh_used;
                fresh_used += end - start;
                assert!(fresh_used <= self.layout.fresh_blocks, "fresh frames for the rows of a step");
                block as u32
            });
            self.local[s.seat.at()] = Local { pages: (start as u32, end as u32), fresh };
            let at = self.home(s.seat, layer);
            let Home { from, end: ring_end, .. } = self.homes[at];
            let in_ring = |page: usize| (from as usize..ring_end as usize).contains(&page);
            for page in start..first.div_ceil(page_tokens) {
                let frame = self.local_frame(s.seat, layer, page).expect("a local page");
                let to = frame * self.geometry.page_bytes();
                if in_ring(page) {
                    let from = self.ring_frame(s.seat, layer, page) * self.geometry.page_bytes();
                    if from != to {
                        self.arena.as_mut_slice().copy_within(from..from + block_bytes, to);
                    }
                } else {
                    // A prefix that others computed, or pages that were filled from outside.
                    self.stall_nanos += self.wait_for(s.seat, layer, page);
                    let block = batch.block_table(s)[page];
                    match self.spec.transfer {
                        Transfer::PerPage => self.bring_per_page(dram, layer, block, frame),
                        Transfer::Fused => {
                            let block = dram.block(layer, block);
                            self.arena.as_mut_slice()[to..to + block_bytes].copy_from_slice(block);
                            brought += block_bytes;
                        }
                    }
                    self.residency.counters_mut(s.seat).fetched_bytes += block_bytes as u64;
                }
            }
            let home = &mut self.homes[at];
            // Full pages before this step are in DRAM or on their way.
            if home.sent < s.first_position / page_tokens as u32 {
                (home.sent, home.clean) =
                    (s.first_position / page_tokens as u32, s.first_position / page_tokens as u32);
            }
            if fresh.is_none() {
                (home.from, home.end) = (start as u32, end as u32);
            }
        }
        if brought > 0 {
            let done = self.link.send(Direction::ToHbm, brought, 1);
            self.stall_nanos += self.link.wait(done);
        }
    }

    // ---- save ----------------------------------------------------------------------------------------------------

    /// Sends the pages that the rows of `batch` fill to DRAM, and keeps the last ones of a prompt in local frames.
    pub fn save(&mut self, pool: &mut Pool, dram: &mut Layers, layer: usize, batch: &Batch) {
        let KvGeometry { page_tokens, kv_heads, .. } = self.geometry;
        let block_bytes = kv_heads * self.geometry.page_bytes();
        let per_page = self.spec.transfer == Transfer::PerPage;
        let staging_bytes = self.spec.staging_chunks() * block_bytes;
        // Fragments leave in one call together.
        let mut fragment_calls = 1;
        for s in batch.sequences {
            let table = batch.block_table(s);
            let full = s.first_position as usize / page_tokens..s.context_tokens() / page_tokens;
            let at = self.home(s.seat, layer);
            let mut page = full.start;
            while page < full.end {
                let adjacent = |page: &usize| table[*page].0 == table[*page - 1].0 + 1;
                let run = if per_page { 1 } else { 1 + (page + 1..full.end).take_while(adjacent).count() };
                let frame = self.local_frame(s.seat, layer, page).expect("a page that fills is local");
                let from = frame * self.geometry.page_bytes();
                if per_page {
                    self.save_per_page(dram, layer, table[page], frame);
                } else if run > 1 {
                    self.homes[at].arrival = self.link.send(Direction::ToDram, run * block_bytes, 1);
                    // Fresh frames lie as blocks do.
                    let to = dram.run_mut(layer, table[page], run);
                    copy_run(pool, &self.arena.as_slice()[from..from + run * block_bytes], to, block_bytes);
                } else {
                    // A chunk is in use until its bytes are through.
                    let room = staging_bytes - block_bytes;
                    self.stall_nanos += self.link.wait(self.link.room(Direction::ToDram, room));
                    self.homes[at].arrival = self.link.send(Direction::ToDram, block_bytes, fragment_calls);
                    fragment_calls = 0;
                    let from = self.arena.as_slice()[from..from + block_bytes].as_ptr();
                    let to = dram.run_mut(layer, table[page], 1).as_mut_ptr();
                    // Prompts leave chunks to answers.
                    let reserve = if s.num_rows() > 1 { self.spec.seats } else { 0 };
                    // SAFETY: a block of one layer each. Nobody reads the block in DRAM before its ticket is done, nor
                    // writes it while a sequence holds it; `Kv` drops the tier, and so the saver, before the pool.
                    if let Some(ticket) = unsafe { self.saver.send(from, to, block_bytes, reserve) } {
                        self.homes[at].ticket = ticket;
                    }
                }
                page += run;
            }
            self.saved_bytes += (full.len() * block_bytes) as u64;
            self.residency.counters_mut(s.seat).saved += (full.len() * kv_heads) as u64;
            self.homes[at].sent = full.end as u32;
            let Home { ticket, arrival, .. } = self.homes[at];
            if ticket <= self.saver.done() && self.link.is_done(arrival) {
                self.homes[at].clean = full.end as u32;
            }
            if self.local[s.seat.at()].fresh.is_some() {
                self.fresh_free = self.fresh_free.max(arrival);
                self.adopt(s, layer, full);
                self.keep_tail(s, layer);
            }
        }
    }

    /// Keeps `pages`, which the rows of a prompt filled, in cache frames, as long as some are free. On their way to DRAM they have been
    /// copied already, so these may be dropped at any moment; who fetches one again waits for its copy.
    fn adopt(&mut self, s: &SequenceRows, layer: usize, pages: Range<usize>) {
        let (kv_heads, bytes) = (self.geometry.kv_heads, self.geometry.page_bytes());
        for page in pages {
            let source = self.local_frame(s.seat, layer, page).expect("a page that fills is local");
            for head in 0..kv_heads {
                if !self.residency.has_room(s.seat, layer) {
                    return;
                }
                if self.residency.find(s.seat, layer, head, page).is_none() {
                    let frame = self.residency.adopt(s.seat, layer, head, page).at();
                    let from = (source + head) * bytes;
                    self.arena.as_mut_slice().copy_within(from..from + bytes, frame * bytes);
                }
            }
        }
    }

    /// Copies the last pages of a prompt, which the next step may need, from fresh to local frames.
    fn keep_tail(&mut self, s: &SequenceRows, layer: usize) {
        let block_bytes = self.geometry.kv_heads * self.geometry.page_bytes();
        let (start, end) = self.local[s.seat.at()].pages;
        let from = start.max(end.saturating_sub(self.layout.local_pages as u32));
        for page in from..end {
            let frame = self.local_frame(s.seat, layer, page as usize).expect("a local page");
            let source = frame * self.geometry.page_bytes();
            let to = self.ring_frame(s.seat, layer, page as usize) * self.geometry.page_bytes();
            self.arena.as_mut_slice().copy_within(source..source + block_bytes, to);
        }
        let at = self.home(s.seat, layer);
        (self.homes[at].from, self.homes[at].end) = (from, end);
    }

    /// Leaves fresh frames: the last pages of the sequences of `batch` are in their local frames, and the others count as clean ones do.
    pub fn settle(&mut self, batch: &Batch) {
        let page_tokens = self.geometry.page_tokens;
        for s in batch.sequences {
            let end = s.context_tokens();
            let pages = (self.spec.local_start(end, page_tokens) as u32, end.div_ceil(page_tokens) as u32);
            self.local[s.seat.at()] = Local { pages, fresh: None };
        }
    }

    // ---- between steps -------------------------------------------------------------------------------------------

    /// Forgets `seat`.
    pub fn release(&mut self, seat: SeatIndex) {
        for layer in 0..self.geometry.num_layers {
            let at = self.home(seat, layer);
            self.saver.wait(self.homes[at].ticket);
            self.stall_nanos += self.link.wait(self.homes[at].arrival);
            self.homes[at] = Home::default();
        }
        self.local[seat.at()] = Local::default();
        let (bytes, poison) = (self.geometry.page_bytes(), self.spec.poison);
        let arena = self.arena.as_mut_slice();
        self.residency.release(seat, &mut |frame| {
            if poison {
                arena[frame.at() * bytes..(frame.at() + 1) * bytes].fill(0xff);
            }
        });
    }

    /// Writes the pages of `seat` that were not sent to DRAM yet to their blocks in `table`.
    pub fn park(&mut self, dram: &mut Layers, seat: SeatIndex, table: &[BlockIndex]) {
        let block_bytes = self.geometry.kv_heads * self.geometry.page_bytes();
        for layer in 0..self.geometry.num_layers {
            let at = self.home(seat, layer);
            let Home { from, end, sent, .. } = self.homes[at];
            for page in from.max(sent) as usize..end as usize {
                let frame = self.ring_frame(seat, layer, page);
                if self.spec.transfer == Transfer::PerPage {
                    self.save_per_page(dram, layer, table[page], frame);
                    continue;
                }
                // Who leaves the seat waits for it.
                self.homes[at].arrival = self.link.send(Direction::ToDram, block_bytes, 1);
                let frame = frame * self.geometry.page_bytes();
                let pages = &self.arena.as_slice()[frame..frame + block_bytes];
                dram.run_mut(layer, table[page], 1).copy_from_slice(pages);
            }
            self.saved_bytes += u64::from(end - from.max(sent).min(end)) * block_bytes as u64;
        }
    }

    /// Tokens of `seat` that are in DRAM in all layers.
    pub fn saved_tokens(&mut self, seat: SeatIndex) -> usize {
        let done = self.saver.done();
        let layers = 0..self.geometry.num_layers;
        let clean = layers.map(|layer| {
            self.publish(seat, layer, done);
            self.homes[self.home(seat, layer)].clean
        });
        clean.min().unwrap_or(0) as usize * self.geometry.page_tokens
    }

    /// The state of the tier.
    pub fn state(&self) -> TierState {
        let frames = self.frames() as u64;
        let cache_frames = self.local_base() as u64;
        TierState {
            cache_frames,
            cache_used: self.residency.frames_in_use() as u64,
            pinned_frames: frames - cache_frames,
            free_extents: self.residency.free_extents() as u64,
            duplicate_bytes: self.duplicates.iter().sum::<u64>() * self.geometry.page_bytes() as u64,
            saving_pages: self.saver.in_flight() * self.geometry.kv_heads as u64,
            table_bytes: self.residency.bytes_in_use(),
            saved_bytes: self.saved_bytes,
            link_calls: self.link.calls(),
            stall_nanos: self.stall_nanos,
            extra_waves: self.extra_waves,
            pages: self.residency.totals(),
        }
    }

    /// What happened to the pages of `seat`, and the cache frames that it holds.
    pub fn counters(&self, seat: SeatIndex) -> (SeatCounters, usize) {
        (*self.residency.counters(seat), self.residency.frames_of(seat))
    }

    /// The resident pages of (seat, layer), ascending.
    pub fn resident(&self, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        let mut pages: Vec<_> =
            self.residency.resident(seat, layer).map(|(head, page, _)| (head, page)).collect();
        pages.sort_unstable();
        pages
    }

    /// Panics unless tables are whole and every resident page equals its copy in DRAM.
    pub fn check(&self, dram: &Layers, batch: &Batch) {
        self.residency.check();
        for s in batch.sequences {
            for layer in 0..self.geometry.num_layers {
                self.saver.wait(self.homes[self.home(s.seat, layer)].ticket);
                for (head, page, frame) in self.residency.resident(s.seat, layer) {
                    let (table, page_tokens) = (batch.block_table(s), self.geometry.page_tokens);
                    let block = self.spec.block_of(page, table, self.pool_blocks, page_tokens);
                    assert!(
                        self.frame(frame.at()) == dram.page_bytes(layer, block, head),
                        "{:?} layer {layer} head {head} page {page}: a clean page equals its copy in DRAM",
                        s.seat
                    );
                }
            }
        }
    }
}

/// Copies a run of blocks on all threads.
fn copy_run(pool: &mut Pool, from: &[u8], to: &mut [u8], block_bytes: usize) {
    assert_eq!(from.len(), to.len(), "a run of blocks");
    let to = Shared(to.as_mut_ptr());
    pool.run(from.len() / block_bytes, &|task, _| {
        let block = &from[task * block_bytes..(task + 1) * block_bytes];
        // SAFETY: block `task` of the target, which is as long as the source.
        unsafe { to.at(task * block_bytes).copy_from_nonoverlapping(block.as_ptr(), block_bytes) };
    });
}
