//! Random requests, aborts and hang-ups under random limits: every answer equals the one by definition, whatever else
//! runs, and no block is lost.

use kv::QuotaRule;
use ops::Random;
use sparse::Budget;

use super::fake_runner::{Fault, Kv, Prediction, expected, expected_prompt_logprobs};
use super::support::{Bench, Listener, config, prompt, request, sparse};
use crate::config::{Admission, Config, Prefill, Segments, TierShare};
use crate::engine::Event;
use crate::guard::GuardRule;
use crate::request::{FinishReason, Request, RequestId, TokenLogprobs, Update};

#[derive(Debug)]
enum Op {
    Submit(Box<Request>, Option<usize>, std::ops::Range<usize>),
    Abort(RequestId),
    Stop(RequestId),
    Step,
}

struct Live {
    id: RequestId,
    request: Request,
    /// Tokens of its prompt that are an answer to somebody else.
    answered: std::ops::Range<usize>,
    listener: Listener,
    impatient: bool,
    cancelled: bool,
}

/// What a run has seen, so that a test can tell an idle fuzz.
#[derive(Debug, Default)]
struct Seen {
    answers: usize,
    cached_tokens: u32,
    /// Tokens of sparse answers that later requests took over.
    taken_over: usize,
    preemptions: u32,
    parked: f64,
    /// Steps in which somebody rested, and requests that went first because others were preferred to them too often.
    rests: f64,
    promoted: f64,
    /// Tokens that went through the layers one by one, counted per layer.
    by_layer: usize,
    evictions: f64,
    /// Of guards: checks, doubled budgets, and requests that attended to everything in the end.
    guarded: [f64; 3],
}

/// What somebody may go on from.
struct Ended {
    request: Request,
    answer: Vec<u32>,
}

fn random_config(random: &mut Random) -> Config {
    let mut config = config(6 + random.below(40));
    config.page_tokens = [8, 16][random.below(2)];
    config.shared_together = config.page_tokens * [1, 1, 1, 2, 5][random.below(5)];
    config.max_num_seqs = 1 + random.below(12);
    config.max_inject_tokens = [1, 3, 8, 17, 64, 300][random.below(6)];
    config.max_context = 60 + random.below(160);
    config.prefix_cache = random.below(5) > 0;
    config.guard = (random.below(2) == 0).then(|| GuardRule {
        rate_ppm: [100_000, 1_000_000][random.below(2)],
        bytes_per_token: [60, 400, 1 << 40][random.below(3)],
        mass_min_permille: [0, 300, 1000][random.below(3)],
        layers: vec![0, 1, 3],
        key_page_bytes: 64,
    });
    config.prefix_limit = if random.below(4) == 0 { Some(random.below(100)) } else { None };
    if random.below(2) == 0 {
        config.num_blocks += 60;
    }
    // As many as the longest request needs, or more.
    let longest = config.max_context.div_ceil(config.page_tokens).min(config.num_blocks);
    config.tier = (random.below(2) == 0).then(|| TierShare {
        extents: random.below(100),
        layers: 2,
        kv_heads: 2,
        rule: [QuotaRule::Adaptive, QuotaRule::Fixed(2), QuotaRule::Shared][random.below(3)],
        digest_places: longest + random.below(4) / 3 * random.below(60),
    });
    if random.below(2) == 0 {
        let (prompts, layers) = (1 + random.below(4), 2);
        let hidden_rows = config.max_context + random.below(3) * config.max_inject_tokens;
        config.prefill = Prefill::Segmented(Segments { layers, prompts, hidden_rows });
    }
    if random.below(2) == 0 {
        config.admission = Admission::WorkingSet { steps: 1 + random.below(20) };
    }
    config.max_skips = [1, 4, 16][random.below(3)];
    config
}

fn guard_of(config: &Config) -> Option<(&GuardRule, usize)> {
    config.guard.as_ref().map(|rule| (rule, config.page_tokens))
}

