//! Parameters that both completion APIs share, checked and turned into what the engine understands.

use std::collections::BTreeMap;

use engine::{Request, Stopping};
use ops::sample::SamplingParams;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::sparse::SparseParams;
use super::{ApiError, Fields};
use crate::app::App;

/// Below this a temperature is greedy: dividing logits by less would overflow.
const TEMPERATURE_MIN: f32 = 1e-5;

/// How an answer is generated and shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens before which nothing ends the answer.
    pub min_tokens: u32,
    /// Tokens that end it.
    pub end_tokens: Vec<u32>,
    /// Strings that end it.
    pub stops: Vec<String>,
    /// Whether the stop string is shown.
    pub include_stop: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// Whether the answer is sent token by token.
    pub stream: bool,
    /// Whether a stream ends with a chunk of counts.
    pub include_usage: bool,
    /// What generated tokens attend to.
    pub sparse: SparseParams,
    /// Whether answers carry token ids.
    pub return_token_ids: bool,
    /// Lower ones are preferred.
    pub priority: i32,
    /// Whether log-probabilities name tokens as `token_id:7`.
    pub return_tokens_as_token_ids: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Params {
    /// Takes the shared fields out of a request body.
    ///
    /// # Errors
    /// 400 for a value out of range, 404 for another model, 422 for a wrong type.
    pub fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        check_model(fields, app)?;
        let ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
        let mut end_tokens = if ignore_eos { Vec::new() } else { app.defaults.end_tokens.clone() };
        end_tokens.extend(take_stop_token_ids(fields, app)?);
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = take_stream_options(fields, stream)?;
        let sparse = SparseParams::take(fields, app)?;
        Ok(Params {
            sampling: take_sampling(fields, app)?,
            min_tokens: fields.take("min_tokens")?.unwrap_or(0),
            end_tokens,
            stops: take_stops(fields, app)?,
            include_stop: fields.take("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.take("skip_special_tokens")?.unwrap_or(true),
            stream,
            // A receipt comes with the counts.
            include_usage: include_usage || sparse.receipt,
            sparse,
            priority: fields.take("priority")?.unwrap_or(0),
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            return_tokens_as_token_ids: fields.take("return_tokens_as_token_ids")?.unwrap_or(false),
        })
    }

    /// The request to the engine for a prompt that [`Params::check_length`] accepted.
    pub fn request(&self, prompt: Vec<u32>, max_tokens: u32) -> Request {
        Request {
            sparse: self.sparse.request(prompt.len()),
            reuse: self.sparse.reuse(),
            priority: self.priority,
            prompt,
            sampling: self.sampling.clone(),
            stopping: Stopping {
                max_tokens,
                min_tokens: self.min_tokens,
                end_tokens: self.end_tokens.clone(),
            },
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// The number of tokens to generate after a prompt: what was asked for, or else `default`, or what the context
    /// leaves.
    ///
    /// # Errors
    /// 400 if prompt and answer do not fit the context together, or `min_tokens` is more than there will be.
    pub fn check_length(
        &self,
        app: &App,
        prompt_tokens: usize,
        requested: Option<u32>,
        default: Option<u32>,
        param: &str,
    ) -> Result<u32, ApiError> {
        let max_context = app.max_context;
        let left = max_context.saturating_sub(prompt_tokens);
        let least = requested.unwrap_or(1);
        if prompt_tokens == 0 {
            return Err(ApiError::invalid(param, "The prompt has no tokens."));
        }
        if left < least as usize {
            return Err(ApiError::too_long(
                param,
                format!(
                    "This model's maximum context length is {max_context} tokens. However, you requested {} tokens \
                     ({prompt_tokens} in the prompt, {least} in the completion). Please reduce either.",
                    prompt_tokens + least as usize
                ),
            ));
        }
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let max_tokens = requested.unwrap_or_else(|| default.unwrap_or(left).min(left));
        if self.min_tokens > max_tokens {
            return Err(ApiError::invalid(
                "min_tokens",
                format!("`min_tokens` ({}) is more than `max_tokens` ({max_tokens})", self.min_tokens),
            ));
        }
        Ok(max_tokens)
    }
}

/// Refuses requests for a model that is not served; without a name the one there is answers.
pub fn check_model(fields: &mut Fields, app: &App) -> Result<(), ApiError> {
    match fields.take::<String>("model")? {
        Some(name) if !app.names.contains(&name) => Err(ApiError::no_such_model(&name)),
        _ => Ok(()),
    }
}

fn take_sampling(fields: &mut Fields, app: &App) -> Result<SamplingParams, ApiError> {
    let defaults = &app.defaults;
    let temperature = fields.take_within("temperature", 0.0..=2.0)?.or(defaults.temperature).unwrap_or(1.0);
    let top_k = match fields.take::<i64>("top_k")? {
        None => defaults.top_k.unwrap_or(0),
        Some(-1 | 0) => 0,
        Some(k) if k > 0 => u32::try_from(k).unwrap_or(u32::MAX),
        Some(k) => {
            let message = format!("`top_k` must be positive, or 0 or -1 for all tokens, not {k}");
            return Err(ApiError::invalid("top_k", message));
        }
    };
    // A negative seed is as good as any.
    let seed = match fields.take::<i64>("seed")? {
        Some(seed) => seed as u64,
        // Where nothing is drawn by lot, nothing else that goes by the seed should differ from call to call.
        None if temperature < TEMPERATURE_MIN => 0,
        None => getrandom::u64().map_err(|e| ApiError::internal(format!("no random seed: {e}")))?,
    };
    let repetition_penalty = fields.take_within("repetition_penalty", f32::MIN_POSITIVE..=100.0)?;
    Ok(SamplingParams {
        temperature: if temperature < TEMPERATURE_MIN { 0.0 } else { temperature },
        top_p: fields.take_within("top_p", 0.0..=1.0)?.or(defaults.top_p).unwrap_or(1.0),
        top_k,
        min_p: fields.take_within("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
        presence_penalty: fields.take_within("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.take_within("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty: repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        logit_bias: take_logit_bias(fields, app)?,
        seed,
    })
}

fn take_logit_bias(fields: &mut Fields, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
    let param = "logit_bias";
    let entries: BTreeMap<String, f32> = fields.take(param)?.unwrap_or_default();
    check_count(param, entries.len(), app.limits.logit_bias)?;
    entries
        .into_iter()
        .map(|(token, bias)| {
            let id = token.parse().map_err(|_| {
                ApiError::invalid(param, format!("`logit_bias` has the key {token:?}, which is no token id"))
            })?;
            check_token(param, id, app)?;
            if !(-100.0..=100.0).contains(&bias) {
                let message = format!("`logit_bias` of token {id} must be between -100 and 100, not {bias}");
                return Err(ApiError::invalid(param, message));
            }
            Ok((id, bias))
        })
        .collect()
}

fn take_stop_token_ids(fields: &mut Fields, app: &App) -> Result<Vec<u32>, ApiError> {
    let param = "stop_token_ids";
    let ids: Vec<u32> = fields.take(param)?.unwrap_or_default();
    check_count(param, ids.len(), app.limits.stop_tokens)?;
    ids.iter().try_for_each(|&id| check_token(param, id, app))?;
    Ok(ids)
}

fn take_stops(fields: &mut Fields, app: &App) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop")? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    check_count("stop", stops.len(), app.limits.stops)?;
    for stop in &stops {
        if stop.is_empty() || stop.len() > app.limits.stop_bytes {
            let message =
                format!("A stop string must have 1 to {} bytes, not {}", app.limits.stop_bytes, stop.len());
            return Err(ApiError::invalid("stop", message));
        }
    }
    Ok(stops)
}

/// Whether a stream ends with counts.
fn take_stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let param = "stream_options";
    let Some(options) = fields.take::<Map<String, Value>>(param)? else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid(param, "`stream_options` needs `stream` to be true"));
    }
    let mut options = Fields::nested(options, param);
    let include_usage = options.take("include_usage")?.unwrap_or(false);
    // Padding against traffic analysis: a hint that OpenAI's clients may send.
    options.take::<bool>("include_obfuscation")?;
    options.finish().map(|_| include_usage)
}

/// Refuses an id that the model has no embedding for.
pub fn check_token(param: &str, id: u32, app: &App) -> Result<(), ApiError> {
    if (id as usize) < app.vocab_size {
        return Ok(());
    }
    let message =
        format!("`{param}` has the token id {id}, but the vocabulary has {} tokens", app.vocab_size);
    Err(ApiError::invalid(param, message))
}

/// Refuses a text of `bytes` that is certainly too long, before anything is done with it.
pub fn check_text(param: &str, bytes: usize, bytes_max: usize, app: &App) -> Result<(), ApiError> {
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(ApiError::too_long(
        param,
        format!(
            "This model's maximum context length is {} tokens. However, your text has {bytes} bytes, of which {bytes_max} \
             are allowed. Please reduce it.",
            app.max_context
        ),
    ))
}

/// Refuses a list that is longer than it may be.
pub fn check_count(param: &str, count: usize, max: usize) -> Result<(), ApiError> {
    if count <= max {
        return Ok(());
    }
    Err(ApiError::invalid(param, format!("`{param}` has {count} entries, of which {max} are allowed")))
}
