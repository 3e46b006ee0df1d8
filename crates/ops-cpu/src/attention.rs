//! Attention, for decode and prefill alike, split by split (flash attention: Dao et al. 2022; its split form for
//! decode: Dao et al. 2023).
//!
//! A *unit* is a tile of rows of one sequence with one KV head, so every page is read once for all query heads that
//! share it. For each split of 512 slots [`crate::split`] computes scores, their maximum, and the weighted values, and
//! the results are merged in ascending order, that of pseudo-tokens last. Where one row has a long context, splits become tasks of their own:
//! each leaves its result in memory, and whoever finishes last merges them in the same order by the same code.
//! So no bit depends on how the work was cut.
//!
//! Measured on four cores of Zen 4 in bf16, heads of 128, as fractions of the machine's own ceiling in the same round
//! (`bench`, otherwise idle): prefill does 0.82 to 0.83 of the rate of the register tile at 8K and 0.75 at 1K, where
//! the triangle of the causal mask is a larger part; the exponentials are most of what is missing. Decode reads KV at
//! 0.83 to 0.94 of a bandwidth of 37 GB/s. Where neighbours left the memory alone and it gave 67 GB/s, decode reached
//! 0.67 to 0.73 (0.57 to 0.62 before pages were fetched ahead): KV comes in pieces of 4 KiB, at each of which the
//! hardware's prefetcher begins anew.
//!
//! Where splits are tasks, those of one split with all heads follow one another, because the pages of a block lie side by side. On
//! two cores of Emerald Rapids, four sequences of 32,768 tokens with 4 KV heads of 64, dense decode read at 0.76 (0.73 to 0.77) of the
//! bandwidth so, and at 0.68 (0.64 to 0.69) head by head (five runs in turn). Out of the second-level cache the same arithmetic
//! takes as long as this memory does.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use ops::cluster::OrderedSlots;
use ops::coverage::HeadCoverage;
use ops::sparse::Attention;
use ops::{Batch, DType, HeadShape, KvGeometry, SPLIT_TOKENS, SequenceRows, Tensor};

use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, PerThread, Shared};
use crate::merge::{Partial, Running, carry_stride, finish, merge, put_away, take_up};
use crate::pages::{Kv, Layers};
use crate::pool::Pool;
use crate::selection::Selections;
use crate::simd::Simd;
use crate::split::{SplitScratch, pack_queries, split_partial};
use crate::tensor::CpuTensor;
use crate::tier::{Tier, WavePart};
use crate::tile::{Bf16, Element, F16, F32};
use crate::view::{Frames, HeadView};

/// Rows times query heads per unit: enough to reuse what was read, few enough for their scores to stay in the
/// second-level cache.
const UNIT_HEIGHT: usize = 60;

/// Rows times query heads up to which the splits of a sequence are tasks of their own.
const SPLIT_HEIGHT_MAX: usize = 16;

/// Memory for the results of splits, unless a single sequence needs more.
const PARTIALS_BYTES: usize = 32 << 20;

/// Memory of attention.
#[derive(Debug)]
pub struct Scratch {
    pub(crate) threads: PerThread<SplitScratch>,
    partials: Buffer<f32>,
    /// Lines from one wave to the next, `[row][query head]`.
    carry: Buffer<f32>,
    plans: Vec<Plan>,
    pending: Vec<AtomicU32>,
    /// Of the query heads of a row that is inspected.
    pub(crate) covered: Vec<HeadCoverage>,
}

/// How the work of some rows of one sequence is cut.
#[derive(Clone, Debug)]
struct Plan {
    tasks_end: usize,
    /// Index of the sequence, and rows of it.
    sequence: usize,
    rows: Range<usize>,
    /// The place of the only row among the selections, if it attends to one.
    place: Option<usize>,
    /// Rows per unit.
    tile_rows: usize,
    /// First split that any row attends to, and how many there are.
    first_split: usize,
    num_splits: usize,
    /// Whether nothing of these rows came in a wave before this one, and whether nothing follows.
    starts: bool,
    ends: bool,
    /// Number of the item in the HBM tier.
    item: usize,
    /// Where each split is a task: the first result in `partials` and the first counter in `pending`.
    by_split: Option<(usize, usize)>,
}

/// Rows per unit: as many as make up `UNIT_HEIGHT`, in multiples that fill tiles of six rows.
fn tile_rows(group: usize) -> usize {
    let rows = UNIT_HEIGHT / group;
    let whole = (1..=6).find(|r| (r * group).is_multiple_of(6)).unwrap_or(6);
    if rows > whole { rows / whole * whole } else { rows.max(1) }
}

