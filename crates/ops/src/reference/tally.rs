//! What selections come to, by sets of pages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Selections;
use crate::tally::{Overlap, RowTally, WORKING_SET_STEPS_MAX, WorkingSet, WorkingSetSpec};
use crate::{Batch, SeatIndex};

/// The last selections of all seats.
#[derive(Debug, Default)]
pub(super) struct NaiveTally {
    /// By seat, layer and head: the position of the last row, and the pages that it selected.
    last: BTreeMap<(SeatIndex, usize, usize), (usize, BTreeSet<usize>)>,
    rows: BTreeMap<SeatIndex, RowTally>,
    overlap: Overlap,
    sets: Option<WorkingSetSpec>,
    /// By seat, layer and head: the pages of the last rows, none of those that select nothing.
    recent: BTreeMap<(SeatIndex, usize, usize), VecDeque<BTreeSet<usize>>>,
}

impl NaiveTally {
    pub(super) fn within(&mut self, sets: &WorkingSetSpec) {
        self.sets = Some(*sets);
    }

    pub(super) fn begin(&mut self, batch: &Batch) {
        self.rows.retain(|seat, _| batch.sequences.iter().all(|s| s.seat != *seat));
    }

    pub(super) fn add(
        &mut self,
        layer: usize,
        heads: usize,
        page_tokens: usize,
        batch: &Batch,
        selection: &Selections,
    ) {
        for (place, row) in batch.sparse_rows().enumerate() {
            for head in 0..heads {
                let key = (row.sequence.seat, layer, head);
                let before = self.last.remove(&key);
                let recent = self.recent.entry(key).or_default();
                recent.push_back(BTreeSet::new());
                if recent.len() > WORKING_SET_STEPS_MAX {
                    recent.pop_front();
                }
                let Some(bits) = &selection.bits[selection.at(place, head)] else { continue };
                let slots = (0..64 * bits.len()).filter(|slot| bits[slot / 64] >> (slot % 64) & 1 == 1);
                let slots: Vec<usize> = slots.collect();
                let pages: BTreeSet<usize> = slots.iter().map(|slot| slot / page_tokens).collect();
                if let Some((position, before)) = before
                    && position + 1 == row.position
                {
                    self.overlap.pages += pages.len() as u64;
                    self.overlap.repeated += pages.intersection(&before).count() as u64;
                }
                *self.recent.get_mut(&key).and_then(VecDeque::back_mut).expect("it was added") =
                    pages.clone();
                self.last.insert(key, (row.position, pages));
                if row.row + 1 == row.sequence.rows.end as usize {
                    let tally = self.rows.entry(row.sequence.seat).or_default();
                    tally.slots += slots.len() as u64;
                    tally.selections += 1;
                }
            }
        }
    }

    pub(super) fn release(&mut self, seat: SeatIndex) {
        self.last.retain(|(of, ..), _| *of != seat);
        self.recent.retain(|(of, ..), _| *of != seat);
        self.rows.remove(&seat);
    }

    pub(super) fn overlap(&self) -> Overlap {
        self.overlap
    }

    pub(super) fn row(&self, seat: SeatIndex) -> RowTally {
        self.rows.get(&seat).copied().unwrap_or_default()
    }

    pub(super) fn working_set(&self, seat: SeatIndex) -> WorkingSet {
        let mut set = WorkingSet::default();
        let Some(sets) = &self.sets else { return set };
        for &layer in sets.layers() {
            let of_layer = self.recent.range((seat, layer, 0)..(seat, layer + 1, 0));
            let mut pages = 0;
            for (_, rows) in of_layer {
                let last = rows.iter().rev().take(sets.steps());
                pages += last.flatten().collect::<BTreeSet<_>>().len() as u64;
                set.steps = set.steps.max(rows.len().min(sets.steps()) as u32);
            }
            set.pages += pages;
            set.layers += u32::from(pages > 0);
        }
        set
    }
}
