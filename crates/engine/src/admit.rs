//! Who of those that wait starts to run.
//!
//! They are tried in order of rank: whoever was passed over too often first, then by priority, then by arrival. With working sets one
//! that does not fit is put back and the next is tried (SparseServe); with slots nobody overtakes. What SparseServe lacks: a request
//! that was passed over [`Config::max_skips`](crate::Config) times goes first, whatever HBM says, and until it does nobody else is
//! admitted.

use std::time::Duration;

use kv::OutOfBlocks;

use crate::config::Admission;
use crate::engine::Engine;
use crate::flights::StepBudget;
use crate::run::Runner;
use crate::sequence::Sequence;

/// Blocks of each running request whose digests must find a place when another one is admitted beside them.
const PLACES_AHEAD: usize = 2;

/// Requests that are tried in a step before nobody further back is.
const LOOK_AHEAD: usize = 16;

/// What became of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Admitted,
    /// The step has no work left for a prompt of its length, and no place for it to go layer by layer.
    NoTurn,
    /// Blocks or places for digests are short.
    NoRoom,
    /// What it will need does not fit HBM beside those who run.
    NoHbm,
}

/// What is kept for requests that wait for nothing but their turn, from those behind them.
#[derive(Clone, Copy, Debug, Default)]
struct Aside {
    seats: usize,
    blocks: usize,
    places: usize,
}

