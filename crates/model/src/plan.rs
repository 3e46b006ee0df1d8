//! Sizes, for the memory plan of a server and for `inspect`.

use ops::{Backend, DType, KvGeometry};

use crate::ModelConfig;
use crate::weights::ModelSpec;

/// Bytes that the weights of `config`'s model take on `backend` as `dtype`.
pub fn weight_bytes<B: Backend>(config: &ModelConfig, backend: &B, dtype: DType) -> u64 {
    let spec = ModelSpec::new(config);
    // Vectors and biases are f32 on every device.
    let f32s = |values: usize| values as u64 * size_of::<f32>() as u64;
    let linears = spec.linears().map(|linear| {
        let bias = if linear.bias { f32s(linear.rows()) } else { 0 };
        backend.linear_bytes(linear.rows(), linear.cols, dtype) + bias
    });
    linears.sum::<u64>() + spec.vectors().map(|vector| f32s(vector.len)).sum::<u64>()
}

/// Number of parameters of `config`'s model; tied ones count once.
pub fn num_parameters(config: &ModelConfig) -> u64 {
    let spec = ModelSpec::new(config);
    let linears = spec.linears().map(|l| (l.rows() * (l.cols + usize::from(l.bias))) as u64);
    linears.sum::<u64>() + spec.vectors().map(|v| v.len as u64).sum::<u64>()
}

/// Shape of the KV pool of `config`'s model.
pub fn kv_geometry(config: &ModelConfig, page_tokens: usize, dtype: DType) -> KvGeometry {
    let heads = config.heads;
    KvGeometry {
        num_layers: config.num_layers,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        page_tokens,
        dtype,
    }
}
