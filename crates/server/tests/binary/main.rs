//! The binary as a user runs it, from a folder that is not its own.

mod answers;
mod cache;
mod errors;
mod hub;
mod ladder;
mod process;
mod reuse;
mod selection;
mod server;
mod tiers;
