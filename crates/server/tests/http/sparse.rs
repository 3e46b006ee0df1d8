//! `sparse` in request bodies, and receipts.

use serde_json::{Value, json};

use crate::support::{Options, start};

/// A prompt of some tokens, which the parrot repeats.
fn asked(sparse: Value) -> Value {
    let prompt = vec![100; 90];
    json!({"prompt": prompt, "max_tokens": 40, "ignore_eos": true, "temperature": 0, "sparse": sparse})
}

fn offering(policies: &[&'static str]) -> Options {
    Options { policies: policies.to_vec(), ..Options::default() }
}

#[tokio::test]
async fn receipts_tell_what_was_attended() {
    let server = start(offering(&["quest", "streaming", "dense"])).await;
    let answer = server.ok("/v1/completions", &asked(json!({"receipt": true}))).await;
    // Of 40 tokens the first comes from the prompt and the last is not run; contexts are 91 to 129 tokens.
    let receipt = &answer["usage"]["sparse"];
    assert_eq!((&receipt["policy"], &receipt["budget"]), (&json!("quest"), &json!(64)), "{answer}");
    assert_eq!((&receipt["steps"], &receipt["raised_steps"]), (&json!(39), &json!(0)), "{answer}");
    assert_eq!(receipt["context_tokens_per_step"], json!(110.0), "{answer}");
    let attended = receipt["attended_tokens_per_step"].as_f64().unwrap();
    assert!(attended > 48.0 && attended <= 64.0, "{answer}");

    let streaming = asked(json!({"policy": "streaming", "budget": "50%", "receipt": true}));
    let answer = server.ok("/v1/completions", &streaming).await;
    let receipt = &answer["usage"]["sparse"];
    assert_eq!(
        (&receipt["budget"], &receipt["attended_tokens_per_step"]),
        (&json!(45), &json!(45.0)),
        "{answer}"
    );

    let tiny = asked(json!({"budget": 1, "receipt": true}));
    let answer = server.ok("/v1/completions", &tiny).await;
    assert_eq!(answer["usage"]["sparse"]["raised_steps"], json!(39), "{answer}");

    for dense in [json!({"policy": "dense", "receipt": true}), json!({"dense": true, "receipt": true})] {
        let answer = server.ok("/v1/completions", &asked(dense)).await;
        let receipt = &answer["usage"]["sparse"];
        assert_eq!((&receipt["policy"], &receipt["steps"]), (&json!("dense"), &json!(0)), "{answer}");
    }
    let answer = server.ok("/v1/completions", &asked(json!({}))).await;
    assert!(answer["usage"].get("sparse").is_none(), "{answer}");
}

#[tokio::test]
async fn receipts_tell_what_was_estimated_apart() {
    let server = start(offering(&["quest", "retroinfer"])).await;
    let ask = |sparse: Value| {
        let mut asked = asked(sparse);
        asked["prompt"] = json!(vec![100; 330]);
        asked["max_tokens"] = json!(20);
        asked
    };
    let estimating = ask(json!({"policy": "retroinfer", "budget": 200, "receipt": true}));
    let answer = server.ok("/v1/completions", &estimating).await;
    // One span of 256 tokens and 16 clusters, of which 23.2 % are 3.
    let receipt = &answer["usage"]["sparse"];
    assert_eq!(receipt["estimated_clusters_per_step"], json!(3.0), "{answer}");
    assert_eq!(receipt["attended_tokens_per_step"], json!(200.0), "{answer}");
    for sparse in [
        json!({"policy": "retroinfer", "budget": 200, "options": {"estimate": "0%"}, "receipt": true}),
        json!({"policy": "quest", "budget": 200, "receipt": true}),
    ] {
        let answer = server.ok("/v1/completions", &ask(sparse)).await;
        let receipt = answer["usage"]["sparse"].as_object().unwrap();
        assert!(receipt["steps"] == 19 && !receipt.contains_key("estimated_clusters_per_step"), "{answer}");
    }
}

#[tokio::test]
async fn streams_and_chats_carry_receipts() {
    let server = start(offering(&["dense", "quest"])).await;
    let sparse = json!({"policy": "quest", "options": {"group": "max", "dense-layers": 1}, "receipt": true});
    // Who asks for a receipt gets the counts that it comes with.
    for options in [json!({"include_usage": true}), Value::Null] {
        let mut streamed = asked(sparse.clone());
        streamed["stream_options"] = options;
        let chunks = server.stream("/v1/completions", &streamed).await;
        assert_eq!(chunks[chunks.len() - 1]["usage"]["sparse"]["steps"], json!(39), "{streamed}");
    }
    let chat = json!({
        "messages": [{"role": "user", "content": "The key of Barin is 271828."}], "max_tokens": 3,
        "ignore_eos": true, "temperature": 0, "sparse": sparse,
    });
    let answer = server.ok("/v1/chat/completions", &chat).await;
    assert_eq!(answer["usage"]["sparse"]["policy"], json!("quest"), "{answer}");
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let server = start(offering(&["quest", "seerattention"])).await;
    let gate = |file: &str| json!({"policy": "seerattention", "options": {"gate": file}});
    for (sparse, status, param, part) in [
        (json!({"policy": "qest"}), 400, "sparse", "there is no policy"),
        (json!({"policy": "arkvale"}), 400, "sparse", "it offers quest"),
        (json!({"options": {"top": 3}}), 400, "sparse", "no option \"top\""),
        (json!({"options": {"group": "sum"}}), 400, "sparse", "mean or max or query-mean"),
        (json!({"options": {"partition": 32}}), 400, "sparse", "fixed when the server starts"),
        (gate("/etc/passwd"), 400, "sparse", "the option gate is fixed when the server starts"),
        (
            json!({"policy": "seerattention", "options": {"threshold": 2}}),
            400,
            "sparse",
            "a number from 0 to 1",
        ),
        (json!({"options": {"group": ["max"]}}), 422, "sparse.options", "must be a string"),
        (json!({"budget": -1}), 400, "sparse.budget", "the budget is"),
        (json!({"budget": "half"}), 400, "sparse.budget", "the budget is"),
        (json!({"policy": 3}), 422, "sparse.policy", "wrong type"),
        (json!({"dense": true, "policy": "qest"}), 400, "sparse", "there is no policy"),
        (json!({"dense": true, "policy": "arkvale"}), 400, "sparse", "it offers quest"),
        (json!({"dense": true, "options": {"top": 3}}), 400, "sparse", "no option \"top\""),
        (json!({"dense": true, "options": {"group": "sum"}}), 400, "sparse", "mean or max or query-mean"),
        (json!({"polic": "quest"}), 400, "sparse.polic", "polic"),
        (json!("quest"), 422, "sparse", "wrong type"),
    ] {
        let error = server.refused("/v1/completions", &asked(sparse), status, Some(param)).await;
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
}
