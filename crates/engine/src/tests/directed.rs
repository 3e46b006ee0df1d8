//! One behaviour per test.

use kv::QuotaRule;

use sparse::Budget;

use super::fake_runner::{NAN_TOKEN, expected, expected_after, expected_answer, expected_prompt_logprobs};
use super::support::{Bench, Listener, config, prompt, request, sparse};
use crate::config::{Config, TierShare};
use crate::engine::Event;
use crate::request::{FinishReason, Refusal, Request, Update, Usage};

fn usage(listener: &Listener) -> Usage {
    match listener.end() {
        Some(Update::Finished { usage, .. }) => usage,
        other => panic!("finished, not {other:?}"),
    }
}

#[test]
fn a_prompt_is_computed_in_chunks_beside_running_answers() {
    let mut bench = Bench::new(Config { max_inject_tokens: 8, ..config(40) });
    let (_, first) = bench.start(request(prompt(0, 3), 50));
    bench.step();
    assert_eq!(bench.engine.runner.last_step, [(0, 3)]);
    let (_, second) = bench.start(request(prompt(1, 21), 5));
    bench.step();
    assert_eq!(bench.engine.runner.last_step, [(3, 1), (0, 8)]);
    let (_, third) = bench.start(request(prompt(2, 9), 5));
    bench.step();
    assert_eq!(bench.engine.runner.last_step, [(4, 1), (8, 8)], "the budget goes to the older prompt");
    bench.step();
    assert_eq!(bench.engine.runner.last_step, [(5, 1), (16, 5), (0, 3)], "what it leaves goes to the next");
    bench.finish();
    for (family, len, max_tokens, listener) in [(0, 3, 50, first), (1, 21, 5, second), (2, 9, 5, third)] {
        let expected = expected_answer(&request(prompt(family, len), max_tokens), 200);
        assert_eq!(listener.tokens(), expected.0);
    }
}

#[test]
fn answers_never_wait_for_the_token_budget() {
    let mut bench = Bench::new(Config { max_inject_tokens: 1, max_num_seqs: 3, ..config(40) });
    for family in 0..3 {
        bench.start(request(prompt(family, 2), 20));
    }
    (0..6).for_each(|_| bench.step());
    assert_eq!(bench.engine.runner.last_step.len(), 3, "three answers advance with a budget of one");
}

#[test]
fn the_second_turn_of_a_chat_takes_the_first_from_the_prefix_cache() {
    let mut bench = Bench::new(config(40));
    let (_, first) = bench.start(request(prompt(0, 30), 10));
    bench.finish();
    assert_eq!(usage(&first).cached_tokens, 0);
    let turn: Vec<u32> = prompt(0, 30).into_iter().chain(first.tokens()).chain(prompt(1, 10)).collect();
    let (_, second) = bench.start(request(turn.clone(), 10));
    bench.finish();
    // 39 tokens have KV (the last was not run), four blocks of them are sealed.
    assert_eq!(usage(&second).cached_tokens, 32);
    assert_eq!(second.tokens(), expected_answer(&request(turn, 10), 200).0);
    assert_eq!(bench.metric("sparseserve_prompt_tokens_cached_total", None), 32.0);
}

#[test]
fn the_last_token_of_a_cached_prompt_is_computed() {
    let mut bench = Bench::new(config(40));
    bench.start(request(prompt(0, 32), 1));
    bench.finish();
    let (_, again) = bench.start(request(prompt(0, 32), 1));
    bench.step();
    assert_eq!(
        bench.engine.runner.last_step,
        [(24, 8)],
        "24 of 32 tokens are shared: a whole number of blocks below 32"
    );
    assert_eq!(usage(&again).cached_tokens, 24);
}

#[test]
fn two_equal_prompts_at_once_end_up_in_the_same_blocks() {
    let mut bench = Bench::new(Config { max_inject_tokens: 100, ..config(40) });
    bench.start(request(prompt(0, 40), 5));
    bench.start(request(prompt(0, 40), 5));
    bench.step();
    assert_eq!(bench.engine.kv_counts().in_use, 5 + 2, "five shared, and a block each for the answers");
    bench.finish();
}