fn random_request(random: &mut Random, config: &Config, live: &[Live]) -> Request {
    // Families share prefixes; a tail of its own makes most prompts differ somewhere.
    let mut tokens = prompt(random.below(3) as u32, 1 + random.below(config.max_context));
    let tail = random.below(tokens.len() + 1);
    for token in &mut tokens[tail..] {
        *token = random.below(40) as u32;
    }
    // The next turn of a conversation: what was asked before, what was answered, and something new.
    if random.below(3) == 0 && !live.is_empty() {
        let before = &live[random.below(live.len())].request;
        let (mut answer, ..) = expected(before, config.max_context, guard_of(config));
        answer.truncate(random.below(answer.len() + 1));
        tokens.truncate(random.below(9));
        tokens = [before.prompt.as_slice(), &answer, &tokens].concat();
        tokens.truncate(config.max_context);
    }
    // Where digests need room, answers are longer: requests are admitted with some to spare.
    let longest = if config.tier.is_some() { 150 } else { 50 };
    let mut request = request(tokens, random.below(longest) as u32);
    request.sampling.seed = random.below(3) as u64;
    request.priority = [0, 0, 0, -1, 5][random.below(5)];
    request.stopping.end_tokens = (0..random.below(3)).map(|_| random.below(48) as u32).collect();
    request.stopping.min_tokens = random.below(8) as u32;
    // Who attends sparsely has digests, for which an HBM tier must have room.
    let sparse_of_four = if config.tier.is_some() { 3 } else { 2 };
    request.sparse =
        (random.below(4) < sparse_of_four).then(|| sparse(1 + random.below(2), random.below(60) as u32));
    // Who reuses answers says so, mostly with the same budget as the others.
    request.reuse = request.sparse.filter(|_| random.below(3) == 0).map(|_| match random.below(4) {
        0 => Budget::Share(0.25),
        _ => Budget::Tokens(20),
    });
    request.logprobs = (random.below(5) == 0).then(|| random.below(6) as u32);
    let max_tokens = &mut request.stopping.max_tokens;
    if random.below(6) == 0 {
        request.prompt_logprobs = Some(random.below(6) as u32);
        *max_tokens *= random.below(2) as u32;
    } else {
        *max_tokens = (*max_tokens).max(1);
    }
    request
}

/// The next turn after `before`: what it asked, what it was answered, and something new; with where the answer is.
fn next_turn(random: &mut Random, before: &Ended) -> (Request, std::ops::Range<usize>) {
    let Ended { request: asked, answer } = before;
    let mut tokens = [asked.prompt.as_slice(), answer].concat();
    let answered = asked.prompt.len()..tokens.len();
    tokens.extend((0..1 + random.below(9)).map(|_| random.below(40) as u32));
    (
        Request { sparse: asked.sparse, reuse: asked.reuse, ..request(tokens, 1 + random.below(30) as u32) },
        answered,
    )
}

fn draw(random: &mut Random, config: &Config, live: &[Live], ended: &[Ended]) -> Op {
    if !ended.is_empty() && random.below(9) == 0 {
        let before = &ended[random.below(ended.len())];
        let (request, answered) = next_turn(random, before);
        return Op::Submit(Box::new(request), None, answered);
    }
    match random.below(20) {
        0..6 => Op::Submit(
            Box::new(random_request(random, config, live)),
            (random.below(12) == 0).then(|| random.below(12)),
            0..0,
        ),
        6 if !live.is_empty() => Op::Abort(live[random.below(live.len())].id),
        7 if !live.is_empty() => Op::Stop(live[random.below(live.len())].id),
        _ => Op::Step,
    }
}

/// An answer that goes on from others' depends on what was there. The runner has seen that it was KV of its own tokens and kind.
fn check_reuse(live: &Live, config: &Config, seen: &mut Seen) {
    let Live { request, listener, answered, .. } = live;
    let Some(Update::Finished { usage, .. }) = listener.end() else {
        assert!(live.cancelled || live.impatient, "{request:?} was answered");
        return;
    };
    assert_eq!(usage.generated_tokens as usize, listener.tokens().len());
    assert!(usage.cached_tokens < usage.prompt_tokens);
    let limit =
        config.prefix_limit.map_or(usize::MAX, |limit| if request.prompt.len() > limit { 0 } else { limit });
    assert!(usage.cached_tokens as usize <= if config.prefix_cache { limit } else { 0 });
    if !answered.is_empty() {
        seen.taken_over += (usage.cached_tokens as usize).min(answered.end).saturating_sub(answered.start);
    }
}

