//! Tests of `sparse.rs`.

use super::*;

fn method() -> Method {
    crate::conformance::method(16, Score::Digest { digests: 0 })
}

#[test]
fn the_page_of_the_row_is_attended_and_does_not_compete() {
    let plan = |context, budget| method().plan(context, context, budget);
    // 100 tokens: six whole partitions and four tokens.
    assert_eq!(plan(100, 64), RowPlan { tail_start: 96, candidates: 0..6, take: 3, ..RowPlan::all() });
    // 96 tokens: the sixth is whole, and still the row's own.
    assert_eq!(plan(96, 64), RowPlan { tail_start: 80, candidates: 0..5, take: 3, ..RowPlan::all() });
    assert_eq!(plan(96, 1).take, 1, "raised to one partition");
    assert!(plan(96, 96).is_dense() && plan(96, 100).is_dense() && plan(10, 1).is_dense());
    assert!(plan(100, 99).take == 5 && plan(99, 98).take == 5, "rounded down to whole partitions");
}

#[test]
fn sinks_and_window_take_whole_partitions() {
    let always = Always { sink_tokens: 20, recent_tokens: 40, ..method().always };
    let plan = Method { always, ..method() }.plan(200, 200, 128);
    // The window begins at 160, the sinks end at 32.
    assert_eq!(plan, RowPlan { sink_end: 32, tail_start: 160, candidates: 2..10, take: 3, ..RowPlan::all() });
    assert_eq!(plan.attended(200, 16), 32 + 40 + 48);
    let always = Always { sink_tokens: 90, recent_tokens: 90, ..always };
    let all = Method { always, ..method() };
    assert!(all.plan(170, 170, 3).is_dense(), "sinks and window meet");
}

#[test]
fn an_open_partition_may_compete() {
    let always = Always { recent_tokens: 0, ..method().always };
    let competing = Method { always, open_competes: true, take_min: 3, ..method() };
    assert_eq!(
        competing.plan(100, 100, 64),
        RowPlan { tail_start: 100, candidates: 0..7, take: 4, ..RowPlan::all() }
    );
    assert_eq!(competing.plan(100, 100, 5).take, 3);
    assert_eq!(Method { open_competes: false, ..competing }.plan(100, 100, 64).tail_start, 96);
}

#[test]
fn recency_spends_the_whole_budget() {
    let always = Always { sink_tokens: 4, ..method().always };
    let streaming = Method { partition_tokens: 1, score: Score::Recency, always, ..method() };
    let plan = streaming.plan(100, 100, 30);
    assert_eq!(plan, RowPlan { sink_end: 4, tail_start: 74, ..RowPlan::all() });
    assert_eq!(plan.attended(100, 1), 30);
    assert_eq!(streaming.plan(100, 100, 0).attended(100, 1), 5, "sinks and the row itself");
    assert!(streaming.plan(3, 3, 2).is_dense());
}

