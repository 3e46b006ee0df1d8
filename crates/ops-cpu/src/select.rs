//! Selections, from scores.
//!
//! The best partitions are found without sorting: scores become integers of the same order, and the smallest one that
//! still belongs is found bit by bit, each bit by counting how many are as large. That is a pass over an array in the first-level
//! cache at 16 lanes a step for each bit in which keys differ (16 at most for what was rounded to bf16), over a copy of the keys that
//! are still in question once these are a quarter; fewer where a count is just what is wanted.
//!
//! Within decode of four sequences after 32,000 tokens on two cores of Zen 5 (`bench engine --profile`, interleaved runs) a
//! `shadowkv` step, four softmaxes over 3,871 chunks and two thresholds for each of 16 selections and 24 layers, takes 2.45 ms: 3.05
//! before keys were narrowed and looked for 16 at a time without a branch each. A fifth of what is left are exponentials.

use ops::sparse::{Method, Reduce, RowPlan, Rule, Scope, Score, bitmap_words, mark, order_key};
use ops::tally::page_words;
use ops::{Batch, HeadShape};

use crate::cluster::{ClusterScratch, Clusters};
use crate::digest::Digests;
use crate::isa::{Isa, Kernel};
use crate::memory::Shared;
use crate::merge::carry_stride;
use crate::pool::Pool;
use crate::selection::{Scratch, Selections, mark_pages, ones};
use crate::simd::{LANES, Simd};
use crate::tile::round_to_lanes;

/// Turns scores into selections.
pub fn select(
    isa: Isa,
    pool: &mut Pool,
    selection: &mut Selections,
    digests: &[Digests],
    layer: usize,
    heads: HeadShape,
    batch: &Batch,
) {
    selection.plan(layer, batch);
    let estimates = Shared(selection.estimates.as_mut_ptr());
    let estimated = Shared(selection.estimated.as_mut_ptr());
    let words = bitmap_words(selection.limits.context_max);
    let bits = Shared(selection.bits.as_mut_ptr());
    let page_words = page_words(&selection.limits);
    let pages = Shared(selection.page_bits.as_mut_ptr());
    let counts = Shared(selection.counts.as_mut_ptr());
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
        let clusters = match (method.rule, method.score) {
            (Rule::Clusters { .. }, Score::Digest { digests: index }) => {
                let line = carry_stride(heads.head_dim);
                let first = (place * heads.q_heads + head * heads.group()) * line;
                // SAFETY: the lines of this row and head are this task's; there is memory for them where a method selects
                // clusters, as the plan checked.
                let to = unsafe { std::slice::from_raw_parts_mut(estimates.at(first), heads.group() * line) };
                let table = batch.block_table(&batch.sequences[row.sequence]);
                let digests = &digests[index as usize];
                Some(Clusters { digests, layer, table, head, to })
            }
            _ => None,
        };
        let count = isa.run(SelectRow {
            selection,
            method,
            plan,
            heads,
            place,
            head,
            context,
            scratch,
            bits: first,
            clusters,
        });
        let page_tokens = selection.limits.page_tokens;
        let owned = if shared { 0..heads.kv_heads } else { head..head + 1 };
        for other in owned {
            if other != head {
                bitmap(other).copy_from_slice(first);
            }
            // Of every head: another method may have left pseudo-tokens in this place.
            // SAFETY: as for the bitmaps.
            unsafe {
                let at = place * heads.kv_heads + other;
                let pages = std::slice::from_raw_parts_mut(pages.at(at * page_words), page_words);
                counts.at(at).write(mark_pages(first, page_tokens, pages));
                estimated.at(at).write(count as u32);
            }
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
    /// Where partitions are clusters.
    clusters: Option<Clusters<'a>>,
}

impl Kernel for SelectRow<'_> {
    /// Pseudo-tokens.
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let SelectRow { selection, method, plan, heads, place, head, context, scratch, bits, clusters } =
            self;
        bits.fill(0);
        mark(bits, 0..plan.sink_end);
        mark(bits, plan.tail_start..context);
        if plan.take == 0 && plan.estimated == 0 {
            return 0;
        }
        let count = plan.candidates.len();
        let Scratch { reduced, keys, narrowed, masked, outliers, offsets, sizes, picked, weights, .. } =
            scratch;
        let padded = round_to_lanes(count);
        let (reduced, masked) = (&mut reduced[..padded], &mut masked[..padded]);
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
            each_best(s, keys, num_outliers, narrowed, |i| outliers.push((among.start + i) as u32));
        }
        if clusters.is_some() {
            // Those without a token are left out, like outliers.
            let tags = &selection.line_of(place, head, lines)[..count];
            sizes[..count].iter_mut().zip(tags).for_each(|(size, &tag)| *size = tag as u32);
            if sizes[..count].iter().fold(false, |any, &size| any | (size == 0)) {
                outliers.extend((0..count as u32).filter(|&p| sizes[p as usize] == 0));
            }
        }
        let first = plan.candidates.start;
        for (i, head) in of.enumerate() {
            for line in 0..lines {
                masked[..count]
                    .copy_from_slice(&selection.line_of(place, head, line)[plan.candidates.clone()]);
                masked[count..].fill(f32::NEG_INFINITY);
                for &outlier in &*outliers {
                    masked[outlier as usize - first] = f32::NEG_INFINITY;
                }
                let sum =
                    method.softmax.then(|| exponentials(s, masked, method.softmax_scale(heads.head_dim)));
                reduce(s, reduced, masked, sum, method.reduce, i + line == 0);
            }
        }
        let reduced = &mut reduced[..count];
        if method.reduce != Reduce::Max {
            for score in reduced.iter_mut() {
                *score /= num_lines as f32;
            }
        }
        let keys = &mut keys[..count];
        for (key, &score) in keys.iter_mut().zip(&*reduced) {
            *key = order_key(score);
        }
        if let Some(clusters) = clusters {
            let work = ClusterScratch { keys, narrowed, sizes: &sizes[..count], picked, offsets, weights };
            let line = |line: usize| selection.line_of(place, head, line);
            return clusters.select(s, plan, work, line, bits);
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
        each_best(s, keys, plan.take, narrowed, |i| match method.rule {
            Rule::Threshold(least) if reduced[i] < least => {}
            _ => take_in(first + i),
        });
        0
    }
}

