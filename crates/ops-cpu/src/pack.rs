//! Packed weights.
//!
//! Outputs are cut into panels of 64 (four vectors; the last one may have fewer) and a panel is stored step by step of
//! k: `[outputs / 64][k / 2][64][2]` in bf16, `[outputs / 64][k][64]` in f16 and f32. A product of one row streams a
//! panel front to back; a product of many keeps a slice of it in the cache.

use half::{bf16, f16};
use ops::{DType, Error, WeightView};

use crate::memory::{Buffer, Shared};
use crate::pool::Pool;
use crate::simd::LANES;
use crate::tile::round_to_lanes;

/// Outputs per panel.
pub const PANEL: usize = 64;

/// Values of k that are transposed at once: 64 rows of them stay in the first-level cache.
const BLOCK: usize = 64;

/// A packed weight matrix with an optional bias.
#[derive(Debug)]
pub struct Linear {
    rows: usize,
    cols: usize,
    dtype: DType,
    panels: Buffer<u8>,
    bias: Option<Buffer<f32>>,
}

/// Values of k that one step holds.
pub const fn k_per_step(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 2,
        DType::F16 | DType::F32 => 1,
    }
}

impl Linear {
    /// Bytes that a matrix takes without its bias.
    pub fn bytes(rows: usize, cols: usize, dtype: DType) -> u64 {
        (round_to_lanes(rows) as u64)
            * (cols.next_multiple_of(k_per_step(dtype)) as u64)
            * (dtype.bytes() as u64)
    }

    /// Packs the rows of `parts` one below the other; `biases` is empty or has one vector per part.
    ///
    /// # Panics
    /// When shapes do not fit each other or their bytes.
    pub fn pack(
        pool: &mut Pool,
        parts: &[WeightView],
        biases: &[WeightView],
        dtype: DType,
    ) -> Result<Self, Error> {
        assert!(!parts.is_empty(), "a linear layer has parts");
        let cols = parts[0].cols;
        for part in parts {
            assert_eq!(part.cols, cols, "parts have as many columns as each other");
            assert_eq!(part.bytes.len(), part.rows * part.cols * part.dtype.bytes(), "bytes fit the shape");
        }
        let rows = parts.iter().map(|p| p.rows).sum();
        let bytes = Linear::bytes(rows, cols, dtype);
        let bytes = usize::try_from(bytes).map_err(|_| Error::OutOfMemory { what: "weights", bytes })?;
        let mut panels = Buffer::<u8>::zeroed(bytes, "weights")?;
        let to = Shared(panels.as_mut_ptr());
        let panel_bytes = PANEL * cols.next_multiple_of(k_per_step(dtype)) * dtype.bytes();
        pool.run(rows.div_ceil(PANEL), &|panel, _| {
            let first = panel * PANEL;
            let width = (round_to_lanes(rows) - first).min(PANEL);
            // SAFETY: panel `panel` is these bytes of the buffer, and no other task's.
            let to = unsafe {
                std::slice::from_raw_parts_mut(to.at(panel * panel_bytes), panel_bytes / PANEL * width)
            };
            pack_panel(to, parts, first, width, dtype);
        });
        Ok(Linear { rows, cols, dtype, panels, bias: pack_bias(parts, biases, rows)? })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Steps of k.
    pub fn steps(&self) -> usize {
        self.cols.div_ceil(k_per_step(self.dtype))
    }

    /// Bytes of 16 outputs per step.
    fn vector_bytes(&self) -> usize {
        LANES * k_per_step(self.dtype) * self.dtype.bytes()
    }

    /// Number of panels.
    pub fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Start of a panel and its width in vectors.
    pub fn panel(&self, panel: usize) -> (*const u8, usize) {
        assert!(panel < self.num_panels(), "the matrix has that panel");
        let vectors = ((round_to_lanes(self.rows) - panel * PANEL) / LANES).min(PANEL / LANES);
        let offset = panel * (PANEL / LANES) * self.vector_bytes() * self.steps();
        (self.panels.as_slice()[offset..].as_ptr(), vectors)
    }

    /// The bias, padded with zeros to whole vectors.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(Buffer::as_slice)
    }

