//! A runner whose "KV" is the token itself with how it attended, and whose next token is a hash of the whole context, read back through the
//! block table. A wrong table, a missing or shared block, or a chunk out of place therefore changes an answer.

use std::hash::{DefaultHasher, Hash, Hasher};

use ops::coverage::{Coverage, Inspections};
use ops::residency::SeatCounters;
use ops::sample::{SampleOutput, SampleRow, Sampled};
use ops::sparse::Attention;
use ops::tally::WorkingSet;
use ops::tier::TierState;
use ops::{Batch, BlockIndex, Random, SeatIndex, Segment, SequenceRows, Step};

use super::fake_tier::FakeTier;
use crate::guard::GuardRule;
use crate::request::{FinishReason, Request, Sparse, TokenLogprobs};
use crate::run::Runner;

pub const VOCAB: usize = 50;
/// Contexts that hold this token have NaN for logits.
pub const NAN_TOKEN: u32 = 49;
/// A step that runs this token panics.
pub const PANIC_TOKEN: u32 = 48;

/// What is kept of a token: itself, and a tag that tells how it attended, 0 for everything.
pub type Kv = (u32, u64);

/// The tag of a token at `position`: KV of tokens that attend sparsely belongs to their method, budget and prompt.
fn tag(attention: Attention, sparse: Option<Sparse>, prompt_len: usize, position: usize) -> u64 {
    let (Attention::Sparse { budget, .. }, Some(sparse)) = (attention, sparse) else { return 0 };
    if position < prompt_len {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    (budget, sparse.method.partition_tokens, prompt_len).hash(&mut hasher);
    hasher.finish() << 16 | (sparse.method.partition_tokens as u64) << 1 | 1
}

/// Of a tag that is not 0: tokens per partition of its method.
fn partition_of(tag: u64) -> usize {
    (tag >> 1 & 0x7fff) as usize
}

/// The tag of a token of `request`, with another budget than its own if `budget` says so.
fn tag_of(request: &Request, budget: Option<u32>, position: usize) -> u64 {
    let attention = match request.sparse {
        None => Attention::Dense,
        // What a guard lets attend to everything is dense.
        Some(_) if budget == Some(u32::MAX) => Attention::Dense,
        Some(sparse) => Attention::Sparse { method: 0, budget: budget.unwrap_or(sparse.budget) },
    };
    tag(attention, request.sparse, request.prompt.len(), position)
}

/// The KV of a prompt.
fn known_kv(request: &Request, tokens: &[u32]) -> Vec<Kv> {
    tokens.iter().enumerate().map(|(i, &token)| (token, tag_of(request, None, i))).collect()
}

/// What the fake model says after `context`.
pub struct Prediction {
    hash: u64,
    valid: bool,
}

impl Prediction {
    pub fn after(context: &[Kv]) -> Self {
        let mut hasher = DefaultHasher::new();
        context.hash(&mut hasher);
        Prediction { hash: hasher.finish(), valid: !context.iter().any(|kv| kv.0 == NAN_TOKEN) }
    }

    /// Never draws the two special tokens.
    pub fn draw(&self, seed: u64, position: u64, banned: &[u32]) -> u32 {
        let mut hasher = DefaultHasher::new();
        (self.hash, seed, position).hash(&mut hasher);
        let first = hasher.finish() as usize;
        let mut tokens = (0..48).map(|i| ((first + i) % 48) as u32);
        tokens.find(|t| !banned.contains(t)).expect("not all tokens are banned")
    }

    pub fn logprobs(&self, token: u32, count: u32) -> TokenLogprobs {
        TokenLogprobs { token, logprob: self.logprob(token), rank: 1 + token, top: self.top(count).collect() }
    }

    fn logprob(&self, token: u32) -> f32 {
        -((self.hash % 1000) as f32) - token as f32
    }

    fn top(&self, count: u32) -> impl Iterator<Item = (u32, f32)> {
        (0..count).map(|i| ((self.hash >> i) as u32 % 40, -(i as f32)))
    }
}

/// What the fake model says that a selection covers.
pub fn coverage(context: &[Kv], layer: u32) -> Coverage {
    let mut hasher = DefaultHasher::new();
    (context, layer).hash(&mut hasher);
    let drawn = hasher.finish();
    Coverage { mass: (drawn % 1000) as f32 / 1000.0, recall: (drawn / 1000 % 1000) as f32 / 1000.0 }
}

/// The guard by definition: budgets of positions as they come, from the whole answer so far.
struct NaiveGuard<'a> {
    rule: &'a GuardRule,
    sparse: Sparse,
    seed: u64,
    prompt_len: usize,
    page_tokens: usize,
    /// Of each position from the end of the prompt on, as far as decided; the last one holds on.
    budgets: Vec<u32>,
    read: u64,
    acted: usize,
}

