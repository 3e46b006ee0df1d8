//! `--record-selection` and `bench cache`: what is recorded can be studied, and what cannot be studied says why.

use crate::process::{output, text};

#[test]
fn recorded_selections_become_hit_rates() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let (trace, json) = (path("a.trace"), path("a.json"));
    let recorded = output(&[
        "bench",
        "engine",
        "--context",
        "2048",
        "--batch",
        "2",
        "--steps",
        "40",
        "--policy",
        "replay",
        "--policy-opt",
        "overlap=0.9",
        "--budget",
        "512",
        "--record-selection",
        &trace,
    ]);
    assert!(recorded.status.success(), "{}", text(&recorded.stderr));
    let studied = output(&["bench", "cache", &trace, "--json", &json]);
    assert!(studied.status.success(), "{}", text(&studied.stderr));
    let table = text(&studied.stdout);
    assert!(table.starts_with("Selections of replay:overlap=0.9\n2 requests in 41 steps, 8 "), "{table}");
    let study: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let rate = |rule: &str, ratio: usize| study["hit_rate"][rule][ratio].as_f64().unwrap();
    // What is drawn overlaps as stated; the always-set comes on top.
    let next = study["overlap"][0].as_f64().unwrap();
    assert!((0.88..0.96).contains(&next), "{next}");
    assert!((rate("mandatory-only", 3) - next).abs() < 1e-9);
    assert!(rate("exact-lru", 4) > rate("exact-lru", 0) && rate("belady", 2) >= rate("bucketed-lru", 2));

    // Another policy on other KV, in whose place the trace is played: the same demand.
    let (again, other) = (path("again.trace"), path("again.json"));
    let bench = ["bench", "engine", "--batch", "2", "--steps", "40", "--filled", "7", "--policy", "quest"];
    let replay = ["--budget", "512", "--replay-selection", &trace, "--record-selection", &again];
    let run = output(&[&bench[..], &replay, &["--context", "2048"]].concat());
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(output(&["bench", "cache", &again, "--json", &other]).status.success());
    let replayed: serde_json::Value = serde_json::from_slice(&std::fs::read(&other).unwrap()).unwrap();
    assert_eq!(replayed["note"], "quest");
    for key in ["hit_rate", "overlap", "pages_per_step", "asked"] {
        assert_eq!(replayed[key], study[key], "{key}");
    }
    for (flags, part) in [
        (&["--context", "2000"][..], "give --context 2048"),
        (&["--context", "2048", "--page-tokens", "8"], "2 KV heads and pages of 16 tokens, here there are"),
    ] {
        let refused = output(&[&bench[..], &replay, flags].concat());
        let line = text(&refused.stderr);
        assert!(refused.status.code() == Some(2) && line.contains(part), "{line}");
    }

    // The same bytes again, in part and damaged.
    let bytes = std::fs::read(&trace).unwrap();
    let (cut, bad) = (path("cut.trace"), path("bad.trace"));
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let mut damaged = bytes;
    damaged[1000] ^= 1;
    std::fs::write(&bad, damaged).unwrap();
    for (file, part) in [
        (cut.as_str(), "is cut off after 163 whole records"),
        (bad.as_str(), "is damaged in the record at byte"),
        (json.as_str(), "no selection trace"),
        ("absent.trace", "No such file"),
    ] {
        let refused = output(&["bench", "cache", file]);
        let line = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{line}");
        assert!(line.starts_with(&format!("error: {file}: ")) && line.contains(part), "{line}");
        assert_eq!(line.trim().lines().count(), 1, "{line}");
    }
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let refused = |args: &[&str]| {
        let run = output(&[&["bench", "engine", "--context", "64", "--steps", "1"], args].concat());
        assert_eq!(run.status.code(), Some(2));
        text(&run.stderr)
    };
    let dense = refused(&["--record-selection", "x.trace"]);
    assert!(dense.contains("dense attention selects nothing; --policy names one that does"), "{dense}");
    let nowhere = refused(&["--policy", "quest", "--record-selection", "no/such/folder/x.trace"]);
    assert!(nowhere.contains("--record-selection no/such/folder/x.trace: No such file"), "{nowhere}");
}
