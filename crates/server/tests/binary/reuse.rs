//! Prefixes that others computed, under whatever policy: the same answers to the last bit, unless `--prefix-reuse fast` asks
//! for another bargain.

use serde_json::{Value, json};

use super::process::{Serving, repository};

const POLICIES: [&str; 5] = ["retroinfer", "arkvale", "quest", "shadowkv", "streaming"];

/// A server with short spans, so that small budgets have room for clusters and prefixes are shared in runs of 64 tokens.
fn serve(flags: &[&str]) -> Serving {
    let usual = [
        "--policy",
        "retroinfer",
        "--policy-opt",
        "span=64",
        "--policies",
        "arkvale,quest,shadowkv,streaming,dense",
        "--max-num-seqs",
        "4",
        "--max-context",
        "2560",
    ];
    Serving::start(&[&usual[..], flags].concat())
}

fn ask(prompt: &Value, sparse: Value, max_tokens: usize) -> Value {
    json!({
        "model": "demo", "prompt": prompt, "temperature": 0.8, "seed": 4, "max_tokens": max_tokens, "ignore_eos": true,
        "logprobs": 3, "return_token_ids": true, "sparse": sparse,
    })
}

/// A text of some 900 tokens.
fn text() -> Value {
    let cases: Value =
        serde_json::from_slice(&std::fs::read(repository("demo-model/golden.json")).unwrap()).unwrap();
    let of_length = |case: &&Value| (700..1500).contains(&case["n_ids"].as_u64().unwrap());
    cases.as_array().unwrap().iter().find(of_length).expect("a prompt of this length")["prompt"].clone()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

fn ids(answer: &Value, field: &str) -> Vec<Value> {
    answer["choices"][0][field].as_array().expect("ids were asked for").clone()
}

/// The prompt of the next turn: what was asked, what was answered, and a few tokens more.
fn next_turn(answer: &Value) -> Value {
    let more: Vec<Value> = (0..12).map(|i| json!(210 + 7 * i)).collect();
    Value::Array([ids(answer, "prompt_token_ids"), ids(answer, "token_ids"), more].concat())
}

/// A prefix that a request of one policy computed serves requests of all others, and changes no bit of their answers.
#[test]
fn prefixes_are_shared_across_policies() {
    let with = serve(&[]);
    let without = serve(&["--no-prefix-cache"]);
    for (i, first) in POLICIES.iter().enumerate() {
        // Texts that differ from the start.
        let prompt = json!(format!("{i} {}", text().as_str().unwrap()));
        let opening = ask(&prompt, json!({"policy": first, "budget": 96}), 24);
        let answer = with.complete(&opening);
        assert_eq!(cached(&answer), 0, "{first}");
        assert_eq!(answer["choices"], without.complete(&opening)["choices"], "{first}");
        let prompt_len = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        let turn = next_turn(&answer);
        for second in POLICIES {
            let turn = ask(&turn, json!({"policy": second, "budget": 96, "receipt": true}), 24);
            let (shared, alone) = (with.complete(&turn), without.complete(&turn));
            assert_eq!(shared["choices"], alone["choices"], "{second} after {first}");
            assert!(cached(&shared) >= prompt_len / 64 * 64 && cached(&alone) == 0, "{second} after {first}");
            let receipt = &shared["usage"]["sparse"];
            assert!(
                receipt["attended_tokens_per_step"].as_f64() < receipt["context_tokens_per_step"].as_f64(),
                "{shared}"
            );
        }
    }
}

/// By default the answer of a sparse turn is computed again by the next one, which so is the same as without a prefix cache. With
/// `fast` it is taken over, by requests of the same policy, options and budget alone. A dense answer is shared in any case.
#[test]
fn sparse_answers_are_computed_again_unless_told_otherwise() {
    let servers = [serve(&["--no-prefix-cache"]), serve(&[]), serve(&["--prefix-reuse", "fast"])];
    let sparse = json!({"policy": "quest", "budget": "10%", "options": {"group": "max"}});
    let first = servers.each_ref().map(|server| server.complete(&ask(&text(), sparse.clone(), 200)));
    assert!(
        first.iter().all(|answer| answer["choices"] == first[0]["choices"]),
        "nobody has anything to reuse"
    );
    let prompt_len = first[0]["usage"]["prompt_tokens"].as_u64().unwrap();
    // The last token of an answer is never run.
    let (of_prompt, of_both) = (prompt_len / 64 * 64, (prompt_len + 199) / 64 * 64);
    let turn = next_turn(&first[0]);
    let second = servers.each_ref().map(|server| server.complete(&ask(&turn, sparse.clone(), 24)));
    assert_eq!(second.each_ref().map(cached), [0, of_prompt, of_both]);
    assert_eq!(second[1]["choices"], second[0]["choices"], "exact");
    let logprobs = |answer: &Value| answer["choices"][0]["logprobs"].clone();
    assert_ne!(
        logprobs(&second[2]),
        logprobs(&second[0]),
        "KV that was selected for is not that of a dense prompt"
    );

    for other in [
        json!({"policy": "quest", "budget": "20%", "options": {"group": "max"}}),
        json!({"policy": "quest", "budget": "10%"}),
        json!({"policy": "arkvale", "budget": "10%"}),
        json!({"dense": true}),
    ] {
        let answers = servers.each_ref().map(|server| server.complete(&ask(&turn, other.clone(), 8)));
        assert!(answers.iter().all(|answer| answer["choices"] == answers[0]["choices"]), "{other}");
    }

    let [nothing, exact, _] = &servers;
    let dense = ask(&text(), json!({"dense": true}), 200);
    let turn = ask(&next_turn(&nothing.complete(&dense)), sparse, 24);
    exact.complete(&dense);
    let (shared, alone) = (exact.complete(&turn), nothing.complete(&turn));
    assert_eq!((cached(&shared), &shared["choices"]), (of_both, &alone["choices"]), "dense");
}
