//! Every policy has what users and reviewers need of it: a page with its formula, options, costs, source and measurements, and
//! answers of an independent program to compare with.

use std::path::{Path, PathBuf};

use sparseserve_sparse::POLICIES;

/// Policies that select nothing by keys, so that there is nothing to compare.
const WITHOUT_FIXTURES: [&str; 3] = ["dense", "random", "replay"];
const FIXTURES_MIN: usize = 6;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

#[test]
fn every_policy_has_its_page() {
    let index = std::fs::read_to_string(repository("docs/policies/README.md")).expect("the index");
    for policy in POLICIES {
        let name = policy.name;
        assert!(index.contains(&format!("({name}.md)")), "docs/policies/README.md does not list {name}");
        let page = repository(&format!("docs/policies/{name}.md"));
        let page = std::fs::read_to_string(page).unwrap_or_else(|e| panic!("docs/policies/{name}.md: {e}"));
        assert!(page.starts_with(&format!("# {name}\n")), "docs/policies/{name}.md begins with its name");
        for heading in ["Formula", "Options", "Costs", "Source", "Measured"] {
            let part = page.split(&format!("\n## {heading}\n")).nth(1);
            let part = part.unwrap_or_else(|| panic!("docs/policies/{name}.md lacks {heading}"));
            let text = part.split("\n## ").next().unwrap_or_default();
            assert!(text.trim().len() > 20, "docs/policies/{name}.md says nothing under {heading}");
        }
        for option in policy.options {
            let row = format!("| `{}` | `{}` |", option.name, option.default);
            assert!(page.contains(&row), "docs/policies/{name}.md lacks {row}");
        }
        let listed = page.matches("\n| `").count();
        assert!(listed >= policy.options.len(), "docs/policies/{name}.md");
        let authors = policy.source.split(' ').next().unwrap_or_default();
        assert!(page.contains(authors), "docs/policies/{name}.md does not name {authors}");
    }
}

#[test]
fn every_policy_has_fixtures() {
    let folder = repository("crates/sparse/tests/fixtures");
    let names: Vec<String> = std::fs::read_dir(folder)
        .expect("fixtures")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    for policy in POLICIES.iter().filter(|p| !WITHOUT_FIXTURES.contains(&p.name)) {
        let prefix = format!("{}-", policy.name);
        let count = names.iter().filter(|n| n.starts_with(&prefix) && n.ends_with(".safetensors")).count();
        assert!(count >= FIXTURES_MIN, "{} has {count} fixtures", policy.name);
    }
}
