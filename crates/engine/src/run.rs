//! The second verb of a step: the model.

use ops::coverage::Inspections;
use ops::places::DigestState;
use ops::residency::SeatCounters;
use ops::sample::{SampleOutput, SampleRow};
use ops::tally::{Overlap, RowTally, WorkingSet};
use ops::tier::TierState;
use ops::{BlockIndex, SeatIndex, Step};

use crate::engine::Engine;

/// Runs the rows of a step through a model. The engine knows nothing else of models and devices, so tests put a
/// recorder here and the simulator a cost model.
pub trait Runner {
    /// Runs `step`, writing its KV, and draws one token per entry of `samples` into `out`, in order, after clearing it. Their rows
    /// ascend: `row` is one of the batch, or comes after those, one for each of the prompts that are
    /// [completed](Step::completed), in order. Adds what `inspections` ask for to what they found.
    fn run(
        &mut self,
        step: &Step,
        samples: &[SampleRow],
        inspections: &mut Inspections,
        out: &mut SampleOutput,
    );

    /// Writes what the device alone holds of the sequence in `seat` to its blocks in `table`: it leaves its seat and keeps them.
    fn park(&mut self, _seat: SeatIndex, _table: &[BlockIndex]) {}

    /// How much of the digests is in HBM; zeros in unified memory.
    fn digest_state(&self) -> DigestState {
        DigestState::default()
    }

    /// Forgets what the device holds for `seat`, whose sequence has left; comes before its blocks are used again.
    fn release(&mut self, _seat: SeatIndex) {}

    /// Tokens of `seat` whose KV is in DRAM in all layers, so that others may read it. More than it has in unified memory.
    fn saved_tokens(&mut self, _seat: SeatIndex) -> usize {
        usize::MAX
    }

    /// The state of the HBM tier; `None` in unified memory.
    fn tier_state(&self) -> Option<TierState> {
        None
    }

    /// What happened to the pages of `seat` since it was released, and the cache frames that it holds.
    fn seat_counters(&self, _seat: SeatIndex) -> (SeatCounters, usize) {
        Default::default()
    }

    /// Bytes of digests that were copied to HBM for `seat` in the last step.
    fn digest_loads(&self, _seat: SeatIndex) -> u64 {
        0
    }

    /// How much of each selection the next one repeated, since the start.
    fn overlap(&self) -> Overlap {
        Overlap::default()
    }

    /// What the last row of `seat` selected in the last step; nothing where no layer selects.
    fn row_tally(&self, _seat: SeatIndex) -> RowTally {
        RowTally::default()
    }

    /// The pages that the last rows of the answer in `seat` selected, since the seat was released; nothing where no layer selects.
    fn working_set(&self, _seat: SeatIndex) -> WorkingSet {
        WorkingSet::default()
    }
}

impl<R: Runner> Engine<R> {
    /// Has the device forget the seats that were left. Before a step at the latest: their blocks may be others' by then.
    pub(crate) fn leave_seats(&mut self) {
        for seat in self.kv.left_seats() {
            self.runner.release(seat);
            self.shares.release(seat);
        }
    }

    /// Runs the scheduled rows and samples where a sequence asks for it.
    pub(crate) fn run(&mut self) {
        self.leave_seats();
        self.rows.land(self.flights.layers());
        let mut samples = recycle(std::mem::take(&mut self.samples));
        for part in &mut self.rows.parts {
            let start = samples.len();
            let sequence = &self.running[part.owner];
            part.draws = sequence.push_samples(&mut samples, part.first_row, part.positions.clone());
            part.samples = start..samples.len();
        }
        let mut inspections = std::mem::take(&mut self.rows.inspections);
        self.runner.run(&self.rows.step(), &samples, &mut inspections, &mut self.output);
        assert_eq!(
            inspections.found.len(),
            inspections.asked.len(),
            "the runner checks what it was asked to"
        );
        self.rows.inspections = inspections;
        assert_eq!(self.output.sampled.len(), samples.len(), "the runner samples what it was asked to");
        self.samples = recycle(samples);
    }
}

/// The memory of `samples` for entries of another lifetime. Collecting from a vector's own iterator into entries of
/// the same layout keeps its allocation, which the allocation test verifies.
pub(crate) fn recycle<'b>(mut samples: Vec<SampleRow<'_>>) -> Vec<SampleRow<'b>> {
    samples.clear();
    samples.into_iter().map(|_| unreachable!("it was cleared")).collect()
}