/// For all small cases: parts do not overlap, lie in the context, and hold to the budget if that suffices for the
/// least that is attended.
#[test]
fn plans_are_sound() {
    let mut with_outliers = 0;
    for partition_tokens in [1, 3, 8] {
        for sink_tokens in [0, 5] {
            for recent_tokens in [0, 1, 9] {
                for (open_competes, generated_tokens, outliers) in
                    [(false, 0, 0), (true, 0, 0), (false, 7, 2), (false, 0, 1), (false, 4, 0)]
                {
                    let always = Always { sink_tokens, recent_tokens, generated_tokens, outliers };
                    let method = Method { partition_tokens, always, open_competes, ..method() };
                    for context in 1..60usize {
                        for budget in 0..=context + 1 {
                            for prompt in [context, context.saturating_sub(6), context / 2] {
                                with_outliers += check_plan(&method, context, prompt, budget);
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(with_outliers > 0);
}

/// Checks one, and returns its outliers.
fn check_plan(method: &Method, context: usize, prompt: usize, budget: usize) -> usize {
    let plan = method.plan(context, prompt, budget);
    let length = method.partition_tokens;
    let what = || format!("{method:?} context {context} prompt {prompt} budget {budget}: {plan:?}");
    assert!(plan.is_dense() || budget < context, "{}: it holds everything", what());
    if plan.is_dense() {
        return 0;
    }
    let (first, end) = (plan.candidates.start, plan.candidates.end);
    assert_eq!(plan.sink_end, first * length, "{}", what());
    assert_eq!(plan.tail_start, (end * length).min(context), "{}", what());
    let (among, outliers) = plan.outliers.clone();
    assert!(outliers <= among.len(), "{}", what());
    assert!(outliers == 0 || first <= among.start && among.end <= end, "{}: outliers are candidates", what());
    assert!(outliers == 0 || among.end * length <= prompt, "{}: of the prompt", what());
    assert!(plan.take >= 1 && plan.take + outliers < plan.candidates.len(), "{}", what());
    let least = plan.sink_end + context - plan.tail_start + (outliers + 1) * length;
    assert!(plan.attended(context, length) <= budget.max(least), "{}", what());
    outliers
}

/// Without scores there are a beginning and an end, and as many tokens as the budget says.
#[test]
fn plans_by_recency_are_sound() {
    for (sink_tokens, recent_tokens) in [(0, 1), (5, 1), (3, 9), (0, 0)] {
        let always = Always { sink_tokens, recent_tokens, ..method().always };
        let method = Method { partition_tokens: 1, score: Score::Recency, always, ..method() };
        for context in 1..60usize {
            for budget in 0..=context + 1 {
                let plan = method.plan(context, context, budget);
                let what = || format!("{method:?} context {context} budget {budget}: {plan:?}");
                let least = (sink_tokens + recent_tokens.max(1)) as usize;
                assert!(plan.candidates.is_empty() && plan.outliers.1 == 0, "{}", what());
                assert_eq!(plan.is_dense(), budget.max(least) >= context, "{}", what());
                if !plan.is_dense() {
                    assert!(plan.sink_end < plan.tail_start && plan.tail_start < context, "{}", what());
                    assert_eq!(plan.attended(context, 1), budget.max(least), "{}", what());
                }
            }
        }
    }
}

#[test]
fn generated_tokens_and_outliers_are_attended() {
    let always = Always { sink_tokens: 0, recent_tokens: 32, generated_tokens: 40, outliers: 4 };
    let shadow = Method { partition_tokens: 8, always, ..method() };
    let plan = |context| shadow.plan(context, 200, 160);
    // 21 partitions before the last 32 tokens of the prompt.
    let outliers = (0..21, 4);
    let first = RowPlan { tail_start: 168, candidates: 0..21, take: 12, outliers, ..RowPlan::all() };
    assert_eq!(plan(200), first);
    // 30 generated tokens more, at the expense of what is selected.
    assert_eq!(plan(230), RowPlan { take: 8, ..first.clone() });
    // Only 40 are always attended; those before them compete. The outliers stay what they were.
    assert_eq!(plan(260), RowPlan { tail_start: 184, candidates: 0..23, take: 6, ..first });
    assert_eq!(plan(230).attended(230, 8), 62 + 12 * 8);
    assert!(shadow.plan(100, 60, 90).is_dense() || shadow.plan(100, 60, 90).outliers.0.end <= 3);
}

#[test]
fn marks_are_ranges() {
    for (start, end) in [(0, 0), (0, 64), (3, 7), (60, 70), (64, 128), (1, 200), (199, 200)] {
        let mut bits = [0u64; 4];
        mark(&mut bits, start..end);
        for slot in 0..256 {
            assert_eq!(bits[slot / 64] >> (slot % 64) & 1 == 1, (start..end).contains(&slot), "{slot}");
        }
    }
}

/// Selections by [`Score::Replay`] over some hundred steps of one head, and the share that consecutive ones have in
/// common.
fn replayed(seed: u64, overlap_permille: u16, prompt: usize, budget: usize) -> f64 {
    let (steps, head) = (400, 1);
    let method = Method { score: Score::Replay { seed, overlap_permille }, ..method() };
    let rate = replay_rate(&method, overlap_permille, prompt, budget);
    let (mut last, mut kept, mut all) = (Vec::new(), 0, 0);
    for position in prompt..prompt + steps {
        let plan = method.plan(position + 1, prompt, budget);
        let score = |p: usize| replay_score(seed, rate, 3, head, position, p);
        let mut taken: Vec<usize> = plan.candidates.clone().collect();
        taken.sort_by_key(|&p| (std::cmp::Reverse(order_key(score(p))), p));
        taken.truncate(plan.take);
        if position > prompt {
            kept += taken.iter().filter(|p| last.contains(*p)).count();
            all += taken.len();
        }
        last = taken;
    }
    kept as f64 / all as f64
}

#[test]
fn replay_keeps_the_stated_share() {
    for seed in 0..2 {
        for overlap_permille in [700, 850, 950] {
            for (prompt, budget) in [(4096, 256), (8192, 1024), (3000, 500), (32768, 512)] {
                let found = replayed(seed, overlap_permille, prompt, budget);
                let stated = f64::from(overlap_permille) / 1000.0;
                let what = format!("seed {seed} prompt {prompt} budget {budget}: {found:.3} for {stated}");
                assert!((found - stated).abs() < 0.03, "{what}");
            }
        }
    }
}

#[test]
fn replay_rates_have_their_bounds() {
    let rate = |overlap, prompt, budget| replay_rate(&method(), overlap, prompt, budget);
    assert_eq!(rate(1000, 4096, 256), 0, "nothing changes");
    assert_eq!(rate(0, 4096, 2048), 1 << 32, "all draw anew");
    assert_eq!(rate(750, 10, 256), 1 << 30, "a prompt within its budget");
    assert!(rate(900, 4096, 2048) > rate(900, 4096, 1024), "some are selected again by chance");
    assert!(rate(0, u32::MAX as usize - 1, 1) <= 1 << 32);
    let last = u32::MAX as usize;
    assert!((0.0..1.0).contains(&replay_score(1, 1 << 32, 0, 0, last, 5)));
    // The position before an epoch's end and after it differ, others do not.
    let scores: Vec<f32> = (0..64).map(|position| replay_score(1, 1 << 28, 0, 0, position, 5)).collect();
    let changes = scores.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert_eq!(changes, 4, "{scores:?}");
}

#[test]
fn whole_clusters_fill_what_the_always_set_leaves() {
    let always = Always { sink_tokens: 4, recent_tokens: 64, ..method().always };
    let rule = Rule::Clusters { span_tokens: 256, estimate_permille: 232, copy: 0 };
    let retro = Method { softmax: true, always, take_min: 0, rule, ..method() };
    let plan = |context, budget| retro.plan(context, context, budget);
    assert!(plan(319, 10).is_dense(), "no span ends before the window");
    assert!(plan(700, 700).is_dense());
    // One span; 4 sinks and what follows the span are attended.
    let ordered = OrderedSlots { end: 256, copy: OrderedCopy(0) };
    let tail =
        RowPlan { sink_end: 4, tail_start: 256, candidates: 0..16, estimated: 3, ordered, ..RowPlan::all() };
    assert_eq!(plan(320, 68), tail);
    assert_eq!(
        (plan(320, 68).attended(320, 16), plan(320, 1).attended(320, 16)),
        (68, 68),
        "raised to the always-set"
    );
    assert_eq!(plan(320, 78), RowPlan { take: 10, room: 10, ..tail.clone() });
    // That of the sinks, those of the tail, and one cluster that begins within a page.
    assert_eq!((plan(320, 78).pages_max(320, 16, 16), plan(320, 78).attended(320, 16)), (1 + 4 + 2, 78));
    assert_eq!(plan(320, 300), RowPlan { take: 16, room: 232, ..tail });
    assert_eq!(plan(320, 300).pages_max(320, 16, 16), 20, "never more than there are");
    assert_eq!((plan(575, 500).tail_start, plan(576, 500).tail_start), (256, 512));
    let none = Method { rule: Rule::Clusters { span_tokens: 256, estimate_permille: 0, copy: 0 }, ..retro };
    assert_eq!(none.plan(600, 600, 100).estimated, 0);
}

#[test]
fn digests_of_clusters_need_whole_spans() {
    let spec = |partition_tokens, span_tokens| DigestSpec {
        kind: DigestKind::Cluster { span_tokens, sink_tokens: 4, copy: 0 },
        partition_tokens,
    };
    assert_eq!(spec(16, 1024).width(128), 128 + 128 + 2 + 16);
    assert_eq!((spec(16, 1024).made_together(), spec(16, 1024).shared_together(16)), (1024, 1024));
    assert!(
        spec(16, 1024).check(16).is_ok() && spec(32, 64).check(8).is_ok() && spec(1, 256).check(64).is_ok()
    );
    for (partition, span, page) in
        [(16, 1000, 16), (16, 96, 64), (1, 512, 16), (16, 8192, 16), (128, 1024, 16), (24, 1024, 16)]
    {
        assert!(spec(partition, span).check(page).is_err(), "{partition} {span} {page}");
    }
    let mean = DigestSpec { kind: DigestKind::Mean, partition_tokens: 32 };
    assert_eq!((mean.made_together(), mean.shared_together(16), mean.width(128)), (32, 16, 128));
}
