//! Scores of partitions.
//!
//! A score is a dot product of a *lifted* query with a digest (see [`ops::sparse::Score`]), so a whole row of a digest is
//! read once, front to back, for all lines of its KV head. A task scores a *stretch* of partitions for all heads, because that
//! is how digests lie in memory; the digests after the next are fetched while these are worked on.
//!
//! Measured with one thread of Zen 5 beside busy neighbours: 4 sequences of 31,000 tokens, 16 query and 4 KV heads of 64 in
//! bf16, microseconds per layer at the tenth percentile of 48 calls, medians of interleaved runs, ratios run by run:
//!
//! | | before | now | ratio |
//! |---|---|---|---|
//! | `quest`, one line | 314 | 285 | 0.91 (0.83-0.98) |
//! | `shadowkv`, four lines | 640 | 276 | 0.43 (0.38-0.47) |
//!
//! So much in a loop of scores alone, where the old code stalled more than it did in a step. Within decode of four sequences after
//! 32,000 tokens on two threads (`bench engine --profile`, three interleaved rounds) scores of `shadowkv` take 0.60 (0.55-0.60) of the
//! time before, the step 0.88 (0.79-0.89). What changed, for `shadowkv`: digests are looked up before a stretch begins, and 16 sums are
//! made by one tree (0.68 together; part of what was before is a stall that depends on where the stack lies); a stretch fetches its first
//! digests at once (0.62), and is as long as threads allow (0.49); digests are fetched to the nearest cache (0.47; `quest` 0.77 and not
//! 0.91). As digests were then, tags beside their values: with all digests in the second-level cache 17 us of 27 are left; leaving out the tree, the cosines, the fetches or half of
//! the products saves about a tenth each. Leaving one line of each sixteenth digest unfetched costs a sixth.
//!
//! In fp8 digests have half the bytes and are not scored twice as fast, because widening takes as long as their memory.

use std::marker::PhantomData;
use std::ops::Range;

use ops::sparse::{
    Attention, DIGEST_ALIGN, DigestKind, Method, Reduce, Scope, Score, padded_width, random_score,
    replay_rate, replay_score,
};
use ops::{Batch, DType, HeadShape, Tensor};

use crate::digest::{Digests, Keys, summarise};
use crate::fp8::{E4m3, Stored};
use crate::isa::{Isa, Kernel};
use crate::memory::{LINE_BYTES, Shared};
use crate::pages::{Kv, Pages};
use crate::pool::Pool;
use crate::selection::{LIFTED_MAX, Selections};
use crate::simd::{LANES, Simd};
use crate::tensor::CpuTensor;
use crate::tile::{Bf16, F16, F32};

/// Partitions per task, at most.
const STRETCH_MAX: usize = 1024;

/// And at least, unless there are none left.
const STRETCH_MIN: usize = 128;

/// Tasks per thread, if stretches of that length are allowed: few, because a stretch begins with lifting queries and waiting for the
/// first digests, and yet enough for threads to end together.
const TASKS_PER_THREAD: usize = 8;

/// The length of stretches where a step scores so many candidates.
pub(crate) fn stretch_of(num_candidates: usize, threads: usize) -> usize {
    (num_candidates / (TASKS_PER_THREAD * threads)).clamp(STRETCH_MIN, STRETCH_MAX)
}

/// The length of stretches, in whole groups, that cuts `num_candidates` into equal ones of at most `stretch`.
pub(crate) fn even_stretch(num_candidates: usize, stretch: usize) -> usize {
    num_candidates.div_ceil(num_candidates.div_ceil(stretch).max(1)).next_multiple_of(TOGETHER)
}

/// Partitions whose sums are in flight at a time: enough to hide the latency of an addition.
const TOGETHER: usize = 4;

/// Lines whose sums are in flight at a time, where there are 32 registers.
const LINES: usize = 4;

