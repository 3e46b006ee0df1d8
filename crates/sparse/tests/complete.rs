//! Every policy has what users and reviewers need of it: a page with its formula, options, costs, source and measurements,
//! answers of an independent program to compare with, and cases in which devices are checked.

use std::path::{Path, PathBuf};

use ops::conformance::{Tried, tried};
use ops::sparse::{DigestKind, DigestLayout, DigestSpec, Method, Rule, Scope, Score};
use ops::{DType, KvGeometry};
use sparseserve_sparse::{Options, POLICIES, Setup};

/// Policies without arithmetic on keys, which is what fixtures compare. `dense` selects nothing. `random` and `replay` draw
/// lots: what numpy could say of them is the stream of `ops::Random`, which has tests with known values of its own, and the
/// always-set and the budget, which fixtures of the other policies have.
const WITHOUT_FIXTURES: [&str; 3] = ["dense", "random", "replay"];
const FIXTURES_MIN: usize = 6;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Bytes of a digest for heads of 128 channels in bf16, which pages tell.
fn digest_bytes(spec: DigestSpec) -> usize {
    let kind = match spec.kind {
        DigestKind::Gate { .. } => DigestKind::Gate { dim: 128 },
        other => other,
    };
    let geometry =
        KvGeometry { num_layers: 1, kv_heads: 8, head_dim: 128, page_tokens: 16, dtype: DType::Bf16 };
    DigestLayout::new(&DigestSpec { kind, ..spec }, &geometry).digest_bytes()
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
        let setup = policy.setup(&Options::default()).expect("defaults");
        if let Some(spec) = setup.digest {
            let bytes = digest_bytes(spec);
            let costs = page.split("\n## Costs\n").nth(1).and_then(|rest| rest.split("\n## ").next());
            let said = costs.is_some_and(|costs| costs.contains(&format!("a digest has {bytes} bytes")));
            assert!(said, "docs/policies/{name}.md: a digest has {bytes} bytes");
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

/// What some policy takes for some option, beside defaults.
const VALUES: [&str; 14] =
    ["0", "1", "3", "8", "64", "0.1", "0.5", "0%", "30%", "fp8", "layer", "max", "query-mean", "compete"];

/// What each policy comes to, with its defaults and with each of its options at each of the values that it takes.
fn setups() -> impl Iterator<Item = (&'static str, String, Setup)> {
    POLICIES.into_iter().flat_map(|policy| {
        let options = policy.options.iter().flat_map(|option| VALUES.map(|value| (option.name, value)));
        let with = |(name, value): (&str, &str)| {
            let setup = policy.setup(&[(name, value)].into_iter().collect()).ok()?;
            Some((policy.name, format!("{}:{name}={value}", policy.name), setup))
        };
        let plain = policy.setup(&Options::default()).expect("defaults");
        let others: Vec<_> = options.filter_map(with).collect();
        std::iter::once((policy.name, policy.name.to_owned(), plain)).chain(others)
    })
}

/// The operations that a method needs, without numbers.
fn operations(method: &Method, digest: Option<DigestKind>) -> [String; 4] {
    let kind = match digest {
        None => "no digest".into(),
        Some(DigestKind::Gate { .. }) => "Gate".into(),
        Some(DigestKind::Cluster { .. }) => "Cluster".into(),
        Some(other) => format!("{other:?}"),
    };
    let score = match method.score {
        Score::Recency => "Recency",
        Score::Random { .. } => "Random",
        Score::Replay { .. } => "Replay",
        Score::Digest { .. } => "Digest",
        Score::Gate { .. } => "Gate",
    };
    let rule = match method.rule {
        Rule::Top => "Top",
        Rule::Threshold(_) => "Threshold",
        Rule::Clusters { .. } => "Clusters",
    };
    let merged = match method.score {
        Score::Digest { .. } => format!("{:?}, softmax {}", method.reduce, method.softmax),
        _ => "one line".into(),
    };
    [kind, score.into(), rule.into(), merged]
}

#[test]
fn devices_are_checked_with_what_every_policy_needs() {
    for (check, cases) in tried() {
        let cases: Vec<_> = cases.iter().map(|(m, d): &Tried| operations(m, d.map(|d| d.kind))).collect();
        for (_, what, Setup { digest, method }) in setups() {
            let Some(method) = method else { continue };
            let needed = operations(&method, digest.map(|d| d.kind));
            assert!(cases.contains(&needed), "no case of {check} has {needed:?}, which {what} needs");
        }
        let always = |has: fn(&Method) -> bool| {
            tried().iter().any(|(name, all)| *name == check && all.iter().any(|(m, _)| has(m)))
        };
        assert!(always(|m| m.always.outliers > 0 && m.always.generated_tokens > 0), "{check}: outliers");
        assert!(always(|m| m.open_competes), "{check}: open partitions that compete");
        assert!(always(|m| m.scope == Scope::Layer), "{check}: layers that share a selection");
    }
}

/// A budget of the context or more is dense for every policy; any other cuts the context into parts that do not overlap, and
/// is kept where it suffices for the least that is attended.
#[test]
fn plans_of_every_policy_are_sound() {
    let mut sparse = std::collections::BTreeSet::new();
    for (policy, what, Setup { method, .. }) in setups() {
        let Some(method) = method else { continue };
        let length = method.partition_tokens;
        for context in [1usize, 2, 63, 64, 65, 100, 257, 400, 511, 700, 1300] {
            for prompt in [1, context / 3, context.saturating_sub(5), context - 1] {
                for budget in [context, context + 1, usize::MAX >> 1] {
                    assert!(method.plan(context, prompt, budget).is_dense(), "{what}: {budget} of {context}");
                }
                for budget in [0, 1, 17, 64, context / 4, context / 2, context - 1] {
                    let plan = method.plan(context, prompt, budget);
                    if plan.is_dense() {
                        continue;
                    }
                    sparse.insert(policy);
                    let what = format!("{what} context {context} prompt {prompt} budget {budget}: {plan:?}");
                    assert!(plan.sink_end <= plan.tail_start && plan.tail_start <= context, "{what}");
                    let least_taken = if let Rule::Clusters { span_tokens, .. } = method.rule {
                        assert!(plan.tail_start.is_multiple_of(span_tokens), "{what}");
                        assert_eq!(plan.candidates, 0..plan.tail_start / length, "{what}");
                        0
                    } else if method.score == Score::Recency {
                        assert!(plan.candidates.is_empty(), "{what}");
                        0
                    } else {
                        assert_eq!(plan.sink_end, plan.candidates.start * length, "{what}");
                        assert_eq!(plan.tail_start, (plan.candidates.end * length).min(context), "{what}");
                        let (among, outliers) = plan.outliers.clone();
                        assert!(outliers <= among.len(), "{what}");
                        assert!(
                            outliers == 0
                                || plan.candidates.start <= among.start && among.end <= plan.candidates.end,
                            "{what}: outliers are candidates, and so in neither part"
                        );
                        assert!(plan.take + outliers < plan.candidates.len(), "{what}");
                        (method.take_min + outliers) * length
                    };
                    let tail = (context - plan.tail_start).max(usize::from(method.score == Score::Recency));
                    let least = plan.sink_end
                        + tail.min(if method.score == Score::Recency { 1 } else { tail })
                        + least_taken;
                    assert!(plan.attended(context, length) <= budget.max(least), "{what}");
                }
            }
        }
    }
    let all: Vec<&str> = POLICIES.iter().map(|p| p.name).filter(|name| *name != "dense").collect();
    assert!(all.iter().all(|name| sparse.contains(name)), "nothing was tried of some: {sparse:?}");
}
