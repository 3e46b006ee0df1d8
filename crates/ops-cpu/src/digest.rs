//! Digests of partitions: their place, and how they are made.
//!
//! Those of a block lie together as [`DigestLayout`] says, in the type of K or fp8, so that scoring a run of partitions for all
//! heads reads memory in pieces of some KiB. Making them costs less than a hundredth of prefill, so that is plain code.

use half::{bf16, f16};
use ops::cluster::ClusterLayout;
use ops::cluster::{CLUSTER_TOKENS_MAX, Clustering, OrderedCopy};
use ops::places::{DigestState, Places};
use ops::sparse::{DigestKind, DigestLayout, DigestSpec};
use ops::{Batch, BlockIndex, DType, Error, KvGeometry, SeatIndex, SequenceRows};

use crate::fp8;
use crate::gate::Gate;
use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, PerThread, Shared};
use crate::pack::k_per_step;
use crate::pages::{HEAD_DIM_MAX, Kv, Pages};
use crate::pool::Pool;
use crate::simd::Simd;

/// The digests of one kind, of all blocks of a pool.
#[derive(Debug)]
pub struct Digests {
    spec: DigestSpec,
    geometry: KvGeometry,
    num_blocks: usize,
    layout: DigestLayout,
    /// Blocks of a partition, 1 where it is shorter.
    blocks: usize,
    /// In DRAM, by block.
    layers: Vec<Buffer<u8>>,
    /// Those of some blocks once more, by place, where HBM is apart.
    hbm: Option<Hbm>,
    /// What makes them, where weights do.
    gate: Option<Gate>,
    /// Memory of the threads that cluster keys, where digests are clusters.
    clusters: Option<(Isa, PerThread<Clustering>)>,
}

/// Blocks per task of a copy.
const BLOCKS_PER_TASK: usize = 16;

/// Digests in HBM.
#[derive(Debug)]
struct Hbm {
    layers: Vec<Buffer<u8>>,
    places: Places,
    /// Of the step at hand: blocks that come from DRAM, and where to.
    loads: Vec<(BlockIndex, usize)>,
    /// Blocks of them by the seat that named them first. Each seat that reads digests has a place at least.
    loads_of: Vec<(SeatIndex, u64)>,
    loaded_bytes: u64,
}

/// Where digests of a layer are written.
#[derive(Clone, Copy)]
struct Targets {
    dram: Shared<u8>,
    hbm: Option<Shared<u8>>,
}

impl Digests {
    /// Digests for `num_blocks` blocks, those of `places` blocks at a time in an HBM apart from DRAM if that is said; those of a
    /// gate are made at `isa` by `threads`.
    ///
    /// # Errors
    /// Partitions that do not fit pages; a gate that does not fit; memory.
    pub fn new(
        spec: DigestSpec,
        geometry: KvGeometry,
        num_blocks: usize,
        places: Option<usize>,
        gate: Option<&ops::Gate>,
        (isa, threads): (Isa, usize),
    ) -> Result<Self, Error> {
        ops::Gate::check(gate, spec, &geometry)?;
        let gate = gate.filter(|_| matches!(spec.kind, DigestKind::Gate { .. }));
        spec.check(geometry.page_tokens)?;
        let layout = DigestLayout::new(&spec, &geometry);
        let layers = |blocks: usize| {
            let layer = || Buffer::zeroed(blocks.saturating_mul(layout.block_bytes), "digests");
            (0..geometry.num_layers).map(|_| layer()).collect::<Result<Vec<_>, Error>>()
        };
        let hbm = places.map(|count| -> Result<_, Error> {
            let places = Places::new(num_blocks, count);
            Ok(Hbm {
                layers: layers(count)?,
                places,
                loads: Vec::with_capacity(count),
                loads_of: Vec::with_capacity(count),
                loaded_bytes: 0,
            })
        });
        let (layers, hbm) = (layers(num_blocks)?, hbm.transpose()?);
        let gate = gate.map(|gate| Gate::new(isa, gate, spec.partition_tokens, threads)).transpose()?;
        let clusters = match spec.kind {
            DigestKind::Cluster { span_tokens, .. } => {
                let count = span_tokens / spec.partition_tokens;
                let new = || Clustering::new(span_tokens, count, geometry.head_dim);
                Some((isa, PerThread::new(threads, new)))
            }
            _ => None,
        };
        let blocks = spec.partition_tokens.div_ceil(geometry.page_tokens);
        Ok(Digests { spec, geometry, num_blocks, layout, blocks, layers, hbm, gate, clusters })
    }

