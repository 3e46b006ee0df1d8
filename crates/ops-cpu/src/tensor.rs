//! Activations.

use ops::{Error, Tensor};

use crate::memory::{Buffer, LINE_BYTES, Shared};

/// Floats per cache line.
const LINE: usize = LINE_BYTES / size_of::<f32>();

/// A row-major f32 matrix. Rows start on cache lines an odd number of lines apart: were they a power of two
/// apart, the rows of one register tile would fight for the same sets of the first-level cache.
#[derive(Debug)]
pub struct CpuTensor {
    values: Buffer<f32>,
    rows: usize,
    rows_max: usize,
    cols: usize,
    stride: usize,
}

/// Elements between rows of `cols` elements, `line` of which fill a cache line.
pub const fn odd_stride(cols: usize, line: usize) -> usize {
    cols.div_ceil(line) / 2 * 2 * line + line
}

impl CpuTensor {
    /// Room for `rows_max` rows, all in use.
    pub fn new(rows_max: usize, cols: usize) -> Result<Self, Error> {
        // One line more than needed where `cols` fills an even number of lines.
        let stride = odd_stride(cols, LINE);
        let values = Buffer::zeroed(rows_max.saturating_mul(stride), "activations")?;
        Ok(CpuTensor { values, rows: rows_max, rows_max, cols, stride })
    }

    /// Floats from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// A row in use.
    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &self.values.as_slice()[row * self.stride..][..self.cols]
    }

    /// A row in use.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &mut self.values.as_mut_slice()[row * self.stride..][..self.cols]
    }

    /// First element of row 0, for kernels.
    pub(crate) fn as_ptr(&self) -> *const f32 {
        self.values.as_ptr()
    }

    /// First element of row 0, for the tasks of a fork.
    pub(crate) fn shared(&mut self) -> Shared<f32> {
        Shared(self.values.as_mut_ptr())
    }
}

impl Tensor for CpuTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows in a tensor of {}", self.rows_max);
        self.rows = rows;
    }
}
