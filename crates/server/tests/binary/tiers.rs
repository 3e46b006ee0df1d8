//! A bounded HBM tier, through the whole program: the same answers to the last bit of their log-probabilities.

use std::time::Instant;

use serde_json::{Value, json};

use super::process::{SOON, Serving, client, output_within, repository, sparseserve, text};

/// Requests with long prompts that share a prefix, sparse and dense.
pub fn requests() -> Vec<Value> {
    let needles: Value =
        serde_json::from_slice(&std::fs::read(repository("xtask/golden/needles.json")).unwrap()).unwrap();
    let case = &needles["cases"][0];
    let context: String = case["context"].as_str().unwrap().chars().take(9000).collect();
    let questions = case["questions"].as_array().unwrap();
    let sparse = [
        json!({"policy": "arkvale", "budget": 64, "receipt": true}),
        json!({"policy": "arkvale", "budget": 200, "receipt": true}),
        json!({"policy": "quest", "budget": 128, "receipt": true}),
        json!({"dense": true, "receipt": true}),
        json!({"budget": 300, "receipt": true}),
    ];
    let request = |(question, sparse): (&Value, &Value)| {
        let prompt = format!("{context}\n{}", question["question"].as_str().unwrap());
        json!({
            "model": "demo", "prompt": prompt, "temperature": 0.8, "seed": 4, "max_tokens": 400, "ignore_eos": true,
            "logprobs": 3, "sparse": sparse,
        })
    };
    questions.iter().cycle().zip(&sparse).map(request).collect()
}

const FLAGS: [&str; 12] = [
    "--policy",
    "retroinfer",
    "--policy-opt",
    "span=64",
    "--policies",
    "arkvale,quest",
    "--max-num-seqs",
    "5",
    "--max-context",
    "2560",
    "--max-inject-tokens",
    "256",
];

/// Answers to all requests at once, without what may differ.
pub fn answers(flags: &[&str]) -> (Vec<Value>, Vec<Value>, String) {
    let server = Serving::start(&[&FLAGS[..], flags].concat());
    let asked = requests();
    let url = &format!("{}/v1/completions", server.url);
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let ask =
            |request| scope.spawn(move || client().post(url).json(request).send().unwrap().json().unwrap());
        let threads: Vec<_> = asked.iter().map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // A step tells its metrics after its tokens.
    let start = Instant::now();
    let metrics = loop {
        let metrics = server.get("/metrics").text().unwrap();
        if metric(&metrics, "sparseserve_requests_running") == 0 {
            break metrics;
        }
        assert!(start.elapsed() < SOON, "{metrics}");
    };
    // The clusters of a cached prompt are those that it was cached with. Prefixes are shared in whole spans.
    let again: Value = client().post(url).json(asked.last().unwrap()).send().unwrap().json().unwrap();
    assert_eq!(again["choices"], answers.last().unwrap()["choices"], "{flags:?}: from the prefix cache");
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= 64 && cached.is_multiple_of(64), "{flags:?}: {cached} tokens were cached");
    let receipts = answers.iter().map(|a| a["usage"]["sparse"].clone()).collect();
    (answers.into_iter().map(|a| a["choices"].clone()).collect(), receipts, metrics)
}

/// The value of a counter or gauge.
pub fn metric(metrics: &str, name: &str) -> u64 {
    let line = metrics.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '));
    line.unwrap_or_else(|| panic!("{name} in {metrics}"))[name.len()..].trim().parse().unwrap()
}

