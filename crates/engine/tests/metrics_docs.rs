//! `docs/metrics.md`, the table `METRICS` and what is registered agree.

use sparseserve_engine::{METRICS, MetricDoc, Metrics};

fn row(doc: &MetricDoc) -> String {
    let label = match doc.label {
        Some((name, values)) => format!("`{name}`: {}", values.join(", ")),
        None => String::new(),
    };
    format!("| `{}` | {} | {label} | {} |", doc.name, doc.kind.name(), doc.help)
}

#[test]
fn the_page_lists_every_metric() {
    let page = include_str!("../../../docs/metrics.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `sparseserve_")).collect();
    let expected: Vec<String> = METRICS.iter().map(row).collect();
    assert_eq!(rows, expected, "docs/metrics.md should have these rows:\n{}\n", expected.join("\n"));
}

#[test]
fn every_metric_is_registered_as_documented() {
    let registry = prometheus::Registry::new();
    let _metrics = Metrics::new(&registry).unwrap();
    let mut registered = Vec::new();
    for family in registry.gather() {
        let kind = format!("{:?}", family.get_field_type()).to_lowercase();
        let labels = family.get_metric().iter().flat_map(|m| m.get_label());
        let mut values: Vec<String> = labels.map(|l| format!("{}={}", l.name(), l.value())).collect();
        values.sort();
        registered.push((family.name().to_owned(), kind, values, family.help().to_owned()));
    }
    let mut documented: Vec<_> = METRICS
        .iter()
        .map(|doc| {
            let (label, values) = doc.label.unwrap_or(("", &[]));
            let mut values: Vec<String> = values.iter().map(|value| format!("{label}={value}")).collect();
            values.sort();
            (doc.name.to_owned(), doc.kind.name().to_owned(), values, doc.help.to_owned())
        })
        .collect();
    documented.sort();
    assert_eq!(registered, documented);
}
