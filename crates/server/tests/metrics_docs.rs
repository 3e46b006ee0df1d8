//! `docs/metrics.md`, the tables of metrics and what is registered agree.

use engine::{METRICS, MetricDoc, Metrics};
use sparseserve::http::{HTTP_REQUESTS, HttpMetrics};

/// Everything that `/metrics` shows.
fn documented() -> Vec<MetricDoc> {
    METRICS.into_iter().chain([HTTP_REQUESTS]).collect()
}

fn row(doc: &MetricDoc) -> String {
    let label = |(name, values): &(&str, &[&str])| format!("`{name}`: {}", values.join(", "));
    let labels: Vec<String> = doc.labels.iter().map(label).collect();
    format!("| `{}` | {} | {} | {} |", doc.name, doc.kind.name(), labels.join("; "), doc.help)
}

#[test]
fn the_page_lists_every_metric() {
    let page = include_str!("../../../docs/metrics.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `sparseserve_")).collect();
    let expected: Vec<String> = documented().iter().map(row).collect();
    assert_eq!(rows, expected, "docs/metrics.md should have these rows:\n{}\n", expected.join("\n"));
}

/// Every combination of label values, as `name=value` in the order of the names.
fn children(doc: &MetricDoc) -> Vec<String> {
    let mut labels = doc.labels.to_vec();
    labels.sort_unstable_by_key(|label| label.0);
    let mut all = vec![String::new()];
    for (name, values) in labels {
        let with = |child: &String| values.iter().map(|v| format!("{child}{name}={v} ")).collect::<Vec<_>>();
        all = all.iter().flat_map(with).collect();
    }
    all.sort();
    all
}

#[test]
fn every_metric_is_registered_as_documented() {
    let registry = prometheus::Registry::new();
    let _metrics = Metrics::new(&registry).unwrap();
    let _http = HttpMetrics::new(&registry).unwrap();
    let mut registered = Vec::new();
    for family in registry.gather() {
        let kind = format!("{:?}", family.get_field_type()).to_lowercase();
        let child = |m: &prometheus::proto::Metric| {
            m.get_label().iter().map(|l| format!("{}={} ", l.name(), l.value())).collect::<String>()
        };
        let mut values: Vec<String> = family.get_metric().iter().map(child).collect();
        values.sort();
        registered.push((family.name().to_owned(), kind, values, family.help().to_owned()));
    }
    let documented = documented();
    let of = |doc: &MetricDoc| {
        (doc.name.to_owned(), doc.kind.name().to_owned(), children(doc), doc.help.to_owned())
    };
    let mut documented: Vec<_> = documented.iter().map(of).collect();
    documented.sort();
    assert_eq!(registered, documented);
}
