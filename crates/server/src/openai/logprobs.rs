//! Log-probabilities in the shapes of the two APIs.

use std::sync::Arc;

use engine::TokenLogprobs;
use serde::Serialize;
use serde_json::Map;

use super::generation::Token;
use crate::text::{Decoder, Tokenizer};

/// JSON has no infinity; this is what vLLM writes for it.
const LOGPROB_MIN: f32 = -9999.0;

/// How tokens are named.
#[derive(Clone, Debug)]
pub struct TokenNames {
    /// Knows their text.
    pub tokenizer: Arc<Tokenizer>,
    /// Whether they are `token_id:7` instead.
    pub as_ids: bool,
}

impl TokenNames {
    fn name(&self, id: u32) -> (String, Vec<u8>) {
        let (text, bytes) = self.tokenizer.label(id);
        (if self.as_ids { format!("token_id:{id}") } else { text }, bytes)
    }
}

/// `logprobs` of a chat choice.
#[derive(Debug, Default, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: NamedLogprob,
    top_logprobs: Vec<NamedLogprob>,
}

#[derive(Debug, Serialize)]
struct NamedLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// For `tokens` that carry log-probabilities, with `top` alternatives each.
    pub fn new<'a>(names: &TokenNames, tokens: impl IntoIterator<Item = &'a Token>, top: u32) -> Self {
        let named = |id: u32, logprob: f32| {
            let (token, bytes) = names.name(id);
            NamedLogprob { token, logprob: finite(logprob), bytes }
        };
        let logprobs = tokens.into_iter().filter_map(|token| token.logprobs.as_ref());
        let content = logprobs.map(|l| ChatToken {
            token: named(l.token, l.logprob),
            top_logprobs: l.top.iter().take(top as usize).map(|&(id, logprob)| named(id, logprob)).collect(),
        });
        ChatLogprobs { content: content.collect(), refusal: None }
    }

    /// Adds the tokens of a later delta.
    pub fn extend(&mut self, later: ChatLogprobs) {
        self.content.extend(later.content);
    }
}

/// `logprobs` of a completions choice: four lists of one entry per token.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    /// Characters of the text before each token.
    text_offset: Vec<usize>,
    /// `None` for the first token of a prompt.
    token_logprobs: Vec<Option<f64>>,
    tokens: Vec<String>,
    /// The alternatives and, always, the token itself.
    top_logprobs: Vec<Option<Map<String, serde_json::Value>>>,
}

impl CompletionLogprobs {
    /// For generated `tokens`, whose text begins after `offset` characters.
    pub fn of_answer<'a>(
        names: &TokenNames,
        tokens: impl IntoIterator<Item = &'a Token>,
        offset: usize,
    ) -> Self {
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            lists.push(names, token.id, offset + token.offset, token.logprobs.as_ref());
        }
        lists
    }

    /// For the tokens of an echoed prompt, of which all but the first have `logprobs`. `skip_special_tokens` says whether
    /// special tokens are part of the echoed text.
    pub fn of_prompt(
        names: &TokenNames,
        prompt: &[u32],
        logprobs: &[TokenLogprobs],
        skip_special_tokens: bool,
    ) -> Self {
        let mut lists = CompletionLogprobs::default();
        let mut decoder = Decoder::new(Arc::clone(&names.tokenizer), &[], skip_special_tokens);
        let mut offset = 0;
        for (i, &id) in prompt.iter().enumerate() {
            let logprobs = i.checked_sub(1).and_then(|i| logprobs.get(i));
            lists.push(names, id, offset, logprobs);
            offset += decoder.push(id).chars().count();
        }
        lists
    }

    /// Adds the tokens of a later delta.
    pub fn extend(&mut self, later: CompletionLogprobs) {
        self.text_offset.extend(later.text_offset);
        self.token_logprobs.extend(later.token_logprobs);
        self.tokens.extend(later.tokens);
        self.top_logprobs.extend(later.top_logprobs);
    }

    fn push(&mut self, names: &TokenNames, id: u32, offset: usize, logprobs: Option<&TokenLogprobs>) {
        self.text_offset.push(offset);
        self.tokens.push(names.name(id).0);
        self.token_logprobs.push(logprobs.map(|l| finite(l.logprob)));
        self.top_logprobs.push(logprobs.map(|l| {
            let own = std::iter::once((l.token, l.logprob));
            let all = l.top.iter().copied().chain(own);
            all.map(|(id, logprob)| (names.name(id).0, finite(logprob).into())).collect()
        }));
    }
}

fn finite(logprob: f32) -> f64 {
    // `max` also takes care of NaN. f64, so that an answer and a stream print the same digits.
    logprob.max(LOGPROB_MIN).into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::tests::demo;

    fn names(as_ids: bool) -> TokenNames {
        TokenNames { tokenizer: demo(), as_ids }
    }

    fn token(id: u32, offset: usize, logprob: f32, top: Vec<(u32, f32)>) -> Token {
        Token { id, offset, logprobs: Some(TokenLogprobs { token: id, logprob, rank: 1, top }) }
    }

    #[test]
    fn chat_shape() {
        let a = names(false).tokenizer.encode("a", false).unwrap()[0];
        let tokens = [token(a, 0, -0.5, vec![(a, -0.5), (2, f32::NEG_INFINITY)])];
        let shape = serde_json::to_value(ChatLogprobs::new(&names(false), &tokens, 2)).unwrap();
        assert_eq!(
            shape,
            json!({"refusal": null, "content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "<|eos|>", "logprob": -9999.0, "bytes": b"<|eos|>"}]}]})
        );
        let shape = serde_json::to_value(ChatLogprobs::new(&names(true), &tokens, 0)).unwrap();
        assert_eq!(shape["content"][0]["token"], format!("token_id:{a}"));
        assert_eq!(shape["content"][0]["top_logprobs"], json!([]));
    }

    #[test]
    fn completions_shape_counts_characters() {
        let names = names(false);
        let prompt = names.tokenizer.encode("é🦀a", true).unwrap();
        let logprob = |&id: &u32| TokenLogprobs { token: id, logprob: -1.0, rank: 2, top: vec![(0, -0.25)] };
        let logprobs: Vec<_> = prompt[1..].iter().map(logprob).collect();
        let mut lists = CompletionLogprobs::of_prompt(&names, &prompt, &logprobs, true);
        lists.extend(CompletionLogprobs::of_answer(&names, &[token(2, 1, -0.5, vec![])], 3));
        let shape = serde_json::to_value(lists).unwrap();
        // <|bos|>, two bytes of é, four of the crab, a, then the answer's token after one character of its own.
        assert_eq!(shape["text_offset"], json!([0, 0, 0, 1, 1, 1, 1, 2, 4]));
        assert_eq!(shape["token_logprobs"][0], json!(null));
        assert_eq!(shape["top_logprobs"][0], json!(null));
        assert_eq!(shape["top_logprobs"][7], json!({"<|pad|>": -0.25, "a": -1.0}));
        assert_eq!(shape["tokens"][8], "<|eos|>");
    }
}
