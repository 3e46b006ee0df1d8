//! Requests, admission, and the step: everything between a tokenized prompt and its answer, except the model.
//!
//! ```text
//! Handle::submit => Engine::handle -> schedule -> run -> commit -> emit => Sink::send
//! ```
//!
//! * `request.rs`: what is asked and what is answered. `config.rs`: what is refused.
//! * `handle.rs`: the thread around the engine, and how others reach it.
//! * `engine.rs`: the engine itself, without thread, clock or device. `sequence.rs`: a request inside it.
//! * `schedule.rs`, `run.rs`, `commit.rs`, `emit.rs`: the four verbs of a step. `rows.rs`: what they pass on.
//! * `shares.rs`: who may hold how much of the HBM tier. `digest_room.rs`: for whose digests it has room.
//! * `guard.rs`: whether selections cover enough, and what follows.
//! * `kinds.rs`: which answers may go on from each other's KV.
//! * `model_runner.rs`: the runner of a server, a model on a device. `metrics.rs`, `metric_docs.rs`: what is counted.
//!
//! Invariant: the answer to a request depends on the request alone, never on what else runs, on preemption, or on how
//! its prompt was cut. One that asks for it ([`Request::reuse`]) goes on from KV of earlier answers, and depends on that, too.
//!
//! Invariant: from schedule to commit nothing is allocated.
//!
//! Invariant: a request fails alone, by [`Update::Failed`]. A panic in a step is a broken invariant: another user's
//! tokens could leak, so the process stops with a dump.
#![forbid(unsafe_code)]

mod admit;
mod commit;
mod config;
mod digest_room;
mod emit;
mod engine;
mod flights;
mod guard;
mod handle;
mod kinds;
mod metric_docs;
mod metrics;
mod model_runner;
mod request;
mod rows;
mod run;
mod schedule;
mod sequence;
mod shares;
mod turns;

#[cfg(test)]
mod tests;

pub use config::{Admission, Config, ConfigError, Prefill, Segments, TierShare};
pub use engine::{Engine, Event};
pub use guard::{DOUBLINGS_MAX, GuardAction, GuardRule};
pub use handle::{Handle, OnBroken, abort_process, spawn};
pub use metric_docs::{METRICS, MetricDoc, MetricKind};
pub use metrics::Metrics;
pub use model_runner::ModelRunner;
pub use request::*;
pub use run::Runner;
pub use schedule::REPLAY_ROWS;
pub use sequence::Submission;
