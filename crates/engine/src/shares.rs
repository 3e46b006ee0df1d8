//! What each running request may hold of the HBM tier.

use kv::{Quotas, Want, extents_needed};
use ops::SeatIndex;
use ops::residency::{EXTENT_FRAMES, SeatCounters};

use crate::config::{Admission, Config, TierShare};
use crate::flights::Flight;
use crate::request::Sparse;
use crate::sequence::Sequence;

/// The quotas of the running requests; nothing in unified memory.
pub(crate) struct Shares {
    tier: Option<(TierShare, Quotas)>,
    page_tokens: usize,
    inject_tokens: usize,
    /// Steps whose selections make a working set.
    window: u32,
    wants: Vec<Want>,
    /// Whose they are, as places in `Engine::running`.
    order: Vec<usize>,
}

impl Shares {
    pub(crate) fn new(config: &Config) -> Self {
        let quotas = |tier: TierShare| {
            let per_layer = u32::try_from(tier.extents / tier.layers).unwrap_or(u32::MAX);
            (tier, Quotas::new(tier.rule, per_layer, tier.layers, config.max_num_seqs))
        };
        Shares {
            tier: config.tier.map(quotas),
            page_tokens: config.page_tokens,
            inject_tokens: config.max_inject_tokens,
            window: match config.admission {
                Admission::Slots => u32::MAX,
                Admission::WorkingSet { steps } => steps as u32,
            },
            wants: Vec::with_capacity(config.max_num_seqs),
            order: Vec::with_capacity(config.max_num_seqs),
        }
    }

    /// Gives each of `running` its quota for the step at hand: those first that take part in it, in their order, `first` before them.
    /// Prompts that go layer by layer have what they need of their layer beforehand, half of all frames at most.
    pub(crate) fn divide(&mut self, first: &[usize], running: &mut [Sequence]) {
        let Some((tier, quotas)) = &mut self.tier else { return };
        self.order.clear();
        self.order.extend(first.iter().filter(|&&at| at < running.len() && running[at].takes_part));
        let num_first = self.order.len();
        for takes_part in [true, false] {
            let others = (0..running.len()).filter(|at| running[*at].takes_part == takes_part);
            for at in others {
                if !self.order[..num_first].contains(&at) {
                    self.order.push(at);
                }
            }
        }
        let mut left = tier.extents / 2;
        for sequence in running.iter_mut() {
            let wanted = sequence.flight.as_ref().map_or(0, |f| layer_extents(f, tier, self.page_tokens));
            sequence.layer_extents = wanted.min(left) as u32;
            left -= sequence.layer_extents as usize;
        }
        let taken = (tier.extents / 2 - left).div_ceil(tier.layers) as u32;
        self.wants.clear();
        self.wants.extend(self.order.iter().map(|&at| {
            let want = want(&running[at], tier, self.page_tokens, self.inject_tokens);
            // Who rests keeps what nobody else has a use for.
            Want { mandatory: if running[at].takes_part { want.mandatory } else { 0 }, ..want }
        }));
        let granted = quotas.divide(&self.wants, taken);
        for (&at, &extents) in self.order.iter().zip(granted) {
            running[at].quota = extents;
            running[at].layer_extents += if running[at].flight.is_some() { extents } else { 0 };
        }
    }

    /// Extents per layer that a request goes on to need; nothing in unified memory.
    pub(crate) fn need(&self, sequence: &Sequence) -> u32 {
        let Some((tier, _)) = &self.tier else { return 0 };
        let (mandatory, useful) = extents(sequence, tier, self.page_tokens);
        let need = extents_needed(sequence.working_set, self.window, mandatory, useful);
        let flight = sequence.flight.as_ref().map_or(0, |f| layer_extents(f, tier, self.page_tokens));
        need.saturating_add(flight.div_ceil(tier.layers) as u32)
    }

    /// Notes what a step did to the pages of `seat`, which holds `held` cache frames now; `of_answer` if it ran tokens of an
    /// answer alone.
    pub(crate) fn observe(&mut self, seat: SeatIndex, counters: &SeatCounters, held: usize, of_answer: bool) {
        match &mut self.tier {
            Some((_, quotas)) if of_answer => quotas.observe(seat, counters, held),
            Some((_, quotas)) => quotas.pass_over(seat, counters),
            None => {}
        }
    }

    pub(crate) fn release(&mut self, seat: SeatIndex) {
        if let Some((_, quotas)) = &mut self.tier {
            quotas.release(seat);
        }
    }

    /// Cache frames that are lent, and lent ones that were taken back since the start.
    pub(crate) fn lent(&self) -> (u64, u64) {
        let frames = |tier: &TierShare, extents: u64| extents * (tier.layers * EXTENT_FRAMES) as u64;
        self.tier.as_ref().map_or((0, 0), |(tier, quotas)| {
            (frames(tier, u64::from(quotas.lent())), frames(tier, quotas.reclaimed()))
        })
    }
}

/// What a sequence asks for in its next step.
fn want(sequence: &Sequence, tier: &TierShare, page_tokens: usize, inject_tokens: usize) -> Want {
    let (mandatory, useful) = extents(sequence, tier, page_tokens);
    // A prompt attends to all before it, which is no reason to keep that; in its last step, or where it goes layer by layer in the last
    // one of a layer, what its answer needs comes.
    let midway = sequence.num_generated() == 0
        && sequence.sparse_at(sequence.tokens.len() - 1).is_some()
        && sequence.num_uncomputed() > inject_tokens
        && sequence.flight.is_none();
    Want {
        seat: sequence.kv.seat().expect("who runs has a seat"),
        mandatory: if midway { 0 } else { mandatory },
        useful,
    }
}

/// Extents per layer that hold what one step selects, at most, and those that hold the whole context.
fn extents(sequence: &Sequence, tier: &TierShare, page_tokens: usize) -> (u32, u32) {
    let context = sequence.tokens.len();
    let extents = |pages: usize| (pages * tier.kv_heads).div_ceil(EXTENT_FRAMES) as u32;
    let all = context.div_ceil(page_tokens);
    let pages = match sequence.sparse_at(context - 1) {
        None => all,
        Some(Sparse { method, budget }) => method
            .plan(context, sequence.prompt_len, budget as usize)
            .pages_max(context, method.partition_tokens, page_tokens),
    };
    (extents(pages), extents(all))
}

/// Extents for the KV of a prompt in the layer in which it is.
fn layer_extents(flight: &Flight, tier: &TierShare, page_tokens: usize) -> usize {
    (flight.end.div_ceil(page_tokens) * tier.kv_heads).div_ceil(EXTENT_FRAMES)
}
