use serde_json::{Value, json};

use super::support::*;

const CHAT: &str = "/v1/chat/completions";

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let server = start(Options::default()).await;
    let answer = server.ok(CHAT, &chat("Hello wörld 🦀!")).await;
    assert_eq!(content(&answer), "Hello wörld 🦀!");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("parrot")));
    let choice = &answer["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("stop"), &json!(0)));
    assert_eq!(choice["message"]["role"], "assistant");
    let usage = &answer["usage"];
    let total = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], total);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    server.stop().await;
}

#[tokio::test]
async fn a_second_turn_finds_its_prefix_in_the_cache() {
    let server = start(Options::default()).await;
    let long = "word ".repeat(40);
    server.ok(CHAT, &chat(&long)).await;
    for body in [chat(&long), with(chat(&long), json!({"stop": "wo"}))] {
        let answer = server.ok(CHAT, &body).await;
        assert!(
            answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 16,
            "{answer}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn a_stream_has_role_text_reason_and_usage_in_this_order() {
    let server = start(Options::default()).await;
    let body = with(chat("Hé 🦀🦀"), json!({"stream_options": {"include_usage": true}}));
    let chunks = server.stream(CHAT, &body).await;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let texts: Vec<&str> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(texts.concat(), "Hé 🦀🦀");
    assert!(texts.iter().all(|t| !t.contains('\u{fffd}')));
    assert!(texts.len() > 3, "it is streamed");
    let [.., end, usage] = &chunks[..] else { panic!("too few chunks") };
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert_eq!(end["choices"][0]["delta"], json!({}));
    assert_eq!(end["usage"], Value::Null);
    assert_eq!(usage["choices"], json!([]));
    assert!(usage["usage"]["completion_tokens"].as_u64().unwrap() > 8);
    let id = &chunks[0]["id"];
    assert!(chunks.iter().all(|c| c["id"] == *id && c["object"] == "chat.completion.chunk"));
    let plain = server.stream(CHAT, &chat("a")).await;
    assert!(plain.iter().all(|c| c.get("usage").is_none()));
    server.stop().await;
}

#[tokio::test]
async fn stop_strings_end_the_answer_and_are_not_shown() {
    let server = start(Options::default()).await;
    let body = with(chat("one two END three"), json!({"stop": ["zzz", " END"]}));
    let answer = server.ok(CHAT, &body).await;
    assert_eq!(content(&answer), "one two");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], " END");
    let chunks = server.stream(CHAT, &body).await;
    let text = streamed_text(&chunks);
    assert_eq!(text, "one two");
    let shown = with(body.clone(), json!({"include_stop_str_in_output": true}));
    assert_eq!(content(&server.ok(CHAT, &shown).await), "one two END");
    let later = with(body, json!({"min_tokens": 30, "max_tokens": 40, "ignore_eos": true}));
    assert!(content(&server.ok(CHAT, &later).await).starts_with("one two END three"));
    server.settle().await;
    server.stop().await;
}

#[tokio::test]
async fn a_stop_string_in_the_last_text_counts() {
    let server = start(Options::default()).await;
    // Half a character becomes text only when it is clear that the rest does not come.
    let body = with(chat("a🦀"), json!({"max_tokens": 3, "stop": "\u{fffd}"}));
    let choice = server.ok(CHAT, &body).await["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("a"), &json!("stop")));
    assert_eq!(choice["stop_reason"], "\u{fffd}");
    server.stop().await;
}

#[tokio::test]
async fn lengths_and_end_tokens() {
    let server = start(Options::default()).await;
    for name in ["max_tokens", "max_completion_tokens"] {
        let answer = server.ok(CHAT, &with(chat("one two three"), json!({name: 3}))).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        assert_eq!(answer["usage"]["completion_tokens"], 3);
    }
    let answer = server.ok(CHAT, &with(chat("hi"), json!({"ignore_eos": true, "max_tokens": 20}))).await;
    assert_eq!(answer["usage"]["completion_tokens"], 20);
    assert_eq!(content(&answer), "hi", "end tokens are special, so they have no text");
    let answer = server.ok(CHAT, &with(chat("hi"), json!({"min_tokens": 9, "max_tokens": 20}))).await;
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() >= 9);
    let end = server.ok("/tokenize", &json!({"prompt": "2", "add_special_tokens": false})).await["tokens"][0]
        .clone();
    let answer = server.ok(CHAT, &with(chat("1 2 3"), json!({"stop_token_ids": [end]}))).await;
    assert_eq!((content(&answer), &answer["choices"][0]["stop_reason"]), ("1 ", &end));
    server.stop().await;
}

