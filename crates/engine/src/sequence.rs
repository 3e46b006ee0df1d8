//! A request inside the engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use kv::KvCache;
use ops::residency::SeatCounters;
use ops::sample::{SampleRow, Sampled, SamplingParams};
use ops::tally::WorkingSet;

use crate::config::{Config, kv_tokens_max};
use crate::flights::Flight;
use crate::guard::Guard;
use crate::handle::QueuePlace;
use crate::kinds::Kinds;
use crate::metrics::Metrics;
use crate::request::{
    Attended, Disconnected, FinishReason, PageUse, Refusal, Request, RequestId, Sink, Sparse, Stopping,
    TokenLogprobs, Update, Usage,
};

/// A request that was checked against the limits of an engine, with where its updates go. If it is dropped before its
/// last update, its sink is told that it failed.
pub struct Submission {
    id: RequestId,
    request: Request,
    outlet: Outlet,
    submitted: Duration,
    place: Option<QueuePlace>,
}

impl Submission {
    /// Checks and resolves `request`. `now` is the time since the engine's start.
    ///
    /// # Errors
    /// As [`Config::resolve`].
    pub fn new(
        config: &Config,
        id: RequestId,
        request: Request,
        sink: Box<dyn Sink>,
        now: Duration,
    ) -> Result<Self, Refusal> {
        let request = config.resolve(request)?;
        Ok(Submission { id, request, outlet: Outlet { sink: Some(sink) }, submitted: now, place: None })
    }

    /// One that was checked already, with its place in the queue.
    pub(crate) fn resolved(
        id: RequestId,
        request: Request,
        sink: Box<dyn Sink>,
        now: Duration,
        place: QueuePlace,
    ) -> Self {
        Submission { id, request, outlet: Outlet { sink: Some(sink) }, submitted: now, place: Some(place) }
    }

    /// Forgets it without telling its sink.
    pub(crate) fn withdraw(mut self) {
        self.outlet.close(None);
    }
}

/// How a request left the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished(FinishReason),
    /// Nobody listens any more.
    Aborted,
    Failed(String),
}

/// The token state of a request. What it does in a step follows from its tokens and from how many of them have KV:
/// a prompt, a single new token and what was lost by preemption are all "tokens not computed yet".
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    /// Its place in order of arrival.
    pub(crate) arrival: u64,
    pub(crate) sampling: SamplingParams,
    pub(crate) stopping: Stopping,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) sparse: Option<Sparse>,
    /// Prompt, then answer.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) kv: kv::Sequence,
    /// What its generated tokens attended to so far.
    pub(crate) attended: Attended,
    /// Whether that covered enough.
    pub(crate) guard: Guard,
    /// Whether it waits with its blocks, for a place in HBM.
    pub(crate) parked: bool,
    /// Lower ones come first.
    pub(crate) priority: i32,
    /// How often others were preferred to it since it last took part in a step.
    pub(crate) skips: u32,
    /// Whether that was too often: then it comes before all others, for good.
    pub(crate) promoted: bool,
    /// Whether it takes part in the step at hand, and did in the one before.
    pub(crate) takes_part: bool,
    pub(crate) took_part: bool,
    /// How far its prompt has come, if that goes layer by layer.
    pub(crate) flight: Option<Flight>,
    /// While it waits: whether it needs nothing but its turn, and since when there is no place for it among those that go layer by
    /// layer.
    pub(crate) awaits_turn: bool,
    pub(crate) no_place_since: Option<u64>,
    /// What it selected in its last steps.
    pub(crate) working_set: WorkingSet,
    /// Extents of cache frames that it may hold per layer, and those of the layer in which its prompt is.
    pub(crate) quota: u32,
    pub(crate) layer_extents: u32,
    /// What became of its pages, and what of that was counted since it took its seat.
    pub(crate) pages: PageUse,
    pub(crate) counted: SeatCounters,
    /// Set by commit, acted upon by emit.
    pub(crate) outcome: Option<Outcome>,
    /// Admission is not tried again before this many blocks are available.
    pub(crate) admit_when_available: usize,
    /// Nor before there are so many places for digests.
    pub(crate) admit_when_places: usize,
    /// Prompt tokens whose log-probabilities are known.
    num_scored: usize,
    /// These, until they are complete and sent.
    prompt_scores: Option<Vec<TokenLogprobs>>,
    cached_tokens: usize,
    num_preemptions: u32,
    submitted: Duration,
    admitted: Option<Duration>,
    last_token: Option<Duration>,
    place: Option<QueuePlace>,
    outlet: Outlet,
}

