//! HTTP: routes, keys, cross-origin rules, log and metrics of requests, shutdown.

mod auth;
mod extract;
mod metrics;
mod observe;
mod routes;
mod serve;

pub use metrics::{HTTP_REQUESTS, HttpMetrics};
pub use routes::router;
pub use serve::{Shutdown, serve, stop_signals};
