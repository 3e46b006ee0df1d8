//! What sparse attention asks of a device: digests of partitions, scores of digests, and which slots a row attends to.
//!
//! A *policy* (crate `sparse`) is a [`Method`]: data that says which of these operations run and how. Everything that
//! every device must agree on to the bit, the arithmetic of partitions and budgets, is here and is pure.
//!
//! Invariant: a row's selection depends on its query, the keys before it, its position and its [`Attention`] alone.

use std::ops::Range;

use crate::cluster::{OrderedCopy, OrderedSlots};
pub use crate::digest::{DIGEST_ALIGN, DigestKind, DigestLayout, DigestSpec, TwoSided, padded_width};
use crate::tally::page_words;
use crate::{HeadShape, Random};

/// How a sequence attends. Rows of its prompt always attend to everything before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Attention {
    /// To everything.
    #[default]
    Dense,
    /// Rows at positions from `prompt_len` on attend to what a method selects.
    Sparse {
        /// Index into [`crate::Batch::methods`].
        method: u16,
        /// Slots to attend to at most, per KV head and layer, those always attended included.
        budget: u32,
    },
}

/// Where the scores of partitions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Nothing is scored: what the always-set leaves of the budget is spent on more recent tokens.
    Recency,
    /// Uniform in `[0, 1)` from (seed, layer, scope, position, partition): the floor that a method must beat.
    Random {
        /// Of the stream.
        seed: u64,
    },
    /// Uniform in `[0, 1)` from (seed, layer, scope, partition, epoch): lots that each partition draws anew now and then, so
    /// that consecutive selections share the stated part. See [`replay_score`].
    Replay {
        /// Of the stream.
        seed: u64,
        /// Share of a selection that the one before it holds, in thousandths.
        overlap_permille: u16,
    },
    /// An upper bound or estimate of `q . k` from the digests with this index.
    ///
    /// For two-sided digests `sum_c max(q_c hi_c, q_c lo_c)`; since `hi >= lo` that is `max(q, 0) . hi + min(q, 0) . lo`,
    /// a dot product with the *lifted* query `[max(q, 0) | min(q, 0)]`. For means `q . mean`. Unscaled.
    Digest {
        /// Index into the digests that the device was given.
        digests: u16,
    },
    /// `q . k / sqrt(dim)` of a gate's query and the digests with this index, of [`DigestKind::Gate`]; one score per KV head.
    /// An open partition has none: it must be attended, not [compete](Method::open_competes).
    Gate {
        /// Index into the digests that the device was given.
        digests: u16,
    },
}

impl Rule {
    /// The same with this copy of the pages, where partitions are clusters.
    pub const fn with_copy(self, copy: OrderedCopy) -> Self {
        match self {
            Rule::Clusters { span_tokens, estimate_permille, .. } => {
                Rule::Clusters { span_tokens, estimate_permille, copy: copy.0 }
            }
            other => other,
        }
    }
}

impl Score {
    /// The index of the digests that it reads, if it reads any.
    pub const fn digests(self) -> Option<usize> {
        match self {
            Score::Digest { digests } | Score::Gate { digests } => Some(digests as usize),
            Score::Recency | Score::Random { .. } | Score::Replay { .. } => None,
        }
    }

    /// The same with the digests of this index, where it reads digests.
    pub const fn with_digests(self, digests: u16) -> Self {
        match self {
            Score::Digest { .. } => Score::Digest { digests },
            Score::Gate { .. } => Score::Gate { digests },
            other => other,
        }
    }
}

