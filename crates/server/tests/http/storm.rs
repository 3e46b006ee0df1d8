//! Clients that leave, and bodies that are broken: nothing of them may remain.

use futures_util::StreamExt;
use ops::Random;
use serde_json::json;

use super::support::{Options, chat, completion, start, with};

const REQUESTS: usize = 1000;
const AT_ONCE: usize = 32;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_aborted_and_malformed_requests_leave_nothing() {
    let seed = 7;
    println!("seed {seed}");
    let step = std::time::Duration::from_micros(300);
    let server = start(Options { step, max_waiting: 256, ..Options::default() }).await;
    let before = server.ok("/v1/chat/completions", &chat("the same as ever")).await;
    let server = &server;
    futures_util::stream::iter(0..REQUESTS)
        .for_each_concurrent(AT_ONCE, |i| async move {
            let mut random = Random::keyed(seed, i as u64);
            let text = "word ".repeat(1 + random.below(60));
            let stream = json!({"stream": random.below(2) == 0, "ignore_eos": true, "max_tokens": 200});
            let body = match random.below(2) {
                0 => with(chat(&text), stream),
                _ => with(completion(text.as_str()), stream),
            };
            let path = if body["messages"].is_null() { "/v1/completions" } else { "/v1/chat/completions" };
            let url = format!("{}{path}", server.url);
            let client = server.client.post(url).header("content-type", "application/json");
            if random.below(3) == 0 {
                let whole = body.to_string();
                let mut bytes = whole.into_bytes();
                match random.below(3) {
                    0 => bytes.truncate(random.below(bytes.len())),
                    1 => bytes.insert(0, b'x'),
                    _ => bytes = br#"{"model": "parrot", "prompt": [-1], "messages": 3}"#.to_vec(),
                }
                let status = client.body(bytes).send().await.unwrap().status().as_u16();
                assert!((400..500).contains(&status), "{status}");
                return;
            }
            let patience = std::time::Duration::from_micros(random.below(20_000) as u64);
            let request = async {
                if let Ok(response) = client.body(body.to_string()).send().await {
                    let mut chunks = response.bytes_stream();
                    while chunks.next().await.is_some() {}
                }
            };
            // Dropping the request closes its connection, before the answer or in the middle of it.
            let _ = tokio::time::timeout(patience, request).await;
        })
        .await;
    server.settle().await;
    assert_eq!(server.metric("sparseserve_requests_waiting").await, 0.0);
    let after = server.ok("/v1/chat/completions", &chat("the same as ever")).await;
    assert_eq!(after["choices"], before["choices"]);
    assert!(server.metric("sparseserve_requests_total{outcome=\"aborted\"}").await > 50.0, "clients left");
    assert_eq!(server.metric("sparseserve_requests_total{outcome=\"failed\"}").await, 0.0);
}