impl<R: Runner> Engine<R> {
    /// Puts a request where it belongs in the queue.
    pub(crate) fn queue(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| other.rank() < sequence.rank());
        self.waiting.insert(at, sequence);
    }

    /// Those who were passed over too often move to the front.
    fn promote(&mut self) {
        let max_skips = self.config.max_skips;
        for at in 0..self.waiting.len() {
            if self.waiting[at].skips >= max_skips && !self.waiting[at].promoted {
                let mut sequence = self.waiting.remove(at).expect("an index of the queue");
                sequence.promoted = true;
                tracing::debug!(request = sequence.id.0, "passed over too often: goes first");
                self.metrics.promoted();
                self.queue(sequence);
            }
        }
    }

    /// Admits waiting requests while the step has work left for them, and gives them rows.
    pub(crate) fn admit(&mut self, now: Duration, budget: &mut StepBudget) {
        self.promote();
        let (mut at, mut aside, mut failed) = (0, Aside::default(), 0);
        while at < self.waiting.len() && failed < LOOK_AHEAD {
            let single = self.waiting[at].parked && self.waiting[at].num_uncomputed() == 1;
            if self.running.len() + aside.seats >= self.config.max_num_seqs
                || (budget.tokens() == 0 && !single)
            {
                return;
            }
            let tried = self.try_to_admit(at, aside, budget, now);
            match tried {
                Tried::Admitted => {
                    self.push_rows(self.running.len() - 1, budget);
                    continue;
                }
                Tried::NoTurn => {
                    // Who starts before it takes nothing of what it needs.
                    let sequence = &mut self.waiting[at];
                    let blocks = sequence.admission_tokens().div_ceil(self.config.page_tokens);
                    aside.seats += 1;
                    aside.blocks += blocks;
                    aside.places += if sequence.reads_digests() { blocks } else { 0 };
                    sequence.awaits_turn = true;
                }
                Tried::NoRoom => {}
                Tried::NoHbm => self.waiting[at].skips += 1,
            }
            let slots = matches!(self.config.admission, Admission::Slots);
            if tried != Tried::NoTurn && (slots || self.waiting[at].promoted) {
                return;
            }
            (at, failed) = (at + 1, failed + 1);
        }
    }

    /// Whether the step has something to run for a sequence: rows, or a place to go layer by layer.
    fn has_turn(&self, sequence: &Sequence, budget: &StepBudget) -> bool {
        let prompt_left = sequence.prompt_left();
        match sequence.flies() && self.flights.is_on() {
            true => prompt_left <= budget.tokens() || self.flights.has_room(prompt_left),
            false => budget.tokens() > 0 || sequence.num_uncomputed() == 1,
        }
    }

    /// Admits `waiting[at]` if it has something to run, and if there are blocks for all its known tokens and the next one, room for
    /// their digests, and HBM for what it will select.
    fn try_to_admit(&mut self, at: usize, aside: Aside, budget: &StepBudget, now: Duration) -> Tried {
        let sequence = &mut self.waiting[at];
        sequence.awaits_turn = false;
        if sequence.no_place_since == Some(self.flights.ended) {
            return Tried::NoTurn;
        }
        let num_tokens = sequence.admission_tokens();
        let available = self.kv.num_available().saturating_sub(aside.blocks);
        let left = self.digest_room.left().saturating_sub(aside.places);
        let (is_parked, alone) = (sequence.parked, self.digest_room.is_untouched());
        let too_early =
            available < sequence.admit_when_available || (left < sequence.admit_when_places && !alone);
        if too_early && !is_parked {
            return Tried::NoRoom;
        }
        let need = self.shares.need(sequence);
        if !self.turns.admits(need) && !sequence.promoted && !self.running.is_empty() {
            return Tried::NoHbm;
        }
        // Log-probabilities of a prompt need every row of it.
        let cached_tokens = match sequence.prompt_logprobs {
            None if !is_parked => self.kv.match_prefix(&mut sequence.kv, &sequence.tokens),
            _ => 0,
        };
        if !self.has_turn(&self.waiting[at], budget) {
            let sequence = &mut self.waiting[at];
            // Where it is too long for any step, it waits for a place.
            let waits = !self.flights.is_short(sequence.prompt_left());
            sequence.no_place_since = waits.then_some(self.flights.ended);
            if !is_parked {
                self.kv.suspend(&mut sequence.kv);
            }
            return Tried::NoTurn;
        }
        let sequence = &mut self.waiting[at];
        if sequence.reads_digests() {
            let blocks = sequence.kv.blocks();
            let more = num_tokens.div_ceil(self.config.page_tokens).saturating_sub(blocks.len());
            // So that who begins beside others goes on for a while, and they do.
            let ahead = if alone { 0 } else { PLACES_AHEAD * (self.running.len() + 1) };
            let wanted = self.digest_room.wanted(blocks) + more + ahead;
            if wanted > left {
                if !is_parked {
                    sequence.admit_when_places = wanted;
                    self.kv.suspend(&mut sequence.kv);
                }
                return Tried::NoRoom;
            }
        }
        if let Err(short) = self.reserve_for(at, num_tokens, aside.blocks) {
            if !is_parked {
                // Matching a long prompt costs time; it is worth another try only when this many could be had.
                let matched_unused = available.saturating_sub(short.available);
                let sequence = &mut self.waiting[at];
                sequence.admit_when_available = matched_unused + short.wanted;
                self.kv.suspend(&mut sequence.kv);
            }
            return Tried::NoRoom;
        }
        let mut sequence = self.waiting.remove(at).expect("an index of the queue");
        let has_places = !sequence.reads_digests() || self.digest_room.take(sequence.kv.blocks());
        assert!(has_places, "places were counted before blocks were reserved");
        self.kv.take_seat(&mut sequence.kv);
        sequence.parked = false;
        sequence.no_place_since = None;
        sequence.admit(cached_tokens, now, &self.metrics);
        let overtaken = |other: &&mut Sequence| other.arrival < sequence.arrival && !other.awaits_turn;
        self.waiting.iter_mut().filter(overtaken).for_each(|other| other.skips += 1);
        self.turns.add(need);
        self.running.push(sequence);
        Tried::Admitted
    }

    /// Reserves blocks for `waiting[at]`, from parked ones behind it if need be, and leaves `aside` blocks to others.
    fn reserve_for(&mut self, at: usize, num_tokens: usize, aside: usize) -> Result<(), OutOfBlocks> {
        loop {
            let sequence = &mut self.waiting[at].kv;
            let wanted = num_tokens.div_ceil(self.config.page_tokens).saturating_sub(sequence.blocks().len());
            let available = self.kv.num_available().saturating_sub(aside);
            let reserved = match wanted > available {
                true => Err(OutOfBlocks { wanted, available }),
                false => self.kv.reserve(sequence, num_tokens),
            };
            if reserved.is_ok() || !self.preempt_parked(at + 1) {
                return reserved;
            }
        }
    }
}
