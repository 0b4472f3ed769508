//! A model file: opened and checked once, then cut into slices. It holds no weights of its own:
//! they stay in the map until a backend reads its rank's rows.
//!
//! Called by the session and by backends while they load.

mod bytes;
mod config;
mod cursor;
mod dequantize;
mod description;
pub mod fault;
mod fingerprint;
pub mod gguf;
mod kept;
pub mod metadata;
mod slice;
pub mod synthetic;
mod tokenizer;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

pub use bytes::FileBytes;
pub use config::Error as ConfigError;
pub use description::Description;
pub use kept::Kept;
pub use slice::Slice;
pub use tokenizer::{Error as TokenizerError, Token};

use evener_kernels::quant::Format;

use crate::model::config::ModelConfig;
use crate::model::program::{Program, Weight};
use crate::model::{families, shard};

use gguf::Gguf;

/// A checked model file.
#[derive(Debug)]
pub struct Checkpoint {
    pub config: ModelConfig,
    pub description: Description,
    /// Tensors of the file that the model does not use, but for known harmless ones.
    pub unused_tensors: Vec<String>,
    gguf: Gguf,
    kept: Kept,
}

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Refused { path: PathBuf, reason: Box<Error> },
    #[error(transparent)]
    Synthetic(#[from] synthetic::Error),
    #[error(transparent)]
    Malformed(#[from] fault::Malformed),
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error("tensor `{tensor}` is missing")]
    MissingTensor { tensor: String },
    #[error("tensor `{tensor}` is {got:?} (rows, columns); the model needs {expected:?}")]
    TensorShape { tensor: String, got: [usize; 2], expected: [usize; 2] },
    #[error(
        "none of the matrices is in F32, F16 or BF16, so there is nothing to keep in fp8; take a file \
         in one of these, or leave out --weights fp8"
    )]
    NothingToRound,
    #[error("data of tensor `{tensor}`: block {block} of row {row} is not finite")]
    NotFinite { tensor: String, row: usize, block: usize },
}

impl Checkpoint {
    /// Maps a file and checks everything but the weights themselves; reads no tensor data, but for
    /// a few MiB of samples for the fingerprint. A path may also be the name of a
    /// [`synthetic`] model.
    ///
    /// # Errors
    /// What is wrong and where, with the path.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (bytes, kept) = match path.to_str().filter(|text| text.starts_with(synthetic::SCHEME)) {
            Some(name) => {
                let spec = name.parse::<synthetic::Spec>()?;
                (spec.bytes(), spec.mix.kept())
            }
            None => (FileBytes::map(path), Kept::AsStored),
        };
        let bytes = bytes.map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
        Self::from_bytes(bytes)
            .and_then(|checkpoint| checkpoint.keep(kept))
            .map_err(|reason| Error::Refused { path: path.to_owned(), reason: Box::new(reason) })
    }

    /// [`Self::open`], then [`Self::keep`].
    ///
    /// # Errors
    /// As of either.
    pub fn open_and_keep(path: &Path, kept: Kept) -> Result<Self, Error> {
        Self::open(path)?
            .keep(kept)
            .map_err(|reason| Error::Refused { path: path.to_owned(), reason: Box::new(reason) })
    }

    /// The same from bytes at hand.
    ///
    /// # Errors
    /// What is wrong and where.
    pub fn from_bytes(bytes: FileBytes) -> Result<Self, Error> {
        let gguf = Gguf::parse(bytes)?;
        let config = config::read(&gguf)?;
        let split = shard::split(&config, &[1]).expect("one rank can hold any model");
        let program = families::compile(&config, &split, 0);
        check_program(&gguf, &program)?;
        let unused_tensors = unused_tensors(&gguf, &program);
        let description = description::read(&gguf, &config)?;
        Ok(Self { config, description, unused_tensors, gguf, kept: Kept::AsStored })
    }

    /// The same file, with weights kept so: another model, of another fingerprint and other sizes.
    /// One whose weights are rounded already stays as it is.
    ///
    /// # Errors
    /// There is nothing to round.
    pub fn keep(mut self, kept: Kept) -> Result<Self, Error> {
        if kept == Kept::AsStored || self.kept == kept {
            return Ok(self);
        }
        let split = shard::split(&self.config, &[1]).expect("one rank can hold any model");
        let program = families::compile(&self.config, &split, 0);
        let mut spared = 0;
        for weight in &program.weights {
            let tensor = self.gguf.tensor(&weight.tensor).expect("`from_bytes` found it");
            let format = kept.format_of(tensor.format, weight.role);
            spared += tensor.bytes.len() as i64 - kept::bytes_in(format, tensor) as i64;
        }
        if spared == 0 {
            return Err(Error::NothingToRound);
        }
        self.kept = kept;
        let description = &mut self.description;
        description.weight_bytes = description.weight_bytes.saturating_add_signed(-spared);
        description.fingerprint = kept.fingerprint(&description.fingerprint);
        description.quantization = Format::Fp8.name().to_owned();
        Ok(self)
    }

    /// Whether every tensor the program needs is there and has the shape it expects. `open` does it
    /// for the whole model.
    ///
    /// # Errors
    /// The first tensor that is missing or of another shape.
    pub fn check_program(&self, program: &Program) -> Result<(), Error> {
        check_program(&self.gguf, program)
    }

    /// What a rank holds of a tensor.
    ///
    /// # Errors
    /// The tensor is missing or of another shape.
    ///
    /// # Panics
    /// The weight's rows or columns are outside its shape.
    pub fn slice(&self, weight: &Weight) -> Result<Slice<'_>, Error> {
        Slice::new(&self.gguf, weight, self.kept)
    }

    /// The file as it is.
    #[must_use]
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }
}

fn check_program(gguf: &Gguf, program: &Program) -> Result<(), Error> {
    let check = |weight| Slice::new(gguf, weight, Kept::AsStored).map(drop);
    program.weights.iter().try_for_each(check)
}

fn unused_tensors(gguf: &Gguf, program: &Program) -> Vec<String> {
    let used: HashSet<&str> = program.weights.iter().map(|weight| weight.tensor.as_str()).collect();
    let is_unused = |name: &&str| {
        // Converters of old wrote the rotary frequencies that the formula gives anyway.
        !used.contains(name)
            && !name.ends_with("attn_rot_embd")
            && !name.ends_with("rotary_emb.inv_freq")
    };
    let names = gguf.tensors().iter().map(|tensor| tensor.name.as_str());
    names.filter(is_unused).map(fault::printable).collect()
}
