//! The bundled demo model: its golden prompts.

mod common;

use common::{Sequence, argmax, load, repository};
use ops::reference::Reference;
use ops::{Backend, DType};
use ops_cpu::{CpuBackend, CpuOptions};
use serde_json::Value;
use sparseserve_model::{
    Checkpoint, ModelConfig, Source, dtype_on_disk, kv_geometry, num_parameters, weight_bytes,
};

/// As the server carries it.
const DEMO: Source = Source::Embedded(&[
    ("config.json", include_bytes!("../../../demo-model/config.json")),
    ("generation_config.json", include_bytes!("../../../demo-model/generation_config.json")),
    ("model.safetensors", include_bytes!("../../../demo-model/model.safetensors")),
]);

/// Longer prompts come as text, which the tests of the server have a tokenizer for.
const PROMPT_TOKENS_MAX: u64 = 150;
/// `golden.json` holds four decimals.
const TOLERANCE: f64 = 2e-4;

#[test]
fn short_golden_answers_on_the_reference() {
    assert_eq!(check_golden(Reference::default()), 5);
}

#[test]
fn short_golden_answers_on_the_cpu() {
    let cpu = CpuBackend::new(CpuOptions::default()).expect("a backend");
    assert_eq!(check_golden(cpu), 5);
}

/// Checks logits and answers of the short prompts; says how many there are.
fn check_golden<B: Backend>(backend: B) -> usize {
    let (mut backend, model) = load(backend, &DEMO, DType::F32);
    let golden = std::fs::read(repository("demo-model/golden.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&golden).unwrap();
    let ids = |case: &Value, key: &str| -> Vec<u32> {
        case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let mut num_checked = 0;
    for case in &cases {
        if case["n_ids"].as_u64().unwrap() > PROMPT_TOKENS_MAX {
            continue;
        }
        let (prompt, answer) = (ids(case, "ids"), ids(case, "greedy_ids"));
        num_checked += 1;
        let mut sequence = Sequence::new(&mut backend, &model, prompt.len(), prompt.len() + answer.len());
        let mut logits = sequence.feed(&prompt, &[prompt.len() as u32 - 1]).remove(0);
        for top in case["top5"].as_array().unwrap() {
            let (token, expected) = (top[0].as_u64().unwrap() as usize, top[1].as_f64().unwrap());
            assert!((f64::from(logits[token]) - expected).abs() < TOLERANCE, "{case}");
        }
        for (i, &token) in answer.iter().enumerate() {
            assert_eq!(argmax(&logits), token, "token {i} of {case}");
            logits = sequence.feed(&[token], &[0]).remove(0);
        }
    }
    num_checked
}

#[test]
fn sizes() {
    let config = ModelConfig::read(&DEMO).unwrap();
    assert_eq!(num_parameters(&config), 2_187_520);
    assert_eq!(weight_bytes(&config, &Reference::default(), DType::F32), 4 * 2_187_520);
    assert_eq!(kv_geometry(&config, 16, DType::F32).token_bytes(), 2 * 4 * 2 * 64 * 4);
    assert_eq!((config.context_limit(), config.eos_token_ids.as_slice()), (32768, [2].as_slice()));
    assert_eq!(dtype_on_disk(&config, &Checkpoint::open(&DEMO).unwrap()).unwrap(), DType::F32);
}
