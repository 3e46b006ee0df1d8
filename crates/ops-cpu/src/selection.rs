//! The memory of scores and selections, and which rows they are for.

use ops::cluster::OrderedSlots;
use ops::sparse::{Method, RowPlan, SelectionLimits, bitmap_words};
use ops::tally::page_words;
use ops::{Batch, Error, HeadShape, SparseRow};

use crate::memory::{Buffer, PerThread};
use crate::merge::carry_stride;
use crate::pages::HEAD_DIM_MAX;
use crate::score::{even_stretch, stretch_of};
use crate::select::narrowed_len;
use crate::tile::round_to_lanes;

/// Values of a lifted query, at most.
pub(crate) const LIFTED_MAX: usize = 2 * HEAD_DIM_MAX;

/// Scores and selections of the sparse rows of a step, for one layer at a time.
#[derive(Debug)]
pub struct Selections {
    pub(crate) limits: SelectionLimits,
    /// Of this layer and batch, in order.
    pub(crate) rows: Vec<PlannedRow>,
    /// `[place][kv head][line][partition]`.
    pub(crate) scores: Buffer<f32>,
    /// Queries of a gate, `[place][kv head][head_dim]`.
    pub(crate) gated: Buffer<f32>,
    /// `[place][kv head][word]`.
    pub(crate) bits: Vec<u64>,
    /// Pages with a selected slot, `[place][kv head][word]`.
    pub(crate) page_bits: Vec<u64>,
    /// `[place][kv head]`.
    pub(crate) counts: Vec<Counts>,
    /// Attention to pseudo-tokens, one line of [`carry_stride`] floats for each `[place][query head]`: weighted values, maximum
    /// and sum, as of a split.
    pub(crate) estimates: Buffer<f32>,
    /// Pseudo-tokens, `[place][kv head]`.
    pub(crate) estimated: Vec<u32>,
    pub(crate) threads: PerThread<Scratch>,
}

/// How much is selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) slots: u32,
    /// With a selected slot.
    pub(crate) pages: u32,
}

/// The selection of a row and KV head.
#[derive(Clone, Copy, Debug)]
pub struct Selected<'a> {
    /// A bit per slot.
    pub slots: &'a [u64],
    /// A bit per page, of those with a selected slot.
    pub pages: &'a [u64],
    pub(crate) counts: Counts,
    page_tokens: usize,
}

impl Selected<'_> {
    /// The selected slots of a page, its first the lowest bit.
    #[inline(always)]
    pub fn of_page(&self, page: usize) -> u64 {
        let first = page * self.page_tokens;
        self.slots[first / 64] >> (first % 64) & (u64::MAX >> (64 - self.page_tokens))
    }

    /// The pages with a selected slot, in order.
    pub fn each_page(&self) -> impl Iterator<Item = usize> {
        self.pages.iter().enumerate().flat_map(|(i, &word)| ones(word).map(move |page| i * 64 + page))
    }
}

/// A sparse row and what it attends to.
#[derive(Clone, Debug)]
pub(crate) struct PlannedRow {
    /// Row of the batch.
    pub(crate) row: usize,
    /// Its sequence among those of the batch.
    pub(crate) sequence: usize,
    pub(crate) position: usize,
    pub(crate) method: Method,
    /// `None` if it attends to everything.
    pub(crate) plan: Option<RowPlan>,
    /// Candidates per task.
    pub(crate) stretch: usize,
    /// Tasks of the rows up to this one.
    pub(crate) tasks_end: usize,
}

/// Memory of one thread.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Queries of all lines, as left operands.
    pub(crate) lifted: Vec<u32>,
    /// One value per candidate.
    pub(crate) reduced: Vec<f32>,
    /// Scores of a line, without those of outliers.
    pub(crate) masked: Vec<f32>,
    pub(crate) keys: Vec<u32>,
    /// Some of them.
    pub(crate) narrowed: Vec<u32>,
    /// Partitions, ascending.
    pub(crate) outliers: Vec<u32>,
    /// How many tokens each cluster has, those that were picked, where their mean values are, and their weights, query head by query
    /// head.
    pub(crate) sizes: Vec<u32>,
    pub(crate) picked: Vec<u32>,
    pub(crate) offsets: Vec<usize>,
    pub(crate) weights: Vec<f32>,
}