    /// What they are.
    pub fn spec(&self) -> DigestSpec {
        self.spec
    }

    /// What makes them, where weights do.
    pub(crate) fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Where the parts of a digest lie within a block.
    #[inline(always)]
    pub fn layout(&self) -> &DigestLayout {
        &self.layout
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.geometry.head_dim
    }

    /// Type of what is kept.
    pub fn dtype(&self) -> DType {
        self.geometry.dtype
    }

    /// Where in its [layer](Digests::layer) the digests are among which that of a partition is, and which of them it is for
    /// head 0.
    ///
    /// # Panics
    /// When its block does not exist, or its digests are not in HBM.
    #[inline(always)]
    pub fn block(&self, table: &[BlockIndex], partition: usize) -> (usize, usize) {
        let (block, within) = self.home(table, partition);
        let place = match &self.hbm {
            None => block.at(),
            Some(hbm) => hbm.places.of(block).expect("the digests that a step reads are in HBM"),
        };
        (place * self.layout.block_bytes, within)
    }

    /// The block in which a partition ends, and which of those that end there it is.
    #[inline(always)]
    fn home(&self, table: &[BlockIndex], partition: usize) -> (BlockIndex, usize) {
        // Pages and what divides them are powers of two.
        let within = partition & (self.layout.per_block - 1);
        let block = table[((partition >> self.layout.per_block.trailing_zeros()) + 1) * self.blocks - 1];
        assert!(block.at() < self.num_blocks, "{block:?} of {}", self.num_blocks);
        (block, within)
    }

    /// All digests of a layer that a step may read.
    #[inline(always)]
    pub fn layer(&self, layer: usize) -> &[u8] {
        self.hbm.as_ref().map_or(&self.layers, |hbm| &hbm.layers)[layer].as_slice()
    }

    /// See [`ops::Backend::place_digests`].
    ///
    /// Returns the bytes that came from DRAM, and in how many pieces.
    pub fn place(&mut self, pool: &mut Pool, batch: &Batch) -> (usize, usize) {
        let (block_bytes, page_tokens) = (self.layout.block_bytes, self.geometry.page_tokens);
        let Some(Hbm { layers, places, loads, loads_of, loaded_bytes }) = &mut self.hbm else {
            return (0, 0);
        };
        loads.clear();
        let readers = || batch.sequences.iter().filter(|s| batch.reads_digests(s));
        let blocks_of = |s: &SequenceRows| &batch.block_table(s)[..s.context_tokens().div_ceil(page_tokens)];
        let blocks = readers().flat_map(blocks_of);
        places.hold(blocks.copied(), |block, place| loads.push((block, place)));
        let loads = &*loads;
        loads_of.clear();
        // They come in the order in which blocks were named first.
        let mut rest = loads.as_slice();
        for s in readers() {
            let before = rest.len();
            for block in blocks_of(s) {
                match rest {
                    [] => break,
                    [(next, _), after @ ..] if next == block => rest = after,
                    _ => {}
                }
            }
            if rest.len() < before {
                loads_of.push((s.seat, (before - rest.len()) as u64));
            }
        }
        for (from, to) in self.layers.iter().zip(layers) {
            let (from, to) = (from.as_slice(), Shared(to.as_mut_ptr()));
            pool.run(loads.len().div_ceil(BLOCKS_PER_TASK), &|task, _| {
                for &(block, place) in loads.iter().skip(task * BLOCKS_PER_TASK).take(BLOCKS_PER_TASK) {
                    let from = &from[block.at() * block_bytes..][..block_bytes];
                    // SAFETY: a place of its own for each block, in HBM.
                    unsafe {
                        to.at(place * block_bytes).copy_from_nonoverlapping(from.as_ptr(), block_bytes);
                    }
                }
            });
        }
        let copies = loads.len() * self.layers.len();
        *loaded_bytes += (copies * block_bytes) as u64;
        (copies * block_bytes, copies)
    }

    /// Places in all, those that hold something, and bytes that came from DRAM; zeros where HBM is not apart.
    pub fn places(&self) -> DigestState {
        self.hbm.as_ref().map_or_else(DigestState::default, |hbm| {
            let (places, used) = hbm.places.counts();
            DigestState { places: places as u64, used: used as u64, loaded_bytes: hbm.loaded_bytes }
        })
    }

