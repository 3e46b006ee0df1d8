//! The thread around the engine.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ops::Step;
use ops::coverage::Inspections;
use ops::sample::{SampleOutput, SampleRow};
use prometheus::Registry;

use super::fake_runner::{FakeRunner, PANIC_TOKEN, expected_answer};
use super::support::{Listener, config, metric, prompt, request};
use crate::config::Config;
use crate::handle::{Handle, OnBroken, spawn};
use crate::metrics::Metrics;
use crate::request::{Refusal, RequestId, Update};
use crate::run::Runner;

fn never_broken() -> OnBroken {
    Box::new(|dump| panic!("no invariant is broken here:\n{dump}"))
}

fn start(config: Config, registry: &Registry) -> (Handle, JoinHandle<Result<(), String>>) {
    let runner = FakeRunner::new(config.num_blocks, config.page_tokens);
    let metrics = Metrics::new(registry).unwrap();
    spawn(config, metrics, never_broken(), move || Ok(runner)).unwrap()
}

/// Waits for what another thread is about to do.
fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        std::thread::yield_now();
    }
}

fn failed(listener: &Listener) -> bool {
    matches!(listener.end(), Some(Update::Failed(_)))
}

/// A runner whose steps wait until a test lets them go.
struct Gated {
    inner: FakeRunner,
    entered: Sender<()>,
    open: Receiver<()>,
}

impl Runner for Gated {
    fn run(
        &mut self,
        step: &Step,
        samples: &[SampleRow],
        inspections: &mut Inspections,
        out: &mut SampleOutput,
    ) {
        // Where the test has dropped its ends, steps run freely.
        let _ = self.entered.send(());
        let _ = self.open.recv();
        self.inner.run(step, samples, inspections, out);
    }
}

/// The test's side of a [`Gated`] runner.
struct Gate {
    entered: Receiver<()>,
    open: Sender<()>,
}

impl Gate {
    /// Returns when a step has been scheduled and waits.
    fn wait_for_step(&self) {
        self.entered.recv_timeout(Duration::from_secs(60)).expect("a step runs");
    }

    fn let_step_go(&self) {
        self.open.send(()).expect("a step waits");
    }
}

fn start_gated(config: Config) -> (Handle, JoinHandle<Result<(), String>>, Gate) {
    let inner = FakeRunner::new(config.num_blocks, config.page_tokens);
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let (entered, test_entered) = channel();
    let (test_open, open) = channel();
    let make = move || Ok(Gated { inner, entered, open });
    let (handle, thread) = spawn(config, metrics, never_broken(), make).unwrap();
    (handle, thread, Gate { entered: test_entered, open: test_open })
}

fn submit(handle: &Handle, prompt_len: usize, max_tokens: u32) -> Result<(RequestId, Listener), Refusal> {
    let listener = Listener::default();
    let id = handle.submit(request(prompt(0, prompt_len), max_tokens), Box::new(listener.clone()))?;
    Ok((id, listener))
}

