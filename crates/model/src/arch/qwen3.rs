//! Qwen 3 (Yang et al. 2025): RMS norm of every head of q and k, and heads of their own width.

use super::qwen2::windows;
use super::{Architecture, Variant};

/// Where left out.
const HEAD_DIM_DEFAULT: u64 = 128;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    variant: |raw, num_layers| {
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(Variant {
            head_dim: Some(raw.head_dim.unwrap_or(HEAD_DIM_DEFAULT)),
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: false,
            qk_norm: true,
            windows: windows(raw, num_layers)?,
        })
    },
};