/// Which candidates are selected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// As many of the best as the budget holds.
    Top,
    /// Of these, the ones with at least this probability: [`Method::softmax`] must be set. So fewer than the budget holds and
    /// than [`Method::take_min`], none if no candidate is so likely.
    Threshold(f32),
    /// Partitions are clusters of the keys of spans, of [`DigestKind::Cluster`]: whole ones are taken, the best first, until the
    /// next one would exceed the budget; empty ones never. The tokens of a span that the row sees less than
    /// [`Always::recent_tokens`] after its end are attended. Of the other clusters the best enter attention as one
    /// *pseudo-token* each: key `c`, value `v` and weight `n exp(q . c / sqrt(head_dim))` with centroid, mean value and size.
    Clusters {
        /// Tokens of a span.
        span_tokens: usize,
        /// Clusters that become pseudo-tokens, in thousandths of all those that the row may select.
        estimate_permille: u32,
        /// Which of the [copies](OrderedCopy) of the pages is in their order.
        copy: usize,
    },
}

/// How the scores of the query heads of a scope become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// Their maximum.
    Max,
    /// The score of the mean of the queries.
    MeanQuery,
}

/// Who shares a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The query heads of one KV head.
    KvHead,
    /// All query heads of a layer.
    Layer,
}

/// What is attended to without being scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Always {
    /// The first tokens, in whole partitions.
    pub sink_tokens: u32,
    /// The last tokens, the row's own included, in whole partitions. At least 1 makes the row's own partition part of
    /// the always-set; 0 lets it compete once it is full.
    pub recent_tokens: u32,
    /// Up to so many generated tokens are attended in addition to `recent_tokens`, which then are those before them.
    pub generated_tokens: u32,
    /// So many partitions of the prompt, those whose digests stand worst for their keys: [`DigestKind::Landmark`] tells.
    /// They are attended by all generated tokens alike, and count as part of the budget.
    pub outliers: u32,
}

/// A sparse method as the operations of a device see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Method {
    /// Layers from the first on that attend to everything.
    pub dense_layers: usize,
    /// Tokens per partition.
    pub partition_tokens: usize,
    /// Where scores come from.
    pub score: Score,
    /// How scores of a scope become one.
    pub reduce: Reduce,
    /// Whether the scores of each query head become probabilities first: a softmax over the candidates of
    /// `score / sqrt(head_dim)`; those of [`Score::Gate`] are scaled already.
    pub softmax: bool,
    /// Who shares a selection.
    pub scope: Scope,
    /// What needs no score.
    pub always: Always,
    /// Whether a partition that is not full competes like any other, by what it holds so far, instead of being always
    /// attended.
    pub open_competes: bool,
    /// Partitions that are selected at least.
    pub take_min: usize,
    /// Which candidates are selected.
    pub rule: Rule,
}

/// What a row with a given context and budget attends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowPlan {
    /// Positions `0..sink_end` are attended.
    pub sink_end: usize,
    /// Positions `tail_start..context` are attended.
    pub tail_start: usize,
    /// Partitions that are scored; disjoint from both.
    pub candidates: Range<usize>,
    /// How many of them are selected; of clusters, at most.
    pub take: usize,
    /// Tokens that the selected clusters may have together; 0 where partitions are not clusters.
    pub room: usize,
    /// How many clusters become pseudo-tokens, at most.
    pub estimated: usize,
    /// Those among which outliers are, and how many; the others are what `take` counts.
    pub outliers: (Range<usize>, usize),
    /// Which slots are not those of positions.
    pub ordered: OrderedSlots,
}

impl RowPlan {
    /// Everything.
    fn all() -> Self {
        let outliers = (0..0, 0);
        RowPlan {
            sink_end: 0,
            tail_start: 0,
            candidates: 0..0,
            take: 0,
            room: 0,
            estimated: 0,
            outliers,
            ordered: OrderedSlots::NONE,
        }
    }

    /// Whether the row attends to everything.
    pub fn is_dense(&self) -> bool {
        self.candidates.is_empty() && self.tail_start <= self.sink_end
    }

