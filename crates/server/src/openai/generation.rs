//! One answer in the making: tokens from the engine become text.

use std::collections::VecDeque;
use std::sync::Arc;

use engine::{
    Attended, Disconnected, FinishReason, Guarded, PageUse, Request, RequestId, Sink, TokenLogprobs, Update,
};
use tokio::sync::mpsc;

use super::{ApiError, Params};
use crate::app::App;
use crate::text::{Decoder, StopMatcher};

/// Tokens of the prompt that the decoder sees as left context.
const DECODER_CONTEXT: usize = 8;

/// What a generation tells, in this order: `Prompt` (if asked), `Delta`s, then one of `Finished` and `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Log-probabilities of prompt tokens 1.. .
    Prompt(Vec<TokenLogprobs>),
    /// More of the answer.
    Delta(Delta),
    /// The answer is complete.
    Finished(Finish),
    /// The answer will not be completed.
    Failed(ApiError),
}

/// More of an answer: text that may be shown and the tokens behind it.
///
/// Text is held back while it may be the beginning of a stop string or an incomplete character; its tokens wait with
/// it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// The text.
    pub text: String,
    /// The tokens, the one that ended the answer included.
    pub tokens: Vec<Token>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Characters of the answer's text before it.
    pub offset: usize,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: Reason,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub generated_tokens: u32,
    /// What they attended to, where that was not everything.
    pub attended: Option<Attended>,
    /// What its guard saw and did, where it looked.
    pub guarded: Option<Guarded>,
    /// What became of its pages in an HBM tier.
    pub pages: PageUse,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has as many tokens as it may.
    Length,
    /// The model's end token or one of `stop_token_ids`.
    EndToken(u32),
    /// This stop string.
    Stop(String),
}

impl Reason {
    /// For the log: no text of the client's.
    fn name(&self) -> &'static str {
        match self {
            Reason::Length => "length",
            Reason::EndToken(_) => "end token",
            Reason::Stop(_) => "stop string",
        }
    }
}

/// An answer in the making. Dropping it cancels the request in the engine.
pub struct Generation {
    /// `None` once the engine has nothing more to do.
    running: Option<Running>,
    decoder: Decoder,
    stops: StopMatcher,
    /// The stop string that was found; from then on only the counts are awaited.
    stopped: Option<String>,
    min_tokens: u32,
    end_tokens: Vec<u32>,
    /// What has not been told yet of the next delta.
    delta: Delta,
    /// Characters decoded so far, shown or held back.
    decoded_chars: usize,
    events: VecDeque<Event>,
    counts: Counts,
    /// The HTTP request, for the log.
    span: tracing::Span,
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.running.is_some() {
            let Counts { prompt_tokens, generated_tokens, .. } = self.counts;
            self.span.in_scope(|| tracing::info!(prompt_tokens, generated_tokens, "client left"));
        }
    }
}

struct Running {
    app: Arc<App>,
    id: RequestId,
    updates: mpsc::UnboundedReceiver<Update>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.app.engine.abort(self.id);
    }
}

#[derive(Clone, Copy, Default)]
struct Counts {
    prompt_tokens: u32,
    cached_tokens: u32,
    generated_tokens: u32,
    attended: Option<Attended>,
    guarded: Option<Guarded>,
    pages: PageUse,
}

/// The engine's end of the channel. It has no bound of its own: a request sends at most `max_tokens` updates, and the
/// engine must not wait for a slow client.
struct Updates(mpsc::UnboundedSender<Update>);

impl Sink for Updates {
    fn send(&mut self, update: Update) -> Result<(), Disconnected> {
        self.0.send(update).map_err(|_| Disconnected)
    }
}

impl Generation {
    /// Hands `request` to the engine.
    ///
    /// # Errors
    /// 429 if the queue is full, 400 if the request can never run, 503 if the server shuts down.
    pub fn start(app: &Arc<App>, params: &Params, request: Request) -> Result<Self, ApiError> {
        let mut generation = Generation::idle(app, params, &request.prompt);
        let (sender, updates) = mpsc::unbounded_channel();
        let id = app.engine.submit(request, Box::new(Updates(sender)))?;
        generation.running = Some(Running { app: Arc::clone(app), id, updates });
        Ok(generation)
    }

    /// Takes the request back because another one of the same client was refused.
    pub fn withdraw(mut self) {
        self.running = None;
    }

    /// An answer without tokens: only the prompt was asked for.
    pub fn empty(app: &Arc<App>, params: &Params, prompt: &[u32]) -> Self {
        let mut generation = Generation::idle(app, params, prompt);
        generation.finish(Reason::Length);
        generation
    }

