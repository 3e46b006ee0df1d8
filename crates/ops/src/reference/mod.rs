//! The contract in scalar f32, straight from the formulas: the oracle that every backend is compared with.
//!
//! Nothing here is tuned or blocked. Weights and KV are rounded to their element type; activations are not.

mod attention;
mod fp8;
mod sparse;
mod tally;
mod tier;

use std::ops::Range;

use tally::NaiveTally;
use tier::NaiveTier;

use crate::cluster::OrderedCopy;
use crate::coverage::Inspections;
use crate::places::DigestState;
use crate::residency::SeatCounters;
use crate::sample::{SampleOutput, SampleRow, SampleScratch, sample};
use crate::sparse::{DigestSpec, SelectionLimits};
use crate::tally::{Overlap, RowTally, WorkingSet, WorkingSetSpec};
use crate::tier::{TierSpec, TierState};
pub use sparse::{DigestTable, Selections};

use crate::{
    Backend, Batch, BlockIndex, DType, DeviceInfo, Error, Gate, HeadShape, KvGeometry, SeatIndex, Tensor,
    WeightView,
};

/// The scalar backend.
#[derive(Debug, Default)]
pub struct Reference {
    scratch: SampleScratch,
}

/// A row-major matrix in host memory.
#[derive(Clone, Debug)]
pub struct Matrix {
    values: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Row `row`.
    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &self.values[row * self.cols..][..self.cols]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &mut self.values[row * self.cols..][..self.cols]
    }
}

impl Tensor for Matrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn set_rows(&mut self, rows: usize) {
        assert!(rows * self.cols <= self.values.len(), "{rows} rows were not allocated");
        self.rows = rows;
    }
}

/// A weight matrix `[outputs, inputs]` with its bias.
#[derive(Debug)]
pub struct Weights {
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
    outputs: usize,
    inputs: usize,
}

/// Pages of all layers: `[layer][block][head][K | V][slot][channel]`.
#[derive(Debug)]
pub struct Pages {
    geometry: KvGeometry,
    /// Blocks, those in the order of clusters among them.
    num_blocks: usize,
    /// Blocks of the pool, behind which those are.
    pool_blocks: usize,
    values: Vec<f32>,
    tier: Option<NaiveTier>,
    tally: NaiveTally,
}

impl Pages {
    /// A page: K, then V.
    fn copy(&self, layer: usize, block: BlockIndex, head: usize) -> Vec<f32> {
        let len = 2 * self.geometry.page_tokens * self.geometry.head_dim;
        self.values[self.at(layer, block, head, 0)..][..len].to_vec()
    }

    /// Where K (`part` 0) or V (`part` 1) of a page begins.
    fn at(&self, layer: usize, block: BlockIndex, head: usize, part: usize) -> usize {
        let g = &self.geometry;
        assert!(layer < g.num_layers && block.at() < self.num_blocks && head < g.kv_heads, "page exists");
        (((layer * self.num_blocks + block.at()) * g.kv_heads + head) * 2 + part) * g.page_tokens * g.head_dim
    }

    /// `block`, or its copy in the order of clusters.
    fn block(&self, block: BlockIndex, copy: Option<OrderedCopy>) -> BlockIndex {
        copy.map_or(block, |copy| copy.block(block, self.pool_blocks))
    }

    /// K or V of the slot at `position` of a sequence with this block table.
    fn slot(&self, layer: usize, table: &[BlockIndex], position: usize, head: usize, part: usize) -> usize {
        let g = &self.geometry;
        self.at(layer, table[position / g.page_tokens], head, part) + position % g.page_tokens * g.head_dim
    }

    /// K or V of a slot, of a copy in the order of clusters if one is named.
    fn slot_values(
        &self,
        layer: usize,
        table: &[BlockIndex],
        slot: usize,
        head: usize,
        part: usize,
        copy: Option<OrderedCopy>,
    ) -> &[f32] {
        let block = self.block(table[slot / self.geometry.page_tokens], copy);
        let within = slot % self.geometry.page_tokens;
        &self.values[self.slot(layer, &[block], within, head, part)..][..self.geometry.head_dim]
    }
}

