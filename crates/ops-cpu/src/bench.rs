//! Benches of the kernels, each as a fraction of what the machine can do.
//!
//! Ceilings and kernels take turns in every round, and a fraction is the median over rounds of rate / ceiling of the
//! same round: on a machine whose speed drifts, only ratios of neighbours mean anything.

use std::time::Instant;

use ops::{
    Backend, Batch, BlockIndex, DType, Error, HeadShape, KvGeometry, Random, SequenceRows, WeightView,
};

use crate::ceiling::Ceiling;
use crate::{CpuBackend, CpuOptions, CpuTensor, Kv, Linear, Vector};

/// Bytes of weights or KV that a bench goes through before it comes back to the first: far above the caches.
const COLD_BYTES: usize = 192 << 20;

/// Least time of one measurement.
const MEASURE_SECONDS: f64 = 0.02;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads and instruction set.
    pub cpu: CpuOptions,
    /// Type of weights and KV.
    pub dtype: DType,
    /// Rounds over all benches.
    pub rounds: usize,
    /// Only benches whose name or shape contains this.
    pub filter: String,
}

/// What bounds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Reading memory: rates are bytes per second.
    Bandwidth,
    /// Matrix products: rates are floating-point operations per second.
    Matmul,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// Operation.
    pub name: &'static str,
    /// Shape.
    pub shape: String,
    /// Median time of one call in microseconds.
    pub median_us: f64,
    /// (slowest - fastest) / median over rounds.
    pub spread: f64,
    /// What bounds it.
    pub bound: Bound,
    /// Median rate, per second.
    pub rate: f64,
    /// Median ceiling of the machine, per second.
    pub ceiling: f64,
    /// Median over rounds of rate / ceiling.
    pub fraction: f64,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = match self.bound {
            Bound::Bandwidth => "GB/s",
            Bound::Matmul => "GFLOP/s",
        };
        write!(
            f,
            "{:<10} {:<38} {:>10.1} us  +-{:>3.0} %  {:>7.1} of {:>7.1} {unit:<7}  {:>5.1} %",
            self.name,
            self.shape,
            self.median_us,
            50.0 * self.spread,
            self.rate / 1e9,
            self.ceiling / 1e9,
            100.0 * self.fraction
        )
    }
}

/// A bench: what one call costs, and the call.
struct Case {
    name: &'static str,
    shape: String,
    bound: Bound,
    /// Bytes or operations per call.
    cost: f64,
    call: Box<dyn FnMut(&mut CpuBackend)>,
}

