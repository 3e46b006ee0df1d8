//! The runner of a server on the CPU backend, with whole models: what is in a batch changes no bit of it, a budget that
//! holds the context gives the bits of dense attention, and a warm step allocates nothing.

#[path = "runner/mixes.rs"]
mod mixes;
#[path = "runner/segments.rs"]
mod segments;

use std::path::PathBuf;

use engine::{ModelRunner, Runner};
use model::{DeviceKv, KvSpec, Limits, Model, ModelConfig, Rope, Source, Workspace, kv_geometry};
use ops::coverage::{Coverage, Inspection, Inspections};
use ops::residency::EvictionRule;
use ops::sample::{SampleOutput, SampleRow, SamplingParams};
use ops::sparse::{Attention, DigestSpec, Method, SelectionLimits};
use ops::tier::{TierSpec, TooSmall, Transfer};
use ops::{Batch, BlockIndex, DType, Gate, Random, SeatIndex, SequenceRows};
use ops_cpu::{CpuBackend, CpuOptions};
use sparse::Served;

const PAGE_TOKENS: usize = 16;
const TOP: u32 = 8;
/// Tokens of the longest sequence.
const CONTEXT: usize = 700;
const SEQUENCES: usize = 4;
/// One more, so that a sequence that is parked can go on in another one.
const SEATS: usize = SEQUENCES + 1;
/// Blocks whose digests HBM has at a time: what a step of [`MIXED`] needs, and not all blocks.
const PLACES: usize = 72;

/// Policies of the sequences, one each. The sequences before them are the same, dense.
const POLICIES: [&str; SEQUENCES] = [
    "quest",
    "seerattention:threshold=0.02",
    "random:partition=4",
    // Short spans and no window, so that a small budget has room for clusters.
    "retroinfer:span=64:window=1",
];
/// Tokens of the prompts of sequences that attend sparsely.
const PROMPT: usize = 150;

/// Tokens of a prompt that go through a layer at once, where it goes layer by layer.
const TILE_ROWS: usize = 40;

/// Rows of a step at most.
const ROWS_MAX: usize = 256;

struct Device {
    runner: ModelRunner<CpuBackend>,
    /// Extents of cache frames of each sequence and layer.
    quota: u32,
    vocab: usize,
    layers: usize,
    methods: Vec<Method>,
    /// Which of them the policies are; `None` attends to everything.
    method_of: Vec<Option<u16>>,
}

/// An HBM tier.
#[derive(Clone, Copy, Debug)]
struct Hbm {
    /// Bytes above the least.
    more: u64,
    rule: EvictionRule,
    /// Blocks whose digests have a place.
    places: usize,
}

/// A gate with random weights.
fn gate(config: &ModelConfig) -> Gate {
    let (heads, num_layers, rope) = (config.heads, config.num_layers, Rope::new(&config.rope));
    let dim = heads.head_dim / 2;
    let mut random = Random::new(5);
    let rows = num_layers * heads.kv_heads * dim;
    let mut weights = |cols: usize| (0..rows * cols).map(|_| random.normal()).collect();
    let (k, q) = (weights(3 * heads.head_dim), weights(heads.group() * heads.head_dim));
    Gate { heads, num_layers, dim, k, q, inv_freq: rope.inv_freq().to_vec(), scale: rope.scale() }
}

fn load(folder: &str, dtype: DType, threads: usize) -> Device {
    load_tiered(folder, dtype, threads, None)
}

/// With an HBM tier of so many bytes more than the least, if any are given, and this rule.
fn load_tiered(folder: &str, dtype: DType, threads: usize, hbm: Option<(u64, EvictionRule)>) -> Device {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder);
    let hbm = hbm.map(|(more, rule)| Hbm { more, rule, places: PLACES });
    load_with(folder, dtype, threads, &POLICIES.map(str::to_owned), hbm)
}

