//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::chat_prompt::ChatPrompt;
use super::generation::{Delta, Event, Generation};
use super::logprobs::{ChatLogprobs, TokenNames};
use super::stream::{Chunks, collect, respond};
use super::usage::{StopReason, Usage, answer_id, finish_reason, unix_seconds};
use super::{ApiError, Fields, Params};
use crate::app::{App, InFlight};

/// Fields of a chat request beside the prompt and what both APIs share.
struct ChatParams {
    max_tokens: Option<u32>,
    /// Alternatives to show per token; `None` shows no log-probabilities.
    logprobs: Option<u32>,
}

impl ChatParams {
    fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        let old: Option<u32> = fields.take("max_tokens")?;
        let new: Option<u32> = fields.take("max_completion_tokens")?;
        let max_tokens = match (new, old) {
            (Some(new), Some(old)) if new != old => {
                let message = "`max_tokens` and `max_completion_tokens` differ";
                return Err(ApiError::invalid("max_completion_tokens", message));
            }
            (new, old) => new.or(old),
        };
        if max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "`max_tokens` must be at least 1"));
        }
        let wanted = fields.take("logprobs")?.unwrap_or(false);
        let top: Option<u32> = fields.take("top_logprobs")?;
        let most = app.limits.top_logprobs;
        let logprobs = match (wanted, top) {
            (_, Some(top)) if top > most => {
                let message = format!("`top_logprobs` must be between 0 and {most}, not {top}");
                return Err(ApiError::invalid("top_logprobs", message));
            }
            (false, Some(top)) if top > 0 => {
                return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
            }
            (false, _) => None,
            (true, top) => Some(top.unwrap_or(0)),
        };
        Ok(ChatParams { max_tokens, logprobs })
    }
}

/// What answer and chunks of one request share.
struct Frame {
    app: Arc<App>,
    params: Params,
    id: String,
    created: u64,
    logprobs: Option<u32>,
    prompt_token_ids: Option<Vec<u32>>,
}

/// Answers a chat.
///
/// # Errors
/// Whatever is wrong with the request, or with the server.
pub async fn chat_completions(
    State(app): State<Arc<App>>,
    in_flight: InFlight,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let params = Params::take(&mut fields, &app)?;
    let chat = ChatParams::take(&mut fields, &app)?;
    let prompt = ChatPrompt::take(&mut fields, &app)?;
    let memory = fields.finish()?;

    let prompt = prompt.tokens(&app).await?;
    drop(memory);
    let default = app.defaults.max_new_tokens;
    let max_tokens = params.check_length(&app, prompt.len(), chat.max_tokens, default, "messages")?;
    let prompt_token_ids = params.return_token_ids.then(|| prompt.clone());
    let mut request = params.request(prompt, max_tokens);
    request.logprobs = chat.logprobs;
    let generation = Generation::start(&app, &params, request)?;
    let (id, created) = (answer_id("chatcmpl"), unix_seconds());
    let stream = params.stream;
    let frame = Frame { app, params, id, created, logprobs: chat.logprobs, prompt_token_ids };
    if stream {
        let app = Arc::clone(&frame.app);
        return Ok(respond(&app, vec![generation], ChatStream { frame, usage: Usage::default() }, in_flight));
    }
    Ok(Json(frame.answer(collect(generation).await?)).into_response())
}

#[derive(Serialize)]
struct Answer {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: [Choice; 1],
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

impl Frame {
    fn answer(self, events: Vec<Event>) -> Answer {
        let mut content = String::new();
        let mut logprobs = self.logprobs.map(|_| ChatLogprobs::default());
        let mut token_ids = Vec::new();
        let mut usage = Usage::default();
        let mut reason = ("stop", None);
        for event in events {
            match event {
                Event::Delta(delta) => {
                    if let (Some(all), Some(new)) = (&mut logprobs, self.logprobs_of(&delta)) {
                        all.extend(new);
                    }
                    content.push_str(&delta.text);
                    token_ids.extend(delta.tokens.iter().map(|token| token.id));
                }
                Event::Finished(finish) => {
                    usage.add(&finish);
                    reason = finish_reason(&finish.reason, &self.app.defaults.end_tokens);
                }
                // Prompts have no log-probabilities here, and a failure has become an error before.
                Event::Prompt(_) | Event::Failed(_) => {}
            }
        }
        let (finish_reason, stop_reason) = reason;
        let token_ids = self.params.return_token_ids.then_some(token_ids);
        let message = Message { role: "assistant", content, refusal: None };
        Answer {
            object: "chat.completion",
            created: self.created,
            model: self.app.names[0].clone(),
            choices: [Choice { index: 0, message, logprobs, finish_reason, stop_reason, token_ids }],
            usage,
            prompt_token_ids: self.prompt_token_ids,
            id: self.id,
        }
    }

    fn logprobs_of(&self, delta: &Delta) -> Option<ChatLogprobs> {
        let top = self.logprobs?;
        let as_ids = self.params.return_tokens_as_token_ids;
        let names = TokenNames { tokenizer: Arc::clone(&self.app.tokenizer), as_ids };
        Some(ChatLogprobs::new(&names, &delta.tokens, top))
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.app.names[0],
            "choices": choices,
        });
        if self.params.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

/// A streamed chat: the role, the deltas, the reason of the end and, if asked for, the counts.
struct ChatStream {
    frame: Frame,
    usage: Usage,
}

impl Chunks for ChatStream {
    fn first(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.frame.chunk(json!([choice]));
        if let Some(ids) = &self.frame.prompt_token_ids {
            chunk["prompt_token_ids"] = json!(ids);
        }
        vec![chunk]
    }

    fn next(&mut self, index: usize, event: Event) -> Vec<Value> {
        let choice = match event {
            Event::Delta(delta) => {
                let frame = &self.frame;
                // An end token has no text; who asked for no tokens need not hear of it.
                if delta.text.is_empty() && frame.logprobs.is_none() && !frame.params.return_token_ids {
                    return Vec::new();
                }
                let logprobs = frame.logprobs_of(&delta);
                let content = json!({"content": delta.text});
                let mut choice =
                    json!({"index": index, "delta": content, "logprobs": logprobs, "finish_reason": null});
                if frame.params.return_token_ids {
                    choice["token_ids"] = delta.tokens.iter().map(|token| token.id).collect();
                }
                choice
            }
            Event::Finished(finish) => {
                self.usage.add(&finish);
                let (reason, stop) = finish_reason(&finish.reason, &self.frame.app.defaults.end_tokens);
                json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason, "stop_reason": stop})
            }
            Event::Prompt(_) | Event::Failed(_) => return Vec::new(),
        };
        vec![self.frame.chunk(json!([choice]))]
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.frame.params.include_usage {
            return Vec::new();
        }
        let mut chunk = self.frame.chunk(json!([]));
        chunk["usage"] = json!(self.usage);
        vec![chunk]
    }
}
