//! Every architecture and option against `transformers` in f32: logits and 256 greedy tokens of tiny random models.

mod common;

use common::{Sequence, argmax, load, repository};
use ops::reference::Reference;
use ops::{Backend, DType};
use ops_cpu::{CpuBackend, CpuOptions, Isa};
use safetensors::SafeTensors;
use sparseserve_model::Source;

/// Of the largest reference logit.
const TOLERANCE: f32 = 1e-4;
const NUM_GREEDY: usize = 256;

struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    positions: Vec<u32>,
    /// Of the positions.
    logits: Vec<Vec<f32>>,
}

impl Golden {
    fn read(model: &str) -> Self {
        let bytes = std::fs::read(repository(model).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<u32> {
            let tensor = file.tensor(name).unwrap();
            tensor.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let positions = words("positions");
        let logits: Vec<f32> = words("logits").into_iter().map(f32::from_bits).collect();
        let logits = logits.chunks(logits.len() / positions.len()).map(<[f32]>::to_vec).collect();
        Golden { prompt: words("prompt"), greedy: words("greedy"), positions, logits }
    }
}

fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(repository("xtask/golden/models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() > 20, "fixtures are missing: {names:?}");
    names
}

fn cpu(isa: Isa) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(2), isa: Some(isa) }).expect("an available instruction set")
}

#[test]
fn reference_equals_transformers() {
    fixtures().iter().for_each(|name| check(name, Reference::default()));
}

#[test]
fn cpu_equals_transformers_at_every_instruction_set() {
    for isa in Isa::ALL {
        if isa.available() {
            fixtures().iter().for_each(|name| check(name, cpu(isa)));
        } else {
            eprintln!("SKIPPED: this machine has no {isa}");
        }
    }
}

fn check<B: Backend>(name: &str, backend: B) {
    let path = format!("xtask/golden/models/{name}");
    let golden = Golden::read(&path);
    let (mut backend, model) = load(backend, &Source::Directory(repository(&path)), DType::F32);
    let tokens: Vec<u32> = golden.prompt.iter().chain(&golden.greedy).copied().collect();
    let tokens = &tokens[..tokens.len() - 1]; // nothing follows the last
    assert_eq!(golden.greedy.len(), NUM_GREEDY);
    let (prompt, answer) = tokens.split_at(golden.prompt.len());

    // The whole prompt, with the logits of some rows only; then token by token, as an answer is made.
    let mut whole = Sequence::new(&mut backend, &model, prompt.len(), tokens.len());
    let in_prompt: Vec<u32> =
        golden.positions.iter().copied().filter(|&p| (p as usize) < prompt.len()).collect();
    let prompt_logits = whole.feed(prompt, &in_prompt);
    let answer_logits = feed_in_chunks(&mut whole, answer, 1);

    let greedy: Vec<u32> =
        prompt_logits.last().into_iter().chain(&answer_logits).map(|logits| argmax(logits)).collect();
    assert_eq!(greedy, golden.greedy, "{name}: greedy tokens");
    let scale = golden.logits.iter().flatten().fold(0f32, |max, l| max.max(l.abs()));
    let mut worst = 0f32;
    for (position, expected) in golden.positions.iter().zip(&golden.logits) {
        let found = match in_prompt.binary_search(position) {
            Ok(row) => &prompt_logits[row],
            Err(_) => &answer_logits[*position as usize - prompt.len()],
        };
        assert_eq!(found.len(), expected.len(), "{name}: vocabulary");
        worst = found.iter().zip(expected).fold(worst, |worst, (f, e)| worst.max((f - e).abs()));
    }
    println!("{name}: logits differ by {:.1e} of the largest", worst / scale);
    assert!(worst <= TOLERANCE * scale, "{name}: logits differ by {worst} where the largest is {scale}");

    // However the tokens come in, the bits are the same.
    for chunk in [7, 1] {
        let mut cut = Sequence::new(&mut backend, &model, prompt.len(), tokens.len());
        let logits = feed_in_chunks(&mut cut, tokens, chunk);
        for (row, &position) in in_prompt.iter().enumerate() {
            assert_eq!(
                logits[position as usize], prompt_logits[row],
                "{name}: chunks of {chunk}, {position}"
            );
        }
        assert_eq!(logits[prompt.len()..], answer_logits, "{name}: chunks of {chunk}");
    }
}

/// Appends `tokens` in steps of `chunk`; gives the logits of all of them.
fn feed_in_chunks<B: Backend>(sequence: &mut Sequence<B>, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        logits.extend(sequence.feed(tokens, &rows));
    }
    logits
}

/// Divergence of a mode with rounded weights, KV and activations from f32, over all positions of all fixtures.
#[derive(Debug, Default)]
struct Divergence {
    kl_sum: f64,
    kl_max: f64,
    agreeing: usize,
    positions: usize,
}

impl Divergence {
    /// Adds a position, given both logits.
    fn add(&mut self, exact: &[f32], rounded: &[f32]) {
        let log_softmax = |logits: &[f32]| -> Vec<f64> {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
            logits.iter().map(|&l| f64::from(l - max) - sum.ln()).collect()
        };
        let (p, q) = (log_softmax(exact), log_softmax(rounded));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        self.kl_sum += kl;
        self.kl_max = self.kl_max.max(kl);
        self.agreeing += usize::from(argmax(exact) == argmax(rounded));
        self.positions += 1;
    }

    fn kl_mean(&self) -> f64 {
        self.kl_sum / self.positions as f64
    }

    fn agreement(&self) -> f64 {
        self.agreeing as f64 / self.positions as f64
    }
}

/// All fixtures in `dtype` on the CPU against f32, fed with the same tokens.
fn divergence(dtype: DType) -> Divergence {
    let mut found = Divergence::default();
    for name in fixtures() {
        let path = format!("xtask/golden/models/{name}");
        let golden = Golden::read(&path);
        let tokens: Vec<u32> = golden.prompt.iter().chain(&golden.greedy).copied().collect();
        let logits = |dtype| {
            let source = Source::Directory(repository(&path));
            let (mut backend, model) = load(cpu(Isa::detect()), &source, dtype);
            let mut sequence = Sequence::new(&mut backend, &model, golden.prompt.len(), tokens.len());
            feed_in_chunks(&mut sequence, &tokens, 64)
        };
        let (exact, rounded) = (logits(DType::F32), logits(dtype));
        exact.iter().zip(&rounded).for_each(|(e, r)| found.add(e, r));
    }
    println!(
        "{dtype}: mean KL {:.2e}, max {:.2e}, top-1 {:.4}",
        found.kl_mean(),
        found.kl_max,
        found.agreement()
    );
    found
}

#[test]
fn bf16_stays_near_f32() {
    let found = divergence(DType::Bf16);
    // Measured with AVX-512: mean 4.9e-4 nat, max 1.5e-2 nat, top-1 0.992.
    assert!(found.kl_mean() < 1e-3 && found.kl_max < 4e-2 && found.agreement() > 0.98, "{found:?}");
}

#[test]
fn f16_stays_near_f32() {
    let found = divergence(DType::F16);
    // Measured with AVX-512: mean 4.8e-6 nat, max 2.1e-4 nat, top-1 0.9997.
    assert!(found.kl_mean() < 1e-5 && found.kl_max < 5e-4 && found.agreement() > 0.999, "{found:?}");
}
