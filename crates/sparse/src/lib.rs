//! Sparse attention policies: which part of the context a generated token attends to.
//!
//! A policy is one file that turns its options into a [`Method`], which is data: what a digest keeps of a partition, how
//! digests are scored, how scores of query heads become one, what is always attended, how many layers stay dense. The
//! operations of a device (`ops`) do the rest. So a policy knows nothing of pages, memory or threads, and adding one is
//! adding one file and its name to [`POLICIES`].
//!
//! * `options.rs`: option values as users write them. `budget.rs`: how many tokens. `served.rs`: what a server offers.
//! * `trace/`: what was selected, as a file.
//!
//! Invariant: what a request attends to depends on its tokens, its policy, its options and its budget alone, never on load,
//! memory or time.
#![forbid(unsafe_code)]

mod arkvale;
pub mod auto;
mod budget;
mod dense;
mod options;
mod quest;
mod random;
mod replay;
mod retroinfer;
mod seerattention;
mod served;
mod shadowkv;
mod streaming;
pub mod trace;
#[cfg(test)]
mod worked_example;

use ops::sparse::{DigestSpec, Method};

pub use budget::Budget;
pub use options::{OptionDoc, Options};
pub use served::{Choice, GATE_OF_MODEL, Served, Variant};

/// A sparse method that users can name.
#[derive(Debug)]
pub struct Policy {
    /// What users write.
    pub name: &'static str,
    /// One line for a list.
    pub summary: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// Options that it takes.
    pub options: &'static [OptionDoc],
    /// What its options come to.
    build: fn(&mut Options) -> Result<Setup, Error>,
}

/// All policies.
pub const POLICIES: [&Policy; 9] = [
    &dense::DENSE,
    &streaming::STREAMING,
    &random::RANDOM,
    &quest::QUEST,
    &arkvale::ARKVALE,
    &shadowkv::SHADOWKV,
    &replay::REPLAY,
    &seerattention::SEERATTENTION,
    &retroinfer::RETROINFER,
];

/// What a policy needs of a server and asks of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setup {
    /// Digests that it scores; its method names them as number 0 until a server gives them their place. Those of a gate have the
    /// size 0 until its weights are read.
    pub digest: Option<DigestSpec>,
    /// How it selects; `None` attends to everything.
    pub method: Option<Method>,
}

/// What is wrong with a policy that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such policy.
    #[error("there is no policy {name:?}; there are {}, and auto", names(", "))]
    NoSuchPolicy {
        /// As asked for.
        name: String,
    },
    /// There is, but this server was not started with it.
    #[error("this server does not offer the policy {name:?}; it offers {offered} (--policies)")]
    NotServed {
        /// As asked for.
        name: String,
        /// Names.
        offered: String,
    },
    /// An option that the policy does not have.
    #[error("the policy {policy} has no option {option:?}; {}", known(.policy))]
    NoSuchOption {
        /// Its policy.
        policy: &'static str,
        /// As asked for.
        option: String,
    },
    /// An option without a value.
    #[error("the option {text:?} is not of the form name=value")]
    NoPair {
        /// As given.
        text: String,
    },
    /// A value that the option cannot have.
    #[error("the option {option} is {value:?}; it must be {allowed}")]
    BadValue {
        /// Its name.
        option: &'static str,
        /// As asked for.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// Options that need digests or memory which the server does not have.
    #[error("{what} is fixed when the server starts (--policy-opt): memory is laid out for it")]
    Fixed {
        /// The option.
        what: &'static str,
    },
    /// Weights for which there is only one place.
    #[error("the option gate is {one:?} and {other:?}; a server has one gate")]
    TwoGates {
        /// As asked for.
        one: String,
        /// As asked for.
        other: String,
    },
    /// A budget that is none.
    #[error("the budget is {value:?}; it must be a number of tokens, or a share of the prompt like 12.5%")]
    BadBudget {
        /// As asked for.
        value: String,
    },
}

fn names(separator: &str) -> String {
    POLICIES.map(|p| p.name).join(separator)
}

fn known(policy: &str) -> String {
    let options = POLICIES.iter().find(|p| p.name == policy).map_or(&[][..], |p| p.options);
    match options {
        [] => "it has none".into(),
        options => format!("it has {}", options.iter().map(|o| o.name).collect::<Vec<_>>().join(", ")),
    }
}

impl Policy {
    /// The policy called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(name: &str) -> Result<&'static Policy, Error> {
        let found = POLICIES.into_iter().find(|policy| policy.name == name);
        found.ok_or_else(|| Error::NoSuchPolicy { name: name.into() })
    }

    /// What `options` come to; those that are not given have their defaults.
    ///
    /// # Errors
    /// An option that it does not have, a value that it cannot have.
    pub fn setup(&'static self, options: &Options) -> Result<Setup, Error> {
        let mut rest = options.clone();
        let setup = (self.build)(&mut rest)?;
        match rest.first() {
            None => Ok(setup),
            Some(option) => Err(Error::NoSuchOption { policy: self.name, option: option.to_owned() }),
        }
    }
}
