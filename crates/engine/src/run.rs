//! The third verb of a step.

use ops::Batch;
use ops::sample::{SampleOutput, SampleRow};

/// Runs the rows of a step through a model. The engine knows nothing else of models and devices, so tests put a
/// recorder here and the simulator a cost model.
pub trait Runner {
    /// Runs `batch`, writing its KV, and draws one token per entry of `samples` (whose `row` is a row of the batch)
    /// into `out`, in order, after clearing it. Those rows ascend.
    fn run(&mut self, batch: &Batch, samples: &[SampleRow], out: &mut SampleOutput);
}

/// The memory of `samples` for entries of another lifetime. Collecting from a vector's own iterator into entries of
/// the same layout keeps its allocation, which the allocation test verifies.
pub(crate) fn recycle<'b>(mut samples: Vec<SampleRow<'_>>) -> Vec<SampleRow<'b>> {
    samples.clear();
    samples.into_iter().map(|_| unreachable!("it was cleared")).collect()
}
