//! Checkpoints that are broken on purpose, by hand and at random: always an error of one line, or a model.

use std::fs;
use std::path::Path;

use ops::reference::Reference;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::{Value, json};
use sparseserve_model::{Model, ModelConfig, Source};

/// Another one tries other faults.
const SEED: u64 = 7;
const HIDDEN: usize = 32;

fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "vocab_size": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": true, "eos_token_id": [1, 2], "bos_token_id": 0, "attention_bias": false,
        "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0,
            "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": false},
    })
}

/// Names and shapes of the tensors of [`config`].
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![4, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
    ];
    for layer in 0..2 {
        let own = [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![64, HIDDEN]),
            ("self_attn.k_proj", vec![32, HIDDEN]),
            ("self_attn.v_proj", vec![32, HIDDEN]),
            ("self_attn.q_norm", vec![32]),
            ("self_attn.k_norm", vec![32]),
            ("self_attn.o_proj", vec![HIDDEN, 64]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![8, HIDDEN]),
            ("mlp.up_proj", vec![8, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, 8]),
        ];
        tensors.extend(own.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    tensors
}

/// A safetensors file of zeros.
fn safetensors(tensors: &[(String, Vec<usize>)], dtype: &str) -> Vec<u8> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * if dtype == "F32" { 4 } else { 2 };
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

fn write(dir: &Path, config: &[u8], weights: &[u8]) {
    fs::write(dir.join("config.json"), config).unwrap();
    fs::write(dir.join("model.safetensors"), weights).unwrap();
}

/// Loads `dir`; an error as its line.
fn load(dir: &Path) -> Result<(), String> {
    let mut read = (0, 0);
    let mut progress = |done, total| {
        assert!(done > read.0 && done <= total, "progress goes forward");
        read = (done, total);
    };
    let model = Model::load(&mut Reference::default(), &Source::Directory(dir.into()), None, &mut progress);
    match model {
        Ok(_) => {
            assert_eq!(read.0, read.1, "progress reaches the end");
            Ok(())
        }
        Err(e) => {
            let line = e.to_string();
            assert!(!line.chars().any(char::is_control) && line.chars().count() < 800, "one line: {line:?}");
            Err(line)
        }
    }
}

/// The error of loading a checkpoint with these tensors.
fn error(tensors: &[(String, Vec<usize>)], dtype: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config().to_string().as_bytes(), &safetensors(tensors, dtype));
    load(dir.path()).unwrap_err()
}

#[test]
fn the_untouched_checkpoint_loads() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in ["F32", "BF16", "F16"] {
        write(dir.path(), config().to_string().as_bytes(), &safetensors(&tensors(), dtype));
        load(dir.path()).unwrap();
    }
}

#[test]
fn faults_name_the_tensor() {
    let mut missing = tensors();
    missing.remove(5);
    assert_eq!(error(&missing, "F32"), "tensor model.layers.0.self_attn.v_proj.weight is missing");

    let mut reshaped = tensors();
    reshaped[5].1 = vec![32, 16];
    assert_eq!(
        error(&reshaped, "F32"),
        "tensor model.layers.0.self_attn.v_proj.weight has shape [32, 16], but config.json asks for [32, 32]"
    );
    let mut flat = tensors();
    flat[1].1 = vec![1, HIDDEN];
    assert_eq!(
        error(&flat, "F32"),
        "tensor model.norm.weight has shape [1, 32], but config.json asks for [32]"
    );

    let dtype = error(&tensors(), "I16");
    assert_eq!(dtype, "tensor model.embed_tokens.weight has dtype I16, expected F32, F16 or BF16");

    let mut more = tensors();
    more.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![16])); // as older models have it
    more.push(("lm_head.weight".into(), vec![4, HIDDEN])); // tied
    more.push(("model.layers.1.self_attn.k_proj.bias".into(), vec![32]));
    assert_eq!(
        error(&more, "F32"),
        "tensor model.layers.1.self_attn.k_proj.bias is not one of Qwen3ForCausalLM's: is the checkpoint quantized \
         or of another model?"
    );
}

#[test]
fn a_configuration_may_ask_for_much_but_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut huge = config();
    for (key, value) in [
        ("hidden_size", 1 << 17),
        ("intermediate_size", 1 << 20),
        ("num_hidden_layers", 1 << 10),
        ("num_attention_heads", 1 << 10),
        ("vocab_size", 1 << 22),
    ] {
        huge[key] = json!(value);
    }
    huge["layer_types"] = Value::Null;
    write(dir.path(), huge.to_string().as_bytes(), &safetensors(&tensors(), "F32"));
    let error = load(dir.path()).unwrap_err();
    assert!(error.contains("model.embed_tokens.weight has shape [4, 32]"), "{error}");
}

