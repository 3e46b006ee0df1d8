use serde_json::json;

use super::*;
use crate::RopeScaling;

/// A small valid configuration of `architecture` with the keys of `overrides`; null removes one.
fn parse(architecture: &str, overrides: Value) -> Result<ModelConfig, Error> {
    let mut json = json!({
        "architectures": [architecture], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
        "hidden_act": "silu", "rms_norm_eps": 1e-5,
    });
    let map = json.as_object_mut().unwrap();
    for (key, value) in overrides.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    ModelConfig::parse(json.to_string().as_bytes())
}

fn llama(overrides: Value) -> ModelConfig {
    parse("LlamaForCausalLM", overrides).unwrap()
}

/// Asserts that a Llama configuration with these keys is refused with this message, after `config.json: `.
fn refused(overrides: Value, message: &str) {
    let error = parse("LlamaForCausalLM", overrides).unwrap_err().to_string();
    assert_eq!(error.strip_prefix("config.json: "), Some(message));
}

#[test]
fn both_generations_of_transformers_agree() {
    let scaling = json!({"type": "linear", "factor": 2.0});
    let older = llama(json!({"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "float32"}));
    let parameters = json!({"rope_type": "linear", "rope_theta": 500000, "factor": 2});
    let newer = llama(json!({"rope_parameters": parameters, "dtype": "float32", "head_dim": 32}));
    assert_eq!(older, newer);
    assert_eq!(older.rope.theta, 5e5);
    assert_eq!(older.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(llama(json!({"rope_scaling": null})).rope.theta, 1e4);
    assert_eq!((older.context_limit(), llama(json!({})).context_limit()), (128, 64));
}

#[test]
fn heads() {
    assert_eq!(llama(json!({})).heads, HeadShape { q_heads: 4, kv_heads: 2, head_dim: 32 });
    assert_eq!(llama(json!({"num_key_value_heads": null})).heads.kv_heads, 4);
    assert_eq!(llama(json!({"head_dim": 64})).heads.head_dim, 64);
    let qwen3 = parse("Qwen3ForCausalLM", json!({})).unwrap();
    assert_eq!((qwen3.heads.head_dim, qwen3.qk_norm), (128, true));
    refused(
        json!({"num_key_value_heads": 3}),
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    );
    refused(json!({"num_key_value_heads": 0}), "num_key_value_heads 0 is not in 1..=1024");
    refused(json!({"head_dim": 33}), "head_dim 33 is odd");
    refused(json!({"head_dim": 258}), "head_dim 258 is not in 32..=256");
    refused(
        json!({"num_attention_heads": 3, "num_key_value_heads": 1}),
        "hidden_size 128 is not a multiple of num_attention_heads 3, and there is no head_dim",
    );
}

#[test]
fn end_tokens() {
    assert_eq!(llama(json!({"eos_token_id": 7})).eos_token_ids, [7]);
    assert_eq!(llama(json!({"eos_token_id": [9, 7, 9]})).eos_token_ids, [7, 9]);
    assert!(llama(json!({"eos_token_id": null})).eos_token_ids.is_empty());
    refused(json!({"eos_token_id": [1, 100]}), "eos_token_id 100 is outside of the vocabulary of 100 tokens");

    let files: &[(&str, &[u8])] = &[
        (
            "config.json",
            br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 8, "vocab_size": 50,
                "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 9, "eos_token_id": 3}"#,
        ),
        ("generation_config.json", br#"{"eos_token_id": [40, 3], "temperature": 0.6}"#),
    ];
    let config = ModelConfig::read(&Source::Embedded(Vec::leak(files.to_vec()))).unwrap();
    assert_eq!(config.eos_token_ids, [3, 40]);
}

#[test]
fn windows() {
    let of = |architecture, overrides| parse(architecture, overrides).unwrap().windows;
    let mistral = "MistralForCausalLM";
    assert_eq!(of(mistral, json!({"sliding_window": 48})), [Some(48); 3]);
    assert_eq!(of(mistral, json!({"sliding_window": null})), [None; 3]);
    assert_eq!(of(mistral, json!({})), [Some(4096); 3], "left out is not null");
    for qwen in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        assert_eq!(of(qwen, json!({"sliding_window": 48, "max_window_layers": 0})), [None; 3]);
        let on = json!({"sliding_window": 48, "max_window_layers": 1, "use_sliding_window": true});
        assert_eq!(of(qwen, on), [None, Some(48), Some(48)]);
        let types = json!({
            "sliding_window": 48, "use_sliding_window": true,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        });
        assert_eq!(of(qwen, types), [Some(48), None, Some(48)]);
    }
    let error = |overrides| parse("Qwen2ForCausalLM", overrides).unwrap_err().to_string();
    let unknown = error(json!({"layer_types": ["full_attention", "linear_attention", "full_attention"]}));
    assert_eq!(unknown, "config.json: layer type \"linear_attention\" is not supported");
    let short = error(json!({"layer_types": ["full_attention"]}));
    assert_eq!(short, "config.json: layer_types has 1 entries for 3 layers");
    let zero = error(json!({"use_sliding_window": true, "sliding_window": 0}));
    assert_eq!(zero, "config.json: sliding_window 0 is not positive");
}

#[test]
fn biases() {
    let of = |architecture, overrides| {
        let c = parse(architecture, overrides).unwrap();
        (c.qkv_bias, c.output_bias, c.mlp_bias)
    };
    let on = || json!({"attention_bias": true, "mlp_bias": true});
    assert_eq!(of("LlamaForCausalLM", json!({})), (false, false, false));
    assert_eq!(of("LlamaForCausalLM", on()), (true, true, true));
    assert_eq!(of("MistralForCausalLM", json!({})), (false, false, false));
    assert_eq!(of("Qwen2ForCausalLM", json!({})), (true, false, false));
    assert_eq!(of("Qwen3ForCausalLM", on()), (true, true, false));
}

#[test]
fn yarn_defaults() {
    let yarn = |parameters: Value| {
        let mut all = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
        all.as_object_mut().unwrap().extend(parameters.as_object().unwrap().clone());
        llama(json!({"rope_scaling": all})).rope
    };
    let rope = yarn(json!({}));
    assert_eq!(rope.context_limit(), 64);
    let RopeScaling::Yarn { attention_factor, beta_fast, beta_slow, truncate, .. } = rope.scaling else {
        panic!()
    };
    assert_eq!((beta_fast, beta_slow, truncate), (32.0, 1.0, true));
    assert_eq!(attention_factor, 0.1 * 4f64.ln() + 1.0);
    let RopeScaling::Yarn { factor, .. } = yarn(json!({"factor": null})).scaling else { panic!() };
    assert_eq!(factor, 4.0, "64 positions over 16");
}

#[test]
fn unsupported_options_are_named() {
    let error = parse("GPT2LMHeadModel", json!({})).unwrap_err().to_string();
    assert_eq!(
        error,
        "config.json: architecture \"GPT2LMHeadModel\" is not supported; supported are LlamaForCausalLM, \
         MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    );
    refused(json!({"hidden_act": "gelu"}), "hidden_act \"gelu\" is not supported, only \"silu\"");
    refused(json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping = 50.0 is not supported");
    refused(json!({"quantization_config": {"bits": 4}}), "quantization_config is not supported");
    refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5 is not supported, only 1");
    refused(
        json!({"rope_scaling": {"rope_type": "longrope"}}),
        "rope_type \"longrope\" is not supported; supported are default, linear, dynamic, llama3, yarn",
    );
    refused(
        json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        "rope_parameters that differ by layer type are not supported",
    );
    llama(json!({"partial_rotary_factor": 1.0, "logits_scaling": 1.0, "attn_logit_softcapping": null}));
}

#[test]
fn numbers_are_bounded() {
    refused(json!({"hidden_size": null}), "hidden_size is missing");
    refused(json!({"num_hidden_layers": 0}), "num_hidden_layers 0 is not in 1..=1024");
    refused(json!({"vocab_size": u64::MAX}), "vocab_size 18446744073709551615 is not in 1..=4194304");
    refused(json!({"rms_norm_eps": 0.0}), "rms_norm_eps 0 is not between 0 and 1");
    refused(json!({"rope_theta": 1.0}), "rope_theta 1 is not between 1 and 1000000000000000");
    refused(json!({"rope_scaling": {"type": "linear"}}), "the RoPE scaling lacks factor");
    refused(
        json!({"rope_scaling": {"type": "dynamic", "factor": -2.0}}),
        "factor -2 is not between 0 and 1000000",
    );
    refused(
        json!({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}),
        "high_freq_factor 4 is not above low_freq_factor 4",
    );
    for malformed in [json!({"hidden_size": -1}), json!({"hidden_size": "8"}), json!({"head_dim": 1.5})] {
        let error = parse("LlamaForCausalLM", malformed).unwrap_err().to_string();
        assert!(error.starts_with("config.json: invalid "), "{error}");
    }
}
