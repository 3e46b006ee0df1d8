//! The CPU backend: SIMD and threads.
//!
//! In reading order: [`Isa`] (which instructions), `simd` (vectors of 16 lanes), `tile` (the one inner loop), `pack`
//! and `gemm` (matrix products), `pages`, `attention`, `split` and `merge` (the KV cache), `digest`, `score`,
//! `selection`, `select` and `cluster` (which part of it is attended to), `tally`, `working_set` and `coverage` (what that comes to, and what it leaves out), `tier`, `saver` and `link` (HBM and DRAM), `rows` (everything that treats a
//! row alone), `pool` (threads), `memory`; [`ceiling`] and [`bench`](mod@bench) measure.
//!
//! Invariant: at one instruction set, a row's bits depend on nothing but the row: not on the batch, the number of
//! threads, the chunking of a prompt, or how work is cut into tasks. Outputs are vectorised, reductions are not:
//! every sum over k runs in ascending order, every split of attention is merged in ascending order. Only scores of digests
//! add across lanes, always in one order.
//!
//! Invariant: this crate and one mapping of `model` are the only homes of `unsafe`; this one has no dependency above `ops`.

mod attention;
pub mod bench;
pub mod ceiling;
mod cluster;
mod coverage;
mod digest;
mod fp8;
mod gate;
mod gemm;
mod isa;
mod link;
mod memory;
mod merge;
mod pack;
mod pages;
mod pool;
mod rows;
mod sampling;
mod saver;
mod score;
mod select;
mod selection;
mod simd;
mod split;
mod tally;
mod tensor;
mod tier;
mod tile;
mod view;
mod working_set;

use std::ops::Range;

use ops::coverage::Inspections;
use ops::places::DigestState;
use ops::residency::SeatCounters;
use ops::sample::{SampleOutput, SampleRow};
use ops::sparse::{DigestSpec, SelectionLimits};
use ops::tally::{Overlap, RowTally, WorkingSet, WorkingSetSpec};
use ops::tier::{TierSpec, TierState};
use ops::{
    Backend, Batch, BlockIndex, DType, DeviceInfo, Error, HeadShape, KvGeometry, SeatIndex, Tensor,
    WeightView,
};

pub use digest::Digests;
pub use isa::Isa;
pub use pack::{Linear, Vector};
pub use pages::Kv;
pub use pool::{Pool, THREADS_MAX};
pub use selection::Selections;
use tally::Tally;
pub use tensor::CpuTensor;

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Threads that run kernels, the calling one among them; `None` takes as many as the process may use.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes the best of the machine.
    pub isa: Option<Isa>,
}