#[test]
fn without_prefix_cache_nothing_is_kept() {
    let mut bench = Bench::new(Config { prefix_cache: false, ..config(40) });
    for _ in 0..2 {
        let (_, listener) = bench.start(request(prompt(0, 40), 5));
        bench.finish();
        assert_eq!(usage(&listener).cached_tokens, 0);
    }
    assert_eq!(bench.engine.kv_counts().free, 40);
}

#[test]
fn a_prompt_above_the_prefix_limit_shares_nothing() {
    let mut bench = Bench::new(Config { prefix_limit: Some(20), ..config(40) });
    for (len, cached) in [(16, 0), (20, 16), (19, 16), (21, 0), (40, 0), (40, 0)] {
        let (_, listener) = bench.start(request(prompt(0, len), 9));
        bench.finish();
        assert_eq!(usage(&listener).cached_tokens, cached, "prompt of {len}");
    }
    assert_eq!(bench.engine.kv_counts().cached, 2, "positions below 20 hold two blocks");
}

#[test]
fn the_youngest_is_preempted_and_its_answer_stays_the_same() {
    // Two sequences of 80 tokens need twenty blocks in the end.
    let mut bench = Bench::new(config(13));
    let (_, oldest) = bench.start(request(prompt(0, 40), 40));
    let (_, youngest) = bench.start(request(prompt(1, 40), 40));
    bench.finish();
    assert_eq!(usage(&oldest).preemptions, 0);
    assert!(usage(&youngest).preemptions > 0);
    assert!(bench.metric("sparseserve_preemptions_total", None) > 0.0);
    for (family, listener) in [(0, oldest), (1, youngest)] {
        assert_eq!(listener.tokens(), expected_answer(&request(prompt(family, 40), 40), 200).0);
    }
}

/// A sparse answer's KV is its own: nobody else shares it, and it finds it again after a preemption.
#[test]
fn a_preempted_answer_goes_on_where_it_was() {
    let mut bench = Bench::new(config(13));
    let ask = |family, max_tokens| Request {
        sparse: Some(sparse(2, 12)),
        ..request(prompt(family, 30), max_tokens)
    };
    let (_, oldest) = bench.start(ask(0, 24));
    let (_, youngest) = bench.start(ask(1, 60));
    while oldest.end().is_none() {
        bench.step();
    }
    assert!(bench.metric("sparseserve_preemptions_total", None) > 0.0, "blocks are short");
    bench.step();
    let (first_position, _) = bench.engine.runner.last_step[0];
    assert!(first_position >= 40, "the answer begins at 30, and is run again from {first_position}");
    bench.finish();
    assert_eq!(youngest.tokens(), expected_answer(&ask(1, 60), 200).0);
    assert!(bench.engine.kv_counts().cached <= 2 * 3, "what is left are prompts, in whole blocks");
}