/// A value that a configuration might hold by mistake or malice.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..600).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2.0..2.0).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        prop_oneof![Just("linear"), Just("dynamic"), Just("llama3"), Just("yarn")].prop_map(Value::from),
        prop::collection::vec(any::<u32>().prop_map(Value::from), 0..4).prop_map(Value::from),
        Just(json!({"rope_type": "dynamic", "factor": 1e-3})),
        Just(json!({"type": "llama3", "factor": 1.0, "low_freq_factor": 0.1, "high_freq_factor": 0.2})),
        Just(json!([[[[]]]])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        rng_seed: RngSeed::Fixed(SEED),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_keys_in_config(changes in prop::collection::vec((any::<prop::sample::Index>(), odd_value()), 1..4)) {
        let mut config = config();
        for (place, value) in changes {
            // A key of the outer object, of the RoPE parameters, or one that only some models have.
            let mut keys: Vec<(bool, String)> = config.as_object().unwrap().keys().map(|k| (false, k.clone())).collect();
            if let Some(rope) = config["rope_parameters"].as_object() {
                keys.extend(rope.keys().map(|k| (true, k.clone())));
            }
            keys.extend(["rope_scaling", "rope_theta", "partial_rotary_factor"].map(|k| (false, k.to_string())));
            let (in_rope, key) = keys[place.index(keys.len())].clone();
            let object = if in_rope { &mut config["rope_parameters"] } else { &mut config };
            object[key] = value;
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), config.to_string().as_bytes(), &safetensors(&tensors(), "F32"));
        // Whether it loads is not the question.
        let _ = load(dir.path());
    }

    #[test]
    fn any_bytes_in_config(change in changes(1..6)) {
        let mut bytes = config().to_string().into_bytes();
        change.apply(&mut bytes);
        if let Err(e) = ModelConfig::parse(&bytes) {
            prop_assert!(!e.to_string().chars().any(char::is_control));
        }
    }

    #[test]
    fn any_bytes_in_weights(change in changes(1..6)) {
        let mut bytes = safetensors(&tensors(), "F32");
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        let mut header = bytes[..header_bytes].to_vec();
        change.apply(&mut header);
        bytes.splice(..header_bytes, header);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), config().to_string().as_bytes(), &bytes);
        let _ = load(dir.path());
    }

    #[test]
    fn any_length_of_weights(length in any::<prop::sample::Index>()) {
        let bytes = safetensors(&tensors(), "F32");
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), config().to_string().as_bytes(), &bytes[..length.index(bytes.len())]);
        let error = load(dir.path()).unwrap_err();
        prop_assert!(error.starts_with("model.safetensors: truncated: "), "{}", error);
    }
}

/// Edits of a byte string.
#[derive(Clone, Debug)]
struct Changes(Vec<(prop::sample::Index, Edit)>);

#[derive(Clone, Debug)]
enum Edit {
    Replace(u8),
    Insert(u8),
    Remove,
    /// A digit by another: lengths and offsets that almost fit.
    Digit(u8),
    /// A stretch again, such as a whole entry.
    Repeat(prop::sample::Index),
}

fn changes(number: std::ops::Range<usize>) -> impl Strategy<Value = Changes> {
    let edit = prop_oneof![
        any::<u8>().prop_map(Edit::Replace),
        any::<u8>().prop_map(Edit::Insert),
        Just(Edit::Remove),
        (b'0'..=b'9').prop_map(Edit::Digit),
        any::<prop::sample::Index>().prop_map(Edit::Repeat),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), edit), number).prop_map(Changes)
}

impl Changes {
    fn apply(self, bytes: &mut Vec<u8>) {
        for (place, edit) in self.0 {
            if bytes.is_empty() {
                return;
            }
            let at = place.index(bytes.len());
            match edit {
                Edit::Replace(byte) => bytes[at] = byte,
                Edit::Insert(byte) => bytes.insert(at, byte),
                Edit::Remove => drop(bytes.remove(at)),
                Edit::Digit(digit) => {
                    let place = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit());
                    place.into_iter().for_each(|i| bytes[i] = digit);
                }
                Edit::Repeat(length) => {
                    let end = at + length.index(bytes.len() - at).min(200);
                    let stretch = bytes[at..end].to_vec();
                    bytes.splice(at..at, stretch);
                }
            }
        }
    }
}
