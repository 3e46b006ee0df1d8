//! What answers and streams of both APIs share: everything around their choices.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::Params;
use super::generation::{Delta, Finish};
use super::logprobs::TokenNames;
use super::usage::{StopReason, Usage, answer_id, finish_reason, unix_seconds};
use crate::app::App;

/// How an API names its answers.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// What ids begin with.
    pub prefix: &'static str,
    /// `object` of an answer.
    pub answer: &'static str,
    /// `object` of a chunk of a stream.
    pub chunk: &'static str,
}

/// One request's answer, whole or in chunks.
pub struct Frame {
    /// What is served.
    pub app: Arc<App>,
    /// What both APIs understand.
    pub params: Params,
    /// Alternatives to show per token; `None` shows no log-probabilities.
    pub logprobs: Option<u32>,
    names: Names,
    id: String,
    created: u64,
    usage: Usage,
}

/// A whole answer.
#[derive(Serialize)]
pub struct Answer<C> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<C>,
    usage: Usage,
}

impl Frame {
    /// The frame of a new answer.
    pub fn new(app: Arc<App>, params: Params, logprobs: Option<u32>, names: Names) -> Self {
        let (id, created) = (answer_id(names.prefix), unix_seconds());
        Frame { app, params, logprobs, names, id, created, usage: Usage::default() }
    }

    /// The answer that holds `choices`, all of which have been [`Frame::finished`].
    pub fn answer<C>(&self, choices: Vec<C>) -> Answer<C> {
        Answer {
            id: self.id.clone(),
            object: self.names.answer,
            created: self.created,
            model: self.app.names[0].clone(),
            choices,
            usage: self.usage,
        }
    }

    /// A chunk that holds `choice`.
    pub fn chunk(&self, choice: impl Serialize) -> Value {
        self.chunk_of(json!([choice]))
    }

    /// The chunks after all choices are complete: the counts, if they were asked for.
    pub fn last(&self) -> Vec<Value> {
        if !self.params.include_usage {
            return Vec::new();
        }
        let mut chunk = self.chunk_of(json!([]));
        chunk["usage"] = json!(self.usage);
        vec![chunk]
    }

    fn chunk_of(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": self.names.chunk,
            "created": self.created,
            "model": self.app.names[0],
            "choices": choices,
        });
        if self.params.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// Counts a choice that has ended; `finish_reason` and `stop_reason` of it.
    pub fn finished(&mut self, finish: &Finish) -> (&'static str, Option<StopReason>) {
        self.usage.add(finish, &self.params.sparse, self.app.hbm_page_bytes);
        finish_reason(&finish.reason, &self.app.defaults.end_tokens)
    }

    /// Whether `delta` tells the client nothing. An end token has no text; who asked for no tokens need not hear of it.
    pub fn hides(&self, delta: &Delta) -> bool {
        delta.text.is_empty() && self.logprobs.is_none() && !self.params.return_token_ids
    }

    /// The tokens of `delta`, if ids were asked for.
    pub fn token_ids(&self, delta: &Delta) -> Option<Vec<u32>> {
        self.params.return_token_ids.then(|| delta.tokens.iter().map(|token| token.id).collect())
    }

    /// How log-probabilities name tokens.
    pub fn token_names(&self) -> TokenNames {
        let as_ids = self.params.return_tokens_as_token_ids;
        TokenNames { tokenizer: Arc::clone(&self.app.tokenizer), as_ids }
    }
}
