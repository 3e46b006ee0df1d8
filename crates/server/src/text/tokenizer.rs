//! The model's tokenizer: text to token ids and back.

use std::any::Any;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;

/// Why a tokenizer was not loaded or refused a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` or `tokenizer_config.json` is unusable.
    #[error("{file}: {reason}")]
    File {
        /// Which file.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A text could not be encoded, or ids not be decoded.
    #[error("tokenizer: {0}")]
    Text(String),
    /// A text has more tokens than it may.
    #[error("the text has far more than {0} tokens")]
    TooLong(usize),
}

/// How a vocabulary spells the bytes that a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's table: one printable character per byte.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte.
    Metaspace,
    /// Anything else (WordPiece, ...): tokens have no bytes of their own, only sequences of them have text.
    Other,
}

impl Spelling {
    /// Bytes of text behind a token, at most.
    fn text_bytes(self, token: &str) -> usize {
        match self {
            // One character per byte, or plain text.
            Spelling::ByteLevel => byte_level(token).map_or(token.len(), |bytes| bytes.len()),
            // A word that the vocabulary lacks is one token, whatever its length; such vocabularies end at a hundred
            // characters.
            Spelling::Metaspace | Spelling::Other => token.len().max(UNKNOWN_BYTES_MAX),
        }
    }
}

/// Bytes of text per token that hardly any text exceeds; most have four.
pub const LIKELY_TOKEN_BYTES: usize = 8;

/// Bytes of the pieces in which the tokens of a long text are counted.
const PIECE_BYTES: usize = 64 << 10;

/// Bytes of a word that is one unknown token.
const UNKNOWN_BYTES_MAX: usize = 100;

/// A Hugging Face tokenizer with its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    special: HashSet<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    eos_id: Option<u32>,
    vocab_size: usize,
    token_bytes_max: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("spelling", &self.spelling)
            .field("bos_token", &self.bos_token)
            .field("eos_token", &self.eos_token)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if the model has one, `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`TokenizerError::File`] for a file that is no tokenizer; hostile files included.
    pub fn from_bytes(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self, TokenizerError> {
        let invalid = |reason: String| TokenizerError::File { file: "tokenizer.json", reason };
        let layout: Value = serde_json::from_slice(tokenizer).map_err(|e| invalid(e.to_string()))?;
        let mut inner = contained(|| tokenizers::Tokenizer::from_bytes(tokenizer)).map_err(invalid)?;
        // Both belong to training; a prompt must neither lose its end nor gain padding.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| invalid(e.to_string()))?;

        let config: Value = match config {
            None => Value::Null,
            Some(bytes) => serde_json::from_slice(bytes)
                .map_err(|e| TokenizerError::File { file: "tokenizer_config.json", reason: e.to_string() })?,
        };
        let eos_token = special_token(&config, "eos_token");
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let vocab = inner.get_vocab(true);
        let largest_id = vocab.values().max();
        let spelling = spelling(&layout["decoder"]);
        Ok(Tokenizer {
            token_bytes_max: vocab.keys().map(|token| spelling.text_bytes(token)).max().unwrap_or(1),
            spelling,
            special,
            bos_token: special_token(&config, "bos_token"),
            eos_id: eos_token.as_deref().and_then(|token| inner.token_to_id(token)),
            eos_token,
            vocab_size: largest_id.map_or(0, |&id| id as usize + 1),
            inner,
        })
    }

    /// Token ids of `text`. `add_special_tokens` adds what the model wants around a text, usually a begin token;
    /// special tokens written out in the text become their ids either way.
    ///
    /// # Errors
    /// [`TokenizerError::Text`] if the tokenizer gives up on it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        contained(|| self.inner.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(TokenizerError::Text)
    }

    /// The same for a text that should have no more than `tokens_max` tokens. One that has far more is refused at the
    /// cost of one that has not; one that has some more may be encoded.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], and [`TokenizerError::TooLong`].
    pub fn encode_within(
        &self,
        text: &str,
        add_special_tokens: bool,
        tokens_max: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let suspicious = text.len() > tokens_max.saturating_mul(LIKELY_TOKEN_BYTES);
        // A cut makes tokens of what would be one. That is less than a quarter more, whatever the text.
        let most = tokens_max.saturating_add(tokens_max / 4 + PIECE_BYTES / 64);
        if suspicious && self.count_up_to(text, most, PIECE_BYTES)? > most {
            return Err(TokenizerError::TooLong(tokens_max));
        }
        self.encode(text, add_special_tokens)
    }

    /// Tokens of `text` cut into pieces, up to the piece with which they are more than `most`.
    fn count_up_to(&self, text: &str, most: usize, piece_bytes: usize) -> Result<usize, TokenizerError> {
        let (mut rest, mut count) = (text, 0);
        while !rest.is_empty() && count <= most {
            let (piece, after) = rest.split_at(rest.floor_char_boundary(piece_bytes));
            count += self.encode(piece, false)?.len();
            rest = after;
        }
        Ok(count)
    }

    /// Text of `ids`; unknown ids are left out, incomplete UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Text`] if the tokenizer gives up on them.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        contained(|| self.inner.decode(ids, skip_special_tokens)).map_err(TokenizerError::Text)
    }

    /// The vocabulary's own spelling of a token, `None` for an unknown id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token in the vocabulary's own spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes that `id` adds to a text. A token may end in the middle of a character. `None` if ids have no bytes
    /// of their own in this vocabulary; an unknown id has no bytes.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        if self.spelling == Spelling::Other {
            return None;
        }
        let Some(token) = self.inner.id_to_token(id) else { return Some(Vec::new()) };
        Some(match self.spelling {
            Spelling::ByteLevel => byte_level(&token).unwrap_or_else(|| token.into_bytes()),
            _ if self.special.contains(&id) => token.into_bytes(),
            _ => {
                byte_fallback(&token).map_or_else(|| token.replace('▁', " ").into_bytes(), |byte| vec![byte])
            }
        })
    }

    /// A token as log-probabilities name it: its text, or `bytes:\xf0\x9f` if it is no complete text, as OpenAI has it;
    /// beside it its bytes.
    pub fn label(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = match self.bytes(id) {
            Some(bytes) => bytes,
            None => self.decode(&[id], false).unwrap_or_default().into_bytes(),
        };
        match String::from_utf8(bytes) {
            Ok(text) => {
                let bytes = text.as_bytes().to_vec();
                (text, bytes)
            }
            Err(error) => {
                let bytes = error.into_bytes();
                (format!("bytes:{}", bytes.escape_ascii()), bytes)
            }
        }
    }

    /// Whether `id` is a special token, hidden from answers.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Bytes of text that a token stands for, at most.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// The begin token as `tokenizer_config.json` spells it.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The end token as `tokenizer_config.json` spells it.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    /// The id of [`Tokenizer::eos_token`].
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }
}

