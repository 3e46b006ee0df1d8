//! Frequencies of rotary position embedding (Su et al. 2021) and of its extensions to longer contexts.
//!
//! Computed in f32, operation by operation as `transformers` does (`modeling_rope_utils.py`), so that the angles of
//! far positions agree. Powers are taken in f64 and rounded: within half a unit in the last place on every platform.

use std::f64::consts::PI;

use ops::Batch;
use serde::Deserialize;

use crate::Error;
use crate::config::POSITIONS_MAX;

/// Rotary position embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Channels per head; channel `c` and `c + head_dim / 2` are rotated as a pair.
    pub head_dim: usize,
    /// Context of the configuration.
    pub max_position_embeddings: usize,
    /// How the context was extended.
    pub scaling: RopeScaling,
}

/// How a context was extended beyond that of the pretraining.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by `factor` (Chen et al. 2023).
    Linear {
        /// Of the context.
        factor: f64,
    },
    /// A base that grows with the length of the text once it exceeds `max_position_embeddings` (NTK-aware scaling).
    Dynamic {
        /// Of the context.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// Of the context.
        factor: f64,
        /// Wavelengths longer than the original context over this are scaled.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context over this are kept.
        high_freq_factor: f64,
        /// Context of the pretraining.
        original_max_position_embeddings: usize,
    },
    /// The same idea with a linear ramp over channels, and attention sharpened (Peng et al. 2023).
    Yarn {
        /// Of the context.
        factor: f64,
        /// Scale of cosine and sine.
        attention_factor: f64,
        /// Channels that turn more often within the original context are kept.
        beta_fast: f64,
        /// Channels that turn less often are scaled.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded outward to whole channels.
        truncate: bool,
        /// Context of the pretraining.
        original_max_position_embeddings: usize,
    },
}

/// `rope_scaling` or `rope_parameters` as written.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RawRope {
    pub rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    older_type: Option<String>,
    factor: Option<f64>,
    pub original_max_position_embeddings: Option<u64>,
    pub partial_rotary_factor: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    full_attention: Option<serde::de::IgnoredAny>,
    sliding_attention: Option<serde::de::IgnoredAny>,
}

impl RawRope {
    pub(crate) fn check(&self, head_dim: usize, max_position_embeddings: usize) -> Result<RopeConfig, Error> {
        if self.full_attention.is_some() || self.sliding_attention.is_some() {
            return Err(Error::config("rope_parameters that differ by layer type are not supported"));
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|&f| f != 1.0) {
            return Err(Error::config(format!("partial_rotary_factor {factor} is not supported, only 1")));
        }
        let theta = bounded("rope_theta", self.rope_theta.unwrap_or(10_000.0), 1.0..1e15)?;
        let scaling = self.scaling(max_position_embeddings)?;
        Ok(RopeConfig { theta, head_dim, max_position_embeddings, scaling })
    }

    fn scaling(&self, max_position_embeddings: usize) -> Result<RopeScaling, Error> {
        let kind = self.rope_type.as_deref().or(self.older_type.as_deref()).unwrap_or("default");
        let original = match self.original_max_position_embeddings {
            None => max_position_embeddings,
            Some(n) if (1..=POSITIONS_MAX).contains(&n) => n as usize,
            Some(n) => {
                return Err(Error::config(format!(
                    "original_max_position_embeddings {n} is not in 1..={POSITIONS_MAX}"
                )));
            }
        };
        match kind {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: self.factor()? }),
            "dynamic" => Ok(RopeScaling::Dynamic { factor: self.factor()? }),
            "llama3" => {
                let low_freq_factor = needed("low_freq_factor", self.low_freq_factor)?;
                let high_freq_factor = needed("high_freq_factor", self.high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(Error::config(format!(
                        "high_freq_factor {high_freq_factor} is not above low_freq_factor {low_freq_factor}"
                    )));
                }
                Ok(RopeScaling::Llama3 {
                    factor: self.factor()?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original,
                })
            }
            "yarn" => {
                let factor = match self.factor {
                    None => max_position_embeddings as f64 / original as f64,
                    Some(_) => self.factor()?,
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    attention_factor: bounded("attention_factor", self.attention_factor(factor), 0.0..1e6)?,
                    beta_fast: bounded("beta_fast", or_default(self.beta_fast, 32.0), 0.0..1e6)?,
                    beta_slow: bounded("beta_slow", or_default(self.beta_slow, 1.0), 0.0..1e6)?,
                    truncate: self.truncate.unwrap_or(true),
                    original_max_position_embeddings: original,
                })
            }
            other => Err(Error::config(format!(
                "rope_type {other:?} is not supported; supported are default, linear, dynamic, llama3, yarn"
            ))),
        }
    }

    fn factor(&self) -> Result<f64, Error> {
        needed("factor", self.factor)
    }

    fn attention_factor(&self, factor: f64) -> f64 {
        let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        match (self.attention_factor, or_default(self.mscale, 0.0), or_default(self.mscale_all_dim, 0.0)) {
            (Some(given), _, _) => given,
            (None, numerator, denominator) if numerator != 0.0 && denominator != 0.0 => {
                mscale(numerator) / mscale(denominator)
            }
            _ => mscale(1.0),
        }
    }
}

