//! One suite for every backend: each operation against [`Reference`] on random inputs, and the
//! invariants that no single comparison shows (a row never depends on its batch).
//!
//! Tolerances are relative to the largest magnitude of the expected output. Where a backend may round the inputs of a
//! product to bf16 (8 bits of mantissa, so 2^-9 relative per factor), errors of the terms add up like a random walk
//! and stay below 1 % of the largest output; elsewhere only the order of f32 additions differs.

mod chunks;
mod sparse;
mod tier;
mod tier_cases;
mod working_set;

use crate::reference::{Matrix, Reference};
use crate::sample::{SampleOutput, SampleRow, SamplingParams};
use crate::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score};
use crate::{
    Backend, Batch, BlockIndex, DType, Gate, HeadShape, KvGeometry, PAGE_TOKENS_ALLOWED, Random,
    SPLIT_TOKENS, SeatIndex, SequenceRows, Tensor, WeightView,
};
pub use chunks::check_digest_chunks;
pub use sparse::check_sparse;
pub use tier::check_tiers;
pub use working_set::check_working_sets;

/// Every element type.
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Allowed error of a product, relative to the largest expected magnitude.
pub fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 | DType::F16 => 2e-5,
        DType::Bf16 => 1e-2,
    }
}

/// Allowed error of attention, relative to the largest expected magnitude. A rotated key whose last bit differs may
/// be stored as the next f16 value, 2^-11 away.
pub fn attention_tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 5e-4,
        DType::Bf16 => 1e-2,
    }
}

/// Allowed error of operations on f32 values only.
pub const ELEMENTWISE_TOLERANCE: f32 = 5e-6;

/// How many times more seeds than usual a test shall try: `SPARSESERVE_SEEDS`, which the acceptance run sets, or 1.
pub fn seed_factor() -> u64 {
    std::env::var("SPARSESERVE_SEEDS").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1)
}

/// A method with the digests that it scores, if it scores any.
pub type Tried = (Method, Option<DigestSpec>);

/// What [`check_sparse`] and [`check_tiers`] try, so that a test of policies can tell what they leave out.
pub fn tried() -> [(&'static str, Vec<Tried>); 2] {
    let of = |methods: &[Method], digests: &[DigestSpec]| -> Vec<Tried> {
        methods.iter().map(|&m| (m, m.score.digests().map(|at| digests[at]))).collect()
    };
    let sparse = sparse::cases().iter().flat_map(|case| of(&case.methods, &case.digests)).collect();
    let tiers = tier_cases::cases().iter().flat_map(|case| of(&case.methods, &case.digests)).collect();
    [("check_sparse", sparse), ("check_tiers", tiers)]
}

/// A gate of random weights for those of `digests` that need one, whose size theirs is.
fn gate_of(digests: &[DigestSpec], heads: HeadShape, num_layers: usize, seed: u64) -> Option<Gate> {
    let dim = digests.iter().find_map(|spec| match spec.kind {
        DigestKind::Gate { dim } => Some(dim),
        _ => None,
    })?;
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let mut random = Random::keyed(seed, 99);
    let mut weights = |cols: usize| -> Vec<f32> {
        let values = normals(&mut random, num_layers * kv_heads * dim * cols);
        values.into_iter().map(|v| v / (cols as f32).sqrt()).collect()
    };
    Some(Gate {
        heads,
        num_layers,
        dim,
        k: weights(3 * head_dim),
        q: weights(heads.group() * head_dim),
        inv_freq: (0..head_dim / 2).map(|c| 1e4f32.powf(-2.0 * c as f32 / head_dim as f32)).collect(),
        scale: 1.25,
    })
}

/// The plainest of methods, which cases vary: a row's own partition, and the best of the others.
pub fn method(partition_tokens: usize, score: Score) -> Method {
    Method {
        dense_layers: 0,
        partition_tokens,
        score,
        reduce: Reduce::Mean,
        softmax: false,
        scope: Scope::KvHead,
        always: Always { sink_tokens: 0, recent_tokens: 1, generated_tokens: 0, outliers: 0 },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    }
}

/// Runs every check on fresh backends made by `make`. Returns the extra waves of its HBM tiers: a backend whose frames for them
/// are bounded should have had some.
///
/// # Panics
/// With the seed, the operation and the worst element, when one differs.
pub fn check_all<B: Backend>(make: &mut dyn FnMut() -> B, seed: u64) -> u64 {
    eprintln!("conformance seed {seed}");
    for dtype in DTYPES {
        check_linear(&mut make(), dtype, seed);
        check_pages(&mut make(), dtype, seed);
        check_attention(&mut make(), dtype, seed);
        check_sparse(&mut make(), dtype, seed);
        check_digest_chunks(&mut make(), dtype, seed);
    }
    // What moves pages does not look into them: one type a time is enough.
    let waves = check_tiers(make, DTYPES[seed as usize % DTYPES.len()], seed);
    check_working_sets(make, seed);
    check_rows(&mut make(), seed);
    check_rope_angles(&mut make(), seed);
    check_sample(&mut make(), seed);
    waves
}

/// Asserts that `got` equals `expected` within `tolerance * max |expected|`.
///
/// # Panics
/// With the worst element.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(0f32, |m, x| m.max(x.abs())).max(f32::MIN_POSITIVE);
    let error = |i: usize| (got[i] - expected[i]).abs() / scale;
    // A NaN compares false with everything, so ask for "not within" rather than "beyond".
    if let Some(first) = (0..got.len()).find(|&i| error(i).is_nan() || error(i) > tolerance) {
        let worst = (0..got.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(first);
        panic!(
            "{what}: element {first} is {} and should be {}; worst element {worst}: {} for {} (relative {:e}, \
             allowed {tolerance:e})",
            got[first],
            expected[first],
            got[worst],
            expected[worst],
            error(worst)
        );
    }
}

fn assert_same_bits(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits(), "{what}: element {i} is {a:e}, alone it was {b:e}");
    }
}