fn load_with(folder: PathBuf, dtype: DType, threads: usize, policies: &[String], hbm: Option<Hbm>) -> Device {
    let source = Source::Directory(folder);
    let mut backend = CpuBackend::new(CpuOptions { threads: Some(threads), isa: None }).expect("a backend");
    let model = Model::load(&mut backend, &source, Some(dtype), &mut |_, _| {}).expect("a model");
    let limits = Limits {
        rows_max: ROWS_MAX,
        logits_rows_max: 2,
        sequences_max: SEQUENCES,
        context_max: CONTEXT,
        tile_rows: TILE_ROWS,
        hidden_rows: CONTEXT,
    };
    let workspace = Workspace::new(&mut backend, model.config(), limits).expect("memory");
    let geometry = kv_geometry(model.config(), PAGE_TOKENS, model.dtype());
    let num_blocks = SEQUENCES * geometry.blocks(CONTEXT);
    let (served, variants) = Served::variants(policies).expect("policies");
    let methods: Vec<Method> = variants.iter().filter_map(|v| v.method).collect();
    let mut numbers = 0..;
    let method_of = variants.iter().map(|v| v.method.and_then(|_| numbers.next())).collect();
    let limits = SelectionLimits::new(&methods, model.config().heads, PAGE_TOKENS, ROWS_MAX, CONTEXT);
    let gate = gate(model.config());
    let digests = served.digests().iter().map(|d| d.with_gate(Some(&gate))).collect();
    // Layers with a window get no digests, and so short a window would lie in the local pages of a span.
    let windowed = model.config().windows.iter().all(Option::is_some);
    let made_together = served.digests().iter().map(DigestSpec::made_together).max();
    let tier = hbm.map(|Hbm { more, rule, .. }| {
        let spec = TierSpec {
            bytes: 0,
            seats: SEATS,
            context_max: CONTEXT,
            inject_tokens_max: ROWS_MAX,
            replay_rows: ROWS_MAX,
            partition_tokens_max: if windowed { 32 } else { made_together.unwrap_or(1) },
            copies: DigestSpec::copies(served.digests()),
            eviction: rule,
            transfer: Transfer::Fused,
            link: None,
            poison: true,
        };
        let TooSmall { smallest } = spec.layout(&geometry).expect_err("nothing is too small");
        TierSpec { bytes: smallest + more, ..spec }
    });
    let extents = tier.map_or(0, |tier| tier.layout(&geometry).expect("large enough").extents);
    let quota = (extents / geometry.num_layers / SEATS) as u32;
    let spec = KvSpec {
        tier,
        digests,
        digest_places: hbm.map(|hbm| hbm.places),
        gate: Some(gate),
        selections: Some(limits),
        ..KvSpec::dense(geometry, num_blocks)
    };
    let kv = DeviceKv::new(&mut backend, &spec).expect("memory");
    let (vocab, layers) = (model.config().vocab_size, model.config().num_layers);
    let runner = ModelRunner::new(backend, model, workspace, kv);
    Device { runner, quota, vocab, layers, methods, method_of }
}

/// Token drawn, bits of its log-probability, bits of the likeliest, bits of what a selection covered, if that is not everything.
type Seen = (u32, u32, Vec<(u32, u32)>, Option<[u32; 2]>);

/// A sequence of given tokens, part of which has run.
struct Fed {
    tokens: Vec<u32>,
    /// Of its policy.
    place: usize,
    seat: SeatIndex,
    blocks: Vec<BlockIndex>,
    prompt: usize,
    /// Budget of its policy; `None` attends to everything.
    budget: Option<u32>,
    done: usize,
    /// After each step that it was in.
    seen: Vec<Seen>,
}

impl Fed {
    fn new(place: usize, budget: Option<u32>, length: usize, vocab: usize) -> Self {
        let mut random = Random::new(7 + place as u64);
        let tokens = (0..length).map(|_| random.below(vocab) as u32).collect();
        let block = |i: usize| BlockIndex((i * SEQUENCES + place) as u32);
        let blocks = (0..CONTEXT.div_ceil(PAGE_TOKENS)).map(block).collect();
        let seat = SeatIndex(place as u32);
        Fed { tokens, place, seat, blocks, prompt: PROMPT, budget, done: 0, seen: Vec::new() }
    }
}

/// The arrays of a step, reused.
#[derive(Default)]
struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    tables: Vec<BlockIndex>,
    inspections: Inspections,
    out: SampleOutput,
}

