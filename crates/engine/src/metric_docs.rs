//! Which metrics there are, and what they mean.

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts of values by upper bound.
    Histogram(&'static [f64]),
}

impl MetricKind {
    /// The word for it in documentation.
    pub fn name(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram(_) => "histogram",
        }
    }
}

/// One metric: what is registered, and what `docs/metrics.md` says.
#[derive(Clone, Copy, Debug)]
pub struct MetricDoc {
    /// Full name.
    pub name: &'static str,
    /// How it behaves.
    pub kind: MetricKind,
    /// Its labels, each with all values.
    pub labels: &'static [(&'static str, &'static [&'static str])],
    /// One sentence.
    pub help: &'static str,
}

/// Seconds of a whole request or of a wait.
pub(crate) const REQUEST_SECONDS: MetricKind = MetricKind::Histogram(&[
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0,
]);
/// Seconds of a step or of a token.
pub(crate) const STEP_SECONDS: MetricKind = MetricKind::Histogram(&[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
]);
pub(crate) const ROWS: MetricKind = MetricKind::Histogram(&[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0,
]);

/// Shares of 1, finer towards 1.
pub(crate) const SHARES: MetricKind =
    MetricKind::Histogram(&[0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999, 1.0]);

pub(crate) const OUTCOMES: [&str; 5] = ["stop", "length", "aborted", "failed", "refused"];
pub(crate) const STATES: [&str; 3] = ["free", "used", "cached"];
pub(crate) const PAGE_EVENTS: [&str; 5] = ["hit", "miss", "streamed", "evicted", "saved"];
pub(crate) const DIRECTIONS: [&str; 2] = ["fetched", "saved"];
pub(crate) const FRAME_STATES: [&str; 3] = ["empty", "resident", "pinned"];
pub(crate) const GUARD_ACTION_NAMES: [&str; 2] = ["doubled", "dense"];
pub(crate) const DRAM_STATES: [&str; 2] = ["used", "cached"];
pub(crate) const DIGEST_STATES: [&str; 2] = ["empty", "held"];
pub(crate) const WORKING_SET_LABELS: [&str; 2] = ["needed", "there"];
pub(crate) const PHASES: [&str; 4] = ["schedule", "run", "commit", "emit"];

