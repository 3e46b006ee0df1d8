//! Qwen 2 and 2.5 (Yang et al. 2024): biases on q, k and v, and a window in the upper layers where it is switched on.

use super::{Architecture, Variant, layers_with_window, window};
use crate::Error;
use crate::config::RawConfig;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    variant: |raw, num_layers| {
        Ok(Variant {
            head_dim: raw.head_dim,
            qkv_bias: true,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: windows(raw, num_layers)?,
        })
    },
};

/// Where left out.
const SLIDING_WINDOW_DEFAULT: Option<u64> = Some(4096);
const MAX_WINDOW_LAYERS_DEFAULT: u64 = 28;

/// `use_sliding_window` decides whether there are windows, `layer_types` which layers have them; where it is not
/// written, those from `max_window_layers` on. Qwen 3 has the same rule.
pub(super) fn windows(raw: &RawConfig, num_layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let width = if raw.use_sliding_window.unwrap_or(false) {
        raw.sliding_window.unwrap_or(SLIDING_WINDOW_DEFAULT).map(window).transpose()?
    } else {
        None
    };
    let sliding = match layers_with_window(raw, num_layers)? {
        Some(layers) => layers,
        None => {
            let first = raw.max_window_layers.unwrap_or(MAX_WINDOW_LAYERS_DEFAULT);
            (0..num_layers as u64).map(|layer| layer >= first && width.is_some()).collect()
        }
    };
    if width.is_none() && sliding.contains(&true) {
        return Err(Error::config("layer_types has sliding layers, but there is no sliding window"));
    }
    Ok(sliding.iter().map(|&sliding| if sliding { width } else { None }).collect())
}
