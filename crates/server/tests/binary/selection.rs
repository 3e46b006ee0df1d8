//! `eval selection` against numpy's answers to the same tensors: `crates/sparse/tests/fixtures` has both.

use std::path::Path;

use safetensors::SafeTensors;

use crate::process::{output, repository, text};

/// Of f32 attention, relative to the largest value.
const TOLERANCE: f32 = 1e-5;

struct Answer {
    indptr: Vec<i64>,
    indices: Vec<i64>,
    floats: Vec<(&'static str, Vec<f32>)>,
}

fn read(path: &Path) -> Answer {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| file.tensor(name).unwrap().data().to_vec();
    let ints =
        |name: &str| data(name).chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    let floats =
        |name: &str| data(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let floats = ["out", "out_dense", "lse", "lse_dense"].map(|name| (name, floats(name)));
    Answer { indptr: ints("indptr"), indices: ints("indices"), floats: floats.to_vec() }
}

#[test]
fn policies_select_what_the_formulas_say() {
    let folder = repository("crates/sparse/tests/fixtures");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    names.sort();
    assert!(names.len() >= 50, "fixtures are missing: {names:?}");
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.safetensors");
    for name in names {
        let input = folder.join(&name);
        let run = output(&["eval", "selection", input.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        assert!(run.status.success(), "{name}: {}", text(&run.stderr));
        let (found, expected) = (read(&out), read(&input));
        assert_eq!(found.indptr, expected.indptr, "{name}: how many");
        assert_eq!(found.indices, expected.indices, "{name}: which");
        for ((what, found), (_, expected)) in found.floats.iter().zip(&expected.floats) {
            assert_eq!(found.len(), expected.len(), "{name}: {what}");
            let scale = expected.iter().fold(1e-6f32, |max, x| max.max(x.abs()));
            for (i, (f, e)) in found.iter().zip(expected).enumerate() {
                assert!((f - e).abs() <= TOLERANCE * scale, "{name}: {what}[{i}] is {f} and should be {e}");
            }
        }
    }
}

#[test]
fn flags_come_before_the_file() {
    let input = repository("crates/sparse/tests/fixtures/quest-defaults.safetensors");
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.safetensors");
    let arguments = ["eval", "selection", input.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let run = output(
        &[&arguments[..], &["--policy", "streaming", "--budget", "10", "--policy-opt", "sinks=4"]].concat(),
    );
    assert!(run.status.success(), "{}", text(&run.stderr));
    let found = read(&out);
    assert!(found.indptr.windows(2).all(|w| w[1] - w[0] == 10), "{:?}", found.indptr);
    for (more, part) in [
        (vec!["--policy", "quest", "--policy-opt", "partition=24"], "partitions of 24 tokens on pages of 16"),
        (vec!["--policy", "quest", "--policy-opt", "top=3"], "the policy quest has no option \"top\""),
        (vec!["--budget", "many"], "the budget is \"many\""),
    ] {
        let run = output(&[&arguments[..], &more].concat());
        assert_eq!(run.status.code(), Some(2), "{}", text(&run.stderr));
        assert!(text(&run.stderr).contains(part), "{}", text(&run.stderr));
    }
}

/// Accuracy by policy and budget, of a few hard questions.
#[test]
fn selection_finds_what_the_floor_does_not() {
    let scratch = tempfile::tempdir().unwrap();
    let report = scratch.path().join("report.json");
    let run = output(&[
        "eval",
        "retrieval",
        "--contexts",
        "2",
        "--questions",
        "8",
        "--lengths",
        "2048",
        "--tasks",
        "hard,hop",
        "--budgets",
        "128",
        "--compare",
        "dense,streaming,random,quest,arkvale:partition=16:sinks=16:window=16,seerattention",
        "--json",
        report.to_str().unwrap(),
    ]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(text(&run.stdout).contains("| quest |"), "{}", text(&run.stdout));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let cells = report["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 12, "{report}");
    for cell in cells {
        let (asked, accuracy) = (cell["asked"].as_u64().unwrap(), cell["accuracy"].as_f64().unwrap());
        let attended = cell["attended_tokens_per_step"].as_f64().unwrap();
        assert_eq!(asked, 16, "{cell}");
        match cell["policy"].as_str().unwrap() {
            "dense" => assert_eq!((accuracy, attended), (1.0, 0.0), "{cell}"),
            "streaming" | "random" => assert!(accuracy < 0.5 && attended <= 128.0, "{cell}"),
            _ => assert!(accuracy > 0.8 && attended <= 128.0, "{cell}"),
        }
    }
}
