//! The working sets of sequences: see [`ops::tally::WorkingSet`].
//!
//! Each page has a counter of the steps for which it remains in the set. A step sets those of the pages that it selects and lowers the
//! others by one, down to none; the set is what is not at none. The counters are bit-sliced: a word holds one bit of those of 64
//! pages, so a step is a few operations on whole words, and no stamp can be taken for one of another time. For 12 steps a page
//! takes half a byte.
//!
//! A step of a head with 128K tokens in pages of 16 took 0.8 us on one core: 25 us for 8 heads in 4 layers.

use ops::SeatIndex;
use ops::sparse::SelectionLimits;
use ops::tally::{COUNTER_WORDS, WorkingSet, WorkingSetSpec, page_words};

/// One bit of the counters of as many pages as this has bits.
type Line = [u64; COUNTER_WORDS];

/// The counters of all seats.
#[derive(Debug)]
pub struct WorkingSets {
    spec: WorkingSetSpec,
    kv_heads: usize,
    /// Lines of a head, and those of them that a seat has used.
    lines: usize,
    used: Vec<u32>,
    /// `[seat][sampled layer][head][line][bit]`.
    counters: Vec<Line>,
    /// `[seat][sampled layer]`: pages, and steps up to those that are looked at.
    pages: Vec<u32>,
    steps: Vec<u32>,
}

impl WorkingSets {
    /// For as many seats as `limits` has rows.
    pub fn new(limits: &SelectionLimits, spec: WorkingSetSpec) -> Self {
        let (seats, kv_heads) = (limits.rows_max, limits.heads.kv_heads);
        let lines = page_words(limits).div_ceil(COUNTER_WORDS);
        let layers = seats * spec.layers().len();
        WorkingSets {
            spec,
            kv_heads,
            lines,
            used: vec![0; seats],
            // Zeros that nobody has written to take no memory.
            counters: vec![[0; COUNTER_WORDS]; layers * kv_heads * lines * spec.step_bits()],
            pages: vec![0; layers],
            steps: vec![0; layers],
        }
    }

    /// A row of `seat` in `layer`, if that is one of the sample: `selected` are the pages of each head, `None` where the row attends to
    /// everything.
    pub fn step<'a>(&mut self, seat: SeatIndex, layer: usize, selected: impl Fn(usize) -> Option<&'a [u64]>) {
        let Some(place) = self.spec.place_of(layer) else { return };
        let at = seat.at() * self.spec.layers().len() + place;
        self.steps[at] = (self.steps[at] + 1).min(self.spec.steps() as u32);
        if self.pages[at] == 0 && selected(0).is_none() {
            return;
        }
        let bits = self.spec.step_bits();
        let used = &mut self.used[seat.at()];
        self.pages[at] = 0;
        for head in 0..self.kv_heads {
            let now = selected(head).unwrap_or(&[]);
            *used = (*used).max(now.len().div_ceil(COUNTER_WORDS) as u32);
            let counters = &mut self.counters[(at * self.kv_heads + head) * self.lines * bits..];
            let counters = &mut counters[..*used as usize * bits];
            self.pages[at] += step(counters, bits, self.spec.steps(), now);
        }
    }

    /// The set of `seat`.
    pub fn get(&self, seat: SeatIndex) -> WorkingSet {
        let layers = self.spec.layers().len();
        let (pages, steps) =
            (&self.pages[seat.at() * layers..][..layers], &self.steps[seat.at() * layers..][..layers]);
        WorkingSet {
            pages: pages.iter().copied().map(u64::from).sum(),
            layers: pages.iter().filter(|pages| **pages > 0).count() as u32,
            steps: steps.iter().copied().max().unwrap_or(0),
        }
    }

    /// Forgets `seat`.
    pub fn release(&mut self, seat: SeatIndex) {
        let (layers, bits) = (self.spec.layers().len(), self.spec.step_bits());
        self.pages[seat.at() * layers..][..layers].fill(0);
        self.steps[seat.at() * layers..][..layers].fill(0);
        let used = std::mem::take(&mut self.used[seat.at()]) as usize * bits;
        for head in seat.at() * layers * self.kv_heads..(seat.at() + 1) * layers * self.kv_heads {
            self.counters[head * self.lines * bits..][..used].fill([0; COUNTER_WORDS]);
        }
    }
}

/// Sets the counters of the pages in `selected` to `steps` and lowers the others; returns how many are above none.
fn step(counters: &mut [Line], bits: usize, steps: usize, selected: &[u64]) -> u32 {
    let mut pages = 0;
    let mut selected = selected.chunks(COUNTER_WORDS);
    for counter in counters.chunks_exact_mut(bits) {
        let mut now = [0; COUNTER_WORDS];
        let words = selected.next().unwrap_or(&[]);
        now[..words.len()].copy_from_slice(words);
        // What is above none borrows one from its lowest bit.
        let mut borrow = [0; COUNTER_WORDS];
        counter.iter().for_each(|bit| (0..COUNTER_WORDS).for_each(|i| borrow[i] |= bit[i]));
        let mut left = [0; COUNTER_WORDS];
        for (place, bit) in counter.iter_mut().enumerate() {
            let of_steps = if steps >> place & 1 == 1 { u64::MAX } else { 0 };
            for i in 0..COUNTER_WORDS {
                let before = bit[i];
                bit[i] = (before ^ borrow[i]) & !now[i] | now[i] & of_steps;
                borrow[i] &= !before;
                left[i] |= bit[i];
            }
        }
        pages += left.iter().map(|word| word.count_ones()).sum::<u32>();
    }
    pages
}

#[cfg(test)]
mod tests {
    use ops::Random;
    use ops::tally::WORKING_SET_STEPS_MAX;

    use super::*;

    /// Each page by itself: when it was selected last.
    #[test]
    fn counters_count_down() {
        let mut random = Random::new(7);
        for steps in 1..=WORKING_SET_STEPS_MAX {
            let spec = WorkingSetSpec::new(steps, 0..1);
            let words = 1 + random.below(2 * COUNTER_WORDS);
            let mut counters = vec![[0; COUNTER_WORDS]; words.div_ceil(COUNTER_WORDS) * spec.step_bits()];
            let mut last = vec![None; 64 * words];
            for now in 0..3 * WORKING_SET_STEPS_MAX {
                let mut selected = vec![0u64; 1 + random.below(words)];
                for _ in 0..random.below(3) * random.below(100) {
                    let page = random.below(64 * selected.len());
                    selected[page / 64] |= 1 << (page % 64);
                    last[page] = Some(now);
                }
                let wanted = last.iter().filter(|last| last.is_some_and(|last| last + steps > now)).count();
                let pages = step(&mut counters, spec.step_bits(), steps, &selected);
                assert_eq!(pages as usize, wanted, "seed 7, {steps} steps, at {now}");
            }
        }
    }
}