    fn idle(app: &Arc<App>, params: &Params, prompt: &[u32]) -> Self {
        let context = &prompt[prompt.len().saturating_sub(DECODER_CONTEXT)..];
        Generation {
            running: None,
            decoder: Decoder::new(Arc::clone(&app.tokenizer), context, params.skip_special_tokens),
            stops: StopMatcher::new(params.stops.clone(), params.include_stop),
            stopped: None,
            min_tokens: params.min_tokens,
            end_tokens: params.end_tokens.clone(),
            delta: Delta::default(),
            decoded_chars: 0,
            events: VecDeque::new(),
            counts: Counts { prompt_tokens: prompt.len() as u32, ..Counts::default() },
            span: tracing::Span::current(),
        }
    }

    /// What happens next; `None` after the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let update = self.running.as_mut()?.updates.recv().await;
            match update {
                Some(update) => self.take(update),
                None => {
                    self.fail(ApiError::unavailable("The engine stopped before the answer was complete."))
                }
            }
        }
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::PromptLogprobs(logprobs) => self.events.push_back(Event::Prompt(logprobs)),
            // The step in flight when a stop string was found may bring one more.
            Update::Token { .. } if self.stopped.is_some() => {}
            Update::Token { token, logprobs } => self.take_token(token, logprobs),
            Update::Finished { reason, usage } => {
                self.counts.cached_tokens = usage.cached_tokens;
                self.counts.attended = usage.attended;
                self.counts.guarded = usage.guarded;
                self.counts.pages = usage.pages;
                match (self.stopped.take(), reason) {
                    (Some(stop), _) => self.end(Reason::Stop(stop)),
                    (None, FinishReason::EndToken(token)) => self.finish(Reason::EndToken(token)),
                    (None, FinishReason::Length | FinishReason::Stopped) => self.finish(Reason::Length),
                }
            }
            Update::Failed(reason) => self.fail(ApiError::internal(reason)),
        }
    }

    fn take_token(&mut self, id: u32, logprobs: Option<TokenLogprobs>) {
        self.counts.generated_tokens += 1;
        self.delta.tokens.push(Token { id, offset: self.decoded_chars, logprobs });
        // The engine draws no end token before `min_tokens`, so this one ends the answer and is not shown.
        if self.end_tokens.contains(&id) {
            return;
        }
        let text = self.decoder.push(id);
        self.decoded_chars += text.chars().count();
        if self.counts.generated_tokens < self.min_tokens {
            self.delta.text.push_str(&text);
        } else if !text.is_empty() {
            let revealed = self.stops.push(&text);
            self.delta.text.push_str(&revealed.text);
            if let (Some(stop), Some(running)) = (revealed.stop, &self.running) {
                self.stopped = Some(self.stops.stop(stop).to_owned());
                running.app.engine.stop(running.id);
            }
        }
        if !self.delta.text.is_empty() {
            self.events.push_back(Event::Delta(std::mem::take(&mut self.delta)));
        }
    }

    /// The engine sent its last token: what was held back cannot become a stop string any more.
    fn finish(&mut self, reason: Reason) {
        let tail = self.decoder.finish();
        let revealed = self.stops.push(&tail);
        self.delta.text.push_str(&revealed.text);
        match revealed.stop {
            Some(stop) => self.end(Reason::Stop(self.stops.stop(stop).to_owned())),
            None => {
                self.delta.text.push_str(&self.stops.finish());
                self.end(reason);
            }
        }
    }

    fn end(&mut self, reason: Reason) {
        self.running = None;
        if !self.delta.text.is_empty() || !self.delta.tokens.is_empty() {
            self.events.push_back(Event::Delta(std::mem::take(&mut self.delta)));
        }
        let Counts { prompt_tokens, cached_tokens, generated_tokens, attended, guarded, pages } = self.counts;
        self.span.in_scope(|| {
            let reason = reason.name();
            tracing::info!(prompt_tokens, cached_tokens, generated_tokens, reason, "finished");
        });
        self.events.push_back(Event::Finished(Finish {
            reason,
            prompt_tokens,
            cached_tokens,
            generated_tokens,
            attended,
            guarded,
            pages,
        }));
    }

    fn fail(&mut self, error: ApiError) {
        self.running = None;
        self.span.in_scope(|| tracing::warn!(error = error.message, "failed"));
        self.events.push_back(Event::Failed(error));
    }
}
