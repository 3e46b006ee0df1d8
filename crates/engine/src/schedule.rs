//! The first verb of a step: who runs how many tokens.

use std::time::Duration;

use kv::OutOfBlocks;

use crate::engine::Engine;
use crate::run::Runner;

/// Rows beyond one per sequence that attend to a selection in a step: those of answers that a preempted request computes
/// again. Each needs memory for its selection.
pub const REPLAY_ROWS: usize = 32;

/// Blocks of each running request whose digests must find a place when another one is admitted beside them.
const PLACES_AHEAD: usize = 2;

/// What a step may still take.
struct StepBudget {
    /// Tokens of prompts, and of whatever else has more than one token to run.
    tokens: usize,
    replay_rows: usize,
}

impl<R: Runner> Engine<R> {
    /// Fills `rows`. In order of arrival, every running sequence gets what it has left to compute; all but the last
    /// token of a sequence count against the token budget, so answers never wait for prompts. Then waiting requests
    /// are admitted while budget, places and blocks last; the head of the queue is never overtaken.
    pub(crate) fn schedule(&mut self, now: Duration) {
        self.rows.clear();
        let mut budget = StepBudget { tokens: self.config.max_inject_tokens, replay_rows: REPLAY_ROWS };
        self.digest_room.begin();
        let mut next = 0;
        while next < self.running.len() {
            if self.make_room(next) && self.take_places(next) {
                self.push_rows(next, &mut budget);
            }
            next += 1;
        }
        while (budget.tokens > 0 || self.next_needs_no_budget()) && self.admit_next(now) {
            self.push_rows(self.running.len() - 1, &mut budget);
        }
        assert!(self.rows.num_rows() > 0, "whenever there is work, some of it proceeds");
        // Before quotas: a seat that was left may have been taken again.
        self.leave_seats();
        self.shares.divide(&mut self.running);
        self.rows.set_quotas(&self.running);
    }

    fn push_rows(&mut self, owner: usize, budget: &mut StepBudget) {
        let sequence = &self.running[owner];
        let left = sequence.num_uncomputed();
        let mut num_tokens = if left == 1 { 1 } else { left.min(budget.tokens) };
        if sequence.sparse.is_some() {
            let prompt_left = sequence.prompt_len.saturating_sub(sequence.kv.num_tokens());
            let replayed = num_tokens.saturating_sub(prompt_left + 1).min(budget.replay_rows);
            num_tokens = num_tokens.min(prompt_left + 1 + replayed);
            let first = sequence.kv.num_tokens();
            let of_answer = first.max(sequence.prompt_len);
            num_tokens = sequence.guard.same_until(of_answer, first + num_tokens) - first;
            budget.replay_rows -= num_tokens.saturating_sub(prompt_left + 1);
        }
        if left > 1 {
            budget.tokens -= num_tokens;
        }
        if num_tokens == 0 {
            return;
        }
        self.rows.push(owner, sequence, num_tokens);
        if num_tokens == left {
            self.inspect(owner);
        }
    }

    /// Has the newest token of `running[owner]` checked in this step, if it is its turn.
    fn inspect(&mut self, owner: usize) {
        let Some(rule) = &self.config.guard else { return };
        let sequence = &mut self.running[owner];
        let Some(sparse) = sequence.sparse else { return };
        let (newest, prompt_len) = (sequence.tokens.len() - 1, sequence.prompt_len);
        let seed = sequence.sampling.seed;
        let layer = sequence.guard.turn(rule, &sparse, seed, newest, prompt_len, self.config.page_tokens);
        if let Some(layer) = layer {
            self.rows.inspect(sequence.kv.seat().expect("who runs has a seat"), layer);
        }
    }

