//! Attention within one split.
//!
//! Everything works in powers of two: queries are scaled by `log2(e) / sqrt(head_dim)` before they are rounded, so
//! `softmax` is `2^(s - max)`. Masked slots weigh exactly 0.
//!
//! With few lines memory is the limit, and the next 64 slots are fetched while these are worked on, four pages side by
//! side. Measured with one thread of Zen 4, 16 query and 8 KV heads of 128 in bf16: 13.5 GB/s without, 12.3 when
//! fetched into the first-level cache, 18.2 into the second. Also tried: only the first 8, 16 or 32 lines of a page
//! (11 to 14 GB/s), K and V of a page together (16.5), V by runs of four lines so that both passes over it wait alike
//! (18.2: the same).
//!
//! Where slots are selected in runs shorter than a page, values of runs without one are neither read nor fetched; of K one
//! cache line holds all slots of a page, so that is read whole. As [`crate::score`] measures: `shadowkv` with chunks of 8 on
//! pages of 16 463 us a layer and not 535 (0.88, 0.85-0.90), `quest` `partition=8` 0.88 (0.85-0.88), whole pages 0.98.

use ops::SPLIT_TOKENS;

use crate::memory::Buffer;
use crate::merge::{Partial, Running, head_stride};
use crate::selection::{ones, page_starts};
use crate::simd::{LANES, Simd};
use crate::tensor::odd_stride;
use crate::tile::{
    Element, Fetch, FetchNothing, RowTiles, accumulate, round_to_lanes, tile_vectors, with_tile,
};
use crate::view::{Frames, HeadView};

/// Floats between the scores of one line and the next: a split, what the last tile writes past it, and then an odd
/// number of cache lines, so that rows do not share cache sets.
const SCORES_STRIDE: usize = odd_stride(SPLIT_TOKENS + (KEY_VECTORS - 1) * LANES, LANES);

/// Most pages in a split.
const PAGES_MAX: usize = SPLIT_TOKENS / 8;

/// Slots whose values are read or left alone together, where slots are selected: those of the smallest page.
const RUN: usize = 8;

/// Vectors of keys per register tile, at most.
const KEY_VECTORS: usize = 4;

/// Rows times query heads up to which pages are fetched ahead: the hardware does not see 4 KiB pieces of K and V as a
/// stream, and above this arithmetic hides it.
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
    /// Keys of pairs of 8-slot pages, joined to vectors of 16.
    joined: Buffer<u8>,
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
            joined: Buffer::zeroed(KEY_VECTORS * head_dim * LANES * size_of::<f32>(), WHAT)?,
            results: Buffer::zeroed(2 * Partial::len(height, head_dim), WHAT)?,
        })
    }

    /// Whether it is large enough.
    pub fn fits(&self, height: usize, head_dim: usize) -> bool {
        self.height >= height && self.head_dim >= head_dim
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        (self.queries.len() + self.scores.len() + self.results.len()) * size_of::<f32>() + self.joined.len()
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
    /// Pages of the split.
    pages: [*const u8; PAGES_MAX],
    /// Which of the 16 slots of a vector are attended to, where slots are selected.
    kept: [u16; SPLIT_TOKENS / LANES],
    page_tokens: usize,
    head_dim: usize,
    value_offset: usize,
    /// Slots to be looked at: from a whole vector and page on, to the end of a vector or of the last page.
    first: usize,
    end: usize,
    /// Where weighted values go.
    values: *mut f32,
    /// The runs of [`RUN`] slots with one that is attended to, where that is not true of all.
    runs: [u16; SPLIT_TOKENS / RUN],
    num_runs: usize,
    /// Few lines per page: memory is the limit, and pages are to be fetched ahead.
    stream: bool,
}

impl Split {
    /// Of no pages yet; weighted values will go to `values`.
    #[inline(always)]
    fn new<E: Element>(view: &HeadView, scratch: &mut SplitScratch, values: *mut f32) -> Self {
        Split {
            queries: scratch.queries.as_ptr(),
            queries_stride: queries_stride::<E>(view.head_dim),
            scores: scratch.scores.as_mut_ptr(),
            pages: [std::ptr::null(); PAGES_MAX],
            kept: [0; SPLIT_TOKENS / LANES],
            page_tokens: view.page_tokens,
            head_dim: view.head_dim,
            value_offset: view.kv.value_offset(),
            first: 0,
            end: 0,
            values,
            runs: [0; SPLIT_TOKENS / RUN],
            num_runs: 0,
            stream: view.height() <= STREAM_HEIGHT_MAX && view.page_tokens >= LANES,
        }
    }

