//! The routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
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
    let routes = Router::new()
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
        .route("/detokenize", post(openai::detokenize));
    #[cfg(test)]
    let routes = tests::add_faulty(routes);
    routes
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "There is nothing at this path.") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "This path does not take this method.")
        })
        // From the inside out: a panic is answered, a key is asked for, a browser is told the rules, all is logged.
        .layer(CatchPanicLayer::custom(observe::answer_panic))
        .layer(DefaultBodyLimit::max(app.limits.body_bytes))
        .layer(from_fn_with_state(Arc::clone(&app), auth::require_key))
        .layer(cors(&app.cors_origins))
        .layer(from_fn_with_state(Arc::clone(&app), observe::observe))
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
    use std::convert::Infallible;
    use std::time::Duration;

    use engine::{Config, Metrics, Runner};
    use ops::Step;
    use ops::coverage::Inspections;
    use ops::sample::{SampleOutput, SampleRow};
    use serde_json::Value;
    use tokio::sync::{Semaphore, mpsc};

    use super::*;
    use crate::app::{GenerationDefaults, InFlight, Lifecycle, Limits};
    use crate::http::{HttpMetrics, Shutdown, serve};
    use crate::openai::{Chunks, Event, Fields, Generation, Params, respond};
    use crate::text::tests::demo;

    /// Routes that fail, among the real ones.
    pub fn add_faulty(router: Router<Arc<App>>) -> Router<Arc<App>> {
        router.route("/faulty", get(faulty)).route("/faulty-stream", get(faulty_stream))
    }

    async fn faulty() {
        panic!("on purpose");
    }

    async fn faulty_stream(State(app): State<Arc<App>>, in_flight: InFlight) -> Result<Response, ApiError> {
        let params = Params::take(&mut Fields::parse(b"{}")?, &app)?;
        let generation = Generation::empty(&app, &params, &[1]);
        Ok(respond(&app, vec![generation], Faulty, in_flight))
    }

    struct Faulty;

    impl Chunks for Faulty {
        fn first(&mut self) -> Vec<Value> {
            vec![json!("first")]
        }

        fn next(&mut self, _: usize, _: Event) -> Vec<Value> {
            panic!("on purpose");
        }

        fn last(&mut self) -> Vec<Value> {
            vec![json!("last")]
        }
    }

    /// Nothing is asked of it.
    struct Idle;

    impl Runner for Idle {
        fn run(&mut self, _: &Step, _: &[SampleRow], _: &mut Inspections, _: &mut SampleOutput) {}
    }

    fn app() -> Arc<App> {
        let config = Config {
            max_num_seqs: 1,
            max_inject_tokens: 1,
            max_waiting: 1,
            max_context: 16,
            max_logprobs: 0,
            vocab_size: 856,
            page_tokens: 16,
            num_blocks: 1,
            prefix_cache: false,
            tier: None,
            prefix_limit: None,
            prefill: engine::Prefill::Chunked,
            admission: engine::Admission::Slots,
            max_skips: 16,
            guard: None,
            shared_together: 16,
        };
        let registry = prometheus::Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let runner = || Ok::<_, Infallible>(Idle);
        let (engine, _) = engine::spawn(config, metrics, engine::abort_process(), runner).unwrap();
        let limits = Limits::default();
        Arc::new(App {
            engine,
            http_metrics: HttpMetrics::new(&registry).unwrap(),
            registry,
            tokenizer: demo(),
            template: None,
            names: vec!["idle".into()],
            max_context: 16,
            vocab_size: 856,
            defaults: GenerationDefaults::default(),
            hbm_page_bytes: None,
            policies: sparse::Served::dense(),
            budget: sparse::Budget::Tokens(1024),
            reuses_answers: false,
            body_memory: limits.body_memory(),
            limits,
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            created: 1,
            lifecycle: Arc::new(Lifecycle::default()),
            text_workers: Semaphore::new(1),
        })
    }

    #[tokio::test]
    async fn a_panic_costs_its_request_only() {
        let app = app();
        while !app.engine.is_ready() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, signals) = mpsc::unbounded_channel();
        let shutdown = Shutdown { signals, drain_timeout: Duration::from_secs(20) };
        let served = tokio::spawn(serve(Arc::clone(&app), listener, shutdown));
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap();
        for _ in 0..2 {
            let response = client.get(format!("{url}/faulty")).send().await.unwrap();
            assert_eq!(response.status(), 500);
            assert!(response.headers().contains_key("x-request-id"), "it went the way of all requests");
            let error: Value = response.json().await.unwrap();
            assert_eq!(error["error"]["type"], "server_error");
            assert!(!error.to_string().contains("on purpose"), "what went wrong inside stays inside");

            let response = client.get(format!("{url}/faulty-stream")).send().await.unwrap();
            assert_eq!(response.status(), 200, "it fails later");
            let text = response.text().await.unwrap();
            let data: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
            assert_eq!((data.len(), data[0], data[2]), (3, "data: \"first\"", "data: [DONE]"), "{text}");
            let error: Value = serde_json::from_str(data[1].trim_start_matches("data: ")).unwrap();
            assert_eq!(error["error"]["type"], "server_error");
            assert!(!text.contains("on purpose"));
            assert_eq!(client.get(format!("{url}/health")).send().await.unwrap().status(), 200);
        }
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
        assert_eq!(app.lifecycle.in_flight(), 0);
    }
}