/// DRAM for little more than one request of full length: the youngest are preempted, and go on from what is left.
#[test]
fn answers_do_not_depend_on_preemptions_under_tiers() {
    let (unified, _, metrics) = answers(&[]);
    assert_eq!(metric(&metrics, "sparseserve_preemptions_total"), 0);
    for hbm in ["60%", "8MiB"] {
        let (tiered, _, metrics) = answers(&["--dram", "24MiB", "--hbm", hbm]);
        assert_eq!(tiered, unified, "--hbm {hbm}");
        assert!(metric(&metrics, "sparseserve_preemptions_total") > 0, "{metrics}");
        let (hbm_bytes, dram_bytes) = ["hbm", "dram"]
            .map(|tier| metric(&metrics, &format!("sparseserve_{tier}_capacity_bytes")))
            .into();
        match hbm {
            "60%" => assert!(hbm_bytes.abs_diff(dram_bytes * 3 / 5) <= 1, "{hbm_bytes} of {dram_bytes}"),
            _ => assert_eq!(hbm_bytes, 8 << 20),
        }
    }
}

/// Rules of eviction and quotas decide what is hit and missed, and nothing else.
#[test]
fn answers_do_not_depend_on_the_rules() {
    let (unified, _, _) = answers(&[]);
    let rules: [&[&str]; 3] =
        [&["--eviction", "exact"], &["--eviction", "exact", "--buffering", "0"], &["--eviction", "global"]];
    for rule in rules {
        let (tiered, _, metrics) = answers(&[&["--hbm", "20%"], rule].concat());
        assert_eq!(tiered, unified, "{rule:?}");
        let pages =
            |event: &str| metric(&metrics, &format!("sparseserve_kv_pages_total{{event=\"{event}\"}}"));
        assert!(pages("hit").min(pages("miss")).min(pages("evicted")) > 0, "{rule:?}: {metrics}");
    }
}

#[test]
fn answers_do_not_depend_on_the_size_of_hbm() {
    // K and V of 16 tokens, 64 channels in f32 each.
    let page_bytes = 2 * 16 * 64 * 4;
    let (unified, unified_receipts, in_unified) = answers(&[]);
    let receipt = &unified_receipts[0];
    assert!(receipt.get("pages_hit").is_none(), "in unified memory there are no misses: {receipt}");
    let overlap = |metrics: &str| {
        let pages = metric(metrics, "sparseserve_selected_pages_total");
        (pages, metric(metrics, "sparseserve_selected_pages_repeated_total"))
    };
    let (selected, repeated) = overlap(&in_unified);
    assert!(0 < repeated && repeated < selected, "{in_unified}");
    let smallest = &smallest().to_string();
    for hbm in [smallest, "30%", "99%"] {
        let (tiered, receipts, metrics) = answers(&["--hbm", hbm]);
        assert_eq!(tiered, unified, "--hbm {hbm}");
        let sum = |field: &str| receipts.iter().map(|r| r[field].as_u64().unwrap()).sum::<u64>();
        let pages =
            |event: &str| metric(&metrics, &format!("sparseserve_kv_pages_total{{event=\"{event}\"}}"));
        assert_eq!(sum("pages_hit"), pages("hit"), "--hbm {hbm}");
        assert_eq!(sum("pages_missed"), pages("miss") + pages("streamed"), "--hbm {hbm}");
        // When all have ended, what is left of them is cached.
        let dram = |name: &str| metric(&metrics, &format!("sparseserve_dram_{name}"));
        let (capacity, cached) = (dram("capacity_bytes"), dram("bytes{state=\"cached\"}"));
        assert!(dram("bytes{state=\"used\"}") == 0 && 0 < cached && cached < capacity, "{metrics}");
        let blocks = |state: &str| metric(&metrics, &format!("sparseserve_kv_blocks{{state=\"{state}\"}}"));
        assert_eq!(cached * (blocks("free") + blocks("cached")), capacity * blocks("cached"), "{metrics}");
        // What the server moved, it moved for somebody.
        let moved = |to: &str| metric(&metrics, &format!("sparseserve_kv_bytes_total{{direction=\"{to}\"}}"));
        assert_eq!(sum("fetched_bytes"), moved("fetched"), "--hbm {hbm}");
        let digests = metric(&metrics, "sparseserve_digest_bytes_loaded_total");
        assert_eq!(sum("digest_bytes"), digests, "--hbm {hbm}");
        let copied = pages("miss") + pages("streamed");
        let of_prefixes = moved("fetched").checked_sub(copied * page_bytes).expect("pages are fetched whole");
        assert!(copied > 0 && of_prefixes.is_multiple_of(page_bytes), "--hbm {hbm}: {of_prefixes} bytes");
        if metric(&metrics, "sparseserve_parked_total") == 0 {
            assert_eq!(moved("saved"), pages("saved") * page_bytes, "--hbm {hbm}");
            assert_eq!(overlap(&metrics), overlap(&in_unified), "--hbm {hbm}: selections are the same");
        }
        for (tiered, unified) in receipts.iter().zip(&unified_receipts) {
            let field = "attended_tokens_per_step";
            assert_eq!(tiered[field], unified[field], "--hbm {hbm}");
        }
        // Who has ended holds nothing.
        let frames = |state: &str| metric(&metrics, &format!("sparseserve_hbm_frames{{state=\"{state}\"}}"));
        assert_eq!(
            (frames("resident"), metric(&metrics, "sparseserve_hbm_lent_frames")),
            (0, 0),
            "{metrics}"
        );
        assert!(frames("pinned") > 0 && metric(&metrics, "sparseserve_kv_saving_pages") == 0, "{metrics}");
        match hbm {
            "99%" => assert!(pages("hit") > pages("miss") && pages("streamed") < pages("hit"), "{metrics}"),
            "30%" => assert!(pages("hit") > 0, "{metrics}"),
            _ => assert!(pages("streamed") > 0 && pages("hit") == 0, "{metrics}"),
        }
    }
}

