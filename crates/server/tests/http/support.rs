//! A server for tests, and a client that sees everything.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use engine::{Config, Metrics, Runner};
use ops::Step;
use ops::coverage::Inspections;
use ops::sample::{SampleOutput, SampleRow, SampleScratch, sample};
use prometheus::Registry;
use serde_json::{Value, json};
use sparseserve::app::{App, GenerationDefaults, Lifecycle, Limits};
use sparseserve::http::{HttpMetrics, Shutdown, serve};
use sparseserve::text::{ChatTemplate, Sandbox, Tokenizer};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

pub const VOCAB: usize = 856;
const USER: u32 = 4;
const NUM_SPECIAL: u32 = 12;
pub const EOS: u32 = 2;

/// A model that repeats the user's last message, or a prompt without messages, and ends. Its logits are real ones, so
/// sampling parameters work on them: the token to repeat has 8, the others noise between 0 and 1.
pub struct Parrot {
    scratch: SampleScratch,
    step: Duration,
    /// Steps wait while this is set.
    held: Arc<AtomicBool>,
}

impl Parrot {
    fn logits(row: &SampleRow) -> Vec<f32> {
        let start = row.prompt.iter().rposition(|&t| t == USER).map_or(0, |at| at + 1);
        let words = row.prompt[start..].iter().copied().skip_while(|&t| t < NUM_SPECIAL);
        let mut words = words.take_while(|&t| t >= NUM_SPECIAL);
        let next = words.nth(row.generated.len()).unwrap_or(EOS);
        let noise = |i: usize| ((i as u64 * 7919 + row.position * 104_729) % 1000) as f32 / 1000.0;
        let mut logits: Vec<f32> = (0..VOCAB).map(noise).collect();
        logits[next as usize] = 8.0;
        logits
    }
}

impl Runner for Parrot {
    fn run(&mut self, _: &Step, samples: &[SampleRow], _: &mut Inspections, out: &mut SampleOutput) {
        while self.held.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(self.step);
        out.clear();
        for row in samples {
            sample(out, &Parrot::logits(row), row, &mut self.scratch);
        }
    }
}

/// What a test may want otherwise.
pub struct Options {
    pub step: Duration,
    pub max_waiting: usize,
    pub max_num_seqs: usize,
    pub max_context: usize,
    pub api_keys: Vec<String>,
    pub cors_origins: Vec<String>,
    pub limits: Limits,
    pub drain_timeout: Duration,
    /// Source of the chat template.
    pub template: Option<String>,
    /// Sparse policies, the default first.
    pub policies: Vec<&'static str>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            step: Duration::ZERO,
            max_waiting: 64,
            max_num_seqs: 8,
            max_context: 2048,
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            limits: Limits::default(),
            drain_timeout: Duration::from_secs(20),
            policies: vec!["dense"],
            template: ChatTemplate::find_source(None, Some(&model_file("tokenizer_config.json"))),
        }
    }
}

pub struct Server {
    pub url: String,
    pub client: reqwest::Client,
    pub app: Arc<App>,
    /// Steps wait while this is set.
    pub held: Arc<AtomicBool>,
    pub signals: mpsc::UnboundedSender<()>,
    pub served: JoinHandle<std::io::Result<()>>,
}

pub fn model_file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../../demo-model/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

