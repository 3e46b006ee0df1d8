//! The supported architectures: one file each, listed here.
//!
//! They are all decoders of the same build; a file says in what its own differs.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use crate::Error;
use crate::config::RawConfig;

/// Every architecture. To add one, add a file and a line here.
pub(crate) const ARCHITECTURES: &[Architecture] =
    &[llama::ARCHITECTURE, mistral::ARCHITECTURE, qwen2::ARCHITECTURE, qwen3::ARCHITECTURE];

/// An architecture: its class name in `transformers`, and how it reads a configuration.
pub(crate) struct Architecture {
    pub name: &'static str,
    /// Given the configuration and the number of layers.
    pub variant: fn(&RawConfig, usize) -> Result<Variant, Error>,
}

/// What a configuration makes of an architecture; see `ModelConfig` for the fields.
pub(crate) struct Variant {
    /// `None`: hidden size over heads.
    pub head_dim: Option<u64>,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    pub windows: Vec<Option<usize>>,
}

/// A width of attention, which must be positive.
pub(crate) fn window(width: u64) -> Result<usize, Error> {
    match usize::try_from(width) {
        Ok(width) if width > 0 => Ok(width),
        _ => Err(Error::config(format!("sliding_window {width} is not positive"))),
    }
}

/// `layer_types`, where written: whether each layer attends to a window.
pub(crate) fn layers_with_window(raw: &RawConfig, num_layers: usize) -> Result<Option<Vec<bool>>, Error> {
    let Some(types) = &raw.layer_types else { return Ok(None) };
    if types.len() != num_layers {
        return Err(Error::config(format!(
            "layer_types has {} entries for {num_layers} layers",
            types.len()
        )));
    }
    let sliding = types.iter().map(|t| match t.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(Error::config(format!("layer type {other:?} is not supported"))),
    });
    sliding.collect::<Result<_, _>>().map(Some)
}
