//! Scores of partitions, and the selections that follow from them.
//!
//! A score is a dot product of a *lifted* query with a digest (see [`ops::sparse::Score`]), so a whole row of a digest is
//! read once, front to back, for all lines of its KV head. A task scores a run of partitions for all heads, because that
//! is how digests lie in memory; memory is the limit.
//!
//! The best partitions are found without sorting: scores become integers of the same order, and the smallest one that
//! still belongs is found bit by bit, each bit by counting how many are as large. That is 32 passes over an array in the
//! first-level cache at 16 lanes a step, 1 us for 1,024 partitions, whatever they hold.

use std::marker::PhantomData;
use std::ops::Range;

use ops::sparse::{
    DIGEST_ALIGN, DigestKind, Method, Reduce, RowPlan, Scope, Score, SelectionLimits, bitmap_words, mark,
    order_key, padded_width, random_score,
};
use ops::{Batch, DType, Error, HeadShape, SparseRow, Tensor};

use crate::digest::{Digests, summarise};
use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, LINE_BYTES, PerThread, Shared};
use crate::pages::{HEAD_DIM_MAX, Kv};
use crate::pool::Pool;
use crate::simd::{LANES, Simd};
use crate::tensor::CpuTensor;
use crate::tile::{Bf16, Element, F16, F32};

/// Partitions per task.
const RUN: usize = 128;

/// Partitions whose sums are in flight at a time: enough to hide the latency of an addition.
const TOGETHER: usize = 4;

/// Values of a lifted query, at most.
const LIFTED_MAX: usize = 2 * HEAD_DIM_MAX;

/// Scores and selections of the sparse rows of a step, for one layer at a time.
#[derive(Debug)]
pub struct Selections {
    limits: SelectionLimits,
    /// Of this layer and batch, in order.
    rows: Vec<PlannedRow>,
    /// `[place][kv head][line][partition]`.
    scores: Buffer<f32>,
    /// `[place][kv head][word]`.
    bits: Vec<u64>,
    /// Pages with a selected slot, `[place][kv head]`.
    pages: Vec<u32>,
    threads: PerThread<Scratch>,
}

/// A sparse row and what it attends to.
#[derive(Clone, Debug)]
struct PlannedRow {
    /// Row of the batch.
    row: usize,
    /// Its sequence among those of the batch.
    sequence: usize,
    position: usize,
    method: Method,
    /// `None` if it attends to everything.
    plan: Option<RowPlan>,
    /// Tasks of the rows up to this one.
    tasks_end: usize,
}

/// Memory of one thread.
#[derive(Debug)]
struct Scratch {
    /// Queries of all lines, as left operands.
    lifted: Vec<u32>,
    /// One value per candidate.
    reduced: Vec<f32>,
    /// Scores of a line, without those of outliers.
    masked: Vec<f32>,
    keys: Vec<u32>,
    /// Partitions, ascending.
    outliers: Vec<u32>,
}

impl Scratch {
    fn bytes(&self) -> usize {
        size_of::<u32>()
            * (self.lifted.len()
                + self.reduced.len()
                + self.masked.len()
                + self.keys.len()
                + self.outliers.capacity())
    }
}

impl Selections {
    /// Memory for selections within `limits`.
    pub fn new(limits: SelectionLimits, threads: usize) -> Result<Self, Error> {
        let heads = limits.rows_max * limits.heads.kv_heads;
        let partitions = limits.partitions_max();
        Ok(Selections {
            limits,
            rows: Vec::with_capacity(limits.rows_max),
            scores: Buffer::zeroed(heads * limits.lines_max * partitions, "scores")?,
            bits: vec![0; heads * bitmap_words(limits.context_max)],
            pages: vec![0; heads],
            threads: PerThread::new(threads, || Scratch {
                lifted: vec![0; limits.heads.kv_heads * limits.lines_max * LIFTED_MAX],
                reduced: vec![0.0; partitions],
                masked: vec![0.0; partitions],
                keys: vec![0; partitions],
                outliers: Vec::with_capacity(partitions),
            }),
        })
    }

    /// Bytes held.
    pub fn bytes(&mut self) -> u64 {
        let scratch: usize = self.threads.iter_mut().map(|t| t.bytes()).sum();
        let rows = self.rows.capacity() * size_of::<PlannedRow>();
        (4 * self.scores.len() + 8 * self.bits.len() + 4 * self.pages.len() + scratch + rows) as u64
    }

