//! Every architecture and option against `transformers` in f32: logits and 256 greedy tokens of tiny random models.

mod common;

use common::{Sequence, argmax, load, repository};
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

#[test]
fn logits_and_tokens_are_those_of_transformers() {
    let mut names: Vec<String> = std::fs::read_dir(repository("xtask/golden/models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() > 20, "fixtures are missing: {names:?}");
    for name in names {
        check(&name);
    }
}

fn check(name: &str) {
    let path = format!("xtask/golden/models/{name}");
    let golden = Golden::read(&path);
    let (mut backend, model) = load(&Source::Directory(repository(&path)));
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
fn feed_in_chunks(sequence: &mut Sequence, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        logits.extend(sequence.feed(tokens, &rows));
    }
    logits
}