fn normals(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.normal()).collect()
}

/// A matrix as bytes of `dtype`.
fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    let one = |&v: &f32| match dtype {
        DType::F32 => v.to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(v).to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(one).collect()
}

fn tensor<B: Backend>(backend: &mut B, cols: usize, values: &[f32]) -> B::Tensor {
    let mut t = backend.tensor(values.len() / cols, cols).expect("memory for a small tensor");
    backend.upload(&mut t, values);
    t
}

/// All rows of a tensor, one after the other.
pub fn rows_of<B: Backend>(backend: &mut B, tensor: &B::Tensor) -> Vec<f32> {
    (0..tensor.rows()).flat_map(|i| backend.row(tensor, i).to_vec()).collect()
}

/// Products with and without bias, fused parts, residual addition, embedding lookup; the same row alone and among
/// others.
pub fn check_linear<B: Backend>(backend: &mut B, dtype: DType, seed: u64) {
    let mut random = Random::keyed(seed, 1);
    let mut oracle = Reference::default();
    let shapes =
        [(1, 64, 64), (1, 33, 7), (2, 96, 130), (5, 257, 64), (16, 128, 200), (37, 64, 321), (130, 300, 96)];
    for (rows, inputs, outputs) in shapes {
        let what = format!("seed {seed} linear {dtype} [{rows}, {inputs}] -> {outputs}");
        backend.reserve(heads_of(1, 1, 32), rows, rows, 64, inputs.max(outputs)).expect("scratch");
        // Rows of two parts below each other, from different element types on disk.
        let first = outputs / 3 + 1;
        let weights =
            [normals(&mut random, first * inputs), normals(&mut random, (outputs - first) * inputs)];
        let bias = normals(&mut random, outputs);
        let disk = [DType::F32, dtype];
        let bytes = [encode(&weights[0], disk[0]), encode(&weights[1], disk[1])];
        let counts = [first, outputs - first];
        let part = |i: usize| WeightView { dtype: disk[i], rows: counts[i], cols: inputs, bytes: &bytes[i] };
        let bias_bytes = encode(&bias, DType::F32);
        let (bias_a, bias_b) = bias_bytes.split_at(4 * first);
        let bias_view = |rows: usize, bytes| WeightView { dtype: DType::F32, rows: 1, cols: rows, bytes };
        let biases = [bias_view(counts[0], bias_a), bias_view(counts[1], bias_b)];
        for biases in [&biases[..], &[]] {
            let w = backend.linear(&[part(0), part(1)], biases, dtype).expect("weights");
            let w_oracle = oracle.linear(&[part(0), part(1)], biases, dtype).expect("weights");
            let x = normals(&mut random, rows * inputs);
            let residual = normals(&mut random, rows * outputs);
            let (xt, xo) = (tensor(backend, inputs, &x), tensor(&mut oracle, inputs, &x));
            let mut out = tensor(backend, outputs, &residual);
            let mut expected = tensor(&mut oracle, outputs, &residual);

            backend.linear_add(&mut out, &xt, &w);
            oracle.linear_add(&mut expected, &xo, &w_oracle);
            let added = rows_of(backend, &out);
            assert_close(
                &format!("{what} added"),
                &added,
                &rows_of(&mut oracle, &expected),
                tolerance(dtype),
            );

            backend.linear_forward(&mut out, &xt, &w);
            oracle.linear_forward(&mut expected, &xo, &w_oracle);
            let whole = rows_of(backend, &out);
            assert_close(&what, &whole, &rows_of(&mut oracle, &expected), tolerance(dtype));

            for row in [0, rows / 2, rows - 1] {
                let x = tensor(backend, inputs, &x[row * inputs..][..inputs]);
                let mut alone = tensor(backend, outputs, &residual[row * outputs..][..outputs]);
                backend.linear_add(&mut alone, &x, &w);
                let alone_added = rows_of(backend, &alone);
                assert_same_bits(
                    &format!("{what} added row {row}"),
                    &added[row * outputs..][..outputs],
                    &alone_added,
                );
                backend.linear_forward(&mut alone, &x, &w);
                let alone = rows_of(backend, &alone);
                assert_same_bits(&format!("{what} row {row}"), &whole[row * outputs..][..outputs], &alone);
            }
            let tokens: Vec<u32> = (0..rows).map(|_| random.below(outputs) as u32).collect();
            let mut out = backend.tensor(rows, inputs).expect("memory");
            let mut expected = oracle.tensor(rows, inputs).expect("memory");
            backend.embed(&mut out, &w, &tokens);
            oracle.embed(&mut expected, &w_oracle, &tokens);
            let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
            assert_same_bits(&format!("{what} embed"), &got, &expected);
        }
    }
}

