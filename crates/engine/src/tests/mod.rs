//! Tests of the engine with a runner that has no model: see `fake_runner.rs`.

mod allocations;
mod directed;
mod engine_fuzz;
mod fake_runner;
mod fake_tier;
mod handle;
pub(crate) mod support;
