//! `auto`: what a server does where nobody says otherwise. Constants, so that an answer never depends on the load or the
//! machine; `docs/policies/README.md` has the measurements behind them.

use crate::Budget;

/// Its name.
pub const AUTO: &str = "auto";

/// Prompts of fewer tokens are attended to whole. From here on a step of one request is a quarter faster than dense and more, one of
/// four requests nearly twice as fast, and no answer was lost. At half of it, that is 1.15 and 1.5 times, with 512 tokens to attend to
/// and a few answers lost.
pub const DENSE_BELOW: usize = 8192;

/// The policy for longer ones. Of those that need no training, `arkvale` and `quest` were right most often; with partitions of 8 both
/// are a little better still at 512 tokens of 8K (1.000 and 0.999, not 0.997), and read twice the digests.
pub const POLICY: &str = "arkvale";

/// Its options.
pub const OPTIONS: &str = "partition=16,sinks=16,window=16";

/// The budget, unless one is given: twice the share of 8K at which it came within a point of dense, for texts that are harder
/// than those it was measured on.
pub const BUDGET: Budget = Budget::Share(0.125);
