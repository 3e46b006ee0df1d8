//! The KV cache as logic: which block holds which tokens, who uses it, and what may be evicted.
//!
//! A *block* is a run of `page_tokens` tokens over all layers and heads; a backend keeps its bytes, this crate never
//! sees them. The engine thread owns one [`KvCache`] and, per request, one [`Sequence`] with its block table:
//!
//! ```text
//! match_prefix -> reserve -> (run the model) -> advance -> ... -> free
//! ```
//!
//! * `pool.rs`: every block is free, in use or cached; the order of eviction.
//! * `prefix.rs`: the tree of sealed blocks that later prompts can share.
//! * `sequence.rs`: the block table of one sequence.
//! * `cache.rs`: the verbs above, which move blocks between the three.
//! * `quota.rs`: who may hold how much of the HBM tier.
//! * `needs.rs`: who takes part in a step, by what each needs of it; `thrash.rs`: how many at most, where that was wrong.
//! * `cache_study/`: caches of pages offline, to compare eviction rules.
//!
//! Invariant: a hit compares tokens, not only hashes, so no collision can hand one prompt's KV to another.
//!
//! Invariant: whoever uses a block of the tree uses all blocks before it. So a block that nobody uses has no child in
//! use, and evicting in order of release never evicts a block before its children.
//!
//! Invariant: this crate knows no clock, thread, socket or device, and allocates only when a [`KvCache`] or a
//! [`Sequence`] is made. Its asserts stay on in release: a broken one means that a user could read another's tokens,
//! and the process must stop.
#![forbid(unsafe_code)]

mod cache;
pub mod cache_study;
mod needs;
mod pool;
mod prefix;
mod quota;
mod sequence;
mod thrash;

#[cfg(test)]
mod cache_fuzz;
#[cfg(test)]
mod needs_fuzz;

pub use cache::{KvCache, OutOfBlocks};
pub use needs::{Candidate, admit, extents_needed};
pub use pool::Counts;
pub use quota::{QuotaRule, Quotas, Want};
pub use sequence::Sequence;
pub use thrash::Thrash;