impl Step {
    /// Runs the next `counts[i]` tokens of `fed[i]` together, and says how often `run` allocated.
    fn run(&mut self, device: &mut Device, fed: &mut [&mut Fed], counts: &[usize]) -> u64 {
        let Step { tokens, positions, sequences, tables, inspections, out } = self;
        inspections.asked.clear();
        inspections.found.clear();
        inspections.found.reserve(SEQUENCES);
        tokens.clear();
        positions.clear();
        sequences.clear();
        tables.clear();
        let params = SamplingParams { temperature: 1.0, seed: 3, ..Default::default() };
        let mut samples = Vec::new();
        for (fed, &count) in fed.iter_mut().zip(counts) {
            let (row, table, position) = (tokens.len() as u32, tables.len() as u32, fed.done as u32);
            tokens.extend_from_slice(&fed.tokens[fed.done..fed.done + count]);
            positions.extend(position..position + count as u32);
            tables.extend_from_slice(&fed.blocks);
            sequences.push(SequenceRows {
                rows: row..row + count as u32,
                first_position: position,
                prompt_len: fed.prompt as u32,
                blocks: table..tables.len() as u32,
                attention: match (fed.budget, device.method_of[fed.place]) {
                    (Some(budget), Some(method)) => Attention::Sparse { method, budget },
                    _ => Attention::Dense,
                },
                seat: fed.seat,
                quota: device.quota,
            });
            if fed.done == 0 {
                device.runner.release(fed.seat);
            }
            fed.done += count;
            let is_sparse = fed.budget.is_some() && device.method_of[fed.place].is_some();
            if is_sparse && fed.done > fed.prompt {
                inspections.asked.push(Inspection { seat: fed.seat, layer: (fed.done % 2) as u32 });
            }
            samples.push(SampleRow {
                row: tokens.len() - 1,
                params: &params,
                prompt: &[],
                generated: &[],
                banned: &[],
                position: fed.done as u64,
                top_logprobs: Some(TOP),
                forced: None,
            });
        }
        let batch = Batch { tokens, positions, sequences, block_tables: tables, methods: &device.methods };
        let info = allocation_counter::measure(|| {
            device.runner.run(&ops::Step::of(batch), &samples, inspections, out)
        });
        for (fed, sampled) in fed.iter_mut().zip(&out.sampled) {
            let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
            let bits = top.iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
            let covered = inspections.found.iter().find(|(seat, _)| *seat == fed.seat);
            let covered = covered.filter(|(_, coverage)| *coverage != Coverage::WHOLE);
            let covered = covered.map(|(_, coverage)| [coverage.mass, coverage.recall].map(f32::to_bits));
            fed.seen.push((sampled.token, sampled.logprob.to_bits(), bits, covered));
        }
        info.count_total
    }
}

/// Rows of the sequences in each step: prompts in chunks beside decodes, each alone and all together.
const MIXED: [[usize; SEQUENCES]; 8] = [
    [200, 0, 0, 0],
    [1, 40, 0, 30],
    [1, 160, 3, 90],
    [1, 1, 150, 100],
    [90, 1, 1, 1],
    [1, 1, 20, 100],
    [0, 100, 1, 1],
    [1, 1, 1, 1],
];

fn run_mixed(device: &mut Device, budget: Option<u32>) -> Vec<Fed> {
    let mut all: Vec<Fed> = (0..SEQUENCES).map(|i| Fed::new(i, budget, CONTEXT, device.vocab)).collect();
    let mut step = Step::default();
    for counts in MIXED {
        let (mut fed, mut some): (Vec<&mut Fed>, Vec<usize>) = (Vec::new(), Vec::new());
        for (sequence, &count) in all.iter_mut().zip(&counts).filter(|(_, count)| **count > 0) {
            fed.push(sequence);
            some.push(count);
        }
        step.run(device, &mut fed, &some);
    }
    all
}

