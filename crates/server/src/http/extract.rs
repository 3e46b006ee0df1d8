//! What routes take out of a request.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};

use crate::app::{App, InFlight};
use crate::openai::{ApiError, Fields};

impl FromRequest<Arc<App>> for Fields {
    type Rejection = ApiError;

    /// The body as a JSON object, within the limits of size and time.
    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        if !may_be_json(request.headers()) {
            let message = "The Content-Type must be application/json.";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let body = Bytes::from_request(request, app);
        let body = match tokio::time::timeout(Duration::from_secs(app.limits.body_seconds), body).await {
            Ok(Ok(body)) => body,
            Ok(Err(rejection)) => return Err(ApiError::new(rejection.status(), rejection.body_text())),
            Err(_) => {
                let message = "The body of the request did not arrive in time.";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        app.text_work(body.len(), move || Fields::parse(&body)).await
    }
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