impl Scratch {
    fn bytes(&self) -> usize {
        size_of::<u32>()
            * (self.lifted.len()
                + self.reduced.len()
                + self.masked.len()
                + self.keys.len()
                + self.narrowed.len()
                + self.outliers.capacity()
                + self.sizes.len()
                + self.picked.capacity()
                + self.weights.len())
            + size_of::<usize>() * self.offsets.capacity()
    }
}

impl Selections {
    /// Memory for selections within `limits`.
    pub fn new(limits: SelectionLimits, threads: usize) -> Result<Self, Error> {
        let heads = limits.rows_max * limits.heads.kv_heads;
        let partitions = limits.partitions_max();
        let clusters = if limits.estimates { partitions } else { 0 };
        let lines = if limits.estimates { limits.rows_max * limits.heads.q_heads } else { 0 };
        Ok(Selections {
            limits,
            rows: Vec::with_capacity(limits.rows_max),
            scores: Buffer::zeroed(heads * limits.lines_max * partitions, "scores")?,
            gated: Buffer::zeroed(heads * limits.heads.head_dim, "queries of a gate")?,
            bits: vec![0; heads * bitmap_words(limits.context_max)],
            page_bits: vec![0; heads * page_words(&limits)],
            counts: vec![Counts::default(); heads],
            estimates: Buffer::zeroed(lines * carry_stride(limits.heads.head_dim), "pseudo-tokens")?,
            estimated: vec![0; heads],
            threads: PerThread::new(threads, || Scratch {
                lifted: vec![0; limits.heads.kv_heads * limits.lines_max * LIFTED_MAX],
                reduced: vec![0.0; round_to_lanes(partitions)],
                masked: vec![0.0; round_to_lanes(partitions)],
                keys: vec![0; partitions],
                narrowed: vec![0; narrowed_len(partitions)],
                outliers: Vec::with_capacity(partitions),
                sizes: vec![0; clusters],
                picked: Vec::with_capacity(clusters),
                offsets: Vec::with_capacity(clusters),
                weights: vec![0.0; limits.heads.group() * clusters],
            }),
        })
    }

    /// Bytes held.
    pub fn bytes(&mut self) -> u64 {
        let scratch: usize = self.threads.iter_mut().map(|t| t.bytes()).sum();
        let rows = self.rows.capacity() * size_of::<PlannedRow>();
        (4 * (self.scores.len() + self.gated.len() + self.estimates.len())
            + 8 * (self.bits.len() + self.page_bits.len() + self.counts.len())
            + 4 * self.estimated.len()
            + scratch
            + rows) as u64
    }

