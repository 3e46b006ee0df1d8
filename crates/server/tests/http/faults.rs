//! Bad input and rude clients, in bulk.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ops::Random;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

use super::support::*;

const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

/// What a request that is wrong may be told.
const STATUSES: [u16; 7] = [200, 400, 401, 404, 413, 422, 429];

/// A valid body for each path, with most fields in use.
fn valid(path: &str) -> Value {
    let common = json!({
        "model": "parrot", "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"50": 2},
        "stop": ["zz", "\n"], "stop_token_ids": [5], "max_tokens": 6, "min_tokens": 1, "ignore_eos": false,
        "stream": false, "user": "u", "return_token_ids": true, "skip_special_tokens": true
    });
    match path {
        "/v1/chat/completions" => with(
            common,
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi 🦀"}]}],
                "logprobs": true, "top_logprobs": 2, "chat_template_kwargs": {"a": [1, {"b": null}]}}),
        ),
        "/v1/completions" => with(common, json!({"prompt": ["a", "b"], "logprobs": 1, "echo": true})),
        "/tokenize" => json!({"prompt": "a", "add_special_tokens": true, "return_token_strs": true}),
        _ => json!({"tokens": [1, 50, 60]}),
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0i64), Just(-1), Just(1), Just(i64::MAX), Just(i64::MIN), -1000i64..1000]
            .prop_map(Value::from),
        Just(json!(u64::MAX)),
        prop_oneof![Just(1e308), Just(-0.0), Just(1e-320), -2.0..2.0].prop_map(Value::from),
        prop_oneof![Just(String::new()), "\\PC{0,12}", Just("\u{0}\u{feff}".into()), Just("<|user|>".into())]
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map("[a-z]{0,6}|role|content|type|text", inner, 0..4)
                .prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// Puts `with` where `path` leads.
fn mutate(value: &mut Value, path: &[usize], with: &Value) {
    let Some((&step, rest)) = path.split_first() else {
        *value = with.clone();
        return;
    };
    let len = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    match value {
        Value::Array(items) if len > 0 => mutate(&mut items[step % len], rest, with),
        Value::Object(fields) if len > 0 => {
            fields.values_mut().nth(step % len).into_iter().for_each(|field| mutate(field, rest, with));
        }
        _ => *value = with.clone(),
    }
}

/// A request that is wrong in one or several places, or is not even JSON.
fn any_request() -> impl Strategy<Value = (&'static str, Vec<u8>)> {
    let mutations =
        proptest::collection::vec((proptest::collection::vec(0usize..64, 1..4), any_json()), 0..3);
    let extra = proptest::option::weighted(0.2, ("[a-z_]{1,10}", any_json()));
    let cut = proptest::option::weighted(0.1, 0.0..1.0);
    let path = proptest::sample::select(&PATHS[..]);
    (path, mutations, extra, cut, any::<bool>()).prop_map(|(path, mutations, extra, cut, stream)| {
        let mut body = valid(path);
        if stream && path.starts_with("/v1") {
            body["stream"] = json!(true);
        }
        for (at, value) in &mutations {
            mutate(&mut body, at, value);
        }
        if let (Some((name, value)), Some(fields)) = (extra, body.as_object_mut()) {
            fields.insert(name, value);
        }
        let mut bytes = body.to_string().into_bytes();
        if let Some(cut) = cut {
            bytes.truncate((bytes.len() as f64 * cut) as usize);
        }
        (path, bytes)
    })
}

#[test]
fn any_body_gets_an_answer() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(start(Options::default()));
    // A fixed seed: the same cases every time.
    let config = Config { cases: 1500, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&any_request(), |(path, body)| {
        let (status, text) = runtime.block_on(async {
            let request = server.client.post(format!("{}{path}", server.url)).body(body);
            let response = request.send().await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        });
        prop_assert!(STATUSES.contains(&status), "{} {}", status, text);
        if status != 200 {
            let error: Value = serde_json::from_str(&text).unwrap();
            prop_assert!(error["error"]["message"].is_string(), "{}", text);
        }
        Ok(())
    });
    result.unwrap();
    runtime.block_on(async {
        server.settle().await;
        server.ok("/v1/chat/completions", &chat("alive")).await;
        server.stop().await;
    });
}