#[tokio::test]
async fn sampling_parameters_reach_the_sampler() {
    let server = start(Options::default()).await;
    let token = |answer: &Value| answer["choices"][0]["token_ids"][0].as_u64().unwrap();
    let ask = async |fields: Value| {
        let body = with(chat("x"), json!({"max_tokens": 1, "return_token_ids": true}));
        token(&server.ok(CHAT, &with(body, fields)).await)
    };
    let greedy = ask(json!({})).await;
    assert_eq!(ask(json!({"logit_bias": {"77": 100}})).await, 77);
    assert_ne!(ask(json!({"logit_bias": {greedy.to_string(): -100}})).await, greedy);
    assert_eq!(ask(json!({"temperature": 2.0, "top_k": 1})).await, greedy);
    assert_eq!(ask(json!({"temperature": 2.0, "top_p": 0.0})).await, greedy);
    assert_eq!(ask(json!({"temperature": 2.0, "min_p": 1.0})).await, greedy);
    assert_ne!(ask(json!({"repetition_penalty": 100.0})).await, greedy, "the prompt's token is penalised");
    let hot = |seed: i64| json!({"temperature": 2.0, "top_k": -1, "seed": seed, "max_tokens": 1});
    let mut drawn = Vec::new();
    for seed in -4..12 {
        drawn.push(ask(hot(seed)).await);
        assert_eq!(ask(hot(seed)).await, drawn[drawn.len() - 1], "seed {seed}");
    }
    drawn.sort_unstable();
    drawn.dedup();
    assert!(drawn.len() > 4, "seeds differ: {drawn:?}");

    let repeat = async |fields: Value| {
        let body = with(chat("aaaaaaaa"), json!({"max_tokens": 4, "return_token_ids": true}));
        server.ok(CHAT, &with(body, fields)).await["choices"][0]["token_ids"].clone()
    };
    let plain = repeat(json!({})).await;
    let biased = json!({"logit_bias": {"300": 8.5, "301": 8.4}});
    assert_eq!(repeat(biased.clone()).await[1], 300);
    for penalty in ["frequency_penalty", "presence_penalty"] {
        let penalised = repeat(with(biased.clone(), json!({penalty: 1.5}))).await;
        assert_eq!(penalised[0], 300, "{plain} {penalised}");
        assert_ne!(penalised[1], 300, "{plain} {penalised}");
    }
    server.stop().await;
}

#[tokio::test]
async fn log_probabilities() {
    let server = start(Options::default()).await;
    let body = with(chat("é a"), json!({"logprobs": true, "top_logprobs": 2}));
    let answer = server.ok(CHAT, &body).await;
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens[0]["token"], "bytes:\\xc3");
    assert_eq!(tokens[0]["bytes"], json!([0xc3]));
    assert_eq!(tokens[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(tokens[0]["top_logprobs"][0]["token"], tokens[0]["token"], "greedy takes the likeliest");
    assert!(tokens[0]["logprob"].as_f64().unwrap() < 0.0);
    assert_eq!(tokens.len() as u64, answer["usage"]["completion_tokens"]);
    let streamed: Vec<Value> = server
        .stream(CHAT, &body)
        .await
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(&streamed, tokens);
    let ids = with(body, json!({"return_tokens_as_token_ids": true, "top_logprobs": 0}));
    let answer = server.ok(CHAT, &ids).await;
    let first = &answer["choices"][0]["logprobs"]["content"][0];
    assert!(first["token"].as_str().unwrap().starts_with("token_id:"));
    assert_eq!(first["top_logprobs"], json!([]));
    assert_eq!(server.ok(CHAT, &chat("a")).await["choices"][0]["logprobs"], Value::Null);
    server.stop().await;
}

#[tokio::test]
async fn token_ids_are_returned() {
    let server = start(Options::default()).await;
    let body = with(chat("hi 🦀"), json!({"return_token_ids": true}));
    let answer = server.ok(CHAT, &body).await;
    let tokenized = server.ok("/tokenize", &json!({"messages": body["messages"]})).await;
    assert_eq!(answer["prompt_token_ids"], tokenized["tokens"]);
    let ids = &answer["choices"][0]["token_ids"];
    assert_eq!(ids.as_array().unwrap().last(), Some(&json!(EOS)));
    let chunks = server.stream(CHAT, &body).await;
    assert_eq!(chunks[0]["prompt_token_ids"], tokenized["tokens"]);
    let streamed: Vec<Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["token_ids"].as_array().cloned()).flatten().collect();
    assert_eq!(&Value::from(streamed), ids);
    server.stop().await;
}

