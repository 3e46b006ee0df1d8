//! The thread around the engine, and how others reach it.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::config::Config;
use crate::engine::{Engine, Event};
use crate::metrics::Metrics;
use crate::request::{Refusal, Request, RequestId, Sink};
use crate::run::Runner;
use crate::sequence::Submission;

/// The runner is being made.
const STARTING: u8 = 0;
/// Requests are taken and steps run.
const READY: u8 = 1;
/// No new requests; those that were submitted finish.
const DRAINING: u8 = 2;
/// The thread has ended or is about to.
const STOPPED: u8 = 3;

struct Shared {
    config: Config,
    metrics: Arc<Metrics>,
    /// Only ever grows.
    phase: AtomicU8,
    /// Requests that have not ended.
    num_alive: AtomicUsize,
    num_submitted: AtomicU64,
    start: Instant,
}

/// Held by a request until it ends. There are as many as requests may run and wait together, so who could run at once
/// is never refused because of who waits.
pub(crate) struct QueuePlace(Arc<Shared>);

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.num_alive.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How other threads talk to an engine. When the last one is dropped, the engine finishes its requests and ends.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    events: Sender<Event>,
}

impl Handle {
    /// Submits a request; its updates go to `sink`. Does not block.
    ///
    /// # Errors
    /// When the request makes no sense or can never fit, the queue is full, or the engine takes no more requests. Then
    /// `sink` is told nothing.
    pub fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, Refusal> {
        let submitted = self.try_submit(request, sink);
        if submitted.is_err() {
            self.shared.metrics.refused();
        }
        submitted
    }

    fn try_submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, Refusal> {
        let shared = &self.shared;
        if shared.phase.load(Ordering::Acquire) >= DRAINING {
            return Err(Refusal::ShuttingDown);
        }
        let request = shared.config.resolve(request)?;
        let place = self.take_place()?;
        let id = RequestId(shared.num_submitted.fetch_add(1, Ordering::Relaxed));
        let submission = Submission::resolved(id, request, sink, shared.start.elapsed(), place);
        match self.events.send(Event::Submit(Box::new(submission))) {
            Ok(()) => Ok(id),
            // The thread has just ended; the submission comes back with the error.
            Err(unsent) => {
                if let Event::Submit(submission) = unsent.into_inner() {
                    submission.withdraw();
                }
                Err(Refusal::ShuttingDown)
            }
        }
    }

    fn take_place(&self) -> Result<QueuePlace, Refusal> {
        let Config { max_waiting: limit, max_num_seqs, .. } = self.shared.config;
        let most = self.shared.config.requests_max();
        let more = |alive| (alive < most).then_some(alive + 1);
        match self.shared.num_alive.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => Ok(QueuePlace(Arc::clone(&self.shared))),
            Err(alive) => Err(Refusal::QueueFull { waiting: alive.saturating_sub(max_num_seqs), limit }),
        }
    }

    /// Cancels a request whose client is gone: within one step its blocks are free and its sink is dropped without
    /// another update. Does nothing when it has ended.
    pub fn abort(&self, id: RequestId) {
        self.send(Event::Abort(id));
    }

    /// Ends a request whose client has all that it wanted (a stop string): as [`Handle::abort`], but its sink gets
    /// [`Update::Finished`](crate::Update::Finished) with the counts, after what the step in flight brings.
    pub fn stop(&self, id: RequestId) {
        self.send(Event::Stop(id));
    }

    /// Refuses new requests; the thread ends when those that were submitted have finished.
    pub fn drain(&self) {
        self.advance(DRAINING);
        self.send(Event::Drain);
    }

    /// Refuses new requests and ends all others after the current step, as failed; then the thread ends.
    pub fn shutdown(&self) {
        self.advance(DRAINING);
        self.send(Event::Shutdown);
    }

    /// Whether the runner is made and requests are taken.
    pub fn is_ready(&self) -> bool {
        self.shared.phase.load(Ordering::Acquire) == READY
    }

    /// Whether the engine's thread has ended, or is about to.
    pub fn is_stopped(&self) -> bool {
        self.shared.phase.load(Ordering::Acquire) == STOPPED
    }

    /// The limits of the engine.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// What the engine counts.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn advance(&self, phase: u8) {
        self.shared.phase.fetch_max(phase, Ordering::AcqRel);
    }

    fn send(&self, event: Event) {
        // When the thread has ended there is nothing left to cancel or to drain.
        let _ = self.events.send(event);
    }
}

