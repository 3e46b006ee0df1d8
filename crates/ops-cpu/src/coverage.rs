//! What selections cover of dense attention: scores of all keys of a context, split by split, and what of them is selected.
//!
//! The scores are those of attention, by the same code. Splits are passed over in ascending order, wave after wave, by one task
//! per KV head, so no bit depends on what was resident.

use std::marker::PhantomData;

use ops::coverage::{Coverage, HeadCoverage, Inspections};
use ops::{Batch, DType, HeadShape, SPLIT_TOKENS, SparseRow};

use crate::attention::Scratch;
use crate::isa::{Isa, Kernel};
use crate::memory::Shared;
use crate::pages::Kv;
use crate::pool::Pool;
use crate::selection::Selections;
use crate::simd::{LANES, Simd};
use crate::split::{SplitScratch, pack_queries, split_scores};
use crate::tensor::CpuTensor;
use crate::tier::WavePart;
use crate::tile::{Bf16, Element, F16, F32, round_to_lanes};
use crate::view::{Frames, HeadView};

/// See [`ops::Backend::cover`].
///
/// # Panics
/// When a row that is inspected selects nothing in this layer.
pub fn cover(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut Scratch,
    inspections: &mut Inspections,
    kv: &mut Kv,
    layer: usize,
    qkv: &CpuTensor,
    heads: HeadShape,
    batch: &Batch,
    selection: &Selections,
) {
    let Inspections { asked, found } = inspections;
    for asked in asked.iter().filter(|asked| asked.layer as usize == layer) {
        let rows = batch.sparse_rows().enumerate();
        let last = rows.filter(|(_, row)| row.sequence.seat == asked.seat).last();
        let (place, row) = last.expect("a row that is inspected selects");
        assert!(selection.is_of(place, row.row), "a selection is made for the batch at hand");
        let coverage = match selection.get(place, 0) {
            None => Coverage::WHOLE,
            Some(_) => of_row(isa, pool, scratch, kv, layer, qkv, heads, batch, selection, place, row),
        };
        found.push((asked.seat, coverage));
    }
}

/// Of a row that attends to a selection.
fn of_row(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut Scratch,
    kv: &mut Kv,
    layer: usize,
    qkv: &CpuTensor,
    heads: HeadShape,
    batch: &Batch,
    selection: &Selections,
    place: usize,
    row: SparseRow,
) -> Coverage {
    let geometry = *kv.geometry();
    let Scratch { threads, covered, .. } = scratch;
    covered.clear();
    covered.resize(heads.q_heads, HeadCoverage::new());
    let whole = 0..(row.position + 1).div_ceil(SPLIT_TOKENS);
    let waves = match &mut kv.tier {
        None => 1,
        Some(tier) => tier.look(layer, heads, row.sequence, selection.ordered(place), batch),
    };
    for wave in 0..waves {
        let splits = match &mut kv.tier {
            None => whole.clone(),
            Some(tier) => {
                tier.gather(pool, &kv.dram, wave);
                let part = tier.part(0, wave);
                part.map_or(0..0, |WavePart { splits, .. }| splits)
            }
        };
        let tier = kv.tier.as_deref();
        let covered = Shared(covered.as_mut_ptr());
        let (dram, threads) = (&kv.dram, &*threads);
        pool.run(heads.kv_heads, &|head, thread| {
            let bits = selection.get(place, head).expect("all heads select or none").slots;
            let view = HeadView {
                kv: dram,
                layer,
                head,
                blocks: batch.block_table(row.sequence),
                queries: qkv.row(row.row)[head * heads.group() * heads.head_dim..].as_ptr(),
                queries_stride: qkv.stride(),
                out: std::ptr::null_mut(),
                out_stride: 0,
                lse: None,
                group: heads.group(),
                head_dim: heads.head_dim,
                page_tokens: geometry.page_tokens,
                window: usize::MAX,
                first_position: row.position,
                num_rows: 1,
                selected: None,
                ordered: selection.ordered(place),
                frames: tier.map(|tier| {
                    let (entries, first_page) = tier.entries(0, head);
                    Frames { tier, entries, first_page }
                }),
            };
            // SAFETY: the scratch of this thread, borrowed for this task; the query heads of this task are its own.
            let (scratch, covered) = unsafe {
                let covered = covered.at(head * heads.group());
                (&mut *threads.get(thread), std::slice::from_raw_parts_mut(covered, heads.group()))
            };
            let splits = splits.clone();
            match geometry.dtype {
                DType::Bf16 => {
                    isa.run(HeadAs { view, splits, bits, scratch, covered, element: PhantomData::<Bf16> });
                }
                DType::F16 => {
                    isa.run(HeadAs { view, splits, bits, scratch, covered, element: PhantomData::<F16> });
                }
                DType::F32 => {
                    isa.run(HeadAs { view, splits, bits, scratch, covered, element: PhantomData::<F32> });
                }
            }
        });
    }
    HeadCoverage::mean(covered)
}

