//! The quality guard: now and then it compares what a request selects with dense attention, and lets it attend to more where too
//! little is covered.
//!
//! Invariant: what it does to a request follows from the request alone: its seed, positions, and its own scores. It does not
//! depend on load, tiers or preemption, so neither does an answer.

use ops::Random;
use ops::coverage::Coverage;

use crate::request::{Guarded, Sparse};

/// When requests are checked, and what is enough: the same for all requests of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardRule {
    /// Generated tokens that are checked, of a million, as far as `bytes_per_token` allows.
    pub rate_ppm: u32,
    /// Bytes of keys that the checks of a request may read, times its generated tokens.
    pub bytes_per_token: u64,
    /// Attention mass, in thousandths, below which a request attends to more from then on.
    pub mass_min_permille: u32,
    /// Layers in which policies select, ascending; one is checked at a time.
    pub layers: Vec<u32>,
    /// Bytes of the keys of a page in one layer, all KV heads.
    pub key_page_bytes: u64,
}

/// A budget is doubled so often; after that a request attends to everything.
pub const DOUBLINGS_MAX: usize = 2;

/// Positions from a check to the first token that it changes. The token between runs before a check is known to an engine that is
/// a step ahead of its device.
const DELAY: usize = 2;

/// Sets the draws of the guard apart from those of tokens, which have the same seed.
const STREAM: u64 = 0x6775_6172_6400_0000;

/// The guard of one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guard {
    /// Budgets after the first one, with the positions from which on they hold.
    changes: [Option<(usize, u32)>; DOUBLINGS_MAX + 1],
    /// Positions below this were decided upon: what is run once more after a preemption is not checked once more.
    decided: usize,
    /// Bytes of keys read.
    read: u64,
    pub(crate) seen: Guarded,
}

impl Guard {
    /// The budget of the token at `position`, `first` being that of the request.
    pub(crate) fn budget(&self, first: u32, position: usize) -> u32 {
        let last = self.changes.iter().flatten().rev().find(|(from, _)| *from <= position);
        last.map_or(first, |(_, budget)| *budget)
    }

    /// The end of the run of positions from `from` on that have one budget, `end` at most.
    pub(crate) fn same_until(&self, from: usize, end: usize) -> usize {
        let next = self.changes.iter().flatten().map(|(position, _)| *position).find(|p| *p > from);
        next.map_or(end, |next| next.min(end))
    }

    /// The layer to check for the token at `position`, the newest of its request, if it is one's turn.
    pub(crate) fn turn(
        &mut self,
        rule: &GuardRule,
        sparse: &Sparse,
        seed: u64,
        position: usize,
        prompt_len: usize,
        page_tokens: usize,
    ) -> Option<u32> {
        if position < self.decided.max(prompt_len) {
            return None;
        }
        self.decided = position + 1;
        let mut random = Random::keyed(seed ^ STREAM, position as u64);
        let drawn = random.below(1_000_000) < rule.rate_ppm as usize;
        let context = position + 1;
        let budget = self.budget(sparse.budget, position);
        if !drawn || sparse.method.plan(context, prompt_len, budget as usize).is_dense() {
            return None;
        }
        let layers =
            &rule.layers[rule.layers.partition_point(|l| (*l as usize) < sparse.method.dense_layers)..];
        let bytes = context.div_ceil(page_tokens) as u64 * rule.key_page_bytes;
        let allowed = rule.bytes_per_token.saturating_mul((context - prompt_len) as u64);
        if layers.is_empty() || self.read + bytes > allowed {
            return None;
        }
        self.read += bytes;
        Some(layers[random.below(layers.len())])
    }

    /// Takes in what a check of the token at `position` found.
    pub(crate) fn observe(
        &mut self,
        rule: &GuardRule,
        sparse: &Sparse,
        position: usize,
        prompt_len: usize,
        coverage: Coverage,
    ) -> Option<GuardAction> {
        self.seen.add(coverage);
        let done = self.changes.iter().flatten().count();
        // A change that does not hold yet answers what was seen before it.
        let pending = self.changes.iter().flatten().any(|(from, _)| *from > position);
        if coverage.mass >= rule.mass_min_permille as f32 / 1000.0 || pending || done > DOUBLINGS_MAX {
            return None;
        }
        let budget = self.budget(sparse.budget, position);
        let plan = sparse.method.plan(position + 1, prompt_len, budget as usize);
        // One that is too small for what is always attended is raised to that first.
        let attended = plan.attended(position + 1, sparse.method.partition_tokens) as u32;
        let (budget, action) = match done {
            DOUBLINGS_MAX => (u32::MAX, GuardAction::Dense),
            _ => (budget.max(attended).saturating_mul(2), GuardAction::Doubled),
        };
        self.changes[done] = Some((position + DELAY, budget));
        self.seen.act(action, budget);
        Some(action)
    }
}

