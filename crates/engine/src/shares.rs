//! What each running request may hold of the HBM tier.

use kv::{Quotas, Want};
use ops::SeatIndex;
use ops::residency::{EXTENT_FRAMES, SeatCounters};

use crate::config::{Config, TierShare};
use crate::request::Sparse;
use crate::sequence::Sequence;

/// The quotas of the running requests; nothing in unified memory.
pub(crate) struct Shares {
    tier: Option<(TierShare, Quotas)>,
    page_tokens: usize,
    inject_tokens: usize,
    wants: Vec<Want>,
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
            wants: Vec::with_capacity(config.max_num_seqs),
        }
    }

    /// Gives each of `running`, in order of arrival, its quota for the step at hand.
    pub(crate) fn divide(&mut self, running: &mut [Sequence]) {
        let Some((tier, quotas)) = &mut self.tier else { return };
        self.wants.clear();
        self.wants.extend(running.iter().map(|s| want(s, tier, self.page_tokens, self.inject_tokens)));
        let granted = quotas.divide(&self.wants);
        for (sequence, &extents) in running.iter_mut().zip(granted) {
            sequence.quota = extents;
        }
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
    let context = sequence.tokens.len();
    let extents = |pages: usize| (pages * tier.kv_heads).div_ceil(EXTENT_FRAMES) as u32;
    let all = context.div_ceil(page_tokens);
    let pages = match sequence.sparse_at(context - 1) {
        None => all,
        // A prompt attends to all before it, which is no reason to keep that; in its last step, what its answer needs comes.
        Some(_) if sequence.num_generated() == 0 && sequence.num_uncomputed() > inject_tokens => 0,
        Some(Sparse { method, budget }) => method
            .plan(context, sequence.prompt_len, budget as usize)
            .pages_max(context, method.partition_tokens, page_tokens),
    };
    Want {
        seat: sequence.kv.seat().expect("who runs has a seat"),
        mandatory: extents(pages),
        useful: extents(all),
    }
}