pub(crate) const REQUESTS: MetricDoc = MetricDoc {
    name: "sparseserve_requests_total",
    kind: MetricKind::Counter,
    labels: &[("outcome", &OUTCOMES)],
    help: "Requests by how they ended.",
};
pub(crate) const WAITING: MetricDoc = MetricDoc {
    name: "sparseserve_requests_waiting",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Requests that wait for admission, preempted ones included.",
};
pub(crate) const RUNNING: MetricDoc = MetricDoc {
    name: "sparseserve_requests_running",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Requests that take part in steps.",
};
pub(crate) const PREEMPTIONS: MetricDoc = MetricDoc {
    name: "sparseserve_preemptions_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Times that a running request gave its KV blocks up for an older one.",
};
pub(crate) const PARKED: MetricDoc = MetricDoc {
    name: "sparseserve_parked_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Times that a running request gave its place in HBM up for older ones and waited with its KV blocks.",
};
pub(crate) const PROMOTED: MetricDoc = MetricDoc {
    name: "sparseserve_promoted_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Requests that others were preferred to --max-skips times, and that went first from then on.",
};
pub(crate) const RESTING: MetricDoc = MetricDoc {
    name: "sparseserve_requests_resting",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Running requests that took no part in the last step, because HBM had no room for their working sets.",
};
pub(crate) const RESTS: MetricDoc = MetricDoc {
    name: "sparseserve_rests_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Steps in which a running request took no part, counted per request.",
};
pub(crate) const WORKING_SETS: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_working_set_extents",
    kind: MetricKind::Gauge,
    labels: &[("what", &WORKING_SET_LABELS)],
    help: "Extents per layer: what all running requests need for their working sets, and what there is.",
};
pub(crate) const BATCH_LIMIT: MetricDoc = MetricDoc {
    name: "sparseserve_batch_limit",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Requests that may take part in a step, where steps waited too long for pages; 0 without a limit.",
};
pub(crate) const FLIGHTS: MetricDoc = MetricDoc {
    name: "sparseserve_prompts_by_layer",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Prompts that are on their way layer by layer.",
};
pub(crate) const PROMPT_TOKENS: MetricDoc = MetricDoc {
    name: "sparseserve_prompt_tokens_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Tokens of admitted prompts.",
};
pub(crate) const CACHED_TOKENS: MetricDoc = MetricDoc {
    name: "sparseserve_prompt_tokens_cached_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Those of them whose KV came from the prefix cache.",
};
pub(crate) const GENERATION_TOKENS: MetricDoc = MetricDoc {
    name: "sparseserve_generation_tokens_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Tokens generated.",
};
pub(crate) const TIME_TO_FIRST_TOKEN: MetricDoc = MetricDoc {
    name: "sparseserve_time_to_first_token_seconds",
    kind: REQUEST_SECONDS,
    labels: &[],
    help: "From submission to the first token.",
};
pub(crate) const TIME_PER_OUTPUT_TOKEN: MetricDoc = MetricDoc {
    name: "sparseserve_time_per_output_token_seconds",
    kind: STEP_SECONDS,
    labels: &[],
    help: "From one token of a request to its next.",
};
pub(crate) const REQUEST_DURATION: MetricDoc = MetricDoc {
    name: "sparseserve_request_duration_seconds",
    kind: REQUEST_SECONDS,
    labels: &[],
    help: "From submission to the end, however it ended.",
};
pub(crate) const QUEUE: MetricDoc = MetricDoc {
    name: "sparseserve_queue_seconds",
    kind: REQUEST_SECONDS,
    labels: &[],
    help: "From submission to the first admission.",
};
pub(crate) const KV_BLOCKS: MetricDoc = MetricDoc {
    name: "sparseserve_kv_blocks",
    kind: MetricKind::Gauge,
    labels: &[("state", &STATES)],
    help: "KV blocks by state; cached ones are used by nobody and can be shared or evicted.",
};
pub(crate) const EVICTIONS: MetricDoc = MetricDoc {
    name: "sparseserve_kv_block_evictions_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Cached KV blocks given up for new tokens.",
};
pub(crate) const DRAM_CAPACITY: MetricDoc = MetricDoc {
    name: "sparseserve_dram_capacity_bytes",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Bytes in DRAM for KV with its digests.",
};
pub(crate) const DRAM: MetricDoc = MetricDoc {
    name: "sparseserve_dram_bytes",
    kind: MetricKind::Gauge,
    labels: &[("state", &DRAM_STATES)],
    help: "Those of them that blocks in use and cached ones take.",
};
pub(crate) const STEP: MetricDoc = MetricDoc {
    name: "sparseserve_step_seconds",
    kind: STEP_SECONDS,
    labels: &[("phase", &PHASES)],
    help: "Time of a step by phase.",
};
pub(crate) const STEP_ROWS: MetricDoc = MetricDoc {
    name: "sparseserve_step_rows",
    kind: ROWS,
    labels: &[],
    help: "Rows per step: one per token that is run, of prompts and of answers.",
};

