//! The last verb of a step: clients are told.

use std::time::Duration;

use crate::engine::Engine;
use crate::run::Runner;
use crate::sequence::{Outcome, Sequence};

impl<R: Runner> Engine<R> {
    /// Sends what the step brought, and lets go of the sequences that have ended or that nobody listens to: their blocks
    /// are there for the next step.
    pub(crate) fn emit(&mut self, now: Duration) {
        for part in &self.rows.parts {
            let sequence = &mut self.running[part.owner];
            let failed = matches!(sequence.outcome, Some(Outcome::Failed(_)));
            if !failed {
                let sampled = &self.output.sampled[part.samples.clone()];
                let told = sequence.tell(sampled, &self.output.top, part.draws, now, &self.metrics);
                if told.is_err() {
                    sequence.outcome.get_or_insert(Outcome::Aborted);
                }
            }
            if let Some(outcome) = sequence.outcome.take() {
                self.flights.end(sequence.flight.take());
                sequence.close(outcome, &mut self.kv, now, &self.metrics);
            }
        }
        self.running.retain(|sequence| !sequence.is_closed());
        // Who was admitted came last.
        self.running.sort_unstable_by_key(Sequence::rank);
    }
}