    /// Bytes that the last step loaded for `seat`.
    pub fn loads(&self, seat: SeatIndex) -> u64 {
        let block_bytes = self.layout.block_bytes * self.layers.len();
        let of_seat = self.hbm.iter().flat_map(|hbm| &hbm.loads_of).filter(|(of, _)| *of == seat);
        of_seat.map(|(_, blocks)| blocks * block_bytes as u64).sum()
    }

    /// The digests of a block and head, without padding of scored values.
    pub fn read(&self, layer: usize, block: BlockIndex, head: usize) -> Vec<f32> {
        let bytes = &self.layers[layer].as_slice()[block.at() * self.layout.block_bytes..];
        (0..self.layout.per_block).flat_map(|within| self.decode(bytes, head, within)).collect()
    }

    /// One digest of the block whose digests are `bytes`.
    fn decode(&self, bytes: &[u8], head: usize, within: usize) -> Vec<f32> {
        let [scored, tag, value, ids] = self.layout.parts(head, within).map(|part| &bytes[part]);
        let (kind, d, dtype) = (self.spec.kind, self.geometry.head_dim, self.geometry.dtype);
        let tag = || f32::from_le_bytes(tag.try_into().expect("a tag is four bytes"));
        let all =
            |part: &[u8]| (0..part.len() / dtype.bytes()).map(|i| dtype.read(part, i)).collect::<Vec<_>>();
        match kind {
            DigestKind::Fp8(_) => {
                scored[..kind.width(d)].iter().map(|&code| fp8::decode(code, tag())).collect()
            }
            DigestKind::Landmark => [&all(scored)[..d], &[tag()]].concat(),
            DigestKind::Cluster { .. } => {
                let size = ClusterLayout::digits(tag() as usize);
                [&all(scored)[..], &all(value), &size, &all(ids)].concat()
            }
            _ => all(scored)[..kind.width(d)].to_vec(),
        }
    }
}

impl Digests {
    /// Where the digests of a layer go.
    fn targets(&mut self, layer: usize) -> Targets {
        let hbm = self.hbm.as_mut().map(|hbm| Shared(hbm.layers[layer].as_mut_ptr()));
        Targets { dram: Shared(self.layers[layer].as_mut_ptr()), hbm }
    }

    /// Writes a digest, of these values, to DRAM, and to HBM if its block has a place there.
    ///
    /// # Safety
    /// `to` is this layer's, and nobody else touches the digest.
    unsafe fn write(&self, to: Targets, table: &[BlockIndex], partition: usize, head: usize, values: &[f32]) {
        let mut bytes = [0; DIGEST_BYTES_MAX];
        let bytes = &mut bytes[..self.layout.digest_bytes()];
        self.encode(values, bytes);
        let (block, within) = self.home(table, partition);
        let place = self.hbm.as_ref().and_then(|hbm| hbm.places.of(block));
        let hbm = to.hbm.zip(place);
        for (to, place) in [(to.dram, block.at())].into_iter().chain(hbm) {
            let mut rest = &*bytes;
            for part in self.layout.parts(head, within) {
                let (from, after) = rest.split_at(part.len());
                // SAFETY: `home` checked that the block exists, and a place lies in HBM; the rest is the caller's promise.
                unsafe {
                    let to = to.at(place * self.layout.block_bytes + part.start);
                    to.copy_from_nonoverlapping(from.as_ptr(), from.len());
                }
                rest = after;
            }
        }
    }

    /// The parts of a digest one after the other, rounded.
    fn encode(&self, values: &[f32], to: &mut [u8]) {
        let (kind, d, dtype) = (self.spec.kind, self.geometry.head_dim, self.geometry.dtype);
        let (scored, rest) = to.split_at_mut(self.layout.scored_bytes);
        let (tag, rest) = rest.split_at_mut(self.layout.tag_bytes);
        match kind {
            DigestKind::Fp8(_) => tag.copy_from_slice(&fp8::encode(scored, values).to_le_bytes()),
            DigestKind::Landmark => {
                store(scored, &values[..d], dtype);
                tag.copy_from_slice(&dtype.round(values[d]).to_le_bytes());
            }
            DigestKind::Cluster { .. } => {
                let layout = ClusterLayout { head_dim: d };
                store(scored, &values[..layout.value_at()], dtype);
                let size = ClusterLayout::size(values[layout.size_at()], values[layout.size_at() + 1]);
                tag.copy_from_slice(&(size as f32).to_le_bytes());
                let (value, ids) = rest.split_at_mut(self.layout.value_bytes);
                store(value, &values[layout.value_at()..layout.size_at()], dtype);
                store(ids, &values[layout.ids_at()..], dtype);
            }
            _ => store(scored, values, dtype),
        }
    }
}

