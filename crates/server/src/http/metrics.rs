//! What the server counts beside the engine, which never sees a request that is refused for its form.

use axum::http::StatusCode;
use engine::{MetricDoc, MetricKind};
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Routes as the router knows them; the last stands for all paths that it does not.
const ROUTES: [&str; 12] = [
    "/",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/v1/models",
    "/v1/models/{*name}",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "unknown",
];
const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// Answers by route and class of status.
pub const HTTP_REQUESTS: MetricDoc = MetricDoc {
    name: "sparseserve_http_requests_total",
    kind: MetricKind::Counter,
    labels: &[("route", &ROUTES), ("status", &CLASSES)],
    help: "HTTP requests by route and class of the answer's status.",
};

/// The metrics of the routes. Updating them neither blocks nor allocates.
#[derive(Debug)]
pub struct HttpMetrics {
    /// By route, then by class.
    requests: [[IntCounter; 4]; 12],
}

impl HttpMetrics {
    /// Registers [`HTTP_REQUESTS`].
    ///
    /// # Errors
    /// When `registry` has it already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let labels: Vec<&str> = HTTP_REQUESTS.labels.iter().map(|label| label.0).collect();
        let metric = IntCounterVec::new(Opts::new(HTTP_REQUESTS.name, HTTP_REQUESTS.help), &labels)?;
        registry.register(Box::new(metric.clone()))?;
        let requests = ROUTES.map(|route| CLASSES.map(|class| metric.with_label_values(&[route, class])));
        Ok(HttpMetrics { requests })
    }

    /// Counts an answer to a request of `route`.
    pub fn answered(&self, route: &str, status: StatusCode) {
        let route = ROUTES.iter().position(|&known| known == route).unwrap_or(ROUTES.len() - 1);
        // 2 to 5: there are no answers of class 1.
        let class = usize::from(status.as_u16() / 100).clamp(2, 5) - 2;
        self.requests[route][class].inc();
    }
}