/// Partitions from those that are worked on to those that are fetched.
const AHEAD: usize = 4 * TOGETHER;

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
    gate_queries(pool, selection, digests, layer, qkv, heads);
    let scores = Shared(selection.scores.as_mut_ptr());
    let selection = &*selection;
    pool.run(num_tasks, &|task, thread| {
        let place = selection.rows.partition_point(|r| r.tasks_end <= task);
        let row = &selection.rows[place];
        let first_task = if place == 0 { 0 } else { selection.rows[place - 1].tasks_end };
        let candidates = row.plan.as_ref().map_or(0..0, |p| p.candidates.clone());
        let start = candidates.start + (task - first_task) * row.stretch;
        let stretch = start..(start + row.stretch).min(candidates.end);
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
                    let lot = |partition| random_score(seed, layer, key, row.position, partition);
                    isa.run(Lots {
                        lot,
                        stretch: stretch.clone(),
                        to: scores.wrapping_add(head * head_stride),
                    });
                }
            }
            Score::Replay { seed, overlap_permille } => {
                let sequence = &batch.sequences[row.sequence];
                let budget = match sequence.attention {
                    Attention::Dense => unreachable!("a sparse row has a budget"),
                    Attention::Sparse { budget, .. } => budget as usize,
                };
                let rate = replay_rate(method, overlap_permille, sequence.prompt_len as usize, budget);
                for head in 0..heads.kv_heads {
                    let key = if method.scope == Scope::Layer { 0 } else { head };
                    let lot = |partition| replay_score(seed, rate, layer, key, row.position, partition);
                    isa.run(Lots {
                        lot,
                        stretch: stretch.clone(),
                        to: scores.wrapping_add(head * head_stride),
                    });
                }
            }
            Score::Digest { digests: index } | Score::Gate { digests: index } => {
                let digests = &digests[index as usize];
                let queries = match method.score {
                    Score::Gate { .. } => selection.gated_of(place),
                    _ => qkv.row(row.row),
                };
                assert_eq!(digests.spec().partition_tokens, method.partition_tokens, "digests of the method");
                let tells = matches!(digests.spec().kind, DigestKind::Landmark | DigestKind::Cluster { .. });
                assert!(tells || !method.reads_tags(), "tags that tell outliers or sizes");
                let work = ScoreStretch {
                    method,
                    digests,
                    kv,
                    layer,
                    pages: Pages::of(batch, &batch.sequences[row.sequence]),
                    queries,
                    heads,
                    context: row.position + 1,
                    stretch,
                    scores,
                    head_stride,
                    line_stride,
                    lifted,
                };
                match (digests.spec().kind, geometry.dtype) {
                    (DigestKind::Fp8(_), _) => isa.run(ScoreAs(work, PhantomData::<E4m3>)),
                    (_, DType::Bf16) => isa.run(ScoreAs(work, PhantomData::<Bf16>)),
                    (_, DType::F16) => isa.run(ScoreAs(work, PhantomData::<F16>)),
                    (_, DType::F32) => isa.run(ScoreAs(work, PhantomData::<F32>)),
                }
            }
        }
    });
}

/// Makes the queries of the rows that a gate scores.
fn gate_queries(
    pool: &mut Pool,
    selection: &mut Selections,
    digests: &[Digests],
    layer: usize,
    qkv: &CpuTensor,
    heads: HeadShape,
) {
    let is_gated = |score| matches!(score, Score::Gate { .. });
    if !selection.rows.iter().any(|row| is_gated(row.method.score)) {
        return;
    }
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let to = Shared(selection.gated.as_mut_ptr());
    let rows = &selection.rows;
    pool.run(rows.len() * kv_heads, &|task, _| {
        let row = &rows[task / kv_heads];
        let (Score::Gate { digests: index }, true) = (row.method.score, row.plan.is_some()) else { return };
        assert!(!row.method.open_competes, "a gate has no digest of an open partition");
        let Some(gate) = digests[index as usize].gate() else { panic!("digests of a gate") };
        let head = task % kv_heads;
        let cols = heads.group() * head_dim;
        let queries = &qkv.row(row.row)[head * cols..][..cols];
        // SAFETY: the memory of this row and head, as large as a head, is this task's.
        let to = unsafe { std::slice::from_raw_parts_mut(to.at(task * head_dim), head_dim) };
        gate.query(layer, head, queries, row.position, to);
    });
}

