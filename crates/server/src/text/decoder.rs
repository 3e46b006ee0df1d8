//! Tokens to text while they come, never splitting a character.

use std::sync::Arc;

use super::Tokenizer;

/// Tokens whose text waits for more before it is given up as invalid. A character has at most four bytes and a token
/// at least one, so no valid text waits longer.
const PENDING_TOKENS_MAX: usize = 8;

/// Turns a stream of tokens into a stream of text.
///
/// Concatenated, its output is the text of all tokens; an incomplete character is held back until it is complete.
pub struct Decoder {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// Bytes of an incomplete character: at most 3.
    partial: Vec<u8>,
    /// For vocabularies whose tokens have no bytes of their own: the tokens since `window[..decoded]`, of which those
    /// before `decoded` have been shown and serve as left context.
    window: Vec<u32>,
    decoded: usize,
}

impl Decoder {
    /// A decoder that continues after `context`, the tokens before the first that will be pushed: some vocabularies
    /// write a token differently at the beginning of a text.
    pub fn new(tokenizer: Arc<Tokenizer>, context: &[u32], skip_special_tokens: bool) -> Self {
        let window = context[context.len().saturating_sub(PENDING_TOKENS_MAX)..].to_vec();
        Decoder { tokenizer, skip_special_tokens, partial: Vec::new(), decoded: window.len(), window }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub fn push(&mut self, token: u32) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(token) {
            return String::new();
        }
        match self.tokenizer.bytes(token) {
            Some(bytes) => {
                self.partial.extend(bytes);
                self.complete_characters()
            }
            None => self.push_by_context(token),
        }
    }

    /// What is still held back, with U+FFFD for what never became a character.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.partial);
        if !held.is_empty() {
            return String::from_utf8_lossy(&held).into_owned();
        }
        let text = self.undecoded_text();
        self.decoded = self.window.len();
        text
    }

    /// Takes all complete characters, and U+FFFD for invalid bytes, out of `partial`.
    fn complete_characters(&mut self) -> String {
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.partial.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = taken + invalid.len() == self.partial.len();
            if at_end && is_incomplete(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                taken += invalid.len();
            }
        }
        self.partial.drain(..taken);
        text
    }

    /// The text of the window with the new token, less the text without it. Text that ends in U+FFFD may be the
    /// beginning of a character.
    fn push_by_context(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = self.undecoded_text();
        let pending = self.window.len() - self.decoded;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && pending < PENDING_TOKENS_MAX {
            return String::new();
        }
        let context = self.window.len().saturating_sub(PENDING_TOKENS_MAX);
        self.window.drain(..context);
        self.decoded = self.window.len();
        text
    }

    fn undecoded_text(&self) -> String {
        let decode =
            |tokens: &[u32]| self.tokenizer.decode(tokens, self.skip_special_tokens).unwrap_or_default();
        let shown = decode(&self.window[..self.decoded]);
        let all = decode(&self.window);
        match all.strip_prefix(&shown) {
            Some(new) => new.to_owned(),
            // The new tokens changed how the old ones are written; what was shown stays as it is.
            None => decode(&self.window[self.decoded..]),
        }
    }
}

/// Whether more bytes could make `bytes` a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(_) => false,
        Err(error) => error.error_len().is_none(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tests::{demo, fixed_seed, metaspace, wordpiece};

    fn decode_stream(tokenizer: &Arc<Tokenizer>, tokens: &[u32]) -> Vec<String> {
        let mut decoder = Decoder::new(Arc::clone(tokenizer), &[], true);
        let mut pieces: Vec<String> = tokens.iter().map(|&t| decoder.push(t)).collect();
        pieces.push(decoder.finish());
        pieces
    }

    #[test]
    fn emoji_over_several_tokens_comes_whole() {
        let tokenizer = demo();
        let text = "ok 👩‍👩‍👧 é 漢字 🦀";
        let tokens = tokenizer.encode(text, false).unwrap();
        assert!(tokens.len() > text.chars().count(), "the test needs characters of several tokens");
        let pieces = decode_stream(&tokenizer, &tokens);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')));
    }

    #[test]
    fn truncated_characters_become_replacements_at_once_or_at_the_end() {
        let tokenizer = demo();
        let crab = tokenizer.encode("🦀", false).unwrap();
        assert_eq!(crab.len(), 4);
        let cut = [&crab[..3], &tokenizer.encode("a", false).unwrap()].concat();
        assert_eq!(decode_stream(&tokenizer, &cut).concat(), "\u{fffd}a");
        assert_eq!(decode_stream(&tokenizer, &crab[..2]).concat(), "\u{fffd}");
        let shifted = [&crab[2..], &crab[..], &crab[..2]].concat();
        assert_eq!(decode_stream(&tokenizer, &shifted).concat(), tokenizer.decode(&shifted, true).unwrap());
    }

    #[test]
    fn metaspace_keeps_spaces_after_a_prompt_and_joins_byte_tokens() {
        let tokenizer = metaspace();
        let ids = |tokens: &[&str]| tokens.iter().map(|t| tokenizer.id(t).unwrap()).collect::<Vec<_>>();
        let mut decoder = Decoder::new(Arc::clone(&tokenizer), &ids(&["▁hello"]), true);
        assert_eq!(decoder.push(ids(&["▁world"])[0]), " world");
        let bytes = ids(&["<0xF0>", "<0x9F>", "<0xA6>", "<0x80>"]);
        let pieces: Vec<String> = bytes.iter().map(|&b| decoder.push(b)).collect();
        assert_eq!(pieces, ["", "", "", "🦀"]);
    }

    #[test]
    fn wordpiece_needs_its_neighbours() {
        let tokenizer = wordpiece();
        let tokens: Vec<u32> = ["hello", "wor", "##ld"].iter().map(|t| tokenizer.id(t).unwrap()).collect();
        assert_eq!(decode_stream(&tokenizer, &tokens), ["hello", " wor", "ld", ""]);
    }

    proptest! {
        #![proptest_config(fixed_seed(256))]

        #[test]
        fn any_text_survives(text in "\\PC{0,40}") {
            let tokenizer = demo();
            let tokens = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(decode_stream(&tokenizer, &tokens).concat(), text);
        }

        #[test]
        fn any_tokens_decode_as_in_one_go(tokens in proptest::collection::vec(0u32..856, 0..60)) {
            let tokenizer = demo();
            let whole = tokenizer.decode(&tokens, true).unwrap();
            prop_assert_eq!(decode_stream(&tokenizer, &tokens).concat(), whole);
        }
    }
}
