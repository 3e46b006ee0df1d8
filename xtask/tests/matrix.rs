//! `docs/matrix.md`: every pair of features has a test, and the tests exist.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

fn cells(line: &str) -> Vec<&str> {
    line.trim().trim_matches('|').split('|').map(str::trim).collect()
}

fn names(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_pair_has_a_test_that_exists() {
    let text = fs::read_to_string(root().join("docs/matrix.md")).expect("docs/matrix.md");
    let rows: Vec<Vec<&str>> = text.lines().filter(|l| l.starts_with('|')).map(cells).collect();
    let tests = rows.iter().position(|row| row[0] == "test").expect("a table of the tests");
    let (matrix, tests) = (&rows[..tests], &rows[tests + 2..]);
    let columns = &matrix[0][1..];
    let mut features: Vec<&str> = vec![matrix[2][0]];
    features.extend(columns);
    assert!(features.len() >= 7, "{features:?}");
    for (i, row) in matrix[2..].iter().enumerate() {
        assert_eq!(row[0], features[i], "rows and columns are in one order");
        for (j, cell) in row[1..].iter().enumerate().filter(|(j, _)| *j >= i) {
            let pair = format!("{} with {}", row[0], columns[j]);
            assert!(names(cell).next().is_some(), "{pair} has no test");
            for name in names(cell) {
                assert!(
                    tests.iter().any(|t| names(t[0]).next() == Some(name)),
                    "{pair}: {name} is in the table of tests"
                );
            }
        }
    }
    for test in tests {
        let name = names(test[0]).next().expect("a name");
        let file = names(test[1]).next().expect("a file");
        let source = fs::read_to_string(root().join(file)).expect(file);
        let defined = [format!("fn {name}("), format!("fn {name}<")];
        assert!(defined.iter().any(|d| source.contains(d)), "{name} is not in {file}");
    }
}
