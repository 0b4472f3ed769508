//! Synthetic models are models: every format loads like a file, and gives the same bits whatever
//! the split.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use evener_worker::checkpoint::Checkpoint;
use evener_worker::checkpoint::synthetic::{Mix, SCHEME};

use support::group::Group;

fn open(mix: Mix) -> Checkpoint {
    Checkpoint::open(Path::new(&format!("{SCHEME}llama-tiny:{mix}"))).unwrap()
}

#[test]
fn every_format_gives_finite_logits_that_do_not_depend_on_the_split() {
    let prompt: Vec<u32> = (0..9).map(|i| 7 + 31 * i).collect();
    for mix in Mix::all() {
        let checkpoint = open(mix);
        let logits = |shares: &[u32]| {
            let group = Group { shares, chunk: 4, ..Group::default() };
            group.logits(&checkpoint, &[&prompt]).remove(0)
        };
        let (whole, split) = (logits(&[1]), logits(&[1, 1]));
        let spread = (whole.iter().map(|v| v * v).sum::<f32>() / whole.len() as f32).sqrt();
        assert!((0.1..10.0).contains(&spread), "{mix}: logits are spread by {spread}");
        let is_same = whole.iter().zip(&split).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(is_same && whole.len() == split.len(), "{mix}: two ranks give other bits than one");
    }
}

#[test]
fn two_openings_are_the_same_model_and_another_format_is_another() {
    let of = |mix| open(mix).description.fingerprint;
    let mixes: Vec<Mix> = Mix::all().collect();
    assert_eq!(of(mixes[3]), of(mixes[3]));
    assert_ne!(of(mixes[3]), of(mixes[4]));
}

#[test]
fn nothing_but_its_length_ends_an_answer() {
    let description = open(Mix::Q4KM).description;
    assert!(description.eos_token_ids.is_empty());
    assert_eq!(description.quantization, "Q4_K_M");
    assert_eq!(description.vocab, 512);
}
