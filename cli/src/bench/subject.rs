//! What is measured: model files and models of random weights, each with what a step of it demands.

use std::path::PathBuf;

use anyhow::{Context, bail};
use evener_proto::KvFormat;
use evener_worker::checkpoint::Checkpoint;
use evener_worker::checkpoint::synthetic::{Mix, SCHEME, Shape, Spec};
use evener_worker::measure::Demand;

use crate::models;
use crate::up::available_memory;
use crate::values::Bytes;

/// What a step's buffers, the KV cache, the processes and the buffer that bandwidth is measured with
/// may need beside the weights.
const BESIDE_WEIGHTS: u64 = 2560 << 20;

/// A model to measure.
#[derive(Debug, Clone)]
pub struct Subject {
    /// What `--model` of a worker takes.
    pub model: String,
    /// The file, if it is one.
    pub file: Option<PathBuf>,
    /// What people should know of it: that it has fewer layers than its shape.
    pub note: Option<String>,
    pub demand: Demand,
    pub vocab: u32,
    pub context_length: usize,
    pub quantization: String,
}

/// The models that the options name, files first.
///
/// # Errors
/// A name that means nothing, or a file that cannot be served.
pub fn all(
    models: &[String],
    shapes: &[String],
    formats: &[String],
    layers: Option<usize>,
    kv: KvFormat,
) -> anyhow::Result<Vec<Subject>> {
    let open = |model, file, note| Subject::open(model, file, note, kv);
    let mut subjects = Vec::new();
    for model in models {
        let path = models::resolve(model)?;
        let is_file = !model.starts_with(SCHEME);
        subjects.push(open(path.display().to_string(), is_file.then_some(path), None)?);
    }
    for shape in shapes {
        for format in formats {
            let (spec, note) = fitted(shape.parse()?, format.parse()?, layers)?;
            subjects.push(open(spec.to_string(), None, note)?);
        }
    }
    if subjects.is_empty() {
        bail!(
            "nothing to measure is named; give --model PATH, --synthetic {}, or --kernels",
            Shape::ALL.map(|shape| shape.name).join("|")
        );
    }
    Ok(subjects)
}

/// The shape with as many layers as were asked for, or as memory holds.
fn fitted(shape: Shape, mix: Mix, layers: Option<usize>) -> anyhow::Result<(Spec, Option<String>)> {
    let with = |n_layers| Spec { shape, mix, n_layers };
    if let Some(n) = layers {
        let name = format!("{SCHEME}{}:{mix}:{n}", shape.name);
        return Ok((name.parse()?, None));
    }
    let available = available_memory().unwrap_or(u64::MAX);
    let fits = |n_layers: &usize| {
        with(*n_layers).weight_bytes().saturating_add(BESIDE_WEIGHTS) <= available / 10 * 9
    };
    match (1..=shape.n_layers).rev().find(fits) {
        Some(n) if n == shape.n_layers => Ok((with(n), None)),
        Some(n) => {
            let (all, room) = (shape.n_layers, Bytes(available));
            Ok((with(n), Some(format!("{n} of {all} layers, as many as {room} of memory hold"))))
        }
        None => bail!(
            "not even one layer of {} in {mix} fits: it needs {} and {} are available",
            shape.name,
            Bytes(with(1).weight_bytes() + BESIDE_WEIGHTS),
            Bytes(available)
        ),
    }
}

impl Subject {
    fn open(
        model: String,
        file: Option<PathBuf>,
        note: Option<String>,
        kv: KvFormat,
    ) -> anyhow::Result<Self> {
        let path = PathBuf::from(&model);
        let checkpoint = Checkpoint::open(&path).context("the model cannot be served")?;
        Ok(Self {
            model,
            file,
            note,
            demand: Demand::of(&checkpoint, kv),
            vocab: checkpoint.config.vocab as u32,
            context_length: checkpoint.config.context_length,
            quantization: checkpoint.description.quantization.clone(),
        })
    }

    /// Writes the model to a GGUF file; from then on that file is measured.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&mut self, path: PathBuf) -> anyhow::Result<()> {
        let checkpoint = Checkpoint::open(&PathBuf::from(&self.model))?;
        std::fs::write(&path, checkpoint.gguf().bytes())
            .with_context(|| format!("the model cannot be written to {}", path.display()))?;
        self.model = path.display().to_string();
        self.file = Some(path);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(shapes: &[&str], formats: &[&str], layers: Option<usize>) -> Vec<String> {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let subjects = all(&[], &owned(shapes), &owned(formats), layers, KvFormat::F16).unwrap();
        subjects.into_iter().map(|subject| subject.model).collect()
    }

    #[test]
    fn each_shape_is_measured_in_each_format() {
        let names = names(&["llama-tiny"], &["q4_0", "bf16"], None);
        assert_eq!(names, ["synthetic:llama-tiny:q4_0", "synthetic:llama-tiny:bf16"]);
    }

    #[test]
    fn layers_are_as_many_as_asked_for_or_as_fit() {
        assert_eq!(names(&["llama-tiny"], &["q8_0"], Some(1)), ["synthetic:llama-tiny:q8_0:1"]);
        let huge = fitted("llama-70b".parse().unwrap(), "f32".parse().unwrap(), None);
        // 70 billion floats are 280 GB: this machine has less, or holds them all.
        match huge {
            Ok((spec, note)) => assert_eq!(spec.n_layers < 80, note.is_some()),
            Err(error) => assert!(error.to_string().contains("not even one layer")),
        }
    }

    #[test]
    fn the_demand_of_a_step_leaves_the_embedding_out() {
        let subjects =
            all(&[], &["llama-1b".to_owned()], &["q8_0".to_owned()], Some(2), KvFormat::F16)
                .unwrap();
        let demand = subjects[0].demand;
        let layer = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192);
        assert_eq!(demand.layer_weights, 2 * layer);
        assert_eq!(demand.head_weights, 49_152 * 2048);
        let vectors = 4 * 2048 * 5;
        assert_eq!(demand.step_bytes, (2 * layer + 49_152 * 2048) / 32 * 34 + vectors);
    }
}
