//! The weights of a learned gate, from a file: see [`ops::Gate`] and `docs/policies/seerattention.md`.

use std::path::Path;

use ops::{DType, Gate, HeadShape};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::{Error, ModelConfig, Rope, Source};

/// Its name beside the weights of a model.
const FILE: &str = "gate.safetensors";
/// Published gates have 66 to 101 MB.
const BYTES_MAX: u64 = 1 << 30;

/// The model that a gate must fit.
#[derive(Clone, Copy, Debug)]
pub struct GateModel<'a> {
    /// Heads.
    pub heads: HeadShape,
    /// Layers; those with a window need no gate.
    pub windows: &'a [Option<usize>],
    /// How keys are rotated.
    pub rope: &'a Rope,
}

/// The gate for the model of `source`: that in `file`, or the one that comes with the model.
///
/// # Errors
/// No such file, one that is not sound or for another model, a model whose keys no gate can read.
pub fn read_gate(source: &Source, config: &ModelConfig, file: Option<&Path>) -> Result<Gate, Error> {
    let rope = Rope::new(&config.rope);
    let model = GateModel { heads: config.heads, windows: &config.windows, rope: &rope };
    let (name, bytes) = match file {
        None => (FILE.to_owned(), source.read(FILE, BYTES_MAX)?),
        Some(path) => {
            let name = path.display().to_string();
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let base = path.file_name().and_then(|n| n.to_str());
            let base = base.ok_or_else(|| Error::file(&name, "not the name of a file"))?;
            let bytes = Source::Directory(folder.into()).read(base, BYTES_MAX);
            let full = |error| match error {
                Error::File { cause, .. } => Error::file(&name, cause),
                other => other,
            };
            (name.clone(), bytes.map_err(full)?)
        }
    };
    let Some(bytes) = bytes else {
        let cure = "seerattention needs a gate that was trained for this model (--policy-opt gate=FILE)";
        let place = if file.is_none() { format!(" in {}", source.describe()) } else { String::new() };
        return Err(Error::file(&name, format!("not found{place}; {cure}")));
    };
    gate_of(&name, &bytes, model)
}

/// The gate in `bytes`, the content of a safetensors file that messages call `name`.
///
/// # Errors
/// What is not sound, or for another model.
pub fn gate_of(name: &str, bytes: &[u8], model: GateModel) -> Result<Gate, Error> {
    let bad = |cause: String| Error::file(name, cause);
    if model.rope.prefix_limit().is_some() {
        return Err(bad(
            "a gate undoes the rotation of keys, which dynamic RoPE scaling makes depend on the \
                        length of the prompt; choose another policy"
                .into(),
        ));
    }
    let HeadShape { kv_heads, head_dim, .. } = model.heads;
    let file = SafeTensors::deserialize(bytes).map_err(|e| bad(e.to_string()))?;
    let mut gate = Gate {
        heads: model.heads,
        num_layers: model.windows.len(),
        dim: 0,
        k: Vec::new(),
        q: Vec::new(),
        inv_freq: model.rope.inv_freq().to_vec(),
        scale: model.rope.scale(),
    };
    let parts = [("k_gate", 3 * head_dim), ("q_gate", model.heads.group() * head_dim)];
    let mut gated = (0..model.windows.len()).filter(|&layer| model.windows[layer].is_none());
    let Some(first) = gated.next() else {
        return Err(
            bad("all layers of the model have a sliding window; a gate has nothing to select".into()),
        );
    };
    // The first tensor says the size for all, if it fits otherwise.
    let shape = |tensor: &str| file.tensor(tensor).map(|t| t.shape().to_vec()).unwrap_or_default();
    let tensor = format!("layers.{first}.k_gate");
    if let [of_heads, dim, cols] = shape(&tensor)[..]
        && (of_heads, cols) == (kv_heads, 3 * head_dim)
    {
        if dim == 0 || !dim.is_multiple_of(2) || !head_dim.is_multiple_of(dim) {
            let allowed = format!("it must be even and divide the model's head_dim of {head_dim}");
            return Err(bad(format!("a gate_dim of {dim}; {allowed}")));
        }
        gate.dim = dim;
    }
    for layer in 0..model.windows.len() {
        for (part, cols) in parts {
            let len = kv_heads * gate.dim * cols;
            let to = if part == "k_gate" { &mut gate.k } else { &mut gate.q };
            if model.windows[layer].is_some() {
                to.resize(to.len() + len, 0.0);
                continue;
            }
            let tensor = format!("layers.{layer}.{part}");
            let view = file.tensor(&tensor).map_err(|_| bad(format!("tensor {tensor} is missing")))?;
            if view.shape() != [kv_heads, gate.dim, cols] {
                let size = if gate.dim == 0 { "gate_dim".into() } else { gate.dim.to_string() };
                return Err(bad(format!(
                    "tensor {tensor} has shape {:?}, but the model asks for [{kv_heads}, {size}, {cols}]: is the gate \
                     for this model?",
                    view.shape()
                )));
            }
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => {
                    return Err(bad(format!(
                        "tensor {tensor} has dtype {other:?}, expected F32, F16 or BF16"
                    )));
                }
            };
            to.extend((0..len).map(|i| dtype.read(view.data(), i)));
            if !to[to.len() - len..].iter().all(|w| w.is_finite()) {
                return Err(bad(format!("tensor {tensor} holds values that are no finite numbers")));
            }
        }
    }
    Ok(gate)
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