fn decode(view: WeightView, dtype: DType) -> Vec<f32> {
    (0..view.rows * view.cols).map(|i| dtype.round(view.dtype.read(view.bytes, i))).collect()
}

impl Backend for Reference {
    type Tensor = Matrix;
    type Linear = Weights;
    type Vector = Vec<f32>;
    type Kv = Pages;
    type Digests = DigestTable;
    type Selection = Selections;

    fn info(&self) -> DeviceInfo {
        DeviceInfo { kind: "cpu", isa: "reference".into(), threads: 1 }
    }

    fn tensor(&mut self, rows_max: usize, cols: usize) -> Result<Matrix, Error> {
        Ok(Matrix { values: vec![0.0; rows_max * cols], rows: rows_max, cols })
    }

    fn upload(&mut self, tensor: &mut Matrix, values: &[f32]) {
        assert_eq!(values.len() % tensor.cols, 0, "whole rows");
        tensor.set_rows(values.len() / tensor.cols);
        tensor.values[..values.len()].copy_from_slice(values);
    }

    fn row<'a>(&'a mut self, tensor: &'a Matrix, row: usize) -> &'a [f32] {
        tensor.row(row)
    }

    fn linear(
        &mut self,
        parts: &[WeightView],
        biases: &[WeightView],
        dtype: DType,
    ) -> Result<Weights, Error> {
        let inputs = parts[0].cols;
        assert!(parts.iter().all(|p| p.cols == inputs), "parts have the same inputs");
        let values: Vec<f32> = parts.iter().flat_map(|p| decode(*p, dtype)).collect();
        let outputs = values.len() / inputs;
        let bias: Vec<f32> = biases.iter().flat_map(|b| decode(*b, DType::F32)).collect();
        assert!(bias.is_empty() || bias.len() == outputs, "one bias per output");
        Ok(Weights { values, bias: (!bias.is_empty()).then_some(bias), outputs, inputs })
    }

    fn linear_bytes(&self, rows: usize, cols: usize, _dtype: DType) -> u64 {
        (rows * cols * size_of::<f32>()) as u64
    }

    fn vector(&mut self, view: WeightView) -> Result<Vec<f32>, Error> {
        Ok(decode(view, DType::F32))
    }

    fn kv(
        &mut self,
        geometry: KvGeometry,
        pool_blocks: usize,
        copies: usize,
        tier: Option<TierSpec>,
    ) -> Result<Pages, Error> {
        let num_blocks = (1 + copies) * pool_blocks;
        let elements = num_blocks * geometry.block_bytes() / geometry.dtype.bytes();
        let tier = match tier {
            None => None,
            Some(spec) => Some(NaiveTier::new(spec, spec.layout(&geometry)?, geometry, pool_blocks)),
        };
        let (values, tally) = (vec![0.0; elements], NaiveTally::default());
        Ok(Pages { geometry, num_blocks, pool_blocks, values, tier, tally })
    }

    fn digests(
        &mut self,
        spec: DigestSpec,
        geometry: KvGeometry,
        num_blocks: usize,
        _places: Option<usize>,
        gate: Option<&Gate>,
    ) -> Result<DigestTable, Error> {
        Gate::check(gate, spec, &geometry)?;
        spec.check(geometry.page_tokens)?;
        Ok(DigestTable::new(spec, geometry, num_blocks, gate))
    }

    fn selection(&mut self, limits: SelectionLimits) -> Result<(Selections, u64), Error> {
        Ok((Selections::new(limits), 0))
    }

    fn tally_within(&mut self, kv: &mut Pages, _: &SelectionLimits, sets: &WorkingSetSpec) {
        kv.tally.within(sets);
    }

    fn reserve(&mut self, _: HeadShape, _: usize, _: usize, _: usize, _: usize) -> Result<u64, Error> {
        Ok(0)
    }

    fn embed(&mut self, out: &mut Matrix, table: &Weights, tokens: &[u32]) {
        assert_eq!(out.cols, table.inputs, "hidden size");
        out.set_rows(tokens.len());
        for (i, &token) in tokens.iter().enumerate() {
            out.row_mut(i).copy_from_slice(&table.values[token as usize * table.inputs..][..table.inputs]);
        }
    }

