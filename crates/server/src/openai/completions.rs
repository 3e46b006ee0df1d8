//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::frame::{Answer, Frame, Names};
use super::generation::{Delta, Event, Generation};
use super::logprobs::CompletionLogprobs;
use super::params::{check_count, check_text, check_token};
use super::stream::{Chunks, collect, respond};
use super::usage::StopReason;
use super::{ApiError, Fields, Params};
use crate::app::{App, InFlight};

/// What OpenAI generates where a request doesn't say.
const DEFAULT_MAX_TOKENS: u32 = 16;

const NAMES: Names = Names { prefix: "cmpl", answer: "text_completion", chunk: "text_completion" };

/// `prompt`: one or several, as text or as ids.
#[derive(Deserialize)]
#[serde(untagged)]
enum PromptField {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// One prompt.
enum RawPrompt {
    Text(String),
    Ids(Vec<u32>),
}

/// A prompt that is ready to run.
struct Prompt {
    tokens: Vec<u32>,
    /// What `echo` shows of it; empty without.
    text: String,
    /// Whether `text` leaves special tokens out, as a client's own text does.
    hides_special: bool,
    /// Log-probabilities of its tokens but the first, once they are known.
    logprobs: Vec<engine::TokenLogprobs>,
}

/// Fields of a completions request beside what both APIs share.
struct CompletionParams {
    max_tokens: u32,
    /// Alternatives to show per token; `None` shows no log-probabilities.
    logprobs: Option<u32>,
    echo: bool,
    add_special_tokens: bool,
}

impl CompletionParams {
    fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        let echo = fields.take("echo")?.unwrap_or(false);
        let max_tokens = fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS);
        if max_tokens == 0 && !echo {
            return Err(ApiError::invalid(
                "max_tokens",
                "`max_tokens` must be at least 1 unless `echo` is true",
            ));
        }
        let logprobs: Option<u32> = fields.take("logprobs")?;
        let most = app.limits.top_logprobs;
        if let Some(top) = logprobs.filter(|&top| top > most) {
            let message = format!("`logprobs` must be between 0 and {most}, not {top}");
            return Err(ApiError::invalid("logprobs", message));
        }
        let add_special_tokens = fields.take("add_special_tokens")?.unwrap_or(true);
        Ok(CompletionParams { max_tokens, logprobs, echo, add_special_tokens })
    }
}

/// Completions being made.
struct Completions {
    frame: Frame,
    echo: bool,
    prompts: Vec<Prompt>,
}

/// Continues one or several prompts, each a choice; they run at the same time.
///
/// # Errors
/// Whatever is wrong with the request, or with the server. One prompt that is refused refuses all.
pub async fn completions(
    State(app): State<Arc<App>>,
    in_flight: InFlight,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let params = Params::take(&mut fields, &app)?;
    let own = CompletionParams::take(&mut fields, &app)?;
    let prompts = take_prompts(&mut fields, &app)?;
    let memory = fields.finish()?;

    let check_length =
        |tokens: usize| params.check_length(&app, tokens, Some(own.max_tokens), None, "prompt").map(drop);
    // What is certainly too long is refused before it costs anything.
    prompts.iter().try_for_each(|prompt| match prompt {
        RawPrompt::Text(text) => check_text("prompt", text.len(), app.text_bytes_max(), &app),
        RawPrompt::Ids(ids) => check_length(ids.len()),
    })?;
    let prompts = tokenize(prompts, &app, &own).await?;
    prompts.iter().try_for_each(|prompt| check_length(prompt.tokens.len()))?;
    drop(memory);
    let mut generations = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        match start(&app, &params, &own, prompt.tokens.clone()) {
            Ok(generation) => generations.push(generation),
            Err(refusal) => {
                generations.into_iter().for_each(Generation::withdraw);
                return Err(refusal);
            }
        }
    }
    let frame = Frame::new(Arc::clone(&app), params, own.logprobs, NAMES);
    let completions = Completions { frame, echo: own.echo, prompts };
    if completions.frame.params.stream {
        return Ok(respond(&app, generations, completions, in_flight));
    }
    let events = try_join_all(generations.into_iter().map(collect)).await?;
    Ok(Json(completions.answer(events)).into_response())
}

fn start(
    app: &Arc<App>,
    params: &Params,
    own: &CompletionParams,
    prompt: Vec<u32>,
) -> Result<Generation, ApiError> {
    if own.max_tokens == 0 && own.logprobs.is_none() {
        return Ok(Generation::empty(app, params, &prompt));
    }
    let mut request = params.request(prompt, own.max_tokens);
    request.logprobs = own.logprobs;
    request.prompt_logprobs = own.logprobs.filter(|_| own.echo);
    Generation::start(app, params, request)
}

fn take_prompts(fields: &mut Fields, app: &App) -> Result<Vec<RawPrompt>, ApiError> {
    let expected =
        "`prompt` must be a string, a list of strings, a list of token ids or a list of such lists";
    let value: Value = fields.require("prompt")?;
    let prompt: PromptField =
        serde_json::from_value(value).map_err(|_| ApiError::mistyped("prompt", expected))?;
    let prompts: Vec<RawPrompt> = match prompt {
        PromptField::Text(text) => vec![RawPrompt::Text(text)],
        PromptField::Ids(ids) => vec![RawPrompt::Ids(ids)],
        PromptField::Texts(texts) => texts.into_iter().map(RawPrompt::Text).collect(),
        PromptField::IdLists(lists) => lists.into_iter().map(RawPrompt::Ids).collect(),
    };
    // They wait together, so more than may run and wait would be refused for ever.
    check_count("prompt", prompts.len(), app.limits.prompts.min(app.engine.config().requests_max()))?;
    for prompt in &prompts {
        if let RawPrompt::Ids(ids) = prompt {
            ids.iter().try_for_each(|&id| check_token("prompt", id, app))?;
        }
    }
    Ok(prompts)
}

