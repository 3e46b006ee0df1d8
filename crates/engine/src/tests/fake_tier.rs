//! The HBM tier of the fake device: what is written lies with its seat until it is saved, some steps later. Whoever reads a
//! block too early, or leaves a seat without a word, gets a wrong answer.

use std::collections::{BTreeMap, BTreeSet};

use kv::QuotaRule;
use ops::residency::SeatCounters;
use ops::tier::TierState;
use ops::{Batch, BlockIndex, Random, SeatIndex, SequenceRows, Step};

use super::fake_runner::Kv;
use crate::config::TierShare;

/// A tier whose saves take a random number of steps.
pub struct FakeTier {
    random: Random,
    page_tokens: usize,
    /// Extents per layer.
    extents: usize,
    layers: usize,
    digest_places: usize,
    /// Whether each sequence may hold them all.
    shared: bool,
    seats: BTreeMap<SeatIndex, Seat>,
    state: TierState,
}

#[derive(Default)]
struct Seat {
    /// By position, what is not saved.
    written: BTreeMap<usize, Kv>,
    saved: usize,
    /// Its first token here; those before it in its page were parked.
    from: usize,
    table: Vec<BlockIndex>,
    counters: SeatCounters,
}

impl FakeTier {
    pub fn new(seed: u64, page_tokens: usize, tier: &TierShare) -> Self {
        FakeTier {
            random: Random::new(seed),
            page_tokens,
            extents: tier.extents / tier.layers,
            layers: tier.layers,
            shared: tier.rule == QuotaRule::Shared,
            digest_places: tier.digest_places,
            seats: BTreeMap::new(),
            state: TierState::default(),
        }
    }

    /// Before a step: quotas and digests fit.
    pub fn check(&self, step: &Step) {
        let batch = &step.batch;
        let prompts = || step.prompts().map(|segment| &segment.sequence);
        let all = || batch.sequences.iter().chain(prompts());
        let sparse = all().filter(|s| batch.reads_digests(s));
        let blocks: BTreeSet<BlockIndex> = sparse.flat_map(|s| batch.block_table(s)).copied().collect();
        let blocks = blocks.len();
        assert!(blocks <= self.digest_places, "digests of {blocks} blocks in {} places", self.digest_places);
        let resting = step.resting.iter().map(|(_, quota)| *quota as usize);
        let quotas = all().map(|s| s.quota as usize).chain(resting);
        let quotas: usize = if self.shared { quotas.max().unwrap_or(0) } else { quotas.sum() };
        // What a prompt has of its layer comes on top of what it has of all.
        let extra = step.prompts().map(|s| s.extents as usize - s.sequence.quota as usize);
        let extra = if self.shared { 0 } else { extra.sum::<usize>().div_ceil(self.layers) };
        assert!(quotas + extra <= self.extents, "quotas of {quotas} + {extra} extents of {}", self.extents);
        let mut seats = BTreeSet::new();
        assert!(
            all().map(|s| s.seat).chain(step.resting.iter().map(|(seat, _)| *seat)).all(|s| seats.insert(s))
        );
    }

    pub fn write(&mut self, sequence: &SequenceRows, position: usize, kv: Kv) {
        let first = sequence.first_position as usize;
        let seat = self.seats.entry(sequence.seat).or_insert_with(|| {
            // Whole pages before it were computed by others.
            Seat { saved: first / self.page_tokens * self.page_tokens, from: first, ..Seat::default() }
        });
        assert!(seat.saved <= first, "{:?} goes on where it was", sequence.seat);
        seat.written.insert(position, kv);
    }

    /// What is read at `position`, if it is not read from DRAM.
    pub fn read(&self, seat: SeatIndex, position: usize) -> Option<Kv> {
        self.seats.get(&seat).and_then(|seat| seat.written.get(&position)).copied()
    }

    /// After a step: saves some of what is full, into `dram`.
    pub fn save<'a>(
        &mut self,
        batch: &Batch,
        sequences: impl Iterator<Item = &'a SequenceRows>,
        dram: &mut [Option<Kv>],
    ) {
        for sequence in sequences {
            let table = batch.block_table(sequence);
            let full = sequence.context_tokens() / self.page_tokens;
            let late = self.random.below(3).min(full);
            let seat = self.seats.get_mut(&sequence.seat).expect("a seat that was written to");
            seat.table = table.to_vec();
            seat.save(self.page_tokens, full - late, dram);
            let step = SeatCounters { hits: 3, misses: 2, streamed: 1, ..SeatCounters::default() };
            seat.counters.add(&step);
            self.state.pages.add(&step);
        }
        self.state.stall_nanos += 1000;
        self.state.cache_frames = 32 * self.extents as u64;
    }

    /// Waits for what is being saved, and forgets the seat.
    pub fn release(&mut self, seat: SeatIndex, dram: &mut [Option<Kv>]) {
        // Of a prompt that has not been through all layers nothing is of use.
        if let Some(mut left) = self.seats.remove(&seat).filter(|seat| !seat.table.is_empty()) {
            let end = left.written.keys().last().map_or(0, |last| last + 1);
            left.save(self.page_tokens, end / self.page_tokens, dram);
        }
    }

    /// Writes everything that is not saved to DRAM, that of the page that is open, too.
    pub fn park(&mut self, seat: SeatIndex, table: &[BlockIndex], dram: &mut [Option<Kv>]) {
        let Some(seat) = self.seats.get_mut(&seat) else { return };
        for (&position, &kv) in &seat.written {
            let slot =
                table[position / self.page_tokens].at() * self.page_tokens + position % self.page_tokens;
            dram[slot] = Some(kv);
        }
    }

    pub fn saved_tokens(&self, seat: SeatIndex) -> usize {
        self.seats.get(&seat).map_or(0, |seat| seat.saved)
    }

    /// Each seat that was not released holds 5 frames.
    pub fn state(&self) -> TierState {
        let used = 5 * self.seats.len() as u64;
        TierState { cache_used: used, cache_frames: self.state.cache_frames.max(used), ..self.state }
    }

    pub fn counters(&self, seat: SeatIndex) -> (SeatCounters, usize) {
        self.seats.get(&seat).map_or_else(Default::default, |seat| (seat.counters, 5))
    }
}

impl Seat {
    /// Saves pages below `end`, if they are not saved.
    fn save(&mut self, page_tokens: usize, end: usize, dram: &mut [Option<Kv>]) {
        while self.saved / page_tokens < end {
            for position in self.saved.max(self.from)..self.saved + page_tokens {
                let kv = self.written.remove(&position).expect("a full page was written");
                let slot = self.table[position / page_tokens].at() * page_tokens + position % page_tokens;
                dram[slot] = Some(kv);
            }
            self.saved += page_tokens;
        }
    }
}