    /// Sets the pages of split `split` of the context, as far as any row attends to it; returns how many pages the split
    /// has up to the last of them.
    #[inline(always)]
    fn take_all(&mut self, view: &HeadView, split: usize) -> usize {
        let page_tokens = self.page_tokens;
        let (first, _) = view.attended(0, split);
        let (_, end) = view.attended(view.num_rows - 1, split);
        let num_pages = end.div_ceil(page_tokens);
        self.first = first / page_tokens.max(LANES) * page_tokens.max(LANES);
        self.end = round_to_lanes(end);
        let first_page = split * (SPLIT_TOKENS / page_tokens);
        for page in self.first / page_tokens..num_pages {
            self.pages[page] = match view.frames {
                None => view.page(first_page + page),
                Some(Frames { tier, entries, first_page: first_entry }) => {
                    let entry = entries[first_page + page - first_entry];
                    debug_assert_eq!(entry.page as usize, first_page + page, "pages are consecutive");
                    tier.frame(entry.frame as usize).as_ptr()
                }
            };
        }
        num_pages
    }

    /// Sets the pages of split `split` among those with a selected slot, and which slots are; returns how many it has.
    #[inline(always)]
    fn take_selected(&mut self, view: &HeadView, bits: &[u64], split: usize) -> usize {
        let page_tokens = self.page_tokens;
        let per_split = SPLIT_TOKENS / page_tokens;
        let of_page = u64::MAX >> (64 - page_tokens);
        if let Some(Frames { tier, entries, .. }) = view.frames {
            let first = (split * per_split).min(entries.len());
            let entries = &entries[first..entries.len().min(first + per_split)];
            for (i, entry) in entries.iter().enumerate() {
                let slot = entry.page as usize * page_tokens;
                self.keep(
                    i,
                    tier.frame(entry.frame as usize).as_ptr(),
                    bits[slot / 64] >> (slot % 64) & of_page,
                );
            }
            self.end = round_to_lanes(entries.len() * page_tokens);
            return entries.len();
        }
        let mut skip = split * per_split;
        let mut num_pages = 0;
        for (i, &word) in bits.iter().enumerate() {
            let starts = page_starts(word, page_tokens);
            let count = starts.count_ones() as usize;
            if skip >= count {
                skip -= count;
                continue;
            }
            for shift in ones(starts).skip(skip).take(per_split - num_pages) {
                self.keep(num_pages, view.page((i * 64 + shift) / page_tokens), word >> shift & of_page);
                num_pages += 1;
            }
            if num_pages == per_split {
                break;
            }
            skip = 0;
        }
        self.end = round_to_lanes(num_pages * page_tokens);
        num_pages
    }

    /// Sets page `i` of the split, and which of its slots are attended to.
    #[inline(always)]
    fn keep(&mut self, i: usize, page: *const u8, slots: u64) {
        self.pages[i] = page;
        let first = i * self.page_tokens;
        if self.page_tokens < LANES {
            self.kept[first / LANES] |= (slots << (first % LANES)) as u16;
        } else {
            for vector in 0..self.page_tokens / LANES {
                self.kept[first / LANES + vector] = (slots >> (vector * LANES)) as u16;
            }
        }
    }

    /// Notes which runs of slots up to `end` have a selected one, unless all have.
    #[inline(always)]
    fn find_runs(&mut self, end: usize) {
        let mut count = 0;
        for run in 0..end / RUN {
            self.runs[count] = run as u16;
            count += usize::from(self.kept[run * RUN / LANES] >> (run * RUN % LANES) & 0xff != 0);
        }
        self.num_runs = if count < end / RUN { count } else { 0 };
    }

    /// The values of run `i`.
    ///
    /// # Safety
    /// There are runs, and their pages are set.
    #[inline(always)]
    unsafe fn values_of_run<E: Element>(&self, i: usize) -> *const u8 {
        let slot = self.runs[i] as usize * RUN;
        let row_bytes = self.head_dim * (E::VECTOR_BYTES / LANES);
        let step = slot % self.page_tokens / E::K_PER_STEP;
        // SAFETY: the caller's promise.
        unsafe { self.pages[slot / self.page_tokens].add(self.value_offset + step * row_bytes) }
    }

    /// The values of the [`KEY_VECTORS`] runs from run `i` on, if there is one, to be fetched at `lines` lines per step.
    ///
    /// # Safety
    /// As for [`Split::values_of_run`].
    #[inline(always)]
    unsafe fn runs_ahead<E: Element>(&self, i: usize, lines: usize) -> Ahead {
        let mut pieces = [std::ptr::null(); KEY_VECTORS];
        for piece in 0..KEY_VECTORS {
            // SAFETY: the caller's promise.
            pieces[piece] = unsafe { self.values_of_run::<E>((i + piece).min(self.num_runs - 1)) };
        }
        Ahead { pieces, stride: E::VECTOR_BYTES, lines: if i < self.num_runs { lines } else { 0 } }
    }