    /// Rows that may attend to a selection.
    pub fn rows_max(&self) -> usize {
        self.limits.rows_max
    }

    /// The selection of a sparse row and KV head as a bitmap of slots, and how many pages it touches; `None` if the row
    /// attends to everything.
    pub fn get(&self, place: usize, head: usize) -> Option<(&[u64], usize)> {
        let row = &self.rows[place];
        row.plan.as_ref()?;
        let at = place * self.limits.heads.kv_heads + head;
        let words = bitmap_words(self.limits.context_max);
        let bits = &self.bits[at * words..][..bitmap_words(row.position + 1)];
        Some((bits, self.pages[at] as usize))
    }

    /// Number of sparse rows, and whether the one at `place` is row `row` of the batch.
    pub fn is_of(&self, place: usize, row: usize) -> bool {
        self.rows.get(place).is_some_and(|r| r.row == row)
    }

    /// The scores of a line.
    fn line_of(&self, place: usize, head: usize, line: usize) -> &[f32] {
        &self.scores.as_slice()[self.line(place, head, line)..][..self.limits.partitions_max()]
    }

    fn line(&self, place: usize, head: usize, line: usize) -> usize {
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
        self.pages[at] = num_pages(bits, self.limits.page_tokens) as u32;
    }

    /// Notes the sparse rows of `batch`, and what each attends to in `layer`.
    fn plan(&mut self, layer: usize, batch: &Batch) {
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
            let tasks = plan.as_ref().map_or(0, |p| p.candidates.len().div_ceil(RUN));
            let tasks_end = self.rows.last().map_or(0, |r| r.tasks_end) + tasks;
            self.rows.push(PlannedRow { row, sequence, position, method: *method, plan, tasks_end });
        }
    }
}

/// Pages of `page_tokens` slots with a bit in `bits`.
fn num_pages(bits: &[u64], page_tokens: usize) -> usize {
    let page = u64::MAX >> (64 - page_tokens);
    let of_word = |word: u64| (0..64).step_by(page_tokens).filter(|&shift| word >> shift & page != 0).count();
    bits.iter().filter(|&&word| word != 0).map(|&word| of_word(word)).sum()
}

/// Scores the candidates of the sparse rows of `batch`.
pub fn score(
    isa: Isa,
    pool: &mut Pool,
    selection: &mut Selections,
    digests: &[Digests],
    kv: &Kv,
    layer: usize,
    qkv: &CpuTensor,
    heads: HeadShape,
    batch: &Batch,
) {
    let geometry = kv.geometry();
    assert_eq!((qkv.rows(), qkv.cols()), (batch.num_rows(), heads.qkv_cols()), "shape of QKV");
    assert_eq!(heads, selection.limits.heads, "heads of the selection");
    batch.check(geometry.page_tokens);
    selection.plan(layer, batch);
    let Some(num_tasks) = selection.rows.last().map(|r| r.tasks_end).filter(|&n| n > 0) else { return };
    let scores = Shared(selection.scores.as_mut_ptr());
    let selection = &*selection;
    pool.run(num_tasks, &|task, thread| {
        let place = selection.rows.partition_point(|r| r.tasks_end <= task);
        let row = &selection.rows[place];
        let first_task = if place == 0 { 0 } else { selection.rows[place - 1].tasks_end };
        let candidates = row.plan.as_ref().map_or(0..0, |p| p.candidates.clone());
        let start = candidates.start + (task - first_task) * RUN;
        let run = start..(start + RUN).min(candidates.end);
        let method = &row.method;
        // SAFETY: the scratch of this thread, borrowed for this task.
        let lifted = unsafe { (*selection.threads.get(thread)).lifted.as_mut_ptr() };
        // SAFETY: the place lies in the buffer: the plan checked the row and its context against the limits.
        let scores = unsafe { scores.at(selection.line(place, 0, 0)) };
        let line_stride = selection.limits.partitions_max();
        let head_stride = selection.limits.lines_max * line_stride;
        match method.score {
            Score::Recency => unreachable!("nothing competes"),
            Score::Random { seed } => {
                for head in 0..heads.kv_heads {
                    let key = if method.scope == Scope::Layer { 0 } else { head };
                    for partition in run.clone() {
                        let score = random_score(seed, layer, key, row.position, partition);
                        // SAFETY: the scores of these partitions of this row are this task's alone.
                        unsafe { scores.add(head * head_stride + partition).write(score) };
                    }
                }
            }
            Score::Digest { digests: index } => {
                let digests = &digests[index as usize];
                assert_eq!(digests.spec().partition_tokens, method.partition_tokens, "digests of the method");
                let work = ScoreRun {
                    method,
                    digests,
                    kv,
                    layer,
                    table: batch.block_table(&batch.sequences[row.sequence]),
                    queries: qkv.row(row.row),
                    heads,
                    context: row.position + 1,
                    run,
                    scores,
                    head_stride,
                    line_stride,
                    lifted,
                };
                match geometry.dtype {
                    DType::Bf16 => isa.run(ScoreAs(work, PhantomData::<Bf16>)),
                    DType::F16 => isa.run(ScoreAs(work, PhantomData::<F16>)),
                    DType::F32 => isa.run(ScoreAs(work, PhantomData::<F32>)),
                }
            }
        }
    });
}

