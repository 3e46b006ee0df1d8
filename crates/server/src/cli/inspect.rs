//! `sparseserve inspect`: what a model is, without reading its weights.

use std::io::Write;

use model::{Checkpoint, ModelConfig, RopeScaling};
use ops::DType;
use serde_json::json;

use super::commands::InspectArgs;
use super::failure::Failure;
use super::options::CommonOptions;
use super::screen::parameters;
use super::settings::{LogSettings, ModelChoice};
use super::size::Bytes;
use super::text::TextSide;
use super::{load, log};

/// Lines of a template that are shown.
const TEMPLATE_LINES: usize = 5;
/// Characters of a line that are shown.
const LINE_CHARS: usize = 100;
/// The page size that KV bytes are told for; they are the same for all.
const PAGE_TOKENS: usize = 16;

/// Runs the command.
pub fn run(args: InspectArgs) -> Result<(), Failure> {
    let _log = log::start(&LogSettings::resolve(CommonOptions::default(), "warn"))?;
    let choice = ModelChoice::resolve(args.model.as_deref())?;
    let source = load::source(&choice)?;
    let config = ModelConfig::read(&source)?;
    let checkpoint = Checkpoint::open(&source)?;
    let dtype = model::dtype_on_disk(&config, &checkpoint)?;
    let text = TextSide::read(&source)?;
    let facts = Facts { name: choice.name(), config: &config, dtype, text: &text };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", facts.json())?
    } else {
        write!(out, "{}", facts.text())?
    }
    Ok(())
}

struct Facts<'a> {
    name: String,
    config: &'a ModelConfig,
    dtype: DType,
    text: &'a TextSide,
}

impl Facts<'_> {
    fn parameters(&self) -> u64 {
        model::num_parameters(self.config)
    }

    fn kv_token_bytes(&self, dtype: DType) -> u64 {
        model::kv_geometry(self.config, PAGE_TOKENS, dtype).token_bytes() as u64
    }

    fn weight_bytes(&self, dtype: DType) -> u64 {
        self.parameters() * dtype.bytes() as u64
    }

    fn windows(&self) -> String {
        let windows = &self.config.windows;
        let with = windows.iter().flatten().count();
        match windows.iter().flatten().next() {
            None => "all layers attend to the whole context".into(),
            Some(window) => format!("{with} of {} layers attend to the last {window} tokens", windows.len()),
        }
    }

    /// Names of the token with this id, for people.
    fn token(&self, id: u32) -> String {
        format!("{id} {:?}", self.text.tokenizer.token(id).unwrap_or_default())
    }

    fn json(&self) -> serde_json::Value {
        let config = self.config;
        let by_dtype = |bytes: &dyn Fn(DType) -> u64| json!({"f32": bytes(DType::F32), "f16": bytes(DType::F16), "bf16": bytes(DType::Bf16)});
        json!({
            "model": self.name,
            "architecture": config.architecture,
            "parameters": self.parameters(),
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.heads.q_heads,
            "num_kv_heads": config.heads.kv_heads,
            "head_dim": config.heads.head_dim,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_word_embeddings,
            "dtype_on_disk": self.dtype.name(),
            "weight_bytes": by_dtype(&|dtype| self.weight_bytes(dtype)),
            "kv_bytes_per_token": by_dtype(&|dtype| self.kv_token_bytes(dtype)),
            "context_limit": config.context_limit(),
            "sliding_windows": config.windows,
            "rope": {"theta": config.rope.theta, "scaling": scaling(&config.rope.scaling)},
            "tokenizer": {
                "vocab_size": self.text.tokenizer.vocab_size(),
                "bos_token": self.text.tokenizer.bos_token(),
                "eos_token": self.text.tokenizer.eos_token(),
                "end_token_ids": self.text.defaults.end_tokens,
            },
            "chat_template": self.text.template_source.as_ref().map(|(text, file)| json!({
                "file": file, "source": text,
            })),
        })
    }

    fn text(&self) -> String {
        let config = self.config;
        let heads = config.heads;
        let tokenizer = &self.text.tokenizer;
        let dtypes = [DType::F32, DType::F16, DType::Bf16];
        let weights = dtypes.map(|d| format!("{} as {d}", Bytes(self.weight_bytes(d)))).join(", ");
        let kv = dtypes.map(|d| format!("{} as {d}", Bytes(self.kv_token_bytes(d)))).join(", ");
        let tied = if config.tie_word_embeddings { "tied" } else { "untied" };
        let ends: Vec<String> = self.text.defaults.end_tokens.iter().map(|&id| self.token(id)).collect();
        let full = self.kv_token_bytes(self.dtype) * config.context_limit() as u64;
        let mut lines = vec![
            ("model", self.name.clone()),
            ("architecture", config.architecture.to_owned()),
            ("parameters", format!("{} ({} on disk)", parameters(self.parameters()), self.dtype)),
            (
                "layers",
                format!(
                    "{}, width {}, MLP {}",
                    config.num_layers, config.hidden_size, config.intermediate_size
                ),
            ),
            (
                "heads",
                format!("{} over {} KV heads of {} channels", heads.q_heads, heads.kv_heads, heads.head_dim),
            ),
            ("vocabulary", format!("{} tokens, {tied} embeddings", config.vocab_size)),
            ("weights", weights),
            ("KV per token", kv),
            (
                "context",
                format!("{} tokens, {} of KV as {}", config.context_limit(), Bytes(full), self.dtype),
            ),
            ("attention", self.windows()),
            ("RoPE", format!("theta {}, scaling {}", config.rope.theta, scaling(&config.rope.scaling))),
            (
                "tokenizer",
                format!(
                    "{} tokens, begins with {:?}, ends with {}",
                    tokenizer.vocab_size(),
                    tokenizer.bos_token().unwrap_or("nothing"),
                    if ends.is_empty() { "nothing".into() } else { ends.join(", ") }
                ),
            ),
        ];
        match &self.text.template_source {
            None => lines.push(("chat template", "none: a base model, for completions only".into())),
            Some((source, file)) => {
                lines.push(("chat template", format!("from {file}, {} characters", source.chars().count())));
                let shown = source.lines().take(TEMPLATE_LINES).map(|line| ("", shortened(line)));
                lines.extend(shown);
            }
        }
        lines.iter().map(|(name, value)| format!("{name:14} {value}\n")).collect()
    }
}

/// The beginning of a line, without control characters.
fn shortened(line: &str) -> String {
    let clean: String = line.chars().filter(|c| !c.is_control()).take(LINE_CHARS + 1).collect();
    match clean.char_indices().nth(LINE_CHARS) {
        Some((end, _)) => format!("{}...", &clean[..end]),
        None => clean,
    }
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::Default => "none".into(),
        RopeScaling::Linear { factor } => format!("linear x{factor}"),
        RopeScaling::Dynamic { factor } => format!("dynamic x{factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings: original, .. } => {
            format!("llama3 x{factor} of {original}")
        }
        RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => {
            format!("yarn x{factor} of {original}")
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn long_lines_are_cut_and_cleaned() {
        assert_eq!(super::shortened("a\u{1b}[31mb"), "a[31mb");
        assert_eq!(super::shortened(&"é".repeat(101)), format!("{}...", "é".repeat(100)));
        assert_eq!(super::shortened(&"é".repeat(100)), "é".repeat(100));
    }
}
