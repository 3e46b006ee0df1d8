//! Attention within one split.
//!
//! Everything works in powers of two: queries are scaled by `log2(e) / sqrt(head_dim)` before they are rounded, so
//! `softmax` is `2^(s - max)`. Masked slots weigh exactly 0.
//!
//! What is looked at are *runs* of 8 slots, as pages hold them; where slots are selected, those with one that is. Two of them at a
//! time are scored by one vector, wherever they lie.
//!
//! With few lines memory is the limit, and the next runs are fetched while these are worked on, eight side by side: the hardware
//! does not see pieces of some KiB as a stream. Measured on two cores of Zen 5 within decode of four sequences after 32,000 tokens
//! (`bench engine --profile`, interleaved runs), milliseconds a step: `shadowkv`, chunks of 8 on pages of 16, 6.1 where K of whole
//! pages was read, 5.0 where only selected runs are, 4.1 since words of a selection without a bit are passed over; `retroinfer` 6.5
//! and 6.1, whole pages (`quest`, dense) the same. Also tried: fetching into the second-level cache (1.05 of the time), first lines
//! of all pages of a split at once (the same).
//!
//! With the last values come the first keys of the split that follows. On two cores of Emerald Rapids dense decode of four sequences
//! of 32,768 tokens then reads at 0.77 (0.74 to 0.82) of the bandwidth and not 0.76. Tried there: values begun while weights are
//! computed, 16, 24 and 32 runs ahead: 0.99, 0.94 and 0.92 of the rate; the second-level cache in place of the first: dense the same,
//! `shadowkv` 1.1 of the time and more; the second-level cache 16 runs ahead and the first one 8: `shadowkv` 0.93 of the time, dense 1.07,
//! `retroinfer` 1.2.

use ops::SPLIT_TOKENS;

use crate::memory::{Buffer, LINE_BYTES};
use crate::merge::{Partial, Running, head_stride};
use crate::pages::RUN;
use crate::selection::{Selected, ones, page_starts};
use crate::simd::{LANES, Simd};
use crate::tensor::odd_stride;
use crate::tile::{
    Element, Fetch, FetchNothing, RowTiles, accumulate, round_to_lanes, tile_vectors, with_tile,
};
use crate::view::{Frames, HeadView};

/// Floats between the scores of one line and the next: a split, what the last tile writes past it, and then an odd
/// number of cache lines, so that rows do not share cache sets.
const SCORES_STRIDE: usize = odd_stride(SPLIT_TOKENS + (KEY_VECTORS - 1) * LANES, LANES);

/// Most runs in a split.
const RUNS_MAX: usize = SPLIT_TOKENS / RUN;

/// Runs that are fetched side by side, while as many are worked on: those of a tile of keys.
const FETCHED: usize = KEY_VECTORS * LANES / RUN;

/// Vectors of keys per register tile, at most.
const KEY_VECTORS: usize = 4;

/// Rows times query heads up to which runs are fetched ahead: above this arithmetic hides what it takes to read them.
const STREAM_HEIGHT_MAX: usize = 16;

/// Memory of one thread.
#[derive(Debug)]
pub struct SplitScratch {
    height: usize,
    head_dim: usize,
    /// Scaled queries as left operands, `[height][head_dim]`.
    queries: Buffer<u32>,
    /// Scores, then in their place weights as left operands, `[height][SPLIT_TOKENS]`.
    scores: Buffer<f32>,
    /// A partial and a running result.
    results: Buffer<f32>,
}

impl SplitScratch {
    /// Scratch for up to `height` lines of `head_dim` channels.
    pub fn new(height: usize, head_dim: usize) -> Result<Self, ops::Error> {
        const WHAT: &str = "attention";
        Ok(SplitScratch {
            height,
            head_dim,
            queries: Buffer::zeroed(height * odd_stride(head_dim, LANES), WHAT)?,
            scores: Buffer::zeroed(height * SCORES_STRIDE, WHAT)?,
            results: Buffer::zeroed(2 * Partial::len(height, head_dim), WHAT)?,
        })
    }