/// A run of partitions for one row. The scores of these partitions are written to `scores`, and are nobody else's.
struct ScoreRun<'a> {
    method: &'a Method,
    digests: &'a Digests,
    kv: &'a Kv,
    layer: usize,
    table: &'a [ops::BlockIndex],
    queries: &'a [f32],
    heads: HeadShape,
    context: usize,
    run: Range<usize>,
    scores: *mut f32,
    head_stride: usize,
    line_stride: usize,
    /// Memory of the thread for lifted queries.
    lifted: *mut u32,
}

struct ScoreAs<'a, E>(ScoreRun<'a>, PhantomData<E>);

impl<E: Element> Kernel for ScoreAs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.0;
        let kind = w.digests.spec().kind;
        let width = padded_width(kind.width(w.heads.head_dim));
        let lines = w.method.lines(w.heads);
        let layer = w.digests.layer(w.layer);
        for head in 0..w.heads.kv_heads {
            for line in 0..lines {
                let mut lifted = [0.0; LIFTED_MAX];
                lift(&w, kind, head, line, &mut lifted);
                let mut c = 0;
                while c < width {
                    // SAFETY: the scratch has room for the lifted queries of all lines, which are whole vectors.
                    unsafe {
                        let to = w
                            .lifted
                            .cast::<E::Left>()
                            .add(((head * lines + line) * width + c) / E::K_PER_STEP);
                        E::store_left(s, to, s.load(lifted.as_ptr().add(c)));
                    }
                    c += LANES;
                }
            }
        }
        // At most the last candidate is not full.
        let full_end = w.run.end.min(w.context / w.method.partition_tokens);
        let at = |partition: usize| layer[w.digests.offset(w.table, partition.min(full_end - 1))..].as_ptr();
        let mut next = [std::ptr::null(); TOGETHER];
        if w.run.start < full_end {
            for i in 0..TOGETHER {
                next[i] = at(w.run.start + i);
            }
        }
        let mut partition = w.run.start;
        while partition < full_end {
            let rows = next;
            for i in 0..TOGETHER {
                next[i] = at(partition + TOGETHER + i);
            }
            for head in 0..w.heads.kv_heads {
                let mut of_head = rows;
                for i in 0..TOGETHER {
                    // SAFETY: digests of all heads follow one another.
                    of_head[i] = unsafe { rows[i].add(head * w.digests.head_bytes()) };
                    fetch(s, next[i].wrapping_add(head * w.digests.head_bytes()), w.digests.digest_bytes());
                }
                // SAFETY: the digests lie in the layer.
                unsafe { w.score_some::<S, E>(s, head, of_head, partition, full_end - partition) };
            }
            partition += TOGETHER;
        }
        if full_end < w.run.end {
            let partition = w.run.end - 1;
            for head in 0..w.heads.kv_heads {
                let mut open = [0u32; LIFTED_MAX];
                open_digest::<S, E>(s, &w, head, partition, &mut open);
                // SAFETY: the array has room for the widest digest.
                unsafe { w.score_some::<S, E>(s, head, [open.as_ptr().cast(); TOGETHER], partition, 1) };
            }
        }
    }
}

/// Fetches `bytes` into the cache.
#[inline(always)]
fn fetch<S: Simd>(s: S, from: *const u8, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        s.prefetch(from.wrapping_add(line));
        line += LINE_BYTES;
    }
}