/// Splits that rows at `positions` attend to.
fn splits(positions: Range<usize>, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |w| (positions.start + 1).saturating_sub(w));
    first / SPLIT_TOKENS..positions.end.div_ceil(SPLIT_TOKENS)
}

impl Scratch {
    /// Scratch for `threads` threads that grows when first used.
    pub fn new(threads: usize) -> Result<Self, ops::Error> {
        let mut empty = Vec::with_capacity(threads);
        for _ in 0..threads {
            empty.push(SplitScratch::new(0, 0)?);
        }
        let mut empty = empty.into_iter();
        Ok(Scratch {
            threads: PerThread::new(threads, || empty.next().expect("one per thread")),
            partials: Buffer::zeroed(0, "attention")?,
            carry: Buffer::zeroed(0, "attention")?,
            plans: Vec::new(),
            pending: Vec::new(),
            covered: Vec::new(),
        })
    }

    /// Makes room; returns all bytes held.
    pub fn reserve(
        &mut self,
        heads: HeadShape,
        rows_max: usize,
        sequences_max: usize,
        context_max: usize,
    ) -> Result<u64, ops::Error> {
        self.reserve_threads(heads)?;
        let carried = rows_max * heads.q_heads * carry_stride(heads.head_dim);
        if self.carry.len() < carried {
            self.carry = Buffer::zeroed(carried, "attention")?;
        }
        let rows = (SPLIT_HEIGHT_MAX / heads.group()).max(1);
        let one = heads.kv_heads
            * context_max.div_ceil(SPLIT_TOKENS)
            * Partial::len(rows * heads.group(), heads.head_dim);
        let needed = one.saturating_mul(sequences_max).min(PARTIALS_BYTES / size_of::<f32>()).max(one);
        if self.partials.len() < needed {
            self.partials = Buffer::zeroed(needed, "attention")?;
        }
        self.reserve_plans(sequences_max, heads);
        self.covered.reserve(heads.q_heads.saturating_sub(self.covered.len()));
        let threads: usize = self.threads.iter_mut().map(|t| t.bytes()).sum();
        let tables = self.plans.capacity() * size_of::<Plan>()
            + self.pending.len() * size_of::<AtomicU32>()
            + self.covered.capacity() * size_of::<HeadCoverage>();
        let results = (self.partials.len() + self.carry.len()) * size_of::<f32>();
        Ok((threads + results + tables) as u64)
    }

    /// Makes room for `count` runs of rows.
    pub fn reserve_plans(&mut self, count: usize, heads: HeadShape) {
        self.plans.reserve(count);
        self.reserve_pending(count * heads.kv_heads);
    }

    fn reserve_threads(&mut self, heads: HeadShape) -> Result<(), ops::Error> {
        let height = heads.group().max(tile_rows(heads.group()) * heads.group()).max(SPLIT_HEIGHT_MAX);
        for scratch in self.threads.iter_mut() {
            if !scratch.fits(height, heads.head_dim) {
                *scratch = SplitScratch::new(height, heads.head_dim)?;
            }
        }
        Ok(())
    }

    fn reserve_pending(&mut self, len: usize) {
        if self.pending.len() < len {
            self.pending.resize_with(len, || AtomicU32::new(0));
        }
    }

    /// Cuts the work of a batch; returns the number of tasks.
    fn plan(
        &mut self,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
        page_tokens: usize,
        waves: Option<(&Tier, usize)>,
    ) -> usize {
        self.plans.clear();
        let partials_len = self.partials.len();
        let mut cut = Cut { heads, partials_len, waves, items: 0, tasks: 0, partials: 0, counters: 0 };
        let mut place = 0;
        for (sequence, s) in batch.sequences.iter().enumerate() {
            let num_sparse = match (s.attention, selection) {
                (Attention::Sparse { .. }, Some(_)) => {
                    s.context_tokens().saturating_sub(s.prompt_len as usize).min(s.num_rows())
                }
                _ => 0,
            };
            let num_dense = s.num_rows() - num_sparse;
            let all = |rows: Range<usize>| {
                let first = s.first_position as usize;
                splits(first + rows.start..first + rows.end, window)
            };
            if num_dense > 0 {
                self.plans.extend(cut.plan(sequence, 0..num_dense, None, all(0..num_dense)));
            }
            for row in num_dense..s.num_rows() {
                let selection = selection.expect("sparse rows are counted where there is one");
                assert!(
                    selection.is_of(place, s.rows.start as usize + row),
                    "a selection is made for the batch at hand"
                );
                let selected = (0..heads.kv_heads).filter_map(|head| selection.get(place, head));
                let plan = match selected.map(|s| s.counts.pages as usize).max() {
                    None => cut.plan(sequence, row..row + 1, None, all(row..row + 1)),
                    Some(pages) => {
                        let splits = 0..pages.div_ceil(SPLIT_TOKENS / page_tokens);
                        cut.plan(sequence, row..row + 1, Some(place), splits)
                    }
                };
                self.plans.extend(plan);
                place += 1;
            }
        }
        self.reserve_pending(cut.counters);
        for plan in &self.plans {
            if let Some((_, first)) = plan.by_split {
                for pending in &mut self.pending[first..first + heads.kv_heads] {
                    *pending.get_mut() = plan.num_splits as u32;
                }
            }
        }
        cut.tasks
    }
}