/// Row-wise operations: norm, SwiGLU, selection.
pub fn check_rows<B: Backend>(backend: &mut B, seed: u64) {
    let mut random = Random::keyed(seed, 2);
    let mut oracle = Reference::default();
    for (rows, cols) in [(1, 64), (3, 40), (17, 96), (70, 256)] {
        let what = format!("seed {seed} [{rows}, {cols}]");
        backend.reserve(heads_of(1, 1, 32), rows, rows, 64, 2 * cols).expect("scratch");
        let x = normals(&mut random, rows * cols);
        let weight = encode(&normals(&mut random, cols), DType::Bf16);
        let weight = WeightView { dtype: DType::Bf16, rows: 1, cols, bytes: &weight };
        let (w, w_oracle) = (backend.vector(weight).expect("memory"), oracle.vector(weight).expect("memory"));
        let (xt, xo) = (tensor(backend, cols, &x), tensor(&mut oracle, cols, &x));

        let mut out = backend.tensor(rows, cols).expect("memory");
        let mut expected = oracle.tensor(rows, cols).expect("memory");
        backend.rms_norm(&mut out, &xt, &w, 1e-5);
        oracle.rms_norm(&mut expected, &xo, &w_oracle, 1e-5);
        let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
        assert_close(&format!("{what} rms_norm"), &got, &expected, ELEMENTWISE_TOLERANCE);

        let mut out = backend.tensor(rows, cols / 2).expect("memory");
        let mut expected = oracle.tensor(rows, cols / 2).expect("memory");
        backend.swiglu(&mut out, &xt);
        oracle.swiglu(&mut expected, &xo);
        let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
        assert_close(&format!("{what} swiglu"), &got, &expected, ELEMENTWISE_TOLERANCE);

        let chosen: Vec<u32> = (0..rows / 2 + 1).map(|_| random.below(rows) as u32).collect();
        let mut out = backend.tensor(rows, cols).expect("memory");
        let mut expected = oracle.tensor(rows, cols).expect("memory");
        backend.select_rows(&mut out, &xt, &chosen);
        oracle.select_rows(&mut expected, &xo, &chosen);
        let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
        assert_same_bits(&format!("{what} select_rows"), &got, &expected);

        // Some of the rows of one to some of the other, whose others stay.
        let taken = random.below(rows)..rows;
        let at = random.below(rows - taken.len() + 1);
        let before = normals(&mut random, rows * cols);
        let (mut out, mut expected) = (tensor(backend, cols, &before), tensor(&mut oracle, cols, &before));
        backend.copy_rows(&mut out, at, &xt, taken.clone());
        oracle.copy_rows(&mut expected, at, &xo, taken);
        let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
        assert_same_bits(&format!("{what} copy_rows"), &got, &expected);
    }
}

