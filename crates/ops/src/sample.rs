//! Sampling: penalties, temperature, truncation, one draw, log-probabilities.
//!
//! The order is vLLM's, which clients are used to: bias and bans, then penalties, then temperature, then min-p, top-k,
//! top-p, then the draw. Log-probabilities are those of the raw logits, before any of it.

use std::ops::Range;

use crate::Random;

/// What a request asks of sampling.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens less likely than this times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from tokens that were generated before.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among generated tokens.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Added to logits, as (token, bias).
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random stream.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// One token to be drawn.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// Row of the logits.
    pub row: usize,
    /// How to draw.
    pub params: &'a SamplingParams,
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens generated so far.
    pub generated: &'a [u32],
    /// Tokens that must not be drawn now (end tokens before `min_tokens`).
    pub banned: &'a [u32],
    /// Position that the new token will take: keys the random stream, so a draw depends on (seed, position) alone.
    pub position: u64,
    /// Number of most likely tokens to report with their log-probabilities; `None` skips the softmax for them.
    pub top_logprobs: Option<u32>,
    /// Report the log-probability of this token instead of drawing one (prompt log-probabilities).
    pub forced: Option<u32>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability under the raw logits; 0 when log-probabilities were not asked for.
    pub logprob: f32,
    /// Its place among all tokens by raw logit, from 1; 0 when log-probabilities were not asked for.
    pub rank: u32,
    /// Where its alternatives lie in [`SampleOutput::top`].
    pub top: Range<u32>,
    /// False when its logit is NaN, which is so only when every logit is (or, for a forced token, its own): the token
    /// then means nothing and the request must fail.
    pub valid: bool,
}

/// Where sampled tokens go; kept between steps so that nothing is allocated once it is warm.
#[derive(Clone, Debug, Default)]
pub struct SampleOutput {
    /// One per [`SampleRow`], in order.
    pub sampled: Vec<Sampled>,
    /// Most likely tokens with their log-probabilities, descending, ties by token id.
    pub top: Vec<(u32, f32)>,
}

impl SampleOutput {
    /// Forgets the tokens of the last step.
    pub fn clear(&mut self) {
        self.sampled.clear();
        self.top.clear();
    }
}

/// Working memory of [`sample`].
#[derive(Clone, Debug, Default)]
pub struct SampleScratch {
    logits: Vec<f32>,
    candidates: Vec<(u32, f32)>,
    occurrences: Vec<u32>,
}

impl SampleScratch {
    /// Scratch that will not grow for `vocab` tokens.
    pub fn with_vocab(vocab: usize) -> Self {
        SampleScratch {
            logits: Vec::with_capacity(vocab),
            candidates: Vec::with_capacity(vocab),
            occurrences: Vec::with_capacity(vocab),
        }
    }
}

/// Draws one token from `logits` (`[vocab]`) and appends it, with what was asked about it, to `out`.
pub fn sample(out: &mut SampleOutput, logits: &[f32], row: &SampleRow, scratch: &mut SampleScratch) {
    let token = match row.forced {
        Some(token) => token,
        None => draw(logits, row, scratch),
    };
    let valid = !logits[token as usize].is_nan();
    let mut sampled = Sampled { token, logprob: 0.0, rank: 0, top: 0..0, valid };
    if let Some(count) = row.top_logprobs {
        let log_sum = log_sum_exp(logits);
        let own = logits[token as usize];
        sampled.logprob = own - log_sum;
        sampled.rank = 1 + logits.iter().filter(|&&l| l > own).count() as u32;
        let start = out.top.len() as u32;
        top_candidates(&mut scratch.candidates, logits, count as usize);
        out.top.extend(scratch.candidates.iter().map(|&(t, l)| (t, l - log_sum)));
        sampled.top = start..out.top.len() as u32;
    }
    out.sampled.push(sampled);
}

/// The `count` largest entries of `logits` into `candidates`, descending, ties by index.
fn top_candidates(candidates: &mut Vec<(u32, f32)>, logits: &[f32], count: usize) {
    candidates.clear();
    candidates.extend(logits.iter().enumerate().map(|(t, &l)| (t as u32, l)));
    let count = count.min(candidates.len());
    keep_top(candidates, count);
}

/// Descending by value, then ascending by token: a total order, so equal logits never make a result depend on the
/// algorithm.
fn by_likelihood(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn keep_top(candidates: &mut Vec<(u32, f32)>, count: usize) {
    if count < candidates.len() {
        if count > 0 {
            candidates.select_nth_unstable_by(count - 1, by_likelihood);
        }
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(by_likelihood);
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    max + sum.ln() as f32
}

/// Index of the largest logit, ties by index.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[best] || logits[best].is_nan() {
            best = i;
        }
    }
    best as u32
}