/// What Python's `value or default` gives.
fn or_default(value: Option<f64>, default: f64) -> f64 {
    value.filter(|&v| v != 0.0).unwrap_or(default)
}

fn needed(key: &str, value: Option<f64>) -> Result<f64, Error> {
    bounded(key, value.ok_or_else(|| Error::config(format!("the RoPE scaling lacks {key}")))?, 0.0..1e6)
}

fn bounded(key: &str, value: f64, open: std::ops::Range<f64>) -> Result<f64, Error> {
    if value > open.start && value < open.end {
        return Ok(value);
    }
    Err(Error::config(format!("{key} {value} is not between {} and {}", open.start, open.end)))
}

impl RopeConfig {
    /// Tokens that fit into a context: `max_position_embeddings` where the configuration already counts the extension,
    /// times the factor where it does not.
    pub fn context_limit(&self) -> usize {
        let tokens = match self.scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => self.max_position_embeddings as f64,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                self.max_position_embeddings as f64 * factor.max(1.0)
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
                original_max_position_embeddings as f64 * factor.max(1.0)
            }
        };
        tokens.min(POSITIONS_MAX as f64) as usize
    }
}

/// The frequencies of a model, and which rows of a batch use which.
#[derive(Clone, Debug)]
pub struct Rope {
    config: RopeConfig,
    base: Vec<f32>,
}

impl Rope {
    /// Computes the frequencies of `config`.
    pub fn new(config: &RopeConfig) -> Self {
        Rope { config: config.clone(), base: base_frequencies(config) }
    }

