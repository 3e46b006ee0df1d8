//! Errors as OpenAI's API reports them.

use std::any::Any;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::Refusal;
use serde_json::{Value, json};

use crate::text::{TemplateError, TokenizerError, panic_message};

/// Seconds after which a refused client should try again.
const RETRY_AFTER_SECONDS: u32 = 1;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong, for the client's user.
    pub message: String,
    /// The parameter that is to blame.
    pub param: Option<String>,
    /// For programs: `model_not_found`, `context_length_exceeded`, ...
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error about no parameter in particular.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: None }
    }

    /// 400: `param` has a value that is out of range or not supported.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 422: `param` has a value of the wrong type.
    pub fn mistyped(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, message) }
    }

    /// 400: prompt and answer do not fit the context.
    pub fn too_long(param: &str, message: String) -> Self {
        ApiError { code: Some("context_length_exceeded"), ..ApiError::invalid(param, message) }
    }

    /// 400: the tokenizer gave up on the text of `param`, or found it too long.
    pub fn untokenizable(param: &str, error: &TokenizerError) -> Self {
        match error {
            TokenizerError::TooLong(max_context) => ApiError::too_long(
                param,
                format!(
                    "This model's maximum context length is {max_context} tokens. However, your text has far more. \
                     Please reduce it."
                ),
            ),
            _ => ApiError::invalid(param, error.to_string()),
        }
    }

    /// 404: no such model.
    pub fn no_such_model(name: &str) -> Self {
        ApiError {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..ApiError::new(StatusCode::NOT_FOUND, format!("The model `{name}` does not exist"))
        }
    }

    /// 503: not ready yet, or shutting down.
    pub fn unavailable(message: &str) -> Self {
        ApiError { code: Some("unavailable"), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 500: what answers the request panicked, which is logged.
    pub fn panicked(panic: &(dyn Any + Send)) -> Self {
        tracing::error!(panic = panic_message(panic), "a request panicked");
        ApiError::internal("The server failed on this request; it is logged.")
    }

    /// The `type` that OpenAI's clients switch on.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::QueueFull { .. } => ApiError {
                code: Some("rate_limit_exceeded"),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            Refusal::NeverFits(_) => ApiError {
                code: Some("context_length_exceeded"),
                ..ApiError::new(StatusCode::BAD_REQUEST, message)
            },
            Refusal::Invalid(_) => ApiError::new(StatusCode::BAD_REQUEST, message),
            Refusal::ShuttingDown => ApiError::unavailable(&message),
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, error.to_string())
    }
}

impl From<TemplateError> for ApiError {
    /// The client chose the messages and the operator the template; only the template's own refusal certainly concerns
    /// the client, yet none of these is a fault of the server.
    fn from(error: TemplateError) -> Self {
        ApiError::invalid("messages", error.to_string())
    }
}