/// Bytes of the widest digest: of one whose two sides are f32, or of a cluster.
const DIGEST_BYTES_MAX: usize = 4 * (2 * HEAD_DIM_MAX + 1 + CLUSTER_TOKENS_MAX);

/// Partitions that the rows of a sequence complete.
fn completed(sequence: &SequenceRows, partition_tokens: usize) -> std::ops::Range<usize> {
    sequence.first_position as usize / partition_tokens..sequence.context_tokens() / partition_tokens
}

/// Makes the digests of the partitions that the rows of `batch` complete.
pub fn digest(pool: &mut Pool, digests: &mut Digests, kv: &mut Kv, layer: usize, batch: &Batch) {
    assert_eq!(*kv.geometry(), digests.geometry, "digests of this pool");
    batch.check(kv.geometry().page_tokens);
    if let DigestKind::Cluster { span_tokens, sink_tokens, copy } = digests.spec.kind {
        return cluster_spans(pool, digests, kv, layer, batch, (span_tokens, sink_tokens, OrderedCopy(copy)));
    }
    let kv = &*kv;
    let length = digests.spec.partition_tokens;
    let num_tasks = batch.sequences.iter().map(|s| completed(s, length).len()).sum();
    if num_tasks == 0 {
        return;
    }
    let to = digests.targets(layer);
    let digests = &*digests;
    pool.run(num_tasks, &|task, thread| {
        let mut task = task;
        for s in batch.sequences {
            let partitions = completed(s, length);
            if task >= partitions.len() {
                task -= partitions.len();
                continue;
            }
            let partition = partitions.start + task;
            let pages = Pages::of(batch, s);
            let positions = partition * length..(partition + 1) * length;
            // SAFETY: the pool says which thread this is.
            let gate = digests.gate().map(|g| (g, unsafe { g.turn_to(positions.clone(), thread) }));
            for head in 0..digests.geometry.kv_heads {
                let mut values = [0.0; 2 * HEAD_DIM_MAX];
                let keys = Keys { kv, layer, pages, head, positions: positions.clone() };
                match gate {
                    Some((gate, angles)) => gate.digest(&keys, angles, &mut values),
                    None => summarise(digests.spec.kind.unrounded(), &keys, &mut values),
                }
                let width = digests.spec.kind.width(digests.geometry.head_dim);
                // SAFETY: the digest belongs to this partition alone; rows of one batch complete a partition of a block once.
                unsafe { digests.write(to, pages.table, partition, head, &values[..width]) };
            }
            return;
        }
    });
}

