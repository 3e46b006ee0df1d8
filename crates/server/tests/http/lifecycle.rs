//! Everything around a request: keys, limits, queue, shutdown.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use sparseserve::app::Limits;

use super::support::*;

const CHAT: &str = "/v1/chat/completions";

/// A chat that takes a thousand steps.
fn endless() -> Value {
    with(chat("hi"), json!({"ignore_eos": true, "max_tokens": 1000}))
}

impl Server {
    /// Waits until `/metrics` shows `value` for `name`.
    async fn reach(&self, name: &str, value: f64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.metric(name).await != value {
            assert!(Instant::now() < deadline, "{name} never is {value}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test]
async fn keys_open_the_api_and_nothing_else_does() {
    let keys = vec!["first".to_owned(), "second".to_owned()];
    let server = start(Options { api_keys: keys, ..Options::default() }).await;
    let error = server.refused(CHAT, &chat("hi"), 401, None).await;
    assert_eq!((&error["type"], &error["code"]), (&json!("authentication_error"), &json!("invalid_api_key")));
    assert!(!error.to_string().contains("first"), "the error does not tell the key");
    assert_eq!(server.post(CHAT, &chat("hi")).await.headers()["www-authenticate"], "Bearer");
    for path in ["/v1/models", "/metrics", "/nothing"] {
        assert_eq!(server.get(path).await.status(), 401, "{path}");
    }
    for path in ["/", "/health", "/ready", "/version"] {
        assert_eq!(server.get(path).await.status(), 200, "{path}");
    }
    for (key, status) in [("first", 200), ("second", 200), ("firs", 401), ("third", 401)] {
        let asked = server.client.get(format!("{}/v1/models", server.url)).bearer_auth(key).send().await;
        assert_eq!(asked.unwrap().status(), status, "{key}");
    }
    server.stop().await;
}

#[tokio::test]
async fn pages_of_allowed_origins_may_ask() {
    let origins = vec!["https://chat.example".to_owned()];
    let keys = vec!["key".to_owned()];
    let server = start(Options { cors_origins: origins, api_keys: keys, ..Options::default() }).await;
    let preflight = async |origin: &str| {
        let request = server.client.request(reqwest::Method::OPTIONS, format!("{}{CHAT}", server.url));
        let request = request.header("origin", origin).header("access-control-request-method", "POST");
        // As the official client for JavaScript asks.
        let wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count";
        let answer = request.header("access-control-request-headers", wanted).send().await.unwrap();
        let header = |name: &str| Some(answer.headers().get(name)?.to_str().unwrap().to_owned());
        assert_eq!(header("access-control-allow-headers").as_deref(), Some(wanted));
        header("access-control-allow-origin")
    };
    assert_eq!(preflight("https://chat.example").await.unwrap(), "https://chat.example");
    assert_eq!(preflight("https://evil.example").await, None);
    server.stop().await;
}

#[tokio::test]
async fn bodies_must_be_json_and_small() {
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let server = start(Options { limits, ..Options::default() }).await;
    server.refused(CHAT, &chat(&"x".repeat(2000)), 413, None).await;
    let send = async |content_type: Option<&str>, body: &str| {
        let request = server.client.post(format!("{}{CHAT}", server.url)).body(body.to_owned());
        let request = match content_type {
            Some(content_type) => request.header("content-type", content_type),
            None => request,
        };
        request.send().await.unwrap().status().as_u16()
    };
    let good = chat("hi").to_string();
    assert_eq!(send(None, &good).await, 200);
    assert_eq!(send(Some("application/json; charset=utf-8"), &good).await, 200);
    assert_eq!(send(Some("text/plain"), &good).await, 415);
    assert_eq!(send(None, "{").await, 400);
    assert_eq!(send(None, "[]").await, 422);
    assert_eq!(send(None, "").await, 400);
    server.stop().await;
}

#[tokio::test]
async fn answers_are_counted_by_route_and_class() {
    let options = Options { api_keys: vec!["key".into()], ..Options::default() };
    let server = start(options).await;
    let send = async |path: &str, key: &str, body: &str| {
        let request = server.client.post(format!("{}{path}", server.url)).bearer_auth(key);
        request.body(body.to_owned()).send().await.unwrap().status().as_u16()
    };
    let good = chat("hi").to_string();
    let answers = [(CHAT, "key", good.as_str(), 200), (CHAT, "no", &good, 401), (CHAT, "key", "{", 400)];
    let strange = [(CHAT, "key", "[]", 422), ("/nothing", "key", "", 404), ("/nothing/2", "key", "", 404)];
    for (path, key, body, status) in answers.into_iter().chain(strange) {
        assert_eq!(send(path, key, body).await, status);
    }
    server.client.get(format!("{}/v1/models/none", server.url)).bearer_auth("key").send().await.unwrap();
    let count = |route: &str, class: &str| {
        let name = "sparseserve_http_requests_total";
        let families = server.app.registry.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap();
        let wanted = |m: &&prometheus::proto::Metric| {
            [route, class].iter().all(|value| m.get_label().iter().any(|label| label.value() == *value))
        };
        family.get_metric().iter().find(wanted).unwrap().get_counter().get_value()
    };
    assert_eq!([count(CHAT, "2xx"), count(CHAT, "4xx"), count(CHAT, "5xx")], [1.0, 3.0, 0.0]);
    assert_eq!([count("unknown", "4xx"), count("/v1/models/{*name}", "4xx")], [2.0, 1.0]);
    server.stop().await;
}

#[tokio::test]
async fn answers_carry_the_id_of_their_request() {
    let server = start(Options::default()).await;
    let ask = async |id: &str| {
        let request = server.client.get(format!("{}/health", server.url)).header("x-request-id", id);
        request.send().await.unwrap().headers()["x-request-id"].clone()
    };
    assert_eq!(ask("mine").await, "mine");
    assert_eq!(ask(&"x".repeat(200)).await.len(), 16);
    server.stop().await;
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let options = Options { max_waiting: 1, max_num_seqs: 1, ..Options::default() };
    let server = start(options).await;
    server.held.store(true, Ordering::Release);
    let first = server.post(CHAT, &with(endless(), json!({"stream": true}))).await;
    server.reach("sparseserve_queue_seconds_count", 1.0).await;
    let second = server.post(CHAT, &with(chat("a"), json!({"stream": true}))).await;
    let refused = server.post(CHAT, &chat("b")).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "rate_limit_exceeded");
    drop(first);
    server.held.store(false, Ordering::Release);
    assert!(second.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    server.settle().await;
    server.stop().await;
}

#[tokio::test]
async fn one_refused_prompt_takes_the_others_back() {
    let options = Options { max_waiting: 2, max_num_seqs: 1, ..Options::default() };
    let server = start(options).await;
    server.held.store(true, Ordering::Release);
    let first = server.post(CHAT, &with(endless(), json!({"stream": true}))).await;
    server.reach("sparseserve_queue_seconds_count", 1.0).await;
    server.refused("/v1/completions", &completion(json!(["a", "b", "c"])), 429, None).await;
    drop(first);
    server.held.store(false, Ordering::Release);
    server.settle().await;
    server.reach("sparseserve_requests_waiting", 0.0).await;
    server.ok(CHAT, &chat("still there")).await;
    server.stop().await;
}

#[tokio::test]
async fn an_idle_server_takes_as_many_prompts_as_may_run() {
    let options = Options { max_waiting: 1, max_num_seqs: 8, ..Options::default() };
    let server = start(options).await;
    let answer = server.ok("/v1/completions", &completion(vec!["a"; 9])).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 9);
    // Ten would have to wait for each other.
    server.refused("/v1/completions", &completion(vec!["a"; 10]), 400, Some("prompt")).await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_blocks() {
    let server = start(Options { step: Duration::from_millis(5), ..Options::default() }).await;
    let streamed = server.post(CHAT, &with(endless(), json!({"stream": true}))).await;
    let mut body = streamed.bytes_stream();
    body.next().await.unwrap().unwrap();
    drop(body);
    server.reach("sparseserve_requests_total{outcome=\"aborted\"}", 1.0).await;

    let whole = server.client.post(format!("{}{CHAT}", server.url)).json(&endless());
    let gone = whole.timeout(Duration::from_millis(100)).send().await;
    assert!(gone.unwrap_err().is_timeout());
    server.reach("sparseserve_requests_total{outcome=\"aborted\"}", 2.0).await;
    server.settle().await;
    server.stop().await;
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() {
    let limits = Limits { keep_alive: Duration::from_secs(1), ..Limits::default() };
    let server = start(Options { limits, ..Options::default() }).await;
    server.held.store(true, Ordering::Release);
    let response = server.post(CHAT, &with(chat("hi"), json!({"stream": true}))).await;
    tokio::time::sleep(Duration::from_millis(1300)).await;
    server.held.store(false, Ordering::Release);
    let text = response.text().await.unwrap();
    assert!(text.lines().any(|line| line == ":"), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"));
    server.stop().await;
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let server = start(Options::default()).await;
    server.held.store(true, Ordering::Release);
    let running = server.post(CHAT, &with(chat("one two three"), json!({"stream": true}))).await;
    server.reach("sparseserve_queue_seconds_count", 1.0).await;
    server.signals.send(()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.get("/ready").await.status() != 503 {
        assert!(Instant::now() < deadline, "it never drains");
    }
    assert_eq!(server.get("/health").await.status(), 200);
    let refused = server.post(CHAT, &chat("late")).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    server.held.store(false, Ordering::Release);
    let text = streamed_text(&chunks(&running.text().await.unwrap()));
    assert_eq!(text, "one two three");
    server.served.await.unwrap().unwrap();
    assert!(server.client.get(format!("{}/health", server.url)).send().await.is_err());
}

#[tokio::test]
async fn the_drain_timeout_and_a_second_signal_end_it() {
    for impatient in [false, true] {
        let drain_timeout = Duration::from_millis(if impatient { 60_000 } else { 200 });
        let step = Duration::from_millis(20);
        let server = start(Options { drain_timeout, step, ..Options::default() }).await;
        let running = server.post(CHAT, &with(endless(), json!({"stream": true}))).await;
        server.signals.send(()).unwrap();
        if impatient {
            server.signals.send(()).unwrap();
        }
        let started = Instant::now();
        let text = running.text().await.unwrap();
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("\"error\"")).collect();
        assert_eq!(errors.len(), 1, "the client is told: {text}");
        server.served.await.unwrap().unwrap();
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
