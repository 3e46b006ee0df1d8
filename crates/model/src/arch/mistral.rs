//! Mistral 7B and its successors (Jiang et al. 2023): a window over the last tokens in every layer, or none.

use super::{Architecture, Variant, layers_with_window, window};

/// Where `sliding_window` is left out; newer models write null.
const SLIDING_WINDOW_DEFAULT: Option<u64> = Some(4096);

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "MistralForCausalLM",
    variant: |raw, num_layers| {
        let width = raw.sliding_window.unwrap_or(SLIDING_WINDOW_DEFAULT).map(window).transpose()?;
        if let Some(layers) = layers_with_window(raw, num_layers)?
            && layers.iter().any(|&sliding| sliding != width.is_some())
        {
            return Err(crate::Error::config(
                "layer_types that differ by layer are not part of MistralForCausalLM",
            ));
        }
        Ok(Variant {
            head_dim: raw.head_dim,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![width; num_layers],
        })
    },
};
