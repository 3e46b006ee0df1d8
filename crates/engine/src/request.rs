//! What a client of the engine asks, and what it is told.

use ops::coverage::Coverage;
use ops::residency::SeatCounters;
use ops::sample::SamplingParams;
use ops::sparse::Method;
use ops::tally::RowTally;
use sparse::Budget;

use crate::guard::GuardAction;

/// Identity of a request inside the engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One completion to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids, already tokenized; never empty.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// When it ends.
    pub stopping: Stopping,
    /// Alternatives to report per generated token; `None` reports no log-probabilities.
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt. Such a request computes its whole prompt: it takes nothing from the
    /// prefix cache.
    pub prompt_logprobs: Option<u32>,
    /// How generated tokens attend; `None` to everything. The prompt always does.
    pub sparse: Option<Sparse>,
    /// The budget of `sparse` as it was asked for: its prompt goes on from KV of earlier answers of the same method and budget, and
    /// its own answer is left to later ones. Dense answers are shared in any case. `None` computes such KV again, densely, and keeps
    /// its own to itself.
    pub reuse: Option<Budget>,
    /// Requests of lower numbers are preferred to those of higher ones, until these were passed over too often.
    pub priority: i32,
}

/// A sparse method with the budget of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sparse {
    /// How it selects; its digests are those that the runner keeps.
    pub method: Method,
    /// Tokens attended to per step, layer and KV head at most.
    pub budget: u32,
}

/// When a request ends.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Tokens to generate at most; at least 1 unless only prompt log-probabilities are wanted (0).
    pub max_tokens: u32,
    /// End tokens are not drawn before this many.
    pub min_tokens: u32,
    /// Tokens that end the answer: the model's own and the client's.
    pub end_tokens: Vec<u32>,
}

/// A token with its log-probability and the likeliest alternatives, descending.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the raw logits.
    pub logprob: f32,
    /// Its place by likelihood, from 1.
    pub rank: u32,
    /// `(token, log-probability)`, descending.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens` or the context limit was reached.
    Length,
    /// An end token was drawn; it is the last token sent.
    EndToken(u32),
    /// Its client had all that it wanted ([`Handle::stop`](crate::Handle::stop)).
    Stopped,
}

/// Counts and times of a finished request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them whose KV came from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated, the end token included.
    pub generated_tokens: u32,
    /// How often it was preempted.
    pub preemptions: u32,
    /// What its generated tokens attended to; `None` if they were asked to attend to everything.
    pub attended: Option<Attended>,
    /// What its guard saw and did; `None` if nothing was checked.
    pub guarded: Option<Guarded>,
    /// What became of its pages in an HBM tier; zeros in unified memory.
    pub pages: PageUse,
}

/// What the checks of a request found, and what was done about it. Sums are over the checks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guarded {
    /// Tokens that were checked, in one layer each.
    pub checks: u32,
    /// Attention mass covered.
    pub mass_sum: f32,
    /// The least of it.
    pub mass_min: f32,
    /// Recall of the likeliest tokens.
    pub recall_sum: f32,
    /// How often the budget was doubled.
    pub doubled: u32,
    /// Whether everything was attended to in the end.
    pub dense: bool,
    /// The last budget, where it was changed.
    pub budget: Option<u32>,
}

impl Default for Guarded {
    fn default() -> Self {
        Guarded {
            checks: 0,
            mass_sum: 0.0,
            mass_min: 1.0,
            recall_sum: 0.0,
            doubled: 0,
            dense: false,
            budget: None,
        }
    }
}

impl Guarded {
    pub(crate) fn add(&mut self, coverage: Coverage) {
        self.checks += 1;
        self.mass_sum += coverage.mass;
        self.mass_min = self.mass_min.min(coverage.mass);
        self.recall_sum += coverage.recall;
    }

    pub(crate) fn act(&mut self, action: GuardAction, budget: u32) {
        match action {
            GuardAction::Doubled => (self.doubled, self.budget) = (self.doubled + 1, Some(budget)),
            GuardAction::Dense => self.dense = true,
        }
    }
}