/// What is done with the dump of an engine whose invariants are broken. Called on the engine thread, once.
pub type OnBroken = Box<dyn FnOnce(&str) + Send>;

/// Time that a dump has to be printed.
const DUMP_TIME: Duration = Duration::from_secs(2);

/// The way to end after a broken invariant outside tests: prints the dump to standard error and aborts.
pub fn abort_process() -> OnBroken {
    Box::new(|dump| {
        let dump = dump.to_owned();
        // If nobody reads standard error, printing never ends, and the process must.
        let printing = std::thread::Builder::new().spawn(move || eprintln!("{dump}"));
        let start = Instant::now();
        while printing.as_ref().is_ok_and(|thread| !thread.is_finished()) && start.elapsed() < DUMP_TIME {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::process::abort();
    })
}

/// Starts the engine's thread. The runner is made on it, by `runner`, because the state of a device may not be allowed
/// to move between threads; until then requests are queued.
///
/// The thread ends when it is drained or shut down, when every [`Handle`] is gone and no request is left, or when
/// `runner` fails; then joining returns its error, and queued requests fail.
///
/// # Errors
/// When the system cannot start a thread.
///
/// # Panics
/// When [`Config::check`] fails.
pub fn spawn<R, E>(
    config: Config,
    metrics: Metrics,
    on_broken: OnBroken,
    runner: impl FnOnce() -> Result<R, E> + Send + 'static,
) -> io::Result<(Handle, JoinHandle<Result<(), E>>)>
where
    R: Runner,
    E: Send + 'static,
{
    if let Err(error) = config.check() {
        panic!("the configuration of an engine is checked first: {error}");
    }
    let shared = Arc::new(Shared {
        config,
        metrics: Arc::new(metrics),
        phase: AtomicU8::new(STARTING),
        num_alive: AtomicUsize::new(0),
        num_submitted: AtomicU64::new(0),
        start: Instant::now(),
    });
    let (events, inbox) = unbounded();
    let handle = Handle { shared: Arc::clone(&shared), events };
    let stopped = StoppedOnDrop(Arc::clone(&shared));
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let stopped = stopped;
        let runner = runner()?;
        let mut engine = Engine::new(shared.config.clone(), Arc::clone(&shared.metrics), runner);
        stopped.0.phase.fetch_max(READY, Ordering::AcqRel);
        // The engine may be in any state after a panic: it is only looked at, for the dump.
        let ended = catch_unwind(AssertUnwindSafe(|| serve(&mut engine, &inbox, &|| shared.start.elapsed())));
        if let Err(panic) = ended {
            stopped.0.phase.fetch_max(STOPPED, Ordering::AcqRel);
            on_broken(&dump(&engine, panic.as_ref()));
        }
        Ok(())
    })?;
    Ok((handle, thread))
}

/// Marks the engine as stopped however its thread ends, a panic while the runner is made included.
struct StoppedOnDrop(Arc<Shared>);

impl Drop for StoppedOnDrop {
    fn drop(&mut self) {
        self.0.phase.fetch_max(STOPPED, Ordering::AcqRel);
    }
}

/// Steps while there is work, sleeps on the channel while there is none, and takes in events between steps. A request
/// that is submitted in the moment of the end fails when the channel is dropped.
fn serve<R: Runner>(engine: &mut Engine<R>, inbox: &Receiver<Event>, clock: &dyn Fn() -> Duration) {
    while !engine.is_drained() {
        if !engine.has_work() {
            match inbox.recv() {
                Ok(event) => engine.handle(event, clock()),
                // All handles are gone.
                Err(_) => return,
            }
        }
        // Only what is there now: a flood of events must not keep the requests from their step.
        for event in inbox.try_iter().take(inbox.len()) {
            engine.handle(event, clock());
        }
        if engine.has_work() {
            engine.step(clock);
        }
    }
}

fn dump<R: Runner>(engine: &Engine<R>, panic: &(dyn Any + Send)) -> String {
    let text = |payload: &(dyn Any + Send)| {
        let words = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
        words.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
    };
    let state = catch_unwind(AssertUnwindSafe(|| engine.dump()))
        .unwrap_or_else(|again| format!("the state cannot be shown: {}\n", text(again.as_ref())));
    format!(
        "the engine broke an invariant and stops, so that no request can see another's tokens\n{}\n{state}",
        text(panic)
    )
}