    /// The selection of a sparse row and KV head; `None` if the row attends to everything.
    pub fn get(&self, place: usize, head: usize) -> Option<Selected<'_>> {
        let row = &self.rows[place];
        row.plan.as_ref()?;
        let at = place * self.limits.heads.kv_heads + head;
        let (words, page_words) = (bitmap_words(self.limits.context_max), page_words(&self.limits));
        let page_tokens = self.limits.page_tokens;
        let slots = &self.bits[at * words..][..bitmap_words(row.position + 1)];
        let pages = &self.page_bits[at * page_words..][..slots.len().div_ceil(page_tokens)];
        Some(Selected { slots, pages, counts: self.counts[at], page_tokens })
    }

    /// Attention to the pseudo-tokens of a sparse row and KV head: a line of [`carry_stride`] floats per query head; `None` if
    /// there are none.
    pub(crate) fn estimate(&self, place: usize, head: usize) -> Option<&[f32]> {
        let HeadShape { q_heads, kv_heads, head_dim } = self.limits.heads;
        if self.rows[place].plan.is_none() || self.estimated[place * kv_heads + head] == 0 {
            return None;
        }
        let group = self.limits.heads.group();
        let line = carry_stride(head_dim);
        Some(&self.estimates.as_slice()[(place * q_heads + head * group) * line..][..group * line])
    }

    /// Which slots of a sparse row are in the order of clusters.
    pub(crate) fn ordered(&self, place: usize) -> OrderedSlots {
        self.rows[place].plan.as_ref().map_or(OrderedSlots::NONE, |plan| plan.ordered)
    }

    /// Number of sparse rows, and whether the one at `place` is row `row` of the batch.
    pub fn is_of(&self, place: usize, row: usize) -> bool {
        self.rows.get(place).is_some_and(|r| r.row == row)
    }

    /// The queries that a gate made for a row, `[kv head][head_dim]`.
    pub(crate) fn gated_of(&self, place: usize) -> &[f32] {
        let cols = self.limits.heads.kv_heads * self.limits.heads.head_dim;
        &self.gated.as_slice()[place * cols..][..cols]
    }

    /// The scores of a line.
    pub(crate) fn line_of(&self, place: usize, head: usize, line: usize) -> &[f32] {
        &self.scores.as_slice()[self.line(place, head, line)..][..self.limits.partitions_max()]
    }

    pub(crate) fn line(&self, place: usize, head: usize, line: usize) -> usize {
        ((place * self.limits.heads.kv_heads + head) * self.limits.lines_max + line)
            * self.limits.partitions_max()
    }

    /// Scores that were computed.
    pub fn read_scores(&self, place: usize, head: usize, line: usize, to: &mut [f32]) {
        to.copy_from_slice(&self.scores.as_slice()[self.line(place, head, line)..][..to.len()]);
    }

    /// Other scores in their place.
    pub fn write_scores(&mut self, place: usize, head: usize, line: usize, from: &[f32]) {
        let at = self.line(place, head, line);
        self.scores.as_mut_slice()[at..][..from.len()].copy_from_slice(from);
    }

    /// Another selection in the place of what was selected.
    pub fn write(&mut self, place: usize, head: usize, bits: &[u64]) {
        let at = place * self.limits.heads.kv_heads + head;
        let words = bitmap_words(self.limits.context_max);
        self.bits[at * words..][..bits.len()].copy_from_slice(bits);
        let pages = &mut self.page_bits[at * page_words(&self.limits)..];
        self.counts[at] = mark_pages(bits, self.limits.page_tokens, pages);
        self.estimated[at] = 0;
    }

    /// Notes the sparse rows of `batch`, and what each attends to in `layer`.
    pub(crate) fn plan(&mut self, layer: usize, batch: &Batch) {
        self.rows.clear();
        let mut sequence = 0;
        for sparse_row in batch.sparse_rows() {
            let SparseRow { row, position, method, .. } = sparse_row;
            let plan = sparse_row.plan();
            while batch.sequences[sequence].rows.end as usize <= row {
                sequence += 1;
            }
            assert!(
                self.rows.len() < self.limits.rows_max
                    && position < self.limits.context_max
                    && self.limits.hold(method),
                "selections for {} rows of {} tokens",
                self.limits.rows_max,
                self.limits.context_max
            );
            let plan = (layer >= method.dense_layers && !plan.is_dense()).then_some(plan);
            self.rows.push(PlannedRow {
                row,
                sequence,
                position,
                method: *method,
                plan,
                stretch: 0,
                tasks_end: 0,
            });
        }
        let candidates = |row: &PlannedRow| row.plan.as_ref().map_or(0, |p| p.candidates.len());
        let stretch = stretch_of(self.rows.iter().map(candidates).sum(), self.threads.len());
        let mut tasks_end = 0;
        for row in &mut self.rows {
            let count = candidates(row);
            row.stretch = even_stretch(count, stretch);
            tasks_end += count.div_ceil(row.stretch.max(1));
            row.tasks_end = tasks_end;
        }
    }
}

