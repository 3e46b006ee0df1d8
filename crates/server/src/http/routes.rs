//! The routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use prometheus::TextEncoder;
use serde_json::json;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use super::{auth, observe};
use crate::app::App;
use crate::openai::{self, ApiError};

/// Everything the server answers.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(root))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*name}", get(openai::model))
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/v1/completions", post(openai::completions))
        .route("/tokenize", post(openai::tokenize))
        .route("/detokenize", post(openai::detokenize))
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "There is nothing at this path.") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "This path does not take this method.")
        })
        // From the inside out: a panic is answered, a key is asked for, a browser is told the rules, all is logged.
        .layer(CatchPanicLayer::custom(observe::answer_panic))
        .layer(DefaultBodyLimit::max(app.limits.body_bytes))
        .layer(from_fn_with_state(Arc::clone(&app), auth::require_key))
        .layer(cors(&app.cors_origins))
        .layer(from_fn(observe::observe))
        .with_state(app)
}

/// Without origins no header is sent, so browsers keep pages of other origins away.
fn cors(origins: &[String]) -> CorsLayer {
    if origins.is_empty() {
        return CorsLayer::new();
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods(Any)
        // Keys come in a header that pages must name anyway; official clients add a dozen of their own.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(Any)
}

async fn root(State(app): State<Arc<App>>) -> String {
    format!(
        "SparseServe {} serves {}.\n\n\
         POST /v1/chat/completions   POST /v1/completions   GET /v1/models\n\
         POST /tokenize              POST /detokenize\n\
         GET  /health   GET /ready   GET /metrics   GET /version\n",
        env!("CARGO_PKG_VERSION"),
        app.names[0],
    )
}

/// 200 while the process lives.
async fn health() -> &'static str {
    "ok\n"
}

/// 200 while requests are taken in.
async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    if app.lifecycle.is_draining() {
        return Err(ApiError::unavailable("The server is shutting down."));
    }
    if !app.engine.is_ready() {
        return Err(ApiError::unavailable("The model is not ready."));
    }
    Ok("ready\n")
}

async fn version() -> Response {
    axum::Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

/// In Prometheus's text format.
async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = TextEncoder::new().encode_to_string(&app.registry.gather());
    let text = text.map_err(|e| ApiError::internal(format!("metrics: {e}")))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn faulty() {
        panic!("on purpose");
    }

    #[tokio::test]
    async fn a_panic_costs_its_request_only() {
        let routes = Router::new().route("/faulty", get(faulty)).route("/health", get(health));
        let router: Router = routes.layer(CatchPanicLayer::custom(observe::answer_panic));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, router).into_future());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        for _ in 0..2 {
            let response = client.get(format!("{url}/faulty")).send().await.unwrap();
            assert_eq!(response.status(), 500);
            let error: serde_json::Value = response.json().await.unwrap();
            assert_eq!(error["error"]["type"], "server_error");
            assert!(!error.to_string().contains("on purpose"), "what went wrong inside stays inside");
            assert_eq!(client.get(format!("{url}/health")).send().await.unwrap().status(), 200);
        }
    }
}