fn draw(raw: &[f32], row: &SampleRow, scratch: &mut SampleScratch) -> u32 {
    let p = row.params;
    let plain = p.logit_bias.is_empty()
        && row.banned.is_empty()
        && p.repetition_penalty == 1.0
        && p.presence_penalty == 0.0
        && p.frequency_penalty == 0.0;
    let SampleScratch { logits, candidates, occurrences } = scratch;
    let logits: &[f32] = if plain {
        raw
    } else {
        logits.clear();
        logits.extend_from_slice(raw);
        adjust(logits, occurrences, row);
        logits
    };
    let best = argmax(logits);
    if p.temperature <= 0.0 || p.top_k == 1 {
        return best;
    }
    truncate(candidates, logits, logits[best as usize], p);
    let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
    let mut target = Random::keyed(p.seed, row.position).unit() * total;
    for &(token, weight) in candidates.iter() {
        target -= f64::from(weight);
        if target < 0.0 {
            return token;
        }
    }
    // Rounding can leave a crumb after the last candidate; no candidate at all means that every logit was NaN.
    candidates.last().map_or(best, |c| c.0)
}

/// Bias, bans and penalties, on a copy of the logits.
fn adjust(logits: &mut [f32], occurrences: &mut Vec<u32>, row: &SampleRow) {
    let p = row.params;
    for &(token, bias) in &p.logit_bias {
        logits[token as usize] += bias;
    }
    for &token in row.banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
    if p.repetition_penalty == 1.0 && p.presence_penalty == 0.0 && p.frequency_penalty == 0.0 {
        return;
    }
    // Bit 31 marks a token of the prompt, the rest counts its occurrences in the answer. Taking the count
    // out when a token is visited first both penalises each token once and leaves the table zero for the next row.
    const IN_PROMPT: u32 = 1 << 31;
    occurrences.resize(logits.len(), 0);
    for &token in row.prompt {
        occurrences[token as usize] |= IN_PROMPT;
    }
    for &token in row.generated {
        occurrences[token as usize] += 1;
    }
    for &token in row.prompt.iter().chain(row.generated) {
        let marks = std::mem::take(&mut occurrences[token as usize]);
        if marks == 0 {
            continue;
        }
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
        let generated = marks & !IN_PROMPT;
        if generated > 0 {
            *logit -= p.presence_penalty + p.frequency_penalty * generated as f32;
        }
    }
}

