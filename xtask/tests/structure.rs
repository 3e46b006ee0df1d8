//! The rules of ARCHITECTURE.md that a machine can check.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use regex::Regex;

/// Dependency order, top to bottom. A crate may use those after it, never one before it. Backends use `ops` only and
/// are used by the binary alone.
const ORDER: [&str; 7] = ["sparseserve", "engine", "model", "sparse", "kv", "ops-cpu", "ops"];

/// Crates that only some of ours may name.
const CONFINED: [(&str, &[&str]); 5] = [
    ("tokio", &["sparseserve"]),
    ("axum", &["sparseserve"]),
    ("serde", &["sparseserve", "model"]),
    ("serde_json", &["sparseserve", "model"]),
    ("memmap2", &["model"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Rust sources of the workspace with their paths relative to its root.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a folder of the workspace") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join("crates"), &mut paths);
    walk(&root().join("xtask"), &mut paths);
    paths.sort();
    let relative = |p: &Path| p.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
    paths.iter().map(|p| (relative(p), fs::read_to_string(p).expect("UTF-8 source"))).collect()
}

/// Normal dependencies of each of our crates, by short name.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let short = |name: &str| name.strip_prefix("sparseserve-").unwrap_or(name).to_string();
    let list = |value: &serde_json::Value| value.as_array().expect("a list").clone();
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let normal = list(&package["dependencies"]).into_iter().filter(|d| d["kind"].is_null());
            let names = normal.map(|d| short(d["name"].as_str().expect("a name"))).collect();
            (short(package["name"].as_str().expect("a name")), names)
        })
        .collect()
}

#[test]
fn dependencies_point_down() {
    let dependencies = dependencies();
    let place = |name: &str| ORDER.iter().position(|o| *o == name);
    for (name, uses) in &dependencies {
        if name == "xtask" {
            continue;
        }
        let own = place(name).unwrap_or_else(|| panic!("crate {name} has no place in ORDER"));
        for used in uses {
            let Some(other) = place(used) else { continue };
            assert!(other > own, "{name} must not depend on {used}: the order is {ORDER:?}");
            assert!(
                used != "ops-cpu" || name == "sparseserve",
                "{name} names a backend; only the binary may"
            );
            assert!(name != "ops-cpu" || used == "ops", "a backend depends on ops alone, not on {used}");
        }
        for (library, allowed) in CONFINED {
            let confined = uses.iter().any(|u| u == library) && !allowed.contains(&name.as_str());
            assert!(!confined, "{name} must not use {library}; only {allowed:?} may");
        }
    }
    assert!(ORDER.iter().all(|o| dependencies.contains_key(*o)), "ORDER names a crate that does not exist");
}

#[test]
fn unsafe_has_few_homes() {
    let word = Regex::new(r"\bunsafe\b").expect("a pattern");
    for (path, text) in sources() {
        let allowed = path.starts_with("crates/ops-cpu/")
            || path == "crates/model/src/mmap.rs"
            || path.contains("/tests/")
            || path.starts_with("xtask/");
        let code = text.lines().filter(|l| {
            let l = l.trim_start();
            !l.starts_with("//") && !l.contains("unsafe_code") && !l.contains("unsafe_op_in_unsafe_fn")
        });
        for line in code {
            assert!(allowed || !word.is_match(line), "{path}: unsafe outside a backend: {line}");
        }
    }
}

/// rustc 1.95 can skip the copy when an array is passed by value to a closure whose parameter is `mut`, so that the
/// caller's array changes (seen at opt-level 1 and 2). Bind it inside the closure instead.
#[test]
fn closures_take_no_mut_parameters() {
    let closure = Regex::new(r"\|([^|&\n]*[,(]\s*)?mut [a-z_]").expect("a pattern");
    for (path, text) in sources() {
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//") && !l.contains("Regex::new")) {
            assert!(!closure.is_match(line), "{path}: a closure with a `mut` parameter: {line}");
        }
    }
}

#[test]
fn files_can_be_read_in_a_sitting() {
    const LINES_MAX: usize = 700;
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{path} has {lines} lines; {LINES_MAX} is the most");
    }
}

#[test]
fn nothing_is_left_undone() {
    let banned = Regex::new(concat!(
        r"todo",
        r"!\(|unimplemented",
        r"!\(|\bdbg",
        r"!\(|allow\(dead",
        "_code|FIX",
        "ME"
    ))
    .expect("a pattern");
    for (path, text) in sources() {
        for line in text.lines() {
            assert!(!banned.is_match(line), "{path}: {line}");
        }
    }
}