/// Rotation angles up to positions where f32 itself is coarse.
pub fn check_rope_angles<B: Backend>(backend: &mut B, seed: u64) {
    let mut random = Random::keyed(seed, 3);
    let mut oracle = Reference::default();
    for head_dim in [32, 80, 128] {
        let rows = 40;
        let positions: Vec<u32> =
            (0..rows).map(|i| if i == 0 { 0 } else { random.below(200_000) as u32 }).collect();
        let sets: Vec<u32> = (0..rows).map(|_| random.below(2) as u32).collect();
        let inv_freq: Vec<f32> = (0..head_dim)
            .map(|i| 1e4f32.powf(-2.0 * (i % (head_dim / 2)) as f32 / head_dim as f32))
            .collect();
        let mut out = backend.tensor(rows, head_dim).expect("memory");
        let mut expected = oracle.tensor(rows, head_dim).expect("memory");
        backend.rope_angles(&mut out, &positions, &inv_freq, &sets, 1.25);
        oracle.rope_angles(&mut expected, &positions, &inv_freq, &sets, 1.25);
        let (got, expected) = (rows_of(backend, &out), rows_of(&mut oracle, &expected));
        assert_close(&format!("seed {seed} rope_angles {head_dim}"), &got, &expected, ELEMENTWISE_TOLERANCE);
    }
}

/// Pages come back as they were written, for every page size.
pub fn check_pages<B: Backend>(backend: &mut B, dtype: DType, seed: u64) {
    let mut random = Random::keyed(seed, 4);
    for page_tokens in PAGE_TOKENS_ALLOWED {
        for head_dim in [32, 80, 128] {
            let geometry = KvGeometry { num_layers: 2, kv_heads: 3, head_dim, page_tokens, dtype };
            let mut kv = backend.kv(geometry, 4, 0, None).expect("memory");
            let mut written = Vec::new();
            for layer in 0..2 {
                for block in 0..4 {
                    for head in 0..3 {
                        let k = normals(&mut random, page_tokens * head_dim);
                        let v = normals(&mut random, page_tokens * head_dim);
                        backend.write_page(&mut kv, layer, BlockIndex(block), head, &k, &v);
                        written.push((layer, BlockIndex(block), head, k, v));
                    }
                }
            }
            for (layer, block, head, k, v) in written {
                let what =
                    format!("seed {seed} page {dtype} {page_tokens}x{head_dim} {layer} {block:?} {head}");
                let (k_read, v_read) = backend.read_page(&kv, layer, block, head);
                let rounded = |x: &[f32]| x.iter().map(|&x| dtype.round(x)).collect::<Vec<_>>();
                assert_same_bits(&format!("{what} k"), &k_read, &rounded(&k));
                assert_same_bits(&format!("{what} v"), &v_read, &rounded(&v));
            }
        }
    }
}

fn heads_of(q_heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { q_heads, kv_heads, head_dim }
}

/// A set of sequences, each as (tokens in context, rows in this step).
struct Work {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    block_tables: Vec<BlockIndex>,
    methods: Vec<Method>,
}

impl Work {
    /// Sequence `s` runs the last `rows` of `context` tokens; its blocks are `tables[s]`.
    fn new(steps: &[(usize, usize)], tables: &[Vec<BlockIndex>]) -> Work {
        let mut work = Work {
            tokens: vec![],
            positions: vec![],
            sequences: vec![],
            block_tables: vec![],
            methods: vec![],
        };
        for (&(context, rows), table) in steps.iter().zip(tables) {
            let start = work.tokens.len() as u32;
            let first = (context - rows) as u32;
            let blocks = work.block_tables.len() as u32;
            work.positions.extend(first..context as u32);
            work.tokens.resize(work.positions.len(), 0);
            work.block_tables.extend(table);
            work.sequences.push(SequenceRows {
                rows: start..start + rows as u32,
                first_position: first,
                prompt_len: context as u32,
                blocks: blocks..blocks + table.len() as u32,
                attention: Default::default(),
                seat: SeatIndex(work.sequences.len() as u32),
                quota: 0,
            });
        }
        work
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: &self.block_tables,
            methods: &self.methods,
        }
    }
}