impl NaiveGuard<'_> {
    fn budget(&mut self, position: usize) -> u32 {
        let at = position - self.prompt_len;
        let last = self.budgets.last().copied().unwrap_or(self.sparse.budget);
        while self.budgets.len() <= at {
            self.budgets.push(last);
        }
        self.budgets[at]
    }

    /// After the newest token, at the end of `context`, was run.
    fn check(&mut self, context: &[Kv]) {
        let position = context.len() - 1;
        if position < self.prompt_len {
            return;
        }
        let budget = self.budget(position);
        let mut random = Random::keyed(self.seed ^ 0x6775_6172_6400_0000, position as u64);
        let drawn = random.below(1_000_000) < self.rule.rate_ppm as usize;
        let plan = self.sparse.method.plan(context.len(), self.prompt_len, budget as usize);
        let cost = context.len().div_ceil(self.page_tokens) as u64 * self.rule.key_page_bytes;
        let generated = (context.len() - self.prompt_len) as u64;
        let layers: Vec<u32> = self
            .rule
            .layers
            .iter()
            .copied()
            .filter(|l| *l >= self.sparse.method.dense_layers as u32)
            .collect();
        if !drawn
            || plan.is_dense()
            || self.read + cost > generated * self.rule.bytes_per_token
            || layers.is_empty()
        {
            return;
        }
        self.read += cost;
        let mass = coverage(context, layers[random.below(layers.len())]).mass;
        let next = self.budget(position + 1);
        if mass >= self.rule.mass_min_permille as f32 / 1000.0 || next != budget || self.acted > 2 {
            return;
        }
        self.acted += 1;
        let attended = plan.attended(context.len(), self.sparse.method.partition_tokens) as u32;
        self.budgets.push(if self.acted == 3 { u32::MAX } else { budget.max(attended).saturating_mul(2) });
    }
}

/// The answer by definition, without batch, blocks or chunks.
pub fn expected_answer(request: &Request, max_context: usize) -> (Vec<u32>, FinishReason) {
    let (answer, reason, _) = expected(request, max_context, None);
    (answer, reason)
}

/// The same where a guard looks on, on pages of so many tokens, and with the KV of prompt and answer.
pub fn expected(
    request: &Request,
    max_context: usize,
    guard: Option<(&GuardRule, usize)>,
) -> (Vec<u32>, FinishReason, Vec<Kv>) {
    expected_after(&[], request, max_context, guard)
}

