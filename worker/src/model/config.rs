//! The shape of a model, checked once: everything downstream may divide by these numbers.
//!
//! Built by `checkpoint` from a file's metadata. What Evener does not know is refused there, never
//! guessed.

/// Activations are quantised in blocks of this many columns; every split falls on a multiple of it.
pub const BLOCK: usize = 32;

/// Which file of `families/` compiles it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mixtral,
}

/// The shape of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// Columns of the residual stream, a multiple of [`BLOCK`].
    pub hidden: usize,
    pub n_layers: usize,
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    pub n_kv_heads: usize,
    /// Columns of one head, a multiple of [`BLOCK`].
    pub head_dim: usize,
    /// Columns between gate/up and down, a multiple of [`BLOCK`].
    pub ffn: usize,
    /// Rows of embedding and head.
    pub vocab: usize,
    /// Most tokens of one sequence.
    pub context_length: usize,
    pub norm_eps: f32,
    pub rope: Rope,
    /// The head is the embedding table.
    pub tied_head: bool,
    /// Of a layer's FFN, if it has several to choose from.
    pub experts: Option<Experts>,
}

/// The FFNs of a layer, each of `ModelConfig::ffn` columns, of which a token takes a few (Shazeer et
/// al. 2017, "Outrageously large neural networks").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    pub n: usize,
    /// That one token takes.
    pub n_used: usize,
    /// One tensor holds a kind of matrix of all experts, below each other, or each is its own.
    pub are_stacked: bool,
}

impl Experts {
    /// Most of a layer.
    pub const MAX: usize = 1024;
    /// Most that one token takes.
    pub const MAX_USED: usize = 32;
}

/// Rotary position embedding (Su et al. 2021, RoFormer, section 3.2.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f32,
    /// Columns of a head that rotate, even.
    pub dim: usize,
    pub pairs: RopePairs,
}

/// Which columns form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// (0, 1), (2, 3), ...: GGUF's "norm" order, used by Llama files.
    Adjacent,
    /// (0, d/2), (1, d/2 + 1), ...: "neox" order.
    Halves,
}

/// Why a shape cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{what} is {got}; it must be at least 1")]
    Zero { what: &'static str, got: usize },
    #[error("{what} is {got}; it must be a multiple of {of}")]
    NotMultiple { what: &'static str, got: usize, of: usize },
    #[error("{what} is {got}; at most {max} is allowed")]
    TooLarge { what: &'static str, got: usize, max: usize },
    #[error("{what} is {got}; it must be a finite number above zero")]
    NotPositive { what: &'static str, got: String },
}

impl ModelConfig {
    /// Checks every relation that the rest of the worker relies on.
    ///
    /// # Errors
    /// The first number that cannot be served, with what would be allowed.
    pub fn check(&self) -> Result<(), Error> {
        // Bounds that no real model reaches; they keep a corrupt header from asking for terabytes.
        let sizes = [
            ("hidden size", self.hidden, 1 << 17),
            ("layer count", self.n_layers, 1 << 10),
            ("head count", self.n_heads, 1 << 12),
            ("kv head count", self.n_kv_heads, 1 << 12),
            ("head size", self.head_dim, 1 << 12),
            ("ffn size", self.ffn, 1 << 19),
            ("vocabulary size", self.vocab, 1 << 22),
            ("context length", self.context_length, 1 << 24),
        ];
        for (what, got, max) in sizes {
            if got == 0 {
                return Err(Error::Zero { what, got });
            }
            if got > max {
                return Err(Error::TooLarge { what, got, max });
            }
        }
        if let Some(Experts { n, n_used, .. }) = self.experts {
            let sizes = [
                ("expert count", n, Experts::MAX),
                ("used experts", n_used, n.min(Experts::MAX_USED)),
            ];
            for (what, got, max) in sizes {
                if got == 0 {
                    return Err(Error::Zero { what, got });
                }
                if got > max {
                    return Err(Error::TooLarge { what, got, max });
                }
            }
        }
        let multiples = [
            ("hidden size", self.hidden, BLOCK),
            ("head size", self.head_dim, BLOCK),
            ("ffn size", self.ffn, BLOCK),
            ("head count", self.n_heads, self.n_kv_heads),
            ("rope dimension", self.rope.dim, 2),
        ];
        for (what, got, of) in multiples {
            if got % of != 0 {
                return Err(Error::NotMultiple { what, got, of });
            }
        }
        if self.rope.dim > self.head_dim {
            return Err(Error::TooLarge {
                what: "rope dimension",
                got: self.rope.dim,
                max: self.head_dim,
            });
        }
        for (what, value) in [("norm epsilon", self.norm_eps), ("rope theta", self.rope.theta)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::NotPositive { what, got: value.to_string() });
            }
        }
        Ok(())
    }

    /// Query heads that share one KV head.
    #[must_use]
    pub fn heads_per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Columns of one leaf of the down projection's fixed summation tree: the coarsest of a few
    /// sizes that divides the FFN. Coarse leaves cost less in the kernel, fine ones allow finer
    /// shares: 256 columns where they are 4 % of the FFN at most, 128 are up to 8 % of the models
    /// served.
    #[must_use]
    pub fn ffn_leaf(&self) -> usize {
        let leaves: &[usize] = if self.ffn >= 25 * 256 { &[256, 128, 64] } else { &[128, 64] };
        leaves.iter().copied().find(|leaf| self.ffn.is_multiple_of(*leaf)).unwrap_or(BLOCK)
    }
}
