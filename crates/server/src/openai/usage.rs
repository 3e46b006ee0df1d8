//! Counts, times and names in answers.

use std::time::{SystemTime, UNIX_EPOCH};

use engine::{Attended, Guarded, PageUse};
use serde::Serialize;

use super::generation::{Finish, Reason};
use super::sparse::SparseParams;

/// `usage` of an answer.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    #[serde(skip_serializing_if = "Option::is_none")]
    sparse: Option<Receipt>,
}

/// What generated tokens attended to: per layer that is not dense and per KV head, averaged over steps.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Receipt {
    policy: &'static str,
    /// The policy and budget that were asked for, of the first choice.
    budget: u32,
    /// Generated tokens that were run.
    steps: u32,
    attended_tokens_per_step: f64,
    /// Clusters that were attended to as one token each, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_clusters_per_step: Option<f64>,
    context_tokens_per_step: f64,
    /// Steps for which the budget was raised to what the policy attends to at least.
    raised_steps: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    guard: Option<GuardReceipt>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    tier: Option<TierReceipt>,
    #[serde(skip)]
    sum: Attended,
}

/// What the quality guard saw and did.
#[derive(Clone, Copy, Debug, Serialize)]
struct GuardReceipt {
    /// Generated tokens that were checked, in one layer each.
    checks: u32,
    /// Attention mass that selections covered, of 1: mean and least.
    mass_mean: f32,
    mass_min: f32,
    /// How many of the likeliest tokens were selected, of 1: the mean.
    recall_mean: f32,
    /// Times that a budget was doubled.
    doubled: u32,
    /// Choices that attended to everything in the end.
    dense: u32,
    /// The largest budget that it led to, in tokens; absent if it changed none.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<u32>,
    #[serde(skip)]
    sums: (f32, f32),
}

/// What became of a request's pages in the HBM tier, prompt and answer together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct TierReceipt {
    /// Pages that were needed and in HBM.
    pages_hit: u64,
    /// Pages that were needed and had to be fetched.
    pages_missed: u64,
    /// Bytes of KV that were copied to HBM for it: of those, of a shared prefix, and of what the guard read.
    fetched_bytes: u64,
    /// Bytes of digests that were.
    digest_bytes: u64,
    /// Pages that selections named, over as many as their tokens would fill; none without a selection.
    #[serde(skip_serializing_if = "Option::is_none")]
    page_amplification: Option<f64>,
    /// Seconds that its steps waited for pages, whoever's they were.
    stall_seconds: f64,
    /// Bytes of cache frames held at once, at most.
    resident_peak_bytes: u64,
    #[serde(skip)]
    selected: [u64; 2],
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl Usage {
    /// Adds a finished choice.
    ///
    /// `page_bytes` is given where there is an HBM tier.
    pub fn add(&mut self, finish: &Finish, sparse: &SparseParams, page_bytes: Option<u64>) {
        self.prompt_tokens += finish.prompt_tokens;
        self.completion_tokens += finish.generated_tokens;
        self.total_tokens += finish.prompt_tokens + finish.generated_tokens;
        self.prompt_tokens_details.cached_tokens += finish.cached_tokens;
        if sparse.receipt {
            let receipt = self.sparse.get_or_insert_with(|| Receipt {
                policy: sparse.policy(finish.prompt_tokens as usize),
                budget: sparse.budget_tokens(finish.prompt_tokens as usize),
                ..Receipt::default()
            });
            receipt.add(finish.attended.unwrap_or_default());
            if let Some(guarded) = &finish.guarded {
                receipt.guard.get_or_insert_default().add(guarded);
            }
            if let Some(page_bytes) = page_bytes {
                receipt.tier.get_or_insert_default().add(&finish.pages, page_bytes);
            }
        }
    }
}

impl Receipt {
    fn add(&mut self, attended: Attended) {
        let sum = &mut self.sum;
        sum.steps += attended.steps;
        sum.tokens += attended.tokens;
        sum.context_tokens += attended.context_tokens;
        sum.raised_steps += attended.raised_steps;
        sum.estimated_clusters += attended.estimated_clusters;
        let per_step = |count: f64| count / f64::from(sum.steps.max(1));
        self.attended_tokens_per_step = per_step(sum.tokens);
        self.context_tokens_per_step = per_step(sum.context_tokens as f64);
        self.estimated_clusters_per_step =
            (sum.estimated_clusters > 0).then(|| per_step(sum.estimated_clusters as f64));
        (self.steps, self.raised_steps) = (sum.steps, sum.raised_steps);
    }
}

impl Default for GuardReceipt {
    fn default() -> Self {
        let Guarded { checks, mass_min, doubled, budget, .. } = Guarded::default();
        let (mass_mean, recall_mean, dense, sums) = (0.0, 0.0, 0, (0.0, 0.0));
        GuardReceipt { checks, mass_mean, mass_min, recall_mean, doubled, dense, budget, sums }
    }
}

impl GuardReceipt {
    fn add(&mut self, guarded: &Guarded) {
        self.checks += guarded.checks;
        self.sums = (self.sums.0 + guarded.mass_sum, self.sums.1 + guarded.recall_sum);
        self.mass_mean = self.sums.0 / self.checks.max(1) as f32;
        self.recall_mean = self.sums.1 / self.checks.max(1) as f32;
        self.mass_min = self.mass_min.min(guarded.mass_min);
        self.doubled += guarded.doubled;
        self.dense += u32::from(guarded.dense);
        self.budget = self.budget.max(guarded.budget);
    }
}

impl TierReceipt {
    fn add(&mut self, pages: &PageUse, page_bytes: u64) {
        let missed = pages.misses + pages.streamed;
        self.pages_hit += pages.hits;
        self.pages_missed += missed;
        self.fetched_bytes += pages.fetched_bytes;
        self.digest_bytes += pages.digest_bytes;
        let [selected, packed] = &mut self.selected;
        *selected += pages.selected;
        *packed += pages.selected_packed;
        self.page_amplification = (*packed > 0).then(|| *selected as f64 / *packed as f64);
        self.stall_seconds += pages.stall_nanos as f64 * 1e-9;
        self.resident_peak_bytes = self.resident_peak_bytes.max(pages.resident_peak * page_bytes);
    }
}

/// `finish_reason` and vLLM's `stop_reason`: the stop string, or the id of a stop token that is not the model's own.
pub fn finish_reason(reason: &Reason, end_tokens: &[u32]) -> (&'static str, Option<StopReason>) {
    match reason {
        Reason::Length => ("length", None),
        Reason::EndToken(id) if end_tokens.contains(id) => ("stop", None),
        Reason::EndToken(id) => ("stop", Some(StopReason::Token(*id))),
        Reason::Stop(stop) => ("stop", Some(StopReason::Text(stop.clone()))),
    }
}

/// What ended an answer, if the client named it.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

/// A fresh id of an answer, `chatcmpl-` or `cmpl-` and random digits.
pub fn answer_id(prefix: &str) -> String {
    // Without randomness ids repeat, which hurts nothing but logs.
    let random = getrandom::u64().unwrap_or_default();
    format!("{prefix}-{random:016x}")
}

/// Now, in Unix seconds.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