impl Sequence {
    /// Allocates all that the sequence needs until it ends, except for log-probabilities.
    pub(crate) fn new(submission: Submission, arrival: u64, config: &Config, kinds: &mut Kinds) -> Self {
        let Submission { id, request, outlet, submitted, place } = submission;
        let Request {
            prompt: mut tokens,
            sampling,
            stopping,
            logprobs,
            prompt_logprobs,
            sparse,
            reuse,
            priority,
        } = request;
        let prompt_len = tokens.len();
        let max_tokens = stopping.max_tokens as usize;
        tokens.reserve_exact(max_tokens);
        let blocks_max = kv_tokens_max(prompt_len, max_tokens).div_ceil(config.page_tokens);
        let shareable_tokens = config.shareable_tokens(prompt_len);
        let kv = |shareable_tokens| kv::Sequence::new(0, shareable_tokens, arrival, blocks_max);
        let kv = match (sparse, reuse) {
            (None, _) => kv(shareable_tokens),
            // What is generated sparsely has KV that only this request would compute.
            (Some(_), None) => kv(shareable_tokens.min(prompt_len)),
            (Some(sparse), Some(budget)) => {
                let kind = kinds.number(sparse.method, budget);
                kv(shareable_tokens.min(prompt_len)).of_kind(kind, shareable_tokens)
            }
        };
        Sequence {
            id,
            arrival,
            sampling,
            stopping,
            logprobs,
            prompt_logprobs,
            sparse,
            tokens,
            prompt_len,
            kv,
            attended: Attended::default(),
            guard: Guard::default(),
            parked: false,
            priority,
            skips: 0,
            promoted: false,
            takes_part: false,
            took_part: false,
            flight: None,
            awaits_turn: false,
            no_place_since: None,
            working_set: WorkingSet::default(),
            quota: 0,
            layer_extents: 0,
            pages: PageUse::default(),
            counted: SeatCounters::default(),
            outcome: None,
            admit_when_available: 0,
            admit_when_places: 0,
            num_scored: 0,
            prompt_scores: prompt_logprobs.map(|_| Vec::new()),
            cached_tokens: 0,
            num_preemptions: 0,
            submitted,
            admitted: None,
            last_token: None,
            place,
            outlet,
        }
    }

    pub(crate) fn num_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    pub(crate) fn num_uncomputed(&self) -> usize {
        self.tokens.len() - self.kv.num_tokens()
    }

    /// Tokens of its prompt that are not computed yet.
    pub(crate) fn prompt_left(&self) -> usize {
        self.prompt_len.saturating_sub(self.kv.num_tokens())
    }

    /// Whether what is left of its prompt can go layer by layer: log-probabilities need every row of the last layer.
    pub(crate) fn flies(&self) -> bool {
        self.prompt_left() > 1 && self.prompt_logprobs.is_none()
    }

    /// Its place among all requests: who comes first is lower.
    pub(crate) fn rank(&self) -> (bool, i32, u64) {
        (!self.promoted, self.priority, self.arrival)
    }

    /// The method of the token at `position`, if it is one of the answer, with the budget that the guard leaves it.
    pub(crate) fn sparse_at(&self, position: usize) -> Option<Sparse> {
        self.sparse.map(|sparse| Sparse { budget: self.guard.budget(sparse.budget, position), ..sparse })
    }

    /// How the next tokens that it runs attend, which all have one budget.
    pub(crate) fn next_attention(&self) -> Option<Sparse> {
        // What attends to everything for good is dense, and needs neither digests nor memory for selections.
        self.sparse_at(self.kv.num_tokens().max(self.prompt_len)).filter(|sparse| sparse.budget != u32::MAX)
    }

    /// Whether the next tokens that it runs select by digests.
    pub(crate) fn reads_digests(&self) -> bool {
        self.next_attention().is_some_and(|sparse| sparse.method.reads_digests())
    }

    /// Tokens to reserve KV for at admission: all that are known, and the next one if there will be one to run.
    pub(crate) fn admission_tokens(&self) -> usize {
        (self.tokens.len() + 1).min(kv_tokens_max(self.prompt_len, self.stopping.max_tokens as usize))
    }

    pub(crate) fn admit(&mut self, cached_tokens: usize, now: Duration, metrics: &Metrics) {
        if self.admitted.is_some() {
            return;
        }
        self.admitted = Some(now);
        self.cached_tokens = cached_tokens;
        metrics.admitted(self.prompt_len, cached_tokens, now.saturating_sub(self.submitted));
    }

    pub(crate) fn preempt(&mut self, kv: &mut KvCache) {
        kv.suspend(&mut self.kv);
        self.num_preemptions += 1;
        self.parked = false;
        tracing::debug!(request = self.id.0, tokens = self.tokens.len(), "preempted");
        (self.admit_when_available, self.admit_when_places) = (0, 0);
        self.leaves_seat();
    }

    pub(crate) fn park(&mut self, kv: &mut KvCache) {
        kv.park(&mut self.kv);
        self.parked = true;
        self.leaves_seat();
        tracing::debug!(request = self.id.0, tokens = self.tokens.len(), "parked");
    }

    fn leaves_seat(&mut self) {
        assert!(self.flight.is_none(), "a prompt that goes layer by layer keeps its seat");
        self.quota = 0;
        self.counted = SeatCounters::default();
        (self.took_part, self.working_set) = (false, WorkingSet::default());
    }

