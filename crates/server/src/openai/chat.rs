//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::chat_prompt::ChatPrompt;
use super::frame::{Answer, Frame, Names};
use super::generation::{Delta, Event, Generation};
use super::logprobs::ChatLogprobs;
use super::stream::{Chunks, collect, respond};
use super::usage::StopReason;
use super::{ApiError, Fields, Params};
use crate::app::{App, InFlight};

const NAMES: Names = Names { prefix: "chatcmpl", answer: "chat.completion", chunk: "chat.completion.chunk" };

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
    let frame = Frame::new(Arc::clone(&app), params, chat.logprobs, NAMES);
    let chat = Chat { frame, prompt_token_ids };
    if chat.frame.params.stream {
        return Ok(respond(&app, vec![generation], chat, in_flight));
    }
    Ok(Json(chat.answer(collect(generation).await?)).into_response())
}

/// A chat being answered.
struct Chat {
    frame: Frame,
    /// If ids were asked for.
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct ChatAnswer {
    #[serde(flatten)]
    answer: Answer<Choice>,
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

impl Chat {
    fn answer(mut self, events: Vec<Event>) -> ChatAnswer {
        let frame = &mut self.frame;
        let mut choice = Choice {
            index: 0,
            message: Message { role: "assistant", content: String::new(), refusal: None },
            logprobs: frame.logprobs.map(|_| ChatLogprobs::default()),
            finish_reason: "stop",
            stop_reason: None,
            token_ids: frame.params.return_token_ids.then(Vec::new),
        };
        for event in events {
            match event {
                Event::Delta(delta) => {
                    if let (Some(all), Some(new)) = (&mut choice.logprobs, logprobs_of(frame, &delta)) {
                        all.extend(new);
                    }
                    if let (Some(all), Some(new)) = (&mut choice.token_ids, frame.token_ids(&delta)) {
                        all.extend(new);
                    }
                    choice.message.content.push_str(&delta.text);
                }
                Event::Finished(finish) => {
                    (choice.finish_reason, choice.stop_reason) = frame.finished(&finish);
                }
                // Prompts have no log-probabilities here, and a failure has become an error before.
                Event::Prompt(_) | Event::Failed(_) => {}
            }
        }
        ChatAnswer { answer: frame.answer(vec![choice]), prompt_token_ids: self.prompt_token_ids }
    }
}

fn logprobs_of(frame: &Frame, delta: &Delta) -> Option<ChatLogprobs> {
    let top = frame.logprobs?;
    Some(ChatLogprobs::new(&frame.token_names(), &delta.tokens, top))
}

/// A streamed chat: the role, the deltas, the reason of the end and, if asked for, the counts.
impl Chunks for Chat {
    fn first(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.frame.chunk(choice);
        if let Some(ids) = &self.prompt_token_ids {
            chunk["prompt_token_ids"] = json!(ids);
        }
        vec![chunk]
    }

    fn next(&mut self, index: usize, event: Event) -> Vec<Value> {
        let choice = match event {
            Event::Delta(delta) if self.frame.hides(&delta) => return Vec::new(),
            Event::Delta(delta) => {
                let (logprobs, token_ids) = (logprobs_of(&self.frame, &delta), self.frame.token_ids(&delta));
                let content = json!({"content": delta.text});
                let mut choice =
                    json!({"index": index, "delta": content, "logprobs": logprobs, "finish_reason": null});
                if let Some(ids) = token_ids {
                    choice["token_ids"] = json!(ids);
                }
                choice
            }
            Event::Finished(finish) => {
                let (reason, stop) = self.frame.finished(&finish);
                json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason, "stop_reason": stop})
            }
            Event::Prompt(_) | Event::Failed(_) => return Vec::new(),
        };
        vec![self.frame.chunk(choice)]
    }

    fn last(&mut self) -> Vec<Value> {
        self.frame.last()
    }
}