#[tokio::test]
async fn messages_in_all_their_forms() {
    let server = start(Options::default()).await;
    let ask = async |messages: Value| {
        let answer = server.ok(CHAT, &json!({"messages": messages, "temperature": 0})).await;
        content(&answer).to_owned()
    };
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(ask(json!([{"role": "user", "content": parts}])).await, "a\nb");
    let developer =
        json!([{"role": "developer", "content": "d"}, {"role": "user", "content": "u", "name": "n"}]);
    assert_eq!(ask(developer).await, "u");
    let echoed =
        json!({"role": "assistant", "content": "a", "refusal": null, "tool_calls": [], "annotations": []});
    assert_eq!(
        ask(json!([{"role": "user", "content": "u"}, echoed, {"role": "user", "content": "v"}])).await,
        "v"
    );

    let continued = json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Sure"}],
        "continue_final_message": true});
    let tokens = server.ok("/tokenize", &continued).await["tokens"].clone();
    let text = server.ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].clone();
    assert_eq!(text, "<|bos|><|user|>u<|eos|><|assistant|> Sure");
    let open = json!({"messages": [{"role": "user", "content": "u"}], "add_generation_prompt": false});
    let tokens = server.ok("/tokenize", &open).await["tokens"].clone();
    let text = server.ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].clone();
    assert_eq!(text, "<|bos|><|user|>u<|eos|>");
    server.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = start(Options::default()).await;
    let refuse = async |fields: Value, status: u16, param: &str| {
        server.refused(CHAT, &with(chat("hi"), fields), status, Some(param)).await
    };
    assert_eq!(refuse(json!({"model": "gpt"}), 404, "model").await["code"], "model_not_found");
    for (fields, param) in [
        (json!({"n": 2}), "n"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"no_such_parameter": 1}), "no_such_parameter"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": -1}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {"856": 1}}), "logit_bias"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stop": "x".repeat(1025)}), "stop"),
        (json!({"stop_token_ids": [856]}), "stop_token_ids"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "max_completion_tokens"),
        (json!({"max_tokens": 5, "min_tokens": 6}), "min_tokens"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": [{"content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "x", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": "a", "x": 1}]}), "messages[0].x"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content"),
        (json!({"chat_template": "x"}), "chat_template"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"tools": []}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"documents": []}}), "chat_template_kwargs"),
        (
            json!({"messages": [{"role": "assistant", "content": " \n"}], "continue_final_message": true}),
            "continue_final_message",
        ),
        (
            json!({"messages": [{"role": "assistant"}], "continue_final_message": true}),
            "continue_final_message",
        ),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "continue_final_message"),
    ] {
        refuse(fields, 400, param).await;
    }
    for (fields, param) in [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [{"role": 7, "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 7}]}), "messages[0].content"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"stop": 7}), "stop"),
        (json!({"seed": 0.5}), "seed"),
        (json!({"user": "u", "model": 7}), "model"),
    ] {
        refuse(fields, 422, param).await;
    }
    let error = refuse(json!({"max_tokens": 4000}), 400, "messages").await;
    assert_eq!(error["code"], "context_length_exceeded");
    let harmless =
        json!({"user": "u", "metadata": {}, "n": 1, "store": false, "service_tier": "auto", "tools": []});
    server.ok(CHAT, &with(chat("hi"), harmless)).await;
    server.stop().await;
}

#[tokio::test]
async fn without_a_template_there_is_no_chat() {
    let server = start(Options { template: None, ..Options::default() }).await;
    server.refused(CHAT, &chat("hi"), 400, Some("messages")).await;
    server.ok("/v1/completions", &completion("hi")).await;
    server.stop().await;
}