    /// Whether it is large enough.
    pub fn fits(&self, height: usize, head_dim: usize) -> bool {
        self.height >= height && self.head_dim >= head_dim
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        (self.queries.len() + self.scores.len() + self.results.len()) * size_of::<f32>()
    }

    /// A place for results of splits, and a running result of nothing yet.
    #[inline(always)]
    pub fn start(&mut self, height: usize, head_dim: usize) -> (Partial, Running) {
        assert!(self.fits(height, head_dim), "attention scratch of {} lines for {height}", self.height);
        let len = Partial::len(height, head_dim);
        let (partial, running) = self.results.as_mut_slice().split_at_mut(len);
        running[..len].fill(0.0);
        running[..round_to_lanes(height)].fill(f32::NEG_INFINITY);
        // SAFETY: `len` floats in each half.
        unsafe {
            (Partial::at(partial.as_mut_ptr(), height), Running(Partial::at(running.as_mut_ptr(), height)))
        }
    }
}

/// Left operands from one line of queries to the next.
#[inline(always)]
fn queries_stride<E: Element>(head_dim: usize) -> usize {
    odd_stride(head_dim.div_ceil(E::K_PER_STEP), LANES)
}

/// Scales and rounds the queries.
///
/// # Safety
/// The view is valid and fits the scratch.
#[inline(always)]
pub unsafe fn pack_queries<S: Simd, E: Element>(s: S, view: &HeadView, scratch: &mut SplitScratch) {
    let scale = s.splat(std::f32::consts::LOG2_E / (view.head_dim as f32).sqrt());
    let stride = queries_stride::<E>(view.head_dim);
    for line in 0..view.height() {
        let (row, g) = (line / view.group, line % view.group);
        // SAFETY: the caller's promise; a line of the scratch has room for whole vectors.
        unsafe {
            let from = view.queries.add(row * view.queries_stride + g * view.head_dim);
            let to = scratch.queries.as_mut_ptr().cast::<E::Left>().add(line * stride);
            let mut c = 0;
            while c < view.head_dim {
                let v = s.load_part(from.add(c), (view.head_dim - c).min(LANES));
                E::store_left(s, to.add(c / E::K_PER_STEP), s.mul(v, scale));
                c += LANES;
            }
        }
    }
}

/// What the tiles of one split need to know.
struct Split {
    queries: *const u32,
    queries_stride: usize,
    scores: *mut f32,
    /// Keys of runs, in order; their values lie `value_offset` further.
    runs: [*const u8; RUNS_MAX],
    /// Runs, where it is odd without the last once more that makes it even.
    num_runs: usize,
    /// Which slots of a run are attended to, where slots are selected.
    kept: [u8; RUNS_MAX],
    head_dim: usize,
    run_bytes: usize,
    value_offset: usize,
    /// Slots of runs to be looked at, in whole vectors.
    first: usize,
    end: usize,
    /// Where weighted values go.
    values: *mut f32,
    /// Few lines per run: memory is the limit, and runs are to be fetched ahead.
    stream: bool,
    /// Where the keys of the first runs of the split after this one are, and how many of those are known.
    next: [*const u8; FETCHED],
    num_next: usize,
}

impl Split {
    /// Of nothing yet; weighted values will go to `values`.
    #[inline(always)]
    fn new<E: Element>(view: &HeadView, scratch: &mut SplitScratch, values: *mut f32) -> Self {
        Split {
            queries: scratch.queries.as_ptr(),
            queries_stride: queries_stride::<E>(view.head_dim),
            scores: scratch.scores.as_mut_ptr(),
            runs: [std::ptr::null(); RUNS_MAX],
            num_runs: 0,
            kept: [0; RUNS_MAX],
            head_dim: view.head_dim,
            run_bytes: view.head_dim / E::K_PER_STEP * E::VECTOR_BYTES / (LANES / RUN),
            value_offset: view.kv.value_offset(),
            first: 0,
            end: 0,
            values,
            stream: view.height() <= STREAM_HEIGHT_MAX,
            next: [std::ptr::null(); FETCHED],
            num_next: 0,
        }
    }

    /// Sets the runs of split `split`; where there are more than `most`, only so many and nothing else.
    #[inline(always)]
    fn take(&mut self, view: &HeadView, split: usize, most: usize) {
        match view.selected {
            None => self.take_all(view, split, most),
            Some(selected) => self.take_selected(view, &selected, split, most),
        }
    }

