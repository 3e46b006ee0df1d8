//! What selections come to: how many tokens they name, and how much of one the next one repeats.
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

/// The pages that a sequence selected in its last steps, counted in a sample of its layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Pages of which a slot was selected in the last steps, each of a (layer, KV head) by itself, over the sampled layers.
    pub pages: u64,
    /// Sampled layers in which the sequence selected anything meanwhile.
    pub layers: u32,
    /// Steps that ran rows of its answer since its seat was last released, at most as many as are looked at.
    pub steps: u32,
}

/// Words of a bitmap of the pages of a context.
pub const fn page_words(limits: &SelectionLimits) -> usize {
    limits.context_max.div_ceil(64 * limits.page_tokens)
}

/// Bytes of the last selections of so many sequences as `limits` has rows, one bit per page, layer and KV head, and of what goes
/// with them. Those of seats that nobody takes take no memory.
pub const fn bytes(limits: &SelectionLimits, layers: usize) -> u64 {
    let layer = limits.heads.kv_heads * page_words(limits) * size_of::<u64>() + size_of::<u32>();
    (limits.rows_max as u64).saturating_mul((layers * layer + size_of::<RowTally>()) as u64)
}
