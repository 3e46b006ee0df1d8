//! Attention and what selections cover of it, slot by slot.

use super::sparse::{PseudoToken, Selections};
use super::{Matrix, Pages, dot};
use crate::cluster::OrderedSlots;
use crate::coverage::{Coverage, Inspections, TOP_TOKENS};
use crate::{Batch, HeadShape, Tensor};

/// See [`crate::Backend::attend`].
pub(super) fn attend(
    out: &mut Matrix,
    mut lse: Option<&mut Matrix>,
    kv: &Pages,
    layer: usize,
    qkv: &Matrix,
    heads: HeadShape,
    window: Option<usize>,
    batch: &Batch,
    selection: Option<&Selections>,
) {
    assert!(selection.is_none() || window.is_none(), "a window is no layer for selections");
    batch.check(kv.geometry.page_tokens);
    assert_eq!((qkv.cols, out.cols), (heads.qkv_cols(), heads.q_cols()), "columns");
    out.set_rows(qkv.rows);
    if let Some(lse) = &mut lse {
        assert_eq!(lse.cols, heads.q_heads, "columns");
        lse.set_rows(qkv.rows);
    }
    let d = heads.head_dim;
    let scale = 1.0 / (d as f32).sqrt();
    let mut sparse_rows = batch.sparse_rows().enumerate().peekable();
    for sequence in batch.sequences {
        let table = batch.block_table(sequence);
        for row in sequence.rows.clone() {
            let row = row as usize;
            let end = batch.positions[row] as usize + 1;
            let start = window.map_or(0, |w| end.saturating_sub(w));
            let place = sparse_rows.next_if(|(_, s)| s.row == row).map(|(place, _)| place);
            for h in 0..heads.q_heads {
                let kv_head = h / heads.group();
                let bits = selection.zip(place).and_then(|(s, place)| s.bits[s.at(place, kv_head)].as_ref());
                let attended: Vec<usize> =
                    (start..end).filter(|p| bits.is_none_or(|b| b[p / 64] >> (p % 64) & 1 == 1)).collect();
                let q = &qkv.row(row)[h * d..][..d];
                let ordered = selection.zip(place).map_or(OrderedSlots::NONE, |(s, place)| s.ordered[place]);
                let slot = |p: usize, part: usize| {
                    let page_tokens = kv.geometry.page_tokens;
                    let (tier, copy) = (kv.tier.as_ref(), ordered.of(p));
                    match tier.and_then(|t| t.page(sequence.seat, layer, kv_head, p / page_tokens, copy)) {
                        Some(page) => &page[(part * page_tokens + p % page_tokens) * d..][..d],
                        None => kv.slot_values(layer, table, p, kv_head, part, copy),
                    }
                };
                // Clusters that stand for their tokens: `size * exp(score) = exp(score + ln size)`.
                let pseudo = match (selection, place, bits) {
                    (Some(selection), Some(place), Some(_)) => {
                        &selection.pseudo[selection.at(place, kv_head)][..]
                    }
                    _ => &[],
                };
                let of_cluster = |p: &PseudoToken| p.scores[h % heads.group()] * scale + (p.size as f32).ln();
                let scores = attended.iter().map(|&p| dot(q, slot(p, 0)) * scale);
                let scores: Vec<f32> = scores.chain(pseudo.iter().map(of_cluster)).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f32 = weights.iter().sum();
                let o = &mut out.row_mut(row)[h * d..][..d];
                o.fill(0.0);
                let values = attended.iter().map(|&p| slot(p, 1));
                let values = values.chain(pseudo.iter().map(|p| &p.value[..]));
                for (value, weight) in values.zip(&weights) {
                    for (o, v) in o.iter_mut().zip(value) {
                        *o += weight / sum * v;
                    }
                }
                if let Some(lse) = &mut lse {
                    lse.row_mut(row)[h] = max + sum.ln();
                }
            }
        }
    }
}

/// See [`crate::Backend::cover`].
pub(super) fn cover(
    inspections: &mut Inspections,
    kv: &Pages,
    layer: usize,
    qkv: &Matrix,
    heads: HeadShape,
    batch: &Batch,
    selection: &Selections,
) {
    let d = heads.head_dim;
    for asked in inspections.asked.iter().filter(|i| i.layer as usize == layer) {
        let last = batch.sparse_rows().enumerate().filter(|(_, s)| s.sequence.seat == asked.seat).last();
        let (place, sparse_row) = last.expect("a row that is inspected selects");
        let table = batch.block_table(sparse_row.sequence);
        let (mut mass, mut recall) = (0.0, 0.0);
        for h in 0..heads.q_heads {
            let kv_head = h / heads.group();
            let q = &qkv.row(sparse_row.row)[h * d..][..d];
            let score = |p: usize| {
                let copy = selection.ordered[place].of(p);
                dot(q, kv.slot_values(layer, table, p, kv_head, 0, copy)) / (d as f32).sqrt()
            };
            let scores: Vec<f32> = (0..=sparse_row.position).map(score).collect();
            let bits = selection.bits[selection.at(place, kv_head)].as_ref();
            let selected = |p: &usize| bits.is_none_or(|b| b[p / 64] >> (p % 64) & 1 == 1);
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |p: usize| (scores[p] - max).exp();
            let all: f32 = (0..scores.len()).map(weight).sum();
            let kept: f32 = (0..scores.len()).filter(selected).map(weight).sum();
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
            order.truncate(TOP_TOKENS);
            mass += kept / all / heads.q_heads as f32;
            let found = order.iter().filter(|p| selected(p)).count() as f32;
            recall += found / order.len() as f32 / heads.q_heads as f32;
        }
        inspections.found.push((asked.seat, Coverage { mass, recall }));
    }
}
