//! `sparseserve eval`: how well sparse policies answer, and what they select.

mod retrieval;
mod selection;
mod tasks;

pub use tasks::Task;

use super::commands::{Eval, EvalArgs};
use super::failure::Failure;

/// Runs the command.
pub fn run(args: EvalArgs) -> Result<(), Failure> {
    match args.what {
        Eval::Retrieval(args) => retrieval::run(*args),
        Eval::Selection(args) => selection::run(&args),
    }
}
