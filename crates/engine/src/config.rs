//! What an engine is made with, and what it can take in.

use kv::QuotaRule;
use ops::PAGE_TOKENS_ALLOWED;

use crate::guard::GuardRule;
use crate::request::{Refusal, Request};

/// Limits of an engine, resolved: nothing here is a default or a guess. All memory of the step loop follows from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Sequences that run at the same time, at most.
    pub max_num_seqs: usize,
    /// Token budget: rows per step of sequences that have more than one token to compute (prompts, and what a preempted
    /// sequence computes again). A sequence whose last token is to be computed gets its row beside the budget.
    pub max_inject_tokens: usize,
    /// Requests that wait when as many run as may, at most; further ones are refused.
    pub max_waiting: usize,
    /// Tokens of prompt and answer together, at most.
    pub max_context: usize,
    /// Alternatives that a request may ask for per token.
    pub max_logprobs: u32,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens per block.
    pub page_tokens: usize,
    /// Blocks of the KV pool.
    pub num_blocks: usize,
    /// Whether prompts share KV.
    pub prefix_cache: bool,
    /// The HBM tier, where the device has one apart from DRAM.
    pub tier: Option<TierShare>,
    /// How prompts go through the layers.
    pub prefill: Prefill,
    /// Who takes part in a step.
    pub admission: Admission,
    /// A request that others were preferred to this often goes first.
    pub max_skips: u32,
    /// When requests that attend sparsely are checked; `None` never.
    pub guard: Option<GuardRule>,
    /// Where KV depends on the length of the prompt (dynamic NTK scaling beyond the original context): a prompt longer
    /// than this shares nothing, a shorter one only positions below it.
    pub prefix_limit: Option<usize>,
    /// Tokens of a prompt that are shared as a whole or not at all, a multiple of `page_tokens`: more than these where digests lie
    /// with blocks before the last token that they depend on.
    pub shared_together: usize,
}

/// How the tokens of a prompt go through the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefill {
    /// Chunk after chunk, each through all layers.
    Chunked,
    /// Layer after layer, each for the whole prompt (SparseServe's layer-segmented prefill).
    Segmented(Segments),
}

/// Bounds of layer-segmented prefill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Layers of the model.
    pub layers: usize,
    /// Prompts that are on their way at a time, at most.
    pub prompts: usize,
    /// Tokens whose hidden states are kept between steps, of all of these together.
    pub hidden_rows: usize,
}

/// Who takes part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Whoever has a seat.
    Slots,
    /// As many as the HBM tier has room for: what each needs is estimated from what it selected in so many steps
    /// (SparseServe's working-set-aware batch size control). In unified memory as with slots.
    WorkingSet {
        /// Steps.
        steps: usize,
    },
}

/// What the engine divides of an HBM tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierShare {
    /// Extents of cache frames.
    pub extents: usize,
    /// Layers, which share them alike.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// How requests share them.
    pub rule: QuotaRule,
    /// Blocks of running requests that attend sparsely, at most: HBM has the digests of as many.
    pub digest_places: usize,
}

