//! What a device keeps of a context.

use ops::sparse::{DigestSpec, SelectionLimits};
use ops::{Backend, Gate, KvGeometry};

use crate::Error;

/// The pages of a pool, the digests of its blocks, and the selections of a step.
pub struct DeviceKv<B: Backend> {
    pub(crate) pages: B::Kv,
    pub(crate) digests: Vec<B::Digests>,
    /// `None` where every request attends to everything.
    pub(crate) selection: Option<B::Selection>,
}

impl<B: Backend> DeviceKv<B> {
    /// A pool of `num_blocks` blocks, whose requests all attend to everything.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &mut B, geometry: KvGeometry, num_blocks: usize) -> Result<Self, Error> {
        Ok(DeviceKv { pages: backend.kv(geometry, num_blocks)?, digests: Vec::new(), selection: None })
    }

    /// The same for requests that attend sparsely: with digests as `specs` say, in the order by which methods name them, those of
    /// a gate by the weights of `gate`.
    ///
    /// # Errors
    /// Out of memory; partitions that do not fit the pages; a gate that is missing or does not fit.
    pub fn with_selections(
        backend: &mut B,
        geometry: KvGeometry,
        num_blocks: usize,
        specs: &[DigestSpec],
        limits: SelectionLimits,
        gate: Option<&Gate>,
    ) -> Result<Self, Error> {
        let digests = specs.iter().map(|&spec| backend.digests(spec, geometry, num_blocks, gate));
        let digests = digests.collect::<Result<_, _>>()?;
        let (selection, _) = backend.selection(limits)?;
        Ok(DeviceKv { pages: backend.kv(geometry, num_blocks)?, digests, selection: Some(selection) })
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
