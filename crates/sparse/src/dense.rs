//! `dense`: everything, as without this crate.

use crate::{Error, Options, Policy, Setup};

/// See `docs/policies/dense.md`.
pub const DENSE: Policy = Policy {
    name: "dense",
    summary: "attends to everything; the budget means nothing",
    source: "Vaswani et al. 2017, Attention Is All You Need",
    options: &[],
    build,
};

fn build(_: &mut Options) -> Result<Setup, Error> {
    Ok(Setup { digest: None, method: None })
}