/// The same where the request goes on from KV of others.
pub fn expected_after(
    taken: &[Kv],
    request: &Request,
    max_context: usize,
    guard: Option<(&GuardRule, usize)>,
) -> (Vec<u32>, FinishReason, Vec<Kv>) {
    let mut context = request.prompt.clone();
    let mut kv = known_kv(request, &context);
    kv[..taken.len()].copy_from_slice(taken);
    let mut answer = Vec::new();
    let mut guard = guard.zip(request.sparse).map(|((rule, page_tokens), sparse)| NaiveGuard {
        rule,
        sparse,
        seed: request.sampling.seed,
        prompt_len: request.prompt.len(),
        page_tokens,
        budgets: Vec::new(),
        read: 0,
        acted: 0,
    });
    while answer.len() < request.stopping.max_tokens as usize && context.len() < max_context {
        let too_short = answer.len() < request.stopping.min_tokens as usize;
        let banned: &[u32] = if too_short { &request.stopping.end_tokens } else { &[] };
        let token = Prediction::after(&kv).draw(request.sampling.seed, context.len() as u64, banned);
        if let Some(guard) = &mut guard {
            guard.check(&kv);
        }
        let budget = guard.as_mut().map(|guard| guard.budget(context.len()));
        answer.push(token);
        context.push(token);
        kv.push((token, tag_of(request, budget, context.len() - 1)));
        if request.stopping.end_tokens.contains(&token) {
            return (answer, FinishReason::EndToken(token), kv);
        }
    }
    (answer, FinishReason::Length, kv)
}

/// Log-probabilities of the prompt by definition.
pub fn expected_prompt_logprobs(prompt: &[u32], count: u32) -> Vec<TokenLogprobs> {
    let kv: Vec<Kv> = prompt.iter().map(|&token| (token, 0)).collect();
    (1..prompt.len()).map(|i| Prediction::after(&kv[..i]).logprobs(prompt[i], count)).collect()
}

/// What the runner does wrong on purpose, to show that tests notice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Leaves what was in a slot before, if there was something.
    LosesWrites,
    /// Reads one token of the context from the block before.
    ReadsNeighbour,
    /// Says that everything is saved, whether it is or not.
    SavesNothing,
    /// Keeps what it holds for seats that were left.
    KeepsSeats,
    /// Forgets what was not saved of a sequence that is parked.
    ForgetsParked,
    /// Finds that a selection covers less when others run, too.
    CoversByLoad,
}

pub struct FakeRunner {
    pub fault: Option<Fault>,
    pub tier: Option<FakeTier>,
    page_tokens: usize,
    /// What is in each slot of each block; `None` before it is first written.
    kv: Vec<Option<Kv>>,
    context: Vec<Kv>,
    /// Layers of the model, where prompts go layer by layer.
    pub layers: usize,
    /// The store of hidden states: whose token is in a row, and through how many layers it has been.
    hidden: Vec<(SeatIndex, u32, usize)>,
    /// Tokens that went through layers one by one, counted per layer.
    pub work: usize,
    /// Most work of a step.
    pub work_max: usize,
    /// Rows of each sequence in the last step, as (first position, rows).
    pub last_step: Vec<(u32, usize)>,
    pub num_steps: usize,
    /// Most rows of a step that attended to a selection.
    pub sparse_rows_max: usize,
}

impl FakeRunner {
    pub fn new(num_blocks: usize, page_tokens: usize) -> Self {
        FakeRunner {
            fault: None,
            tier: None,
            page_tokens,
            kv: vec![None; num_blocks * page_tokens],
            context: Vec::with_capacity(num_blocks * page_tokens),
            layers: 1,
            hidden: Vec::new(),
            work: 0,
            work_max: 0,
            last_step: Vec::with_capacity(64),
            num_steps: 0,
            sparse_rows_max: 0,
        }
    }
}

/// How the rows of `sequence` after its prompt attend.
fn sparse_of(batch: &Batch, sequence: &SequenceRows) -> Option<Sparse> {
    match sequence.attention {
        Attention::Dense => None,
        Attention::Sparse { method, budget } => {
            Some(Sparse { method: batch.methods[method as usize], budget })
        }
    }
}