/// Two turns of a chat and a third request. By default what was generated sparsely is computed again and every answer is that of a
/// server that keeps nothing; who asks for it takes it over from requests that asked for the same.
#[test]
fn the_next_turn_goes_on_from_a_sparse_answer_if_it_says_so() {
    let ask = |prompt: &[u32], partition_tokens, budget, reuse| Request {
        sparse: Some(sparse(partition_tokens, budget)),
        reuse,
        ..request(prompt.to_vec(), 20)
    };
    let half = Some(Budget::Share(0.5));
    let mut exact = Bench::new(config(60));
    let mut fast = Bench::new(config(60));
    let mut nothing = Bench::new(Config { prefix_cache: false, ..config(60) });
    let run = |bench: &mut Bench, request: &Request| {
        let (_, listener) = bench.start(request.clone());
        bench.finish();
        (listener.tokens(), usage(&listener).cached_tokens)
    };
    let first = ask(&prompt(0, 30), 2, 15, None);
    let (answer, _, kv) = expected(&first, 200, None);
    for (bench, reuse) in [(&mut exact, None), (&mut fast, half), (&mut nothing, None)] {
        assert_eq!(run(bench, &Request { reuse, ..first.clone() }).0, answer);
    }
    let turn = [first.prompt.as_slice(), &answer, &prompt(1, 10)].concat();

    // Its budget is another one in tokens. 49 tokens of the first turn have KV, 6 blocks are sealed, 3 of them of the prompt alone.
    let second = ask(&turn, 2, 30, None);
    let (by_definition, ..) = expected(&second, 200, None);
    assert_eq!(run(&mut exact, &second), (by_definition.clone(), 24));
    assert_eq!(run(&mut nothing, &second), (by_definition.clone(), 0));
    let second = Request { reuse: half, ..second };
    let (taken_over, _, second_kv) = expected_after(&kv[..48], &second, 200, None);
    assert_ne!(taken_over, by_definition);
    assert_eq!(run(&mut fast, &second), (taken_over.clone(), 48));

    // Of another method, budget or none: nothing of the answer, and nothing of what follows it.
    for other in
        [ask(&turn, 4, 30, half), ask(&turn, 2, 30, Some(Budget::Tokens(30))), ask(&turn, 2, 30, None)]
    {
        assert_eq!(run(&mut fast, &other).0, expected(&other, 200, None).0);
    }
    let dense = request(turn.clone(), 20);
    assert_eq!(run(&mut fast, &dense).0, expected_answer(&dense, 200).0);

    // The third turn finds the second one, prompt and answer, behind KV of the first.
    let third = [turn.as_slice(), &taken_over, &prompt(2, 5)].concat();
    let third = ask(&third, 2, 44, half);
    let (expected, ..) = expected_after(&second_kv[..72], &third, 200, None);
    assert_eq!(run(&mut fast, &third), (expected, 72));
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    let mut bench = Bench::new(config(20));
    let (running, _) = bench.start(request(prompt(0, 80), 20));
    let (_, large) = bench.start(request(prompt(1, 100), 5));
    let (_, small) = bench.start(request(prompt(2, 4), 5));
    (0..10).for_each(|_| bench.step());
    assert!(large.heard().is_empty() && small.heard().is_empty(), "the small one fits but came later");
    assert_eq!(bench.metric("sparseserve_requests_waiting", None), 2.0);
    bench.handle(Event::Abort(running));
    bench.finish();
    assert_eq!((large.tokens().len(), small.tokens().len()), (5, 5));
}

#[test]
fn blocks_are_told_in_bytes_too() {
    let mut bench = Bench::new(config(40));
    let bytes = |bench: &Bench| {
        let of = |state| bench.metric("sparseserve_dram_bytes", Some(state));
        [bench.metric("sparseserve_dram_capacity_bytes", None), of("used"), of("cached")]
    };
    assert_eq!(bytes(&bench), [40e3, 0.0, 0.0]);
    bench.start(request(prompt(0, 20), 5));
    bench.step();
    assert_eq!(bytes(&bench), [40e3, 3e3, 0.0]);
    bench.finish();
    assert_eq!(bytes(&bench), [40e3, 0.0, 3e3], "24 tokens were run");
}

#[test]
fn an_aborted_request_leaves_within_one_step() {
    let mut bench = Bench::new(config(40));
    let (running, first) = bench.start(request(prompt(0, 20), 50));
    bench.step();
    bench.step();
    let (waiting, second) = bench.start(request(prompt(1, 20), 50));
    bench.handle(Event::Abort(waiting));
    bench.handle(Event::Abort(running));
    assert!(!bench.engine.has_work());
    assert_eq!(bench.engine.kv_counts().in_use, 0);
    assert!(first.end().is_none() && second.heard().is_empty(), "an aborted request is dropped in silence");
    assert_eq!(bench.metric("sparseserve_requests_total", Some("aborted")), 2.0);
    bench.handle(Event::Abort(running));
}

#[test]
fn a_stopped_request_counts_as_answered() {
    let mut bench = Bench::new(config(40));
    let (id, listener) = bench.start(request(prompt(0, 20), 50));
    bench.step();
    bench.handle(Event::Stop(id));
    assert!(matches!(listener.end(), Some(Update::Finished { reason: FinishReason::Stopped, .. })));
    assert_eq!(bench.metric("sparseserve_requests_total", Some("stop")), 1.0);
}