/// The CPU as a device.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    pool: Pool,
    products: gemm::Scratch,
    attention: attention::Scratch,
    sampling: sampling::Scratch,
    /// Bytes of digests that came to HBM for the step at hand, and in how many pieces: what the link takes for them is had from the
    /// tier, which [`Backend::place_digests`] does not see.
    placed: (usize, usize),
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the machine lacks the instruction set asked for, threads or memory.
    pub fn new(options: CpuOptions) -> Result<Self, Error> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.available() {
            let best = Isa::detect();
            return Err(Error::Unsupported(format!("this machine has no {isa}; the best it has is {best}")));
        }
        let threads = match options.threads {
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        Ok(CpuBackend {
            isa,
            pool: Pool::new(threads)?,
            products: gemm::Scratch::new(threads)?,
            attention: attention::Scratch::new(threads)?,
            sampling: sampling::Scratch::new(threads),
            placed: (0, 0),
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Linear = Linear;
    type Vector = Vector;
    type Kv = Kv;
    type Digests = Digests;
    type Selection = Selections;

    fn info(&self) -> DeviceInfo {
        DeviceInfo { kind: "cpu", isa: self.isa.name().to_owned(), threads: self.pool.threads() }
    }

    fn tensor(&mut self, rows_max: usize, cols: usize) -> Result<CpuTensor, Error> {
        CpuTensor::new(rows_max, cols)
    }

    fn upload(&mut self, tensor: &mut CpuTensor, values: &[f32]) {
        let cols = tensor.cols();
        assert!(cols > 0 && values.len().is_multiple_of(cols), "whole rows");
        tensor.set_rows(values.len() / cols);
        for (row, values) in values.chunks_exact(cols).enumerate() {
            tensor.row_mut(row).copy_from_slice(values);
        }
    }

    fn row<'a>(&'a mut self, tensor: &'a CpuTensor, row: usize) -> &'a [f32] {
        tensor.row(row)
    }

    fn linear(&mut self, parts: &[WeightView], biases: &[WeightView], dtype: DType) -> Result<Linear, Error> {
        Linear::pack(&mut self.pool, parts, biases, dtype)
    }

    fn linear_bytes(&self, rows: usize, cols: usize, dtype: DType) -> u64 {
        Linear::bytes(rows, cols, dtype)
    }

    fn vector(&mut self, view: WeightView) -> Result<Vector, Error> {
        Vector::new(view)
    }

    fn kv(
        &mut self,
        geometry: KvGeometry,
        num_blocks: usize,
        copies: usize,
        tier: Option<TierSpec>,
    ) -> Result<Kv, Error> {
        Kv::new(geometry, num_blocks, copies, tier)
    }

    fn digests(
        &mut self,
        spec: DigestSpec,
        geometry: KvGeometry,
        num_blocks: usize,
        places: Option<usize>,
        gate: Option<&ops::Gate>,
    ) -> Result<Digests, Error> {
        Digests::new(spec, geometry, num_blocks, places, gate, (self.isa, self.pool.threads()))
    }

    fn selection(&mut self, limits: SelectionLimits) -> Result<(Selections, u64), Error> {
        let mut selection = Selections::new(limits, self.pool.threads())?;
        // Each row that attends to a selection is a piece of work of its own, beside the rest of its sequence.
        self.attention.reserve_plans(2 * limits.rows_max, limits.heads);
        let bytes = selection.bytes();
        Ok((selection, bytes))
    }

    fn tally_within(&mut self, kv: &mut Kv, limits: &SelectionLimits, sets: &WorkingSetSpec) {
        kv.tally = Some(Tally::new(limits, kv.geometry().num_layers, sets));
    }

    fn reserve(
        &mut self,
        heads: HeadShape,
        rows_max: usize,
        sequences_max: usize,
        context_max: usize,
        cols_max: usize,
    ) -> Result<u64, Error> {
        self.sampling.reserve(sequences_max);
        let products = self.products.reserve(rows_max, cols_max)?;
        Ok(products + self.attention.reserve(heads, rows_max, sequences_max, context_max)?)
    }

    fn embed(&mut self, out: &mut CpuTensor, table: &Linear, tokens: &[u32]) {
        rows::embed(&mut self.pool, out, table, tokens);
    }

    fn select_rows(&mut self, out: &mut CpuTensor, x: &CpuTensor, rows: &[u32]) {
        rows::select_rows(&mut self.pool, out, x, rows);
    }

    fn copy_rows(&mut self, out: &mut CpuTensor, at: usize, x: &CpuTensor, rows: Range<usize>) {
        rows::copy_rows(&mut self.pool, out, at, x, rows);
    }

    fn rms_norm(&mut self, out: &mut CpuTensor, x: &CpuTensor, weight: &Vector, eps: f32) {
        rows::rms_norm(self.isa, &mut self.pool, out, x, weight, eps);
    }

    fn linear_forward(&mut self, out: &mut CpuTensor, x: &CpuTensor, w: &Linear) {
        gemm::product(self.isa, &mut self.pool, &mut self.products, out, x, w, gemm::Store::Set);
    }

    fn linear_add(&mut self, out: &mut CpuTensor, x: &CpuTensor, w: &Linear) {
        gemm::product(self.isa, &mut self.pool, &mut self.products, out, x, w, gemm::Store::Add);
    }

    fn swiglu(&mut self, out: &mut CpuTensor, gate_up: &CpuTensor) {
        rows::swiglu(self.isa, &mut self.pool, out, gate_up);
    }

    fn rope_angles(
        &mut self,
        out: &mut CpuTensor,
        positions: &[u32],
        inv_freq: &[f32],
        sets: &[u32],
        scale: f32,
    ) {
        rows::rope_angles(&mut self.pool, out, positions, inv_freq, sets, scale);
    }

    fn balance(&mut self, kv: &mut Kv, batch: &Batch) {
        if let Some(tally) = &mut kv.tally {
            tally.begin(batch);
        }
        if let Some(tier) = &mut kv.tier {
            tier.balance(batch);
        }
    }

    fn grant(&mut self, kv: &mut Kv, seat: SeatIndex, layer: usize, extents: usize) {
        if let Some(tier) = &mut kv.tier {
            tier.grant(seat, layer, extents);
        }
    }

    fn append(
        &mut self,
        kv: &mut Kv,
        layer: usize,
        qkv: &mut CpuTensor,
        heads: HeadShape,
        qk_norm: Option<(&Vector, &Vector, f32)>,
        angles: &CpuTensor,
        batch: &Batch,
    ) {
        let (bytes, copies) = std::mem::take(&mut self.placed);
        if let Some(tier) = kv.tier.as_mut().filter(|_| bytes > 0) {
            tier.fetched_digests(bytes, copies);
        }
        pages::append(self.isa, &mut self.pool, kv, layer, qkv, heads, qk_norm, angles, batch);
    }

    fn place_digests(&mut self, digests: &mut Digests, batch: &Batch) {
        let (bytes, copies) = digests.place(&mut self.pool, batch);
        self.placed = (self.placed.0 + bytes, self.placed.1 + copies);
    }

    fn digest(&mut self, digests: &mut Digests, kv: &mut Kv, layer: usize, batch: &Batch) {
        digest::digest(&mut self.pool, digests, kv, layer, batch);
    }

    fn save(&mut self, kv: &mut Kv, layer: usize, batch: &Batch) {
        if let Some(tier) = &mut kv.tier {
            tier.save(&mut self.pool, &mut kv.dram, layer, batch);
        }
    }

    fn settle(&mut self, kv: &mut Kv, batch: &Batch) {
        if let Some(tier) = &mut kv.tier {
            tier.settle(batch);
        }
    }

    fn score(
        &mut self,
        selection: &mut Selections,
        digests: &[Digests],
        kv: &Kv,
        layer: usize,
        qkv: &CpuTensor,
        heads: HeadShape,
        batch: &Batch,
    ) {
        let (isa, pool) = (self.isa, &mut self.pool);
        score::score(isa, pool, selection, digests, kv, layer, qkv, heads, batch);
    }

    fn select(
        &mut self,
        selection: &mut Selections,
        digests: &[Digests],
        layer: usize,
        heads: HeadShape,
        batch: &Batch,
    ) {
        select::select(self.isa, &mut self.pool, selection, digests, layer, heads, batch);
    }

    fn tally(&mut self, kv: &mut Kv, layer: usize, batch: &Batch, selection: &Selections) {
        if let Some(tally) = &mut kv.tally {
            tally.add(layer, batch, selection);
        }
    }

    fn resolve(
        &mut self,
        kv: &mut Kv,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
    ) -> usize {
        kv.tier.as_mut().map_or(1, |tier| tier.resolve(layer, heads, window, batch, selection))
    }

    fn gather(&mut self, kv: &mut Kv, wave: usize) {
        if let Some(tier) = &mut kv.tier {
            tier.gather(&mut self.pool, &kv.dram, wave);
        }
    }

    fn attend(
        &mut self,
        out: &mut CpuTensor,
        lse: Option<&mut CpuTensor>,
        kv: &Kv,
        layer: usize,
        qkv: &CpuTensor,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Selections>,
        wave: usize,
    ) {
        let (isa, pool, scratch) = (self.isa, &mut self.pool, &mut self.attention);
        attention::attend(
            isa, pool, scratch, out, lse, kv, layer, qkv, heads, window, batch, selection, wave,
        );
    }

    fn cover(
        &mut self,
        inspections: &mut Inspections,
        kv: &mut Kv,
        layer: usize,
        qkv: &CpuTensor,
        heads: HeadShape,
        batch: &Batch,
        selection: &Selections,
    ) {
        let (isa, pool, scratch) = (self.isa, &mut self.pool, &mut self.attention);
        coverage::cover(isa, pool, scratch, inspections, kv, layer, qkv, heads, batch, selection);
    }

    fn sample(&mut self, out: &mut SampleOutput, logits: &CpuTensor, rows: &[SampleRow]) {
        sampling::sample_rows(&mut self.pool, &mut self.sampling, out, logits, rows);
    }

    fn release(&mut self, kv: &mut Kv, seat: SeatIndex) {
        if let Some(tally) = &mut kv.tally {
            tally.release(seat);
        }
        if let Some(tier) = &mut kv.tier {
            tier.release(seat);
        }
    }

    fn park(&mut self, kv: &mut Kv, seat: SeatIndex, table: &[BlockIndex]) {
        if let Some(tier) = &mut kv.tier {
            tier.park(&mut kv.dram, seat, table);
        }
    }

    fn digest_state(&self, digests: &Digests) -> DigestState {
        digests.places()
    }

    fn digest_loads(&self, digests: &Digests, seat: SeatIndex) -> u64 {
        digests.loads(seat)
    }

    fn overlap(&self, kv: &Kv) -> Overlap {
        kv.tally.as_ref().map_or_else(Overlap::default, Tally::overlap)
    }

    fn row_tally(&self, kv: &Kv, seat: SeatIndex) -> RowTally {
        kv.tally.as_ref().map_or_else(RowTally::default, |tally| tally.row(seat))
    }

    fn working_set(&self, kv: &Kv, seat: SeatIndex) -> WorkingSet {
        kv.tally.as_ref().map_or_else(WorkingSet::default, |tally| tally.working_set(seat))
    }

    fn saved_tokens(&mut self, kv: &mut Kv, seat: SeatIndex) -> usize {
        kv.tier.as_mut().map_or(usize::MAX, |tier| tier.saved_tokens(seat))
    }

    fn tier_state(&self, kv: &Kv) -> Option<TierState> {
        kv.tier.as_ref().map(|tier| tier.state())
    }

    fn seat_counters(&self, kv: &Kv, seat: SeatIndex) -> (SeatCounters, usize) {
        kv.tier.as_ref().map_or_else(Default::default, |tier| tier.counters(seat))
    }

    fn check_tier(&mut self, kv: &Kv, batch: &Batch) {
        if let Some(tier) = &kv.tier {
            tier.check(&kv.dram, batch);
        }
    }

    fn read_resident(&mut self, kv: &Kv, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        kv.tier.as_ref().map_or_else(Vec::new, |tier| tier.resident(seat, layer))
    }

    fn write_page(
        &mut self,
        kv: &mut Kv,
        layer: usize,
        block: BlockIndex,
        head: usize,
        k: &[f32],
        v: &[f32],
    ) {
        kv.dram.write_page(layer, block, head, k, v);
    }

    fn read_page(&mut self, kv: &Kv, layer: usize, block: BlockIndex, head: usize) -> (Vec<f32>, Vec<f32>) {
        kv.dram.read_page(layer, block, head)
    }

    fn read_digests(&mut self, digests: &Digests, layer: usize, block: BlockIndex, head: usize) -> Vec<f32> {
        digests.read(layer, block, head)
    }

    fn read_scores(
        &mut self,
        selection: &Selections,
        place: usize,
        head: usize,
        line: usize,
        scores: &mut [f32],
    ) {
        selection.read_scores(place, head, line, scores);
    }

    fn write_scores(
        &mut self,
        selection: &mut Selections,
        place: usize,
        head: usize,
        line: usize,
        scores: &[f32],
    ) {
        selection.write_scores(place, head, line, scores);
    }

    fn read_selection(&mut self, selection: &Selections, place: usize, head: usize) -> Option<Vec<u64>> {
        selection.get(place, head).map(|selected| selected.slots.to_vec())
    }

    fn write_selection(&mut self, selection: &mut Selections, place: usize, head: usize, bits: &[u64]) {
        selection.write(place, head, bits);
    }
}