impl ScoreRun<'_> {
    /// Scores the digests `rows` of a head for all its lines, and writes those of the first `count` partitions from
    /// `partition` on.
    ///
    /// # Safety
    /// The digests are readable, and queries are lifted.
    #[inline(always)]
    unsafe fn score_some<S: Simd, E: Element>(
        &self,
        s: S,
        head: usize,
        rows: [*const u8; TOGETHER],
        partition: usize,
        count: usize,
    ) {
        let width = padded_width(self.digests.spec().kind.width(self.heads.head_dim));
        let lines = self.method.lines(self.heads);
        for line in 0..lines {
            // SAFETY: the caller's promise; the line lies in the scratch, and the scores of the run are this task's.
            unsafe {
                let left = self.lifted.cast::<E::Left>().add((head * lines + line) * width / E::K_PER_STEP);
                let sums = dots::<S, E>(s, left, rows, width);
                let to = self.scores.add(head * self.head_stride + line * self.line_stride + partition);
                for i in 0..TOGETHER {
                    if i < count {
                        to.add(i).write(s.reduce_sum(sums[i]));
                    }
                }
            }
        }
    }
}

/// The lifted query of a line: see [`ops::sparse::Score::Digest`]. Where scores are averaged over the query heads, that
/// of their mean, because a mean of dot products is the dot product of a mean.
#[inline(always)]
fn lift(w: &ScoreRun, kind: DigestKind, head: usize, line: usize, to: &mut [f32; LIFTED_MAX]) {
    let (group, d) = (w.heads.group(), w.heads.head_dim);
    let query_lines = w.method.query_lines(w.heads);
    if line == query_lines {
        // The last value of the digest, as it is.
        to[kind.width(d) - 1] = 1.0;
        return;
    }
    let one_line = query_lines == 1;
    let of = if one_line { 0..group } else { line..line + 1 };
    let two_sided = matches!(kind, DigestKind::MinMax | DigestKind::CuboidMean);
    let mean_first = w.method.reduce == Reduce::MeanQuery;
    let share = 1.0 / of.len() as f32;
    for g in of {
        let query = &w.queries[(head * group + g) * d..][..d];
        for c in 0..d {
            let q = query[c] * share;
            if two_sided && !mean_first {
                to[c] += q.max(0.0);
                to[d + c] += q.min(0.0);
            } else {
                to[c] += q;
            }
        }
    }
    if two_sided && mean_first {
        for c in 0..d {
            (to[c], to[d + c]) = (to[c].max(0.0), to[c].min(0.0));
        }
    }
}

/// The digest of a partition that is not full, of what it holds, as it would be stored.
#[inline(always)]
fn open_digest<S: Simd, E: Element>(
    s: S,
    w: &ScoreRun,
    head: usize,
    partition: usize,
    to: &mut [u32; LIFTED_MAX],
) {
    let kind = w.digests.spec().kind;
    let mut values = [0.0; LIFTED_MAX];
    let positions = partition * w.method.partition_tokens..w.context;
    summarise(kind, w.kv, w.layer, w.table, head, positions, &mut values);
    values[kind.width(w.heads.head_dim)..].fill(0.0);
    let bytes_per_value = E::VECTOR_BYTES / LANES / E::K_PER_STEP;
    for c in (0..padded_width(kind.width(w.heads.head_dim))).step_by(LANES) {
        // SAFETY: both arrays have room for the widest digest.
        unsafe {
            let to = to.as_mut_ptr().cast::<u8>().add(c * bytes_per_value);
            E::store_right(s, to, s.load(values.as_ptr().add(c)));
        }
    }
}

/// Lane sums of the dot products of a lifted query with some digests.
///
/// # Safety
/// `width` values of each are readable; `width` is a multiple of [`DIGEST_ALIGN`].
#[inline(always)]
unsafe fn dots<S: Simd, E: Element>(
    s: S,
    left: *const E::Left,
    rows: [*const u8; TOGETHER],
    width: usize,
) -> [S::V; TOGETHER] {
    const { assert!(DIGEST_ALIGN == 2 * LANES, "whole vectors, of pairs too") };
    let mut sums = [s.splat(0.0); TOGETHER];
    let mut step = 0;
    while step < width / E::K_PER_STEP {
        for i in 0..TOGETHER {
            // SAFETY: the caller's promise.
            unsafe {
                let right = rows[i].add(step / LANES * E::VECTOR_BYTES);
                sums[i] = E::mul_add_lanes(s, sums[i], left.add(step), right);
            }
        }
        step += LANES;
    }
    sums
}