    /// Pages of `page_tokens` slots that the row attends to per KV head, at most, if its context has `context` tokens and its
    /// partitions `partition_tokens`; clusters, of any number of tokens, are counted as if they had as many.
    pub fn pages_max(&self, context: usize, partition_tokens: usize, page_tokens: usize) -> usize {
        let all = context.div_ceil(page_tokens);
        if self.is_dense() {
            return all;
        }
        let first_of_tail = self.tail_start.max(self.sink_end) / page_tokens;
        let per_partition = partition_tokens.div_ceil(page_tokens);
        // Clusters follow one another, so most begin within a page.
        let selected = match self.room {
            0 => (self.take + self.outliers.1) * per_partition,
            room => room.div_ceil(partition_tokens) + room.div_ceil(page_tokens),
        };
        (self.sink_end.div_ceil(page_tokens) + selected + all - first_of_tail).min(all)
    }

    /// Slots that the row attends to, if every partition taken has `partition_tokens`; where these are clusters, at most.
    /// Pseudo-tokens are not among them.
    pub fn attended(&self, context: usize, partition_tokens: usize) -> usize {
        let tail = context - self.tail_start.max(self.sink_end);
        let selected = match self.room {
            0 => (self.take + self.outliers.1) * partition_tokens,
            room => room,
        };
        (self.sink_end + tail + selected).min(context)
    }
}

impl Method {
    /// Whether its scores are made of digests.
    pub const fn reads_digests(&self) -> bool {
        matches!(self.score, Score::Digest { .. } | Score::Gate { .. })
    }

    /// What a row attends to whose context, itself included, has `context` tokens, the first `prompt_tokens` of them its
    /// prompt, with `budget` tokens at most.
    ///
    /// A budget of the context or more gives everything. One too small for the always-set and `take_min` partitions is
    /// raised to that; where partitions are clusters, to the always-set.
    ///
    /// # Panics
    /// When the context is empty.
    pub fn plan(&self, context: usize, prompt_tokens: usize, budget: usize) -> RowPlan {
        assert!(context > 0, "a row attends to itself");
        let all = RowPlan::all();
        if budget >= context {
            return all;
        }
        let length = self.partition_tokens;
        let Always { sink_tokens, recent_tokens, generated_tokens, outliers } = self.always;
        let generated = context.saturating_sub(prompt_tokens).min(generated_tokens as usize);
        let recent_tokens = recent_tokens as usize + generated;
        if let Rule::Clusters { span_tokens, estimate_permille, copy } = self.rule {
            let tail_start = context.saturating_sub(recent_tokens) / span_tokens * span_tokens;
            if tail_start == 0 {
                return all;
            }
            let sink_end = (sink_tokens as usize).min(tail_start);
            let candidates = 0..tail_start / length;
            let room = budget.saturating_sub(sink_end + context - tail_start);
            let take = room.min(candidates.len());
            let estimated = candidates.len() * estimate_permille as usize / 1000;
            let ordered = OrderedSlots { end: tail_start, copy: OrderedCopy(copy) };
            return RowPlan { sink_end, tail_start, candidates, take, room, estimated, ordered, ..all };
        }
        let complete = context / length;
        let sinks = (sink_tokens as usize).div_ceil(length).min(complete);
        let sink_end = sinks * length;
        if self.score == Score::Recency {
            let recent = budget.saturating_sub(sink_end).max(recent_tokens).max(1);
            let tail_start = context.saturating_sub(recent);
            return if tail_start <= sink_end { all } else { RowPlan { sink_end, tail_start, ..all } };
        }
        // The partition that is open, or where there is none the one after the last.
        let competing = if self.open_competes { context.div_ceil(length) } else { complete };
        let recent = context.saturating_sub(recent_tokens) / length;
        let candidates_end = if recent_tokens == 0 { competing } else { recent.min(competing) };
        if candidates_end <= sinks {
            return all;
        }
        let tail_start = (candidates_end * length).min(context);
        let candidates = sinks..candidates_end;
        // The same ones for every generated token.
        let of_prompt =
            sinks..(prompt_tokens.saturating_sub(self.always.recent_tokens as usize) / length).max(sinks);
        let of_prompt = of_prompt.start..of_prompt.end.min(candidates_end);
        let outliers = (outliers as usize).min(of_prompt.len());
        let always = sink_end + context - tail_start + outliers * length;
        let take = (budget.saturating_sub(always) / length).max(self.take_min);
        if take + outliers >= candidates.len() {
            return all;
        }
        let among = if outliers == 0 { 0..0 } else { of_prompt };
        RowPlan { sink_end, tail_start, candidates, take, outliers: (among, outliers), ..all }
    }

