//! What the engine counts and times, for Prometheus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kv::Counts;
use ops::coverage::Coverage;
use ops::places::DigestState;
use ops::tally::Overlap;
use ops::tier::TierState;
use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

use crate::guard::GuardAction;
use crate::metric_docs::*;
use crate::request::FinishReason;
use crate::sequence::Outcome;

/// The metrics of one engine. Updating them neither blocks nor allocates.
pub struct Metrics {
    /// By outcome, as in `OUTCOMES`.
    requests: [IntCounter; 5],
    waiting: IntGauge,
    running: IntGauge,
    preemptions: IntCounter,
    parked: IntCounter,
    promoted: IntCounter,
    resting: IntGauge,
    rests: IntCounter,
    /// As in `WORKING_SET_LABELS`.
    working_sets: [IntGauge; 2],
    batch_limit: IntGauge,
    flights: IntGauge,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generation_tokens: IntCounter,
    time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    request_duration: Histogram,
    queue: Histogram,
    /// By state, as in `STATES`.
    kv_blocks: [IntGauge; 3],
    evictions: IntCounter,
    dram_capacity: IntGauge,
    /// By state, as in `DRAM_STATES`.
    dram: [IntGauge; 2],
    block_bytes: AtomicU64,
    /// By phase, as in `PHASES`.
    step: [Histogram; 4],
    step_rows: Histogram,
    /// By event, as in `PAGE_EVENTS`.
    pages: [IntCounter; 5],
    selected: IntCounter,
    repeated: IntCounter,
    /// By direction, as in `DIRECTIONS`.
    moved: [IntCounter; 2],
    link_calls: [IntCounter; 2],
    stall: Counter,
    waves: IntCounter,
    /// By state, as in `FRAME_STATES`.
    hbm_capacity: IntGauge,
    frames: [IntGauge; 3],
    lent: IntGauge,
    reclaimed: IntCounter,
    /// By state, as in `DIGEST_STATES`.
    digest_places: [IntGauge; 2],
    digests_loaded: IntCounter,
    tables: IntGauge,
    duplicates: IntGauge,
    saving: IntGauge,
    guard_mass: Histogram,
    guard_recall: Histogram,
    /// By action, as in `GUARD_ACTION_NAMES`.
    guard_actions: [IntCounter; 2],
}