#[test]
fn a_client_that_hangs_up_frees_its_blocks_in_the_same_step() {
    let mut bench = Bench::new(config(40));
    let listener = Listener::impatient(1);
    bench.submit(request(prompt(0, 10), 50), &listener).unwrap();
    let (_, other) = bench.start(request(prompt(1, 10), 6));
    bench.step();
    bench.step();
    assert_eq!(bench.metric("sparseserve_requests_running", None), 1.0);
    bench.finish();
    assert_eq!(bench.engine.runner.num_steps, 7, "it takes no part in later steps");
    assert_eq!(other.tokens().len(), 6);
    assert_eq!(bench.metric("sparseserve_requests_total", Some("aborted")), 1.0);
}

#[test]
fn a_sink_that_panics_loses_its_own_request_only() {
    struct Panics;
    impl crate::request::Sink for Panics {
        fn send(&mut self, _: Update) -> Result<(), crate::request::Disconnected> {
            panic!("a bug of the client");
        }
    }
    let mut bench = Bench::new(config(40));
    let (_, other) = bench.start(request(prompt(1, 10), 6));
    let now = bench.now();
    let id = crate::request::RequestId(77);
    let submission = crate::sequence::Submission::new(
        &bench.engine.config,
        id,
        request(prompt(0, 10), 6),
        Box::new(Panics),
        now,
    );
    bench.handle(Event::Submit(Box::new(submission.unwrap())));
    bench.finish();
    assert_eq!(other.tokens().len(), 6);
    assert_eq!(bench.metric("sparseserve_requests_total", Some("aborted")), 1.0);
}

#[test]
fn end_tokens_wait_for_min_tokens() {
    let free = expected_answer(&request(prompt(0, 10), 30), 200).0;
    let end = free[3];
    let with = |min_tokens| {
        let mut r = request(prompt(0, 10), 30);
        r.stopping.end_tokens = vec![end];
        r.stopping.min_tokens = min_tokens;
        r
    };
    let mut bench = Bench::new(config(40));
    let (_, soon) = bench.start(with(0));
    let (_, late) = bench.start(with(10));
    bench.finish();
    assert_eq!(*soon.tokens().last().unwrap(), end);
    let Some(Update::Finished { reason, .. }) = soon.end() else { panic!("finished") };
    assert_eq!(reason, FinishReason::EndToken(end));
    assert!(late.tokens().len() > 10 && !late.tokens()[..10].contains(&end));
    assert_eq!(late.tokens(), expected_answer(&with(10), 200).0);
}

#[test]
fn the_context_limit_ends_an_answer() {
    let mut bench = Bench::new(Config { max_context: 40, ..config(40) });
    let (_, listener) = bench.start(request(prompt(0, 30), u32::MAX));
    bench.finish();
    assert_eq!(listener.tokens().len(), 10);
    assert!(matches!(listener.end(), Some(Update::Finished { reason: FinishReason::Length, .. })));
    assert_eq!(bench.metric("sparseserve_requests_total", Some("length")), 1.0);
}

#[test]
fn prompt_logprobs_come_once_and_whole() {
    let scored =
        |len, max_tokens| Request { prompt_logprobs: Some(2), ..request(prompt(0, len), max_tokens) };
    let mut bench = Bench::new(Config { max_inject_tokens: 8, ..config(40) });
    bench.start(request(prompt(0, 30), 1));
    bench.finish();
    for (len, max_tokens) in [(30, 0), (30, 3), (1, 0), (1, 2)] {
        let (_, listener) = bench.start(scored(len, max_tokens));
        bench.finish();
        let heard = listener.heard();
        let Update::PromptLogprobs(actual) = &heard[0] else { panic!("the prompt comes first: {heard:?}") };
        assert_eq!(*actual, expected_prompt_logprobs(&prompt(0, len), 2));
        assert_eq!(heard.len(), 2 + max_tokens as usize);
        assert_eq!(usage(&listener).cached_tokens, 0, "its whole prompt is computed");
    }
}

