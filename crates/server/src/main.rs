//! The `sparseserve` binary.
fn main() {}
