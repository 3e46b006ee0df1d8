//! Files of gates, sound and faulty.

use std::fs;

use safetensors::tensor::TensorView;

use super::*;
use crate::{RopeConfig, RopeScaling};

const HEADS: HeadShape = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 16 };

fn rope(scaling: RopeScaling) -> Rope {
    Rope::new(&RopeConfig { theta: 1e4, head_dim: 16, max_position_embeddings: 64, scaling })
}

/// A file with these tensors: name, shape, type, value of every element.
fn file(tensors: &[(&str, &[usize], Dtype, f32)]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, dtype, value)| {
            let element = match dtype {
                Dtype::BF16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            };
            element.repeat(shape.iter().product())
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, dtype, _), bytes)| {
        (*name, TensorView::new(*dtype, shape.to_vec(), bytes).expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("a file")
}

fn read(bytes: &[u8], windows: &[Option<usize>], scaling: RopeScaling) -> Result<Gate, String> {
    let rope = rope(scaling);
    let model = GateModel { heads: HEADS, windows, rope: &rope };
    gate_of("g", bytes, model).map_err(|error| error.to_string())
}

#[test]
fn layers_without_a_window_have_weights() {
    let bytes = file(&[
        ("layers.1.k_gate", &[2, 8, 48], Dtype::F32, 0.5),
        ("layers.1.q_gate", &[2, 8, 32], Dtype::BF16, 0.25),
        ("something.else", &[3], Dtype::F32, 1.0),
    ]);
    let gate = read(&bytes, &[Some(8), None], RopeScaling::Default).expect("a gate");
    assert_eq!((gate.dim, gate.num_layers, gate.scale), (8, 2, 1.0));
    assert!(gate.k_of(0, 1).iter().all(|&w| w == 0.0) && gate.q_of(0, 0).iter().all(|&w| w == 0.0));
    assert!(gate.k_of(1, 0).iter().all(|&w| w == 0.5) && gate.q_of(1, 1).iter().all(|&w| w == 0.25));
    assert_eq!(gate.bytes(), 4 * (2 * 2 * 8 * (48 + 32) + 8));
    assert_eq!(gate.inv_freq_of(1), gate.inv_freq[2]);
}

#[test]
fn faulty_files_are_refused_in_one_line() {
    let k: (&str, &[usize], _, _) = ("layers.0.k_gate", &[2, 8, 48], Dtype::F32, 0.5);
    let q: (&str, &[usize], _, _) = ("layers.0.q_gate", &[2, 8, 32], Dtype::F32, 0.5);
    let sound = file(&[k, q]);
    let cases: [(Vec<u8>, &str); 9] = [
        (sound[..sound.len() - 1].to_vec(), "g: "),
        (Vec::new(), "g: "),
        (file(&[k]), "tensor layers.0.q_gate is missing"),
        (file(&[q]), "tensor layers.0.k_gate is missing"),
        (
            file(&[k, ("layers.0.q_gate", &[2, 8, 64], Dtype::F32, 0.5)]),
            "tensor layers.0.q_gate has shape [2, 8, 64], but the model asks for [2, 8, 32]: is the gate for this model?",
        ),
        (file(&[("layers.0.k_gate", &[16, 48], Dtype::F32, 0.5)]), "asks for [2, gate_dim, 48]"),
        (
            file(&[("layers.0.k_gate", &[2, 6, 48], Dtype::F32, 0.5)]),
            "a gate_dim of 6; it must be even and divide",
        ),
        (file(&[k, ("layers.0.q_gate", &[2, 8, 32], Dtype::F32, f32::NAN)]), "no finite numbers"),
        (
            file(&[k, ("layers.0.q_gate", &[2, 8, 32], Dtype::U32, 0.5)]),
            "has dtype U32, expected F32, F16 or BF16",
        ),
    ];
    for (bytes, part) in cases {
        let error = read(&bytes, &[None], RopeScaling::Default).expect_err(part);
        assert!(error.contains(part) && !error.contains('\n'), "{part}: {error}");
    }
    let huge: usize = 1 << 60;
    let error = read(
        &file(&[("layers.1.k_gate", &[0, huge, 0], Dtype::F32, 0.0)]),
        &[Some(1), None],
        RopeScaling::Default,
    );
    assert!(error.expect_err("too large").contains("asks for [2, gate_dim, 48]"));
    let error = read(&sound, &[Some(8)], RopeScaling::Default).expect_err("nothing to select");
    assert!(error.contains("a gate has nothing to select"), "{error}");
    let error = read(&sound, &[None], RopeScaling::Dynamic { factor: 2.0 }).expect_err("no single rotation");
    assert!(error.contains("dynamic RoPE scaling") && error.contains("choose another policy"), "{error}");
    assert!(read(&sound, &[None], RopeScaling::Linear { factor: 2.0 }).is_ok());
}

#[test]
fn a_gate_lies_with_its_model_or_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4}"#;
    fs::write(folder.path().join("config.json"), config).expect("a file");
    let source = Source::Directory(folder.path().into());
    let config = ModelConfig::read(&source).expect("a configuration");
    let line = |file: Option<&Path>| read_gate(&source, &config, file).unwrap_err().to_string();
    let error = line(None);
    assert!(
        error.starts_with("gate.safetensors: not found in ") && error.contains("--policy-opt gate="),
        "{error}"
    );
    let absent = folder.path().join("absent");
    assert!(
        line(Some(&absent)).starts_with(&format!("{}: not found; seerattention needs", absent.display()))
    );
    assert!(line(Some(folder.path())).ends_with("not a regular file"));
    assert!(line(Some(Path::new("/"))).ends_with("not the name of a file"));
    let tensors: [(&str, &[usize], _, _); 2] = [
        ("layers.0.k_gate", &[2, 16, 96], Dtype::F32, 0.5),
        ("layers.0.q_gate", &[2, 16, 64], Dtype::F32, 0.5),
    ];
    fs::write(folder.path().join("other"), file(&tensors)).expect("a file");
    let gate = read_gate(&source, &config, Some(&folder.path().join("other"))).expect("a gate");
    fs::rename(folder.path().join("other"), folder.path().join(FILE)).expect("renamed");
    assert_eq!(read_gate(&source, &config, None).expect("a gate"), gate);
}
