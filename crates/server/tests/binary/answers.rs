//! What the bundled model answers, through the whole program.

use serde_json::{Value, json};

use super::process::{Serving, output, repository, sparseserve, text};

const EOS_TEXT: &str = "<|eos|>";

fn read(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(repository(path)).unwrap()).unwrap()
}

fn greedy(prompt: &str) -> Value {
    json!({"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 16})
}

/// All prompts of `golden.json`, up to 2,000 tokens, twice: the second time from the prefix cache.
#[test]
fn golden_answers() {
    let server = Serving::start(&[]);
    let cases = read("demo-model/golden.json");
    assert_eq!(cases.as_array().unwrap().len(), 14);
    for case in cases.as_array().unwrap() {
        let expected = case["greedy_text"].as_str().unwrap().trim_end_matches(EOS_TEXT);
        let tokens = case["n_ids"].as_u64().unwrap();
        for round in 0..2 {
            let answer = server.complete(&greedy(case["prompt"].as_str().unwrap()));
            assert_eq!(answer["choices"][0]["text"], expected, "{tokens} tokens, round {round}");
            assert_eq!(answer["usage"]["prompt_tokens"], tokens);
            let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
            assert!(
                round == 0 || cached >= (tokens - 1) / 16 * 16,
                "{cached} of {tokens} tokens were cached"
            );
        }
    }
    server.signal("-TERM");
    let (status, said) = server.end();
    assert!(status.success(), "{status}: {said}");
}

/// Needles in 8K and 32K tokens, dense and with what is selected by default. The questions of a context share its KV, so
/// the context is computed once.
#[test]
fn needles_at_8k_and_32k() {
    for policy in ["dense", "auto"] {
        find_needles(&Serving::start(&["--policy", policy]));
    }
}

fn find_needles(server: &Serving) {
    let cases = read("xtask/golden/needles.json");
    for case in cases["cases"].as_array().unwrap() {
        let context = case["context"].as_str().unwrap();
        for (i, question) in case["questions"].as_array().unwrap().iter().enumerate() {
            let asked = question["question"].as_str().unwrap();
            let answer = server.complete(&greedy(&format!("{context}\n{asked}")));
            let expected = question["greedy_text"].as_str().unwrap().trim_end_matches(EOS_TEXT);
            assert_eq!(answer["choices"][0]["text"], expected, "{} {asked}", case["name"]);
            let usage = &answer["usage"];
            let (tokens, cached) =
                (&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"]);
            assert_eq!(tokens, &question["num_prompt_tokens"]);
            assert!(i == 0 || cached.as_u64() > Some(8000), "{cached} of {tokens} tokens were cached");
        }
    }
}

#[test]
fn run_prints_the_answer_alone() {
    let prompt = "The key of Barin is 271828.\nWhat is the key of Barin?";
    let plain = output(&["run", "-p", prompt]);
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    assert_eq!(text(&plain.stdout), " 271828.\n");
    let as_json = output(&["run", "-p", prompt, "--json"]);
    let answer: Value = serde_json::from_slice(&as_json.stdout).unwrap();
    assert_eq!((&answer["text"], &answer["finish_reason"]), (&json!(" 271828."), &json!("stop")));
    assert_eq!(answer["usage"]["completion_tokens"], 6);

    let mut piped = sparseserve(&["run", "-p", "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut piped.stdin.take().unwrap(), prompt.as_bytes()).unwrap();
    assert_eq!(text(&piped.wait_with_output().unwrap().stdout), " 271828.\n");
}

/// As in `sparseserve inspect | head -1`.
#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut command = sparseserve(&["run", "-p", "The old lamp", "--max-tokens", "500"]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut process = command.spawn().unwrap();
    drop(process.stdout.take());
    let ended = process.wait_with_output().unwrap();
    assert!(ended.status.success() && ended.stderr.is_empty(), "{}: {}", ended.status, text(&ended.stderr));
}

#[test]
fn inspect_tells_what_a_model_is() {
    let facts = text(&output(&["inspect"]).stdout);
    for fact in ["LlamaForCausalLM", "2.19 M", "32768 tokens", "4 KiB as f32", "chat template"] {
        assert!(facts.contains(fact), "{fact} in\n{facts}");
    }
    let as_json = output(&["inspect", "--json"]);
    let facts: Value = serde_json::from_slice(&as_json.stdout).unwrap();
    assert!(facts.to_string().contains("LlamaForCausalLM"));
}

#[test]
fn bench_measures_a_model() {
    let measured = output(&[
        "bench",
        "engine",
        "--context",
        "600",
        "--batch",
        "2",
        "--filled",
        "3",
        "--steps",
        "9",
        "--prefill-tokens",
        "700",
        "--json",
    ]);
    assert!(measured.status.success(), "{}", text(&measured.stderr));
    let report: Value = serde_json::from_slice(&measured.stdout).unwrap();
    for phase in ["prefill", "decode"] {
        let rate = report[phase]["tokens_per_s"].as_f64().unwrap();
        let fraction = report[phase]["fraction"].as_f64().unwrap();
        assert!(rate > 0.0 && fraction > 0.0 && fraction.is_finite(), "{report}");
    }
}