/// Scores that are lots, of partitions that are this task's alone.
struct Lots<F> {
    lot: F,
    stretch: Range<usize>,
    /// Of partition 0.
    to: *mut f32,
}

impl<F: Fn(usize) -> f32> Kernel for Lots<F> {
    type Output = ();

    /// Plain code, compiled for the instruction set.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for partition in self.stretch {
            // SAFETY: the scores of these partitions lie in the buffer.
            unsafe { self.to.add(partition).write((self.lot)(partition)) };
        }
    }
}

/// A stretch of partitions for one row. The scores of these partitions are written to `scores`, and are nobody else's.
struct ScoreStretch<'a> {
    method: &'a Method,
    digests: &'a Digests,
    kv: &'a Kv,
    layer: usize,
    pages: Pages<'a>,
    /// Of the row; where a gate scores, one of head_dim values per KV head.
    queries: &'a [f32],
    heads: HeadShape,
    context: usize,
    stretch: Range<usize>,
    scores: *mut f32,
    head_stride: usize,
    line_stride: usize,
    /// Memory of the thread for lifted queries.
    lifted: *mut u32,
}

struct ScoreAs<'a, E>(ScoreStretch<'a>, PhantomData<E>);

impl<E: Stored> Kernel for ScoreAs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.0;
        let kind = w.digests.spec().kind;
        let width = padded_width(kind.scored_width(w.heads.head_dim));
        let lines = w.method.query_lines(w.heads);
        let layer = w.digests.layer(w.layer);
        let layout = w.digests.layout();
        let (scored_bytes, per_block) = (layout.scored_bytes, layout.per_block);
        let head_bytes = per_block * scored_bytes;
        let mut lifted = [0.0; LIFTED_MAX];
        for head in 0..w.heads.kv_heads {
            for line in 0..lines {
                lifted[..width].fill(0.0);
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
        let full_end = w.stretch.end.min(w.context / w.method.partition_tokens);
        let num_full = full_end.saturating_sub(w.stretch.start);
        let shape = Shape { steps: width / E::K_PER_STEP, lines, reads_tags: w.method.reads_tags() };
        // All of them first: looking them up between sums costs as much again.
        let mut places = [std::ptr::null(); STRETCH_MAX + AHEAD];
        if num_full > 0 {
            for (i, place) in places[..num_full.next_multiple_of(TOGETHER) + AHEAD].iter_mut().enumerate() {
                let partition = (w.stretch.start + i).min(full_end - 1);
                let (block, within) = w.digests.block(w.pages.table, partition);
                *place = layer[block + within * scored_bytes..].as_ptr();
            }
        }
        let has_tags = E::SCALED || shape.reads_tags;
        // From the values of a partition for head 0 to its tag for head 0.
        let to_tag = |partition: usize| {
            let within = partition & (per_block - 1);
            layout.tags_at.wrapping_sub(within * scored_bytes).wrapping_add(within * layout.tag_bytes)
        };
        for &digest in &places[..AHEAD.min(num_full)] {
            for head in 0..w.heads.kv_heads {
                s.prefetch(digest.wrapping_add(head * head_bytes));
                fetch(s, digest.wrapping_add(head * head_bytes), scored_bytes);
            }
        }
        for first in (0..num_full).step_by(TOGETHER) {
            let (mut rows, mut next) =
                ([std::ptr::null::<u8>(); TOGETHER], [std::ptr::null::<u8>(); TOGETHER]);
            rows.copy_from_slice(&places[first..first + TOGETHER]);
            next.copy_from_slice(&places[first + AHEAD..first + AHEAD + TOGETHER]);
            let mut tags = [std::ptr::null::<f32>(); TOGETHER];
            for i in 0..TOGETHER {
                s.prefetch(next[i]);
                if has_tags {
                    // Those after the last are the last once more.
                    let partition = |ahead: usize| (w.stretch.start + first + ahead + i).min(full_end - 1);
                    s.prefetch(next[i].wrapping_add(to_tag(partition(AHEAD))));
                    tags[i] = rows[i].wrapping_add(to_tag(partition(0))).cast();
                }
            }
            for head in 0..w.heads.kv_heads {
                // Digests of all heads follow one another.
                let at = head * head_bytes;
                for digest in next {
                    fetch(s, digest.wrapping_add(at), scored_bytes);
                }
                let rows = rows.map(|row| row.wrapping_add(at));
                // SAFETY: the digests lie in the layer, and tags where they have some.
                unsafe {
                    let tags = match has_tags {
                        true => tags.map(|tag| tag.wrapping_add(head * per_block).read_unaligned()),
                        false => [1.0; TOGETHER],
                    };
                    let (partition, count) = (w.stretch.start + first, num_full - first);
                    w.score_some::<S, E>(s, &shape, head, rows, tags, partition, count);
                }
            }
        }
        if full_end < w.stretch.end {
            let partition = w.stretch.end - 1;
            for head in 0..w.heads.kv_heads {
                let mut open = [0u32; LIFTED_MAX];
                let tag = open_digest::<S, E>(s, &w, head, partition, &mut open);
                let (rows, tags) = ([open.as_ptr().cast(); TOGETHER], [tag; TOGETHER]);
                // SAFETY: the array has room for the widest digest.
                unsafe { w.score_some::<S, E>(s, &shape, head, rows, tags, partition, 1) };
            }
        }
    }
}