    /// Reserves blocks for all known tokens of `running[at]`, preempting the youngest until they fit. Returns whether
    /// it still runs: in the end it may have been the youngest itself.
    fn make_room(&mut self, at: usize) -> bool {
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if self.kv.reserve(&mut sequence.kv, sequence.tokens.len()).is_ok() {
                return true;
            }
            if self.preempt_parked(0) {
                continue;
            }
            assert!(self.running.len() > 1, "a lone request fits, that was checked when it was submitted");
            self.preempt_youngest();
        }
        false
    }

    /// Takes places for the digests of `running[at]`. Where too few are left, it and all younger ones are parked: HBM has no room for
    /// what they need, DRAM has. The oldest always finds enough. Returns whether it still runs.
    fn take_places(&mut self, at: usize) -> bool {
        let sequence = &self.running[at];
        if !sequence.reads_digests() || self.digest_room.take(sequence.kv.blocks()) {
            return true;
        }
        assert!(at > 0, "a lone request has places for its digests, that was checked at the start");
        while self.running.len() > at {
            self.park_youngest();
        }
        false
    }

    /// The youngest gives up its seat and waits with its blocks, at the front of the queue.
    fn park_youngest(&mut self) {
        let mut youngest = self.running.pop().expect("someone runs");
        let seat = youngest.kv.seat().expect("who runs has a seat");
        self.runner.park(seat, youngest.kv.blocks());
        youngest.park(&mut self.kv);
        self.metrics.parked();
        self.waiting.push_front(youngest);
    }

    /// Takes the blocks of the youngest that is parked, but not of the first `spared`; returns whether there was one.
    fn preempt_parked(&mut self, spared: usize) -> bool {
        let parked = self.waiting.iter().take_while(|s| s.parked).count();
        if parked <= spared {
            return false;
        }
        self.waiting[parked - 1].preempt(&mut self.kv);
        self.metrics.preempted();
        true
    }

    /// The youngest goes back to the front of the queue, where it is still in order of arrival. Its sealed blocks stay
    /// cached, so that what nobody evicts meanwhile need not be computed again.
    fn preempt_youngest(&mut self) {
        let mut youngest = self.running.pop().expect("someone runs");
        youngest.preempt(&mut self.kv);
        self.metrics.preempted();
        self.waiting.push_front(youngest);
    }

    /// Whether the head of the queue has a single token to run: an answer that was parked does not wait for prompts.
    fn next_needs_no_budget(&self) -> bool {
        self.waiting.front().is_some_and(|sequence| sequence.parked && sequence.num_uncomputed() == 1)
    }

    /// Admits the head of the queue if there is a seat, blocks for all its known tokens and the next one, and room for their digests.
    fn admit_next(&mut self, now: Duration) -> bool {
        if self.running.len() == self.config.max_num_seqs {
            return false;
        }
        let Some(sequence) = self.waiting.front_mut() else { return false };
        let num_tokens = sequence.admission_tokens();
        let (available, left) = (self.kv.num_available(), self.digest_room.left());
        let (is_parked, alone) = (sequence.parked, self.digest_room.is_untouched());
        let too_early =
            available < sequence.admit_when_available || (left < sequence.admit_when_places && !alone);
        if too_early && !is_parked {
            return false;
        }
        // Log-probabilities of a prompt need every row of it.
        let cached_tokens = match sequence.prompt_logprobs {
            None if !is_parked => self.kv.match_prefix(&mut sequence.kv, &sequence.tokens),
            _ => 0,
        };
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
                return false;
            }
        }
        if let Err(short) = self.reserve_first(num_tokens) {
            if !is_parked {
                // Matching a long prompt costs time; it is worth another try only when this many could be had.
                let matched_unused = available - short.available;
                let sequence = &mut self.waiting[0];
                sequence.admit_when_available = matched_unused + short.wanted;
                self.kv.suspend(&mut sequence.kv);
            }
            return false;
        }
        let mut sequence = self.waiting.pop_front().expect("the head of the queue");
        let has_places = !sequence.reads_digests() || self.digest_room.take(sequence.kv.blocks());
        assert!(has_places, "places were counted before blocks were reserved");
        self.kv.take_seat(&mut sequence.kv);
        sequence.parked = false;
        sequence.admit(cached_tokens, now, &self.metrics);
        self.running.push(sequence);
        true
    }

    /// Reserves blocks for the head of the queue, from younger ones that are parked if need be.
    fn reserve_first(&mut self, num_tokens: usize) -> Result<(), OutOfBlocks> {
        loop {
            let reserved = self.kv.reserve(&mut self.waiting[0].kv, num_tokens);
            if reserved.is_ok() || !self.preempt_parked(1) {
                return reserved;
            }
        }
    }
}
