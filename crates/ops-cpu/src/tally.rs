//! What selections come to: see [`ops::tally`].
//!
//! Of each seat, layer and head the last selection is kept as a bitmap of pages, which `select` makes anyway.

use ops::sparse::SelectionLimits;
use ops::tally::{Overlap, RowTally, WorkingSet, WorkingSetSpec, page_words};
use ops::{Batch, SeatIndex};

use crate::selection::Selections;
use crate::working_set::WorkingSets;

/// No row came before.
const NONE: u32 = u32::MAX;

/// The last selections of all seats, and what was counted.
#[derive(Debug)]
pub struct Tally {
    layers: usize,
    kv_heads: usize,
    page_tokens: usize,
    /// Words of a bitmap of pages.
    words: usize,
    /// `[seat][layer][head][word]`.
    pages: Vec<u64>,
    /// `[seat][layer]`: the position of the last row.
    positions: Vec<u32>,
    /// `[seat]`: of the last row in the step at hand.
    rows: Vec<RowTally>,
    overlap: Overlap,
    sets: WorkingSets,
}

impl Tally {
    /// For as many seats as `limits` has rows.
    pub fn new(limits: &SelectionLimits, layers: usize, sets: &WorkingSetSpec) -> Self {
        let (seats, kv_heads, words) = (limits.rows_max, limits.heads.kv_heads, page_words(limits));
        Tally {
            layers,
            kv_heads,
            page_tokens: limits.page_tokens,
            words,
            pages: vec![0; seats * layers * kv_heads * words],
            positions: vec![NONE; seats * layers],
            rows: vec![RowTally::default(); seats],
            overlap: Overlap::default(),
            sets: WorkingSets::new(limits, *sets),
        }
    }

    /// A new step.
    pub fn begin(&mut self, batch: &Batch) {
        batch.sequences.iter().for_each(|s| self.rows[s.seat.at()] = RowTally::default());
    }

    /// Counts what the rows of `batch` select in `layer`.
    pub fn add(&mut self, layer: usize, batch: &Batch, selection: &Selections) {
        for (place, row) in batch.sparse_rows().enumerate() {
            let seat = row.sequence.seat.at();
            self.sets.step(row.sequence.seat, layer, |head| selection.get(place, head).map(|s| s.pages));
            let selects = selection.get(place, 0).is_some();
            let position = if selects { row.position as u32 } else { NONE };
            let before = std::mem::replace(&mut self.positions[seat * self.layers + layer], position);
            if !selects {
                continue;
            }
            let follows = before != NONE && before + 1 == position;
            // Beyond what the last row could select lies what an earlier request left.
            let known = if follows { row.position.div_ceil(64 * self.page_tokens) } else { 0 };
            let mut slots = 0;
            for head in 0..self.kv_heads {
                let selected = selection.get(place, head).expect("all heads select or none");
                let at = ((seat * self.layers + layer) * self.kv_heads + head) * self.words;
                let last = &mut self.pages[at..][..selected.pages.len()];
                slots += u64::from(selected.counts.slots);
                if follows {
                    let both = |(before, now): (&u64, &u64)| u64::from((before & now).count_ones());
                    self.overlap.pages += u64::from(selected.counts.pages);
                    self.overlap.repeated +=
                        last.iter().zip(selected.pages).take(known).map(both).sum::<u64>();
                }
                last.copy_from_slice(selected.pages);
            }
            if row.row + 1 == row.sequence.rows.end as usize {
                self.rows[seat].slots += slots;
                self.rows[seat].selections += self.kv_heads as u32;
            }
        }
    }

    /// Forgets `seat`.
    pub fn release(&mut self, seat: SeatIndex) {
        self.positions[seat.at() * self.layers..][..self.layers].fill(NONE);
        self.rows[seat.at()] = RowTally::default();
        self.sets.release(seat);
    }

    /// What was counted since the start.
    pub fn overlap(&self) -> Overlap {
        self.overlap
    }

    /// Of the last row of `seat` in the step at hand.
    pub fn row(&self, seat: SeatIndex) -> RowTally {
        self.rows[seat.at()]
    }

    /// What the last rows of `seat` selected.
    pub fn working_set(&self, seat: SeatIndex) -> WorkingSet {
        self.sets.get(seat)
    }
}