fn check_answer(live: &Live, config: &Config, seen: &mut Seen) {
    let Live { request, listener, .. } = live;
    if request.reuse.is_some() {
        return check_reuse(live, config, seen);
    }
    let (answer, reason, kv) = expected(request, config.max_context, guard_of(config));
    let tokens = listener.tokens();
    let end = listener.end();
    let Some(end) = end else {
        assert!(live.cancelled || live.impatient, "{request:?} was answered");
        assert!(answer.starts_with(&tokens), "an answer that was cut short is the same up to there");
        return;
    };
    let Update::Finished { reason: actual, usage } = end else { panic!("{end:?} for {request:?}") };
    if actual == FinishReason::Stopped {
        assert!(live.cancelled, "{request:?} was stopped");
        assert!(answer.starts_with(&tokens), "an answer that was stopped is the same up to there");
        assert_eq!(usage.generated_tokens as usize, tokens.len());
        return;
    }
    assert_eq!(tokens, answer, "{request:?}");
    assert_eq!(actual, reason, "{request:?}");
    assert_eq!(usage.generated_tokens as usize, answer.len());
    assert_eq!(usage.prompt_tokens as usize, request.prompt.len());
    assert!(usage.cached_tokens < usage.prompt_tokens);
    assert_eq!(usage.attended.is_some(), request.sparse.is_some());
    if let (Some(attended), Some(sparse)) = (usage.attended, request.sparse) {
        // The last token of an answer is never run.
        let steps = answer.len().saturating_sub(1);
        assert_eq!(attended.steps as usize, steps, "{request:?}");
        let contexts: usize = (0..steps).map(|i| request.prompt.len() + i + 1).sum();
        assert_eq!(attended.context_tokens as usize, contexts);
        assert!(attended.tokens <= attended.context_tokens as f64);
        let doublings = usage.guarded.map_or(0, |guarded| guarded.doubled);
        let most = if usage.guarded.is_some_and(|g| g.dense) {
            u64::MAX
        } else {
            u64::from(sparse.budget) << doublings
        };
        let within = (steps as u64).saturating_mul(most);
        assert!(attended.raised_steps > 0 || attended.tokens <= within as f64, "{request:?} {attended:?}");
    }
    if config.prefix_limit.is_some_and(|limit| request.prompt.len() > limit) || !config.prefix_cache {
        assert_eq!(usage.cached_tokens, 0);
    }
    check_logprobs(request, &listener.heard(), &answer, &kv);
    seen.answers += 1;
    seen.cached_tokens += usage.cached_tokens;
    seen.preemptions += usage.preemptions;
}

fn check_logprobs(request: &Request, heard: &[Update], answer: &[u32], kv: &[Kv]) {
    let mut of_prompt: Vec<&Vec<TokenLogprobs>> = Vec::new();
    let mut of_answer = Vec::new();
    for update in heard {
        match update {
            Update::PromptLogprobs(logprobs) => of_prompt.push(logprobs),
            Update::Token { logprobs, .. } => of_answer.push(logprobs.clone()),
            Update::Finished { .. } | Update::Failed(_) => {}
        }
    }
    let expected = request.prompt_logprobs.map(|count| expected_prompt_logprobs(&request.prompt, count));
    assert_eq!(of_prompt, expected.iter().collect::<Vec<_>>());
    if expected.is_some() {
        assert!(matches!(heard[0], Update::PromptLogprobs(_)), "the prompt comes before the answer");
    }
    for (i, actual) in of_answer.into_iter().enumerate() {
        let context = &kv[..request.prompt.len() + i];
        let expected = request.logprobs.map(|n| Prediction::after(context).logprobs(answer[i], n));
        assert_eq!(actual, expected);
    }
}