    /// Sets the runs of split `split` of the context, as far as any row attends to it.
    #[inline(always)]
    fn take_all(&mut self, view: &HeadView, split: usize, most: usize) {
        let page_tokens = view.page_tokens;
        let (first, _) = view.attended(0, split);
        let (_, end) = view.attended(view.num_rows - 1, split);
        let num_pages = end.div_ceil(page_tokens);
        self.first = first / page_tokens.max(LANES) * page_tokens.max(LANES);
        let first_page = split * (SPLIT_TOKENS / page_tokens);
        self.num_runs = self.first / RUN;
        for page in self.first / page_tokens..num_pages {
            if self.num_runs >= most {
                return;
            }
            let start = match view.frames {
                None => view.page(first_page + page),
                Some(Frames { tier, entries, first_page: first_entry }) => {
                    let entry = entries[first_page + page - first_entry];
                    debug_assert_eq!(entry.page as usize, first_page + page, "pages are consecutive");
                    tier.frame(entry.frame as usize).as_ptr()
                }
            };
            for run in 0..page_tokens / RUN {
                self.push(start, run, 0);
            }
        }
        // Those of no row, and none at all where the first page begins after the last row.
        self.num_runs = match round_to_lanes(end) / RUN {
            end if end > self.first / RUN => self.num_runs.min(end),
            _ => 0,
        };
        self.close();
    }

    /// Sets the runs with a selected slot of the pages of split `split` among those with one, and which slots are.
    #[inline(always)]
    fn take_selected(&mut self, view: &HeadView, selected: &Selected, split: usize, most: usize) {
        let per_split = SPLIT_TOKENS / view.page_tokens;
        if let Some(Frames { tier, entries, .. }) = view.frames {
            let first = (split * per_split).min(entries.len());
            for entry in &entries[first..entries.len().min(first + per_split)] {
                let page = tier.frame(entry.frame as usize).as_ptr();
                self.keep(page, selected.of_page(entry.page as usize));
            }
            return self.close();
        }
        let (mut skip, mut left) = (split * per_split, per_split);
        for (i, &word) in selected.pages.iter().enumerate() {
            let count = word.count_ones() as usize;
            if skip >= count {
                skip -= count;
                continue;
            }
            for page in ones(word).skip(skip).take(left).map(|page| i * 64 + page) {
                if self.num_runs >= most {
                    return;
                }
                self.keep(view.page(page), selected.of_page(page));
            }
            left -= left.min(count - skip);
            if left == 0 {
                break;
            }
            skip = 0;
        }
        self.close();
    }

    /// Adds the runs of a page with a bit in `slots`.
    #[inline(always)]
    fn keep(&mut self, page: *const u8, slots: u64) {
        for start in ones(page_starts(slots, RUN)) {
            self.push(page, start / RUN, (slots >> start) as u8);
        }
    }

    /// Adds run `run` of a page, and which of its slots are selected.
    #[inline(always)]
    fn push(&mut self, page: *const u8, run: usize, kept: u8) {
        // Within a page.
        self.runs[self.num_runs] = page.wrapping_add(run * self.run_bytes);
        self.kept[self.num_runs] = kept;
        self.num_runs += 1;
    }

    /// Makes whole vectors of the runs that were added.
    #[inline(always)]
    fn close(&mut self) {
        self.end = round_to_lanes(self.num_runs * RUN);
        if self.num_runs % 2 == 1 {
            // Its scores are of no slot.
            self.runs[self.num_runs] = self.runs[self.num_runs - 1];
            self.kept[self.num_runs] = 0;
        }
    }

    /// Removes the scores of slots that are not selected.
    ///
    /// # Safety
    /// `scores` is valid up to the end of the split.
    #[inline(always)]
    unsafe fn keep_selected<S: Simd>(&self, s: S, scores: *mut f32) {
        for vector in 0..self.end / LANES {
            let kept = u16::from_le_bytes([self.kept[2 * vector], self.kept[2 * vector + 1]]);
            if kept != u16::MAX {
                // SAFETY: the caller's promise.
                unsafe {
                    let at = scores.add(vector * LANES);
                    s.store(at, s.keep(s.load(at), kept));
                }
            }
        }
    }