#[test]
fn many_threads_get_their_own_answers() {
    let registry = Registry::new();
    let (handle, thread) = start(config(60), &registry);
    let clients: Vec<_> = (0..8u32)
        .map(|client| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                for i in 0..40 {
                    let asked = request(prompt(client * 40 + i, 1 + (i as usize * 7) % 60), 1 + i % 20);
                    let listener = Listener::default();
                    let id = handle.submit(asked.clone(), Box::new(listener.clone())).unwrap();
                    if i % 5 == 4 {
                        handle.abort(id);
                        continue;
                    }
                    until("an answer", || listener.end().is_some());
                    assert_eq!(listener.tokens(), expected_answer(&asked, 200).0);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    handle.drain();
    thread.join().unwrap().unwrap();
    assert!(handle.is_stopped());
    let outcomes = ["stop", "length", "aborted", "failed", "refused"];
    let ended = outcomes.map(|outcome| metric(&registry, "sparseserve_requests_total", Some(outcome)));
    assert_eq!(ended.iter().sum::<f64>(), 320.0, "{ended:?}");
    assert!(ended[1] >= 256.0 && ended[3] + ended[4] == 0.0, "some aborts come too late: {ended:?}");
    assert_eq!(metric(&registry, "sparseserve_kv_blocks", Some("used")), 0.0);
}

#[test]
fn a_full_queue_refuses_and_an_end_makes_room() {
    let (handle, thread, gate) = start_gated(Config { max_waiting: 2, max_num_seqs: 1, ..config(40) });
    submit(&handle, 10, 1).unwrap();
    gate.wait_for_step();
    // The first one runs now, so the queue is empty.
    submit(&handle, 10, 1).unwrap();
    let (waiting, _) = submit(&handle, 10, 1).unwrap();
    assert_eq!(submit(&handle, 10, 1).unwrap_err(), Refusal::QueueFull { waiting: 2, limit: 2 });
    gate.let_step_go();
    gate.wait_for_step();
    submit(&handle, 10, 1).unwrap();
    assert!(matches!(submit(&handle, 10, 1), Err(Refusal::QueueFull { .. })));
    // An aborted request leaves the queue, too.
    handle.abort(waiting);
    gate.let_step_go();
    gate.wait_for_step();
    submit(&handle, 10, 1).unwrap();
    drop(gate);
    handle.drain();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_free_place_to_run_is_as_good_as_one_in_the_queue() {
    let (handle, thread, gate) = start_gated(Config { max_waiting: 1, max_num_seqs: 3, ..config(40) });
    // Whether the engine has got around to admitting any of them makes no difference.
    let submitted: Vec<_> = (0..4).map(|_| submit(&handle, 10, 1).unwrap()).collect();
    assert_eq!(submit(&handle, 10, 1).unwrap_err(), Refusal::QueueFull { waiting: 1, limit: 1 });
    drop(gate);
    handle.drain();
    thread.join().unwrap().unwrap();
    assert!(submitted.iter().all(|(_, listener)| listener.tokens().len() == 1));
}

#[test]
fn drain_finishes_what_was_submitted_and_takes_nothing_new() {
    let (handle, thread, gate) = start_gated(config(40));
    let (_, running) = submit(&handle, 10, 5).unwrap();
    gate.wait_for_step();
    let (_, waiting) = submit(&handle, 10, 5).unwrap();
    assert!(handle.is_ready());
    handle.drain();
    assert!(!handle.is_ready());
    assert_eq!(submit(&handle, 10, 5).unwrap_err(), Refusal::ShuttingDown);
    drop(gate);
    thread.join().unwrap().unwrap();
    assert_eq!((running.tokens().len(), waiting.tokens().len()), (5, 5));
    assert_eq!(submit(&handle, 10, 5).unwrap_err(), Refusal::ShuttingDown);
}

#[test]
fn shutdown_fails_what_is_left() {
    let (handle, thread, gate) = start_gated(config(40));
    let (_, running) = submit(&handle, 10, 5).unwrap();
    gate.wait_for_step();
    let (_, waiting) = submit(&handle, 10, 5).unwrap();
    handle.shutdown();
    drop(gate);
    thread.join().unwrap().unwrap();
    assert!(failed(&running) && failed(&waiting));
    assert_eq!(running.tokens().len(), 1, "the step that ran was finished");
}

#[test]
fn an_abort_takes_effect_after_the_current_step() {
    let (handle, thread, gate) = start_gated(config(40));
    let (id, listener) = submit(&handle, 10, 50).unwrap();
    gate.wait_for_step();
    handle.abort(id);
    gate.let_step_go();
    handle.drain();
    thread.join().unwrap().unwrap();
    assert_eq!(listener.tokens().len(), 1);
    assert!(listener.end().is_none());
}

#[test]
fn without_handles_the_engine_finishes_and_ends() {
    let (handle, thread) = start(config(40), &Registry::new());
    let (_, listener) = submit(&handle, 10, 30).unwrap();
    drop(handle);
    thread.join().unwrap().unwrap();
    assert_eq!(listener.tokens().len(), 30);
}

#[test]
fn a_runner_that_cannot_be_made_fails_what_was_queued() {
    let (tell, wait) = channel::<()>();
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let make = move || -> Result<FakeRunner, String> {
        let _ = wait.recv();
        Err("no such model".into())
    };
    let (handle, thread) = spawn(config(40), metrics, never_broken(), make).unwrap();
    let (_, listener) = submit(&handle, 10, 5).unwrap();
    assert!(!handle.is_ready(), "requests are queued while the model loads");
    drop(tell);
    assert_eq!(thread.join().unwrap(), Err("no such model".into()));
    assert!(failed(&listener) && handle.is_stopped());
    assert_eq!(submit(&handle, 10, 5).unwrap_err(), Refusal::ShuttingDown);
}

#[test]
fn a_broken_invariant_stops_the_engine_with_a_dump() {
    let (tell, dumped) = channel();
    let on_broken: OnBroken = Box::new(move |dump| tell.send(dump.to_owned()).expect("the test listens"));
    let config = config(40);
    let runner = FakeRunner::new(config.num_blocks, config.page_tokens);
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let (handle, thread) = spawn(config, metrics, on_broken, move || Ok::<_, String>(runner)).unwrap();
    let listener = Listener::default();
    handle.submit(request(vec![1, 2, PANIC_TOKEN], 5), Box::new(listener.clone())).unwrap();
    let dump = dumped.recv_timeout(Duration::from_secs(60)).expect("a dump");
    assert!(dump.contains("the fake model was asked to panic"), "{dump}");
    assert!(dump.contains("running: request 0 arrival 1 prompt 3"), "{dump}");
    thread.join().unwrap().unwrap();
    assert!(failed(&listener) && handle.is_stopped());
    assert_eq!(submit(&handle, 10, 5).unwrap_err(), Refusal::ShuttingDown);
}

#[test]
fn refusals_are_counted_and_come_before_the_queue() {
    let registry = Registry::new();
    let (handle, thread) = start(Config { max_waiting: 1, ..config(40) }, &registry);
    assert!(matches!(submit(&handle, 200, 5), Err(Refusal::NeverFits(_))));
    assert!(matches!(submit(&handle, 0, 5), Err(Refusal::Invalid(_))));
    assert_eq!(metric(&registry, "sparseserve_requests_total", Some("refused")), 2.0);
    submit(&handle, 10, 1).unwrap();
    handle.drain();
    thread.join().unwrap().unwrap();
}
