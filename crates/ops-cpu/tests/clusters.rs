//! Clusters of keys: what must be true of them whatever the formula.

use ops::cluster::{ClusterLayout, NO_CLUSTER, OrderedCopy};
use ops::conformance::{assert_close, rows_of};
use ops::sparse::{
    Always, Attention, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, SelectionLimits,
};
use ops::{Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, Random, SeatIndex, SequenceRows};
use sparseserve_ops_cpu::{CpuBackend, CpuOptions, Isa};

const SEED: u64 = 41;
const HEADS: HeadShape = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 48 };
const PAGE: usize = 16;
const CONTEXT: usize = 1000;

struct World {
    backend: CpuBackend,
    kv: <CpuBackend as Backend>::Kv,
    digests: Vec<<CpuBackend as Backend>::Digests>,
    table: Vec<BlockIndex>,
    qkv: <CpuBackend as Backend>::Tensor,
    span: usize,
    partition: usize,
}

fn rows(first: usize, count: usize, prompt: usize, attention: Attention) -> SequenceRows {
    SequenceRows {
        rows: 0..count as u32,
        first_position: first as u32,
        prompt_len: prompt as u32,
        blocks: 0..(first + count).div_ceil(PAGE) as u32,
        attention,
        seat: SeatIndex(0),
        quota: 0,
    }
}

impl World {
    /// A context of random tokens whose digests are made in chunks of at most `chunk` tokens.
    fn new(isa: Isa, dtype: DType, span: usize, partition: usize, chunk: usize, threads: usize) -> Self {
        let HeadShape { kv_heads, head_dim, .. } = HEADS;
        let mut backend =
            CpuBackend::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).expect("a backend");
        let geometry = KvGeometry { num_layers: 1, kv_heads, head_dim, page_tokens: PAGE, dtype };
        let table: Vec<BlockIndex> = (0..CONTEXT.div_ceil(PAGE) as u32).rev().map(BlockIndex).collect();
        let mut kv = backend.kv(geometry, table.len(), 1, None).expect("memory");
        let mut random = Random::new(SEED);
        let mut page = || (0..PAGE * head_dim).map(|_| random.normal()).collect::<Vec<f32>>();
        for &block in &table {
            for head in 0..kv_heads {
                backend.write_page(&mut kv, 0, block, head, &page(), &page());
            }
        }
        let kind = DigestKind::Cluster { span_tokens: span, sink_tokens: 4, copy: 0 };
        let spec = DigestSpec { kind, partition_tokens: partition };
        let mut digests = backend.digests(spec, geometry, table.len(), None, None).expect("memory");
        let positions: Vec<u32> = (0..CONTEXT as u32).collect();
        for first in (0..CONTEXT).step_by(chunk) {
            let count = chunk.min(CONTEXT - first);
            let sequence = [rows(first, count, CONTEXT, Attention::Dense)];
            let batch = Batch {
                tokens: &positions[..count],
                positions: &positions[first..first + count],
                sequences: &sequence,
                block_tables: &table,
                methods: &[],
            };
            backend.digest(&mut digests, &mut kv, 0, &batch);
        }
        backend.reserve(HEADS, 1, 1, CONTEXT, HEADS.qkv_cols()).expect("scratch");
        let mut qkv = backend.tensor(1, HEADS.qkv_cols()).expect("memory");
        let query: Vec<f32> = (0..HEADS.qkv_cols()).map(|_| 2.0 * random.normal()).collect();
        backend.upload(&mut qkv, &query);
        World { backend, kv, digests: vec![digests], table, qkv, span, partition }
    }

    fn method(&self, estimate_permille: u32) -> Method {
        Method {
            dense_layers: 0,
            partition_tokens: self.partition,
            score: Score::Digest { digests: 0 },
            reduce: Reduce::Mean,
            softmax: true,
            scope: Scope::KvHead,
            always: Always { sink_tokens: 4, recent_tokens: 64, generated_tokens: 0, outliers: 0 },
            open_competes: false,
            take_min: 0,
            rule: Rule::Clusters { span_tokens: self.span, estimate_permille, copy: 0 },
        }
    }

    /// Attention of the last token, and what it selects; `None` for dense.
    fn attend(&mut self, method: Option<(Method, u32)>) -> (Vec<f32>, Vec<Option<Vec<u64>>>) {
        let methods = Vec::from_iter(method.map(|(method, _)| method));
        let attention =
            method.map_or(Attention::Dense, |(_, budget)| Attention::Sparse { method: 0, budget });
        let sequence = [rows(CONTEXT - 1, 1, CONTEXT - 1, attention)];
        let batch = Batch {
            tokens: &[0],
            positions: &[CONTEXT as u32 - 1],
            sequences: &sequence,
            block_tables: &self.table,
            methods: &methods,
        };
        let mut out = self.backend.tensor(1, HEADS.q_cols()).expect("memory");
        let (backend, kv, qkv) = (&mut self.backend, &self.kv, &self.qkv);
        if method.is_none() {
            backend.attend(&mut out, None, kv, 0, qkv, HEADS, None, &batch, None, 0);
            return (rows_of(backend, &out), Vec::new());
        }
        let limits = SelectionLimits::new(&methods, HEADS, PAGE, 1, CONTEXT);
        let (mut selection, _) = backend.selection(limits).expect("memory");
        backend.score(&mut selection, &self.digests, kv, 0, qkv, HEADS, &batch);
        backend.select(&mut selection, &self.digests, 0, HEADS, &batch);
        backend.attend(&mut out, None, kv, 0, qkv, HEADS, None, &batch, Some(&selection), 0);
        let bits = (0..HEADS.kv_heads).map(|head| backend.read_selection(&selection, 0, head)).collect();
        (rows_of(backend, &out), bits)
    }

    /// K and V of a head slot by slot, of the pool or of the copy in the order of clusters.
    fn slots(&mut self, head: usize, copy: Option<OrderedCopy>) -> Vec<(Vec<f32>, Vec<f32>)> {
        let mut slots = Vec::new();
        for &block in &self.table {
            let block = copy.map_or(block, |copy| copy.block(block, self.table.len()));
            let (k, v) = self.backend.read_page(&self.kv, 0, block, head);
            let rows = k.chunks(HEADS.head_dim).zip(v.chunks(HEADS.head_dim));
            slots.extend(rows.map(|(k, v)| (k.to_vec(), v.to_vec())));
        }
        slots
    }

    /// Digests of a head, those of all partitions one after the other.
    fn read(&mut self, head: usize) -> Vec<f32> {
        let table = self.table.clone();
        table.iter().flat_map(|&b| self.backend.read_digests(&self.digests[0], 0, b, head)).collect()
    }
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