impl Metrics {
    /// Registers every metric of [`METRICS`].
    ///
    /// # Errors
    /// When `registry` has one of them already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Metrics {
            requests: counters(registry, REQUESTS)?,
            waiting: gauge(registry, WAITING)?,
            running: gauge(registry, RUNNING)?,
            preemptions: counter(registry, PREEMPTIONS)?,
            parked: counter(registry, PARKED)?,
            promoted: counter(registry, PROMOTED)?,
            resting: gauge(registry, RESTING)?,
            rests: counter(registry, RESTS)?,
            working_sets: gauges(registry, WORKING_SETS)?,
            batch_limit: gauge(registry, BATCH_LIMIT)?,
            flights: gauge(registry, FLIGHTS)?,
            prompt_tokens: counter(registry, PROMPT_TOKENS)?,
            cached_tokens: counter(registry, CACHED_TOKENS)?,
            generation_tokens: counter(registry, GENERATION_TOKENS)?,
            time_to_first_token: histogram(registry, TIME_TO_FIRST_TOKEN)?,
            time_per_output_token: histogram(registry, TIME_PER_OUTPUT_TOKEN)?,
            request_duration: histogram(registry, REQUEST_DURATION)?,
            queue: histogram(registry, QUEUE)?,
            kv_blocks: gauges(registry, KV_BLOCKS)?,
            evictions: counter(registry, EVICTIONS)?,
            dram_capacity: gauge(registry, DRAM_CAPACITY)?,
            dram: gauges(registry, DRAM)?,
            block_bytes: AtomicU64::new(0),
            step: histograms(registry, STEP)?,
            step_rows: histogram(registry, STEP_ROWS)?,
            pages: counters(registry, PAGES)?,
            selected: counter(registry, SELECTED)?,
            repeated: counter(registry, REPEATED)?,
            moved: counters(registry, MOVED)?,
            link_calls: counters(registry, LINK_CALLS)?,
            stall: float_counter(registry, STALL)?,
            waves: counter(registry, WAVES)?,
            hbm_capacity: gauge(registry, HBM_CAPACITY)?,
            frames: gauges(registry, FRAMES)?,
            lent: gauge(registry, LENT)?,
            reclaimed: counter(registry, RECLAIMED)?,
            digest_places: gauges(registry, DIGEST_PLACES)?,
            digests_loaded: counter(registry, DIGESTS_LOADED)?,
            tables: gauge(registry, TABLES)?,
            duplicates: gauge(registry, DUPLICATES)?,
            saving: gauge(registry, SAVING)?,
            guard_mass: histogram(registry, GUARD_MASS)?,
            guard_recall: histogram(registry, GUARD_RECALL)?,
            guard_actions: counters(registry, GUARD_ACTIONS)?,
        })
    }

    /// Says how many bytes in DRAM a block takes with its digests; 0 as long as nobody does.
    pub fn set_block_bytes(&self, bytes: u64) {
        self.block_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Says how large the HBM tier is; 0 as long as nobody does.
    pub fn set_hbm_bytes(&self, bytes: u64) {
        self.hbm_capacity.set(bytes as i64);
    }

    pub(crate) fn refused(&self) {
        self.requests[4].inc();
    }

    pub(crate) fn admitted(&self, prompt_tokens: usize, cached_tokens: usize, queued: Duration) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.cached_tokens.inc_by(cached_tokens as u64);
        self.queue.observe(queued.as_secs_f64());
    }

    pub(crate) fn preempted(&self) {
        self.preemptions.inc();
    }

    pub(crate) fn parked(&self) {
        self.parked.inc();
    }

    /// A request that was passed over too often.
    pub(crate) fn promoted(&self) {
        self.promoted.inc();
    }

    /// Who takes part in a step by working sets: how many rest, and the extents per layer that all need, of how many; so many requests
    /// may take part at most.
    pub(crate) fn turns(&self, resting: usize, needed: u32, extents: u32, limit: usize) {
        self.resting.set(resting as i64);
        self.rests.inc_by(resting as u64);
        self.working_sets[0].set(i64::from(needed));
        self.working_sets[1].set(i64::from(extents));
        self.batch_limit.set(if limit == usize::MAX { 0 } else { limit as i64 });
    }

    /// Prompts that go layer by layer.
    pub(crate) fn flights(&self, count: usize) {
        self.flights.set(count as i64);
    }

    pub(crate) fn first_token(&self, since_submission: Duration) {
        self.generation_tokens.inc();
        self.time_to_first_token.observe(since_submission.as_secs_f64());
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.generation_tokens.inc();
        self.time_per_output_token.observe(since_last.as_secs_f64());
    }

    pub(crate) fn closed(&self, outcome: &Outcome, since_submission: Duration) {
        let at = match outcome {
            Outcome::Finished(FinishReason::EndToken(_) | FinishReason::Stopped) => 0,
            Outcome::Finished(FinishReason::Length) => 1,
            Outcome::Aborted => 2,
            Outcome::Failed(_) => 3,
        };
        self.requests[at].inc();
        self.request_duration.observe(since_submission.as_secs_f64());
    }

    /// A check of the guard, and what it led to.
    pub(crate) fn checked(&self, coverage: &Coverage, action: Option<GuardAction>) {
        self.guard_mass.observe(f64::from(coverage.mass));
        self.guard_recall.observe(f64::from(coverage.recall));
        match action {
            None => {}
            Some(GuardAction::Doubled) => self.guard_actions[0].inc(),
            Some(GuardAction::Dense) => self.guard_actions[1].inc(),
        }
    }

    /// The four phases of a step, and its rows.
    pub(crate) fn stepped(&self, phases: [Duration; 4], num_rows: usize) {
        for (histogram, phase) in self.step.iter().zip(phases) {
            histogram.observe(phase.as_secs_f64());
        }
        self.step_rows.observe(num_rows as f64);
    }

    /// What is there between two steps; `num_evictions` counts from the start.
    pub(crate) fn observe(&self, num_waiting: usize, num_running: usize, blocks: Counts, num_evictions: u64) {
        self.waiting.set(num_waiting as i64);
        self.running.set(num_running as i64);
        for (gauge, count) in self.kv_blocks.iter().zip([blocks.free, blocks.in_use, blocks.cached]) {
            gauge.set(count as i64);
        }
        advance(&self.evictions, num_evictions);
        let bytes = |count: usize| (count as u64 * self.block_bytes.load(Ordering::Relaxed)) as i64;
        self.dram_capacity.set(bytes(blocks.free + blocks.in_use + blocks.cached));
        self.dram[0].set(bytes(blocks.in_use));
        self.dram[1].set(bytes(blocks.cached));
    }

    /// How much of each selection the next one repeated, since the start.
    pub(crate) fn overlap(&self, overlap: &Overlap) {
        advance(&self.selected, overlap.pages);
        advance(&self.repeated, overlap.repeated);
    }

    /// The HBM tier after a step, with its digests, and its lent frames: those of now, and those taken back since the start.
    pub(crate) fn tier(&self, state: &TierState, digests: &DigestState, lent: u64, reclaimed: u64) {
        self.digest_places[0].set((digests.places - digests.used) as i64);
        self.digest_places[1].set(digests.used as i64);
        advance(&self.digests_loaded, digests.loaded_bytes);
        let pages = &state.pages;
        let events = [pages.hits, pages.misses, pages.streamed, pages.evictions, pages.saved];
        self.pages.iter().zip(events).for_each(|(counter, total)| advance(counter, total));
        let moved = [pages.fetched_bytes, state.saved_bytes];
        self.moved.iter().zip(moved).for_each(|(counter, total)| advance(counter, total));
        let calls = self.link_calls.iter().zip(state.link_calls);
        calls.for_each(|(counter, total)| advance(counter, total));
        self.stall.inc_by((state.stall_nanos as f64 * 1e-9 - self.stall.get()).max(0.0));
        advance(&self.waves, state.extra_waves);
        let frames = [state.cache_frames - state.cache_used, state.cache_used, state.pinned_frames];
        self.frames.iter().zip(frames).for_each(|(gauge, count)| gauge.set(count as i64));
        self.lent.set(lent as i64);
        advance(&self.reclaimed, reclaimed);
        self.tables.set(state.table_bytes as i64);
        self.duplicates.set(state.duplicate_bytes as i64);
        self.saving.set(state.saving_pages as i64);
    }
}

