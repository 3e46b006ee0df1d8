//! `auto`: what a server does where nobody says otherwise. Constants, so that an answer never depends on the load or the
//! machine; `docs/policies/README.md` has the measurements behind them.

use crate::Budget;

/// Its name.
pub const AUTO: &str = "auto";

/// Prompts of fewer tokens are attended to whole. Here the budget reaches 1,024 tokens, and a step of one request is a quarter
/// faster than dense, one of four requests twice as fast; below, there is little to gain.
pub const DENSE_BELOW: usize = 8192;

/// The policy for longer ones: of those that need no training the one that was right most often at 512 tokens of 8K, and the
/// fastest.
pub const POLICY: &str = "arkvale";

/// Its options.
pub const OPTIONS: &str = "partition=16,sinks=16,window=16";

/// The budget, unless one is given: twice the share of 8K at which it came within a point of dense, for texts that are harder
/// than those it was measured on.
pub const BUDGET: Budget = Budget::Share(0.125);
