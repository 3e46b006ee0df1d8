//! Chat templates from whoever made the model.

use std::time::{Duration, Instant};

use serde_json::{Map, json};
use sparseserve::text::{RenderInput, TemplateError};

use super::support::*;

fn input() -> RenderInput {
    let message = json!({"role": "user", "content": "hi"});
    RenderInput {
        messages: vec![message.as_object().unwrap().clone()],
        add_generation_prompt: true,
        variables: Map::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_template_eats_memory_or_time() {
    let double = |body: &str| {
        format!(
            "{{% set n = namespace(a='aaaaaaaa', b='aaaaaaaa') %}}{{% for i in range(64) %}}{body}{{% endfor %}}"
        )
    };
    let nest = double("{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}");
    let hostile = [
        double("{% set n.a = n.a ~ n.a %}"),
        double("{% set n.a = n.a + n.a %}"),
        double("{% set n.a = n.a|replace('a', n.a) %}"),
        double("{% set x %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = x %}"),
        "{% set n = namespace(l=[]) %}{% for i in range(99) %}{% set n.l = n.l + ['a' * 99999999 ~ i] %}{% endfor %}"
            .to_owned(),
        nest.clone() + "{{ n.a }}",
        nest.clone() + "{{ n.a|tojson }}",
        nest + "{{ n.a == n.b }}",
    ];
    let started = Instant::now();
    for source in hostile {
        let sandbox = sandbox(&source);
        let result = sandbox.render(&input()).await;
        assert!(result.is_err(), "{source} gave {} bytes", result.unwrap_or_default().len());
        assert!(started.elapsed() < Duration::from_secs(60), "{source}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_template_costs_its_request_only() {
    // A bomb for those who ask for one.
    let source = "{% set n = namespace(a='aaaaaaaa') %}\
        {% if messages[0].content == 'boom' %}{% for i in range(64) %}{% set n.a = n.a ~ n.a %}{% endfor %}{% endif %}\
        <|user|>{{ messages[0].content }}<|eos|>";
    let server = start(Options { template: Some(source.into()), ..Options::default() }).await;
    let path = "/v1/chat/completions";
    for _ in 0..3 {
        let error = server.refused(path, &chat("boom"), 400, Some("messages")).await;
        assert!(error["message"].as_str().unwrap().contains("exceeded its limit"), "{error}");
        assert_eq!(server.ok(path, &chat("fine")).await["choices"][0]["message"]["content"], "fine");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_a_template_come_back() {
    let sandbox = sandbox("{{ raise_exception('no ' ~ messages[0].role) }}");
    for _ in 0..2 {
        assert_eq!(sandbox.render(&input()).await, Err(TemplateError::Refused("no user".into())));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_messages_fit() {
    let sandbox = sandbox("{% for m in messages %}<|user|>{{ m.content|trim }}<|eos|>{% endfor %}");
    let mut large = input();
    let text = "word 🦀 ".repeat((30 << 20) / 10);
    large.messages[0].insert("content".into(), text.as_str().into());
    let prompt = sandbox.render(&large).await.unwrap();
    assert!(prompt.len() > 29 << 20 && prompt.contains(text.trim()));
}