/// Runs all benches.
///
/// # Errors
/// When memory is short or the instruction set is not there.
pub fn run(options: &Options) -> Result<Vec<Row>, Error> {
    let mut backend = CpuBackend::new(options.cpu.clone())?;
    let ceiling = Ceiling::new(backend.isa, backend.pool.threads())?;
    let mut cases = cases(&mut backend, options)?;
    let mut seconds = vec![Vec::new(); cases.len()];
    let mut ceilings = vec![Vec::new(); cases.len()];
    for _ in 0..options.rounds.max(1) {
        for (i, case) in cases.iter_mut().enumerate() {
            ceilings[i].push(match case.bound {
                Bound::Bandwidth => ceiling.read_bandwidth(&mut backend.pool),
                Bound::Matmul => ceiling.matmul_rate(&mut backend.pool, options.dtype),
            });
            seconds[i].push(time(&mut backend, &mut case.call));
        }
    }
    let rows = cases.iter().zip(seconds).zip(ceilings).map(|((case, seconds), ceilings)| {
        let fractions = seconds.iter().zip(&ceilings).map(|(s, c)| case.cost / s / c).collect();
        let (fastest, slowest) = seconds.iter().fold((f64::MAX, 0f64), |(a, b), &s| (a.min(s), b.max(s)));
        let median_seconds = median(seconds);
        Row {
            name: case.name,
            shape: case.shape.clone(),
            median_us: 1e6 * median_seconds,
            spread: (slowest - fastest) / median_seconds,
            bound: case.bound,
            rate: case.cost / median_seconds,
            ceiling: median(ceilings),
            fraction: median(fractions),
        }
    });
    Ok(rows.collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds per call.
fn time(backend: &mut CpuBackend, call: &mut dyn FnMut(&mut CpuBackend)) -> f64 {
    call(backend);
    let start = Instant::now();
    let mut calls = 0;
    while calls < 3 || start.elapsed().as_secs_f64() < MEASURE_SECONDS {
        call(backend);
        calls += 1;
    }
    start.elapsed().as_secs_f64() / f64::from(calls)
}

/// The shapes of a 0.6 B model (Qwen3: hidden 1024, 16 query and 8 KV heads of 128, feed-forward 3072), and attention
/// also with the groups of four of Llama 3.
fn cases(backend: &mut CpuBackend, options: &Options) -> Result<Vec<Case>, Error> {
    let dtype = options.dtype;
    let mut cases = Vec::new();
    let wanted = |name: &str, shape: &str| name.contains(&options.filter) || shape.contains(&options.filter);
    for (inputs, outputs) in [(1024, 4096), (1024, 6144), (3072, 1024), (1024, 131_072)] {
        for rows in [1, 4, 16, 512, 2048] {
            let name = if rows <= 16 { "gemv" } else { "gemm" };
            let shape = format!("{rows} x {inputs} -> {outputs}");
            if wanted(name, &shape) && (rows <= 16 || outputs < 100_000) {
                cases.push(linear(backend, name, shape, dtype, rows, inputs, outputs)?);
            }
        }
    }
    let group_2 = HeadShape { q_heads: 16, kv_heads: 8, head_dim: 128 };
    let group_4 = HeadShape { q_heads: 32, kv_heads: 8, head_dim: 128 };
    for (heads, sequences, context, rows) in [
        (group_2, 1, 1024, 1),
        (group_2, 1, 8192, 1),
        (group_4, 1, 32_768, 1),
        (group_4, 4, 8192, 1),
        (group_2, 1, 1024, 1024),
        (group_2, 1, 8192, 512),
        (group_4, 1, 8192, 512),
    ] {
        let name = if rows == 1 { "decode" } else { "prefill" };
        let shape = format!(
            "{sequences} x {rows} rows at {context}, {}/{} heads of {}",
            heads.q_heads, heads.kv_heads, heads.head_dim
        );
        if wanted(name, &shape) {
            cases.push(attention(backend, name, shape, dtype, heads, sequences, context, rows)?);
        }
    }
    for rows in [1, 512] {
        for (name, shape) in [
            ("rms_norm", format!("{rows} x 1024")),
            ("swiglu", format!("{rows} x 3072")),
            ("append", format!("{rows} rows, 16/8 heads of 128")),
        ] {
            if wanted(name, &shape) {
                cases.push(row_wise(backend, name, shape, dtype, rows)?);
            }
        }
    }
    Ok(cases)
}

/// Bytes of random weights; a short run of them repeated, since their values do not matter.
fn weights(backend: &mut CpuBackend, rows: usize, cols: usize, dtype: DType) -> Result<Linear, Error> {
    let mut random = Random::new(3);
    let pattern: Vec<u8> =
        (0..997).flat_map(|_| half::bf16::from_f32(0.1 * random.normal()).to_le_bytes()).collect();
    let bytes: Vec<u8> = pattern.iter().copied().cycle().take(rows * cols * 2).collect();
    backend.linear(&[WeightView { dtype: DType::Bf16, rows, cols, bytes: &bytes }], &[], dtype)
}

fn normals(backend: &mut CpuBackend, rows: usize, cols: usize) -> Result<CpuTensor, Error> {
    let mut random = Random::new(4);
    let mut tensor = backend.tensor(rows, cols)?;
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
    backend.upload(&mut tensor, &values);
    Ok(tensor)
}

fn linear(
    backend: &mut CpuBackend,
    name: &'static str,
    shape: String,
    dtype: DType,
    rows: usize,
    inputs: usize,
    outputs: usize,
) -> Result<Case, Error> {
    let bytes = backend.linear_bytes(outputs, inputs, dtype);
    // A product of many rows is bound by arithmetic wherever its weights come from.
    let copies = if rows > 16 { 1 } else { (COLD_BYTES as u64).div_ceil(bytes) };
    let mut matrices = Vec::new();
    for _ in 0..copies {
        matrices.push(weights(backend, outputs, inputs, dtype)?);
    }
    let x = normals(backend, rows, inputs)?;
    let mut out = backend.tensor(rows, outputs)?;
    let mut turn = 0;
    let call = Box::new(move |backend: &mut CpuBackend| {
        turn = (turn + 1) % matrices.len();
        backend.linear_forward(&mut out, &x, &matrices[turn]);
    });
    let (bound, cost) = if rows > 16 {
        (Bound::Matmul, 2.0 * (rows * inputs * outputs) as f64)
    } else {
        (Bound::Bandwidth, bytes as f64)
    };
    Ok(Case { name, shape, bound, cost, call })
}

/// A batch of equal sequences over blocks in order.
struct Sequences {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    tables: Vec<BlockIndex>,
}

impl Sequences {
    fn new(sequences: usize, context: usize, rows: usize, page_tokens: usize) -> Self {
        let blocks = context.div_ceil(page_tokens) as u32;
        let first = (context - rows) as u32;
        let one = |i: u32| SequenceRows {
            rows: i * rows as u32..(i + 1) * rows as u32,
            first_position: first,
            prompt_len: context as u32,
            blocks: i * blocks..(i + 1) * blocks,
            attention: Default::default(),
            seat: ops::SeatIndex(i),
            quota: 0,
        };
        Sequences {
            tokens: vec![0; sequences * rows],
            positions: (0..sequences).flat_map(|_| first..context as u32).collect(),
            sequences: (0..sequences as u32).map(one).collect(),
            tables: (0..sequences as u32 * blocks).map(BlockIndex).collect(),
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: &self.tables,
            methods: &[],
        }
    }
}

/// A pool with random pages.
fn pages(backend: &mut CpuBackend, geometry: KvGeometry, blocks: usize) -> Result<Kv, Error> {
    let mut kv = backend.kv(geometry, blocks, 0, None)?;
    let mut random = Random::new(5);
    let len = geometry.page_tokens * geometry.head_dim;
    let values: Vec<f32> = (0..len + 64).map(|_| random.normal()).collect();
    for layer in 0..geometry.num_layers {
        for block in 0..blocks {
            for head in 0..geometry.kv_heads {
                let shift = (7 * block + head) % 64;
                let (k, v) = (&values[shift..shift + len], &values[64 - shift..64 - shift + len]);
                backend.write_page(&mut kv, layer, BlockIndex(block as u32), head, k, v);
            }
        }
    }
    Ok(kv)
}

fn attention(
    backend: &mut CpuBackend,
    name: &'static str,
    shape: String,
    dtype: DType,
    heads: HeadShape,
    sequences: usize,
    context: usize,
    rows: usize,
) -> Result<Case, Error> {
    let mut geometry = KvGeometry {
        num_layers: 1,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        page_tokens: 16,
        dtype,
    };
    let blocks = sequences * geometry.blocks(context);
    let bytes = sequences * context * geometry.token_bytes();
    if rows == 1 {
        geometry.num_layers = COLD_BYTES.div_ceil(bytes);
    }
    let kv = pages(backend, geometry, blocks)?;
    backend.reserve(heads, sequences * rows, sequences, context, heads.qkv_cols())?;
    let work = Sequences::new(sequences, context, rows, geometry.page_tokens);
    let qkv = normals(backend, sequences * rows, heads.qkv_cols())?;
    let mut out = backend.tensor(sequences * rows, heads.q_cols())?;
    let mut layer = 0;
    let call = Box::new(move |backend: &mut CpuBackend| {
        layer = (layer + 1) % geometry.num_layers;
        backend.attend(&mut out, None, &kv, layer, &qkv, heads, None, &work.batch(), None, 0);
    });
    // Scores and weighted values, each 2 operations per channel, of the slots that rows attend to.
    let attended: usize = (context - rows..context).map(|position| position + 1).sum();
    let (bound, cost) = if rows == 1 {
        (Bound::Bandwidth, bytes as f64)
    } else {
        (Bound::Matmul, 4.0 * (sequences * attended * heads.q_cols()) as f64)
    };
    Ok(Case { name, shape, bound, cost, call })
}

fn row_wise(
    backend: &mut CpuBackend,
    name: &'static str,
    shape: String,
    dtype: DType,
    rows: usize,
) -> Result<Case, Error> {
    let heads = HeadShape { q_heads: 16, kv_heads: 8, head_dim: 128 };
    let case =
        |floats: usize, call| Case { name, shape, bound: Bound::Bandwidth, cost: 4.0 * floats as f64, call };
    let ones = |backend: &mut CpuBackend, cols: usize| -> Result<Vector, Error> {
        let bytes: Vec<u8> = (0..cols).flat_map(|_| 1f32.to_le_bytes()).collect();
        backend.vector(WeightView { dtype: DType::F32, rows: 1, cols, bytes: &bytes })
    };
    Ok(match name {
        "rms_norm" => {
            let (x, mut out) = (normals(backend, rows, 1024)?, backend.tensor(rows, 1024)?);
            let weight = ones(backend, 1024)?;
            let call = move |backend: &mut CpuBackend| backend.rms_norm(&mut out, &x, &weight, 1e-6);
            case(2 * rows * 1024, Box::new(call))
        }
        "swiglu" => {
            let (x, mut out) = (normals(backend, rows, 2 * 3072)?, backend.tensor(rows, 3072)?);
            let call = move |backend: &mut CpuBackend| backend.swiglu(&mut out, &x);
            case(3 * rows * 3072, Box::new(call))
        }
        _ => {
            let geometry = KvGeometry { num_layers: 1, kv_heads: 8, head_dim: 128, page_tokens: 16, dtype };
            let work = Sequences::new(1, rows, rows, 16);
            let mut kv = backend.kv(geometry, geometry.blocks(rows), 0, None)?;
            let mut qkv = normals(backend, rows, heads.qkv_cols())?;
            let weight = ones(backend, 128)?;
            let mut angles = backend.tensor(rows, 128)?;
            backend.rope_angles(&mut angles, &work.positions, &[0.01; 64], &vec![0; rows], 1.0);
            let call = move |backend: &mut CpuBackend| {
                let norm = Some((&weight, &weight, 1e-6));
                backend.append(&mut kv, 0, &mut qkv, heads, norm, &angles, &work.batch());
            };
            case(2 * rows * heads.qkv_cols(), Box::new(call))
        }
    })
}