#[test]
fn tokens_that_stand_for_themselves_are_attended() {
    for isa in levels() {
        let mut world = World::new(isa, DType::F32, 128, 1, CONTEXT, 2);
        let (dense, _) = world.attend(None);
        for budget in [0, 300, 700] {
            let method = world.method(1000);
            let (out, bits) = world.attend(Some((method, budget)));
            assert!(bits.iter().all(Option::is_some), "some tokens are estimated");
            assert_close(&format!("seed {SEED} {isa} budget {budget}"), &out, &dense, 1e-5);
        }
        let method = world.method(0);
        let (out, _) = world.attend(Some((method, 0)));
        assert!(
            out.iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-2),
            "without them it is another answer"
        );
    }
}

#[test]
fn the_whole_context_as_budget_is_dense() {
    for isa in levels() {
        let mut world = World::new(isa, DType::Bf16, 256, 16, CONTEXT, 2);
        let (dense, _) = world.attend(None);
        let method = world.method(232);
        assert_eq!(world.attend(Some((method, CONTEXT as u32))), (dense, vec![None, None]), "{isa}");
    }
}

#[test]
fn whole_clusters_are_selected_within_the_budget() {
    let (span, partition) = (256, 16);
    let mut world = World::new(Isa::detect(), DType::F16, span, partition, CONTEXT, 2);
    let end = (CONTEXT - 64) / span * span;
    let layout = ClusterLayout { head_dim: HEADS.head_dim };
    for budget in [0, 236, 240, 300, 420, 800, CONTEXT - 1] {
        let method = world.method(232);
        let (_, bits) = world.attend(Some((method, budget as u32)));
        for (head, bits) in bits.into_iter().enumerate() {
            let bits = bits.expect("a selection");
            let selected = |p: usize| bits[p / 64] >> (p % 64) & 1 == 1;
            let what = format!("seed {SEED} budget {budget} head {head}");
            assert!((0..4).chain(end..CONTEXT).all(selected), "{what}: the always-set");
            let attended = (0..CONTEXT).filter(|&p| selected(p)).count();
            assert!(attended <= budget.max(4 + CONTEXT - end), "{what}: {attended}");
            let width = layout.ids_at() + partition;
            let digests = world.read(head);
            let cluster = |p: usize| {
                let id = digests[p / partition * width + layout.ids_at() + p % partition] as u16;
                (p >= 4).then(|| p / span * (span / partition) + id as usize)
            };
            assert_eq!(digests[layout.ids_at()] as u16, NO_CLUSTER);
            let mut members = vec![Vec::new(); end / partition];
            (0..end).filter_map(|p| Some((p, cluster(p)?))).for_each(|(p, of)| members[of].push(p));
            let (pool, ordered) = (world.slots(head, None), world.slots(head, Some(OrderedCopy(0))));
            assert!(pool[..4] == ordered[..4], "{what}: sinks come first");
            let mut slot = 4;
            for (i, members) in members.iter().enumerate() {
                let slots = slot..slot + members.len();
                slot = slots.end;
                let tokens: Vec<_> = members.iter().map(|&p| &pool[p]).collect();
                assert!(ordered[slots.clone()].iter().eq(tokens), "{what} cluster {i}: its tokens in order");
                let digest = &digests[i * width..(i + 1) * width];
                let size = ClusterLayout::size(digest[layout.size_at()], digest[layout.size_at() + 1]);
                assert_eq!(size, members.len(), "{what} cluster {i}");
                let taken = slots.filter(|&slot| selected(slot)).count();
                assert!(taken == 0 || taken == size, "{what} cluster {i}: {taken} of {size}");
            }
            // Nothing smaller than what is left of the budget was better than what was taken: at least one more was wanted.
            assert!(budget < 300 || attended > budget - span, "{what}: {attended}");
        }
    }
}

#[test]
fn clusters_depend_on_the_keys_alone() {
    let mut whole = World::new(Isa::Scalar, DType::Bf16, 128, 16, CONTEXT, 1);
    let expected: Vec<Vec<u32>> =
        (0..2).map(|head| whole.read(head).into_iter().map(f32::to_bits).collect()).collect();
    for isa in levels() {
        for (chunk, threads) in [(1, 1), (37, 3), (128, 2)] {
            let mut parts = World::new(isa, DType::Bf16, 128, 16, chunk, threads);
            for head in 0..2 {
                let found: Vec<u32> = parts.read(head).into_iter().map(f32::to_bits).collect();
                assert!(found == expected[head], "seed {SEED} {isa}: chunks of {chunk}, {threads} threads");
            }
        }
    }
}