/// Brings a counter to what was counted elsewhere since the start.
fn advance(counter: &IntCounter, total: u64) {
    counter.inc_by(total - counter.get());
}

fn opts(doc: &MetricDoc) -> Opts {
    Opts::new(doc.name, doc.help)
}

fn histogram_opts(doc: &MetricDoc) -> HistogramOpts {
    let MetricKind::Histogram(buckets) = doc.kind else {
        panic!("{} is documented as a histogram", doc.name)
    };
    HistogramOpts::from(opts(doc)).buckets(buckets.to_vec())
}

fn check(doc: &MetricDoc, kind: MetricKind, labelled: bool) {
    assert_eq!(doc.kind, kind, "{} is documented with its kind", doc.name);
    assert_eq!(!doc.labels.is_empty(), labelled, "{} is documented with its label", doc.name);
}

/// The children of a metric by label value: looked up once, so that an update does not search.
fn children<T, const N: usize>(doc: &MetricDoc, child: impl Fn(&str) -> T) -> [T; N] {
    let [(_, values)] = doc.labels else { panic!("{} has one label", doc.name) };
    assert_eq!(values.len(), N, "{} has a child per label value", doc.name);
    std::array::from_fn(|i| child(values[i]))
}

fn label(doc: &MetricDoc) -> [&'static str; 1] {
    let [(name, _)] = doc.labels else { panic!("{} has one label", doc.name) };
    [name]
}

fn counter(registry: &Registry, doc: MetricDoc) -> prometheus::Result<IntCounter> {
    check(&doc, MetricKind::Counter, false);
    let metric = IntCounter::with_opts(opts(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn float_counter(registry: &Registry, doc: MetricDoc) -> prometheus::Result<Counter> {
    check(&doc, MetricKind::Counter, false);
    let metric = Counter::with_opts(opts(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counters<const N: usize>(registry: &Registry, doc: MetricDoc) -> prometheus::Result<[IntCounter; N]> {
    check(&doc, MetricKind::Counter, true);
    let metric = IntCounterVec::new(opts(&doc), &label(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(children(&doc, |value| metric.with_label_values(&[value])))
}

fn gauge(registry: &Registry, doc: MetricDoc) -> prometheus::Result<IntGauge> {
    check(&doc, MetricKind::Gauge, false);
    let metric = IntGauge::with_opts(opts(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauges<const N: usize>(registry: &Registry, doc: MetricDoc) -> prometheus::Result<[IntGauge; N]> {
    check(&doc, MetricKind::Gauge, true);
    let metric = IntGaugeVec::new(opts(&doc), &label(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(children(&doc, |value| metric.with_label_values(&[value])))
}

fn histogram(registry: &Registry, doc: MetricDoc) -> prometheus::Result<Histogram> {
    let metric = Histogram::with_opts(histogram_opts(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histograms<const N: usize>(registry: &Registry, doc: MetricDoc) -> prometheus::Result<[Histogram; N]> {
    let metric = HistogramVec::new(histogram_opts(&doc), &label(&doc))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(children(&doc, |value| metric.with_label_values(&[value])))
}
