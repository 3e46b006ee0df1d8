//! What selections come to: see [`ops::tally`].
//!
//! Of each seat, layer and head the last selection is kept as a bitmap of pages. Selections are sparse, so what it costs is to
//! read their bitmaps of slots once.

use ops::sparse::SelectionLimits;
use ops::tally::{Overlap, RowTally, page_words};
use ops::{Batch, SeatIndex};

use crate::selection::{Selections, ones, page_starts};

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
}

impl Tally {
    /// For as many seats as `limits` has rows.
    pub fn new(limits: &SelectionLimits, layers: usize) -> Self {
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
                let (bits, pages) = selection.get(place, head).expect("all heads select or none");
                let at = ((seat * self.layers + layer) * self.kv_heads + head) * self.words;
                let last = &mut self.pages[at..][..bits.len().div_ceil(self.page_tokens)];
                let (named, repeated) = replace(last, known, bits, self.page_tokens);
                slots += named;
                if follows {
                    self.overlap.pages += pages as u64;
                    self.overlap.repeated += repeated;
                }
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
    }

    /// What was counted since the start.
    pub fn overlap(&self) -> Overlap {
        self.overlap
    }

    /// Of the last row of `seat` in the step at hand.
    pub fn row(&self, seat: SeatIndex) -> RowTally {
        self.rows[seat.at()]
    }
}

/// Puts the pages of `bits` in the place of those in `last`, of which `known` words mean anything; returns the slots of `bits`, and
/// the pages that both have.
fn replace(last: &mut [u64], known: usize, bits: &[u64], page_tokens: usize) -> (u64, u64) {
    let of_word = 64 / page_tokens;
    let (mut slots, mut repeated) = (0, 0);
    // A word of pages is that of as many words of slots as a page has slots.
    for (at, (last, bits)) in last.iter_mut().zip(bits.chunks(page_tokens)).enumerate() {
        let mut pages = 0;
        for (i, &word) in bits.iter().enumerate() {
            slots += u64::from(word.count_ones());
            for start in ones(page_starts(word, page_tokens)) {
                pages |= 1 << (i * of_word + start / page_tokens);
            }
        }
        let before = if at < known { *last } else { 0 };
        repeated += u64::from((before & pages).count_ones());
        *last = pages;
    }
    (slots, repeated)
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    #[test]
    fn pages_and_slots_are_counted() {
        let mut random = Random::new(3);
        for page_tokens in [8, 16, 32, 64] {
            let words = 150;
            let mut last = vec![u64::MAX; (words * 64usize).div_ceil(64 * page_tokens)];
            let mut before: Vec<usize> = Vec::new();
            for round in 0..20 {
                let mut bits = vec![0u64; words];
                (0..300).for_each(|_| bits[random.below(words)] |= 1 << random.below(64));
                let selected: Vec<usize> =
                    (0..words * 64).filter(|slot| bits[slot / 64] >> (slot % 64) & 1 == 1).collect();
                let mut pages: Vec<usize> = selected.iter().map(|slot| slot / page_tokens).collect();
                pages.dedup();
                let known = if round == 0 { 0 } else { last.len() };
                let found = replace(&mut last, known, &bits, page_tokens);
                let both = pages.iter().filter(|page| before.contains(page)).count();
                assert_eq!(
                    found,
                    (selected.len() as u64, both as u64),
                    "pages of {page_tokens}, round {round}"
                );
                before = pages;
            }
        }
    }
}
