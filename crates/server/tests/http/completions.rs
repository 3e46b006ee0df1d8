use serde_json::{Value, json};

use super::support::*;

const PATH: &str = "/v1/completions";

fn text(answer: &Value, index: usize) -> &str {
    answer["choices"][index]["text"].as_str().unwrap()
}

#[tokio::test]
async fn every_form_of_prompt() {
    let server = start(Options::default()).await;
    let answer = server.ok(PATH, &completion("one two")).await;
    assert_eq!((text(&answer, 0), &answer["object"]), ("one two", &json!("text_completion")));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let tokens = server.ok("/tokenize", &json!({"prompt": "one two"})).await["tokens"].clone();
    assert_eq!(text(&server.ok(PATH, &completion(tokens.clone())).await, 0), "one two");
    let both = server.ok(PATH, &completion(json!([tokens, [1, 100, 101]]))).await;
    assert_eq!(text(&both, 0), "one two");
    assert_eq!(both["choices"][1]["index"], 1);
    let many = server.ok(PATH, &completion(json!(["a", "b b", "c c c"]))).await;
    assert_eq!([text(&many, 0), text(&many, 1), text(&many, 2)], ["a", "b b", "c c c"]);
    let single: u64 = many["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(single > 6, "counts are of all prompts");
    let default = server.ok(PATH, &json!({"prompt": "word ".repeat(30), "temperature": 0})).await;
    assert_eq!(default["usage"]["completion_tokens"], 16);
    server.stop().await;
}

#[tokio::test]
async fn streams_of_several_prompts() {
    let server = start(Options::default()).await;
    let body = with(
        completion(json!(["one 🦀 two", "three four"])),
        json!({"stream_options": {"include_usage": true}, "echo": true}),
    );
    let chunks = server.stream(PATH, &body).await;
    let of = |index: usize| -> String {
        let choices = chunks.iter().filter_map(|c| c["choices"].get(0)).filter(|c| c["index"] == index);
        choices.filter_map(|c| c["text"].as_str()).collect()
    };
    assert_eq!(of(0), "one 🦀 twoone 🦀 two");
    assert_eq!(of(1), "three fourthree four");
    let usage = &chunks.last().unwrap()["usage"];
    let whole = server.ok(PATH, &with(body, json!({"stream_options": null}))).await;
    assert_eq!(usage["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    assert_eq!(usage["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(of(0), text(&whole, 0));
    server.stop().await;
}

#[tokio::test]
async fn echo_with_log_probabilities_as_evaluation_harnesses_use_it() {
    let server = start(Options::default()).await;
    let prompt = "The key é";
    for max_tokens in [0, 1] {
        let fields = json!({"echo": true, "logprobs": 2, "max_tokens": max_tokens, "return_token_ids": true});
        let answer = server.ok(PATH, &with(completion(prompt), fields)).await;
        let lists = &answer["choices"][0]["logprobs"];
        let ids = answer["choices"][0]["prompt_token_ids"].as_array().unwrap();
        let tokens = lists["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), ids.len() + max_tokens);
        for list in ["token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(lists[list].as_array().unwrap().len(), tokens.len(), "{list}");
        }
        assert_eq!((&lists["token_logprobs"][0], &lists["top_logprobs"][0]), (&Value::Null, &Value::Null));
        assert!(lists["token_logprobs"][1].as_f64().unwrap() < 0.0);
        let top = lists["top_logprobs"][1].as_object().unwrap();
        assert!((2..=3).contains(&top.len()) && top.contains_key(tokens[1].as_str().unwrap()), "{top:?}");
        assert!(text(&answer, 0).starts_with(prompt));
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
        if max_tokens == 0 {
            assert_eq!(text(&answer, 0), prompt);
            assert_eq!(answer["choices"][0]["finish_reason"], "length");
        } else {
            let offset = lists["text_offset"].as_array().unwrap().last().unwrap().as_u64().unwrap();
            assert_eq!(offset, prompt.chars().count() as u64);
        }
    }
    let plain = server.ok(PATH, &with(completion(prompt), json!({"echo": true, "max_tokens": 0}))).await;
    assert_eq!(text(&plain, 0), prompt);
    assert_eq!(plain["usage"]["completion_tokens"], 0);
    let empty = with(completion("a"), json!({"logprobs": 0}));
    let answer = server.ok(PATH, &empty).await;
    assert_eq!(answer["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = start(Options::default()).await;
    let long = "word ".repeat(3000);
    for (fields, status, param) in [
        (json!({"prompt": null}), 400, "prompt"),
        (json!({"prompt": []}), 400, "prompt"),
        (json!({"prompt": [[]]}), 400, "prompt"),
        (json!({"prompt": [1, 856]}), 400, "prompt"),
        (json!({"prompt": long}), 400, "prompt"),
        (json!({"prompt": vec!["a"; 129]}), 400, "prompt"),
        (json!({"prompt": "", "add_special_tokens": false}), 400, "prompt"),
        (json!({"prompt": 7}), 422, "prompt"),
        (json!({"prompt": [1, -1]}), 422, "prompt"),
        (json!({"prompt": ["a", 1]}), 422, "prompt"),
        (json!({"max_tokens": 0}), 400, "max_tokens"),
        (json!({"logprobs": 21}), 400, "logprobs"),
        (json!({"logprobs": true}), 422, "logprobs"),
        (json!({"best_of": 2}), 400, "best_of"),
        (json!({"suffix": "x"}), 400, "suffix"),
        (json!({"model": "other"}), 404, "model"),
        (json!({"messages": []}), 400, "messages"),
    ] {
        server.refused(PATH, &with(completion("a"), fields), status, Some(param)).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn models_tokens_and_the_rest() {
    let server = start(Options::default()).await;
    let json_of = async |path: &str| server.get(path).await.json::<Value>().await.unwrap();
    let models = json_of("/v1/models").await;
    assert_eq!(models["data"][1]["id"], "org/parrot");
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    assert_eq!(json_of("/v1/models/org/parrot").await["id"], "org/parrot");
    assert_eq!(server.get("/v1/models/none").await.status(), 404);
    for path in ["/", "/health", "/ready", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status(), 200, "{path}");
    }
    assert!(json_of("/version").await["version"].is_string());

    let tokens = server.ok("/tokenize", &json!({"prompt": "a 🦀", "return_token_strs": true})).await;
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["tokens"][0], 1);
    assert_eq!(tokens["token_strs"][0], "<|bos|>");
    assert_eq!(tokens["max_model_len"], 2048);
    let bare = server.ok("/tokenize", &json!({"prompt": "a 🦀", "add_special_tokens": false})).await;
    let text = server.ok("/detokenize", &json!({"tokens": bare["tokens"]})).await;
    assert_eq!(text["prompt"], "a 🦀");
    server.refused("/detokenize", &json!({"tokens": [856]}), 400, Some("tokens")).await;
    server.refused("/tokenize", &json!({}), 400, Some("messages")).await;
    let large = "word ".repeat(10_000);
    assert!(server.ok("/tokenize", &json!({"prompt": large})).await["count"].as_u64().unwrap() >= 10_000);

    let missing = server.get("/nothing").await;
    assert_eq!(missing.status(), 404);
    assert!(missing.json::<Value>().await.unwrap()["error"]["message"].is_string());
    assert_eq!(server.get(PATH).await.status(), 405);
    server.stop().await;
}
