//! What routes take out of a request.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;

use crate::app::{App, InFlight};
use crate::openai::{ApiError, Fields};

/// Bytes of a body beyond the limit that are read all the same, and the time for it.
const DISCARDED_BYTES_MAX: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

impl FromRequest<Arc<App>> for Fields {
    type Rejection = ApiError;

    /// The body as a JSON object, within the limits of size and time.
    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        if !may_be_json(request.headers()) {
            let message = "The Content-Type must be application/json.";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let most = app.limits.body_bytes;
        let length = content_length(request.headers());
        if length.is_some_and(|length| length > most) {
            if !request.headers().contains_key(header::EXPECT) {
                // A failure to write would keep the client from reading why.
                let _ = tokio::time::timeout(DISCARD_TIME, discard(request, DISCARDED_BYTES_MAX)).await;
            }
            let message = format!("The body has more than {most} bytes.");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        let body = async {
            // Who does not say how much will come may send as much as anybody.
            let memory = app.reserve_body(length.unwrap_or(most)).await;
            Bytes::from_request(request, app).await.map(|body| (body, memory))
        };
        let (body, memory) = match tokio::time::timeout(app.limits.body_time, body).await {
            Ok(Ok(arrived)) => arrived,
            Ok(Err(rejection)) => return Err(ApiError::new(rejection.status(), rejection.body_text())),
            Err(_) => {
                let message = "The body of the request did not arrive in time.";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        // Not among the text workers: what is refused for its length must not wait for what is tokenized.
        let parsed = match memory {
            None => Fields::parse(&body),
            Some(_) => match tokio::task::spawn_blocking(move || Fields::parse(&body)).await {
                Ok(parsed) => parsed,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        };
        parsed.map(|fields| fields.in_memory(memory))
    }
}

/// Reads what a client sends in vain, but not for ever.
async fn discard(request: Request, mut bytes_left: usize) {
    let mut body = request.into_body().into_data_stream();
    while let Some(Ok(chunk)) = body.next().await {
        match bytes_left.checked_sub(chunk.len()) {
            Some(left) => bytes_left = left,
            None => return,
        }
    }
}

/// Bytes of the body, if the request says.
fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether the body claims to be JSON, or claims nothing.
fn may_be_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return true };
    let media_type = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("application/json")
}

impl FromRequestParts<Arc<App>> for InFlight {
    type Rejection = ApiError;

    /// Takes the request in, unless the server is starting or shutting down.
    async fn from_request_parts(_: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let shutting_down = || ApiError::unavailable("The server is shutting down.");
        let guard = app.lifecycle.enter().ok_or_else(shutting_down)?;
        if !app.engine.is_ready() {
            return Err(ApiError::unavailable("The model is not ready."));
        }
        Ok(guard)
    }
}
