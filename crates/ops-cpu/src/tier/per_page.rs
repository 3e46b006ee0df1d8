//! The naive offload that SparseServe compares itself with (vLLM-SO): each page of each head is a copy and a call of its own, one
//! after the other, and the step waits for every one.

use ops::BlockIndex;

use super::Tier;
use super::waves::Fetch;
use crate::link::Direction;
use crate::pages::Layers;

impl Tier {
    /// Fetches what is listed, page by page.
    pub(super) fn fetch_per_page(&mut self, dram: &Layers) {
        let (page_bytes, bytes) = (self.geometry.page_bytes(), self.fetched_part);
        for &Fetch { head, block, frame, .. } in &self.fetches {
            let done = self.link.send(Direction::ToHbm, bytes, 1);
            let page = &dram.page_bytes(self.layer, block, head as usize)[..bytes];
            self.arena.as_mut_slice()[frame as usize * page_bytes..][..bytes].copy_from_slice(page);
            self.link.wait(done);
        }
    }

    /// Brings the pages of a block to local frames, from `frame` on.
    pub(super) fn bring_per_page(&mut self, dram: &Layers, layer: usize, block: BlockIndex, frame: usize) {
        let bytes = self.geometry.page_bytes();
        for head in 0..self.geometry.kv_heads {
            let done = self.link.send(Direction::ToHbm, bytes, 1);
            let page = dram.page_bytes(layer, block, head);
            self.arena.as_mut_slice()[(frame + head) * bytes..][..bytes].copy_from_slice(page);
            self.stall_nanos += self.link.wait(done);
        }
    }

    /// Saves the pages of a block from local frames, from `frame` on. They are in DRAM then.
    pub(super) fn save_per_page(&mut self, dram: &mut Layers, layer: usize, block: BlockIndex, frame: usize) {
        let bytes = self.geometry.page_bytes();
        let to = dram.run_mut(layer, block, 1);
        for head in 0..self.geometry.kv_heads {
            let done = self.link.send(Direction::ToDram, bytes, 1);
            to[head * bytes..][..bytes].copy_from_slice(self.frame(frame + head));
            self.stall_nanos += self.link.wait(done);
        }
    }
}
