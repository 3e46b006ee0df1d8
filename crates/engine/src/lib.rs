//! SparseServe: engine.
#![forbid(unsafe_code)]
mod request;
mod run;
pub use request::*;
pub use run::Runner;
