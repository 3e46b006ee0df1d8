//! Chat templates: the Jinja programs that models bring to turn messages into one prompt.
//!
//! A template is code from whoever made the model, so it runs with bounds: source size, instructions (fuel), recursion
//! and output.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

/// Source bytes. The longest templates of well-known models have about 20 KiB.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Instructions for the template itself and per message and tool; real templates use some hundred.
const FUEL_BASE: u64 = 500_000;
const FUEL_PER_MESSAGE: u64 = 10_000;
/// Nested calls of macros.
const RECURSION_MAX: usize = 100;
/// Output beyond what the messages hold: a template repeats a message at most a few times.
const OUTPUT_BYTES_BASE: usize = 1 << 20;
const OUTPUT_FACTOR: usize = 4;

/// Why a template gave no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum TemplateError {
    /// The template is no template, or too large.
    #[error("chat template: {0}")]
    Source(String),
    /// The template itself refused the messages (`raise_exception`).
    #[error("{0}")]
    Refused(String),
    /// The template failed on these messages.
    #[error("chat template: {0}")]
    Failed(String),
    /// The template used more than its share of time or memory.
    #[error("chat template: exceeded its limit of {0}")]
    Limit(String),
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RenderInput {
    /// The messages, each an object with `role` and `content`.
    pub messages: Vec<Map<String, serde_json::Value>>,
    /// Whether to open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// Further variables, `chat_template_kwargs` of the request.
    pub variables: Map<String, serde_json::Value>,
}

impl RenderInput {
    /// Bytes of text in it, on which the bounds depend.
    pub fn text_bytes(&self) -> usize {
        fn bytes(value: &serde_json::Value) -> usize {
            match value {
                serde_json::Value::String(text) => text.len(),
                serde_json::Value::Array(items) => items.iter().map(bytes).sum(),
                serde_json::Value::Object(fields) => {
                    fields.iter().map(|(name, v)| name.len() + bytes(v)).sum()
                }
                _ => 8,
            }
        }
        let fields = self.messages.iter().flat_map(Map::values).chain(self.variables.values());
        fields.map(bytes).sum()
    }
}

/// A compiled chat template.
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    knows_developer: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos_token", &self.bos_token).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template's source as a model directory holds it: the text of `chat_template.jinja` if there is one, else
    /// `chat_template` of `tokenizer_config.json`, a string or a list of named ones of which `default` is taken.
    pub fn find_source(jinja_file: Option<&str>, tokenizer_config: Option<&[u8]>) -> Option<String> {
        if let Some(source) = jinja_file {
            return Some(source.to_owned());
        }
        let config: serde_json::Value = serde_json::from_slice(tokenizer_config?).ok()?;
        let found = match &config["chat_template"] {
            serde_json::Value::Array(named) => named
                .iter()
                .find(|entry| entry["name"] == "default")
                .or_else(|| named.first())
                .map(|entry| &entry["template"])?,
            single => single,
        };
        found.as_str().map(str::to_owned)
    }

    /// Compiles `source`; `bos_token` and `eos_token` are variables that templates expect, empty if the model has none.
    ///
    /// # Errors
    /// [`TemplateError::Source`] with the line that is wrong.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            let reason = format!("{} bytes, of which {SOURCE_BYTES_MAX} are allowed", source.len());
            return Err(TemplateError::Source(reason));
        }
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| TemplateError::Source(describe(&e)))?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned("chat_template", without_generation_tags(source))
            .map_err(|e| TemplateError::Source(describe(&e)))?;
        Ok(ChatTemplate {
            source: source.to_owned(),
            environment,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
            knows_developer: source.contains("developer"),
        })
    }

    /// Whether the template has a word for the role `developer`; else such messages are system messages.
    pub fn knows_developer(&self) -> bool {
        self.knows_developer
    }

    /// What [`ChatTemplate::new`] was given.
    pub(super) fn parts(&self) -> [&str; 3] {
        [&self.source, &self.bos_token, &self.eos_token]
    }

    /// The prompt for `input`. Bounded in instructions and output, but not in memory: see [`super::Sandbox`].
    ///
    /// # Errors
    /// [`TemplateError::Refused`] if the template raised an exception, [`TemplateError::Failed`] and
    /// [`TemplateError::Limit`] if it could not do its work.
    pub fn render(&self, input: &RenderInput) -> Result<String, TemplateError> {
        let output_bytes_max = OUTPUT_BYTES_BASE + OUTPUT_FACTOR * input.text_bytes();
        let fuel = FUEL_BASE + FUEL_PER_MESSAGE * input.messages.len() as u64;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template("chat_template").map_err(failure)?;

        let mut variables = Map::new();
        variables.insert("bos_token".into(), self.bos_token.as_str().into());
        variables.insert("eos_token".into(), self.eos_token.as_str().into());
        variables.extend(input.variables.clone());
        let messages = minijinja::context! {
            messages => Value::from(Serde(&input.messages)),
            add_generation_prompt => input.add_generation_prompt,
        };
        let all = minijinja::context! { ..messages, ..Value::from(Serde(&variables)) };

        let mut output = BoundedWriter { bytes: Vec::new(), max: output_bytes_max, overflow: false };
        let rendered = template.render_captured_to(all, &mut output).map(drop);
        if output.overflow {
            return Err(TemplateError::Limit(format!("{output_bytes_max} bytes of output")));
        }
        rendered.map_err(failure)?;
        String::from_utf8(output.bytes).map_err(|e| TemplateError::Failed(e.to_string()))
    }
}