fn fuzz(seed: u64, num_ops: usize, fault: Option<Fault>) -> Seen {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let config = random_config(&mut random);
    let mut bench = Bench::new(config.clone());
    bench.engine.runner.fault = fault;
    let mut live: Vec<Live> = Vec::new();
    let mut done: Vec<Ended> = Vec::new();
    let mut seen = Seen::default();
    for _ in 0..num_ops {
        match draw(&mut random, &config, &live, &done) {
            Op::Submit(request, patience, answered) => {
                let listener = patience.map_or_else(Listener::default, Listener::impatient);
                // Some can never fit, and are refused.
                if let Ok(id) = bench.submit((*request).clone(), &listener) {
                    live.push(Live {
                        id,
                        request: *request,
                        answered,
                        listener,
                        impatient: patience.is_some(),
                        cancelled: false,
                    });
                }
            }
            Op::Abort(id) | Op::Stop(id) if live.iter().all(|l| l.id != id) => {
                unreachable!("drawn from live")
            }
            Op::Abort(id) => cancel(&mut bench, &mut live, id, Event::Abort(id)),
            Op::Stop(id) => cancel(&mut bench, &mut live, id, Event::Stop(id)),
            Op::Step => {
                if bench.engine.has_work() {
                    bench.step();
                }
            }
        }
        live.retain(|l| {
            let ended = l.listener.end().is_some();
            if ended {
                check_answer(l, &config, &mut seen);
                done.push(Ended { request: l.request.clone(), answer: l.listener.tokens() });
            }
            !ended
        });
        done.drain(..done.len().saturating_sub(3));
    }
    bench.finish();
    let sparse_rows_max = bench.engine.runner.sparse_rows_max;
    assert!(sparse_rows_max <= config.max_num_seqs + crate::REPLAY_ROWS, "{sparse_rows_max} rows");
    for l in &live {
        check_answer(l, &config, &mut seen);
    }
    seen.evictions = bench.metric("sparseserve_kv_block_evictions_total", None);
    seen.parked = bench.metric("sparseserve_parked_total", None);
    seen.rests = bench.metric("sparseserve_rests_total", None);
    seen.promoted = bench.metric("sparseserve_promoted_total", None);
    seen.by_layer = bench.engine.runner.work;
    let work_max = (config.max_inject_tokens + config.max_num_seqs) * bench.engine.runner.layers;
    assert!(bench.engine.runner.work_max <= work_max, "the work of a step is bounded");
    let actions = "sparseserve_guard_actions_total";
    seen.guarded = [
        bench.metric("sparseserve_guard_attention_mass", None),
        bench.metric(actions, Some("doubled")),
        bench.metric(actions, Some("dense")),
    ];
    seen
}

fn cancel(bench: &mut Bench, live: &mut [Live], id: RequestId, event: Event) {
    live.iter_mut().filter(|l| l.id == id).for_each(|l| l.cancelled = true);
    bench.handle(event);
}

#[test]
fn answers_do_not_depend_on_what_else_runs() {
    let mut total = Seen::default();
    for seed in 0..200 * ops::conformance::seed_factor() {
        let seen = fuzz(seed, 600, None);
        total.answers += seen.answers;
        total.cached_tokens += seen.cached_tokens;
        total.taken_over += seen.taken_over;
        total.preemptions += seen.preemptions;
        total.evictions += seen.evictions;
        total.parked += seen.parked;
        total.rests += seen.rests;
        total.promoted += seen.promoted;
        total.by_layer += seen.by_layer;
        total.guarded.iter_mut().zip(seen.guarded).for_each(|(sum, n)| *sum += n);
    }
    println!("{total:?}");
    assert!(total.answers > 5000, "{total:?}");
    assert!(total.cached_tokens > 1000 && total.preemptions > 100 && total.evictions > 1000.0, "{total:?}");
    assert!(total.taken_over > 300, "{total:?}");
    assert!(total.parked > 10.0 && total.rests > 100.0 && total.promoted > 100.0, "{total:?}");
    assert!(total.by_layer > 10_000, "{total:?}");
    assert!(total.guarded.iter().all(|&n| n > 100.0), "{total:?}");
}

#[test]
#[should_panic(expected = "a new token is drawn after all known ones")]
fn canary_lost_writes_are_noticed() {
    for seed in 0..120 {
        fuzz(seed, 600, Some(Fault::LosesWrites));
    }
}

/// Blocks that are shared before they are in DRAM, seats that are taken over with what lies there, open pages that are lost, and
/// coverage that depends on others.
#[test]
fn canary_a_careless_device_is_noticed() {
    for fault in [Fault::SavesNothing, Fault::KeepsSeats, Fault::ForgetsParked, Fault::CoversByLoad] {
        let noticed = (0..120).any(|seed| std::panic::catch_unwind(|| fuzz(seed, 600, Some(fault))).is_err());
        assert!(noticed, "{fault:?} and nobody noticed");
    }
}

#[test]
#[should_panic(expected = "a new token is drawn after all known ones")]
fn canary_a_wrong_block_is_noticed() {
    for seed in 0..120 {
        fuzz(seed, 600, Some(Fault::ReadsNeighbour));
    }
}