    /// Appends what is to be sampled after rows `first_row..` that run the tokens at `positions`; returns whether the
    /// last of it draws a new token.
    pub(crate) fn push_samples<'a>(
        &'a self,
        samples: &mut Vec<SampleRow<'a>>,
        first_row: usize,
        positions: std::ops::Range<usize>,
    ) -> bool {
        let (prompt, generated) = self.tokens.split_at(self.prompt_len);
        let row = |position: usize| SampleRow {
            row: first_row + position - positions.start,
            params: &self.sampling,
            prompt,
            generated,
            banned: &[],
            position: position as u64 + 1,
            top_logprobs: None,
            forced: None,
        };
        if self.prompt_logprobs.is_some() {
            // The row of a prompt token scores the token after it. After a preemption known ones are not scored again.
            let unknown = positions.start.max(self.num_scored)..positions.end.min(self.prompt_len - 1);
            samples.extend(unknown.map(|position| SampleRow {
                top_logprobs: self.prompt_logprobs,
                forced: Some(prompt[position + 1]),
                ..row(position)
            }));
        }
        let draws = positions.end == self.tokens.len() && self.stopping.max_tokens > 0;
        if draws {
            let too_short = generated.len() < self.stopping.min_tokens as usize;
            samples.push(SampleRow {
                banned: if too_short { &self.stopping.end_tokens } else { &[] },
                top_logprobs: self.logprobs,
                ..row(positions.end - 1)
            });
        }
        draws
    }

    /// Tells the client what a step brought: `sampled` as [`Sequence::push_samples`] asked for it.
    pub(crate) fn tell(
        &mut self,
        sampled: &[Sampled],
        top: &[(u32, f32)],
        draws: bool,
        now: Duration,
        metrics: &Metrics,
    ) -> Result<(), Disconnected> {
        let num_scores = sampled.len() - usize::from(draws);
        let (scores, drawn) = sampled.split_at(num_scores);
        if let Some(known) = &mut self.prompt_scores {
            known.extend(scores.iter().map(|s| token_logprobs(s, top)));
            self.num_scored += num_scores;
            if self.num_scored == self.prompt_len - 1 {
                let known = std::mem::take(known);
                self.prompt_scores = None;
                self.outlet.send(Update::PromptLogprobs(known))?;
            }
        }
        for token in drawn {
            match self.last_token.replace(now) {
                None => metrics.first_token(now.saturating_sub(self.submitted)),
                Some(before) => metrics.next_token(now.saturating_sub(before)),
            }
            let logprobs = self.logprobs.map(|_| token_logprobs(token, top));
            self.outlet.send(Update::Token { token: token.token, logprobs })?;
        }
        Ok(())
    }

    /// Ends the sequence: its blocks are released and its client gets the last update.
    pub(crate) fn close(&mut self, outcome: Outcome, kv: &mut KvCache, now: Duration, metrics: &Metrics) {
        assert!(self.flight.is_none(), "a flight ends before its request");
        kv.hand_on(&mut self.kv, &self.tokens);
        kv.free(&mut self.kv);
        self.place = None;
        tracing::debug!(
            request = self.id.0,
            ?outcome,
            generated_tokens = self.num_generated(),
            "request ended"
        );
        metrics.closed(&outcome, now.saturating_sub(self.submitted));
        let last = match outcome {
            Outcome::Finished(reason) => Some(Update::Finished { reason, usage: self.usage() }),
            Outcome::Failed(why) => {
                tracing::warn!(request = self.id.0, why, "request failed");
                Some(Update::Failed(why))
            }
            Outcome::Aborted => None,
        };
        self.outlet.close(last);
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len as u32,
            cached_tokens: self.cached_tokens as u32,
            generated_tokens: self.num_generated() as u32,
            preemptions: self.num_preemptions,
            attended: self.sparse.map(|_| self.attended),
            guarded: Some(self.guard.seen).filter(|seen| seen.checks > 0),
            pages: self.pages,
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.outlet.sink.is_none()
    }
}

fn token_logprobs(sampled: &Sampled, top: &[(u32, f32)]) -> TokenLogprobs {
    let top = top[sampled.top.start as usize..sampled.top.end as usize].to_vec();
    TokenLogprobs { token: sampled.token, logprob: sampled.logprob, rank: sampled.rank, top }
}

/// A sink that gets exactly one last update, whatever happens.
struct Outlet {
    /// `None` after the last update.
    sink: Option<Box<dyn Sink>>,
}

impl Outlet {
    /// A sink is the client's code, and touches nothing of the engine: if it panics, its client counts as gone.
    fn send(&mut self, update: Update) -> Result<(), Disconnected> {
        let sink = self.sink.as_mut().ok_or(Disconnected)?;
        catch_unwind(AssertUnwindSafe(|| sink.send(update))).unwrap_or_else(|_| {
            tracing::error!("the sink of a request panicked");
            Err(Disconnected)
        })
    }

    fn close(&mut self, last: Option<Update>) {
        // Nobody may be listening, and that is fine: there is nothing left to cancel.
        let _ = last.map(|update| self.send(update));
        self.sink = None;
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        if self.sink.is_some() {
            self.close(Some(Update::Failed("the engine has stopped".into())));
        }
    }
}
