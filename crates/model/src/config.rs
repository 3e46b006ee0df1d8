//! `config.json`: what it may say, and the checked configuration made from it.

use ops::HeadShape;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::arch::{self, Architecture, Variant};
use crate::error::one_line;
use crate::rope::RawRope;
use crate::{Error, RopeConfig, Source};

const CONFIG_BYTES_MAX: u64 = 4 << 20;

// Far beyond any model, so that arithmetic on sizes cannot overflow and a hostile file cannot ask for much.
const HIDDEN_MAX: u64 = 1 << 17;
const INTERMEDIATE_MAX: u64 = 1 << 20;
const LAYERS_MAX: u64 = 1 << 10;
const HEADS_MAX: u64 = 1 << 10;
const HEAD_DIM_ALLOWED: std::ops::RangeInclusive<u64> = 32..=256;
const VOCAB_MAX: u64 = 1 << 22;
/// Positions are rotated in f32, which holds integers up to this.
pub(crate) const POSITIONS_MAX: u64 = 1 << 24;

/// A model's configuration after everything in it was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Class name, such as `LlamaForCausalLM`.
    pub architecture: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Heads of attention.
    pub heads: HeadShape,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding; its `context_limit` is that of the model.
    pub rope: RopeConfig,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases of the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Biases of the MLP.
    pub mlp_bias: bool,
    /// Whether every head of q and k is normalised before the rotation.
    pub qk_norm: bool,
    /// Per layer, the number of last tokens that it attends to, the own included; `None` is all.
    pub windows: Vec<Option<usize>>,
    /// Tokens that end an answer, from `config.json` and `generation_config.json`, ascending.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
}

/// `config.json` as it is written, by transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
#[derive(Debug, Deserialize)]
pub(crate) struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    pub head_dim: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub use_sliding_window: Option<bool>,
    /// Left out and null mean different things.
    #[serde(default, deserialize_with = "present")]
    pub sliding_window: Option<Option<u64>>,
    pub max_window_layers: Option<u64>,
    pub layer_types: Option<Vec<String>>,
    eos_token_id: Option<TokenIds>,
    bos_token_id: Option<u32>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    original_max_position_embeddings: Option<u64>,
    partial_rotary_factor: Option<f64>,
}

/// `generation_config.json`, as far as it concerns the model.
#[derive(Debug, Default, Deserialize)]
struct RawGenerationConfig {
    eos_token_id: Option<TokenIds>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn as_slice(&self) -> &[u32] {
        match self {
            TokenIds::One(id) => std::slice::from_ref(id),
            TokenIds::Many(ids) => ids,
        }
    }
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl ModelConfig {
    /// Reads `config.json` and, where it exists, `generation_config.json`.
    ///
    /// # Errors
    /// What is missing, malformed, out of bounds or not supported.
    pub fn read(source: &Source) -> Result<Self, Error> {
        let config = source.require("config.json", CONFIG_BYTES_MAX)?;
        let mut config = ModelConfig::parse(&config)?;
        const GENERATION: &str = "generation_config.json";
        if let Some(generation) = source.read(GENERATION, CONFIG_BYTES_MAX)? {
            let generation: RawGenerationConfig =
                serde_json::from_slice(&generation).map_err(|e| Error::file(GENERATION, e))?;
            config.add_end_tokens(GENERATION, generation.eos_token_id.as_ref())?;
        }
        Ok(config)
    }

    /// Checks the bytes of a `config.json`.
    ///
    /// # Errors
    /// What is missing, malformed, out of bounds or not supported.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(json).map_err(Error::config)?;
        refuse_unsupported(&value)?;
        let raw: RawConfig = serde_json::from_value(value).map_err(Error::config)?;
        let architecture = find_architecture(&raw)?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::config(format!("hidden_act {act:?} is not supported, only \"silu\"")));
        }

        let hidden_size = required("hidden_size", raw.hidden_size, 1..=HIDDEN_MAX)?;
        let num_layers = required("num_hidden_layers", raw.num_hidden_layers, 1..=LAYERS_MAX)?;
        let variant = (architecture.variant)(&raw, num_layers)?;
        let heads = head_shape(&raw, hidden_size, variant.head_dim)?;
        let vocab_size = required("vocab_size", raw.vocab_size, 1..=VOCAB_MAX)?;
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(Error::config(format!("rms_norm_eps {rms_norm_eps} is not between 0 and 1")));
        }
        let positions = required("max_position_embeddings", raw.max_position_embeddings, 1..=POSITIONS_MAX)?;
        let Variant { qkv_bias, output_bias, mlp_bias, qk_norm, windows, .. } = variant;
        let mut config = ModelConfig {
            architecture: architecture.name,
            hidden_size,
            intermediate_size: required("intermediate_size", raw.intermediate_size, 1..=INTERMEDIATE_MAX)?,
            num_layers,
            heads,
            vocab_size,
            rms_norm_eps: rms_norm_eps as f32,
            rope: rope(&raw, heads.head_dim, positions)?,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias,
            output_bias,
            mlp_bias,
            qk_norm,
            windows,
            eos_token_ids: Vec::new(),
            bos_token_id: raw.bos_token_id,
        };
        config.check_token("config.json", "bos_token_id", raw.bos_token_id)?;
        config.add_end_tokens("config.json", raw.eos_token_id.as_ref())?;
        Ok(config)
    }

    /// Tokens that fit into a context: what the model was made for, times what its RoPE scaling adds.
    pub fn context_limit(&self) -> usize {
        self.rope.context_limit()
    }

    fn add_end_tokens(&mut self, file: &str, ids: Option<&TokenIds>) -> Result<(), Error> {
        for &id in ids.map_or(&[][..], TokenIds::as_slice) {
            self.check_token(file, "eos_token_id", Some(id))?;
            if let Err(place) = self.eos_token_ids.binary_search(&id) {
                self.eos_token_ids.insert(place, id);
            }
        }
        Ok(())
    }

    fn check_token(&self, file: &str, key: &str, id: Option<u32>) -> Result<(), Error> {
        match id {
            Some(id) if id as usize >= self.vocab_size => Err(Error::file(
                file,
                format!("{key} {id} is outside of the vocabulary of {} tokens", self.vocab_size),
            )),
            _ => Ok(()),
        }
    }
}

