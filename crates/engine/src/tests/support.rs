//! Engines, requests and listeners for tests.

use std::cell::Cell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ops::sample::SamplingParams;
use ops::sparse::{Always, Method, Reduce, Rule, Scope, Score};
use prometheus::Registry;

use super::fake_runner::{FakeRunner, VOCAB};
use super::fake_tier::FakeTier;
use crate::config::{Config, Prefill, Segments};
use crate::engine::{Engine, Event};
use crate::metrics::Metrics;
use crate::request::{Disconnected, Refusal, Request, RequestId, Sink, Sparse, Stopping, Update};
use crate::sequence::Submission;

/// Of a block in DRAM.
pub const BLOCK_BYTES: u64 = 1000;

pub fn config(num_blocks: usize) -> Config {
    Config {
        max_num_seqs: 8,
        max_inject_tokens: 16,
        max_waiting: 100,
        max_context: 200,
        max_logprobs: 5,
        vocab_size: VOCAB,
        page_tokens: 8,
        num_blocks,
        prefix_cache: true,
        tier: None,
        prefix_limit: None,
        prefill: Prefill::Chunked,
        admission: crate::Admission::Slots,
        max_skips: 16,
        guard: None,
        shared_together: 8,
    }
}

/// Prompt tokens `0..40` by a little generator, so that prompts of one `family` share prefixes.
pub fn prompt(family: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + family * 13 + i / 9) % 40).collect()
}

pub fn request(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        prompt,
        sampling: SamplingParams::default(),
        stopping: Stopping { max_tokens, min_tokens: 0, end_tokens: vec![] },
        logprobs: None,
        prompt_logprobs: None,
        sparse: None,
        reuse: None,
        priority: 0,
    }
}

/// Attention to the best partitions of so many tokens.
pub fn sparse(partition_tokens: usize, budget: u32) -> Sparse {
    let method = Method {
        dense_layers: 0,
        partition_tokens,
        score: Score::Digest { digests: 0 },
        reduce: Reduce::Mean,
        softmax: false,
        scope: Scope::KvHead,
        always: Always { sink_tokens: 1, recent_tokens: 2, generated_tokens: 0, outliers: 0 },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    };
    Sparse { method, budget }
}

/// What a client has heard.
#[derive(Clone, Debug, Default)]
pub struct Listener {
    heard: Arc<Mutex<Vec<Update>>>,
    /// Hangs up after this many updates.
    patience: Option<usize>,
}

impl Listener {
    pub fn impatient(patience: usize) -> Self {
        Listener { patience: Some(patience), ..Default::default() }
    }

    pub fn heard(&self) -> Vec<Update> {
        self.heard.lock().unwrap().clone()
    }

    pub fn tokens(&self) -> Vec<u32> {
        let token =
            |update: &Update| if let Update::Token { token, .. } = update { Some(*token) } else { None };
        self.heard().iter().filter_map(token).collect()
    }

    /// The last update, if it is the last.
    pub fn end(&self) -> Option<Update> {
        let heard = self.heard();
        let is_end = |u: &Update| matches!(u, Update::Finished { .. } | Update::Failed(_));
        let num_ends = heard.iter().filter(|u| is_end(u)).count();
        assert!(num_ends <= 1, "there is one last update");
        assert!(num_ends == 0 || is_end(&heard[heard.len() - 1]), "the last update is the last");
        heard.into_iter().last().filter(is_end)
    }
}

impl Sink for Listener {
    fn send(&mut self, update: Update) -> Result<(), Disconnected> {
        let mut heard = self.heard.lock().unwrap();
        if self.patience == Some(heard.len()) {
            return Err(Disconnected);
        }
        heard.push(update);
        Ok(())
    }
}

/// An engine with virtual time: every look at the clock is a millisecond later.
pub struct Bench {
    pub engine: Engine<FakeRunner>,
    pub registry: Registry,
    now: Cell<u64>,
    num_submitted: u64,
}

impl Bench {
    pub fn new(config: Config) -> Self {
        let registry = Registry::new();
        let metrics = Arc::new(Metrics::new(&registry).unwrap());
        metrics.set_block_bytes(BLOCK_BYTES);
        let mut runner = FakeRunner::new(config.num_blocks, config.page_tokens);
        if let Prefill::Segmented(Segments { layers, .. }) = config.prefill {
            runner.layers = layers;
        }
        runner.tier = config.tier.map(|tier| FakeTier::new(9, config.page_tokens, &tier));
        Bench { engine: Engine::new(config, metrics, runner), registry, now: Cell::new(0), num_submitted: 0 }
    }

    pub fn now(&self) -> Duration {
        self.now.set(self.now.get() + 1);
        Duration::from_millis(self.now.get())
    }

    pub fn submit(&mut self, request: Request, listener: &Listener) -> Result<RequestId, Refusal> {
        let id = RequestId(self.num_submitted);
        let sink = Box::new(listener.clone());
        let submission = Submission::new(&self.engine.config, id, request, sink, self.now())?;
        self.num_submitted += 1;
        self.handle(Event::Submit(Box::new(submission)));
        Ok(id)
    }

    /// Submits what must be accepted, to a new listener.
    pub fn start(&mut self, request: Request) -> (RequestId, Listener) {
        let listener = Listener::default();
        let id = self.submit(request, &listener).expect("the request fits");
        (id, listener)
    }

    pub fn handle(&mut self, event: Event) {
        let now = self.now();
        self.engine.handle(event, now);
        self.engine.check();
    }

    pub fn step(&mut self) {
        let now = &self.now;
        self.engine.step(&|| {
            now.set(now.get() + 1);
            Duration::from_millis(now.get())
        });
        self.engine.check();
    }

    pub fn finish(&mut self) {
        let mut steps = 0;
        while self.engine.has_work() {
            self.step();
            steps += 1;
            assert!(steps < 1_000_000, "requests come to an end");
        }
        assert_eq!(self.engine.kv_counts().in_use, 0, "every block is free or cached when nobody runs");
    }

    pub fn metric(&self, name: &str, label: Option<&str>) -> f64 {
        metric(&self.registry, name, label)
    }
}

/// The value of a counter or gauge, or the count of a histogram.
pub fn metric(registry: &Registry, name: &str, label: Option<&str>) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|f| f.name() == name).expect("a metric of this name");
    let wanted = |m: &&prometheus::proto::Metric| {
        label.is_none_or(|value| m.get_label().iter().any(|pair| pair.value() == value))
    };
    let metric = family.get_metric().iter().find(wanted).expect("a metric of this label");
    match family.get_field_type() {
        prometheus::proto::MetricType::COUNTER => metric.get_counter().get_value(),
        prometheus::proto::MetricType::GAUGE => metric.get_gauge().get_value(),
        _ => metric.get_histogram().get_sample_count() as f64,
    }
}
