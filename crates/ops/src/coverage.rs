//! How much of dense attention a selection covers: what a sampled check measures and a quality guard acts upon.

use crate::SeatIndex;

/// The likeliest tokens of a query head of which [`Coverage::recall`] tells how many were selected; all there are in a context
/// that is shorter.
pub const TOP_TOKENS: usize = 64;

/// A check that is asked for: of the selection that the last row of a sequence attends to in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Whose.
    pub seat: SeatIndex,
    /// Where.
    pub layer: u32,
}

/// The checks of a step: those that are asked for, and what came out so far.
#[derive(Clone, Debug, Default)]
pub struct Inspections {
    /// At most one per sequence.
    pub asked: Vec<Inspection>,
    /// In order of the layers.
    pub found: Vec<(SeatIndex, Coverage)>,
}

/// What a selection covers of its context, means over the query heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coverage {
    /// Weight that dense attention gives to the selected slots, of 1. Pseudo-tokens are not counted.
    pub mass: f32,
    /// Share of the [`TOP_TOKENS`] slots with the highest scores that are selected; of equal ones the earlier.
    pub recall: f32,
}

impl Coverage {
    /// Of a row that attends to everything.
    pub const WHOLE: Coverage = Coverage { mass: 1.0, recall: 1.0 };
}

/// The slots of one query head, passed over once in ascending order: weights by running maximum, and the best scores.
#[derive(Clone, Debug)]
pub struct HeadCoverage {
    max: f32,
    /// Weights of all slots and of selected ones, relative to the maximum.
    all: f32,
    selected: f32,
    /// The best scores so far, descending, and whether they are selected.
    top: [(f32, bool); TOP_TOKENS],
    top_len: usize,
}

impl HeadCoverage {
    /// Of no slots.
    pub const fn new() -> Self {
        HeadCoverage {
            max: f32::NEG_INFINITY,
            all: 0.0,
            selected: 0.0,
            top: [(f32::NEG_INFINITY, false); TOP_TOKENS],
            top_len: 0,
        }
    }

    /// Adds slots whose weights relative to `max` sum up to `all`, those of the selected ones to `selected`; `exp` is the
    /// exponential that scores are taken to.
    pub fn weigh(&mut self, max: f32, all: f32, selected: f32, exp: impl Fn(f32) -> f32) {
        if max > self.max {
            // Nothing was weighed before the first finite maximum.
            let scale = if self.max == f32::NEG_INFINITY { 0.0 } else { exp(self.max - max) };
            self.all *= scale;
            self.selected *= scale;
            self.max = max;
        }
        if max > f32::NEG_INFINITY {
            let scale = exp(max - self.max);
            self.all += all * scale;
            self.selected += selected * scale;
        }
    }

    /// Adds the score of the next slot to the best ones, if it is one of them.
    #[inline(always)]
    pub fn rank(&mut self, score: f32, selected: bool) {
        if self.top_len == TOP_TOKENS && score <= self.top[TOP_TOKENS - 1].0 {
            return;
        }
        let at = self.top[..self.top_len].partition_point(|(better, _)| *better >= score);
        self.top_len = (self.top_len + 1).min(TOP_TOKENS);
        self.top[at..self.top_len].rotate_right(1);
        self.top[at] = (score, selected);
    }

    /// The mean over `heads`.
    pub fn mean(heads: &[HeadCoverage]) -> Coverage {
        let (mut mass, mut recall) = (0.0, 0.0);
        for head in heads {
            let found = head.top[..head.top_len].iter().filter(|(_, selected)| *selected).count();
            mass += head.selected / head.all;
            recall += found as f32 / head.top_len as f32;
        }
        let count = heads.len() as f32;
        Coverage { mass: mass / count, recall: recall / count }
    }
}

impl Default for HeadCoverage {
    fn default() -> Self {
        HeadCoverage::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    /// By the formulas, with everything at hand.
    fn by_definition(scores: &[f32], selected: &[bool]) -> (f32, f32) {
        let weights: Vec<f64> = scores.iter().map(|s| f64::from(*s).exp()).collect();
        let of = |keep: &dyn Fn(usize) -> bool| -> f64 {
            (0..scores.len()).filter(|i| keep(*i)).map(|i| weights[i]).sum()
        };
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        order.truncate(TOP_TOKENS);
        let found = order.iter().filter(|i| selected[**i]).count() as f32 / order.len() as f32;
        ((of(&|i| selected[i]) / of(&|_| true)) as f32, found)
    }

    #[test]
    fn one_pass_finds_what_the_formulas_say() {
        let mut random = Random::new(17);
        for round in 0..200 {
            let len = 1 + random.below(400);
            // Few distinct values: ties are common.
            let scores: Vec<f32> = (0..len).map(|_| random.below(40) as f32 * 0.25 - 5.0).collect();
            let selected: Vec<bool> = (0..len).map(|_| random.below(3) == 0).collect();
            let mut head = HeadCoverage::new();
            let piece = 1 + random.below(100);
            for from in (0..len).step_by(piece) {
                let range = from..(from + piece).min(len);
                let max = scores[range.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weight = |i: usize| (scores[i] - max).exp();
                let all = range.clone().map(weight).sum();
                let kept = range.clone().filter(|i| selected[*i]).map(weight).sum();
                head.weigh(max, all, kept, f32::exp);
                range.for_each(|i| head.rank(scores[i], selected[i]));
            }
            let Coverage { mass, recall } = HeadCoverage::mean(&[head]);
            let (expected_mass, expected_recall) = by_definition(&scores, &selected);
            assert!((mass - expected_mass).abs() < 1e-5, "seed 17 round {round}: {mass} {expected_mass}");
            assert!((recall - expected_recall).abs() < 1e-6, "seed 17 round {round}");
        }
    }
}
