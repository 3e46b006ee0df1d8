//! The demo model, inside the binary: `demo-model/README.md` says what it is and what it can be asked.

/// Its files by name.
pub static FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../../../demo-model/config.json")),
    ("generation_config.json", include_bytes!("../../../../demo-model/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../../../demo-model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../../demo-model/tokenizer_config.json")),
    ("gate.safetensors", include_bytes!("../../../../demo-model/gate.safetensors")),
    ("model.safetensors", include_bytes!("../../../../demo-model/model.safetensors")),
];

/// Something that it can answer.
pub const QUESTION: &str = "The key of Barin is 271828.\nWhat is the key of Barin?";
