//! The engine without a thread, a clock or a device: events in, steps, updates out.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use kv::KvCache;
use ops::sample::{SampleOutput, SampleRow, Sampled};

use crate::config::Config;
use crate::digest_room::DigestRoom;
use crate::flights::Flights;
use crate::kinds::Kinds;
use crate::metrics::Metrics;
use crate::request::{FinishReason, RequestId};
use crate::rows::StepRows;
use crate::run::Runner;
use crate::sequence::{Outcome, Sequence, Submission};
use crate::shares::Shares;
use crate::turns::Turns;

/// All that can happen to an engine from outside.
pub enum Event {
    /// A new request.
    Submit(Box<Submission>),
    /// The client of a request is gone. Unknown ids are those of requests that ended meanwhile.
    Abort(RequestId),
    /// The client of a request has all that it wanted, for instance up to a stop string.
    Stop(RequestId),
    /// Finish what was submitted; nothing new will come.
    Drain,
    /// End every request now.
    Shutdown,
}

/// Requests, KV and the step. One thread owns it.
///
/// Invariant: `running` and `waiting` are sorted by rank: who was passed over too often, then by priority, then by arrival. Blocks go
/// to the first in rank, so it is never preempted and always makes progress.
///
/// What is bounded: running and waiting requests, rows and samples of a step, blocks, and the bytes of all of these;
/// they follow from [`Config`]. Log-probabilities of a prompt are held until they are complete, `1 + max_logprobs`
/// entries per token. Waits are bounded in steps and in order: a running request takes part in a step at least once in
/// `max_skips + max_num_seqs`, and who waits is passed over `max_skips` times at most; when blocks run out it may be preempted again
/// and again until those before it have ended.
pub struct Engine<R> {
    pub(crate) config: Config,
    pub(crate) runner: R,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) kv: KvCache,
    pub(crate) waiting: VecDeque<Sequence>,
    pub(crate) running: Vec<Sequence>,
    /// Who may hold how much of the HBM tier.
    pub(crate) shares: Shares,
    /// What digests take of it.
    pub(crate) digest_room: DigestRoom,
    /// Whose turn it is.
    pub(crate) turns: Turns,
    /// Prompts that go layer by layer.
    pub(crate) flights: Flights,
    /// Who may go on from whose answers.
    kinds: Kinds,
    /// What this step runs.
    pub(crate) rows: StepRows,
    /// Empty between steps; only its memory stays.
    pub(crate) samples: Vec<SampleRow<'static>>,
    /// What this step sampled.
    pub(crate) output: SampleOutput,
    /// Time that steps waited for pages, up to the last one.
    pub(crate) stall_nanos: u64,
    /// The same of the last step alone.
    pub(crate) waited: Duration,
    num_arrived: u64,
    draining: bool,
    stopped: bool,
}

impl<R: Runner> Engine<R> {
    /// An engine without requests; allocates what its steps need.
    ///
    /// # Panics
    /// When [`Config::check`] fails.
    pub fn new(config: Config, metrics: Arc<Metrics>, runner: R) -> Self {
        if let Err(error) = config.check() {
            panic!("the configuration of an engine was checked: {error}");
        }
        let rows_max = config.rows_max();
        let engine = Engine {
            kv: KvCache::new(
                config.num_blocks,
                config.page_tokens,
                config.shared_together / config.page_tokens,
                config.max_num_seqs,
            ),
            shares: Shares::new(&config),
            digest_room: DigestRoom::new(config.tier.map(|tier| tier.digest_places), config.num_blocks),
            turns: Turns::new(&config),
            flights: Flights::new(&config),
            kinds: Kinds::new(),
            waiting: VecDeque::with_capacity(config.max_waiting + config.max_num_seqs),
            running: Vec::with_capacity(config.max_num_seqs),
            rows: StepRows::new(&config),
            samples: Vec::with_capacity(rows_max),
            output: SampleOutput {
                sampled: Vec::<Sampled>::with_capacity(rows_max),
                top: Vec::with_capacity(rows_max * config.max_logprobs as usize),
            },
            stall_nanos: 0,
            waited: Duration::ZERO,
            num_arrived: 0,
            draining: false,
            stopped: false,
            config,
            runner,
            metrics,
        };
        engine.observe();
        engine
    }

    /// Takes in what happened. `now` is the time since the engine's start.
    pub fn handle(&mut self, event: Event, now: Duration) {
        match event {
            Event::Submit(submission) => {
                self.submit(*submission, now);
                return self.observe();
            }
            Event::Abort(id) => self.cancel(id, Outcome::Aborted, now),
            Event::Stop(id) => self.cancel(id, Outcome::Finished(FinishReason::Stopped), now),
            Event::Drain => self.draining = true,
            Event::Shutdown => self.shut_down(now),
        }
        // Perhaps no step comes for long.
        self.leave_seats();
        self.observe();
    }

