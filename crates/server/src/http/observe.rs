//! Each request in the log and in the metrics: an id, what was asked, what was answered and when.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use crate::app::App;
use crate::openai::ApiError;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What machines ask every few seconds, which would bury the rest of the log.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

/// Bytes of a request id that a client may bring.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Runs the request in a span of its own, logs and counts its status; gives it the id that the client brought, or a new one.
pub async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let brought = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_BYTES_MAX).cloned();
    let id = brought.or_else(new_id).unwrap_or(HeaderValue::from_static("none"));
    // The route, not the path: paths are the client's to invent.
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", |path| path.as_str()).to_owned();
    let is_probe = PROBES.contains(&route.as_str());
    let span = tracing::info_span!("request", id = ?id, method = %request.method(), route = route.as_str());
    let start = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    span.in_scope(|| {
        let (status, ms) = (response.status().as_u16(), start.elapsed().as_secs_f64() * 1e3);
        match is_probe {
            true => tracing::debug!(status, ms, "answered"),
            false => tracing::info!(status, ms, "answered"),
        }
    });
    app.http_metrics.answered(&route, response.status());
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn new_id() -> Option<HeaderValue> {
    let random = getrandom::u64().ok()?;
    HeaderValue::from_str(&format!("{random:016x}")).ok()
}

/// The answer to a request whose handler panicked. The panic itself has been logged with its place.
pub fn answer_panic(panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
    use axum::response::IntoResponse;
    ApiError::panicked(panic.as_ref()).into_response()
}
