//! The text side of a model: tokenizer and chat template from its files.

use std::sync::Arc;

use model::Source;
use sparseserve::app::GenerationDefaults;
use sparseserve::text::{ChatTemplate, Tokenizer};

use super::failure::Failure;

/// Tokenizers of large vocabularies take 10 to 30 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const FILE_BYTES_MAX: u64 = 8 << 20;

/// Tokenizer, template and what the model says about generation.
pub struct TextSide {
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text; base models have none.
    pub template: Option<Arc<ChatTemplate>>,
    /// Source of the template, and the file that it is from.
    pub template_source: Option<(String, &'static str)>,
    /// Defaults of sampling, and end tokens.
    pub defaults: GenerationDefaults,
}

impl TextSide {
    /// Reads the files of `source`.
    ///
    /// # Errors
    /// A tokenizer that is missing, a file that is faulty.
    pub fn read(source: &Source) -> Result<Self, Failure> {
        let tokenizer = source.require("tokenizer.json", TOKENIZER_BYTES_MAX)?;
        let tokenizer_config = source.read("tokenizer_config.json", FILE_BYTES_MAX)?;
        let tokenizer =
            Tokenizer::from_bytes(&tokenizer, tokenizer_config.as_deref()).map_err(Failure::input)?;
        let jinja = source.read("chat_template.jinja", FILE_BYTES_MAX)?;
        let jinja = jinja.as_deref().map(std::str::from_utf8).transpose();
        let jinja = jinja.map_err(|e| Failure::input(format!("chat_template.jinja: {e}")))?;
        let file = if jinja.is_some() { "chat_template.jinja" } else { "tokenizer_config.json" };
        let template_source = ChatTemplate::find_source(jinja, tokenizer_config.as_deref());
        let template = template_source.as_deref().map(|text| {
            let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
            ChatTemplate::new(text, bos.unwrap_or_default(), eos.unwrap_or_default())
        });
        let template = template.transpose().map_err(Failure::input)?;
        let defaults = GenerationDefaults::from_json(
            &json(source, "generation_config.json")?,
            &json(source, "config.json")?,
            &tokenizer,
        );
        Ok(TextSide {
            tokenizer: Arc::new(tokenizer),
            template: template.map(Arc::new),
            template_source: template_source.map(|text| (text, file)),
            defaults,
        })
    }
}

/// A JSON file, null where there is none.
fn json(source: &Source, name: &str) -> Result<serde_json::Value, Failure> {
    match source.read(name, FILE_BYTES_MAX)? {
        None => Ok(serde_json::Value::Null),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| Failure::input(format!("{name}: {e}"))),
    }
}
