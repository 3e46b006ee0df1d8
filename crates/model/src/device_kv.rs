//! What a device keeps of a context.

use ops::sparse::{DigestSpec, SelectionLimits};
use ops::{Backend, KvGeometry};
use sparse::trace::{Player, Recorder};

use crate::Error;

/// The pages of a pool, the digests of its blocks, and the selections of a step.
pub struct DeviceKv<B: Backend> {
    pub(crate) pages: B::Kv,
    pub(crate) digests: Vec<B::Digests>,
    /// `None` where every request attends to everything.
    pub(crate) selection: Option<B::Selection>,
    /// Where selections are recorded, if they are.
    pub(crate) recorder: Option<Recorder>,
    /// What is selected instead, if anything is.
    pub(crate) player: Option<Player>,
}

impl<B: Backend> DeviceKv<B> {
    /// A pool of `num_blocks` blocks, whose requests all attend to everything.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &mut B, geometry: KvGeometry, num_blocks: usize) -> Result<Self, Error> {
        let pages = backend.kv(geometry, num_blocks)?;
        Ok(DeviceKv { pages, digests: Vec::new(), selection: None, recorder: None, player: None })
    }

    /// The same for requests that attend sparsely: with digests as `specs` say, in the order by which methods name them.
    ///
    /// # Errors
    /// Out of memory; partitions that do not fit the pages.
    pub fn with_selections(
        backend: &mut B,
        geometry: KvGeometry,
        num_blocks: usize,
        specs: &[DigestSpec],
        limits: SelectionLimits,
    ) -> Result<Self, Error> {
        let digests = specs.iter().map(|&spec| backend.digests(spec, geometry, num_blocks));
        let digests = digests.collect::<Result<_, _>>()?;
        let (selection, _) = backend.selection(limits)?;
        let pages = backend.kv(geometry, num_blocks)?;
        Ok(DeviceKv { pages, digests, selection: Some(selection), recorder: None, player: None })
    }

    /// Records what is selected from now on.
    pub fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Takes the selections of a trace instead of those of policies from now on: for benches.
    pub fn replay(&mut self, player: Player) {
        self.player = Some(player);
    }

    /// The pages, for benches that fill them.
    pub fn pages(&mut self) -> &mut B::Kv {
        &mut self.pages
    }

    /// Makes the digests of the contexts of `batch`, whose pages were filled: for benches.
    pub fn digest(&mut self, backend: &mut B, layer: usize, batch: &ops::Batch) {
        for digests in &mut self.digests {
            backend.digest(digests, &self.pages, layer, batch);
        }
    }
}