async fn tokenize(
    prompts: Vec<RawPrompt>,
    app: &App,
    own: &CompletionParams,
) -> Result<Vec<Prompt>, ApiError> {
    let (echo, add_special_tokens, max_context) = (own.echo, own.add_special_tokens, app.max_context);
    let bytes = |prompt: &RawPrompt| match prompt {
        RawPrompt::Text(text) => text.len(),
        RawPrompt::Ids(ids) => ids.len() * size_of::<u32>(),
    };
    let total_bytes = prompts.iter().map(bytes).sum();
    let tokenizer = Arc::clone(&app.tokenizer);
    app.text_work(total_bytes, move || {
        let prompts = prompts.into_iter().map(|prompt| {
            let (tokens, text, hides_special) = match prompt {
                RawPrompt::Text(text) => {
                    let tokens = tokenizer.encode_within(&text, add_special_tokens, max_context);
                    let tokens = tokens.map_err(|error| ApiError::untokenizable("prompt", &error))?;
                    (tokens, if echo { text } else { String::new() }, true)
                }
                RawPrompt::Ids(ids) => {
                    let text = if echo { tokenizer.decode(&ids, false)? } else { String::new() };
                    (ids, text, false)
                }
            };
            Ok(Prompt { tokens, text, hides_special, logprobs: Vec::new() })
        });
        prompts.collect()
    })
    .await
}

/// A choice, or what a chunk adds to it.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

impl Choice {
    fn new(index: usize) -> Self {
        Choice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            prompt_token_ids: None,
            token_ids: None,
        }
    }

    /// Adds what a later chunk would.
    fn extend(&mut self, later: Choice) {
        self.text.push_str(&later.text);
        match (&mut self.logprobs, later.logprobs) {
            (Some(all), Some(new)) => all.extend(new),
            (none, new) => *none = none.take().or(new),
        }
        match (&mut self.token_ids, later.token_ids) {
            (Some(all), Some(new)) => all.extend(new),
            (none, new) => *none = none.take().or(new),
        }
        self.prompt_token_ids = self.prompt_token_ids.take().or(later.prompt_token_ids);
        self.finish_reason = self.finish_reason.or(later.finish_reason);
        self.stop_reason = self.stop_reason.take().or(later.stop_reason);
    }
}

impl Completions {
    fn answer(mut self, events: Vec<Vec<Event>>) -> Answer<Choice> {
        let mut choices = Vec::with_capacity(events.len());
        for (index, events) in events.into_iter().enumerate() {
            let mut choice = Choice::new(index);
            if let Some(start) = self.start_of(index) {
                choice.extend(start);
            }
            for event in events {
                if let Some(more) = self.choice_of(index, event) {
                    choice.extend(more);
                }
            }
            if self.frame.logprobs.is_some() {
                choice.logprobs.get_or_insert_default();
            }
            choices.push(choice);
        }
        self.frame.answer(choices)
    }

    /// What is known of a choice before its first event; the echo waits for the prompt's log-probabilities if they were
    /// asked for.
    fn start_of(&self, index: usize) -> Option<Choice> {
        let prompt = &self.prompts[index];
        let echo = self.echo && self.frame.logprobs.is_none();
        let return_token_ids = self.frame.params.return_token_ids;
        if !echo && !return_token_ids {
            return None;
        }
        Some(Choice {
            text: if echo { prompt.text.clone() } else { String::new() },
            prompt_token_ids: return_token_ids.then(|| prompt.tokens.clone()),
            token_ids: return_token_ids.then(Vec::new),
            ..Choice::new(index)
        })
    }

    /// What `event` adds to a choice.
    fn choice_of(&mut self, index: usize, event: Event) -> Option<Choice> {
        Some(match event {
            Event::Prompt(logprobs) => {
                self.prompts[index].logprobs = logprobs;
                let prompt = &self.prompts[index];
                let logprobs = CompletionLogprobs::of_prompt(
                    &self.frame.token_names(),
                    &prompt.tokens,
                    &prompt.logprobs,
                    prompt.hides_special,
                );
                Choice { text: prompt.text.clone(), logprobs: Some(logprobs), ..Choice::new(index) }
            }
            Event::Delta(delta) if self.frame.hides(&delta) => return None,
            Event::Delta(delta) => Choice {
                logprobs: self.logprobs_of(index, &delta),
                token_ids: self.frame.token_ids(&delta),
                text: delta.text,
                ..Choice::new(index)
            },
            Event::Finished(finish) => {
                let (finish_reason, stop_reason) = self.frame.finished(&finish);
                Choice { finish_reason: Some(finish_reason), stop_reason, ..Choice::new(index) }
            }
            Event::Failed(_) => return None,
        })
    }

    fn logprobs_of(&self, index: usize, delta: &Delta) -> Option<CompletionLogprobs> {
        self.frame.logprobs?;
        let echoed = if self.echo { self.prompts[index].text.chars().count() } else { 0 };
        Some(CompletionLogprobs::of_answer(&self.frame.token_names(), &delta.tokens, echoed))
    }
}

/// Streamed completions: deltas of all choices as they come.
impl Chunks for Completions {
    fn first(&mut self) -> Vec<Value> {
        let starts = (0..self.prompts.len()).filter_map(|index| self.start_of(index));
        starts.map(|choice| self.frame.chunk(choice)).collect()
    }

    fn next(&mut self, index: usize, event: Event) -> Vec<Value> {
        let choice = self.choice_of(index, event);
        choice.map(|choice| self.frame.chunk(choice)).into_iter().collect()
    }

    fn last(&mut self) -> Vec<Value> {
        self.frame.last()
    }
}
