//! `sparseserve bench`: kernels against what the machine can do, and a model against what its bytes and operations
//! allow. Ceilings are measured between the steps that they are compared with. `bench cache` is in its own file.

use std::io::Write;
use std::time::Instant;

use engine::Sparse;
use engine::{ModelRunner, Runner};
use kv::{QuotaRule, Quotas, Want};
use model::DeviceKv;
use ops::coverage::Inspections;
use ops::residency::{EXTENT_FRAMES, SeatCounters};
use ops::sample::{SampleOutput, SampleRow, SamplingParams};
use ops::sparse::{Attention, DigestLayout, Method, Score};
use ops::tally::Overlap;
use ops::{Backend, Batch, BlockIndex, DType, KvGeometry, Random, SeatIndex, SequenceRows, Step};
use ops_cpu::bench::{Bound, Options, Row};
use ops_cpu::ceiling::Ceiling;
use ops_cpu::{CpuOptions, Pool};
use serde_json::{Value, json};

use super::cache;
use super::commands::{Bench, BenchArgs, BenchEngineArgs, BenchKernelsArgs};
use super::failure::Failure;
use super::load::{self, Device, Prepared};
use super::log;
use super::metadata;
use super::options::ConfigFile;
use super::profile::{Entry, Profiled};
use super::settings::{ComputeSettings, EngineSettings, LogSettings, ModelChoice};
use super::sparse::player as player_of;

/// Rounds over the kernels.
const KERNEL_ROUNDS: usize = 7;
/// Ceilings are measured anew after this many decode steps.
const STEPS_PER_CEILING: usize = 8;
/// Different random pages that the KV is filled with.
const RANDOM_PAGES: usize = 61;

/// Runs the command.
pub fn run(args: BenchArgs) -> Result<(), Failure> {
    match args.what {
        Bench::Kernels(args) => kernels(args),
        Bench::Engine(args) => engine(*args),
        Bench::Cache(args) => cache::run(&args),
        Bench::Metadata(args) => metadata::run(&args),
    }
}

