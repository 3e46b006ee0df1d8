//! The kernel contract: what a device must be able to do for SparseServe.
//!
//! A [`Backend`] owns activations, packed weights and the pages of the KV cache, and runs the operations of one
//! step over a [`Batch`]. Everything above this crate is written against the trait; the device is chosen once, in
//! the binary.
//!
//! * [`reference`](mod@reference) implements the contract in scalar f32, straight from the formulas: the oracle.
//! * [`conformance`] compares any backend with it on random inputs, with written tolerances.
//!
//! Invariant: this crate knows no thread, clock, socket or device, and holds no `unsafe`.
#![forbid(unsafe_code)]

mod backend;
mod batch;
pub mod cluster;
pub mod conformance;
pub mod coverage;
mod digest;
mod dtype;
pub mod fp8;
mod gate;
mod page;
pub mod places;
mod random;
pub mod reference;
pub mod residency;
pub mod sample;
pub mod sparse;
pub mod tally;
pub mod tier;

pub use backend::{Backend, DeviceInfo, Error, Tensor, WeightView};
pub use batch::{Batch, Segment, SequenceRows, SparseRow, Step};
pub use dtype::DType;
pub use gate::Gate;
pub use page::{BlockIndex, HeadShape, KvGeometry, PAGE_TOKENS_ALLOWED, SPLIT_TOKENS};
pub use random::Random;
pub use residency::SeatIndex;
