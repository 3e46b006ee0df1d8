//! The third verb of a step: what was computed becomes state.

use std::time::Duration;

use crate::engine::Engine;
use crate::request::FinishReason;
use crate::rows::Part;
use crate::run::Runner;
use crate::sequence::{Outcome, Sequence};

impl<R: Runner> Engine<R> {
    /// Notes what the step did to the pages of those in it, in an HBM tier.
    fn count_pages(&mut self) {
        let Some(state) = self.runner.tier_state() else { return };
        let stall_nanos = state.stall_nanos - self.stall_nanos;
        self.stall_nanos = state.stall_nanos;
        self.waited = Duration::from_nanos(stall_nanos);
        let parts = &self.rows.parts;
        for i in 0..parts.len() + self.rows.owners.len() {
            let (owner, of_answer) = match i.checked_sub(parts.len()) {
                None => {
                    let Part { owner, ref positions, .. } = parts[i];
                    (owner, positions.start >= self.running[owner].prompt_len)
                }
                // On its way through the layers; several segments of one prompt follow one another.
                Some(at) => {
                    let owner = self.rows.owners[at];
                    let again = at > 0 && self.rows.owners[at - 1] == owner;
                    if again || parts.iter().any(|part| part.owner == owner) {
                        continue;
                    }
                    (owner, false)
                }
            };
            let sequence = &mut self.running[owner];
            let seat = sequence.kv.seat().expect("who runs has a seat");
            let (counters, held) = self.runner.seat_counters(seat);
            let digest_bytes = self.runner.digest_loads(seat);
            sequence.pages.add(&counters.since(&sequence.counted), digest_bytes, held, stall_nanos);
            sequence.counted = counters;
            self.shares.observe(seat, &counters, held, of_answer);
            sequence.working_set = self.runner.working_set(seat);
        }
    }

    /// Notes what the checks of the step found.
    fn guard(&mut self) {
        let Some(rule) = &self.config.guard else { return };
        for &(seat, coverage) in &self.rows.inspections.found {
            // Of a request that fails.
            if coverage.mass.is_nan() {
                continue;
            }
            let sequence = self.running.iter_mut().find(|s| s.kv.seat() == Some(seat));
            let sequence = sequence.expect("who is checked runs");
            let sparse = sequence.sparse.expect("who is checked selects");
            let (position, prompt_len) = (sequence.tokens.len() - 1, sequence.prompt_len);
            let action = sequence.guard.observe(rule, &sparse, position, prompt_len, coverage);
            self.metrics.checked(&coverage, action);
        }
    }

    /// Notes which prompts have been through all layers.
    fn land(&mut self) {
        let layers = self.flights.layers();
        for &owner in &self.rows.owners {
            let sequence = &mut self.running[owner];
            let landed = sequence.flight.take_if(|flight| flight.has_landed(layers));
            self.flights.end(landed);
        }
    }

    /// Notes the KV that was written, appends the drawn tokens, and decides who has ended.
    pub(crate) fn commit(&mut self) {
        self.count_pages();
        self.guard();
        self.land();
        for part in &self.rows.parts {
            let sequence = &mut self.running[part.owner];
            let sampled = &self.output.sampled[part.samples.clone()];
            if sampled.iter().all(|s| s.valid) {
                let seat = sequence.kv.seat().expect("who runs has a seat");
                let saved = self.runner.saved_tokens(seat);
                self.kv.advance(&mut sequence.kv, &sequence.tokens[..part.positions.end], saved);
                if part.draws {
                    let last = part.positions.end - 1;
                    if let Some(sparse) = sequence.sparse_at(last).filter(|_| last >= sequence.prompt_len) {
                        let row = self.runner.row_tally(seat);
                        sequence.attended.add(&sparse, last + 1, sequence.prompt_len, row);
                    }
                    let token = sampled.last().expect("a drawn token is sampled").token;
                    assert!(
                        (token as usize) < self.config.vocab_size,
                        "the runner draws tokens of the vocabulary"
                    );
                    sequence.tokens.push(token);
                }
                sequence.outcome = outcome(sequence);
            } else {
                // Whatever led to NaN lies in its KV, which nobody must share.
                self.kv.discard(&mut sequence.kv);
                sequence.outcome = Some(Outcome::Failed("the model computed NaN for this request".into()));
            }
        }
    }
}

/// How `sequence` has ended, if it has.
fn outcome(sequence: &Sequence) -> Option<Outcome> {
    let num_generated = sequence.num_generated();
    if num_generated == 0 {
        // Only a request for the log-probabilities of its prompt generates nothing.
        let prompt_only = sequence.stopping.max_tokens == 0 && sequence.num_uncomputed() == 0;
        return prompt_only.then_some(Outcome::Finished(FinishReason::Length));
    }
    let last = sequence.tokens[sequence.tokens.len() - 1];
    if sequence.stopping.end_tokens.contains(&last) {
        return Some(Outcome::Finished(FinishReason::EndToken(last)));
    }
    let complete = num_generated == sequence.stopping.max_tokens as usize;
    complete.then_some(Outcome::Finished(FinishReason::Length))
}
