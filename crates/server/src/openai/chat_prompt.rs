//! Chat messages to a prompt, for chat completions and for `/tokenize`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::params::{check_count, check_text};
use super::{ApiError, Fields};
use crate::app::App;
use crate::text::RenderInput;

/// Variables of a chat template that a request may not set by `chat_template_kwargs`.
const RESERVED_VARIABLES: [&str; 9] = [
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "bos_token",
    "eos_token",
    // Not supported, here as little as beside it.
    "tools",
    "documents",
];

/// The fields of a request that make its prompt.
#[derive(Debug)]
pub struct ChatPrompt {
    input: RenderInput,
    /// What stands at the end of the last message, if the answer is to continue it.
    end: Option<String>,
    add_special_tokens: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

impl ChatPrompt {
    /// Takes `messages` and what goes with them out of a request body.
    ///
    /// # Errors
    /// 400 for messages that are not supported, 422 for wrong types.
    pub fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        let messages: Vec<Map<String, Value>> = fields.require("messages")?;
        check_count("messages", messages.len(), app.limits.messages)?;
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "`messages` is empty"));
        }
        let knows_developer =
            app.template.as_ref().is_some_and(|sandbox| sandbox.template().knows_developer());
        let mut messages = messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| take_message(message, &format!("messages[{i}]"), knows_developer))
            .collect::<Result<Vec<_>, _>>()?;

        let add_generation_prompt = fields.take("add_generation_prompt")?;
        let end = match fields.take("continue_final_message")?.unwrap_or(false) {
            false => None,
            true if add_generation_prompt == Some(true) => {
                let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
                return Err(ApiError::invalid("continue_final_message", message));
            }
            true => Some(mark_end(&mut messages)?),
        };
        let variables: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
        if let Some(name) = variables.keys().find(|name| RESERVED_VARIABLES.contains(&name.as_str())) {
            let message = format!("`chat_template_kwargs` must not set `{name}`");
            return Err(ApiError::invalid("chat_template_kwargs", message));
        }
        Ok(ChatPrompt {
            input: RenderInput {
                messages,
                add_generation_prompt: add_generation_prompt.unwrap_or(end.is_none()),
                variables,
            },
            end,
            // Templates write the begin token themselves.
            add_special_tokens: fields.take("add_special_tokens")?.unwrap_or(false),
        })
    }

    /// The prompt's tokens.
    ///
    /// # Errors
    /// 400 if the model has no chat template or its template refuses the messages.
    pub async fn tokens(self, app: &App) -> Result<Vec<u32>, ApiError> {
        let Some(template) = &app.template else {
            let message = "This model has no chat template; use /v1/completions.";
            return Err(ApiError::invalid("messages", message));
        };
        let most = app.text_bytes_max();
        check_text("messages", self.input.text_bytes(), most, app)?;
        let mut prompt = template.render(&self.input).await?;
        if let Some(end) = &self.end {
            prompt = cut_at(&prompt, end)?;
        }
        check_text("messages", prompt.len(), most, app)?;
        let (tokenizer, prompt_bytes, max_context) = (app.tokenizer.clone(), prompt.len(), app.max_context);
        let encode = move || tokenizer.encode_within(&prompt, self.add_special_tokens, max_context);
        let tokens = app.text_work(prompt_bytes, encode).await;
        tokens.map_err(|error| ApiError::untokenizable("messages", &error))
    }
}

/// Appends to the last message what no text contains, and returns it: where the template writes that, the message ends.
/// Spaces at the end go, as templates would have it.
fn mark_end(messages: &mut [Map<String, Value>]) -> Result<String, ApiError> {
    let text = match messages.last_mut().and_then(|last| last.get_mut("content")) {
        Some(Value::String(text)) if !text.trim().is_empty() => text,
        _ => {
            let message = "The last message is empty, so it cannot be continued.";
            return Err(ApiError::invalid("continue_final_message", message));
        }
    };
    let random = || getrandom::u64().map_err(|e| ApiError::internal(format!("no random mark: {e}")));
    let end = format!("end-{:016x}{:016x}", random()?, random()?);
    text.truncate(text.trim_end().len());
    text.push_str(&end);
    Ok(end)
}

/// What the template wrote before the mark, so that the model continues it.
fn cut_at(prompt: &str, end: &str) -> Result<String, ApiError> {
    let Some((before, _)) = prompt.rsplit_once(end) else {
        let message = "The chat template changes the last message, so it cannot be continued.";
        return Err(ApiError::invalid("continue_final_message", message));
    };
    // A template may show a message more than once.
    Ok(before.replace(end, ""))
}

fn take_message(
    message: Map<String, Value>,
    path: &str,
    knows_developer: bool,
) -> Result<Map<String, Value>, ApiError> {
    let mut fields = Fields::nested(message, path);
    let role: String = fields.require("role")?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" => role,
        "developer" if knows_developer => role,
        "developer" => "system".to_owned(),
        "tool" | "function" => {
            let message = format!("The role `{role}` is not supported, as tools are not.");
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
        _ => return Err(ApiError::invalid(format!("{path}.role"), format!("There is no role {role:?}."))),
    };
    let content = match fields.take("content")? {
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => join_parts(parts, path)?,
        None if role == "assistant" => String::new(),
        None => {
            return Err(ApiError::invalid(format!("{path}.content"), format!("`{path}.content` is missing")));
        }
    };
    let mut taken = Map::new();
    taken.insert("role".into(), role.into());
    taken.insert("content".into(), content.into());
    for optional in ["name", "reasoning_content"] {
        if let Some(text) = fields.take::<String>(optional)? {
            taken.insert(optional.into(), text.into());
        }
    }
    fields.finish().map(|_| taken)
}

/// Text parts are lines of one text.
fn join_parts(parts: Vec<Part>, path: &str) -> Result<String, ApiError> {
    let texts = parts.into_iter().map(|part| match (part.r#type.as_str(), part.text) {
        ("text", Some(text)) => Ok(text),
        ("text", None) => Err(ApiError::invalid(
            format!("{path}.content"),
            format!("A text part of `{path}` has no `text`."),
        )),
        (other, _) => Err(ApiError::invalid(
            format!("{path}.content"),
            format!("Content parts of type {other:?} are not supported; this model reads text."),
        )),
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}