/// Clusters the spans that the rows of `batch` complete, and copies their pages in the order of clusters.
fn cluster_spans(
    pool: &mut Pool,
    digests: &mut Digests,
    kv: &mut Kv,
    layer: usize,
    batch: &Batch,
    (span_tokens, sink_tokens, copy): (usize, usize, OrderedCopy),
) {
    let kv_heads = digests.geometry.kv_heads;
    let num_tasks: usize = batch.sequences.iter().map(|s| completed(s, span_tokens).len() * kv_heads).sum();
    if num_tasks == 0 {
        return;
    }
    let to = digests.targets(layer);
    let digests = &*digests;
    let pages_to = kv.dram.shared(layer);
    let cache = kv;
    let kv = &*cache;
    let (isa, memory) = digests.clusters.as_ref().expect("clusters have memory");
    pool.run(num_tasks, &|task, thread| {
        let mut task = task;
        for s in batch.sequences {
            let spans = completed(s, span_tokens);
            if task >= spans.len() * kv_heads {
                task -= spans.len() * kv_heads;
                continue;
            }
            let (span, head) = (spans.start + task / kv_heads, task % kv_heads);
            let start = span * span_tokens;
            let positions = start..start + span_tokens;
            let pages = Pages::of(batch, s);
            // SAFETY: the memory of this thread, borrowed for this task.
            let clustering = unsafe { &mut *memory.get(thread) };
            isa.run(ClusterSpan {
                keys: Keys { kv, layer, pages, head, positions },
                sinks: sink_tokens.saturating_sub(start),
                clustering,
            });
            let width = digests.spec.width(digests.geometry.head_dim);
            let mut values = [0.0; CLUSTER_WIDTH_MAX];
            let first = start / digests.spec.partition_tokens;
            for partition in 0..span_tokens / digests.spec.partition_tokens {
                clustering.digest(partition, &mut values[..width]);
                // SAFETY: the digest belongs to this span and head alone: blocks are shared by whole spans, and rows of one batch
                // complete a span once.
                unsafe { digests.write(to, pages.table, first + partition, head, &values[..width]) };
            }
            let KvGeometry { page_tokens, .. } = digests.geometry;
            for (page, tokens) in clustering.order().chunks_exact(page_tokens).enumerate() {
                let block = kv.dram.block_in(Some(copy), pages.table[start / page_tokens + page]);
                // SAFETY: `offset` checked that the page exists. It belongs to this span and head alone, as digests do, and nobody reads
                // copies while digests are made.
                let ordered = unsafe {
                    let page = pages_to.at(kv.dram.offset(block, head));
                    std::slice::from_raw_parts_mut(page, digests.geometry.page_bytes())
                };
                for (slot, &token) in tokens.iter().enumerate() {
                    let position = start + usize::from(token);
                    let from = kv.digest_page(layer, pages, position / page_tokens, head);
                    kv.dram.copy_slot(from, position % page_tokens, ordered, slot);
                }
            }
            return;
        }
    });
    if let Some(tier) = &mut cache.tier {
        tier.sent_copies(num_tasks * span_tokens / digests.geometry.page_tokens);
    }
}

/// Values of a digest of a cluster, at most.
const CLUSTER_WIDTH_MAX: usize = 2 * HEAD_DIM_MAX + 2 + CLUSTER_TOKENS_MAX;

/// Finds the clusters of a span.
struct ClusterSpan<'a> {
    keys: Keys<'a>,
    sinks: usize,
    clustering: &'a mut Clustering,
}

impl Kernel for ClusterSpan<'_> {
    type Output = ();

    /// Plain code, compiled for the instruction set: it has no reduction that may be reordered, so its bits are the same.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let ClusterSpan { keys, sinks, clustering } = self;
        let d = keys.kv.geometry().head_dim;
        let to = clustering.keys_mut();
        keys.each_key(|i, key| to[i * d..(i + 1) * d].copy_from_slice(key));
        clustering.run(sinks);
        keys.each_value(|i, value| clustering.add_value(i, value));
    }
}

/// The digest of `keys`, in f32 and not rounded; not that of a gate.
///
/// Sums run over positions in ascending order, so the digest depends on the keys alone.
pub fn summarise(kind: DigestKind, keys: &Keys, to: &mut [f32; 2 * HEAD_DIM_MAX]) {
    match keys.kv.geometry().dtype {
        DType::F32 => summarise_as(kind, keys, to, |k: &[u8; 4]| f32::from_le_bytes(*k)),
        DType::F16 => summarise_as(kind, keys, to, |k: &[u8; 2]| f16::from_le_bytes(*k).to_f32()),
        DType::Bf16 => summarise_as(kind, keys, to, |k: &[u8; 2]| bf16::from_le_bytes(*k).to_f32()),
    }
}

fn summarise_as<const BYTES: usize>(
    kind: DigestKind,
    keys: &Keys,
    to: &mut [f32; 2 * HEAD_DIM_MAX],
    decode: impl Fn(&[u8; BYTES]) -> f32 + Copy,
) {
    let d = keys.kv.geometry().head_dim;
    let count = keys.positions.len() as f32;
    let (high, rest) = to.split_at_mut(d);
    let low = &mut rest[..d];
    if let DigestKind::Mean | DigestKind::Landmark = kind {
        high.fill(0.0);
        keys.each(decode, |c, k| high[c] += k);
        high.iter_mut().for_each(|sum| *sum /= count);
        if kind == DigestKind::Landmark {
            low[0] = least_cosine(keys, high, decode);
        }
        return;
    }
    high.fill(f32::NEG_INFINITY);
    low.fill(f32::INFINITY);
    keys.each(decode, |c, k| {
        high[c] = high[c].max(k);
        low[c] = low[c].min(k);
    });
    if kind == DigestKind::CuboidMean {
        let mut radius = [0.0; HEAD_DIM_MAX];
        for (h, l) in high.iter_mut().zip(&*low) {
            *h = (*l + *h) / 2.0;
        }
        keys.each(decode, |c, k| radius[c] += (high[c] - k).abs());
        for ((h, l), r) in high.iter_mut().zip(low).zip(&radius) {
            (*h, *l) = (*h + r / count, *h - r / count);
        }
    }
}