/// Turns scores, whole vectors of them, into `2^((score - max) * log2(e) / sqrt(scale))`, the largest into 1; returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, scores: &mut [f32], scale: usize) -> f32 {
    let (vectors, _) = scores.as_chunks_mut::<LANES>();
    let factor = s.splat(std::f32::consts::LOG2_E / (scale as f32).sqrt());
    let mut max = s.splat(f32::NEG_INFINITY);
    let mut sum = s.splat(0.0);
    // SAFETY: a vector each.
    unsafe {
        for vector in vectors.iter() {
            max = s.max(s.load(vector.as_ptr()), max);
        }
        let max = s.splat(s.reduce_max(max));
        for vector in vectors {
            let weight = s.exp2(s.mul(s.sub(s.load(vector.as_ptr()), max), factor));
            sum = s.add(sum, weight);
            s.store(vector.as_mut_ptr(), weight);
        }
    }
    s.reduce_sum(sum)
}

/// Adds a line, divided by `sum`, to the reduced scores, or takes it over if it is the first. Both are whole vectors.
#[inline(always)]
fn reduce<S: Simd>(s: S, reduced: &mut [f32], scores: &[f32], sum: Option<f32>, how: Reduce, first: bool) {
    let (to, from) = (reduced.as_chunks_mut::<LANES>().0, scores.as_chunks::<LANES>().0);
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: a vector each.
        unsafe {
            let line = s.load(from.as_ptr());
            let line = match sum {
                Some(sum) => s.mul(line, s.splat(1.0 / sum)),
                None => line,
            };
            let before = s.load(to.as_ptr());
            let after = match how {
                _ if first => line,
                Reduce::Max => s.max(line, before),
                Reduce::Mean | Reduce::MeanQuery => s.add(before, line),
            };
            s.store(to.as_mut_ptr(), after);
        }
    }
}

/// Visits the places of the `take` largest keys in ascending order; of equal keys the first. `narrowed` is memory of
/// [`narrowed_len`].
#[inline(always)]
pub(crate) fn each_best<S: Simd>(
    s: S,
    keys: &[u32],
    take: usize,
    narrowed: &mut [u32],
    mut visit: impl FnMut(usize),
) {
    let (least, mut ties) = threshold(s, keys, take, narrowed);
    each_at_least(s, keys, least, |i| {
        let tie = keys[i] == least;
        if !tie || ties > 0 {
            ties -= usize::from(tie);
            visit(i);
        }
    });
}

/// Visits the places of keys that are at least `least`, in ascending order.
#[inline(always)]
pub(crate) fn each_at_least<S: Simd>(s: S, keys: &[u32], least: u32, mut visit: impl FnMut(usize)) {
    let (chunks, rest) = keys.as_chunks::<LANES>();
    for (c, chunk) in chunks.iter().enumerate() {
        // A branch per key would be guessed wrong at every one that is taken.
        ones(u64::from(s.at_least(chunk, least))).for_each(|i| visit(c * LANES + i));
    }
    let first = keys.len() - rest.len();
    rest.iter().enumerate().filter(|(_, key)| **key >= least).for_each(|(i, _)| visit(first + i));
}

