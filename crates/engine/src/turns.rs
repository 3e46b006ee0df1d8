//! Whose turn it is: who of those that run takes part in a step.
//!
//! With slots, or in unified memory, everybody. With working sets those whose needs fit HBM together; the others *rest*, keep their
//! seats, and are skipped [`Config::max_skips`](crate::Config) times at most before they go first. The arithmetic is in `kv::needs`; where
//! it was wrong and steps wait for pages, `kv::thrash` lowers the number of those that take part.

use std::time::Duration;

use kv::{Candidate, Thrash};

use crate::config::{Admission, Config};
use crate::metrics::Metrics;
use crate::sequence::Sequence;
use crate::shares::Shares;

/// Of all extents, the part that must stay free when somebody new is admitted: one in so many, so that who runs can need more.
const FREE: u32 = 8;

/// The turns of a step.
pub(crate) struct Turns {
    /// Extents per layer that working sets share; `None` where everybody takes part.
    extents: Option<u32>,
    /// Who takes part, as places in `Engine::running`, those first who were skipped too often.
    pub(crate) order: Vec<usize>,
    candidates: Vec<Candidate>,
    picked: Vec<bool>,
    /// What those who run need together, in extents per layer.
    needed: u32,
    pub(crate) thrash: Thrash,
}

impl Turns {
    pub(crate) fn new(config: &Config) -> Self {
        let extents = match (config.admission, config.tier) {
            (Admission::WorkingSet { .. }, Some(tier)) => {
                Some(u32::try_from(tier.extents / tier.layers).unwrap_or(u32::MAX))
            }
            _ => None,
        };
        let seats = config.max_num_seqs;
        Turns {
            extents,
            order: Vec::with_capacity(seats),
            candidates: Vec::with_capacity(seats),
            picked: Vec::with_capacity(seats),
            needed: 0,
            thrash: Thrash::default(),
        }
    }

    /// Decides who of `running` takes part.
    pub(crate) fn choose(&mut self, config: &Config, shares: &Shares, running: &mut [Sequence]) {
        running.iter_mut().for_each(|s| s.takes_part = false);
        self.order.clear();
        let Some(extents) = self.extents else {
            self.order.extend(0..running.len());
            return;
        };
        self.candidates.clear();
        self.candidates.extend(running.iter().map(|s| Candidate {
            need: shares.need(s),
            ran_last_step: s.took_part,
            skips: s.skips,
        }));
        self.needed = self.candidates.iter().fold(0, |sum, c| sum.saturating_add(c.need));
        let limit = self.thrash.limit();
        kv::admit(&self.candidates, extents, limit, config.max_skips, &mut self.picked);
        self.order.extend((0..running.len()).filter(|&at| self.picked[at]));
        // The first finds room whatever it needs.
        self.order.sort_by_key(|&at| {
            let skips = running[at].skips;
            (if skips >= config.max_skips { u32::MAX - skips } else { u32::MAX }, at)
        });
    }

    /// Whether HBM has room for what a new request will need, beside what those who run do.
    pub(crate) fn admits(&self, need: u32) -> bool {
        self.extents.is_none_or(|extents| {
            self.needed.checked_add(need).is_some_and(|sum| sum <= extents - extents.div_ceil(FREE))
        })
    }

    /// Somebody was admitted.
    pub(crate) fn add(&mut self, need: u32) {
        self.needed = self.needed.saturating_add(need);
    }

    /// Notes who took part, and who rests.
    pub(crate) fn note(&self, running: &mut [Sequence], metrics: &Metrics) {
        let mut resting = 0;
        for sequence in running {
            sequence.took_part = sequence.takes_part;
            if sequence.takes_part {
                sequence.skips = 0;
            } else {
                sequence.skips += 1;
                resting += 1;
            }
        }
        let Some(extents) = self.extents else { return };
        metrics.turns(resting, self.needed, extents, self.thrash.limit());
        if resting > 0 {
            tracing::debug!(resting, needed = self.needed, extents, limit = self.thrash.limit(), "some rest");
        }
    }

    /// Takes in how long a step of `running` waited for pages, and how long it took.
    pub(crate) fn observe(&mut self, waited: Duration, took: Duration, running: &[Sequence]) {
        if self.extents.is_some() {
            let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            let taking_part = running.iter().filter(|s| s.took_part).count();
            self.thrash.observe(ns(waited), ns(took.saturating_sub(waited)), taking_part);
        }
    }
}