    /// One iteration: a row for every running answer, and prompt tokens up to the budget. `clock` tells the time since
    /// the engine's start.
    ///
    /// # Panics
    /// When an invariant is broken: then no request can be trusted any more and the process must stop.
    pub fn step(&mut self, clock: &dyn Fn() -> Duration) {
        assert!(self.has_work(), "a step has something to do");
        let start = clock();
        self.schedule(start);
        let scheduled = clock();
        self.run();
        let ran = clock();
        self.commit();
        self.turns.observe(self.waited, ran - scheduled, &self.running);
        let committed = clock();
        self.emit(committed);
        self.leave_seats();
        self.metrics.overlap(&self.runner.overlap());
        let phases = [scheduled - start, ran - scheduled, committed - ran, clock() - committed];
        self.metrics.stepped(phases, self.rows.num_rows());
        self.observe();
    }

    /// Whether a request waits or runs.
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Whether [`Event::Drain`] or [`Event::Shutdown`] came and every request has ended.
    pub fn is_drained(&self) -> bool {
        self.draining && !self.has_work()
    }

    fn submit(&mut self, submission: Submission, now: Duration) {
        self.num_arrived += 1;
        let mut sequence = Sequence::new(submission, self.num_arrived, &self.config, &mut self.kinds);
        if self.stopped {
            sequence.close(
                Outcome::Failed("the engine has stopped".into()),
                &mut self.kv,
                now,
                &self.metrics,
            );
        } else {
            self.queue(sequence);
        }
    }

    fn cancel(&mut self, id: RequestId, outcome: Outcome, now: Duration) {
        let sequence = if let Some(at) = self.running.iter().position(|s| s.id == id) {
            Some(self.running.remove(at))
        } else {
            let at = self.waiting.iter().position(|s| s.id == id);
            at.and_then(|at| self.waiting.remove(at))
        };
        if let Some(mut sequence) = sequence {
            self.flights.end(sequence.flight.take());
            sequence.close(outcome, &mut self.kv, now, &self.metrics);
        }
    }

    fn shut_down(&mut self, now: Duration) {
        self.draining = true;
        self.stopped = true;
        for mut sequence in self.running.drain(..).chain(self.waiting.drain(..)) {
            let outcome = Outcome::Failed("the server is shutting down".into());
            self.flights.end(sequence.flight.take());
            sequence.close(outcome, &mut self.kv, now, &self.metrics);
        }
    }

    fn observe(&self) {
        let (waiting, running) = (self.waiting.len(), self.running.len());
        self.metrics.flights(self.flights.count());
        self.metrics.observe(waiting, running, self.kv.counts(), self.kv.num_evictions());
        if let Some(state) = self.runner.tier_state() {
            let (lent, reclaimed) = self.shares.lent();
            self.metrics.tier(&state, &self.runner.digest_state(), lent, reclaimed);
        }
    }

    /// Blocks by state.
    pub fn kv_counts(&self) -> kv::Counts {
        self.kv.counts()
    }

    /// Panics unless every invariant of engine and KV cache holds between two steps. Slow: for tests.
    pub fn check(&self) {
        let parked = self.waiting.iter().filter(|s| s.parked);
        self.kv.check(self.running.iter().chain(parked).map(|s| &s.kv));
        assert!(self.running.len() <= self.config.max_num_seqs, "running requests are bounded");
        assert!(self.running.is_sorted_by_key(|s| s.rank()), "running requests are in order of rank");
        assert!(self.waiting.iter().is_sorted_by_key(|s| s.rank()), "waiting requests are in order of rank");
        self.flights.check(self.running.iter().filter_map(|s| s.flight.as_ref()));
        for sequence in &self.waiting {
            assert!(
                sequence.parked || sequence.kv.blocks().is_empty(),
                "who waits holds no blocks, unless it is parked"
            );
            assert!(sequence.kv.seat().is_none() && sequence.flight.is_none(), "who waits has no seat");
        }
        for sequence in &self.running {
            assert!(sequence.num_uncomputed() > 0, "who runs has something to run");
            assert!(sequence.outcome.is_none(), "who has ended does not run");
            let skips_max = self.config.max_skips as usize + self.config.max_num_seqs;
            assert!(sequence.skips as usize <= skips_max, "nobody rests for more than {skips_max} steps");
        }
    }

    /// The state in words, for the log of a process that is about to stop. Holds no token of any request.
    pub fn dump(&self) -> String {
        let mut text = String::new();
        let counts = self.kv.counts();
        let rows = self.rows.num_rows();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "kv blocks: {counts:?}, {} evictions, last step: {rows} rows",
            self.kv.num_evictions()
        );
        for (state, sequences) in [
            ("running", self.running.as_slice()),
            ("waiting", self.waiting.as_slices().0),
            ("waiting", self.waiting.as_slices().1),
        ] {
            for s in sequences {
                let (known, computed, blocks) = (s.tokens.len(), s.kv.num_tokens(), s.kv.blocks());
                let shown = &blocks[..blocks.len().min(64)];
                let _ = writeln!(
                    text,
                    "{state}: request {} arrival {} prompt {} tokens {known} computed {computed} blocks {}: {:?}",
                    s.id.0,
                    s.arrival,
                    s.prompt_len,
                    blocks.len(),
                    shown.iter().map(|b| b.0).collect::<Vec<_>>(),
                );
            }
        }
        text
    }
}