    /// Most lines, whatever the reduction and whether tags are needed.
    const fn lines_max(&self, heads: HeadShape) -> usize {
        match self.score {
            Score::Digest { .. } => heads.group() + 1,
            _ => 1,
        }
    }

    /// Scores become probabilities by a softmax of score over the square root of this.
    pub const fn softmax_scale(&self, head_dim: usize) -> usize {
        match self.score {
            Score::Gate { .. } => 1,
            _ => head_dim,
        }
    }

    /// Whether selections need the tags of digests: cosines tell outliers, sizes what of clusters fits.
    pub const fn reads_tags(&self) -> bool {
        self.always.outliers > 0 || matches!(self.rule, Rule::Clusters { .. })
    }

    /// Lines of scores, with one more for tags where selections need them.
    pub const fn lines(&self, heads: HeadShape) -> usize {
        self.query_lines(heads) + self.reads_tags() as usize
    }

    /// Scores per KV head that are kept apart until selection: one per query head where they cannot be merged before.
    pub const fn query_lines(&self, heads: HeadShape) -> usize {
        match (self.score, self.reduce, self.softmax) {
            (Score::Digest { .. }, Reduce::Max, _) | (Score::Digest { .. }, _, true) => heads.group(),
            _ => 1,
        }
    }
}

/// The score of [`Score::Random`]; `head` is 0 where a layer shares its selection.
#[inline]
pub fn random_score(seed: u64, layer: usize, head: usize, position: usize, partition: usize) -> f32 {
    let place = (layer as u64) << 48 | (head as u64) << 32 | position as u64;
    // 24 bits, which f32 holds exactly.
    let bits = Random::keyed(Random::keyed(seed, place).next_u64(), partition as u64).next_u64() >> 40;
    bits as f32 / (1 << 24) as f32
}

/// How often a partition draws anew under [`Score::Replay`]: its chance per step, times 2^32.
///
/// Where a share `rho` of the partitions draws anew in a step and `k` of `n` are selected, `k x` of them fall out of the
/// selection and as many come in, with `x = rho (1 - k / n)`, both give or take `sqrt(k x)`. Since always `k` are selected,
/// the larger of the two numbers changes: a share of `x + sqrt(x / (pi k))` on average, which is solved for `x`.
///
/// `k` and `n` are those of the first generated token, so that `rho` does not change while a request runs: an epoch that
/// depended on the row would jump.
pub fn replay_rate(method: &Method, overlap_permille: u16, prompt_tokens: usize, budget: usize) -> u64 {
    let plan = method.plan(prompt_tokens + 1, prompt_tokens, budget);
    let changed = 1.0 - f64::from(overlap_permille.min(1000)) / 1000.0;
    // A prompt within its budget selects nothing: as if there were many partitions, and many selected.
    let (noise, left_out) = match (plan.take as f64, plan.candidates.len() as f64) {
        (0.0, _) => (0.0, 1.0),
        (take, candidates) => (1.0 / (std::f64::consts::PI * take).sqrt(), 1.0 - take / candidates),
    };
    let root = ((noise * noise + 4.0 * changed).sqrt() - noise) / 2.0;
    let rho = (root * root / left_out).min(1.0);
    (rho * (1u64 << 32) as f64) as u64
}