/// Work that was cut so far.
struct Cut<'a> {
    heads: HeadShape,
    /// Room for results of splits.
    partials_len: usize,
    /// The HBM tier and the wave, where there is one.
    waves: Option<(&'a Tier, usize)>,
    /// Runs of rows so far, those of other waves among them.
    items: usize,
    tasks: usize,
    partials: usize,
    counters: usize,
}

impl Cut<'_> {
    /// Tasks for `rows` of a sequence over `splits`, as far as they are of this wave.
    fn plan(
        &mut self,
        sequence: usize,
        rows: Range<usize>,
        place: Option<usize>,
        splits: Range<usize>,
    ) -> Option<Plan> {
        let item = self.items;
        self.items += 1;
        let WavePart { splits, starts, ends } = match self.waves {
            None => WavePart { splits, starts: true, ends: true },
            Some((tier, wave)) => tier.part(item, wave)?,
        };
        let heads = self.heads;
        let height = rows.len() * heads.group();
        let needed = heads.kv_heads * splits.len() * Partial::len(height, heads.head_dim);
        let few_rows = rows.len() == 1 || height <= SPLIT_HEIGHT_MAX;
        let by_split = few_rows && splits.len() > 1 && self.partials + needed <= self.partials_len;
        let tile_rows = if by_split { rows.len() } else { tile_rows(heads.group()) };
        let tiles = rows.len().div_ceil(tile_rows);
        self.tasks += heads.kv_heads * tiles * if by_split { splits.len() } else { 1 };
        let plan = Plan {
            tasks_end: self.tasks,
            sequence,
            rows,
            place,
            tile_rows,
            first_split: splits.start,
            num_splits: splits.len(),
            starts,
            ends,
            item,
            by_split: by_split.then_some((self.partials, self.counters)),
        };
        if by_split {
            self.partials += needed;
            self.counters += heads.kv_heads;
        }
        Some(plan)
    }
}