/// A configuration that cannot work; says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// Whether an engine can be made of this.
    ///
    /// # Errors
    /// When a limit is 0, the page size is not supported, or an index of a batch would not fit in 32 bits.
    pub fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            (self.max_num_seqs, "max_num_seqs"),
            (self.max_inject_tokens, "max_inject_tokens"),
            (self.max_waiting, "max_waiting"),
            (self.vocab_size, "vocab_size"),
            (self.num_blocks, "num_blocks"),
        ];
        for (value, name) in positive {
            if value == 0 {
                return Err(ConfigError(format!("{name} must be at least 1")));
            }
        }
        if self.max_context < 2 {
            return Err(ConfigError("max_context must hold a token of a prompt and one of an answer".into()));
        }
        if !PAGE_TOKENS_ALLOWED.contains(&self.page_tokens) {
            let allowed = PAGE_TOKENS_ALLOWED;
            return Err(ConfigError(format!(
                "page_tokens is {} and must be one of {allowed:?}",
                self.page_tokens
            )));
        }
        if let Some(TierShare { digest_places, .. }) = self.tier
            && digest_places < self.table_blocks_max()
        {
            return Err(ConfigError(format!(
                "digest_places is {digest_places} and the longest request has {} blocks",
                self.table_blocks_max()
            )));
        }
        if self.shared_together == 0 || !self.shared_together.is_multiple_of(self.page_tokens) {
            return Err(ConfigError(format!(
                "shared_together is {} and must be a multiple of page_tokens, {}",
                self.shared_together, self.page_tokens
            )));
        }
        if let Prefill::Segmented(Segments { layers, prompts, hidden_rows }) = self.prefill {
            if layers == 0 || prompts == 0 || self.tier.is_some_and(|tier| tier.layers != layers) {
                return Err(ConfigError(format!("{prompts} prompts that go through {layers} layers")));
            }
            if hidden_rows < self.max_context {
                return Err(ConfigError(format!(
                    "hidden states of {hidden_rows} tokens are kept and the longest prompt has {}",
                    self.max_context
                )));
            }
        }
        if self.admission == (Admission::WorkingSet { steps: 0 }) || self.max_skips == 0 {
            return Err(ConfigError("working_set_steps and max_skips must be at least 1".into()));
        }
        let largest = [
            (self.max_context, 1, "max_context"),
            (self.num_blocks, 1, "num_blocks"),
            (self.vocab_size, 1, "vocab_size"),
            (
                self.max_num_seqs,
                self.table_blocks_max(),
                "max_num_seqs times the blocks of the longest sequence",
            ),
            (self.rows_max(), 1 + self.max_logprobs as usize, "rows of a step times max_logprobs"),
        ];
        for (a, b, name) in largest {
            if a.checked_mul(b).is_none_or(|product| product >= u32::MAX as usize) {
                return Err(ConfigError(format!("{name} does not fit in 32 bits: {a} * {b}")));
            }
        }
        Ok(())
    }

    /// Requests that run and wait together, at most.
    pub fn requests_max(&self) -> usize {
        self.max_num_seqs.saturating_add(self.max_waiting)
    }

    /// Rows of a step, at most.
    pub fn rows_max(&self) -> usize {
        self.max_num_seqs.saturating_add(self.max_inject_tokens)
    }

    /// Blocks of the longest sequence that can run.
    pub(crate) fn table_blocks_max(&self) -> usize {
        self.max_context.div_ceil(self.page_tokens).min(self.num_blocks)
    }

    /// Positions below this can be shared with other sequences.
    pub(crate) fn shareable_tokens(&self, prompt_len: usize) -> usize {
        match self.prefix_limit {
            _ if !self.prefix_cache => 0,
            None => usize::MAX,
            Some(limit) if prompt_len > limit => 0,
            Some(limit) => limit,
        }
    }

    /// Resolves `request`: checks it against the limits, and lowers `max_tokens` to what the context leaves.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] when it makes no sense, [`Refusal::NeverFits`] when it could never run.
    pub fn resolve(&self, mut request: Request) -> Result<Request, Refusal> {
        self.check_tokens(&request)?;
        let prompt_len = request.prompt.len();
        if prompt_len >= self.max_context {
            return Err(Refusal::NeverFits(format!(
                "the prompt has {prompt_len} tokens and the context limit is {} tokens for prompt and answer together",
                self.max_context
            )));
        }
        let left = (self.max_context - prompt_len) as u32;
        request.stopping.max_tokens = request.stopping.max_tokens.min(left);
        let max_tokens = request.stopping.max_tokens as usize;
        // The last token of an answer is never run, so it needs no KV.
        let kv_tokens = kv_tokens_max(prompt_len, max_tokens);
        let pool_tokens = self.num_blocks * self.page_tokens;
        if kv_tokens > pool_tokens {
            return Err(Refusal::NeverFits(format!(
                "the prompt has {prompt_len} tokens and up to {max_tokens} are to be generated: that needs KV for \
                 {kv_tokens} tokens, and the pool holds {pool_tokens} ({} blocks of {} tokens)",
                self.num_blocks, self.page_tokens
            )));
        }
        Ok(request)
    }

    fn check_tokens(&self, request: &Request) -> Result<(), Refusal> {
        let invalid = |text: String| Err(Refusal::Invalid(text));
        if request.prompt.is_empty() {
            return invalid("the prompt is empty".into());
        }
        let biased = request.sampling.logit_bias.iter().map(|b| b.0);
        let mut tokens = request.prompt.iter().chain(&request.stopping.end_tokens).copied().chain(biased);
        if let Some(token) = tokens.find(|&token| token as usize >= self.vocab_size) {
            return invalid(format!(
                "token id {token} is not in the vocabulary of {} tokens",
                self.vocab_size
            ));
        }
        if request.stopping.max_tokens == 0 && request.prompt_logprobs.is_none() {
            return invalid("max_tokens is 0 and no log-probabilities of the prompt are asked for".into());
        }
        let wanted = request.logprobs.max(request.prompt_logprobs).unwrap_or(0);
        if wanted > self.max_logprobs {
            return invalid(format!(
                "{wanted} alternatives per token are asked for and {} may",
                self.max_logprobs
            ));
        }
        Ok(())
    }
}

/// Tokens whose KV a request needs at most: all but the last of the answer, which is never run.
pub(crate) fn kv_tokens_max(prompt_len: usize, max_tokens: usize) -> usize {
    prompt_len + max_tokens.saturating_sub(1)
}