/// What a guard did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardAction {
    /// The budget was doubled.
    Doubled,
    /// From then on the request attends to everything.
    Dense,
}

#[cfg(test)]
mod tests {
    use ops::sparse::{Always, Method, Reduce, Rule, Scope, Score};

    use super::*;

    const RULE: fn() -> GuardRule = || GuardRule {
        rate_ppm: 300_000,
        bytes_per_token: 1000,
        mass_min_permille: 900,
        layers: vec![1, 3, 4],
        key_page_bytes: 50,
    };

    fn sparse(dense_layers: usize) -> Sparse {
        let always = Always { sink_tokens: 0, recent_tokens: 1, generated_tokens: 0, outliers: 0 };
        let method = Method {
            dense_layers,
            partition_tokens: 16,
            score: Score::Recency,
            reduce: Reduce::Mean,
            softmax: false,
            scope: Scope::KvHead,
            always,
            open_competes: false,
            take_min: 0,
            rule: Rule::Top,
        };
        Sparse { method, budget: 40 }
    }

    /// Turns at positions `from..to` of a prompt of 100 tokens.
    fn turns(
        guard: &mut Guard,
        rule: &GuardRule,
        sparse: &Sparse,
        positions: std::ops::Range<usize>,
    ) -> Vec<(usize, u32)> {
        positions.filter_map(|p| guard.turn(rule, sparse, 7, p, 100, 16).map(|layer| (p, layer))).collect()
    }

    #[test]
    fn turns_follow_seed_and_position() {
        let (rule, sparse) = (RULE(), sparse(2));
        let all = turns(&mut Guard::default(), &rule, &sparse, 90..1100);
        assert!((230..370).contains(&all.len()), "three in ten of a thousand: {}", all.len());
        assert!(
            all.iter().all(|(p, layer)| *p >= 100 && [3, 4].contains(layer)),
            "of answers, where they select"
        );
        assert!([3, 4].iter().all(|l| all.iter().any(|(_, layer)| layer == l)), "every such layer");
        let mut guard = Guard::default();
        let first = turns(&mut guard, &rule, &sparse, 90..500);
        assert!(turns(&mut guard, &rule, &sparse, 100..500).is_empty(), "nothing is checked once more");
        let rest = turns(&mut guard, &rule, &sparse, 500..1100);
        assert_eq!([first, rest].concat(), all, "whatever is run again");
    }

    #[test]
    fn checks_stay_below_their_bytes() {
        let rule = GuardRule { rate_ppm: 1_000_000, bytes_per_token: 100, ..RULE() };
        let found = turns(&mut Guard::default(), &rule, &sparse(0), 100..1100);
        let mut read = 0;
        for (position, _) in &found {
            read += (position + 1).div_ceil(16) as u64 * 50;
            assert!(read <= 100 * (position - 99) as u64, "at {position}");
        }
        assert!(found.len() > 20, "and use them: {}", found.len());
    }

    #[test]
    fn budgets_double_and_then_everything_is_attended_to() {
        let (rule, sparse) = (RULE(), sparse(0));
        let mut guard = Guard::default();
        let (bad, good) = (Coverage { mass: 0.5, recall: 0.5 }, Coverage { mass: 0.95, recall: 0.9 });
        assert_eq!(guard.observe(&rule, &sparse, 200, 100, good), None);
        assert_eq!(guard.observe(&rule, &sparse, 210, 100, bad), Some(GuardAction::Doubled));
        assert_eq!(guard.observe(&rule, &sparse, 211, 100, bad), None, "what was done does not hold yet");
        assert_eq!(guard.observe(&rule, &sparse, 212, 100, bad), Some(GuardAction::Doubled));
        assert_eq!(guard.observe(&rule, &sparse, 300, 100, bad), Some(GuardAction::Dense));
        assert_eq!(guard.observe(&rule, &sparse, 400, 100, bad), None, "there is nothing more to do");
        let at = |position| guard.budget(40, position);
        assert_eq!(
            [200, 211, 212, 213, 214, 301, 302, 900].map(at),
            [40, 40, 80, 80, 160, 160, u32::MAX, u32::MAX]
        );
        assert_eq!(guard.same_until(150, 290), 212);
        assert_eq!(guard.same_until(212, 290), 214);
        assert_eq!(guard.same_until(214, 290), 290);
        assert_eq!((guard.seen.checks, guard.seen.doubled, guard.seen.dense), (6, 2, true));
        assert!((guard.seen.mass_min - 0.5).abs() < 1e-6);
    }
}
