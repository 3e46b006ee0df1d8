//! The weights of a learned gate, which says where attention will be before it is computed (SeerAttention-R, Gao et al. 2025).
//!
//! Per layer and KV head there are two matrices. With `R(p)` the rotation of RoPE to position `p`, whose frequencies are
//! those of the model,
//!
//! * the digest of a partition that begins at position `s` is `R(s) K [max_j k_j | min_j k_j | mean_j k_j]`, over its keys as
//!   they were before RoPE: `k_j = R(j)^-1` of the key that is stored. From that one, rounded as it is, so that a digest
//!   depends on the pages alone;
//! * the query of a token at position `t` is `R(t) Q [q_1 | .. | q_g] / sqrt(dim)` of the queries of the KV head's group,
//!   before RoPE too;
//! * a score is their dot product.

use crate::sparse::{DigestKind, DigestSpec};
use crate::{Error, HeadShape, KvGeometry};

/// The weights of a gate and the rotation that it undoes and applies.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// Heads of the model.
    pub heads: HeadShape,
    /// Layers of the model. Those without a gate have zeros.
    pub num_layers: usize,
    /// Values of a digest; even, and divides `head_dim`.
    pub dim: usize,
    /// `K`: `[layer][kv head][dim][3 * head_dim]`.
    pub k: Vec<f32>,
    /// `Q`: `[layer][kv head][dim][group * head_dim]`.
    pub q: Vec<f32>,
    /// Radians per token of the model's channel pairs `(c, c + head_dim / 2)`: `[head_dim / 2]`, the same at all lengths.
    pub inv_freq: Vec<f32>,
    /// Scale of cosine and sine.
    pub scale: f32,
}

impl Gate {
    /// Whether digests of `spec` over `geometry` can be made with `gate`: those of other kinds need none.
    ///
    /// # Errors
    /// No gate, or one for another model.
    pub fn check(gate: Option<&Gate>, spec: DigestSpec, geometry: &KvGeometry) -> Result<(), Error> {
        let DigestKind::Gate { dim } = spec.kind else { return Ok(()) };
        let refused = |what: &str| Err(Error::Unsupported(format!("digests of a gate: {what}")));
        let Some(gate) = gate else { return refused("its weights were not given") };
        let HeadShape { kv_heads, head_dim, .. } = gate.heads;
        let heads = gate.num_layers * kv_heads;
        if (gate.num_layers, kv_heads, head_dim)
            != (geometry.num_layers, geometry.kv_heads, geometry.head_dim)
        {
            return refused("its layers and heads are not those of the KV cache");
        }
        if gate.dim != dim || dim == 0 || !dim.is_multiple_of(2) || !head_dim.is_multiple_of(dim) {
            return refused("its size must be even and divide that of a head");
        }
        let len = (heads * dim * 3 * head_dim, heads * dim * gate.heads.group() * head_dim, head_dim / 2);
        if len != (gate.k.len(), gate.q.len(), gate.inv_freq.len()) {
            return refused("its weights have other shapes than its sizes say");
        }
        Ok(())
    }

    /// `K` of a layer and KV head: `[dim][3 * head_dim]`.
    pub fn k_of(&self, layer: usize, head: usize) -> &[f32] {
        let len = self.dim * 3 * self.heads.head_dim;
        &self.k[(layer * self.heads.kv_heads + head) * len..][..len]
    }

    /// `Q` of a layer and KV head: `[dim][group * head_dim]`.
    pub fn q_of(&self, layer: usize, head: usize) -> &[f32] {
        let len = self.dim * self.heads.group() * self.heads.head_dim;
        &self.q[(layer * self.heads.kv_heads + head) * len..][..len]
    }

    /// Radians per token of pair `(c, c + dim / 2)` of a digest: those of every `head_dim / dim`-th pair of the model.
    pub fn inv_freq_of(&self, c: usize) -> f32 {
        self.inv_freq[c * (self.heads.head_dim / self.dim)]
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> u64 {
        (size_of::<f32>() * (self.k.len() + self.q.len() + self.inv_freq.len())) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn a_gate_fits_one_model() {
        let heads = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 16 };
        let gate = Gate {
            heads,
            num_layers: 3,
            dim: 8,
            k: (0..3 * 2 * 8 * 48).map(|i| i as f32).collect(),
            q: vec![0.0; 3 * 2 * 8 * 32],
            inv_freq: (0..8).map(|c| c as f32).collect(),
            scale: 1.0,
        };
        let geometry =
            KvGeometry { num_layers: 3, kv_heads: 2, head_dim: 16, page_tokens: 16, dtype: DType::F32 };
        let spec = DigestSpec { kind: DigestKind::Gate { dim: 0 }, partition_tokens: 32 };
        let sized = spec.with_gate(Some(&gate));
        assert_eq!(sized.kind.width(16), 8);
        assert_eq!(spec.with_gate(None), spec);
        assert!(Gate::check(Some(&gate), sized, &geometry).is_ok());
        let mean = DigestSpec { kind: DigestKind::Mean, ..spec };
        assert_eq!(mean.with_gate(Some(&gate)), mean);
        assert!(Gate::check(None, mean, &geometry).is_ok());
        let refused = |gate: Option<&Gate>, spec, geometry| {
            Gate::check(gate, spec, &geometry).expect_err("does not fit").to_string()
        };
        assert!(refused(None, sized, geometry).contains("its weights were not given"));
        assert!(refused(Some(&gate), spec, geometry).contains("its size must be even"));
        let taller = KvGeometry { num_layers: 4, ..geometry };
        assert!(refused(Some(&gate), sized, taller).contains("are not those of the KV cache"));
        let short = Gate { q: Vec::new(), ..gate.clone() };
        assert!(refused(Some(&short), sized, geometry).contains("other shapes"));
        assert_eq!(gate.k_of(1, 1)[0], (3 * 8 * 48) as f32);
        assert_eq!(gate.inv_freq_of(3), 6.0, "every second pair of the model");
    }
}