/// Options under which the formulas would be others than ours, with the values that leave them as they are. Nobody is
/// served by a model that answers a little wrong.
fn refuse_unsupported(config: &Value) -> Result<(), Error> {
    let neutral: [(&str, &[Value]); 15] = [
        ("quantization_config", &[]),
        ("attn_logit_softcapping", &[]),
        ("final_logit_softcapping", &[]),
        ("logit_softcapping", &[]),
        ("query_pre_attn_scalar", &[]),
        ("attention_multiplier", &[]),
        ("embedding_multiplier", &[Value::from(1.0), Value::from(1)]),
        ("residual_multiplier", &[Value::from(1.0), Value::from(1)]),
        ("logits_scaling", &[Value::from(1.0), Value::from(1)]),
        ("logit_scale", &[Value::from(1.0), Value::from(1)]),
        ("use_qk_norm", &[Value::Bool(false)]),
        ("use_bidirectional_attention", &[Value::Bool(false)]),
        ("is_causal", &[Value::Bool(true)]),
        ("is_encoder_decoder", &[Value::Bool(false)]),
        ("num_local_experts", &[Value::from(0)]),
    ];
    for (key, values) in neutral {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(value) if values.contains(value) => {}
            Some(Value::Object(_)) => return Err(Error::config(format!("{key} is not supported"))),
            Some(value) => return Err(Error::config(format!("{key} = {value} is not supported"))),
        }
    }
    Ok(())
}

fn find_architecture(raw: &RawConfig) -> Result<&'static Architecture, Error> {
    let names = raw.architectures.as_deref().unwrap_or(&[]);
    let known = |name: &String| arch::ARCHITECTURES.iter().find(|a| a.name == name);
    names.iter().find_map(known).ok_or_else(|| Error::Architecture {
        found: if names.is_empty() {
            "(none named)".into()
        } else {
            one_line(&format!("{:?}", names.join(", ")))
        },
        supported: arch::ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
    })
}

fn required(key: &str, value: Option<u64>, allowed: std::ops::RangeInclusive<u64>) -> Result<usize, Error> {
    let value = value.ok_or_else(|| Error::config(format!("{key} is missing")))?;
    if !allowed.contains(&value) {
        return Err(Error::config(format!(
            "{key} {value} is not in {}..={}",
            allowed.start(),
            allowed.end()
        )));
    }
    Ok(value as usize)
}

fn head_shape(raw: &RawConfig, hidden_size: usize, head_dim: Option<u64>) -> Result<HeadShape, Error> {
    let q_heads = required("num_attention_heads", raw.num_attention_heads, 1..=HEADS_MAX)?;
    let kv_heads = match raw.num_key_value_heads {
        None => q_heads,
        some => required("num_key_value_heads", some, 1..=HEADS_MAX)?,
    };
    if !q_heads.is_multiple_of(kv_heads) {
        return Err(Error::config(format!(
            "num_attention_heads {q_heads} is not a multiple of num_key_value_heads {kv_heads}"
        )));
    }
    if head_dim.is_none() && !hidden_size.is_multiple_of(q_heads) {
        return Err(Error::config(format!(
            "hidden_size {hidden_size} is not a multiple of num_attention_heads {q_heads}, and there is no head_dim"
        )));
    }
    let head_dim = head_dim.unwrap_or((hidden_size / q_heads) as u64);
    let head_dim = required("head_dim", Some(head_dim), HEAD_DIM_ALLOWED)?;
    if !head_dim.is_multiple_of(2) {
        return Err(Error::config(format!("head_dim {head_dim} is odd")));
    }
    Ok(HeadShape { q_heads, kv_heads, head_dim })
}

fn rope(raw: &RawConfig, head_dim: usize, max_position_embeddings: usize) -> Result<RopeConfig, Error> {
    // transformers lets `rope_scaling` win where both are written.
    let mut rope = raw.rope_scaling.clone().or_else(|| raw.rope_parameters.clone()).unwrap_or_default();
    rope.rope_theta = rope.rope_theta.or(raw.rope_theta);
    rope.partial_rotary_factor = rope.partial_rotary_factor.or(raw.partial_rotary_factor);
    // And here the outer one.
    rope.original_max_position_embeddings =
        raw.original_max_position_embeddings.or(rope.original_max_position_embeddings);
    rope.check(head_dim, max_position_embeddings)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
