//! Between text and tokens: tokenizer, chat template, streaming decoder, stop strings.

mod decoder;
mod sandbox;
mod stop;
mod template;
mod tokenizer;

#[cfg(test)]
pub(crate) use tokenizer::tests;

pub use decoder::Decoder;
pub use sandbox::{RENDER_VERB, Sandbox, render_main};
pub use stop::StopMatcher;
pub use template::{ChatTemplate, RenderInput, TemplateError};
pub(crate) use tokenizer::panic_message;
pub use tokenizer::{LIKELY_TOKEN_BYTES, Tokenizer, TokenizerError};