/// Turns scores into selections.
pub fn select(
    isa: Isa,
    pool: &mut Pool,
    selection: &mut Selections,
    layer: usize,
    heads: HeadShape,
    batch: &Batch,
) {
    selection.plan(layer, batch);
    let words = bitmap_words(selection.limits.context_max);
    let bits = Shared(selection.bits.as_mut_ptr());
    let pages = Shared(selection.pages.as_mut_ptr());
    let selection = &*selection;
    pool.run(selection.rows.len() * heads.kv_heads, &|task, thread| {
        let (place, head) = (task / heads.kv_heads, task % heads.kv_heads);
        let row = &selection.rows[place];
        let method = &row.method;
        let Some(plan) = &row.plan else { return };
        let shared = method.scope == Scope::Layer;
        if shared && head > 0 {
            return;
        }
        // SAFETY: the scratch of this thread, borrowed for this task.
        let scratch = unsafe { &mut *selection.threads.get(thread) };
        let context = row.position + 1;
        // SAFETY: the bitmaps of this row and head, or of all heads for the one task that has them, are this task's.
        let bitmap = |head: usize| unsafe {
            let at = place * heads.kv_heads + head;
            std::slice::from_raw_parts_mut(bits.at(at * words), bitmap_words(context))
        };
        let first = bitmap(head);
        isa.run(SelectRow { selection, method, plan, heads, place, head, context, scratch, bits: first });
        let count = num_pages(first, selection.limits.page_tokens) as u32;
        let owned = if shared { 0..heads.kv_heads } else { head..head + 1 };
        for other in owned {
            if other != head {
                bitmap(other).copy_from_slice(first);
            }
            // SAFETY: as for the bitmaps.
            unsafe { pages.at(place * heads.kv_heads + other).write(count) };
        }
    });
}

/// The selection of one row and scope.
struct SelectRow<'a> {
    selection: &'a Selections,
    method: &'a Method,
    plan: &'a RowPlan,
    heads: HeadShape,
    place: usize,
    head: usize,
    context: usize,
    scratch: &'a mut Scratch,
    bits: &'a mut [u64],
}

impl Kernel for SelectRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SelectRow { selection, method, plan, heads, place, head, context, scratch, bits } = self;
        bits.fill(0);
        mark(bits, 0..plan.sink_end);
        mark(bits, plan.tail_start..context);
        if plan.take == 0 {
            return;
        }
        let count = plan.candidates.len();
        let Scratch { reduced, keys, masked, outliers, .. } = scratch;
        let (reduced, masked) = (&mut reduced[..count], &mut masked[..count]);
        let of = if method.scope == Scope::Layer { 0..heads.kv_heads } else { head..head + 1 };
        let lines = method.query_lines(heads);
        let num_lines = of.len() * lines;
        outliers.clear();
        let (among, num_outliers) = plan.outliers.clone();
        if num_outliers > 0 {
            let keys = &mut keys[..among.len()];
            for (key, &cosine) in keys.iter_mut().zip(&selection.line_of(place, head, lines)[among.clone()]) {
                *key = !order_key(cosine);
            }
            each_best(keys, num_outliers, |i| outliers.push((among.start + i) as u32));
        }
        let first = plan.candidates.start;
        for (i, head) in of.enumerate() {
            for line in 0..lines {
                masked.copy_from_slice(&selection.line_of(place, head, line)[plan.candidates.clone()]);
                for &outlier in &*outliers {
                    masked[outlier as usize - first] = f32::NEG_INFINITY;
                }
                let softmax = method.softmax.then(|| Softmax::over(s, masked, heads.head_dim));
                reduce(s, reduced, masked, softmax, method.reduce, i + line == 0);
            }
        }
        if method.reduce != Reduce::Max {
            for score in reduced.iter_mut() {
                *score /= num_lines as f32;
            }
        }
        let keys = &mut keys[..count];
        for (key, &score) in keys.iter_mut().zip(&*reduced) {
            *key = order_key(score);
        }
        let mut take_in = |partition: usize| {
            let start = partition * method.partition_tokens;
            mark(bits, start..(start + method.partition_tokens).min(context));
        };
        for &outlier in &*outliers {
            take_in(outlier as usize);
            // Below every score.
            keys[outlier as usize - first] = 0;
        }
        each_best(keys, plan.take, |i| take_in(first + i));
    }
}

