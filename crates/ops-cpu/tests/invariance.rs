//! What the conformance suite has no shapes for: long sums, many threads, work cut in other ways. Everything to the bit.

use ops::conformance::{DTYPES, assert_close, rows_of, tolerance};
use ops::reference::Reference;
use ops::{
    Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, Random, SequenceRows, Tensor, WeightView,
};
use sparseserve_ops_cpu::{CpuBackend, CpuOptions, Isa};

const SEED: u64 = 21;

fn backend(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(threads), isa: Some(isa) })
        .expect("an available instruction set")
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

fn normals(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.normal()).collect()
}

fn tensor<B: Backend>(backend: &mut B, cols: usize, values: &[f32]) -> B::Tensor {
    let mut t = backend.tensor(values.len() / cols, cols).expect("memory");
    backend.upload(&mut t, values);
    t
}

/// `x w^T` and `x + x w^T`-like residual sums for one backend.
fn products<B: Backend>(
    backend: &mut B,
    weights: WeightView,
    dtype: DType,
    x: &[f32],
    residual: &[f32],
) -> Vec<f32> {
    let w = backend.linear(&[weights], &[], dtype).expect("memory");
    let x = tensor(backend, weights.cols, x);
    let mut out = tensor(backend, weights.rows, residual);
    backend.linear_add(&mut out, &x, &w);
    let mut all = rows_of(backend, &out);
    backend.linear_forward(&mut out, &x, &w);
    all.extend(rows_of(backend, &out));
    all
}

#[test]
fn long_sums_and_many_rows() {
    let mut random = Random::new(SEED);
    // Above what is summed at once, above the rows of one task, and neither a multiple of anything.
    for (rows, inputs, outputs) in [(1, 2501, 80), (7, 2501, 80), (245, 1100, 70)] {
        let weights = normals(&mut random, inputs * outputs);
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let weights = WeightView { dtype: DType::F32, rows: outputs, cols: inputs, bytes: &bytes };
        let x = normals(&mut random, rows * inputs);
        let residual = normals(&mut random, rows * outputs);
        for dtype in DTYPES {
            let expected = products(&mut Reference::default(), weights, dtype, &x, &residual);
            for isa in levels() {
                let what = format!("seed {SEED} {isa} {dtype} [{rows}, {inputs}] -> {outputs}");
                let one = products(&mut backend(isa, 1), weights, dtype, &x, &residual);
                assert_close(&what, &one, &expected, tolerance(dtype));
                assert!(
                    one == products(&mut backend(isa, 3), weights, dtype, &x, &residual),
                    "{what}: threads"
                );
                let last = rows - 1;
                let alone = products(
                    &mut backend(isa, 1),
                    weights,
                    dtype,
                    &x[last * inputs..],
                    &residual[last * outputs..],
                );
                assert!(
                    one[last * outputs..rows * outputs] == alone[..outputs],
                    "{what}: last row alone, added"
                );
                assert!(one[(rows + last) * outputs..] == alone[outputs..], "{what}: last row alone");
            }
        }
    }
}

