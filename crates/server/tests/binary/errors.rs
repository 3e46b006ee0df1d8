//! Bad input: one line that names cause and cure, exit code 2, nothing else.

use std::fs;
use std::path::Path;

use super::process::{SOON, output_within, repository, sparseserve, text};

/// The one line of standard error of a command that must fail with exit code 2.
fn complaint(arguments: &[&str]) -> String {
    let output = output_within(&mut sparseserve(arguments), SOON);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?} printed {}", text(&output.stdout));
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{arguments:?}: {said}");
    said
}

fn says(arguments: &[&str], words: &[&str]) {
    let said = complaint(arguments);
    for word in words {
        assert!(said.contains(word), "{arguments:?} does not name {word:?}: {said}");
    }
}

/// A copy of a golden model that a test may break.
fn broken_model(name: &str, damage: impl Fn(&Path)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(repository(&format!("xtask/golden/models/{name}"))).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(repository(&format!("demo-model/{file}")), copy.path().join(file)).unwrap();
    }
    damage(copy.path());
    copy
}

fn edit(path: &Path, change: impl Fn(String) -> String) {
    let before = fs::read_to_string(path).unwrap();
    let after = change(before.clone());
    assert_ne!(before, after, "the damage is done");
    fs::write(path, after).unwrap();
}

#[test]
fn flags_and_files() {
    says(&["serve", "--port", "0", "--dram", "lots"], &["lots"]);
    says(&["serve", "--port", "70000"], &["70000", "--port"]);
    says(&["serve", "--port", "0", "--nonsense"], &["--nonsense"]);
    says(&["serve", "--port", "0", "--page-tokens", "17"], &["17", "16"]);
    says(&["serve", "--port", "0", "--device", "cuda"], &["CUDA"]);
    says(&["serve", "--port", "0", "--isa", "sse9"], &["sse9", "avx2"]);
    says(&["serve", "--port", "0", "--max-context", "40000"], &["40000", "32768"]);
    says(&["serve", "--port", "0", "--log-level", "nonsense"], &["--log-level", "nonsense", "debug"]);
    says(&["serve", "--port", "0", "--log-level", "warn,engine=loud"], &["--log-level", "warn,engine=loud"]);
    says(&["serve", "--port", "0", "--dram", "100%"], &["headroom", "would fit"]);
    says(&["run", "-p", "x", "--temperature", "-1"], &["--temperature", "between 0 and 100"]);
    says(&["run", "-p", "x", "--top-p", "-1"], &["--top-p", "above 0"]);
    let mut command = sparseserve(&["serve", "--port", "0"]);
    let output = output_within(command.env("SPARSESERVE_NO_PREFIX_CACHE", "maybe"), SOON);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("maybe"), "{}", text(&output.stderr));
    says(&["serve", "--port", "0", "--threads", "5000"], &["--threads 5000", "1024"]);
    says(&["serve", "--port", "0", "--max-waiting", "99999999999999"], &["--max-waiting", "1000000"]);
    says(&["serve", "--port", "0", "--max-context", "1"], &["--max-context 1"]);
    says(&["serve", "--port", "0", "--policy", "replay"], &["the policy replay", "leave it out of --policy"]);
    says(&["serve", "--port", "0", "--policies", "quest,replay"], &["the policy replay", "--policies"]);
    says(&["serve", "--port", "0", "--prefix-reuse", "maybe"], &["maybe", "exact", "fast"]);
    says(
        &["serve", "--port", "0", "--prefix-reuse", "fast", "--no-prefix-cache"],
        &["--prefix-reuse fast", "leave one"],
    );
    says(&["serve", "--port", "0", "--config", "no-such-file.toml"], &["no-such-file.toml"]);
    says(&["serve", "--port", "0", "--preset", "vlm"], &["vlm", "vllm-so"]);
    for preset in ["vllm", "vllm-s", "vllm-so", "sparseserve", "spin", "best"] {
        says(&["run", "-p", "x", "--preset", preset], &[&format!("--preset {preset}"), "--hbm 1GiB"]);
    }
    says(&["serve", "--port", "0", "--offload", "false"], &["--offload false", "--hbm"]);
    says(
        &["serve", "--port", "0", "--offload", "false", "--hbm", "1GiB", "--dram", "1GiB"],
        &["--dram", "--offload false", "leave one"],
    );
    says(&["serve", "--port", "0", "--offload", "maybe"], &["maybe", "true or false"]);
    says(&["serve", "--port", "0", "--emulate-link", "25,4"], &["--emulate-link", "--hbm"]);
    says(&["serve", "--port", "0", "--hbm", "10%", "--emulate-link", "25"], &["\"25\"", "as in 25,4"]);
    says(&["serve", "--port", "0", "--transfer", "slow"], &["slow", "per-page"]);
    says(&["serve", "--port", "0", "--prefill", "whole"], &["whole", "segmented"]);
    says(&["serve", "--port", "0", "--admission", "all"], &["all", "working-set"]);
    says(&["serve", "--port", "0", "--working-set-steps", "64"], &["--working-set-steps 64", "1 to 63"]);
    says(&["serve", "--port", "0", "--max-skips", "0"], &["--max-skips 0"]);
    says(&["bench", "engine", "--max-prefills", "0"], &["--max-prefills 0"]);
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), "prot = 8000\n").unwrap();
    says(&["serve", "--port", "0", "--config", config.path().to_str().unwrap()], &["prot"]);
}

