//! Chat templates from whoever made the model.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, json};
use sparseserve::text::{RENDER_VERB, RenderInput, TemplateError};

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

/// Takes for ever without taking memory, if the message says so.
const BURNER: &str = "{% if messages[0].content == 'burn' %}\
    {% set n = namespace(a='a', b='a') %}\
    {% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}\
    {% endif %}done";

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_too_long_is_not_asked_again() {
    let sandbox = sandbox(BURNER).with_time(Duration::from_secs(1));
    let mut burning = input();
    burning.messages[0].insert("content".into(), "burn".into());
    assert_eq!(sandbox.render(&input()).await, Ok("done".into()));
    assert_eq!(sandbox.render(&burning).await, Err(TemplateError::Limit("1s".into())));
    assert_eq!(sandbox.num_started(), 1, "the child that was there already has had its time");
    assert_eq!(sandbox.render(&input()).await, Ok("done".into()));
    assert_eq!(sandbox.num_started(), 2);
}

/// As after a `kill -9` of the server: nobody takes its time, and its input stays open.
#[test]
fn a_child_that_nobody_kills_ends_by_itself() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sparseserve"))
        .arg(RENDER_VERB)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let setup = json!({"source": BURNER, "bos_token": "", "eos_token": "", "cpu_seconds": 1});
    let mut burning = serde_json::to_value(input()).unwrap();
    burning["messages"][0]["content"] = "burn".into();
    let lines = format!("{setup}\n{}\n{burning}\n", serde_json::to_value(input()).unwrap());
    stdin.write_all(lines.as_bytes()).unwrap();
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if started.elapsed() > Duration::from_secs(60) => {
                child.kill().unwrap();
                panic!("it burns for ever");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    assert!(!status.success() && status.code().is_none(), "a signal ends it: {status}");
    let mut answered = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut answered).unwrap();
    assert_eq!(answered, "{\"Ok\":\"done\"}\n", "the first prompt was rendered");
}