    /// Copies row `row` (the weights of one output) into `out`, `cols` wide.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "one value per column");
        let (panel, vectors) = self.panel(row / PANEL);
        let (lane, width) = (row % PANEL, vectors * LANES);
        let per_step = k_per_step(self.dtype);
        for (k, out) in out.iter_mut().enumerate() {
            let element = (k / per_step * width + lane) * per_step + k % per_step;
            // SAFETY: `lane < width`, `k < cols`: an element of this panel, aligned to its size as the panel is.
            *out = unsafe {
                match self.dtype {
                    DType::Bf16 => bf16::from_bits(*panel.cast::<u16>().add(element)).to_f32(),
                    DType::F16 => f16::from_bits(*panel.cast::<u16>().add(element)).to_f32(),
                    DType::F32 => *panel.cast::<f32>().add(element),
                }
            };
        }
    }
}

fn pack_bias(parts: &[WeightView], biases: &[WeightView], rows: usize) -> Result<Option<Buffer<f32>>, Error> {
    if biases.is_empty() {
        return Ok(None);
    }
    assert_eq!(biases.len(), parts.len(), "one bias per part");
    let mut packed = Buffer::<f32>::zeroed(round_to_lanes(rows), "bias")?;
    let mut at = 0;
    for (part, bias) in parts.iter().zip(biases) {
        assert_eq!(bias.rows * bias.cols, part.rows, "one bias per output");
        decode(bias.dtype, bias.bytes, &mut packed.as_mut_slice()[at..at + part.rows]);
        at += part.rows;
    }
    Ok(Some(packed))
}

/// A vector of weights in f32, padded with zeros to whole vectors.
#[derive(Debug)]
pub struct Vector {
    len: usize,
    values: Buffer<f32>,
}

impl Vector {
    /// Converts `view` (`rows * cols` values).
    pub fn new(view: WeightView) -> Result<Self, Error> {
        let len = view.rows * view.cols;
        let mut values = Buffer::zeroed(round_to_lanes(len), "weights")?;
        decode(view.dtype, view.bytes, &mut values.as_mut_slice()[..len]);
        Ok(Vector { len, values })
    }

    /// Number of values.
    pub fn dim(&self) -> usize {
        self.len
    }

    /// The values, and zeros up to a multiple of 16.
    pub fn padded(&self) -> &[f32] {
        self.values.as_slice()
    }
}

/// Little-endian elements to f32.
fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * dtype.bytes(), "bytes fit the shape");
    match dtype {
        DType::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*b).to_f32();
            }
        }
        DType::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// Packs outputs `first..first + width`, those beyond the last row being zeros, block by block of k.
fn pack_panel(to: &mut [u8], parts: &[WeightView], first: usize, width: usize, dtype: DType) {
    let cols = parts[0].cols;
    let per_step = k_per_step(dtype);
    let mut block = [[0.0f32; BLOCK]; PANEL];
    for k0 in (0..cols).step_by(BLOCK) {
        let count = BLOCK.min(cols - k0);
        for (lane, values) in block[..width].iter_mut().enumerate() {
            values.fill(0.0);
            if let Some((part, row)) = find_row(parts, first + lane) {
                let at = (row * cols + k0) * part.dtype.bytes();
                decode(part.dtype, &part.bytes[at..at + count * part.dtype.bytes()], &mut values[..count]);
            }
        }
        let element = dtype.bytes();
        let to = &mut to[k0 * width * element..][..count.next_multiple_of(per_step) * width * element];
        match dtype {
            DType::Bf16 => {
                for (step, to) in to.chunks_exact_mut(width * 4).enumerate() {
                    for (to, values) in to.as_chunks_mut::<4>().0.iter_mut().zip(&block) {
                        let bits = |k: usize| u32::from(bf16::from_f32(values[k]).to_bits());
                        *to = (bits(2 * step) | bits(2 * step + 1) << 16).to_le_bytes();
                    }
                }
            }
            DType::F16 => {
                for (step, to) in to.chunks_exact_mut(width * 2).enumerate() {
                    for (to, values) in to.as_chunks_mut::<2>().0.iter_mut().zip(&block) {
                        *to = f16::from_f32(values[step]).to_le_bytes();
                    }
                }
            }
            DType::F32 => {
                for (step, to) in to.chunks_exact_mut(width * 4).enumerate() {
                    for (to, values) in to.as_chunks_mut::<4>().0.iter_mut().zip(&block) {
                        *to = values[step].to_le_bytes();
                    }
                }
            }
        }
    }
}

/// The part that holds output `row`, and its row there.
fn find_row<'a, 'b>(parts: &'b [WeightView<'a>], mut row: usize) -> Option<(&'b WeightView<'a>, usize)> {
    for part in parts {
        if row < part.rows {
            return Some((part, row));
        }
        row -= part.rows;
    }
    None
}