    fn select_rows(&mut self, out: &mut Matrix, x: &Matrix, rows: &[u32]) {
        assert_eq!(out.cols, x.cols, "columns");
        out.set_rows(rows.len());
        for (i, &row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(row as usize));
        }
    }

    fn copy_rows(&mut self, out: &mut Matrix, at: usize, x: &Matrix, rows: Range<usize>) {
        assert_eq!(out.cols, x.cols, "columns");
        for (i, row) in rows.enumerate() {
            out.row_mut(at + i).copy_from_slice(x.row(row));
        }
    }

    fn rms_norm(&mut self, out: &mut Matrix, x: &Matrix, weight: &Vec<f32>, eps: f32) {
        assert_eq!((out.cols, weight.len()), (x.cols, x.cols), "columns");
        out.set_rows(x.rows);
        for i in 0..x.rows {
            out.row_mut(i).copy_from_slice(x.row(i));
            normalise(out.row_mut(i), weight, eps);
        }
    }

    fn linear_forward(&mut self, out: &mut Matrix, x: &Matrix, w: &Weights) {
        out.set_rows(x.rows);
        out.values[..x.rows * out.cols].fill(0.0);
        self.linear_add(out, x, w);
    }

    fn linear_add(&mut self, out: &mut Matrix, x: &Matrix, w: &Weights) {
        assert_eq!((x.cols, out.cols, out.rows), (w.inputs, w.outputs, x.rows), "shapes of a product");
        for i in 0..x.rows {
            for n in 0..w.outputs {
                let weights = &w.values[n * w.inputs..][..w.inputs];
                let sum = dot(x.row(i), weights) + w.bias.as_ref().map_or(0.0, |b| b[n]);
                out.row_mut(i)[n] += sum;
            }
        }
    }

    fn swiglu(&mut self, out: &mut Matrix, gate_up: &Matrix) {
        assert_eq!(gate_up.cols, 2 * out.cols, "gate and up");
        out.set_rows(gate_up.rows);
        for i in 0..gate_up.rows {
            let (gate, up) = gate_up.row(i).split_at(out.cols);
            for ((o, &g), &u) in out.row_mut(i).iter_mut().zip(gate).zip(up) {
                *o = g / (1.0 + (-g).exp()) * u;
            }
        }
    }

    fn rope_angles(
        &mut self,
        out: &mut Matrix,
        positions: &[u32],
        inv_freq: &[f32],
        sets: &[u32],
        scale: f32,
    ) {
        let half = out.cols / 2;
        assert_eq!((positions.len(), inv_freq.len() % half), (sets.len(), 0), "a set of frequencies per row");
        out.set_rows(positions.len());
        for (i, (&position, &set)) in positions.iter().zip(sets).enumerate() {
            let (cos, sin) = out.row_mut(i).split_at_mut(half);
            for (c, &frequency) in inv_freq[set as usize * half..][..half].iter().enumerate() {
                let angle = position as f32 * frequency;
                cos[c] = angle.cos() * scale;
                sin[c] = angle.sin() * scale;
            }
        }
    }

    fn balance(&mut self, kv: &mut Pages, batch: &Batch) {
        kv.tally.begin(batch);
        if let Some(tier) = &mut kv.tier {
            tier.balance(batch);
        }
    }

    fn grant(&mut self, kv: &mut Pages, seat: SeatIndex, layer: usize, extents: usize) {
        if let Some(tier) = &mut kv.tier {
            tier.grant(seat, layer, extents);
        }
    }

    fn append(
        &mut self,
        kv: &mut Pages,
        layer: usize,
        qkv: &mut Matrix,
        heads: HeadShape,
        qk_norm: Option<(&Vec<f32>, &Vec<f32>, f32)>,
        angles: &Matrix,
        batch: &Batch,
    ) {
        let KvGeometry { page_tokens, dtype, .. } = kv.geometry;
        batch.check(page_tokens);
        assert_eq!((qkv.cols, angles.cols), (heads.qkv_cols(), heads.head_dim), "columns");
        let d = heads.head_dim;
        if let Some(tier) = &mut kv.tier {
            tier.begin(layer, batch);
        }
        for sequence in batch.sequences {
            let table = batch.block_table(sequence);
            for row in sequence.rows.clone() {
                let row = row as usize;
                let position = batch.positions[row] as usize;
                for (h, head) in qkv.row_mut(row).chunks_exact_mut(d).enumerate() {
                    let is_q = h < heads.q_heads;
                    if h < heads.q_heads + heads.kv_heads {
                        if let Some((q_weight, k_weight, eps)) = qk_norm {
                            normalise(head, if is_q { q_weight } else { k_weight }, eps);
                        }
                        rotate(head, angles.row(row));
                    }
                    if !is_q {
                        let part = (h - heads.q_heads) / heads.kv_heads;
                        let kv_head = (h - heads.q_heads) % heads.kv_heads;
                        let at = kv.slot(layer, table, position, kv_head, part);
                        if position.is_multiple_of(page_tokens) {
                            kv.values[at..][..page_tokens * d].fill(0.0);
                        }
                        for (c, &value) in head.iter().enumerate() {
                            kv.values[at + c] = dtype.round(value);
                        }
                    }
                }
            }
        }
    }

    fn place_digests(&mut self, _digests: &mut DigestTable, _batch: &Batch) {}

    fn digest(&mut self, digests: &mut DigestTable, kv: &mut Pages, layer: usize, batch: &Batch) {
        batch.check(kv.geometry.page_tokens);
        digests.update(kv, layer, batch);
    }

    fn save(&mut self, kv: &mut Pages, layer: usize, batch: &Batch) {
        if let Some(mut tier) = kv.tier.take() {
            tier.save(layer, batch, |block, head| kv.copy(layer, block, head));
            kv.tier = Some(tier);
        }
    }

    fn settle(&mut self, kv: &mut Pages, batch: &Batch) {
        if let Some(tier) = &mut kv.tier {
            tier.settle(batch);
        }
    }

    fn score(
        &mut self,
        selection: &mut Selections,
        digests: &[DigestTable],
        kv: &Pages,
        layer: usize,
        qkv: &Matrix,
        heads: HeadShape,
        batch: &Batch,
    ) {
        selection.score(digests, kv, layer, qkv, heads, batch);
    }

    fn select(
        &mut self,
        selection: &mut Selections,
        digests: &[DigestTable],
        layer: usize,
        heads: HeadShape,
        batch: &Batch,
    ) {
        selection.select(digests, layer, heads, batch);
    }

    fn tally(&mut self, kv: &mut Pages, layer: usize, batch: &Batch, selection: &Selections) {
        let KvGeometry { kv_heads, page_tokens, .. } = kv.geometry;
        kv.tally.add(layer, kv_heads, page_tokens, batch, selection);
    }

    fn resolve(
        &mut self,
        kv: &mut Pages,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) -> usize {
        if let Some(tier) = &mut kv.tier {
            tier.resolve(layer, heads, window, batch, selection);
        }
        1
    }

    fn gather(&mut self, kv: &mut Pages, _wave: usize) {
        if let Some(mut tier) = kv.tier.take() {
            tier.gather(|layer, block, head| kv.copy(layer, block, head));
            kv.tier = Some(tier);
        }
    }

    fn attend(
        &mut self,
        out: &mut Matrix,
        lse: Option<&mut Matrix>,
        kv: &Pages,
        layer: usize,
        qkv: &Matrix,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
        _wave: usize,
    ) {
        attention::attend(out, lse, kv, layer, qkv, heads, window, batch, selection);
    }

    fn cover(
        &mut self,
        inspections: &mut Inspections,
        kv: &mut Pages,
        layer: usize,
        qkv: &Matrix,
        heads: HeadShape,
        batch: &Batch,
        selection: &Selections,
    ) {
        attention::cover(inspections, kv, layer, qkv, heads, batch, selection);
        if let Some(tier) = &mut kv.tier {
            tier.look(inspections, layer, batch, selection);
        }
    }

    fn sample(&mut self, out: &mut SampleOutput, logits: &Matrix, rows: &[SampleRow]) {
        out.clear();
        for row in rows {
            sample(out, logits.row(row.row), row, &mut self.scratch);
        }
    }

    fn release(&mut self, kv: &mut Pages, seat: SeatIndex) {
        kv.tally.release(seat);
        if let Some(tier) = &mut kv.tier {
            tier.release(seat);
        }
    }

    fn park(&mut self, kv: &mut Pages, seat: SeatIndex, _table: &[BlockIndex]) {
        if let Some(tier) = &mut kv.tier {
            tier.park(seat);
        }
    }

    fn digest_state(&self, _digests: &DigestTable) -> DigestState {
        DigestState::default()
    }

    fn digest_loads(&self, _digests: &DigestTable, _seat: SeatIndex) -> u64 {
        0
    }

    fn overlap(&self, kv: &Pages) -> Overlap {
        kv.tally.overlap()
    }

    fn row_tally(&self, kv: &Pages, seat: SeatIndex) -> RowTally {
        kv.tally.row(seat)
    }

    fn working_set(&self, kv: &Pages, seat: SeatIndex) -> WorkingSet {
        kv.tally.working_set(seat)
    }

    fn saved_tokens(&mut self, kv: &mut Pages, seat: SeatIndex) -> usize {
        kv.tier.as_ref().map_or(usize::MAX, |tier| tier.saved_tokens(seat))
    }

    fn tier_state(&self, kv: &Pages) -> Option<TierState> {
        kv.tier.as_ref().map(|tier| tier.state())
    }

    fn seat_counters(&self, kv: &Pages, seat: SeatIndex) -> (SeatCounters, usize) {
        kv.tier.as_ref().map_or_else(Default::default, |tier| tier.counters(seat))
    }

    fn check_tier(&mut self, kv: &Pages, batch: &Batch) {
        if let Some(tier) = &kv.tier {
            tier.check(kv, batch);
        }
    }

    fn read_resident(&mut self, kv: &Pages, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        kv.tier.as_ref().map_or_else(Vec::new, |tier| tier.resident(seat, layer))
    }

    fn write_page(
        &mut self,
        kv: &mut Pages,
        layer: usize,
        block: BlockIndex,
        head: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let dtype = kv.geometry.dtype;
        for (part, values) in [k, v].into_iter().enumerate() {
            assert_eq!(values.len(), kv.geometry.page_tokens * kv.geometry.head_dim, "a whole page");
            let at = kv.at(layer, block, head, part);
            for (slot, &value) in kv.values[at..].iter_mut().zip(values) {
                *slot = dtype.round(value);
            }
        }
    }

    fn read_page(
        &mut self,
        kv: &Pages,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let len = kv.geometry.page_tokens * kv.geometry.head_dim;
        let part = |part| kv.values[kv.at(layer, block, head, part)..][..len].to_vec();
        (part(0), part(1))
    }

    fn read_digests(
        &mut self,
        digests: &DigestTable,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> Vec<f32> {
        digests.values[digests.of_block(layer, block, head)].to_vec()
    }

    fn read_scores(
        &mut self,
        selection: &Selections,
        place: usize,
        head: usize,
        line: usize,
        scores: &mut [f32],
    ) {
        let from = &selection.scores[selection.line(place, head, line)];
        scores.copy_from_slice(&from[..scores.len()]);
    }

    fn write_scores(
        &mut self,
        selection: &mut Selections,
        place: usize,
        head: usize,
        line: usize,
        scores: &[f32],
    ) {
        let at = selection.line(place, head, line);
        selection.scores[at][..scores.len()].copy_from_slice(scores);
    }

    fn read_selection(&mut self, selection: &Selections, place: usize, head: usize) -> Option<Vec<u64>> {
        selection.bits[selection.at(place, head)].clone()
    }

    fn write_selection(&mut self, selection: &mut Selections, place: usize, head: usize, bits: &[u64]) {
        let at = selection.at(place, head);
        selection.bits[at] = Some(bits.to_vec());
        selection.pseudo[at].clear();
    }
}

/// Eight sums side by side, only so that the compiler can use vectors and the oracle is not unbearably slow.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a, b) = (a.chunks(8), b.chunks(8));
    for (a, b) in a.zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

fn normalise(x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), weight.len(), "one weight per channel");
    let mean = dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x *= scale * w;
    }
}

fn rotate(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (cos, sin) = angles.split_at(half);
    for c in 0..half {
        let (a, b) = (head[c], head[c + half]);
        head[c] = a * cos[c] - b * sin[c];
        head[c + half] = b * cos[c] + a * sin[c];
    }
}

#[cfg(test)]
mod tests;