impl FakeRunner {
    /// Prompts that go layer by layer: each token goes through all layers, one after the other, and what it left in the store is there.
    fn run_segments(&mut self, step: &Step) {
        let before = self.work;
        for segment in step.segments {
            let Segment { sequence, layers, ends, start, tokens, hidden, .. } = segment;
            let tokens = &step.prompt_tokens[tokens.start as usize..tokens.end as usize];
            assert_eq!(tokens.len(), sequence.num_rows(), "a token for each row");
            assert!(!tokens.contains(&PANIC_TOKEN), "the fake model was asked to panic");
            assert!(
                layers.len() == 1 || sequence.first_position == *start && *ends,
                "a layer comes before the next"
            );
            assert!(
                !*ends || sequence.context_tokens() == sequence.prompt_len as usize,
                "the last of the prompt"
            );
            self.work += tokens.len() * layers.len();
            for (i, &token) in tokens.iter().enumerate() {
                let position = sequence.first_position as usize + i;
                let row = *hidden as usize + position - *start as usize;
                self.hidden.resize(self.hidden.len().max(row + 1), (SeatIndex(0), 0, 0));
                for layer in layers.clone() {
                    let there = (sequence.seat, token, layer as usize);
                    assert!(layer == 0 || self.hidden[row] == there, "what came out of the layer before");
                    self.hidden[row] = (sequence.seat, token, layer as usize + 1);
                }
                if layers.end as usize == self.layers {
                    let slot = step.batch.block_table(sequence)[position / self.page_tokens].at()
                        * self.page_tokens
                        + position % self.page_tokens;
                    match &mut self.tier {
                        Some(tier) => tier.write(sequence, position, (token, 0)),
                        None if self.kv[slot].is_none() || self.fault != Some(Fault::LosesWrites) => {
                            self.kv[slot] = Some((token, 0));
                        }
                        None => {}
                    }
                }
            }
        }
        self.work_max = self.work_max.max(self.work - before + step.batch.num_rows() * self.layers);
    }
}

