//! HTTP: routes, keys, cross-origin rules, observation, shutdown.

mod auth;
mod extract;
mod observe;
mod routes;
mod serve;

pub use routes::router;
pub use serve::{Shutdown, serve, stop_signals};