/// `out[h] = softmax(q_h K^T / sqrt(head_dim)) V`.
///
/// # Panics
/// When shapes do not fit.
pub fn attend(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut Scratch,
    out: &mut CpuTensor,
    mut lse: Option<&mut CpuTensor>,
    kv: &Kv,
    layer: usize,
    qkv: &CpuTensor,
    heads: HeadShape,
    window: Option<usize>,
    batch: &Batch,
    selection: Option<&Selections>,
    wave: usize,
) {
    let geometry = *kv.geometry();
    assert_eq!(
        (heads.kv_heads, heads.head_dim),
        (geometry.kv_heads, geometry.head_dim),
        "heads of the cache"
    );
    assert!(heads.q_heads.is_multiple_of(heads.kv_heads) && heads.q_heads > 0, "groups of query heads");
    assert_eq!((qkv.rows(), qkv.cols()), (batch.num_rows(), heads.qkv_cols()), "shape of QKV");
    assert_eq!(out.cols(), heads.q_cols(), "columns of the output");
    assert!(window != Some(0), "a window holds the row itself");
    assert!(window.is_none() || selection.is_none(), "a window is no layer for selections");
    batch.check(geometry.page_tokens);
    out.set_rows(qkv.rows());
    if let Some(lse) = &mut lse {
        assert_eq!(lse.cols(), heads.q_heads, "columns of log-sum-exps");
        lse.set_rows(qkv.rows());
    }
    scratch.reserve_threads(heads).expect("memory for a step that was not reserved");
    if scratch.partials.len() == 0 {
        let context = batch.sequences.iter().map(SequenceRows::context_tokens).max().unwrap_or(0);
        scratch
            .reserve(heads, batch.num_rows(), batch.sequences.len(), context)
            .expect("memory for a step that was not reserved");
    }
    let tier = kv.tier.as_deref();
    let waves = tier.map(|tier| (tier, wave));
    let num_tasks = scratch.plan(heads, window, batch, selection, geometry.page_tokens, waves);
    let carry_lines = scratch.carry.len() / carry_stride(heads.head_dim);
    let carries = scratch.plans.iter().any(|p| !p.starts || !p.ends);
    assert!(!carries || carry_lines >= qkv.rows() * heads.q_heads, "memory for several waves");
    let out_stride = out.stride();
    let out = out.shared();
    let lse = lse.map(|lse| (lse.shared(), lse.stride()));
    let partials = Shared(scratch.partials.as_mut_ptr());
    let carry = Shared(scratch.carry.as_mut_ptr());
    let scratch = &*scratch;
    pool.run(num_tasks, &|task, thread| {
        let index = scratch.plans.partition_point(|p| p.tasks_end <= task);
        let tasks_start = if index == 0 { 0 } else { scratch.plans[index - 1].tasks_end };
        let plan = &scratch.plans[index];
        let unit = Unit {
            geometry,
            dram: &kv.dram,
            tier,
            layer,
            qkv,
            heads,
            window,
            batch,
            selection,
            sequence: &batch.sequences[plan.sequence],
            plan,
            task: task - tasks_start,
            out,
            out_stride,
            lse,
            partials,
            carry,
            pending: &scratch.pending,
        };
        // SAFETY: the scratch of this thread, borrowed for this task.
        let scratch = unsafe { &mut *scratch.threads.get(thread) };
        match geometry.dtype {
            DType::Bf16 => isa.run(UnitAs { unit, scratch, element: PhantomData::<Bf16> }),
            DType::F16 => isa.run(UnitAs { unit, scratch, element: PhantomData::<F16> }),
            DType::F32 => isa.run(UnitAs { unit, scratch, element: PhantomData::<F32> }),
        }
    });
}

/// One task.
struct Unit<'a> {
    geometry: KvGeometry,
    dram: &'a Layers,
    tier: Option<&'a Tier>,
    layer: usize,
    qkv: &'a CpuTensor,
    heads: HeadShape,
    window: Option<usize>,
    batch: &'a Batch<'a>,
    selection: Option<&'a Selections>,
    sequence: &'a SequenceRows,
    plan: &'a Plan,
    /// Its number among those of the plan.
    task: usize,
    out: Shared<f32>,
    out_stride: usize,
    lse: Option<(Shared<f32>, usize)>,
    partials: Shared<f32>,
    carry: Shared<f32>,
    pending: &'a [AtomicU32],
}

/// A task with its memory, for pages of `E`.
struct UnitAs<'a, E> {
    unit: Unit<'a>,
    scratch: &'a mut SplitScratch,
    element: PhantomData<E>,
}

impl Unit<'_> {
    /// The pages of a KV head and the rows `rows` (of the sequence) that look at them.
    #[inline(always)]
    fn view(&self, head: usize, rows: Range<usize>) -> HeadView<'_> {
        let HeadShape { head_dim, .. } = self.heads;
        let group = self.heads.group();
        let first_row = self.sequence.rows.start as usize + rows.start;
        HeadView {
            kv: self.dram,
            layer: self.layer,
            head,
            blocks: self.batch.block_table(self.sequence),
            queries: self.qkv.row(first_row)[head * group * head_dim..].as_ptr(),
            queries_stride: self.qkv.stride(),
            // SAFETY: rows of this sequence and columns of these query heads exist in `out`.
            out: unsafe { self.out.at(first_row * self.out_stride + head * group * head_dim) },
            out_stride: self.out_stride,
            // SAFETY: the same rows, and a column per query head.
            lse: self.lse.map(|(lse, stride)| unsafe { (lse.at(first_row * stride + head * group), stride) }),
            group,
            head_dim,
            page_tokens: self.geometry.page_tokens,
            window: self.window.unwrap_or(usize::MAX),
            first_position: self.sequence.first_position as usize + rows.start,
            num_rows: rows.len(),
            selected: self.plan.place.map(|place| {
                let selected = self.selection.and_then(|selection| selection.get(place, head));
                selected.expect("a row that was planned by its selection has one")
            }),
            ordered: self
                .plan
                .place
                .zip(self.selection)
                .map_or(OrderedSlots::NONE, |(place, s)| s.ordered(place)),
            frames: self.tier.map(|tier| {
                let (entries, first_page) = tier.entries(self.plan.item, head);
                Frames { tier, entries, first_page }
            }),
        }
    }
}