/// How many keys are at least `least`.
#[inline(always)]
fn count(keys: &[u32], least: u32) -> usize {
    let mut count = 0u32;
    for &key in keys {
        count += u32::from(key >= least);
    }
    count as usize
}

/// The `take`-th largest key, and how many keys that equal it are among the `take` largest.
#[inline(always)]
fn threshold<S: Simd>(s: S, keys: &[u32], take: usize, narrowed: &mut [u32]) -> (u32, usize) {
    // Bits in which all keys agree are those of the result, too.
    let (all, any) = keys.iter().fold((u32::MAX, 0), |(all, any), &key| (all & key, any | key));
    // Those that may still be it are at least `least`, in the bits that were looked at; `larger` keys are beyond them.
    let (mut least, mut as_large, mut larger) = (all, keys.len(), 0);
    let (mut rest, mut beyond_rest, mut narrow) = (keys, 0, Some(narrowed));
    for bit in (0..32).rev().filter(|bit| (all ^ any) >> bit & 1 == 1) {
        let candidate = least & (u32::MAX << bit) | 1 << bit;
        let found = beyond_rest + count(rest, candidate);
        if found >= take {
            (least, as_large) = (least | 1 << bit, found);
        } else {
            larger = found;
        }
        if found == take {
            // These are the ones, and the bits to come say only which is the least of them.
            // Smaller keys wrap around to a distance beyond theirs.
            let distance = |&key: &u32| key.wrapping_sub(candidate);
            least = candidate.wrapping_add(rest.iter().map(distance).fold(u32::MAX, u32::min));
            break;
        }
        if 4 * (as_large - larger) <= rest.len()
            && let Some(to) = narrow.take()
        {
            let low = least & (u32::MAX << bit);
            let count = within(s, rest, low, low.checked_add(1 << bit), to);
            (rest, beyond_rest) = (&to[..count], larger);
        }
    }
    let larger = least.checked_add(1).map_or(0, |above| beyond_rest + count(rest, above));
    (least, take - larger)
}

/// Memory for the keys of `count` that [`within`] copies: a vector is written where one key is left.
pub(crate) const fn narrowed_len(count: usize) -> usize {
    count / 4 + LANES
}

/// Copies the keys from `low` on, and below `end` if there is an end; returns how many those are. `to` has room for
/// a vector after them.
#[inline(always)]
fn within<S: Simd>(s: S, keys: &[u32], low: u32, end: Option<u32>, to: &mut [u32]) -> usize {
    let (chunks, last) = keys.as_chunks::<LANES>();
    let is_within = |key: u32| key >= low && end.is_none_or(|end| key < end);
    let mut count = 0;
    for chunk in chunks {
        let beyond = end.map_or(0, |end| s.at_least(chunk, end));
        let mask = s.at_least(chunk, low) & !beyond;
        s.compress(
            chunk,
            mask,
            to[count..].first_chunk_mut().expect("room for a vector after what was kept"),
        );
        count += mask.count_ones() as usize;
    }
    for &key in last.iter().filter(|key| is_within(**key)) {
        to[count] = key;
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    struct Threshold<'a> {
        keys: &'a [u32],
        take: usize,
    }

    impl Kernel for Threshold<'_> {
        type Output = (u32, usize);

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> (u32, usize) {
            threshold(s, self.keys, self.take, &mut vec![0; narrowed_len(self.keys.len())])
        }
    }

    #[test]
    fn thresholds_are_those_of_a_sort() {
        let mut random = Random::new(11);
        for count in [1, 2, 17, 300] {
            for distinct in [1, 3, 1 << 30, usize::MAX] {
                let mut keys: Vec<u32> = (0..count).map(|_| random.below(distinct) as u32).collect();
                if distinct == usize::MAX {
                    // As scores are: in most of them the highest bit is set.
                    keys.iter_mut().for_each(|key| *key = order_key(1.0 + random.normal()));
                    (keys[0], keys[count / 2]) = (u32::MAX, 0);
                }
                let keys = keys;
                let mut sorted = keys.clone();
                sorted.sort_by_key(|&k| std::cmp::Reverse(k));
                for take in 1..=count {
                    let least = sorted[take - 1];
                    let ties = sorted[..take].iter().filter(|&&k| k == least).count();
                    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                        let found = isa.run(Threshold { keys: &keys, take });
                        assert_eq!(found, (least, ties), "seed 11, {isa}: {take} of {keys:?}");
                    }
                }
            }
        }
    }
}