    /// `count` runs from `run` on, if there are any, `offset` bytes after their keys, to be fetched at `lines` lines per step.
    #[inline(always)]
    fn ahead(&self, run: usize, count: usize, offset: usize, lines: usize) -> Ahead {
        let mut runs = [std::ptr::null(); FETCHED];
        for i in 0..count {
            runs[i] = self.runs[(run + i).min(self.num_runs - 1)].wrapping_add(offset);
        }
        Ahead { runs, count, next: 0, offset: 0, lines: if run < self.num_runs { lines } else { 0 } }
    }
}

/// Runs that are fetched into the cache side by side, some lines per step.
struct Ahead {
    runs: [*const u8; FETCHED],
    /// So many there are.
    count: usize,
    /// The next line, one of each run in turn.
    next: usize,
    offset: usize,
    /// Lines per step.
    lines: usize,
}

impl Fetch for &mut Ahead {
    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        for _ in 0..self.lines {
            s.prefetch(self.runs[self.next].wrapping_add(self.offset));
            self.next += 1;
            if self.next == self.count {
                (self.next, self.offset) = (0, self.offset + LINE_BYTES);
            }
        }
    }
}

/// Scores, weights and weighted values of one split, into `to`.
///
/// # Safety
/// The view is valid, fits the scratch, and `to` is valid for its height; queries are packed.
#[inline(always)]
pub unsafe fn split_partial<S: Simd, E: Element>(
    s: S,
    view: &HeadView,
    split: usize,
    scratch: &mut SplitScratch,
    to: Partial,
    next: Option<(&HeadView, usize)>,
) {
    let mut p = Split::new::<E>(view, scratch, to.values);
    p.take(view, split, RUNS_MAX);
    if let Some((view, split)) = next.filter(|_| p.stream) {
        let mut next = Split::new::<E>(view, scratch, to.values);
        next.take(view, split, FETCHED);
        p.num_next = next.num_runs.min(FETCHED);
        p.next[..p.num_next].copy_from_slice(&next.runs[..p.num_next]);
    }
    if p.num_runs == 0 {
        // SAFETY: the caller's promise. Nothing is attended to: this changes no result that it is merged with.
        unsafe {
            for line in 0..view.height() {
                (*to.max.add(line), *to.sum.add(line)) = (f32::NEG_INFINITY, 0.0);
            }
            to.values.write_bytes(0, view.height() * head_stride(view.head_dim));
        }
        return;
    }
    // SAFETY: the caller's promise; runs from `p.first` to `p.end` were just set.
    unsafe {
        scores::<S, E>(s, view, &p);
        for line in 0..view.height() {
            let scores = p.scores.add(line * SCORES_STRIDE);
            let (first, end) = match view.selected {
                None => view.attended(line / view.group, split),
                Some(_) => {
                    p.keep_selected(s, scores);
                    (0, p.end)
                }
            };
            let (max, sum) = weights::<S, E>(s, scores, first, end, p.first, p.end);
            *to.max.add(line) = max;
            *to.sum.add(line) = sum;
        }
        let vectors = view.head_dim.div_ceil(LANES);
        let mut vector = 0;
        while vector < vectors {
            let n = tile_vectors::<S>(vectors - vector);
            let mut tiles = RowTiles::new::<S>(view.height());
            while let Some((line, lines)) = tiles.next_tile() {
                with_tile!(S, lines, n, values_tile, (s, &p, line, vector));
            }
            vector += n;
        }
    }
}

/// Hands the scores of a split that is attended to whole to `each`, line by line: those of its slots from its start on, in powers
/// of two.
///
/// # Safety
/// As for [`split_partial`]; nothing is selected, and there is no window.
#[inline(always)]
pub unsafe fn split_scores<S: Simd, E: Element>(
    s: S,
    view: &HeadView,
    split: usize,
    scratch: &mut SplitScratch,
    mut each: impl FnMut(usize, *const f32),
) {
    let mut p = Split::new::<E>(view, scratch, std::ptr::null_mut());
    p.take_all(view, split, RUNS_MAX);
    assert!(p.num_runs > 0, "a split that is attended to");
    // SAFETY: the caller's promise; runs up to `p.end` were just set.
    unsafe {
        scores::<S, E>(s, view, &p);
        for line in 0..view.height() {
            each(line, p.scores.add(line * SCORES_STRIDE));
        }
    }
}