/// The tokens that survive temperature, min-p, top-k and top-p, with weights relative to the likeliest. In index order
/// when nothing truncates, else descending.
fn truncate(candidates: &mut Vec<(u32, f32)>, logits: &[f32], max: f32, p: &SamplingParams) {
    let inverse = 1.0 / p.temperature;
    let weights = logits.iter().enumerate().map(|(t, &l)| (t as u32, ((l - max) * inverse).exp()));
    candidates.clear();
    candidates.extend(weights.filter(|c| c.1 > 0.0 && c.1 >= p.min_p));
    let top_k = p.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        keep_top(candidates, top_k);
    }
    if p.top_p < 1.0 {
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        // Tokens below (1 - top_p) / n of the mass hold less than 1 - top_p together, so none of them is in the
        // nucleus: what has to be sorted is short.
        let floor = total * f64::from(1.0 - p.top_p) / candidates.len() as f64;
        candidates.retain(|c| f64::from(c.1) >= floor);
        candidates.sort_unstable_by(by_likelihood);
        let mut mass = 0.0;
        let nucleus = total * f64::from(p.top_p);
        let kept = candidates.iter().take_while(|c| {
            let wanted = mass < nucleus;
            mass += f64::from(c.1);
            wanted
        });
        let kept = kept.count().max(1);
        candidates.truncate(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(params: &SamplingParams) -> SampleRow<'_> {
        SampleRow {
            row: 0,
            params,
            prompt: &[],
            generated: &[],
            banned: &[],
            position: 0,
            top_logprobs: None,
            forced: None,
        }
    }

    fn one(logits: &[f32], row: &SampleRow) -> Sampled {
        let mut out = SampleOutput::default();
        sample(&mut out, logits, row, &mut SampleScratch::default());
        out.sampled.remove(0)
    }

    /// Empirical frequencies of `n` draws at different positions.
    fn frequencies(logits: &[f32], params: &SamplingParams, n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..n {
            counts[one(logits, &SampleRow { position, ..row(params) }).token as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn greedy_breaks_ties_by_index() {
        let params = SamplingParams { temperature: 0.0, ..Default::default() };
        assert_eq!(one(&[1.0, 3.0, 3.0, 2.0], &row(&params)).token, 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_key() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let params = SamplingParams { seed: 11, ..Default::default() };
        let seen = frequencies(&logits, &params, 20_000);
        for (f, p) in seen.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((f - p).abs() < 0.015, "{seen:?}");
        }
        let at = |position| one(&logits, &SampleRow { position, ..row(&params) }).token;
        assert_eq!((0..50).map(at).collect::<Vec<_>>(), (0..50).map(at).collect::<Vec<_>>());
    }

    #[test]
    fn truncations_keep_what_the_formulas_keep() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |params: SamplingParams| {
            frequencies(&logits, &params, 3000).iter().map(|&f| f > 0.0).collect::<Vec<_>>()
        };
        let base = SamplingParams::default();
        assert_eq!(kept(SamplingParams { top_k: 2, ..base.clone() }), [true, true, false, false]);
        assert_eq!(kept(SamplingParams { top_p: 0.79, ..base.clone() }), [true, true, false, false]);
        assert_eq!(kept(SamplingParams { top_p: 0.81, ..base.clone() }), [true, true, true, false]);
        assert_eq!(kept(SamplingParams { top_p: 0.0, ..base.clone() }), [true, false, false, false]);
        assert_eq!(kept(SamplingParams { min_p: 0.2, ..base.clone() }), [true, true, true, false]);
        // Temperature comes before truncation: at 0.5 the ratios are squared.
        assert_eq!(kept(SamplingParams { min_p: 0.2, temperature: 0.5, ..base }), [true, true, false, false]);
    }

    #[test]
    fn penalties_bias_and_bans() {
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        let logits = [2.0, 1.9, -1.0, 0.0];
        let p = SamplingParams { repetition_penalty: 1.5, ..greedy.clone() };
        assert_eq!(one(&logits, &SampleRow { prompt: &[0, 0], ..row(&p) }).token, 1, "divided once or more");
        let p = SamplingParams { repetition_penalty: 1.04, ..greedy.clone() };
        assert_eq!(one(&logits, &SampleRow { prompt: &[0, 0, 0], ..row(&p) }).token, 0, "divided once only");
        let p = SamplingParams { frequency_penalty: 0.06, ..greedy.clone() };
        assert_eq!(one(&logits, &SampleRow { generated: &[0], ..row(&p) }).token, 0);
        assert_eq!(one(&logits, &SampleRow { generated: &[0, 0], ..row(&p) }).token, 1);
        let p = SamplingParams { presence_penalty: 0.06, ..greedy.clone() };
        assert_eq!(one(&logits, &SampleRow { generated: &[0, 0], ..row(&p) }).token, 0);
        assert_eq!(
            one(&logits, &SampleRow { prompt: &[0, 0], ..row(&p) }).token,
            0,
            "prompt is not penalised"
        );
        let p = SamplingParams { logit_bias: vec![(3, 5.0)], ..greedy.clone() };
        assert_eq!(one(&logits, &row(&p)).token, 3);
        assert_eq!(one(&logits, &SampleRow { banned: &[0, 1], ..row(&greedy) }).token, 3);
    }

    #[test]
    fn scratch_carries_nothing_over() {
        let p = SamplingParams { temperature: 0.0, frequency_penalty: 1.0, ..Default::default() };
        let (mut out, mut scratch) = (SampleOutput::default(), SampleScratch::default());
        sample(&mut out, &[2.0, 1.5], &SampleRow { generated: &[0], ..row(&p) }, &mut scratch);
        sample(&mut out, &[2.0, 1.5], &SampleRow { generated: &[1], ..row(&p) }, &mut scratch);
        assert_eq!(out.sampled.iter().map(|s| s.token).collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn only_a_row_without_any_number_is_invalid() {
        let nan = f32::NAN;
        for temperature in [0.0, 1.0] {
            let params = SamplingParams { temperature, ..Default::default() };
            assert!(!one(&[nan, nan, nan], &row(&params)).valid);
            let drawn = one(&[nan, 1.0, nan], &row(&params));
            assert_eq!((drawn.token, drawn.valid), (1, true));
            assert!(!one(&[nan, 1.0], &SampleRow { forced: Some(0), ..row(&params) }).valid);
        }
    }

    #[test]
    fn logprobs_are_of_raw_logits() {
        let logits: Vec<f32> = [0.1f32, 0.6, 0.3].iter().map(|p| p.ln() + 4.0).collect();
        let p = SamplingParams { temperature: 0.0, logit_bias: vec![(2, 9.0)], ..Default::default() };
        let (mut out, mut scratch) = (SampleOutput::default(), SampleScratch::default());
        sample(&mut out, &logits, &SampleRow { top_logprobs: Some(2), ..row(&p) }, &mut scratch);
        let s = &out.sampled[0];
        assert_eq!((s.token, s.rank, s.top.clone()), (2, 2, 0..2));
        assert!((s.logprob - 0.3f32.ln()).abs() < 1e-6);
        assert_eq!((out.top[0].0, out.top[1].0), (1, 2));
        let forced = SampleRow { top_logprobs: Some(0), forced: Some(0), ..row(&p) };
        assert!((one(&logits, &forced).logprob - 0.1f32.ln()).abs() < 1e-6);
    }
}
