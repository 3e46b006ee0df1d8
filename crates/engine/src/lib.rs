//! SparseServe: engine.
#![forbid(unsafe_code)]
mod model_runner;
mod request;
mod run;
pub use model_runner::ModelRunner;
pub use request::*;
pub use run::Runner;
