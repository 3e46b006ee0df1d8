//! Everything around a request: keys, limits, queue, shutdown.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::{Value, json};
use sparseserve::app::Limits;

use super::support::{Options, Server, chat, completion, start, with};

async fn status(server: &Server, path: &str) -> u16 {
    server.get(path).await.status().as_u16()
}

#[tokio::test]
async fn the_open_pages_answer() {
    let server = start(Options::default()).await;
    for path in [
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/models/parrot",
        "/v1/models/org/parrot",
    ] {
        assert_eq!(status(&server, path).await, 200, "{path}");
    }
    let unknown = server.get("/v1/models/other").await;
    assert_eq!(unknown.status(), 404);
    let error: Value = unknown.json().await.unwrap();
    assert_eq!(error["error"]["code"], "model_not_found");
    for path in ["/nowhere", "/v1/nowhere"] {
        let response = server.get(path).await;
        assert_eq!(response.status(), 404);
        assert!(response.json::<Value>().await.unwrap()["error"]["message"].is_string());
    }
    assert_eq!(status(&server, "/v1/chat/completions").await, 405);
    server.stop().await;
}

#[tokio::test]
async fn keys_open_the_api_and_nothing_else_does() {
    let keys = vec!["first-key".to_string(), "second".to_string()];
    let server = start(Options { api_keys: keys, ..Options::default() }).await;
    for path in ["/health", "/ready", "/version"] {
        assert_eq!(status(&server, path).await, 200, "{path} needs no key");
    }
    let with_key = |key: &str| {
        let request = server.client.get(format!("{}/v1/models", server.url));
        if key.is_empty() { request } else { request.header("authorization", key) }
    };
    for (key, expected) in [
        ("Bearer first-key", 200),
        ("Bearer second", 200),
        ("Bearer first", 401),
        ("Bearer first-keys", 401),
        ("first-key", 401),
        ("Bearer ", 401),
        ("", 401),
    ] {
        let response = with_key(key).send().await.unwrap();
        assert_eq!(response.status().as_u16(), expected, "{key:?}");
        if expected == 401 {
            let error: Value = response.json().await.unwrap();
            assert!(!error.to_string().contains("first-key"), "the error does not tell the key: {error}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn only_named_origins_may_call() {
    let server =
        start(Options { cors_origins: vec!["https://a.example".into()], ..Options::default() }).await;
    for (origin, allowed) in [("https://a.example", true), ("https://b.example", false)] {
        let request = server.client.get(format!("{}/v1/models", server.url)).header("origin", origin);
        let response = request.send().await.unwrap();
        let header = response.headers().get("access-control-allow-origin").cloned();
        assert_eq!(header.is_some_and(|h| h == origin), allowed, "{origin}");
    }
    server.stop().await;
}

#[tokio::test]
async fn large_bodies_are_refused() {
    let server =
        start(Options { limits: Limits { body_bytes: 10_000, ..Limits::default() }, ..Options::default() })
            .await;
    let body = completion("x".repeat(20_000));
    let (status, error) = server.ask("/v1/completions", &body).await;
    assert_eq!(status, 413, "{error}");
    server.ok("/v1/completions", &completion("small")).await;
    server.stop().await;
}

/// One request runs, one waits, the others are turned away and told when to come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_429() {
    let server = start(Options { max_num_seqs: 1, max_waiting: 1, ..Options::default() }).await;
    server.held.store(true, Ordering::Release);
    let post = |_| {
        server.client.post(format!("{}/v1/completions", server.url)).json(&completion("some words")).send()
    };
    let mut answers: FuturesUnordered<_> = (0..6).map(post).collect();
    // While the engine is held only refusals come back.
    let refused = answers.next().await.unwrap().unwrap();
    assert_eq!(refused.status(), 429);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    server.held.store(false, Ordering::Release);
    let mut taken = 0;
    while let Some(answer) = answers.next().await {
        let status = answer.unwrap().status().as_u16();
        assert!(status == 200 || status == 429, "{status}");
        taken += usize::from(status == 200);
    }
    assert!(taken >= 1, "what was taken in was answered");
    drop(answers);
    server.stop().await;
}

/// After the first signal: what runs finishes, what comes is refused, and the server returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_running_requests_finish() {
    let server = start(Options { step: Duration::from_millis(20), ..Options::default() }).await;
    let text = "word ".repeat(20);
    let body = with(chat(&text), json!({"stream": true}));
    let mut running = server.post("/v1/chat/completions", &body).await;
    let first = running.chunk().await.unwrap().unwrap();
    assert!(first.starts_with(b"data: "));
    server.signals.send(()).unwrap();
    let mut rest = first.to_vec();
    while let Some(chunk) = running.chunk().await.unwrap() {
        rest.extend_from_slice(&chunk);
    }
    assert!(String::from_utf8(rest).unwrap().ends_with("data: [DONE]\n\n"), "the stream is whole");
    tokio::time::timeout(Duration::from_secs(10), server.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_in_time() {
    let drain_timeout = Duration::from_millis(100);
    let server =
        start(Options { step: Duration::from_millis(50), drain_timeout, ..Options::default() }).await;
    let body = with(chat("x"), json!({"stream": true, "ignore_eos": true, "max_tokens": 1500}));
    let mut running = server.post("/v1/chat/completions", &body).await;
    running.chunk().await.unwrap();
    server.signals.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), server.served).await.unwrap().unwrap().unwrap();
}