fn kernels(args: BenchKernelsArgs) -> Result<(), Failure> {
    let ComputeSettings { threads, isa } = ComputeSettings::resolve(args.compute)?;
    let cpu = CpuOptions { threads: Some(threads), isa: Some(isa) };
    let options = Options { cpu, dtype: DType::Bf16, rounds: KERNEL_ROUNDS, filter: String::new() };
    let rows = ops_cpu::bench::run(&options)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let ceiling = |bound| rows.iter().filter(|r| r.bound == bound).map(|r| r.ceiling).fold(0.0, f64::max);
        let row = |r: &Row| {
            json!({
                "name": r.name, "shape": r.shape, "median_us": r.median_us, "spread": r.spread,
                "bound": match r.bound { Bound::Bandwidth => "bandwidth", Bound::Matmul => "matmul" },
                "rate": r.rate, "ceiling": r.ceiling, "fraction": r.fraction,
            })
        };
        let object = json!({
            "threads": threads,
            "isa": isa.name(),
            "bf16_gemm_gflops": ceiling(Bound::Matmul) / 1e9,
            "read_gb_per_s": ceiling(Bound::Bandwidth) / 1e9,
            "rows": rows.iter().map(row).collect::<Vec<Value>>(),
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(out, "{threads} threads, {}; rates of the ceiling measured beside them", isa.name())?;
        for row in rows {
            writeln!(out, "{row}")?;
        }
    }
    Ok(())
}

/// Every operation of the device is timed: that costs microseconds per step.
type BenchDevice = Profiled<Device>;

/// What a phase took, and what the machine would have allowed.
struct Phase {
    /// Median seconds of a step.
    seconds: f64,
    /// (slowest - fastest) / median.
    spread: f64,
    /// Tokens per second.
    rate: f64,
    /// Tokens per second that bytes and operations allow.
    bound: f64,
    /// Median over steps of rate / bound of the same moment.
    fraction: f64,
}

impl Phase {
    /// From (seconds, seconds at the bound) of each step of `tokens` tokens.
    fn new(tokens: usize, steps: &[(f64, f64)]) -> Self {
        let median = |values: Vec<f64>| {
            let mut sorted = values;
            sorted.sort_by(f64::total_cmp);
            sorted[sorted.len() / 2]
        };
        let seconds = median(steps.iter().map(|s| s.0).collect());
        let slowest = steps.iter().map(|s| s.0).fold(0.0, f64::max);
        let fastest = steps.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
        Phase {
            seconds,
            spread: (slowest - fastest) / seconds,
            rate: tokens as f64 / seconds,
            bound: tokens as f64 / median(steps.iter().map(|s| s.1).collect()),
            fraction: median(steps.iter().map(|s| s.1 / s.0).collect()),
        }
    }

    fn json(&self) -> Value {
        json!({
            "step_ms": 1e3 * self.seconds, "spread": self.spread, "tokens_per_s": self.rate,
            "bound_tokens_per_s": self.bound, "fraction": self.fraction,
        })
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Phase { seconds, spread, rate, bound, fraction } = self;
        write!(
            f,
            "{:.2} ms a step (+-{:.0} %), {rate:.1} tokens/s of {bound:.1} allowed: {:.0} %",
            1e3 * seconds,
            50.0 * spread,
            100.0 * fraction
        )
    }
}

fn engine(args: BenchEngineArgs) -> Result<(), Failure> {
    let file = ConfigFile::read(args.common.config.as_deref())?;
    let _log = log::start(&LogSettings::resolve(args.common.clone().or(file.common), "warn"))?;
    let choice = ModelChoice::resolve(args.model.as_deref().or(file.model.as_deref()))?;
    let mut engine = args.engine.clone().complete(file.engine);
    engine.sparse.policy.get_or_insert_with(|| "dense".into());
    let mut settings = EngineSettings::resolve(engine, args.batch)?;
    if args.context == 0 || args.batch == 0 || args.steps == 0 || args.prefill_tokens == Some(0) {
        return Err(Failure::input("--context, --batch, --steps and --prefill-tokens must be at least 1"));
    }
    // One step more than is timed warms up.
    let context_end = (args.context + args.steps + 1).max(args.prefill_tokens.unwrap_or(0));
    settings.max_context.get_or_insert(context_end);
    settings.max_num_seqs = args.batch;
    settings.parks = false;
    let device = Profiled::new(load::device(&settings.compute)?);
    let prepared = Prepared::on(device, load::source(&choice)?, &settings)?;
    let blocks = prepared.geometry.blocks(context_end);
    if context_end > prepared.max_context || blocks * args.batch > prepared.plan.num_blocks {
        return Err(Failure::input(format!(
            "{} sequences of {context_end} tokens need {} KV blocks; there are {} for contexts of {}",
            args.batch,
            blocks * args.batch,
            prepared.plan.num_blocks,
            prepared.max_context
        )));
    }
    let ComputeSettings { threads, isa } = settings.compute.clone();
    let sparse = settings.sparse.method(args.context)?;
    if args.replay_selection.is_some() && sparse.is_none() {
        return Err(Failure::input(
            "--replay-selection: dense attention selects nothing; --policy names one that does",
        ));
    }
    let player = args.replay_selection.as_deref();
    let mut player = player.map(|path| player_of(path, &prepared.geometry, args.context)).transpose()?;
    let context_last = args.context + args.steps;
    let (mut quotas, wants) =
        frames(&prepared, settings.quota_rule, args.batch, sparse.as_ref(), context_last);
    let work = Work::new(&prepared, settings.max_inject_tokens, args.batch, blocks, sparse, wants);
    let (dtype, geometry, num_blocks) = (prepared.dtype, prepared.geometry, blocks * args.batch);
    let mut runner = prepared.load_filled(&mut |backend, kv| {
        fill(backend, kv, geometry, num_blocks, args.filled);
        work.digest(backend, kv, args.context);
        player.take().into_iter().for_each(|player| kv.replay(player));
    })?;
    let mut limits = Limits { ceiling: Ceiling::new(isa, threads)?, pool: Pool::new(threads)?, dtype };

    let prefill =
        args.prefill_tokens.map(|tokens| work.prefill(&mut runner, &mut quotas, &mut limits, tokens));
    let (decode, pages) = work.decode(&mut runner, &mut quotas, &mut limits, args.context, args.steps);
    let profile = runner.backend().take();
    let mut out = std::io::stdout().lock();
    if args.json {
        let object = json!({
            "model": choice.name(), "dtype": dtype.name(), "threads": threads, "isa": isa.name(),
            "context": args.context, "batch": args.batch, "prefill_tokens": args.prefill_tokens,
            "prefill": prefill.as_ref().map(Phase::json), "decode": decode.json(),
            "pages": pages.as_ref().map(|pages| pages_json(pages, args.steps)),
            "profile": args.profile.then(|| profile_json(&profile, args.steps)),
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(out, "{}, {dtype}, {threads} threads, {}", choice.name(), isa.name())?;
        if let (Some(tokens), Some(phase)) = (args.prefill_tokens, &prefill) {
            writeln!(out, "prefill of {tokens} tokens: {phase}")?;
        }
        writeln!(out, "decode of {} after {} tokens: {decode}", args.batch, args.context)?;
        if let Some(pages) = &pages {
            write_pages(&mut out, pages, args.steps)?;
        }
        if args.profile {
            write_profile(&mut out, &profile, args.steps)?;
        }
    }
    Ok(())
}

/// What the steps did to the pages of an HBM tier, and how much of each selection the next one repeated.
struct Pages {
    counters: SeatCounters,
    /// Calls that moved pages to HBM, and what steps waited for transfers.
    link_calls: u64,
    stall_nanos: u64,
    overlap: Overlap,
}

fn write_pages(out: &mut dyn Write, moved: &Pages, steps: usize) -> std::io::Result<()> {
    let pages = &moved.counters;
    writeln!(
        out,
        "pages: {:.1} % hit; a step fetches {:.1} to stay and {:.1} to pass through, and evicts {:.1}; selections name {:.2} times \
         as many as their tokens would fill",
        100.0 * pages.hits as f64 / pages.needed().max(1) as f64,
        pages.misses as f64 / steps as f64,
        pages.streamed as f64 / steps as f64,
        pages.evictions as f64 / steps as f64,
        amplification(pages),
    )?;
    writeln!(
        out,
        "transfers: a step fetches {:.2} MB in {:.1} calls, and waits {:.3} ms",
        pages.fetched_bytes as f64 / 1e6 / steps as f64,
        moved.link_calls as f64 / steps as f64,
        moved.stall_nanos as f64 / 1e6 / steps as f64,
    )
}

/// Pages that selections named, over as many as their tokens would fill.
fn amplification(pages: &SeatCounters) -> f64 {
    pages.selected as f64 / pages.selected_packed.max(1) as f64
}

fn pages_json(Pages { counters: pages, link_calls, stall_nanos, overlap }: &Pages, steps: usize) -> Value {
    let per_step = |count: u64| count as f64 / steps as f64;
    json!({
        "hit_rate": pages.hits as f64 / pages.needed().max(1) as f64,
        "overlap": overlap.repeated as f64 / overlap.pages.max(1) as f64,
        "misses_per_step": per_step(pages.misses),
        "streamed_per_step": per_step(pages.streamed),
        "evictions_per_step": per_step(pages.evictions),
        "page_amplification": amplification(pages),
        "fetched_bytes_per_step": per_step(pages.fetched_bytes),
        "link_calls_per_step": per_step(*link_calls),
        "stall_ms_per_step": per_step(*stall_nanos) / 1e6,
    })
}

/// Time of each operation in a step, and its share of all of them.
fn write_profile(out: &mut dyn Write, profile: &[Entry], steps: usize) -> std::io::Result<()> {
    let total: f64 = profile.iter().map(|e| e.time.as_secs_f64()).sum();
    for entry in profile {
        let seconds = entry.time.as_secs_f64();
        let name = match entry.shape {
            (0, 0) => entry.name.to_owned(),
            (to, from) => format!("{} {from} -> {to}", entry.name),
        };
        writeln!(
            out,
            "  {name:<24} {:>4} calls a step {:>9.3} ms a step {:>5.1} %",
            entry.calls / steps,
            1e3 * seconds / steps as f64,
            100.0 * seconds / total
        )?;
    }
    Ok(())
}

fn profile_json(profile: &[Entry], steps: usize) -> Value {
    let entry = |e: &Entry| {
        json!({
            "op": e.name, "cols_out": e.shape.0, "cols_in": e.shape.1, "calls": e.calls / steps,
            "ms": 1e3 * e.time.as_secs_f64() / steps as f64,
        })
    };
    profile.iter().map(entry).collect()
}

/// The rule that divides cache frames, as a server has it, and what each of `batch` sequences that are alike asks it for.
fn frames(
    prepared: &Prepared<BenchDevice>,
    rule: QuotaRule,
    batch: usize,
    sparse: Option<&Sparse>,
    context: usize,
) -> (Quotas, Vec<Want>) {
    let geometry = prepared.geometry;
    let per_layer = prepared.tier.map_or(0, |tier| tier.layout.extents / geometry.num_layers);
    let all = geometry.blocks(context);
    let pages = sparse.map_or(all, |Sparse { method, budget }| {
        let plan = method.plan(context, context, *budget as usize);
        plan.pages_max(context, method.partition_tokens, geometry.page_tokens)
    });
    let extents = |pages: usize| (pages * geometry.kv_heads).div_ceil(EXTENT_FRAMES) as u32;
    let want = |seat| Want { seat: SeatIndex(seat), mandatory: extents(pages), useful: extents(all) };
    let quotas = Quotas::new(rule, per_layer as u32, geometry.num_layers, batch);
    (quotas, (0..batch as u32).map(want).collect())
}

/// What the machine can do, now.
struct Limits {
    ceiling: Ceiling,
    pool: Pool,
    dtype: DType,
}

impl Limits {
    /// Seconds that `bytes` of memory or `operations` take at best, whichever is longer.
    fn seconds(&mut self, bytes: f64, operations: f64) -> f64 {
        let reading = bytes / self.ceiling.read_bandwidth(&mut self.pool);
        reading.max(operations / self.ceiling.matmul_rate(&mut self.pool, self.dtype))
    }
}

/// Sizes of the model and tables of the sequences.
struct Work {
    weight_bytes: f64,
    kv_token_bytes: f64,
    /// Parameters that every prompt token is multiplied with: all but embedding and head.
    layer_parameters: f64,
    /// Operations of attention per pair of a query and a key, in a layer.
    pair_operations: f64,
    head_parameters: f64,
    rows_max: usize,
    vocab: u32,
    batch: usize,
    blocks: usize,
    /// How decoded tokens attend.
    sparse: Option<Sparse>,
    methods: Vec<Method>,
    num_layers: usize,
    /// Bytes of a digest over the KV heads of a layer.
    digest_bytes: f64,
    /// Frames of an HBM tier that each sequence asks for.
    wants: Vec<Want>,
}

impl Work {
    fn new(
        prepared: &Prepared<BenchDevice>,
        rows_max: usize,
        batch: usize,
        blocks: usize,
        sparse: Option<Sparse>,
        wants: Vec<Want>,
    ) -> Self {
        let geometry = prepared.geometry;
        let digest = |index: u16| {
            let layout = DigestLayout::new(&prepared.digests[index as usize], &geometry);
            ((layout.scored_bytes + layout.tag_bytes) * geometry.kv_heads) as f64
        };
        let digest_bytes = match sparse.map(|s| s.method.score) {
            Some(Score::Digest { digests } | Score::Gate { digests }) => digest(digests),
            _ => 0.0,
        };
        let config = &prepared.config;
        let head = (config.vocab_size * config.hidden_size) as f64;
        let tables = if config.tie_word_embeddings { 1.0 } else { 2.0 };
        let unread = if config.tie_word_embeddings { 0.0 } else { head * prepared.dtype.bytes() as f64 };
        Work {
            weight_bytes: prepared.plan.weights_bytes as f64 - unread,
            kv_token_bytes: prepared.geometry.token_bytes() as f64,
            layer_parameters: model::num_parameters(config) as f64 - tables * head,
            pair_operations: 4.0 * config.heads.q_cols() as f64,
            head_parameters: head,
            rows_max,
            vocab: config.vocab_size as u32,
            batch,
            blocks,
            sparse,
            methods: sparse.iter().map(|s| s.method).collect(),
            num_layers: config.num_layers,
            digest_bytes,
            wants,
        }
    }

    /// Makes the digests of contexts that were filled.
    fn digest(&self, backend: &mut BenchDevice, kv: &mut DeviceKv<BenchDevice>, context: usize) {
        let tables: Vec<BlockIndex> = (0..(self.batch * self.blocks) as u32).map(BlockIndex).collect();
        let positions: Vec<u32> = (0..context as u32).collect();
        for place in 0..self.batch {
            let sequences = [self.rows(place, 0..context as u32, 0, usize::MAX, 0)];
            let batch = Batch {
                tokens: &positions,
                positions: &positions,
                sequences: &sequences,
                block_tables: &tables,
                methods: &self.methods,
            };
            (0..self.num_layers).for_each(|layer| kv.digest(backend, layer, &batch));
        }
    }

    /// Bytes of KV and digests that a token at `position` has read, and positions that it attends to, over all layers.
    fn attended(&self, position: usize, prompt: usize) -> (f64, f64) {
        let (context, layers) = (position + 1, self.num_layers as f64);
        let dense = context as f64;
        let plan = self.sparse.map(|s| (s.method, s.method.plan(context, prompt, s.budget as usize)));
        let Some((method, plan)) = plan.filter(|(_, plan)| !plan.is_dense()) else {
            return (dense * self.kv_token_bytes, dense * layers);
        };
        let dense_layers = method.dense_layers.min(self.num_layers) as f64;
        let sparse_layers = layers - dense_layers;
        let attended = plan.attended(context, method.partition_tokens) as f64;
        let tokens = dense_layers * dense + sparse_layers * attended;
        let digests = sparse_layers * plan.candidates.len() as f64 * self.digest_bytes;
        // Of a cluster that is estimated the mean value is read once more, half of what a token has.
        let estimates = sparse_layers * plan.estimated as f64 * self.kv_token_bytes / layers / 2.0;
        (tokens * self.kv_token_bytes / layers + digests + estimates, tokens)
    }

    /// Decodes `steps` tokens of each sequence after `context` tokens. Also says what that did to the pages of an HBM tier.
    fn decode(
        &self,
        runner: &mut ModelRunner<BenchDevice>,
        quotas: &mut Quotas,
        limits: &mut Limits,
        context: usize,
        steps: usize,
    ) -> (Phase, Option<Pages>) {
        let tables: Vec<BlockIndex> = (0..(self.batch * self.blocks) as u32).map(BlockIndex).collect();
        let params = SamplingParams { temperature: 0.0, ..Default::default() };
        let mut tokens: Vec<u32> = (0..self.batch as u32).map(|i| i % self.vocab).collect();
        let mut out = SampleOutput::default();
        let (mut timed, mut bound) = (Vec::with_capacity(steps), 0.0);
        let mut warm = None;
        let mut overlap = Overlap::default();
        runner.release(SeatIndex(0));
        quotas.release(SeatIndex(0));
        for step in 0..=steps {
            let position = context + step;
            let positions = vec![position as u32; self.batch];
            let granted = quotas.divide(&self.wants, 0);
            let row = |i: usize| self.rows(i, i as u32..i as u32 + 1, position, context, granted[i]);
            let sequences: Vec<SequenceRows> = (0..self.batch).map(row).collect();
            let batch = Batch {
                tokens: &tokens,
                positions: &positions,
                sequences: &sequences,
                block_tables: &tables,
                methods: &self.methods,
            };
            let samples: Vec<SampleRow> = (0..self.batch).map(|row| greedy(row, &params)).collect();
            let start = Instant::now();
            runner.run(&Step::of(batch), &samples, &mut Inspections::default(), &mut out);
            let seconds = start.elapsed().as_secs_f64();
            tokens.iter_mut().zip(&out.sampled).for_each(|(token, sampled)| *token = sampled.token);
            for want in &self.wants {
                let (counters, held) = runner.seat_counters(want.seat);
                quotas.observe(want.seat, &counters, held);
            }
            if step == 0 {
                runner.backend().start();
                (warm, overlap) = (runner.tier_state(), runner.overlap());
                continue;
            }
            if (step - 1).is_multiple_of(STEPS_PER_CEILING) {
                let rows = self.batch as f64;
                let (bytes, tokens) = self.attended(position, context);
                let kv = rows * bytes;
                let operations = 2.0 * rows * (self.layer_parameters + self.head_parameters)
                    + rows * tokens * self.pair_operations;
                bound = limits.seconds(self.weight_bytes + kv, operations);
            }
            timed.push((seconds, bound));
        }
        let pages = runner.tier_state().zip(warm).map(|(now, warm)| Pages {
            counters: now.pages.since(&warm.pages),
            link_calls: now.link_calls[0] - warm.link_calls[0],
            stall_nanos: now.stall_nanos - warm.stall_nanos,
            overlap: runner.overlap().since(&overlap),
        });
        (Phase::new(self.batch, &timed), pages)
    }

    /// Prefills the first sequence with `tokens` random tokens, several times.
    fn prefill(
        &self,
        runner: &mut ModelRunner<BenchDevice>,
        quotas: &mut Quotas,
        limits: &mut Limits,
        tokens: usize,
    ) -> Phase {
        const REPEATS: usize = 3;
        let mut random = Random::new(1);
        let tables: Vec<BlockIndex> = (0..self.blocks as u32).map(BlockIndex).collect();
        let params = SamplingParams { temperature: 0.0, ..Default::default() };
        let mut out = SampleOutput::default();
        let n = tokens as f64;
        let operations = 2.0 * (n * self.layer_parameters + self.head_parameters)
            + n * (n + 1.0) / 2.0 * self.pair_operations * self.num_layers as f64;
        let mut timed = Vec::new();
        for _ in 0..REPEATS {
            let prompt: Vec<u32> = (0..tokens).map(|_| random.below(self.vocab as usize) as u32).collect();
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let before = limits.seconds(self.weight_bytes, operations);
            runner.release(SeatIndex(0));
            let start = Instant::now();
            let mut done = 0;
            while done < tokens {
                let rows = (tokens - done).min(self.rows_max);
                let sequences =
                    [self.rows(0, 0..rows as u32, done, usize::MAX, quotas.divide(&self.wants, 0)[0])];
                let range = done..done + rows;
                let batch = Batch {
                    tokens: &prompt[range.clone()],
                    positions: &positions[range],
                    sequences: &sequences,
                    block_tables: &tables,
                    methods: &self.methods,
                };
                done += rows;
                let samples: Vec<SampleRow> =
                    (done == tokens).then(|| greedy(rows - 1, &params)).into_iter().collect();
                runner.run(&Step::of(batch), &samples, &mut Inspections::default(), &mut out);
            }
            let seconds = start.elapsed().as_secs_f64();
            let after = limits.seconds(self.weight_bytes, operations);
            timed.push((seconds, (before + after) / 2.0));
        }
        Phase::new(tokens, &timed)
    }

    /// Rows of a sequence whose blocks are those of place `table`, after a prompt of `prompt` tokens.
    fn rows(
        &self,
        table: usize,
        rows: std::ops::Range<u32>,
        first: usize,
        prompt: usize,
        quota: u32,
    ) -> SequenceRows {
        let attention = match self.sparse {
            None => Attention::Dense,
            Some(Sparse { budget, .. }) => Attention::Sparse { method: 0, budget },
        };
        let blocks = (table * self.blocks) as u32..((table + 1) * self.blocks) as u32;
        SequenceRows {
            rows,
            first_position: first as u32,
            prompt_len: u32::try_from(prompt).unwrap_or(u32::MAX),
            blocks,
            attention,
            seat: SeatIndex(table as u32),
            quota,
        }
    }
}

fn greedy(row: usize, params: &SamplingParams) -> SampleRow<'_> {
    SampleRow {
        row,
        params,
        prompt: &[],
        generated: &[],
        banned: &[],
        position: 0,
        top_logprobs: None,
        forced: None,
    }
}

/// Random K and V, normal like those of a normed layer, in every page.
fn fill<B: Backend>(backend: &mut B, kv: &mut DeviceKv<B>, g: KvGeometry, num_blocks: usize, seed: u64) {
    let mut random = Random::new(seed);
    let pages: Vec<Vec<f32>> = (0..RANDOM_PAGES)
        .map(|_| (0..g.page_tokens * g.head_dim).map(|_| random.normal()).collect())
        .collect();
    for layer in 0..g.num_layers {
        for block in 0..num_blocks {
            for head in 0..g.kv_heads {
                let (k, v) = (&pages[random.below(RANDOM_PAGES)], &pages[random.below(RANDOM_PAGES)]);
                backend.write_page(kv.pages(), layer, BlockIndex(block as u32), head, k, v);
            }
        }
    }
}