/// What the digests of a stretch have in common.
struct Shape {
    /// Steps of a lifted query.
    steps: usize,
    lines: usize,
    /// Whether tags are a line of their own.
    reads_tags: bool,
}

/// Fetches the cache lines that begin in a digest of `bytes`; the one before them is also of the digest that precedes it.
#[inline(always)]
fn fetch<S: Simd>(s: S, digest: *const u8, bytes: usize) {
    let mut line = digest.addr().wrapping_neg() % LINE_BYTES;
    while line < bytes {
        s.prefetch(digest.wrapping_add(line));
        line += LINE_BYTES;
    }
}

impl ScoreStretch<'_> {
    /// Scores the digests `rows` of a head, with these tags, for all its lines, and writes those of the first `count` partitions
    /// from `partition` on.
    ///
    /// # Safety
    /// The digests are readable, and queries are lifted.
    #[inline(always)]
    unsafe fn score_some<S: Simd, E: Stored>(
        &self,
        s: S,
        shape: &Shape,
        head: usize,
        rows: [*const u8; TOGETHER],
        tags: [f32; TOGETHER],
        partition: usize,
        count: usize,
    ) {
        let lines = shape.lines;
        // SAFETY: the caller's promise; the lines lie in the scratch, and the scores of the stretch are this task's.
        unsafe {
            let to = self.scores.add(head * self.head_stride + partition);
            let left = self.lifted.cast::<E::Left>().add(head * lines * shape.steps);
            let mut line = 0;
            // So many lines at once as their sums fit in registers, each of which would load or widen the digests anew.
            while const { S::TILE_VECTORS > 1 } && line + LINES <= lines {
                let left = left.add(line * shape.steps);
                let sums = s.reduce_all(dots::<S, E, LINES>(s, left, shape.steps, rows));
                for l in 0..LINES {
                    finish_some::<E>(sums[l], tags, to.add((line + l) * self.line_stride), count);
                }
                line += LINES;
            }
            while line < lines {
                let left = left.add(line * shape.steps);
                let [sums] = dots::<S, E, 1>(s, left, shape.steps, rows);
                finish_some::<E>(s.reduce_sums(sums), tags, to.add(line * self.line_stride), count);
                line += 1;
            }
            if shape.reads_tags {
                write_some(tags, to.add(lines * self.line_stride), count);
            }
        }
    }
}

/// Writes the scores of `count` digests with these sums and tags.
///
/// # Safety
/// They are writable.
#[inline(always)]
unsafe fn finish_some<E: Stored>(
    mut sums: [f32; TOGETHER],
    tags: [f32; TOGETHER],
    to: *mut f32,
    count: usize,
) {
    for i in 0..TOGETHER {
        sums[i] = E::finish(sums[i], tags[i]);
    }
    // SAFETY: the caller's promise.
    unsafe { write_some(sums, to, count) };
}

