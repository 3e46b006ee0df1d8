//! `POST /tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::chat_prompt::ChatPrompt;
use super::params::{check_count, check_model, check_text, check_token};
use super::{ApiError, Fields};
use crate::app::App;
use crate::text::LIKELY_TOKEN_BYTES;

/// Bytes of text, or tokens, that may be asked about however short the context: some want to know by how much a text
/// is too long.
const COUNTED_BYTES_MAX: usize = 1 << 20;

/// Tokens of a `prompt` or of `messages`.
///
/// # Errors
/// Whatever is wrong with the request.
pub async fn tokenize(State(app): State<Arc<App>>, mut fields: Fields) -> Result<Json<Value>, ApiError> {
    check_model(&mut fields, &app)?;
    let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
    let tokens = match fields.take::<String>("prompt")? {
        Some(prompt) => {
            let add_special_tokens = fields.take("add_special_tokens")?.unwrap_or(true);
            let _memory = fields.finish()?;
            let likely = app.max_context.saturating_mul(2 * LIKELY_TOKEN_BYTES);
            check_text("prompt", prompt.len(), likely.max(COUNTED_BYTES_MAX), &app)?;
            let tokenizer = Arc::clone(&app.tokenizer);
            app.text_work(prompt.len(), move || tokenizer.encode(&prompt, add_special_tokens)).await?
        }
        None => {
            let chat = ChatPrompt::take(&mut fields, &app)?;
            let _memory = fields.finish()?;
            chat.tokens(&app).await?
        }
    };
    let texts: Option<Vec<String>> =
        with_texts.then(|| tokens.iter().map(|&id| app.tokenizer.token(id).unwrap_or_default()).collect());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.max_context,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

/// The text of `tokens`.
///
/// # Errors
/// Whatever is wrong with the request.
pub async fn detokenize(State(app): State<Arc<App>>, mut fields: Fields) -> Result<Json<Value>, ApiError> {
    check_model(&mut fields, &app)?;
    let tokens: Vec<u32> = fields.require("tokens")?;
    let _memory = fields.finish()?;
    check_count("tokens", tokens.len(), app.max_context.max(COUNTED_BYTES_MAX))?;
    tokens.iter().try_for_each(|&id| check_token("tokens", id, &app))?;
    let tokenizer = Arc::clone(&app.tokenizer);
    let prompt =
        app.text_work(tokens.len() * size_of::<u32>(), move || tokenizer.decode(&tokens, false)).await?;
    Ok(Json(json!({"prompt": prompt})))
}