    /// Scale of cosine and sine, called `attention_factor` in configurations.
    pub fn scale(&self) -> f32 {
        match self.config.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Radians per token of each channel pair, `[head_dim / 2]`, in a text of up to `max_position_embeddings` tokens.
    pub fn inv_freq(&self) -> &[f32] {
        &self.base
    }

    /// Appends the frequencies for a text of `seq_len` tokens to `out`. They differ from [`Rope::inv_freq`] only for
    /// [`RopeScaling::Dynamic`] and beyond `max_position_embeddings`.
    pub fn extend_inv_freq(&self, seq_len: u32, out: &mut Vec<f32>) {
        match self.config.scaling {
            RopeScaling::Dynamic { factor } if seq_len as usize > self.config.max_position_embeddings => {
                let ratio = factor as f32 * seq_len as f32 / self.config.max_position_embeddings as f32;
                let growth = ratio - (factor - 1.0) as f32;
                let dim = self.config.head_dim as f64;
                let theta = self.config.theta as f32 * power(growth, (dim / (dim - 2.0)) as f32);
                out.extend(inverse_powers(theta, self.config.head_dim));
            }
            _ => out.extend_from_slice(&self.base),
        }
    }

    /// Length that tokens of a request must stay below for their KV to be shared with other requests, which holds for
    /// the prompt as a whole too: beyond it, the rotation of a key depends on how long the request's prompt is. `None`
    /// where there is no such length.
    pub fn prefix_limit(&self) -> Option<usize> {
        matches!(self.config.scaling, RopeScaling::Dynamic { .. })
            .then_some(self.config.max_position_embeddings)
    }

    /// Fills `inv_freq` with the distinct sets of frequencies that the rows of `batch` need and `sets` with the set of
    /// each row.
    ///
    /// With dynamic scaling a row's frequencies are those for the length of the text when the row is computed by a
    /// generation that runs the whole prompt and then token by token: the prompt's length for its tokens, the own
    /// position + 1 after it. That depends on nothing but request and position, so it does not matter how a prompt is
    /// cut into steps, or whether an answer is computed again after a preemption.
    pub fn frequencies(&self, batch: &Batch, inv_freq: &mut Vec<f32>, sets: &mut Vec<u32>) {
        inv_freq.clear();
        inv_freq.extend_from_slice(&self.base);
        sets.clear();
        let Some(limit) = self.prefix_limit() else {
            sets.resize(batch.num_rows(), 0);
            return;
        };
        let (mut num_sets, mut newest) = (1, None);
        for sequence in batch.sequences {
            for row in sequence.rows.clone() {
                let position = batch.positions[row as usize];
                let seq_len = sequence.prompt_len.max(position + 1);
                if seq_len as usize <= limit {
                    sets.push(0);
                    continue;
                }
                if newest != Some(seq_len) {
                    self.extend_inv_freq(seq_len, inv_freq);
                    num_sets += 1;
                    newest = Some(seq_len);
                }
                sets.push(num_sets - 1);
            }
        }
    }

    /// Values that [`Rope::frequencies`] can put into `inv_freq` for batches of up to `rows_max` rows.
    pub fn inv_freq_len_max(&self, rows_max: usize) -> usize {
        let sets_max = if self.prefix_limit().is_some() { 1 + rows_max } else { 1 };
        sets_max * self.base.len()
    }
}

fn power(base: f32, exponent: f32) -> f32 {
    f64::from(base).powf(f64::from(exponent)) as f32
}

/// `theta^(2c / head_dim)` for each pair of channels `c`.
fn powers(theta: f32, head_dim: usize) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |c| power(theta, (2 * c) as f32 / head_dim as f32))
}

fn inverse_powers(theta: f32, head_dim: usize) -> impl Iterator<Item = f32> {
    powers(theta, head_dim).map(|p| 1.0 / p)
}

fn base_frequencies(config: &RopeConfig) -> Vec<f32> {
    let unscaled = inverse_powers(config.theta as f32, config.head_dim);
    match config.scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => unscaled.collect(),
        RopeScaling::Linear { factor } => unscaled.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f64;
            let wavelen_long = (original / low_freq_factor) as f32;
            let wavelen_short = (original / high_freq_factor) as f32;
            let band = (high_freq_factor - low_freq_factor) as f32;
            let scaled = |frequency: f32| {
                let wavelen = (2.0 * PI) as f32 / frequency;
                if wavelen > wavelen_long {
                    frequency / factor as f32
                } else if wavelen < wavelen_short {
                    frequency
                } else {
                    let kept = (original as f32 / wavelen - low_freq_factor as f32) / band;
                    (1.0 - kept) * frequency / factor as f32 + kept * frequency
                }
            };
            unscaled.map(scaled).collect()
        }
        RopeScaling::Yarn { factor, .. } => {
            let (low, high) = yarn_ramp(config);
            let scaled = |(c, power): (usize, f32)| {
                let scaled_share = ((c as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let kept = 1.0 - scaled_share;
                1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
            };
            powers(config.theta as f32, config.head_dim).enumerate().map(scaled).collect()
        }
    }
}

/// Channels between which YaRN goes over from keeping to scaling: those that make `beta_fast` and `beta_slow` turns
/// within the original context.
fn yarn_ramp(config: &RopeConfig) -> (f64, f64) {
    let RopeScaling::Yarn { beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } =
        config.scaling
    else {
        unreachable!("called for YaRN only");
    };
    let dim = config.head_dim as f64;
    let channel_of = |turns: f64| {
        let radius = original_max_position_embeddings as f64 / (turns * 2.0 * PI);
        dim * radius.ln() / (2.0 * config.theta.ln())
    };
    let (mut low, mut high) = (channel_of(beta_fast), channel_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high { (low, high + 0.001) } else { (low, high) }
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