/// How a softmax goes from score to probability: `2^((score - max) * factor) / sum`.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    factor: f32,
    sum: f32,
}

impl Softmax {
    /// Over `scores / sqrt(head_dim)`.
    #[inline(always)]
    fn over<S: Simd>(s: S, scores: &[f32], head_dim: usize) -> Self {
        let factor = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut softmax = Softmax { max, factor, sum: 1.0 };
        let mut sum = 0.0;
        let mut i = 0;
        while i < scores.len() {
            let mut weights = [0.0; LANES];
            let n = probabilities(s, &scores[i..], softmax, &mut weights);
            for weight in &weights[..n] {
                sum += weight;
            }
            i += n;
        }
        softmax.sum = sum;
        softmax
    }
}

/// Up to 16 probabilities; returns how many.
#[inline(always)]
fn probabilities<S: Simd>(s: S, scores: &[f32], softmax: Softmax, to: &mut [f32; LANES]) -> usize {
    let n = scores.len().min(LANES);
    // SAFETY: `n` scores are there, and the array holds a vector.
    unsafe {
        let v = s.sub(s.load_part(scores.as_ptr(), n), s.splat(softmax.max));
        let weight = s.exp2(s.mul(v, s.splat(softmax.factor)));
        s.store(to.as_mut_ptr(), s.div(weight, s.splat(softmax.sum)));
    }
    n
}

/// Adds a line to the reduced scores, or takes it over if it is the first.
#[inline(always)]
fn reduce<S: Simd>(
    s: S,
    reduced: &mut [f32],
    scores: &[f32],
    softmax: Option<Softmax>,
    how: Reduce,
    first: bool,
) {
    let mut i = 0;
    while i < scores.len() {
        let n = (scores.len() - i).min(LANES);
        let mut values = [0.0; LANES];
        match softmax {
            Some(softmax) => {
                probabilities(s, &scores[i..], softmax, &mut values);
            }
            None => values[..n].copy_from_slice(&scores[i..i + n]),
        }
        for j in 0..n {
            let r = &mut reduced[i + j];
            *r = match how {
                _ if first => values[j],
                Reduce::Max => r.max(values[j]),
                Reduce::Mean | Reduce::MeanQuery => *r + values[j],
            };
        }
        i += n;
    }
}

/// Visits the places of the `take` largest keys in ascending order; of equal keys the first.
#[inline(always)]
fn each_best(keys: &[u32], take: usize, mut visit: impl FnMut(usize)) {
    let (least, mut ties) = threshold(keys, take);
    for (i, &key) in keys.iter().enumerate() {
        let tie = key == least && ties > 0;
        ties -= usize::from(tie);
        if key > least || tie {
            visit(i);
        }
    }
}

/// The `take`-th largest key, and how many keys that equal it are among the `take` largest.
#[inline(always)]
fn threshold(keys: &[u32], take: usize) -> (u32, usize) {
    let mut least = 0u32;
    for bit in (0..32).rev() {
        let candidate = least | 1 << bit;
        let mut as_large = 0u32;
        for &key in keys {
            as_large += u32::from(key >= candidate);
        }
        if as_large as usize >= take {
            least = candidate;
        }
    }
    let larger = keys.iter().filter(|&&key| key > least).count();
    (least, take - larger)
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    #[test]
    fn thresholds_are_those_of_a_sort() {
        let mut random = Random::new(11);
        for count in [1, 2, 17, 300] {
            for distinct in [1, 3, 1 << 30] {
                let keys: Vec<u32> = (0..count).map(|_| random.below(distinct) as u32).collect();
                let mut sorted = keys.clone();
                sorted.sort_by_key(|&k| std::cmp::Reverse(k));
                for take in 1..=count {
                    let least = sorted[take - 1];
                    let ties = sorted[..take].iter().filter(|&&k| k == least).count();
                    assert_eq!(threshold(&keys, take), (least, ties), "seed 11: {take} of {keys:?}");
                }
            }
        }
    }

    #[test]
    fn pages_are_counted() {
        let bits = [0b1, 0, 1 << 63 | 1 << 8, u64::MAX];
        assert_eq!([8, 16, 32, 64].map(|page| num_pages(&bits, page)), [1 + 2 + 8, 1 + 2 + 4, 1 + 2 + 2, 3]);
    }
}