impl Runner for FakeRunner {
    fn run(
        &mut self,
        step: &Step,
        samples: &[SampleRow],
        inspections: &mut Inspections,
        out: &mut SampleOutput,
    ) {
        let batch = &step.batch;
        batch.check(self.page_tokens);
        assert!(!batch.tokens.contains(&PANIC_TOKEN), "the fake model was asked to panic");
        let page_tokens = self.page_tokens;
        let slot = |table: &[BlockIndex], position: usize| {
            table[position / page_tokens].at() * page_tokens + position % page_tokens
        };
        self.num_steps += 1;
        if let Some(tier) = &self.tier {
            tier.check(step);
        }
        self.run_segments(step);
        self.sparse_rows_max = self.sparse_rows_max.max(batch.sparse_rows().count());
        self.last_step.clear();
        for (i, sequence) in batch.sequences.iter().enumerate() {
            let written = &batch.block_table(sequence)[sequence.first_position as usize / self.page_tokens..];
            for other in batch.sequences.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, other)| other) {
                let table = batch.block_table(other);
                assert!(
                    !written.iter().any(|b| table.contains(b)),
                    "a block that is written is its writer's alone"
                );
            }
            self.last_step.push((sequence.first_position, sequence.num_rows()));
            for row in sequence.rows.clone() {
                let position = batch.positions[row as usize] as usize;
                let to = &mut self.kv[slot(batch.block_table(sequence), position)];
                let sparse = sparse_of(batch, sequence);
                let tag = tag(sequence.attention, sparse, sequence.prompt_len as usize, position);
                let kv = (batch.tokens[row as usize], tag);
                match &mut self.tier {
                    Some(tier) => tier.write(sequence, position, kv),
                    None if to.is_none() || self.fault != Some(Fault::LosesWrites) => *to = Some(kv),
                    None => {}
                }
            }
        }
        out.clear();
        for sample in samples {
            let (sequence, position) = match sample.row.checked_sub(batch.num_rows()) {
                None => {
                    let sequence = batch.sequences.iter().find(|s| s.rows.contains(&(sample.row as u32)));
                    let sequence = sequence.expect("a sampled row is a row of the batch");
                    (sequence, batch.positions[sample.row] as usize)
                }
                Some(prompt) => {
                    let segment = step.completed(self.layers).nth(prompt).expect("a prompt that is complete");
                    (&segment.sequence, segment.sequence.context_tokens() - 1)
                }
            };
            assert_eq!(sample.position, position as u64 + 1, "a draw is keyed by the place of the new token");
            assert_eq!(sequence.prompt_len as usize, sample.prompt.len());
            let table = batch.block_table(sequence);
            self.context.clear();
            let read = (0..=position).map(|p| {
                let local = self.tier.as_ref().and_then(|tier| tier.read(sequence.seat, p));
                local.unwrap_or_else(|| self.kv[slot(table, p)].expect("a slot is written before it is read"))
            });
            self.context.extend(read);
            if let Some(sparse) = sparse_of(batch, sequence) {
                let own = |kv: &Kv| kv.1 == 0 || partition_of(kv.1) == sparse.method.partition_tokens;
                assert!(self.context.iter().all(own), "KV of answers is for requests of the same kind");
            }
            if let Some(asked) = inspections.asked.iter().find(|i| i.seat == sequence.seat)
                && sample.forced.is_none()
            {
                let mut found = coverage(&self.context, asked.layer);
                if self.fault == Some(Fault::CoversByLoad) && batch.sequences.len() > 2 {
                    found.mass = 0.0;
                }
                inspections.found.push((asked.seat, found));
            }
            if self.fault == Some(Fault::ReadsNeighbour) && position >= self.page_tokens {
                self.context[position] = self.context[position - self.page_tokens];
            }
            let prediction = Prediction::after(&self.context);
            let token = match sample.forced {
                Some(token) => token,
                None => {
                    let known = sample.prompt.iter().chain(sample.generated);
                    assert!(
                        self.context.iter().map(|kv| &kv.0).eq(known),
                        "a new token is drawn after all known ones"
                    );
                    prediction.draw(sample.params.seed, sample.position, sample.banned)
                }
            };
            let start = out.top.len() as u32;
            let mut sampled =
                Sampled { token, logprob: 0.0, rank: 0, top: start..start, valid: prediction.valid };
            if let Some(count) = sample.top_logprobs {
                out.top.extend(prediction.top(count));
                (sampled.logprob, sampled.rank) = (prediction.logprob(token), 1 + token);
                sampled.top.end = out.top.len() as u32;
            }
            out.sampled.push(sampled);
        }
        if let Some(tier) = &mut self.tier {
            let complete = step.completed(self.layers).map(|segment| &segment.sequence);
            tier.save(batch, batch.sequences.iter().chain(complete), &mut self.kv);
        }
    }

    fn park(&mut self, seat: SeatIndex, table: &[BlockIndex]) {
        if let Some(tier) = self.tier.as_mut().filter(|_| self.fault != Some(Fault::ForgetsParked)) {
            tier.park(seat, table, &mut self.kv);
        }
    }

    fn release(&mut self, seat: SeatIndex) {
        if let Some(tier) = self.tier.as_mut().filter(|_| self.fault != Some(Fault::KeepsSeats)) {
            tier.release(seat, &mut self.kv);
        }
    }

    fn saved_tokens(&mut self, seat: SeatIndex) -> usize {
        let tier = self.tier.as_ref().filter(|_| self.fault != Some(Fault::SavesNothing));
        tier.map_or(usize::MAX, |tier| tier.saved_tokens(seat))
    }

    /// Sets that come and go, of requests that fill HBM now and then.
    fn working_set(&self, seat: SeatIndex) -> WorkingSet {
        let mut hasher = DefaultHasher::new();
        (seat, self.num_steps / 20).hash(&mut hasher);
        WorkingSet { pages: hasher.finish() % 2000, layers: 2, steps: 63 }
    }

    fn tier_state(&self) -> Option<TierState> {
        self.tier.as_ref().map(FakeTier::state)
    }

    fn seat_counters(&self, seat: SeatIndex) -> (SeatCounters, usize) {
        self.tier.as_ref().map_or_else(Default::default, |tier| tier.counters(seat))
    }
}