/// The first slot of each page of `page_tokens` slots that has a bit in `word`.
#[inline(always)]
pub(crate) fn page_starts(word: u64, page_tokens: usize) -> u64 {
    let mut any = word;
    let mut half = page_tokens / 2;
    while half > 0 {
        any |= any >> half;
        half /= 2;
    }
    // A bit at every multiple of the page.
    any & (u64::MAX / (u64::MAX >> (64 - page_tokens)))
}

/// The places of the bits of `mask`, in ascending order.
#[inline(always)]
pub(crate) fn ones(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (place < u64::BITS).then_some(place as usize)
    })
}

/// Writes which pages of `page_tokens` slots have a bit in `bits` to as many words as there are for these pages.
#[inline(always)]
pub(crate) fn mark_pages(bits: &[u64], page_tokens: usize, pages: &mut [u64]) -> Counts {
    let mut counts = Counts::default();
    // A word of pages is that of as many words of slots as a page has slots.
    for (pages, bits) in pages.iter_mut().zip(bits.chunks(page_tokens)) {
        *pages = 0;
        for (i, &word) in bits.iter().enumerate().filter(|(_, word)| **word != 0) {
            counts.slots += word.count_ones();
            for start in ones(page_starts(word, page_tokens)) {
                *pages |= 1 << ((i * 64 + start) / page_tokens);
            }
        }
        counts.pages += pages.count_ones();
    }
    counts
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    #[test]
    fn pages_and_slots_of_many_words_are_counted() {
        let mut random = Random::new(3);
        for page_tokens in [8, 16, 32, 64] {
            let words = 150;
            let mut pages = vec![u64::MAX; (words * 64usize).div_ceil(64 * page_tokens)];
            for round in 0..20 {
                let mut bits = vec![0u64; words];
                (0..300).for_each(|_| bits[random.below(words)] |= 1 << random.below(64));
                let slots: Vec<usize> =
                    (0..words * 64).filter(|slot| bits[slot / 64] >> (slot % 64) & 1 == 1).collect();
                let mut wanted: Vec<usize> = slots.iter().map(|slot| slot / page_tokens).collect();
                wanted.dedup();
                let counts = mark_pages(&bits, page_tokens, &mut pages);
                let selected = Selected { slots: &bits, pages: &pages, counts, page_tokens };
                let what = format!("seed 3, pages of {page_tokens}, round {round}");
                assert!(selected.each_page().eq(wanted.iter().copied()), "{what}");
                let wanted = Counts { slots: slots.len() as u32, pages: wanted.len() as u32 };
                assert_eq!(counts, wanted, "{what}");
            }
        }
    }

    #[test]
    fn pages_are_marked() {
        let bits = [0b1, 0, 1 << 63 | 1 << 8, u64::MAX];
        for (page_tokens, of_words) in
            [(8, [1, 0, 2, 8]), (16, [1, 0, 2, 4]), (32, [1, 0, 2, 2]), (64, [1, 0, 1, 1])]
        {
            let mut pages = [u64::MAX];
            let counts = mark_pages(&bits, page_tokens, &mut pages);
            let selected = Selected { slots: &bits, pages: &pages, counts, page_tokens };
            let found: Vec<usize> = selected.each_page().collect();
            let wanted: Vec<usize> =
                (0..256 / page_tokens).filter(|&page| selected.of_page(page) != 0).collect();
            assert_eq!(found, wanted, "pages of {page_tokens}");
            assert_eq!(counts, Counts { slots: 67, pages: of_words.iter().sum() }, "pages of {page_tokens}");
        }
        assert_eq!(ones(page_starts(1 << 63 | 1 << 9 | 1 << 7, 8)).collect::<Vec<_>>(), [0, 8, 56]);
    }
}