/// A layer of attention under test: shapes, pools and block tables of a few sequences.
struct Layer<'a, B: Backend> {
    backend: &'a mut B,
    kv: B::Kv,
    heads: HeadShape,
    window: Option<usize>,
    q_norm: Option<(B::Vector, B::Vector)>,
}

impl<B: Backend> Layer<'_, B> {
    /// Appends and attends `rows` (their `qkv` values); returns q, k, v after rotation and the attention output.
    fn step(&mut self, work: &Work, qkv: &[f32], inv_freq: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let rows = work.tokens.len();
        let mut x = tensor(self.backend, self.heads.qkv_cols(), qkv);
        let mut angles = self.backend.tensor(rows, self.heads.head_dim).expect("memory");
        let mut out = self.backend.tensor(rows, self.heads.q_cols()).expect("memory");
        self.backend.rope_angles(&mut angles, &work.positions, inv_freq, &vec![0; rows], 1.0);
        let norm = self.q_norm.as_ref().map(|(q, k)| (q, k, 1e-6));
        self.backend.append(&mut self.kv, 1, &mut x, self.heads, norm, &angles, &work.batch());
        self.backend.attend(&mut out, None, &self.kv, 1, &x, self.heads, self.window, &work.batch(), None, 0);
        (rows_of(self.backend, &x), rows_of(self.backend, &out))
    }
}

/// Append and attention of a mixed batch against the oracle; then the same sequences one by one, prefilled in chunks
/// and decoded token by token, to the bit.
pub fn check_attention<B: Backend>(backend: &mut B, dtype: DType, seed: u64) {
    let mut random = Random::keyed(seed, 5);
    let short = SPLIT_TOKENS - 1;
    let cases: [(HeadShape, usize, Option<usize>, bool, usize); 9] = [
        (heads_of(4, 2, 64), 16, None, false, 2 * SPLIT_TOKENS + 70),
        (heads_of(8, 2, 32), 8, None, true, short),
        (heads_of(3, 3, 80), 16, Some(20), false, short),
        (heads_of(6, 1, 96), 32, None, true, short),
        (heads_of(2, 1, 128), 64, Some(600), false, 2 * SPLIT_TOKENS + 70),
        (heads_of(7, 1, 64), 16, Some(1), false, short),
        (heads_of(2, 2, 256), 16, None, false, short),
        (heads_of(5, 1, 40), 16, None, true, short),
        (heads_of(8, 2, 128), 16, Some(512), true, SPLIT_TOKENS + 90),
    ];
    for (heads, page_tokens, window, normed, longest) in cases {
        let what = format!(
            "seed {seed} attention {dtype} {heads:?} page {page_tokens} window {window:?} norm {normed}"
        );
        let geometry = KvGeometry {
            num_layers: 2,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            page_tokens,
            dtype,
        };
        // Contexts around every border: one token, a page, a split, several splits.
        let contexts = [1, page_tokens, page_tokens + 1, SPLIT_TOKENS + 3, longest];
        let mut next = 0;
        let mut blocks: Vec<u32> = (0..contexts.iter().map(|c| geometry.blocks(*c) as u32).sum()).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.below(i + 1));
        }
        let tables: Vec<Vec<BlockIndex>> = contexts
            .iter()
            .map(|c| {
                let count = geometry.blocks(*c);
                next += count;
                blocks[next - count..next].iter().map(|&b| BlockIndex(b)).collect()
            })
            .collect();
        let inv_freq: Vec<f32> = (0..heads.head_dim / 2).map(|c| 0.9f32.powi(c as i32)).collect();
        let values: Vec<Vec<f32>> =
            contexts.iter().map(|c| normals(&mut random, c * heads.qkv_cols())).collect();
        let all: Vec<f32> = values.concat();
        let norm: Vec<Vec<u8>> =
            (0..2).map(|_| encode(&normals(&mut random, heads.head_dim), DType::F32)).collect();
        let view =
            |i: usize| WeightView { dtype: DType::F32, rows: 1, cols: heads.head_dim, bytes: &norm[i] };
        backend
            .reserve(heads, all.len() / heads.qkv_cols(), contexts.len(), 3 * SPLIT_TOKENS, heads.qkv_cols())
            .expect("scratch");

        let mut oracle = Reference::default();
        let (kv, kv_oracle) = (
            backend.kv(geometry, blocks.len(), 0, None).expect("memory"),
            oracle.kv(geometry, blocks.len(), 0, None).expect("memory"),
        );
        let q_norm = normed.then(|| (backend.vector(view(0)).unwrap(), backend.vector(view(1)).unwrap()));
        let oracle_norm = normed.then(|| (oracle.vector(view(0)).unwrap(), oracle.vector(view(1)).unwrap()));
        let mut expected_layer =
            Layer { backend: &mut oracle, kv: kv_oracle, heads, window, q_norm: oracle_norm };
        let mut layer = Layer { backend, kv, heads, window, q_norm };

        let steps: Vec<(usize, usize)> = contexts.iter().map(|&c| (c, c)).collect();
        let whole = Work::new(&steps, &tables);
        let (expected_x, expected_out) = expected_layer.step(&whole, &all, &inv_freq);
        let (x, out) = layer.step(&whole, &all, &inv_freq);
        assert_close(&format!("{what}: qkv after append"), &x, &expected_x, ELEMENTWISE_TOLERANCE);
        assert_close(&format!("{what}: output"), &out, &expected_out, attention_tolerance(dtype));

        // Each sequence alone: some chunks, then token by token; its bits must be those of the batch above.
        for (s, &context) in contexts.iter().enumerate() {
            let first_row = whole.sequences[s].rows.start as usize;
            let mut done = 0;
            while done < context {
                let left = context - done;
                let rows = if left > 3 { random.below(left - 2).max(1) } else { 1 };
                done += rows;
                let work = Work::new(&[(done, rows)], &tables[s..s + 1]);
                let cols = heads.qkv_cols();
                let (_, part) = layer.step(&work, &values[s][(done - rows) * cols..done * cols], &inv_freq);
                let at = (first_row + done - rows) * heads.q_cols();
                assert_same_bits(
                    &format!("{what}: sequence {s} rows {}..{done} alone", done - rows),
                    &part,
                    &out[at..at + part.len()],
                );
            }
        }
    }
}