#[test]
fn a_mixed_batch_equals_one_by_one() {
    // One model per architecture and option that changes what a batch looks like from inside.
    for folder in [
        "demo-model",
        "xtask/golden/models/llama-rope-dynamic",
        "xtask/golden/models/mistral-window",
        "xtask/golden/models/qwen2-bias",
        "xtask/golden/models/qwen3-qknorm",
    ] {
        for dtype in [DType::F32, DType::Bf16] {
            for budget in [None, Some(64)] {
                let mixed = run_mixed(&mut load(folder, dtype, 3), budget);
                // Alone, on another number of threads, where the sequence ends in the same places.
                let mut device = load(folder, dtype, 1);
                for (place, expected) in mixed.iter().enumerate() {
                    let mut alone = Fed::new(place, budget, CONTEXT, device.vocab);
                    let mut step = Step::default();
                    for counts in MIXED.iter().filter(|counts| counts[place] > 0) {
                        step.run(&mut device, &mut [&mut alone], &[counts[place]]);
                    }
                    assert_eq!(
                        alone.seen, expected.seen,
                        "{folder} in {dtype}, {budget:?}, sequence {place}"
                    );
                }
            }
        }
    }
}

/// From the smallest legal HBM up, with frames that hold nothing full of NaN: the same bits.
#[test]
fn tiers_change_no_bit() {
    for (folder, dtype) in [
        ("demo-model", DType::Bf16),
        ("demo-model", DType::F32),
        ("xtask/golden/models/llama-rope-dynamic", DType::F32),
        ("xtask/golden/models/mistral-window", DType::Bf16),
        ("xtask/golden/models/qwen3-qknorm", DType::F16),
    ] {
        for budget in [None, Some(64)] {
            let unified = run_mixed(&mut load(folder, dtype, 2), budget);
            let mut tiers =
                [0, 1 << 16, 1 << 19, 1 << 30].map(|more| (more, EvictionRule::Bucketed)).to_vec();
            if folder == "demo-model" {
                tiers.extend([(1 << 19, EvictionRule::Exact), (1 << 19, EvictionRule::Global)]);
            }
            for (more, rule) in tiers {
                let mut device = load_tiered(folder, dtype, 3, Some((more, rule)));
                let tiered = run_mixed(&mut device, budget);
                let rule = rule.name();
                let what = format!("{folder} in {dtype}, {budget:?}, {more} bytes above the least, {rule}");
                assert_eq!(draws(&tiered), draws(&unified), "{what}");
                let pages = device.runner.tier_state().expect("tiers").pages;
                match more {
                    0 => assert!(pages.streamed > 0 && pages.hits + pages.misses == 0, "{what}: {pages:?}"),
                    1073741824 => {
                        assert!(pages.hits > 0 && pages.streamed + pages.evictions == 0, "{what}: {pages:?}")
                    }
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn a_warm_step_allocates_nothing() {
    let rules = EvictionRule::ALL.map(|rule| Some((1 << 18, rule)));
    for hbm in [None, Some((0, EvictionRule::Bucketed))].into_iter().chain(rules) {
        let mut device = load_tiered("demo-model", DType::Bf16, 2, hbm);
        for budget in [None, Some(48)] {
            run_mixed(&mut device, budget);
            let mut all: Vec<Fed> =
                (0..SEQUENCES).map(|i| Fed::new(i, budget, CONTEXT, device.vocab)).collect();
            let mut step = Step::default();
            let mut fed: Vec<&mut Fed> = all.iter_mut().collect();
            step.run(&mut device, &mut fed, &[200, 30, 1, 20]);
            for counts in [[1, 1, 1, 1], [50, 1, 1, 110], [1, 100, 100, 50], [1, 1, 1, 1]] {
                let allocations = step.run(&mut device, &mut fed, &counts);
                assert_eq!(allocations, 0, "{hbm:?}, {budget:?}, rows {counts:?}");
            }
        }
    }
}

/// What an answer says, whatever the order of splits and rows behind it.
fn draws(fed: &[Fed]) -> Vec<&Vec<Seen>> {
    fed.iter().map(|fed| &fed.seen).collect()
}

#[test]
fn a_budget_that_holds_the_context_is_dense_and_a_smaller_one_is_not() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let device = || load("demo-model", dtype, 2);
        let dense = run_mixed(&mut device(), None);
        let full = run_mixed(&mut device(), Some(CONTEXT as u32));
        assert_eq!(draws(&full), draws(&dense), "{dtype}");
        let small = run_mixed(&mut device(), Some(32));
        for place in 0..SEQUENCES {
            assert_ne!(small[place].seen, dense[place].seen, "{dtype}: {}", POLICIES[place]);
        }
    }
}
