//! The first verb of a step: who runs how many tokens.
//!
//! Running requests come first: blocks for what they know, then whose turn it is, then rows. Then waiting requests are admitted as long
//! as a step has work for prompts left: `admit.rs`.

use std::time::Duration;

use crate::config::Admission;
use crate::engine::Engine;
use crate::flights::StepBudget;
use crate::run::Runner;
use crate::sequence::Sequence;

/// Rows beyond one per sequence that attend to a selection in a step: those of answers that a preempted request computes
/// again. Each needs memory for its selection.
pub const REPLAY_ROWS: usize = 32;

impl<R: Runner> Engine<R> {
    /// Fills `rows`. Every running request whose turn it is gets what it has left to compute; all but the last token of a sequence
    /// count against the budget for prompts, so answers never wait for prompts.
    pub(crate) fn schedule(&mut self, now: Duration) {
        self.rows.clear();
        let mut budget = StepBudget::new(self.config.max_inject_tokens, &self.flights, REPLAY_ROWS);
        self.digest_room.begin();
        self.make_room();
        self.turns.choose(&self.config, &self.shares, &mut self.running);
        for i in 0..self.turns.order.len() {
            let at = self.turns.order[i];
            if self.take_places(at) {
                self.push_rows(at, &mut budget);
            } else if matches!(self.config.admission, Admission::Slots) {
                self.park_from(at);
                break;
            }
        }
        self.admit(now, &mut budget);
        self.fly(&mut budget);
        self.turns.note(&mut self.running, &self.metrics);
        let works = self.rows.num_rows() + self.rows.segments.len() > 0;
        assert!(works, "whenever there is work, some of it proceeds");
        // Before quotas: a seat that was left may have been taken again.
        self.leave_seats();
        self.shares.divide(&self.turns.order, &mut self.running);
        self.rows.set_quotas(&self.running);
    }

    /// Gives `running[owner]` rows of the step, or work if it goes layer by layer.
    pub(crate) fn push_rows(&mut self, owner: usize, budget: &mut StepBudget) {
        let sequence = &mut self.running[owner];
        sequence.takes_part = true;
        let left = sequence.num_uncomputed();
        let prompt_left = sequence.prompt_left();
        if sequence.flies()
            && self.flights.is_on()
            && prompt_left > budget.tokens()
            && sequence.flight.is_none()
        {
            let first = sequence.kv.num_tokens();
            // Where there is no place it goes chunk by chunk.
            sequence.flight = self.flights.take_off(first..first + prompt_left);
        }
        if let Some(flight) = &mut sequence.flight {
            return budget.grant(flight);
        }
        let mut num_tokens = if left == 1 { 1 } else { left.min(budget.tokens()) };
        if sequence.sparse.is_some() {
            let replayed = num_tokens.saturating_sub(prompt_left + 1).min(budget.replay_rows);
            num_tokens = num_tokens.min(prompt_left + 1 + replayed);
            let first = sequence.kv.num_tokens();
            let of_answer = first.max(sequence.prompt_len);
            num_tokens = sequence.guard.same_until(of_answer, first + num_tokens) - first;
            budget.replay_rows -= num_tokens.saturating_sub(prompt_left + 1);
        }
        if left > 1 {
            budget.take_tokens(num_tokens);
        }
        if num_tokens == 0 {
            return;
        }
        self.rows.push(owner, sequence, num_tokens);
        if num_tokens == left {
            self.inspect(owner);
        }
    }

    /// Turns the work that prompts were granted into segments. What nobody else wanted is theirs, too.
    fn fly(&mut self, budget: &mut StepBudget) {
        if self.flights.count() == 0 {
            return;
        }
        budget.keep_nothing();
        let layers = self.flights.layers();
        for owner in 0..self.running.len() {
            let sequence = &mut self.running[owner];
            let Some(flight) = sequence.flight.as_mut().filter(|_| sequence.takes_part) else { continue };
            budget.grant(flight);
            self.rows.push_flight(owner, sequence, layers);
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

    /// Reserves blocks for all known tokens of everybody who runs, preempting the last in rank until those before it fit.
    fn make_room(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if self.kv.reserve(&mut sequence.kv, sequence.tokens.len()).is_ok() {
                at += 1;
            } else if !self.preempt_parked(0) {
                assert!(
                    self.running.len() > 1,
                    "a lone request fits, that was checked when it was submitted"
                );
                self.preempt_last();
            }
        }
    }

    /// Takes places for the digests of `running[at]`; the first in a step always finds enough.
    fn take_places(&mut self, at: usize) -> bool {
        let sequence = &self.running[at];
        let found = !sequence.reads_digests() || self.digest_room.take(sequence.kv.blocks());
        assert!(
            found || !self.digest_room.is_untouched(),
            "a lone request has places for its digests, that was checked at the start"
        );
        found
    }

    /// HBM has no room for the digests of `running[at]` and of those after it, DRAM has: they give up their seats and wait with their
    /// blocks.
    fn park_from(&mut self, at: usize) {
        while self.running.len() > at {
            let mut last = self.running.pop().expect("someone runs");
            if last.flight.is_some() {
                // It has nothing yet that would be worth keeping.
                self.preempt(last);
                continue;
            }
            let seat = last.kv.seat().expect("who runs has a seat");
            self.runner.park(seat, last.kv.blocks());
            last.park(&mut self.kv);
            self.metrics.parked();
            self.queue(last);
        }
    }

    /// Takes the blocks of the last in rank that is parked, from `waiting[from]` on; returns whether there was one.
    pub(crate) fn preempt_parked(&mut self, from: usize) -> bool {
        let Some(at) = (from..self.waiting.len()).rfind(|&at| self.waiting[at].parked) else { return false };
        self.waiting[at].preempt(&mut self.kv);
        self.metrics.preempted();
        true
    }

    fn preempt_last(&mut self) {
        let last = self.running.pop().expect("someone runs");
        self.preempt(last);
    }

    /// A running request goes back to the queue. Its sealed blocks stay cached, so that what nobody evicts meanwhile need not be
    /// computed again.
    fn preempt(&mut self, mut sequence: Sequence) {
        self.flights.end(sequence.flight.take());
        sequence.preempt(&mut self.kv);
        self.metrics.preempted();
        self.queue(sequence);
    }
}