/// HBM for the whole KV cache is no tier.
#[test]
fn where_everything_fits_nothing_is_fetched() {
    let (unified, ..) = answers(&[]);
    let (answers, receipts, metrics) = answers(&["--hbm", "100%"]);
    assert_eq!(answers, unified);
    assert_eq!(metric(&metrics, "sparseserve_hbm_capacity_bytes"), 0);
    assert!(receipts.iter().all(|receipt| receipt.get("pages_hit").is_none()), "{receipts:?}");
}

/// The least `--hbm` in bytes, as a refusal tells it.
fn smallest() -> u64 {
    let refused = output_within(&mut sparseserve(&[&["serve", "--hbm", "1KiB"], &FLAGS[..]].concat()), SOON);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    let bytes = said.split("--hbm ").nth(3).and_then(|rest| rest.split(' ').next()?.parse().ok());
    bytes.unwrap_or_else(|| panic!("a size that would do in {said}"))
}

/// HBM with room for the digests of the prompts, which share most of them, and of a part of the answers: who does not find room
/// any more waits with its KV.
#[test]
fn answers_do_not_depend_on_who_is_parked() {
    let (unified, ..) = answers(&[]);
    let (tiered, _, metrics) = answers(&["--hbm", &smallest().to_string(), "--admission", "slots"]);
    assert_eq!(tiered, unified);
    assert!(metric(&metrics, "sparseserve_parked_total") > 0, "{metrics}");
    assert_eq!(metric(&metrics, "sparseserve_preemptions_total"), 0);
    assert!(metric(&metrics, "sparseserve_digest_bytes_loaded_total") > 0);
    assert!(metric(&metrics, "sparseserve_hbm_digest_places{state=\"held\"}") > 0);
}

/// With working sets those for whom HBM has no room rest instead, and take turns.
#[test]
fn answers_do_not_depend_on_who_rests() {
    let (unified, ..) = answers(&[]);
    for (hbm, prefill) in [("8MiB", "segmented"), ("8MiB", "chunked")] {
        let flags = ["--hbm", hbm, "--prefill", prefill, "--max-skips", "3"];
        let (tiered, _, metrics) = answers(&flags);
        assert_eq!(tiered, unified, "{flags:?}");
        let waited =
            metric(&metrics, "sparseserve_rests_total") + metric(&metrics, "sparseserve_promoted_total");
        assert!(waited > 0, "{metrics}");
        assert_eq!(metric(&metrics, "sparseserve_parked_total"), 0);
    }
}