/// Writes the first `count` values.
///
/// # Safety
/// They are writable.
#[inline(always)]
unsafe fn write_some(values: [f32; TOGETHER], to: *mut f32, count: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if count >= TOGETHER {
            to.cast::<[f32; TOGETHER]>().write_unaligned(values);
        } else {
            for i in 0..count {
                to.add(i).write(values[i]);
            }
        }
    }
}

/// The lifted query of a line: see [`ops::sparse::Score::Digest`]. Where scores are averaged over the query heads, that
/// of their mean, because a mean of dot products is the dot product of a mean.
#[inline(always)]
fn lift(w: &ScoreStretch, kind: DigestKind, head: usize, line: usize, to: &mut [f32; LIFTED_MAX]) {
    let (group, d) = (w.heads.group(), w.heads.head_dim);
    if let DigestKind::Gate { dim } = kind {
        to[..dim].copy_from_slice(&w.queries[head * d..][..dim]);
        return;
    }
    let one_line = w.method.query_lines(w.heads) == 1;
    let of = if one_line { 0..group } else { line..line + 1 };
    let two_sided = matches!(kind, DigestKind::MinMax | DigestKind::CuboidMean | DigestKind::Fp8(_));
    let mean_first = w.method.reduce == Reduce::MeanQuery;
    let share = 1.0 / of.len() as f32;
    let (low, high) = to.split_at_mut(d);
    let high = &mut high[..if two_sided { d } else { 0 }];
    for g in of {
        let query = &w.queries[(head * group + g) * d..][..d];
        if two_sided && !mean_first {
            for ((low, high), q) in low.iter_mut().zip(&mut *high).zip(query) {
                let q = q * share;
                *low += q.max(0.0);
                *high += q.min(0.0);
            }
        } else {
            low.iter_mut().zip(query).for_each(|(to, q)| *to += q * share);
        }
    }
    if two_sided && mean_first {
        for (low, high) in low.iter_mut().zip(high) {
            (*low, *high) = (low.max(0.0), low.min(0.0));
        }
    }
}

/// The scored values of a partition that is not full, of what it holds, as they would be stored; returns the tag.
#[inline(always)]
fn open_digest<S: Simd, E: Stored>(
    s: S,
    w: &ScoreStretch,
    head: usize,
    partition: usize,
    to: &mut [u32; LIFTED_MAX],
) -> f32 {
    let (kind, d) = (w.digests.spec().kind, w.heads.head_dim);
    let mut values = [0.0; LIFTED_MAX];
    let positions = partition * w.method.partition_tokens..w.context;
    let keys = Keys { kv: w.kv, layer: w.layer, pages: w.pages, head, positions };
    summarise(kind.unrounded(), &keys, &mut values);
    let cosine = w.digests.dtype().round(values[d]);
    let used = kind.scored_width(d);
    values[used..].fill(0.0);
    // SAFETY: both arrays have room for the widest digest.
    let scale = unsafe { E::store(s, to.as_mut_ptr().cast(), values.as_ptr(), used, padded_width(used)) };
    if kind == DigestKind::Landmark { cosine } else { scale }
}

/// Lane sums of the dot products of `L` lifted queries, `steps` long and as far apart, with some digests.
///
/// # Safety
/// `steps` steps of each are readable; they are whole vectors.
#[inline(always)]
unsafe fn dots<S: Simd, E: Stored, const L: usize>(
    s: S,
    left: *const E::Left,
    steps: usize,
    rows: [*const u8; TOGETHER],
) -> [[S::V; TOGETHER]; L] {
    const { assert!(DIGEST_ALIGN == 2 * LANES, "whole vectors, of pairs too") };
    let mut sums = [[s.splat(0.0); TOGETHER]; L];
    let mut step = 0;
    while step < steps {
        for i in 0..TOGETHER {
            // SAFETY: the caller's promise.
            unsafe {
                let right = E::load(s, rows[i].add(step / LANES * E::VECTOR_BYTES));
                for l in 0..L {
                    sums[l][i] = E::mul_add_lanes(s, sums[l][i], left.add(l * steps + step), right);
                }
            }
        }
        step += LANES;
    }
    sums
}
