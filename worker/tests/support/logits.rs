//! Sequences of tokens, what an oracle makes of them, and how near the logits of two runs are.

use std::io::Cursor;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

/// Sequences of so many tokens that a tiny model knows.
pub fn sequences(lens: &[usize]) -> Vec<Vec<u32>> {
    let token = |sequence: usize, at: usize| ((at * 37 + sequence * 11 + at * at) % 260) as u32;
    lens.iter().enumerate().map(|(s, &len)| (0..len).map(|at| token(s, at)).collect()).collect()
}

/// The oracle's logits of every position of a prompt: candle-transformers' Llama, or Mixtral, on the same
/// file.
pub fn oracle(file: &[u8], prompt: &[u32]) -> Vec<f32> {
    let mut reader = Cursor::new(file);
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let step = |(position, &token): (usize, &u32)| {
        let input = Tensor::from_vec(vec![token], (1, 1), &Device::Cpu).unwrap();
        model.forward(&input, position).unwrap().to_vec2::<f32>().unwrap().remove(0)
    };
    prompt.iter().enumerate().flat_map(step).collect()
}

/// Asserts that no logit is further off than `tolerance` of the largest of its sequence.
pub fn compare(want: &[Vec<f32>], got: &[Vec<f32>], tolerance: f32, about: &str) {
    for (want, got) in want.iter().zip(got) {
        assert_eq!(want.len(), got.len());
        let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
        assert!(largest > 0.1, "logits of next to nothing show nothing");
        let worst = want.iter().zip(got).map(|(want, got)| (want - got).abs());
        let worst = worst.fold(0f32, |max, x| if x > max || x.is_nan() { x } else { max });
        assert!(worst <= tolerance * largest, "{about}: off by {worst} of {largest}");
    }
}