#[test]
fn memory_that_does_not_suffice_is_told_with_the_arithmetic() {
    let serve = ["serve", "--port", "0", "--policy", "dense"];
    says(&[&serve[..], &["--dram", "1MiB"]].concat(), &["1 MiB", "128 MiB", "--max-context"]);
    let quest = ["--policy", "quest", "--max-context", "4096", "--dram", "64MiB"];
    let parts = ["--hbm is too small", "digests 1.01 MiB", "64 requests", "--max-num-seqs"];
    says(&[&["serve", "--port", "0", "--hbm", "4MiB"][..], &quest].concat(), &parts);
    let in_hbm = ["--offload", "false", "--hbm", "1MiB"];
    says(&[&serve[..], &in_hbm].concat(), &["--hbm is too small", "1 MiB", "128 MiB", "--max-context"]);
}

#[test]
fn directories_that_hold_no_model() {
    says(&["serve", "--port", "0", "./no/such/dir"], &["no/such/dir"]);
    let empty = tempfile::tempdir().unwrap();
    says(&["serve", "--port", "0", empty.path().to_str().unwrap()], &["config.json"]);
}

#[test]
fn models_that_are_broken() {
    let check = |damage: &dyn Fn(&Path), words: &[&str]| {
        let model = broken_model("llama-default", damage);
        says(&["run", "-p", "x", model.path().to_str().unwrap()], words);
    };
    let config =
        |change: &'static dyn Fn(String) -> String| move |p: &Path| edit(&p.join("config.json"), change);
    check(
        &config(&|c| c.replace("LlamaForCausalLM", "GrokForCausalLM")),
        &["GrokForCausalLM", "LlamaForCausalLM"],
    );
    check(&config(&|c| c.replace("{", "{{")), &["config.json"]);
    check(
        &config(&|c| c.replace("\"hidden_size\": ", "\"hidden_size\": 9")),
        &["config.json", "embed_tokens", "948"],
    );
    check(
        &|p| {
            let weights = fs::read(p.join("model.safetensors")).unwrap();
            fs::write(p.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
        },
        &["model.safetensors"],
    );
    check(&|p| fs::write(p.join("model.safetensors"), [0xff; 64]).unwrap(), &["model.safetensors"]);
    check(&|p| fs::write(p.join("tokenizer.json"), "{}").unwrap(), &["tokenizer.json"]);
}

#[test]
fn gates_that_are_missing_or_of_another_model() {
    let asked = |name: &str, options: &[&str], words: &[&str]| {
        let model = broken_model(name, |_| ());
        let model = model.path().to_str().unwrap();
        says(&[&["run", "-p", "x", model, "--policy", "seerattention"], options].concat(), words);
    };
    let demo = repository("demo-model/gate.safetensors");
    let demo = format!("gate={}", demo.display());
    asked("llama-default", &[], &["gate.safetensors: not found in", "--policy-opt gate=FILE"]);
    asked(
        "llama-default",
        &["--policy-opt", "gate=no/such"],
        &["no/such: not found", "--policy-opt gate=FILE"],
    );
    asked(
        "llama-default",
        &["--policy-opt", &demo],
        &["gate.safetensors: tensor layers.0", "is the gate for this model?"],
    );
    asked("llama-rope-dynamic", &["--policy-opt", &demo], &["dynamic RoPE scaling", "choose another policy"]);
}

#[test]
fn shards_stay_in_their_directory() {
    let model = broken_model("llama-sharded", |p| {
        edit(&p.join("model.safetensors.index.json"), |index| {
            index.replacen("model-00001", "../model-00001", 1)
        });
    });
    says(&["run", "-p", "x", model.path().to_str().unwrap()], &["../model-00001"]);
}

#[test]
fn offline_is_said_plainly() {
    let home = tempfile::tempdir().unwrap();
    let mut command = sparseserve(&["run", "-p", "x", "nobody/nothing"]);
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", home.path());
    let output = output_within(&mut command, SOON);
    let said = text(&output.stderr);
    assert!(
        !output.status.success() && said.contains("nobody/nothing") && said.contains("HF_HUB_OFFLINE"),
        "{said}"
    );
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
}
