//! Digests in fp8: an upper bound remains one, at every instruction set and for whatever finite keys.

use ops::conformance::seed_factor;
use ops::fp8;
use ops::sparse::{
    Always, Attention, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, SelectionLimits, TwoSided,
};
use ops::{Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, Random, SeatIndex, SequenceRows};
use sparseserve_ops_cpu::{CpuBackend, CpuOptions, Isa};

const SEED: u64 = 67;
const HEADS: HeadShape = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 48 };
const PAGE: usize = 16;
/// The last partition is open.
const CONTEXT: usize = 20 * PAGE + 5;
const KINDS: [DigestKind; 4] = [
    DigestKind::MinMax,
    DigestKind::Fp8(TwoSided::MinMax),
    DigestKind::CuboidMean,
    DigestKind::Fp8(TwoSided::CuboidMean),
];

/// What keys look like: powers of two of the largest and the smallest.
const MAGNITUDES: [(i32, i32); 6] = [(0, 0), (8, -12), (120, 100), (-100, -110), (-133, -149), (118, -149)];

/// Digests of each kind, `[block][head]`, and the scores of all partitions by each, `[head]`.
struct Made {
    digests: Vec<Vec<Vec<f32>>>,
    scores: Vec<Vec<Vec<f32>>>,
}

fn run(isa: Isa, dtype: DType, reduce: Reduce, (most, least): (i32, i32), seed: u64) -> Made {
    let HeadShape { kv_heads, head_dim, .. } = HEADS;
    let mut backend = CpuBackend::new(CpuOptions { threads: Some(2), isa: Some(isa) }).expect("a backend");
    let geometry = KvGeometry { num_layers: 1, kv_heads, head_dim, page_tokens: PAGE, dtype };
    let table: Vec<BlockIndex> = (0..CONTEXT.div_ceil(PAGE) as u32).rev().map(BlockIndex).collect();
    let mut kv = backend.kv(geometry, table.len(), 0, None).expect("memory");
    let mut random = Random::new(seed);
    // Some channels lie on one side of zero, some values on numbers of fp8.
    let mut key = |i: usize| {
        let exponent = least + random.below((most - least + 1) as usize) as i32;
        let normal = if random.below(8) == 0 { 1.5 } else { random.normal() };
        let value = if (i % head_dim).is_multiple_of(5) { normal.abs() } else { normal };
        // In two steps: the power alone may be below what f32 has.
        value * 2f32.powi(exponent / 2) * 2f32.powi(exponent - exponent / 2)
    };
    let zeros = vec![0.0; PAGE * head_dim];
    for &block in &table {
        for head in 0..kv_heads {
            let keys: Vec<f32> = (0..PAGE * head_dim).map(&mut key).collect();
            backend.write_page(&mut kv, 0, block, head, &keys, &zeros);
        }
    }
    let spec = |kind| DigestSpec { kind, partition_tokens: PAGE };
    let digests =
        KINDS.map(|kind| backend.digests(spec(kind), geometry, table.len(), None, None).expect("memory"));
    let mut digests = Vec::from(digests);
    let positions: Vec<u32> = (0..CONTEXT as u32).collect();
    let sequence = |first: usize, attention| SequenceRows {
        rows: 0..(CONTEXT - first) as u32,
        first_position: first as u32,
        prompt_len: CONTEXT as u32 - 1,
        blocks: 0..table.len() as u32,
        attention,
        seat: SeatIndex(0),
        quota: 0,
    };
    let all = [sequence(0, Attention::Dense)];
    let batch = Batch {
        tokens: &positions,
        positions: &positions,
        sequences: &all,
        block_tables: &table,
        methods: &[],
    };
    digests.iter_mut().for_each(|d| backend.digest(d, &mut kv, 0, &batch));
    backend.reserve(HEADS, 1, 1, CONTEXT, HEADS.qkv_cols()).expect("scratch");
    let mut qkv = backend.tensor(1, HEADS.qkv_cols()).expect("memory");
    let mut random = Random::new(seed + 1);
    let query: Vec<f32> = (0..HEADS.qkv_cols()).map(|_| random.normal()).collect();
    backend.upload(&mut qkv, &query);
    let mut scores = Vec::new();
    for index in 0..KINDS.len() as u16 {
        let methods = [Method {
            dense_layers: 0,
            partition_tokens: PAGE,
            score: Score::Digest { digests: index },
            reduce,
            softmax: false,
            scope: Scope::KvHead,
            always: Always { sink_tokens: 0, recent_tokens: 0, generated_tokens: 0, outliers: 0 },
            open_competes: true,
            take_min: 1,
            rule: Rule::Top,
        }];
        let limits = SelectionLimits::new(&methods, HEADS, PAGE, 1, CONTEXT);
        let (mut selection, _) = backend.selection(limits).expect("memory");
        let last = [sequence(CONTEXT - 1, Attention::Sparse { method: 0, budget: 64 })];
        let batch = Batch {
            tokens: &positions[..1],
            positions: &positions[CONTEXT - 1..],
            sequences: &last,
            block_tables: &table,
            methods: &methods,
        };
        backend.score(&mut selection, &digests, &kv, 0, &qkv, HEADS, &batch);
        let mut of = |head| {
            let mut scores = vec![0.0; table.len()];
            backend.read_scores(&selection, 0, head, 0, &mut scores);
            scores
        };
        scores.push((0..kv_heads).map(&mut of).collect());
    }
    let full = &table[..table.len() - 1];
    let places = || full.iter().flat_map(|&block| (0..kv_heads).map(move |head| (block, head)));
    let digests =
        digests.iter().map(|d| places().map(|(b, h)| backend.read_digests(d, 0, b, h)).collect()).collect();
    Made { digests, scores }
}

