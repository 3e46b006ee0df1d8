//! What the server serves: one model with its text side, and the bounds that requests must keep.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::http::HttpMetrics;
use crate::text::{Sandbox, Tokenizer};

/// Everything the routes share. Built once at start, never changed but for [`Lifecycle`].
pub struct App {
    /// The engine that runs the model.
    pub engine: engine::Handle,
    /// What `/metrics` shows; the engine's metrics are registered here.
    pub registry: prometheus::Registry,
    /// What of it the routes count.
    pub http_metrics: HttpMetrics,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template; without one there are no chat completions.
    pub template: Option<Sandbox>,
    /// Names that requests may call the model by; answers carry the first. Not empty.
    pub names: Vec<String>,
    /// Tokens of prompt and answer together at most.
    pub max_context: usize,
    /// Rows of the model's embedding: ids in requests must be below.
    pub vocab_size: usize,
    /// What the model itself says about generation.
    pub defaults: GenerationDefaults,
    /// Sparse policies that requests may ask for, the default first.
    pub policies: sparse::Served,
    /// Budget of requests that name none.
    pub budget: sparse::Budget,
    /// Whether requests go on from the KV of sparse answers to others of the same policy, options and budget.
    pub reuses_answers: bool,
    /// Bytes of a page in the HBM tier; `None` in unified memory.
    pub hbm_page_bytes: Option<u64>,
    /// Bounds on single requests.
    pub limits: Limits,
    /// Keys that open the API; empty leaves it open.
    pub api_keys: Vec<String>,
    /// Origins whose pages may call the API; `*` for all, empty for none.
    pub cors_origins: Vec<String>,
    /// When the server started, in Unix seconds; the API calls it the model's creation.
    pub created: u64,
    /// Whether requests are taken in, and how many are.
    pub lifecycle: Arc<Lifecycle>,
    /// Permits for tokenizing and templating large texts, so that a flood of them leaves cores to the engine.
    pub text_workers: Semaphore,
    /// Memory for large bodies, a permit per KiB; [`Limits::body_memory`] makes it.
    pub body_memory: Arc<Semaphore>,
}

/// Memory that a body takes of [`App::body_memory`], until it has become tokens.
pub type BodyMemory = OwnedSemaphorePermit;

/// Bytes of text from which work on it leaves the threads that serve connections: some tenths of a millisecond's worth.
const LARGE_TEXT_BYTES: usize = 16 << 10;

/// Bodies of the largest size that are in memory at once.
const LARGEST_BODIES: usize = 4;

impl App {
    /// Runs `work`, which handles `bytes` of text: at once if that is little, else on a thread where it may take its
    /// time, a bounded number of them at once.
    ///
    /// # Panics
    /// If `work` does.
    pub async fn text_work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if bytes < LARGE_TEXT_BYTES {
            return work();
        }
        // The semaphore is never closed, so there is always a permit to wait for.
        let _permit = self.text_workers.acquire().await;
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Waits for memory for a body of `bytes`, which are within the limit. Small ones need none: connections bound them.
    pub async fn reserve_body(&self, bytes: usize) -> Option<BodyMemory> {
        if bytes < LARGE_TEXT_BYTES {
            return None;
        }
        let permits = u32::try_from(bytes.min(self.limits.body_bytes).div_ceil(KIB)).ok()?;
        // The semaphore is never closed.
        Arc::clone(&self.body_memory).acquire_many_owned(permits).await.ok()
    }

    /// Bytes beyond which no text can be as few tokens as the context holds. What is longer is refused before the
    /// tokenizer, which takes a hundred times a text's memory, has seen it.
    pub fn text_bytes_max(&self) -> usize {
        self.max_context.saturating_mul(self.tokenizer.token_bytes_max())
    }
}

const KIB: usize = 1 << 10;

/// Bounds on requests, which are refused with 400 beyond them, or 413 for the body; and on connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Prompts of one completions request.
    pub prompts: usize,
    /// Messages of one chat.
    pub messages: usize,
    /// Stop strings.
    pub stops: usize,
    /// Bytes of one stop string.
    pub stop_bytes: usize,
    /// Entries of `stop_token_ids`.
    pub stop_tokens: usize,
    /// Entries of `logit_bias`.
    pub logit_bias: usize,
    /// Alternatives per token in log-probabilities.
    pub top_logprobs: u32,
    /// Time in which a request's headers must have arrived.
    pub header_time: Duration,
    /// Time in which its body must have arrived.
    pub body_time: Duration,
    /// Time after which a stream without news sends a comment, so that proxies keep the line open.
    pub keep_alive: Duration,
    /// Connections at once; further ones wait until one closes.
    pub connections: usize,
}

impl Limits {
    /// Limits for a model of `max_context` tokens: a body holds a prompt that fills the context, however its characters
    /// are escaped, or many short ones.
    pub fn for_context(max_context: usize) -> Self {
        let most = Limits::default();
        let body_bytes = max_context.saturating_mul(64).saturating_add(4 << 20).min(most.body_bytes);
        Limits { body_bytes, ..most }
    }