/// Runs a call into the tokenizers crate, which panics on some inconsistent files (a post-processor that names a token
/// the vocabulary lacks, ids beyond 32 bits): a panic is an error like any other.
fn contained<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(format!("inconsistent: {}", panic_message(panic.as_ref()))),
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panicked")
}

/// A special token is written as a string or as `{"content": ...}`.
fn special_token(config: &Value, name: &str) -> Option<String> {
    let token = &config[name];
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

fn spelling(decoder: &Value) -> Spelling {
    match decoder["type"].as_str() {
        Some("ByteLevel") => Spelling::ByteLevel,
        Some("Metaspace") => Spelling::Metaspace,
        Some("Replace") if decoder["pattern"]["String"] == "▁" && decoder["content"] == " " => {
            Spelling::Metaspace
        }
        Some("Sequence") => decoder["decoders"]
            .as_array()
            .into_iter()
            .flatten()
            .map(spelling)
            .find(|&found| found != Spelling::Other)
            .unwrap_or(Spelling::Other),
        _ => Spelling::Other,
    }
}

/// The bytes of a token in GPT-2's spelling; `None` if a character is not in its table, as in added tokens, which are
/// plain text.
///
/// Printable Latin-1 characters stand for themselves, the 68 other bytes for the characters from U+0100 on.
fn byte_level(token: &str) -> Option<Vec<u8>> {
    token
        .chars()
        .map(|c| match u32::from(c) {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
            code @ 0x100..=0x120 => Some((code - 0x100) as u8),
            code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
            0x143 => Some(0xad),
            _ => None,
        })
        .collect()
}

/// `<0x0A>` is the byte 10.
fn byte_fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;
    use serde_json::json;

    use super::*;

    const DEMO: &[u8] = include_bytes!("../../../../demo-model/tokenizer.json");
    const DEMO_CONFIG: &[u8] = include_bytes!("../../../../demo-model/tokenizer_config.json");

    /// The same `cases` every time.
    pub(crate) fn fixed_seed(cases: u32) -> ProptestConfig {
        ProptestConfig { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Default::default() }
    }

    /// The demo model's: byte-level BPE.
    pub(crate) fn demo() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_bytes(DEMO, Some(DEMO_CONFIG)).unwrap())
    }

    /// As Llama 2's: SentencePiece BPE with byte fallback.
    pub(crate) fn metaspace() -> Arc<Tokenizer> {
        let words = ["<unk>", "<s>", "</s>", "▁hello", "▁world", "▁", "h", "e"];
        let mut vocab: serde_json::Map<String, Value> =
            words.iter().enumerate().map(|(id, w)| (w.to_string(), json!(id))).collect();
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(words.len() + byte));
        }
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": []}
        });
        Arc::new(Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap())
    }

    /// As BERT's: tokens without bytes of their own.
    pub(crate) fn wordpiece() -> Arc<Tokenizer> {
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "hello": 1, "wor": 2, "##ld": 3}}
        });
        Arc::new(Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap())
    }

    #[test]
    fn the_demo_tokenizer_has_its_specials() {
        let tokenizer = demo();
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<|bos|>"), Some("<|eos|>")));
        assert_eq!((tokenizer.eos_id(), tokenizer.vocab_size()), (Some(2), 856));
        assert_eq!(tokenizer.encode("a", true).unwrap()[0], 1);
        assert_ne!(tokenizer.encode("a", false).unwrap()[0], 1);
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(100));
    }

    #[test]
    fn every_byte_level_token_has_the_bytes_that_decoding_gives() {
        let tokenizer = demo();
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.bytes(id).unwrap();
            assert_eq!(
                String::from_utf8_lossy(&bytes),
                tokenizer.decode(&[id], false).unwrap(),
                "token {id}"
            );
        }
        let all: HashSet<Vec<u8>> = (0..856).map(|id| tokenizer.bytes(id).unwrap()).collect();
        assert!((0..=255u8).all(|byte| all.contains(&vec![byte])), "a byte has no token");
    }

    #[test]
    fn labels_are_text_or_escaped_bytes() {
        let tokenizer = demo();
        let crab = tokenizer.encode("🦀", false).unwrap();
        assert_eq!(tokenizer.label(crab[0]), ("bytes:\\xf0".into(), vec![0xf0]));
        assert_eq!(metaspace().label(3), (" hello".into(), b" hello".to_vec()));
        assert_eq!(tokenizer.label(u32::MAX), (String::new(), Vec::new()));
    }

    #[test]
    fn long_texts_are_counted_no_further_than_need_be() {
        let tokenizer = demo();
        let long = "word ".repeat(1_000_000);
        let counted = tokenizer.count_up_to(&long, 1000, 1 << 12).unwrap();
        assert!((1000..10_000).contains(&counted), "{counted}");
        assert_eq!(tokenizer.encode_within(&long, true, 1000), Err(TokenizerError::TooLong(1000)));
        // Near the limit the exact count decides, and that is for others to do.
        let near = "a".repeat(1100);
        assert_eq!(tokenizer.encode_within(&near, true, 1000), tokenizer.encode(&near, true));
    }

    #[test]
    fn files_that_are_no_tokenizers_are_refused() {
        let check = |file: &[u8]| match Tokenizer::from_bytes(file, None) {
            Err(TokenizerError::File { file: "tokenizer.json", .. }) => {}
            other => panic!("{other:?}"),
        };
        check(b"");
        check(b"[]");
        check(b"{}");
        check(&DEMO[..DEMO.len() / 2]);
        check("[".repeat(100_000).as_bytes());
        assert!(Tokenizer::from_bytes(DEMO, Some(b"{")).is_err());
        assert!(Tokenizer::from_bytes(DEMO, Some(br#"{"eos_token": [1], "bos_token": 7}"#)).is_ok());
    }

    /// Replaces one value somewhere in the file.
    fn mutate(value: &mut Value, path: &[usize], with: &Value) {
        let Some((&step, rest)) = path.split_first() else {
            *value = with.clone();
            return;
        };
        match value {
            Value::Array(items) if !items.is_empty() => {
                let at = step % items.len();
                mutate(&mut items[at], rest, with);
            }
            Value::Object(fields) if !fields.is_empty() => {
                let at = step % fields.len();
                if let Some(field) = fields.values_mut().nth(at) {
                    mutate(field, rest, with);
                }
            }
            _ => *value = with.clone(),
        }
    }

    proptest! {
        #![proptest_config(fixed_seed(64))]

        #[test]
        fn a_text_that_fits_is_never_too_long(
            words in proptest::collection::vec("[ab 🦀é\\n]{0,30}| {1,90}|(key ){1,30}|<\\|eos\\|>", 1..40),
            times in 1usize..60,
        ) {
            let (tokenizer, text) = (demo(), words.concat().repeat(times));
            let tokens = tokenizer.encode(&text, false).unwrap();
            let counted = tokenizer.count_up_to(&text, usize::MAX, 1 << 10).unwrap();
            prop_assert!(counted <= tokens.len() + tokens.len() / 4 + 16, "{} of {}", counted, tokens.len());
            prop_assert_eq!(tokenizer.encode_within(&text, false, tokens.len()).unwrap(), tokens);
        }
    }

    proptest! {
        #![proptest_config(fixed_seed(200))]
        #[test]
        fn mutated_files_never_panic(
            path in proptest::collection::vec(0usize..1000, 1..5),
            with in prop_oneof![
                Just(json!(null)), Just(json!(-1)), Just(json!(u64::MAX)), Just(json!("x")), Just(json!({})),
                Just(json!([])), Just(json!(1.5)), Just(json!("(((")), Just(json!({"Regex": "(a+)+$"})),
            ],
        ) {
            let mut file: Value = serde_json::from_slice(DEMO).unwrap();
            mutate(&mut file, &path, &with);
            if let Ok(tokenizer) = Tokenizer::from_bytes(file.to_string().as_bytes(), Some(DEMO_CONFIG)) {
                let _ = tokenizer.encode("The key of Barin is 271828.\n", true);
                let _ = tokenizer.decode(&[1, 500, u32::MAX], true);
            }
        }
    }
}
