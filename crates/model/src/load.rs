//! From a checkpoint to packed weights.

use ops::{Backend, DType, WeightView};

use crate::checkpoint::TensorData;
use crate::decoder::{Layer, Model};
use crate::weights::{LayerSpec, LinearSpec, ModelSpec, VectorSpec, bias, weight};
use crate::{Checkpoint, Error, ModelConfig, Rope, Source};

impl<B: Backend> Model<B> {
    /// Loads the model of `source` and packs its weights as `dtype`, or as they are on disk where `None`. Calls
    /// `progress` with the bytes read so far and in all.
    ///
    /// Every tensor is checked before the first is packed. No file is open or mapped afterwards.
    ///
    /// # Errors
    /// A checkpoint that is faulty or not supported, and memory that does not suffice.
    pub fn load(
        backend: &mut B,
        source: &Source,
        dtype: Option<DType>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let config = ModelConfig::read(source)?;
        let checkpoint = Checkpoint::open(source)?;
        let spec = ModelSpec::new(&config);
        let total_bytes = spec.check(config.architecture, &checkpoint)?;
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => dtype_on_disk(&config, &checkpoint)?,
        };
        let mut loader =
            Loader { backend, checkpoint: &checkpoint, dtype, progress, done_bytes: 0, total_bytes };
        Ok(Model {
            embed: loader.linear(&spec.embed)?,
            layers: spec.layers.iter().map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
            norm: loader.vector(&spec.norm)?,
            lm_head: spec.lm_head.as_ref().map(|head| loader.linear(head)).transpose()?,
            rope: Rope::new(&config.rope),
            dtype,
            config,
        })
    }
}

/// Element type of the weights of `checkpoint`: that of the embedding, which no checkpoint keeps in another.
///
/// # Errors
/// An embedding that is missing or not what `config` says.
pub fn dtype_on_disk(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<DType, Error> {
    let embed = ModelSpec::new(config).embed;
    let (module, rows) = &embed.parts[0];
    checkpoint.check(&weight(module), &[*rows, embed.cols]).map(|(dtype, _)| dtype)
}

struct Loader<'a, B> {
    backend: &'a mut B,
    checkpoint: &'a Checkpoint,
    dtype: DType,
    progress: &'a mut dyn FnMut(u64, u64),
    done_bytes: u64,
    total_bytes: u64,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, spec: &LayerSpec) -> Result<Layer<B>, Error> {
        Ok(Layer {
            input_norm: self.vector(&spec.input_norm)?,
            qkv: self.linear(&spec.qkv)?,
            qk_norm: match &spec.qk_norm {
                Some([q, k]) => Some((self.vector(q)?, self.vector(k)?)),
                None => None,
            },
            output: self.linear(&spec.output)?,
            post_attention_norm: self.vector(&spec.post_attention_norm)?,
            gate_up: self.linear(&spec.gate_up)?,
            down: self.linear(&spec.down)?,
        })
    }

    fn linear(&mut self, spec: &LinearSpec) -> Result<B::Linear, Error> {
        let checkpoint = self.checkpoint;
        let parts: Vec<TensorData> = spec
            .parts
            .iter()
            .map(|(module, rows)| checkpoint.tensor(&weight(module), &[*rows, spec.cols]))
            .collect::<Result<_, _>>()?;
        let with_bias = if spec.bias { &spec.parts[..] } else { &[] };
        let biases: Vec<TensorData> = with_bias
            .iter()
            .map(|(module, rows)| checkpoint.tensor(&bias(module), &[*rows]))
            .collect::<Result<_, _>>()?;
        let parts: Vec<WeightView> = parts.iter().map(TensorData::view).collect();
        let biases: Vec<WeightView> = biases.iter().map(TensorData::view).collect();
        let packed = self.backend.linear(&parts, &biases, self.dtype)?;
        self.advance(parts.iter().chain(&biases));
        Ok(packed)
    }

    fn vector(&mut self, spec: &VectorSpec) -> Result<B::Vector, Error> {
        let tensor = self.checkpoint.tensor(&spec.name, &[spec.len])?;
        let vector = self.backend.vector(tensor.view())?;
        self.advance([&tensor.view()]);
        Ok(vector)
    }

    fn advance<'w>(&mut self, read: impl IntoIterator<Item = &'w WeightView<'w>>) {
        self.done_bytes += read.into_iter().map(|view| view.bytes.len() as u64).sum::<u64>();
        (self.progress)(self.done_bytes, self.total_bytes);
    }
}
