//! From schedule to commit nothing is allocated once an engine exists.

use std::time::Duration;

use super::support::{Bench, config, prompt, request};
use crate::config::Config;
use crate::request::Request;

/// Prompts of all lengths, cached ones, answers, preemptions, evictions and ends, with and without log-probabilities.
#[test]
fn a_step_does_not_allocate_before_it_emits() {
    let mut bench = Bench::new(Config { max_inject_tokens: 24, max_num_seqs: 6, ..config(30) });
    let (mut num_steps, mut num_allocations) = (0, 0);
    for round in 0..60u32 {
        for i in 0..5 {
            let asked = request(
                prompt((round + i) % 7, 1 + (round as usize * 11 + i as usize * 29) % 120),
                1 + i * 9,
            );
            let prompt_logprobs = (i == 3).then_some(4);
            bench.start(Request { logprobs: (i == 2).then_some(5), prompt_logprobs, ..asked });
        }
        while bench.engine.has_work() {
            let engine = &mut bench.engine;
            let info = allocation_counter::measure(|| {
                engine.schedule(Duration::ZERO);
                engine.run();
                engine.commit();
            });
            num_allocations += info.count_total;
            num_steps += 1;
            engine.emit(Duration::ZERO);
        }
    }
    assert!(bench.metric("sparseserve_preemptions_total", None) > 10.0, "sequences were preempted");
    assert!(bench.metric("sparseserve_prompt_tokens_cached_total", None) > 100.0, "prefixes were shared");
    assert_eq!(num_allocations, 0, "in {num_steps} steps");
}

#[test]
fn canary_the_counter_sees_an_allocation() {
    let info = allocation_counter::measure(|| drop(std::hint::black_box(vec![0u8; 10])));
    assert_eq!(info.count_total, 1);
}