/// Decode of one token of three sequences and a chunk of a fourth.
fn decode(isa: Isa, threads: usize, dtype: DType, context_reserved: usize) -> Vec<f32> {
    let mut backend = backend(isa, threads);
    let heads = HeadShape { q_heads: 6, kv_heads: 2, head_dim: 64 };
    let geometry = KvGeometry { num_layers: 1, kv_heads: 2, head_dim: 64, page_tokens: 16, dtype };
    let steps = [(1700, 1), (513, 1), (3, 1), (1100, 40)];
    backend.reserve(heads, 43, steps.len(), context_reserved, 640).expect("memory");
    let mut random = Random::new(SEED);
    let (mut positions, mut sequences, mut tables) = (vec![], vec![], vec![]);
    for (context, rows) in steps {
        let (row, block) = (positions.len() as u32, tables.len() as u32);
        positions.extend((context - rows) as u32..context as u32);
        tables.extend((0..geometry.blocks(context) as u32).map(|b| BlockIndex(block + b)));
        sequences.push(SequenceRows {
            rows: row..positions.len() as u32,
            first_position: (context - rows) as u32,
            prompt_len: context as u32,
            blocks: block..tables.len() as u32,
            attention: Default::default(),
            seat: ops::SeatIndex(0),
            quota: 0,
        });
    }
    let mut kv = backend.kv(geometry, tables.len(), 0, None).expect("memory");
    for &block in &tables {
        for head in 0..2 {
            let (k, v) = (normals(&mut random, 16 * 64), normals(&mut random, 16 * 64));
            backend.write_page(&mut kv, 0, block, head, &k, &v);
        }
    }
    let tokens = vec![0; positions.len()];
    let batch = Batch {
        tokens: &tokens,
        positions: &positions,
        sequences: &sequences,
        block_tables: &tables,
        methods: &[],
    };
    let qkv = normals(&mut random, positions.len() * heads.qkv_cols());
    let qkv = tensor(&mut backend, heads.qkv_cols(), &qkv);
    let mut out = backend.tensor(positions.len(), heads.q_cols()).expect("memory");
    backend.attend(&mut out, None, &kv, 0, &qkv, heads, None, &batch, None, 0);
    rows_of(&mut backend, &out)
}

#[test]
fn attention_does_not_depend_on_how_it_is_cut() {
    for isa in levels() {
        for dtype in DTYPES {
            let what = format!("seed {SEED} {isa} {dtype}");
            // Splits as tasks of their own; then memory for their results is too small, so that they are not.
            let by_split = decode(isa, 4, dtype, 2048);
            assert!(by_split == decode(isa, 1, dtype, 2048), "{what}: one thread");
            assert!(by_split == decode(isa, 2, dtype, 1), "{what}: without split tasks");
        }
    }
}

#[test]
fn a_reused_page_is_cleared() {
    for isa in levels() {
        for dtype in DTYPES {
            let mut backend = backend(isa, 1);
            let heads = HeadShape { q_heads: 1, kv_heads: 1, head_dim: 32 };
            let geometry = KvGeometry { num_layers: 1, kv_heads: 1, head_dim: 32, page_tokens: 16, dtype };
            let mut kv = backend.kv(geometry, 1, 0, None).expect("memory");
            let stale = vec![f32::NAN; 16 * 32];
            backend.write_page(&mut kv, 0, BlockIndex(0), 0, &stale, &stale);
            let mut qkv = tensor(&mut backend, heads.qkv_cols(), &[0.5; 96]);
            let mut angles = backend.tensor(1, 32).expect("memory");
            backend.rope_angles(&mut angles, &[0], &[1.0; 16], &[0], 1.0);
            let sequence = SequenceRows {
                rows: 0..1,
                first_position: 0,
                prompt_len: 1,
                blocks: 0..1,
                attention: Default::default(),
                seat: ops::SeatIndex(0),
                quota: 0,
            };
            let batch = Batch {
                tokens: &[0],
                positions: &[0],
                sequences: &[sequence],
                block_tables: &[BlockIndex(0)],
                methods: &[],
            };
            backend.append(&mut kv, 0, &mut qkv, heads, None, &angles, &batch);
            let (k, v) = backend.read_page(&kv, 0, BlockIndex(0), 0);
            for page in [k, v] {
                assert!(page[..32].iter().all(|&x| x == 0.5), "{isa} {dtype}: the slot is written");
                assert!(page[32..].iter().all(|&x| x == 0.0), "{isa} {dtype}: the rest is cleared");
            }
        }
    }
}

#[test]
fn packed_bytes_are_as_announced() {
    let mut backend = backend(Isa::Scalar, 1);
    for dtype in DTYPES {
        assert_eq!(backend.linear_bytes(64, 32, dtype), 64 * 32 * dtype.bytes() as u64);
        let padded = if dtype == DType::Bf16 { 34 } else { 33 };
        assert_eq!(backend.linear_bytes(65, 33, dtype), 80 * padded * dtype.bytes() as u64);
    }
    assert_eq!(backend.tensor(3, 5).expect("memory").rows(), 3);
    let error = CpuBackend::new(CpuOptions { threads: Some(0), isa: None }).expect_err("no thread");
    assert!(error.to_string().contains("at least one thread"), "{error}");
}