    /// What all large bodies together may take.
    pub fn body_memory(&self) -> Arc<Semaphore> {
        let permits = self.body_bytes.div_ceil(KIB).saturating_mul(LARGEST_BODIES);
        Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 32 << 20,
            prompts: 128,
            messages: 4096,
            stops: 16,
            stop_bytes: 1024,
            stop_tokens: 256,
            logit_bias: 1024,
            top_logprobs: 20,
            header_time: Duration::from_secs(30),
            body_time: Duration::from_secs(60),
            keep_alive: Duration::from_secs(15),
            connections: 4096,
        }
    }
}

/// What a model's `generation_config.json` says; a request overrides each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end an answer.
    pub end_tokens: Vec<u32>,
    /// Sampling temperature; 0 where the model says `do_sample: false`.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Number of candidates.
    pub top_k: Option<u32>,
    /// Least relative probability.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Length of an answer that names no length.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json`, with the end tokens of `config.json` where it names none, and the tokenizer's
    /// end token in any case. Values of the wrong type count as absent: none of them is worth refusing a model for.
    pub fn from_json(
        generation_config: &serde_json::Value,
        config: &serde_json::Value,
        tokenizer: &Tokenizer,
    ) -> Self {
        let float = |name: &str| generation_config[name].as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        let count = |name: &str| generation_config[name].as_u64().and_then(|n| u32::try_from(n).ok());
        let mut end_tokens = token_ids(&generation_config["eos_token_id"]);
        if end_tokens.is_empty() {
            end_tokens = token_ids(&config["eos_token_id"]);
        }
        end_tokens.extend(tokenizer.eos_id());
        end_tokens.sort_unstable();
        end_tokens.dedup();
        let greedy = generation_config["do_sample"] == false;
        GenerationDefaults {
            end_tokens,
            temperature: if greedy { Some(0.0) } else { float("temperature").filter(|&t| t >= 0.0) },
            top_p: float("top_p").filter(|p| (0.0..=1.0).contains(p)),
            top_k: count("top_k"),
            min_p: float("min_p").filter(|p| (0.0..=1.0).contains(p)),
            repetition_penalty: float("repetition_penalty").filter(|&p| p > 0.0),
            max_new_tokens: count("max_new_tokens").filter(|&n| n > 0),
        }
    }
}

/// `eos_token_id` is one id or a list of them.
fn token_ids(value: &serde_json::Value) -> Vec<u32> {
    let single = std::slice::from_ref(value);
    let ids = value.as_array().map_or(single, Vec::as_slice);
    ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// Requests in flight, and whether more may come.
#[derive(Debug, Default)]
pub struct Lifecycle {
    draining: AtomicBool,
    in_flight: AtomicUsize,
    idle: Notify,
}

impl Lifecycle {
    /// Takes a request in, until the guard is dropped; `None` while draining.
    pub fn enter(self: &Arc<Self>) -> Option<InFlight> {
        // Counted before the check: a drain that begins in between sees this request and waits for it.
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let guard = InFlight(Arc::clone(self));
        (!self.is_draining()).then_some(guard)
    }

    /// Takes no more requests in.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Whether no more requests are taken in.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Requests in flight now.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Returns when no request is in flight.
    pub async fn idle(&self) {
        loop {
            let notified = self.idle.notified();
            if self.in_flight() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// A request being answered; dropped when its last byte has been made.
#[derive(Debug)]
pub struct InFlight(Arc<Lifecycle>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::tests::demo;

    #[test]
    fn defaults_come_from_the_model_and_ignore_nonsense() {
        let tokenizer = demo();
        let read = |generation, config| GenerationDefaults::from_json(&generation, &config, &tokenizer);
        let defaults =
            read(json!({"do_sample": false, "eos_token_id": [7, 2], "max_new_tokens": 16}), json!({}));
        assert_eq!(defaults.end_tokens, [2, 7]);
        assert_eq!((defaults.temperature, defaults.max_new_tokens), (Some(0.0), Some(16)));
        let defaults = read(json!({"top_p": 3, "top_k": -1, "temperature": "x"}), json!({"eos_token_id": 9}));
        assert_eq!(defaults, GenerationDefaults { end_tokens: vec![2, 9], ..Default::default() });
    }

    #[tokio::test]
    async fn draining_waits_for_what_is_in_flight() {
        let lifecycle = Arc::new(Lifecycle::default());
        lifecycle.idle().await;
        let guard = lifecycle.enter().unwrap();
        lifecycle.drain();
        assert!(lifecycle.enter().is_none());
        assert_eq!(lifecycle.in_flight(), 1);
        let waiting = tokio::spawn({
            let lifecycle = Arc::clone(&lifecycle);
            async move { lifecycle.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(guard);
        waiting.await.unwrap();
    }
}
