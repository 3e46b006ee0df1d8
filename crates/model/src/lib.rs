//! Models: the configuration and weights of a checkpoint, the architectures, and the loop over the layers.
//!
//! In the order in which they are used: a [`Source`] holds the files of a checkpoint, [`ModelConfig`] is what its
//! `config.json` says after everything in it was checked, a [`Checkpoint`] finds tensors, [`Model::load`] packs them
//! for a backend, and [`Model::forward`] runs a step.
//!
//! Invariant: whatever the files of a checkpoint hold, reading them ends in a model or in an [`Error`] of one line.
//! Nothing here panics because of them, and no allocation is larger than the files justify.
#![deny(unsafe_code)]

mod arch;
mod checkpoint;
mod config;
mod decoder;
mod device_kv;
mod error;
mod gate;
mod load;
mod mmap;
mod plan;
mod rope;
mod segments;
mod source;
mod warm;
mod weights;
mod workspace;

pub use checkpoint::{Checkpoint, TensorData};
pub use config::ModelConfig;
pub use decoder::Model;
pub use device_kv::{DeviceKv, KvSpec};
pub use error::Error;
pub use gate::{GateModel, gate_of, read_gate};
pub use load::dtype_on_disk;
pub use plan::{kv_geometry, num_parameters, weight_bytes};
pub use rope::{Rope, RopeConfig, RopeScaling};
pub use source::Source;
pub use workspace::{Limits, Workspace};

/// Class names of the supported architectures, as `config.json` spells them.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    arch::ARCHITECTURES.iter().map(|a| a.name)
}