/// The score of [`Score::Replay`] for draws at `rate` ([`replay_rate`]); `head` is 0 where a layer shares its selection.
///
/// The epoch of a partition is `floor(position * rho + phase)`, with a phase of its own, uniform in `[0, 1)`. So what is
/// selected depends on the position, not on what was selected before.
#[inline]
pub fn replay_score(
    seed: u64,
    rate: u64,
    layer: usize,
    head: usize,
    position: usize,
    partition: usize,
) -> f32 {
    let place = (layer as u64) << 48 | (head as u64) << 32 | partition as u64;
    let mut own = Random::keyed(seed, place);
    let phase = own.next_u64() >> 32;
    // Positions have 32 bits, so no product reaches 2^64.
    let epoch = (position as u64 * rate + phase) >> 32;
    let bits = Random::keyed(own.next_u64(), epoch).next_u64() >> 40;
    bits as f32 / (1 << 24) as f32
}

/// `score` as an integer of the same order, so that the order is total and 0 equals -0. A NaN has the place that its
/// bits give it: its row is thrown away later, but until then every device must do the same.
pub fn order_key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// Marks positions `range` in a bitmap of slots.
pub fn mark(bits: &mut [u64], range: Range<usize>) {
    if range.is_empty() {
        return;
    }
    let (first, last) = (range.start / 64, (range.end - 1) / 64);
    let low = u64::MAX << (range.start % 64);
    let high = u64::MAX >> (63 - (range.end - 1) % 64);
    if first == last {
        bits[first] |= low & high;
        return;
    }
    bits[first] |= low;
    bits[first + 1..last].fill(u64::MAX);
    bits[last] |= high;
}

/// Words of a bitmap over `context` slots.
pub const fn bitmap_words(context: usize) -> usize {
    context.div_ceil(64)
}

/// Bounds on selections, for their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectionLimits {
    /// Rows of a batch that attend to a selection.
    pub rows_max: usize,
    /// Tokens of a context.
    pub context_max: usize,
    /// Heads.
    pub heads: HeadShape,
    /// Slots per page.
    pub page_tokens: usize,
    /// Tokens of the shortest partition of any method.
    pub partition_tokens_min: usize,
    /// Most [`Method::lines`] of any method.
    pub lines_max: usize,
    /// Whether clusters may become pseudo-tokens.
    pub estimates: bool,
}

impl SelectionLimits {
    /// For `methods`.
    pub fn new(
        methods: &[Method],
        heads: HeadShape,
        page_tokens: usize,
        rows_max: usize,
        context_max: usize,
    ) -> Self {
        let scored = methods.iter().filter(|m| m.score != Score::Recency);
        SelectionLimits {
            rows_max,
            context_max,
            heads,
            page_tokens,
            partition_tokens_min: scored.map(|m| m.partition_tokens).min().unwrap_or(context_max).max(1),
            // Requests may ask for another reduction than the server's.
            lines_max: methods.iter().map(|m| m.lines_max(heads)).max().unwrap_or(1),
            estimates: methods.iter().any(|m| matches!(m.rule, Rule::Clusters { .. })),
        }
    }

    /// Bytes of scores, selections, queries of gates and attention to pseudo-tokens, without what threads need beside them.
    pub const fn bytes(&self) -> u64 {
        let HeadShape { q_heads, kv_heads, head_dim } = self.heads;
        let scores = self.lines_max * self.partitions_max() * size_of::<f32>();
        let bits = (bitmap_words(self.context_max) + page_words(self)) * size_of::<u64>();
        let gated = head_dim * size_of::<f32>();
        let estimates = if self.estimates { q_heads * (head_dim + 2) * size_of::<f32>() } else { 0 };
        (self.rows_max as u64).saturating_mul((kv_heads * (scores + bits + gated) + estimates) as u64)
    }

    /// Whether there is memory for selections of `method`.
    pub fn hold(&self, method: &Method) -> bool {
        let scored = method.score != Score::Recency;
        !scored
            || method.partition_tokens >= self.partition_tokens_min
                && method.lines(self.heads) <= self.lines_max
                && (self.estimates || !matches!(method.rule, Rule::Clusters { .. }))
    }

    /// Scores per line.
    pub const fn partitions_max(&self) -> usize {
        self.context_max.div_ceil(self.partition_tokens_min)
    }
}

#[cfg(test)]
#[path = "sparse_tests.rs"]
mod tests;
