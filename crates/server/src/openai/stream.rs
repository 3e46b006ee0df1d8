//! Answers as server-sent events.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::stream::{self, StreamExt, select_all};
use serde_json::Value;

use super::{ApiError, Event, Generation};
use crate::app::{App, InFlight};

/// Turns the events of an answer into the chunks of a stream.
pub trait Chunks: Send + 'static {
    /// Chunks before anything has happened.
    fn first(&mut self) -> Vec<Value>;
    /// Chunks that tell `event` of the choice `index`.
    fn next(&mut self, index: usize, event: Event) -> Vec<Value>;
    /// Chunks after all choices are complete.
    fn last(&mut self) -> Vec<Value>;
}

/// Streams the answers of `generations`, each a choice, as `chunks` dresses them, and `[DONE]` at the end. The client's
/// leaving drops the stream, and with it the generations. A choice that fails ends the stream with an error, a panic too.
pub fn respond(
    app: &Arc<App>,
    generations: Vec<Generation>,
    mut chunks: impl Chunks,
    in_flight: InFlight,
) -> Response {
    let events = generations.into_iter().enumerate().map(|(index, generation)| {
        stream::unfold(generation, move |generation| async move {
            let mut generation = generation;
            let event = AssertUnwindSafe(generation.next()).catch_unwind().await;
            let event = event.unwrap_or_else(|panic| Some(Event::Failed(ApiError::panicked(&*panic))))?;
            Some(((index, event), generation))
        })
        .boxed()
    });
    let first = chunks.first();
    let events = select_all(events).map(Some).chain(stream::iter([None]));
    let rest = events.scan(Some((chunks, in_flight)), |state, event| {
        let Some((chunks, _)) = state else { return std::future::ready(None) };
        // After a panic nothing of it is used but to end it.
        let told = catch_unwind(AssertUnwindSafe(|| match event {
            Some((_, Event::Failed(error))) => Err(error),
            Some((index, event)) => Ok(chunks.next(index, event)),
            None => Ok(chunks.last()),
        }));
        let told = told.unwrap_or_else(|panic| Err(ApiError::panicked(&*panic)));
        let told = told.unwrap_or_else(|error| {
            *state = None;
            vec![error.body()]
        });
        std::future::ready(Some(told))
    });
    let chunks = stream::iter([first]).chain(rest).flat_map(stream::iter);
    let data = chunks.map(|chunk| sse::Event::default().data(chunk.to_string()));
    let done = stream::iter([sse::Event::default().data("[DONE]")]);
    let body = data.chain(done).map(Ok::<_, Infallible>);
    Sse::new(body).keep_alive(KeepAlive::new().interval(app.limits.keep_alive)).into_response()
}

/// Waits for a whole answer.
///
/// # Errors
/// What made it fail.
pub async fn collect(mut generation: Generation) -> Result<Vec<Event>, ApiError> {
    let mut events = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Failed(error) => return Err(error),
            event => events.push(event),
        }
    }
    Ok(events)
}