/// Collects output and stops the template when there is too much of it.
struct BoundedWriter {
    bytes: Vec<u8>,
    max: usize,
    overflow: bool,
}

impl io::Write for BoundedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max {
            self.overflow = true;
            return Err(io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The marker that tells [`raise_exception`] from the engine's own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The time now, local, in the given format.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it, which is what models saw.
fn to_json(_: &State, value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    // Accepted for what templates pass as a matter of form; key order and characters are kept anyway.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        Some(indent) => Some(usize::try_from(indent)?),
        None => None,
    };
    let mut out = BoundedWriter { bytes: Vec::new(), max: SOURCE_BYTES_MAX * 64, overflow: false };
    let spaces = " ".repeat(indent.unwrap_or(0).min(16));
    let written = match indent {
        None => {
            let mut json = serde_json::Serializer::with_formatter(&mut out, PythonFormatter);
            value.serialize(&mut json)
        }
        Some(_) => {
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut json = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut json)
        }
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from(String::from_utf8_lossy(&out.bytes).into_owned()))
}

/// `", "` and `": "` between things, as Python has it.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// `{% generation %}` marks the assistant's words for training; here it is a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let tag = &rest[open + 2..open + length];
        let words = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        let replacement = match words.trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        result.push_str(&rest[..open + 2]);
        match replacement {
            Some(replacement) => result.push_str(&tag.replace(words.trim(), replacement)),
            None => result.push_str(tag),
        }
        result.push_str("%}");
        rest = &rest[open + length + 2..];
    }
    result.push_str(rest);
    result
}

