//! The ladder, through the whole program: no rung changes an answer, and the start screen tells which there are.

use serde_json::Value;

use super::process::{Serving, output, text};
use super::tiers::{answers, metric, requests};

/// A slow link, and a copy for every page: the same answers to the last bit, preemptions and all.
#[test]
fn answers_do_not_depend_on_how_pages_move() {
    let (unified, _, metrics) = answers(&[]);
    assert_eq!(metric(&metrics, "sparseserve_link_calls_total{direction=\"fetched\"}"), 0);
    let ways: [&[&str]; 3] = [
        &["--hbm", "20%", "--emulate-link", "0.5,20"],
        &["--hbm", "20%", "--transfer", "per-page"],
        &["--dram", "24MiB", "--hbm", "8MiB", "--transfer", "per-page", "--emulate-link", "5,1"],
    ];
    for way in ways {
        let (moved, _, metrics) = answers(way);
        assert_eq!(moved, unified, "{way:?}");
        let count =
            |name: &str, label: &str| metric(&metrics, &format!("sparseserve_{name}_total{{{label}}}"));
        let pages = ["miss", "streamed"].map(|event| count("kv_pages", &format!("event=\"{event}\"")));
        let pages = pages.iter().sum::<u64>();
        let [fetches, saves] =
            ["fetched", "saved"].map(|to| count("link_calls", &format!("direction=\"{to}\"")));
        let saved = count("kv_pages", "event=\"saved\"");
        assert!(pages > 0 && saved > 0, "{metrics}");
        match way.contains(&"per-page") {
            true => assert!(fetches >= pages && saves >= saved, "{way:?}: {fetches} and {saves} calls"),
            false => assert!(0 < fetches && fetches < pages / 4 && 0 < saves && saves < saved, "{metrics}"),
        }
        assert_eq!(metric(&metrics, "sparseserve_preemptions_total") > 0, way.contains(&"--dram"));
    }
}

/// HBM alone: it is the pool, and DRAM has nothing.
#[test]
fn answers_do_not_depend_on_offload() {
    let (unified, ..) = answers(&[]);
    let (in_hbm, receipts, metrics) = answers(&["--offload", "false", "--hbm", "24MiB"]);
    assert_eq!(in_hbm, unified);
    assert!(receipts.iter().all(|receipt| receipt.get("pages_hit").is_none()), "{receipts:?}");
    assert!(metric(&metrics, "sparseserve_preemptions_total") > 0, "the pool is small: {metrics}");
    let capacity = |tier: &str| metric(&metrics, &format!("sparseserve_{tier}_capacity_bytes"));
    assert!(capacity("dram") == 0 && (23 << 20..=24 << 20).contains(&capacity("hbm")), "{metrics}");
}

/// Baselines of one policy and budget differ in where KV lies and how it moves, and in no bit.
#[test]
fn presets_of_one_policy_give_one_answer() {
    let prompt = requests()[0]["prompt"].as_str().unwrap().to_owned();
    let answer = |flags: &[&str]| -> Value {
        let all = [
            &["run", "--json", "-p", &prompt, "--temperature", "1", "--seed", "5", "--max-tokens", "60"][..],
            &["--max-context", "4096", "--budget", "64"],
            flags,
        ]
        .concat();
        let done = output(&all);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    };
    let plain = answer(&["--policy", "arkvale", "--policy-opt", "partition=32"]);
    assert!(plain["usage"]["prompt_tokens"].as_u64().unwrap() > 1000, "{plain}");
    for preset in ["vllm-s", "vllm-so", "sparseserve"] {
        let hbm = if preset == "vllm-s" { "64MiB" } else { "8MiB" };
        let flags = ["--preset", preset, "--hbm", hbm, "--emulate-link", "5,1"];
        assert_eq!(answer(&flags), plain, "{preset}");
    }
}

#[test]
fn the_start_screen_tells_the_rungs() {
    let says = |flags: &[&str], words: &[&str]| {
        let all = ["--max-context", "2048", "--max-num-seqs", "2", "--max-inject-tokens", "128"];
        let server = Serving::start(&[&all[..], flags].concat());
        server.signal("-INT");
        let (_, said) = server.end();
        words.iter().for_each(|word| assert!(said.contains(word), "{flags:?}: no {word:?} in\n{said}"));
        said
    };
    let said = says(&[], &["schedule     chunked prefill, admission by slots"]);
    assert!(!said.contains("link ") && !said.contains("preset "), "{said}");
    says(
        &["--preset", "vllm-so", "--hbm", "40%", "--emulate-link", "25,4"],
        &[
            "link         per-page transfers, emulated: 25 GB/s and 4 us a call in each direction",
            "(global LRU)",
            "chunked prefill, admission by slots",
            "preset       vllm-so",
        ],
    );
    says(
        &["--hbm", "40%"],
        &[
            "link         fused transfers, as fast as memory",
            "layer-segmented prefill of up to 4 prompts, admission by working sets of 12 steps",
        ],
    );
    let schedule = "schedule     chunked prefill, admission by slots";
    says(&["--hbm", "100%"], &["holds the whole KV cache", schedule]);
    says(
        &["--preset", "vllm", "--hbm", "20MiB"],
        &["KV           20 MiB", "no DRAM tier", "dense", schedule, "preset       vllm"],
    );
}
