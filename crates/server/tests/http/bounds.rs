//! Requests far beyond the limits cost next to nothing.

use std::time::Duration;

use serde_json::{Value, json};
use sparseserve::app::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::*;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A server with a context of 64 tokens that takes bodies of 32 MiB.
async fn narrow() -> Server {
    start(Options { max_context: 64, ..Options::default() }).await
}

/// The answer, from a server whose text workers are all busy: nothing was tokenized, decoded or rendered for it.
async fn ask_without_text_work(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let _busy = server.app.text_workers.acquire_many(2).await.unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(60), server.ask(path, body));
    answer.await.expect("it waits for no text worker")
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_cannot_fit_are_refused_before_they_are_tokenized() {
    let server = narrow().await;
    let text = "word ".repeat(6_000_000);
    let ids = vec![100; 3_000_000];
    let messages = json!([{"role": "user", "content": text}]);
    for (path, body, param) in [
        (COMPLETIONS, json!({"prompt": text}), "prompt"),
        (COMPLETIONS, json!({"prompt": [text]}), "prompt"),
        (COMPLETIONS, json!({"prompt": ids}), "prompt"),
        (COMPLETIONS, json!({"prompt": [ids], "echo": true}), "prompt"),
        (CHAT, json!({"messages": messages}), "messages"),
        ("/tokenize", json!({"prompt": text}), "prompt"),
        ("/tokenize", json!({"messages": messages}), "messages"),
    ] {
        let (status, answer) = ask_without_text_work(&server, path, &body).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{path}: {answer}");
        assert_eq!(answer["error"]["code"], "context_length_exceeded", "{path}: {answer}");
    }
    server.refused("/detokenize", &json!({"tokens": ids}), 400, Some("tokens")).await;
    // What does fit is answered, up to the last token.
    let most = server.app.max_context - 1;
    let fits = json!({"prompt": vec![100; most], "max_tokens": 1});
    assert_eq!(server.ok(COMPLETIONS, &fits).await["usage"]["prompt_tokens"], most);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_decoded_for_an_echo_only() {
    let server = narrow().await;
    let ids = server.ok("/tokenize", &json!({"prompt": "one two"})).await["tokens"].clone();
    let echoed = server.ok(COMPLETIONS, &json!({"prompt": ids, "echo": true, "max_tokens": 0})).await;
    assert_eq!(echoed["choices"][0]["text"], "<|bos|>one two");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_wait_for_memory_and_small_ones_do_not() {
    let limits = Limits { body_bytes: 1 << 20, body_time: Duration::from_secs(2), ..Limits::default() };
    let server = start(Options { limits, ..Options::default() }).await;
    let large = json!({"prompt": "word ".repeat(40_000)});
    let all = server.app.body_memory.available_permits();
    let taken = server.app.body_memory.acquire_many(all as u32).await.unwrap();
    server.refused("/tokenize", &large, 408, None).await;
    server.ok("/tokenize", &json!({"prompt": "small"})).await;
    drop(taken);
    server.ok("/tokenize", &large).await;
    assert_eq!(server.app.body_memory.available_permits(), all, "it is given back");
    // Far more than sockets hold: the client gets to reading the answer.
    server.refused("/tokenize", &json!({"prompt": "word ".repeat(4_000_000)}), 413, None).await;
    server.stop().await;
}

#[tokio::test]
async fn headers_must_come_in_time() {
    let limits = Limits { header_time: Duration::from_millis(200), ..Limits::default() };
    let server = start(Options { limits, ..Options::default() }).await;
    let address = server.url.trim_start_matches("http://");
    for sent in ["", "GET", "GET /health HTTP/1.1\r\nHost: x\r\nX-Slow"] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut told = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut told)).await;
        assert!(closed.is_ok(), "{sent:?} keeps the connection open");
    }
    assert_eq!(server.get("/health").await.status(), 200);
    server.stop().await;
}

#[tokio::test]
async fn connections_wait_for_a_place() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let server = start(Options { limits, ..Options::default() }).await;
    let address = server.url.trim_start_matches("http://");
    let first = tokio::net::TcpStream::connect(address).await.unwrap();
    let second = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = || server.client.get(format!("{}/health", server.url));
    let waiting = request().timeout(Duration::from_millis(300)).send().await;
    assert!(waiting.unwrap_err().is_timeout());
    drop((first, second));
    assert_eq!(request().send().await.unwrap().status(), 200);
    server.stop().await;
}

#[test]
fn bodies_may_be_as_large_as_the_context_makes_sensible() {
    let of = |max_context| Limits::for_context(max_context).body_bytes;
    assert_eq!([of(64), of(131_072), of(1 << 20)], [(4 << 20) + 4096, 12 << 20, 32 << 20]);
}