pub async fn start(options: Options) -> Server {
    let held = Arc::new(AtomicBool::new(false));
    let registry = Registry::new();
    let config = Config {
        max_num_seqs: options.max_num_seqs,
        max_inject_tokens: 256,
        max_waiting: options.max_waiting,
        max_context: options.max_context,
        max_logprobs: options.limits.top_logprobs,
        vocab_size: VOCAB,
        page_tokens: 16,
        num_blocks: 1024,
        prefix_cache: true,
        tier: None,
        prefix_limit: None,
        prefill: engine::Prefill::Chunked,
        admission: engine::Admission::Slots,
        max_skips: 16,
        guard: None,
        shared_together: 16,
    };
    let parrot =
        Parrot { scratch: SampleScratch::with_vocab(VOCAB), step: options.step, held: Arc::clone(&held) };
    let broken = engine::abort_process();
    let metrics = Metrics::new(&registry).unwrap();
    let (engine, _) = engine::spawn(config, metrics, broken, || Ok::<_, Infallible>(parrot)).unwrap();
    while !engine.is_ready() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let tokenizer_config = model_file("tokenizer_config.json");
    let tokenizer = Tokenizer::from_bytes(&model_file("tokenizer.json"), Some(&tokenizer_config)).unwrap();
    let defaults = GenerationDefaults { temperature: None, max_new_tokens: None, ..defaults(&tokenizer) };
    let app = Arc::new(App {
        engine,
        http_metrics: HttpMetrics::new(&registry).unwrap(),
        registry,
        tokenizer: Arc::new(tokenizer),
        template: options.template.map(|source| sandbox(&source)),
        names: vec!["parrot".into(), "org/parrot".into()],
        max_context: options.max_context,
        vocab_size: VOCAB,
        defaults,
        hbm_page_bytes: None,
        policies: sparse::Served::new(options.policies, &Default::default()).unwrap(),
        budget: sparse::Budget::Tokens(64),
        reuses_answers: false,
        body_memory: options.limits.body_memory(),
        limits: options.limits,
        api_keys: options.api_keys,
        cors_origins: options.cors_origins,
        created: 1,
        lifecycle: Arc::new(Lifecycle::default()),
        text_workers: Semaphore::new(2),
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (signals, receiver) = mpsc::unbounded_channel();
    let shutdown = Shutdown { signals: receiver, drain_timeout: options.drain_timeout };
    let served = tokio::spawn(serve(Arc::clone(&app), listener, shutdown));
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().unwrap();
    Server { url, client, app, held, signals, served }
}

/// The chat template `source`, run by the binary under test.
pub fn sandbox(source: &str) -> Sandbox {
    let template = ChatTemplate::new(source, "<|bos|>", "<|eos|>").unwrap();
    Sandbox::new(Arc::new(template), env!("CARGO_BIN_EXE_sparseserve").into())
}

fn defaults(tokenizer: &Tokenizer) -> GenerationDefaults {
    let read = |name| serde_json::from_slice(&model_file(name)).unwrap();
    GenerationDefaults::from_json(&read("generation_config.json"), &read("config.json"), tokenizer)
}

impl Server {
    /// Ends the engine and the server.
    pub async fn stop(self) {
        self.signals.send(()).unwrap();
        // After the first it may have ended already.
        let _ = self.signals.send(());
        self.served.await.unwrap().unwrap();
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    /// Status and JSON.
    pub async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).await;
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    /// JSON of an answer that must succeed.
    pub async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(path, body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The error that a body must get.
    pub async fn refused(&self, path: &str, body: &Value, status: u16, param: Option<&str>) -> Value {
        let (actual, answer) = self.ask(path, body).await;
        assert_eq!(actual, status, "{body} got {answer}");
        let error = &answer["error"];
        assert_eq!(error["param"].as_str(), param, "{body} got {answer}");
        assert!(error["message"].is_string() && error["type"].is_string(), "{answer}");
        error.clone()
    }

    /// The chunks of a stream, without `[DONE]`, which must come last.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let response = self.post(path, &body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        chunks(&response.text().await.unwrap())
    }

    /// A value of `/metrics`.
    pub async fn metric(&self, line: &str) -> f64 {
        let text = self.get("/metrics").await.text().await.unwrap();
        let found = text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {line} in\n{text}"))
    }

    /// Waits until the engine holds no block for any request.
    pub async fn settle(&self) {
        for _ in 0..5000 {
            if self.metric("sparseserve_kv_blocks{state=\"used\"}").await == 0.0
                && self.metric("sparseserve_requests_running").await == 0.0
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("blocks stay in use");
    }
}

/// The chunks in a streamed body, without `[DONE]`, which must come last.
pub fn chunks(body: &str) -> Vec<Value> {
    let events = body.split("\n\n").filter(|event| !event.is_empty());
    let mut data: Vec<&str> = events.map(|event| event.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
}

/// The text that chunks of a chat bring.
pub fn streamed_text(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

/// A chat with one message.
pub fn chat(text: &str) -> Value {
    json!({"model": "parrot", "messages": [{"role": "user", "content": text}], "temperature": 0})
}

/// A completions body.
pub fn completion(prompt: impl Into<Value>) -> Value {
    json!({"model": "parrot", "prompt": prompt.into(), "temperature": 0, "max_tokens": 100})
}

/// `body` with further fields.
pub fn with(body: Value, fields: Value) -> Value {
    let mut body = body;
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}
