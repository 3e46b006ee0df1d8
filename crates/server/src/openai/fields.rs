//! The fields of a request body: each is used, known to be harmless, or refused by name.

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::ApiError;
use crate::app::BodyMemory;

/// Fields that change nothing here, with the reason. Any value is accepted.
const HARMLESS: &[(&str, &str)] = &[
    ("user", "names the client's user to OpenAI's abuse monitoring"),
    ("safety_identifier", "the same, newer"),
    ("metadata", "labels of stored answers; nothing is stored"),
    ("prompt_cache_key", "a routing hint; the prefix cache needs none"),
    ("prompt_cache_retention", "a hint; the prefix cache keeps what it can"),
    ("service_tier", "there is one tier"),
    ("store", "nothing is stored"),
    ("parallel_tool_calls", "meaningless without tools, which are refused"),
    ("request_id", "answers carry an id of their own"),
];

/// Fields that are not supported, with the values that ask for nothing and are accepted. `null` and absence always are.
fn neutral_values(name: &str) -> Vec<Value> {
    match name {
        "n" | "best_of" => vec![json!(1), json!(1.0)],
        "tools" | "functions" | "bad_words" | "documents" | "logits_processors" => vec![json!([])],
        // In messages: what an answer of OpenAI's carries when a client sends it back.
        "tool_calls" | "annotations" => vec![json!([])],
        "tool_choice" | "function_call" => vec![json!("none")],
        "response_format" => vec![json!({"type": "text"})],
        "modalities" => vec![json!(["text"])],
        "suffix" => vec![json!("")],
        "use_beam_search" => vec![json!(false)],
        "length_penalty" => vec![json!(1), json!(1.0)],
        "spaces_between_special_tokens" => vec![json!(true)],
        _ => Vec::new(),
    }
}

/// The fields of a JSON object that have not been taken yet.
#[derive(Debug)]
pub struct Fields {
    fields: Map<String, Value>,
    /// Where the object lies in the body, for messages: empty or `stream_options.`.
    path: String,
    /// What the body takes of the server's memory.
    memory: Option<BodyMemory>,
}

impl Fields {
    /// Reads a request body.
    ///
    /// # Errors
    /// 400 if it is no JSON, 422 if it is no object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|e| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("The body of the request is not valid JSON: {e}"))
        })?;
        match value {
            Value::Object(fields) => Ok(Fields { fields, path: String::new(), memory: None }),
            _ => Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "The body must be a JSON object.")),
        }
    }

    /// The fields of an object inside the body.
    pub fn nested(fields: Map<String, Value>, path: &str) -> Self {
        Fields { fields, path: format!("{path}."), memory: None }
    }

    /// The same, holding the memory that was reserved for it.
    pub fn in_memory(self, memory: Option<BodyMemory>) -> Self {
        Fields { memory, ..self }
    }

    /// Takes the field `name`; `null` counts as absent.
    ///
    /// # Errors
    /// 422 if its type is wrong.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.fields.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value).map(Some).map_err(|e| {
                let path = self.path_of(name);
                ApiError::mistyped(&path, format!("`{path}` has a wrong type: {e}"))
            }),
        }
    }

    /// Takes a field that must be there.
    ///
    /// # Errors
    /// 400 if it is absent, 422 if its type is wrong.
    pub fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        let path = self.path_of(name);
        self.take(name)?.ok_or_else(|| ApiError::invalid(&path, format!("`{path}` is missing")))
    }

    /// Takes a number that must lie in `range`.
    ///
    /// # Errors
    /// 400 if it does not, 422 if it is no number.
    pub fn take_within(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let value: Option<f32> = self.take(name)?;
        match value {
            Some(value) if !range.contains(&value) => {
                let path = self.path_of(name);
                let (low, high) = (range.start(), range.end());
                Err(ApiError::invalid(
                    &path,
                    format!("`{path}` must be between {low} and {high}, not {value}"),
                ))
            }
            _ => Ok(value),
        }
    }

    /// Refuses whatever is left, unless it asks for nothing. Returns the memory of the body, to be held until what was
    /// taken out of it has become tokens.
    ///
    /// # Errors
    /// 400 naming the first field that is not supported.
    pub fn finish(self) -> Result<Option<BodyMemory>, ApiError> {
        for (name, value) in &self.fields {
            let known = self.path.is_empty() && HARMLESS.iter().any(|(harmless, _)| harmless == name);
            if known || value.is_null() || neutral_values(name).contains(value) {
                continue;
            }
            let path = self.path_of(name);
            let mut error = ApiError::invalid(&path, format!("The parameter `{path}` is not supported."));
            error.code = Some("unsupported_parameter");
            return Err(error);
        }
        Ok(self.memory)
    }

    fn path_of(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(body: Value) -> Result<(), ApiError> {
        Fields::parse(body.to_string().as_bytes())?.finish().map(drop)
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        finish(json!({"user": "u", "n": 1, "best_of": 1.0, "tools": [], "response_format": {"type": "text"}, "logit_bias": null}))
            .unwrap();
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for name in ["n", "tools", "response_format", "guided_json", "sparse", "no_such_thing"] {
            let error = finish(json!({name: {"x": 2}})).unwrap_err();
            assert_eq!((error.status, error.param.as_deref()), (StatusCode::BAD_REQUEST, Some(name)));
            assert!(error.message.contains(name));
        }
    }

    #[test]
    fn types_and_ranges() {
        let parse = |body: Value| Fields::parse(body.to_string().as_bytes()).unwrap();
        let status = |error: ApiError| error.status.as_u16();
        assert_eq!(parse(json!({"a": null})).take::<u32>("a"), Ok(None));
        assert_eq!(status(parse(json!({"a": "1"})).take::<u32>("a").unwrap_err()), 422);
        assert_eq!(status(parse(json!({})).require::<u32>("a").unwrap_err()), 400);
        assert_eq!(status(parse(json!({"a": 2.1})).take_within("a", 0.0..=2.0).unwrap_err()), 400);
        assert_eq!(status(parse(json!({"a": 1e300})).take_within("a", 0.0..=2.0).unwrap_err()), 400);
        assert_eq!(status(Fields::parse(b"[]").unwrap_err()), 422);
        assert_eq!(status(Fields::parse(b"{").unwrap_err()), 400);
        assert_eq!(status(Fields::parse("[".repeat(1000).as_bytes()).unwrap_err()), 400);
    }
}
