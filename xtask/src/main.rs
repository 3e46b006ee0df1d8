//! `cargo run -p xtask -- accept [--minutes N]`: what takes longer than the tests may. `soak [--minutes N]` runs its
//! second part alone.
//!
//! 1. The tests in release, with many more seeds for every fuzz and conformance check (`SPARSESERVE_SEEDS`).
//! 2. A soak of the real server: a seeded storm of requests, shared prefixes, malformed bodies and clients that leave,
//!    on a KV pool that is too small, every answer compared with the one it had alone; half of the time with the defaults,
//!    half with several policies, an HBM tier and a guard.
#![forbid(unsafe_code)]

mod soak;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How many times more seeds than the tests use.
const SEEDS: &str = "10";
/// Minutes of the soak.
const MINUTES: u64 = 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (verb, minutes) = match arguments[..] {
        [verb @ ("accept" | "soak")] => (verb, MINUTES),
        [verb @ ("accept" | "soak"), "--minutes", minutes] => {
            (verb, minutes.parse().context("--minutes wants a whole number")?)
        }
        _ => bail!("usage: cargo run -p xtask -- accept|soak [--minutes N]"),
    };
    if verb == "accept" {
        cargo(&["test", "--workspace", "--release"])?;
    }
    cargo(&["build", "--release"])?;
    soak::run(Duration::from_secs(60 * minutes))
}

fn cargo(arguments: &[&str]) -> Result<()> {
    eprintln!("== cargo {}", arguments.join(" "));
    let status = Command::new("cargo").args(arguments).env("SPARSESERVE_SEEDS", SEEDS).status()?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}