/// Scores of all lines with slots `p.first..p.end`. The last tile may score the last slots again, into what lies past
/// them in the scratch: that is cheaper than tiles of every width.
///
/// # Safety
/// As for [`split_partial`].
#[inline(always)]
unsafe fn scores<S: Simd, E: Element>(s: S, view: &HeadView, p: &Split) {
    let mut slot = p.first;
    while slot < p.end {
        let mut keys = [[std::ptr::null(); 2]; KEY_VECTORS];
        for i in 0..S::TILE_VECTORS {
            let run = (slot + i * LANES).min(p.end - LANES) / RUN;
            keys[i] = [p.runs[run], p.runs[run + 1]];
        }
        // SAFETY: the caller's promise.
        unsafe {
            let mut tiles = RowTiles::new::<S>(view.height());
            while let Some((line, lines)) = tiles.next_tile() {
                with_tile!(S, lines, all, scores_tile, (s, p, line, slot, &keys));
            }
        }
        slot += S::TILE_VECTORS * LANES;
    }
}

/// # Safety
/// As for [`split_partial`]; lines and keys are valid.
#[inline(always)]
unsafe fn scores_tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    p: &Split,
    line: usize,
    slot: usize,
    keys: &[[*const u8; 2]; KEY_VECTORS],
) {
    let mut acc = [[s.splat(0.0); N]; R];
    let mut right = [keys[0]; N];
    right.copy_from_slice(&keys[..N]);
    // SAFETY: the caller's promise.
    unsafe {
        let left = p.queries.cast::<E::Left>().add(line * p.queries_stride);
        let (left_stride, steps) = (p.queries_stride, p.head_dim.div_ceil(E::K_PER_STEP));
        let stride = E::VECTOR_BYTES / (LANES / RUN);
        if p.stream && line == 0 {
            // So many lines per step that as many runs have come in when these are done.
            let (next, count) = ((slot + KEY_VECTORS * LANES) / RUN, 2 * N);
            let lines = (count * stride).div_ceil(LINE_BYTES);
            let mut ahead = if next < p.num_runs {
                p.ahead(next, count, 0, lines)
            } else {
                // After the last keys come the values, tile by tile.
                let tiles = (next - p.num_runs) / count;
                p.ahead(p.first / RUN + tiles * count, count, p.value_offset, lines)
            };
            accumulate::<S, E, _, _, R, N>(s, &mut acc, left, left_stride, right, stride, steps, &mut ahead);
        } else {
            accumulate::<S, E, _, _, R, N>(
                s,
                &mut acc,
                left,
                left_stride,
                right,
                stride,
                steps,
                FetchNothing,
            );
        }
        for r in 0..R {
            for n in 0..N {
                s.store(p.scores.add((line + r) * SCORES_STRIDE + slot + n * LANES), acc[r][n]);
            }
        }
    }
}

