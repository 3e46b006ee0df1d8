//! A broken invariant ends the process with a dump. The test runs itself once more as the process that ends.

use std::process::Command;

use ops::Step;
use ops::coverage::Inspections;
use ops::sample::{SampleOutput, SampleRow, SamplingParams};
use sparseserve_engine::{
    Config, Disconnected, Metrics, Request, Runner, Sink, Stopping, Update, abort_process, spawn,
};

const CHILD: &str = "SPARSESERVE_TEST_ABORT_CHILD";

/// Samples nothing, whatever it was asked to.
struct Broken;

impl Runner for Broken {
    fn run(&mut self, _: &Step, _: &[SampleRow], _: &mut Inspections, out: &mut SampleOutput) {
        out.clear();
    }
}

struct Nobody;

impl Sink for Nobody {
    fn send(&mut self, _: Update) -> Result<(), Disconnected> {
        Ok(())
    }
}

fn serve_with_a_broken_runner() {
    let config = Config {
        max_num_seqs: 1,
        max_inject_tokens: 8,
        max_waiting: 1,
        max_context: 16,
        max_logprobs: 0,
        vocab_size: 10,
        page_tokens: 8,
        num_blocks: 2,
        prefix_cache: true,
        tier: None,
        prefix_limit: None,
        prefill: sparseserve_engine::Prefill::Chunked,
        admission: sparseserve_engine::Admission::Slots,
        max_skips: 16,
        guard: None,
        shared_together: 8,
    };
    let metrics = Metrics::new(&prometheus::Registry::new()).expect("a fresh registry");
    let (handle, thread) =
        spawn(config, metrics, abort_process(), || Ok::<_, ()>(Broken)).expect("a thread starts");
    let request = Request {
        prompt: vec![9, 9, 9],
        sampling: SamplingParams::default(),
        stopping: Stopping { max_tokens: 2, min_tokens: 0, end_tokens: vec![] },
        logprobs: None,
        prompt_logprobs: None,
        reuse: None,
        priority: 0,
        sparse: None,
    };
    handle.submit(request, Box::new(Nobody)).expect("the request fits");
    thread.join().expect("the process ends before the thread").expect("the runner was made");
}

#[test]
fn a_broken_invariant_aborts_the_process_with_a_dump() {
    if std::env::var_os(CHILD).is_some() {
        serve_with_a_broken_runner();
        return;
    }
    let own = std::env::current_exe().expect("a test has a path");
    let output =
        Command::new(own).args(["--nocapture"]).env(CHILD, "1").output().expect("the test runs again");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "the process does not end as if nothing had happened: {told}");
    #[cfg(unix)]
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(6), "SIGABRT: {told}");
    assert!(told.contains("the runner samples what it was asked to"), "{told}");
    assert!(
        told.contains("running: request 0 arrival 1 prompt 3 tokens 3 computed 0 blocks 1: [0]"),
        "{told}"
    );
}