/// A message that is continued is the end of its prompt, whatever it says, the template's own words included.
#[test]
fn any_message_can_be_continued() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(start(Options::default()));
    let config = Config { cases: 300, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let words = proptest::sample::select(
        &["os", "<|eos|>", "|>", "e", " ", "\n", "<|assistant|> ", "end-", "🦀"][..],
    );
    let content =
        prop_oneof![proptest::collection::vec(words, 1..5).prop_map(|words| words.concat()), "\\PC{1,12}",];
    let result = runner.run(&content, |content| {
        prop_assume!(!content.trim().is_empty());
        let messages = json!([{"role": "user", "content": "u"}, {"role": "assistant", "content": content}]);
        let text = runtime.block_on(async {
            let body = json!({"messages": messages, "continue_final_message": true});
            let tokens = server.ok("/tokenize", &body).await["tokens"].clone();
            server.ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].clone()
        });
        let expected = format!("<|bos|><|user|>u<|eos|><|assistant|> {}", content.trim());
        prop_assert_eq!(text.as_str(), Some(expected.as_str()));
        Ok(())
    });
    result.unwrap();
    runtime.block_on(server.stop());
}

/// What a rude client does with its request.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Sends something malformed.
    Malformed,
    /// Leaves before the answer begins.
    LeavesAtOnce,
    /// Leaves in the middle of a stream.
    LeavesLater(u64),
    /// Sends half a body.
    HalfBody,
    /// Stays to the end.
    Stays,
}

async fn behave(server: &Server, manner: Manner, seed: u64) {
    let mut random = Random::new(seed);
    let mut text =
        |words: usize| (0..words).map(|_| ["key ", "of ", "🦀 ", "x"][random.below(4)]).collect::<String>();
    let body = with(
        chat(&text(60)),
        json!({"stream": true, "ignore_eos": true, "max_tokens": 40, "seed": seed, "temperature": 1.0}),
    );
    let url = format!("{}/v1/chat/completions", server.url);
    let request = server.client.post(&url);
    match manner {
        Manner::Malformed => {
            let bytes = body.to_string().into_bytes();
            let cut = bytes.len() / 2;
            let response = request.body(bytes[..cut].to_vec()).send().await.unwrap();
            assert_eq!(response.status(), 400);
        }
        Manner::LeavesAtOnce => {
            let impatience = Duration::from_micros(200 + seed % 4000);
            let _ = tokio::time::timeout(impatience, request.json(&body).send()).await;
        }
        Manner::LeavesLater(chunks) => {
            let response = request.json(&body).send().await.unwrap();
            if response.status() == 200 {
                let mut stream = response.bytes_stream();
                for _ in 0..chunks {
                    stream.next().await;
                }
            }
        }
        Manner::HalfBody => {
            let bytes = body.to_string().into_bytes();
            let half = bytes[..bytes.len() / 2].to_vec();
            let parts = futures_util::stream::iter([Ok(half), Err(std::io::Error::other("gone"))]);
            assert!(request.body(reqwest::Body::wrap_stream(parts)).send().await.is_err());
        }
        Manner::Stays => {
            let response = request.json(&body).send().await.unwrap();
            assert!([200, 429].contains(&response.status().as_u16()));
            assert!(response.text().await.is_ok());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_rude_clients_leave_no_block_behind() {
    let seed = 20;
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let options = Options { step: Duration::from_micros(100), max_waiting: 16, ..Options::default() };
    let server = start(options).await;
    let before = server.ok("/v1/chat/completions", &chat("the same as ever")).await;
    let mut clients = FuturesUnordered::new();
    for i in 0..1000 {
        let manner = match random.below(8) {
            0 => Manner::Malformed,
            1 | 2 => Manner::LeavesAtOnce,
            3..=5 => Manner::LeavesLater(random.below(12) as u64),
            6 => Manner::HalfBody,
            _ => Manner::Stays,
        };
        clients.push(behave(&server, manner, i));
        if clients.len() == 24 {
            clients.next().await;
        }
    }
    while clients.next().await.is_some() {}
    drop(clients);
    server.settle().await;
    assert_eq!(server.app.lifecycle.in_flight(), 0);
    assert_eq!(server.metric("sparseserve_requests_total{outcome=\"failed\"}").await, 0.0);
    assert!(server.metric("sparseserve_requests_total{outcome=\"aborted\"}").await > 100.0);
    let after = server.ok("/v1/chat/completions", &chat("the same as ever")).await;
    assert_eq!(after["choices"], before["choices"]);
    server.stop().await;
}
