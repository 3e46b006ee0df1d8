//! Where a step goes: a device that times each of its operations.

use std::ops::Range;
use std::time::{Duration, Instant};

use ops::coverage::Inspections;
use ops::places::DigestState;
use ops::residency::SeatCounters;
use ops::sample::{SampleOutput, SampleRow};
use ops::sparse::{DigestSpec, SelectionLimits};
use ops::tally::{Overlap, RowTally, WorkingSet, WorkingSetSpec};
use ops::tier::{TierSpec, TierState};
use ops::{
    Backend, Batch, BlockIndex, DType, DeviceInfo, Error, Gate, HeadShape, KvGeometry, SeatIndex, Tensor,
    WeightView,
};

/// One kind of operation, as often as it ran since [`Profiled::start`].
pub struct Entry {
    /// What it is, with the shape of its weights where it has some.
    pub name: &'static str,
    /// Columns of output and input of a product; zeros for other operations.
    pub shape: (usize, usize),
    /// How often it ran.
    pub calls: usize,
    /// All of them together.
    pub time: Duration,
}

/// `B`, timed. Operations of the CPU end when they return; those of a device that queues would need its own clock.
pub struct Profiled<B> {
    inner: B,
    entries: Vec<Entry>,
}

impl<B> Profiled<B> {
    /// Times `inner`.
    pub fn new(inner: B) -> Self {
        Profiled { inner, entries: Vec::new() }
    }

    /// Forgets what ran so far.
    pub fn start(&mut self) {
        self.entries.clear();
    }

    /// What ran since the start, longest first.
    pub fn take(&mut self) -> Vec<Entry> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_by_key(|e| std::cmp::Reverse(e.time));
        entries
    }

    fn timed<T>(&mut self, name: &'static str, shape: (usize, usize), run: impl FnOnce(&mut B) -> T) -> T {
        let start = Instant::now();
        let result = run(&mut self.inner);
        let time = start.elapsed();
        match self.entries.iter_mut().find(|e| e.name == name && e.shape == shape) {
            Some(entry) => (entry.calls, entry.time) = (entry.calls + 1, entry.time + time),
            None => self.entries.push(Entry { name, shape, calls: 1, time }),
        }
        result
    }
}

impl<B: Backend> Backend for Profiled<B> {
    type Tensor = B::Tensor;
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Kv = B::Kv;
    type Digests = B::Digests;
    type Selection = B::Selection;

    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn tensor(&mut self, rows_max: usize, cols: usize) -> Result<B::Tensor, Error> {
        self.inner.tensor(rows_max, cols)
    }

    fn upload(&mut self, tensor: &mut B::Tensor, values: &[f32]) {
        self.inner.upload(tensor, values);
    }

    fn row<'a>(&'a mut self, tensor: &'a B::Tensor, row: usize) -> &'a [f32] {
        self.inner.row(tensor, row)
    }

    fn linear(
        &mut self,
        parts: &[WeightView],
        biases: &[WeightView],
        dtype: DType,
    ) -> Result<B::Linear, Error> {
        self.inner.linear(parts, biases, dtype)
    }

    fn linear_bytes(&self, rows: usize, cols: usize, dtype: DType) -> u64 {
        self.inner.linear_bytes(rows, cols, dtype)
    }

    fn vector(&mut self, view: WeightView) -> Result<B::Vector, Error> {
        self.inner.vector(view)
    }

    fn kv(
        &mut self,
        geometry: KvGeometry,
        num_blocks: usize,
        copies: usize,
        tier: Option<TierSpec>,
    ) -> Result<B::Kv, Error> {
        self.inner.kv(geometry, num_blocks, copies, tier)
    }

    fn digests(
        &mut self,
        spec: DigestSpec,
        geometry: KvGeometry,
        num_blocks: usize,
        places: Option<usize>,
        gate: Option<&Gate>,
    ) -> Result<B::Digests, Error> {
        self.inner.digests(spec, geometry, num_blocks, places, gate)
    }

    fn selection(&mut self, limits: SelectionLimits) -> Result<(B::Selection, u64), Error> {
        self.inner.selection(limits)
    }

    fn tally_within(&mut self, kv: &mut B::Kv, limits: &SelectionLimits, sets: &WorkingSetSpec) {
        self.inner.tally_within(kv, limits, sets);
    }

