//! Whatever a body holds, the answer is one of the documented statuses and the server lives.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

use super::support::{Options, chat, completion, start, with};

const ALLOWED: [u16; 7] = [200, 400, 401, 404, 413, 422, 429];

const FIELDS: [&str; 34] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "seed",
    "logprobs",
    "top_logprobs",
    "stream_options",
    "ignore_eos",
    "min_tokens",
    "chat_template_kwargs",
    "user",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "add_special_tokens",
    "echo",
    "n",
    "tools",
    "response_format",
    "best_of",
    "suffix",
    "metadata",
    "no such field",
];

/// Any JSON, mostly small.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        (-3.0f64..3.0).prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        ".{0,12}".prop_map(Value::from),
        Just(json!("\u{0}\u{fffd}🦀<|eos|>")),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z0-9]{0,6}|role|content|type|text", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

#[test]
fn bodies_get_a_documented_status() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = runtime.block_on(start(Options::default()));
    // A fixed seed: the same cases every time.
    let config = Config { cases: 400, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let changes = prop::collection::vec((prop::sample::select(&FIELDS[..]), any_value()), 0..4);
    let result = runner.run(&(any::<bool>(), changes), |(is_chat, changes)| {
        let (path, body) = match is_chat {
            true => ("/v1/chat/completions", chat("hello")),
            false => ("/v1/completions", completion("hello")),
        };
        let changes = Value::Object(changes.into_iter().map(|(k, v)| (k.to_string(), v)).collect());
        let body = with(body, changes);
        let status = runtime.block_on(server.ask(path, &body)).0;
        prop_assert!(ALLOWED.contains(&status), "{body} got {status}");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    runtime.block_on(async {
        server.settle().await;
        server.ok("/v1/chat/completions", &chat("alive")).await;
        server.stop().await;
    });
}
