//! What selections come to, by sets of pages.

use std::collections::{BTreeMap, BTreeSet};

use super::Selections;
use crate::tally::{Overlap, RowTally};
use crate::{Batch, SeatIndex};

/// The last selections of all seats.
#[derive(Debug, Default)]
pub(super) struct NaiveTally {
    /// By seat, layer and head: the position of the last row, and the pages that it selected.
    last: BTreeMap<(SeatIndex, usize, usize), (usize, BTreeSet<usize>)>,
    rows: BTreeMap<SeatIndex, RowTally>,
    overlap: Overlap,
}

impl NaiveTally {
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
        self.rows.remove(&seat);
    }

    pub(super) fn overlap(&self) -> Overlap {
        self.overlap
    }

    pub(super) fn row(&self, seat: SeatIndex) -> RowTally {
        self.rows.get(&seat).copied().unwrap_or_default()
    }
}