/// Some splits of a KV head, for pages of `E`.
struct HeadAs<'a, E> {
    view: HeadView<'a>,
    splits: std::ops::Range<usize>,
    /// What is selected.
    bits: &'a [u64],
    scratch: &'a mut SplitScratch,
    /// Of each query head.
    covered: &'a mut [HeadCoverage],
    element: PhantomData<E>,
}

impl<E: Element> Kernel for HeadAs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let HeadAs { view, splits, bits, scratch, covered, element: PhantomData } = self;
        let context = view.first_position + 1;
        // SAFETY: the view is of one row and fits the scratch, which was reserved for these heads; its pages are in DRAM or in
        // the frames of this wave.
        unsafe {
            scratch.start(view.height(), view.head_dim);
            pack_queries::<S, E>(s, &view, scratch);
            for split in splits {
                let first = split * SPLIT_TOKENS;
                let end = (context - first).min(SPLIT_TOKENS);
                let mut kept = [0u16; SPLIT_TOKENS / LANES];
                for (vector, kept) in kept.iter_mut().enumerate().take(end.div_ceil(LANES)) {
                    let slot = first + vector * LANES;
                    *kept = (bits[slot / 64] >> (slot % 64)) as u16;
                }
                split_scores::<S, E>(s, &view, split, scratch, |line, scores| {
                    add::<S>(s, &mut covered[line], scores, end, &kept);
                });
            }
        }
    }
}

/// Adds the scores of the first `end` slots of a split, those with a bit in `kept` selected. Scores are in powers of two.
///
/// # Safety
/// `scores` is valid for a split.
#[inline(always)]
unsafe fn add<S: Simd>(
    s: S,
    covered: &mut HeadCoverage,
    scores: *const f32,
    end: usize,
    kept: &[u16; SPLIT_TOKENS / LANES],
) {
    let vectors = round_to_lanes(end) / LANES;
    let there = |vector: usize| {
        if (vector + 1) * LANES <= end { u16::MAX } else { u16::MAX >> (LANES - end % LANES) }
    };
    // SAFETY: the caller's promise.
    let vector_at = |vector: usize| unsafe { s.keep(s.load(scores.add(vector * LANES)), there(vector)) };
    let mut max = s.splat(f32::NEG_INFINITY);
    for vector in 0..vectors {
        max = s.max(max, vector_at(vector));
    }
    let max = s.reduce_max(max);
    let (mut all, mut selected, largest) = (s.splat(0.0), s.splat(0.0), s.splat(max));
    for vector in 0..vectors {
        let score = s.sub(vector_at(vector), largest);
        all = s.add(all, s.exp2(score));
        if kept[vector] != 0 {
            selected = s.add(selected, s.exp2(s.keep(score, kept[vector])));
        }
    }
    covered.weigh(max, s.reduce_sum(all), s.reduce_sum(selected), f32::exp2);
    for slot in 0..end {
        // SAFETY: the caller's promise.
        let score = unsafe { *scores.add(slot) };
        covered.rank(score, kept[slot / LANES] >> (slot % LANES) & 1 == 1);
    }
}