/// The pages of a request in an HBM tier, prompt and answer together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageUse {
    /// Pages that were needed and resident.
    pub hits: u64,
    /// Pages that were needed and had to be fetched to stay.
    pub misses: u64,
    /// Pages that were needed and passed through.
    pub streamed: u64,
    /// Bytes of pages that were copied to HBM for it: of those, of a shared prefix, and of keys that the guard read.
    pub fetched_bytes: u64,
    /// Bytes of digests that were copied to HBM for it.
    pub digest_bytes: u64,
    /// Pages that selections named and that are not local, and as many as the slots selected in them would fill.
    pub selected: u64,
    /// See there.
    pub selected_packed: u64,
    /// Cache frames held at once, at most.
    pub resident_peak: u64,
    /// Time that the steps it took part in waited for pages, whoever's they were, in nanoseconds.
    pub stall_nanos: u64,
}

impl PageUse {
    /// Adds a step: what happened to the pages in it, digests that it loaded, the frames held after it, and its stall.
    pub(crate) fn add(&mut self, step: &SeatCounters, digest_bytes: u64, held: usize, stall_nanos: u64) {
        self.hits += step.hits;
        self.misses += step.misses;
        self.streamed += step.streamed;
        self.fetched_bytes += step.fetched_bytes;
        self.digest_bytes += digest_bytes;
        self.selected += step.selected;
        self.selected_packed += step.selected_packed;
        self.resident_peak = self.resident_peak.max(held as u64);
        self.stall_nanos += stall_nanos;
    }
}

/// What the generated tokens of a request attended to, per layer that is not dense and per KV head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attended {
    /// Generated tokens that were run, each once.
    pub steps: u32,
    /// Tokens that all of them together attended to, each a mean over layers and KV heads.
    pub tokens: f64,
    /// Tokens in all their contexts together: what dense attention would have read.
    pub context_tokens: u64,
    /// Steps whose budget was too small for what a method attends to at least.
    pub raised_steps: u32,
    /// Clusters that all of them together attended to as one token each, at most; their tokens are not among `tokens`.
    pub estimated_clusters: u64,
}

impl Attended {
    /// Adds a step of `sparse` whose context, itself included, has `context` tokens, of which `row` was selected.
    pub(crate) fn add(&mut self, sparse: &Sparse, context: usize, prompt_tokens: usize, row: RowTally) {
        let plan = sparse.method.plan(context, prompt_tokens, sparse.budget as usize);
        let at_most =
            if plan.is_dense() { context } else { plan.attended(context, sparse.method.partition_tokens) };
        self.steps += 1;
        self.tokens += match row {
            // No layer selected, or nobody counted.
            RowTally { selections: 0, .. } => at_most as f64,
            RowTally { slots, selections } => slots as f64 / f64::from(selections),
        };
        self.context_tokens += context as u64;
        self.estimated_clusters += plan.estimated as u64;
        self.raised_steps += u32::from(at_most > (sparse.budget as usize).min(context));
    }
}

/// What the engine tells about a request, in this order: `PromptLogprobs` (if asked), `Token`s, then one of
/// `Finished` and `Failed`.
#[derive(Clone, Debug)]
pub enum Update {
    /// Log-probabilities of prompt tokens 1.. (the first has none).
    PromptLogprobs(Vec<TokenLogprobs>),
    /// A generated token.
    Token {
        /// Its id.
        token: u32,
        /// With log-probabilities if they were asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The answer is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Its counts.
        usage: Usage,
    },
    /// This request failed, alone; says why.
    Failed(String),
}

/// Where updates of one request go. Called on the engine thread: it must neither block nor take long.
///
/// A sink gets exactly one last update, [`Update::Finished`] or [`Update::Failed`], unless its request was aborted;
/// then it is dropped in silence.
pub trait Sink: Send {
    /// Delivers `update`; `Err` when nobody listens any more, which cancels the request within one step.
    fn send(&mut self, update: Update) -> Result<(), Disconnected>;
}

/// The client is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disconnected;

/// Why a request was not taken in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The waiting queue is full; try again later.
    #[error("the queue is full: {waiting} requests wait and {limit} may")]
    QueueFull {
        /// Requests waiting now.
        waiting: usize,
        /// The bound.
        limit: usize,
    },
    /// It makes no sense; says what to change.
    #[error("{0}")]
    Invalid(String),
    /// It could never run, whatever else finishes; says what does not fit.
    #[error("{0}")]
    NeverFits(String),
    /// The engine is draining or has stopped.
    #[error("the server is shutting down")]
    ShuttingDown,
}
