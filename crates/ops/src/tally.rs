//! What selections come to: how many tokens they name, how much of one the next one repeats, and how many pages the last ones name
//! together.
//!
//! Counted from the selections themselves, so that it is the same in unified memory and in tiers, whatever HBM holds.

use crate::sparse::SelectionLimits;

/// Pages that the rows of answers select, over all layers and KV heads that select, since the start. Counted are rows that come
/// right after a row of the same sequence which selected in that layer, too, with no change of seat in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Pages with a selected slot.
    pub pages: u64,
    /// Those of them of which the row before selected a slot, too, for the same layer and KV head.
    pub repeated: u64,
}

impl Overlap {
    /// What was counted since `before`.
    pub fn since(&self, before: &Overlap) -> Overlap {
        Overlap { pages: self.pages - before.pages, repeated: self.repeated - before.repeated }
    }
}

/// What the last row of a sequence selected in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowTally {
    /// Selected slots, over all layers and KV heads that selected. Pseudo-tokens are not counted.
    pub slots: u64,
    /// Selections: layers that selected, times KV heads.
    pub selections: u32,
}

/// Steps over which a working set is counted, unless somebody says otherwise: SparseServe found that more add little to what the next
/// step finds again.
pub const WORKING_SET_STEPS: usize = 12;

/// The most of them.
pub const WORKING_SET_STEPS_MAX: usize = 63;

/// Layers in which a working set is counted, at most.
pub const SAMPLED_LAYERS_MAX: usize = 4;

/// The pages that a sequence selected in its last steps, counted in a sample of its layers. A step of a sequence is a row of its
/// answer, those that a preempted request runs again among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Pages of which a slot was selected in the last steps, each of a (layer, KV head) by itself, over the sampled layers. As
    /// selections number them: one that changes its place for that in an ordered copy stays the same.
    pub pages: u64,
    /// Sampled layers in which anything was selected meanwhile.
    pub layers: u32,
    /// Its steps since its seat was last released, at most as many as are looked at.
    pub steps: u32,
}

/// Over what working sets are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSetSpec {
    steps: usize,
    /// Ascending; those in use.
    layers: [usize; SAMPLED_LAYERS_MAX],
    num_layers: usize,
}

impl WorkingSetSpec {
    /// The last `steps` steps, in a sample of the layers `selecting`, which ascend: spread evenly over them, or all where they are few.
    ///
    /// # Panics
    /// Unless there are 1 to [`WORKING_SET_STEPS_MAX`] steps.
    pub fn new(steps: usize, selecting: impl Iterator<Item = usize> + Clone) -> Self {
        assert!((1..=WORKING_SET_STEPS_MAX).contains(&steps), "a working set of {steps} steps");
        let of = selecting.clone().count();
        let num_layers = of.min(SAMPLED_LAYERS_MAX);
        let mut layers = [0; SAMPLED_LAYERS_MAX];
        for (i, layer) in layers[..num_layers].iter_mut().enumerate() {
            // From the middle of an equal part each.
            let nth = (2 * i + 1) * of / (2 * num_layers);
            *layer = selecting.clone().nth(nth).expect("it is below their number");
        }
        WorkingSetSpec { steps, layers, num_layers }
    }

    /// Steps that are looked at.
    pub const fn steps(&self) -> usize {
        self.steps
    }

    /// The sampled layers, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.layers[..self.num_layers]
    }

    /// The place of `layer` among them, if it is one.
    pub fn place_of(&self, layer: usize) -> Option<usize> {
        self.layers().iter().position(|l| *l == layer)
    }

    /// Bits of a number of steps.
    pub const fn step_bits(&self) -> usize {
        (usize::BITS - self.steps.leading_zeros()) as usize
    }
}

/// Words of a bitmap of pages whose working set is counted at once.
pub const COUNTER_WORDS: usize = 8;

/// Words of a bitmap of the pages of a context.
pub const fn page_words(limits: &SelectionLimits) -> usize {
    limits.context_max.div_ceil(64 * limits.page_tokens)
}

/// Bytes of the last selections of so many sequences as `limits` has rows, one bit per page, layer and KV head, of their working
/// sets, less than a byte per page, sampled layer and KV head, and of what goes with them. Those of seats that nobody takes take no
/// memory.
pub fn bytes(limits: &SelectionLimits, layers: usize, sets: &WorkingSetSpec) -> u64 {
    let words = page_words(limits);
    let bitmap = limits.heads.kv_heads * size_of::<u64>();
    let layer = bitmap * words + size_of::<u32>();
    let sampled = bitmap * words.next_multiple_of(COUNTER_WORDS) * sets.step_bits() + 2 * size_of::<u32>();
    let seat = layers * layer + sets.layers().len() * sampled + size_of::<RowTally>() + size_of::<u32>();
    (limits.rows_max as u64).saturating_mul(seat as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_sampled_evenly() {
        let of = |layers: &[usize]| WorkingSetSpec::new(12, layers.iter().copied()).layers().to_vec();
        let all: Vec<usize> = (0..32).collect();
        assert_eq!(of(&all), [4, 12, 20, 28]);
        assert_eq!(of(&all[2..]), [5, 13, 20, 28]);
        assert_eq!(of(&all[..5]), [0, 1, 3, 4]);
        assert_eq!(of(&[1, 3, 5, 7]), [1, 3, 5, 7]);
        assert_eq!(of(&[6]), [6]);
        assert_eq!(of(&[]), []);
        for num in 5..200 {
            let sampled = of(&(0..num).collect::<Vec<_>>());
            assert!(sampled.is_sorted_by(|a, b| a < b) && sampled[3] < num, "{sampled:?} of {num}");
        }
    }

    #[test]
    fn places_and_bits() {
        let spec = WorkingSetSpec::new(12, (0..16).filter(|l| l % 2 == 1));
        assert_eq!(spec.layers(), [3, 7, 11, 15]);
        assert_eq!([3, 4, 15, 0].map(|layer| spec.place_of(layer)), [Some(0), None, Some(3), None]);
        let bits = |steps| WorkingSetSpec::new(steps, 0..1).step_bits();
        assert_eq!([1, 2, 3, 4, 7, 8, 12, 15, 16, 63].map(bits), [1, 2, 2, 3, 3, 4, 4, 4, 5, 6]);
    }
}