    /// Removes the scores of slots that are not selected.
    ///
    /// # Safety
    /// `scores` is valid up to the end of the split.
    #[inline(always)]
    unsafe fn keep_selected<S: Simd>(&self, s: S, scores: *mut f32) {
        for vector in 0..self.end / LANES {
            let kept = self.kept[vector];
            if kept != u16::MAX {
                // SAFETY: the caller's promise.
                unsafe {
                    let at = scores.add(vector * LANES);
                    s.store(at, s.keep(s.load(at), kept));
                }
            }
        }
    }

    /// The 16 slots from `slot` on of K, where a page has as many.
    ///
    /// # Safety
    /// The page of the slot is set.
    #[inline(always)]
    unsafe fn vector<E: Element>(&self, slot: usize) -> *const u8 {
        let vector = slot % self.page_tokens / LANES;
        // SAFETY: the caller's promise.
        unsafe { self.pages[slot / self.page_tokens].add(vector * E::VECTOR_BYTES) }
    }

    /// What lies `offset` bytes into the pages of the 64 slots from `slot` on, if there are such slots, to be fetched
    /// at `lines` lines per step.
    ///
    /// # Safety
    /// Pages below the end of the split are set.
    #[inline(always)]
    unsafe fn ahead<E: Element>(&self, slot: usize, offset: usize, lines: usize) -> Ahead {
        let mut pieces = [std::ptr::null(); KEY_VECTORS];
        for i in 0..KEY_VECTORS {
            let slot = (slot + i * LANES).min(self.end - LANES);
            // SAFETY: the caller's promise.
            pieces[i] = unsafe { self.vector::<E>(slot).wrapping_add(offset) };
        }
        let lines = if slot < self.end { lines } else { 0 };
        Ahead { pieces, stride: self.page_tokens / LANES * E::VECTOR_BYTES, lines }
    }
}

/// Four pieces of memory that are fetched into the cache side by side, some lines of each per step.
struct Ahead {
    /// Where the next line of each is.
    pieces: [*const u8; KEY_VECTORS],
    /// Bytes from line to line.
    stride: usize,
    /// Lines per step.
    lines: usize,
}