#[test]
fn nan_fails_its_own_request_and_is_not_shared() {
    let mut bench = Bench::new(config(40));
    let mut poisoned = prompt(0, 20);
    poisoned[2] = NAN_TOKEN;
    let (_, bad) = bench.start(request(poisoned, 10));
    let (_, good) = bench.start(request(prompt(1, 20), 10));
    bench.finish();
    assert!(matches!(bad.end(), Some(Update::Failed(why)) if why.contains("NaN")));
    assert_eq!(good.tokens(), expected_answer(&request(prompt(1, 20), 10), 200).0);
    assert_eq!(bench.metric("sparseserve_requests_total", Some("failed")), 1.0);
    let cached = bench.engine.kv_counts().cached;
    assert_eq!(cached, 3, "only the good request left its blocks: 29 tokens were run");
}

#[test]
fn what_can_never_run_is_refused_with_the_arithmetic() {
    let config = Config { max_context: 100, ..config(10) };
    let refusal = |request| config.resolve(request).unwrap_err().to_string();
    assert_eq!(
        refusal(request(prompt(0, 100), 1)),
        "the prompt has 100 tokens and the context limit is 100 tokens for prompt and answer together"
    );
    assert_eq!(
        refusal(request(prompt(0, 60), 30)),
        "the prompt has 60 tokens and up to 30 are to be generated: that needs KV for 89 tokens, and the pool holds \
         80 (10 blocks of 8 tokens)"
    );
    assert!(config.resolve(request(prompt(0, 60), 21)).is_ok(), "the last token needs no KV");
    assert_eq!(refusal(request(vec![], 1)), "the prompt is empty");
    assert_eq!(refusal(request(vec![50], 1)), "token id 50 is not in the vocabulary of 50 tokens");
    let zero = "max_tokens is 0 and no log-probabilities of the prompt are asked for";
    assert_eq!(refusal(request(vec![1], 0)), zero);
    let mut many = request(vec![1], 1);
    many.logprobs = Some(6);
    assert_eq!(refusal(many), "6 alternatives per token are asked for and 5 may");
    let mut biased = request(vec![1], 1);
    biased.sampling.logit_bias = vec![(3, 1.0), (99, 1.0)];
    assert!(matches!(config.resolve(biased), Err(Refusal::Invalid(_))));
}

#[test]
fn a_pool_that_one_request_fills_serves_requests_one_by_one() {
    let mut bench = Bench::new(config(5));
    let all: Vec<_> = (0..4).map(|family| bench.start(request(prompt(family, 30), 11)).1).collect();
    bench.finish();
    for (family, listener) in all.iter().enumerate() {
        assert_eq!(listener.tokens(), expected_answer(&request(prompt(family as u32, 30), 11), 200).0);
    }
}

#[test]
fn shutdown_fails_everyone_and_drain_nobody() {
    let mut bench = Bench::new(config(40));
    let (_, drained) = bench.start(request(prompt(0, 10), 5));
    bench.step();
    bench.handle(Event::Drain);
    assert!(!bench.engine.is_drained());
    bench.finish();
    assert!(bench.engine.is_drained());
    assert_eq!(drained.tokens().len(), 5);

    let (_, running) = bench.start(request(prompt(0, 10), 5));
    bench.step();
    bench.handle(Event::Shutdown);
    let (_, late) = bench.start(request(prompt(0, 10), 5));
    assert!(bench.engine.is_drained());
    for listener in [running, late] {
        assert!(matches!(listener.end(), Some(Update::Failed(_))));
    }
}

/// Receipts and metrics tell the same pages, also of requests that were preempted.
#[test]
fn pages_are_counted_once() {
    let tier =
        TierShare { extents: 12, layers: 2, kv_heads: 2, rule: QuotaRule::Adaptive, digest_places: 99 };
    let mut bench = Bench::new(Config { tier: Some(tier), ..config(20) });
    let listeners: Vec<Listener> = (0..4)
        .map(|i| {
            let request =
                Request { sparse: Some(sparse(8, 16)), ..request(prompt(i, 30 + 7 * i as usize), 40) };
            bench.start(request).1
        })
        .collect();
    bench.finish();
    let usages: Vec<Usage> = listeners.iter().map(usage).collect();
    assert!(usages.iter().any(|u| u.preemptions > 0), "blocks are short");
    let sum = |of: fn(&Usage) -> u64| usages.iter().map(of).sum::<u64>() as f64;
    let pages = |event| bench.metric("sparseserve_kv_pages_total", Some(event));
    assert_eq!(sum(|u| u.pages.hits), pages("hit"));
    assert_eq!(sum(|u| u.pages.misses), pages("miss"));
    assert_eq!(sum(|u| u.pages.streamed), pages("streamed"));
    assert!(usages.iter().all(|u| u.pages.resident_peak == 5 && u.pages.stall_nanos > 0));
    assert_eq!(bench.metric("sparseserve_hbm_frames", Some("empty")), 32.0 * 6.0);
    assert!(bench.metric("sparseserve_kv_stall_seconds_total", None) > 0.0);
}

