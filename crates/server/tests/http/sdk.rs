//! The official Rust and Python clients.

use std::io::Write;
use std::process::Command;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
    FinishReason, StopConfiguration,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use futures_util::StreamExt;

use super::support::*;

fn client(server: &Server) -> Client<OpenAIConfig> {
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("key");
    Client::with_config(config).with_http_client(server.client.clone())
}

fn request(text: &str) -> CreateChatCompletionRequest {
    let message = ChatCompletionRequestUserMessageArgs::default().content(text).build().unwrap();
    CreateChatCompletionRequestArgs::default()
        .model("parrot")
        .messages([message.into()])
        .temperature(0.0)
        .build()
        .unwrap()
}

#[tokio::test]
async fn the_rust_client() {
    let server = start(Options { api_keys: vec!["key".into()], ..Options::default() }).await;
    let client = client(&server);

    let mut plain = request("Hello 🦀 world");
    plain.logprobs = Some(true);
    plain.top_logprobs = Some(2);
    plain.stop = Some(StopConfiguration::String(" world".into()));
    let answer = client.chat().create(plain).await.unwrap();
    let choice = &answer.choices[0];
    assert_eq!(choice.message.content.as_deref(), Some("Hello 🦀"));
    assert_eq!(choice.finish_reason, Some(FinishReason::Stop));
    let tokens = choice.logprobs.as_ref().unwrap().content.as_ref().unwrap();
    assert!(tokens.iter().all(|token| token.top_logprobs.len() == 2));
    assert!(answer.usage.unwrap().prompt_tokens > 0);

    let mut stream = client.chat().create_stream(request("one two 🦀 three")).await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = stream.next().await {
        for choice in chunk.unwrap().choices {
            text += choice.delta.content.as_deref().unwrap_or_default();
        }
    }
    assert_eq!(text, "one two 🦀 three");

    let completion = CreateCompletionRequestArgs::default()
        .model("org/parrot")
        .prompt(["a b", "c d"])
        .temperature(0.0)
        .logprobs(2)
        .echo(true)
        .build()
        .unwrap();
    let answer = client.completions().create(completion).await.unwrap();
    assert_eq!(answer.choices[1].text, "c dc d");
    let lists = answer.choices[0].logprobs.as_ref().unwrap();
    assert_eq!(lists.tokens.len(), lists.text_offset.len());

    let models = client.models().list().await.unwrap();
    assert_eq!(models.data.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["parrot", "org/parrot"]);
    assert_eq!(client.models().retrieve("parrot").await.unwrap().owned_by, "sparseserve");

    let mut two = request("hi");
    two.n = Some(2);
    match client.chat().create(two).await {
        Err(OpenAIError::ApiError(error)) => assert!(format!("{error:?}").contains("`n`"), "{error:?}"),
        other => panic!("{other:?}"),
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client() {
    let has_sdk = Command::new("python3").args(["-c", "import openai"]).output();
    if !has_sdk.is_ok_and(|output| output.status.success()) {
        // Not by a macro, whose output the test harness hides.
        let _ = std::io::stderr()
            .write_all(b"SKIPPED: the_python_client needs python3 with the package openai\n");
        return;
    }
    let server = start(Options { api_keys: vec!["key".into()], ..Options::default() }).await;
    let script = format!("{}/tests/http/openai_sdk.py", env!("CARGO_MANIFEST_DIR"));
    let url = format!("{}/v1", server.url);
    let run = move || Command::new("python3").args([&script, &url, "key"]).output();
    let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.ends_with("ok\n"), "{out}");
    server.stop().await;
}