fn failure(error: Error) -> TemplateError {
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        source = cause.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::Limit("instructions".into()),
        _ => TemplateError::Failed(describe(&error)),
    }
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn input(messages: serde_json::Value) -> RenderInput {
        let messages = serde_json::from_value(messages).unwrap();
        RenderInput { messages, add_generation_prompt: true, variables: Map::new() }
    }

    fn render(source: &str, messages: serde_json::Value) -> Result<String, TemplateError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&input(messages))
    }

    #[test]
    fn the_demo_template() {
        let config = include_bytes!("../../../../demo-model/tokenizer_config.json");
        let source = ChatTemplate::find_source(None, Some(config)).unwrap();
        let prompt =
            render(&source, json!([{"role": "system", "content": " s "}, {"role": "user", "content": "u"}]));
        assert_eq!(
            prompt.unwrap(),
            "<s><|system|>s</s><|user|>u</s><|assistant|>".replace("</s>", "<|eos|>")
        );
    }

    #[test]
    fn sources_are_found_where_models_keep_them() {
        let find = |jinja, config: serde_json::Value| {
            ChatTemplate::find_source(jinja, Some(config.to_string().as_bytes()))
        };
        let named = json!({"chat_template": [
            {"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        assert_eq!(find(None, named.clone()).as_deref(), Some("d"));
        assert_eq!(find(Some("file"), named).as_deref(), Some("file"));
        assert_eq!(find(None, json!({})), None);
        assert_eq!(find(None, json!({"chat_template": 7})), None);
        assert_eq!(ChatTemplate::find_source(None, None), None);
    }

    #[test]
    fn conventions_of_hugging_face() {
        let check = |source: &str, expected: &str| {
            let messages = json!([{"role": "user", "content": "Hi é"}]);
            assert_eq!(render(source, messages).unwrap(), expected, "{source}");
        };
        check("{{ messages[0].content.upper().strip() }}", "HI É");
        check("{{ messages|tojson }}", r#"[{"role": "user", "content": "Hi é"}]"#);
        check(
            "{{ {'a': [1, true, none]}|tojson(indent=2) }}",
            "{\n  \"a\": [\n    1,\n    true,\n    null\n  ]\n}",
        );
        check("{% if true %}\n  {% set x = 1 %}\na\n{% endif %}\n", "a\n");
        check(
            "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "Hi é",
        );
        check("{% for x in [1,2,3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1");
        check("{{ messages[0]['content'].split(' ')[-1] }}{{ (messages|length) is odd }}", "éTrue");
        check(
            "{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = m.role %}{% endfor %}{{ ns.a }}",
            "user",
        );
        check("{{ bos_token }}{{ eos_token }}{{ tools is defined }}{{ undefined_thing }}", "<s></s>False");
        check("{{ strftime_now('%Y')|length }}", "4");
        check("{{ '<b>' }}", "<b>");
    }

    #[test]
    fn exceptions_of_the_template_reach_the_client() {
        let refused = render("{{ raise_exception('roles must alternate') }}", json!([]));
        assert_eq!(refused, Err(TemplateError::Refused("roles must alternate".into())));
        assert!(matches!(render("{{ 1 + 'a' }}", json!([])), Err(TemplateError::Failed(_))));
        assert!(matches!(render("{{ x.y.z }}", json!([])), Err(TemplateError::Failed(_))));
        assert!(matches!(render("{% if %}", json!([])), Err(TemplateError::Source(_))));
        assert!(matches!(render("{{ strftime_now('%!') }}", json!([])), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn hostile_templates_end_soon() {
        let nested = "{% for a in range(99999) %}".repeat(4) + &"{% endfor %}".repeat(4);
        let parentheses = "{{ ".to_owned() + &"(".repeat(100_000) + "1" + &")".repeat(100_000) + " }}";
        let blocks = "{% if true %}".repeat(50_000) + &"{% endif %}".repeat(50_000);
        let large = "a".repeat(SOURCE_BYTES_MAX + 1);
        for source in [
            nested.as_str(),
            &parentheses,
            &blocks,
            &large,
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
            "{% for i in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}",
            "{{ 'a' * 99999999999 }}",
            "{{ range(99999999999) }}",
            "{% include 'chat_template' %}",
            "{% extends 'chat_template' %}",
        ] {
            let started = Instant::now();
            let result = render(source, json!([]));
            let shown: String = source.chars().take(60).collect();
            assert!(result.is_err(), "{shown}");
            assert!(started.elapsed() < Duration::from_secs(10), "{shown} took {:?}", started.elapsed());
        }
    }
}