pub(crate) const PAGES: MetricDoc = MetricDoc {
    name: "sparseserve_kv_pages_total",
    kind: MetricKind::Counter,
    labels: &[("event", &PAGE_EVENTS)],
    help: "Pages of the HBM tier: needed and resident (hit), fetched to stay (miss), passed through (streamed), given up \
           (evicted), saved to DRAM (saved).",
};
pub(crate) const SELECTED: MetricDoc = MetricDoc {
    name: "sparseserve_selected_pages_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Pages that generated tokens selected, per layer and KV head, where the token before them selected, too.",
};
pub(crate) const REPEATED: MetricDoc = MetricDoc {
    name: "sparseserve_selected_pages_repeated_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Those of them that the token before selected, too, in the same layer and KV head: divided by all, the overlap of \
           selections from step to step.",
};
pub(crate) const MOVED: MetricDoc = MetricDoc {
    name: "sparseserve_kv_bytes_total",
    kind: MetricKind::Counter,
    labels: &[("direction", &DIRECTIONS)],
    help: "Bytes of KV copied from DRAM to HBM (fetched: pages that were missed or streamed, the last ones of a shared prefix, \
           keys that the guard reads) and from HBM to DRAM (saved).",
};
pub(crate) const LINK_CALLS: MetricDoc = MetricDoc {
    name: "sparseserve_link_calls_total",
    kind: MetricKind::Counter,
    labels: &[("direction", &DIRECTIONS)],
    help: "Calls that moved KV or digests from DRAM to HBM (fetched) and from HBM to DRAM (saved): one for all that a layer needs, \
           or one for each page.",
};
pub(crate) const STALL: MetricDoc = MetricDoc {
    name: "sparseserve_kv_stall_seconds_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Time that steps waited for pages to be fetched, and for saves that they could not go on without.",
};
pub(crate) const WAVES: MetricDoc = MetricDoc {
    name: "sparseserve_kv_extra_waves_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Waves beyond one per layer and step: attention to more pages than there were frames at hand.",
};
pub(crate) const HBM_CAPACITY: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_capacity_bytes",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Bytes of the HBM tier: frames, digests, and the tables that lead to them; 0 where there is none.",
};
pub(crate) const FRAMES: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_frames",
    kind: MetricKind::Gauge,
    labels: &[("state", &FRAME_STATES)],
    help: "Frames of the HBM tier: empty, holding a page that may be evicted (resident), or pinned.",
};
pub(crate) const LENT: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_lent_frames",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Frames of the HBM tier that requests may use beyond what their misses ask for.",
};
pub(crate) const RECLAIMED: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_reclaimed_frames_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Lent frames that were taken back for somebody else.",
};
pub(crate) const DIGEST_PLACES: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_digest_places",
    kind: MetricKind::Gauge,
    labels: &[("state", &DIGEST_STATES)],
    help: "Places in HBM for the digests of a KV block: empty, or holding those of a block.",
};
pub(crate) const DIGESTS_LOADED: MetricDoc = MetricDoc {
    name: "sparseserve_digest_bytes_loaded_total",
    kind: MetricKind::Counter,
    labels: &[],
    help: "Bytes of digests copied from DRAM to HBM.",
};
pub(crate) const TABLES: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_table_bytes",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Bytes in use of the tables that lead from pages to frames.",
};
pub(crate) const GUARD_MASS: MetricDoc = MetricDoc {
    name: "sparseserve_guard_attention_mass",
    kind: SHARES,
    labels: &[],
    help: "Checks of the quality guard by the attention mass that the selection covered, of one token in one layer each.",
};
pub(crate) const GUARD_RECALL: MetricDoc = MetricDoc {
    name: "sparseserve_guard_recall",
    kind: SHARES,
    labels: &[],
    help: "The same checks by how many of the 64 likeliest tokens were selected.",
};
pub(crate) const GUARD_ACTIONS: MetricDoc = MetricDoc {
    name: "sparseserve_guard_actions_total",
    kind: MetricKind::Counter,
    labels: &[("action", &GUARD_ACTION_NAMES)],
    help: "What the quality guard did: doubled the budget of a request, or had it attend to everything.",
};
pub(crate) const DUPLICATES: MetricDoc = MetricDoc {
    name: "sparseserve_hbm_duplicate_bytes",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Bytes of cached pages in HBM that another running request holds as well, because they share a prefix; each step looks at one layer.",
};
pub(crate) const SAVING: MetricDoc = MetricDoc {
    name: "sparseserve_kv_saving_pages",
    kind: MetricKind::Gauge,
    labels: &[],
    help: "Pages on their way to DRAM.",
};

/// Every metric of the engine: the single source of registration and documentation.
pub const METRICS: [MetricDoc; 43] = [
    REQUESTS,
    WAITING,
    RUNNING,
    PREEMPTIONS,
    PARKED,
    PROMOTED,
    RESTING,
    RESTS,
    WORKING_SETS,
    BATCH_LIMIT,
    FLIGHTS,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    GENERATION_TOKENS,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_DURATION,
    QUEUE,
    KV_BLOCKS,
    EVICTIONS,
    DRAM_CAPACITY,
    DRAM,
    STEP,
    STEP_ROWS,
    PAGES,
    SELECTED,
    REPEATED,
    MOVED,
    LINK_CALLS,
    STALL,
    WAVES,
    HBM_CAPACITY,
    FRAMES,
    LENT,
    RECLAIMED,
    DIGEST_PLACES,
    DIGESTS_LOADED,
    TABLES,
    DUPLICATES,
    SAVING,
    GUARD_MASS,
    GUARD_RECALL,
    GUARD_ACTIONS,
];