/// Replaces the scores of one line by weights, as left operands: `2^(score - max)` for slots `first..end`, 0 for the
/// others of `begin..stop`. Returns the maximum and the sum of the weights, as rounded.
///
/// Weights are not wider than scores and written in ascending order, so none overwrites a score still to be read.
///
/// # Safety
/// `scores` is valid for a split; `begin <= first`, `end <= stop`, and both outer bounds are whole vectors.
#[inline(always)]
unsafe fn weights<S: Simd, E: Element>(
    s: S,
    scores: *mut f32,
    first: usize,
    end: usize,
    begin: usize,
    stop: usize,
) -> (f32, f32) {
    let to = scores.cast::<E::Left>();
    let zero = s.splat(0.0);
    // SAFETY: the caller's promise.
    unsafe {
        if first >= end {
            let mut slot = begin;
            while slot < stop {
                E::store_left(s, to.add(slot / E::K_PER_STEP), zero);
                slot += LANES;
            }
            return (f32::NEG_INFINITY, 0.0);
        }
        let (low, high) = (first / LANES * LANES, round_to_lanes(end));
        if first > low {
            let mask = u16::MAX << (first - low);
            s.store(scores.add(low), s.keep(s.load(scores.add(low)), mask));
        }
        if end < high {
            let mask = u16::MAX >> (high - end);
            s.store(scores.add(high - LANES), s.keep(s.load(scores.add(high - LANES)), mask));
        }
        let mut max = s.load(scores.add(low));
        let mut slot = low + LANES;
        while slot < high {
            max = s.max(max, s.load(scores.add(slot)));
            slot += LANES;
        }
        let max = s.reduce_max(max);
        let mut slot = begin;
        while slot < low {
            E::store_left(s, to.add(slot / E::K_PER_STEP), zero);
            slot += LANES;
        }
        let (mut sum, largest) = (zero, s.splat(max));
        while slot < high {
            let weight = s.exp2(s.sub(s.load(scores.add(slot)), largest));
            E::store_left(s, to.add(slot / E::K_PER_STEP), weight);
            sum = s.add(sum, E::round_left(s, weight));
            slot += LANES;
        }
        while slot < stop {
            E::store_left(s, to.add(slot / E::K_PER_STEP), zero);
            slot += LANES;
        }
        (max, s.reduce_sum(sum))
    }
}

/// # Safety
/// As for [`split_partial`]; weights are there.
#[inline(always)]
unsafe fn values_tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    p: &Split,
    line: usize,
    vector: usize,
) {
    let mut acc = [[s.splat(0.0); N]; R];
    let left_stride = SCORES_STRIDE * size_of::<f32>() / size_of::<E::Left>();
    let row_bytes = p.head_dim * (E::VECTOR_BYTES / LANES);
    // SAFETY: the caller's promise. Loads past the last channel of the last slot stay in what a buffer has after its end,
    // and their lanes are not stored.
    unsafe {
        let weights = p.scores.cast::<E::Left>().add(line * left_stride);
        let stream = p.stream && line == 0 && vector == 0;
        let mut ahead = p.ahead(p.num_runs, 1, 0, 0);
        // So many lines per step that the next runs have come in when these are done.
        let lines = row_bytes.div_ceil(LINE_BYTES);
        let mut run = p.first / RUN;
        while run < p.num_runs {
            if stream && run.is_multiple_of(FETCHED) {
                ahead = if run + FETCHED < p.num_runs {
                    p.ahead(run + FETCHED, FETCHED, p.value_offset, lines)
                } else {
                    let steps = (p.num_runs - run) * RUN / E::K_PER_STEP;
                    let all = p.num_next * p.run_bytes.div_ceil(LINE_BYTES);
                    Ahead { runs: p.next, count: p.num_next, next: 0, offset: 0, lines: all.div_ceil(steps) }
                };
            }
            // Those that follow one another are one.
            let most = (p.num_runs - run).min(FETCHED - run % FETCHED);
            let mut count = 1;
            while count < most && p.runs[run + count] == p.runs[run + count - 1].wrapping_add(p.run_bytes) {
                count += 1;
            }
            let start = p.runs[run].add(p.value_offset + vector * E::VECTOR_BYTES);
            let mut right = [start; N];
            for n in 1..N {
                right[n] = start.add(n * E::VECTOR_BYTES);
            }
            let left = weights.add(run * RUN / E::K_PER_STEP);
            let steps = count * RUN / E::K_PER_STEP;
            if stream {
                accumulate::<S, E, _, _, R, N>(
                    s,
                    &mut acc,
                    left,
                    left_stride,
                    right,
                    row_bytes,
                    steps,
                    &mut ahead,
                );
            } else {
                accumulate::<S, E, _, _, R, N>(
                    s,
                    &mut acc,
                    left,
                    left_stride,
                    right,
                    row_bytes,
                    steps,
                    FetchNothing,
                );
            }
            run += count;
        }
        for r in 0..R {
            for n in 0..N {
                let to = p.values.add((line + r) * head_stride(p.head_dim) + (vector + n) * LANES);
                s.store(to, acc[r][n]);
            }
        }
    }
}
