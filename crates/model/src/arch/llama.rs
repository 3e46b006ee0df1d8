//! Llama 2, 3, 3.1 and later, and the many models of their build (Touvron et al. 2023, Grattafiori et al. 2024).

use super::{Architecture, Variant, layers_with_window};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "LlamaForCausalLM",
    variant: |raw, num_layers| {
        if layers_with_window(raw, num_layers)?.is_some_and(|layers| layers.contains(&true)) {
            return Err(crate::Error::config("sliding layers are not part of LlamaForCausalLM"));
        }
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(Variant {
            head_dim: raw.head_dim,
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            qk_norm: false,
            windows: vec![None; num_layers],
        })
    },
};
