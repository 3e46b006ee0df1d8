//! The third verb of a step.

use ops::Batch;
use ops::sample::{SampleOutput, SampleRow};

/// Runs the rows of a step through a model. The engine knows nothing else of models and devices, so tests put a
/// recorder here and the simulator a cost model.
pub trait Runner {
    /// Runs `batch`, writing its KV, and draws one token per entry of `samples` (whose `row` is a row of the batch)
    /// into `out`, in order, after clearing it.
    fn run(&mut self, batch: &Batch, samples: &[SampleRow], out: &mut SampleOutput);
}
