//! Which tensors a model consists of: names and shapes, for loading, checking and planning alike.

use std::collections::HashSet;

use crate::{Checkpoint, Error, ModelConfig};

/// A linear layer: projections stacked one below the other so that they are one product.
#[derive(Debug)]
pub(crate) struct LinearSpec {
    /// Module name and number of outputs of each projection.
    pub parts: Vec<(String, usize)>,
    /// Inputs.
    pub cols: usize,
    /// Whether the projections have biases.
    pub bias: bool,
}

/// A vector of weights.
#[derive(Debug)]
pub(crate) struct VectorSpec {
    pub name: String,
    pub len: usize,
}

/// The weights of a decoder layer.
#[derive(Debug)]
pub(crate) struct LayerSpec {
    pub input_norm: VectorSpec,
    pub qkv: LinearSpec,
    /// Of q and k.
    pub qk_norm: Option<[VectorSpec; 2]>,
    pub output: LinearSpec,
    pub post_attention_norm: VectorSpec,
    pub gate_up: LinearSpec,
    pub down: LinearSpec,
}

/// The weights of a model.
#[derive(Debug)]
pub(crate) struct ModelSpec {
    pub embed: LinearSpec,
    pub layers: Vec<LayerSpec>,
    pub norm: VectorSpec,
    /// `None` when tied to the embedding.
    pub lm_head: Option<LinearSpec>,
}

impl LinearSpec {
    /// Outputs of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|p| p.1).sum()
    }

    fn for_each_tensor(&self, f: &mut impl FnMut(&str, &[usize]) -> Result<(), Error>) -> Result<(), Error> {
        for (module, rows) in &self.parts {
            f(&weight(module), &[*rows, self.cols])?;
            if self.bias {
                f(&bias(module), &[*rows])?;
            }
        }
        Ok(())
    }
}

/// Name of a module's weight.
pub(crate) fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// Name of a module's bias.
pub(crate) fn bias(module: &str) -> String {
    format!("{module}.bias")
}

impl ModelSpec {
    pub fn new(config: &ModelConfig) -> Self {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let linear = |name: &str| LinearSpec { parts: vec![(name.into(), vocab)], cols: hidden, bias: false };
        ModelSpec {
            embed: linear("model.embed_tokens"),
            layers: (0..config.num_layers).map(|layer| LayerSpec::new(config, layer)).collect(),
            norm: VectorSpec { name: "model.norm.weight".into(), len: hidden },
            lm_head: (!config.tie_word_embeddings).then(|| linear("lm_head")),
        }
    }

    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        let of_layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        std::iter::once(&self.embed).chain(of_layers).chain(&self.lm_head)
    }

    pub fn vectors(&self) -> impl Iterator<Item = &VectorSpec> {
        let of_layers = self.layers.iter().flat_map(|l| {
            [&l.input_norm, &l.post_attention_norm].into_iter().chain(l.qk_norm.iter().flatten())
        });
        of_layers.chain(std::iter::once(&self.norm))
    }

    /// Checks that `checkpoint` holds the tensors of this model and no others; gives their bytes on disk.
    pub fn check(&self, architecture: &'static str, checkpoint: &Checkpoint) -> Result<u64, Error> {
        let (mut expected, mut total_bytes) = (HashSet::new(), 0);
        let mut check = |name: &str, shape: &[usize]| {
            total_bytes += checkpoint.check(name, shape)?.1;
            expected.insert(name.to_string());
            Ok(())
        };
        self.linears().try_for_each(|linear| linear.for_each_tensor(&mut check))?;
        self.vectors().try_for_each(|vector| check(&vector.name, &[vector.len]))?;
        let unexpected = checkpoint.names().find(|name| !expected.contains(*name) && !self.is_surplus(name));
        match unexpected {
            Some(name) => Err(Error::unexpected_tensor(name, architecture)),
            None => Ok(total_bytes),
        }
    }

    /// Tensors that checkpoints hold although they follow from others.
    fn is_surplus(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || (self.lm_head.is_none() && name == "lm_head.weight")
    }
}

impl LayerSpec {
    fn new(config: &ModelConfig, layer: usize) -> Self {
        let (hidden, heads) = (config.hidden_size, config.heads);
        let kv_cols = heads.kv_heads * heads.head_dim;
        let module = |name: &str| format!("model.layers.{layer}.{name}");
        let vector = |name: &str, len| VectorSpec { name: weight(&module(name)), len };
        let linear = |parts: &[(&str, usize)], cols, bias| LinearSpec {
            parts: parts.iter().map(|&(name, rows)| (module(name), rows)).collect(),
            cols,
            bias,
        };
        let qkv = [
            ("self_attn.q_proj", heads.q_cols()),
            ("self_attn.k_proj", kv_cols),
            ("self_attn.v_proj", kv_cols),
        ];
        let gate_up =
            [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)];
        LayerSpec {
            input_norm: vector("input_layernorm", hidden),
            qkv: linear(&qkv, hidden, config.qkv_bias),
            qk_norm: config
                .qk_norm
                .then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(|name| vector(name, heads.head_dim))),
            output: linear(&[("self_attn.o_proj", hidden)], heads.q_cols(), config.output_bias),
            post_attention_norm: vector("post_attention_layernorm", hidden),
            gate_up: linear(&gate_up, hidden, config.mlp_bias),
            down: linear(&[("mlp.down_proj", hidden)], config.intermediate_size, config.mlp_bias),
        }
    }
}
