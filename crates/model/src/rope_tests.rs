use serde_json::Value;

use super::*;
use crate::ModelConfig;

/// Units in the last place by which a frequency may differ: torch's f32 power is within one of the exact value, ours
/// within half, and what follows adds at most one rounding on either side.
const ULPS_MAX: u32 = 4;

/// A Llama configuration with the keys of `overrides`.
fn config(overrides: &Value) -> ModelConfig {
    let mut json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 8,
    });
    let json_map = json.as_object_mut().unwrap();
    json_map.extend(overrides.as_object().unwrap().clone());
    ModelConfig::parse(json.to_string().as_bytes()).unwrap()
}

#[test]
fn frequencies_are_those_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../xtask/golden/rope.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let config = config(&case["config"]);
        let rope = Rope::new(&config.rope);
        let mut inv_freq = Vec::new();
        rope.extend_inv_freq(case["seq_len"].as_u64().unwrap_or(0) as u32, &mut inv_freq);
        let expected = case["inv_freq"].as_array().unwrap();
        assert_eq!(inv_freq.len(), expected.len());
        for (channel, (found, expected)) in inv_freq.iter().zip(expected).enumerate() {
            let expected = expected.as_f64().unwrap() as f32;
            let ulps = found.to_bits().abs_diff(expected.to_bits());
            assert!(ulps <= ULPS_MAX, "channel {channel}: {found} for {expected}, {:?}", config.rope);
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert_eq!(rope.scale(), factor as f32, "{:?}", config.rope);
    }
}

#[test]
fn dynamic_frequencies_follow_request_and_position_alone() {
    let config = config(&serde_json::json!({
        "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 10,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    }));
    let rope = Rope::new(&config.rope);
    assert_eq!(rope.prefix_limit(), Some(10));
    assert_eq!(config.context_limit(), 40);
    let sequence = |rows: std::ops::Range<u32>, first_position, prompt_len| ops::SequenceRows {
        rows,
        first_position,
        prompt_len,
        blocks: 0..0,
        attention: Default::default(),
        seat: ops::SeatIndex(0),
        quota: 0,
    };
    // A long prompt's chunk, its later decode, a short request across the limit, two tokens of one long answer.
    let sequences =
        [sequence(0..2, 3, 12), sequence(2..3, 12, 12), sequence(3..5, 9, 4), sequence(5..7, 20, 12)];
    let batch = Batch {
        tokens: &[0; 7],
        positions: &[3, 4, 12, 9, 10, 20, 21],
        sequences: &sequences,
        block_tables: &[],
        methods: &[],
    };
    let (mut inv_freq, mut sets) = (Vec::new(), Vec::new());
    rope.frequencies(&batch, &mut inv_freq, &mut sets);
    let lengths = [12, 12, 13, 10, 11, 21, 22];
    for (row, seq_len) in lengths.into_iter().enumerate() {
        let mut expected = Vec::new();
        rope.extend_inv_freq(seq_len, &mut expected);
        assert_eq!(inv_freq[sets[row] as usize * 16..][..16], expected, "row {row}");
        assert_eq!(expected == rope.inv_freq(), seq_len <= 10, "row {row}");
    }
    assert_eq!(sets, [1, 1, 2, 0, 3, 4, 5]);
    assert!(inv_freq.len() <= rope.inv_freq_len_max(7));
}

#[test]
fn one_set_serves_all_rows_unless_scaling_is_dynamic() {
    let config = config(&serde_json::json!({
        "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 10,
    }));
    let rope = Rope::new(&config.rope);
    let sequences = [ops::SequenceRows {
        rows: 0..3,
        first_position: 99,
        prompt_len: 50,
        blocks: 0..0,
        attention: Default::default(),
        seat: ops::SeatIndex(0),
        quota: 0,
    }];
    let batch = Batch {
        tokens: &[0; 3],
        positions: &[99, 100, 101],
        sequences: &sequences,
        block_tables: &[],
        methods: &[],
    };
    let (mut inv_freq, mut sets) = (Vec::new(), Vec::new());
    rope.frequencies(&batch, &mut inv_freq, &mut sets);
    assert_eq!((inv_freq.as_slice(), sets.as_slice()), (rope.inv_freq(), [0, 0, 0].as_slice()));
    assert_eq!(rope.prefix_limit(), None);
    assert_eq!(rope.inv_freq_len_max(100), 16);
}