fn check(isa: Isa) {
    if !isa.available() {
        eprintln!("SKIPPED: this machine has no {isa}");
        return;
    }
    for round in 0..seed_factor() {
        for (i, magnitudes) in MAGNITUDES.into_iter().enumerate() {
            for (dtype, reduce) in
                [(DType::F32, Reduce::Mean), (DType::F32, Reduce::Max), (DType::Bf16, Reduce::MeanQuery)]
            {
                let seed = SEED + 100 * round + 2 * i as u64;
                let what = format!("seed {seed} {isa} {dtype} {reduce:?} 2^{magnitudes:?}");
                let Made { digests, scores } = run(isa, dtype, reduce, magnitudes, seed);
                for kind in [0, 2] {
                    // What fp8 contains is the mean box in f32, before the other digest rounds it to bf16.
                    if kind == 0 || dtype == DType::F32 {
                        for (exact, rounded) in digests[kind].iter().zip(&digests[kind + 1]) {
                            check_box(&what, exact, rounded);
                        }
                    }
                    // The query of a bf16 digest is rounded to bf16, that of fp8 is not.
                    if dtype == DType::F32 {
                        for (exact, bound) in
                            scores[kind].iter().flatten().zip(scores[kind + 1].iter().flatten())
                        {
                            assert!(bound >= exact, "{what}: {bound:e} for {exact:e}");
                        }
                    }
                }
            }
        }
    }
}

/// The box is inside the rounded one, whose sides are the next numbers of fp8.
fn check_box(what: &str, exact: &[f32], rounded: &[f32]) {
    let middle = exact.len() / 2;
    let largest = exact.iter().fold(0f64, |m, &v| m.max(f64::from(v).abs()));
    for (c, (&v, &r)) in exact.iter().zip(rounded).enumerate() {
        let outward = if c < middle { r >= v } else { r <= v };
        assert!(outward && r.is_finite(), "{what}: channel {c} is {r:e} for {v:e}");
        let (v, r) = (f64::from(v), f64::from(r));
        // An eighth, or half a step of the smallest numbers at the least and greatest power of two that fit.
        let step = (largest / 224.0 * 2f64.powi(-9)).max(2f64.powi(*fp8::EXPONENTS.start() - 9));
        assert!(
            (r - v).abs() <= (v.abs().max(r.abs()) / 8.0).max(step),
            "{what}: channel {c} is {r:e} for {v:e}"
        );
    }
}

#[test]
fn scalar() {
    check(Isa::Scalar);
}

#[test]
fn avx2() {
    check(Isa::Avx2);
}

#[test]
fn avx512() {
    check(Isa::Avx512);
}

#[test]
fn avx512_bf16() {
    check(Isa::Avx512Bf16);
}