impl<E: Element> Kernel for UnitAs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let UnitAs { unit: u, scratch, element: PhantomData } = self;
        let plan = u.plan;
        let tiles = plan.rows.len().div_ceil(plan.tile_rows);
        let (head, part) = match plan.by_split {
            Some(_) => (u.task % u.heads.kv_heads, u.task / u.heads.kv_heads),
            None => (u.task / tiles, u.task % tiles),
        };
        // The last tile has the longest context: first, so that no thread is left with it at the end.
        let tile = if plan.by_split.is_some() { 0 } else { tiles - 1 - part };
        let first_row = plan.rows.start + tile * plan.tile_rows;
        let view = u.view(head, first_row..(first_row + plan.tile_rows).min(plan.rows.end));
        let (height, len) = (view.height(), Partial::len(view.height(), view.head_dim));
        let splits = match plan.by_split {
            Some(_) => plan.first_split + part..plan.first_split + part + 1,
            None if plan.place.is_some() => plan.first_split..plan.first_split + plan.num_splits,
            None => {
                let own = splits(view.first_position..view.first_position + view.num_rows, u.window);
                own.start.max(plan.first_split)..own.end.min(plan.first_split + plan.num_splits)
            }
        };
        // Whose runs are fetched while this task ends: that of the same thread, except at the end of its share.
        let after = u.task + 1;
        let next = (plan.by_split.is_some() && after < plan.num_splits * u.heads.kv_heads).then(|| {
            (u.view(after % u.heads.kv_heads, plan.rows.clone()), plan.first_split + after / u.heads.kv_heads)
        });
        let (partial, mut running) = scratch.start(height, view.head_dim);
        // SAFETY: the scratch was made for this height; rows and columns of `out` are this unit's alone. The plan gave each
        // (head, split) of a sequence its own place in `partials`.
        unsafe {
            let place = |first_partial: usize, split: usize| {
                Partial::at(u.partials.at(first_partial + (head * plan.num_splits + split) * len), height)
            };
            let row = u.sequence.rows.start as usize + first_row;
            let line = row * u.heads.q_heads + head * view.group;
            let carry = u.carry.0.wrapping_add(line * carry_stride(view.head_dim));
            pack_queries::<S, E>(s, &view, scratch);
            if plan.by_split.is_none() && !plan.starts {
                take_up(&view, &mut running, carry, u.heads.q_heads);
            }
            for split in splits {
                let to = plan.by_split.map_or(partial, |(first, _)| place(first, part));
                let next = next.as_ref().map(|(view, split)| (view, *split));
                split_partial::<S, E>(s, &view, split, scratch, to, next);
                if plan.by_split.is_none() {
                    merge(s, &view, &mut running, partial);
                }
            }
            if let Some((first_partial, first_counter)) = plan.by_split {
                // Orders what the others wrote before what the last one reads.
                if u.pending[first_counter + head].fetch_sub(1, Ordering::AcqRel) > 1 {
                    return;
                }
                if !plan.starts {
                    take_up(&view, &mut running, carry, u.heads.q_heads);
                }
                for split in 0..plan.num_splits {
                    merge(s, &view, &mut running, place(first_partial, split));
                }
            }
            if plan.ends {
                let selected = plan.place.zip(u.selection);
                if let Some(estimate) =
                    selected.and_then(|(place, selection)| selection.estimate(place, head))
                {
                    // Its lines lie as those that are carried do.
                    take_up(&view, &mut Running(partial), estimate.as_ptr(), u.heads.q_heads);
                    merge(s, &view, &mut running, partial);
                }
                finish(s, &view, &running);
            } else {
                put_away(&view, &running, carry, u.heads.q_heads);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_fill_register_tiles() {
        for group in 1..=64 {
            let rows = tile_rows(group);
            assert!(rows >= 1 && (rows == 1 || rows * group <= UNIT_HEIGHT), "{group}");
        }
        assert_eq!([1, 2, 4, 5, 7, 8].map(tile_rows), [60, 30, 15, 12, 6, 6]);
    }

    #[test]
    fn splits_follow_the_window() {
        assert_eq!(splits(0..1, None), 0..1);
        assert_eq!(splits(511..512, None), 0..1);
        assert_eq!(splits(512..513, None), 0..2);
        assert_eq!(splits(1023..1030, Some(512)), 1..3);
        assert_eq!(splits(1022..1030, Some(512)), 0..3);
    }
}