/// Draws equal the reference's for the same logits: sampling is exact, since f32 logits are its only input.
pub fn check_sample<B: Backend>(backend: &mut B, seed: u64) {
    let mut random = Random::keyed(seed, 6);
    let mut oracle = Reference::default();
    let (rows, vocab) = (9, 300);
    backend.reserve(heads_of(1, 1, 32), rows, rows, 64, vocab).expect("scratch");
    let logits = normals(&mut random, rows * vocab);
    let (x, xo): (B::Tensor, Matrix) = (tensor(backend, vocab, &logits), tensor(&mut oracle, vocab, &logits));
    let params: Vec<SamplingParams> = (0..rows)
        .map(|i| SamplingParams {
            temperature: [0.0, 0.7, 1.3][i % 3],
            top_p: [1.0, 0.9, 0.5][i % 3],
            top_k: [0, 40][i % 2],
            min_p: [0.0, 0.05][i % 2],
            repetition_penalty: [1.0, 1.1][i % 2],
            frequency_penalty: 0.2 * (i % 2) as f32,
            seed: random.next_u64(),
            ..Default::default()
        })
        .collect();
    let history: Vec<u32> = (0..50).map(|_| random.below(vocab) as u32).collect();
    let requests: Vec<SampleRow> = params
        .iter()
        .enumerate()
        .map(|(i, params)| SampleRow {
            row: rows - 1 - i,
            params,
            prompt: &history[..20],
            generated: &history[20..20 + i],
            banned: &history[40..40 + i % 3],
            position: i as u64,
            top_logprobs: (i % 2 == 0).then_some(5),
            forced: (i == 8).then_some(7),
        })
        .collect();
    let (mut out, mut expected) = (SampleOutput::default(), SampleOutput::default());
    for _ in 0..2 {
        backend.sample(&mut out, &x, &requests);
        oracle.sample(&mut expected, &xo, &requests);
        assert_eq!(out.sampled, expected.sampled, "seed {seed} sample");
        assert_eq!(out.top, expected.top, "seed {seed} sample");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The suite holds for the oracle itself, and notices a backend that is wrong.
    #[test]
    fn reference_conforms() {
        check_all(&mut Reference::default, 1);
    }

    #[test]
    #[should_panic(expected = "element 1")]
    fn a_wrong_value_is_noticed() {
        assert_close("canary", &[1.0, 2.0], &[1.0, 2.1], 1e-3);
    }

    #[test]
    #[should_panic(expected = "canary")]
    fn a_nan_is_noticed() {
        assert_close("canary", &[f32::NAN], &[1.0], 1e-3);
    }
}