    fn reserve(
        &mut self,
        heads: HeadShape,
        rows_max: usize,
        sequences_max: usize,
        context_max: usize,
        cols_max: usize,
    ) -> Result<u64, Error> {
        self.inner.reserve(heads, rows_max, sequences_max, context_max, cols_max)
    }

    fn embed(&mut self, out: &mut B::Tensor, table: &B::Linear, tokens: &[u32]) {
        self.timed("embed", (0, 0), |b| b.embed(out, table, tokens));
    }

    fn select_rows(&mut self, out: &mut B::Tensor, x: &B::Tensor, rows: &[u32]) {
        self.timed("select_rows", (0, 0), |b| b.select_rows(out, x, rows));
    }

    fn rms_norm(&mut self, out: &mut B::Tensor, x: &B::Tensor, weight: &B::Vector, eps: f32) {
        self.timed("rms_norm", (0, 0), |b| b.rms_norm(out, x, weight, eps));
    }

    fn linear_forward(&mut self, out: &mut B::Tensor, x: &B::Tensor, w: &B::Linear) {
        self.timed("linear", (out.cols(), x.cols()), |b| b.linear_forward(out, x, w));
    }

    fn linear_add(&mut self, out: &mut B::Tensor, x: &B::Tensor, w: &B::Linear) {
        self.timed("linear_add", (out.cols(), x.cols()), |b| b.linear_add(out, x, w));
    }

    fn swiglu(&mut self, out: &mut B::Tensor, gate_up: &B::Tensor) {
        self.timed("swiglu", (0, 0), |b| b.swiglu(out, gate_up));
    }

    fn rope_angles(
        &mut self,
        out: &mut B::Tensor,
        positions: &[u32],
        inv_freq: &[f32],
        sets: &[u32],
        scale: f32,
    ) {
        self.timed("rope_angles", (0, 0), |b| b.rope_angles(out, positions, inv_freq, sets, scale));
    }

    fn append(
        &mut self,
        kv: &mut B::Kv,
        layer: usize,
        qkv: &mut B::Tensor,
        heads: HeadShape,
        qk_norm: Option<(&B::Vector, &B::Vector, f32)>,
        angles: &B::Tensor,
        batch: &Batch,
    ) {
        self.timed("append", (0, 0), |b| b.append(kv, layer, qkv, heads, qk_norm, angles, batch));
    }

    fn place_digests(&mut self, digests: &mut B::Digests, batch: &Batch) {
        self.timed("place digests", (0, 0), |b| b.place_digests(digests, batch));
    }

    fn digest(&mut self, digests: &mut B::Digests, kv: &mut B::Kv, layer: usize, batch: &Batch) {
        self.timed("digest", (0, 0), |b| b.digest(digests, kv, layer, batch));
    }

    fn copy_rows(&mut self, out: &mut B::Tensor, at: usize, x: &B::Tensor, rows: Range<usize>) {
        self.timed("copy rows", (0, 0), |b| b.copy_rows(out, at, x, rows));
    }

    fn grant(&mut self, kv: &mut B::Kv, seat: SeatIndex, layer: usize, extents: usize) {
        self.inner.grant(kv, seat, layer, extents);
    }

    fn settle(&mut self, kv: &mut B::Kv, batch: &Batch) {
        self.inner.settle(kv, batch);
    }

    fn score(
        &mut self,
        selection: &mut B::Selection,
        digests: &[B::Digests],
        kv: &B::Kv,
        layer: usize,
        qkv: &B::Tensor,
        heads: HeadShape,
        batch: &Batch,
    ) {
        self.timed("score", (0, 0), |b| b.score(selection, digests, kv, layer, qkv, heads, batch));
    }

    fn select(
        &mut self,
        selection: &mut B::Selection,
        digests: &[B::Digests],
        layer: usize,
        heads: HeadShape,
        batch: &Batch,
    ) {
        self.timed("select", (0, 0), |b| b.select(selection, digests, layer, heads, batch));
    }

    fn tally(&mut self, kv: &mut B::Kv, layer: usize, batch: &Batch, selection: &B::Selection) {
        self.timed("tally", (0, 0), |b| b.tally(kv, layer, batch, selection));
    }

    fn balance(&mut self, kv: &mut B::Kv, batch: &Batch) {
        self.timed("balance", (0, 0), |b| b.balance(kv, batch));
    }

    fn save(&mut self, kv: &mut B::Kv, layer: usize, batch: &Batch) {
        self.timed("save", (0, 0), |b| b.save(kv, layer, batch));
    }

