//! The clients that people use.

use std::process::Command;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use futures_util::StreamExt;

use super::support::{Options, Server, start};

const KEY: &str = "a-key";

async fn server() -> (Server, Client<OpenAIConfig>) {
    let server = start(Options { api_keys: vec![KEY.into()], ..Options::default() }).await;
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key(KEY);
    (server, Client::with_config(config))
}

fn question(text: &str) -> CreateChatCompletionRequest {
    let message = ChatCompletionRequestUserMessageArgs::default().content(text).build().unwrap();
    CreateChatCompletionRequestArgs::default()
        .model("parrot")
        .messages([message.into()])
        .temperature(0.0)
        .logprobs(true)
        .top_logprobs(2)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn async_openai_chats() {
    let (server, client) = server().await;
    assert_eq!(client.models().list().await.unwrap().data[0].id, "parrot");

    let answer = client.chat().create(question("polly wants")).await.unwrap();
    let choice = &answer.choices[0];
    assert_eq!(choice.message.content.as_deref(), Some("polly wants"));
    let tokens = choice.logprobs.as_ref().and_then(|l| l.content.as_ref()).unwrap();
    assert!(tokens.iter().all(|t| t.top_logprobs.len() == 2 && t.logprob <= 0.0));
    assert_eq!(answer.usage.unwrap().completion_tokens as usize, tokens.len());

    let mut stream = client.chat().create_stream(question("a cracker 🦀")).await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = stream.next().await {
        for choice in chunk.unwrap().choices {
            text.push_str(&choice.delta.content.unwrap_or_default());
        }
    }
    assert_eq!(text, "a cracker 🦀");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn async_openai_completes() {
    let (server, client) = server().await;
    let request = CreateCompletionRequestArgs::default()
        .model("parrot")
        .prompt(["one", "two"])
        .temperature(0.0)
        .max_tokens(50u32)
        .build()
        .unwrap();
    let answer = client.completions().create(request).await.unwrap();
    assert_eq!(answer.choices.len(), 2);
    assert!(answer.choices[0].text.contains("one") && answer.choices[1].text.contains("two"));

    let unknown = CreateCompletionRequestArgs::default().model("other").prompt("x").build().unwrap();
    let error = client.completions().create(unknown).await.unwrap_err();
    assert!(error.to_string().contains("other"), "{error}");
    server.stop().await;
}

/// The official Python client, where there is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_sdk_works() {
    let python = |arguments: &[&str]| Command::new("python3").args(arguments).output();
    if !python(&["-c", "import openai"]).is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED: the openai package of Python is not installed");
        return;
    }
    let (server, _) = server().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_sdk.py");
    let url = format!("{}/v1", server.url);
    let output = tokio::task::spawn_blocking(move || {
        Command::new("python3").args([script, &url, KEY]).output().unwrap()
    })
    .await
    .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    server.stop().await;
}