impl Fetch for &mut Ahead {
    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        for _ in 0..self.lines {
            for piece in &mut self.pieces {
                s.prefetch(*piece);
                *piece = piece.wrapping_add(self.stride);
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
) {
    let mut p = Split::new::<E>(view, scratch, to.values);
    let num_pages = match view.selected {
        None => p.take_all(view, split),
        Some(bits) => p.take_selected(view, bits, split),
    };
    if num_pages == 0 {
        // SAFETY: the caller's promise. Nothing is attended to: this changes no result that it is merged with.
        unsafe {
            for line in 0..view.height() {
                (*to.max.add(line), *to.sum.add(line)) = (f32::NEG_INFINITY, 0.0);
            }
            to.values.write_bytes(0, view.height() * head_stride(view.head_dim));
        }
        return;
    }
    if view.selected.is_some() && p.page_tokens > RUN {
        p.find_runs(num_pages * p.page_tokens);
    }
    // SAFETY: the caller's promise; pages from `p.first` to `p.end` were just set.
    unsafe {
        scores::<S, E>(s, view, &p, num_pages, scratch.joined.as_mut_ptr());
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
        // The last page may end before the last vector of scores.
        p.end = p.end.min(num_pages * p.page_tokens);
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
    let num_pages = p.take_all(view, split);
    // SAFETY: the caller's promise; pages up to `p.end` were just set.
    unsafe {
        scores::<S, E>(s, view, &p, num_pages, scratch.joined.as_mut_ptr());
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
unsafe fn scores<S: Simd, E: Element>(s: S, view: &HeadView, p: &Split, num_pages: usize, joined: *mut u8) {
    let mut slot = p.first;
    while slot < p.end {
        let mut keys = [std::ptr::null(); KEY_VECTORS];
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..S::TILE_VECTORS {
                let slot = (slot + i * LANES).min(p.end - LANES);
                keys[i] = if p.page_tokens < LANES {
                    let to = joined.add(i * p.head_dim.div_ceil(E::K_PER_STEP) * E::VECTOR_BYTES);
                    join_pages::<E>(to, p, slot / p.page_tokens, num_pages);
                    to.cast_const()
                } else {
                    p.vector::<E>(slot)
                };
            }
            let stride = p.page_tokens.div_ceil(LANES) * E::VECTOR_BYTES;
            let mut tiles = RowTiles::new::<S>(view.height());
            while let Some((line, lines)) = tiles.next_tile() {
                with_tile!(S, lines, all, scores_tile, (s, p, line, slot, &keys, stride));
            }
        }
        slot += S::TILE_VECTORS * LANES;
    }
}

/// Joins the keys of pages `page` and `page + 1`, of 8 slots each, to vectors of 16. A page beyond the last counts
/// as zeros.
///
/// # Safety
/// `to` has room for them; pages below `num_pages` are valid.
#[inline(always)]
unsafe fn join_pages<E: Element>(to: *mut u8, p: &Split, page: usize, num_pages: usize) {
    let half = E::VECTOR_BYTES / 2;
    for step in 0..p.head_dim.div_ceil(E::K_PER_STEP) {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.add(step * E::VECTOR_BYTES);
            to.copy_from_nonoverlapping(p.pages[page].add(step * half), half);
            if page + 1 < num_pages {
                to.add(half).copy_from_nonoverlapping(p.pages[page + 1].add(step * half), half);
            } else {
                to.add(half).write_bytes(0, half);
            }
        }
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
    keys: &[*const u8; KEY_VECTORS],
    stride: usize,
) {
    let mut acc = [[s.splat(0.0); N]; R];
    let mut right = [keys[0]; N];
    right.copy_from_slice(&keys[..N]);
    // SAFETY: the caller's promise.
    unsafe {
        let left = p.queries.cast::<E::Left>().add(line * p.queries_stride);
        let (left_stride, steps) = (p.queries_stride, p.head_dim.div_ceil(E::K_PER_STEP));
        if p.stream && line == 0 {
            // After the last keys come the values, which take as many bytes in as many pieces.
            let next = slot + KEY_VECTORS * LANES;
            let mut ahead = if next < p.end {
                p.ahead::<E>(next, 0, 1)
            } else if p.num_runs > 0 {
                p.runs_ahead::<E>(0, 1)
            } else {
                p.ahead::<E>(p.first, p.value_offset, 1)
            };
            accumulate::<S, E, _, R, N>(s, &mut acc, left, left_stride, right, stride, steps, &mut ahead);
        } else {
            accumulate::<S, E, _, R, N>(s, &mut acc, left, left_stride, right, stride, steps, FetchNothing);
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
        let mut slot = p.first;
        let stream = p.stream && line == 0 && vector == 0;
        let mut ahead = Ahead { pieces: [std::ptr::null(); KEY_VECTORS], stride: 0, lines: 0 };
        // So many lines per step that the next slots have come in when these are done.
        let lines = p.head_dim.div_ceil(KEY_VECTORS * LANES);
        // Weights of the other runs are zeros, which add nothing.
        for i in 0..p.num_runs {
            let start = p.values_of_run::<E>(i).add(vector * E::VECTOR_BYTES);
            let mut right = [start; N];
            for n in 1..N {
                right[n] = start.add(n * E::VECTOR_BYTES);
            }
            if stream && i.is_multiple_of(KEY_VECTORS) {
                ahead = p.runs_ahead::<E>(i + KEY_VECTORS, lines);
            }
            let left = weights.add(p.runs[i] as usize * RUN / E::K_PER_STEP);
            let steps = RUN / E::K_PER_STEP;
            accumulate::<S, E, _, R, N>(s, &mut acc, left, left_stride, right, row_bytes, steps, &mut ahead);
        }
        while slot < p.end && p.num_runs == 0 {
            let slots = (p.end - slot).min(p.page_tokens);
            let start = p.pages[slot / p.page_tokens].add(p.value_offset + vector * E::VECTOR_BYTES);
            let mut right = [start; N];
            for n in 1..N {
                right[n] = start.add(n * E::VECTOR_BYTES);
            }
            let left = weights.add(slot / E::K_PER_STEP);
            let steps = slots / E::K_PER_STEP;
            if stream {
                if (slot - p.first).is_multiple_of(KEY_VECTORS * LANES) {
                    ahead = p.ahead::<E>(slot + KEY_VECTORS * LANES, p.value_offset, lines);
                }
                accumulate::<S, E, _, R, N>(
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
                accumulate::<S, E, _, R, N>(
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
            slot += slots;
        }
        for r in 0..R {
            for n in 0..N {
                let to = p.values.add((line + r) * head_stride(p.head_dim) + (vector + n) * LANES);
                s.store(to, acc[r][n]);
            }
        }
    }
}