    fn resolve(
        &mut self,
        kv: &mut B::Kv,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&B::Selection>,
    ) -> usize {
        self.timed("resolve", (0, 0), |b| b.resolve(kv, layer, heads, window, batch, selection))
    }

    fn gather(&mut self, kv: &mut B::Kv, wave: usize) {
        self.timed("gather", (0, 0), |b| b.gather(kv, wave));
    }

    fn attend(
        &mut self,
        out: &mut B::Tensor,
        lse: Option<&mut B::Tensor>,
        kv: &B::Kv,
        layer: usize,
        qkv: &B::Tensor,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&B::Selection>,
        wave: usize,
    ) {
        self.timed("attend", (0, 0), |b| {
            b.attend(out, lse, kv, layer, qkv, heads, window, batch, selection, wave);
        });
    }

    fn cover(
        &mut self,
        inspections: &mut Inspections,
        kv: &mut B::Kv,
        layer: usize,
        qkv: &B::Tensor,
        heads: HeadShape,
        batch: &Batch,
        selection: &B::Selection,
    ) {
        self.timed("cover", (0, 0), |b| b.cover(inspections, kv, layer, qkv, heads, batch, selection));
    }

    fn sample(&mut self, out: &mut SampleOutput, logits: &B::Tensor, rows: &[SampleRow]) {
        self.timed("sample", (0, 0), |b| b.sample(out, logits, rows));
    }

    fn release(&mut self, kv: &mut B::Kv, seat: SeatIndex) {
        self.inner.release(kv, seat);
    }

    fn park(&mut self, kv: &mut B::Kv, seat: SeatIndex, table: &[BlockIndex]) {
        self.inner.park(kv, seat, table);
    }

    fn digest_state(&self, digests: &B::Digests) -> DigestState {
        self.inner.digest_state(digests)
    }

    fn digest_loads(&self, digests: &B::Digests, seat: SeatIndex) -> u64 {
        self.inner.digest_loads(digests, seat)
    }

    fn overlap(&self, kv: &B::Kv) -> Overlap {
        self.inner.overlap(kv)
    }

    fn row_tally(&self, kv: &B::Kv, seat: SeatIndex) -> RowTally {
        self.inner.row_tally(kv, seat)
    }

    fn working_set(&self, kv: &B::Kv, seat: SeatIndex) -> WorkingSet {
        self.inner.working_set(kv, seat)
    }

    fn saved_tokens(&mut self, kv: &mut B::Kv, seat: SeatIndex) -> usize {
        self.inner.saved_tokens(kv, seat)
    }

    fn tier_state(&self, kv: &B::Kv) -> Option<TierState> {
        self.inner.tier_state(kv)
    }

    fn seat_counters(&self, kv: &B::Kv, seat: SeatIndex) -> (SeatCounters, usize) {
        self.inner.seat_counters(kv, seat)
    }

    fn check_tier(&mut self, kv: &B::Kv, batch: &Batch) {
        self.inner.check_tier(kv, batch);
    }

    fn read_resident(&mut self, kv: &B::Kv, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)> {
        self.inner.read_resident(kv, seat, layer)
    }

    fn write_page(
        &mut self,
        kv: &mut B::Kv,
        layer: usize,
        block: BlockIndex,
        head: usize,
        k: &[f32],
        v: &[f32],
    ) {
        self.inner.write_page(kv, layer, block, head, k, v);
    }

    fn read_page(
        &mut self,
        kv: &B::Kv,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        self.inner.read_page(kv, layer, block, head)
    }

    fn read_digests(
        &mut self,
        digests: &B::Digests,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> Vec<f32> {
        self.inner.read_digests(digests, layer, block, head)
    }

    fn read_scores(
        &mut self,
        selection: &B::Selection,
        place: usize,
        head: usize,
        line: usize,
        scores: &mut [f32],
    ) {
        self.inner.read_scores(selection, place, head, line, scores);
    }

    fn write_scores(
        &mut self,
        selection: &mut B::Selection,
        place: usize,
        head: usize,
        line: usize,
        scores: &[f32],
    ) {
        self.inner.write_scores(selection, place, head, line, scores);
    }

    fn read_selection(&mut self, selection: &B::Selection, place: usize, head: usize) -> Option<Vec<u64>> {
        self.inner.read_selection(selection, place, head)
    }

    fn write_selection(&mut self, selection: &mut B::Selection, place: usize, head: usize, bits: &[u64]) {
        self.inner.write_selection(selection, place, head, bits);
    }
}