/// `min_j cos(k_j, mean)`, with sums over channels in ascending order.
fn least_cosine<const BYTES: usize>(
    keys: &Keys,
    mean: &[f32],
    decode: impl Fn(&[u8; BYTES]) -> f32 + Copy,
) -> f32 {
    let mean_square: f32 = mean.iter().map(|m| m * m).sum();
    let mut least = f32::INFINITY;
    for position in keys.positions.clone() {
        let (mut dot, mut square) = (0.0, 0.0);
        let key = Keys { positions: position..position + 1, ..*keys };
        key.each(decode, |c, k| {
            dot += k * mean[c];
            square += k * k;
        });
        least = least.min(dot / (square * mean_square).sqrt().max(f32::MIN_POSITIVE));
    }
    least
}

/// Keys of a head at some positions.
pub struct Keys<'a> {
    /// The pool.
    pub kv: &'a Kv,
    /// Layer.
    pub layer: usize,
    /// Of the sequence.
    pub pages: Pages<'a>,
    /// KV head.
    pub head: usize,
    /// Positions in the sequence.
    pub positions: std::ops::Range<usize>,
}

impl Keys<'_> {
    /// Visits number and channels of every key, in order of positions.
    pub(crate) fn each_key(&self, mut visit: impl FnMut(usize, &[f32])) {
        let mut values = [0.0; HEAD_DIM_MAX];
        for (i, position) in self.positions.clone().enumerate() {
            let key = Keys { positions: position..position + 1, ..*self };
            match self.kv.geometry().dtype {
                DType::F32 => key.each(|k: &[u8; 4]| f32::from_le_bytes(*k), |c, k| values[c] = k),
                DType::F16 => key.each(|k: &[u8; 2]| f16::from_le_bytes(*k).to_f32(), |c, k| values[c] = k),
                DType::Bf16 => key.each(|k: &[u8; 2]| bf16::from_le_bytes(*k).to_f32(), |c, k| values[c] = k),
            }
            visit(i, &values[..self.kv.geometry().head_dim]);
        }
    }

    /// Visits number and channels of the value of every position, in order.
    fn each_value(&self, mut visit: impl FnMut(usize, &[f32])) {
        let KvGeometry { head_dim, page_tokens, dtype, .. } = *self.kv.geometry();
        let mut values = [0.0; HEAD_DIM_MAX];
        for (i, position) in self.positions.clone().enumerate() {
            let page = self.kv.digest_page(self.layer, self.pages, position / page_tokens, self.head);
            for (c, value) in values[..head_dim].iter_mut().enumerate() {
                *value = dtype.read(page, self.kv.dram.value_element(position % page_tokens, c));
            }
            visit(i, &values[..head_dim]);
        }
    }

    /// Visits channel and value of every key, in order of positions.
    fn each<const BYTES: usize>(
        &self,
        decode: impl Fn(&[u8; BYTES]) -> f32,
        mut visit: impl FnMut(usize, f32),
    ) {
        let KvGeometry { head_dim, page_tokens, dtype, .. } = *self.kv.geometry();
        let per_step = k_per_step(dtype);
        for position in self.positions.clone() {
            let page = self.kv.digest_page(self.layer, self.pages, position / page_tokens, self.head);
            let (keys, _) = page.as_chunks::<BYTES>();
            let slot = position % page_tokens;
            for step in 0..head_dim / per_step {
                let first = self.kv.dram.key_element(slot, step * per_step);
                for (i, key) in keys[first..first + per_step].iter().enumerate() {
                    visit(step * per_step + i, decode(key));
                }
            }
        }
    }
}

/// Rounds `values` to `dtype`.
fn store(bytes: &mut [u8], values: &[f32], dtype: DType) {
    for (i, &value) in values.iter().enumerate() {
        match dtype {
            DType::F32 => bytes[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes()),
            DType::F16 => bytes[2 * i..2 * i + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::Bf16 => bytes[2 * i..2 * i + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
}