/// Also when no step follows, because it was the last request.
#[test]
fn who_is_aborted_leaves_hbm_at_once() {
    let tier =
        TierShare { extents: 12, layers: 2, kv_heads: 2, rule: QuotaRule::Adaptive, digest_places: 99 };
    let mut bench = Bench::new(Config { tier: Some(tier), ..config(20) });
    let resident = |bench: &Bench| bench.metric("sparseserve_hbm_frames", Some("resident"));
    for event in [Event::Abort, Event::Stop, |_| Event::Shutdown] {
        let (id, _) = bench.start(request(prompt(0, 30), 40));
        (0..4).for_each(|_| bench.step());
        assert_eq!(resident(&bench), 5.0);
        bench.handle(event(id));
        assert!(!bench.engine.has_work());
        assert_eq!(resident(&bench), 0.0);
    }
}

/// HBM with the digests of one long request: the others wait with their blocks, and lose them only where DRAM is short, too.
#[test]
fn who_has_no_place_for_its_digests_is_parked() {
    for (num_blocks, preempts) in [(100, false), (36, true)] {
        let config = config(num_blocks);
        let tier = TierShare {
            extents: 12,
            layers: 2,
            kv_heads: 2,
            rule: QuotaRule::Adaptive,
            digest_places: config.max_context.div_ceil(config.page_tokens).min(num_blocks),
        };
        let mut bench = Bench::new(Config { tier: Some(tier), ..config });
        // Dense ones need no digests, and go on.
        let dense = bench.start(request(prompt(9, 20), 150)).1;
        let sparse = |i: u32| Request { sparse: Some(sparse(8, 16)), ..request(prompt(i, 50), 90) };
        let listeners: Vec<Listener> = (0..3).map(|i| bench.start(sparse(i)).1).collect();
        bench.finish();
        assert_eq!(dense.tokens(), expected_answer(&request(prompt(9, 20), 150), 200).0);
        for (i, listener) in listeners.iter().enumerate() {
            assert_eq!(
                listener.tokens(),
                expected_answer(&sparse(i as u32), 200).0,
                "{i} in {num_blocks} blocks"
            );
        }
        assert!(bench.metric("sparseserve_parked_total", None) > 0.0, "{num_blocks} blocks");
        assert_eq!(
            bench.metric("sparseserve_preemptions_total", None) > 0.0,
            preempts,
            "{num_blocks} blocks"
        );
    }
}

#[test]
fn a_dump_names_requests_and_blocks_but_no_tokens() {
    let mut bench = Bench::new(config(40));
    bench.start(request(vec![41; 20], 5));
    bench.step();
    bench.start(request(vec![41; 9], 5));
    let dump = bench.engine.dump();
    assert!(
        dump.contains("running: request 0 arrival 1 prompt 20 tokens 20 computed 16 blocks 3: [0, 1, 2]"),
        "{dump}"
    );
    assert!(dump.contains("waiting: request 1 arrival 2 prompt 9"), "{dump}");
    assert!(!dump.contains("41"), "{dump}");
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let good = config(10);
    assert_eq!(good.check(), Ok(()));
    let bad = [
        Config { max_num_seqs: 0, ..good.clone() },
        Config { max_inject_tokens: 0, ..good.clone() },
        Config { page_tokens: 7, ..good.clone() },
        Config { max_context: 1, ..good.clone() },
        Config { max_context: usize::MAX, ..good.clone() },
        Config { max_inject_tokens: usize::MAX, ..good.clone() },
        Config { max_num_seqs: 1 << 31, ..good.clone() },
        Config { num_blocks: 1 << 32, ..good },
    ];
    for config in bad {
        assert!(config.check().is_err(), "{config:?}");
    }
}