/// A guard that finds too little covered widens budgets: by the same checks, at the same tokens, whatever HBM holds and whoever
/// is preempted.
#[test]
fn what_a_guard_does_depends_on_the_request_alone() {
    const GUARD: [&str; 6] = ["--guard-rate", "0.3", "--guard-mass", "0.99", "--guard-bytes", "1MiB"];
    let run = |flags: &[&str]| answers(&[&GUARD[..], flags].concat());
    let (free, ..) = answers(&[]);
    let (unified, receipts, metrics) = run(&[]);
    assert_ne!(unified, free, "it changes answers");
    let guards = |receipts: &[Value]| receipts.iter().map(|r| r["guard"].clone()).collect::<Vec<_>>();
    let expected = guards(&receipts);
    assert!(expected[3].is_null(), "dense attention needs no guard: {expected:?}");
    let sum = |field: &str| expected.iter().filter_map(|g| g[field].as_u64()).sum::<u64>();
    assert!(sum("checks") > 20 && sum("doubled") > 0, "{expected:?}");
    assert_eq!(metric(&metrics, "sparseserve_guard_recall_count"), sum("checks"));
    assert_eq!(metric(&metrics, "sparseserve_guard_actions_total{action=\"doubled\"}"), sum("doubled"));
    assert_eq!(metric(&metrics, "sparseserve_guard_actions_total{action=\"dense\"}"), sum("dense"));
    for hbm in ["8MiB", "60%"] {
        let (tiered, receipts, metrics) = run(&["--dram", "24MiB", "--hbm", hbm]);
        assert_eq!(tiered, unified, "--hbm {hbm}");
        assert_eq!(guards(&receipts), expected, "--hbm {hbm}");
        assert!(metric(&metrics, "sparseserve_preemptions_total") > 0, "{metrics}");
    }
    // Checks that may read nothing do not take place.
    let (unread, receipts, _) = answers(&["--guard-rate", "1", "--guard-bytes", "1"]);
    assert!(guards(&receipts).iter().all(Value::is_null), "{receipts:?}");
    assert_eq!(unread, free);
}

/// With a policy that attends to the same pages in every step, the first step of an answer finds all of them but those that a
/// token more brings along: the prompt's last chunk is among what a warm start fetched.
#[test]
fn the_first_step_of_an_answer_finds_its_pages() {
    let flags = ["--policy", "streaming", "--budget", "800", "--hbm", "60%", "--max-context", "2560"];
    let server =
        Serving::start(&[&flags[..], &["--max-inject-tokens", "512", "--max-num-seqs", "2"]].concat());
    let url = format!("{}/v1/completions", server.url);
    let receipt = |first_token: u32, max_tokens: u32| -> Value {
        // As many tokens, none of them known from before.
        let prompt: Vec<u32> = (0..1500).map(|i| first_token + i % 40).collect();
        let body = json!({
            "model": "demo", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "sparse": {"receipt": true},
        });
        let answer: Value = client().post(&url).json(&body).send().unwrap().json().unwrap();
        answer["usage"]["sparse"].clone()
    };
    let (prompt, step) = (receipt(100, 1), receipt(300, 2));
    let more = |field: &str| step[field].as_u64().unwrap() - prompt[field].as_u64().unwrap();
    // 4 layers of 2 heads; a window of 784 tokens has 49 pages, the last 2 of them local.
    assert!(more("pages_hit") >= 4 * 2 * 46, "{prompt} {step}");
    assert!(more("pages_missed") <= 4 * 2, "{prompt} {step}");
}
